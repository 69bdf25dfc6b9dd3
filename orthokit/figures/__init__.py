"""Charts as pure functions: arrays in, a Plotly figure dictionary out; the same in a notebook, a page and a report."""

from orthokit.figures.adapter_rates import loss_by_budget, rates_by_block, tuned_rates
from orthokit.figures.adapters import kept_and_broken, requantised, step_costs
from orthokit.figures.anchors import anchor_alignment, anchor_overlap, anchor_spectra, loss_landscape
from orthokit.figures.arena import correlation_forest, direction_profiles, distortion_scatter, layer_map
from orthokit.figures.checkpoint_spectra import density_with_law, inspection_spectra
from orthokit.figures.coefficients import accuracy_cost, before_after, scaling_ranges, table_maps
from orthokit.figures.continual import forgetting_matrices, penalty_weights
from orthokit.figures.curves import loss_curves, scalar_history
from orthokit.figures.display import (
    RENDERERS,
    Shown,
    browser_path,
    figure_json,
    png,
    set_renderer,
    show,
    without_caption,
)
from orthokit.figures.energy import energy_by_dimension, energy_by_matrix, energy_change, energy_pairs, sphere
from orthokit.figures.front import rates_and_scores, stability_plasticity, ways_back
from orthokit.figures.gap import gap_by_beta, gap_heatmap
from orthokit.figures.inspection import inspection_compare, inspection_depth, inspection_map
from orthokit.figures.intervals import mean_interval, t_quantile
from orthokit.figures.maps import error_laws, error_parity, map_adviser, merge_drift, singular_values_by_angle
from orthokit.figures.merging import MERGE_VALUES, merge_energies, merge_map
from orthokit.figures.merging_scores import merge_front, merge_scales, merge_scores
from orthokit.figures.momentum import (
    alignment_by_beta,
    alignment_by_checkpoint,
    noise_suppression,
    projection_arrows,
    subspace_error,
)
from orthokit.figures.pion import (
    drift_budget,
    rate_range,
    spectrum_kept,
    stationarity_split,
)
from orthokit.figures.poet import drift_causes, memory_modes, spectrum_drift
from orthokit.figures.race import race_curves, race_ranking, rate_sensitivity
from orthokit.figures.representation import (
    phase_forest,
    rank_after_finetuning,
    rank_and_loss,
    rank_by_layer,
    rank_phases,
)
from orthokit.figures.spectra import coefficient_map, spectra, spectrum_bars, spectrum_heatmap, spectrum_ratio
from orthokit.figures.template import COLOURS, DASHES, DIVERGING, FONT, SEQUENTIAL, SYMBOLS, TEMPLATE
from orthokit.figures.turns import error_at_angle, matrix_picture, pair_angles, spectrum_before_after

__all__ = [
    "COLOURS",
    "DASHES",
    "DIVERGING",
    "FONT",
    "MERGE_VALUES",
    "RENDERERS",
    "SEQUENTIAL",
    "SYMBOLS",
    "TEMPLATE",
    "Shown",
    "accuracy_cost",
    "alignment_by_beta",
    "alignment_by_checkpoint",
    "anchor_alignment",
    "anchor_overlap",
    "anchor_spectra",
    "before_after",
    "browser_path",
    "coefficient_map",
    "correlation_forest",
    "density_with_law",
    "direction_profiles",
    "distortion_scatter",
    "drift_budget",
    "drift_causes",
    "energy_by_dimension",
    "energy_by_matrix",
    "energy_change",
    "energy_pairs",
    "error_at_angle",
    "error_laws",
    "error_parity",
    "figure_json",
    "forgetting_matrices",
    "gap_by_beta",
    "gap_heatmap",
    "inspection_compare",
    "inspection_depth",
    "inspection_map",
    "inspection_spectra",
    "kept_and_broken",
    "layer_map",
    "loss_by_budget",
    "loss_curves",
    "loss_landscape",
    "map_adviser",
    "matrix_picture",
    "mean_interval",
    "memory_modes",
    "merge_drift",
    "merge_energies",
    "merge_front",
    "merge_map",
    "merge_scales",
    "merge_scores",
    "noise_suppression",
    "pair_angles",
    "penalty_weights",
    "phase_forest",
    "png",
    "projection_arrows",
    "race_curves",
    "race_ranking",
    "rank_after_finetuning",
    "rank_and_loss",
    "rank_by_layer",
    "rank_phases",
    "rate_range",
    "rate_sensitivity",
    "rates_and_scores",
    "rates_by_block",
    "requantised",
    "scalar_history",
    "scaling_ranges",
    "set_renderer",
    "show",
    "singular_values_by_angle",
    "spectra",
    "spectrum_bars",
    "spectrum_before_after",
    "spectrum_drift",
    "spectrum_heatmap",
    "spectrum_kept",
    "spectrum_ratio",
    "sphere",
    "stability_plasticity",
    "stationarity_split",
    "step_costs",
    "subspace_error",
    "t_quantile",
    "table_maps",
    "tuned_rates",
    "ways_back",
    "without_caption",
]
