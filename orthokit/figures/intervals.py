r"""Confidence intervals of a mean over seeds, exact for normal errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.figures._check import array

__all__ = ["mean_interval", "t_quantile"]


def t_quantile(freedom: int, *, level: float = 0.95) -> float:
    r"""The half width of a Student-t interval, in standard errors.

    $t$ such that $P(|T_\nu| \le t) = \text{level}$, from the finite trigonometric sums that hold for whole $\nu$.

    Args:
        freedom: Degrees of freedom $\nu \ge 1$.
        level: Probability inside the interval, in (0, 1). Default 0.95.

    Returns:
        The quantile, positive.

    Raises:
        OptionError: ``freedom < 1`` or ``level`` outside (0, 1).

    Example:
        >>> round(t_quantile(4), 4)
        2.7764

    Numerics:
        Exact sums in float64, solved by bisection to 1e-14 in the angle; O(freedom) per evaluation.

    References:
        M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if freedom < 1 or not 0 < level < 1:
        raise OptionError(f"need freedom >= 1 and 0 < level < 1; got freedom={freedom}, level={level}.")
    low, high = 0.0, math.pi / 2
    while high - low > 1e-14:
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def mean_interval(values: Sequence[float] | np.ndarray | Any, *, level: float = 0.95) -> tuple[float, float, float]:
    r"""The mean over seeds with its Student-t confidence interval.

    $\bar x \pm t_{n-1} s / \sqrt n$, with $s$ the sample standard deviation.

    Args:
        values: Shape ``(n,)``, one value per seed, ``n >= 2``.
        level: Confidence level in (0, 1). Default 0.95.

    Returns:
        ``(mean, low, high)``.

    Raises:
        ShapeError: Fewer than two values: one run says nothing about its spread.
        NonFiniteError: A value is NaN or infinite.

    Example:
        >>> mean, low, high = mean_interval([1.0, 2.0, 3.0])
        >>> mean == 2.0 and low < 1.0 and high > 3.0
        True
    """
    x = array("values", values, dims=(1,), finite=False)
    if not np.isfinite(x).all():
        raise NonFiniteError("an interval needs finite values; drop or explain the runs that diverged.")
    if len(x) < 2:
        raise ShapeError("an interval over seeds needs at least two values; got 1.")
    mean = float(x.mean())
    half = t_quantile(len(x) - 1, level=level) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def _central_probability(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)) for Student's T."""
    sine, cosine = math.sin(angle), math.cos(angle)
    total = term = cosine if freedom % 2 else 1.0
    if freedom == 1:
        return 2 * angle / math.pi
    # Odd: factors 2/3, 4/5 ...; even: 1/2, 3/4 ...; each step adds two powers of the cosine.
    first = 2 if freedom % 2 else 1
    for k in range(first, freedom - 2, 2):
        term *= k / (k + 1) * cosine * cosine
        total += term
    return 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
