r"""A stream of gradients, taken block by block and folded into moving averages for many betas at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError

__all__ = ["Numbers", "as_betas", "blocks", "empty_buffers", "fold", "positive"]

#: One number, or several.
Numbers = float | int | Sequence[float | int] | Tensor

# Elements of a block, so that all betas cost one matrix product a block and memory does not depend on the stream.
_BLOCK = 2**21


def fold(M: Tensor, block: Tensor, betas: Tensor) -> Tensor:
    """Buffers ``(betas, *shape)`` after the gradients ``block (k, *shape)``; all betas by one matrix product."""
    k = len(block)
    ages = torch.arange(k - 1, -1, -1, dtype=torch.float64, device=betas.device)
    weights = ((1 - betas)[:, None] * betas[:, None] ** ages).to(M)
    decay = (betas**k).to(M).reshape(-1, *[1] * (M.ndim - 1))
    return M * decay + (weights @ block.reshape(k, -1).to(M.dtype)).reshape(M.shape)


def as_betas(beta: Numbers) -> Tensor:
    """``beta`` in float64, checked to lie in [0, 1)."""
    b = torch.as_tensor(beta, dtype=torch.float64)
    if not bool(((b >= 0) & (b < 1)).all()):
        raise OptionError(f"beta must satisfy 0 <= beta < 1; got {b.tolist()}.")
    return b


def empty_buffers(betas: Tensor, block: Tensor) -> Tensor:
    """Zero buffers, one a beta, for gradients like those of ``block``; float32 or better."""
    dtype = torch.promote_types(block.dtype, torch.float32)
    return torch.zeros(len(betas), *block.shape[1:], dtype=dtype, device=block.device)


def blocks(gradients: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """The stream as stacks ``(k, *shape)`` of bounded size."""
    if isinstance(gradients, Tensor):
        if gradients.ndim < 1 or not gradients.is_floating_point():
            raise DtypeError(
                f"gradients must be a floating tensor (K, ...); got {gradients.dtype}, {gradients.ndim}-d."
            )
        if len(gradients):
            yield from gradients.detach().split(max(1, _BLOCK // max(1, gradients[0].numel())))
        return
    held: list[Tensor] = []
    shape: torch.Size | None = None
    for G in gradients:
        shape = G.shape if shape is None else shape
        if G.shape != shape:
            raise ShapeError(f"all gradients must have one shape; got {tuple(shape)}, then {tuple(G.shape)}.")
        if not G.is_floating_point():
            raise DtypeError(f"gradients must be floating; got {G.dtype}.")
        held.append(G.detach())
        if len(held) * G.numel() >= _BLOCK:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)


def positive(values: Numbers, name: str) -> Tensor:
    """``values`` in float64, checked to be positive and finite."""
    x = torch.as_tensor(values, dtype=torch.float64)
    if x.numel() == 0 or not bool(((x > 0) & x.isfinite()).all()):
        raise OptionError(f"{name} must be positive and finite; got {x.tolist()}.")
    return x
