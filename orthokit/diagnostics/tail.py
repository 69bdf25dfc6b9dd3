r"""Whether a spectrum has a heavy tail, with which exponent, how sure that is, and when there is none to speak of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics.bulk import BulkFit, as_values, bulk_fit
from orthokit.errors import DtypeError, OptionError, ShapeError
from orthokit.linalg import singular_values
from orthokit.linalg._check import check_finite

__all__ = ["PowerLaw", "power_law_alpha", "tail_fit"]

# Tails tried at once: blocks of candidates against the eigenvalues behind them, small enough for the caches.
_BLOCK = 64
# Below these an exponent is refused: eigenvalues in all, eigenvalues in the tail (the interval is then alpha - 1 by a
# factor of 1.6 either way), largest over smallest eigenvalue of the tail, and above this one the exponent itself.
_ENOUGH, _TAIL, _SPAN, _STEEPEST = 50, 20, 2.0, 10.0
# 5 % point of the scaled distance for exponential data whose mean is estimated (Stephens 1974, table 1).
_REJECTED = 1.094
# A bulk that describes a spectrum to within this distance leaves a tail only if half of that tail stands above it.
# Noise of k >= 50 singular values stays below 0.09, spectra that are power laws throughout are above 0.15.
_BULK = 0.1
# 2.5 % and 97.5 % points of the normal distribution.
_NORMAL = 1.959964


@dataclass(frozen=True)
class PowerLaw:
    """A power-law tail of the eigenvalues of ``W^T W``: density ``~ lambda^(-alpha)`` above ``xmin``.

    Args:
        alpha: Exponent of the density; infinite if the tail is one repeated value.
        xmin: Smallest eigenvalue of the tail.
        distance: Kolmogorov-Smirnov distance between tail and law, in [0, 1].
        tail: Eigenvalues in the tail.
        values: Nonzero eigenvalues in all.
        largest: Largest eigenvalue.
        low: Lower end of the 95 % interval of ``alpha``, given ``xmin``.
        high: Its upper end.
        scaled_distance: ``distance`` on a scale that does not depend on the size of the tail; above 1.094 the law is
            rejected at 5 %.
        refused: Why the exponent should not be shown, in words; ``None`` if it may be.
    """

    alpha: float
    xmin: float
    distance: float
    tail: int
    values: int
    largest: float
    low: float
    high: float
    scaled_distance: float
    refused: str | None

    @property
    def enough(self) -> bool:
        """Whether there are the 50 eigenvalues below which the exponent means little."""
        return self.values >= _ENOUGH

    @property
    def weighted(self) -> float:
        """``alpha log10(largest eigenvalue)``, the scale-aware variant."""
        return self.alpha * math.log10(self.largest)


def power_law_alpha(W: Float[Tensor, "out in"], *, fewest: int = 10) -> PowerLaw:
    r"""The exponent of the heavy tail of a weight matrix's spectrum, its start chosen by the data.

    .. math:: \alpha = 1 + n \Big/ \sum_{\lambda_j \ge \lambda_{min}} \log(\lambda_j / \lambda_{min})

    over the eigenvalues of :math:`W^\top W`, with the :math:`\lambda_{min}` among them whose law is closest to its tail
    in Kolmogorov-Smirnov distance.

    Args:
        W: Matrix, shape ``(out, in)``.
        fewest: Smallest tail that is tried, ``>= 2``; default 10.

    Returns:
        :class:`PowerLaw`. Its ``refused`` says when there is no exponent to speak of; for a random matrix it does.
        About 2 in well-trained layers of large models, 2 to 6 is called healthy, above 6 weakly trained; that is a rule
        of thumb.

    Raises:
        OptionError: ``fewest`` below 2, or fewer nonzero eigenvalues than that.
        ShapeError, DtypeError, NonFiniteError: As :func:`~orthokit.diagnostics.spectrum`.

    Example:
        Eigenvalues at the quantiles of a law with exponent 3:

        >>> q = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
        >>> fit = power_law_alpha(torch.diag((1 - q) ** -0.25))
        >>> abs(fit.alpha - 3) < 0.05, fit.low < 3 < fit.high, fit.refused
        (True, True, None)

    Numerics:
        float64 singular values, squared; eigenvalues within rounding error of zero are left out. Then as
        :func:`tail_fit`.

    References:
        As :func:`tail_fit`; C. Martin, M. Mahoney, arXiv 1810.01075, for weights.
    """
    _check_fewest(fewest)
    if W.ndim != 2:
        raise ShapeError(f"W must be one matrix (out, in); got shape {tuple(W.shape)}.")
    if W.is_complex() or not W.is_floating_point():
        raise DtypeError(f"W must be real floating; got {W.dtype}. Convert it with .float() first.")
    sigma = singular_values(W.detach() if W.device.type == "mps" else W.detach().double()).cpu().double()
    rounding = max(W.shape) * torch.finfo(torch.promote_types(W.dtype, torch.float32)).eps
    floor = (rounding * sigma.max().item()) ** 2 if len(sigma) else 0.0
    values = sigma.square()
    if (found := int((values > floor).sum())) < fewest:
        raise OptionError(
            f"a tail needs at least fewest={fewest} nonzero eigenvalues; W of shape {tuple(W.shape)} has {found}."
        )
    return tail_fit(values, fewest=fewest, floor=floor, bulk=bulk_fit(sigma, shape=(W.shape[0], W.shape[1])))


def tail_fit(
    values: Tensor | np.ndarray | Sequence[float | int],
    *,
    fewest: int = 10,
    floor: float | int | None = None,
    bulk: BulkFit | None = None,
) -> PowerLaw:
    r"""The power-law tail of given eigenvalues: exponent, interval, quality, and whether to show it at all.

    With :math:`n` eigenvalues in the tail and :math:`D` their distance to the law,

    .. math:: \alpha = 1 + \frac{n}{S}, \quad S = \sum_{j} \log\frac{\lambda_j}{\lambda_{min}}, \qquad
        \alpha_{low, high} = 1 + \frac{\Gamma_{n-1}(2.5\,\%, 97.5\,\%)}{S}, \qquad
        D^* = \Big(D - \frac{0.2}{n}\Big)\Big(\sqrt n + 0.26 + \frac{0.5}{\sqrt n}\Big)

    Args:
        values: Eigenvalues, squares of all singular values of a matrix, in any order, shape ``(k,)``, ``>= 0``.
        fewest: Smallest tail that is tried, ``>= 2``; default 10.
        floor: Eigenvalues not above it count as zero; default ``k`` epsilon of the largest.
        bulk: :func:`~orthokit.diagnostics.bulk_fit` of the same matrix; default ``None``: a spectrum that is one of
            noise is then refused only where its edge is too short or too steep to pass.

    Returns:
        :class:`PowerLaw`. ``refused`` is set for fewer than 50 eigenvalues; if ``bulk`` is within 0.1 of the spectrum
        and half of the tail is not above its edge; for fewer than 20 eigenvalues in the tail, or less than a factor of
        2 from its smallest to its largest; if the law is rejected; and for ``alpha`` above 10.

    Raises:
        OptionError: ``fewest`` below 2, fewer nonzero eigenvalues than that, or a negative one.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> q = (np.arange(300) + 0.5) / 300
        >>> fit = tail_fit((1 - q) ** -1.0)
        >>> abs(fit.alpha - 2) < 0.05, fit.refused
        (True, None)
        >>> tail_fit(np.linspace(1, 1.5, 300)).refused
        'its 71 largest eigenvalues lie within a factor of 1.08; a power law shows over a factor of 2 or more'

    Numerics:
        float64. Every eigenvalue that leaves a tail of ``fewest`` is tried: ``k^2 / 2`` exponentials, 2 ms for
        ``k = 384`` and 0.1 s for 4096 on one core. The interval is exact for independent eigenvalues above a given
        ``xmin``. It includes neither the choice of ``xmin`` (with it, 90 to 95 % of the intervals hold the truth), nor
        that eigenvalues of one matrix repel each other, nor that the law may be wrong. The test of the law is lenient,
        since ``xmin`` is chosen to make the distance small: of true power laws it rejects far fewer than 5 %. Of
        Gaussian matrices with ``k >= 50`` and their ``bulk`` more than 95 % are refused (without it 50 to 100 %,
        depending on the shape); of samples of 100 and more from power laws with exponents 2 to 5 fewer than 10 %.

    References:
        A. Clauset, C. Shalizi, M. Newman, Power-law distributions in empirical data, arXiv 0706.1062, sections 3.1 and
        3.3; M. Stephens (1974), EDF statistics for goodness of fit and some comparisons, table 1, for the scaled
        distance: logarithms of a Pareto tail are exponential. The distance is taken on both sides of every step of the
        empirical distribution. The rules of refusal are ours, and their bounds were chosen by measurement.
    """
    _check_fewest(fewest)
    found = as_values(values).double().sort().values
    check_finite(found, name="values")
    if len(found) and found[0] < 0:
        raise OptionError(f"eigenvalues of W^T W are >= 0; got {found[0].item():g}. Clamp what rounding made negative.")
    if floor is None:
        floor = len(found) * torch.finfo(torch.float64).eps * found[-1].item() if len(found) else 0.0
    there = found[found > floor]
    if len(there) < fewest:
        raise OptionError(f"a tail needs at least fewest={fewest} nonzero eigenvalues; these are {len(there)}.")
    logs = there.log()
    counts = torch.arange(len(logs), 0, -1, dtype=torch.float64)
    # Sums of log(lambda_j / lambda_min) over the tail, as sums of differences: exactly 0 for a repeated value.
    gaps = torch.cat([logs.diff() * counts[1:], logs.new_zeros(1)])
    sums = gaps.flip(0).cumsum(0).flip(0)
    alphas = (1 + counts / sums)[: len(logs) - fewest + 1]
    distances = torch.cat([_distances(logs, alphas, start) for start in range(0, len(alphas), _BLOCK)])
    best = int(distances.argmin())
    n, alpha, distance = len(there) - best, alphas[best].item(), distances[best].item()
    low, high = (1 + _gamma_interval(n - 1) / sums[best]).tolist()
    scaled = (distance - 0.2 / n) * (math.sqrt(n) + 0.26 + 0.5 / math.sqrt(n))
    xmin, largest = there[best].item(), there[-1].item()
    return PowerLaw(
        alpha=alpha,
        xmin=xmin,
        distance=distance,
        tail=n,
        values=len(there),
        largest=largest,
        low=low,
        high=high,
        scaled_distance=scaled,
        refused=_reason(there, n, alpha, scaled, bulk),
    )


def _reason(values: Tensor, n: int, alpha: float, scaled: float, bulk: BulkFit | None) -> str | None:
    """Why a tail of ``n`` values is not to be shown as a power law, in words."""
    if len(values) < _ENOUGH:
        return f"{len(values)} eigenvalues are too few for an exponent; it takes {_ENOUGH}"
    if bulk is not None and bulk.above is not None and bulk.distance is not None and bulk.distance < _BULK:
        within = min(bulk.above, n)
        if 2 * within < n:
            return (
                f"the spectrum is near that of a random matrix (distance {bulk.distance:.2g}), and {n - within} of the "
                f"{n} largest eigenvalues lie below the edge of its bulk"
            )
    if n < _TAIL:
        return f"the tail has {n} eigenvalues; an exponent takes {_TAIL}"
    span = (values[-1] / values[-n]).item()
    if span < _SPAN:
        return (
            f"its {n} largest eigenvalues lie within a factor of {span:.3g}; a power law shows over a factor of "
            f"{_SPAN:g} or more"
        )
    if scaled > _REJECTED:
        return f"the tail is no power law: its scaled distance is {scaled:.2f}, and {_REJECTED} is the limit at 5 %"
    if alpha > _STEEPEST:
        return f"an exponent of {alpha:.1f} is an edge and no heavy tail; {_STEEPEST:g} is the limit"
    return None


def _distances(logs: Tensor, alphas: Tensor, start: int) -> Tensor:
    """Kolmogorov-Smirnov distances of the laws that begin at the eigenvalues from ``start`` on, one block of them."""
    stop = min(start + _BLOCK, len(alphas))
    alpha = alphas[start:stop, None]
    # An infinite exponent means that the tail is one value, the start of the law: nothing lies below it.
    rate = torch.where(alpha.isfinite(), 1 - alpha, 0.0)
    rows = torch.arange(stop - start, dtype=torch.float64)[:, None]
    n = len(logs) - start - rows
    gap = (logs[start:] - logs[start:stop, None]).mul_(rate).expm1_()
    # Both sides of a step of the empirical distribution: the middle of the step, and half of its height.
    gap += (torch.arange(len(logs) - start, dtype=torch.float64) + 0.5 - rows) / n
    return gap.triu_().abs_().amax(1) + 0.5 / n[:, 0]


def _gamma_interval(shape: int) -> Tensor:
    """The 2.5 % and 97.5 % points of the gamma distribution of a shape >= 1 and scale 1."""
    p = torch.tensor([0.025, 0.975], dtype=torch.float64)
    a = torch.tensor(float(shape), dtype=torch.float64)
    z = torch.tensor([-_NORMAL, _NORMAL], dtype=torch.float64)
    # Wilson and Hilferty's approximation, then Newton's steps in log x, where the distribution is nearly straight.
    x = a * (1 - 1 / (9 * a) + z / (3 * a.sqrt())) ** 3
    for _ in range(5):
        density = ((a * x.log()) - x - torch.lgamma(a)).exp()
        x = x * ((p - torch.special.gammainc(a, x)) / density).exp()
    return x


def _check_fewest(fewest: int) -> None:
    if fewest < 2:
        raise OptionError(f"fewest must be an integer >= 2; got {fewest}.")
