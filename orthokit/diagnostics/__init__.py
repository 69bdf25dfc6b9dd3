"""Measurements of weights, gradients and momentum: spectra, energy, subspaces, and the theory to hold them against."""

from orthokit.diagnostics.bounds import GapBounds, gap_theorem_bounds, gap_theorem_window, wedin_bound, weyl_bounds
from orthokit.diagnostics.energy import expected_energy, hyperspherical_energy, projected_energy, simplex_energy
from orthokit.diagnostics.momentum import (
    alignment,
    beta_for_window,
    effective_samples,
    momentum_buffers,
    noise_suppression,
    pipelines,
    signal_persistence,
    spectral_gap,
    white_noise_suppression,
)
from orthokit.diagnostics.monitor import Monitor
from orthokit.diagnostics.randommatrix import (
    buffer_noise,
    noise_edge,
    polar_only_threshold,
    rank_one_alignment,
    spike_cosines,
    spike_positions,
    survival_threshold,
)
from orthokit.diagnostics.spectrum import effective_rank, low_rank_part, spectrum, stable_rank
from orthokit.diagnostics.subspace import principal_angles, subspace_error, top_subspace
from orthokit.diagnostics.synthetic import SignalPlusPerturbation, published_sigmas, published_strengths

__all__ = [
    "GapBounds",
    "Monitor",
    "SignalPlusPerturbation",
    "alignment",
    "beta_for_window",
    "buffer_noise",
    "effective_rank",
    "effective_samples",
    "expected_energy",
    "gap_theorem_bounds",
    "gap_theorem_window",
    "hyperspherical_energy",
    "low_rank_part",
    "momentum_buffers",
    "noise_edge",
    "noise_suppression",
    "pipelines",
    "polar_only_threshold",
    "principal_angles",
    "projected_energy",
    "published_sigmas",
    "published_strengths",
    "rank_one_alignment",
    "signal_persistence",
    "simplex_energy",
    "spectral_gap",
    "spectrum",
    "spike_cosines",
    "spike_positions",
    "stable_rank",
    "subspace_error",
    "survival_threshold",
    "top_subspace",
    "wedin_bound",
    "weyl_bounds",
    "white_noise_suppression",
]
