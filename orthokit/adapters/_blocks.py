r"""Options and parts of the adapters whose factors are block-diagonal rotations with packed skew generators."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.adapters._initialise import stream_generator
from orthokit.adapters._rotating import Rotating, check_conv, parameter, plain_autograd, width_of
from orthokit.adapters._rotation import SkewMap
from orthokit.adapters._turn import generator_bound, rotation_blocks
from orthokit.adapters.base import PartConfig
from orthokit.adapters.sites import Site
from orthokit.errors import OptionError
from orthokit.linalg import packed_size

__all__ = ["BlockAdapter", "BlockOptions", "check_blocks"]

# The size at which the factor is 1: that of the published experiments.
_REFERENCE_BLOCK = 32
# Steps of Adam with signs at random turn a block by sqrt(b) times the rate, signs that agree by b times it; the best
# rates that the study ``adapters`` found lie between, near b^-0.8.
_BLOCK_POWER = 0.75
# Reading a number from an accelerator waits for it: there the remainder is looked at once in this many updates.
_WATCH_EVERY = 50


def check_blocks(site: Site, width: int, block_size: int, *, conv: str) -> None:
    """Raise unless ``block_size`` divides the coordinates of the layer, in words and with sizes that do."""
    # Channels of different groups never meet: a block over two of them would mix what the layer keeps apart.
    unit = width // site.groups if site.kind == "conv" and conv == "channels" else width
    if unit % block_size == 0:
        return
    divisors = [d for d in range(2, unit + 1) if unit % d == 0]
    below = max((d for d in divisors if d < block_size), default=None)
    above = min((d for d in divisors if d > block_size), default=None)
    offered = " or ".join(str(d) for d in (below, above) if d is not None) or "none: leave the layer out"
    of = f"the {unit} channels of a group" if unit != width else f"the {width} inputs"
    raise OptionError(
        f"block_size must divide {of} of {site.name or 'the layer'!r}; {block_size} does not. Nearest: {offered}."
    )


@dataclass(frozen=True, kw_only=True)
class BlockOptions(PartConfig):
    """The options that ``OFT`` and ``BOFT`` share; see there."""

    block_size: int
    map: str = "cayley"
    terms: int = 5
    order: int = 4
    tolerance: float | None = 1e-5
    share: bool = False
    radius: float | None = None
    dropout: float = 0.0
    angle_scale: float = 1.0
    block_rate: bool = True
    conv: str = "channels"
    init_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise OptionError(f"block_size must be at least 2, as one coordinate cannot turn; got {self.block_size}.")
        SkewMap(self.map, self.terms, self.order)
        check_conv(self.conv)
        for name in ("tolerance", "radius"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise OptionError(f"{name} must be a number greater than 0, or None; got {value}.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"dropout must be in [0, 1); got {self.dropout}.")
        if not (self.angle_scale > 0 and math.isfinite(self.angle_scale)):
            raise OptionError(f"angle_scale must be a number greater than 0; got {self.angle_scale}.")
        if not (self.init_std >= 0 and math.isfinite(self.init_std)):
            raise OptionError(f"init_std must be a number of at least 0; got {self.init_std}.")

    @property
    def spec(self) -> SkewMap:
        """The map with its length."""
        return SkewMap(self.map, self.terms, self.order)

    @property
    def rate(self) -> float:
        """The factor between the parameter and the generators, ``angle_scale (32 / b)^(3/4)``."""
        return self.angle_scale * ((_REFERENCE_BLOCK / self.block_size) ** _BLOCK_POWER if self.block_rate else 1.0)

    def check_site(self, site: Site) -> int:
        """The width that is turned; raises unless the options suit the layer."""
        width = width_of(site, self.conv)
        check_blocks(site, width, self.block_size, conv=self.conv)
        if self.dropout and site.kind == "conv" and self.conv == "patches":
            raise OptionError(
                f"dropout acts on the inputs, and patches of {site.name or 'the layer'!r} are turned in the weight; "
                "take conv='channels' or dropout=0."
            )
        return width


class BlockAdapter(Rotating):
    r"""Factors ``Diag(f(Q_1), ..., f(Q_k))``, each ``Q_i = strength project(rate unpack(v_i))``.

    Args:
        config: Options.
        site: The layer.
        lead: Leading sizes of the parameter; the last is the number of blocks, or 1 when they share one.
        blocks: The number of blocks.
        stream: Number of the layer.
    """

    config: BlockOptions

    def __init__(self, config: BlockOptions, site: Site, *, lead: tuple[int, ...], blocks: int, stream: int) -> None:
        super().__init__(config, site)
        self.view, self.blocks = config.conv, blocks
        v = torch.zeros(*lead, packed_size(config.block_size), dtype=torch.float64)
        if config.init_std:
            v.normal_(std=config.init_std, generator=stream_generator(config.seed, stream))
        #: Packed generators, before ``rate``, the projection and ``strength``.
        self.generator = parameter(v, site)
        #: Whether the series was too far from orthogonal when last looked at, so that the exact map is used.
        self.switched = False
        self._watched: int | None = None

    def packed(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*lead p"]:
        """The generators that the map is applied to, packed; differentiable.

        Args:
            dtype: Default that of the parameter.
        """
        v = self.generator if dtype is None else self.generator.to(dtype)
        rate, radius = self.config.rate, self.config.radius
        if radius is not None:
            # ||Q||_F = sqrt(2) ||v||; inside the ball the factor is the constant 1.
            norm = math.sqrt(2) * rate * torch.linalg.vector_norm(v, dim=-1, keepdim=True)
            return v * (rate * self.strength * radius / norm.clamp_min(radius))
        return v if rate * self.strength == 1 else v * (rate * self.strength)

    def rotations(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The blocks of every factor, in the order of ``R = F_0 F_1 ...``; differentiable, without dropout.

        Args:
            dtype: Default that of the parameter.

        Returns:
            One stack ``(k, b, b)`` per factor. With ``share`` all blocks are the same memory.
        """
        R = self._rotations(self.dtype if dtype is None else dtype, drop=False)
        return [stack.expand(self.blocks, -1, -1) for stack in R]

    def remainder(self) -> float:
        r"""A bound of ``||Q||_2^{k+1}``, the distance of the series of ``cayley_neumann`` from the exact map."""
        return self._bound(0.0) ** (self.config.terms + 1)

    def map_in_use(self) -> SkewMap:
        """The map, or the exact one where the series is beyond ``tolerance``."""
        config = self.config
        if config.map != "cayley_neumann" or config.tolerance is None:
            return config.spec
        exact = SkewMap("cayley", config.terms, config.order)
        if plain_autograd():
            # A value cannot be looked at, and the exact map is always within the tolerance.
            return exact
        if self._due():
            enough = config.tolerance ** (1 / (config.terms + 1))
            self.switched = not self._bound(enough) <= enough
            self._watched = self.generator._version
        return exact if self.switched else config.spec

    def _due(self) -> bool:
        if self.generator.device.type == "cpu" or self._watched is None or not torch.is_grad_enabled():
            return True
        # By updates, not by calls: a checkpointed layer is called twice and must do the same twice.
        return self.generator._version - self._watched >= _WATCH_EVERY

    def _bound(self, enough: float) -> float:
        with torch.no_grad():
            return generator_bound(self.packed(self.dtype), enough=enough)

    @property
    def drops(self) -> bool:
        """Whether blocks are at rest at random now."""
        return self.training and self.config.dropout > 0

    def _rotations(self, dtype: torch.dtype, *, drop: bool) -> Tensor:
        work = torch.promote_types(dtype, self.dtype)
        R = rotation_blocks(self.packed(work), self.config.block_size, self.map_in_use())
        if drop and self.drops:
            R = R.expand(*R.shape[:-3], self.blocks, -1, -1)
            # PyTorch's own source, as nn.Dropout: checkpointing restores it, so a layer run twice drops the same.
            rest = torch.rand(R.shape[:-2], device=R.device) < self.config.dropout
            eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
            R = torch.where(rest[..., None, None], eye, R)
        return R.to(dtype)

    def train(self, mode: bool = True) -> BlockAdapter:
        """As for any module; what was known of the parameters is looked at again."""
        self._watched = None
        return super().train(mode)  # type: ignore[return-value]

    def detail(self) -> str:
        """Blocks, map and what bounds it."""
        config = self.config
        text = f"{self.blocks} x {config.block_size}{' shared' if config.share else ''}, {config.map}"
        if config.map == "cayley_neumann":
            text += f" k={config.terms}" + (", switched to exact" if self.map_in_use().map == "cayley" else "")
        if config.map == "exp_taylor":
            text += f" p={config.order}"
        if config.radius is not None:
            text += f", radius {config.radius:g}"
        return text

    def extra_repr(self) -> str:
        """As :meth:`detail`."""
        return self.detail()
