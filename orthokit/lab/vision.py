"""A small vision transformer, and the weights of one that knows five kinds of garment."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import OptionError, ShapeError
from orthokit.lab._assets import asset_bytes, asset_json
from orthokit.lab.models import _bare, _fill

__all__ = ["SmallViT", "load_small_vit"]

_ASSET = "vit_garments"
_SIDE = 28


def _linear(inputs: int, outputs: int, generator: torch.Generator, *, scale: float = 1.0) -> nn.Linear:
    layer = _bare(nn.Linear, inputs, outputs)
    _fill(layer.weight, torch.randn(outputs, inputs, generator=generator) * (scale * inputs**-0.5))
    _fill(layer.bias, torch.zeros(outputs))
    return layer


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (_linear(dim, dim, generator) for _ in range(3))
        self.o = _linear(dim, dim, generator, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", h=self.heads) for f in (self.q, self.k, self.v))
        return self.o(rearrange(F.scaled_dot_product_attention(q, k, v), "b h t d -> b t (h d)"))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.up, self.down = _linear(dim, hidden, generator), _linear(hidden, dim, generator, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Attention(dim, heads, scale, generator)
        self.mlp = _MLP(dim, hidden, scale, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    r"""A vision transformer for 28 x 28 grey pictures, small enough to fine-tune in seconds on one core.

    ``scores = head(features)``, ``features = mean(norm(blocks(patches W + positions)))`` over the patches.

    Args:
        classes: Outputs, ``>= 2``; default 10.
        patch: Side of a patch in pixels, a divisor of 28; default 7, which makes 16 patches.
        dim: Width, a multiple of ``heads``; default 64.
        layers: Blocks; default 3.
        heads: Default 4.
        hidden: Width inside a block's MLP; default 128.
        seed: Of the initial weights; default 0. The global generator is not touched.

    Raises:
        OptionError: Sizes out of range or that do not fit together.

    Example:
        >>> model = SmallViT(classes=5)
        >>> model(torch.zeros(2, 1, 28, 28)).shape, model.features(torch.zeros(2, 1, 28, 28)).shape
        (torch.Size([2, 5]), torch.Size([2, 64]))

    Numerics:
        float32; 104,000 parameters at the default sizes, about 10 MFLOP a picture for forward and backward.

    References:
        A. Dosovitskiy et al. (2020), An image is worth 16 x 16 words, arXiv 2010.11929; here with the mean over the
        patches in place of a class token.
    """

    def __init__(
        self,
        classes: int = 10,
        *,
        patch: int = 7,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        hidden: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if classes < 2 or min(dim, layers, heads, hidden) < 1:
            raise OptionError(f"need classes >= 2 and other sizes >= 1; got {classes, dim, layers, heads, hidden}.")
        if patch < 1 or _SIDE % patch or dim % heads:
            raise OptionError(
                f"patch must divide {_SIDE} and heads must divide dim; got patch={patch}, dim={dim}, heads={heads}."
            )
        g = torch.Generator().manual_seed(seed)
        self.sizes = {"patch": patch, "dim": dim, "layers": layers, "heads": heads, "hidden": hidden}
        self.patches = _linear(patch * patch, dim, g)
        self.positions = nn.Parameter(torch.randn((_SIDE // patch) ** 2, dim, generator=g) * 0.02)
        # The residual stream sums 2 * layers branches and should keep its scale.
        scale = (2 * layers) ** -0.5
        self.blocks = nn.ModuleList(_Block(dim, heads, hidden, scale, g) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = _linear(dim, classes, g)

    def features(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch dim"]:
        """What the head sees: the mean over the patches.

        Args:
            images: Grey values in [0, 1], 28 x 28.

        Raises:
            ShapeError: Another size.
        """
        if images.shape[-2:] != (_SIDE, _SIDE):
            raise ShapeError(f"pictures must be {_SIDE} x {_SIDE}; got {tuple(images.shape[-2:])}. Resize them first.")
        patch = self.sizes["patch"]
        cut = rearrange(images, "b 1 (h p) (w q) -> b (h w) (p q)", p=patch, q=patch)
        x = self.patches(cut) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores of a batch of pictures."""
        return self.head(self.features(images))


def load_small_vit() -> SmallViT:
    """A :class:`SmallViT` that was trained on the first five classes of Fashion-MNIST, with its head of five outputs.

    Returns:
        The model, in evaluation mode; how it was trained is in ``record.json`` beside its weights.

    Raises:
        AssetError: A file is missing or damaged.

    Example:
        >>> load_small_vit()(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 5])
    """
    from safetensors.torch import load

    record = asset_json(_ASSET, "record.json")
    model = SmallViT(record["model"]["classes"], **record["model"]["sizes"])
    model.load_state_dict(load(asset_bytes(_ASSET, "model.safetensors")))
    return model.eval()
