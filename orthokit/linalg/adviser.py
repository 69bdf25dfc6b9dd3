"""The adviser: which map keeps singular values within a tolerance with the fewest matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg.laws import map_length, polished_bounds
from orthokit.linalg.maps import (
    _products,
    cayley,
    cayley_neumann,
    exp,
    exp_taylor,
    polish_orthogonal,
    singular_value_bounds,
)

__all__ = ["MapChoice", "map_products", "recommended_map"]

# No series worth its products is longer: six products reach degree 16.
_MOST_TERMS = 16


def map_products(map: str, *, terms: int | None = None, order: int | None = None, polish: int = 0) -> int | None:
    """The matrix products that a map and its polish steps take; None for the exact maps, which need more than products.

    Args:
        map: One of ``MAPS``.
        terms: ``k`` of ``"cayley_neumann"``.
        order: ``p`` of ``"exp_taylor"``.
        polish: Polish steps, two products each.

    Returns:
        The number of ``b x b`` products, or None.

    Raises:
        UnknownNameError: No such map.
        OptionError: The map's length is missing.

    Example:
        >>> [map_products("cayley_neumann", terms=k) for k in (1, 2, 3, 4, 5, 8)]
        [1, 2, 2, 3, 3, 4]
    """
    length = map_length(map, terms, order)
    if map in ("cayley", "exp"):
        return None
    degree = length + 1 if map == "cayley_neumann" else length
    return min(_products(degree, size) for size in range(1, degree + 1)) + 2 * polish


def recommended_map(
    theta: float, *, tolerance: float = 1e-3, family: Literal["cayley", "exp"] = "cayley", most_products: int = 6
) -> MapChoice:
    """The adviser: the map with the fewest matrix products that keeps singular values within the tolerance.

    Of maps with equally many products it takes the most accurate one. If none with ``most_products`` or fewer will do,
    it names the exact map of the family.

    Args:
        theta: Largest angle of the generator in radians, ``||Q||_2 >= 0``.
        tolerance: Largest allowed distance of a singular value from 1, ``> 0``; default 1e-3.
        family: ``"cayley"`` (a plane turns by ``2 arctan(theta)``) or ``"exp"`` (by ``theta``); default ``"cayley"``.
        most_products: Products beyond which a solve is preferred, ``>= 1``; default 6.

    Returns:
        The choice: ``.map``, ``.terms``, ``.order``, ``.polish``, ``.products``, ``.bounds``; ``.apply(Q)`` applies it.

    Raises:
        UnknownNameError: No such family.
        OptionError: A value out of range.

    Example:
        >>> print(recommended_map(0.3))
        cayley_neumann, terms=2 (2 products), singular values in [1, 1.00036]
        >>> recommended_map(0.3, tolerance=1e-5).terms, recommended_map(2.0).map
        (4, 'cayley')

    Numerics:
        Exact bounds, in float64: rounding of the products themselves is not counted.
    """
    if family not in ("cayley", "exp"):
        raise unknown_name("family", family, ("cayley", "exp"))
    if not (tolerance > 0 and most_products >= 1):
        raise OptionError(f"need tolerance > 0, most_products >= 1; got {tolerance=}, {most_products=}.")
    series = "cayley_neumann" if family == "cayley" else "exp_taylor"
    found = []
    for length in range(1, _MOST_TERMS + 1):
        options = {"terms": length} if family == "cayley" else {"order": length}
        for polish in range(most_products // 2 + 1):
            products = map_products(series, polish=polish, **options) or 0
            if products <= most_products:
                bounds = polished_bounds(series, theta, polish=polish, **options)
                found.append(MapChoice(map=series, polish=polish, products=products, bounds=bounds, **options))
    fitting = [choice for choice in found if choice.error <= tolerance]
    exact = MapChoice(map=family, polish=0, products=None, bounds=singular_value_bounds(family, theta))
    return min(fitting, key=lambda c: (c.products, c.error), default=exact)


@dataclass(frozen=True)
class MapChoice:
    """A map with its length and polish steps, what it costs and what it guarantees.

    Attributes:
        map: One of ``MAPS``.
        terms: ``k``, for ``"cayley_neumann"``.
        order: ``p``, for ``"exp_taylor"``.
        polish: Polish steps after the map.
        products: Matrix products in all; None for an exact map.
        bounds: Smallest and largest singular value it can give, for the angle it was chosen for.
    """

    map: str
    polish: int
    products: int | None
    bounds: tuple[float, float]
    terms: int | None = None
    order: int | None = None

    @property
    def error(self) -> float:
        """The largest distance of a singular value from 1."""
        return max(1 - self.bounds[0], self.bounds[1] - 1)

    def apply(self, Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
        """The map of ``Q``, polished."""
        if self.map == "cayley_neumann":
            R = cayley_neumann(Q, terms=self.terms or 1)
        elif self.map == "exp_taylor":
            R = exp_taylor(Q, order=self.order or 1)
        else:
            R = cayley(Q) if self.map == "cayley" else exp(Q)
        return polish_orthogonal(R, steps=self.polish)

    def __str__(self) -> str:
        """One line: map, length, cost and bounds."""
        length = f", terms={self.terms}" if self.terms else f", order={self.order}" if self.order else ""
        polish = f", polish={self.polish}" if self.polish else ""
        cost = "exact, one solve" if self.map == "cayley" else "exact"
        cost = cost if self.products is None else f"{self.products} product{'s' * (self.products != 1)}"
        return f"{self.map}{length}{polish} ({cost}), singular values in [{self.bounds[0]:.6g}, {self.bounds[1]:.6g}]"
