"""The mean of matrices in which each counts by a quadratic form of its own: RegMean and WUDI are both one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gram_mean"]


def gram_mean(matrices: Sequence[Tensor], grams: Sequence[Tensor], factors: Sequence[float], ridge: float) -> Tensor:
    r"""``argmin_X sum_i w_i tr((X - A_i) (G_i + r I) (X - A_i)^T)``, in float64.

    Args:
        matrices: ``A_i``, shape ``(..., out, in)``.
        grams: ``G_i``, symmetric and positive semidefinite, shape ``(..., in, in)``.
        factors: ``w_i >= 0``, one of them greater.
        ridge: ``r`` relative to the mean diagonal of ``sum_i w_i G_i / sum_i w_i``. Where no ``G_i`` says anything, the
            answer is the weighted mean; it is also where all ``G_i`` are equal.
    """
    total = sum(factors)
    gram = torch.zeros_like(grams[0], dtype=torch.float64)
    for matrix, factor in zip(grams, factors, strict=True):
        gram.add_(matrix, alpha=factor / total)
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    # An input that is zero throughout leaves nothing to be relative to: any ridge then gives the mean.
    pull = torch.where(level > 0, ridge * level, 1.0)[..., None, None]
    target = torch.zeros_like(matrices[0], dtype=torch.float64)
    for matrix, own, factor in zip(matrices, grams, factors, strict=True):
        wide = matrix.double()
        target.add_(wide @ own.double() + pull * wide, alpha=factor / total)
    gram.diagonal(dim1=-2, dim2=-1).add_(pull[..., 0])
    # Symmetric to rounding; the factorisation reads one triangle.
    root, failed = torch.linalg.cholesky_ex(gram)
    if bool(failed.any()):
        # Singular beyond the ridge: the shortest of the solutions.
        return target @ torch.linalg.pinv(gram, hermitian=True)
    return torch.cholesky_solve(target.mT, root).mT
