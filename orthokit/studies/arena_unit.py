"""One unit of the recorded arena: a method on a ground, at the learning rate that suits it."""

from __future__ import annotations

import math
from typing import Any

from orthokit.lab.arena.contest import compete
from orthokit.studies.optimizer_race import _best, _one_thread, next_rate

__all__ = ["TUNING_SEED", "measure_unit"]

TUNING_SEED = 100
# Singular directions that are kept of a profile; of a longer one every second, third, ...
_DIRECTIONS = 128


def measure_unit(unit: dict[str, Any]) -> list[dict[str, Any]]:
    """Tuning by the target loss on a seed of its own, then the other seeds at the best rate.

    Args:
        unit: ``ground, method, size, steps, small``; ``rates`` to try first and ``extensions`` beyond them; ``seeds``;
            ``evaluations`` of a run; ``paths`` and ``alphas`` of the way back, and ``walked``, the seeds that have one.

    Returns:
        Rows of :func:`orthokit.lab.arena.compete`, the finals of tuning with ``kind="tune"``; the rows of layers and
        profiles of the first seed alone.
    """
    options: dict[str, Any] = {key: unit[key] for key in ("ground", "method", "steps", "small")}
    options["size"] = unit["size"] or None
    with _one_thread():
        best, rows = _tuned(unit, options)
        for place, seed in enumerate(unit["seeds"]):
            paths = _walks(unit, seed)
            options |= {"evaluations": unit["evaluations"], "paths": paths, "alphas": unit["alphas"]}
            found = compete(lr=best, seed=seed, portrait=True, **options)
            rows += [row for row in found if row["kind"] in ("run", "path") or (place == 0 and _kept(row, found))]
    return rows


def _tuned(unit: dict[str, Any], options: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """The best learning rate, and the finals of all that were tried, until the best one lies inside."""
    scores: dict[float, float] = {}
    rows: list[dict[str, Any]] = []
    waiting = list(unit["rates"])
    while waiting:
        lr = waiting.pop(0)
        final = compete(lr=lr, seed=TUNING_SEED, **options)[-1]
        rows.append({**final, "kind": "tune"})
        scores[lr] = final["target"]
        if not waiting and len(scores) < len(unit["rates"]) + unit["extensions"]:
            further = next_rate(scores)
            waiting += [] if further is None else [further]
    return _best(scores), rows


def _walks(unit: dict[str, Any], seed: int) -> bool | list[str]:
    if seed not in unit["walked"]:
        return False
    return unit["paths"] or True


def _kept(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    if row["kind"] != "profile":
        return True
    longest = 1 + max(other["index"] for other in rows if other["kind"] == "profile" and other["layer"] == row["layer"])
    return row["index"] % math.ceil(longest / _DIRECTIONS) == 0
