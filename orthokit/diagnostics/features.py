r"""How features spread over directions: RankMe and the decay exponent of a spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix

__all__ = ["DecayFit", "alpha_req", "decay_fit", "feature_values", "rankme"]

# Fewer points than this are no line.
_FEWEST = 5


@dataclass(frozen=True)
class DecayFit:
    """A spectrum's decay ``lambda_i ~ i^(-exponent)``, with the range that was really used.

    Args:
        exponent: The exponent; larger means that fewer directions carry the variance.
        scale: ``lambda_1`` of the fitted line.
        first: First index of the fit, counted from 1.
        last: Last index of the fit; below the ``last`` that was asked for if the features have fewer directions.
        shrunk: Whether it is.
        r2: Weighted share of the variance of ``log lambda`` that the line explains.
    """

    exponent: float
    scale: float
    first: int
    last: int
    shrunk: bool
    r2: float


def feature_values(
    Z: Float[Tensor, "*batch samples width"],
    *,
    values: Literal["singular", "eigen"] = "singular",
    centre: bool = False,
) -> Float[Tensor, "*batch k"]:
    r"""Singular values of a feature matrix, or the eigenvalues of its covariance, largest first.

    .. math:: s_k = \sigma_k(Z), \qquad \lambda_k = s_k^2 / N

    Args:
        Z: Features, one sample a row, shape ``(..., N, d)``.
        values: ``"singular"`` (default) or ``"eigen"``.
        centre: Subtract column means first; default not.

    Returns:
        Shape ``(..., min(N, d))``, descending, ``>= 0``, float64.

    Raises:
        UnknownNameError: Unknown ``values``.
        ShapeError: Fewer than two dimensions, or no samples.
        DtypeError: Not real floating.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> feature_values(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), values="eigen").tolist()
        [4.5, 0.5]

    Numerics:
        Singular values in float64 of a float64 copy, each to a few epsilon of the largest.
    """
    if values not in ("singular", "eigen"):
        raise unknown_name("kind of values", values, ("singular", "eigen"))
    check_matrix(Z, name="Z")
    if Z.is_complex():
        raise DtypeError(f"Z must be real; got {Z.dtype}.")
    if 0 in Z.shape[-2:]:
        raise ShapeError(f"Z needs at least one sample and one feature; got shape {tuple(Z.shape)}.")
    check_finite(Z, name="Z")
    work = Z.detach().to(torch.float32 if Z.device.type == "mps" else torch.float64)
    if centre:
        work = work - work.mean(dim=-2, keepdim=True)
    n, d = work.shape[-2:]
    if n > 2 * d:
        # A triangle with the same singular values; squaring into Z^T Z would lose the small ones.
        work = torch.linalg.qr(work, mode="r").R
    s = torch.linalg.svdvals(work).double()
    return s if values == "singular" else s.square() / n


def rankme(
    Z: Float[Tensor, "*batch samples width"],
    *,
    eps: float = 1e-7,
    values: Literal["singular", "eigen"] = "singular",
    centre: bool = False,
) -> Float[Tensor, "*batch"]:
    r"""How many directions features use, as the exponential of the entropy of their spectrum.

    .. math:: \mathrm{RankMe}(Z) = \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \frac{s_k}{\sum_j s_j} + \epsilon

    Args:
        Z: Features, one sample a row, shape ``(..., N, d)``.
        eps: Added to every ``p_k``, ``>= 0``; default 1e-7, as published. With 0 it is the effective rank.
        values: ``"singular"`` (default, as published) or ``"eigen"``: eigenvalues of the covariance, as in work on
            language models; lower for the same features, so say which one is shown.
        centre: Subtract column means first; default not, as published.

    Returns:
        Shape ``(...)``, between 1 and ``min(N, d)`` but for ``eps``; 0 for zero features by convention.

    Raises:
        OptionError: ``eps`` below 0.
        UnknownNameError: Unknown ``values``.
        ShapeError, DtypeError, NonFiniteError: As :func:`feature_values`.

    Example:
        >>> round(rankme(torch.eye(6)).item(), 3), round(rankme(torch.ones(6, 6)).item(), 3)
        (6.0, 1.0)

    Numerics:
        float64, returned as float64 for float64 input, else float32. ``eps`` lifts the value of a collapsed
        spectrum of ``k`` directions by a factor of about ``1 + 16 k eps``: 0.1 % for 600 of them.

    References:
        Q. Garrido et al., RankMe, arXiv 2210.02885, equation 1; values="eigen": arXiv 2509.23024.
    """
    if not eps >= 0:
        raise OptionError(f"eps must be >= 0; got {eps}.")
    s = feature_values(Z, values=values, centre=centre)
    total = s.sum(-1, keepdim=True)
    p = s / torch.where(total > 0, total, 1.0) + eps
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.where(total[..., 0] > 0, rank, 0.0).to(torch.promote_types(Z.dtype, torch.float32))


def alpha_req(
    Z: Float[Tensor, "samples width"], *, first: int = 5, last: int = 99, centre: bool = True
) -> Float[Tensor, ""]:
    r"""The exponent with which the variance of features falls over their principal directions.

    .. math:: \lambda_i \sim i^{-\alpha}, \qquad
        \min_{\alpha, c} \sum_{i=first}^{last} \tfrac1i \,(\log\lambda_i - c + \alpha \log i)^2

    Args:
        Z: Features, one sample a row, shape ``(N, d)``.
        first: First index of the fit, counted from 1, ``>= 1``; default 5: the head does not follow the law.
        last: Last index; default 99. Shrunk to the number of directions the features have; :func:`decay_fit` gives the
            exponent together with the range that was used.
        centre: Eigenvalues of the covariance (default), not of the second moment.

    Returns:
        The exponent, a scalar; near 1 is the edge between smooth and rough codes, larger is a collapsed one.

    Raises:
        OptionError: ``first`` below 1, or fewer than five indices to fit.
        ShapeError, DtypeError, NonFiniteError: As :func:`feature_values`.

    Example:
        >>> i = torch.arange(1, 41, dtype=torch.float64)
        >>> round(alpha_req(torch.diag(i**-0.75), centre=False).item(), 6)
        1.5

    Numerics:
        float64 spectrum and fit. A covariance estimated from ``N`` samples bends down towards its end: with ``d`` near
        ``N``, or ``last`` near ``d``, the exponent is too large.

    References:
        K. Agrawal et al. (2022), alpha-ReQ, NeurIPS; C. Stringer et al. (2019) for weights and range.
    """
    fit = decay_fit(feature_values(Z, values="eigen", centre=centre), first=first, last=last)
    return Z.new_tensor(fit.exponent, dtype=torch.promote_types(Z.dtype, torch.float32))


def decay_fit(values: Tensor, *, first: int = 5, last: int = 99) -> DecayFit:
    r"""Fit ``lambda_i ~ i^(-alpha)`` to a descending spectrum, and say over which range.

    Args:
        values: Eigenvalues, largest first, shape ``(k,)``, as of :func:`feature_values`.
        first: First index of the fit, counted from 1, ``>= 1``; default 5.
        last: Last index; default 99; shrunk to the values above rounding error of the largest.

    Returns:
        :class:`DecayFit`.

    Raises:
        OptionError: ``first`` below 1, or fewer than five indices to fit.
        ShapeError: Not one dimension.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> fit = decay_fit(3 * torch.arange(1.0, 65.0).double() ** -2)
        >>> round(fit.exponent, 6), round(fit.scale, 6), fit.last, fit.shrunk
        (2.0, 3.0, 64, True)

    Numerics:
        Weighted least squares of ``log lambda`` on ``log i`` with weights ``1/i``, which count every octave about
        equally; float64.
    """
    if first < 1:
        raise OptionError(f"first must be an index >= 1; got {first}.")
    if values.ndim != 1:
        raise ShapeError(f"values must be one spectrum, shape (k,); got {tuple(values.shape)}.")
    check_finite(values, name="values")
    values = values.double()
    floor = len(values) * torch.finfo(torch.float64).eps * values.max() if len(values) else 0.0
    there = int((values > floor).sum())
    end = min(last, there)
    if end - first + 1 < _FEWEST:
        raise OptionError(
            f"the fit needs at least {_FEWEST} indices; first={first}, last={last} and {there} nonzero values leave "
            f"{max(0, end - first + 1)}. Lower first, or take wider features."
        )
    i = torch.arange(first, end + 1, dtype=torch.float64, device=values.device)
    x, y, w = i.log(), values[first - 1 : end].log(), 1 / i
    w = w / w.sum()
    dx, dy = x - (w * x).sum(), y - (w * y).sum()
    slope = (w * dx * dy).sum() / (w * dx * dx).sum()
    spread = (w * dy * dy).sum()
    left = (w * (dy - slope * dx).square()).sum()
    scale = ((w * y).sum() - slope * (w * x).sum()).exp()
    r2 = 1 - (left / spread).item() if spread > 0 else 1.0
    return DecayFit(-slope.item(), scale.item(), first, end, end < last, r2)
