r"""Maps from skew to (nearly) orthogonal matrices, each with its exact error law.

A skew matrix is normal, with eigenvalues ``+- i theta``; every map here is a function ``f`` of it, so in each plane the
singular value of the result is ``|f(i theta)|``, exactly. :func:`singular_value_bounds` turns that into numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._check import check_finite, check_square, working_dtype

__all__ = [
    "MAPS",
    "cayley",
    "cayley_neumann",
    "exp",
    "exp_taylor",
    "inverse_cayley",
    "matrix_polynomial",
    "polish_orthogonal",
    "singular_value_bounds",
]

MAPS = ("cayley", "cayley_neumann", "exp", "exp_taylor")


def cayley(Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    r"""The Cayley transform ``(I + Q)(I - Q)^{-1}``: orthogonal to rounding, for any skew ``Q``.

    An eigenvalue ``i theta`` of ``Q`` becomes a rotation by ``2 arctan(theta)``; half a turn is never reached.

    Args:
        Q: Skew matrix or batch, shape ``(..., b, b)``.

    Returns:
        Orthogonal with determinant 1; shape and dtype of ``Q``.

    Raises:
        ShapeError: ``Q`` is not square.
        NonFiniteError: ``Q`` holds a NaN or an infinity.

    Example:
        >>> R = cayley(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))  # theta = 1: a quarter turn
        >>> R.round().tolist()
        [[0.0, 1.0], [-1.0, 0.0]]

    Numerics:
        One LU solve in at least float32. ``I - Q`` has no singular value below 1, so the solve is well conditioned
        whatever the size of the angles up to ``theta`` about ``1 / eps``.

    References:
        A. Cayley (1846).
    """
    check_square(Q, name="Q")
    check_finite(Q, name="Q")
    work = Q.to(working_dtype(Q))
    eye = torch.eye(Q.shape[-1], dtype=work.dtype, device=Q.device)
    # I + Q and (I - Q)^{-1} commute, so solving from the left is the same matrix.
    return torch.linalg.solve(eye - work, eye + work).to(Q.dtype)


def inverse_cayley(R: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    r"""The skew ``Q`` with ``cayley(Q) = R``: ``(R + I)^{-1} (R - I)``.

    Args:
        R: Orthogonal matrix or batch without eigenvalue -1, shape ``(..., b, b)``.

    Returns:
        Shape and dtype of ``R``.

    Raises:
        ShapeError: ``R`` is not square.
        OptionError: ``R`` has an eigenvalue -1 to rounding: a half turn or a reflection is no Cayley transform.
        NonFiniteError: ``R`` holds a NaN or an infinity.

    Example:
        >>> Q = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])
        >>> torch.allclose(inverse_cayley(cayley(Q)), Q, atol=1e-6)
        True

    Numerics:
        One LU solve in at least float32; the error grows like ``theta^2`` near a half turn.
    """
    check_square(R, name="R")
    check_finite(R, name="R")
    work = R.to(working_dtype(R))
    eye = torch.eye(R.shape[-1], dtype=work.dtype, device=R.device)
    found, info = torch.linalg.solve_ex(work + eye, work - eye)
    # The generator of a turn by theta is tan(theta / 2): where R + I is singular to rounding it says so itself, and an
    # SVD for that would take several times as long as the solve.
    size = torch.linalg.vector_norm(found, dim=(-2, -1)) if R.numel() else torch.zeros(())
    if bool((info != 0).any()) or not bool((size < 0.1 / torch.finfo(work.dtype).eps).all()):
        raise OptionError("R must have no eigenvalue -1; a half turn or a reflection is no Cayley transform.")
    return found.to(R.dtype)


def _neumann_coefficients(terms: int) -> list[float]:
    return [1.0] + [2.0] * terms + [1.0]


def _taylor_coefficients(order: int) -> list[float]:
    return [1 / math.factorial(i) for i in range(order + 1)]


def cayley_neumann(Q: Float[Tensor, "*batch b b"], *, terms: int = 4) -> Float[Tensor, "*batch b b"]:
    r"""The Cayley transform by a truncated series: ``(I + Q) (I + Q + ... + Q^k)``, without a solve.

    It equals ``cayley(Q) (I - Q^{k+1})``, so its distance from the exact transform is ``||Q||_2^{k+1}`` exactly. Even
    ``k`` is far closer to orthogonal than the next odd one: singular values ``sqrt(1 + theta^{2k+2})`` against
    ``1 +- theta^{k+1}``.

    Args:
        Q: Skew matrix or batch, shape ``(..., b, b)``.
        terms: ``k``, the highest power in the sum, ``>= 1``; default 4. Published codes take 3.

    Returns:
        Shape and dtype of ``Q``.

    Raises:
        ShapeError: ``Q`` is not square.
        OptionError: ``terms`` is below 1.

    Example:
        >>> Q = 0.1 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> float(torch.linalg.matrix_norm(cayley_neumann(Q, terms=3) - cayley(Q), 2)) < 1.01e-4
        True

    Numerics:
        Two products for ``k`` = 2 and 3, three for 4 and 5; see :func:`matrix_polynomial`. In the dtype of ``Q``.

    References:
        Z. Qiu et al. (2025), Reparameterized LLM training via orthogonal equivalence transformation, arXiv 2506.08001.
        The parity law is ours.
    """
    if terms < 1:
        raise OptionError(f"terms must be at least 1; got {terms}.")
    return matrix_polynomial(_neumann_coefficients(terms), Q)


def exp_taylor(A: Float[Tensor, "*batch b b"], *, order: int = 2) -> Float[Tensor, "*batch b b"]:
    r"""The exponential cut after ``order`` terms: ``I + A + A^2/2 + ... + A^p/p!``.

    For ``p = 2`` and skew ``A``: ``E^T E = I + A^4 / 4``, a growth of every plane by about ``theta^4 / 8``.

    Args:
        A: Skew matrix or batch, shape ``(..., b, b)``.
        order: ``p >= 1``; default 2.

    Returns:
        Shape and dtype of ``A``.

    Raises:
        ShapeError: ``A`` is not square.
        OptionError: ``order`` is below 1.

    Example:
        >>> A = 0.2 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        >>> E = exp_taylor(A, order=2)
        >>> torch.allclose(E.mT @ E, torch.eye(2).double() + A @ A @ A @ A / 4)
        True

    Numerics:
        One product for ``p = 2``, two for 3 and 4; in the dtype of ``A``.
    """
    if order < 1:
        raise OptionError(f"order must be at least 1; got {order}.")
    return matrix_polynomial(_taylor_coefficients(order), A)


def exp(A: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    r"""The matrix exponential: orthogonal to rounding for skew ``A``, rotating each plane by ``theta``.

    Args:
        A: Skew matrix or batch, shape ``(..., b, b)``.

    Returns:
        Shape and dtype of ``A``.

    Raises:
        ShapeError: ``A`` is not square.
        NonFiniteError: ``A`` holds a NaN or an infinity.

    Example:
        >>> A = torch.pi / 2 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> exp(A).round().abs().tolist()
        [[0.0, 1.0], [1.0, 0.0]]

    Numerics:
        Scaling and squaring in at least float32.
    """
    check_square(A, name="A")
    check_finite(A, name="A")
    return torch.linalg.matrix_exp(A.to(working_dtype(A))).to(A.dtype)


def matrix_polynomial(coefficients: Sequence[float], X: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    r"""``c_0 I + c_1 X + ... + c_d X^d`` with about ``2 sqrt(d)`` products instead of ``d - 1``.

    Powers up to ``X^s`` are made once; the polynomial is then a polynomial in ``X^s`` whose coefficients are
    combinations of them, evaluated by Horner's rule.

    Args:
        coefficients: ``c_0 ... c_d``, at least one.
        X: Square matrix or batch, shape ``(..., b, b)``.

    Returns:
        Shape and dtype of ``X``.

    Raises:
        ShapeError: ``X`` is not square.
        OptionError: No coefficient.

    Example:
        >>> matrix_polynomial([1.0, 0.0, 1.0], torch.full((1, 1), 3.0)).item()
        10.0

    References:
        M. Paterson, L. Stockmeyer (1973), On the number of nonscalar multiplications necessary to evaluate polynomials.
    """
    check_square(X, name="X")
    if not coefficients:
        raise OptionError("a polynomial needs at least one coefficient.")
    degree = len(coefficients) - 1
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    s = min(range(1, max(degree, 1) + 1), key=lambda size: _products(degree, size))
    powers = [eye.expand_as(X), X]
    while len(powers) <= min(s, degree):
        powers.append(powers[-1] @ X)
    result = None
    for start in range(degree - degree % s, -1, -s):
        block = coefficients[start] * powers[0]
        for power, c in zip(powers[1:], coefficients[start + 1 : start + s], strict=False):
            block = block + c * power
        if result is None:
            # A leading block of one coefficient is a multiple of I: Horner's first product is a scaling.
            result, scalar = block, coefficients[start] if start == degree else None
        else:
            result = block + (powers[s] * scalar if scalar is not None else result @ powers[s])
            scalar = None
    return result  # type: ignore[return-value]


def _products(degree: int, size: int) -> int:
    blocks = degree // size
    return (min(size, degree) - 1) + blocks - (1 if blocks and degree % size == 0 else 0)


def polish_orthogonal(X: Float[Tensor, "*batch m n"], *, steps: int = 1) -> Float[Tensor, "*batch m n"]:
    r"""A nearly orthogonal matrix made more so: ``X <- X (3 I - X^T X) / 2``, which squares the error each time.

    Args:
        X: Matrix or batch with singular values in (0, sqrt(3)), shape ``(..., m, n)``.
        steps: ``>= 0``; default 1.

    Returns:
        Shape and dtype of ``X``.

    Raises:
        OptionError: ``steps`` is negative.

    Example:
        >>> X = torch.diag(torch.tensor([1.01, 0.99], dtype=torch.float64))
        >>> float((polish_orthogonal(X) - torch.eye(2)).abs().max()) < 1.6e-4
        True

    Numerics:
        Two products a step on the shorter side, in the dtype of ``X``. An error ``e`` of a singular value becomes
        ``1.5 e^2``.
    """
    if steps < 0:
        raise OptionError(f"steps must be at least 0; got {steps}.")
    for _ in range(steps):
        X = 1.5 * X - 0.5 * (X @ (X.mT @ X) if X.shape[-2] >= X.shape[-1] else (X @ X.mT) @ X)
    return X


def singular_value_bounds(
    map: str, theta: float, *, terms: int | None = None, order: int | None = None
) -> tuple[float, float]:
    r"""The smallest and largest singular value that a map can give a skew matrix of spectral norm up to ``theta``.

    Exact: the extremes of ``|f(i t)|`` over ``0 <= t <= theta``, found at the ends and at the real roots of the
    derivative of the polynomial ``|f(i t)|^2``.

    Args:
        map: ``"cayley"``, ``"exp"`` (both exactly orthogonal), ``"cayley_neumann"`` or ``"exp_taylor"``.
        theta: Largest angle of the generator in radians, ``>= 0``.
        terms: ``k`` of ``"cayley_neumann"``, which needs it.
        order: ``p`` of ``"exp_taylor"``, which needs it.

    Returns:
        ``(low, high)``.

    Raises:
        UnknownNameError: No such map.
        OptionError: ``theta`` is negative, or the map's length is missing.

    Example:
        >>> singular_value_bounds("cayley_neumann", 0.5, terms=3)  # 1 - theta^4
        (0.9375, 1.0)
        >>> round(singular_value_bounds("exp_taylor", 0.5, order=2)[1], 6)  # sqrt(1 + theta^4 / 4)
        1.007782
    """
    if map not in MAPS:
        raise unknown_name("map", map, MAPS)
    if not theta >= 0:
        raise OptionError(f"theta must be at least 0; got {theta}.")
    if map in ("cayley", "exp"):
        return 1.0, 1.0
    length = terms if map == "cayley_neumann" else order
    if length is None or length < 1:
        option = "terms" if map == "cayley_neumann" else "order"
        raise OptionError(f"{map} needs {option}= of at least 1; got {length}.")
    coefficients = _neumann_coefficients(length) if map == "cayley_neumann" else _taylor_coefficients(length)
    squared = _squared_modulus(coefficients)
    points = [0.0, float(theta), *(t for t in _critical_points(squared) if 0 < t < theta)]
    values = [math.sqrt(max(0.0, sum(c * t**i for i, c in enumerate(squared)))) for t in points]
    return min(values), max(values)


def _squared_modulus(coefficients: Sequence[float]) -> list[float]:
    """Coefficients in ``t`` of ``|sum_j c_j (i t)^j|^2``, cancelled exactly where powers cancel."""
    real, imaginary = [0.0] * len(coefficients), [0.0] * len(coefficients)
    for j, c in enumerate(coefficients):
        (real if j % 2 == 0 else imaginary)[j] = c if j % 4 < 2 else -c
    squared = [0.0] * (2 * len(coefficients) - 1)
    for part in (real, imaginary):
        for i, a in enumerate(part):
            for j, b in enumerate(part):
                squared[i + j] += a * b
    return squared


def _critical_points(polynomial: Sequence[float]) -> list[float]:
    """Real roots of the derivative, by the eigenvalues of its companion matrix."""
    slope = [i * c for i, c in enumerate(polynomial)][1:]
    while slope and abs(slope[-1]) < 1e-300:
        slope.pop()
    if len(slope) < 2:
        return []
    n = len(slope) - 1
    companion = torch.zeros(n, n, dtype=torch.float64)
    companion[1:, :-1] = torch.eye(n - 1, dtype=torch.float64)
    companion[:, -1] = -torch.tensor(slope[:-1], dtype=torch.float64) / slope[-1]
    roots = torch.linalg.eigvals(companion)
    # A generous threshold: a point that is no extremum only adds a value between the true extremes.
    return [float(r.real) for r in roots if abs(float(r.imag)) < 1e-3]
