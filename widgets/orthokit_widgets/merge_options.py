"""The options of every merging method as settings of a page: made from the registry and the spaces of the tuner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import param

from orthokit.linalg.merged_rotations import INTENSITIES
from orthokit.merging import methods
from orthokit.merging.decoupling import RESIDUALS, TARGETS
from orthokit.merging.sparse import ELECTIONS, RESCALINGS, SIGNS
from orthokit.merging.tuning import SPACES
from orthokit_widgets.fields import Settings

State = TypeVar("State", bound=Settings)

__all__ = [
    "LEFT_OUT",
    "LOGARITHMIC",
    "OPTIONS",
    "SEGMENTS",
    "SETTINGS",
    "WORDS",
    "idle_options",
    "option_values",
    "with_options",
]

#: Options that the page does not offer: tensors and numbers of each expert, and numerics that hardly move a result.
LEFT_OUT = frozenset(
    {"threshold", "masks", "seed", "rank", "eps", "solver", "ridge", "steps", "lr", "floor", "keep", "losses", "route"}
    | {"residual_options", "count", "start"}
)
_CHOICES: Mapping[str, tuple[str, ...]] = {
    **{"target": TARGETS, "residual": tuple(RESIDUALS), "intensity": INTENSITIES},
    **{"election": ELECTIONS, "signs": SIGNS, "rescale": RESCALINGS},
}
# Options offered below the name of their method alone, although another's of that name is left out.
_OFFERED = frozenset({("orthomerge", "threshold")})
_RANGES: Mapping[tuple[str, str], tuple[Any, ...]] = {
    ("orthomerge", "threshold"): (-1.0, 1.0),
    ("orthomerge", "prior"): (1e-5, 1.0, "log"),
    ("orthomerge", "clip"): (1.0, 20.0),
    ("knots", "density"): (0.05, 1.0, "log"),
}
_LABELS = {
    "normalize": "Divide by the weights",
    "t": "Place on the arc t",
    "density": "Density kept",
    "election": "Signs elected by",
    "p": "Share dropped p",
    "signs": "Signs",
    "rescale": "Enlarged by",
    "filter_wise": "Angle per row",
    "inner": "Merged inside by",
    "offdiagonal": "Off-diagonal kept",
    "power": "Power",
    "target": "What is turned",
    "residual": "Rest merged by",
    "threshold": "Conflict below cosine",
    "prior": "Prior",
    "clip": "Largest correction",
    "intensity": "Angle of the turn",
    "pull": "Pull of the base",
}
_WORDS: Mapping[str, str] = {
    **{"global": "all of it", "conflict": "rows in conflict", "task_arithmetic": "task arithmetic"},
    **{"sum": "size", "count": "number", "l1": "length"},
}
_MOST_SIDE_BY_SIDE, _LONG = 3, 34  # choices, and letters of all of them, that fit beside each other
_STEPS = 0.05


def _offered(method: str, option: str) -> bool:
    return option not in LEFT_OUT or (method, option) in _OFFERED


def _made(method: str, option: str, default: Any) -> tuple[param.Parameter, bool]:
    """The setting of an option, and whether its slider is logarithmic."""
    label = _LABELS.get(option, option)
    if isinstance(default, bool):
        return param.Selector(default=default, objects=[True, False], label=label), False
    space: Any = _RANGES.get((method, option)) or SPACES[method].get(option)
    if isinstance(default, str):
        choices = _CHOICES.get(option) or space
        return param.Selector(default=default, objects=list(choices), label=label), False
    low, high, *log = space
    step = None if log else _STEPS
    return param.Number(float(default), bounds=(float(low), float(high)), step=step, label=label), bool(log)


#: Method to option to the setting that holds it.
OPTIONS: dict[str, dict[str, str]] = {
    method: {option: f"{method}_{option}" for option in spec.options if _offered(method, option)}
    for method, spec in methods().items()
}
_MADE = {
    setting: _made(method, option, methods()[method].options[option])
    for method, settings in OPTIONS.items()
    for option, setting in settings.items()
}


def _words(parameter: param.Parameter) -> dict[Any, str]:
    objects = parameter.objects if isinstance(parameter, param.Selector) else []
    return {one: ("yes" if one else "no") if isinstance(one, bool) else _WORDS.get(one, str(one)) for one in objects}


def _beside(parameter: param.Parameter) -> bool:
    """Whether the choices fit side by side."""
    words = _words(parameter)
    return 0 < len(words) <= _MOST_SIDE_BY_SIDE and sum(map(len, words.values())) <= _LONG


#: Settings of all options; those with a logarithmic slider; those whose choices lie side by side; words for choices.
SETTINGS = tuple(_MADE)
LOGARITHMIC = frozenset(setting for setting, (_, log) in _MADE.items() if log)
SEGMENTS = {name: _words(parameter) for name, (parameter, _) in _MADE.items() if _beside(parameter)}
WORDS = {name: _words(parameter) for name, (parameter, _) in _MADE.items()}


def with_options(state: type[State]) -> type[State]:
    """A class of settings with one for each option of each method, named ``METHOD_OPTION``."""
    for setting, (parameter, _) in _MADE.items():
        state.param.add_parameter(setting, parameter)
    return state


# Method to option to the option and value without which it changes nothing.
_NEEDS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "orthomerge": {"threshold": ("target", "conflict")},
    "knots": {"density": ("inner", "ties"), "election": ("inner", "ties")},
    "dare": {"election": ("signs", "ties"), "normalize": ("signs", "ties")},
}


def idle_options(state: Settings, method: str) -> list[str]:
    """Settings of a method that change nothing as its others are."""
    own, needs = OPTIONS[method], _NEEDS.get(method, {})
    return [own[option] for option, (other, value) in needs.items() if getattr(state, own[other]) != value]


def option_values(state: Settings, method: str) -> dict[str, Any]:
    """The options of a method as a page has them, for ``merge(..., **options)``."""
    return {option: getattr(state, setting) for option, setting in OPTIONS[method].items()}
