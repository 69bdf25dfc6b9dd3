"""Which family of finetuning methods a change is consistent with, from what each of them must leave behind."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orthokit.diagnostics._change_parts import (
    block_size,
    factor,
    free_block_share,
    row_scaled_rank,
)
from orthokit.diagnostics.profiles import ThinSVD

__all__ = ["Evidence", "Finding", "find_kind", "numerical_rank"]

# Rounding noise is known by its mean square, so that its norm is known within a few per cent; three times that bounds
# what a method can leave by computing carelessly.
_LEVEL, _NOISE = 3.0, 1.1
# An invariant counts as kept only if the change would break it far more: by the energy that an isotropic random change
# of the same size puts into what the invariant forbids.
_CLEAR, _ALMOST = 0.1, 1e-3
# Chance alone comes below _ALMOST with fewer free numbers than this.
_FREE = 30
_OVERLAP = 0.9
# Energy that blocks may leave beyond what the noise would, as a factor.
_SPARE = 2.0
_LOWER = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What has been measured of one pair, in float64.

    Args:
        W0: Base.
        W: Tuned.
        D: ``W - W0``.
        base: Thin SVD of ``W0``.
        values: Singular values of the change.
        change: Frobenius norm of the change.
        noise: Rms size of rounding in one entry of the change.
        computed: Part of it that is arithmetic, not storage.
        floor: Largest singular value of such rounding.
        residual: Of the best right rotation.
        random: Share of a random change that a right rotation removes.
        spectrum: Norm of the difference of the singular values.
        rank: Numerical rank of the change, ``None`` if full.
    """

    W0: Tensor
    W: Tensor
    D: Tensor
    base: ThinSVD
    values: Tensor
    change: float
    noise: float
    computed: float
    floor: float
    residual: float
    random: float
    spectrum: float
    rank: int | None


@dataclass(frozen=True)
class Finding:
    """Slug, block size and rank of the adapter where the kind has them."""

    kind: str
    block_size: int | None = None
    rank: int | None = None


def numerical_rank(values: Tensor, floor: float, noise: float, shape: tuple[int, int]) -> int | None:
    """Singular values above the floor; ``None`` unless they hold most of the energy, the rest is noise and compact.

    Compact: two factors of that rank are smaller than the matrix.
    """
    out, width = shape
    rank = int((values > floor).sum())
    rest, total = float(values[rank:].square().sum()), float(values.square().sum())
    if rank * (out + width) >= out * width or rest > total / 2 or rest > (_NOISE * noise) ** 2 * out * width:
        return 0 if total == 0 else None
    return rank


def find_kind(seen: Evidence) -> Finding:
    """The most specific kind whose marks are all there."""
    if torch.equal(seen.W0, seen.W):
        return Finding("unchanged")
    out, width = seen.W.shape
    size = out * width
    if float(seen.base.S[0]) == 0:
        return Finding("general")
    small = seen.change <= _NOISE * seen.noise * math.sqrt(size) and float(seen.values[0]) <= seen.floor
    if small or _is_cast(seen.W0, seen.W):
        return Finding("rounded")
    simple, along_rows = _scaling(seen)
    if simple is not None:
        return Finding(simple)
    level = _LEVEL * seen.noise * math.sqrt(size)
    if _explained(seen, seen.residual, level, (1 - seen.random) * size):
        return _rotation(seen, level)
    # Rounding moves each singular value by about the noise of one entry, and all of them by its square.
    moved = _LEVEL * seen.noise * math.sqrt(min(out, width)) + size * seen.noise**2 / float(seen.base.S.norm())
    if _explained(seen, seen.spectrum, moved, min(out, width)):
        return Finding("orthogonal_both")
    if seen.rank:
        return _low_rank(seen)
    return _scaled_low_rank(seen, along_rows) or Finding("general")


def _explained(seen: Evidence, left: float, level: float, free: float) -> bool:
    """Whether ``left`` is noise, and far below what a random change has among ``free`` forbidden numbers."""
    random = free / seen.W.numel() * seen.change**2
    if left <= level and left**2 <= _CLEAR * random:
        return True
    return free >= _FREE and left**2 <= _ALMOST * random


def _is_cast(W0: Tensor, W: Tensor) -> bool:
    """Whether one of the two is the other in a shorter format; what all rounds to 0 proves nothing."""
    if not (W0.any() and W.any()):
        return False
    # One row tells nearly always.
    return any(
        torch.equal(b[:1].to(dtype).to(b), a[:1]) and torch.equal(b.to(dtype).to(b), a)
        for dtype in _LOWER
        for a, b in ((W, W0), (W0, W))
    )


def _scaling(seen: Evidence) -> tuple[str | None, float]:
    """One factor for all entries, one a row or one a column, if that explains the change; and the energy of the rows'.

    The energy that the best factors take off follows from inner products alone; what they leave is formed only then.
    """
    out, width = seen.W.shape
    level = _LEVEL * seen.noise * math.sqrt(out * width)
    rows, columns = [], []
    for part in (seen.D, seen.W0):
        product = part * seen.W0
        rows.append(product.sum(1, keepdim=True))
        columns.append(product.sum(0, keepdim=True))
    whole = [part.sum(0, keepdim=True) for part in rows]
    along_rows = 0.0
    for kind, (inner, energy), used in (("scaled", whole, 1), ("rows", rows, out), ("columns", columns, width)):
        factors = torch.where(energy > 0, inner / torch.where(energy > 0, energy, 1.0), 0.0)
        taken = float((factors * inner).sum())
        if kind == "rows":
            along_rows = taken
        if taken < seen.change**2 / 2:
            continue
        left = float(torch.linalg.matrix_norm(seen.D - factors * seen.W0))
        if _explained(seen, left, level, out * width - used):
            return kind, along_rows
    return None, along_rows


def _rotation(seen: Evidence, level: float) -> Finding:
    out, width = seen.W.shape
    most = max(level, math.sqrt(_ALMOST * (1 - seen.random)) * seen.change)
    computed = _LEVEL * seen.computed * math.sqrt(out * width)

    def allowed(b: int) -> float:
        # Fewer angles fit less of the noise: by so much, and not more, blocks may leave more than the full rotation.
        fitted = (1 - free_block_share(out, width, b)) / max(1 - seen.random, 1 / (out * width))
        return min(most, max(computed, math.sqrt(_SPARE * fitted) * seen.residual))

    b = block_size(seen.W0, seen.W, allowed)
    if b is not None:
        return Finding("oft", block_size=b)
    if seen.rank and seen.rank <= width / 8:
        return Finding("hra", rank=seen.rank)
    return Finding("orthogonal_in")


def _low_rank(seen: Evidence) -> Finding:
    """PiSSA trains the leading directions of the base themselves: they lie in the range of its change, on both sides.

    The difference of two factorisations of rank ``r`` has rank ``2 r``.
    """
    rank = seen.rank or 0
    half = (rank + 1) // 2
    top_left, top_right = seen.base.U[:, :half], seen.base.Vh[:half].mT
    # Nothing of such a change lies beside both: two thin products spare any other change the decomposition.
    beside = seen.D - top_left @ (top_left.mT @ seen.D)
    if float((beside - (beside @ top_right) @ top_right.mT).square().sum()) < seen.change**2 / 2:
        U, _, Vh = factor(seen.D, top=rank)
        overlaps = (top_left.mT @ U[:, :rank], Vh[:rank] @ top_right)
        if all(float(part.square().sum()) > _OVERLAP * half for part in overlaps):
            return Finding("pissa", rank=half)
    return Finding("lora", rank=rank)


def _scaled_low_rank(seen: Evidence, along_rows: float) -> Finding | None:
    out, width = seen.W.shape
    most = min(out, width) // 8
    tail = float(seen.values[most:].square().sum())
    # What is not of low rank in the change would have to be the scaling of rows: mostly it plainly is not.
    if most < 1 or along_rows < tail / 2:
        return None
    limit = _LEVEL * seen.noise * math.sqrt(out * width)
    rank = row_scaled_rank(seen.W0, seen.W, limit=limit, most=most)
    return None if rank is None else Finding("dora", rank=rank)
