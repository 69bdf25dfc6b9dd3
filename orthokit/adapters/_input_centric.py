"""``x W^T`` for a reparameterised ``W`` that is never formed: forward and backward of the layer by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthokit.adapters.block_rotation import turn
from orthokit.adapters.quantization import dequantize

__all__ = ["Frozen", "input_centric"]


@dataclass(frozen=True)
class Frozen:
    """The frozen weight as it is stored: a matrix, or codes with their scales.

    Args:
        weight: ``(out, in)``: floating, or codes.
        scale: One per group of codes.
        zero: One per group of codes.
        group_size: Codes in a group.
    """

    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int = 0

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix in a floating type."""
        if self.scale is None or self.zero is None:
            return self.weight.to(dtype)
        return dequantize(self.weight, self.scale, self.zero, group_size=self.group_size, dtype=dtype)


def input_centric(
    x: Tensor,
    bias: Tensor | None,
    frozen: Frozen,
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    left: list[Tensor],
    right: list[Tensor],
    *,
    low: bool,
) -> Tensor:
    r"""``y = ((x[p_in] D_in^T) W^T D_out^T)[p_out^{-1}] + bias``: two thin products around the frozen one.

    Args:
        x: Rows ``(..., in)``.
        bias: Added last, after the outputs are back in their places, so that a merge need not touch it.
        frozen: The stored weight, its rows and columns already in the order of the blocks.
        places: ``p_in``, its inverse, ``p_out``, its inverse.
        left: Blocks of the out-side.
        right: Blocks of the in-side.
        low: Keep ``x`` alone and recompute ``b = W a`` in the backward pass; else keep ``b`` as well.

    Returns:
        Rows ``(..., out)``.
    """
    # The products are in row form, so each block acts transposed.
    stacks = [R.mT for R in (*left, *right)]
    return _InputCentric.apply(  # type: ignore[no-any-return]
        low, frozen.group_size, len(left), x, bias, frozen.weight, frozen.scale, frozen.zero, *places, *stacks
    )


class _InputCentric(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        low: bool,
        group_size: int,
        lefts: int,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        p_in: Tensor,
        inverse_in: Tensor,
        p_out: Tensor,
        inverse_out: Tensor,
        *stacks: Tensor,
    ) -> Tensor:
        ctx.low, ctx.group_size, ctx.lefts = low, group_size, lefts
        rows = x.reshape(-1, x.shape[-1])
        frozen = Frozen(weight, scale, zero, group_size)
        b = _through(rows, frozen.dense(x.dtype), p_in, list(stacks[lefts:]))
        y = turn(list(stacks[:lefts]), b).index_select(1, inverse_out)
        if bias is not None:
            y += bias
        kept = None if low else b
        ctx.save_for_backward(x, kept, weight, scale, zero, p_in, inverse_in, p_out, *stacks)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, b, weight, scale, zero, p_in, inverse_in, p_out, *stacks = ctx.saved_tensors
        left, right = stacks[: ctx.lefts], stacks[ctx.lefts :]
        wanted = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        frozen = Frozen(weight, scale, zero, ctx.group_size).dense(x.dtype)
        turned_in = rows.index_select(1, p_in)
        if b is None:
            b = turn(right, turned_in) @ frozen.mT
        dy = gradient.reshape(-1, gradient.shape[-1])
        d_bias = dy.sum(0) if wanted[4] else None
        dy = dy.index_select(1, p_out)
        d_left = _block_gradients(left, b, dy)
        da = turn([S.mT for S in left], dy) @ frozen
        d_right = _block_gradients(right, turned_in, da)
        dx = None
        if wanted[3]:
            dx = turn([S.mT for S in right], da).index_select(1, inverse_in).view(x.shape)
        return (None, None, None, dx, d_bias, *[None] * 7, *d_left, *d_right)


def _through(rows: Tensor, W: Tensor, p_in: Tensor, right: list[Tensor]) -> Tensor:
    """``b = (x[p_in] D_in^T) W^T``: the rows before the out-side turns them."""
    return turn(right, rows.index_select(1, p_in)) @ W.mT


def _block_gradients(stacks: list[Tensor], inputs: Tensor, outputs: Tensor) -> list[Tensor]:
    """For ``y_j = x_j S_j`` with every block ``j`` on its own coordinates: ``dS_j = x_j^T dy_j``."""
    gradients, start = [], 0
    for S in stacks:
        k, b = S.shape[0], S.shape[-1]
        x, dy = (t[:, start : start + k * b].unflatten(1, (k, b)) for t in (inputs, outputs))
        gradients.append(x.permute(1, 2, 0) @ dy.transpose(0, 1))
        start += k * b
    return gradients
