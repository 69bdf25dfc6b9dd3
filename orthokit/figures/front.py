"""Gain against forgetting: the front with intervals, both scores against the learning rate, and ways back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, named, seeded, vector
from orthokit.figures.intervals import t_quantile
from orthokit.figures.race import _pair
from orthokit.figures.template import GUIDE, Number, axis, build, fade, guide, line, listing, log_axis, number

__all__ = ["rates_and_scores", "stability_plasticity", "ways_back"]

# Where a label may stand, and its middle in shares of the chart, for a label of no width.
_PLACES = {
    "top center": (0.0, 0.045),
    "bottom center": (0.0, -0.045),
    "middle right": (0.015, 0.0),
    "middle left": (-0.015, 0.0),
    "top right": (0.012, 0.035),
    "top left": (-0.012, 0.035),
    "bottom right": (0.012, -0.035),
    "bottom left": (-0.012, -0.035),
}
_CHARACTER = 0.0095
# Who forgets so many times more than all others would press their points together.
_FAR = 2.5


def stability_plasticity(
    points: Mapping[Any, Any],
    *,
    xlabel: str,
    ylabel: str,
    notes: Mapping[Any, str] | None = None,
    title: str = "Who learns more, and who forgets less?",
    level: Number = 0.95,
    start: tuple[Number, Number] | None = (0.0, 0.0),
    clip: bool = True,
) -> dict[str, Any]:
    """Gain against forgetting with confidence intervals on both axes, and the front of those that none beats.

    Args:
        points: Method to ``(runs, 2)``: gain and forgetting. One run has no interval; a method with a run that diverged
            is named, not drawn.
        xlabel: Name and unit of the gain; right is better.
        ylabel: Name and unit of the forgetting; the axis is turned over, so up is better.
        notes: Method to words shown when it is pointed at, such as its size and learning rate.
        title: The question the chart answers.
        level: Confidence level, in (0, 1); default 0.95.
        start: Where the model before training is, a star; ``None``: it has no place here.
        clip: End the vertical axis (default) before a few methods that forget at least 2.5 times as much as all
            others; arrows at its edge say how much that is. ``False``: show everything where it is.

    Returns:
        A Plotly figure as a dictionary; methods are labelled where they are.

    Raises:
        ShapeError: Not pairs, or every method diverged.

    Example:
        >>> points = {"A": [[2.0, 1.0], [2.2, 1.2]], "B": [[1.0, 2.0], [1.0, 2.1]]}
        >>> figure = stability_plasticity(points, xlabel="gain", ylabel="forgetting")
        >>> figure["layout"]["meta"]["caption"]
        'On the front, where no other gains as much and forgets less: A. Beaten on both axes: B by A. \
Bars: 95% intervals of means over 2 seeds.'
    """
    found, gone, counts = {}, [], set()
    for label, pairs in named("points", points).items():
        runs = array(f"runs of {label!r}", pairs, dims=(2,), finite=False)
        if runs.shape[1] != 2:
            raise ShapeError(f"runs of {label!r} must be pairs (gain, forgetting); got shape {runs.shape}.")
        if np.isfinite(runs).all():
            found[label] = runs
            counts.add(len(runs))
        else:
            gone.append(label)
    if not found:
        raise ShapeError("every method diverged; there is nothing to draw.")
    means = {label: (float(runs[:, 0].mean()), float(runs[:, 1].mean())) for label, runs in found.items()}
    beaten = {label: [other for other in means if _beats(means[other], means[label])] for label in means}
    front = sorted((label for label in means if not beaten[label]), key=lambda label: means[label])
    far = _far(means) if clip else []
    origin = [] if start is None else [(float(start[0]), float(start[1]))]
    words = {str(label): note for label, note in (notes or {}).items()}
    data = [_staircase([means[label] for label in front], [*origin, *(runs.min(axis=0) for runs in found.values())])]
    for index, (label, runs) in enumerate(found.items()):
        data += _method(label, runs, index, "top center", words.get(label, ""), label in front, float(level))
    data += [_before(at) for at in origin]
    drawn = [trace for trace in data[1:] if trace["name"] not in far]
    (left, right), (low, high) = _reach(drawn, "x"), _reach(drawn, "y")
    labelled = [trace for trace in drawn if "text" in trace]
    places = [(trace["x"][0], trace["y"][0]) for trace in labelled]
    spots = _apart(places, [trace["name"] for trace in labelled], low=(left, low), high=(right, high))
    for trace, spot in zip(labelled, spots, strict=True):
        trace["textposition"] = spot
    vertical = axis(ylabel, autorange="reversed", zeroline=True, zerolinecolor=GUIDE)
    if far:
        vertical = axis(ylabel, range=[high, low], zeroline=True, zerolinecolor=GUIDE)
        data += [_arrow(trace, high - 0.025 * (high - low)) for trace in data if trace.get("text", [""])[0] in far]
    said = [f"On the front, where no other gains as much and forgets less: {listing(front)}."]
    if losers := [f"{label} by {listing(rivals)}" for label, rivals in beaten.items() if rivals]:
        said.append(f"Beaten on both axes: {'; '.join(losers)}.")
    if far:
        told = listing([f"{label}, which forgets {number(means[label][1])}" for label in far])
        said.append(f"Below the chart: {told}.")
    if gone:
        said.append(f"Diverged: {listing(gone)}.")
    if max(counts) > 1:
        seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
        said.append(f"Bars: {level:.0%} intervals of means over {seeds} seeds.")
    return build(
        "stability_plasticity",
        data,
        title=title,
        caption=" ".join(said),
        height=520,
        showlegend=False,
        xaxis=axis(xlabel, zeroline=True, zerolinecolor=GUIDE),
        yaxis=vertical,
    )


def rates_and_scores(
    rates: Mapping[Any, tuple[Any, Any, Any]],
    *,
    xlabel: str = "learning rate",
    gain: str = "gained",
    forgetting: str = "forgotten",
    most: Number | None = None,
    title: str = "What does the learning rate trade?",
) -> dict[str, Any]:
    """Gain and forgetting against the learning rate, side by side, so that nobody wins by being undertrained.

    Args:
        rates: Method to ``(rates, gains, forgettings)``: rates ``(n,)``, above 0, increasing; values ``(n,)`` or
            ``(seeds, n)``, NaN where a run diverged.
        xlabel: Name of the horizontal axes.
        gain: Name and unit of the left axis.
        forgetting: Name and unit of the right axis.
        most: Most forgetting that is shown; the left axis then ends where as much is lost as the best gains. Default
            all.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Rates and values do not fit together, or every run diverged.
        OptionError: A rate is not above 0.

    Example:
        >>> rates = {"A": ([1e-3, 2e-3, 4e-3], [0.5, 1.0, 0.8], [0.1, 0.2, 0.9])}
        >>> rates_and_scores(rates)["layout"]["meta"]["caption"]
        'At its best rate: A gains 1 and forgets 0.2 at 0.002; at twice that rate it forgets 0.9.'
    """
    data, said, every, heights = [], [], [], []
    for index, (label, entry) in enumerate(named("rates", rates).items()):
        across, gains, forgettings = _three(label, entry)
        if across[0] <= 0:
            raise OptionError(f"learning rates must be above 0; those of {label!r} begin with {across[0]:g}.")
        g, f = gains.mean(axis=0), forgettings.mean(axis=0)
        if not np.isfinite(g).any():
            continue
        data.append(line(label, across, g, index, markers=True))
        right = line(label, across, f, index, markers=True, showlegend=False)
        data.append(right | {"xaxis": "x2", "yaxis": "y2"})
        at = int(np.nanargmax(g))
        told = f"{label} gains {number(g[at])} and forgets {number(f[at])} at {number(across[at])}"
        if at + 1 < len(across) and np.isfinite(f[at + 1]):
            told += f"; at twice that rate it forgets {number(f[at + 1])}" if _double(across, at) else ""
        said.append(told)
        every.append(across)
        heights.append((float(np.nanmax(g)), float(np.nanmin(g)), float(np.nanmin(f))))
    if not data:
        raise ShapeError("every run diverged; there is nothing to draw.")
    left, right = (axis(name, zeroline=True, zerolinecolor=GUIDE) for name in (gain, forgetting))
    if most is not None:
        top = max(best for best, _, _ in heights)
        low = max(min(worst for _, worst, _ in heights), -top)
        least = min(0.0, min(value for _, _, value in heights))
        left["range"] = [low - 0.08 * abs(top), top + 0.08 * abs(top)]
        right["range"] = [least - 0.08 * float(most), float(most)]
    return build(
        "rates_and_scores",
        data,
        title=title,
        caption=f"At its best rate: {'. '.join(said)}.",
        height=460,
        xaxis=log_axis(xlabel, *every, domain=[0, 0.44]),
        yaxis=left,
        xaxis2=log_axis(xlabel, *every, domain=[0.56, 1], anchor="y2"),
        yaxis2=right | {"anchor": "x2"},
    )


def ways_back(
    paths: Mapping[Any, tuple[Any, Any, Any]],
    stops: Mapping[Any, Any] | None = None,
    *,
    xlabel: str,
    ylabel: str,
    told: Sequence[Number] = (0.5, 1.0),
    title: str = "What does going back part of the way cost, and what does it save?",
) -> dict[str, Any]:
    r"""Paths from finished models ($\alpha=1$) to the pretrained one ($\alpha=0$), in the plane of gain and forgetting.

    Args:
        paths: Path to ``(alphas, gains, forgettings)``: alphas ``(n,)``, increasing; values ``(n,)`` or ``(seeds, n)``.
        stops: Single points, such as layer-wise scales: name to ``(runs, 2)``.
        xlabel: Name and unit of the gain; right is better.
        ylabel: Name and unit of the forgetting; up is better.
        told: Places whose marks carry their ``alpha``; the ends of paths are the same points.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary: means over seeds with a mark for each ``alpha``, faint lines for the seeds.

    Raises:
        ShapeError: Alphas and values do not fit together.

    Example:
        >>> figure = ways_back({"A": ([0.0, 0.5, 1.0], [0, 1.5, 2.0], [0, 0.1, 1.0])}, xlabel="gain", ylabel="lost")
        >>> figure["layout"]["meta"]["caption"]
        'At α = 0.5: A keeps 75% of its gain and 10% of its forgetting.'
    """
    data: list[dict[str, Any]] = []
    said: dict[float, list[str]] = {}
    for index, (label, entry) in enumerate(named("paths", paths).items()):
        alphas, gains, forgettings = _three(label, entry)
        for g, f in zip(gains, forgettings, strict=True) if len(gains) > 1 else ():
            seed = line(label, g, f, index, markers=False, showlegend=False, hoverinfo="skip", opacity=0.25)
            data.append(seed)
        g, f = gains.mean(axis=0), forgettings.mean(axis=0)
        trace = line(label, g, f, index, markers=True)
        shown = [f"α = {a:g}" if any(np.isclose(a, place) for place in told) else "" for a in alphas]
        trace |= {"mode": "lines+markers+text", "text": shown, "textposition": "bottom right", "customdata": alphas}
        trace["textfont"] = {"size": 11, "color": trace["line"]["color"]}
        trace["hovertemplate"] = "α = %{customdata:g}: gained %{x:.3g}, forgotten %{y:.3g}<extra>" + label + "</extra>"
        data.append(trace)
        at = int(np.abs(alphas - 0.5).argmin())
        if 0 < at < len(alphas) - 1 and g[-1] > 0 and f[-1] > 0:
            kept = [f"{part[at] / part[-1]:.0%}".replace("-", "−") for part in (g, f)]
            words = f"{label} keeps {kept[0]} of its gain and {kept[1]} of its forgetting"
            said.setdefault(float(alphas[at]), []).append(words)
    count = len(paths)
    for index, (label, pairs) in enumerate(named("stops", stops).items() if stops else ()):
        runs = array(f"runs of {label!r}", pairs, dims=(2,))
        data += _method(label, runs, count + index, "top center", "", False, 0.95)
    halves = [f"At α = {at:g}: {'; '.join(words)}." for at, words in said.items()]
    caption = " ".join(halves) or "No path has a middle, a gain and a forgetting."
    return build(
        "ways_back",
        data,
        title=title,
        caption=caption,
        height=500,
        xaxis=axis(xlabel, zeroline=True, zerolinecolor=GUIDE),
        yaxis=axis(ylabel, autorange="reversed", zeroline=True, zerolinecolor=GUIDE),
    )


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """At least as much gained and no more forgotten, and one of them really."""
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def _method(
    label: str, runs: np.ndarray, index: int, place: str, note: str, front: bool, level: float
) -> list[dict[str, Any]]:
    """The seeds of a method, faint, and their mean with its intervals."""
    mark = line(label, [], [], index, markers=True)["marker"]
    mean, half = runs.mean(axis=0), np.zeros(2)
    shared = {"type": "scatter", "name": label, "legendgroup": label}
    data: list[dict[str, Any]] = []
    if len(runs) > 1:
        half = t_quantile(len(runs) - 1, level=level) * runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
        dots = {"marker": mark | {"size": 5, "opacity": 0.35}, "showlegend": False, "hoverinfo": "skip"}
        data.append({**shared, **dots, "mode": "markers", "x": runs[:, 0], "y": runs[:, 1]})
    bar = {"type": "data", "thickness": 1.4, "width": 4, "color": fade(mark["color"], 0.75)}
    said = [f"gained {_with(mean[0], half[0])}", f"forgotten {_with(mean[1], half[1])}", note]
    data.append(
        {
            **{**shared, "mode": "markers+text", "x": [mean[0]], "y": [mean[1]]},
            "error_x": bar | {"array": [half[0]]},
            "error_y": bar | {"array": [half[1]]},
            "marker": mark | {"size": 12, "line": {"width": 1.6 if front else 0, "color": "#1F2328"}},
            "text": [label],
            "textposition": place,
            "textfont": {"size": 12, "color": mark["color"]},
            "hovertemplate": "<br>".join(part for part in said if part) + f"<extra>{label}</extra>",
        }
    )
    return data


def _staircase(front: list[tuple[float, float]], corners: Sequence[Any]) -> dict[str, Any]:
    """The edge of what the front dominates: level up to each point, then down to the next one's forgetting."""
    start = min(float(corner[0]) for corner in corners)
    xs, ys = [start, *(g for g, _ in front)], [front[0][1], *(f for _, f in front)]
    edge = guide("front", xs, ys, showlegend=False, hoverinfo="skip")
    edge["line"] |= {"shape": "vh", "dash": "solid"}
    return edge


def _far(means: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those few who forget far more than all others."""
    order = sorted(means, key=lambda label: means[label][1], reverse=True)
    for count in range(len(order) // 4, 0, -1):
        most = means[order[count]][1]
        if most > 0 and means[order[count - 1]][1] > _FAR * most:
            return order[:count]
    return []


def _reach(traces: Sequence[dict[str, Any]], along: str) -> tuple[float, float]:
    """The least and the most that marks and bars show on an axis, with some room."""
    ys = [np.asarray(trace[along], dtype=float) for trace in traces]
    bars = [np.asarray(trace.get(f"error_{along}", {}).get("array", [0.0]), dtype=float) for trace in traces]
    low = min(float((y - bar).min()) for y, bar in zip(ys, bars, strict=True))
    high = max(float((y + bar).max()) for y, bar in zip(ys, bars, strict=True))
    return low - 0.06 * (high - low), high + 0.1 * (high - low)


def _arrow(mean: Mapping[str, Any], height: float) -> dict[str, Any]:
    """At the lower edge, under where a method would be, with the forgetting that has no place there."""
    name = str(mean["name"])
    return {
        **{key: mean[key] for key in ("type", "mode", "name", "legendgroup", "x", "hovertemplate", "textfont")},
        **{"y": [height], "text": [f"{name}: {number(mean['y'][0])}"], "textposition": "top center"},
        "marker": {"symbol": "triangle-down", "size": 11, "color": mean["marker"]["color"]},
        "hovertemplate": mean["hovertemplate"].replace("<extra>", "<br>below the chart<extra>"),
    }


def _before(at: tuple[float, float]) -> dict[str, Any]:
    return {
        **{"type": "scatter", "mode": "markers+text", "name": "before", "x": [at[0]], "y": [at[1]], "text": ["before"]},
        "textfont": {"size": 12, "color": GUIDE},
        "marker": {"symbol": "star", "size": 12, "color": GUIDE},
        "hovertemplate": "the pretrained model<extra></extra>",
    }


def _apart(
    points: Sequence[tuple[float, float]], labels: Sequence[str], *, low: tuple[float, float], high: tuple[float, float]
) -> list[str]:
    """For each point the place of its label that is furthest from other points and from labels placed before."""
    at, spread = np.array(points, dtype=float), np.subtract(high, low)
    at = (at - low) / np.where(spread > 0, spread, 1.0)
    at[:, 1] = 1 - at[:, 1]
    taken, chosen = [], []
    for index, label in enumerate(labels):
        width = _CHARACTER * len(label)
        others = np.delete(at, index, axis=0)
        best, room = "top center", -np.inf
        for place, (dx, dy) in _PLACES.items():
            middle = at[index] + (dx + np.sign(dx) * width / 2, dy)
            # A label is wide and low: what stands beside it at its height is as near as what is above it.
            gaps = [
                np.hypot(max(abs(x - middle[0]) - width / 2 - w / 2, 0), 1.6 * (y - middle[1])) for x, y, w in taken
            ]
            gaps += [np.hypot(max(abs(x - middle[0]) - width / 2, 0), 1.6 * (y - middle[1])) for x, y in others]
            nearest = min([*gaps, 0.12])
            if nearest > room + 1e-9:
                best, room, spot = place, nearest, middle
        chosen.append(best)
        taken.append((*spot, width))
    return chosen


def _three(label: str, entry: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Across and two scores, one row a seed each."""
    try:
        across, gains, forgettings = entry
    except (TypeError, ValueError) as cause:
        raise ShapeError(f"{label!r} must map to (across, gains, forgettings); got {type(entry).__name__}.") from cause
    across, first = _pair(label, (across, gains))
    second = seeded(f"forgettings of {label!r}", forgettings, len(across), per="point", finite=False)
    if len(second) != len(first):
        raise ShapeError(f"{label!r} has gains of {len(first)} seeds and forgettings of {len(second)}.")
    return vector(f"across of {label!r}", across), first, second


def _double(across: np.ndarray, at: int) -> bool:
    return bool(np.isclose(across[at + 1] / across[at], 2, rtol=0.05))


def _with(value: float, half: float) -> str:
    return f"{number(value)} ± {number(half)}" if half else number(value)
