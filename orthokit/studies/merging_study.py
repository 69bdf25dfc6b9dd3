"""The study of merging: experts of one pretrained model, merged by every method, each tuned with the same budget."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
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
from orthokit.merging import MergeLine, merge, merge_line, methods, tune
from orthokit.merging.decoupling import TARGETS
from orthokit.merging.tuning import SPACES
from orthokit.studies._engine import Study
from orthokit.studies.merging_blocks import BLOCK_FAMILIES, block_contestants
from orthokit.studies.optimizer_race import _one_thread

__all__ = ["MERGING", "MERGING_BUDGET", "contestants"]

Row = dict[str, Any]

MERGING_BUDGET: Mapping[str, int] = {"pictures": 16, "texts": 10, "language": 16}
"""Trials of every method, by family; the first is its defaults."""

# Three experts of the encoder take as long to train as all that is done with the smaller models.
_MOST_SEEDS = {"texts": 3}
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
        {"family": family, "part": part, "seed": seed, "budget": budget, "small": small}
        for part, families in (("tensors", tuple(FAMILIES)), ("blocks", BLOCK_FAMILIES))
        for seed in range(seeds)
        for family in families
        if seed < _MOST_SEEDS.get(family, seeds)
        for budget in [2 if small else MERGING_BUDGET[family]]
    ]


def _measure(unit: Row) -> list[Row]:
    with _one_thread():
        family, seed, small = unit["family"], unit["seed"], unit["small"]
        steps = 2 if small else None
        experts = {
            task: train_expert(family, task, seed=seed, steps=steps, small=small) for task in FAMILIES[family].tasks
        }
        base = family_base(family, small=small)
        if unit["part"] == "blocks":
            found, made = block_contestants(family, base, experts, seed=seed, small=small)
            rows = [
                {"kind": "anchors", "family": family, "seed": seed, "task": list(experts)[row["expert"]]}
                | {key: row[key] for key in ("block", "cosine_before", "cosine", "norm")}
                for row in made.rows
            ]
            for name, (merged_with, space) in found.items():
                rows += _tuned(unit, name, merged_with, None, space, experts)
            return rows
        statistics = expert_statistics(family, experts, samples=8 if small else 128, small=small)
        rows = _judged(unit, "base", base, experts, "start")
        for task, expert in experts.items():
            rows += _judged(unit, f"expert {task}", expert.trunk, experts, "expert")
        for name, (method, fixed, space) in contestants(len(experts)).items():
            merged_with = _merging(method, fixed, base, experts, statistics, seed)
            rows += _tuned(unit, name, merged_with, method, space, experts)
    return rows


def _merging(
    method: str,
    fixed: Mapping[str, Any],
    base: Mapping[str, Tensor],
    experts: Mapping[str, Expert],
    statistics: Mapping[str, Sequence[Mapping[str, Tensor]]],
    seed: int,
) -> Callable[[Mapping[str, Any]], dict[str, Tensor]]:
    """A method as a function from the options of a trial to the merged trunk."""
    needs = methods()[method].statistics
    common: dict[str, Any] = {"method": method, **fixed, "seed": seed}
    if needs:
        common["statistics"] = statistics[needs]
    if method == "metrics_weighted":
        common["losses"] = [expert.loss for expert in experts.values()]
    trunks = [expert.trunk for expert in experts.values()]
    lines: dict[str, MergeLine] = {}

    def merged_with(options: Mapping[str, Any]) -> dict[str, Tensor]:
        if "scale" not in options:
            return merge(base, trunks, **common, **options)
        # Trials that differ in their scale alone share two merges.
        rest = {key: value for key, value in options.items() if key != "scale"}
        key = json.dumps(rest, sort_keys=True)
        if key not in lines:
            lines.clear()
            lines[key] = merge_line(base, trunks, **common, **rest)
        return lines[key].at(options["scale"])

    return merged_with


def _tuned(
    unit: Row,
    name: str,
    merged_with: Callable[[Mapping[str, Any]], dict[str, Tensor]],
    method: str | None,
    space: Mapping[str, Any],
    experts: Mapping[str, Expert],
) -> list[Row]:
    """The rows of one contestant: with its defaults and tuned."""

    begun = time.process_time()
    plain, taken = merged_with({}), time.process_time() - begun

    def scores(options: Mapping[str, Any]) -> dict[str, float]:
        merged = merged_with(options) if options else plain
        return expert_scores(unit["family"], merged, experts, part="validation", small=unit["small"])

    tuned = tune(method, scores, budget=unit["budget"], space=space, seed=unit["seed"])
    rows = _judged(unit, name, plain, experts, "default", options="{}", seconds=taken)
    if not tuned.options:  # the defaults were the best
        return rows + [{**row, "kind": "tuned"} for row in rows]
    begun = time.process_time()
    merged, told = merged_with(tuned.options), json.dumps(dict(tuned.options))
    taken = time.process_time() - begun
    return rows + _judged(unit, name, merged, experts, "tuned", options=told, seconds=taken)


def _judged(
    unit: Row, name: str, trunk: Mapping[str, Tensor], experts: Mapping[str, Expert], kind: str, **more: Any
) -> list[Row]:
    """One row per task and one for what is retained."""
    common = {"kind": kind, "family": unit["family"], "seed": unit["seed"], "method": name}
    common |= {"budget": unit["budget"], **more}
    found = expert_scores(unit["family"], trunk, experts, small=unit["small"])
    found["retained"] = family_retention(unit["family"], trunk, small=unit["small"])
    return [{**common, "task": task, "score": score} for task, score in found.items()]


def _depends(unit: Row) -> Sequence[str]:
    """The files behind a unit."""
    arena = ("ground", "language", "pictures", "texts")
    return (
        "studies/merging_study.py",
        *(("studies/merging_blocks.py",) if unit["part"] == "blocks" else ()),
        "merging/*.py",
        "lab/famil*.py",
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
