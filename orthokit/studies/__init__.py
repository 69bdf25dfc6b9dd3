"""Studies that need many seeds: run once with ``orthokit study``, kept under ``evidence/``, shown by the notebooks."""

from __future__ import annotations

from orthokit.studies import arena_claims as _arena_claims
from orthokit.studies import arena_correlations as _arena_correlations
from orthokit.studies import arena_results as _arena_results
from orthokit.studies import arena_study as _arena_study
from orthokit.studies import arena_ways as _arena_ways
from orthokit.studies import checkpoint_changes as _checkpoint_changes
from orthokit.studies import checkpoint_claims as _checkpoint_claims
from orthokit.studies import checkpoint_geometry as _checkpoint_geometry
from orthokit.studies import continual as _continual
from orthokit.studies import continual_results as _continual_results
from orthokit.studies import dual_anchors as _dual_anchors
from orthokit.studies import live_anchors as _live_anchors
from orthokit.studies import live_merges as _live_merges
from orthokit.studies import merging_claims as _merging_claims
from orthokit.studies import merging_published as _merging_published
from orthokit.studies import merging_results as _merging_results
from orthokit.studies import merging_study as _merging_study
from orthokit.studies import representation as _representation
from orthokit.studies import representation_phases as _representation_phases
from orthokit.studies import representation_results as _representation_results
from orthokit.studies import representation_study as _representation_study
from orthokit.studies import safe_steps as _safe_steps
from orthokit.studies import training_spectra as _training_spectra
from orthokit.studies._catalogue import STUDIES, names, run
from orthokit.studies._engine import Study, evidence_root, evidence_stamp, load_evidence
from orthokit.studies.adapter_claims import ADAPTER_DUELS, AdapterDuel, adapter_margins, oftv2_costs, oftv2_widest
from orthokit.studies.adapter_geometry import what_is_kept
from orthokit.studies.adapter_probes import adapted_at, kept_at, merge_gap, orthogonality_at, requantised_at
from orthokit.studies.adapter_results import (
    adapter_costs,
    adapter_curves,
    adapter_differences,
    adapter_finals,
    adapter_live,
    adapter_rates,
    adapter_settings,
    adapter_summary,
    adapter_trade,
    adapters_by_budget,
    adapters_kept,
    best_rates_by_block,
    block_exponents,
)
from orthokit.studies.adapter_study import ADAPTERS
from orthokit.studies.adapters import ADAPTER_METHODS, ADAPTER_TRACKS, adapt_once, adapter_budget
from orthokit.studies.arena_claims import *  # noqa: F403
from orthokit.studies.arena_correlations import *  # noqa: F403
from orthokit.studies.arena_results import *  # noqa: F403
from orthokit.studies.arena_study import *  # noqa: F403
from orthokit.studies.arena_ways import *  # noqa: F403
from orthokit.studies.checkpoint_changes import *  # noqa: F403
from orthokit.studies.checkpoint_claims import *  # noqa: F403
from orthokit.studies.checkpoint_geometry import *  # noqa: F403
from orthokit.studies.coefficients import (
    compare_recipes,
    head_split,
    mean_miss,
    orthogonality,
    relative_to,
    reported_step,
    scalar_maps,
    scale_rules,
    start_ranges,
    step_length,
    train_recipes,
    values_after,
)
from orthokit.studies.continual import *  # noqa: F403
from orthokit.studies.continual_results import *  # noqa: F403
from orthokit.studies.dual_anchors import *  # noqa: F403
from orthokit.studies.energy import energies, energy_changes, spread_on_sphere
from orthokit.studies.live_anchors import *  # noqa: F403
from orthokit.studies.live_merges import *  # noqa: F403
from orthokit.studies.maps import (
    LiveErrors,
    adviser_table,
    error_curves,
    live_drift,
    live_errors,
    parity_errors,
    plane_curves,
    planes_at_norms,
    simulate_merges,
)
from orthokit.studies.merging_claims import *  # noqa: F403
from orthokit.studies.merging_published import *  # noqa: F403
from orthokit.studies.merging_results import *  # noqa: F403
from orthokit.studies.merging_study import *  # noqa: F403
from orthokit.studies.optimizer_race import TRACKS, Track, enter, race_once
from orthokit.studies.pion import (
    PION_DRIFT,
    PION_DRIFT_VARIANTS,
    PION_RIVALS,
    compare_geometries,
    drift_histories,
    drift_history,
    gradient_split,
    rivals_without_norms,
    spectra_after_training,
    strip_norms,
)
from orthokit.studies.pipelines import (
    ORDERS,
    at_rates,
    best_lr,
    compare_optimizers,
    curves,
    final_values,
    race,
    rate_curves,
    train_pipeline,
)
from orthokit.studies.poet import (
    DRIFT_VARIANTS,
    POET_METHODS,
    POET_STUDY,
    compare_methods,
    drift_curves,
    identity_errors,
    initial_norms,
    merge_schedules,
    spectrum_along_training,
    train_method,
    train_poet,
)
from orthokit.studies.poet_memory import (
    LAYER_KINDS,
    LLAMA,
    layer_bytes,
    memory_on_paper,
    memory_table,
    trainable_by_block,
)
from orthokit.studies.probe import (
    Probe,
    alignments,
    measure_probe,
    pipeline_lead,
    polar_alignment,
    probe_along_training,
)
from orthokit.studies.race_claims import PUBLISHED_DUELS, Duel, duel_margins, race_and_fit
from orthokit.studies.race_results import (
    first_updates,
    polar_overhead,
    race_costs,
    race_curves,
    race_differences,
    race_finals,
    race_live,
    race_rates,
    race_summary,
    tuned_rates,
)
from orthokit.studies.recipes import PLAIN, SPECTRA, Recipe, lab_recipes, published_recipes, with_spectrum
from orthokit.studies.representation import *  # noqa: F403
from orthokit.studies.representation_phases import *  # noqa: F403
from orthokit.studies.representation_results import *  # noqa: F403
from orthokit.studies.representation_study import *  # noqa: F403
from orthokit.studies.rotations import RotationRun, adapt_by_rotation
from orthokit.studies.safe_steps import *  # noqa: F403
from orthokit.studies.step_memory import step_bytes
from orthokit.studies.synthetic import (
    BETAS,
    PUBLISHED_RANK_3,
    compare_with_published,
    measure_gap,
    side_by_side,
)
from orthokit.studies.training_spectra import *  # noqa: F403

__all__ = [
    "ADAPTERS",
    "ADAPTER_DUELS",
    "ADAPTER_METHODS",
    "ADAPTER_TRACKS",
    "BETAS",
    "DRIFT_VARIANTS",
    "LAYER_KINDS",
    "LLAMA",
    "ORDERS",
    "PION_DRIFT",
    "PION_DRIFT_VARIANTS",
    "PION_RIVALS",
    "PLAIN",
    "POET_METHODS",
    "POET_STUDY",
    "PUBLISHED_DUELS",
    "PUBLISHED_RANK_3",
    "SPECTRA",
    "STUDIES",
    "TRACKS",
    "AdapterDuel",
    "Duel",
    "LiveErrors",
    "Probe",
    "Recipe",
    "RotationRun",
    "Study",
    "Track",
    "adapt_by_rotation",
    "adapt_once",
    "adapted_at",
    "adapter_budget",
    "adapter_costs",
    "adapter_curves",
    "adapter_differences",
    "adapter_finals",
    "adapter_live",
    "adapter_margins",
    "adapter_rates",
    "adapter_settings",
    "adapter_summary",
    "adapter_trade",
    "adapters_by_budget",
    "adapters_kept",
    "adviser_table",
    "alignments",
    "at_rates",
    "best_lr",
    "best_rates_by_block",
    "block_exponents",
    "compare_geometries",
    "compare_methods",
    "compare_optimizers",
    "compare_recipes",
    "compare_with_published",
    "curves",
    "drift_curves",
    "drift_histories",
    "drift_history",
    "duel_margins",
    "energies",
    "energy_changes",
    "enter",
    "error_curves",
    "evidence_root",
    "evidence_stamp",
    "final_values",
    "first_updates",
    "gradient_split",
    "head_split",
    "identity_errors",
    "initial_norms",
    "kept_at",
    "lab_recipes",
    "layer_bytes",
    "live_drift",
    "live_errors",
    "load_evidence",
    "mean_miss",
    "measure_gap",
    "measure_probe",
    "memory_on_paper",
    "memory_table",
    "merge_gap",
    "merge_schedules",
    "names",
    "oftv2_costs",
    "oftv2_widest",
    "orthogonality",
    "orthogonality_at",
    "parity_errors",
    "pipeline_lead",
    "plane_curves",
    "planes_at_norms",
    "polar_alignment",
    "polar_overhead",
    "probe_along_training",
    "published_recipes",
    "race",
    "race_and_fit",
    "race_costs",
    "race_curves",
    "race_differences",
    "race_finals",
    "race_live",
    "race_once",
    "race_rates",
    "race_summary",
    "rate_curves",
    "relative_to",
    "reported_step",
    "requantised_at",
    "rivals_without_norms",
    "run",
    "scalar_maps",
    "scale_rules",
    "side_by_side",
    "simulate_merges",
    "spectra_after_training",
    "spectrum_along_training",
    "spread_on_sphere",
    "start_ranges",
    "step_bytes",
    "step_length",
    "strip_norms",
    "train_method",
    "train_pipeline",
    "train_poet",
    "train_recipes",
    "trainable_by_block",
    "tuned_rates",
    "values_after",
    "what_is_kept",
    "with_spectrum",
]

__all__ += _arena_claims.__all__
__all__ += _arena_correlations.__all__
__all__ += _arena_results.__all__
__all__ += _arena_study.__all__
__all__ += _arena_ways.__all__
__all__ += _checkpoint_changes.__all__
__all__ += _checkpoint_claims.__all__
__all__ += _checkpoint_geometry.__all__
__all__ += _continual.__all__
__all__ += _continual_results.__all__
__all__ += _merging_study.__all__
__all__ += _live_anchors.__all__
__all__ += _dual_anchors.__all__
__all__ += _merging_claims.__all__
__all__ += _live_merges.__all__
__all__ += _merging_published.__all__
__all__ += _merging_results.__all__
__all__ += _representation.__all__
__all__ += _representation_phases.__all__
__all__ += _representation_results.__all__
__all__ += _representation_study.__all__
__all__ += _safe_steps.__all__
__all__ += _training_spectra.__all__
