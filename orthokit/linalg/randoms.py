"""Random matrices with orthonormal rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor

from orthokit.errors import ShapeError

__all__ = ["random_orthogonal"]


def random_orthogonal(
    *shape: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""A matrix drawn uniformly (Haar) among those with orthonormal rows or columns.

    ``Q R = QR(Gaussian)``, then the columns of ``Q`` are multiplied by the signs of the diagonal of ``R``; without that
    step the law would depend on the conventions of the QR routine.

    Args:
        *shape: ``(..., out, in)``, at least two sizes.
        generator: Source of randomness; default a fresh generator seeded from the operating system.
        dtype: Default ``torch.get_default_dtype()``.
        device: Default the generator's device.

    Returns:
        The matrix: ``Q Q^T = I`` if ``out <= in``, ``Q^T Q = I`` otherwise.

    Raises:
        ShapeError: Fewer than two sizes, or a negative one.

    Example:
        >>> Q = random_orthogonal(3, 5, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(Q @ Q.T, torch.eye(3), atol=1e-6))
        True

    Numerics:
        Drawn and factored in float64, then rounded: orthogonal to the last digit of ``dtype``.

    References:
        F. Mezzadri (2007), How to generate random matrices from the classical compact groups, arXiv math-ph/0609050.
    """
    if len(shape) < 2 or min(shape) < 0:
        raise ShapeError(f"shape must be (..., out, in) with sizes >= 0; got {shape}.")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    long, short = max(shape[-2:]), min(shape[-2:])
    gaussian = torch.randn(*shape[:-2], long, short, generator=generator, device=generator.device, dtype=torch.float64)
    Q, R = torch.linalg.qr(gaussian)
    Q = Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)
    Q = Q if shape[-2] >= shape[-1] else Q.mT
    return Q.to(dtype=dtype or torch.get_default_dtype(), device=device or generator.device).contiguous()
