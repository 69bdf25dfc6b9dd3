"""Who keeps, who updates and who sends what, as boxes of index ranges: plain arithmetic, alike on every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

__all__ = [
    "Box",
    "Item",
    "Transfer",
    "assign_owners",
    "chunk",
    "extent",
    "overlap",
    "relative",
    "shard_boxes",
    "transfers",
    "volume",
]

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: a half-open range of indices for every dimension."""


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor on its way: for every process the box it has, and the box it is to get."""

    # Compared by identity: an item is made once, and plans that are looked up at every step are keyed by it.
    have: tuple[Box | None, ...]
    want: tuple[Box | None, ...]


class Transfer(NamedTuple):
    """A box that one process hands to another, or to itself."""

    box: Box
    source: int
    target: int


def assign_owners(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Give each matrix to the process with the least work so far, the most expensive matrix first.

    Longest-processing-time-first: with equal loads at the start, the busiest of ``m`` processes gets at most
    ``4/3 - 1/(3m)`` of what the best possible assignment would give it (Graham 1969). Ties go to the lower index, so
    that every process finds the same owners.

    Args:
        costs: Work of each matrix, in any unit.
        loads: Work each process already has; raised in place.

    Returns:
        The owner of each matrix.

    Example:
        >>> loads = [0.0, 0.0]
        >>> assign_owners([2.0, 3.0, 3.0, 2.0], loads), loads
        ([0, 0, 1, 1], [5.0, 5.0])
    """
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    return owners


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """The range of ``torch.chunk``: equal ranges rounded up, the last ones short or empty."""
    width = -(-size // parts) if size else 0
    return min(size, index * width), min(size, (index + 1) * width)


def shard_boxes(shape: Sequence[int], mesh: Sequence[int], dims: Sequence[int | None]) -> list[Box]:
    """The box of every position of a mesh, in row-major order.

    Args:
        shape: Shape of the whole tensor.
        mesh: Sizes of the mesh.
        dims: For each mesh dimension the tensor dimension it shards, or ``None`` where it replicates.

    Returns:
        One box a position; empty ranges where there are more processes than rows.

    Example:
        >>> shard_boxes((5, 4), (2,), (0,))
        [((0, 3), (0, 4)), ((3, 5), (0, 4))]
    """
    found = []
    for position in product(*map(range, mesh)):
        box = [(0, size) for size in shape]
        for coordinate, parts, dim in zip(position, mesh, dims, strict=True):
            if dim is not None:
                start, stop = box[dim]
                a, b = chunk(stop - start, parts, coordinate)
                box[dim] = (start + a, start + b)
        found.append(tuple(box))
    return found


def overlap(a: Box | None, b: Box | None) -> Box | None:
    """The common part of two boxes; ``None`` where it is empty."""
    if a is None or b is None:
        return None
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative(box: Box, frame: Box) -> tuple[slice, ...]:
    """The slices that cut ``box`` out of a tensor that holds ``frame``."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, frame, strict=True))


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """The number of entries of a box."""
    return prod(extent(box))


def transfers(item: Item) -> list[Transfer]:
    """What has to be handed over so that everybody gets what it wants.

    The boxes of ``have`` are the cells of a grid, some of them with several holders. A process takes from itself
    what it holds; the rest comes from the nearest holder, which with replicas is one of its own replica.
    """
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(item.have):
        if box is not None and volume(box):
            holders.setdefault(box, []).append(rank)
    found = []
    for target, want in enumerate(item.want):
        if want is None or not volume(want):
            continue
        own = item.have[target]
        if overlap(own, want) == want:
            found.append(Transfer(want, target, target))
            continue
        for box, ranks in holders.items():
            common = overlap(box, want)
            if common is not None:
                found.append(Transfer(common, min(ranks, key=lambda rank: abs(rank - target)), target))
    return found
