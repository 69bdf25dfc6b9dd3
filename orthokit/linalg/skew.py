"""Skew-symmetric matrices as vectors: half the numbers, and no way to be anything but skew."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from orthokit.errors import ShapeError
from orthokit.linalg import _skew_places
from orthokit.linalg._check import check_square

__all__ = ["pack_skew", "packed_size", "skew_part", "unpack_skew"]


def packed_size(b: int) -> int:
    """The number of free entries of a ``b x b`` skew matrix, ``b (b - 1) / 2``.

    Example:
        >>> packed_size(4)
        6
    """
    return b * (b - 1) // 2


def skew_part(X: Shaped[Tensor, "*batch b b"]) -> Shaped[Tensor, "*batch b b"]:
    r"""The skew part ``(X - X^T) / 2``: the nearest skew matrix.

    Args:
        X: Square matrix or batch, shape ``(..., b, b)``.

    Returns:
        Shape and dtype of ``X``.

    Raises:
        ShapeError: ``X`` is not square.

    Example:
        >>> skew_part(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    check_square(X, name="X")
    return (X - X.mT) / 2


def pack_skew(Q: Shaped[Tensor, "*batch b b"]) -> Shaped[Tensor, "*batch n"]:
    r"""The strict upper triangle of a skew matrix, row by row: ``vec = (Q_01, Q_02, ..., Q_12, ...)``.

    Args:
        Q: Skew matrix or batch, shape ``(..., b, b)``. Only the strict upper triangle is read.

    Returns:
        Shape ``(..., b (b - 1) / 2)``; ``||Q||_F^2 = 2 ||vec||^2``.

    Raises:
        ShapeError: ``Q`` is not square.

    Example:
        >>> v = torch.arange(1.0, 7.0)
        >>> torch.equal(pack_skew(unpack_skew(v)), v)
        True

    Numerics:
        A gather; exact in every dtype and differentiable any number of times, keeping nothing for the backward pass.
        The index, 7 bytes per entry, is kept between calls for ``b <= 2048``.
    """
    check_square(Q, name="Q")
    # A compiler does not trace functions with a forward derivative of their own, and differentiates the gathers itself.
    return _skew_places.pack(Q) if torch.compiler.is_compiling() else _Pack.apply(Q)  # type: ignore[no-any-return]


def unpack_skew(v: Shaped[Tensor, "*batch n"]) -> Shaped[Tensor, "*batch b b"]:
    r"""The skew matrix ``Q = U - U^T`` whose strict upper triangle, row by row, is ``v``.

    Args:
        v: Packed entries, shape ``(..., b (b - 1) / 2)`` for some ``b >= 1``.

    Returns:
        Shape ``(..., b, b)``, exactly skew.

    Raises:
        ShapeError: The length of ``v`` is no ``b (b - 1) / 2``.

    Example:
        >>> unpack_skew(torch.tensor([2.0])).tolist()
        [[0.0, 2.0], [-2.0, 0.0]]

    Numerics:
        A gather, as in :func:`pack_skew`. Its gradient is ``dL/dv_ij = (dL/dQ)_ij - (dL/dQ)_ji``.
    """
    n = v.shape[-1] if v.ndim else 0
    b = (1 + math.isqrt(1 + 8 * n)) // 2
    if v.ndim < 1 or packed_size(b) != n:
        raise ShapeError(f"a packed skew matrix has b (b - 1) / 2 entries: 0, 1, 3, 6 ...; got shape {tuple(v.shape)}.")
    if torch.compiler.is_compiling():
        return _skew_places.unpack(v, b)
    return _Unpack.apply(v, b)  # type: ignore[no-any-return]


# Both are linear: written by hand, they keep nothing, where autograd would keep the index and scatter in its backward.
class _Pack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(Q: Tensor) -> Tensor:
        return _skew_places.pack(Q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.b = inputs[0].shape[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Unpack.apply(gradient, ctx.b).triu(1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return _Pack.apply(tangent)


class _Unpack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, b: int) -> Tensor:
        return _skew_places.unpack(v, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.b = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Pack.apply(gradient - gradient.mT), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return _Unpack.apply(tangent, ctx.b)
