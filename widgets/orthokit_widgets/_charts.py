"""Charts of the pages, made from those of :mod:`orthokit.figures`: smoothed, thinned, with steady scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.figures import loss_curves, projection_arrows, scalar_history, spectrum_heatmap
from orthokit_widgets.training_run import RANK

__all__ = ["arrows", "history", "live_spectrum", "losses", "most", "short", "smooth", "thin"]

#: Most points of a line, and of all lines of a chart together: more cost time and show nothing.
MAX_POINTS, MAX_TOTAL = 1000, 1500
# A picture of at most this many cells: 5 a second have to be drawn.
_COLUMNS, _ROWS = 120, 64
_DECADES = 2.5
_PAIR = f"σ<sub>{RANK}</sub> {{}} σ<sub>{RANK + 1}</sub>"
_AXES = {
    "gap": (f"gap {_PAIR.format('−')}", "How wide is the momentum's gap?"),
    "gap_ratio": (f"ratio {_PAIR.format('/')}", "How wide is the momentum's gap, as a ratio?"),
    "energy": ("energy above random", "Do the neurons stay spread out?"),
    "stable_rank": ("stable rank", "How many directions does the weight use?"),
    "alignment": ("alignment", "Does the update follow the slow signal?"),
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


def short(names: list[str]) -> list[str]:
    """Names of runs without the parts, between hyphens, that all of them end with; unchanged if there is only one.

    Example:
        >>> short(["muon-pre-1M-digits", "adamw-1M-digits"])
        ['muon-pre', 'adamw']
    """
    parts = [name.split("-") for name in names]
    while len(names) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return ["-".join(part) for part in parts]


def most(lines: int) -> int:
    """Most points of each of so many lines."""
    return min(MAX_POINTS, max(150, MAX_TOTAL // lines))


def thin(steps: np.ndarray, values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points, the first and the last among them."""
    if len(steps) <= limit:
        return steps, values
    chosen = np.unique(np.linspace(0, len(steps) - 1, limit).round().astype(int))
    return steps[chosen], values[chosen]


def arrows(points: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Arrows from the origin in a wide, low frame: the long direction lies flat, angles are true.

    Args:
        points: Label to lengths along the signal and across it.

    Returns:
        A Plotly figure as a dictionary.
    """
    flat = {label: (across, along) for label, (along, across) in points.items()}
    figure = projection_arrows(flat, xlabel="length across the signal", ylabel="along it")
    layout = figure["layout"]
    far, high = (max(abs(pair[i]) for pair in flat.values()) or 1.0 for i in (0, 1))
    low = min(0.0, *(pair[1] for pair in flat.values()))
    layout["xaxis"]["range"] = [-0.03 * far, 1.05 * far]
    layout["yaxis"]["range"] = [1.2 * low - 0.1 * high, 1.25 * high]
    # The plot gives way by showing more, not by shrinking.
    layout["yaxis"].pop("constrain", None)
    for head in layout["annotations"]:
        # The head belongs to the whole arrow: plotly leaves out the heads of arrows of a few pixels.
        head |= {"ax": 0, "ay": 0}
    return figure


def losses(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Training losses over each other, averaged over the last fortieth of the longest run.

    Args:
        curves: Run to steps and losses, not empty.

    Returns:
        A Plotly figure as a dictionary.
    """
    window = max(1, max(len(steps) for steps, _ in curves.values()) // 40)
    pairs = zip(short(list(curves)), curves.values(), strict=True)
    lines = {name: thin(steps, smooth(values, window), most(len(curves))) for name, (steps, values) in pairs}
    figure = loss_curves(lines, ylabel="training loss (nats)", title="How fast does the loss fall?")
    if window > 1:
        figure["layout"]["meta"]["caption"] += f" Each point is the mean of {window} steps."
    return figure


def history(series: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, quantity: str) -> dict[str, Any]:
    """What the monitor measured of one matrix, run by run.

    Args:
        series: Run to steps and values, not empty; a run without values keeps its place, and so its colour.
        quantity: Name of the quantity.

    Returns:
        A Plotly figure as a dictionary.
    """
    label, question = _AXES[quantity]
    missing = ([0], [math.nan])
    pairs = {
        name: pair if pair[0] else missing for name, pair in zip(short(list(series)), series.values(), strict=True)
    }
    limit = most(len(pairs))
    lines = {name: thin(np.asarray(at), np.asarray(values, dtype=float), limit) for name, (at, values) in pairs.items()}
    positive = all((values[np.isfinite(values)] > 0).all() for _, values in lines.values())
    figure = scalar_history(lines, ylabel=label, title=question, log=quantity == "gap" and positive)
    figure["layout"]["yaxis"]["exponentformat"] = "power"
    if any("marker" not in trace for trace in figure["data"]):  # a long line has none: all alike
        for trace in figure["data"]:
            trace["mode"] = "lines"
            trace.pop("marker", None)
    return figure


def live_spectrum(steps: Sequence[int], spectra: Sequence[np.ndarray], *, matrix: str, of: str) -> dict[str, Any]:
    """Singular values of one matrix over training; the colours move in whole quarter decades only.

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
    top = math.ceil(4 * math.log10(max(float(max(spectrum[0] for spectrum in spectra)), 1e-30))) / 4
    name = matrix.removesuffix(".weight") if of == "spectrum" else f"the momentum of {matrix.removesuffix('.weight')}"
    where = np.asarray(steps)[columns]
    figure = spectrum_heatmap(where, kept[:, rows], name=name, zmin=top - _DECADES, zmax=top)
    figure["data"][0]["y"] = (rows + 1).tolist()
    figure["layout"]["title"]["text"] = f"How does the spectrum of {name} move?"
    return figure
