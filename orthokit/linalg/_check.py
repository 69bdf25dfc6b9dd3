"""Checks of tensor arguments, shared by the linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from orthokit.errors import DtypeError, NonFiniteError, ShapeError

__all__ = ["check_finite", "check_matrix", "check_square", "working_dtype"]


def check_matrix(X: Tensor, *, name: str = "W") -> None:
    """Raise unless ``X`` is a floating or complex tensor with at least two dimensions."""
    if X.ndim < 2:
        raise ShapeError(f"{name} must have at least 2 dimensions (..., out, in); got shape {tuple(X.shape)}.")
    if not (X.is_floating_point() or X.is_complex()):
        raise DtypeError(f"{name} must be floating or complex; got {X.dtype}. Convert it with .float() first.")


def check_square(X: Tensor, *, name: str = "X") -> None:
    """Raise unless the last two dimensions of ``X`` are equal."""
    if X.ndim < 2 or X.shape[-1] != X.shape[-2]:
        raise ShapeError(f"{name} must be square, shape (..., b, b); got {tuple(X.shape)}.")


def check_finite(X: Tensor, *, name: str = "W") -> None:
    """Raise if ``X`` holds a NaN or an infinity, which decompositions answer with noise or a crash."""
    # A sum is finite only if every entry is, and takes a tenth of the time of looking at each.
    if X.dtype in (torch.float32, torch.float64) and bool(torch.isfinite(X.detach().sum())):
        return
    bad = int((~torch.isfinite(X)).sum())
    if bad:
        raise NonFiniteError(f"{name} must be finite; {bad} of its {X.numel()} entries are NaN or infinite.")


def working_dtype(X: Tensor) -> torch.dtype:
    """The dtype to decompose ``X`` in: its own, but never below float32, where LAPACK has no routines."""
    if X.is_complex():
        return torch.promote_types(X.dtype, torch.complex64)
    return torch.promote_types(X.dtype, torch.float32)
