r"""What theory says about the spectrum of a momentum buffer: the random-matrix laws.

Throughout, gradients are ``S + Xi_t`` with a signal of singular values ``lambda_k`` and noise entries of variance
``sigma^2``, and the buffer's noise has entries of standard deviation

.. math:: s = \sigma \sqrt{\tfrac{1-\beta}{1+\beta}\,(1-\beta^{2t})} \;\to\; \sigma/\sqrt{2T-1}.

Every function takes ``steps=t`` for the exact finite sums (the signal is then ``(1-beta^t) lambda_k``); the default is
many steps. ``beta = 0`` describes a raw gradient. The laws are asymptotic in the size of the matrix: expect
a few per cent at 100 x 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics._stream import Numbers, positive
from orthokit.diagnostics.momentum import effective_samples, signal_persistence
from orthokit.errors import OptionError, ShapeError

__all__ = [
    "buffer_noise",
    "noise_edge",
    "polar_only_threshold",
    "rank_one_alignment",
    "spike_cosines",
    "spike_positions",
    "survival_threshold",
]

Strengths = Sequence[float | int] | Tensor


def buffer_noise(sigma: Numbers, beta: Numbers, *, steps: int | None = None) -> Float[Tensor, "*result"]:
    r"""The standard deviation ``s`` of an entry of the buffer's noise.

    Args:
        sigma: Noise of a gradient entry, ``>= 0``; one or several (broadcast with ``beta``).
        beta: Momentum in [0, 1), one or several.
        steps: ``t >= 1``; default ``None``: many steps.

    Returns:
        float64, broadcast shape of ``sigma`` and ``beta``.

    Raises:
        OptionError: A value out of range.

    Example:
        >>> round(buffer_noise(2.0, 0.6).item(), 12)
        1.0
    """
    level = torch.as_tensor(sigma, dtype=torch.float64)
    if not bool(((level >= 0) & level.isfinite()).all()):
        raise OptionError(f"sigma must be finite and >= 0; got {level.tolist()}.")
    b = torch.as_tensor(beta, dtype=torch.float64)
    s = level / effective_samples(b).sqrt()
    return s if steps is None else s * signal_persistence(b**2, steps=steps).sqrt()


def noise_edge(
    shape: tuple[int, int], sigma: Numbers, beta: Numbers, *, steps: int | None = None
) -> Float[Tensor, "*result"]:
    r"""Where the noise of a buffer ends: its largest singular value is about ``s (sqrt m + sqrt n)``.

    Args:
        shape: ``(m, n)``.
        sigma: Noise of a gradient entry, one or several.
        beta: Momentum in [0, 1), one or several.
        steps: ``t``; default ``None``: many steps.

    Returns:
        float64, broadcast shape of ``sigma`` and ``beta``; an estimate of ``sigma_{r+1}(M)``.

    Raises:
        ShapeError: Sizes below 1.
        OptionError: A value out of range.

    Example:
        >>> round(noise_edge((100, 100), 1.0, 0.0).item(), 9)
        20.0

    References:
        S. Geman (1980), A limit theorem for the norm of random matrices; Z. Bai, Y. Yin (1988).
    """
    m, n = _sizes(shape)
    return buffer_noise(sigma, beta, steps=steps) * (math.sqrt(m) + math.sqrt(n))


def survival_threshold(
    shape: tuple[int, int], sigma: Numbers, beta: Numbers, *, steps: int | None = None
) -> Float[Tensor, "*result"]:
    r"""The weakest signal a buffer shows: a spike leaves the noise iff ``lambda_k > s (m n)^{1/4}``.

    Args:
        shape: ``(m, n)``.
        sigma: Noise of a gradient entry, one or several.
        beta: Momentum in [0, 1), one or several.
        steps: ``t``; default ``None``: many steps. Compare then with ``(1-beta^t) lambda_k``.

    Returns:
        float64, broadcast shape of ``sigma`` and ``beta``.

    Raises:
        ShapeError: Sizes below 1.
        OptionError: A value out of range.

    Example:
        >>> round(survival_threshold((100, 100), 1.0, 0.0).item(), 9)
        10.0

    References:
        F. Benaych-Georges, R. Nadakuditi, arXiv 1103.2221, section 3.
    """
    m, n = _sizes(shape)
    return buffer_noise(sigma, beta, steps=steps) * (m * n) ** 0.25


def spike_positions(
    strengths: Strengths, shape: tuple[int, int], sigma: Numbers, beta: Numbers, *, steps: int | None = None
) -> Float[Tensor, "*result"]:
    r"""Where the signal's singular values appear in the buffer, pushed outwards by the noise.

    .. math:: \sigma_k(M) \approx \sqrt{(\lambda_k^2 + s^2 m)(\lambda_k^2 + s^2 n)} / \lambda_k

    A strength below :func:`survival_threshold` sinks into the noise; its position is then the noise edge.

    Args:
        strengths: Singular values of the signal, positive, shape ``(r,)``.
        shape: ``(m, n)``.
        sigma: Noise of a gradient entry, one or several.
        beta: Momentum in [0, 1), one or several.
        steps: ``t``; default ``None``: many steps.

    Returns:
        float64, shape ``(..., r)`` with the broadcast shape of ``sigma`` and ``beta`` first.

    Raises:
        ShapeError: Sizes below 1.
        OptionError: A value out of range.

    Example:
        >>> spike_positions([12.0], (100, 100), 0.0, 0.9).tolist()
        [12.0]

    References:
        F. Benaych-Georges, R. Nadakuditi, The singular values and vectors of low rank perturbations of large
        rectangular random matrices, arXiv 1103.2221, section 3.
    """
    lam, s, m, n, seen = _spikes(strengths, shape, sigma, beta, steps)
    position = ((lam**2 + s**2 * m) * (lam**2 + s**2 * n)).sqrt() / lam
    return torch.where(seen, position, s * (math.sqrt(m) + math.sqrt(n)))


def spike_cosines(
    strengths: Strengths, shape: tuple[int, int], sigma: Numbers, beta: Numbers, *, steps: int | None = None
) -> tuple[Float[Tensor, "*result"], Float[Tensor, "*result"]]:
    r"""How well the buffer's singular vectors point at the signal's: ``|<u_k, uhat_k>|`` and ``|<v_k, vhat_k>|``.

    .. math:: \langle u_k, \hat u_k \rangle^2 \approx \frac{\lambda_k^4 - s^4 m n}{\lambda_k^4 + \lambda_k^2 s^2 m},
        \qquad \text{right: } s^2 n \text{ in the denominator}

    Args:
        strengths: Singular values of the signal, positive and distinct, shape ``(r,)``.
        shape: ``(m, n)``.
        sigma: Noise of a gradient entry, one or several.
        beta: Momentum in [0, 1), one or several.
        steps: ``t``; default ``None``: many steps.

    Returns:
        ``(left, right)``, cosines (not squared) in [0, 1], each ``(..., r)``; 0 below the survival threshold.

    Raises:
        ShapeError: Sizes below 1.
        OptionError: A value out of range.

    Example:
        >>> left, right = spike_cosines([12.0], (400, 100), 0.3, 0.9)
        >>> bool(left < right < 1)  # the longer vector is harder to find
        True

    References:
        arXiv 1103.2221, section 3.
    """
    lam, s, m, n, seen = _spikes(strengths, shape, sigma, beta, steps)
    top = lam**4 - s**4 * m * n
    left, right = (torch.where(seen, top / (lam**4 + lam**2 * s**2 * size), 0.0).clamp(0, 1).sqrt() for size in (m, n))
    return left, right


def rank_one_alignment(
    strength: Numbers, shape: tuple[int, int], sigma: Numbers, beta: Numbers, *, steps: int | None = None
) -> Float[Tensor, "*result"]:
    r"""The alignment of the orthogonalised buffer with a rank-one signal, for long matrices.

    .. math:: a(\mathrm{polar}(M)) \approx \lambda / \sqrt{\lambda^2 + s^2 \max(m, n)}

    Args:
        strength: ``lambda > 0``, one or several.
        shape: ``(m, n)``, one size much larger than the other.
        sigma: Noise of a gradient entry, one or several.
        beta: Momentum in [0, 1), one or several; 0 for orthogonalisation without momentum.
        steps: ``t``; default ``None``: many steps.

    Returns:
        float64, broadcast shape; within 5 % at 400 x 100.

    Raises:
        ShapeError: Sizes below 1.
        OptionError: A value out of range.

    Example:
        >>> round(rank_one_alignment(2.0, (400, 100), 1.0, 0.99).item(), 3)
        0.816

    References:
        Ours: for ``m >> n`` the Gram matrix of the noise is nearly ``s^2 m I``.
    """
    long = max(_sizes(shape))
    lam = positive(strength, "strength")
    if steps is not None:
        lam = lam * signal_persistence(beta, steps=steps)
    return lam / (lam**2 + buffer_noise(sigma, beta, steps=steps) ** 2 * long).sqrt()


def polar_only_threshold(shape: tuple[int, int], sigma: float | int) -> float:
    r"""The signal strength below which orthogonalising a raw rank-one gradient recovers only a marginal part of it.

    .. math:: \lambda < \tfrac14 \sigma (\sqrt m - \sqrt n), \qquad m \ge n

    Args:
        shape: ``(m, n)`` in either order; the condition is empty (0) for square matrices.
        sigma: Noise of a gradient entry, ``>= 0``.

    Returns:
        The threshold.

    Raises:
        ShapeError: Sizes below 1.
        OptionError: ``sigma`` out of range.

    Example:
        >>> polar_only_threshold((400, 100), 1.0)
        2.5

    References:
        arXiv 2606.03899, theorem 3.
    """
    m, n = _sizes(shape)
    return float(buffer_noise(sigma, 0.0)) * abs(math.sqrt(m) - math.sqrt(n)) / 4


def _sizes(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ShapeError(f"shape must be (m, n) with sizes >= 1; got {tuple(shape)}.")
    return shape


def _spikes(
    strengths: Strengths, shape: tuple[int, int], sigma: Numbers, beta: Numbers, steps: int | None
) -> tuple[Tensor, Tensor, int, int, Tensor]:
    """Strengths and noise of the buffer, broadcast to ``(..., r)``, the sizes, and which spikes survive."""
    m, n = _sizes(shape)
    lam = positive(strengths, "strengths").reshape(-1)
    s = buffer_noise(sigma, beta, steps=steps)[..., None]
    if steps is not None:
        lam = lam * signal_persistence(beta, steps=steps)[..., None]
    return lam, s, m, n, lam > s * (m * n) ** 0.25
