"""What comes into a chart is checked here: one place, one wording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError

__all__ = ["array", "betas_vector", "matrix", "named", "nested", "seeded", "vector"]


def array(name: str, values: Any, *, dims: tuple[int, ...], finite: bool = True) -> np.ndarray:
    """``values`` (array, tensor or nested list) as a float64 array with one of the numbers of dimensions ``dims``."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    try:
        result = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as cause:
        message = f"{name} must be numbers in a rectangular array; got {type(values).__name__}. {cause}."
        raise DtypeError(message) from cause
    if result.ndim not in dims:
        wanted = " or ".join(f"{d}-dimensional" for d in dims)
        raise ShapeError(f"{name} must be {wanted}; got shape {result.shape}.")
    if result.size == 0:
        raise ShapeError(f"{name} must hold at least one number; got shape {result.shape}.")
    if finite and not np.isfinite(result).all():
        bad = int((~np.isfinite(result)).sum())
        raise NonFiniteError(f"{name} must be finite; {bad} of {result.size} values are NaN or infinite.")
    return result


def vector(
    name: str,
    values: Any,
    *,
    length: int | None = None,
    low: float | None = None,
    increasing: bool = False,
    finite: bool = True,
) -> np.ndarray:
    """``values`` as a 1-D float64 array, with its length, lower bound (not strict) and order checked."""
    result = array(name, values, dims=(1,), finite=finite)
    if length is not None and len(result) != length:
        raise ShapeError(f"{name} must have {length} values, one per point of the other axis; got {len(result)}.")
    if low is not None and np.nanmin(result) < low:
        raise OptionError(f"{name} must be >= {low:g}; the smallest value is {np.nanmin(result):g}.")
    if increasing and (np.diff(result) <= 0).any():
        raise OptionError(f"{name} must be strictly increasing; sort it and drop repeated values.")
    return result


def matrix(name: str, values: Any, *, shape: tuple[int | None, int | None] = (None, None)) -> np.ndarray:
    """``values`` as a 2-D float64 array; ``None`` in ``shape`` leaves that side free."""
    result = array(name, values, dims=(2,))
    if any(want is not None and want != got for want, got in zip(shape, result.shape, strict=True)):
        wanted = " x ".join("any" if side is None else str(side) for side in shape)
        raise ShapeError(f"{name} must have shape {wanted}; got {result.shape[0]} x {result.shape[1]}.")
    return result


def betas_vector(values: Any) -> np.ndarray:
    """Momentum coefficients: increasing, in [0, 1)."""
    result = vector("betas", values, low=0.0, increasing=True)
    if result.max() >= 1:
        raise OptionError(f"betas must be < 1; got {result.max():g}.")
    return result


def named(name: str, series: Any) -> dict[str, Any]:
    """A non-empty mapping from label to data, with labels as text."""
    if not isinstance(series, Mapping):
        raise DtypeError(f"{name} must map a label to its values, such as {{'Muon': values}}; got {type(series)}.")
    if not series:
        raise ShapeError(f"{name} must hold at least one labelled series; got an empty mapping.")
    return {str(label): values for label, values in series.items()}


def nested(name: str, series: Any, *, row: str, column: str) -> dict[str, dict[str, Any]]:
    """A mapping from label to a mapping whose own labels are the same in each, such as way to cause to size.

    Args:
        name: Of the argument.
        series: The mapping.
        row: What an outer label is, for messages.
        column: What an inner label is.
    """
    rows = {label: named(f"{column}s of {label!r}", of) for label, of in named(name, series).items()}
    columns = list(next(iter(rows.values())))
    for label, of in rows.items():
        if list(of) != columns:
            raise ShapeError(f"every {row} must have the {column}s {columns}; {label!r} has {list(of)}.")
    return rows


def seeded(name: str, values: Any, count: int, *, per: str, finite: bool = True, signed: bool = True) -> np.ndarray:
    """Values of one seed ``(n,)`` or of several ``(seeds, n)``, always as ``(seeds, n)``.

    Args:
        name: Of the values.
        values: The values.
        count: ``n``.
        per: What there is a value for, for messages.
        finite: Refuse NaN and infinities.
        signed: Let negative values pass.
    """
    result = np.atleast_2d(array(name, values, dims=(1, 2), finite=finite))
    if result.shape[-1] != count:
        raise ShapeError(f"{name} must have {count} values, one per {per}; got {result.shape[-1]}.")
    if not signed and (result < 0).any():
        raise OptionError(f"{name} must be at least 0; the smallest is {np.nanmin(result):g}.")
    return result
