"""Curves against training steps: loss of several pipelines with bands over seeds, and any scalar's history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import ShapeError
from orthokit.figures._check import array, named, vector
from orthokit.figures.intervals import t_quantile
from orthokit.figures.template import Number, axis, band, build, line, listing, log_axis, number

__all__ = ["loss_curves", "scalar_history"]

MAX_POINTS = 2000


def loss_curves(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    ylabel: str = "validation loss (bits per byte)",
    title: str = "Which pipeline reaches the lowest loss?",
    xlabel: str = "step",
    log_x: bool = False,
    level: Number = 0.95,
) -> dict[str, Any]:
    """Loss against step, one line per label; several seeds give the mean and its confidence band.

    Args:
        curves: Label to ``(steps, values)``: steps ``(n,)``; values ``(n,)``, or ``(seeds, n)``. A NaN (a run that
            diverged) breaks the line.
        ylabel: Name and unit of the vertical axis.
        title: The question the chart answers.
        xlabel: Name and unit of the horizontal axis, when it is not the step.
        log_x: Logarithmic horizontal axis, for values above 0.
        xlabel: Name of the horizontal axis, when it is not the step.
        log_x: Logarithmic horizontal axis, for rates.
        level: Confidence level of the band, in (0, 1). Default 0.95.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Steps and values do not fit together.

    Example:
        >>> figure = loss_curves({"Muon": ([0, 10], [[3.0, 2.0], [3.1, 2.2]]), "SGD": ([0, 10], [3.0, 2.6])})
        >>> figure["layout"]["meta"]["caption"].startswith("Lowest at the end: Muon")
        True
    """
    data, last, seeds = [], {}, 0
    for index, (label, pair) in enumerate(named("curves", curves).items()):
        steps, values = _pair(label, pair)
        runs = np.atleast_2d(values)
        mean = runs.mean(axis=0)
        # Against steps the end counts; against anything else (a learning rate) the lowest point.
        at = -1 if xlabel == "step" or not np.isfinite(mean).any() else int(np.nanargmin(mean))
        where = "" if at == -1 else f" at {number(steps[at])}"
        last[label] = (float(mean[at]), 0.0, where)
        if len(runs) > 1:
            seeds = max(seeds, len(runs))
            half = t_quantile(len(runs) - 1, level=float(level)) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
            last[label] = (float(mean[at]), float(half[at]), where)
            data.append(band(label, steps, mean - half, mean + half, index))
        data.append(line(label, *_thin(steps, mean), index))
    finite = {label: pair for label, pair in last.items() if np.isfinite(pair[0])}
    if finite:
        order = sorted(finite, key=lambda label: finite[label][0])
        ends = [f"{label}: {number(finite[label][0])}{_half(finite[label][1])}{finite[label][2]}" for label in order]
        lead = "Lowest at the end" if xlabel == "step" else f"Lowest, by {xlabel}"
        caption = f"{lead}: {', then '.join(ends)}"
    else:
        caption = "No run ended with a finite loss"
    broken = [label for label in last if label not in finite]
    caption += f"; diverged: {listing(broken)}" if broken and finite else ""
    caption += f". Bands: {level:.0%} interval of the mean, up to {seeds} seeds." if seeds else "."
    across = log_axis(xlabel, *(steps for steps, _ in curves.values())) if log_x else axis(xlabel)
    return build("loss_curves", data, title=title, caption=caption, xaxis=across, yaxis=axis(ylabel))


def scalar_history(
    series: Mapping[Any, tuple[Any, Any]],
    *,
    ylabel: str,
    title: str | None = None,
    log: bool = False,
) -> dict[str, Any]:
    """Any recorded scalar against the training step.

    Args:
        series: Label to ``(steps, values)``, both ``(n,)``. Values may hold NaN.
        ylabel: Name and unit of the vertical axis.
        title: The question; made from ``ylabel`` when not given.
        log: Logarithmic vertical axis.

    Returns:
        A Plotly figure as a dictionary; long series are thinned to 2000 points for display.

    Example:
        >>> figure = scalar_history({"run 1": ([0, 1, 2], [1.0, 0.5, 0.25])}, ylabel="gap")
        >>> figure["layout"]["meta"]["caption"]
        'run 1: from 1 to 0.25 over 2 steps.'
    """
    data, said = [], []
    for index, (label, pair) in enumerate(named("series", series).items()):
        steps, values = _pair(label, pair, single=True)
        data.append(line(label, *_thin(steps, values), index))
        good = np.isfinite(values)
        if good.any():
            first, final = values[good][0], values[good][-1]
            said.append(f"{label}: from {number(first)} to {number(final)} over {number(np.ptp(steps[good]))} steps")
        else:
            said.append(f"{label}: no finite value")
    return build(
        "scalar_history",
        data,
        title=title or f"How does the {ylabel} change while training?",
        caption="; ".join(said) + ".",
        xaxis=axis("step"),
        yaxis=log_axis(ylabel, *(t["y"] for t in data)) if log else axis(ylabel),
    )


def _pair(label: str, pair: Any, *, single: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one label, checked against each other."""
    try:
        steps, values = pair
    except (TypeError, ValueError) as cause:
        raise ShapeError(f"{label!r} must map to a pair (steps, values); got {type(pair).__name__}.") from cause
    steps = vector(f"steps of {label!r}", steps, increasing=True)
    values = array(f"values of {label!r}", values, dims=(1,) if single else (1, 2), finite=False)
    if values.shape[-1] != len(steps):
        raise ShapeError(f"{label!r} has {len(steps)} steps but values of shape {values.shape}.")
    return steps, values


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MAX_POINTS`` points, the last one kept: more only cost the browser time."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    chosen = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    return steps[chosen], values[chosen]


def _half(width: float) -> str:
    """The ± of a caption."""
    return f" ± {number(width)}" if width else ""
