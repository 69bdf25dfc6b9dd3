"""Small models that train on a laptop and are built like the large ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import OptionError, ShapeError, unknown_name

__all__ = ["SIZES", "SmallCNN", "TinyGPT", "TinyGPTConfig"]

_BYTES = 256
_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass(frozen=True)
class TinyGPTConfig:
    """Shape of a :class:`TinyGPT`.

    Args:
        dim: Width of the residual stream; a multiple of ``2 * heads``.
        layers: Number of blocks.
        heads: Attention heads of a block.
        hidden: Width inside the SwiGLU.
        context: Longest sequence, in bytes.
    """

    dim: int = 128
    layers: int = 5
    heads: int = 4
    hidden: int = 344
    context: int = 256

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads, self.hidden, self.context) < 1:
            raise OptionError(f"every size of a TinyGPT must be at least 1; got {self}.")
        if self.dim % (2 * self.heads):
            # Rotary positions turn pairs of coordinates, so a head needs an even width.
            raise OptionError(f"dim must be a multiple of 2 * heads = {2 * self.heads}; got dim={self.dim}.")


SIZES: dict[str, TinyGPTConfig] = {
    "0.2M": TinyGPTConfig(dim=64, layers=4, heads=4, hidden=176),
    "1M": TinyGPTConfig(dim=128, layers=5, heads=4, hidden=344),
    "3M": TinyGPTConfig(dim=192, layers=6, heads=6, hidden=512),
    "10M": TinyGPTConfig(dim=384, layers=6, heads=6, hidden=1024),
    "30M": TinyGPTConfig(dim=512, layers=9, heads=8, hidden=1376),
}


def _linear(inputs: int, outputs: int, *, std: float, generator: torch.Generator) -> nn.Linear:
    layer = _bare(nn.Linear, inputs, outputs, bias=False)
    _fill(layer.weight, torch.randn(outputs, inputs, generator=generator) * std)
    return layer


def _bare(kind: type[_Layer], *sizes: int, **options: Any) -> _Layer:
    """A layer whose own initialisation, which would draw from the global generator, is skipped."""
    return cast("_Layer", nn.utils.skip_init(kind, *sizes, **options))


@torch.no_grad()
def _fill(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)


class _Attention(nn.Module):
    def __init__(self, config: TinyGPTConfig, generator: torch.Generator) -> None:
        super().__init__()
        d, std = config.dim, config.dim**-0.5
        self.heads = config.heads
        self.q = _linear(d, d, std=std, generator=generator)
        self.k = _linear(d, d, std=std, generator=generator)
        self.v = _linear(d, d, std=std, generator=generator)
        # 1/sqrt(2 layers): the residual stream sums 2 * layers branches and should keep its scale.
        self.o = _linear(d, d, std=std * (2 * config.layers) ** -0.5, generator=generator)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", h=self.heads) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        return self.o(rearrange(y, "b h t d -> b t (h d)"))


class _SwiGLU(nn.Module):
    def __init__(self, config: TinyGPTConfig, generator: torch.Generator) -> None:
        super().__init__()
        d, h = config.dim, config.hidden
        self.gate = _linear(d, h, std=d**-0.5, generator=generator)
        self.up = _linear(d, h, std=d**-0.5, generator=generator)
        self.down = _linear(h, d, std=(2 * config.layers * h) ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Block(nn.Module):
    def __init__(self, config: TinyGPTConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, eps=1e-6)
        self.attn = _Attention(config, generator)
        self.norm2 = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp = _SwiGLU(config, generator)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: coordinate ``i`` of a head turns with coordinate ``i + d/2``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class TinyGPT(nn.Module):
    r"""A byte-level language model with the parts of today's large ones: RMSNorm, rotary positions, SwiGLU, no biases.

    ``p(next byte | bytes so far) = softmax(head(norm(blocks(embed(bytes)))))``; text needs no tokenizer.

    Args:
        size: ``"0.2M"``, ``"1M"``, ``"3M"``, ``"10M"``, ``"30M"`` (parameters, roughly) or a :class:`TinyGPTConfig`.
        seed: Seed of the initial weights; default 0. The global generator is not touched.
        **overrides: Fields of :class:`TinyGPTConfig` to replace, for example ``context=512``.

    Raises:
        UnknownNameError: No such size or field.
        OptionError: Sizes that do not fit together.

    Example:
        >>> model = TinyGPT("0.2M")
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 256])

    Numerics:
        float32 weights; about ``6 * parameters`` FLOP a byte for forward and backward.

    References:
        A. Karpathy (2022), nanoGPT, for the scale; H. Touvron et al. (2023), LLaMA, arXiv 2302.13971, for the parts.
        The input embedding and the output head are not tied, so that each is one matrix with one role.
    """

    def __init__(self, size: str | TinyGPTConfig = "1M", *, seed: int = 0, **overrides: int) -> None:
        super().__init__()
        if isinstance(size, str) and size not in SIZES:
            raise unknown_name("TinyGPT size", size, SIZES)
        base = SIZES[size] if isinstance(size, str) else size
        for name in overrides:
            if name not in asdict(base):
                raise unknown_name("TinyGPT option", name, asdict(base))
        self.config = replace(base, **overrides)
        d, g = self.config.dim, torch.Generator().manual_seed(seed)
        self.embed = _bare(nn.Embedding, _BYTES, d)
        _fill(self.embed.weight, torch.randn(_BYTES, d, generator=g) * 0.5)
        self.blocks = nn.ModuleList(_Block(self.config, g) for _ in range(self.config.layers))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.head = _linear(d, _BYTES, std=0.5 * d**-0.5, generator=g)
        half = d // self.config.heads // 2
        angles = torch.arange(self.config.context)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Integer[Tensor, "batch time"]) -> Float[Tensor, "batch time 256"]:
        """Logits of the next byte at every position.

        Args:
            ids: Bytes 0 ... 255, shape ``(batch, time)``, ``time <= config.context``.

        Returns:
            Logits, shape ``(batch, time, 256)``.

        Raises:
            ShapeError: The sequence is longer than the context.
        """
        time = ids.shape[-1]
        if time > self.config.context:
            raise ShapeError(f"a sequence may hold at most context = {self.config.context} bytes; got {time}.")
        cos, sin = self.cos[:time], self.sin[:time]  # type: ignore[index]
        x = self.embed(ids.long())
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x)).float()

    @torch.no_grad()
    def generate(
        self, prompt: str, *, length: int = 200, temperature: float = 0.8, generator: torch.Generator | None = None
    ) -> str:
        """Text continued from ``prompt``, one sampled byte at a time.

        Args:
            prompt: Text to start from, at least one byte.
            length: Bytes to add, ``>= 0``; default 200.
            temperature: Above 0; lower is more certain; default 0.8.
            generator: Source of randomness; default a generator seeded with 0, so that equal calls agree.

        Returns:
            Prompt and continuation.

        Raises:
            OptionError: Empty prompt, negative length or a temperature that is not positive.

        Example:
            >>> text = TinyGPT("0.2M").generate("We ", length=4)
            >>> text.startswith("We ")
            True
        """
        ids = list(prompt.encode())
        if not ids or length < 0 or not temperature > 0:
            raise OptionError(f"need a prompt, length >= 0, temperature > 0; got {prompt!r}, {length}, {temperature}.")
        source = torch.Generator().manual_seed(0) if generator is None else generator
        device = self.embed.weight.device
        for _ in range(length):
            window = torch.tensor([ids[-self.config.context :]], device=device)
            logits = self(window)[0, -1].cpu() / temperature
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=source)))
        return bytes(ids).decode("utf-8", errors="replace")


class SmallCNN(nn.Module):
    """Two convolutions and two linear layers for images of one channel: the smallest model with conv matrices.

    Args:
        classes: Number of outputs; default 10.
        width: Channels of the first convolution; default 16.
        seed: Seed of the initial weights; default 0.

    Example:
        >>> SmallCNN()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, *, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.conv1 = _bare(nn.Conv2d, 1, width, 3, padding=1)
        self.conv2 = _bare(nn.Conv2d, width, 2 * width, 3, padding=1)
        self.hidden = _bare(nn.Linear, 2 * width * 16, 64)
        self.head = _bare(nn.Linear, 64, classes)
        for layer in (self.conv1, self.conv2, self.hidden, self.head):
            weight, bias = cast("list[Tensor]", [layer.weight, layer.bias])
            _fill(weight, torch.randn(weight.shape, generator=g) * (2 / weight[0].numel()) ** 0.5)
            _fill(bias, torch.zeros_like(bias))

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        """Class scores of a batch of images."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        # A fixed 4 x 4 grid lets 28 x 28 garments and 8 x 8 digits share the model.
        x = F.adaptive_avg_pool2d(F.relu(self.conv2(x)), 4)
        return self.head(F.relu(self.hidden(x.flatten(1))))
