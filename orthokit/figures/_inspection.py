"""What the charts of a look at a checkpoint share: columns, cells, scales."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.diagnostics.inspection import COLUMNS, Column
from orthokit.errors import ShapeError, unknown_name
from orthokit.figures.template import DIVERGING, GUIDE, SEQUENTIAL, axis, log_axis

__all__ = [
    "MOST_NAMED",
    "PLOTTED",
    "Rows",
    "cell_text",
    "checked_rows",
    "colours",
    "column_values",
    "compare_ticks",
    "escaped",
    "height_axis",
    "logarithmic",
    "map_cells",
    "missing_cells",
    "on_scale",
    "plotted",
    "reason",
    "short",
    "sorted_names",
    "words",
]

PLOTTED = tuple(name for name, column in COLUMNS.items() if column.kind != "text" and name != "layer")
OUTSIDE = "no layer"
# From this ratio of the largest to the smallest value on, a linear scale would show two colours only.
_DECADES = 100.0
MOST_NAMED = 40

Rows = Sequence[Mapping[str, Any]]


def map_cells(rows: Rows) -> tuple[list[str], list[str], list[list[int | None]]]:
    """Where each matrix stands: the roles, the layers, and the number of the row (of ``rows``) in each cell."""
    places: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        layer, role = row.get("layer"), short(str(row.get("role") or row["name"]))
        key = (role, OUTSIDE if layer is None else str(int(layer)))
        if key in places:
            # Experts and heads share layer and role: their number in the stack tells them apart, else a count does.
            stack = re.search(r"\[\d+\]$", str(row["name"]))
            fits = stack is not None and (role + stack.group(), key[1]) not in places
            key = (role + stack.group() if stack and fits else _free(role, key[1], places), key[1])
        places[key] = index
    layers = [str(n) for n in sorted({int(layer) for _, layer in places if layer != OUTSIDE})]
    outside = [role for role, layer in places if layer == OUTSIDE]
    roles = list(dict.fromkeys([role for role, layer in places if layer != OUTSIDE] + outside))
    # An empty column sets apart what has no layer.
    across = layers + [" "] * bool(layers and outside) + [OUTSIDE] * bool(outside)
    return roles, across, [[places.get((role, layer)) for layer in across] for role in roles]


def missing_cells(roles: list[str], layers: list[str], cells: list[list[int | None]], missing: Any) -> dict[str, Any]:
    """Places of the matrices that have no value, as ``x`` and ``y``."""
    found = [(x, y) for y, row in zip(roles, cells, strict=True) for x, cell in zip(layers, row, strict=True)
             if cell is not None and missing[cell]]  # fmt: skip
    return {"x": [x for x, _ in found], "y": [y for _, y in found]}


def cell_text(row: Mapping[str, Any], column: Column) -> str:
    """What the hover says of a matrix."""
    value = row.get(column.name)
    said = f"{words(column)} {column.text(value)}" if value is not None else f"{words(column)}: {reason(row, column)}"
    return escaped(f"{row['name']}\n{row.get('shape', '')}\n{said}").replace("\n", "<br>")


def reason(row: Mapping[str, Any], column: Column) -> str:
    """Why a cell is empty."""
    if column.group == "tail":
        return str(row.get("alpha_refused") or "not measured")
    if column.group == "change":
        return "not measured: no base, or none of it has this name and shape; or not defined for this change"
    return "not measured yet or not defined here"


def escaped(text: str) -> str:
    """A name as Plotly shows it letter by letter; of the entities it knows these three and no quotes."""
    return html.escape(text, quote=False)


def short(name: str) -> str:
    """A name without the word that nearly all parameters end in."""
    return name.removesuffix(".weight")


def sorted_names(tables: Sequence[Mapping[str, float]]) -> list[str]:
    """Every name, by falling value of the first table; those without one last, in the order in which they come."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    first = tables[0]
    return sorted(names, key=lambda name: -first[name] if math.isfinite(first.get(name, math.nan)) else math.inf)


def compare_ticks(order: Sequence[str]) -> dict[str, Any]:
    """Names as ticks, where there are few enough to be read."""
    if len(order) > MOST_NAMED:
        return {"showticklabels": False, "ticks": ""}
    where = {"tickmode": "array", "tickvals": list(range(1, len(order) + 1)), "tickangle": -50}
    return where | {"ticktext": [escaped(short(name)) for name in order], "tickfont": {"size": 10}}


def plotted(name: str) -> Column:
    """A column that can be drawn, by its name."""
    if name not in PLOTTED:
        raise unknown_name("column of numbers", name, PLOTTED)
    return COLUMNS[name]


def checked_rows(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows as a list, of which there has to be one."""
    kept = list(rows)
    if not kept:
        raise ShapeError("rows must hold at least one matrix; got none.")
    return kept


_WORDS = {
    "relative_change": "relative change",
    "orthogonality_error": "distance from orthogonal",
    "mp_distance": "distance from random",
    "above_edge": "values above the noise edge",
    "above_floor": "values above the rounding floor",
    "alpha_distance": "distance from the power law",
    "alpha_tail": "values in the tail",
    "energy_excess": "energy above random",
    "outlier_rows": "number of odd rows",
    "outlier_columns": "number of odd columns",
    "change_stable_rank": "stable rank of the change",
    "change_rank": "rank of the change",
    "rotation_fraction": "rotation-like share",
    "rotation_angle": "rotation angle",
    "rotation_residual": "change beside the rotation",
    "block_size": "block size",
}


def words(column: Column) -> str:
    """What a column is called in a sentence, where its label has lost its neighbours."""
    return _WORDS.get(column.name, column.label)


def column_values(rows: Rows, column: str) -> np.ndarray:
    """The column as float64, NaN where there is no finite value."""
    values = np.array([math.nan if row.get(column) is None else float(row[column]) for row in rows])
    return np.where(np.isfinite(values), values, math.nan)


def logarithmic(values: np.ndarray, column: Column) -> bool:
    """Whether the positive values of a column without a sign span two decades."""
    positive = values[values > 0]
    return not column.signed and positive.size > 1 and not (values < 0).any() and _span(positive) >= _DECADES


def _span(positive: np.ndarray) -> float:
    return float(positive.max() / positive.min())


def on_scale(values: np.ndarray, column: Column) -> Callable[[float], float | None]:
    """From a value to the number that has its colour; zeros lie half a decade below the smallest positive value."""
    if not logarithmic(values, column):
        return lambda value: None if math.isnan(value) else value
    floor = float(np.log10(values[values > 0].min())) - 0.5
    return lambda value: None if math.isnan(value) else math.log10(value) if value > 0 else floor


def colours(values: np.ndarray, column: Column) -> dict[str, Any]:
    """Colours and limits of a heat map."""
    bar: dict[str, Any] = {"title": {"text": words(column), "side": "right"}, "thickness": 14}
    finite = values[np.isfinite(values)]
    if not finite.size:
        return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1, "showscale": False}
    if column.signed:
        most = float(np.abs(finite).max()) or 1.0
        return {"colorscale": DIVERGING, "zmin": -most, "zmid": 0, "zmax": most, "colorbar": bar}
    if logarithmic(values, column):
        positive = finite[finite > 0]
        low, high = float(np.log10(positive.min())), float(np.log10(positive.max()))
        marks = log_axis("", positive)
        ticks = [(math.log10(v), t) for v, t in zip(marks["tickvals"], marks["ticktext"], strict=True)]
        ticks = [(v, t) for v, t in ticks if low - 1e-9 <= v <= high + 1e-9]
        if (finite == 0).any():
            low -= 0.5
            ticks.insert(0, (low, "0"))
        bar |= {"tickmode": "array", "tickvals": [v for v, _ in ticks], "ticktext": [t for _, t in ticks]}
        return {"colorscale": SEQUENTIAL, "zmin": low, "zmax": high, "colorbar": bar}
    low, high = float(finite.min()), float(finite.max())
    # One value everywhere has no range: it gets the lower colour of a range as wide as itself.
    high = high if high > low else low + (abs(low) or 1.0)
    return {"colorscale": SEQUENTIAL, "zmin": low, "zmax": high, "colorbar": bar}


def height_axis(values: np.ndarray, column: Column) -> tuple[dict[str, Any], str]:
    """The axis of a measurement, and what the caption has to add about it."""
    name = words(column) + (f" ({column.unit})" if column.unit else "")
    finite = values[np.isfinite(values)]
    if not logarithmic(finite, column):
        return axis(name, **({"zeroline": True, "zerolinecolor": GUIDE} if column.signed else {})), ""
    zeros = int((finite == 0).sum())
    return log_axis(name, finite), f"; {zeros} at exactly 0 lie below the axis" if zeros else ""


def _free(role: str, layer: str, places: Mapping[tuple[str, str], int]) -> str:
    count = 2
    while (f"{role} ({count})", layer) in places:
        count += 1
    return f"{role} ({count})"
