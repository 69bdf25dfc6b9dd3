r"""How exactly numbers are stored: the error of rounding to the nearest number of a type.

A number :math:`x` with :math:`2^e \le |x| < 2^{e+1}` has neighbours at a distance of
:math:`\mathrm{ulp} = 2^e \epsilon`, below the smallest normal number :math:`2^{e_{\min}}` of
:math:`2^{e_{\min}} \epsilon`. Rounding to the nearest is off by up to half of it, in the mean square by
:math:`\mathrm{ulp}^2 / 12`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["pieces", "rounding_error"]

# Numbers at a time: what a step needs besides stays in the caches.
_STEP = 1 << 18
# Where the bits of the exponent stand, by the type in which the numbers are looked at.
_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def pieces(W: Tensor) -> Iterator[Tensor]:
    """``W`` of shape ``(rows, columns)`` in runs of rows of a few hundred thousand numbers."""
    yield from W.split(max(1, _STEP // max(1, W.shape[1])))


def rounding_error(W: Tensor, dtype: torch.dtype) -> float:
    """Root mean square of the rounding error of the numbers of ``W``, were each rounded to the nearest of ``dtype``.

    Zeros have none, and a number that is far below the smallest of ``dtype`` loses itself. NaN and infinities count as
    zeros; the error of a complex number is that of both parts. 0 for types of whole numbers, which are exact, and for
    no numbers.
    """
    if W.numel() == 0 or not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    if W.is_complex():
        return math.sqrt(2) * rounding_error(torch.view_as_real(W.detach().resolve_conj()), _real(dtype))
    if W.device.type == "mps":  # which has no float64
        W = W.cpu()
    facts = torch.finfo(_real(dtype))
    work = torch.float64 if torch.float64 in (W.dtype, dtype) else torch.float32
    size = 0.0
    for piece in pieces(W.detach().reshape(W.shape[0] if W.ndim > 1 else 1, -1)):
        # hypot scales by itself: squares of large or tiny powers would leave the range of float64.
        size = math.hypot(size, _size_of_ulps(piece.to(work).contiguous(), facts))
    return size / math.sqrt(12 * W.numel())


def _size_of_ulps(x: Tensor, facts: torch.finfo) -> float:
    """Square root of the sum of the squares of the ulps of ``x``."""
    kind, bits = _EXPONENT[x.dtype]
    powers = (x.view(kind) & bits).view(x.dtype)
    few = 0.0
    if powers.amin().item() < facts.smallest_normal:
        small = powers < facts.smallest_normal
        # Less than half of the smallest number becomes 0: the error is then the number itself, and that of zeros 0.
        least, sizes = facts.smallest_normal * facts.eps, x[small].double().abs_()
        few = _norm(torch.where(sizes < least / 2, sizes * math.sqrt(12), least))
        powers.masked_fill_(small, 0.0)
    if powers.amax().item() == math.inf:
        powers.masked_fill_(powers.isinf(), 0.0)  # the exponent of NaN as well
    return math.hypot(few, facts.eps * _norm(powers))


def _norm(x: Tensor) -> float:
    """Euclidean norm in float64, of numbers of which no two squares need to have their sum in range."""
    top = x.amax().item() if x.numel() else 0.0
    if x.dtype == torch.float64 and top > 0:
        return top * torch.linalg.vector_norm(x / top).item()
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
