"""The optimizer race: curves of many rivals, paired differences as a forest, what a wrong learning rate costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, named, seeded, vector
from orthokit.figures.intervals import mean_interval, t_quantile
from orthokit.figures.template import (
    COLOURS,
    GUIDE,
    SYMBOLS,
    Number,
    axis,
    band,
    build,
    line,
    listing,
    log_axis,
    number,
)

__all__ = ["race_curves", "race_ranking", "rate_sensitivity"]


def race_curves(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "Which optimizer is ahead?",
    skip: Number = 0.0,
    level: Number = 0.95,
) -> dict[str, Any]:
    """Loss of many rivals over a run, each with the confidence band of its mean over seeds.

    Args:
        curves: Label to ``(across, values)``: across ``(n,)``, increasing; values ``(n,)`` or ``(seeds, n)``. NaN
            breaks a line. Rivals may have different ``across``.
        xlabel: Name and unit of the horizontal axis.
        ylabel: Name and unit of the vertical axis.
        title: The question the chart answers.
        skip: Share of the horizontal range that is left out at the start, in [0, 1); default 0.
        level: Confidence level of the bands, in (0, 1); default 0.95.

    Returns:
        A Plotly figure as a dictionary; up to 14 rivals differ in colour, dash or marker.

    Raises:
        ShapeError: Across and values do not fit together.
        OptionError: ``skip`` out of range.

    Example:
        >>> curves = {"A": ([0, 1], [[3, 2], [3, 2.2]]), "B": ([0, 1], [3, 2.5])}
        >>> figure = race_curves(curves, xlabel="seconds", ylabel="loss (nats)")
        >>> figure["layout"]["meta"]["caption"]
        'At the end: A 2.1 ± 1.3, B 2.5. Bands: 95% interval of the mean over seeds.'
    """
    if not 0 <= skip < 1:
        raise OptionError(f"skip must be in [0, 1); got {skip}.")
    pairs = {label: _pair(label, pair) for label, pair in named("curves", curves).items()}
    start = float(skip) * max(across[-1] for across, _ in pairs.values())
    data, ends, banded = [], {}, False
    for index, (label, (across, runs)) in enumerate(pairs.items()):
        kept = across >= start
        across, runs = across[kept], runs[:, kept]
        if not len(across):
            continue
        mean, half = runs.mean(axis=0), np.zeros(len(across))
        if len(runs) > 1:
            banded = True
            half = t_quantile(len(runs) - 1, level=float(level)) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
            data.append(band(label, across, mean - half, mean + half, index))
        data.append(line(label, across, mean, index))
        ends[label] = (float(mean[-1]), float(half[-1]))
    finite = sorted((label for label in ends if np.isfinite(ends[label][0])), key=lambda label: ends[label][0])
    said = [f"{label} {_told(*ends[label])}" for label in finite]
    caption = f"At the end: {', '.join(said)}." if said else "No run ended with a finite loss."
    if broken := [label for label in ends if label not in finite]:
        caption += f" Diverged: {listing(broken)}."
    if banded:
        caption += f" Bands: {level:.0%} interval of the mean over seeds."
    return build("race_curves", data, title=title, caption=caption, xaxis=axis(xlabel), yaxis=axis(ylabel))


def race_ranking(
    differences: Mapping[Any, Mapping[Any, Any]],
    *,
    baseline: str = "AdamW",
    unit: str = "bits per byte",
    title: str | None = None,
    level: Number = 0.95,
) -> dict[str, Any]:
    """Paired differences to a baseline with their confidence intervals, best on top.

    Args:
        differences: Kind of comparison (such as ``"equal tokens"``) to label to one difference a seed, ``(n,)``,
            ``n >= 2``; below zero is better. The first kind sets the order.
        baseline: What was subtracted.
        unit: Unit of the differences.
        title: The question; made from ``baseline`` when not given.
        level: Confidence level, in (0, 1); default 0.95.

    Returns:
        A Plotly figure as a dictionary. An open marker has an interval that holds zero.

    Raises:
        ShapeError: Nothing to draw, or the kinds hold different labels.

    Example:
        >>> figure = race_ranking({"equal tokens": {"Muon": [-0.2, -0.21], "SGD": [0.1, 0.11], "Lion": [-1.0, 1.0]}})
        >>> figure["layout"]["meta"]["caption"]
        'Equal tokens: better than AdamW: Muon; worse: SGD; undecided: Lion. Markers: mean; bars: 95% interval.'
    """
    kinds = {kind: named(kind, values) for kind, values in named("differences", differences).items()}
    first = next(iter(kinds.values()))
    if any(values.keys() != first.keys() for values in kinds.values()):
        raise ShapeError("every kind of comparison must hold the same labels.")
    found = {
        kind: {label: _interval(label, numbers, level) for label, numbers in values.items()}
        for kind, values in kinds.items()
    }
    ranked = next(iter(found.values()))
    order = sorted(ranked, key=lambda label: (ranked[label] or (np.inf,))[0])
    data, said = [], []
    for index, (kind, intervals) in enumerate(found.items()):
        drawn = [label for label in order if intervals[label]]
        shift = 0.28 * (index - (len(found) - 1) / 2)
        rows = np.array([intervals[label] for label in drawn]).reshape(-1, 3)
        clear = (rows[:, 1] > 0) | (rows[:, 2] < 0)
        data.append(
            {
                **{"type": "scatter", "mode": "markers", "name": kind},
                "x": rows[:, 0],
                "y": [order.index(label) + shift for label in drawn],
                "error_x": {
                    **{"type": "data", "symmetric": False, "thickness": 2, "width": 5, "color": COLOURS[index]},
                    "array": rows[:, 2] - rows[:, 0],
                    "arrayminus": rows[:, 0] - rows[:, 1],
                },
                "marker": {
                    "symbol": [SYMBOLS[index] + ("" if sure else "-open") for sure in clear],
                    **{"size": 10, "color": COLOURS[index], "line": {"width": 2, "color": COLOURS[index]}},
                },
                "text": drawn,
                "hovertemplate": "%{text}: %{x:.3g}<extra>" + kind + "</extra>",
            }
        )
        said.append(_verdicts(kind, intervals, order, baseline))
    return build(
        "race_ranking",
        data,
        title=title or f"Who beats {baseline}, and by how much?",
        caption=" ".join(said) + f" Markers: mean; bars: {level:.0%} interval.",
        height=150 + 40 * len(order),
        xaxis=axis(f"final loss minus {baseline}'s ({unit}); left is better", zeroline=True, zerolinecolor=GUIDE),
        yaxis=axis("", tickmode="array", tickvals=list(range(len(order))), ticktext=order, autorange="reversed"),
        showlegend=len(found) > 1,
    )


def rate_sensitivity(
    rates: Mapping[Any, tuple[Any, Any]],
    *,
    ylabel: str = "loss above its best (bits per byte)",
    title: str = "What does a wrong learning rate cost?",
    most: Number | None = None,
) -> dict[str, Any]:
    """Loss above a rival's own best against its learning rate, as a multiple of its own best rate.

    Args:
        rates: Label to ``(rates, values)``: rates ``(n,)``, above 0, increasing; values ``(n,)`` or ``(seeds, n)``.
            NaN where a run diverged.
        ylabel: Name and unit of the vertical axis.
        title: The question the chart answers.
        most: Highest value the vertical axis shows, ``> 0``; default all.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Rates and values do not fit together.
        OptionError: A rate is not above 0.

    Example:
        >>> figure = rate_sensitivity({"A": ([1, 2, 4], [3.0, 2.0, 2.5]), "B": ([1, 2, 4], [1.2, 1.0, 1.1])})
        >>> figure["layout"]["meta"]["caption"]
        'Twice the best rate costs: B 0.1, A 0.5; half of it: B 0.2, A 1.'
    """
    data, above, below = [], {}, {}
    for index, (label, pair) in enumerate(named("rates", rates).items()):
        across, runs = _pair(label, pair)
        if across[0] <= 0:
            raise OptionError(f"learning rates must be above 0; those of {label!r} begin with {across[0]:g}.")
        mean = runs.mean(axis=0)
        if not np.isfinite(mean).any():
            continue
        best = int(np.nanargmin(mean))
        loss = mean - mean[best]
        data.append(line(label, across / across[best], loss, index, markers=True))
        for side, found in ((1, above), (-1, below)):
            if 0 <= best + side < len(loss):
                found[label] = float(loss[best + side])
    if not data:
        raise ShapeError("every run diverged; there is nothing to draw.")
    said = [
        f"{where}: {_ranked(found)}" for where, found in (("Twice the best rate costs", above), ("half of it", below))
    ]
    shown = {"range": [-0.04 * float(most), float(most)]} if most is not None else {}
    return build(
        "rate_sensitivity",
        data,
        title=title,
        caption="; ".join(said) + ".",
        xaxis=log_axis("learning rate / its own best", *(trace["x"] for trace in data)),
        yaxis=axis(ylabel, **shown),
    )


def _pair(label: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    """Across and one row of values a seed."""
    try:
        across, values = pair
    except (TypeError, ValueError) as cause:
        raise ShapeError(f"{label!r} must map to a pair (across, values); got {type(pair).__name__}.") from cause
    across = vector(f"across of {label!r}", across, increasing=True)
    return across, seeded(f"values of {label!r}", values, len(across), per="point", finite=False)


def _interval(label: str, values: Any, level: Number) -> tuple[float, float, float] | None:
    """Mean and ends; ``None`` where a run diverged."""
    numbers = array(f"differences of {label!r}", values, dims=(1,), finite=False)
    return mean_interval(numbers, level=float(level)) if np.isfinite(numbers).all() else None


def _verdicts(kind: str, intervals: dict[str, Any], order: list[str], baseline: str) -> str:
    sides: dict[str, list[str]] = {f"better than {baseline}": [], "worse": [], "undecided": [], "diverged": []}
    for label in order:
        interval = intervals[label]
        if interval is None:
            sides["diverged"].append(label)
            continue
        _, low, high = interval
        sides[f"better than {baseline}" if high < 0 else "worse" if low > 0 else "undecided"].append(label)
    told = [f"{side}: {', '.join(labels)}" for side, labels in sides.items() if labels]
    return f"{kind[:1].upper()}{kind[1:]}: {'; '.join(told)}."


def _ranked(found: dict[str, float]) -> str:
    good = sorted((label for label in found if np.isfinite(found[label])), key=lambda label: found[label])
    told = [f"{label} {number(found[label])}" for label in good]
    return ", ".join(told + [f"{label} diverges" for label in found if label not in good]) or "not tried"


def _told(value: float, half: float) -> str:
    """A mean with as many digits as its interval allows."""
    if not half:
        return number(value)
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{value:.{digits}f} ± {half:.{digits}f}".replace("-", "−")
