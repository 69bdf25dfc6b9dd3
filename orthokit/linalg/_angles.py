"""The angles of a skew matrix with independent normal entries, as quadrature nodes and weights.

Integrating a function of the angles with them gives its mean over the ``b`` singular values of a random generator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["finite_angles", "semicircle_angles"]


def finite_angles(b: int) -> tuple[Tensor, Tensor]:
    """Quadrature nodes and weights for the exact mean over the ``b`` angles of a skew matrix with unit entries.

    The positive angles have joint density ``prod (x_i^2 - x_j^2)^2 exp(-sum x^2 / 2)``, times ``prod x^2`` for odd
    ``b``: a determinantal ensemble of the even (odd) Hermite functions of ``y = x / sqrt(2)``, whose one-point density
    on ``y > 0`` is twice the sum of the squares of the first ``b // 2`` of them. An odd ``b`` has one angle 0 more,
    where every map gives 1.
    """
    if b == 1:
        return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y, w = _legendre(0.0, math.sqrt(2 * b) + 6.0)
    # Orthonormal Hermite functions by their three-term recurrence; scaled so that nothing overflows.
    previous, current = torch.zeros_like(y), math.pi**-0.25 * torch.exp(-(y**2) / 2)
    density = torch.zeros_like(y)
    for n in range(b):
        if n % 2 == b % 2:
            density += 2 * current**2
        previous, current = current, math.sqrt(2 / (n + 1)) * y * current - math.sqrt(n / (n + 1)) * previous
    # Each plane counts twice among the b singular values.
    return math.sqrt(2) * y, 2 * w * density / b


def semicircle_angles(b: int) -> tuple[Tensor, Tensor]:
    """Quadrature over the semicircle of radius ``2 sqrt(b)``, in the angle that makes its density smooth."""
    phi, w = _legendre(0.0, math.pi / 2)
    return 2 * math.sqrt(b) * torch.sin(phi), w * (4 / math.pi) * torch.cos(phi) ** 2


def _legendre(low: float, high: float, *, panels: int = 128, points: int = 16) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on equal panels of ``[low, high]``."""
    j = torch.arange(1, points, dtype=torch.float64)
    off = j / torch.sqrt(4 * j**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    width = (high - low) / panels
    starts = low + width * torch.arange(panels, dtype=torch.float64)
    x = starts[:, None] + width * (nodes + 1) / 2
    return x.flatten(), (vectors[0] ** 2 * width).expand_as(x).flatten()
