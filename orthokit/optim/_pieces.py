"""What Muon's step is made of: the blocks of the parameters as rows of a work list, and passes over them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthokit.device import fast_matmul_dtype, matmul_rates
from orthokit.matrices import MatrixBlock

__all__ = [
    "Chunk",
    "Piece",
    "Plan",
    "chunks",
    "core_rate",
    "decay",
    "iteration_dtype",
    "iteration_options",
    "like",
    "measured",
    "shrink",
    "strips",
    "write_back",
]

# Up to m m n with m the shorter side, the kernels of half precision cost more than the work: float32 is three times as
# fast for one matrix, and for a stack of many between as fast and half slower. The other bounds are those of a whole
# stack, where one process knows all of it. Up to the last of them, one matrix of 128 x 128 or eight of 64 x 64, it
# depends on the processor, so products of that side are measured.
_TINY, _TINY_STACK, _SMALL_STACK, _SMALL = 1 << 17, 1 << 20, 1 << 21, 128
# Entries that go through the iteration at once. On one core of a CPU a few matrices at a time, small enough that the
# buffers stay in the caches; on several half as many, so that each has its own. Where that leaves less than a few
# chunks a core they get smaller, down to what handing them out is worth. On other devices the launch of a kernel costs.
_CHUNK, _CHUNK_OF_CORE, _CHUNK_LEAST = 1 << 22, 1 << 21, 1 << 20
_CHUNKS_OF_CORE = 2
_CHUNK_ELSEWHERE = 1 << 27
# Entries that several passes go over before the next ones are touched: a few tensors of them fit in a core's cache.
_STRIP = 1 << 16


class Piece(NamedTuple):
    """One block of one parameter: what a row of the work list is."""

    parameter: Tensor
    block: MatrixBlock

    @property
    def plain(self) -> bool:
        """Whether the block is the parameter itself: a matrix as it is."""
        return self.parameter.ndim == 2 and not self.block.layout.steps

    def of(self, tensor: Tensor) -> Tensor:
        """This block of a tensor shaped like the parameter, ``(matrices, out, in)``; a view if there is one."""
        if self.plain:
            return tensor.unsqueeze(0)  # the common case, at a tenth of the cost of the general one
        return self.block.read(tensor).reshape(-1, *self.block.shape[-2:])

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient, which is there."""
        return self.parameter.grad  # pyright: ignore[reportReturnType]


class Chunk(list[Piece]):
    """Pieces of one shape that go through the iteration together."""

    recipe: tuple[list[Any], Any] | None = None
    """What an optimizer has decided for these pieces, with the options that it depends on."""

    @cached_property
    def plain(self) -> bool:
        """Whether every block is a whole matrix, so that nothing needs to be cut out of its parameter."""
        return all(piece.plain for piece in self)

    @cached_property
    def counts(self) -> list[int]:
        """How many matrices each piece holds."""
        return [piece.block.count for piece in self]

    def of(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The blocks of tensors shaped like the parameters: ``(out, in)`` if all are plain, else with a batch."""
        return list(tensors) if self.plain else [piece.of(x) for piece, x in zip(self, tensors, strict=True)]

    def split(self, stack: Tensor) -> list[Tensor]:
        """A stack ``(matrices, out, in)`` piece by piece, in the shapes of :meth:`of`."""
        return list(stack.unbind() if self.plain else stack.split(self.counts))


class Plan(NamedTuple):
    """The work list of one step."""

    chunks: list[Chunk]
    apart: list[Tensor]
    """Parameters that are cut into blocks, whose buffers move as a whole."""


def like(tensor: Tensor, memory: Tensor) -> Tensor:
    """The beginning of a flat ``memory`` in the shape of a tensor that is no larger."""
    return memory[: tensor.numel()].view(tensor.shape)


def strips(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape, together a part at a time, so that a second pass over a part finds it in the cache."""
    if tensors[0].device.type != "cpu" or not all(x.is_contiguous() for x in tensors):
        return iter([tensors])
    return zip(*(x.view(-1).split(_STRIP) for x in tensors), strict=True)


def iteration_options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as :func:`orthokit.linalg.orthogonalize` names them."""
    return {
        "method": group["method"],
        "steps": group["ns_steps"],
        "polish": group["polish"],
        "coefficients": group["ns_coefficients"] if group["method"] == "newton_schulz" else None,
        "scaling": group["scaling"],
        "eps": group["eps"],
    }


def iteration_dtype(x: Tensor, shape: Sequence[int], group: dict[str, Any]) -> torch.dtype:
    """The dtype of the products for matrices ``(..., out, in)`` of an input like ``x``.

    Where several processes share the work, nothing but the shape of one matrix and what they have agreed on decides, so
    that all of them decide alike.
    """
    # The exact factor of rounded input would not be exact, and half precision has no complex form.
    if x.is_complex() or group["method"] == "svd":
        return x.dtype
    if group["ns_dtype"] is not None:
        return group["ns_dtype"]
    if x.dtype == torch.float64:
        return x.dtype
    rows, columns = shape[-2:]
    work = min(rows, columns) * rows * columns
    if work <= _TINY:
        return torch.float32
    if "agreed_dtype" in group:
        return group["agreed_dtype"]
    work *= math.prod(shape[:-2])
    if work <= _TINY_STACK:
        return torch.float32
    known = "small_dtype" if work <= _SMALL_STACK else "fast_dtype"
    return group[known] if known in group else measured(x.device)[known]


def core_rate(dtype: torch.dtype, group: dict[str, Any]) -> float:
    """FLOP/s of large products on one core of this CPU."""
    rates = group["core_rates"] if "core_rates" in group else measured(torch.device("cpu"))["core_rates"]
    return rates.get(str(dtype).removeprefix("torch."), rates["float32"])


def measured(device: torch.device) -> dict[str, Any]:
    """What is measured once, with the present number of threads, as the group of a step may hold it."""
    return _measured(device, torch.get_num_threads())


@cache
def _measured(device: torch.device, threads: int) -> dict[str, Any]:
    return {
        "fast_dtype": fast_matmul_dtype(device),
        "small_dtype": fast_matmul_dtype(device, side=_SMALL),
        "core_rates": {name: rate / threads for name, rate in matmul_rates(device).items()},
    }


def decay(weights: list[Tensor], directions: list[Tensor], *, rate: float, rule: str) -> None:
    """Shrink the weights in place: all entries, or with ``"cautious"`` those that the step makes smaller as well."""
    if not rate:
        return
    if rule == "decoupled":
        shrink(weights, 1 - rate)
        return
    if weights[0].is_complex():
        for weight, direction in zip(weights, directions, strict=True):
            weight.sub_(weight * ((weight * direction.conj()).real > 0), alpha=rate)
        return
    shrinking = torch._foreach_mul(weights, directions)
    torch._foreach_sign_(shrinking)
    torch._foreach_clamp_min_(shrinking, 0)
    torch._foreach_addcmul_(weights, weights, shrinking, value=-rate)


def shrink(tensors: list[Tensor], factor: float) -> None:
    """Multiply all tensors by one number, in place."""
    if tensors[0].dtype in (torch.bfloat16, torch.float16):
        # The list form would round the number to their dtype first: to 0.988 instead of 0.99.
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def write_back(chunk: Chunk, values: list[Tensor], tensors: list[Tensor] | None = None) -> None:
    """Strides that allow no view gave a copy; its values go back to the parameter (or to ``tensors``)."""
    if chunk.plain:
        return
    for i, (piece, value) in enumerate(zip(chunk, values, strict=True)):
        target = piece.parameter if tensors is None else tensors[i]
        if value.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
            piece.block.write(target, value.view(piece.block.shape))


def chunks(pieces: list[Piece]) -> Iterator[Chunk]:
    """Pieces of one shape, dtype and device together, as many as the caches hold."""
    alike: dict[tuple, list[Piece]] = defaultdict(list)
    for piece in pieces:
        p = piece.parameter
        alike[(*piece.block.shape[-2:], p.dtype, piece.gradient.dtype, p.device)].append(piece)
    total = sum(piece.block.numel for piece in pieces)
    for members in alike.values():
        entries = sum(piece.block.numel for piece in members)
        # Equal shares: a small rest would keep a core waiting.
        share = entries / math.ceil(entries / _room(members[0].parameter.device, total))
        found: dict[int, Chunk] = defaultdict(Chunk)
        start = 0
        for piece in members:
            found[int((start + piece.block.numel / 2) // share)].append(piece)
            start += piece.block.numel
        yield from found.values()


def _room(device: torch.device, total: int) -> int:
    """Entries of a chunk, for that many in all."""
    if device.type != "cpu":
        return _CHUNK_ELSEWHERE
    threads = torch.get_num_threads()
    if threads == 1:
        return _CHUNK
    return max(_CHUNK_LEAST, min(_CHUNK_OF_CORE, total // (_CHUNKS_OF_CORE * threads)))
