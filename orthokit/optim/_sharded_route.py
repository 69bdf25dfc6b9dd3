"""Moves boxes of many tensors between processes with one all-to-all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from orthokit.optim._sharded_plan import Box, Item, extent, relative, transfers, volume

__all__ = ["Router"]

# Every piece starts at a multiple of this in the byte buffers, so that it can be read in any dtype.
_ALIGNMENT = 16


class _Piece(NamedTuple):
    """A box of one item, and where it lies in a byte buffer."""

    item: int
    box: Box
    offset: int


class _Plan(NamedTuple):
    """What this process sends, receives and keeps; ``sizes`` are the bytes for and from each process."""

    sends: list[_Piece]
    receives: list[_Piece]
    keeps: list[tuple[int, Box]]
    send_sizes: list[int]
    receive_sizes: list[int]
    silent: bool


class Router:
    """Moves tensors of a group; plans are remembered, since every step moves the same ones.

    Args:
        group: The process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.bytes_sent = 0
        """Bytes this process has handed to others so far."""
        self.collectives = 0
        """All-to-alls so far."""
        self._plans: dict[Hashable, _Plan] = {}

    def route(
        self,
        items: Sequence[Item],
        tensors: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        device: Any,
        *,
        remember: bool = True,
    ) -> list[Tensor | None]:
        """Hand over all items.

        Args:
            items: What goes where; equal on every process.
            tensors: This process's box of each item (``None`` where it has none), of any dtype and strides.
            dtypes: The dtype each item travels in, and arrives in.
            device: Where the buffers are made.
            remember: Keep the plan for the next call with the same items; default ``True``.

        Returns:
            The wanted box of each item, ``None`` where this process wants nothing. A result may share memory with its
            own tensor (where it already had the whole box) or with the other results.
        """
        key = (tuple(items), tuple(dtypes))
        plan = self._plans.get(key) or self._plan(items, dtypes)
        if remember:
            self._plans[key] = plan
        received = torch.empty(sum(plan.receive_sizes), dtype=torch.uint8, device=device)
        if not plan.silent:
            sent = torch.empty(sum(plan.send_sizes), dtype=torch.uint8, device=device)
            views = [_view(sent, piece, dtypes) for piece in plan.sends]
            boxes = [self._part(items, tensors, piece.item, piece.box) for piece in plan.sends]
            if views:
                torch._foreach_copy_(views, boxes)
            dist.all_to_all_single(received, sent, plan.receive_sizes, plan.send_sizes, group=self.group)
            self.bytes_sent += sum(plan.send_sizes)
            self.collectives += 1
        return self._unpack(plan, items, tensors, dtypes, received)

    def _part(self, items: Sequence[Item], tensors: Sequence[Tensor | None], item: int, box: Box) -> Tensor:
        own = items[item].have[self.rank]
        return cast("Tensor", tensors[item])[relative(box, cast("Box", own))]

    def _unpack(
        self,
        plan: _Plan,
        items: Sequence[Item],
        tensors: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        received: Tensor,
    ) -> list[Tensor | None]:
        results: list[Tensor | None] = []
        for item, dtype in zip(items, dtypes, strict=True):
            want = item.want[self.rank]
            empty = want is not None and not volume(want)
            results.append(torch.empty(extent(want), dtype=dtype, device=received.device) if empty and want else None)
        parts = [(k, box, self._part(items, tensors, k, box)) for k, box in plan.keeps]
        parts += [(piece.item, piece.box, _view(received, piece, dtypes)) for piece in plan.receives]
        targets, sources = [], []
        for k, box, part in parts:
            want, result = items[k].want[self.rank], results[k]
            if box == want and part.dtype == dtypes[k]:
                results[k] = part  # whole as it came: no copy
                continue
            if result is None:
                results[k] = result = torch.empty(extent(want or box), dtype=dtypes[k], device=received.device)
            targets.append(result[relative(box, want or box)])
            sources.append(part)
        if targets:
            torch._foreach_copy_(targets, sources)
        return results

    def _plan(self, items: Sequence[Item], dtypes: Sequence[torch.dtype]) -> _Plan:
        sends: list[list[tuple[int, Box]]] = [[] for _ in range(self.size)]
        receives: list[list[tuple[int, Box]]] = [[] for _ in range(self.size)]
        keeps, silent = [], True
        for k, item in enumerate(items):
            for box, source, target in transfers(item):
                if source == target:
                    if target == self.rank:
                        keeps.append((k, box))
                    continue
                silent = False
                if source == self.rank:
                    sends[target].append((k, box))
                if target == self.rank:
                    receives[source].append((k, box))
        outgoing, send_sizes = _lay_out(sends, dtypes)
        incoming, receive_sizes = _lay_out(receives, dtypes)
        return _Plan(outgoing, incoming, keeps, send_sizes, receive_sizes, silent)


def _lay_out(parts: list[list[tuple[int, Box]]], dtypes: Sequence[torch.dtype]) -> tuple[list[_Piece], list[int]]:
    """One piece after the other, in the order of the processes; both sides of a transfer find the same order."""
    pieces, sizes, offset = [], [], 0
    for members in parts:
        start = offset
        for k, box in members:
            pieces.append(_Piece(k, box, offset))
            size = volume(box) * dtypes[k].itemsize
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        sizes.append(offset - start)
    return pieces, sizes


def _view(buffer: Tensor, piece: _Piece, dtypes: Sequence[torch.dtype]) -> Tensor:
    """The piece inside a byte buffer, in its own dtype and shape."""
    dtype = dtypes[piece.item]
    size = volume(piece.box) * dtype.itemsize
    return buffer[piece.offset : piece.offset + size].view(dtype).view(extent(piece.box))
