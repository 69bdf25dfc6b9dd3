"""A look at one to four checkpoints as one HTML page that needs nothing else: table, maps, spectra, words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orthokit.diagnostics.inspection import COLUMNS, GROUPS, Column, Inspection
from orthokit.diagnostics.verdict import describe_changes
from orthokit.errors import OptionError, ShapeError
from orthokit.figures import direction_profiles
from orthokit.figures._inspection import PLOTTED, colours, column_values, map_cells, on_scale, reason, words
from orthokit.figures.checkpoint_spectra import MOST_SPECTRA, inspection_spectra
from orthokit.figures.inspection import inspection_compare, inspection_depth, inspection_map
from orthokit.figures.template import listing, style
from orthokit.reports._packing import pack, pack_profiles, places
from orthokit.reports.notebook import duration, version
from orthokit.reports.page import _plotly_js, environment, write_text

__all__ = ["inspection_page"]

MOST_MODELS = 4
# What the page may weigh beside plotly.js: the whole stays under 6 MB.
_ROOM = 1_050_000
# Points kept of a spectrum and of a profile, tried in this order until the data fit.
_POINTS = ((96, 64), (64, 40), (48, 24), (40, 0), (24, 0), (0, 0))
_NO_SPECTRA = "The page has no spectra: it would be too large with them. The JSON file has all."
_NO_PROFILES = "The page has no profiles along directions: it would be too large with them. The JSON file has all."
# Entries of a list of what was left out.
_LISTED = 500
_ALWAYS = ("name", "shape", "kind")


def inspection_page(inspections: Inspection | Sequence[Inspection], path: str | Path) -> Path:
    """Writes the page of one inspection, or of two to four side by side.

    The file holds everything: a table to sort, filter and take along as CSV, a map of layers and roles, the spectra
    laid over each other, depth profiles, what was left out, and what each column means. Spectra are thinned for it
    (all values are in ``Inspection.to_json``), further the more matrices there are; a page that would still be too
    large keeps its largest matrices, and says so.

    Args:
        inspections: What :func:`orthokit.diagnostics.inspect` returned, or a sequence of one to four of them.
        path: Where to write; the file appears when it is complete.

    Returns:
        The path.

    Raises:
        OptionError: None or more than four inspections, or one without a matrix.
        ReportError: The file cannot be written.

    Numerics:
        Under 6 MB, 4.9 of them plotly.js. Values in the page have six digits, points of spectra a relative error
        below 1e-3.
    """
    several = [inspections] if isinstance(inspections, Inspection) else list(inspections)
    if not 1 <= len(several) <= MOST_MODELS:
        raise OptionError(f"a page compares one to four models; got {len(several)}. Write a page for each four.")
    for one in several:
        if not one.rows:
            raise OptionError(f"the inspection of {one.name!r} has no matrix, so there is nothing to show.")
    names = _names(several)
    data = _fitting(several, names)
    compared = any(one.compared for one in several)
    html = (
        environment()
        .get_template("inspection.html.j2")
        .render(
            title=f"Inspection of {listing(names)}",
            models=[_head(one, name) for one, name in zip(several, names, strict=True)],
            several=len(several) > 1,
            compared=compared,
            based=any(model["base_spectra"] for model in data["models"]),
            profiled=any(model["profiles"] for model in data["models"]),
            drawn=any(model["spectra"] for model in data["models"]),
            cut=data["cut"],
            groups=[(key, label) for key, label in GROUPS.items() if any(c["group"] == key for c in data["columns"])],
            shown=data["groups"],
            empty=[words(c) for c in COLUMNS.values() if c.name not in data["known"] and (compared or not c.compared)],
            glossary=[(label, [c for c in COLUMNS.values() if c.group == key]) for key, label in GROUPS.items()],
            depth=data["charts"]["depth"] is not None,
            listed=_LISTED,
            data=_embedded(data),
            plotly=_plotly_js(),
            version=version(),
        )
    )
    path = Path(path)
    write_text(path, html)
    return path


def _head(inspection: Inspection, name: str) -> dict[str, Any]:
    """What the page says about one model in words."""
    return {
        "name": name,
        "base": inspection.base_name,
        "summary": inspection.summary(),
        "notes": list(inspection.notes),
        "interrupted": inspection.interrupted,
        "took": duration(inspection.seconds) if inspection.seconds >= 0.1 else "",
        "verdicts": describe_changes(inspection.rows) if inspection.compared else [],
        "left_out": list(inspection.left_out),
        "unmatched": list(inspection.unmatched),
    }


def _names(several: Sequence[Inspection]) -> list[str]:
    """Their names; a second one of the same name is numbered."""
    names: list[str] = []
    for one in several:
        count = 1 + sum(name == one.name or name.startswith(f"{one.name} (") for name in names)
        names.append(one.name if count == 1 else f"{one.name} ({count})")
    return names


def _fitting(several: Sequence[Inspection], names: list[str]) -> dict[str, Any]:
    """The data of the page, as detailed as its room allows."""
    data = _data(several, names, [list(one.rows) for one in several])
    for points, along in _POINTS:
        _pack(data, several, points, along)
        if len(_embedded(data)) <= _ROOM:
            profiled = any(one.profiles for one in several)
            data["cut"] = _NO_SPECTRA if not points else _NO_PROFILES if profiled and not along else ""
            return data
    total = keep = max(len(one.rows) for one in several)
    while len(_embedded(data)) > _ROOM and keep > 1:
        keep //= 2
        data = _data(several, names, [_largest(one.rows, keep) for one in several])
        _pack(data, several, 0, 0)
    data["cut"] = (
        f"Only the {keep:,} largest matrices of each model are in this page, of {total:,}, and no spectra: it would be "
        "too large with them. The JSON file has all."
    )
    return data


def _largest(rows: Sequence[dict[str, Any]], keep: int) -> list[dict[str, Any]]:
    """The ``keep`` matrices of most numbers, in the order of the model."""
    chosen = sorted(range(len(rows)), key=lambda index: -(rows[index].get("numel") or 0))[:keep]
    return [rows[index] for index in sorted(chosen)]


def _data(several: Sequence[Inspection], names: list[str], every: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """All that the page holds but spectra and profiles."""
    known = [name for name in COLUMNS if any(row.get(name) is not None for rows in every for row in rows)]
    columns = [
        {"name": c.name, "label": c.label, "words": words(c), "group": c.group, "meaning": c.meaning,
         "number": c.kind != "text", "unit": c.unit, "always": c.name in _ALWAYS}
        for c in sorted((COLUMNS[name] for name in known), key=_place)
    ]  # fmt: skip
    plotted = [name for name in PLOTTED if name in known]
    return {
        "columns": columns,
        "groups": ["norms", "change" if any(one.compared for one in several) else "spectrum"],
        "known": known,
        "styles": [style(index) for index in range(2 * MOST_SPECTRA)],
        "most": MOST_SPECTRA,
        "models": [_model(*parts, known) for parts in zip(several, names, every, strict=True)],
        "chosen": _first_choice(every[0]),
        "opening": [_opening(every[:1], plotted), _opening(every, plotted)],
        "charts": _charts(dict(zip(names, every, strict=True)), plotted),
        "cut": "",
    }


def _pack(data: dict[str, Any], several: Sequence[Inspection], points: int, along: int) -> None:
    """Puts spectra and profiles into ``data``, of so many points each."""
    for model, one in zip(data["models"], several, strict=True):
        keys = model["cells"]["name"]
        model["spectra"] = pack(one.spectra, keys, points)
        model["base_spectra"] = pack(one.base_spectra, keys, points)
        model["profiles"] = pack_profiles(one.profiles, keys, along)
    packed = [model[part] for model in data["models"] for part in ("spectra", "base_spectra") if model[part]]
    data["places"] = {length: places(length, points) for length in sorted({k for one in packed for k in one["k"]})}


def _place(column: Column) -> int:
    """What identifies a matrix comes first, then its verdict and what changed, then the rest."""
    if column.name in _ALWAYS:
        return _ALWAYS.index(column.name)
    return len(_ALWAYS) + (0 if column.name == "verdict" else 1 if column.group == "change" else 2)


def _model(inspection: Inspection, name: str, rows: list[dict[str, Any]], known: list[str]) -> dict[str, Any]:
    """One model's table, column by column, and the places in its map."""
    cells, texts, why, reasons = {}, {}, {}, {}
    for column in (COLUMNS[key] for key in known):
        values = [row.get(column.name) for row in rows]
        cells[column.name] = [_compact(value) for value in values]
        if column.kind != "text":
            texts[column.name] = _texts(column, values, cells[column.name])
        absent = {
            index: reasons.setdefault(reason(row, column), len(reasons))
            for index, (row, value) in enumerate(zip(rows, values, strict=True))
            if value is None and column.name != "alpha_refused"
        }
        # Most columns lack a value for one and the same reason.
        why[column.name] = next(iter(absent.values())) if len(set(absent.values())) == 1 else absent
    roles, layers, grid = map_cells(rows)
    return {
        "name": name,
        "base": inspection.base_name,
        "cells": cells,
        "texts": texts,
        "why": why,
        "reasons": list(reasons),
        "map": {"roles": roles, "layers": layers, "cells": grid},
    }


def _charts(models: dict[str, list[dict[str, Any]]], plotted: list[str]) -> dict[str, Any]:
    """Each chart once in full, and for each column what differs from that; long arrays are filled in from the table."""
    several = len(models) > 1
    rows = next(iter(models.values()))
    depth = (
        (lambda column: inspection_depth(None, column, models=models))
        if several
        else (lambda column: _hollow(inspection_depth(rows, column), ("text",)))
    )
    profiles = direction_profiles({"": {"retention": [0.0], "adaptation": [0.0]}}, layer="a matrix")
    return {
        "map": [_map_chart(found, plotted) for found in models.values()],
        "depth": _patched(depth, plotted),
        "compare": _patched(lambda c: _hollow(inspection_compare(models, c)), plotted) if several else None,
        "spectra": inspection_spectra({"": [1.0]})["layout"],
        "profiles": profiles["layout"],
    }


def _map_chart(rows: list[dict[str, Any]], plotted: list[str]) -> dict[str, Any]:
    chart = _patched(lambda column: _hollow(inspection_map(rows, column)), plotted)
    floors = {}
    for name in plotted:
        values = column_values(rows, name)
        # A logarithmic scale is known by where it puts zero.
        lowest = on_scale(values, COLUMNS[name])(0.0)
        floors[name] = lowest if "tickvals" in colours(values, COLUMNS[name]).get("colorbar", {}) else None
    return {**(chart or {}), "floors": floors}


def _hollow(figure: dict[str, Any], keys: tuple[str, ...] = ("x", "y", "z", "text")) -> dict[str, Any]:
    """The figure without the arrays that the page computes from its table."""
    for trace in figure["data"]:
        for key in keys:
            trace.pop(key, None)
    axis = figure["layout"]["xaxis"]
    for key in ("tickvals", "ticktext") if figure["layout"]["meta"]["chart"] == "inspection_compare" else ():
        axis.pop(key, None)
    return figure


def _patched(make: Callable[[str], dict[str, Any]], plotted: list[str]) -> dict[str, Any] | None:
    """A figure and, for each column, its difference from it; ``None`` where no figure can be made."""
    try:
        figures = {column: make(column) for column in plotted}
    except ShapeError:
        return None
    first = next(iter(figures.values()))
    return {"figure": first, "patches": {column: _difference(figure, first) for column, figure in figures.items()}}


def _difference(new: Any, old: Any) -> Any:
    """What turns ``old`` into ``new``: changed keys (``null`` removes), entries of equally long lists of objects."""
    if isinstance(new, list):
        pairs = enumerate(zip(new, old, strict=True))
        return {str(index): _difference(mine, theirs) for index, (mine, theirs) in pairs if mine != theirs}
    changed: dict[str, Any] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in new:
            changed[key] = None
        elif key not in old:
            changed[key] = new[key]
        elif new[key] != old[key]:
            mine, theirs = new[key], old[key]
            nested = isinstance(mine, dict) and isinstance(theirs, dict)
            if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
                nested = all(isinstance(item, dict) for item in (*mine, *theirs))
            changed[key] = _difference(mine, theirs) if nested else mine
    return changed


def _first_choice(rows: list[dict[str, Any]]) -> list[str]:
    """What the spectra open with: the most changed and the least, or the matrices of most and least stable rank."""
    for column in ("relative_change", "stable_rank"):
        known = sorted((row for row in rows if row.get(column) is not None), key=lambda row: row[column])
        if known:
            return list(dict.fromkeys(known[index]["name"] for index in (-1, len(known) // 2, 0)))
    return [rows[0]["name"]]


def _opening(every: list[list[dict[str, Any]]], plotted: list[str]) -> str:
    """The column that a chart opens with: the change if all models have one."""
    names = [name for name in ("relative_change", "stable_rank") if name in plotted]
    shared = (name for name in names if all(any(row.get(name) is not None for row in rows) for rows in every))
    return next(shared, plotted[0])


def _texts(column: Column, values: list[Any], cells: list[Any]) -> dict[int, str]:
    """The texts of the cells that are not just four digits of their number: those the page writes itself."""
    own = {}
    for index, (value, cell) in enumerate(zip(values, cells, strict=True)):
        text = None if value is None else column.text(value)
        if text is not None and not (cell is not None and _usual(cell, text)):
            own[index] = text
    return own


def _usual(cell: float, text: str) -> bool:
    # A hair more than the number: where a tie decides, the two languages round differently.
    same = text == f"{cell:.4g}" == f"{cell * (1 + 1e-12):.4g}"
    return same and (cell == 0 or 1e-3 <= abs(cell) <= 9999)


def _compact(value: Any) -> Any:
    """Six digits, and nothing that JSON cannot hold."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")


def _embedded(data: dict[str, Any]) -> str:
    """JSON that can stand inside a script element: no "<" can end it or open a comment."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
