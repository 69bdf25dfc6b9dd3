r"""What the maps do to singular values, predicted: per plane, and per merge.

A map ``f`` of a skew matrix turns a plane of angle ``theta`` into one with singular value ``|f(i theta)|``. Generators
with independent Gaussian entries have known angles, so the expected drift of a spectrum is an integral.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._angles import finite_angles, semicircle_angles
from orthokit.linalg._check import check_finite, check_matrix, working_dtype
from orthokit.linalg.maps import MAPS, _taylor_coefficients, singular_value_bounds

__all__ = [
    "METHODS_OF_DRIFT",
    "expected_generator_norm",
    "expected_log_drift",
    "leading_law",
    "map_length",
    "orthogonality_error",
    "plane_singular_values",
    "polished_bounds",
]

METHODS_OF_DRIFT = ("finite", "semicircle", "leading")


def plane_singular_values(
    map: str,
    theta: Float[Tensor, "*angles"],
    *,
    terms: int | None = None,
    order: int | None = None,
    polish: int = 0,
) -> Float[Tensor, "*angles"]:
    r"""The singular value that a map gives each plane: ``|f(i theta)|``, exactly.

    ===================  =====================================================================
    map                  singular value
    ===================  =====================================================================
    ``cayley``, ``exp``  1
    ``cayley_neumann``   ``|1 - (i theta)^{k+1}|``: ``sqrt(1 + theta^{2k+2})`` for even ``k``,
                         ``1 + theta^{k+1}`` for k = 1, 5 ..., ``|1 - theta^{k+1}|`` for k = 3, 7 ...
    ``exp_taylor``       ``|sum_{j <= p} (i theta)^j / j!|``
    ===================  =====================================================================

    Each polish step then takes ``s`` to ``|s (3 - s^2) / 2|``.

    Args:
        map: One of ``MAPS``.
        theta: Angles in radians, any shape.
        terms: ``k`` of ``"cayley_neumann"``, which needs it.
        order: ``p`` of ``"exp_taylor"``, which needs it.
        polish: Number of polish steps, ``>= 0``; default 0.

    Returns:
        Shape and dtype of ``theta``.

    Raises:
        UnknownNameError: No such map.
        OptionError: The map's length is missing or below 1, or ``polish`` is negative.

    Example:
        >>> plane_singular_values("cayley_neumann", torch.tensor([0.5, 1.0]), terms=3).tolist()
        [0.9375, 0.0]

    Numerics:
        In at least float64; the closed form of the series, so small errors are not lost in a sum.
    """
    length = map_length(map, terms, order)
    t = theta.double()
    if map in ("cayley", "exp"):
        s = torch.ones_like(t)
    elif map == "cayley_neumann":
        power = t.abs() ** (length + 1)
        s = torch.sqrt(1 + power**2) if length % 2 == 0 else (1 - _sign(length + 1) * power).abs()
    else:
        real, imaginary = torch.zeros_like(t), torch.zeros_like(t)
        for j, c in enumerate(_taylor_coefficients(length)):
            part = (c if j % 4 < 2 else -c) * t**j
            real, imaginary = (real + part, imaginary) if j % 2 == 0 else (real, imaginary + part)
        s = torch.hypot(real, imaginary)
    if polish < 0:
        raise OptionError(f"polish must be at least 0; got {polish}.")
    for _ in range(polish):
        s = (1.5 * s - 0.5 * s**3).abs()
    return s.to(theta.dtype)


def polished_bounds(
    map: str, theta: float, *, terms: int | None = None, order: int | None = None, polish: int = 1
) -> tuple[float, float]:
    r"""The smallest and largest singular value after a map and polish steps, for angles up to ``theta``.

    The singular values of the map fill the interval of :func:`singular_value_bounds`, and a polish step takes ``s``
    to ``g(s) = |s (3 - s^2) / 2|``, with ``g(1) = 1`` its only maximum below ``sqrt(3)`` and ``g(sqrt(3)) = 0``.

    Args:
        map: One of ``MAPS``.
        theta: Largest angle in radians, ``>= 0``.
        terms: ``k`` of ``"cayley_neumann"``.
        order: ``p`` of ``"exp_taylor"``.
        polish: Number of polish steps, ``>= 0``; default 1.

    Returns:
        ``(low, high)``, exact.

    Raises:
        UnknownNameError: No such map.
        OptionError: ``theta`` or ``polish`` is negative, or the map's length is missing.

    Example:
        >>> low, high = polished_bounds("exp_taylor", 0.5, order=2)  # 1 - 1.5 (theta^4 / 8)^2 = 0.999908
        >>> round(low, 4), high
        (0.9999, 1.0)
    """
    if polish < 0:
        raise OptionError(f"polish must be at least 0; got {polish}.")
    low, high = singular_value_bounds(map, theta, terms=terms, order=order)
    for _ in range(polish):
        inside = [extreme for at, extreme in ((1.0, 1.0), (math.sqrt(3), 0.0)) if low <= at <= high]
        values = [*(abs(1.5 * s - 0.5 * s**3) for s in (low, high)), *inside]
        low, high = min(values), max(values)
    return low, high


def expected_generator_norm(std: float, block_size: int) -> float:
    r"""The spectral norm of a skew matrix with independent entries, ``2 s sqrt(b)``: the edge of the semicircle.

    Args:
        std: Standard deviation ``s`` of the packed entries, ``>= 0``.
        block_size: ``b >= 1``.

    Returns:
        The largest angle to expect, in radians.

    Raises:
        OptionError: A value out of range.

    Example:
        >>> round(expected_generator_norm(0.01, 256), 4)
        0.32

    Numerics:
        The limit of large ``b``. The mean norm lies below it, by about 10 % at ``b = 32`` and 2 % at 256; the largest
        of many blocks lies about at it.

    References:
        E. Wigner (1958), On the distribution of the roots of certain symmetric matrices.
    """
    _check_entries(std, block_size)
    return 2 * std * math.sqrt(block_size)


def orthogonality_error(X: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch"]:
    r"""How far a matrix is from orthogonal: ``||X^T X - I||_2``, or ``||X X^T - I||_2`` if it is wide.

    The largest ``|s^2 - 1|`` over the singular values ``s`` of ``X``.

    Args:
        X: Matrix or batch, shape ``(..., m, n)``.

    Returns:
        Shape ``(...)``, in at least float32.

    Raises:
        ShapeError: Fewer than two dimensions.
        NonFiniteError: ``X`` holds a NaN or an infinity.

    Example:
        >>> orthogonality_error(torch.diag(torch.tensor([1.0, 0.5]))).item()
        0.75

    Numerics:
        Eigenvalues of the difference, so that an error far below 1 keeps its digits; ``O(m n min(m, n))``.
    """
    check_matrix(X, name="X")
    check_finite(X, name="X")
    X = X.to(working_dtype(X))
    gram = X.mT @ X if X.shape[-2] >= X.shape[-1] else X @ X.mT
    gram = gram - torch.eye(gram.shape[-1], dtype=X.dtype, device=X.device)
    values = torch.linalg.eigvalsh(gram).abs()
    return values.amax(-1) if values.shape[-1] else values.sum(-1)


def leading_law(map: str, *, terms: int | None = None, order: int | None = None) -> tuple[float, int]:
    r"""The first term of the logarithm of a singular value: ``log s = c theta^q + ...``.

    Args:
        map: ``"cayley_neumann"`` or ``"exp_taylor"``, or an exact map, whose ``c`` is 0.
        terms: ``k`` of ``"cayley_neumann"``.
        order: ``p`` of ``"exp_taylor"``.

    Returns:
        ``(c, q)``; ``c > 0`` means that the map grows, ``c < 0`` that it shrinks.

    Raises:
        UnknownNameError: No such map.
        OptionError: The map's length is missing.

    Example:
        >>> leading_law("cayley_neumann", terms=2), leading_law("cayley_neumann", terms=3)
        ((0.5, 6), (-1.0, 4))
        >>> leading_law("exp_taylor", order=2)  # theta^4 / 8
        (0.125, 4)
    """
    length = map_length(map, terms, order)
    if map in ("cayley", "exp"):
        return 0.0, 0
    if map == "cayley_neumann":
        return (0.5, 2 * length + 2) if length % 2 == 0 else (-float(_sign(length + 1)), length + 1)
    # From exp(-i theta) E_p(i theta) = 1 - exp(-i theta) sum_{j > p} (i theta)^j / j!, its first real term.
    if length % 2:
        return -_sign(length + 1) / math.factorial(length + 1), length + 1
    return _sign(length + 2) / (math.factorial(length) * (length + 2)), length + 2


def expected_log_drift(
    map: str,
    std: float,
    block_size: int,
    *,
    terms: int | None = None,
    order: int | None = None,
    polish: int = 0,
    method: Literal["finite", "semicircle", "leading"] = "finite",
) -> float:
    r"""The mean change of the logarithm of a singular value in one merge of one side, for random generators.

    For packed entries that are independent normal numbers of standard deviation ``s``,
    ``E (1/b) sum_j log |f(i theta_j)|`` over the angles of a ``b x b`` generator. ``n`` merges of both sides change
    the geometric mean of a weight's singular values by ``exp(2 n d) - 1``.

    Args:
        map: One of ``MAPS``.
        std: ``s >= 0``, in radians.
        block_size: ``b >= 1``.
        terms: ``k`` of ``"cayley_neumann"``.
        order: ``p`` of ``"exp_taylor"``.
        polish: Polish steps after the map, ``>= 0``; default 0.
        method: ``"finite"`` (default) integrates over the exact density of the angles for this ``b``;
            ``"semicircle"`` over its limit for large ``b``; ``"leading"`` takes the first term of the logarithm and
            Catalan moments, ``c Cat_{q/2} (s^2 b)^{q/2}``.

    Returns:
        ``d``, the drift per merge and side, a pure number.

    Raises:
        UnknownNameError: No such map or method.
        OptionError: A value out of range; ``"leading"`` together with ``polish``.

    Example:
        >>> leading = expected_log_drift("cayley_neumann", 0.03, 32, terms=3, method="leading")
        >>> abs(leading + 2 * 0.03**4 * 32**2) < 1e-12
        True
        >>> round(math.expm1(2 * 200 * leading), 2)  # two sides, 200 merges
        -0.48

    Numerics:
        Gauss-Legendre quadrature in float64. Where a map is singular inside the range of angles (``k = 3`` at 1) the
        integrand has a logarithmic pole, integrable, and the result is good to about 1e-3 of itself.

    References:
        M. L. Mehta (2004), Random matrices, 3rd edition, chapter 13 (antisymmetric Hermitian matrices).
        The laws for these maps are ours.
    """
    if method not in METHODS_OF_DRIFT:
        raise unknown_name("method", method, METHODS_OF_DRIFT)
    _check_entries(std, block_size)
    options = {"terms": terms, "order": order}
    if method == "leading":
        if polish:
            raise OptionError("the leading law has no polish; use method='finite' or 'semicircle'.")
        c, q = leading_law(map, **options)
        half = q // 2
        return c * math.comb(2 * half, half) / (half + 1) * (std * std * block_size) ** half
    theta, weights = finite_angles(block_size) if method == "finite" else semicircle_angles(block_size)
    s = plane_singular_values(map, std * theta, polish=polish, **options)
    return float((weights * torch.log(s.clamp_min(1e-300))).sum())


def _sign(even: int) -> int:
    """``i^even``, which is ``+-1``."""
    return 1 if even % 4 == 0 else -1


def map_length(map: str, terms: int | None, order: int | None) -> int:
    """The length of a series, ``k`` or ``p``, checked; 0 for the exact maps."""
    if map not in MAPS:
        raise unknown_name("map", map, MAPS)
    if map in ("cayley", "exp"):
        return 0
    name, length = ("terms", terms) if map == "cayley_neumann" else ("order", order)
    if length is None or length < 1:
        raise OptionError(f"{map} needs {name}= of at least 1; got {length}.")
    return length


def _check_entries(std: float, block_size: int) -> None:
    if not (std >= 0 and math.isfinite(std)) or block_size < 1:
        raise OptionError(f"need a finite std >= 0 and block_size >= 1; got std={std}, block_size={block_size}.")
