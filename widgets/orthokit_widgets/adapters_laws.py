"""How far maps that are not exact are from a rotation, by their laws; kept between changes of the page "Adapters"."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from orthokit.linalg import plane_singular_values
from orthokit_widgets.momentum_data import Cache

__all__ = ["ANGLES", "law", "law_label"]

#: Largest angles of the generator at which laws are drawn.
ANGLES = np.geomspace(1e-3, 3.0, 49)
_LAWS = Cache(256)


def law_label(map: str, terms: int) -> str:
    """What charts call a map that is not exact."""
    return f"k = {terms}" if map == "cayley_neumann" else f"exp, order {terms}"


def law(map: str, terms: int, angles: np.ndarray, planes: Tensor, factors: int = 1) -> np.ndarray:
    r"""``||R^T R - I||_2`` of a map by its law, for one generator at several sizes; kept for :data:`ANGLES`.

    Args:
        map: One of ``linalg.MAPS``.
        terms: Its length.
        angles: Largest angles, ``(n,)``.
        planes: Angles of all planes over the largest.
        factors: Number of rotations in a row; with several it is a bound: squared singular values multiply.

    Returns:
        Errors, ``(n,)``.
    """
    key = (map, terms, factors, id(planes)) if angles is ANGLES else None
    if key is not None and (kept := _LAWS.get(key)) is not None and kept[0] is planes:
        return kept[1]
    theta = torch.from_numpy(angles)[:, None] * planes
    squared = plane_singular_values(map, theta, terms=terms, order=terms).square()
    low, high = squared.amin(1) ** factors, squared.amax(1) ** factors
    errors = torch.maximum(high - 1, 1 - low).numpy()
    if key is not None:
        _LAWS.put(key, (planes, errors))
    return errors
