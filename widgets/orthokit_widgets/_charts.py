"""Charts of the live page, made from those of :mod:`orthokit.figures`: smoothed, thinned, with steady scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.figures import loss_curves, scalar_history, spectrum_heatmap
from orthokit_widgets.training_run import RANK

__all__ = ["history", "live_spectrum", "losses", "smooth", "thin"]

#: Most points of a line: more cost the browser time and show nothing.
MAX_POINTS = 1000
# A picture of at most this many cells: 5 a second have to be drawn.
_COLUMNS, _ROWS = 120, 64
_DECADES = 2.5
_AXES = {
    "gap": (f"gap σ{RANK} − σ{RANK + 1} of the momentum", "How wide is the momentum's gap?"),
    "gap_ratio": (f"ratio σ{RANK} / σ{RANK + 1} of the momentum", "How wide is the momentum's gap, as a ratio?"),
    "energy": ("hyperspherical energy above random", "Do the neurons stay spread out?"),
    "stable_rank": ("stable rank of the weight", "How many directions does the weight use?"),
    "alignment": ("alignment with the slow signal", "Does the update follow the slow signal?"),
}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last ``window`` values at every point (fewer at the start); NaN spreads over its window only."""
    bad = ~np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(bad, 0.0, values))])
    spoilt = np.concatenate([[0], np.cumsum(bad)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    mean = (sums[end] - sums[start]) / (end - start)
    return np.where(spoilt[end] > spoilt[start], np.nan, mean)


def thin(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` points, the first and the last among them."""
    if len(steps) <= most:
        return steps, values
    chosen = np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))
    return steps[chosen], values[chosen]


def losses(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Training losses over each other, averaged over the last fortieth of the longest run.

    Args:
        curves: Run to steps and losses, not empty.

    Returns:
        A Plotly figure as a dictionary.
    """
    window = max(1, max(len(steps) for steps, _ in curves.values()) // 40)
    lines = {name: thin(steps, smooth(values, window)) for name, (steps, values) in curves.items()}
    label = "training loss (nats)" + (f", mean of {window} steps" if window > 1 else "")
    return loss_curves(lines, ylabel=label, title="How fast does the loss fall?")


def history(series: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, quantity: str) -> dict[str, Any]:
    """What the monitor measured of one matrix, run by run.

    Args:
        series: Run to steps and values, not empty.
        quantity: Name of the quantity.

    Returns:
        A Plotly figure as a dictionary.
    """
    label, question = _AXES[quantity]
    lines = {name: thin(np.asarray(steps), np.asarray(values, dtype=float)) for name, (steps, values) in series.items()}
    positive = all((values[np.isfinite(values)] > 0).all() for _, values in lines.values())
    return scalar_history(lines, ylabel=label, title=question, log=quantity == "gap" and positive)


def live_spectrum(steps: Sequence[int], spectra: Sequence[np.ndarray], *, matrix: str, of: str) -> dict[str, Any]:
    """Singular values of one matrix over training; the colours move in whole half decades only.

    Args:
        steps: Steps of the looks.
        spectra: One spectrum a look.
        matrix: Name of the matrix.
        of: ``"spectrum"`` (the weight) or ``"momentum_spectrum"``.

    Returns:
        A Plotly figure as a dictionary.
    """
    columns = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _COLUMNS)).round().astype(int))
    kept = np.stack([np.nan_to_num(np.asarray(spectra[column], dtype=float)) for column in columns])
    rows = np.unique(np.linspace(0, kept.shape[1] - 1, min(kept.shape[1], _ROWS)).round().astype(int))
    top = math.ceil(2 * math.log10(max(float(max(spectrum[0] for spectrum in spectra)), 1e-30))) / 2
    name = matrix if of == "spectrum" else f"the momentum of {matrix}"
    where = np.asarray(steps)[columns]
    figure = spectrum_heatmap(where, kept[:, rows], name=name, zmin=top - _DECADES, zmax=top)
    figure["data"][0]["y"] = (rows + 1).tolist()
    return figure
