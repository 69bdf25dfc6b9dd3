r"""The rotation of a Pion step: a polynomial of the generator, applied to the weights without being formed.

``W f(s A) = W + s D (c_1 + c_2 s A + c_3 (s A)^2 + ...)`` with ``D = W A`` costs one product a term. For skew ``A``
every ``f`` here is orthogonal up to a power of the largest angle; ``linalg.maps`` and ``linalg.laws`` hold the laws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from orthokit.errors import OptionError, unknown_name

__all__ = ["PION_MAPS", "cayley_change", "check_map", "gram_coefficients", "map_coefficients"]

PION_MAPS = ("exp_taylor", "cayley_neumann", "cayley")
_MOST_POLISH = 2


def check_map(map: str, order: int, polish: int) -> None:
    """Raise unless the three make a map."""
    if map not in PION_MAPS:
        raise unknown_name("map", map, PION_MAPS)
    if not order >= 1:
        raise OptionError(f"exp_order must be at least 1; got {order}.")
    if not 0 <= polish <= _MOST_POLISH:
        raise OptionError(f"polish must be 0 to {_MOST_POLISH}, since each triples the products; got {polish}.")
    if polish and map == "cayley":
        raise OptionError('polish has nothing to repair after map="cayley"; leave it at 0.')


@functools.lru_cache(maxsize=64)
def map_coefficients(map: str, order: int, polish: int) -> tuple[float, ...]:
    r"""``(c_0, c_1, ...)`` of the map as a polynomial of the generator; ``c_0 = c_1 = 1``.

    ``"exp_taylor"``: ``1 / k!`` up to ``order``. ``"cayley_neumann"``: the series of ``linalg.cayley_neumann`` with
    ``order`` terms at half the generator, which turns by the same angle. Each polish replaces ``f`` by
    ``f (3 - f^* f) / 2`` with ``f^*(x) = f(-x)``: the Newton-Schulz step on the factor, multiplied out.

    Example:
        >>> map_coefficients("cayley_neumann", 2, 0)
        (1.0, 1.0, 0.5, 0.125)
    """
    if map == "exp_taylor":
        coefficients = [1 / math.factorial(k) for k in range(order + 1)]
    else:
        coefficients = [c / 2**k for k, c in enumerate([1.0] + [2.0] * order + [1.0])]
    for _ in range(polish):
        gram = gram_coefficients(coefficients)
        gram[0] -= 3.0
        coefficients = [-c / 2 for c in _multiply(coefficients, gram)]
    while len(coefficients) > 2 and coefficients[-1] == 0:
        coefficients.pop()
    return tuple(coefficients)


def gram_coefficients(coefficients: Sequence[float]) -> list[float]:
    """The coefficients of ``f(-x) f(x)``: of ``f(A)^T f(A)`` for skew ``A``, which is the identity up to truncation."""
    return _multiply([c * (-1) ** k for k, c in enumerate(coefficients)], coefficients)


def _multiply(left: Sequence[float], right: Sequence[float]) -> list[float]:
    result = [0.0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            result[i + j] += a * b
    return result


def cayley_change(W: Tensor, Q: Tensor, side: str) -> Tensor:
    """``W C(Q) - W`` for the in-side, ``C(Q) W - W`` for the out-side, with the exact Cayley transform: one solve.

    With ``C(Q) = I + 2 Q (I - Q)^-1`` the solve is for the change alone, and so is its rounding. Solving for the turned
    weight would round the whole of it at every step.
    """
    eye = torch.eye(Q.shape[-1], dtype=W.dtype, device=W.device)
    return torch.linalg.solve(eye - Q, 2 * (W @ Q if side == "in" else Q @ W), left=side == "out")
