"""Charts as pure functions: arrays in, a Plotly figure dictionary out; the same in a notebook, a page and a report."""

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
from orthokit.figures.gap import gap_by_beta, gap_heatmap
from orthokit.figures.intervals import mean_interval, t_quantile
from orthokit.figures.momentum import (
    alignment_by_beta,
    alignment_by_checkpoint,
    noise_suppression,
    projection_arrows,
    subspace_error,
)
from orthokit.figures.spectra import coefficient_map, spectra, spectrum_bars, spectrum_heatmap, spectrum_ratio
from orthokit.figures.template import COLOURS, DASHES, DIVERGING, FONT, SEQUENTIAL, SYMBOLS, TEMPLATE

__all__ = [
    "COLOURS",
    "DASHES",
    "DIVERGING",
    "FONT",
    "RENDERERS",
    "SEQUENTIAL",
    "SYMBOLS",
    "TEMPLATE",
    "Shown",
    "alignment_by_beta",
    "alignment_by_checkpoint",
    "browser_path",
    "coefficient_map",
    "energy_by_dimension",
    "energy_by_matrix",
    "energy_change",
    "energy_pairs",
    "figure_json",
    "gap_by_beta",
    "gap_heatmap",
    "loss_curves",
    "mean_interval",
    "noise_suppression",
    "png",
    "projection_arrows",
    "scalar_history",
    "set_renderer",
    "show",
    "spectra",
    "spectrum_bars",
    "spectrum_heatmap",
    "spectrum_ratio",
    "sphere",
    "subspace_error",
    "t_quantile",
    "without_caption",
]
