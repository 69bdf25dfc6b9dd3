"""The geometry of representations as a recorded study: how long, how many seeds, and what each result depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthokit.studies._engine import Study
from orthokit.studies.adapter_study import ADAPTER_COMMON, ADAPTER_SOURCES, whole_numbers
from orthokit.studies.optimizer_race import _one_thread
from orthokit.studies.race_study import OPTIMIZER_SOURCES
from orthokit.studies.representation import (
    FINETUNED,
    OPTIMIZER_RATES,
    asset_features,
    finetuned_features,
    pretraining_features,
)

__all__ = ["REPRESENTATION"]

Row = dict[str, Any]


def _units(size: str, seeds: int) -> list[Row]:
    small = size == "smoke"
    common = {"context": 8, "windows": 96} if small else {"context": 64, "windows": 768}
    courses = {
        # Features 64 wide are told by fewer windows than features 128 wide.
        "0.2M": {"steps": 4, "seeds": seeds} if small else {"steps": 768, "seeds": seeds, "windows": 512},
        # A look costs as much as thirty steps here, and a step twice as much.
        "1M": {"steps": 2 if small else 256, "seeds": min(seeds, 3)},
    }
    pretrained = [
        {
            **{"kind": "pretrain", "size": name, "optimizer": optimizer, "seed": seed, "lr": lr},
            **{"steps": course["steps"], "between": name == "0.2M", "batch": 2 if small else 8},
            **{key: course.get(key, value) for key, value in common.items()},
            "layers": 1 if small else None,
        }
        for name, course in courses.items()
        for seed in range(course["seeds"])
        for optimizer, lr in OPTIMIZER_RATES.items()
    ]
    tuned = [
        {
            **{"kind": "finetune", "method": method, "text": text, "seed": seed, "lr": FINETUNED[method]},
            **{"steps": 2 if small else 30, "small": small},
            **common,
        }
        for method, text in [*((method, "moby_dick") for method in FINETUNED), ("full", "addresses")]
        for seed in range(seeds)
    ]
    return [*pretrained, {"kind": "asset", **common}, *tuned]


def _measure(unit: Row) -> list[Row]:
    options = dict(unit)
    kind = options.pop("kind")
    with _one_thread():
        if kind == "pretrain":
            return pretraining_features(options.pop("size"), options.pop("optimizer"), **options)
        if kind == "finetune":
            return finetuned_features(options.pop("method"), **options)
        return [{"kind": "asset", **row} for row in asset_features(**options)]


_COMMON = (
    *(f"studies/{name}.py" for name in ("representation", "representation_study")),
    *(f"diagnostics/{name}.py" for name in ("features", "_collect", "_modes", "spectrum")),
    *(f"lab/{name}.py" for name in ("racer", "tasks", "models", "schedules", "corpora")),
)


def _depends(unit: Row) -> Sequence[str]:
    """The files behind a unit; the recipe itself is part of the unit."""
    own: tuple[str, ...] = ("lab/pretrained.py",)
    if unit["kind"] == "pretrain":
        own = OPTIMIZER_SOURCES["AdamW" if unit["optimizer"] == "adamw" else "muon"]
    elif unit["kind"] == "finetune":
        own = ADAPTER_COMMON + ADAPTER_SOURCES[unit["method"]] + own
    return sorted({*_COMMON, *own})


REPRESENTATION = Study(
    name="representation",
    question="How does the number of directions that features use change along pretraining, and by fine-tuning?",
    units=_units,
    measure=_measure,
    summarise=whole_numbers,
    seeds=5,
    depends=_depends,
)
