r"""Coefficient tables made to measure: the best odd quintics for a given interval of singular values, one by one.

Published tables assume one smallest singular value, 1e-3. For another one, or for another number of steps, the same
construction takes a millisecond here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from orthokit.errors import OptionError
from orthokit.linalg.coefficients import Triple

__all__ = ["landing_interval", "minimax_quintic", "minimax_table"]

# A row made for very small values has a minimum close to 0 further right, and rounding sends values there to either
# sign. Fitting no further down than this share of the upper end keeps value over argument above 1/4 of the slope.
_CUSHION = 0.02407327424182761
# From here on the best quintic equals the one of third order at 1 to the last digits of its coefficients.
_SHORT = 5e-6
_LIMIT: Triple = (1.875, -1.25, 0.375)


def minimax_quintic(lower: float | int, upper: float | int) -> tuple[Triple, float]:
    r"""The odd quintic closest to 1 on an interval, and how close it comes.

    ``argmin_{a,b,c} max_{lower <= s <= upper} |1 - (a s + b s^3 + c s^5)|``; the error takes its largest size at four
    points with alternating signs, two of them the ends.

    Args:
        lower: Smallest argument, ``> 0``.
        upper: Largest, ``>= lower``.

    Returns:
        ``((a, b, c), error)``.

    Raises:
        OptionError: Not ``0 < lower <= upper``, or ``lower`` so small a share of ``upper`` that rounding decides.

    Example:
        >>> (a, b, c), error = minimax_quintic(0.5, 1.0)
        >>> bool(abs((1 - error) - (a * 0.5 + b * 0.5**3 + c * 0.5**5)) < 1e-12)
        True

    Numerics:
        Remez exchange in float64, in powers of the centred square of ``s``, which stay independent on short intervals;
        about five solutions of a 4 x 4 system.

    References:
        N. Amsel, D. Persson, C. Musco, R. Gower (2025), The Polar Express, arXiv 2505.16932, section 4 and appendix.
        The centred basis is ours.
    """
    if not 0 < lower <= upper < math.inf:
        raise OptionError(f"need 0 < lower <= upper; got lower={lower}, upper={upper}.")
    if lower >= (1 - _SHORT) * upper:
        scaled = tuple(x / upper**power for x, power in zip(_LIMIT, (1, 3, 5), strict=True))
        return scaled, abs(1 - _value(scaled, lower))  # type: ignore[return-value]
    middle, half = (upper**2 + lower**2) / 2, (upper**2 - lower**2) / 2
    m = middle / half
    # Where the extrema of a Chebyshev polynomial of the same degree are.
    inner = np.array([(3 * lower + upper) / 4, (lower + 3 * upper) / 4])
    error = math.inf
    for _ in range(100):
        points = np.array([lower, *inner, upper])
        t = (points**2 - middle) / half
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points * t, points * t**2, signs], axis=1)
        p, q, r, found = (float(x) for x in np.linalg.solve(system, np.ones(4)))
        # The derivative of s (p + q t + r t^2) in s, as a polynomial in t; its roots are the next inner points.
        linear, constant = 3 * q + 4 * m * r, p + 2 * m * q
        discriminant = linear**2 - 20 * r * constant
        if discriminant < 0:
            break
        roots = (-linear + np.array([-1.0, 1.0]) * math.sqrt(discriminant)) / (10 * r)
        inner = np.sqrt(np.sort(middle + half * roots))
        if abs(found - error) <= 1e-15:
            row = (p - q * m + r * m**2, (q - 2 * r * m) / half, r / half**2)
            return row, abs(found)
        error = found
    raise OptionError(
        f"no best quintic was found on [{lower:g}, {upper:g}]; make lower a larger share of upper, such as 1e-6 of it."
    )


def minimax_table(
    lower: float | int, *, steps: int, safety: float | int = 1.0, cushion: float | int = _CUSHION
) -> list[Triple]:
    r"""The ``steps`` quintics whose composition brings all of ``[lower, 1]`` closest to 1.

    Each row is the best for the interval that the rows before it leave; that greedy choice is optimal for the whole
    composition. A row that maps ``[l, u]`` into ``[1 - E, 1 + E]`` hands ``l = 1 - E``, ``u = 1 + E`` on.

    Args:
        lower: Smallest singular value relative to the bound on the largest, in ``(0, 1]``.
        steps: Rows, ``>= 1``.
        safety: All rows but the last are evaluated at ``s / safety``, so that rounding that lifts a singular value
            above the interval does no harm; ``>= 1``; default 1. Tables in use have 1.01 or 1.02 for bfloat16.
        cushion: A row is fitted no further down than this share of its upper end and then centred again, in
            ``[0, 1)``; default 0.024, as published. Without it the first rows dip close to 0 inside their interval.

    Returns:
        ``steps`` triples ``(a, b, c)``, for ``coefficients=`` of ``orthogonalize``.

    Raises:
        OptionError: An option is out of range; see :func:`minimax_quintic` for ``lower``.

    Example:
        >>> low, high = landing_interval(minimax_table(1e-3, steps=7), 1e-3)
        >>> bool(1 - 1e-6 < low <= high < 1 + 1e-6)
        True

    Numerics:
        float64. With ``cushion`` 0 and ``safety`` 1 the composition is the best there is. Its last interval closes
        with the third power of the one before.

    References:
        As :func:`minimax_quintic`; algorithm 2 there for the composition, section 4.4 for cushion and safety.
    """
    if not 0 < lower <= 1 or steps < 1:
        raise OptionError(f"need 0 < lower <= 1 and steps >= 1; got lower={lower}, steps={steps}.")
    if not safety >= 1 or not 0 <= cushion < 1:
        raise OptionError(f"need safety >= 1 and 0 <= cushion < 1; got safety={safety}, cushion={cushion}.")
    rows: list[Triple] = []
    low, high = float(lower), 1.0
    for i in range(steps):
        row, _ = minimax_quintic(max(low, cushion * high), high)
        if low < cushion * high:
            # Centred for the shorter interval; the same row serves [low, high] best when both ends miss 1 by as much.
            row = _scaled(row, 2 / (_value(row, low) + _value(row, high)))
        if i < steps - 1:
            row = (row[0] / safety, row[1] / safety**3, row[2] / safety**5)
        rows.append(row)
        low = min(_value(row, low), 1.0)  # rounding may leave the last interval the wrong way round
        high = 2 - low
    return rows


def landing_interval(
    table: Sequence[Sequence[float]], lower: float | int, *, upper: float | int = 1.0
) -> tuple[float, float]:
    r"""Where a table sends the singular values of an interval: the exact range of its composition.

    The image of an interval under one row is an interval again, with its ends at ends or extrema.

    Args:
        table: Triples ``(a, b, c)``, such as those of :func:`coefficient_table`.
        lower: Smallest singular value, ``>= 0``.
        upper: Largest, ``>= lower``; default 1.

    Returns:
        ``(smallest, largest)`` value of the composition on the interval.

    Raises:
        OptionError: Not ``0 <= lower <= upper``.

    Example:
        >>> landing_interval([(1.5, -0.5, 0.0)], 0.0)
        (0.0, 1.0)

    Numerics:
        Python floats; the ends are right to a few units of rounding.
    """
    if not 0 <= lower <= upper < math.inf:
        raise OptionError(f"need 0 <= lower <= upper; got lower={lower}, upper={upper}.")
    low, high = float(lower), float(upper)
    for row in table:
        a, b, c = (float(x) for x in row)
        turning = [math.sqrt(y) for y in _square_roots(5 * c, 3 * b, a) if y > 0]
        # A composition may overshoot into the negative, where an odd polynomial has the same extrema mirrored.
        inside = [s for root in turning for s in (-root, root) if low < s < high]
        values = [_value((a, b, c), s) for s in (low, *inside, high)]
        low, high = min(values), max(values)
    return low, high


def _value(row: Triple, s: float) -> float:
    a, b, c = row
    return s * (a + s * s * (b + s * s * c))


def _scaled(row: Triple, factor: float) -> Triple:
    a, b, c = row
    return (a * factor, b * factor, c * factor)


def _square_roots(a: float, b: float, c: float) -> list[float]:
    """Real roots of ``a y^2 + b y + c``, without the cancellation that a tiny ``a`` brings to the textbook formula."""
    discriminant = b * b - 4 * a * c
    if discriminant < 0:
        return []
    q = -(b + math.copysign(math.sqrt(discriminant), b)) / 2
    return [x / y for x, y in ((q, a), (c, q)) if y and math.isfinite(x / y)]
