"""Every exception and warning a user can meet.

Each message is one or two sentences: the constraint, what was found, what to do. All classes derive from
:class:`OrthokitError` and from the built-in a caller would expect (``ValueError``, ``OSError`` ...), so
``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AssetError",
    "CheckpointError",
    "DeviceError",
    "DtypeError",
    "MissingExtraError",
    "NonFiniteError",
    "NothingMatchedWarning",
    "OptionError",
    "OrthokitError",
    "ParameterError",
    "ReportError",
    "RunBusyError",
    "RunDamagedError",
    "RunError",
    "ShapeError",
    "UnknownNameError",
    "unknown_name",
]


class OrthokitError(Exception):
    """Base of every error raised on purpose by orthokit."""


class OptionError(OrthokitError, ValueError):
    """An option is outside its range, or two options contradict each other."""


class UnknownNameError(OptionError, LookupError):
    """A name (corpus, model, method, parameter ...) is not one of the known ones."""


class ShapeError(OrthokitError, ValueError):
    """A tensor has the wrong number of dimensions or a size that does not fit."""


class DtypeError(OrthokitError, TypeError):
    """A tensor or value has a type the operation is not defined for."""


class NonFiniteError(OrthokitError, ArithmeticError):
    """A NaN or an infinity was found where finite numbers are required."""


class ParameterError(OrthokitError, ValueError):
    """A model parameter was given to an optimizer or adapter that cannot treat it."""


class DeviceError(OrthokitError, RuntimeError):
    """The requested device or dtype is not there."""


class AssetError(OrthokitError, OSError):
    """A data file of the package is missing or does not have the recorded content."""


class CheckpointError(OrthokitError, ValueError):
    """A model file cannot be read, or does not fit the model it is loaded into."""


class RunError(OrthokitError, OSError):
    """A run folder cannot be used as asked."""


class RunBusyError(RunError):
    """Another process is writing the run."""


class RunDamagedError(RunError):
    """A file of a run is damaged; the message names the file. Other runs stay readable."""


class ReportError(OrthokitError, RuntimeError):
    """A notebook, report or study cannot be made as asked."""


class MissingExtraError(OrthokitError, ImportError):
    """An optional dependency is needed; the message gives the command that installs it."""


class NothingMatchedWarning(UserWarning):
    """A pattern or a model held nothing that the operation applies to."""


def unknown_name(kind: str, name: object, choices: Iterable[object]) -> UnknownNameError:
    """The error for a name that is not among ``choices``, with the closest match first.

    Args:
        kind: What the name stands for, in words: ``"corpus"``, ``"optimizer"``.
        name: What was given.
        choices: The names that exist.

    Returns:
        The exception, to be raised by the caller.

    Example:
        >>> str(unknown_name("corpus", "moby", ["addresses", "moby_dick"]))
        "unknown corpus 'moby'; did you mean 'moby_dick'? Known: 'addresses', 'moby_dick'."
    """
    known = sorted({str(choice) for choice in choices})
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    listed = ", ".join(repr(choice) for choice in known) or "none"
    return UnknownNameError(f"unknown {kind} {str(name)!r}{hint} Known: {listed}.")
