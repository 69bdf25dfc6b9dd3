"""Merged models side by side: scores of every contestant on every task, and what is learnt against what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.figures._check import array, named, nested
from orthokit.figures.front import _apart, _beats, _staircase
from orthokit.figures.intervals import t_quantile
from orthokit.figures.race import _pair
from orthokit.figures.template import (
    COLOURS,
    GUIDE,
    SYMBOLS,
    Number,
    axis,
    build,
    fade,
    guide,
    line,
    listing,
    log_axis,
    number,
)

__all__ = ["merge_front", "merge_scales", "merge_scores"]

_DASHES = ("dot", "solid", "dash")


def merge_scores(
    marks: Mapping[Any, Mapping[Any, Any]],
    *,
    unit: str,
    groups: Mapping[Any, str] | None = None,
    references: Sequence[str] = ("base", "experts"),
    by: str = "average",
    title: str = "Which merge keeps most of what the experts can do?",
) -> dict[str, Any]:
    """Score of every contestant, one panel a column, best on top; what they lie between as upright lines.

    Args:
        marks: Column (a task, an average) to label to ``(mean, low, high)``; ``low`` and ``high`` NaN where there is no
            interval.
        unit: Unit of the scores; higher is better.
        groups: Label to group, told apart by colour and marker, seven at most; default one group.
        references: Labels that are lines, not rows; those that are not there are left out.
        by: Column that sorts the rows.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Columns hold different labels, an entry is no triple, or only references are there.
        NonFiniteError: A mean is not finite.
        OptionError: ``by`` is no column.

    Example:
        >>> average = {"TA": (80.0, 79.0, 81.0), "TIES": (82.0, 81.5, 82.5), "base": (60.0, 59.0, 61.0)}
        >>> merge_scores({"average": average}, unit="points")["layout"]["meta"]["caption"]
        'By average: TIES 82 points first, TA 80 last of 2; base 60. Bars: intervals of the means.'
    """
    columns = {
        column: {label: _triple(column, label, entry) for label, entry in of.items()}
        for column, of in nested("marks", marks, row="column", column="label").items()
    }
    if by not in columns:
        raise OptionError(f"by must be one of the columns {listing(list(columns))}; got {by!r}.")
    lead = columns[by]
    rows = sorted((label for label in lead if label not in references), key=lambda label: -lead[label][0])
    if not rows:
        raise ShapeError("marks must hold a contestant besides the references.")
    told, kinds = _grouped(rows, groups)
    lines = [label for label in references if label in lead]
    gap, height = 0.02, [-0.7, len(rows) - 0.3]
    width = (1 - gap * (len(columns) - 1)) / len(columns)
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    for place, (column, of) in enumerate(columns.items()):
        at = {"xaxis": "x" if place == 0 else f"x{place + 1}", "showlegend": place == 0}
        for label, dash in zip(lines, _DASHES, strict=False):
            upright = guide(label, [of[label][0]] * 2, height, dash=dash, hovertemplate="%{x:.4g}")
            data.append(upright | {"legendgroup": label} | at)
        for index, kind in enumerate(kinds):
            mine = [label for label in rows if told[label] == kind]
            data.append(_points(kind, mine, [rows.index(label) for label in mine], of, index) | at)
        name = f"xaxis{at['xaxis'][1:]}"
        start = place * (width + gap)
        shown = _reach(np.array([of[label] for label in (*rows, *lines)]))
        layout[name] = axis(f"{column}<br>({unit})", domain=[start, start + width], nticks=4, range=shown)
    return build(
        "merge_scores",
        data,
        title=title,
        caption=_caption(lead, rows, lines, by, unit) + _bars(columns, rows, layout),
        height=210 + 22 * len(rows),
        yaxis=axis(
            "", tickmode="array", tickvals=list(range(len(rows))), ticktext=rows, range=height[::-1], zeroline=False
        ),
        **layout,
    )


def merge_front(
    points: Mapping[Any, Any],
    *,
    unit: str,
    groups: Mapping[Any, str] | None = None,
    references: Sequence[str] = ("base",),
    leave: Sequence[str] = ("experts",),
    factor: Number = 1.0,
    level: Number = 0.95,
    title: str = "Who learns more from the experts, and who keeps more of the base?",
) -> dict[str, Any]:
    """Average score against what is retained, with intervals on both axes and the front of those that none beats.

    Args:
        points: Label to ``(runs, 2)``: average and retained score, higher is better, one row a seed. One run has no
            interval.
        unit: Unit of the scores times ``factor``.
        groups: Label to group, told apart by colour and marker, seven at most; default one group.
        references: Labels that are stars and no contestants; those that are not there are left out.
        leave: Labels that are not drawn: single experts retain so little that the rest would be pressed together.
        factor: What scores are multiplied by, such as 100; default 1.
        level: Confidence level, in (0, 1); default 0.95.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary. Those on the front and the references are labelled, the others when they are
        pointed at.

    Raises:
        ShapeError: Not pairs, or only references are there.

    Example:
        >>> points = {"TA": [(80, 70), (82, 72)], "FDA": [(85, 80), (84, 80)], "base": [(50, 90), (52, 90)]}
        >>> merge_front(points, unit="points")["layout"]["meta"]["caption"]
        'On the front, where no other has as high an average and retains more: FDA. Beaten on both axes: TA. \
Bars: 95% intervals of means over 2 seeds.'
    """
    runs = {label: float(factor) * _runs(label, of) for label, of in named("points", points).items()}
    runs = {label: of for label, of in runs.items() if label not in leave}
    rivals = [label for label in runs if label not in references]
    if not rivals:
        raise ShapeError("points must hold a contestant besides the references.")
    means = {label: (float(of[:, 0].mean()), float(of[:, 1].mean())) for label, of in runs.items()}
    worse = {label: (mean[0], -mean[1]) for label, mean in means.items()}
    beaten = [label for label in rivals if any(_beats(worse[other], worse[label]) for other in rivals)]
    front = sorted((label for label in rivals if label not in beaten), key=lambda label: means[label])
    edge = _staircase([worse[label] for label in front], [(one[:, 0].min(), 0.0) for one in runs.values()])
    data = [edge | {"y": [-y for y in edge["y"]]}]
    told, kinds = _grouped(rivals, groups)
    marks = {label: _marks(of, level) for label, of in runs.items()}
    for index, kind in enumerate(kinds):
        data.append(_crosses(kind, {label: marks[label] for label in rivals if told[label] == kind}, index))
    data += [_star(label, means[label]) for label in references if label in means]
    labelled = [*front, *(label for label in references if label in means)]
    data.append(_words(labelled, means))
    said = [f"On the front, where no other has as high an average and retains more: {listing(front)}."]
    if beaten:
        said.append(f"Beaten on both axes: {listing(beaten)}.")
    across, up = (_reach(np.array([of[place] for of in marks.values()])) for place in range(2))
    counts = sorted({len(of) for of in runs.values()})
    if counts[-1] > 1:
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        said.append(f"Bars: {level:.0%} intervals of means over {seeds} seeds.")
    return build(
        "merge_front",
        data,
        title=title,
        caption=" ".join(said),
        height=520,
        showlegend=True,
        xaxis=axis(f"average over the experts' tasks ({unit}); right is better", range=across),
        yaxis=axis(f"retained of the base ({unit}); up is better", range=up),
    )


def merge_scales(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    unit: str,
    base: Number | None = None,
    factor: Number = 1.0,
    title: str = "How much of the merged change should be added?",
) -> dict[str, Any]:
    """Average score of several methods against the factor on their merged change.

    Args:
        curves: Method to ``(scales, averages)``: scales ``(n,)``, above 0, increasing; averages ``(n,)`` or
            ``(seeds, n)``, higher is better.
        unit: Unit of the averages times ``factor``.
        base: Average of the base, a level line; default none.
        factor: What averages are multiplied by, such as 100; default 1.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Scales and averages do not fit together.
        OptionError: A scale is not above 0, where a logarithmic axis has no place.

    Example:
        >>> figure = merge_scales({"TA": ([0.1, 0.3, 1.0], [0.6, 0.8, 0.4])}, unit="points", factor=100)
        >>> figure["layout"]["meta"]["caption"]
        'Highest: TA 80 at 0.3. At a scale of 1: TA 40.'
    """
    data, best, whole, every = [], [], [], []
    for index, (label, pair) in enumerate(named("curves", curves).items()):
        scales, runs = _pair(label, pair)
        if scales[0] <= 0:
            raise OptionError(f"scales must be above 0; those of {label!r} begin with {scales[0]:g}.")
        mean = float(factor) * runs.mean(axis=0)
        data.append(line(label, scales, mean, index, markers=True))
        at = int(mean.argmax())
        best.append((float(mean[at]), f"{label} {number(mean[at])} at {number(scales[at])}"))
        whole += [f"{label} {number(value)}" for value in mean[np.isclose(scales, 1.0)]]
        every.append(scales)
    ends = [min(float(scales[0]) for scales in every), max(float(scales[-1]) for scales in every)]
    if base is not None:
        data.append(guide("base", ends, [float(factor) * float(base)] * 2))
    said = f"Highest: {', '.join(text for _, text in sorted(best, key=lambda entry: -entry[0]))}."
    return build(
        "merge_scales",
        data,
        title=title,
        caption=said + (f" At a scale of 1: {', '.join(whole)}." if whole else ""),
        xaxis=log_axis("scale: factor on the merged change", *every),
        yaxis=axis(f"average over the experts' tasks ({unit})"),
    )


def _runs(label: str, of: Any) -> np.ndarray:
    found = array(f"runs of {label!r}", of, dims=(2,))
    if found.shape[1] != 2:
        raise ShapeError(f"runs of {label!r} must be pairs (average, retained); got shape {found.shape}.")
    return found


def _grouped(labels: Sequence[str], groups: Mapping[Any, str] | None) -> tuple[dict[str, str], list[str]]:
    """Group of each label, and the groups that are there, in the order in which they were given."""
    given = {str(label): str(group) for label, group in (groups or {}).items()}
    told = {label: given.get(label, "merged") for label in labels}
    return told, [kind for kind in dict.fromkeys([*given.values(), "merged"]) if kind in told.values()]


def _marks(runs: np.ndarray, level: Number) -> np.ndarray:
    """Mean and ends of its interval, one row an axis."""
    mean, half = runs.mean(axis=0), np.zeros(2)
    if len(runs) > 1:
        half = t_quantile(len(runs) - 1, level=float(level)) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return np.stack([mean, mean - half, mean + half], axis=1)


def _crosses(name: str, marks: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
    """Means of one group with bars on both axes."""
    colour, every = COLOURS[index], np.array(list(marks.values()))
    x, y = every[:, :, 0].T
    across, up = (every[:, :, 2] - every[:, :, 0]).T
    bar = {"type": "data", "thickness": 1.2, "width": 3, "color": fade(colour, 0.55)}
    return {
        **{"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "text": list(marks)},
        **{"error_x": bar | {"array": across}, "error_y": bar | {"array": up}},
        "marker": {"symbol": SYMBOLS[index], "size": 10, "color": colour},
        "hovertemplate": "%{text}<br>average %{x:.4g}, retained %{y:.4g}<extra></extra>",
    }


def _reach(marks: np.ndarray) -> list[float]:
    """The part of an axis that shows all means, and bars as far as they leave the means some room."""
    means = marks[:, 0]
    least, most = float(means.min()), float(means.max())
    span = (most - least) or abs(most) * 0.1 or 1.0
    low, high = float(np.nanmin([least, *marks[:, 1]])), float(np.nanmax([most, *marks[:, 2]]))
    return [max(low, least - 0.4 * span) - 0.08 * span, min(high, most + 0.4 * span) + 0.08 * span]


def _star(label: str, at: tuple[float, float]) -> dict[str, Any]:
    return {
        **{"type": "scatter", "mode": "markers", "name": label, "x": [at[0]], "y": [at[1]], "showlegend": False},
        "marker": {"symbol": "star", "size": 13, "color": GUIDE},
        "hovertemplate": f"{label}<br>average %{{x:.4g}}, retained %{{y:.4g}}<extra></extra>",
    }


def _words(labelled: Sequence[str], means: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Labels where they are furthest from all points, the unlabelled too."""
    order = [*labelled, *(label for label in means if label not in labelled)]
    # The places are chosen for an axis that is turned over.
    at = np.array([(means[label][0], -means[label][1]) for label in order])
    room = 0.2 * (at.max(axis=0) - at.min(axis=0))  # for the bars
    low, high = at.min(axis=0) - room, at.max(axis=0) + room
    names = [label if label in labelled else "" for label in order]
    ends = {"low": (float(low[0]), float(low[1])), "high": (float(high[0]), float(high[1]))}
    spots = _apart([(x, y) for x, y in at.tolist()], names, **ends)[: len(labelled)]
    x, y = zip(*(means[label] for label in labelled), strict=True)
    shown = {"text": list(labelled), "textposition": spots, "x": x, "y": y}
    # Marks that are not seen keep the words off those that are.
    hidden = {"mode": "markers+text", "marker": {"size": 14, "opacity": 0}, "hoverinfo": "skip", "showlegend": False}
    return {"type": "scatter", "name": "", **hidden, **shown}


def _triple(column: str, label: str, entry: Any) -> tuple[float, float, float]:
    found = array(f"{label!r} in {column!r}", entry, dims=(1,), finite=False)
    if len(found) != 3:
        raise ShapeError(f"{label!r} in {column!r} must be (mean, low, high); got {len(found)} numbers.")
    if not np.isfinite(found[0]):
        raise NonFiniteError(f"the mean of {label!r} in {column!r} must be finite; leave out what has none.")
    return float(found[0]), float(found[1]), float(found[2])


def _points(
    name: str, labels: list[str], places: list[int], of: Mapping[str, tuple[float, float, float]], index: int
) -> dict[str, Any]:
    colour, symbol = COLOURS[index], SYMBOLS[index]
    marks = np.array([of[label] for label in labels]).reshape(-1, 3)
    bar = {"type": "data", "symmetric": False, "thickness": 1.6, "width": 3, "color": colour}
    return {
        **{"type": "scatter", "mode": "markers", "name": name, "legendgroup": name},
        **{"x": marks[:, 0], "y": places, "text": labels, "hovertemplate": "%{text}: %{x:.4g}"},
        "error_x": {**bar, "array": marks[:, 2] - marks[:, 0], "arrayminus": marks[:, 0] - marks[:, 1]},
        "marker": {"symbol": symbol, "size": 8, "color": colour},
    }


def _caption(
    lead: Mapping[str, tuple[float, float, float]], rows: list[str], lines: list[str], by: str, unit: str
) -> str:
    said = f"By {by}: {rows[0]} {number(lead[rows[0]][0])} {unit} first"
    if len(rows) > 1:
        said += f", {rows[-1]} {number(lead[rows[-1]][0])} last of {len(rows)}"
    return "; ".join([said, *(f"{label} {number(lead[label][0])}" for label in lines)]) + "."


def _bars(
    columns: Mapping[str, Mapping[str, tuple[float, float, float]]], rows: list[str], layout: Mapping[str, Any]
) -> str:
    """What the bars are, and whether panels cut some; nothing without bars."""
    ends = np.array([[of[label][1:] for label in rows] for of in columns.values()])
    if not np.isfinite(ends).any():
        return ""
    shown = np.array([panel["range"] for panel in layout.values()])[:, None]
    cut = (ends[..., 0] < shown[..., 0]).any() or (ends[..., 1] > shown[..., 1]).any()
    return " Bars: intervals of the means" + (", cut where a panel ends." if cut else ".")
