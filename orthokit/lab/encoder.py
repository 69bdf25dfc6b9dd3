"""A BERT of plain torch modules that makes sentences into vectors, and a classifier on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import OptionError, ShapeError

__all__ = ["EncoderConfig", "SentenceClassifier", "SentenceEncoder"]

_Layer = TypeVar("_Layer", bound=nn.Module)
# Of the published initialisation; a layer norm follows every use.
_STD = 0.02


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a :class:`SentenceEncoder`; the defaults are those of all-MiniLM-L6-v2.

    Args:
        vocabulary: Number of tokens; token 0 is padding.
        dim: Width of the residual stream; a multiple of ``heads``.
        layers: Number of blocks.
        heads: Attention heads of a block.
        hidden: Width inside the feed-forward part.
        positions: Longest sequence, in tokens.
        eps: Of the layer norms.
    """

    vocabulary: int = 30_522
    dim: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    positions: int = 512
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if min(self.vocabulary, self.dim, self.layers, self.heads, self.hidden, self.positions) < 1:
            raise OptionError(f"every size of an encoder must be at least 1; got {self}.")
        if self.dim % self.heads:
            raise OptionError(f"dim must be a multiple of heads = {self.heads}; got dim={self.dim}.")


def _drawn(layer: type[_Layer], *sizes: int, generator: torch.Generator) -> _Layer:
    """A layer with normal weights and a bias of 0; what it draws itself leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        made = layer(*sizes)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * _STD if name == "weight" else torch.zeros(p.shape))
    return made


class SentenceEncoder(nn.Module):
    r"""One vector a sentence: the mean over tokens of a BERT's last hidden states.

    ``x = LN(word + position + type)``; in every block ``x = LN(x + O(attention(x)))`` and ``x = LN(x + W_2 gelu(W_1
    x))``, the norms after the sums.

    Args:
        config: Its shape; default that of all-MiniLM-L6-v2.
        seed: Of the initial weights; default 0. The global generator is not touched.

    Example:
        >>> encoder = SentenceEncoder(EncoderConfig(vocabulary=50, dim=8, layers=1, heads=2, hidden=16, positions=6))
        >>> encoder(torch.tensor([[1, 2, 3, 0]])).shape
        torch.Size([1, 8])

    Numerics:
        float32; the vector does not depend on how much padding stands behind a sentence, to rounding. About
        ``6 * 10.6 M`` FLOP a token for forward and backward at the default shape.

    References:
        J. Devlin et al. (2018), BERT, arXiv 1810.04805; W. Wang et al. (2020), MiniLM, arXiv 2002.10957; N. Reimers and
        I. Gurevych (2019), Sentence-BERT, arXiv 1908.10084, section 3 (mean pooling; the vector is not scaled to length
        1 here). Names of parameters are those of the published weights, so that adapters made for BERT fit.
    """

    def __init__(self, config: EncoderConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = EncoderConfig() if config is None else config
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = _Embeddings(self.config, generator)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(_Block(self.config, generator) for _ in range(self.config.layers))

    def hidden_states(
        self, ids: Integer[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time dim"]:
        """The last hidden state of every token.

        Args:
            ids: Tokens, shape ``(batch, time)``, ``time <= config.positions``.
            mask: Which are tokens and not padding; default ``ids != 0``. At least one in every row.

        Returns:
            Shape ``(batch, time, dim)``; at padding nothing of meaning.

        Raises:
            ShapeError: The sequence is longer than there are positions.
            OptionError: A sentence without a token.
        """
        time = ids.shape[-1]
        if time > self.config.positions:
            raise ShapeError(f"a sentence may hold at most positions = {self.config.positions} tokens; got {time}.")
        mask = ids != 0 if mask is None else mask
        if _known(mask.any(-1).all()) is False:
            raise OptionError("every sentence needs at least one token that is not padding (0).")
        x = self.embeddings(ids.long())
        seen = None if _known(mask.all()) else mask[:, None, None, :]
        for block in cast("nn.ModuleList", self.encoder.layer):
            x = block(x, seen)
        return x

    def forward(
        self, ids: Integer[Tensor, "batch time"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Sentence vectors.

        Args:
            ids: As for :meth:`hidden_states`.
            mask: As for :meth:`hidden_states`.

        Returns:
            Mean over the tokens that are not padding, shape ``(batch, dim)``.
        """
        mask = ids != 0 if mask is None else mask
        weight = mask[..., None].to(self.embeddings.word_embeddings.weight.dtype)
        return (self.hidden_states(ids, mask) * weight).sum(1) / weight.sum(1)


class SentenceClassifier(nn.Module):
    """A linear head on the vectors of a :class:`SentenceEncoder`.

    Args:
        encoder: The encoder; it is used, not copied.
        classes: Number of classes, ``>= 2``.
        seed: Of the head's initial weights; default 0.

    Raises:
        OptionError: Fewer than two classes.

    Example:
        >>> encoder = SentenceEncoder(EncoderConfig(vocabulary=50, dim=8, layers=1, heads=2, hidden=16, positions=6))
        >>> SentenceClassifier(encoder, 3)(torch.tensor([[1, 2, 3, 0]])).shape
        torch.Size([1, 3])
    """

    def __init__(self, encoder: SentenceEncoder, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        if classes < 2:
            raise OptionError(f"a classifier needs at least 2 classes; got {classes}.")
        self.encoder = encoder
        self.head = _drawn(nn.Linear, encoder.config.dim, classes, generator=torch.Generator().manual_seed(seed))

    def forward(self, ids: Integer[Tensor, "batch time"]) -> Float[Tensor, "batch classes"]:
        """Class scores of sentences, ``ids`` padded with 0."""
        return self.head(self.encoder(ids))


class _Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.word_embeddings = _drawn(nn.Embedding, config.vocabulary, config.dim, generator=generator)
        self.position_embeddings = _drawn(nn.Embedding, config.positions, config.dim, generator=generator)
        # One sentence at a time: only the first of the two types of the published weights is ever looked up.
        self.token_type_embeddings = _drawn(nn.Embedding, 2, config.dim, generator=generator)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[-1], device=ids.device)
        x = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(place))
        return self.LayerNorm(x + self.position_embeddings(place))


class _Block(nn.Module):
    def __init__(self, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = _Attention(config, generator)
        self.intermediate = _Dense(config.dim, config.hidden, generator)
        self.output = _Output(config.hidden, config, generator)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        x = self.attention(x, seen)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class _Attention(nn.Module):
    def __init__(self, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = config.heads
        self.self = nn.ModuleDict(
            {name: _drawn(nn.Linear, config.dim, config.dim, generator=generator) for name in ("query", "key", "value")}
        )
        self.output = _Output(config.dim, config, generator)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        parts = (self.self[name](x) for name in ("query", "key", "value"))
        q, k, v = (rearrange(part, "b t (h d) -> b h t d", h=self.heads) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.output(rearrange(mixed, "b h t d -> b t (h d)"), x)


class _Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dense = _drawn(nn.Linear, inputs, outputs, generator=generator)


class _Output(_Dense):
    """A branch's last product, added to what went past the branch, then normalised."""

    def __init__(self, inputs: int, config: EncoderConfig, generator: torch.Generator) -> None:
        super().__init__(inputs, config.dim, generator)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, branch: Tensor, past: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(branch) + past)


def _known(flag: Tensor) -> bool | None:
    """The value of a flag; ``None`` under ``vmap``, where a tensor has one for each example."""
    try:
        return bool(flag)
    except RuntimeError:
        return None
