r"""Sums over all pairs of unit vectors, tile by tile, with their gradient; the engine of the hyperspherical energy.

Only one tile of the Gram matrix exists at any time. The backward pass walks the upper triangle anew, because
recomputing a tile costs less than the memory to keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ANGLE_FLOOR", "NORM_FLOOR", "PairEnergy"]

# Distances and angles are floored here: duplicates stay finite, and float64 still resolves a pair at the floor.
ANGLE_FLOOR = 1e-6
# Rows shorter than this have no direction.
NORM_FLOOR = 1e-12
# Tiles with a squared distance below this are redone in float64. In float32, 2 - 2G has an absolute error of a few
# 1e-7, so what stays in float32 is right to about 3e-5 relative in the worst pair.
_NEAR = 1 / 64
# Elements of a tile when many small matrices are stacked into one.
_GROUP = 2**19


class Tile(NamedTuple):
    """One block of the Gram matrix of a group of matrices: rows ``i``, columns ``j``, ``G = A B^T``."""

    group: slice
    i: slice
    j: slice
    A: Tensor
    B: Tensor
    G: Tensor

    @property
    def diagonal(self) -> bool:
        return self.i == self.j


class PairEnergy(torch.autograd.Function):
    """Per-neuron sums ``e_i = sum over j != i of f(z_ij)`` (and of the mirrored points), shape ``(B, N)``."""

    @staticmethod
    def forward(W: Tensor, norms: Tensor, s: float, mirror: bool, angular: bool, rows: int) -> Tensor:
        energy = torch.zeros(W.shape[:2], dtype=_wide(W), device=W.device)
        for tile in _tiles(W, norms, rows, mirror=mirror, angular=angular):
            f = pair_value(tile.G, s, angular)
            if mirror:
                f += pair_value(-tile.G, s, angular)
            if tile.diagonal:
                f.diagonal(dim1=-2, dim2=-1).zero_()
            else:
                energy[tile.group, tile.j] += f.sum(-2)
            energy[tile.group, tile.i] += f.sum(-1)
        return energy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        W, norms, *ctx.options = inputs
        ctx.save_for_backward(W, norms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        W, norms = ctx.saved_tensors
        s, mirror, angular, rows = ctx.options
        weight = grads[0]
        # Gradients with respect to the unit rows, one accumulator a precision: the float64 one holds near pairs, whose
        # large radial parts must cancel in the projection below, and exists only if there are any.
        sums: dict[torch.dtype, Tensor] = {}
        for tile in _tiles(W, norms, rows, mirror=mirror, angular=angular):
            C = pair_slope(tile.G, s, angular)
            if mirror:
                C -= pair_slope(-tile.G, s, angular)
            C *= (weight[tile.group, tile.i, None] + weight[tile.group, None, tile.j]).to(C.dtype)
            if C.dtype not in sums:
                sums[C.dtype] = torch.zeros(W.shape, dtype=C.dtype, device=W.device)
            total = sums[C.dtype]
            if tile.diagonal:
                C.diagonal(dim1=-2, dim2=-1).zero_()
            else:
                total[tile.group, tile.j] += _matmul(C.mT, tile.A)
            total[tile.group, tile.i] += _matmul(C, tile.B)
        gradient = torch.zeros(W.shape, dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
        for dtype, total in sums.items():
            X = _unit(W, norms, dtype)
            tangent = total - (total * X).sum(-1, keepdim=True) * X
            tangent = tangent / norms.to(dtype).clamp_min(NORM_FLOOR)
            gradient += torch.where(norms >= NORM_FLOOR, tangent, torch.zeros_like(tangent)).to(gradient.dtype)
        return gradient.to(W.dtype), None, None, None, None, None


def pair_value(G: Tensor, s: float, angular: bool) -> Tensor:
    """``f_s`` of the distance (or angle) of pairs with cosines ``G``, floored; a new tensor."""
    if angular:
        z = torch.acos(G.clamp(-1, _top(G)))
        return z.log_().neg_() if s == 0 else z.pow_(-s)
    squared = (2 - 2 * G).clamp_(min=ANGLE_FLOOR**2)
    if s == 0:
        return squared.log_().mul_(-0.5)
    if s == 1:
        return squared.rsqrt_()
    return squared.reciprocal_() if s == 2 else squared.pow_(-s / 2)


def pair_slope(G: Tensor, s: float, angular: bool) -> Tensor:
    """Derivative of :func:`pair_value` with respect to ``G``; 0 for pairs at the floor."""
    factor = 1.0 if s == 0 else s
    if angular:
        top = _top(G)
        cosine = G.clamp(-1, top)
        # The angle has a corner at antipodes, where its slope is infinite along no direction in particular.
        sine = ((1 - cosine) * (1 + cosine)).clamp_(min=ANGLE_FLOOR**2).sqrt_()
        slope = torch.acos(cosine).pow_(-s - 1).mul_(factor).div_(sine)
        at_floor = cosine == top
        return slope.masked_fill_(at_floor, 0)
    squared = 2 - 2 * G
    at_floor = squared <= ANGLE_FLOOR**2
    return squared.clamp_(min=ANGLE_FLOOR**2).pow_(-s / 2 - 1).mul_(factor).masked_fill_(at_floor, 0)


def _top(G: Tensor) -> float:
    """Largest cosine kept apart from 1."""
    return 1 - max(ANGLE_FLOOR**2 / 2, torch.finfo(G.dtype).eps)


def _wide(W: Tensor) -> torch.dtype:
    return torch.float32 if W.device.type == "mps" else torch.float64


def _unit(W: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows of ``W`` in ``dtype``; norms are taken anew when that has more digits than they have."""
    if torch.finfo(norms.dtype).eps > torch.finfo(dtype).eps:
        norms = torch.linalg.vector_norm(W, dim=-1, keepdim=True, dtype=dtype)
    wide = torch.promote_types(dtype, norms.dtype)
    return (W.to(wide) / norms.to(wide).clamp_min(NORM_FLOOR)).to(dtype)


def _matmul(A: Tensor, B: Tensor) -> Tensor:
    # Under autocast a product of cosines would be rounded to bfloat16, which leaves two digits of a distance.
    with torch.autocast(A.device.type, enabled=False):
        return torch.bmm(A, B)


def _tiles(W: Tensor, norms: Tensor, rows: int, *, mirror: bool, angular: bool) -> Iterator[Tile]:
    """The upper triangle of the Gram matrices of ``W`` ``(B, N, d)``; zero on the diagonal."""
    batch, n, _ = W.shape
    wide = _wide(W)
    rows = min(rows, n)
    columns = min(8 * rows, n)
    dtype = torch.promote_types(W.dtype, torch.float32)
    per_group = max(1, _GROUP // (rows * columns))
    for b in range(0, batch, per_group):
        group = slice(b, min(b + per_group, batch))
        Wg, ng = W[group], norms[group]
        X = _unit(Wg, ng, dtype)
        for start in range(0, n, rows):
            i = slice(start, min(start + rows, n))
            ends = [i, *(slice(c, min(c + columns, n)) for c in range(i.stop, n, columns))]
            for j in ends:
                A, B = X[:, i], X[:, j]
                G = _gram(A, B, i == j)
                if dtype != wide and _near(G, both=mirror or angular):
                    A, B = (_unit(Wg[:, k], ng[:, k], wide) for k in (i, j))
                    G = _gram(A, B, i == j)
                yield Tile(group, i, j, A, B, G)


def _gram(A: Tensor, B: Tensor, diagonal: bool) -> Tensor:
    G = _matmul(A, B.mT)
    if diagonal:
        G.diagonal(dim1=-2, dim2=-1).zero_()
    return G


def _near(G: Tensor, *, both: bool) -> bool:
    """Whether a pair of the tile is too close (or, with ``both``, too close to antipodal) for float32."""
    low, high = G.aminmax()
    return bool(2 - 2 * high < _NEAR) or (both and bool(2 + 2 * low < _NEAR))
