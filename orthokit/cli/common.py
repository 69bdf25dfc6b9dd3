"""What the commands share: exit codes, and how options with names and values are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from orthokit.errors import OptionError

__all__ = ["FAILED", "INTERRUPTED", "OK", "USAGE", "parameters", "value"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def value(text: str) -> Any:
    """A number, list, mapping or truth value where the text is one in JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parameters(pairs: Sequence[str], *, flag: str = "-p") -> dict[str, str]:
    """``NAME=VALUE`` pairs as a mapping."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise OptionError(f"{flag} takes NAME=VALUE; got {pair!r}.")
        if name.strip() in values:
            raise OptionError(f"parameter {name.strip()} was given twice; say which value is meant.")
        values[name.strip()] = value.strip()
    return values
