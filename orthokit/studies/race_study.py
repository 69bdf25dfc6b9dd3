"""The optimizer race as a recorded study: which learning rates are tried, and what each result depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthokit.lab.contestants import CONTESTANTS
from orthokit.studies._engine import Study
from orthokit.studies.optimizer_race import TRACKS, measure_race

__all__ = ["RACE", "RATES", "TUNING_SEEDS"]

TUNING_SEEDS = (100, 101)
_EXTENSIONS = 8

# First learning rates to try, a factor of two apart, around the best of short trials on another seed; the study goes on
# beyond the edge at which the best one lies.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "tinygpt": {
        "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2),
        "sgd": (0.2, 0.4, 0.8, 1.6),
        "lion": (5e-4, 1e-3, 2e-3, 4e-3),
        "muon_pre": (5e-3, 1e-2, 2e-2, 4e-2),
        "muon_post": (5e-3, 1e-2, 2e-2, 4e-2),
        "muon_none": (5e-3, 1e-2, 2e-2, 4e-2),
        "normuon": (5e-3, 1e-2, 2e-2, 4e-2),
        "pion": (5e-3, 1e-2, 2e-2, 4e-2),
        "poet": (1e-3, 2e-3, 4e-3, 8e-3),
    },
    "cnn": {
        "adamw": (1e-2, 2e-2, 4e-2, 8e-2),
        "sgd": (5e-2, 0.1, 0.2, 0.4),
        "lion": (2e-3, 4e-3, 8e-3, 1.6e-2),
        "muon_pre": (1e-2, 2e-2, 4e-2, 8e-2),
        "muon_post": (1e-2, 2e-2, 4e-2, 8e-2),
        "muon_none": (1e-2, 2e-2, 4e-2, 8e-2),
        "normuon": (1e-2, 2e-2, 4e-2, 8e-2),
        "pion": (2e-2, 4e-2, 8e-2, 0.16),
        "poet": (1e-3, 2e-3, 4e-3, 8e-3),
    },
}


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    small = size == "smoke"
    return [
        {
            **{"track": track, "name": name, "small": small, "rest_lr": course.rest_lr},
            "optimizer": CONTESTANTS[name].optimizer,
            "options": dict(CONTESTANTS[name].options),
            "rates": list(rates[1:3] if small else rates),
            "extensions": 0 if small else _EXTENSIONS,
            "tuning_seeds": list(TUNING_SEEDS[: 1 if small else None]),
            "seeds": list(range(seeds)),
            "steps": 4 if small else course.steps,
            "evaluations": 2 if small else 20,
            "cost_steps": 5 if small else 60,
            "yardstick_rate": course.rest_lr,
        }
        for track, course in TRACKS.items()
        for name, rates in RATES[track].items()
    ]


_COMMON = (
    "studies/optimizer_race.py",
    *(f"lab/{name}.py" for name in ("racer", "tasks", "models", "schedules", "corpora", "images")),
)
_MATRIX = (
    *(f"optim/{name}.py" for name in ("base", "muon", "_alone", "_pieces", "rates", "routing", "blocks")),
    *(f"linalg/{name}.py" for name in ("polar", "_iteration", "_workspace", "coefficients")),
    "matrices/*.py",
    "device.py",
    "_threads.py",
)
OPTIMIZER_SOURCES: dict[str, tuple[str, ...]] = {
    "AdamW": (),
    "SGD": (),
    "Lion": ("lab/baselines.py",),
    "muon": _MATRIX,
    "pion": (
        *_MATRIX,
        "optim/pion.py",
        "optim/_pion*.py",
        *(f"linalg/{name}.py" for name in ("skew", "_skew_places", "maps", "spectra")),
    ),
    "POET": ("adapters/*.py", "linalg/*.py", *_MATRIX),
}
"""Files that hold an optimizer, by name."""


def _depends(unit: dict[str, Any]) -> Sequence[str]:
    """The files behind a unit; the recipe itself is part of the unit."""
    return sorted({*_COMMON, *OPTIMIZER_SOURCES[unit["optimizer"]]})


RACE = Study(
    name="race",
    question="Which optimizer trains best, each at its best learning rate, for equal tokens and for equal time?",
    units=_units,
    measure=measure_race,
    seeds=5,
    depends=_depends,
)
