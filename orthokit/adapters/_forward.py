"""A linear layer with a reparameterised weight, ``y = x (A_out W A_in)^T``: forward and backward by hand, two ways.

Input-centric, the rows are turned and the weight is never formed. Weight-centric, the weight is formed and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthokit.adapters.block_rotation import rotate_sides, turn
from orthokit.adapters.quantization import dequantize

__all__ = ["Frozen", "Places", "input_centric", "weight_centric"]


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


class Places(NamedTuple):
    """The orders of both sides and their inverses.

    Args:
        p_in: Place ``i`` of the blocks holds input ``p_in[i]``.
        inverse_in: Its inverse.
        p_out: The same for outputs.
        inverse_out: Its inverse.
    """

    p_in: Tensor
    inverse_in: Tensor
    p_out: Tensor
    inverse_out: Tensor


def input_centric(
    x: Tensor,
    bias: Tensor | None,
    frozen: Frozen,
    places: Places,
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
        places: The orders.
        left: Blocks of the out-side.
        right: Blocks of the in-side.
        low: Keep ``x`` alone and recompute ``b = W a`` in the backward pass; else keep ``b`` as well.

    Returns:
        Rows ``(..., out)``.
    """
    # The products are in row form, so each block acts transposed.
    stacks = [R.mT for R in (*left, *right)]
    return _InputCentric.apply(_Fixed(frozen, places, len(left), low), x, bias, *stacks)  # type: ignore[no-any-return]


def weight_centric(
    x: Tensor, bias: Tensor | None, frozen: Frozen, places: Places, left: list[Tensor], right: list[Tensor]
) -> Tensor:
    """The same by forming ``(D_out W D_in)[p_out^{-1}][:, p_in^{-1}]`` in each pass; only ``x`` is kept between them.

    For ``N`` rows and a width ``d`` it takes ``3 N d^2`` multiplications and some ``8 d^2 b`` for the weight, against
    ``2 N d^2 + 6 N d b`` input-centric, whose thin products and gathers run far below the speed of square ones.

    Args:
        x: Rows ``(..., in)``.
        bias: Added last.
        frozen: The stored weight, its rows and columns already in the order of the blocks.
        places: The orders.
        left: Blocks of the out-side.
        right: Blocks of the in-side.

    Returns:
        Rows ``(..., out)``.
    """
    return _WeightCentric.apply(_Fixed(frozen, places, len(left)), x, bias, *left, *right)  # type: ignore[no-any-return]


class _Fixed(NamedTuple):
    """What a pass takes besides rows, bias and blocks, and has no gradient."""

    frozen: Frozen
    places: Places
    lefts: int
    low: bool = False

    def save(self, ctx: Any, x: Tensor, kept: Tensor | None, stacks: tuple[Tensor, ...]) -> None:
        """Keep everything for the backward pass; tensors where autograd sees a change in place and can offload them."""
        frozen = self.frozen
        ctx.group_size, ctx.lefts = frozen.group_size, self.lefts
        ctx.save_for_backward(x, kept, frozen.weight, frozen.scale, frozen.zero, *self.places, *stacks)


class _Saved(NamedTuple):
    """What :meth:`_Fixed.save` kept."""

    x: Tensor
    kept: Tensor | None
    W: Tensor
    places: Places
    left: list[Tensor]
    right: list[Tensor]

    @classmethod
    def of(cls, ctx: Any) -> _Saved:
        """The frozen matrix comes in the dtype of the rows."""
        x, kept, weight, scale, zero, *rest = ctx.saved_tensors
        W = Frozen(weight, scale, zero, ctx.group_size).dense(x.dtype)
        stacks = rest[4:]
        return cls(x, kept, W, Places(*rest[:4]), stacks[: ctx.lefts], stacks[ctx.lefts :])


class _InputCentric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fixed: _Fixed, x: Tensor, bias: Tensor | None, *stacks: Tensor) -> Tensor:
        frozen, places, lefts, low = fixed
        rows = x.reshape(-1, x.shape[-1])
        b = turn(list(stacks[lefts:]), rows.index_select(1, places.p_in)) @ frozen.dense(x.dtype).mT
        y = turn(list(stacks[:lefts]), b).index_select(1, places.inverse_out)
        if bias is not None:
            y += bias
        fixed.save(ctx, x, None if low else b, stacks)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, b, W, places, left, right = _Saved.of(ctx)
        _, x_wanted, bias_wanted, *_ = ctx.needs_input_grad
        placed = x.reshape(-1, x.shape[-1]).index_select(1, places.p_in)
        if b is None:
            b = turn(right, placed) @ W.mT
        dy = gradient.reshape(-1, gradient.shape[-1])
        d_bias = dy.sum(0) if bias_wanted else None
        dy = dy.index_select(1, places.p_out)
        d_left = _block_gradients(left, b, dy)
        da = turn([S.mT for S in left], dy) @ W
        d_right = _block_gradients(right, placed, da)
        dx = None
        if x_wanted:
            dx = turn([S.mT for S in right], da).index_select(1, places.inverse_in).view(x.shape)
        return (None, dx, d_bias, *d_left, *d_right)


class _WeightCentric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fixed: _Fixed, x: Tensor, bias: Tensor | None, *stacks: Tensor) -> Tensor:
        frozen, places, lefts, _ = fixed
        W = rotate_sides(frozen.dense(x.dtype), list(stacks[:lefts]), list(stacks[lefts:]))
        W = W.index_select(0, places.inverse_out).index_select(1, places.inverse_in)
        fixed.save(ctx, x, None, stacks)
        return torch.nn.functional.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, _, W, places, left, right = _Saved.of(ctx)
        _, x_wanted, bias_wanted, *_ = ctx.needs_input_grad
        rows, dy = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        d_bias = dy.sum(0) if bias_wanted else None
        inner = turn(right, W)  # W D_in
        dx = None
        if x_wanted:
            whole = rotate_sides(inner, left, [])
            whole = whole.index_select(0, places.inverse_out).index_select(1, places.inverse_in)
            dx = (dy @ whole).view(x.shape)
        dW = (dy.mT @ rows).index_select(0, places.p_out).index_select(1, places.p_in)
        # V_i = R_i A_i on rows: dR_i = dV_i A_i^T, which is the gradient in row form of the transposed matrices.
        d_left = _block_gradients(left, dW.mT, inner.mT)
        d_right = _block_gradients(right, W, rotate_sides(dW, [R.mT for R in left], []))
        return (None, dx, d_bias, *d_left, *d_right)


def _block_gradients(stacks: list[Tensor], inputs: Tensor, outputs: Tensor) -> list[Tensor]:
    """For ``y_j = x_j S_j`` with every block ``j`` on its own coordinates: ``dS_j = x_j^T dy_j``."""
    gradients, start = [], 0
    for S in stacks:
        k, b = S.shape[0], S.shape[-1]
        x, dy = (t[:, start : start + k * b].unflatten(1, (k, b)) for t in (inputs, outputs))
        gradients.append(x.permute(1, 2, 0) @ dy.transpose(0, 1))
        start += k * b
    return gradients
