"""Which entries of a vector are the largest in size: exact, with a rule for equals, and fast.

Everything goes through pieces that fit into a core's cache, where an operation runs several times faster than from
memory; a vector may therefore be one that is computed piece by piece and never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cut", "bits_of", "kth_largest", "largest_cut", "pieces", "shrink_", "workspace"]

# The pattern of a positive float, read as an integer, grows with the float. Sizes are compared as integers: NumPy
# partitions them in less than half the time of floats, whose NaNs it has to look for.
_PATTERN = {torch.float32: (torch.int32, 0x7FFF_FFFF), torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF)}

# The most entries that torch works on in one thread: small pieces gain nothing from a second one, and waiting for it
# between operations costs ten times the work where other programs run.
_PIECE = 1 << 15


class Cut(NamedTuple):
    """A rule that keeps an exact number of entries.

    Args:
        threshold: Entries above it in size stay, entries below go.
        end: Entries equal to it stay where their row-major index is below this.
    """

    threshold: float
    end: int


def pieces(size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """The bounds of the pieces of a vector: small on a CPU, the whole elsewhere."""
    step = _PIECE if device.type == "cpu" else max(1, size)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def bits_of(values: Tensor, out: Tensor | None = None) -> Tensor:
    """The sizes of float32 or float64 ``values`` as integers of the same order, in new memory or in ``out``."""
    integer, mask = _PATTERN[values.dtype]
    return torch.bitwise_and(values.view(integer), mask, out=out)


def kth_largest(bits: Tensor, k: int) -> int:
    """The ``k``-th largest of the flat integers ``bits``, counted from 1; on a CPU the last ``k`` are then the largest.

    On a CPU ``bits`` is reordered, elsewhere left as it is.
    """
    place = bits.numel() - k
    if bits.device.type == "cpu":
        # NumPy's vectorised partition takes 1 to 3 ns an entry where torch.kthvalue takes 30 to 40.
        array = bits.numpy()
        array.partition(place)
        return int(array[place])
    return int(torch.kthvalue(bits, place + 1).values)


def workspace(size: int, like: Tensor) -> Tensor:
    """Memory for the sizes of ``size`` entries of the dtype and device of ``like``."""
    return torch.empty(size, dtype=_PATTERN[like.dtype][0], device=like.device)


def largest_cut(
    values: Callable[[int, int], Tensor], size: int, k: int, like: Tensor, *, bits: Tensor | None = None
) -> Cut:
    """The cut that keeps exactly ``k`` of ``size`` entries: the largest in size, the earlier ones among equals.

    Args:
        values: Gives the entries from one index to another, flat; called once or twice for each.
        size: Number of entries, ``>= k``.
        k: How many stay, ``>= 1``.
        like: A tensor of the dtype and device of the values.
        bits: Memory to work in, from :func:`workspace`; default new. First touching that of a large tensor takes as
            long as selecting in it, so calls in a row should share it.
    """
    bits = workspace(size, like) if bits is None else bits
    for start, stop in pieces(size, like.device):
        bits_of(values(start, stop), out=bits[start:stop])
    pattern = kth_largest(bits, k)
    threshold = float(torch.tensor(pattern, dtype=bits.dtype).view(like.dtype))
    if bits.device.type == "cpu":
        array = bits.numpy()
        left_out = np.count_nonzero(array[: size - k] == pattern)
        room = np.count_nonzero(array[size - k :] == pattern)
    else:
        room = k - int(torch.count_nonzero(bits > pattern))
        left_out = int(torch.count_nonzero(bits == pattern)) - room
    if left_out == 0 or threshold == 0:  # whether a zero stays makes no difference
        return Cut(threshold, size)
    for start, stop in pieces(size, like.device):
        equals = (bits_of(values(start, stop)) == pattern).cpu().numpy().nonzero()[0]
        if len(equals) > room:
            return Cut(threshold, start + int(equals[room]))
        room -= len(equals)
    return Cut(threshold, size)


def shrink_(part: Tensor, cut: Cut, start: int) -> None:
    """Set to zero, in place, what ``cut`` drops of the flat ``part``, whose first entry has index ``start``."""
    if cut.threshold == 0:
        return
    split = min(max(cut.end - start, 0), len(part))
    value = torch.tensor(cut.threshold, dtype=part.dtype)
    below = float(torch.nextafter(value, torch.zeros_like(value)))
    for piece, bound in ((part[:split], below), (part[split:], float(value))):
        if len(piece):
            torch.ops.aten.hardshrink.out(piece, bound, out=piece)  # zero where the size is at most the bound
