"""The comparison of adapters as a recorded study: which learning rates are tried, and what each result depends on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orthokit.adapters.oft import OFT
from orthokit.lab.arena import FIRST_RATES, enter
from orthokit.studies._engine import Study
from orthokit.studies.adapters import ADAPTER_METHODS, ADAPTER_TRACKS, adapt_once, adapter_budget
from orthokit.studies.optimizer_race import _best, _one_thread, next_rate

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ADAPTERS", "ADAPTER_RATES", "ADAPTER_SOURCES", "BLOCKS", "whole_numbers"]

_TUNING_SEED = 100
_YARDSTICK = "lora"
_EXTENSIONS = 6

# The study goes on beyond the edge at which the best one lies.
ADAPTER_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    track: {name: FIRST_RATES[track][name] for name in ADAPTER_METHODS} for track in ADAPTER_TRACKS
}
# The grid of the record began further down than the arena's, and went up from there.
ADAPTER_RATES["tinygpt"]["full"] = (8e-4, 1.6e-3, 3.2e-3)
BLOCKS = (8, 16, 32, 64, 128)
_BLOCK_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
# A second model and task: blocks on both sides of 32, with the scale alone.
_TEXT_BLOCKS, _TEXT_BLOCK_RATES = (8, 32, 128), (2.5e-4, 5e-4, 1e-3, 2e-3)
_BLOCK_SEEDS = (100, 101, 102, 103)
# Multiples of the budget that some methods are compared at as well.
_SCALES, _SCALED = (0.25, 4.0), ("lora", "oft", "hra")


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    small = size == "smoke"
    common = {"small": small, "seeds": list(range(seeds)), "extensions": 0 if small else _EXTENSIONS}
    compared = [
        {
            **common,
            **{"kind": "run", "track": track, "name": name, "scale": 1.0},
            **{"size": 2 if small else chosen, "trainable": trainable},
            "rates": list(ADAPTER_RATES[track][name][: 1 if small else None]),
            "steps": 2 if small else ADAPTER_TRACKS[track].steps,
            "evaluations": 5 if track == "tinygpt" and not small else 2,
            "cost_steps": 3 if small else 16,
        }
        for track in ADAPTER_TRACKS
        for name, (chosen, trainable) in adapter_budget(track).items()
    ]
    blocks = [
        {
            **common,
            **{"kind": "block", "track": "tinygpt", "name": "oft", "block": block, "block_rate": scaled},
            "rates": list(_BLOCK_RATES[: 1 if small else None]),
            "seeds": list(_BLOCK_SEEDS[: 1 if small else None]),
            "steps": 2 if small else 24,
        }
        for block in BLOCKS
        for scaled in (True, False)
        # At the block that the scale is 1 for, both are the same.
        if scaled or block != ADAPTER_TRACKS["tinygpt"].block
    ]
    blocks += [
        {
            **common,
            **{"kind": "block", "track": "noun", "name": "oft", "block": block, "block_rate": True},
            "rates": list(_TEXT_BLOCK_RATES[: 1 if small else None]),
            "seeds": list(_BLOCK_SEEDS[: 1 if small else 2]),
            "steps": 2 if small else 24,
        }
        for block in _TEXT_BLOCKS
    ]
    scaled = [
        {**unit, "scale": scale, "evaluations": 1, "size": 2 if small else chosen, "trainable": trainable}
        for scale in _SCALES
        for unit in compared
        if unit["track"] == "tinygpt" and unit["name"] in _SCALED
        for chosen, trainable in [adapter_budget("tinygpt", scale)[unit["name"]]]
    ]
    first = [unit for unit in compared if unit["track"] == "tinygpt"]
    return [*first, *blocks, *compared[len(first) :], *scaled]


def _measure(unit: dict[str, Any]) -> list[dict[str, Any]]:
    with _one_thread():
        return _block(unit) if unit["kind"] == "block" else _compared(unit)


def _tune(unit: dict[str, Any], method: Any, *, seeds: Sequence[int], **options: Any) -> dict[float, list[float]]:
    """Learning rate to the final losses on the tuning seeds, until the best one lies inside."""
    found: dict[float, list[float]] = {}
    waiting = list(unit["rates"])
    options |= {"steps": unit["steps"], "small": unit["small"], "other": False}
    while waiting:
        lr = waiting.pop(0)
        runs = (adapt_once(unit["track"], method, lr=lr, seed=seed, **options) for seed in seeds)
        found[lr] = [rows[-1]["value"] for rows in runs]
        if not waiting and len(found) < len(unit["rates"]) + unit["extensions"]:
            further = next_rate(_means(found))
            waiting += [] if further is None else [further]
    return found


def _means(found: dict[float, list[float]]) -> dict[float, float]:
    return {lr: statistics.fmean(values) for lr, values in found.items()}


def _compared(unit: dict[str, Any]) -> list[dict[str, Any]]:
    """Tuning, then the runs of the other seeds at the best rate; what is kept, and what a step costs."""
    labels = {key: unit[key] for key in ("track", "name", "scale", "size", "trainable")}
    options: dict[str, Any] = {"size": unit["size"] or None}
    found = _tune(unit, unit["name"], seeds=[_TUNING_SEED], **options)
    best = _best(_means(found))
    rows: list[dict[str, Any]] = [
        {"kind": "tune", **labels, "lr": lr, "seed": _TUNING_SEED, "step": unit["steps"], "value": value}
        for lr, (value,) in found.items()
    ]
    options |= {"steps": unit["steps"], "small": unit["small"], "evaluations": unit["evaluations"]}
    for seed in unit["seeds"]:
        run = adapt_once(unit["track"], unit["name"], lr=best, seed=seed, kept=unit["scale"] == 1, **options)
        rows += [{"kind": "run", **labels, "lr": best, "seed": seed, **row} for row in run]
    if unit["scale"] == 1:
        rows.append({"kind": "cost", **labels, **_cost(unit)})
    return rows


def _cost(unit: dict[str, Any]) -> dict[str, float]:
    """Processor time of a step beside one of LoRA, in turns, so that what else the machine does hits both alike."""
    options = {"steps": unit["cost_steps"], "small": unit["small"], "lr": 1e-4, "seed": 0}
    pair = [
        enter(unit["track"], unit["name"], size=unit["size"] or None, **options),
        enter(unit["track"], _YARDSTICK, size=2 if unit["small"] else None, **options),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(unit["cost_steps"]):
        for racer, seen in zip(pair, times, strict=True):
            before = racer.seconds
            racer.advance()
            seen.append(racer.seconds - before)
    step, yardstick = (statistics.median(seen[len(seen) // 4 :]) for seen in times)
    return {"step_ms": 1e3 * step, "ratio": step / yardstick}


def _block(unit: dict[str, Any]) -> list[dict[str, Any]]:
    """The final loss of OFT at every rate, for one block size."""
    labels = {key: unit[key] for key in ("kind", "track", "name", "block", "block_rate")}
    config = OFT(block_size=unit["block"], block_rate=unit["block_rate"])
    found = _tune(unit, config, seeds=unit["seeds"])
    return [
        {**labels, "lr": lr, "seed": seed, "step": unit["steps"], "value": value}
        for lr, values in found.items()
        for seed, value in zip(unit["seeds"], values, strict=True)
    ]


_ARENA = ("entry", "ground", "grounds", "language", "methods", "texts")
ADAPTER_COMMON = (
    *(f"studies/{name}.py" for name in ("adapters", "adapter_geometry", "adapter_study")),
    *(f"adapters/{name}.py" for name in ("base", "sites", "layer", "_initialise", "attach", "targets", "stack")),
    *(f"lab/{name}.py" for name in ("racer", "tasks", "text_tasks", "encoder", "models", "schedules", "glosses")),
    *(f"lab/{name}.py" for name in ("pretrained", "corpora", "eras", *(f"arena/{part}" for part in _ARENA))),
)
_TURNS = ("adapters/_rotating.py", "adapters/_turn.py", "adapters/_rotation.py", "linalg/_skew_places.py")
_BLOCKS = (
    *_TURNS,
    "adapters/_blocks.py",
    *(f"linalg/{name}.py" for name in ("maps", "skew", "block_diagonal", "butterfly", "permutations")),
)
ADAPTER_SOURCES: dict[str, tuple[str, ...]] = {
    "full": ("adapters/full.py",),
    "lora": ("adapters/lora.py",),
    "dora": ("adapters/dora.py", "adapters/lora.py"),
    "oft": ("adapters/oft.py", *_BLOCKS),
    "boft": ("adapters/boft.py", *_BLOCKS),
    "hra": ("adapters/hra.py", "adapters/_householder.py", *_TURNS),
}
"""Files that hold a kind of adapter, by name."""


def _depends(unit: dict[str, Any]) -> Sequence[str]:
    """The files behind a unit; the recipe itself is part of the unit."""
    return sorted({*ADAPTER_COMMON, *ADAPTER_SOURCES[unit["name"]]})


_WHOLE = ("size", "trainable", "seed", "step", "block", "index", "left_out")


def whole_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers as such: rows that lack them would make floats of a column, which a file keeps to six digits."""
    # A size may be a name.
    numbers = table.select_dtypes("number").columns
    return table.astype({column: "Int64" for column in _WHOLE if column in numbers})


ADAPTERS = Study(
    name="adapters",
    question="What does each kind of adapter reach with equally many numbers, and what does it keep of the model?",
    units=_units,
    measure=_measure,
    summarise=whole_numbers,
    seeds=5,
    depends=_depends,
)
