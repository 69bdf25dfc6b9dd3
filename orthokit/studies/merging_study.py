"""The study of merging: experts of one pretrained model, merged by every method, each tuned with the same budget."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from orthokit.lab.families import (
    FAMILIES,
    Expert,
    expert_scores,
    expert_statistics,
    family_base,
    family_retention,
    train_expert,
)
from orthokit.merging import merge, methods, tune
from orthokit.merging.decoupling import TARGETS
from orthokit.merging.tuning import SPACES
from orthokit.studies._engine import Study
from orthokit.studies.optimizer_race import _one_thread

__all__ = ["MERGING", "MERGING_BUDGET", "contestants"]

Row = dict[str, Any]

MERGING_BUDGET = 16
"""Trials per method; the first is its defaults."""

# Methods whose residual merger OrthoMerge is tried with, to be compared with the merger alone.
_RESIDUALS = ("task_arithmetic", "ties", "tsv")


def contestants(experts: int) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """What takes part: a name to the method, its fixed options, and what is tuned.

    Args:
        experts: How many are merged.

    Example:
        >>> list(contestants(3))[:2], contestants(3)["orthomerge global ties"][:2]
        (['linear', 'task_arithmetic'], ('orthomerge', {'target': 'global', 'residual': 'ties'}))
    """
    found: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {}
    for name, spec in methods().items():
        least, most = spec.experts
        if name != "orthomerge" and least <= experts and (most is None or experts <= most):
            found[name] = (name, {}, dict(SPACES[name]))
    found["orthomerge global linear"] = ("orthomerge", {}, {"scale": SPACES["orthomerge"]["scale"]})
    for target in TARGETS:
        for residual in _RESIDUALS:
            fixed = {"target": target, "residual": residual}
            scale = {"scale": SPACES[residual]["scale"]}
            found[f"orthomerge {target} {residual}"] = ("orthomerge", fixed, scale)
    return found


def _units(size: str, seeds: int) -> list[Row]:
    small = size == "smoke"
    return [
        {"family": family, "seed": seed, "budget": 2 if small else MERGING_BUDGET, "small": small}
        for family in FAMILIES
        for seed in range(seeds)
    ]


def _measure(unit: Row) -> list[Row]:
    with _one_thread():
        family, seed, small = unit["family"], unit["seed"], unit["small"]
        steps = 2 if small else None
        experts = {
            task: train_expert(family, task, seed=seed, steps=steps, small=small) for task in FAMILIES[family].tasks
        }
        base = family_base(family, small=small)
        statistics = expert_statistics(family, experts, samples=8 if small else 128, small=small)
        rows = _judged(unit, "base", base, experts, "start")
        for task, expert in experts.items():
            rows += _judged(unit, f"expert {task}", expert.trunk, experts, "expert")
        for name, entry in contestants(len(experts)).items():
            rows += _merged(unit, name, entry, base, experts, statistics)
    return rows


def _merged(
    unit: Row,
    name: str,
    entry: tuple[str, dict[str, Any], dict[str, Any]],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Expert],
    statistics: Mapping[str, Sequence[Mapping[str, Tensor]]],
) -> list[Row]:
    """The rows of one contestant: with its defaults and tuned."""
    method, fixed, space = entry
    needs = methods()[method].statistics
    common: dict[str, Any] = {"method": method, **fixed, "seed": unit["seed"]}
    if needs:
        common["statistics"] = statistics[needs]
    if method == "metrics_weighted":
        common["losses"] = [expert.loss for expert in experts.values()]
    trunks = [expert.trunk for expert in experts.values()]

    def scores(options: Mapping[str, Any]) -> dict[str, float]:
        merged = merge(base, trunks, **common, **options)
        return expert_scores(unit["family"], merged, experts, part="validation", small=unit["small"])

    tuned = tune(method, scores, budget=unit["budget"], space=space, seed=unit["seed"])
    rows: list[Row] = []
    for kind, options in (("default", {}), ("tuned", tuned.options)):
        if rows and not options:  # the defaults were the best
            return rows + [{**row, "kind": kind} for row in rows]
        begun = time.process_time()
        merged = merge(base, trunks, **common, **options)
        seconds = time.process_time() - begun
        rows += _judged(unit, name, merged, experts, kind, options=json.dumps(dict(options)), seconds=seconds)
    return rows


def _judged(
    unit: Row, name: str, trunk: Mapping[str, Tensor], experts: Mapping[str, Expert], kind: str, **more: Any
) -> list[Row]:
    """One row per task and one for what is retained."""
    common = {"kind": kind, "family": unit["family"], "seed": unit["seed"], "method": name, **more}
    found = expert_scores(unit["family"], trunk, experts, small=unit["small"])
    found["retained"] = family_retention(unit["family"], trunk, small=unit["small"])
    return [{**common, "task": task, "score": score} for task, score in found.items()]


def _depends(unit: Row) -> Sequence[str]:
    """The files behind a unit."""
    arena = ("ground", "language", "pictures", "texts")
    return (
        "studies/merging_study.py",
        "merging/*.py",
        "lab/families.py",
        *(f"lab/arena/{name}.py" for name in arena),
        *(f"lab/{name}.py" for name in ("racer", "tasks", "text_tasks", "image_tasks", "vision", "encoder", "models")),
        *(f"lab/{name}.py" for name in ("fisher", "example_gradients", "input_subspaces", "schedules", "glosses")),
    )


MERGING = Study(
    name="merging",
    question="Which way to merge experts keeps most of what each of them can do, and of what the base could do?",
    units=_units,
    measure=_measure,
    seeds=5,
    depends=_depends,
)
