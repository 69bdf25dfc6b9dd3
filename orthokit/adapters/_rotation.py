"""Packed generators to rotations, with a backward pass written by hand that keeps little and recomputes less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._skew_places import pack, unpack
from orthokit.linalg.maps import MAPS, _neumann_coefficients, _taylor_coefficients, exp
from orthokit.linalg.skew import unpack_skew

__all__ = ["SkewMap", "packed_rotation"]


@dataclass(frozen=True)
class SkewMap:
    """One of ``linalg.MAPS`` with its length.

    Args:
        map: Name.
        terms: ``k`` of ``"cayley_neumann"``.
        order: ``p`` of ``"exp_taylor"``.
    """

    map: str
    terms: int
    order: int

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise unknown_name("map", self.map, MAPS)
        if self.terms < 1 or self.order < 1:
            raise OptionError(f"terms and order must be at least 1; got terms={self.terms}, order={self.order}.")

    @property
    def coefficients(self) -> list[float] | None:
        """Of the polynomial that the map is; ``None`` for the exact maps."""
        if self.map == "cayley_neumann":
            return _neumann_coefficients(self.terms)
        return _taylor_coefficients(self.order) if self.map == "exp_taylor" else None

    @property
    def turns(self) -> float:
        """Degree of the rotation for a small angle of the generator: 2 for the Cayley family, 1 for exponentials."""
        return 2.0 if self.map.startswith("cayley") else 1.0

    def angle(self, theta: float) -> float:
        """By how much a plane with generator angle ``theta`` is turned, in radians."""
        return 2 * float(torch.tensor(theta, dtype=torch.float64).atan()) if self.turns == 2 else theta


def packed_rotation(v: Tensor, b: int, spec: SkewMap, *, recompute: bool = False) -> Tensor:
    r"""``f(Q)`` for packed generators ``v`` of shape ``(k, b (b - 1) / 2)``: shape ``(k, b, b)``.

    With ``A = Q^T`` and ``L_f`` the derivative of ``f``, the gradient is ``L_f(A)[dL/df]``, evaluated by the same
    splitting as the polynomial itself. For ``k = 3`` that is the four products of the published backward pass. For the
    Cayley transform, ``R = 2 M - I`` with ``M = (I - Q)^{-1}``, it is ``2 M^T (dL/dR) M^T``: two products, and nothing
    is kept but ``R`` itself.

    Args:
        v: Packed generators.
        b: Block size.
        spec: The map.
        recompute: Keep only ``v`` for the backward pass and make ``Q`` and ``Q^2`` again there.
    """
    if b == 1:
        return v.new_ones(v.shape[0], 1, 1)  # a 1 x 1 skew matrix is 0
    if spec.map == "exp":
        return exp(unpack_skew(v))
    return _PackedRotation.apply(v, b, spec, recompute)  # type: ignore[no-any-return]


class _PackedRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, b: int, spec: SkewMap, recompute: bool) -> Tensor:
        ctx.spec, ctx.b, ctx.recompute = spec, b, recompute
        Q = unpack(v, b)
        coefficients = spec.coefficients
        if coefficients is None:
            # inv_ex: no device synchronisation, and NaN goes on to the loss, where a training loop looks for it.
            R = torch.linalg.inv_ex(_eye_like(Q) - Q)[0].mul_(2)
            R.diagonal(dim1=-2, dim2=-1).sub_(1)
            ctx.save_for_backward(R)
            return R
        squared = Q @ Q
        ctx.save_for_backward(*((v,) if recompute else (Q, squared)))
        return _polynomial(coefficients, Q, squared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        coefficients = ctx.spec.coefficients
        if coefficients is None:
            (R,) = ctx.saved_tensors
            inverse = (R.mT + _eye_like(R)) / 2
            wanted = 2 * (inverse @ gradient @ inverse)
        else:
            if ctx.recompute:
                Q = unpack(ctx.saved_tensors[0], ctx.b)
                squared = Q @ Q
            else:
                Q, squared = ctx.saved_tensors
            # Q^T = -Q and (Q^T)^2 = Q^2
            wanted = _derivative(coefficients, -Q, squared, gradient)
        return pack(wanted - wanted.mT), None, None, None


def _polynomial(coefficients: list[float], A: Tensor, squared: Tensor) -> Tensor:
    """``sum_i c_i A^i`` by Horner's rule in ``A^2``: as few products as any splitting up to degree 6."""
    result, scalar = None, None
    for c0, c1 in _pairs(coefficients):
        block = c1 * A
        block.diagonal(dim1=-2, dim2=-1).add_(c0)
        if result is None:
            result, scalar = block, c0 if c1 == 0 else None
        else:
            result = block.add_(squared, alpha=scalar) if scalar is not None else torch.baddbmm(block, result, squared)
            scalar = None
    return result  # type: ignore[return-value]


def _derivative(coefficients: list[float], A: Tensor, squared: Tensor, direction: Tensor) -> Tensor:
    """The derivative of the polynomial at ``A`` in a direction, carried along Horner's rule."""
    of_squared = torch.baddbmm(direction @ A, A, direction)
    value, slope, scalar = None, None, None
    for c0, c1 in _pairs(coefficients):
        block = c1 * A
        block.diagonal(dim1=-2, dim2=-1).add_(c0)
        change = c1 * direction
        if value is None:
            value, slope, scalar = block, change, c0 if c1 == 0 else None
        elif scalar is not None:
            value, slope, scalar = block.add_(squared, alpha=scalar), change.add_(of_squared, alpha=scalar), None
        else:
            slope = torch.baddbmm(torch.baddbmm(change, slope, squared), value, of_squared)  # type: ignore[arg-type]
            value = torch.baddbmm(block, value, squared)
    return slope  # type: ignore[return-value]


def _pairs(coefficients: list[float]) -> list[tuple[float, float]]:
    """``(c_0, c_1), (c_2, c_3), ...``, highest first."""
    padded = [*coefficients, 0.0] if len(coefficients) % 2 else coefficients
    return list(zip(padded[0::2], padded[1::2], strict=True))[::-1]


def _eye_like(Q: Tensor) -> Tensor:
    return torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
