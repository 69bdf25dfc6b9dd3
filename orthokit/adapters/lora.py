r"""LoRA: a trainable change of low rank beside the frozen weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters._initialise import stream_generator
from orthokit.adapters.base import Adapter, PartConfig
from orthokit.adapters.sites import Site
from orthokit.errors import NonFiniteError, OptionError, unknown_name

__all__ = ["LoRA", "LoRAAdapter"]

INITS = ("kaiming", "gaussian", "pissa", "milora")
_SPECTRAL = ("pissa", "milora")
_DOWN = 3


@dataclass(frozen=True)
class LoRA(PartConfig):
    r"""Options of LoRA: ``T(W) = W + s (B A - B_0 A_0)``, with ``A`` (rank, in) and ``B`` (out, rank) trained.

    ``s = alpha / rank``, or ``alpha / sqrt(rank)`` rank-stabilised. ``B_0 A_0`` is where training begins: 0 for the
    usual starts, the top or bottom singular triplets of ``W`` over ``s`` for PiSSA and MiLoRA.

    Args:
        rank: ``r``, from 1 to the smaller side of the weight; default 16.
        alpha: ``> 0``, or ``None`` (default) for a scale ``s`` of 1.
        init: ``"kaiming"`` (default): ``A`` uniform in ``+-1 / sqrt(in)``, ``B = 0``. ``"gaussian"``: ``A`` normal with
            standard deviation ``1 / rank``, ``B = 0``. ``"pissa"``: the ``rank`` largest singular triplets of ``W``,
            shared out evenly. ``"milora"``: the ``rank`` smallest.
        rank_stabilised: Scale ``alpha / sqrt(rank)``; default ``False``. Needs ``alpha``.
        dropout: Share of the inputs that the adapter does not see in training, in [0, 1); default 0. Linear layers
            alone.
        seed: Of ``A``; default 0.

    Raises:
        OptionError: An option out of range; on attaching, a rank above the smaller side.
        UnknownNameError: Unknown start.

    Example:
        >>> layer = LoRA(rank=2, init="pissa").wrap(nn.Linear(6, 4))
        >>> x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(layer(x), layer.original()(x))  # attaching changes nothing
        True

    Numerics:
        ``rank (in + out)`` trainable numbers, in at least float32. The change is computed as
        ``s ((B - B_0) A + B_0 (A - A_0))``, which is exactly 0 at the start and does not cancel after it. PiSSA and
        MiLoRA take one singular value decomposition a layer, keep ``A_0`` and ``B_0`` in the state (as large as the
        adapter) and multiply at rank ``2 r``.

    References:
        E. Hu et al. (2021), LoRA, arXiv 2106.09685, section 4; D. Kalajdzievski (2023), rsLoRA, arXiv 2312.03732; F.
        Meng et al. (2024), PiSSA, arXiv 2404.02948; H. Wang et al. (2024), MiLoRA, arXiv 2406.09044. Those two, and
        PEFT, take ``s B_0 A_0`` out of the frozen weight; here the frozen weight stays as it is, so that adapters can
        be stacked, switched and taken off, and the same numbers ``A``, ``B`` mean the same layer.
        :meth:`LoRAAdapter.factors` gives a plain LoRA of rank ``2 r`` on the untouched weight.
    """

    kind: ClassVar[str] = "lora"
    conv: ClassVar[str] = "patches"
    """Convolutions are read as matrices of patches."""

    rank: int = 16
    alpha: float | None = None
    _: KW_ONLY
    init: str = "kaiming"
    rank_stabilised: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"rank must be at least 1; got {self.rank}.")
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise OptionError(f"alpha must be a number greater than 0, or None for a scale of 1; got {self.alpha}.")
        if self.rank_stabilised and self.alpha is None:
            raise OptionError("rank_stabilised divides alpha by sqrt(rank), and alpha is None; give it, too.")
        if self.init not in INITS:
            raise unknown_name("init", self.init, INITS)
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout must be in [0, 1); got {self.dropout}.")

    @property
    def scale(self) -> float:
        """``s``, the factor on ``B A``."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int = 0) -> LoRAAdapter:
        """The adapter of one layer; see :class:`LoRAAdapter`."""
        return LoRAAdapter(self, site, weight, stream=stream)


class LoRAAdapter(Adapter):
    r"""The adapter of one layer: ``y = inner(x) + s B (A x)``.

    Args:
        config: Options.
        site: The layer.
        weight: Gives its weight as a matrix; asked for PiSSA and MiLoRA alone.
        stream: Number of the layer in the model.
    """

    turns_inputs = False
    view = "patches"
    down_start: Tensor | None
    up_start: Tensor | None

    def __init__(self, config: LoRA, site: Site, weight: Callable[[], Tensor], *, stream: int) -> None:
        super().__init__(config, site)
        self.config: LoRA = config
        rows, columns, rank = site.out_features, site.in_features // site.groups * site.patch, config.rank
        if rank > min(rows, columns):
            raise OptionError(
                f"rank={rank} is above the smaller side of {site.name or 'the layer'} ({rows} x {columns}); take at "
                f"most {min(rows, columns)}."
            )
        if config.dropout and site.kind in ("conv", "embedding"):
            raise OptionError(
                f"dropout={config.dropout} acts on rows of inputs, and {site.name or 'the layer'} ({site.kind}) adapts "
                "its weight; take dropout=0 or leave it out of targets."
            )
        spectral = config.init in _SPECTRAL
        down, up = _spectral_start(config, site, weight()) if spectral else _usual_start(config, site, columns, stream)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.register_buffer("down_start", down.clone() if spectral else None)
        self.register_buffer("up_start", up.clone() if spectral else None)

    def factors(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """The change of the weight as ``(down, up)``: ``up @ down``, scale and strength in ``up``.

        ``r`` is the rank, twice it for PiSSA and MiLoRA. Differentiable.
        """
        down, up = self.down, self.up
        if self.down_start is not None and self.up_start is not None:
            down = torch.cat([down, down - self.down_start])
            up = torch.cat([up - self.up_start, self.up_start], dim=1)
        scale = self.config.scale * self.strength
        return down, up if scale == 1.0 else up * scale

    def merge(self, W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """``W + s (B A - B_0 A_0)``."""
        if self.strength == 0:
            return W
        down, up = self.factors()
        return W + (up.to(W.dtype) @ down.to(W.dtype))

    def around(self, inner: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """``inner(x) + s B (A x)``, in the type of ``x``."""
        y = inner(x)
        return y if self.strength == 0 else self.added(y, x)

    def added(self, y: Float[Tensor, "*rows out"], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """``y + s B (A x)``: the last product is added into a copy of ``y``, with no pass of its own."""
        down, up = self.factors()
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        hidden = F.linear(x, down.to(x.dtype)).reshape(-1, down.shape[0])
        return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, up.to(x.dtype).mT).view(y.shape)

    def look_up(self, rows: Float[Tensor, "*rows in"], index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows in"]:
        """``rows + s B[index] A``."""
        if self.strength == 0:
            return rows
        down, up = self.factors()
        return rows + F.embedding(index, up).to(rows.dtype) @ down.to(rows.dtype)

    def detail(self) -> str:
        """Rank, scale and start in words."""
        config = self.config
        parts = [f"rank {config.rank}", f"scale {config.scale:g}"]
        return ", ".join([*parts, config.init] if config.init in _SPECTRAL else parts)


def _usual_start(config: LoRA, site: Site, columns: int, stream: int) -> tuple[Tensor, Tensor]:
    """``A`` drawn on the CPU in float32, so that every device begins with the same numbers; ``B = 0``."""
    generator = stream_generator(config.seed, stream, _DOWN, 0)
    down = torch.empty(config.rank, columns)
    if config.init == "kaiming":
        down.uniform_(-1, 1, generator=generator).div_(math.sqrt(columns))
    else:
        down.normal_(generator=generator).div_(config.rank)
    up = torch.zeros(site.out_features, config.rank, dtype=site.dtype, device=site.device)
    return down.to(site.device, site.dtype), up


@torch.no_grad()
def _spectral_start(config: LoRA, site: Site, W: Tensor) -> tuple[Tensor, Tensor]:
    """The largest or smallest triplets of ``W / s``, the root of the singular values on either side."""
    if not bool(W.isfinite().all()):
        raise NonFiniteError(
            f"{site.name or 'the layer'} has entries that are not finite; {config.init} needs its SVD."
        )
    U, S, Vh = torch.linalg.svd(W / config.scale, full_matrices=False)
    taken = slice(config.rank) if config.init == "pissa" else slice(len(S) - config.rank, None)
    root = S[taken].sqrt()
    return (root[:, None] * Vh[taken]).contiguous(), (U[:, taken] * root).contiguous()
