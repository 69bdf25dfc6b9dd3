"""Charts of the page "Inspect", made from those of :mod:`orthokit.figures`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orthokit.diagnostics import Inspection
from orthokit.errors import ShapeError
from orthokit.figures import (
    density_with_law,
    direction_profiles,
    inspection_compare,
    inspection_depth,
    inspection_map,
    inspection_spectra,
)
from orthokit.figures._inspection import map_cells, short

__all__ = ["compare", "density", "depth", "first_choice", "heat", "profiles", "spectra"]

Rows = Sequence[Mapping[str, Any]]


def heat(rows: Rows, column: str) -> dict[str, Any] | None:
    """A measurement of every matrix as colours; each cell carries the place of its row.

    Args:
        rows: What is known.
        column: What to show.

    Returns:
        A Plotly figure as a dictionary, or ``None`` while there is nothing.
    """
    if not rows:
        return None
    figure = inspection_map(rows, column)
    _, _, cells = map_cells(rows)
    figure["data"][0]["customdata"] = [[None if cell is None else [cell] for cell in row] for row in cells]
    figure["layout"]["meta"]["caption"] += " Press a cell for its spectrum."
    return figure


def depth(models: Mapping[str, Rows], column: str) -> dict[str, Any] | None:
    """A measurement along the depth, by role; of several models, of each as a whole."""
    first = next(iter(models.values()))
    try:
        return inspection_depth(None, column, models=models) if len(models) > 1 else inspection_depth(first, column)
    except ShapeError:  # no rows, or none in a layer
        return None


def compare(models: Mapping[str, Rows], column: str) -> dict[str, Any] | None:
    """The same matrices of several models side by side."""
    if len(models) < 2 or not all(models.values()):
        return None
    return inspection_compare(models, column)


def spectra(
    found: Inspection, names: Sequence[str], *, of: str, across: str, height: str, unit: str
) -> dict[str, Any] | None:
    """Singular values of some matrices, or of their changes.

    Args:
        found: What was measured.
        names: Of the matrices.
        of: ``"weights"`` or ``"changes"``.
        across: ``"log"``, ``"linear"``, or ``"share"``.
        height: ``"log"`` or ``"linear"``.
        unit: ``"none"``, ``"first"`` or ``"frobenius"``.

    Returns:
        A Plotly figure as a dictionary, or ``None`` where none of them has any.
    """
    source = found.changes if of == "changes" else found.spectra
    known = [name for name in names if name in source]
    if not known:
        return None
    own = {name: source[name] for name in known}
    more: dict[str, Any] = {}
    if of == "weights":
        edges = {str(row["name"]): row["mp_edge"] for row in found.rows}
        more = {"base": found.base_spectra or None, "edges": {name: edges[name] for name in known}}
    title = "How do the singular values fall off?" if of == "weights" else "How many directions does the change have?"
    figure = inspection_spectra(
        own,
        **more,
        normalise=None if unit == "none" else unit,  # type: ignore[arg-type]
        log_x=across == "log",
        log_y=height == "log",
        quantile_axis=across == "share",
        title=title,
    )
    if of == "weights":
        dotted = "Dashed: the upper edge of the noise" + ("; dotted: the base." if found.base_spectra else ".")
        figure["layout"]["meta"]["caption"] += f" {dotted}"
    return figure


def density(found: Inspection, name: str) -> dict[str, Any] | None:
    """The singular values of one matrix beside the law of random entries."""
    row = found[name]
    if name not in found.spectra:
        return None
    shape = [int(size) for size in str(row["shape"]).split(" x ")]
    return density_with_law(
        found.spectra[name],
        shape=shape,
        noise=row["noise"] or None,
        edge=row["mp_edge"] or None,
        above=row["above_edge"],
        name=short(name),
    )


def profiles(found: Inspection, names: Sequence[str]) -> dict[str, Any] | None:
    """Along the singular directions of the base: what was lost there, and what came."""
    known = [name for name in names if name in found.profiles][:4]
    if not known:
        return None
    parts = {
        short(name): {
            "retention": found.profiles[name]["retention_drift"],
            "adaptation": found.profiles[name]["adaptation"],
        }
        for name in known
    }
    layer = short(known[0]) if len(known) == 1 else "the chosen matrices"
    return direction_profiles(parts, layer=layer, title=f"Which singular directions of {layer} changed?")


def first_choice(found: Inspection) -> list[int]:
    """Places of the matrices that are drawn when nobody has chosen: of most and of least change, or stable rank."""
    for column in ("relative_change", "stable_rank"):
        known = [
            (float(row[column]), place)
            for place, row in enumerate(found.rows)
            if row["name"] in found.spectra and row[column] is not None and math.isfinite(row[column])
        ]
        if known:
            order = [place for _, place in sorted(known)]
            return sorted({order[-1], order[len(order) // 2], order[0]})
    return []
