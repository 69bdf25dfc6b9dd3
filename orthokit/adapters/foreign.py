r"""Quantised layers of bitsandbytes and torchao as places for adapters; neither package is imported before it is met.

Known by class: ``Linear4bit`` and ``Linear8bitLt`` (with their subclasses), and ``nn.Linear`` with a weight that is one
of torchao's tensors. The forward pass is the layer's own, the dense weight that of its own dequantisation. Merging
gives a plain ``nn.Linear``, which no longer quantises activations where the layer did.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters.quantized import dense_product, plain_linear
from orthokit.adapters.sites import KINDS, Kind
from orthokit.errors import ParameterError

__all__ = []

_INT8 = 127


def _is_a(layer: object, package: str, name: str) -> bool:
    """Whether an object is of a class of a package, or of a subclass, without importing it."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(layer).__mro__)


class _ForeignKind(Kind):
    """A quantised layer with ``in_features``, ``out_features``, ``weight`` and ``bias``."""

    casts = True

    def call(self, layer: Any, x: Tensor, *, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        if weight is not None:
            return dense_product(layer, x, weight, bias)
        y = layer(x)
        # Their products take the bias with them: it is taken off again, which costs a rounding.
        return y if bias or layer.bias is None else y - layer.bias.to(y.dtype)

    def plain(self, layer: Any, weight: Tensor) -> nn.Module:
        return plain_linear(layer, weight)


class _Linear4bitKind(_ForeignKind):
    """``bitsandbytes.nn.Linear4bit``; the type of merged layers is the one that its weight had before."""

    name = "quantized_bnb_4bit"

    def fits(self, layer: nn.Module) -> bool:
        return _is_a(layer, "bitsandbytes", "Linear4bit")

    def dtype(self, layer: Any) -> torch.dtype:
        return _quant_state(layer).dtype

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        state = _quant_state(layer)
        if getattr(state, "packing_format_for_cpu", False):
            # Repacked for a kernel of its own, which alone reads it: rows of I give the columns.
            columns = torch.eye(layer.in_features, dtype=state.dtype, device=layer.weight.device)
            return self.call(layer, columns, bias=False).mT.to(dtype)
        return import_module("bitsandbytes.functional").dequantize_4bit(layer.weight.data, state).to(dtype)


class _Linear8bitKind(_ForeignKind):
    """``bitsandbytes.nn.Linear8bitLt``: a scale per row, and outliers in 16 bits as its threshold says.

    It does not record the type that its weight had: merged layers have that of the bias, else float16 on a GPU and
    float32 on a CPU.
    """

    name = "quantized_bnb_8bit"

    def fits(self, layer: nn.Module) -> bool:
        return _is_a(layer, "bitsandbytes", "Linear8bitLt")

    def dtype(self, layer: Any) -> torch.dtype:
        if layer.weight.is_floating_point():
            return layer.weight.dtype
        if layer.bias is not None:
            return layer.bias.dtype
        return torch.float32 if layer.weight.device.type == "cpu" else torch.float16

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        codes = layer.weight.data
        if codes.is_floating_point():
            return codes.to(dtype)
        # Scales move from the weight to the state at the first call.
        scale = next((s for s in (layer.state.SCB, getattr(layer.weight, "SCB", None)) if s is not None), None)
        if scale is None:
            raise ParameterError("a Linear8bitLt has codes without scales; move it to its device first.")
        return (codes.to(torch.float32) * (scale.to(torch.float32) / _INT8)[:, None]).to(dtype)


class _TorchaoKind(_ForeignKind):
    """``nn.Linear`` with one of torchao's tensors for a weight.

    Some of these have no gradient for their inputs (those that quantise activations), others keep a dense weight for
    it. Here the gradient is that of the dense weight, made anew in the backward pass: activations are passed straight
    through their rounding.
    """

    name = "quantized_torchao"

    def fits(self, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight") if type(layer) is nn.Linear else None
        return weight is not None and type(weight).__module__.split(".")[0] == "torchao"

    def dtype(self, layer: Any) -> torch.dtype:
        return layer.weight.dtype

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        return _dequantized(layer.weight).to(dtype)

    def call(self, layer: Any, x: Tensor, *, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        if weight is not None:
            return dense_product(layer, x, weight, bias)
        return _StraightThrough.apply(x, layer.bias if bias else None, layer.weight)  # type: ignore[return-value]


def _quant_state(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise ParameterError("a Linear4bit is not quantised yet; move it to its device first.")
    return state


def _dequantized(weight: Any) -> Tensor:
    # NF4Tensor has a name of its own for it.
    own = getattr(weight, "get_original_weight", None) or weight.dequantize
    return own().detach()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Any) -> Tensor:
        # On the context and not among the saved tensors: it is no dense one, and frozen.
        ctx.weight = weight
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Its kernels take its own type alone; inputs of another meet the dense weight.
        matrix = weight if weight.dtype == x.dtype else _dequantized(weight).to(x.dtype)
        return F.linear(x, matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = gradient @ _dequantized(ctx.weight).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            db = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
        return dx, db, None


KINDS.insert(0, _TorchaoKind())
KINDS.extend([_Linear4bitKind(), _Linear8bitKind()])
