"""Adapters on one real weight, at a chosen distance from it: what each keeps, merging, requantising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters.base import PartConfig
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.oft import OFT, OFTAdapter
from orthokit.adapters.quantized import QuantizedLinear, requantize
from orthokit.errors import OptionError
from orthokit.linalg.skew import unpack_skew
from orthokit.studies.adapter_geometry import what_is_kept

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["adapted_at", "kept_at", "merge_gap", "orthogonality_at", "requantised_at"]

_HALVINGS = 40


def adapted_at(layer: nn.Module, config: PartConfig, *, distance: float, seed: int = 0) -> AdaptedLayer:
    r"""An adapter with random numbers, of the size at which the weight has moved by a given share of itself.

    Args:
        layer: ``nn.Linear`` or a quantised one; not changed.
        config: The adapter.
        distance: :math:`\|W' - W\|_F / \|W\|_F`, in (0, 1).
        seed: Of the numbers; default 0.

    Returns:
        The adapted layer.

    Raises:
        OptionError: ``distance`` out of range, or not reached by this adapter.

    Example:
        >>> from orthokit.adapters import OFT
        >>> layer = adapted_at(nn.Linear(32, 16), OFT(block_size=8), distance=0.1)
        >>> round(what_is_kept(layer)["moved"], 4)
        0.1

    Numerics:
        Bisection on the size of the numbers, 40 halvings.
    """
    if not 0 < distance < 1:
        raise OptionError(f"distance must be in (0, 1); got {distance}.")
    adapted = cast("AdaptedLayer", config.wrap(layer))
    source = torch.Generator().manual_seed(seed)
    rest = [(p, p.detach().clone(), torch.randn(p.shape, generator=source)) for p in adapted.adapters.parameters()]
    before = adapted._matrix("patches", torch.float64)

    @torch.no_grad()
    def moved(size: float) -> float:
        for p, start, noise in rest:
            p.copy_(start + size * noise.to(p.dtype))
        after = adapted.effective_weight(dtype=torch.float64)
        return float((after - before).norm() / before.norm())

    low, high = 0.0, 1e-3
    while moved(high) < distance:
        low, high = high, 2 * high
        if high > 1e3:
            raise OptionError(f"{config.kind} cannot move this weight by {distance}; take a smaller distance.")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) < distance else (low, middle)
    moved(high)
    return adapted


def kept_at(
    layer: nn.Module, configs: Mapping[str, PartConfig], *, distance: float, seeds: Sequence[int] = (0,)
) -> pd.DataFrame:
    """What adapters of equal distance from one weight changed of what describes it.

    Args:
        layer: ``nn.Linear``.
        configs: Label to adapter.
        distance: See :func:`adapted_at`.
        seeds: Of the adapters.

    Returns:
        Columns ``method``, ``seed`` and those of :func:`what_is_kept`.
    """
    import pandas as pd

    rows = []
    for label, config in configs.items():
        for seed in seeds:
            found = what_is_kept(adapted_at(layer, config, distance=distance, seed=seed))
            rows.append({"method": label, "seed": seed, **found})
    return pd.DataFrame(rows)


@torch.no_grad()
def merge_gap(layer: nn.Module, config: PartConfig, *, distance: float, rows: int = 64, seed: int = 0) -> float:
    """The largest difference between a layer with an adapter and the plain layer that it merges into.

    Args:
        layer: ``nn.Linear``.
        config: The adapter.
        distance: See :func:`adapted_at`.
        rows: Random inputs; default 64.
        seed: Of adapter and inputs; default 0.

    Returns:
        Largest difference of an output, over the largest output.

    Example:
        >>> from orthokit.adapters import OFT
        >>> merge_gap(nn.Linear(32, 16), OFT(block_size=8), distance=0.3) < 1e-5
        True
    """
    adapted = adapted_at(layer, config, distance=distance, seed=seed)
    x = torch.randn(rows, adapted.in_features, generator=torch.Generator().manual_seed(seed + 1))
    y = adapted(x)
    return float((adapted.merged()(x) - y).abs().max() / y.abs().max())


def requantised_at(
    W: Float[Tensor, "out in"],
    configs: Mapping[str, PartConfig],
    *,
    distances: Sequence[float],
    seeds: Sequence[int] = (0,),
    scheme: str = "nf4",
) -> pd.DataFrame:
    """Adapters over a quantised weight, merged, and quantised again.

    Args:
        W: The weight.
        configs: Label to adapter.
        distances: See :func:`adapted_at`.
        seeds: Of the adapters.
        scheme: ``"nf4"`` (default) or another of :class:`~orthokit.adapters.QuantizedLinear`.

    Returns:
        Columns ``method``, ``distance``, ``seed``; ``merged`` and ``requantised``, the largest relative change of a
        row's length; ``error``, that of quantising again, relative; ``range``, the mean growth of a group's range.
    """
    import pandas as pd

    plain = nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        plain.weight.copy_(W)
    base, rows = QuantizedLinear.from_linear(plain, scheme=scheme), []
    for label, config in configs.items():
        for distance in distances:
            for seed in seeds:
                adapted = adapted_at(base, config, distance=distance, seed=seed)
                _, report = requantize(cast("nn.Linear", adapted.merged()), like=base)
                rows.append(
                    {
                        **{"method": label, "distance": distance, "seed": seed},
                        "merged": report["row_norm_change"],
                        "requantised": report["row_norm_change_quantized"],
                        "error": report["relative_error"],
                        "range": report["range_growth_mean"],
                    }
                )
    return pd.DataFrame(rows)


@torch.no_grad()
def orthogonality_at(
    angles: Sequence[float],
    terms: Sequence[int],
    *,
    tolerance: float | None = None,
    block_size: int = 16,
    seed: int = 0,
) -> dict[str, tuple[list[float], list[float]]]:
    r"""How far from orthogonal the blocks of an OFT layer are when its largest generator has a given norm.

    Args:
        angles: Largest :math:`\|Q_i\|_2` of a block, ``> 0``.
        terms: Terms ``k`` of the Cayley-Neumann series.
        tolerance: That of :class:`~orthokit.adapters.OFT`; default ``None``: the series whatever comes.
        block_size: Default 16.
        seed: Of the generators; default 0.

    Returns:
        ``"k = ..."`` to ``(angles, errors)``: the spectral norm of ``R^T R - I``, largest over blocks.

    Example:
        >>> found = orthogonality_at([0.3], [2, 3])
        >>> abs(found["k = 2"][1][0] / 0.3**6 - 1) < 1e-3  # the law of an even k
        True

    Numerics:
        float64 throughout.
    """
    found = {}
    for k in terms:
        config = OFT(block_size=block_size, map="cayley_neumann", terms=k, tolerance=tolerance, block_rate=False)
        layer = cast("AdaptedLayer", config.wrap(nn.Linear(4 * block_size, block_size, dtype=torch.float64)))
        part = cast("OFTAdapter", layer.parts()[0])
        start = torch.randn(part.generator.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norm = torch.linalg.matrix_norm(unpack_skew(start), 2).max()
        errors = []
        for angle in angles:
            part.generator.copy_(start * (angle / norm))
            R = part.rotations(torch.float64)[0]
            errors.append(float(torch.linalg.matrix_norm(R.mT @ R - torch.eye(block_size), 2).max()))
        found[f"k = {k}"] = ([float(angle) for angle in angles], errors)
    return found
