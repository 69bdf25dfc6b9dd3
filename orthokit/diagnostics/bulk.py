r"""What a spectrum would be if the entries were noise: the Marchenko-Pastur law, and what stands above its edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics._stream import Numbers
from orthokit.diagnostics.randommatrix import noise_edge
from orthokit.errors import OptionError, ShapeError
from orthokit.linalg._check import check_finite

__all__ = ["BulkFit", "as_values", "bulk_fit", "marchenko_pastur_cdf", "marchenko_pastur_quantile"]

# Fewer singular values than this are no distribution: their median says little about the noise.
_FEWEST = 10
# 99.9 % point of the Tracy-Widom law of real matrices (beta = 1).
_TRACY_WIDOM = 3.2722


@dataclass(frozen=True)
class BulkFit:
    r"""The Marchenko-Pastur law that fits the middle of a spectrum, and what the spectrum has besides.

    Args:
        noise: Standard deviation of the entries of a matrix of noise with this median singular value.
        edge: Where its singular values end, ``noise (sqrt m + sqrt n)``.
        threshold: The singular value above which one counts as standing above the edge: the edge and what the largest
            value of pure noise fluctuates by.
        above: How many do.
        distance: Kolmogorov-Smirnov distance between all eigenvalues of :math:`W^\top W` and the law, in [0, 1]; about
            ``3/k`` for noise.
        values: Singular values in all.
        refused: Why there is no bulk to speak of, in words; the measured fields are ``None`` then.
    """

    noise: float | None
    edge: float | None
    threshold: float | None
    above: int | None
    distance: float | None
    values: int
    refused: str | None = None


def marchenko_pastur_cdf(x: Numbers, *, ratio: float | int) -> Float[Tensor, "*result"]:
    r"""The share of eigenvalues below ``x`` for a large matrix of independent entries.

    With :math:`y` the ratio, :math:`x = 1 + y + 2\sqrt y \cos\theta` inside the support
    :math:`[(1-\sqrt y)^2, (1+\sqrt y)^2]` and :math:`\varphi = \arg(1 + \sqrt y\, e^{i\theta})`,

    .. math:: F(x) = 1 - \frac1\pi \Big(\theta - \varphi + \frac{\varphi - \sqrt y \sin\theta}{y}\Big)

    Args:
        x: Squared singular values over ``noise^2 max(m, n)``, one or several.
        ratio: ``min(m, n) / max(m, n)``, in (0, 1].

    Returns:
        float64, in [0, 1], shape of ``x``.

    Raises:
        OptionError: ``ratio`` out of range.

    Example:
        Of a square matrix half of the law lies below about 0.653, and all of it below 4:

        >>> marchenko_pastur_cdf([0.6528, 4.0], ratio=1).round(decimals=4).tolist()
        [0.5, 1.0]

    Numerics:
        Closed form in float64; absolute error of a few ``1e-16 / sqrt(ratio)``.

    References:
        V. Marchenko, L. Pastur (1967), Distribution of eigenvalues for some sets of random matrices. The form in the
        angle is ours: it is the integral of :math:`\frac2\pi \sin^2\theta / x` and keeps its digits for small ratios,
        where the usual one in arctangents cancels.
    """
    _check_ratio(ratio)
    x = torch.as_tensor(x, dtype=torch.float64)
    root = math.sqrt(ratio)
    # x minus the ends is 4 sqrt(y) times the square of the cosine and the sine of half the angle.
    theta = 2 * torch.atan2(((1 + root) ** 2 - x).clamp(min=0).sqrt(), (x - (1 - root) ** 2).clamp(min=0).sqrt())
    wave = root * theta.sin()
    phi = torch.atan2(wave, 1 + root * theta.cos())
    return (1 - (theta - phi + (phi - wave) / ratio) / math.pi).clamp(0, 1)


@lru_cache(maxsize=4096)
def marchenko_pastur_quantile(p: float | int, *, ratio: float | int) -> float:
    r"""The point below which a share ``p`` of the Marchenko-Pastur law lies; ``p = 1/2`` is its median.

    Args:
        p: Share, in [0, 1].
        ratio: ``min(m, n) / max(m, n)``, in (0, 1].

    Returns:
        ``x`` with ``F(x) = p``, between ``(1 - sqrt ratio)^2`` and ``(1 + sqrt ratio)^2``.

    Raises:
        OptionError: An argument out of range.

    Example:
        >>> median = marchenko_pastur_quantile(0.5, ratio=1)
        >>> round(median, 4), round(marchenko_pastur_cdf(median, ratio=1).item(), 12)
        (0.6528, 0.5)

    Numerics:
        Bisection of the closed form to the last digits of the angle; kept for the last 4096 arguments.
    """
    _check_ratio(ratio)
    if not 0 <= p <= 1:
        raise OptionError(f"p must be a share in [0, 1]; got {p}.")
    root = math.sqrt(ratio)
    low, high = 0.0, math.pi  # angles: the law runs from pi down to 0
    for _ in range(60):
        theta = (low + high) / 2
        phi = math.atan2(root * math.sin(theta), 1 + root * math.cos(theta))
        above = (theta - phi + (phi - root * math.sin(theta)) / ratio) / math.pi
        low, high = (theta, high) if above < 1 - p else (low, theta)
    return (1 - root) ** 2 + 4 * root * math.cos((low + high) / 4) ** 2


def bulk_fit(sigma: Tensor | np.ndarray | Sequence[float | int], *, shape: tuple[int, int]) -> BulkFit:
    r"""How much of a spectrum is that of noise: its level, its edge, what stands above, how far the whole is from it.

    .. math:: \hat s = \frac{\mathrm{median}(\sigma)}{\sqrt{\max(m,n)\, \mu_y}}, \qquad
        \text{edge} = \hat s (\sqrt m + \sqrt n)

    with :math:`\mu_y` the median of the Marchenko-Pastur law of ratio :math:`y`. A singular value stands above if its
    square exceeds ``edge^2`` by more than the 99.9 % point of the Tracy-Widom law,

    .. math:: \sigma^2 > \text{edge}^2 + 3.27\, \hat s^2 (\sqrt m + \sqrt n) (1/\sqrt m + 1/\sqrt n)^{1/3}.

    Args:
        sigma: All singular values of one real matrix, in any order, shape ``(min(m, n),)``, ``>= 0``.
        shape: ``(m, n)``.

    Returns:
        :class:`BulkFit`, with ``refused`` set for fewer than ten values, or if half of them are zero to rounding.

    Raises:
        ShapeError: Sizes below 1, or another number of singular values than ``min(m, n)``.
        NonFiniteError: A NaN or an infinity.
        OptionError: A negative value.

    Example:
        One direction of strength 40 in noise that ends at 21:

        >>> generator = torch.Generator().manual_seed(0)
        >>> W = torch.randn(150, 80, generator=generator)
        >>> W[:, 0] += 40 / 150**0.5
        >>> fit = bulk_fit(torch.linalg.svdvals(W), shape=(150, 80))
        >>> fit.above, round(fit.edge), fit.distance < 0.05
        (1, 21, True)

    Numerics:
        float64; a sort and one pass, a few tenths of a millisecond. On noise the estimate of ``s`` is right to about
        ``1.5/k`` (standard deviation, square matrices; flat ones better), and fewer than one matrix in a hundred shows
        a value above. ``r`` strong directions among ``k`` move the median by ``r/2`` places and the noise upwards. A
        matrix whose rows have different scales is no such noise: its distance is large, and what stands above means
        little.

    References:
        M. Gavish, D. Donoho, The optimal hard threshold for singular values is 4/sqrt(3), arXiv 1305.5870, for the
        noise from the median; I. Johnstone (2001), On the distribution of the largest eigenvalue in principal
        components analysis, for the scale of its fluctuation, here without the -1 that makes its centre exact.
    """
    values = as_values(sigma)
    single = values.dtype != torch.float64
    values = values.double().sort().values
    edge_of_one = noise_edge(shape, 1.0, 0.0).item()
    m, n = shape
    k, long = min(m, n), max(m, n)
    if len(values) != k:
        raise ShapeError(
            f"a matrix of shape {tuple(shape)} has {k} singular values; got {len(values)}. Give all of them."
        )
    check_finite(values, name="sigma")
    if values[0] < 0:
        raise OptionError(f"singular values are >= 0; got {values[0].item():g}.")
    if k < _FEWEST:
        return _refused(k, f"{k} singular values are too few for a distribution; it takes {_FEWEST}")
    # The mean of the middle two, where torch's median is the lower one.
    middle = (values[(k - 1) // 2] + values[k // 2]).item() / 2
    rounding = long * torch.finfo(torch.float32 if single else torch.float64).eps * values[-1].item()
    if middle <= rounding:
        return _refused(k, "half of the singular values are zero to rounding: a matrix of low rank has no bulk")
    noise = middle / math.sqrt(long * marchenko_pastur_quantile(0.5, ratio=k / long))
    spread = edge_of_one * (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3)
    threshold = noise * math.sqrt(edge_of_one**2 + _TRACY_WIDOM * spread)
    law = marchenko_pastur_cdf((values / noise).square() / long, ratio=k / long)
    # Both sides of every step of the empirical distribution: the middle of the step, and half of its height.
    steps = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    return BulkFit(
        noise=noise,
        edge=noise * edge_of_one,
        threshold=threshold,
        above=k - int(torch.searchsorted(values, threshold, right=True)),
        distance=(law - steps).abs().max().item() + 0.5 / k,
        values=k,
    )


def as_values(values: Tensor | np.ndarray | Sequence[float | int]) -> Tensor:
    """A spectrum as one dimension on the CPU, in the precision that it comes in: of numbers in a list, float64."""
    if not isinstance(values, Tensor):
        # A copy: torch takes neither reversed views nor read-only memory without a word.
        values = torch.from_numpy(np.array(values, order="C"))
    return values.detach().cpu().reshape(-1)


def _refused(values: int, reason: str) -> BulkFit:
    return BulkFit(noise=None, edge=None, threshold=None, above=None, distance=None, values=values, refused=reason)


def _check_ratio(ratio: float | int) -> None:
    if not 0 < ratio <= 1:
        raise OptionError(f"ratio must be min(m, n) / max(m, n), in (0, 1]; got {ratio}.")
