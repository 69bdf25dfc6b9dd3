r"""Singular values of a weight, gradient or momentum matrix, and two summaries of how many of them matter."""

from __future__ import annotations

import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from orthokit.errors import OptionError
from orthokit.linalg import singular_values, top_singular_value
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["check_rank", "effective_rank", "entropy_rank", "low_rank_part", "spectrum", "stable_rank"]


def spectrum(W: Num[Tensor, "*batch out in"]) -> Shaped[Tensor, "*batch k"]:
    r"""All singular values of ``W``, largest first.

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.

    Returns:
        Shape ``(..., min(out, in))``, descending; float64 for float64 input, else float32.

    Raises:
        ShapeError: Fewer than two dimensions.
        DtypeError: ``W`` is an integer tensor.
        NonFiniteError: ``W`` holds a NaN or an infinity.

    Example:
        >>> spectrum(torch.tensor([[0.0, 2.0], [-3.0, 0.0]])).tolist()
        [3.0, 2.0]

    Numerics:
        LAPACK singular values, each to a few epsilon of the largest. ``orthokit.linalg.singular_values`` offers the
        faster Gram form for monitors.

    References:
        G. Golub, C. Van Loan (2013), Matrix Computations, section 8.6.
    """
    return singular_values(W)


def stable_rank(W: Num[Tensor, "*batch out in"], *, iterations: int | None = None) -> Shaped[Tensor, "*batch"]:
    r"""How many directions carry the energy of ``W``: a rank that ignores small singular values.

    .. math:: \mathrm{srank}(W) = \|W\|_F^2 / \|W\|_2^2 = \sum_k \sigma_k^2 / \sigma_1^2

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.
        iterations: Default ``None``: exact, by the eigenvalues of the smaller Gram matrix. A number ``>= 1`` uses at
            most so many iterations of :func:`~orthokit.linalg.top_singular_value` instead, about ten times faster on
            large matrices.

    Returns:
        Shape ``(...)``; between 1 and the rank, and 0 for a zero (or empty) matrix by convention.

    Raises:
        ShapeError: Fewer than two dimensions.
        DtypeError: ``W`` is an integer tensor.
        NonFiniteError: ``W`` holds a NaN or an infinity.
        OptionError: ``iterations`` below 1.

    Example:
        >>> stable_rank(torch.eye(7)).item()
        7.0
        >>> stable_rank(torch.zeros(3, 4)).item()
        0.0

    Numerics:
        The largest Gram eigenvalue is right to a few epsilon (only small ones suffer from squaring); entries are scaled
        first, so that squares do not overflow. The iteration finds at most the true norm, hence never a smaller
        stable rank than the true one; 12 are within 1e-3 on any spectrum.

    References:
        M. Rudelson, R. Vershynin, Sampling from large matrices, arXiv math/0503442 ("numerical rank").
    """
    check_matrix(W)
    check_finite(W)
    work = W.to(working_dtype(W))
    if W.numel() == 0:
        return torch.zeros(W.shape[:-2], dtype=work.abs().dtype, device=W.device)
    largest = work.abs().amax(dim=(-2, -1), keepdim=True)
    work = work / torch.where(largest > 0, largest, torch.ones_like(largest))
    if iterations is None:
        gram = work @ work.mH if W.shape[-2] <= W.shape[-1] else work.mH @ work
        top = torch.linalg.eigvalsh(gram)[..., -1]
    else:
        top = top_singular_value(work, iterations=iterations).square()
    energy = work.abs().square().sum(dim=(-2, -1))
    return torch.where(energy > 0, energy / torch.where(energy > 0, top, 1.0), energy)


def effective_rank(W: Num[Tensor, "*batch out in"]) -> Shaped[Tensor, "*batch"]:
    r"""The number of equal singular values that would have the entropy of those of ``W``.

    .. math:: \mathrm{erank}(W) = \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \sigma_k / \textstyle\sum_j \sigma_j

    Args:
        W: Matrix or batch, shape ``(..., out, in)``; features need not be centred, and are not.

    Returns:
        Shape ``(...)``; between 1 and the rank, and 0 for a zero (or empty) matrix by convention.

    Raises:
        ShapeError: Fewer than two dimensions.
        DtypeError: ``W`` is an integer tensor.
        NonFiniteError: ``W`` holds a NaN or an infinity.

    Example:
        >>> round(effective_rank(2 * torch.eye(5)).item(), 5)
        5.0

    Numerics:
        Entropy in float64 of singular values in the dtype of ``W``. Other libraries take ``p`` from squared singular
        values, or add 1e-7 to it (RankMe); those values differ.

    References:
        O. Roy, M. Vetterli (2007), The effective rank: a measure of effective dimensionality, EUSIPCO.
    """
    sigma = singular_values(W)
    return entropy_rank(sigma).to(sigma.dtype)


def entropy_rank(sigma: Tensor) -> Tensor:
    """The effective rank that singular values ``(..., k)`` have, in float64; 0 where all are 0."""
    s = sigma.double()
    total = s.sum(-1, keepdim=True)
    p = s / torch.where(total > 0, total, torch.ones_like(total))
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, 0.0)


def low_rank_part(W: Num[Tensor, "*batch out in"], *, rank: int) -> Num[Tensor, "*batch out in"]:
    r"""The nearest matrix of a given rank: the truncated SVD ``U_r S_r V_r^H``.

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.
        rank: ``1 <= rank <= min(out, in)``.

    Returns:
        Shape and dtype of ``W``.

    Raises:
        OptionError: ``rank`` out of range.
        ShapeError: Fewer than two dimensions.
        NonFiniteError: ``W`` holds a NaN or an infinity.

    Example:
        >>> low_rank_part(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2).diagonal().tolist()
        [3.0, 2.0, 0.0]

    References:
        C. Eckart, G. Young (1936), The approximation of one matrix by another of lower rank.
    """
    check_matrix(W)
    check_finite(W)
    check_rank(rank, W)
    U, S, Vh = torch.linalg.svd(W.to(working_dtype(W)), full_matrices=False)
    return ((U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]).to(W.dtype)


def check_rank(rank: int, W: Tensor) -> None:
    """Raise unless ``1 <= rank <= min(out, in)``."""
    most = min(W.shape[-2:])
    if not 1 <= rank <= most:
        raise OptionError(f"rank must satisfy 1 <= rank <= min(out, in) = {most}; got {rank} for {tuple(W.shape)}.")
