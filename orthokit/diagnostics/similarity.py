r"""Measures of two sets of activations of the same tokens, one number each.

:func:`~orthokit.diagnostics.activation_geometry` takes all of them at once and shares the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics import _geometry as kernels
from orthokit.errors import OptionError

__all__ = [
    "Pointwise",
    "gram_distortion",
    "linear_cka",
    "pointwise",
    "procrustes_residual",
    "raw_distance",
    "subspace_distance",
]


@dataclass(frozen=True)
class Pointwise:
    """Token by token, without any alignment: means over the tokens whose activations are nonzero in both models.

    Args:
        cosine: Mean cosine between the two activations of a token.
        angle: Mean angle between them, radians.
        log_norm_ratio: Mean absolute logarithm of the ratio of their norms.
        tokens: How many tokens that is; with none the means are NaN.
    """

    cosine: float
    angle: float
    log_norm_ratio: float
    tokens: int


def procrustes_residual(
    X0: Float[Tensor, "tokens width"],
    X1: Float[Tensor, "tokens width"],
    *,
    centre: bool = True,
    reduce: int | None = None,
    few: Literal["refuse", "flag"] = "refuse",
) -> Float[Tensor, ""]:
    r"""The part of the change that no rotation of the finetuned activations explains.

    .. math:: d_{proc} = \min_{R^\top R = I} \|X_1 R - X_0\|_F \,/\, (\|X_0\|_F + \epsilon)

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same tokens in the same rows, same shape.
        centre: Subtract column means first (default).
        reduce: Compare the best rank-``k`` approximations of both, ``1 <= k <= min(N, d)``: enough tokens are then
            ``4 k``. Each is projected on its own principal components, so that a rotation still leaves 0.
        few: With fewer than ``4 d`` tokens (``4 k`` with ``reduce=k``) a rotation fits noise and the residual is too
            small: ``"refuse"`` (default) raises; ``"flag"`` computes it, and it is the caller who says so.
            :func:`activation_geometry` says so in its result.

    Returns:
        Scalar ``>= 0``: 0 for a rotation (or reflection), ``|c - 1|`` for ``X1 = c X0`` since no scale is removed; at
        most :func:`raw_distance`. float64 for float64 input, else float32.

    Raises:
        ShapeError: Different numbers of tokens or widths, fewer than two tokens, or too few for ``few="refuse"``.
        OptionError: ``reduce`` out of range.
        UnknownNameError: Unknown ``few``.
        DtypeError: Not real floating.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> abs(procrustes_residual(X, 2 * X).item() - 1) < 1e-11
        True

    Numerics:
        float64 throughout. The square is ``||X0||^2 + ||X1||^2 - 2 ||X1^T X0||_*``: one product and the singular values
        of a ``d`` by ``d`` matrix. That difference stops at 1e-8, so residuals below about 1e-2 are taken of
        ``X1 R - X0`` itself, with ``R`` from the SVD: for a rotation, epsilon times the square of the condition number
        of ``X0`` remains, 1e-15 to at most 1e-8. Neither form needs ``X1^T X0`` to have full rank, and with ``N < d``
        both work on ``N`` by ``N`` matrices.

    References:
        P. Schonemann (1966), A generalized solution of the orthogonal Procrustes problem; Z. Huang et al., PEFT-Arena,
        arXiv 2605.28819 (one-sided, no scaling). Differences: the guard for few tokens.
    """
    A0, A1 = kernels.pair(X0, X1, centre=centre)
    kernels.enough_tokens(*A0.shape, reduce=reduce, few=few)
    if reduce is None:
        C0, C1 = kernels.compress(A0), kernels.compress(A1)
    else:
        C0, C1 = (A @ kernels.top_directions(A, reduce)[0] for A in (A0, A1))
    return kernels.as_input(kernels.procrustes(C0, C1) / (torch.linalg.matrix_norm(C0) + kernels.EPS), X0, X1)


def raw_distance(
    X0: Float[Tensor, "tokens width"], X1: Float[Tensor, "tokens width"], *, centre: bool = True
) -> Float[Tensor, ""]:
    r"""How far activations moved, with nothing aligned.

    .. math:: d_{raw} = \|X_1 - X_0\|_F \,/\, (\|X_0\|_F + \epsilon)

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same shape.
        centre: Subtract column means first (default).

    Returns:
        Scalar ``>= 0``; float64 for float64 input, else float32.

    Raises:
        ShapeError, DtypeError, NonFiniteError: As :func:`procrustes_residual`.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> raw_distance(X, 3 * X).item()
        2.0

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819.
    """
    A0, A1 = kernels.pair(X0, X1, centre=centre)
    return kernels.as_input(torch.linalg.matrix_norm(A1 - A0) / (torch.linalg.matrix_norm(A0) + kernels.EPS), X0, X1)


def gram_distortion(
    X0: Float[Tensor, "tokens width"], X1: Float[Tensor, "tokens width"], *, rows: int | None = 1024, seed: int = 0
) -> Float[Tensor, ""]:
    r"""How much the cosines between tokens changed: the geometry as the tokens see each other.

    .. math:: d_{gram} = \|Z_1 Z_1^\top - Z_0 Z_0^\top\|_F \,/\, (\|Z_0 Z_0^\top\|_F + \epsilon)

    with rows of ``Z`` the rows of ``X`` scaled to length 1, not centred.

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same shape.
        rows: Compare at most so many rows, ``>= 2``; default 1024, as published; ``None`` for all.
        seed: Of the draw of those rows, which is the same for both and for every layer of ``N`` tokens.

    Returns:
        Scalar ``>= 0``, 0 for a rotation and for any rescaling of tokens; float64 for float64 input, else float32.

    Raises:
        OptionError: ``rows`` below 2.
        ShapeError, DtypeError, NonFiniteError: As :func:`procrustes_residual`.

    Example:
        >>> X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> gram_distortion(X, -5 * X.roll(1, dims=1)).item() < 1e-6
        True

    Numerics:
        float64. More than ``2 d`` rows are first written in an orthonormal basis of all columns of ``Z0`` and ``Z1``
        (a QR of ``N`` by ``2 d``), which keeps both Gram matrices and their difference: nothing larger than ``2 d`` by
        ``2 d`` is formed for any number of rows, and a rotation gives 1e-15. The expansion
        ``||Z1^T Z1||^2 + ||Z0^T Z0||^2 - 2 ||Z1^T Z0||^2`` would be cheaper and stop at 1e-8. A zero row stays zero.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819.
    """
    A0, A1 = kernels.pair(X0, X1)
    return kernels.as_input(kernels.sampled_gram(A0, A1, rows, seed), X0, X1)


def linear_cka(
    X0: Float[Tensor, "tokens width"], X1: Float[Tensor, "tokens width"], *, centre: bool = True
) -> Float[Tensor, ""]:
    r"""Similarity of two sets of activations, up to rotation and one scale; 1 is the same.

    .. math:: \mathrm{CKA} = \|X_0^\top X_1\|_F^2 \,/\, (\|X_0^\top X_0\|_F \, \|X_1^\top X_1\|_F)

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same shape.
        centre: Subtract column means first (default, and the definition).

    Returns:
        Scalar in [0, 1]; NaN if either is constant over the tokens. float64 for float64 input, else float32.

    Raises:
        ShapeError, DtypeError, NonFiniteError: As :func:`procrustes_residual`.

    Example:
        >>> X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> abs(linear_cka(X, 7 * X.flip(1)).item() - 1) < 1e-6
        True

    Numerics:
        float64; with ``N < d`` on ``N`` by ``N`` matrices. Biased upwards there: even unrelated activations look alike.

    References:
        S. Kornblith et al., Similarity of Neural Network Representations Revisited, arXiv 1905.00414, section 3.
    """
    C0, C1 = (kernels.compress(A) for A in kernels.pair(X0, X1, centre=centre))
    return kernels.as_input(kernels.cka(C1.mT @ C0, C0.mT @ C0, C1.mT @ C1), X0, X1)


def subspace_distance(
    X0: Float[Tensor, "tokens width"], X1: Float[Tensor, "tokens width"], *, rank: int, centre: bool = True
) -> Float[Tensor, ""]:
    r"""How far apart the leading principal directions of both are, as subspaces.

    .. math:: \|P_0 - P_1\|_F / \sqrt{2k} = \Big(\tfrac1k \textstyle\sum_i \sin^2\theta_i\Big)^{1/2}

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same shape.
        rank: ``k``, number of directions, ``1 <= k <= min(N, d)``; published 32 and 64.
        centre: Subtract column means first (default).

    Returns:
        Scalar in [0, 1]; float64 for float64 input, else float32. Not invariant to rotation: this sees it.

    Raises:
        OptionError: ``rank`` out of range, or more than the directions that the activations have.
        ShapeError, DtypeError, NonFiniteError: As :func:`procrustes_residual`.

    Example:
        >>> X = torch.diag(torch.tensor([4.0, 3.0, 0.1, 0.1]))
        >>> round(subspace_distance(X, X.flip(1), rank=2, centre=False).item(), 6)
        1.0

    Numerics:
        Principal directions as eigenvectors of ``X^T X`` (``X X^T`` where that is smaller) in float64; the distance
        from what of one basis lies outside of the other, so small ones do not cancel. Directions are arbitrary where
        ``k`` cuts through equal variances.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819; A. Bjorck, G. Golub (1973) for the angles.
    """
    A0, A1 = kernels.pair(X0, X1, centre=centre)
    kernels.check_range("rank", rank, min(A0.shape))
    (V0, has0), (V1, has1) = kernels.top_directions(A0, rank), kernels.top_directions(A1, rank)
    if rank > min(has0, has1):
        raise OptionError(
            f"rank must be at most the {min(has0, has1)} directions that the activations have; got {rank}. "
            "Beyond them the subspace is arbitrary."
        )
    return kernels.as_input(kernels.unaligned(V0, V1), X0, X1)


def pointwise(X0: Float[Tensor, "tokens width"], X1: Float[Tensor, "tokens width"]) -> Pointwise:
    r"""How each token's activation turned and grew, on average and with nothing aligned or centred.

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same shape.

    Returns:
        :class:`Pointwise`.

    Raises:
        ShapeError, DtypeError, NonFiniteError: As :func:`procrustes_residual`.

    Example:
        >>> import math
        >>> found = pointwise(torch.eye(2), 2 * torch.eye(2).flip(0))
        >>> found.cosine, round(found.angle / math.pi, 6), round(math.exp(found.log_norm_ratio), 6)
        (0.0, 0.5, 2.0)

    Numerics:
        float64. Angles are ``2 atan2(||a - b||, ||a + b||)`` of unit vectors, exact to epsilon also where the cosine
        rounds to 1. Tokens that are zero in either model have no direction and are left out of all three means.

    References:
        W. Kahan (2006), How futile are mindless assessments of roundoff, section 12, for the angle.
    """
    A0, A1 = kernels.pair(X0, X1)
    norm0, norm1 = (torch.linalg.vector_norm(A, dim=1, keepdim=True) for A in (A0, A1))
    there = ((norm0 > 0) & (norm1 > 0))[:, 0]
    norm0, norm1 = norm0[there], norm1[there]
    a, b = A0[there] / norm0, A1[there] / norm1
    angles = 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(a + b, dim=1))
    means = ((a * b).sum(1).mean(), angles.mean(), (norm1 / norm0).log().abs().mean())
    return Pointwise(*(mean.item() for mean in means), tokens=len(a))
