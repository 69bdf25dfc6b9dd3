"""Coefficient tables at work: their maps, spectra before and after, accuracy against cost, and what scalings do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import named, vector
from orthokit.figures.template import GUIDE, axis, build, guide, line, listing, log_axis, number, style

__all__ = ["accuracy_cost", "before_after", "scaling_ranges", "table_maps"]

_GAP = 0.035
# What cannot be told from this on a logarithmic axis is drawn here.
_FLOOR = 1e-4


def table_maps(maps: Mapping[Any, tuple[Any, Any]], *, columns: int = 4, wanted: float = 0.02) -> dict[str, Any]:
    """Where every table sends a singular value, one small panel a table, on a logarithmic axis.

    Args:
        maps: Label to ``(x, y)``, both ``(n,)``: singular value in, positive and increasing, and out.
        columns: Panels in a row, ``>= 1``; default 4.
        wanted: The caption judges inputs from here on; default 0.02, what Gaussian matrices of a few hundred have.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        OptionError: ``columns`` below 1, or an input that is not positive.

    Example:
        >>> figure = table_maps({"cubic": ([0.1, 1.0], [0.5, 1.0]), "steep": ([0.1, 1.0], [0.9, 1.2])})
        >>> figure["layout"]["meta"]["caption"].split(";")[0]
        'From 0.02 on, steep comes closest to 1 (within 0.2)'
    """
    curves = named("maps", maps)
    if columns < 1:
        raise OptionError(f"columns must be at least 1; got {columns}.")
    rows = -(-len(curves) // columns)
    data, layout, titles, misses = [], {}, [], {}
    lowest = 0.0
    for index, (label, (x, y)) in enumerate(curves.items()):
        x = vector(f"inputs of {label!r}", x, increasing=True)
        y = vector(f"outputs of {label!r}", y, length=len(x))
        if x[0] <= 0:
            raise OptionError(f"inputs of {label!r} must be positive, as the axis is logarithmic; got {x[0]:g}.")
        row, column = divmod(index, columns)
        ends = _panel(index, row, column, rows, columns)
        data.append(line(label, x, y, 0, markers=False, showlegend=False, **ends["trace"]))
        data.append(guide("1", [x[0], x[-1]], [1, 1], showlegend=False, hoverinfo="skip", **ends["trace"]))
        below = index + columns >= len(curves)
        layout[ends["x"]] = log_axis("in" if below else "", x, domain=ends["across"], anchor=ends["trace"]["yaxis"])
        layout[ends["x"]] |= {"showticklabels": below, "matches": "x" if index else None}
        layout[ends["y"]] = axis("out" if column == 0 else "", domain=ends["down"], anchor=ends["trace"]["xaxis"])
        layout[ends["y"]] |= {"showticklabels": column == 0, "matches": "y" if index else None}
        titles.append(_heading(label, ends))
        misses[label] = float(np.abs(y - 1)[x >= min(wanted, x[-1])].max())
        lowest = min(lowest, float(y.min()))
    top = max(1.4, *(float(np.max(t["y"])) for t in data))
    layout["yaxis"] |= {"range": [min(-0.05, 1.1 * lowest), 1.05 * top]}
    closest, furthest = min(misses, key=misses.__getitem__), max(misses, key=misses.__getitem__)
    said = f"From {number(wanted)} on, {closest} comes closest to 1 (within {number(misses[closest])})"
    if furthest != closest:
        said += f"; {furthest} stays furthest from it ({number(misses[furthest])})"
    return build(
        "table_maps",
        data,
        title="Where does each table send a singular value?",
        caption=f"{said}.",
        height=90 + 150 * rows,
        annotations=titles,
        **layout,
    )


def before_after(
    before: Mapping[Any, Any],
    after: Mapping[Any, Mapping[Any, Any]],
    *,
    title: str = "What do the tables make of three spectra?",
) -> dict[str, Any]:
    """Singular values after orthogonalisation against those before, one panel a spectrum.

    Args:
        before: Spectrum to singular values ``(k,)``, descending and positive.
        after: The same spectra, each a mapping from label to the values that belong to the same directions, ``(k,)``;
            the same labels in each. What is not finite is left out.
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: The two name different spectra, or spectra with different labels.

    Example:
        >>> figure = before_after({"1/k": [1.0, 0.5]}, {"1/k": {"cubic": [1.0, 0.8], "svd": [1.0, 1.0]}})
        >>> figure["layout"]["meta"]["caption"]
        'Mean distance from 1, closest and furthest: 1/k: svd 0, cubic 0.1.'
    """
    before, after = named("before", before), named("after", after)
    if before.keys() != after.keys():
        raise ShapeError(f"before and after must name the same spectra; got {sorted(before)} and {sorted(after)}.")
    labels = list(named("after", next(iter(after.values()))))
    data, layout, titles, said = [], {}, [], []
    for index, (spectrum, values) in enumerate(before.items()):
        x = vector(f"singular values of {spectrum!r}", values)
        results = named(f"after {spectrum!r}", after[spectrum])
        if list(results) != labels:
            raise ShapeError(f"every spectrum needs the labels {labels}; {spectrum!r} has {list(results)}.")
        ends = _panel(index, 0, index, 1, len(before))
        errors = {}
        for number_, label in enumerate(labels):
            y = vector(f"{label!r} on {spectrum!r}", results[label], length=len(x), finite=False)
            trace = line(label, x / x[0], y, number_, markers=False, showlegend=index == 0, **ends["trace"])
            data.append(trace)
            miss = np.abs(y - 1).mean()
            errors[label] = float(miss) if np.isfinite(miss) else np.inf
        data.append(guide("1", [x[-1] / x[0], 1], [1, 1], showlegend=False, hoverinfo="skip", **ends["trace"]))
        layout[ends["x"]] = log_axis(
            "before, relative to the largest", x / x[0], domain=ends["across"], anchor=ends["trace"]["yaxis"]
        )
        layout[ends["y"]] = axis("after" if index == 0 else "", domain=ends["down"], anchor=ends["trace"]["xaxis"])
        layout[ends["y"]] |= {"showticklabels": index == 0, "matches": "y" if index else None}
        titles.append(_heading(spectrum, ends))
        pair = {min(errors, key=errors.__getitem__), max(errors, key=errors.__getitem__)}
        said.append(f"{spectrum}: {', '.join(f'{n} {_said(errors[n])}' for n in sorted(pair, key=errors.__getitem__))}")
    shown = np.concatenate([np.asarray(t["y"], dtype=float) for t in data])
    shown = shown[np.isfinite(shown)]
    # A table that diverges must not flatten the others.
    layout["yaxis"] |= {"range": [max(-1.3, min(0.0, float(shown.min()))) - 0.05, min(1.6, float(shown.max())) + 0.05]}
    return build(
        "before_after",
        data,
        title=title,
        caption=f"Mean distance from 1, closest and furthest: {'; '.join(said)}.",
        annotations=titles,
        legend={"y": 1.07},
        **layout,
    )


def accuracy_cost(points: Mapping[Any, Mapping[Any, tuple[Any, Any]]], *, limit: float | None = None) -> dict[str, Any]:
    """Accuracy against cost, one panel a spectrum; the grey line joins what nothing else beats in both.

    Args:
        points: Spectrum to a mapping from label to ``(cost, error)``: time relative to five plain steps, positive,
            and mean ``|s - 1|``. The first word of a label is its family, which sets its colour. What misses 1 by
            more than 1 on average has diverged and is left out.
        limit: A cost to mark with a vertical line.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic.

    Raises:
        ShapeError: Everything on a spectrum has diverged.

    Example:
        >>> figure = accuracy_cost({"1/k": {"a x5": (1.0, 0.1), "b x5": (1.2, 0.01), "c x5": (1.3, 0.2)}})
        >>> figure["layout"]["meta"]["caption"]
        'Not beaten in both cost and accuracy: 1/k: a x5 and b x5.'
    """
    data, layout, titles, said, gone = [], {}, [], [], []
    spectra = named("points", points)
    families = list(dict.fromkeys(label.split()[0] for entries in spectra.values() for label in entries))
    seen: set[str] = set()
    everything: list[float] = []
    for index, (spectrum, entries) in enumerate(spectra.items()):
        entries = named(f"points of {spectrum!r}", entries)
        found = {label: (float(c), max(float(e), _FLOOR)) for label, (c, e) in entries.items() if float(e) <= 1}
        gone += [f"{label} on {spectrum}" for label in entries if label not in found]
        if not found:
            raise ShapeError(f"{spectrum!r} needs at least one point with an error of at most 1.")
        ends = _panel(index, 0, index, 1, len(spectra))
        best = _front(found)
        steps = {"shape": "hv", "color": GUIDE, "width": 1.5, "dash": "solid"}
        front = guide("front", *zip(*(found[label] for label in best), strict=True), showlegend=False)
        data.append(front | {"line": steps, "hoverinfo": "skip"} | ends["trace"])
        if limit is not None:
            span = [min(e for _, e in found.values()), max(e for _, e in found.values())]
            data.append(guide("limit", [limit, limit], span, showlegend=False, **ends["trace"]))
        labelled = _apart(best, found)
        for number_, family in enumerate(families):
            members = [label for label in found if label.split()[0] == family]
            if members:
                trace = _family(family, {m: found[m] for m in members}, number_, labelled)
                data.append(trace | {"showlegend": family not in seen} | ends["trace"])
                seen.add(family)
        everything += [error for _, error in found.values()]
        costs = [cost for cost, _ in found.values()]
        title = "cost, five plain steps = 1"
        layout[ends["x"]] = log_axis(title, costs, domain=ends["across"], anchor=ends["trace"]["yaxis"])
        layout[ends["y"]] = {
            "domain": ends["down"],
            "anchor": ends["trace"]["xaxis"],
            "matches": "y" if index else None,
        }
        titles.append(_heading(spectrum, ends))
        said.append(f"{spectrum}: {listing(best)}")
    for key in [key for key in layout if key.startswith("yaxis")]:
        layout[key] |= log_axis("mean |s − 1|" if key == "yaxis" else "", everything, showticklabels=key == "yaxis")
    caption = f"Not beaten in both cost and accuracy: {'; '.join(said)}."
    return build(
        "accuracy_cost",
        data,
        title="What does accuracy cost?",
        caption=caption + (f" Diverged: {listing(gone)}." if gone else ""),
        height=500,
        annotations=titles,
        legend={"y": 1.06},
        **layout,
    )


def scaling_ranges(
    ranges: Mapping[Any, Mapping[Any, tuple[Any, Any]]], errors: Mapping[Any, Mapping[Any, Any]]
) -> dict[str, Any]:
    """Where each scaling lets the steps start, and how far from 1 they end.

    Args:
        ranges: Spectrum to a mapping from scaling to ``(smallest, largest)`` singular value before the first step.
        errors: The same keys: mean ``|s - 1|`` after the steps.

    Returns:
        A Plotly figure as a dictionary: a bar from smallest to largest for each, with its error at the right.

    Raises:
        ShapeError: ``errors`` lacks an entry.
        OptionError: A range that is not positive and increasing.

    Example:
        >>> figure = scaling_ranges({"1/k": {"a": (0.01, 0.5), "b": (0.1, 1.0)}}, {"1/k": {"a": 0.2, "b": 0.1}})
        >>> figure["layout"]["meta"]["caption"]
        'b starts highest on 1/k, 10 times above a, and ends within 0.1 instead of 0.2 on average.'
    """
    data, said, places, where = [], [], [], []
    spectra = named("ranges", ranges)
    for group, (spectrum, scalings) in enumerate(spectra.items()):
        scalings = named(f"ranges of {spectrum!r}", scalings)
        low = {}
        for index, (scaling, (start, end)) in enumerate(scalings.items()):
            if not 0 < float(start) <= float(end):
                raise OptionError(
                    f"the range of {scaling!r} on {spectrum!r} must be 0 < low <= high; got {start}, {end}."
                )
            if spectrum not in errors or scaling not in errors[spectrum]:
                raise ShapeError(f"errors needs an entry for {scaling!r} on {spectrum!r}.")
            place = -(group * (len(scalings) + 1) + index)
            trace = line(scaling, [start, end], [place, place], index, markers=True, showlegend=group == 0)
            trace["mode"] = "lines+markers+text"
            trace["text"] = ["", f"  {number(errors[spectrum][scaling])}"]
            trace["textposition"] = "middle right"
            trace["line"]["width"] = 4
            data.append(trace)
            low[scaling] = float(start)
        places.append(spectrum)
        where.append(-(group * (len(scalings) + 1) + (len(scalings) - 1) / 2))
        said.append(_highest(spectrum, low, errors[spectrum]))
    every = [x for trace in data for x in trace["x"]]
    # Room at the right for the errors, which are written there.
    span = [float(np.log10(min(every))) - 0.2, float(np.log10(max(every))) + 0.45]
    return build(
        "scaling_ranges",
        data,
        title="Where do the steps start, and how far from 1 do they end?",
        caption=f"{'; '.join(said)}.",
        xaxis=log_axis("singular values before the first step; right: mean |s − 1| after the last", every, range=span),
        yaxis=axis("spectrum", tickmode="array", tickvals=where, ticktext=places, showgrid=False),
    )


def _panel(index: int, row: int, column: int, rows: int, columns: int) -> dict[str, Any]:
    """Axis names and domains of one cell of a grid."""
    suffix = "" if index == 0 else str(index + 1)
    width, height = (1 - _GAP * (columns - 1)) / columns, (1 - 2.2 * _GAP * (rows - 1)) / rows
    left, bottom = column * (width + _GAP), (rows - 1 - row) * (height + 2.2 * _GAP)
    return {
        "x": f"xaxis{suffix}",
        "y": f"yaxis{suffix}",
        "across": [left, left + width],
        "down": [bottom, bottom + height],
        "trace": {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"},
    }


def _heading(text: str, ends: dict[str, Any]) -> dict[str, Any]:
    """The title of one panel, above its top left corner."""
    place = {"x": ends["across"][0], "y": ends["down"][1], "xref": "paper", "yref": "paper"}
    look = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "font": {"size": 12}}
    return {"text": f"<b>{text}</b>"} | place | look


def _front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Labels that nothing beats in both numbers, cheapest first."""
    best, lowest = [], np.inf
    for label, (_, error) in sorted(points.items(), key=lambda item: item[1]):
        if error < lowest:
            best.append(label)
            lowest = error
    return best


def _apart(best: list[str], points: dict[str, tuple[float, float]]) -> set[str]:
    """Those of the front that have room for their names: each an error clearly below that of the one before."""
    kept: list[str] = []
    for label in best:
        if not kept or points[label][1] < 0.6 * points[kept[-1]][1]:
            kept.append(label)
    return set(kept)


def _family(name: str, points: dict[str, tuple[float, float]], index: int, labelled: set[str]) -> dict[str, Any]:
    """Markers of one family, with the names of those that are ``labelled``."""
    colour, _, symbol = style(index)
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "legendgroup": name,
        "x": [cost for cost, _ in points.values()],
        "y": [error for _, error in points.values()],
        "text": [label if label in labelled else "" for label in points],
        # The exact factor is the dearest and stands at the right edge: its label points inwards.
        "textposition": "top left" if name == "svd" else "top right",
        "textfont": {"size": 11},
        "customdata": list(points),
        "hovertemplate": "%{customdata}: %{x:.2f}x, %{y:.3g}<extra></extra>",
        "marker": {"symbol": symbol, "size": 9, "color": colour},
    }


def _highest(spectrum: str, low: dict[str, float], errors: Mapping[Any, Any]) -> str:
    """How far apart the scalings start on a spectrum, and what that is worth."""
    top, bottom = max(low, key=low.__getitem__), min(low, key=low.__getitem__)
    ends = f"ends within {number(errors[top])} instead of {number(errors[bottom])} on average"
    return f"{top} starts highest on {spectrum}, {number(low[top] / low[bottom])} times above {bottom}, and {ends}"


def _said(error: float) -> str:
    return number(error) if np.isfinite(error) else "diverged"
