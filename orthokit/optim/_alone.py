"""Muon's step of one small matrix in few calls: beside its products, they are what costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthokit.linalg._workspace import Workspace
from orthokit.linalg.polar import iteration_alone
from orthokit.optim._pieces import Chunk, Piece, iteration_dtype, iteration_options
from orthokit.optim.rates import lr_ratio

__all__ = ["ALONE_OPTIONS", "Alone", "move_alone", "prepare_alone"]

# Options that leave nothing to do beside the polar factor, the Nesterov blend and the decay.
_USUAL = {"order": "pre", "nesterov": True, "normalize": None, "decay": "decoupled"}
#: Options that the preparation depends on.
ALONE_OPTIONS = (
    *_USUAL,
    *("method", "ns_steps", "polish", "ns_coefficients", "scaling", "eps", "ns_dtype", "adjust_lr_fn"),
)
# Entries up to which a matrix by itself is not worth cutting into strips.
_ALONE = 1 << 18


class Alone(NamedTuple):
    """What is decided before the step of one matrix."""

    dtype: torch.dtype
    """That of the products."""
    polar: Callable[[Tensor], Tensor]
    """The polar factor of a matrix ``(1, out, in)`` that may be overwritten."""
    ratio: float
    """The factor on the learning rate."""


def prepare_alone(chunk: Chunk, group: dict[str, Any], workspace: Workspace) -> Alone | None:
    """How the one matrix of a chunk moves; ``None`` where its size or the options want the general way."""
    piece = chunk[0]
    if not chunk.plain or piece.block.numel > _ALONE or any(group[name] != usual for name, usual in _USUAL.items()):
        return None
    shape = (piece.block.shape[-2], piece.block.shape[-1])
    dtype = iteration_dtype(piece.gradient, (1, *shape), group)
    polar = iteration_alone(shape, dtype, **iteration_options(group), workspace=workspace)
    return Alone(dtype, polar, lr_ratio(group["adjust_lr_fn"], *shape))


def move_alone(piece: Piece, buffer: Tensor, group: dict[str, Any], alone: Alone) -> None:
    """The step of one parameter that is one matrix."""
    weight, gradient, momentum, lr = piece.parameter, piece.gradient, group["momentum"], float(group["lr"])
    buffer.lerp_(gradient, 1 - momentum)
    direction = alone.polar(torch.lerp(gradient, buffer, momentum).unsqueeze(0).to(alone.dtype))
    if group["weight_decay"]:
        weight.mul_(1 - lr * group["weight_decay"])
    weight.add_(direction.squeeze(0), alpha=-lr * alone.ratio)
