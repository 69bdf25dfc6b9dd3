"""The arena as a recorded study: which learning rates are tried, and what each result depends on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from orthokit.lab.arena.grounds import GROUNDS
from orthokit.lab.arena.methods import METHODS, budget_settings
from orthokit.lab.arena.rates import FIRST_RATES
from orthokit.studies._engine import Study
from orthokit.studies.adapter_study import ADAPTER_SOURCES, whole_numbers
from orthokit.studies.arena_unit import measure_unit
from orthokit.studies.race_study import OPTIMIZER_SOURCES

__all__ = ["ARENA", "ARENA_GROUNDS"]

_EXTENSIONS = 6
# A run is three times as long there.
_FEW_EXTENSIONS = {"era": 1}
# Steps on the texts, whose models are 20 times as large. Of the eras a head on the frozen encoder knows so much already
# that 24 steps gain nothing.
_TEXT_STEPS = {"noun": 24, "era": 64}
ARENA_GROUNDS = ("tinygpt", "fashion", "digits", *_TEXT_STEPS)
"""Grounds of the recorded study, in the order they are made. "verb" gained nothing in trials of 24 steps."""

# Fewer seeds there too, and a way back of one run with fewer places.
_TEXT_ALPHAS, _TEXT_PATHS = (0.0, 0.3, 0.6, 1.0), ("cayley_sqrt", "dense", "safe", "min")
_ALPHAS = tuple(k / 10 for k in range(11))
# What comes last when time is short.
_LATER = {("noun", method) for method in ("dora", "boft", "milora", "ia3")}


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    small = size == "smoke"
    units = [
        _unit(ground, method, small, seeds, *budget_settings(ground)[method])
        for ground in ARENA_GROUNDS
        for method in METHODS
        if not small or _there(method)
    ]
    return sorted(units, key=lambda unit: (unit["ground"], unit["method"]) in _LATER)


def _there(method: str) -> bool:
    """Whether the package a method needs is installed; in the study proper a missing one is an error."""
    package = METHODS[method].package
    return not package or importlib.util.find_spec(package) is not None


def _unit(ground: str, method: str, small: bool, seeds: int, chosen: int, trainable: int) -> dict[str, Any]:
    text = ground in _TEXT_STEPS
    kept = list(range(max(2, seeds - 2) if text else seeds))
    turns = method in ("oft", "boft", "hra")
    return {
        "ground": ground,
        "method": method,
        "size": min(chosen, 2) if small and method != "vera" else chosen,
        "trainable": trainable,
        "rates": list(FIRST_RATES[ground][method][: 1 if small else None]),
        "extensions": 0 if small else _FEW_EXTENSIONS.get(ground, _EXTENSIONS),
        "seeds": kept,
        "steps": 2 if small else _TEXT_STEPS.get(ground, GROUNDS[ground].steps),
        "evaluations": 1 if text else 2 if small else 4,
        "paths": list(_TEXT_PATHS if turns else ("dense",)) if text else [],
        "alphas": [0.0, 0.5, 1.0] if small else list(_TEXT_ALPHAS if text else _ALPHAS),
        "walked": kept[:1] if small or text else kept,
        "small": small,
    }


_COMMON = (
    "studies/arena_unit.py",
    *(
        f"adapters/{name}.py"
        for name in ("base", "sites", "layer", "_initialise", "attach", "targets", "stack", "paths")
    ),
    *(f"lab/arena/{name}.py" for name in ("ground", "grounds", "entry", "methods", "weights", "portraits")),
    *(f"lab/arena/{name}.py" for name in ("rewinding", "contest")),
    *(f"lab/{name}.py" for name in ("racer", "tasks", "schedules", "pretrained")),
    "diagnostics/_geometry.py",
    "diagnostics/_collect.py",
    "diagnostics/_modes.py",
    *(f"diagnostics/{name}.py" for name in ("profiles", "drift", "activations", "similarity", "spectrum")),
)
_WHERE: dict[str, tuple[str, ...]] = {
    "tinygpt": ("lab/arena/language.py", "lab/models.py", "lab/corpora.py"),
    "fashion": ("lab/arena/pictures.py", "lab/vision.py", "lab/image_tasks.py"),
    "noun": ("lab/arena/texts.py", "lab/text_tasks.py", "lab/encoder.py", "lab/glosses.py"),
}
_WHERE["digits"] = _WHERE["fashion"]
_WHERE["era"] = (*_WHERE["noun"], "lab/eras.py")
_OWN: dict[str, tuple[str, ...]] = {
    **ADAPTER_SOURCES,
    "pissa": ADAPTER_SOURCES["lora"],
    "milora": ADAPTER_SOURCES["lora"],
    "muon": OPTIMIZER_SOURCES["muon"],
    "pion": OPTIMIZER_SOURCES["pion"],
    "vera": (),
    "ia3": (),
}


def _depends(unit: dict[str, Any]) -> Sequence[str]:
    """The files behind a unit; the recipe itself is part of the unit."""
    return sorted({*_COMMON, *_WHERE[unit["ground"]], *_OWN[unit["method"]]})


ARENA = Study(
    name="arena",
    question="What does each way to fine-tune learn, and what does the model forget?",
    units=_units,
    measure=measure_unit,
    summarise=whole_numbers,
    seeds=5,
    depends=_depends,
)
