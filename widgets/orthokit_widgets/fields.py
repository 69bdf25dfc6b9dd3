"""Settings of a page: how each is shown, how it is read from an address or a control, and what is said when it is bad.

A setting is a parameter of a :class:`param.Parameterized` class; its bounds, step, label and choices are written there
once and used for the control, the address and the check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlencode

import param

from orthokit.errors import OptionError, OrthokitError, unknown_name

__all__ = ["Settings", "describe", "read", "read_query", "write_query"]

# Keys of the address that belong to the server.
_FOREIGN = ("bokeh-", "theme", "token")


class Settings(param.Parameterized):
    """Base of a page's state: which parameters are settings, and how they look.

    Args:
        **settings: Settings to start from.

    Raises:
        OptionError: A setting out of range; the message names the range.
        UnknownNameError: No such setting.
    """

    #: Names of the settings, in the order of their controls.
    SETTINGS: tuple[str, ...] = ()
    #: Settings whose slider is logarithmic.
    LOGARITHMIC: frozenset[str] = frozenset()
    #: Settings typed as a number instead of dragged.
    TYPED: frozenset[str] = frozenset()
    #: Choices shown side by side, with the words on them.
    SEGMENTS: ClassVar[Mapping[str, Mapping[Any, str]]] = {}
    #: Words for the choices of a list.
    WORDS: ClassVar[Mapping[str, Mapping[Any, str]]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.set(settings)

    def set(self, settings: Mapping[str, Any]) -> None:
        """Change settings in the order of their controls: what can be chosen may depend on those above."""
        order = [*self.SETTINGS, *settings]
        for name in sorted(settings, key=order.index):
            setattr(self, name, read(self, name, settings[name]))

    def values(self) -> dict[str, Any]:
        """Name to value of every setting."""
        return {name: getattr(self, name) for name in self.SETTINGS}


def describe(state: Settings) -> list[dict[str, Any]]:
    """The controls of a page, as plain data for the form.

    Args:
        state: The page's settings.

    Returns:
        One dict per setting: name, label, help, kind and its range or choices.
    """
    return [_describe(state, name) for name in state.SETTINGS]


def _describe(state: Settings, name: str) -> dict[str, Any]:
    parameter = state.param[name]
    field: dict[str, Any] = {"name": name, "label": parameter.label, "help": parameter.doc or ""}
    if isinstance(parameter, param.Selector):
        words = {**state.WORDS.get(name, {}), **state.SEGMENTS.get(name, {})}
        choices = [{"value": str(item), "label": words.get(item, str(item)), "help": ""} for item in parameter.objects]
        if isinstance(parameter, param.ListSelector):
            return field | {"kind": "several", "choices": choices}
        return field | {"kind": "segments" if name in state.SEGMENTS else "choice", "choices": choices}
    low, high = parameter.bounds
    step = parameter.step or 1
    scale = "log" if name in state.LOGARITHMIC else "linear"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    kind = "number" if name in state.TYPED else "range"
    return field | {"kind": kind, "min": low, "max": high, "step": step, "scale": scale, "digits": digits}


def read(state: Settings, name: str, text: Any) -> Any:
    """The value of a setting from the text of an address or a control.

    Args:
        state: The page's settings.
        name: One of ``state.SETTINGS``.
        text: What was given.

    Returns:
        The value; a number is moved to the nearest step of its control.

    Raises:
        OptionError: Not a number, out of range, or not one of the choices; the message names the range.
        UnknownNameError: No such setting.
    """
    if name not in state.SETTINGS:
        raise unknown_name("setting", name, state.SETTINGS)
    parameter = state.param[name]
    if isinstance(parameter, param.ListSelector):
        return _read_several(parameter, text)
    if isinstance(parameter, param.Selector):
        for item in parameter.objects:
            if str(item) == str(text):
                return item
        listed = ", ".join(str(item) for item in parameter.objects)
        raise OptionError(f"{parameter.label} must be one of {listed}; got {str(text)[:40]!r}.")
    low, high = parameter.bounds
    wanted = f"{parameter.label} must be a number from {low:g} to {high:g}"
    try:
        value = float(text)
    except (TypeError, ValueError) as cause:
        raise OptionError(f"{wanted}; got {str(text)[:40]!r}.") from cause
    if not low <= value <= high:  # also false for NaN
        raise OptionError(f"{wanted}; got {value:g}.")
    if name in state.LOGARITHMIC:
        return value
    step = parameter.step or 1
    value = low + round((value - low) / step) * step
    return int(value) if isinstance(parameter, param.Integer) else round(min(value, high), 10)


def _read_several(parameter: param.ListSelector, text: Any) -> list[Any]:
    """Some of the choices, in their own order, from a list or from text with commas."""
    given = [str(item) for item in text] if isinstance(text, list | tuple) else [p for p in str(text).split(",") if p]
    known = {str(item): item for item in parameter.objects}
    unknown = [item for item in given if item not in known]
    if unknown or not given:
        found = repr(unknown[0][:40]) if unknown else "none"
        raise OptionError(f"{parameter.label} must be one or more of {', '.join(known)}; got {found}.")
    return [item for word, item in known.items() if word in given]


def read_query(state: Settings, query: str) -> list[str]:
    """Set the settings that an address names; what cannot be used is left at its default and told.

    Args:
        state: The page's settings, changed here.
        query: The query of an address, with or without its question mark.

    Returns:
        One sentence per value that was not used.
    """
    problems = []
    pairs = parse_qsl(query.removeprefix("?"), keep_blank_values=True)
    given = [pair for pair in pairs if not pair[0].startswith(_FOREIGN)]
    # In the order of the controls: what can be chosen for one may depend on those above it.
    for name, text in sorted(given, key=lambda pair: [*state.SETTINGS, pair[0]].index(pair[0])):
        try:
            setattr(state, name, read(state, name, text))
        except OrthokitError as error:
            default = f" The default {getattr(state, name)} is used." if name in state.SETTINGS else ""
            problems.append(f"In the address: {error}{default}")
    return problems


def write_query(state: Settings) -> str:
    """The settings that differ from their defaults, as the query of an address.

    Args:
        state: The page's settings.

    Returns:
        The query without a question mark; empty when all is as it was.
    """
    moved = {name: value for name, value in state.values().items() if value != type(state).param[name].default}
    return urlencode({name: _text(value) for name, value in moved.items()}, safe=",")


def _text(value: Any) -> Any:
    """A value as an address has it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else value
