r"""A matrix as codes and scales, and its product with rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters.quantization import (
    dequantize,
    dequantize_int8,
    dequantize_nf4,
    dequantize_scales,
    group_absmax,
    quantize,
    quantize_int8,
    quantize_nf4,
    quantize_scales,
)
from orthokit.errors import CheckpointError, OptionError, unknown_name

__all__ = ["SCHEMES", "Codes", "Layout", "decode", "encode", "layout_of", "product"]

#: Scheme to the size of its groups.
SCHEMES = {"int8": 128, "uint8": 256, "nf4": 64}
#: Most tensors that any layout stores.
_MOST = 5


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored.

    Args:
        scheme: ``"int8"``, ``"uint8"`` or ``"nf4"``.
        group_size: Entries that share a scale.
        double: Whether scales are bytes themselves.
        rows: Of the matrix.
        columns: Of the matrix.
    """

    scheme: str
    group_size: int
    double: bool
    rows: int
    columns: int


def layout_of(scheme: str, group_size: int | None, double: bool | None, rows: int, columns: int) -> Layout:
    """A layout with the defaults of its scheme.

    Raises:
        UnknownNameError: Unknown scheme.
        OptionError: ``group_size`` below 2, or ``double`` with ``"uint8"``.
    """
    if scheme not in SCHEMES:
        raise unknown_name("scheme", scheme, SCHEMES)
    size = SCHEMES[scheme] if group_size is None else group_size
    if size < 2:
        raise OptionError(f"group_size must be at least 2; got {size}.")
    if double and scheme == "uint8":
        raise OptionError("scheme='uint8' keeps its scales in float32; take double=None, or 'int8' or 'nf4'.")
    return Layout(scheme, size, scheme == "nf4" if double is None else double, rows, columns)


def encode(W: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The tensors that store a matrix: codes, then what belongs to the scales."""
    if layout.scheme == "uint8":
        return quantize(W, group_size=layout.group_size)
    absmax = group_absmax(W, group_size=layout.group_size)
    scales: tuple[Tensor, ...] = (absmax,)
    if layout.double:
        scales = quantize_scales(absmax)
        # Codes are chosen for the scales that will be read back.
        absmax = dequantize_scales(*scales)
    to_codes = quantize_int8 if layout.scheme == "int8" else quantize_nf4
    return to_codes(W, absmax, group_size=layout.group_size), *scales


def decode(stored: Sequence[Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """The matrix that :func:`encode` stored; the same numbers in every type, up to its rounding."""
    codes, *scales = stored
    size = layout.group_size
    if layout.scheme == "uint8":
        return dequantize(codes, *scales, group_size=size, dtype=dtype)
    absmax = dequantize_scales(*scales) if layout.double else scales[0]
    if layout.scheme == "int8":
        return dequantize_int8(codes, absmax, group_size=size, dtype=dtype)
    return dequantize_nf4(codes, absmax, columns=layout.columns, group_size=size, dtype=dtype)


def product(x: Tensor, bias: Tensor | None, layout: Layout, stored: tuple[Tensor, ...]) -> Tensor:
    """``x W^T + bias`` in the type of ``x``; only the codes are kept, and decoded again for the gradient of ``x``."""
    # Filled up: torch.compile takes a forward method with as many names as arguments for one without a context.
    filled = (*stored, *[None] * (_MOST - len(stored)))
    return _Product.apply(x, bias, layout, *filled)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: Layout, *filled: Tensor | None) -> Tensor:
        ctx.stored_as = layout
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*filled)
        return F.linear(x, decode(_stored(filled), layout, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ decode(_stored(ctx.saved_tensors), ctx.stored_as, gradient.dtype)
        if ctx.needs_input_grad[1]:
            db = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, db, None, *[None] * _MOST


def _stored(filled: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in filled if tensor is not None]


class Codes(nn.Module):
    """The tensors of a stored matrix. Scales stay in float32 whatever the model is cast to.

    Args:
        layout: How it is stored.
        W: The matrix.
    """

    codes: Tensor
    group_size: Tensor

    def __init__(self, layout: Layout, W: Tensor) -> None:
        super().__init__()
        self.layout = layout
        if layout.scheme == "uint8":
            self._names: tuple[str, ...] = ("codes", "scale", "zero")
        else:
            self._names = ("codes", "scales", "step", "zero", "mean") if layout.double else ("codes", "absmax")
        for name, tensor in zip(self._names, encode(W, layout), strict=True):
            self.register_buffer(name, tensor)
        # Groups of different sizes may be equally many: a state dict says which they are.
        self.register_buffer("group_size", torch.tensor(layout.group_size, device=W.device))

    def stored(self) -> tuple[Tensor, ...]:
        """What :func:`decode` takes."""
        return tuple(getattr(self, name) for name in self._names)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codes:
        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(careful, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        found = state_dict.get(f"{prefix}group_size")
        if found is not None and int(found) != self.layout.group_size:
            raise CheckpointError(
                f"{prefix.rstrip('.')} was stored in groups of {int(found)}, and the model has groups of "
                f"{self.layout.group_size}; make it with group_size={int(found)}."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
