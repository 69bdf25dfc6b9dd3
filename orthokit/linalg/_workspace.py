"""Buffers that are used again: a fresh one costs its page faults at every call, as much as a product on CPUs."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from orthokit._threads import seat

__all__ = ["Workspace"]


class Workspace:
    """Named scratch memory. What it lends under a name is valid until the same thread asks for that name again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str, torch.dtype, torch.device], Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with arbitrary content; the memory grows when a larger one is asked for."""
        size, key = prod(shape), (seat(), name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)

    def __deepcopy__(self, memo: object) -> Workspace:
        return Workspace()  # nothing in it is worth keeping

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()
