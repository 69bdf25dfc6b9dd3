"""Layers of every kind with inputs, adapters that have moved, and what merging has to keep: for tests of adapters."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import nn

from orthokit.adapters.layer import AdaptedLayer

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def linear(inputs=12, outputs=7, *, dtype=torch.float64, seed=0):
    """A linear layer with normal weights and bias of its own draw."""
    g = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / math.sqrt(inputs))
    return layer


def inputs(*shape, dtype=torch.float64, seed=1, grad=False):
    """Normal rows."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_(grad)


def part(layer):
    """The one adapter of a layer."""
    return layer.adapters["default"]


class Conv1D(nn.Module):
    """GPT-2's linear layer, known by its name: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@st.composite
def sites(draw, *, conv="channels", kinds=("linear", "transposed", "conv", "embedding"), groups=True):
    """A plain layer in some type, and inputs for it; widths are multiples of 8 within groups."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(kinds))
    width, seed = draw(st.sampled_from([8, 16, 24, 32])), draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    rows = draw(st.sampled_from([(), (1,), (5,), (2, 3), (200,)]))
    if kind == "linear":
        layer = nn.Linear(width, draw(st.sampled_from([1, 6, width, 40])), bias=draw(st.booleans()))
        x = torch.randn(*rows, width, generator=g)
    elif kind == "transposed":
        layer, x = Conv1D(draw(st.sampled_from([6, width, 40])), width), torch.randn(*rows, width, generator=g)
    elif kind == "embedding":
        layer, x = nn.Embedding(11, width), torch.randint(0, 11, rows, generator=g)
    else:
        dims = draw(st.sampled_from([1, 2, 3]))
        parts = draw(st.sampled_from([1, 2])) if groups else 1
        options = {"stride": draw(st.sampled_from([1, 2])), "padding": draw(st.sampled_from([0, 1])), "groups": parts}
        mode = draw(st.sampled_from(["zeros", "circular"]))
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](8 * parts, 4 * parts, 3, padding_mode=mode, **options)
        x = torch.randn(2, 8 * parts, *[5] * dims, generator=g)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(width))
    return layer.to(dtype), x if kind == "embedding" else x.to(dtype)


def moved(layer: AdaptedLayer, seed: int = 0, *, turn: float = 0.3) -> AdaptedLayer:
    """The layer with every adapter somewhere else than at rest."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.adapters.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(noise if name.endswith("vectors") else p + turn * noise)
    return layer


def assert_merged_is_forward(layer: AdaptedLayer, x: torch.Tensor) -> None:
    """The plain layer that ``merged`` makes gives the same outputs, to the rounding of the layer's type."""
    with torch.no_grad():
        adapted, plain = layer(x), layer.merged()(x)
    assert adapted.shape == plain.shape and adapted.dtype == plain.dtype
    weight = layer.effective_weight(dtype=torch.float64).detach()
    inputs = x.double() if x.is_floating_point() else torch.ones(1, dtype=torch.float64)
    # Inputs, weight and result are rounded once an adapter: units of the last place of a typical sum of that length.
    largest = float(inputs.abs().amax()) if inputs.numel() else 0.0
    scale = float(weight.abs().amax()) * max(1.0, largest) * math.sqrt(layer.in_features * layer.site.patch)
    distance = float((adapted.double() - plain.double()).abs().max()) if adapted.numel() else 0.0
    assert distance <= 8 * len(layer.active) * torch.finfo(adapted.dtype).eps * scale
