"""Skew matrices to and from their packing by gathers alone; neither function records anything for autograd to keep.

On CPUs a gather of every entry takes a fraction of the time of scattering the upper triangle.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

# What is kept takes 7 bytes per entry of the matrix: 29 MB here.
_LARGEST_KEPT = 2048


def pack(Q: Tensor) -> Tensor:
    """The strict upper triangles ``(..., b (b - 1) / 2)``, row by row, of ``(..., b, b)``."""
    b = Q.shape[-1]
    return Q.flatten(-2).index_select(-1, (_kept_upper if _may_keep(Q, b) else _upper)(b, Q.device))


def unpack(v: Tensor, b: int) -> Tensor:
    """The skew matrices ``(..., b, b)`` of packed ones."""
    if b == 1:
        return v.new_zeros(*v.shape[:-1], 1, 1)
    source, sign = (_kept_sources if _may_keep(v, b) else _sources)(b, v.device)
    Q = v.index_select(-1, source).unflatten(-1, (b, b)).mul_(sign)
    Q.diagonal(dim1=-2, dim2=-1).zero_()  # a sign of 0 would let a NaN or an infinity through
    return Q


def _may_keep(X: Tensor, b: int) -> bool:
    # An index made while a program is traced, or of a fake kind, must not outlive it.
    return b <= _LARGEST_KEPT and type(X) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _dtype(b: int) -> torch.dtype:
    return torch.int32 if b * b < 2**31 else torch.int64


def _upper(b: int, device: torch.device) -> Tensor:
    """For every packed entry its place among the ``b * b``."""
    rows, columns = torch.triu_indices(b, b, offset=1, dtype=_dtype(b), device=device)
    return rows * b + columns


def _sources(b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every entry of a skew matrix its place in the packing and its sign."""
    i = torch.arange(b, dtype=_dtype(b), device=device)
    start = i * b - i * (i + 1) // 2 - i - 1  # row i holds the columns j > i, at start[i] + j
    upper = (start[:, None] + i).triu_(1)
    sign = torch.ones(b, b, dtype=torch.int8, device=device).triu_(1)
    return (upper + upper.mT).flatten(), sign - sign.mT


_kept_upper, _kept_sources = lru_cache(maxsize=32)(_upper), lru_cache(maxsize=32)(_sources)
