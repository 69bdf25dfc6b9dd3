r"""Bounds on the spectrum of signal plus noise that hold in the worst case, and whether they say anything.

:func:`weyl_bounds` and :func:`wedin_bound` hold for every pair of matrices. :func:`gap_theorem_bounds` holds with a
stated probability for any temporally orthogonal noise; it is loose at the sizes that are usually plotted, where
:mod:`orthokit.diagnostics.randommatrix` is the sharper guide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orthokit.diagnostics._stream import Numbers, positive
from orthokit.diagnostics.momentum import effective_samples, signal_persistence
from orthokit.diagnostics.spectrum import check_rank
from orthokit.errors import OptionError, ShapeError
from orthokit.linalg import singular_values

__all__ = ["GapBounds", "gap_theorem_bounds", "gap_theorem_window", "wedin_bound", "weyl_bounds"]


class GapBounds(NamedTuple):
    """Bounds of the spectral-gap theorem; leading shape is that of ``beta``."""

    head: Float[Tensor, "*betas r"]
    """Lower bounds on ``sigma_1 .. sigma_r`` of the buffer (may be negative)."""
    tail: Float[Tensor, "*betas"]
    """Upper bound ``b`` on ``sigma_{r+1}``."""
    gap: Float[Tensor, "*betas"]
    """Lower bound on ``sigma_r - sigma_{r+1}``."""
    sine: Float[Tensor, "*betas"]
    """Upper bound on the subspace error; infinite where its denominator is not positive."""
    probability: Float[Tensor, "*betas"]
    """All of them hold together with at least this probability."""
    vacuous: Bool[Tensor, "*betas"]
    """True where the theorem says nothing: no positive gap is promised."""
    sine_vacuous: Bool[Tensor, "*betas"]
    """True where the bound on the subspace error is 1 or more."""


def gap_theorem_bounds(
    strengths: Sequence[float | int] | Tensor, eta: float | int, beta: Numbers, *, steps: int | None = None
) -> GapBounds:
    r"""The worst-case guarantee for a momentum buffer under temporally orthogonal noise, and whether it says anything.

    With probability at least ``1 - (2T-1)^{-1/2}``, where ``b = sqrt(eta) (2T-1)^{-1/4}``:

    .. math:: \sigma_k(M) \ge c\,\lambda_k - b \ (k \le r), \qquad \sigma_{r+1}(M) \le b, \qquad
        \|\sin\Theta\|_2 \le b / (c\,\lambda_r - b)

    Args:
        strengths: Singular values of the signal, positive, shape ``(r,)``.
        eta: Bound on ``E ||Xi_t||_F^2``, ``>= 0``: ``sigma^2 m n`` for entries of variance ``sigma^2``.
        beta: Momentum in [0, 1), one or several.
        steps: ``t``, giving ``c = 1 - beta^t``; default ``None``: ``c = 1``.

    Returns:
        A :class:`GapBounds`. Bounds are returned also where ``vacuous``; do not plot them there as if they bound.

    Raises:
        OptionError: A value out of range.

    Example:
        At the published size the theorem promises nothing, though the gap is there:

        >>> bounds = gap_theorem_bounds([12.0, 8.0, 5.0], eta=100 * 100, beta=0.995)
        >>> bool(bounds.vacuous), round(gap_theorem_window(5.0, eta=100 * 100) / 1e6, 1)
        (True, 1.3)

    References:
        Z. Li et al., arXiv 2606.03899, theorem 1 and corollary 1. The page prints ``lambda_k`` in the subspace bound;
        ``lambda_r``, used here, is what the proof by Wedin's theorem gives.
    """
    lam = positive(strengths, "strengths").reshape(-1)
    if not 0 <= eta < math.inf:
        raise OptionError(f"eta must be finite and >= 0; got {eta}.")
    samples = effective_samples(beta)
    share = torch.ones_like(samples) if steps is None else signal_persistence(beta, steps=steps)
    b = math.sqrt(eta) * samples**-0.25
    weakest = share * lam.min()
    sine = torch.where(weakest > b, b / (weakest - b).clamp(min=1e-300), torch.inf)
    gap = weakest - 2 * b
    return GapBounds(
        head=share[..., None] * lam - b[..., None],
        tail=b,
        gap=gap,
        sine=sine,
        probability=1 - samples**-0.5,
        vacuous=gap <= 0,
        sine_vacuous=sine >= 1,
    )


def gap_theorem_window(strength: float | int, *, eta: float | int) -> float:
    r"""The window from which the gap theorem says something: ``(2T-1)^{1/4} > 2 sqrt(eta) / lambda_r``.

    Args:
        strength: ``lambda_r > 0``, the weakest signal strength.
        eta: Bound on ``E ||Xi_t||_F^2``, ``>= 0``.

    Returns:
        The window ``T`` in steps, at least 1.

    Raises:
        OptionError: A value out of range.

    Example:
        >>> gap_theorem_window(4.0, eta=4.0)
        1.0
    """
    lam = float(positive(strength, "strength"))
    if not 0 <= eta < math.inf:
        raise OptionError(f"eta must be finite and >= 0; got {eta}.")
    return max(1.0, ((2 * math.sqrt(eta) / lam) ** 4 + 1) / 2)


def weyl_bounds(
    signal: Float[Tensor, "*#batch m n"], noise: Float[Tensor, "*#batch m n"]
) -> tuple[Float[Tensor, "*result"], Float[Tensor, "*result"]]:
    r"""Certain limits for the singular values of ``signal + noise``: ``sigma_k(signal) -+ ||noise||_2``.

    Args:
        signal: Matrix or batch, shape ``(..., m, n)``.
        noise: Same; leading dimensions broadcast.

    Returns:
        ``(lower, upper)``, each ``(..., min(m, n))``; ``lower`` is cut at 0.

    Raises:
        ShapeError: Matrices of different shape.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> low, high = weyl_bounds(torch.diag(torch.tensor([5.0, 1.0])), 2 * torch.eye(2))
        >>> low.tolist(), high.tolist()
        ([3.0, 0.0], [7.0, 3.0])

    References:
        H. Weyl (1912); R. Horn, C. Johnson, Topics in Matrix Analysis, section 3.3.
    """
    _same_shape(signal, noise)
    centre, radius = singular_values(signal), singular_values(noise)[..., :1]
    return (centre - radius).clamp(min=0), centre + radius


def wedin_bound(
    signal: Float[Tensor, "*#batch m n"], noise: Float[Tensor, "*#batch m n"], *, rank: int
) -> Float[Tensor, "*result"]:
    r"""A certain limit for the subspace error between ``signal`` and ``signal + noise``, on both sides.

    .. math:: \|\sin\Theta\|_2 \le \frac{\|N\|_2}{\sigma_r(A) - \sigma_{r+1}(A) - \|N\|_2}

    Args:
        signal: ``A``, matrix or batch, shape ``(..., m, n)``.
        noise: ``N``, same; leading dimensions broadcast.
        rank: ``r``, ``1 <= r <= min(m, n)``; for a signal of rank ``r`` the second term is 0.

    Returns:
        Shape ``(...)``; says nothing where it is 1 or more, and is infinite where the denominator is not positive.

    Raises:
        ShapeError: Matrices of different shape.
        OptionError: ``rank`` out of range.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> wedin_bound(torch.diag(torch.tensor([5.0, 0.0])), torch.eye(2), rank=1).item()
        0.25

    References:
        P.-A. Wedin (1972), Perturbation bounds in connection with singular value decomposition; the denominator of the
        theorem, ``sigma_r(A) - sigma_{r+1}(A + N)``, is bounded below by Weyl's inequality.
    """
    _same_shape(signal, noise)
    check_rank(rank, signal)
    s, norm = singular_values(signal), singular_values(noise)[..., 0]
    room = (s[..., rank - 1] - s[..., rank] if rank < s.shape[-1] else s[..., rank - 1]) - norm
    return torch.where(room > 0, norm / torch.where(room > 0, room, 1.0), torch.inf)


def _same_shape(signal: Tensor, noise: Tensor) -> None:
    if signal.shape[-2:] != noise.shape[-2:]:
        raise ShapeError(f"signal and noise must have one shape; got {tuple(signal.shape)} and {tuple(noise.shape)}.")
