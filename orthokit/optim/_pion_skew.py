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

__all__ = [
    "fold",
    "fold_blocks",
    "folded_parts",
    "less_transposed",
    "skew_product",
    "transposed",
    "unfold",
    "unfold_triangles",
]

# Triangles are copied in square tiles; only the ones on the diagonal hold both triangles and need a mask.
_TILE = 256
# Side from which the matrices of a batch are transposed one by one.
_EACH = 128
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def folded_parts(packed: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The rectangle ``(N, b // 2, ceil(b / 2) - 1)`` and the corner ``(N, ceil(b / 2), b // 2)``, as views."""
    big, small, count = b - b // 2, b // 2, len(packed)
    split = small * (big - 1)
    return packed[:, :split].view(count, small, big - 1), packed[:, split:].view(count, big, small)


@functools.lru_cache(maxsize=256)
def _lower_bits(rows: int, columns: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All bits set on and below the ``offset``-th diagonal."""
    return -torch.ones(rows, columns, dtype=dtype, device=device).tril(offset)


def _put_lower(out: Tensor, lower: Tensor, offset: int) -> None:
    """Overwrite ``out`` on and below the ``offset``-th diagonal (0 or -1); ``lower`` has its dtype.

    ``torch.where`` takes four times as long on CPUs as the three operations on bits.
    """
    rows, columns = out.shape[-2:]
    bits = _BITS[out.element_size()]
    for start in range(0, rows, _TILE):
        stop = min(start + _TILE, rows)
        end = min(stop, columns)
        if start:
            out[:, start:stop, :start] = lower[:, start:stop, :start]
        tile, new = (x[:, start:stop, start:end].view(bits) for x in (out, lower))
        mask = _lower_bits(stop - start, end - start, offset, bits, out.device)
        tile.copy_((tile ^ new).bitwise_and_(mask).bitwise_xor_(tile))


def fold(S: Tensor, out: Tensor | None = None, workspace: Workspace | None = None) -> Tensor:
    """``S`` of shape ``(N, b, b)`` as ``(N, b (b - 1) / 2)``; only half of its entries are read.

    Args:
        S: Skew, or symmetric with a diagonal that is not wanted.
        out: Where it goes; its dtype may be wider.
        workspace: Scratch memory.
    """
    b = S.shape[-1]
    big, small = b - b // 2, b // 2
    packed = S.new_empty(len(S), packed_size(b)) if out is None else out
    joined = (workspace or Workspace()).get("fold", (len(S), small, big - 1), S.dtype, S.device)
    joined.copy_(S[:, :small, 1:big])
    return fold_blocks(joined, S[:, :big, big:], S[:, big:, big:], packed)


def fold_blocks(rectangle: Tensor, corner: Tensor, second: Tensor, packed: Tensor) -> Tensor:
    """The blocks of a matrix into ``packed``; ``rectangle`` is the kept part of ``S_11``, and is overwritten."""
    _put_lower(rectangle, second, -1)
    for target, block in zip(folded_parts(packed, sum(corner.shape[1:])), (rectangle, corner), strict=True):
        target.copy_(block)
    return packed


def unfold(
    packed: Tensor, b: int, out: Tensor | None = None, workspace: Workspace | None = None, *, sign: int = -1
) -> Tensor:
    """The whole matrices ``(N, b, b)`` of folded ones: skew, or symmetric without diagonal for ``sign=1``.

    Args:
        packed: ``(N, b (b - 1) / 2)``.
        b: Their size.
        out: Where they go; its dtype may be narrower.
        workspace: Scratch memory.
        sign: Of the mirrored half.
    """
    big = b - b // 2
    full = packed.new_empty(len(packed), b, b) if out is None else out
    scratch = workspace or Workspace()
    rectangle, corner = folded_parts(packed, b)
    straight, turned = _with_transpose(corner, full.dtype, scratch, sign)
    full[:, :big, big:] = straight
    full[:, big:, :big] = turned
    unfold_triangles(rectangle, full[:, :big, :big], full[:, big:, big:], scratch, sign=sign)
    return full


def unfold_triangles(rectangle: Tensor, first: Tensor, second: Tensor, workspace: Workspace, *, sign: int = -1) -> None:
    """``S_11`` and ``S_22`` whole, from the rectangle that holds a triangle of each."""
    big, small = first.shape[-1], second.shape[-1]
    straight, turned = _with_transpose(rectangle, first.dtype, workspace, sign)
    # The triangle of S_11 lies one column to the left in the rectangle, so its mirror image lies one row up.
    k = min(big - 1, small)
    first[:, :-1, 1:] = straight[:, : big - 1]
    _put_lower(first[:, 1:, :-1], turned[:, :, : big - 1], 0)
    second[:, :k] = turned[:, :k]
    _put_lower(second[:, :, :k], straight[:, :, :k], -1)
    for block in (first, second):
        block.diagonal(dim1=-2, dim2=-1).zero_()


def _with_transpose(X: Tensor, dtype: torch.dtype, workspace: Workspace, sign: int) -> tuple[Tensor, Tensor]:
    """``X`` and ``sign X^T`` in a dtype, both contiguous."""
    count, rows, columns = X.shape
    straight = workspace.get("straight", (count, rows, columns), dtype, X.device).copy_(X)
    turned = workspace.get("turned", (count, columns, rows), dtype, X.device)
    transposed(straight, turned)
    return straight, turned.neg_() if sign < 0 else turned


def skew_product(
    P: Tensor,
    Q: Tensor,
    out: Tensor,
    workspace: Workspace,
    *,
    turn: bool,
    right: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``P Q^T - Q P^T`` folded into ``out`` ``(N, b (b - 1) / 2)``.

    Args:
        P: ``(N, b, k)``, in the dtype of the products.
        Q: As ``P``.
        out: Where the result goes, usually wider than the products.
        workspace: Scratch memory.
        turn: Whether to transpose the first product instead of making a second one.
        right: ``P^T`` and ``Q^T`` where they lie in memory as such; default views of ``P`` and ``Q``.
    """
    P_t, Q_t = (P.mT, Q.mT) if right is None else right
    S = workspace.get("skew", (len(P), P.shape[1], P.shape[1]), P.dtype, P.device)
    torch.bmm(P, Q_t, out=S)
    return fold(less_transposed(S, workspace) if turn else S.baddbmm_(Q, P_t, alpha=-1), out, workspace)


def less_transposed(S: Tensor, workspace: Workspace) -> Tensor:
    """``S - S^T`` of every matrix of a batch, in its place."""
    return S.sub_(transposed(S, workspace.get("skew turned", tuple(S.shape), S.dtype, S.device)))


def transposed(X: Tensor, out: Tensor) -> Tensor:
    """``X^T`` of every matrix of a batch, in ``out``."""
    if len(X) == 1 or (X.device.type == "cpu" and X.shape[-1] >= _EACH):
        for target, matrix in zip(out, X, strict=True):
            target.copy_(matrix.mT)  # the shape that torch transposes block by block
    else:
        out.copy_(X.mT)
    return out
