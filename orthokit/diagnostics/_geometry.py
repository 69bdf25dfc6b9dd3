"""Arithmetic of activation geometry on checked float64 matrices ``(tokens, width)``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compress", "cka", "gram", "procrustes", "top_directions", "unaligned"]

# Below this share of the energies the closed form of the Procrustes residual has lost four digits of its square.
_NEAR = 1e-4


def compress(X: Tensor) -> Tensor:
    """Fewer columns with the same inner products between rows: ``X`` itself, or ``(tokens, tokens)`` if it is wide."""
    return X if X.shape[0] >= X.shape[1] else torch.linalg.qr(X.mT, mode="r").R.mT


def procrustes(X0: Tensor, X1: Tensor, cross: Tensor | None = None) -> Tensor:
    """``min ||X1 R - X0||_F`` over orthogonal ``R``; ``cross`` is ``X1^T X0`` if it is there already.

    The closed form needs no ``R`` and no singular vectors, but is a difference of energies: near 0 it would stop at
    the root of epsilon. There the rotation is formed and the residual taken of the difference itself, which is right
    to epsilon. A rank-deficient cross product leaves ``R`` undetermined, but neither form of the residual.
    """
    cross = X1.mT @ X0 if cross is None else cross
    energy = X0.square().sum() + X1.square().sum()
    square = energy - 2 * torch.linalg.svdvals(cross).sum()
    if bool(square > _NEAR * energy):
        return square.sqrt()
    U, _, Vh = torch.linalg.svd(cross)
    return torch.linalg.matrix_norm(X1 @ (U @ Vh) - X0)


def gram(Z0: Tensor, Z1: Tensor) -> tuple[Tensor, Tensor]:
    """``||Z1 Z1^T - Z0 Z0^T||_F`` and ``||Z0 Z0^T||_F`` from matrices of at most ``2 width`` rows.

    Expanding the square into products of ``Z^T Z`` cancels for every rotation. An orthonormal basis ``Q`` of all
    columns together does not: ``Z = Q T`` turns both Gram matrices into small ``T T^T``, subtracted entry by entry.
    """
    width = Z0.shape[1]
    if Z0.shape[0] > 2 * width:
        both = torch.linalg.qr(torch.cat([Z0, Z1], dim=1), mode="r").R
        Z0, Z1 = both[:, :width], both[:, width:]
    before = Z0 @ Z0.mT
    return torch.linalg.matrix_norm(Z1 @ Z1.mT - before), torch.linalg.matrix_norm(before)


def cka(cross: Tensor, own0: Tensor, own1: Tensor) -> Tensor:
    """Linear CKA of ``X1^T X0``, ``X0^T X0`` and ``X1^T X1``; NaN where one of them is zero."""
    return cross.square().sum() / (torch.linalg.matrix_norm(own0) * torch.linalg.matrix_norm(own1))


def top_directions(X: Tensor, rank: int, own: Tensor | None = None) -> tuple[Tensor, bool]:
    """Orthonormal leading principal directions ``(width, rank)``, and whether ``X`` has that many."""
    tall = X.shape[0] >= X.shape[1]
    own = (X.mT @ X if tall else X @ X.mT) if own is None else own
    values, vectors = torch.linalg.eigh(own)
    leading = vectors[:, -rank:].flip(-1)
    noise = max(X.shape) * torch.finfo(X.dtype).eps * values[-1]
    there = bool(values[-rank] > noise)
    return (leading if tall else torch.linalg.qr(X.mT @ leading).Q), there


def unaligned(V0: Tensor, V1: Tensor) -> Tensor:
    """``||P0 - P1||_F / sqrt(2 rank)`` as the root mean squared sine, from what of ``V1`` lies outside of ``V0``."""
    outside = V1 - V0 @ (V0.mT @ V1)
    return (outside.square().sum() / V0.shape[1]).sqrt().clamp(max=1)
