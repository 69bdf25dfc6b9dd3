r"""Weights in eight or four bits, by groups: how a frozen matrix is kept at a quarter or an eighth of float32's size.

``"uint8"`` (:func:`quantize`) has a zero point and takes its groups from the matrix row after row. ``"int8"`` and
``"nf4"`` are symmetric about 0 and take them within rows, so that a row's groups are its own; their scales are the
largest absolute values of the groups (:func:`group_absmax`), which may be kept in eight bits themselves.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from torch.nn import functional as F

from orthokit.errors import OptionError, ShapeError

__all__ = [
    "dequantize",
    "dequantize_int8",
    "dequantize_nf4",
    "dequantize_scales",
    "group_absmax",
    "nf4_levels",
    "quantize",
    "quantize_int8",
    "quantize_nf4",
    "quantize_scales",
]

_LEVELS = 255
_INT8 = 127
_SCALES = 256
_SMALLEST_SPAN = 1e-5


def _nf4_levels() -> tuple[float, ...]:
    # Quantiles of the normal distribution, evenly spaced in probability on either side of 0, which both sides share:
    # eight steps up and seven down, from the mean of 1 - 1/30 and 1 - 1/32 on.
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    up = torch.special.ndtri(torch.linspace(0.5, outermost, 9, dtype=torch.float64))
    down = torch.special.ndtri(torch.linspace(0.5, outermost, 8, dtype=torch.float64))
    levels = torch.cat([-down[1:].flip(0), up]) / up[-1]
    return tuple(levels.tolist())


_NF4 = _nf4_levels()


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


def group_absmax(W: Float[Tensor, "out in"], *, group_size: int = 64) -> Float[Tensor, "out groups"]:
    r"""The largest absolute value of every group of a row: the scales of ``"int8"`` and ``"nf4"``.

    Args:
        W: Finite matrix, shape ``(out, in)``.
        group_size: Entries of a group, ``>= 2``; default 64. The last group of a row may be shorter.

    Returns:
        Float32, shape ``(out, ceil(in / group_size))``.

    Raises:
        OptionError: ``group_size`` is below 2.

    Example:
        >>> group_absmax(torch.tensor([[1.0, -3.0, 2.0]]), group_size=2)
        tensor([[3., 2.]])
    """
    if group_size < 2:
        raise OptionError(f"group_size must be at least 2; got {group_size}.")
    return _row_groups(W.float(), group_size).abs().amax(-1)


def quantize_int8(
    W: Float[Tensor, "out in"], absmax: Float[Tensor, "out groups"], *, group_size: int = 64
) -> Int8[Tensor, "out in"]:
    r"""A matrix as signed bytes: ``q = round(127 w / a)``, clamped to -127 ... 127, ``a`` the scale of its group.

    Args:
        W: Finite matrix, shape ``(out, in)``.
        absmax: From :func:`group_absmax`, or near it: entries beyond a smaller scale are clamped.
        group_size: As given there; default 64.

    Returns:
        Codes in the shape of ``W``.

    Raises:
        ShapeError: The number of groups does not fit.

    Example:
        >>> W = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
        >>> a = group_absmax(W)
        >>> error = (dequantize_int8(quantize_int8(W, a), a) - W).abs()
        >>> bool((group_absmax(error) <= 0.501 * a / 127).all())
        True

    Numerics:
        An entry is off by at most ``a / 254``, up to rounding in float32. Zeros stay exact.
    """
    units = _in_units(W, absmax, group_size) * _INT8
    return units.round_().clamp_(-_INT8, _INT8).to(torch.int8)


def dequantize_int8(
    codes: Int8[Tensor, "out in"],
    absmax: Float[Tensor, "out groups"],
    *,
    group_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out in"]:
    """The matrix that :func:`quantize_int8` stored.

    Args:
        codes: Signed bytes, shape ``(out, in)``.
        absmax: One per group.
        group_size: Default 64.
        dtype: Of the result; default float32, in which it is computed.

    Returns:
        Shape of ``codes``.

    Raises:
        ShapeError: The number of groups does not fit.

    Example:
        >>> dequantize_int8(torch.tensor([[-127, 0, 127]], dtype=torch.int8), torch.tensor([[2.0]]))
        tensor([[-2.,  0.,  2.]])
    """
    return _scaled(codes.to(torch.float32), absmax / _INT8, group_size).to(dtype)


def nf4_levels(*, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Float[Tensor, " 16"]:
    r"""The sixteen values of 4-bit NormalFloat, from -1 to 1, 0 among them.

    ``Phi^{-1}(p) / Phi^{-1}(p_max)``, ``p`` evenly spaced from 1/2 to ``p_max = 1 - (1/30 + 1/32) / 2``: in eight steps
    for positive values, and mirrored in seven for negative ones.

    Args:
        dtype: Default float32.
        device: Default the CPU.

    Returns:
        Rising, shape ``(16,)``.

    Example:
        >>> levels = nf4_levels()
        >>> float(levels[0]), float(levels[7]), float(levels[15]), bool((levels.diff() > 0).all())
        (-1.0, 0.0, 1.0, True)

    References:
        T. Dettmers et al. (2023), QLoRA, arXiv 2305.14314, section 3 and appendix E, where the values are listed.
    """
    return torch.tensor(_NF4, dtype=dtype, device=device)


def quantize_nf4(
    W: Float[Tensor, "out in"], absmax: Float[Tensor, "out groups"], *, group_size: int = 64
) -> UInt8[Tensor, " bytes"]:
    r"""A matrix as 4-bit NormalFloat: the number of the level nearest to ``w / a``, two in a byte.

    Args:
        W: Finite matrix, shape ``(out, in)``.
        absmax: From :func:`group_absmax`, or near it: entries beyond a smaller scale are clamped.
        group_size: As given there; default 64.

    Returns:
        ``ceil(out in / 2)`` bytes, row after row, the first of two in the upper half.

    Raises:
        ShapeError: The number of groups does not fit.

    Example:
        >>> W = torch.randn(4, 65, generator=torch.Generator().manual_seed(0))
        >>> a = group_absmax(W)
        >>> once = dequantize_nf4(quantize_nf4(W, a), a, columns=65)
        >>> torch.equal(dequantize_nf4(quantize_nf4(once, a), a, columns=65), once)
        True

    Numerics:
        An entry is off by at most half of the widest gap between levels, 0.152 ``a``. Zeros stay exact, and so does
        the largest entry of a group. On normal entries the relative error is about 0.09 in groups of 64.
    """
    levels = nf4_levels(device=W.device)
    units = _in_units(W, absmax, group_size).contiguous()
    codes = torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten()
    pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def dequantize_nf4(
    packed: UInt8[Tensor, " bytes"],
    absmax: Float[Tensor, "out groups"],
    *,
    columns: int,
    group_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out {columns}"]:
    """The matrix that :func:`quantize_nf4` stored.

    Args:
        packed: Bytes.
        absmax: One per group.
        columns: Of the matrix.
        group_size: Default 64.
        dtype: Of the result; default float32, in which it is computed.

    Returns:
        Shape ``(out, columns)``.

    Raises:
        ShapeError: The number of bytes or groups does not fit.

    Example:
        >>> dequantize_nf4(torch.tensor([0xF0, 0x70], dtype=torch.uint8), torch.tensor([[2.0]]), columns=3)
        tensor([[ 2., -2.,  0.]])
    """
    count = len(absmax) * columns
    if packed.numel() != (count + 1) // 2:
        raise ShapeError(f"{len(absmax)} x {columns} codes fill {(count + 1) // 2} bytes; got {packed.numel()}.")
    levels = nf4_levels(device=packed.device)
    # A table of pairs: half as many look-ups, and no unpacking.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    values = F.embedding(packed.int(), pairs).flatten()[:count].view(-1, columns)
    return _scaled(values, absmax, group_size).to(dtype)


def quantize_scales(
    absmax: Float[Tensor, "out groups"],
) -> tuple[UInt8[Tensor, "out groups"], Float[Tensor, " steps"], UInt8[Tensor, " steps"], Float[Tensor, ""]]:
    r"""Scales as bytes ("double quantisation"): their mean is taken off, the rest goes through :func:`quantize`.

    Args:
        absmax: Scales, ``>= 0``.

    Returns:
        Codes in the shape of ``absmax``, and per 256 of them a step in float32 and a zero point; the mean.

    Example:
        >>> a = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 1
        >>> bool(((dequantize_scales(*quantize_scales(a)) - a).abs() <= 0.501 / 255).all())
        True

    Numerics:
        A scale is off by at most half a step: the spread of 256 scales and their mean, over 510.

    References:
        T. Dettmers et al. (2023), QLoRA, arXiv 2305.14314, section 3, which keeps them as 8-bit floats; here they are
        evenly spaced.
    """
    mean = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    rest = (absmax - mean).reshape(1, -1)
    # Scales of any size are brought to 1: quantize takes no span below 1e-5.
    spread = float(rest.abs().amax()) if rest.numel() else 0.0
    spread = spread if spread > 0 else 1.0
    codes, step, zero = quantize(rest / spread, group_size=_SCALES)
    return codes.view(absmax.shape), step * spread, zero, mean


def dequantize_scales(
    codes: UInt8[Tensor, "out groups"],
    step: Float[Tensor, " steps"],
    zero: UInt8[Tensor, " steps"],
    mean: Float[Tensor, ""],
) -> Float[Tensor, "out groups"]:
    """The scales that :func:`quantize_scales` stored, none below 0.

    Args:
        codes: Bytes.
        step: One per 256 codes.
        zero: One per 256 codes.
        mean: Of the scales.

    Returns:
        Float32, shape of ``codes``.

    Raises:
        ShapeError: The number of steps does not fit.

    Example:
        >>> dequantize_scales(*quantize_scales(torch.full((2, 3), 0.5)))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    rest = dequantize(codes.view(1, -1), step, zero, group_size=_SCALES).view(codes.shape)
    return (rest + mean).clamp_min_(0)


def _in_units(W: Tensor, absmax: Tensor, group_size: int) -> Tensor:
    """``w / a``; 0 where ``a = 0``."""
    inverse = torch.where(absmax > 0, 1 / absmax, 0.0)
    # The inverse of a subnormal number is infinite: such a group is as good as 0.
    return _scaled(W.float(), inverse.nan_to_num(posinf=0.0), group_size)


def _scaled(X: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """The rows of a matrix with every group times its scale."""
    rows, columns = X.shape
    if scale.shape != (rows, math.ceil(columns / group_size)):
        found = f"got scales of shape {tuple(scale.shape)}"
        raise ShapeError(f"a {rows} x {columns} matrix in groups of {group_size} has one each; {found}.")
    return (_row_groups(X, group_size) * scale[..., None]).flatten(1)[:, :columns]


def _row_groups(X: Tensor, size: int) -> Tensor:
    """``(rows, groups, size)``, the last group of each row filled up with zeros."""
    return F.pad(X, (0, -X.shape[1] % size)).unflatten(1, (-1, size))


def _grouped(X: Tensor, size: int) -> Tensor:
    """``(groups, size)``, the last one filled up with zeros, which its range holds anyway."""
    flat = X.flatten()
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)
