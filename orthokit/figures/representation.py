"""The geometry of representations: rank along pretraining, its phases, its place, and what fine-tuning does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.figures._check import array, matrix, named, nested, seeded, vector
from orthokit.figures.intervals import mean_interval, t_quantile
from orthokit.figures.template import (
    COLOURS,
    GUIDE,
    SYMBOLS,
    Number,
    axis,
    band,
    build,
    guide,
    line,
    listing,
    number,
    style,
)

__all__ = ["phase_forest", "rank_after_finetuning", "rank_and_loss", "rank_by_layer", "rank_phases"]

# Step 0 has no place on a log axis; it stands one octave before step 1.
_ZERO = 0.5
# Ticks of a logarithmic axis of losses; those outside are not drawn.
_BITS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


def rank_phases(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    turns: Mapping[Any, tuple[Any, Any]] | None = None,
    ylabel: str = "RankMe of covariance eigenvalues",
    title: str = "Does the rank of the representation collapse, rise and fall?",
    level: Number = 0.95,
) -> dict[str, Any]:
    """A measure of the features along pretraining, on a logarithmic axis that begins with step 0.

    Args:
        curves: Label to ``(steps, values)``: steps ``(n,)``, ``>= 0``, increasing; values ``(n,)`` or ``(seeds, n)``.
        turns: Label to the steps of ``(trough, peak)``, which are marked; default none.
        ylabel: Name of the measure; say which RankMe it is.
        title: The question the chart answers.
        level: Confidence level of the bands, in (0, 1); default 0.95.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Steps and values do not fit together.
        UnknownNameError: A turning point of a curve that is not there.
        OptionError: A negative step, or a turning point that is no step.

    Example:
        >>> figure = rank_phases({"AdamW": ([0, 1, 2], [17.0, 3.0, 20.0])}, turns={"AdamW": (1, 2)})
        >>> figure["layout"]["meta"]["caption"]
        'AdamW: 17 at the start, lowest 3 at step 1, highest after it 20 at step 2, at the end 20.'
    """
    marked = dict(turns or {})
    data, said, banded, grid = [], [], False, set()
    series = named("curves", curves)
    for label in marked:
        if label not in series:
            raise unknown_name("curve", str(label), series)
    for index, (label, pair) in enumerate(series.items()):
        steps, runs = _pair(label, pair, low=0.0)
        across, mean = np.where(steps > 0, steps, _ZERO), runs.mean(axis=0)
        grid |= {float(step) for step in steps}
        if len(runs) > 1:
            banded = True
            half = t_quantile(len(runs) - 1, level=float(level)) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
            data.append(band(label, across, mean - half, mean + half, index))
        data.append(line(label, across, mean, index))
        told = f"{label}: {number(mean[0])} at the start"
        if label in marked:
            places = [_place(label, steps, step) for step in marked[label]]
            data.append(_turns(label, across[places], mean[places], index))
            trough, peak = places
            told += f", lowest {number(mean[trough])} at step {number(steps[trough])}"
            told += f", highest after it {number(mean[peak])} at step {number(steps[peak])}"
        said.append(f"{told}, at the end {number(mean[-1])}")
    caption = "; ".join(said) + "."
    if banded:
        caption += f" Bands: {level:.0%} interval of the mean over seeds."
    most = max(grid)
    base = 2.0 if most <= 300 else 10.0
    ticks = [0.0, *(base**k for k in range(9) if base**k <= most)]
    shown = [step for step in ticks if step > 0 or 0 in grid]
    where = {"tickvals": [step or _ZERO for step in shown], "ticktext": [f"{step:g}" for step in shown]}
    return build(
        "rank_phases",
        data,
        title=title,
        caption=caption,
        xaxis=axis("step (logarithmic, with step 0 put before 1)", type="log", tickmode="array", **where),
        yaxis=axis(ylabel, rangemode="tozero"),
    )


def phase_forest(
    phases: Mapping[Any, Mapping[Any, Any]],
    *,
    least: Number = 0.05,
    title: str = "Which phases are larger than their noise?",
) -> dict[str, Any]:
    """The size of every phase in every run with its interval, against the smallest change that counts.

    Args:
        phases: Phase to label to ``(size, low, high)`` of each run, ``(runs, 3)``: ``|log|`` of the factor by which
            RankMe changes.
        least: Smallest size that is a phase, ``>= 0``; default 0.05.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary. A filled marker has its whole interval above ``least``.

    Raises:
        ShapeError: Not three numbers a run, or other labels in another phase.
        OptionError: An interval that does not hold its size.

    Example:
        >>> runs = {"collapse": {"AdamW": [[1.9, 1.8, 2.0]]}, "fall": {"AdamW": [[0.0, 0.0, 0.0]]}}
        >>> phase_forest(runs)["layout"]["meta"]["caption"]
        'collapse: present in 1 of 1 runs; fall: in 0 of 1. Present: the whole interval lies right of 0.05 (5 %).'
    """
    rows = nested("phases", phases, row="phase", column="label")
    data, said = [], []
    labels = list(next(iter(rows.values())))
    room = 0.84 / len(labels)  # of the distance between two phases
    for index, label in enumerate(labels):
        points, places = [], []
        for k, (phase, of) in enumerate(rows.items()):
            runs = matrix(f"{phase} of {label!r}", of[label], shape=(None, 3))
            if (runs[:, 0] < runs[:, 1]).any() or (runs[:, 0] > runs[:, 2]).any():
                raise OptionError(f"every size of {phase!r} must lie in its interval (size, low, high).")
            points.append(runs)
            spread = np.arange(len(runs)) - (len(runs) - 1) / 2
            places += list(k + room * (index - (len(labels) - 1) / 2 + 0.7 * spread / max(len(runs), 2)))
        data.append(_forest(label, np.concatenate(points), np.array(places), index, float(least), size=7))
    for phase, of in rows.items():
        low = np.concatenate([np.asarray(of[label], dtype=float)[:, 1] for label in labels])
        said.append(f"{phase}: {'' if said else 'present '}in {int((low > least).sum())} of {len(low)}")
    said[0] += " runs"
    mark = _mark("least that counts", float(least), len(rows))
    return build(
        "phase_forest",
        [mark, *data],
        title=title,
        caption=f"{'; '.join(said)}. Present: the whole interval lies right of {number(least)} "
        f"({number(100 * float(least))} %).",
        height=170 + (60 + 28 * len(labels)) * len(rows),
        xaxis=axis("size of the phase: |log of the factor in RankMe|", zeroline=True, zerolinecolor=GUIDE),
        yaxis=axis("", tickmode="array", tickvals=list(range(len(rows))), ticktext=list(rows), autorange="reversed"),
    )


def rank_by_layer(
    ranks: Mapping[Any, Any],
    *,
    layers: Sequence[str],
    ylabel: str = "effective rank of the last token's features",
    title: str = "Where in the model is the rank lost?",
) -> dict[str, Any]:
    """A measure of the features of every layer, at some moments of training.

    Args:
        ranks: Moment (such as ``"step 16"``) to values, ``(layers,)`` or ``(seeds, layers)``.
        layers: Names, from the embedding up.
        ylabel: Name of the measure.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Values that do not fit the layers.

    Example:
        >>> figure = rank_by_layer({"step 0": [40, 39], "step 16": [30, 5]}, layers=["embed", "norm"])
        >>> figure["layout"]["meta"]["caption"]
        'step 0: lowest 39 in norm, highest 40 in embed; step 16: lowest 5 in norm, highest 30 in embed.'
    """
    names = [str(name) for name in layers]
    data, said, banded = [], [], False
    for index, (label, values) in enumerate(named("ranks", ranks).items()):
        runs = seeded(f"values of {label!r}", values, len(names), per="layer", signed=False)
        mean = runs.mean(axis=0)
        trace = line(label, names, mean, index, markers=True)
        if len(runs) > 1:
            banded = True
            half = t_quantile(len(runs) - 1) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
            trace["error_y"] = {"type": "data", "array": half, "color": style(index)[0], "thickness": 1.5, "width": 4}
        data.append(trace)
        low, high = int(mean.argmin()), int(mean.argmax())
        said.append(
            f"{label}: lowest {number(mean[low])} in {names[low]}, highest {number(mean[high])} in {names[high]}"
        )
    return build(
        "rank_by_layer",
        data,
        title=title,
        caption="; ".join(said) + "." + (" Bars: 95% interval of the mean over seeds." if banded else ""),
        xaxis=axis("layer", type="category"),
        yaxis=axis(ylabel, rangemode="tozero"),
    )


def rank_and_loss(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    points: Mapping[Any, tuple[Any, Any]] | None = None,
    ylabel: str = "RankMe of covariance eigenvalues",
    title: str = "At equal loss, whose rank is higher?",
) -> dict[str, Any]:
    """A measure of the features against the loss; training runs from left to right.

    Args:
        curves: Label to ``(bits, values)``, both ``(n,)``, in the order of the looks.
        points: Label to one ``(bits, value)`` of a model that has no curve; default none.
        ylabel: Name of the measure; say which RankMe it is.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Values that do not fit together.

    Example:
        >>> figure = rank_and_loss({"A": ([8, 4, 2], [17, 3, 20])}, points={"longer": (1.5, 25)})
        >>> figure["layout"]["meta"]["caption"]
        'Ends: A 20 at 2 bits per byte; longer 25 at 1.5.'
    """
    data, said = [], []
    series = named("curves", curves)
    for index, (label, pair) in enumerate(series.items()):
        bits, runs = _pair(label, pair, increasing=False)
        if len(runs) > 1:
            raise ShapeError(f"{label!r} must have one value a look; average over seeds first.")
        data.append(line(label, bits, runs[0], index, markers=True))
        said.append(f"{label} {number(runs[0, -1])} at {number(bits[-1])}" + ("" if said else " bits per byte"))
    for index, (label, pair) in enumerate((points or {}).items(), start=len(series)):
        bits, value = vector(f"point {label!r}", pair, length=2)
        colour, _, symbol = style(index)
        marker = {"symbol": symbol, "size": 13, "color": colour, "line": {"width": 1, "color": "#1F2328"}}
        data.append(
            {**{"type": "scatter", "mode": "markers", "name": str(label), "x": [bits], "y": [value]}, "marker": marker}
        )
        said.append(f"{label} {number(value)} at {number(bits)}")
    return build(
        "rank_and_loss",
        data,
        title=title,
        caption=f"Ends: {'; '.join(said)}.",
        xaxis=axis("validation loss (bits per byte), falling to the right", type="log", autorange="reversed")
        | {"tickmode": "array", "tickvals": list(_BITS), "ticktext": [f"{bits:g}" for bits in _BITS]},
        yaxis=axis(ylabel, rangemode="tozero"),
    )


def rank_after_finetuning(
    changes: Mapping[Any, Mapping[Any, Any]],
    *,
    title: str = "Does fine-tuning raise the rank?",
    level: Number = 0.95,
) -> dict[str, Any]:
    """The change of RankMe by fine-tuning, for every method and text it is measured on.

    Args:
        changes: Text to method to log ratios, one a seed, ``(n,)``, ``n >= 2``.
        title: The question the chart answers.
        level: Confidence level of the intervals, in (0, 1); default 0.95.

    Returns:
        A Plotly figure as a dictionary. A filled marker has an interval without zero.

    Raises:
        ShapeError: A single seed, or other methods for another text.

    Example:
        >>> figure = rank_after_finetuning({"new": {"full": [0.1, 0.11], "LoRA": [-0.2, -0.21]}})
        >>> figure["layout"]["meta"]["caption"]
        'On new: raised by full; lowered by LoRA. Markers: mean; bars: 95% interval.'
    """
    texts = nested("changes", changes, row="text", column="method")
    methods = list(next(iter(texts.values())))
    data, told = [], []
    for index, (text, of) in enumerate(texts.items()):
        rows = np.array([mean_interval(array(m, of[m], dims=(1,)), level=float(level)) for m in methods])
        places = np.arange(len(methods)) + 0.28 * (index - (len(texts) - 1) / 2)
        data.append(_forest(text, rows, places, index, 0.0))
        sides = {
            "raised by": [m for m, row in zip(methods, rows, strict=True) if row[1] > 0],
            "lowered by": [m for m, row in zip(methods, rows, strict=True) if row[2] < 0],
            "undecided for": [m for m, row in zip(methods, rows, strict=True) if row[1] <= 0 <= row[2]],
        }
        told.append(f"On {text}: " + "; ".join(f"{side} {listing(who)}" for side, who in sides.items() if who) + ".")
    return build(
        "rank_after_finetuning",
        data,
        title=title,
        caption=" ".join(told) + f" Markers: mean; bars: {level:.0%} interval.",
        height=150 + 60 * len(methods),
        xaxis=axis("log of the factor in RankMe: right of 0 it rose", zeroline=True, zerolinecolor=GUIDE),
        yaxis=axis("", tickmode="array", tickvals=list(range(len(methods))), ticktext=methods, autorange="reversed"),
        showlegend=len(texts) > 1,
    )


def _pair(label: str, pair: Any, *, low: float | None = None, increasing: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Across and one row of values a seed."""
    try:
        across, values = pair
    except (TypeError, ValueError) as cause:
        raise ShapeError(f"{label!r} must map to a pair (across, values); got {type(pair).__name__}.") from cause
    across = vector(f"across of {label!r}", across, low=low, increasing=increasing)
    return across, seeded(f"values of {label!r}", values, len(across), per="look")


def _place(label: str, steps: np.ndarray, step: Any) -> int:
    found = np.flatnonzero(steps == float(step))
    if not len(found):
        raise OptionError(f"turning points of {label!r} must be among its steps; {step} is not.")
    return int(found[0])


def _turns(label: str, x: np.ndarray, y: np.ndarray, index: int) -> dict[str, Any]:
    colour = style(index)[0]
    marker = {"symbol": "circle-open", "size": 15, "color": colour, "line": {"width": 2.5, "color": colour}}
    return {
        **{"type": "scatter", "mode": "markers", "name": f"turning points, {label}", "legendgroup": label},
        **{"x": x, "y": y, "marker": marker, "showlegend": False, "hoverinfo": "skip"},
    }


def _forest(
    name: str, rows: np.ndarray, places: np.ndarray, index: int, above: float, *, size: int = 10
) -> dict[str, Any]:
    """Values with their intervals; filled where the interval lies on one side of ``above``."""
    clear = (rows[:, 1] > above) | ((rows[:, 2] < above) & (above == 0))
    colour, symbol = COLOURS[index % len(COLOURS)], SYMBOLS[index % len(SYMBOLS)]
    return {
        **{"type": "scatter", "mode": "markers", "name": name, "x": rows[:, 0], "y": places},
        "error_x": {
            **{"type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": colour},
            "array": rows[:, 2] - rows[:, 0],
            "arrayminus": rows[:, 0] - rows[:, 1],
        },
        "marker": {
            "symbol": [symbol + ("" if sure else "-open") for sure in clear],
            **{"size": size, "color": colour, "line": {"width": 2, "color": colour}},
        },
        "hovertemplate": "%{x:.3g}<extra>" + name + "</extra>",
    }


def _mark(name: str, x: float, rows: int) -> dict[str, Any]:
    return guide(name, [x, x], [-0.5, rows - 0.5], dash="dash")
