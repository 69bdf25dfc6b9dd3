"""Measurements of the maps from skew to orthogonal matrices, next to what their laws predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError
from orthokit.linalg import (
    cayley,
    cayley_neumann,
    exp_taylor,
    expected_log_drift,
    orthogonality_error,
    packed_size,
    plane_singular_values,
    polish_orthogonal,
    random_permutation,
    recommended_map,
    rotate_blocks,
    singular_values,
    unpack_skew,
)

__all__ = [
    "LiveErrors",
    "adviser_table",
    "apply_map",
    "error_curves",
    "live_drift",
    "live_errors",
    "parity_errors",
    "parse_map",
    "plane_curves",
    "planes_at_norms",
    "simulate_merges",
]


def parse_map(name: str) -> tuple[str, dict[str, Any], int]:
    """A map written as in a legend: ``"k = 3"``, ``"p = 2"``, ``"k = 2 + polish"`` or ``"exact"``.

    Args:
        name: ``k`` counts the terms of the Cayley-Neumann series, ``p`` those of the exponential.

    Returns:
        ``(map, options, polish)`` as :func:`orthokit.linalg.plane_singular_values` takes them.

    Raises:
        OptionError: The name is none of these.

    Example:
        >>> parse_map("k = 3"), parse_map("p = 2 + polish")
        (('cayley_neumann', {'terms': 3}, 0), ('exp_taylor', {'order': 2}, 1))
    """
    series, plus, polish = name.partition(" + ")
    letter, _, length = (part.strip() for part in series.partition("="))
    if name == "exact":
        return "cayley", {}, 0
    if letter not in ("k", "p") or not length.isdigit() or (plus and polish != "polish"):
        raise OptionError(f"a map is written 'k = 3', 'p = 2', 'k = 2 + polish' or 'exact'; got {name!r}.")
    kind, option = ("cayley_neumann", "terms") if letter == "k" else ("exp_taylor", "order")
    return kind, {option: int(length)}, int(bool(plus))


def apply_map(name: str, Q: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    """The map of that name applied to generators; see :func:`parse_map`.

    Args:
        name: ``"k = 3"`` and the like.
        Q: Skew matrix or batch.

    Returns:
        Shape and dtype of ``Q``.

    Raises:
        OptionError: No such map.

    Example:
        >>> apply_map("exact", torch.zeros(2, 2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    map, options, polish = parse_map(name)
    if map == "cayley":
        return cayley(Q)
    R = cayley_neumann(Q, **options) if map == "cayley_neumann" else exp_taylor(Q, **options)
    return polish_orthogonal(R, steps=polish)


@dataclass(frozen=True)
class LiveErrors:
    """Errors of several maps on the same generators.

    Attributes:
        angles: ``||Q||_2`` of each generator, shape ``(n,)``.
        measured: Map to ``||R^T R - I||_2`` of each, ``(n,)``.
        predicted: Map to the same by its law, from all angles of the generator.
    """

    angles: Tensor
    measured: dict[str, Tensor]
    predicted: dict[str, Tensor]

    @property
    def points(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Map to ``(angles, measured errors)``, as the figures take them."""
        return {name: (self.angles, errors) for name, errors in self.measured.items()}

    @property
    def worst_gap(self) -> float:
        """The largest difference between measured and predicted, relative to errors above 1 and absolute below."""
        gaps = [(self.measured[m] - p).abs() / p.clamp(min=1) for m, p in self.predicted.items()]
        return float(torch.stack(gaps).max())


def live_errors(Q: Float[Tensor, "n b b"], maps: Sequence[str]) -> LiveErrors:
    """The orthogonality error of maps on given generators, measured and by law.

    Args:
        Q: Generators, shape ``(n, b, b)``.
        maps: Names as :func:`parse_map` reads them.

    Returns:
        Angles, measured and predicted errors.

    Example:
        >>> found = live_errors(unpack_skew(torch.tensor([[0.3]], dtype=torch.float64)), ["k = 2"])
        >>> round(float(found.measured["k = 2"]), 6), found.worst_gap < 1e-14
        (0.000729, True)

    Numerics:
        float64 throughout.
    """
    Q = Q.double()
    angles = singular_values(Q)
    measured, predicted = {}, {}
    for name in maps:
        map, options, polish = parse_map(name)
        measured[name] = orthogonality_error(apply_map(name, Q))
        planes = plane_singular_values(map, angles, polish=polish, **options)
        predicted[name] = (planes.square() - 1).abs().amax(-1)
    return LiveErrors(angles[:, 0], measured, predicted)


def plane_curves(angles: Float[Tensor, " n"], maps: Sequence[str]) -> dict[str, Tensor]:
    """The singular value of a plane at each angle, by law, for maps by name.

    Args:
        angles: Radians.
        maps: Names as :func:`parse_map` reads them.

    Returns:
        Map to singular values, ``(n,)``.

    Example:
        >>> plane_curves(torch.tensor([1.0]), ["k = 3", "exact"])
        {'k = 3': tensor([0.]), 'exact': tensor([1.])}
    """
    parsed = {name: parse_map(name) for name in maps}
    return {name: plane_singular_values(m, angles, polish=j, **options) for name, (m, options, j) in parsed.items()}


def error_curves(angles: Float[Tensor, " n"], maps: Sequence[str]) -> dict[str, Tensor]:
    """The largest orthogonality error of a generator with angles up to each of a grid, by law.

    Args:
        angles: Increasing grid in radians.
        maps: Names as :func:`parse_map` reads them.

    Returns:
        Map to errors, ``(n,)``, increasing: the largest among the planes at or below each angle.

    Example:
        >>> [round(float(e), 4) for e in error_curves(torch.tensor([0.1, 0.5]).double(), ["k = 3"])["k = 3"]]
        [0.0002, 0.1211]
    """
    return {name: (s.square() - 1).abs().cummax(0).values for name, s in plane_curves(angles, maps).items()}


def parity_errors(Q: Float[Tensor, "n b b"], norm: float, terms: Sequence[int]) -> list[float]:
    """Measured errors of the Cayley-Neumann series for generators scaled to one spectral norm.

    Args:
        Q: Generators, none of them zero.
        norm: The norm to scale each to.
        terms: Numbers of terms.

    Returns:
        The mean of ``||R^T R - I||_2`` over the generators, for each number of terms.

    Example:
        >>> even, odd = parity_errors(unpack_skew(torch.ones(1, 1)), 0.3, [2, 3])
        >>> round(odd / even)
        22
    """
    Q = Q.double() * (norm / singular_values(Q.double())[:, :1, None])
    return [float(orthogonality_error(cayley_neumann(Q, terms=k)).mean()) for k in terms]


def planes_at_norms(
    Q: Float[Tensor, "b b"], norms: Sequence[float], maps: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """One generator scaled to several norms: the plane of its largest angle, and what each map makes of it.

    Args:
        Q: A generator, shape ``(b, b)``, not zero.
        norms: Spectral norms to scale it to.
        maps: Names as :func:`parse_map` reads them.

    Returns:
        Map to ``(norms, singular values)``: the singular value of the result along the plane of the largest angle.

    Example:
        >>> found = planes_at_norms(unpack_skew(torch.ones(1)), [0.5, 1.0], ["k = 3"])
        >>> [round(float(s), 4) for s in found["k = 3"][1]]
        [0.9375, 0.0]
    """
    Q = Q.double()
    _, S, Vh = torch.linalg.svd(Q)
    scale = torch.tensor(norms, dtype=torch.float64) / S[0]
    scaled = scale[:, None, None] * Q
    # Every map is a function of Q, so the top right singular vector of Q is one of the result too.
    return {name: (scale * S[0], (apply_map(name, scaled) @ Vh[0]).norm(dim=-1)) for name in maps}


def simulate_merges(
    maps: Sequence[str],
    *,
    merges: int = 200,
    every: int = 10,
    size: int = 64,
    block_size: int = 32,
    std: float = 0.03,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
) -> tuple[list[int], dict[str, Tensor], dict[str, list[float]]]:
    """Random rotations of both sides merged into a weight again and again: how its singular values drift.

    Args:
        maps: Names as :func:`parse_map` reads them; all get the same generators.
        merges: Number of merges, ``>= 1``; default 200.
        every: Merges between measurements, ``>= 1``; default 10.
        size: Rows and columns of the weight, a multiple of ``block_size``; default 64.
        block_size: Default 32.
        std: Standard deviation of the packed entries; default 0.03.
        seeds: One weight and one sequence of generators for each.

    Returns:
        The numbers of merges at which it was measured; map to the relative change of the geometric mean of the singular
        values ``(seeds, n)``; map to the change that the law predicts, ``n`` numbers.

    Raises:
        OptionError: A number out of range.

    Example:
        >>> at, measured, predicted = simulate_merges(["k = 3"], merges=4, every=2, size=8, block_size=8, seeds=[0])
        >>> at, measured["k = 3"].shape, predicted["k = 3"][-1] < 0
        ([0, 2, 4], torch.Size([1, 3]), True)

    Numerics:
        float64, so that only the map's own error shows.
    """
    if merges < 1 or every < 1 or size < 1 or block_size < 1 or size % block_size:
        found = f"{merges=}, {every=}, {size=}, {block_size=}"
        raise OptionError(f"need merges, every >= 1 and a size that is a multiple of block_size; got {found}.")
    at = sorted({*range(0, merges + 1, every), merges})
    found = {name: torch.zeros(len(seeds), len(at), dtype=torch.float64) for name in maps}
    for row, seed in enumerate(seeds):
        g = torch.Generator().manual_seed(seed)
        start = torch.randn(size, size, generator=g, dtype=torch.float64)
        base = torch.linalg.slogdet(start).logabsdet
        weights = dict.fromkeys(maps, start)
        for merge in range(1, merges + 1):
            shape = (2 * (size // block_size), packed_size(block_size))
            Q = std * unpack_skew(torch.randn(shape, generator=g, dtype=torch.float64))
            rows, columns = (random_permutation(size, generator=g) for _ in range(2))
            for name, W in weights.items():
                left, right = apply_map(name, Q).chunk(2)
                weights[name] = rotate_blocks(W[rows][:, columns], left=left, right=right)
                if merge in at:
                    change = (torch.linalg.slogdet(weights[name]).logabsdet - base) / size
                    found[name][row, at.index(merge)] = torch.expm1(change)
    predicted = {}
    for name in maps:
        map, options, polish = parse_map(name)
        drift = expected_log_drift(map, std, block_size, polish=polish, **options)
        predicted[name] = [math.expm1(2 * n * drift) for n in at]
    return at, found, predicted


def live_drift(Q: Float[Tensor, "n b b"], map: str) -> tuple[float, float]:
    """The mean log singular value that a map gives trained generators, and what the law for random ones predicts.

    Args:
        Q: Generators, shape ``(n, b, b)``.
        map: A name as :func:`parse_map` reads it.

    Returns:
        ``(measured, predicted)``, both per merge and side; the prediction knows only the size of each block's entries.

    Example:
        >>> Q = 0.05 * unpack_skew(torch.randn(200, 120, generator=torch.Generator().manual_seed(0)))
        >>> measured, predicted = live_drift(Q, "k = 2")
        >>> abs(measured / predicted - 1) < 0.2
        True
    """
    kind, options, polish = parse_map(map)
    Q = Q.double()
    b = Q.shape[-1]
    planes = plane_singular_values(kind, singular_values(Q), polish=polish, **options)
    stds = (Q.square().sum((-2, -1)) / max(b * (b - 1), 1)).sqrt()
    laws = [expected_log_drift(kind, float(s), b, polish=polish, **options) for s in stds]
    return float(planes.log().mean()), sum(laws) / len(laws)


def adviser_table(
    angles: Sequence[float], tolerances: Sequence[float], *, family: str = "cayley"
) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
    """What the adviser says at each angle, for each tolerance.

    Args:
        angles: Largest angles in radians.
        tolerances: Largest allowed distances of a singular value from 1.
        family: ``"cayley"`` or ``"exp"``.

    Returns:
        Tolerance to the number of products (NaN where only the exact map will do), and to the map in words.

    Example:
        >>> products, names = adviser_table([0.1, 2.0], [1e-3])
        >>> products["0.001"], names["0.001"][0].split(",")[0]
        ([2.0, nan], 'cayley_neumann')
    """
    products, names = {}, {}
    for tolerance in tolerances:
        chosen = [recommended_map(angle, tolerance=tolerance, family=family) for angle in angles]  # type: ignore[arg-type]
        products[f"{tolerance:g}"] = [math.nan if c.products is None else float(c.products) for c in chosen]
        names[f"{tolerance:g}"] = [str(c) for c in chosen]
    return products, names
