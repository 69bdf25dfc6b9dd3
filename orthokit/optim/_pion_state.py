"""What Pion remembers of each parameter, half of it as large as it looks, and weights finer than their dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orthokit.device import fast_matmul_dtype
from orthokit.linalg.skew import packed_size
from orthokit.matrices import MatrixBlock
from orthokit.optim._pion_step import kept_sides

__all__ = [
    "fine_weight",
    "new_state",
    "product_dtype",
    "split_weight",
    "state_of_block",
    "wide_dtype",
]


def wide_dtype(p: Tensor) -> torch.dtype:
    """The dtype of the state and of the sums: float64 for float64, else float32."""
    return torch.promote_types(p.dtype, torch.float32)


def product_dtype(p: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of the products for a parameter."""
    if group["dtype"] is not None:
        return group["dtype"]
    return p.dtype if p.dtype == torch.float64 else group.get("fast_dtype") or fast_matmul_dtype(p.device)


def state_sizes(block: MatrixBlock, group: dict[str, Any]) -> dict[str, int]:
    """How many numbers each entry of the state holds for one matrix of a block."""
    sizes = {}
    shape = (block.shape[-2], block.shape[-1])
    for side in kept_sides(group["sides"], shape):
        packed = packed_size(side.size)
        if group["momentum"] == "lie":
            sizes[f"m_{side.name}"] = packed
        sizes[f"v_{side.name}"] = packed if group["second_moment"] else 1
    if group["track"]:
        sizes["causes"] = 2
    if group["track"] or group["restore_every"]:
        sizes["spectrum"] = min(shape)
    return sizes


def new_state(p: Tensor, blocks: list[MatrixBlock], group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter before its first step: ``(matrices, numbers)``, or one row where blocks differ."""
    state = {"step": torch.zeros((), dtype=torch.float32)}
    wide = wide_dtype(p)
    sizes = [state_sizes(block, group) for block in blocks]
    for key in dict.fromkeys(key for one in sizes for key in one):
        numbers = [one.get(key, 0) for one in sizes]
        counts = [block.count for block in blocks]
        total = sum(count * number for count, number in zip(counts, numbers, strict=True))
        shape = (sum(counts), numbers[0]) if len(set(numbers)) == 1 else (total,)
        state[key] = torch.zeros(shape, dtype=wide, device=p.device)
    if group["momentum"] != "lie":
        state["momentum_buffer"] = torch.zeros_like(p, dtype=wide)
    if p.dtype != wide and group["compensated"]:
        # The 16 bits of a float32 that bfloat16 drops; float16 has another exponent, so the difference is kept.
        state["residual"] = torch.zeros_like(p, dtype=torch.int16 if p.dtype == torch.bfloat16 else wide)
    return state


def state_of_block(
    state: dict[str, Tensor], blocks: list[MatrixBlock], block: MatrixBlock, group: dict[str, Any]
) -> dict[str, Tensor]:
    """The rows ``(matrices, numbers)`` of every entry that belong to one block: views."""
    sizes = state_sizes(block, group)
    if len(blocks) == 1:
        return {key: state[key] for key in sizes}
    parts = {}
    for key, size in sizes.items():
        start = 0
        for earlier in blocks[: blocks.index(block)]:
            start += earlier.count * state_sizes(earlier, group).get(key, 0)
        parts[key] = state[key].view(-1)[start : start + block.count * size].view(block.count, size)
    return parts


def fine_weight(weight: Tensor, residual: Tensor | None) -> Tensor:
    """The float32 (or float64) weights of which the parameter holds the leading bits."""
    if residual is None:
        return weight.to(wide_dtype(weight))
    if weight.dtype == torch.bfloat16:
        leading = weight.view(torch.int16).to(torch.int32) << 16
        return (leading + residual).view(torch.float32)
    return weight.to(residual.dtype) + residual


def split_weight(fine: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Write ``fine`` into a parameter and, where there is one, its residual; :func:`fine_weight` gives it back."""
    weight.copy_(fine)
    if residual is None:
        return
    if weight.dtype == torch.bfloat16:
        leading = weight.view(torch.int16).to(torch.int32) << 16
        # A tie that was rounded down leaves 2^15, one more than int16 holds.
        residual.copy_((fine.contiguous().view(torch.int32) - leading).clamp(max=2**15 - 1))
    else:
        residual.copy_(fine - weight)
