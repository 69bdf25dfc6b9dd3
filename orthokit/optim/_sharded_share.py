"""How one parameter lies among the processes: who keeps which part, and who updates which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor

from orthokit.errors import OptionError, ParameterError
from orthokit.matrices import MatrixBlock
from orthokit.matrices.layout import Layout
from orthokit.optim._sharded_plan import Box, Item, chunk, extent, relative, shard_boxes, volume
from orthokit.optim._sharded_route import Router

__all__ = [
    "Share",
    "add_stack",
    "local_part",
    "mesh_boxes",
    "mesh_group",
    "resolved",
    "stack_work",
    "whole_box",
]


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; without autograd, writing into it writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_box(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, size) for size in shape)


def mesh_boxes(
    shape: tuple[int, ...], mesh: DeviceMesh, dims: tuple[int | None, ...], router: Router
) -> tuple[Box, ...]:
    """The box of every process of the group, for a tensor of this shape that a mesh shards along ``dims``."""
    boxes = dict(zip(mesh.mesh.flatten().tolist(), shard_boxes(shape, mesh.mesh.shape, dims), strict=True))
    return tuple(boxes[rank] for rank in dist.get_process_group_ranks(router.group))


def resolved(process_group: Any) -> Any:
    """The process group that an option names."""
    if not dist.is_available() or not dist.is_initialized():
        raise OptionError("process_group needs torch.distributed; call torch.distributed.init_process_group first.")
    group = dist.group.WORLD if isinstance(process_group, str) and process_group == "world" else process_group
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise OptionError(
            f'process_group must be "world" or a ProcessGroup that this process belongs to; got {process_group!r}.'
        )
    return group


def mesh_group(mesh: DeviceMesh | None) -> Any:
    """The process group of all members of a mesh."""
    if mesh is None:
        raise ParameterError("a sharded parameter must have a mesh.")
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten().get_group()


def stack_work(
    blocks: list[MatrixBlock], keep: tuple[Box, ...], dims: tuple[int | None, ...]
) -> tuple[Box | None, ...] | None:
    """The boxes in which a stack of matrices is updated; ``None`` for what has one owner."""
    if len(blocks) != 1 or not _stacked_first(blocks[0].layout):
        return None
    if 0 in dims and all(dim in (0, None) for dim in dims):
        return keep  # every process already holds whole matrices
    shape, count = blocks[0].parameter_shape, len(keep)
    if shape[0] < count:
        return None
    rest = tuple((0, size) for size in shape[1:])
    return tuple((chunk(shape[0], count, rank), *rest) for rank in range(count))


def _stacked_first(layout: Layout) -> bool:
    """Whether the first dimension only counts matrices, so that a range of it is a parameter of the same kind."""
    if layout.counts[0] == 0:
        return False
    kept = (step[1][0] == 0 if step[0] == "permute" else step[1] != 0 for step in layout.steps)
    return all(kept)


def add_stack(loads: list[float], work: tuple[Box | None, ...] | None, cost: float) -> None:
    """Raise the loads of the processes that divide a stack, each by its share of the cost."""
    boxes = work or ()
    total = max((box[0][1] for box in boxes if box is not None), default=0)
    for rank, box in enumerate(boxes):
        if box is not None and total:
            loads[rank] += cost * (box[0][1] - box[0][0]) / total


@dataclass(frozen=True, eq=False)
class Share:
    """One parameter among the processes.

    Args:
        name: Its name.
        shape: Its whole shape.
        keep: The box each process keeps.
        work: The box each process updates; ``None`` for none.
        cost: FLOP of a step of the whole parameter.
        turn: Its place in the order of the work: the expensive ones come first.
        blocks: Its matrix blocks.
        rank: This process.
        mesh: The mesh of a sharded parameter.
        dims: For each dimension of the mesh the dimension of the parameter it shards, or ``None``.
    """

    name: str
    shape: tuple[int, ...]
    keep: tuple[Box, ...]
    work: tuple[Box | None, ...]
    cost: float
    turn: int
    blocks: list[MatrixBlock]
    rank: int
    mesh: DeviceMesh | None
    dims: tuple[int | None, ...]

    @cached_property
    def inwards(self) -> Item:
        """From where the parameter is kept to where it is updated."""
        return Item(self.keep, self.work)

    @cached_property
    def outwards(self) -> Item:
        """From where the parameter is updated to where it is kept."""
        return Item(self.work, self.keep)

    @property
    def own_box(self) -> Box | None:
        """What this process updates; ``None``: nothing."""
        box = self.work[self.rank]
        return box if box is not None and volume(box) else None

    @cached_property
    def own_blocks(self) -> list[MatrixBlock]:
        """The matrix blocks of this process's part of the work."""
        box = self.own_box
        if box is None or extent(box) == self.shape:
            return self.blocks
        return [replace(b, layout=Layout(extent(box), b.layout.steps, b.layout.counts)) for b in self.blocks]

    @cached_property
    def regions(self) -> Tensor:
        """The index of the block that each entry this process keeps belongs to."""
        index = torch.empty(self.shape, dtype=torch.uint8)
        for i, block in enumerate(self.blocks):
            block.write(index, torch.full(block.shape, i, dtype=torch.uint8))
        box = self.keep[self.rank]
        return index[relative(box, whole_box(self.shape))].clone()
