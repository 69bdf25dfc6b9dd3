r"""Rows through blocks, ``x -> x Diag(R_1, ..., R_k)``, with a backward pass written by hand; rotations and angles."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthokit.adapters._rotating import plain_autograd
from orthokit.adapters._rotation import SkewMap, packed_rotation
from orthokit.linalg import matrix_polynomial, unpack_skew
from orthokit.linalg._skew_places import unpack

__all__ = ["generator_bound", "plane_angles", "rotation_blocks", "turn_into", "turn_rows"]


def turn_rows(stack: Float[Tensor, "k b b"], x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """``x Diag(R_1, ..., R_k)``; a single block with ``b < n`` is used for all places.

    Args:
        stack: Blocks, ``k b = n`` or ``k = 1``; in the type of ``x``.
        x: Rows.

    Returns:
        Shape and dtype of ``x``, contiguous.
    """
    if plain_autograd():
        k, b = x.shape[-1] // stack.shape[-1], stack.shape[-1]
        blocks = stack[0] if len(stack) == 1 else stack
        return (x.reshape(*x.shape[:-1], k, 1, b) @ blocks).reshape(x.shape)
    return _TurnRows.apply(stack, x)  # type: ignore[no-any-return]


class _TurnRows(torch.autograd.Function):
    """Keeps the rows and the blocks. Products are written where they belong, not transposed into rows afterwards."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(stack, rows)
        return _product(stack, rows).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        stack, rows = ctx.saved_tensors
        g = gradient.reshape(rows.shape)
        of_stack = _blockwise(rows, g, stack) if ctx.needs_input_grad[0] else None
        of_rows = _product(stack.mT, g).view(gradient.shape) if ctx.needs_input_grad[1] else None
        return of_stack, of_rows


def _product(stack: Tensor, rows: Tensor) -> Tensor:
    b = stack.shape[-1]
    if len(stack) == 1:
        return (rows.reshape(-1, b) @ stack[0]).view(rows.shape)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    turn_into(y, stack, rows)
    return y


def turn_into(out: Float[Tensor, "rows n"], stack: Float[Tensor, "k b b"], rows: Float[Tensor, "rows n"]) -> None:
    """``rows Diag(R_1, ..., R_k)`` into ``out``; one batched product that writes every block where it belongs.

    Args:
        out: Overwritten; may be some columns of a wider matrix.
        stack: Blocks, ``k b = n``.
        rows: Rows; may be some columns of a wider matrix.
    """
    shape = (len(rows), len(stack), stack.shape[-1])
    torch.bmm(rows.view(shape).transpose(0, 1), stack, out=out.view(shape).transpose(0, 1))


def _blockwise(rows: Tensor, g: Tensor, stack: Tensor) -> Tensor:
    """``x_i^T g_i`` for every block."""
    b = stack.shape[-1]
    if len(stack) == 1:
        return (rows.reshape(-1, b).mT @ g.reshape(-1, b))[None]
    k = len(stack)
    return torch.bmm(rows.view(-1, k, b).permute(1, 2, 0), g.view(-1, k, b).transpose(0, 1))


def rotation_blocks(v: Float[Tensor, "*lead p"], b: int, spec: SkewMap) -> Float[Tensor, "*lead b b"]:
    """``f(Q)`` of packed generators, differentiable; NaN goes on to the result."""
    flat = v.reshape(-1, v.shape[-1])
    if spec.map == "exp":
        R = torch.linalg.matrix_exp(_skew(flat, b))
    elif plain_autograd():
        Q = _skew(flat, b)
        eye = torch.eye(b, dtype=Q.dtype, device=Q.device)
        coefficients = spec.coefficients
        R = 2 * torch.linalg.inv_ex(eye - Q)[0] - eye if coefficients is None else matrix_polynomial(coefficients, Q)
    else:
        R = packed_rotation(flat, b, spec)
    return R.view(*v.shape[:-1], b, b)


def _skew(v: Tensor, b: int) -> Tensor:
    # Compilers do not follow a function with derivatives of its own in both directions.
    return unpack(v, b) if torch.compiler.is_compiling() else unpack_skew(v)


@torch.no_grad()
def generator_bound(v: Float[Tensor, "*lead p"], *, enough: float = 0.0) -> float:
    r"""A number that no ``||Q_i||_2`` exceeds.

    ``||Q||_2 <= ||Q||_F / sqrt(2) = ||v||_2``, as angles come in pairs; if that is beyond ``enough``,
    ``||Q||_2 <= (||Q^4||_F^2 / 2)^{1/8}``, for two products a few percent above the norm instead of a factor.

    Args:
        v: Packed generators.
        enough: A bound up to this is good enough.

    Returns:
        The bound of the largest block; NaN if a generator is.
    """
    # The last digits of both are rounding; a bound must not fall below the norm by them.
    margin = 1 + 32 * torch.finfo(v.dtype).eps
    rough = float(torch.linalg.vector_norm(v, dim=-1).max()) * margin
    if rough <= enough or not math.isfinite(rough) or rough == 0:
        return rough
    # Scaled to at most 1 first: an eighth power leaves the range of float32 soon.
    Q = unpack_skew(v / rough)
    fourth = Q @ Q
    fourth = fourth @ fourth
    fine = float(torch.linalg.vector_norm(fourth, dim=(-2, -1)).max() ** 2 / 2) ** 0.125
    return rough * min(1.0, fine * margin)


@torch.no_grad()
def plane_angles(v: Float[Tensor, "*lead p"], spec: SkewMap) -> Float[Tensor, "*lead planes"]:
    """By how much each plane is turned by ``f(Q)``, in ``[0, pi]``; float64 on the CPU. Odd blocks hold one more, 0."""
    theta = torch.linalg.svdvals(unpack_skew(v.cpu().double()))[..., ::2]
    coefficients = spec.coefficients
    if coefficients is not None:
        z = torch.complex(torch.zeros_like(theta), theta)
        value = torch.zeros_like(z)
        for c in reversed(coefficients):
            value = value * z + c
        return value.angle().abs()
    if spec.map == "cayley":
        return 2 * theta.atan()
    wrapped = theta.remainder(2 * math.pi)
    return torch.minimum(wrapped, 2 * math.pi - wrapped)
