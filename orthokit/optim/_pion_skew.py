r"""Skew matrices folded into half the memory, at the speed of copying blocks.

``linalg.pack_skew`` gathers the upper triangle row by row, which costs more than the arithmetic of a step. Here a skew
``S`` of size ``b`` is cut in four blocks at ``ceil(b / 2)``. The corner ``S_12`` is kept whole; the strict upper
triangle of ``S_11``, one column to the left, and the strict lower triangle of ``S_22`` fill one rectangle::

    S_11   .  a  b      S_22   .  .      rectangle   a  b      with the corner: b (b - 1) / 2 numbers,
          -a  .  c             p  .                  p  c      none to spare
          -b -c  .

A symmetric matrix without its diagonal, such as the mean square of a skew one, is folded the same way.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from orthokit.linalg._workspace import Workspace
from orthokit.linalg.skew import packed_size

__all__ = ["fold", "folded_parts", "product", "skew_product", "unfold"]

# Triangles are copied in square tiles; only the ones on the diagonal hold both triangles and need a mask.
_TILE = 192


def folded_parts(packed: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The rectangle ``(N, b // 2, ceil(b / 2) - 1)`` and the corner ``(N, ceil(b / 2), b // 2)``, as views."""
    big, small, count = b - b // 2, b // 2, len(packed)
    split = small * (big - 1)
    return packed[:, :split].view(count, small, big - 1), packed[:, split:].view(count, big, small)


@functools.lru_cache(maxsize=256)
def _upper(rows: int, columns: int, device: torch.device) -> Tensor:
    """True on and above the diagonal."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu()


def _tiles(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + _TILE, size)) for start in range(0, size, _TILE)]


def fold(S: Tensor, out: Tensor | None = None) -> Tensor:
    """``S`` of shape ``(N, b, b)`` as ``(N, b (b - 1) / 2)``; only half of its entries are read."""
    b = S.shape[-1]
    big = b - b // 2
    packed = S.new_empty(len(S), packed_size(b)) if out is None else out
    rectangle, corner = folded_parts(packed, b)
    corner.copy_(S[:, :big, big:])
    _fold_triangles(S[:, :big, :big], S[:, big:, big:], rectangle)
    return packed


def _fold_triangles(first: Tensor, second: Tensor, rectangle: Tensor) -> None:
    upper, lower, columns = first[:, :, 1:], second, rectangle.shape[-1]
    for start, stop in _tiles(rectangle.shape[-2]):
        end = min(stop, columns)
        rectangle[:, start:stop, stop:] = upper[:, start:stop, stop:]
        rectangle[:, start:stop, :start] = lower[:, start:stop, :start]
        mask = _upper(stop - start, end - start, rectangle.device)
        tile = torch.where(mask, upper[:, start:stop, start:end], lower[:, start:stop, start:end])
        rectangle[:, start:stop, start:end] = tile


def unfold(packed: Tensor, b: int, out: Tensor | None = None, *, sign: int = -1) -> Tensor:
    """The whole matrices ``(N, b, b)`` of folded ones: skew, or symmetric without diagonal for ``sign=1``.

    Args:
        packed: ``(N, b (b - 1) / 2)``.
        b: Their size.
        out: Where they go; its dtype may be narrower.
        sign: Of the mirrored half.
    """
    count, big = len(packed), b - b // 2
    full = packed.new_empty(count, b, b) if out is None else out
    rectangle, corner = folded_parts(packed, b)
    rectangle = rectangle.to(full.dtype)
    first, second = full[:, :big, :big], full[:, big:, big:]
    for start, stop in _tiles(big):
        if stop < big:
            part = rectangle[:, start:stop, stop - 1 :]
            _mirror(part, first[:, start:stop, stop:], first[:, stop:, start:stop], sign)
        tile = full.new_zeros(count, stop - start, stop - start)
        # Nothing of the last row lies above the diagonal, and the rectangle may end before it.
        rows = min(stop, rectangle.shape[-2]) - start
        tile[:, :rows, 1:] = rectangle[:, start:stop, start : stop - 1].triu()
        first[:, start:stop, start:stop] = tile + sign * tile.mT
    for start, stop in _tiles(b // 2):
        if start:
            part = rectangle[:, start:stop, :start]
            _mirror(part, second[:, start:stop, :start], second[:, :start, start:stop], sign)
        tile = full.new_zeros(count, stop - start, stop - start)
        columns = min(stop, rectangle.shape[-1]) - start
        tile[:, :, :columns] = rectangle[:, start:stop, start : start + columns].tril(-1)
        second[:, start:stop, start:stop] = tile + sign * tile.mT
    _mirror(corner, full[:, :big, big:], full[:, big:, :big], sign)
    return full


def _mirror(source: Tensor, place: Tensor, mirrored: Tensor, sign: int) -> None:
    """``source`` at its place, and its (negated) transpose opposite."""
    place.copy_(source)
    mirrored.copy_(place.mT)  # from the copy: one dtype, so that torch transposes without converting
    if sign < 0:
        mirrored.neg_()


def product(
    left: Tensor, right: Tensor, out: Tensor, add: Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """``alpha left right (+ beta add)`` for batches of matrices; ``add`` may be ``out``.

    One matrix goes the way of a single product: only there do operands that are transposed or a part of a larger matrix
    cost no copy.
    """
    if len(left) == 1:
        if add is None:
            torch.mm(left[0], right[0], out=out[0])
        else:
            torch.addmm(add[0], left[0], right[0], beta=beta, alpha=alpha, out=out[0])
    elif add is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(add, left, right, beta=beta, alpha=alpha, out=out)
    return out


def skew_product(P: tuple[Tensor, Tensor], Q: tuple[Tensor, Tensor], out: Tensor, workspace: Workspace) -> Tensor:
    """``P Q^T - Q P^T`` folded into ``out`` ``(N, b (b - 1) / 2)``, with three quarters of its products computed.

    Args:
        P: Its first ``ceil(b / 2)`` and its other rows, ``(N, rows, k)``, in the dtype of the products.
        Q: As ``P``.
        out: Where the result goes, usually wider than the products.
        workspace: Scratch memory.
    """
    rectangle, corner = folded_parts(out, P[0].shape[1] + P[1].shape[1])

    def block(name: str, i: int, j: int) -> Tensor:
        shape = (len(out), P[i].shape[1], P[j].shape[1])
        S = workspace.get(name, shape, P[0].dtype, out.device)
        product(P[i], Q[j].mT, S)
        return product(Q[i], P[j].mT, S, S, alpha=-1)

    corner.copy_(block("first", 0, 1))
    _fold_triangles(block("first", 0, 0), block("second", 1, 1), rectangle)
    return out
