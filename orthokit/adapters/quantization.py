r"""Weights in eight bits, by groups: how a frozen matrix is kept at a quarter of float32's size."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from orthokit.errors import OptionError, ShapeError

__all__ = ["dequantize", "quantize"]

_LEVELS = 255
_SMALLEST_SPAN = 1e-5


def quantize(
    W: Float[Tensor, "out in"], *, group_size: int = 256
) -> tuple[UInt8[Tensor, "out in"], Float[Tensor, " groups"], UInt8[Tensor, " groups"]]:
    r"""A matrix as bytes with a scale and a zero point per group: ``w ~ (q - z) s``.

    ``s = max(max - min, 1e-5) / 255``, ``z = round(-min / s)``, ``q = round(w / s) + z`` clamped to 0 ... 255, where
    the range of every group is widened to hold 0.

    Args:
        W: Finite matrix, shape ``(out, in)``.
        group_size: Entries of a group, taken row after row, ``>= 2``; default 256. The last group may be shorter.

    Returns:
        Codes in the shape of ``W``, scales in float32 and zero points, one each per group.

    Raises:
        OptionError: ``group_size`` is below 2.

    Example:
        >>> W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        >>> codes, scale, zero = quantize(W)
        >>> error = (dequantize(codes, scale, zero) - W).abs()
        >>> bool((error.view(2, 256) <= 0.501 * scale[:, None]).all())
        True

    Numerics:
        An entry is off by at most ``s / 2``, up to rounding in float32.

    References:
        Z. Qiu et al. (2026), POET-X, arXiv 2603.05500, section on quantised training. There the range of a group
        need not hold 0, and a group of one sign far from 0 is clipped; here it is not.
    """
    if group_size < 2:
        raise OptionError(f"group_size must be at least 2; got {group_size}.")
    groups = _grouped(W.float(), group_size)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    scale = (high - low).clamp_min(_SMALLEST_SPAN) / _LEVELS
    zero = (-low / scale).round().clamp(0, _LEVELS)
    codes = ((groups / scale[:, None]).round() + zero[:, None]).clamp(0, _LEVELS).to(torch.uint8)
    return codes.flatten()[: W.numel()].view(W.shape), scale, zero.to(torch.uint8)


def dequantize(
    codes: UInt8[Tensor, "out in"],
    scale: Float[Tensor, " groups"],
    zero: UInt8[Tensor, " groups"],
    *,
    group_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out in"]:
    """The matrix that :func:`quantize` stored.

    Args:
        codes: Bytes, shape ``(out, in)``.
        scale: One per group.
        zero: One per group.
        group_size: As given to :func:`quantize`; default 256.
        dtype: Of the result; default float32, in which it is computed.

    Returns:
        Shape of ``codes``.

    Raises:
        ShapeError: The number of groups does not fit the size of the groups.

    Example:
        >>> dequantize(torch.tensor([[0, 4]], dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([2]).byte())
        tensor([[-1.,  1.]])
    """
    groups = _grouped(codes, group_size)
    if len(groups) != len(scale) or len(groups) != len(zero):
        found = f"got {len(scale)} and {len(zero)}"
        raise ShapeError(f"{codes.numel()} codes in groups of {group_size} need {len(groups)} scales; {found}.")
    values = (groups.to(torch.float32) - zero[:, None].to(torch.float32)).mul_(scale[:, None])
    return values.flatten()[: codes.numel()].view(codes.shape).to(dtype)


def _grouped(X: Tensor, size: int) -> Tensor:
    """``(groups, size)``, the last one filled up with zeros, which its range holds anyway."""
    flat = X.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)
