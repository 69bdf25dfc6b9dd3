r"""The kinds of layers that adapters sit on, and how each one's weight is read as a matrix ``(out, in)``."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import DtypeError

__all__ = ["KINDS", "Kind", "Site", "kind_of"]


@dataclass(frozen=True)
class Site:
    """What an adapter has to know about the layer that it sits on.

    Args:
        name: Of the layer in the model, for messages.
        kind: Name of the kind, such as ``"linear"``, ``"conv"`` or ``"embedding"``.
        in_features: Width of the rows that an adapter of the inputs turns: inputs, channels, or the width of an
            embedding.
        out_features: Rows of the weight as a matrix: outputs, or the words of an embedding.
        groups: Inputs are in this many groups that must not be mixed (grouped convolutions); else 1.
        patch: Entries of a convolution's kernel; else 1. Its weight as a matrix of patches has
            ``in_features / groups * patch`` columns.
        dtype: Of the adapter's own parameters: at least float32.
        device: Of the adapter's own parameters.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    groups: int
    patch: int
    dtype: torch.dtype
    device: torch.device


class Kind:
    """A kind of layer; this one is ``nn.Linear``."""

    name = "linear"
    #: Whether an adapter may turn the inputs, rows in the last dimension.
    rows = True
    #: Whether the layer takes inputs of any floating type, and computes in theirs.
    casts = False

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer is of this kind; subclasses are not, as their owners may read the weight themselves."""
        return type(layer) is nn.Linear

    def shape(self, layer: Any) -> tuple[int, int]:
        """``(out, in)`` of the matrix."""
        return layer.out_features, layer.in_features

    def site(self, layer: nn.Module, name: str) -> Site:
        """What adapters are told about the layer."""
        rows, columns = self.shape(layer)
        dtype = self.dtype(layer)
        if not dtype.is_floating_point:
            raise DtypeError(f"adapters need a real floating weight; that of {name!r} is {dtype}.")
        groups = getattr(layer, "groups", 1)
        return Site(
            name=name,
            kind=self.name,
            in_features=columns,
            out_features=rows,
            groups=groups,
            patch=self.patch(layer),
            dtype=torch.promote_types(dtype, torch.float32),
            device=self.device(layer),
        )

    def patch(self, layer: nn.Module) -> int:
        """Entries of the kernel."""
        return 1

    def dtype(self, layer: Any) -> torch.dtype:
        """The type that the layer computes in."""
        return layer.weight.dtype

    def device(self, layer: Any) -> torch.device:
        """Where the layer is."""
        return layer.weight.device

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The dense weight as the layer lays it out; a copy only where the types differ."""
        return layer.weight.to(dtype)

    def matrix(self, layer: nn.Module, weight: Tensor, view: str) -> Tensor:
        """A weight ``(..., out, in)``; ``view`` is ``"channels"`` or ``"patches"``, which differ for convolutions."""
        return weight

    def unmatrix(self, layer: nn.Module, matrix: Tensor, view: str) -> Tensor:
        """The inverse of :meth:`matrix`."""
        return matrix

    def call(self, layer: Any, x: Tensor, *, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        """The layer on inputs, with another weight, or without its bias."""
        if weight is None and bias:
            return layer(x)
        return F.linear(x, layer.weight if weight is None else weight, layer.bias if bias else None)

    def plain(self, layer: Any, weight: Tensor) -> nn.Module:
        """A layer like this one with parameters of its own: this weight, and a copy of the bias."""
        return copy.deepcopy(layer, {id(layer.weight): nn.Parameter(weight)})


class _TransposedKind(Kind):
    """GPT-2's ``Conv1D``, which is a linear layer with its weight stored ``(in, out)``."""

    name = "conv1d_transposed"

    def fits(self, layer: nn.Module) -> bool:
        return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and getattr(layer, "weight", None) is not None

    def shape(self, layer: Any) -> tuple[int, int]:
        columns, rows = layer.weight.shape
        return rows, columns

    def matrix(self, layer: nn.Module, weight: Tensor, view: str) -> Tensor:
        return weight.mT

    def unmatrix(self, layer: nn.Module, matrix: Tensor, view: str) -> Tensor:
        return matrix.mT.contiguous()

    def call(self, layer: Any, x: Tensor, *, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        if weight is None and bias:
            return layer(x)
        return F.linear(x, (layer.weight if weight is None else weight).mT, layer.bias if bias else None)


class _ConvKind(Kind):
    """``nn.Conv1d`` to ``nn.Conv3d``: a matrix for every place of the kernel, or one for whole patches."""

    name = "conv"
    rows = False

    def fits(self, layer: nn.Module) -> bool:
        return type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.out_channels, layer.in_channels

    def patch(self, layer: Any) -> int:
        return layer.weight[0, 0].numel()

    def matrix(self, layer: Any, weight: Tensor, view: str) -> Tensor:
        if view == "patches":
            return weight.flatten(1)
        W = weight.flatten(2).movedim(-1, 0)  # (places, out, in / groups)
        if layer.groups == 1:
            return W
        # Dense over all inputs, zero between groups: a rotation within groups keeps it so.
        K, out, width = W.shape
        dense = W.new_zeros(K, layer.groups, out // layer.groups, layer.groups, width)
        g = torch.arange(layer.groups, device=W.device)
        dense[:, g, :, g] = W.view(K, layer.groups, out // layer.groups, width).movedim(1, 0)
        return dense.view(K, out, layer.groups * width)

    def unmatrix(self, layer: Any, matrix: Tensor, view: str) -> Tensor:
        shape = layer.weight.shape
        if view == "patches":
            return matrix.reshape(shape)
        if layer.groups > 1:
            K, out, _ = matrix.shape
            g = torch.arange(layer.groups, device=matrix.device)
            parts = matrix.view(K, layer.groups, out // layer.groups, layer.groups, shape[1])[:, g, :, g]
            matrix = parts.movedim(0, 1).reshape(K, out, shape[1])
        return matrix.movedim(0, -1).reshape(shape)

    def call(self, layer: Any, x: Tensor, *, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        if weight is None and bias:
            return layer(x)
        # The module's own method knows its stride and its padding, circular and reflected as well.
        return layer._conv_forward(x, layer.weight if weight is None else weight, layer.bias if bias else None)


class _EmbeddingKind(Kind):
    """``nn.Embedding``: looked-up rows are turned; the matrix is (words, width)."""

    name = "embedding"

    def fits(self, layer: nn.Module) -> bool:
        return type(layer) is nn.Embedding

    def shape(self, layer: Any) -> tuple[int, int]:
        return layer.num_embeddings, layer.embedding_dim


KINDS: list[Kind] = [Kind(), _TransposedKind(), _ConvKind(), _EmbeddingKind()]


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer, or ``None`` if no adapter can sit on it."""
    return next((kind for kind in KINDS if kind.fits(layer)), None)
