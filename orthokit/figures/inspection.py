"""What a look at a checkpoint measured, in pictures: over layers and roles, along the depth, model beside model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.diagnostics.inspection import Column
from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.figures._check import named
from orthokit.figures._inspection import (
    MOST_NAMED,
    PLOTTED,
    Rows,
    cell_text,
    checked_rows,
    colours,
    column_values,
    compare_ticks,
    escaped,
    height_axis,
    logarithmic,
    map_cells,
    missing_cells,
    on_scale,
    plotted,
    reason,
    short,
    sorted_names,
    words,
)
from orthokit.figures.template import GUIDE, axis, band, build, line, listing, number, style

__all__ = ["PLOTTED", "inspection_compare", "inspection_depth", "inspection_map"]

MOST_MODELS = 4

# Marks along the depth.
_TICKS = 24


def inspection_map(
    rows: Rows, column: str, *, names: Sequence[str] | None = None, title: str | None = None
) -> dict[str, Any]:
    """One measurement of every matrix of a model as colours: layers along the depth, a row for each role.

    Colours are logarithmic where the values span two decades, and centred at zero for columns with a sign. Matrices
    without a layer (embeddings, heads) stand apart at the right. A cross marks a matrix without a value; its reason
    is in the hover.

    Args:
        rows: ``Inspection.rows``: ``name``, ``shape``, ``layer``, ``role`` and the column.
        column: One of :data:`PLOTTED`.
        names: Show only these matrices; default all.
        title: The question; made from the column when not given.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        UnknownNameError: An unknown column, or one that holds text.
        ShapeError: There are no rows, or none of ``names``.

    Example:
        >>> rows = [{"name": f"h.{i}.q", "shape": "2 x 2", "layer": i, "role": "q", "noise": 0.1 + i} for i in (0, 1)]
        >>> inspection_map(rows, "noise")["layout"]["meta"]["caption"]
        'Largest 1.1 in h.1.q, smallest 0.1 in h.0.q, median 0.6 of 2 matrices.'
    """
    of = plotted(column)
    kept = _chosen(checked_rows(rows), names)
    roles, layers, cells = map_cells(kept)
    values = column_values(kept, column)
    scale, height = colours(values, of), on_scale(values, of)
    z = [[None if cell is None else height(values[cell]) for cell in row] for row in cells]
    text = [["no such matrix" if cell is None else cell_text(kept[cell], of) for cell in row] for row in cells]
    heat: dict[str, Any] = {
        **{"type": "heatmap", "x": layers, "y": roles, "z": z, "text": text, "hovertemplate": "%{text}<extra></extra>"},
        **{"xgap": 1, "ygap": 1, "hoverongaps": True, "name": words(of)},
        **scale,
    }
    crosses = missing_cells(roles, layers, cells, ~np.isfinite(values))
    mark = {"symbol": "x-thin", "size": 9, "color": GUIDE, "line": {"width": 1.5, "color": GUIDE}}
    absent = {"type": "scatter", "mode": "markers", "name": "no value", "marker": mark, "hoverinfo": "skip"}
    absent |= {"showlegend": False} | crosses
    return build(
        "inspection_map",
        [heat, absent],
        title=title or f"Which layers and roles stand out in {words(of)}?",
        caption=_extremes(kept, values, of),
        height=min(170 + 24 * len(roles), 1400),
        # Both lists are given, as an empty column between the layers and the rest would vanish otherwise.
        xaxis=axis("layer", type="category", categoryarray=layers, range=[-0.5, len(layers) - 0.5], showgrid=False),
        yaxis=axis("", type="category", categoryarray=roles, range=[len(roles) - 0.5, -0.5], showgrid=False),
    )


def inspection_depth(
    rows: Rows | None, column: str, *, models: Mapping[str, Rows] | None = None, title: str | None = None
) -> dict[str, Any]:
    """One measurement along the depth of a model: a line for each role; of several models, a line for each model.

    Args:
        rows: ``Inspection.rows`` of one model; ``None`` where ``models`` are given.
        column: One of :data:`PLOTTED`.
        models: Name to rows, up to four: the line is the median over the roles of a layer, the band goes from its
            smallest to its largest value.
        title: The question; made from the column when not given.

    Returns:
        A Plotly figure as a dictionary. Matrices without a layer are left out, and the caption counts them.

    Raises:
        UnknownNameError: An unknown column, or one that holds text.
        OptionError: Both or neither of ``rows`` and ``models``, or more than four models.
        ShapeError: No matrix has a layer.

    Example:
        >>> rows = [{"name": f"h.{i}.q", "layer": i, "role": "q", "stable_rank": 10.0 + i} for i in range(3)]
        >>> inspection_depth(rows, "stable_rank")["layout"]["meta"]["caption"]
        'Median over the roles: 10 in layer 0, 12 in layer 2.'
    """
    of = plotted(column)
    if (rows is None) == (models is None):
        raise OptionError("give rows for one model or models for several, and not both.")
    data: list[dict[str, Any]] = []
    if models is not None:
        every = {label: checked_rows(found) for label, found in _few(models).items()}
        middles = {label: _by_layer(found, column) for label, found in every.items()}
        ends = column_values([row for found in every.values() for row in found], column)
        # A log axis has no zero: a band ends at the smallest value that it can show.
        lowest = float(ends[ends > 0].min()) if logarithmic(ends, of) else -math.inf
        for index, (label, found) in enumerate(middles.items()):
            low, middle, high = np.array(list(found.values()), dtype=float).reshape(-1, 3).T
            across = np.array(list(found), dtype=float)
            data.append(band(escaped(label), across, np.maximum(low, lowest), np.maximum(high, lowest), index))
            data.append(line(escaped(label), across, middle, index))
        said = _depth_of_models(middles) + ". Bands reach from the smallest to the largest role"
    else:
        every = {"": checked_rows(rows or [])}
        roles = _by_role(every[""], column)
        for index, (role, found) in enumerate(roles.items()):
            text = [escaped(f"{row['name']}: {of.text(row.get(column))}") for _, row in found.values()]
            names = [str(row["name"]) for _, row in found.values()]
            drawn = line(escaped(role), list(found), [value for value, _ in found.values()], index)
            data.append(drawn | {"customdata": names, "text": text, "hovertemplate": "%{text}<extra></extra>"})
        said = _ends(_by_layer(every[""], column))
    kept = [row for found in every.values() for row in found if row.get("layer") is not None]
    if not kept:
        raise ShapeError("no matrix has a layer number, so there is no depth to follow.")
    apart = sum(len(found) for found in every.values()) - len(kept)
    if apart:
        said += f"; {apart} without a layer left out"
    values = column_values(kept, column)
    vertical, note = height_axis(values, of)
    return build(
        "inspection_depth",
        data,
        title=title or f"How does {words(of)} vary with the depth?",
        caption=f"{said}{note}.",
        # Layers are whole; a wide plot of few would have a mark between two of them.
        xaxis=axis("layer", tickformat="d", dtick=-(-len({row["layer"] for row in kept}) // _TICKS)),
        yaxis=vertical,
    )


def inspection_compare(models: Mapping[str, Rows], column: str, *, title: str | None = None) -> dict[str, Any]:
    """The same matrices of up to four models side by side: a dot for each, sorted by the first model.

    Args:
        models: Name to ``Inspection.rows``; matrices meet by name.
        column: One of :data:`PLOTTED`.
        title: The question; made from the column when not given.

    Returns:
        A Plotly figure as a dictionary; the caption tells the medians and where two models differ most.

    Raises:
        UnknownNameError: An unknown column, or one that holds text.
        OptionError: More than four models.
        ShapeError: No model, or no rows.

    Example:
        >>> one = [{"name": "a", "noise": 1.0}, {"name": "b", "noise": 2.0}]
        >>> two = [{"name": "a", "noise": 1.0}, {"name": "b", "noise": 3.0}]
        >>> inspection_compare({"one": one, "two": two}, "noise")["layout"]["meta"]["caption"]
        'Median: one 1.5, two 2. Furthest apart in b: one 2, two 3.'
    """
    of = plotted(column)
    every = {label: checked_rows(found) for label, found in _few(models).items()}
    tables = {
        label: dict(zip((row["name"] for row in found), column_values(found, column), strict=True))
        for label, found in every.items()
    }
    order = sorted_names(list(tables.values()))
    grid = np.array([[table.get(name, math.nan) for name in order] for table in tables.values()])
    said = [{row["name"]: of.text(row.get(column)) for row in found} for found in every.values()]
    text = [[escaped(f"{name}: {mine.get(name, '-')}") for name in order] for mine in said]
    data = [
        line(escaped(label), list(range(1, len(order) + 1)), row, index, markers=True)
        | {
            "marker": _marker(index),
            "mode": "markers",
            "text": words,
            "hovertemplate": f"%{{text}}<extra>{escaped(label)}</extra>",
        }
        for index, (label, row, words) in enumerate(zip(tables, grid, text, strict=True))
    ]
    vertical, note = height_axis(grid, of)
    return build(
        "inspection_compare",
        data,
        title=title or f"Where do the models differ in {words(of)}?",
        caption=_differences(list(tables), order, grid, of, vertical) + note + ".",
        # Names stand below the chart and take the more of its height the longer they are.
        height=460 + (min(6 * max(len(short(name)) for name in order), 240) if len(order) <= MOST_NAMED else 0),
        xaxis=axis(f"matrices, sorted by {escaped(next(iter(tables)))}") | compare_ticks(order),
        yaxis=vertical,
    )


def _marker(index: int) -> dict[str, Any]:
    """Smaller from model to model and the first one open, so that equal values show all their markers."""
    colour, _, symbol = style(index)
    return {"symbol": symbol + ("" if index else "-open"), "size": 12 - 2.5 * index, "color": colour}


def _few(models: Mapping[str, Rows]) -> dict[str, Rows]:
    several = named("models", models)
    if len(several) > MOST_MODELS:
        raise OptionError(
            f"at most four models can be read side by side; got {len(several)}. Choose four, or make two comparisons."
        )
    return several


def _chosen(rows: list[Mapping[str, Any]], names: Sequence[str] | None) -> list[Mapping[str, Any]]:
    if names is None:
        return rows
    known = {str(row["name"]) for row in rows}
    for name in names:
        if name not in known:
            raise unknown_name("matrix", name, sorted(known))
    return checked_rows([row for row in rows if row["name"] in set(names)])


def _extremes(rows: Rows, values: np.ndarray, column: Column) -> str:
    """The reading of a map."""
    known = np.isfinite(values)
    missing = int((~known).sum())
    without = f"; {missing} without a value" if missing else ""
    if not known.any():
        return f"None of the {len(rows)} matrices has a value: {reason(rows[0], column)}."
    finite = values[known]
    names = [short(str(row["name"])) for row, here in zip(rows, known, strict=True) if here]
    if float(finite.max()) == float(finite.min()):
        return f"The same in each of the {len(finite)} matrices: {number(finite[0])}{without}."
    top, bottom = (f"{number(end)} in {_where(finite == end, names)}" for end in (finite.max(), finite.min()))
    middle = f"median {number(np.median(finite))} of {len(finite)} matrices"
    return f"Largest {top}, smallest {bottom}, {middle}{without}."


def _where(here: np.ndarray, names: list[str]) -> str:
    """The name of the one matrix, or how many there are."""
    return names[int(here.argmax())] if here.sum() == 1 else f"{int(here.sum())} matrices"


def _by_layer(rows: Rows, column: str) -> dict[int, tuple[float, float, float]]:
    """Layer to the smallest, the median and the largest value in it."""
    layers: dict[int, list[float]] = {}
    for row, value in zip(rows, column_values(rows, column), strict=True):
        if row.get("layer") is not None and math.isfinite(value):
            layers.setdefault(int(row["layer"]), []).append(float(value))
    return {n: (min(found), float(np.median(found)), max(found)) for n, found in sorted(layers.items())}


def _by_role(rows: Rows, column: str) -> dict[str, dict[int, tuple[float, Mapping[str, Any]]]]:
    """Role to layer to value and row; the roles are those of the map."""
    values = column_values(rows, column)
    layered = [index for index, row in enumerate(rows) if row.get("layer") is not None]
    roles, layers, cells = map_cells([rows[index] for index in layered])
    found: dict[str, dict[int, tuple[float, Mapping[str, Any]]]] = {}
    for role, row in zip(roles, cells, strict=True):
        for layer, cell in zip(layers, row, strict=True):
            if cell is not None:
                value = float(values[layered[cell]])
                found.setdefault(role, {})[int(layer)] = (value, rows[layered[cell]])
    return found


def _ends(found: dict[int, tuple[float, float, float]]) -> str:
    if not found:
        return "No matrix of a layer has a value"
    first, last = min(found), max(found)
    return (
        f"Median over the roles: {number(found[first][1])} in layer {first}, {number(found[last][1])} in layer {last}"
    )


def _depth_of_models(middles: Mapping[str, dict[int, tuple[float, float, float]]]) -> str:
    known = {label: found for label, found in middles.items() if found}
    if not known:
        return "No matrix of a layer has a value"
    said = [f"{label} {number(np.median([m[1] for m in found.values()]))}" for label, found in known.items()]
    text = f"Median over the layers: {listing(said)}"
    shared = sorted(set.intersection(*(set(found) for found in known.values())))
    if len(known) > 1 and shared:
        at = max(shared, key=lambda layer: np.ptp([found[layer][1] for found in known.values()]))
        text += f". Furthest apart in layer {at}: "
        text += listing([f"{label} {number(found[at][1])}" for label, found in known.items()])
    return text


def _differences(
    labels: list[str], order: list[str], grid: np.ndarray, column: Column, vertical: Mapping[str, Any]
) -> str:
    """The reading of a comparison: medians, and the matrix in which two models lie furthest apart."""
    known = [(label, row[np.isfinite(row)]) for label, row in zip(labels, grid, strict=True)]
    said = [f"{label} {number(np.median(row)) if row.size else 'without a value'}" for label, row in known]
    text = f"Median: {', '.join(said)}"
    both = np.isfinite(grid).sum(0) > 1
    if not both.any():
        return text
    # On a log axis the eye compares ratios.
    heights = np.log(np.where(grid > 0, grid, np.nan)) if vertical.get("type") == "log" else grid
    apart = np.array([np.ptp(h[np.isfinite(h)]) if np.isfinite(h).sum() > 1 else 0.0 for h in heights.T])
    at = int(apart.argmax())
    if apart[at] == 0:
        return f"{text}. Equal in all {int(both.sum())} matrices that they share"
    here = [f"{label} {number(v)}" for label, v in zip(labels, grid[:, at], strict=True) if math.isfinite(v)]
    return f"{text}. Furthest apart in {short(order[at])}: {', '.join(here)}"
