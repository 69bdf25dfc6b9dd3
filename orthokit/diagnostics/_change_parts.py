"""Arithmetic of weight changes on pairs of float64 matrices: factors, best rotations, blocks, rounding noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orthokit.diagnostics.profiles import ThinSVD
from orthokit.linalg import singular_values
from orthokit.linalg.block_diagonal import block_sizes

__all__ = [
    "LARGEST_BLOCK",
    "Turn",
    "block_residual",
    "block_size",
    "change_values",
    "factor",
    "fit_rows",
    "free_block_share",
    "free_rotation_share",
    "rounding_errors",
    "row_scaled_rank",
    "turn",
]

LARGEST_BLOCK = 256

# Singular values below this share of the largest lose digits in a float64 Gram matrix (their squares reach 1e-10).
_GRAM = 1e-5
# Below this share of the energy the closed form of the residual has lost too many of its 15 digits.
_NEAR = 1e-9


class Turn(NamedTuple):
    """The best right rotation ``R`` of ``W0`` onto ``W``.

    Args:
        residual: ``||W0 R - W||_F``.
        chord: ``||W0 R - W0||_F``.
    """

    residual: float
    chord: float


def factor(W: Tensor, *, exact: bool = False, top: int | None = None) -> ThinSVD:
    """Thin SVD in float64 from the eigenvectors of the smaller Gram matrix, or of ``W`` itself where that is too rough.

    For float32 data the Gram matrix in float64 is at least as exact as a float32 SVD, for half of its time. Of the
    longer side only the first ``top`` vectors may be asked for; they cost a product.
    """
    wide = W.shape[0] <= W.shape[1]
    if not exact:
        values, vectors = torch.linalg.eigh(W @ W.mT if wide else W.mT @ W)
        S = values.clamp(min=0).sqrt().flip(0)
        if bool(S[-1] > _GRAM * S[0]):
            vectors = vectors.flip(1)
            other = (W.mT if wide else W) @ vectors[:, :top] / S[:top]
            return ThinSVD(vectors, S, other.mT) if wide else ThinSVD(other, S, vectors.mT)
    if not wide:
        return ThinSVD(*torch.linalg.svd(W, full_matrices=False))
    V, S, Uh = torch.linalg.svd(W.mT, full_matrices=False)
    return ThinSVD(Uh.mT, S, V.mT)


def change_values(D: Tensor, *, exact: bool = False) -> Tensor:
    """All singular values of the change, descending; values below 1e-8 of the largest are rough unless ``exact``."""
    return singular_values(D, method="svd" if exact else "gram64")


def turn(W0: Tensor, W: Tensor, base: ThinSVD, tuned: ThinSVD) -> Turn:
    """The orthogonal Procrustes problem on the smaller side: ``W0 R`` is determined even where ``R`` is not.

    A wide matrix shrinks to its square factor ``U S``: only what acts on its row space counts. ``tuned`` may hold
    fewer vectors of the longer side than of the other.
    """
    before, after = base.S.square().sum(), tuned.S.square().sum()
    if W0.shape[0] < W0.shape[1]:
        A0, A = base.U * base.S, tuned.U * tuned.S
        if len(tuned.Vh) == len(tuned.S):
            overlap = base.Vh @ tuned.Vh.mT
        else:
            overlap = base.U.mT @ (W0 @ W.mT) @ tuned.U / base.S[:, None] / tuned.S
        target = base.S.square()[:, None] * overlap
    else:
        A0, A = W0, W
        target = (base.Vh.mT * base.S.square()) @ base.Vh
    P, values, Qh = torch.linalg.svd(A0.mT @ A)
    R = P @ Qh
    square = before + after - 2 * values.sum()
    if bool(square < _NEAR * (before + after)):
        square = (A0 @ R - A).square().sum()
    along = (R * target).sum()
    return Turn(float(square.clamp(min=0).sqrt()), float((2 * (before - along)).clamp(min=0).sqrt()))


def free_rotation_share(out: int, width: int, rank: int) -> float:
    """Share of a small isotropic random change that the best right rotation of a matrix of that rank removes.

    To first order a rotation changes ``W0`` by ``W0 A`` with skew ``A``: in the singular frame one free number for each
    of ``rank (rank - 1) / 2`` pairs of directions, and one for each pair of a direction and one ``W0`` does not use.
    """
    return (rank * (rank - 1) / 2 + rank * (width - rank)) / (out * width)


def free_block_share(out: int, width: int, b: int) -> float:
    """Same for a rotation in blocks of ``b`` columns, each of full rank."""
    sizes = block_sizes(width, b)
    return sum(free_rotation_share(out, size, min(out, size)) * size for size in sizes) / width


def block_size(W0: Tensor, W: Tensor, limit: Callable[[int], float]) -> int | None:
    """The smallest ``b`` whose block-diagonal right rotation leaves at most ``limit(b)``; ``None`` if there is none.

    At most half of the columns: one block and a remainder is a full rotation that fits the noise.

    A rotation within a block keeps the norm of the block and of each of its rows. The differences of these norms bound
    the residual from below, so that nearly every wrong size is refused without a decomposition.
    """
    rows0, rows = W0.square(), W.square()
    columns0, columns = rows0.sum(0).cumsum_(0), rows.sum(0).cumsum_(0)
    rows0.cumsum_(1)
    rows.cumsum_(1)
    width = W0.shape[1]
    for b in range(2, min(LARGEST_BLOCK, width // 2) + 1):
        ends = torch.tensor(block_sizes(width, b), device=W.device).cumsum(0) - 1
        bounds = (_norm_gap(a0, a, ends) for a0, a in ((columns0, columns), (rows0, rows)))
        if all(bound <= limit(b) for bound in bounds) and block_residual(W0, W, b) <= limit(b):
            return b
    return None


def _norm_gap(sums0: Tensor, sums: Tensor, ends: Tensor) -> float:
    norms0, norms = (
        torch.diff(part[..., ends], prepend=torch.zeros_like(part[..., :1])).clamp(min=0).sqrt()
        for part in (sums0, sums)
    )
    return float(torch.linalg.vector_norm(norms0 - norms))


def block_residual(W0: Tensor, W: Tensor, b: int) -> float:
    """``min ||W0 diag(R_1, ..., R_k) - W||_F`` over rotations of ``b`` columns each, the last of what is left."""
    out, width = W0.shape
    full = width // b * b
    square = W.new_zeros(())
    for start, size, end in ((0, b, full), (full, width - full, width)):
        if end > start:
            A0, A = (part[:, start:end].reshape(out, -1, size).transpose(0, 1) for part in (W0, W))
            U, _, Vh = torch.linalg.svd(A0.mT @ A)
            square = square + (A0 @ (U @ Vh) - A).square().sum()
    return float(square.sqrt())


def fit_rows(W0: Tensor, W: Tensor) -> Tensor:
    """Factors ``d`` of the rows, shape ``(out, 1)``, that bring ``d W0`` closest to ``W``; 1 for a row of zeros."""
    energy = W0.square().sum(1, keepdim=True)
    return torch.where(energy > 0, (W0 * W).sum(1, keepdim=True) / torch.where(energy > 0, energy, 1.0), 1.0)


def row_scaled_rank(W0: Tensor, W: Tensor, *, limit: float, most: int) -> int | None:
    """The smallest rank, at most ``most``, of ``L`` in ``W = D W0 + L`` with diagonal ``D``; ``None`` if none will do.

    With rank to spare ``D`` is free in as many rows, and the search slow: it begins with small ranks, and where one is
    too slow, the true directions stand out among those found, and as many as lie before the widest gap are tried. A
    direction far weaker than what the scaling changes can be missed: then there is no answer, and not a wrong one.
    """
    low, rank = 0, 1
    while True:
        done, S = _reach(W0, W, limit, rank)
        if done:
            break
        apart = int((S[:-1] / S[1:]).argmax()) + 1 if rank > 1 else rank
        if low < apart < rank and _reach(W0, W, limit, apart)[0]:
            rank = apart
            break
        if rank >= most:
            return None
        low, rank = rank, min(2 * rank, most)
    while rank - low > 1:
        middle = (low + rank) // 2
        low, rank = (low, middle) if _reach(W0, W, limit, middle)[0] else (middle, rank)
    return rank


def _reach(W0: Tensor, W: Tensor, limit: float, rank: int) -> tuple[bool, Tensor]:
    """Whether alternating projections bring what is beside ``D W0`` and a matrix of that rank down to ``limit``.

    The two sets meet at a wide angle as long as the rank is small against both sides, so that the distance shrinks by a
    factor a round; with too small a rank it soon stands still. Besides, the singular values of the matrix at the end.
    """
    L, last = torch.zeros_like(W), math.inf
    for _ in range(60):
        U, S, Vh = factor(W - fit_rows(W0, W - L) * W0, top=rank)
        left = float(torch.linalg.vector_norm(S[rank:]))
        if left <= limit or left > 0.95 * last:
            return left <= limit, S[:rank]
        L, last = (U[:, :rank] * S[:rank]) @ Vh[:rank], left
    return False, S[:rank]


def rounding_errors(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Rms rounding error of each entry as stored in ``dtype``: the spacing around it over the root of 12."""
    info = torch.finfo(dtype)
    # The power of two below |w| is w without sign and mantissa bits.
    if W.dtype == torch.float64:
        power = (W.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    else:
        power = (W.view(torch.int32) & 0x7F80_0000).view(torch.float32)
    return power.mul_(info.eps).clamp_(min=info.tiny * info.eps).div_(math.sqrt(12))
