"""What a merge did to a model, in pictures, from the rows of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.figures.arena import layer_map
from orthokit.figures.energy import energy_by_matrix

__all__ = ["MERGE_VALUES", "merge_energies", "merge_map"]

MERGE_VALUES = {
    "rotation_fraction": "rotation share",
    "generator_norm": "norm of the generator",
    "conflict_share": "rows in conflict",
    "changes": "relative change",
}
"""What :func:`merge_map` can show, one number per expert, with what it is called."""


def merge_map(
    rows: Sequence[Mapping[str, Any]],
    *,
    value: str = "rotation_fraction",
    experts: Sequence[str] | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """One number per expert and matrix of a merged model, as colours.

    Args:
        rows: ``MergeReport.rows``.
        value: One of :data:`MERGE_VALUES`; ``"changes"`` needs a report in full.
        experts: Their names; default expert 1, 2, ...
        title: The question; default made from ``value``.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        UnknownNameError: Unknown ``value``.
        ShapeError: No row has that value.
        OptionError: Another number of names than of experts.

    Example:
        >>> rows = [{"name": f"{i}.q.weight", "rotation_fraction": [0.4, 0.5 + i / 10]} for i in range(2)]
        >>> merge_map(rows)["layout"]["meta"]["caption"]
        'Largest: expert 1 0.4 in 0.q, expert 2 0.6 in 1.q. Mean over layers: expert 1 0.4, expert 2 0.55.'
    """
    if value not in MERGE_VALUES:
        raise unknown_name("value", value, tuple(MERGE_VALUES))
    # A tensor that is no matrix has no rotation, and a row for it no colour.
    told = [row for row in rows if row.get(value) is not None and "none" not in row.get("route", ())]
    if not told:
        raise ShapeError(f"no row of the report has {value!r}; merge with a method that tells it, or report='full'.")
    count = len(told[0][value])
    names = [f"expert {index + 1}" for index in range(count)] if experts is None else list(experts)
    if len(names) != count:
        raise OptionError(f"experts must name {count} of them, as the report has; got {len(names)}.")
    grid = np.array([[np.nan if one is None else one for one in row[value]] for row in told], dtype=float)
    layers = [str(row["name"]).removesuffix(".weight") for row in told]
    figure = layer_map(layers, dict(zip(names, grid.T, strict=True)), name=MERGE_VALUES[value], title=title)
    return _called("merge_map", figure)


def merge_energies(
    rows: Sequence[Mapping[str, Any]], *, title: str = "Does the merge keep the angles between neurons?"
) -> dict[str, Any]:
    """Hyperspherical energy of each matrix: of the base, after the rotation alone, and merged.

    Args:
        rows: ``MergeReport.rows`` of a report in full.
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: No row has energies.

    Example:
        >>> rows = [{"name": "q.weight", "energy_base": 0.72, "energy_rotated": 0.72, "energy_merged": 0.75}]
        >>> merge_energies(rows)["layout"]["meta"]["caption"]
        'merged lies above base in 1 of 1 matrices; furthest in q, by 0.03.'
    """
    told = [row for row in rows if row.get("energy_base") is not None and row.get("energy_merged") is not None]
    if not told:
        raise ShapeError("no row of the report has energies; merge with report='full'.")
    labels = ["merged", "base"] + ["rotated"] * all(row.get("energy_rotated") is not None for row in told)
    layers = [str(row["name"]).removesuffix(".weight") for row in told]
    energies = {label: [row[f"energy_{label}"] for row in told] for label in labels}
    return _called("merge_energies", energy_by_matrix(layers, energies, title=title))


def _called(name: str, figure: dict[str, Any]) -> dict[str, Any]:
    """The chart under a name of its own, by which a page keeps its zoom."""
    layout = figure["layout"]
    layout["meta"]["chart"] = layout["uirevision"] = name
    return figure
