"""What a POET layer holds in memory and what a whole model would: measured for one layer, counted for large models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters import POET, POETLinear
from orthokit.adapters.block_rotation import side_sizes
from orthokit.errors import unknown_name
from orthokit.linalg import packed_size
from orthokit.studies.step_memory import step_bytes

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LAYER_KINDS",
    "LLAMA",
    "PUBLISHED_PEAK_GB",
    "PUBLISHED_TRAINABLE",
    "DensePOET",
    "LlamaShape",
    "layer_bytes",
    "make_layer",
    "memory_on_paper",
    "memory_table",
    "trainable_by_block",
]

LAYER_KINDS = {
    "plain": "nn.Linear, its weight trained",
    "dense": "POET with the effective weight formed in every forward pass",
    "fast": "POET, input-centric, one product kept for the backward pass",
    "low": "POET, input-centric, that product recomputed",
    "weight": "POET, its weight formed in each pass and forgotten between them",
    "low, uint8": "input-centric, recomputed, with the frozen weight in eight bits",
}

# Peak memory in GB on one H100, batch 1, by length: Z. Qiu et al. (2026), POET-X, arXiv 2603.05500, table 9.
PUBLISHED_PEAK_GB: dict[str, dict[str, dict[int, float | None]]] = {
    "8B": {
        "AdamW": {512: 78.9, 1024: 76.3, 2048: 78.7},
        "fast": {512: 28.7, 1024: 33.1, 2048: 43.1},
        "low": {512: 25.9, 1024: 27.9, 2048: 31.7},
        "low, uint8": {512: 20.6, 1024: 23.6, 2048: 29.8},
    },
    "13B": {
        "AdamW": {512: None, 1024: None, 2048: None},  # out of memory
        "fast": {512: 42.8, 1024: 49.0, 2048: 61.9},
        "low": {512: 35.7, 1024: 41.6, 2048: 47.2},
        "low, uint8": {512: 30.1, 1024: 34.6, 2048: 43.6},
    },
}
# Trained numbers of the linear layers in millions, by block: Z. Qiu et al. (2025), arXiv 2506.08001, table 2.
PUBLISHED_TRAINABLE = {"1.3B": {64: 29.22, 128: 58.91, 256: 118.26}}


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that a memory estimate needs.

    Args:
        layers: Blocks.
        dim: Width.
        hidden: Width inside the SwiGLU.
        kv: Width of keys and of values.
        vocabulary: Rows of the embedding and of the head.
    """

    layers: int
    dim: int
    hidden: int
    kv: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """``(out, in)`` of the linear layers of a block."""
        d, h, kv = self.dim, self.hidden, self.kv
        return [(d, d), (kv, d), (kv, d), (d, d), (h, d), (h, d), (d, h)]


LLAMA = {
    # 5376 = 21 * 256: the published runs brought the hidden width to a multiple of the block.
    "1.3B": LlamaShape(layers=24, dim=2048, hidden=5376, kv=2048, vocabulary=32_000),
    "8B": LlamaShape(layers=32, dim=4096, hidden=14_336, kv=1024, vocabulary=128_256),
    "13B": LlamaShape(layers=40, dim=5120, hidden=13_824, kv=5120, vocabulary=32_000),
}


class DensePOET(nn.Module):
    """The formulation that POET-X replaced: the effective weight is formed and autograd keeps what that takes.

    Args:
        layer: The layer whose parameters it uses.

    Example:
        >>> layer = POETLinear(nn.Linear(8, 6), POET(4))
        >>> x = torch.ones(2, 8)
        >>> torch.allclose(DensePOET(layer)(x), layer(x), atol=1e-6)
        True
    """

    def __init__(self, layer: POETLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.effective_weight(), self.layer.bias)


def make_layer(kind: str, inputs: int, outputs: int, *, block_size: int = 64, map: str = "cayley_neumann") -> nn.Module:
    """A layer to measure, without bias, its generators a little away from 0.

    Args:
        kind: One of ``LAYER_KINDS``.
        inputs: ``in``.
        outputs: ``out``.
        block_size: ``b``; default 64.
        map: How rotations are made; default ``"cayley_neumann"``, as published.

    Returns:
        The layer.

    Raises:
        UnknownNameError: No such kind.
    """
    if kind not in LAYER_KINDS:
        raise unknown_name("kind of layer", kind, LAYER_KINDS)
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")  # on meta nothing is drawn
    linear.weight = nn.Parameter(torch.randn(outputs, inputs, generator=g) / inputs**0.5)
    if kind == "plain":
        return linear
    memory = {"low": "low", "low, uint8": "low", "weight": "weight"}.get(kind, "fast")
    config = POET(block_size, memory=memory, quantize="uint8" if "uint8" in kind else None, map=map)
    layer = config.wrap(linear, keep_base=False, track_spectrum=False)
    with torch.no_grad():
        for side in (layer.input, layer.output):
            side.generator.normal_(std=1e-3, generator=g)
    return DensePOET(layer) if kind == "dense" else layer


def layer_bytes(kind: str, inputs: int, outputs: int, *, rows: int, block_size: int = 64) -> dict[str, int]:
    """What one layer holds in memory through a training step with AdamW, measured.

    Args:
        kind: One of ``LAYER_KINDS``.
        inputs: ``in``.
        outputs: ``out``.
        rows: Tokens of the batch.
        block_size: ``b``; default 64.

    Returns:
        Bytes: ``weights`` (parameters, codes and orders), ``gradients``, ``moments`` (the optimizer's state) and
        ``kept`` (what the forward pass keeps for the backward, the input included, each storage once).

    Raises:
        UnknownNameError: No such kind.

    Example:
        >>> plain, low = (layer_bytes(kind, 64, 64, rows=32, block_size=16) for kind in ("plain", "low"))
        >>> low["moments"] / plain["moments"] < (16 - 1) / 64 * 1.01
        True
    """
    layer = make_layer(kind, inputs, outputs, block_size=block_size)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return step_bytes(layer, x)


def memory_table(
    inputs: int, outputs: int, *, rows: int, block_size: int = 64, kinds: Sequence[str] = tuple(LAYER_KINDS)
) -> pd.DataFrame:
    """:func:`layer_bytes` of several kinds of layer.

    Args:
        inputs: ``in``.
        outputs: ``out``.
        rows: Tokens of the batch.
        block_size: ``b``; default 64.
        kinds: Some of ``LAYER_KINDS``; default all.

    Returns:
        One row per kind, columns ``weights, gradients, moments, kept`` in bytes.
    """
    import pandas as pd

    measured = {kind: layer_bytes(kind, inputs, outputs, rows=rows, block_size=block_size) for kind in kinds}
    return pd.DataFrame.from_dict(measured, orient="index")


def trainable_by_block(model: str, block_size: int) -> int:
    """The numbers that POET trains in the linear layers of a large model.

    Args:
        model: A name in ``LLAMA``.
        block_size: ``b``.

    Returns:
        Sum over both sides of all layers.

    Example:
        >>> round(trainable_by_block("1.3B", 64) / 1e6, 2)  # the published table says 29.22
        29.22
    """
    shape = _shape(model)
    sides = [side for pair in shape.linears for side in pair]
    return shape.layers * sum(packed_size(b) for side in sides for b in side_sizes(side, block_size, "block"))


def memory_on_paper(model: str, *, block_size: int = 256, length: int = 2048) -> pd.DataFrame:
    """Memory of training a large model in bfloat16 at batch 1, counted, next to the published peak.

    Weights, gradients and two moments take 2 bytes a number; the embedding and the head are trained by AdamW in every
    method. ``kept`` is what the linear layers keep: their inputs, shared ones once, and for ``"fast"`` also one product
    a layer. Attention, normalisation, logits and workspace are not counted: a measured peak is larger.

    Args:
        model: A name in ``LLAMA``.
        block_size: ``b``; default 256 as published.
        length: Tokens; default 2048.

    Returns:
        One row per method, in GB (1e9 bytes): ``weights, gradients, moments, kept, counted, published peak`` (NaN where
        there is none).

    Raises:
        UnknownNameError: No such model.

    Example:
        >>> paper = memory_on_paper("8B")
        >>> bool((paper["counted"] < paper["published peak"]).all())
        True
    """
    import pandas as pd

    shape = _shape(model)
    linear = shape.layers * sum(m * n for m, n in shape.linears)
    rest = 2 * shape.vocabulary * shape.dim
    generators = trainable_by_block(model, block_size)
    inputs = shape.layers * length * (3 * shape.dim + shape.hidden)
    products = shape.layers * length * sum(m for m, _ in shape.linears)
    published = PUBLISHED_PEAK_GB.get(model, {})
    rows = {}
    for method in ("AdamW", "fast", "low", "low, uint8"):
        trained = rest + (linear if method == "AdamW" else generators)
        frozen = 0.0 if method == "AdamW" else linear * (1 + 5 / 256 if "uint8" in method else 2)
        parts = {
            "weights": 2 * trained + frozen,
            "gradients": 2.0 * trained,
            "moments": 4.0 * trained,
            "kept": 2.0 * (inputs + (products if method == "fast" else 0)),
        }
        gigabytes = {name: size / 1e9 for name, size in parts.items()}
        peak = published.get(method, {}).get(length)
        rows[method] = {**gigabytes, "counted": sum(gigabytes.values()), "published peak": peak}
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def _shape(model: str) -> LlamaShape:
    if model not in LLAMA:
        raise unknown_name("model", model, LLAMA)
    return LLAMA[model]
