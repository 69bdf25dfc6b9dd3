r"""Full fine-tuning as an adapter: the whole weight trains, as a difference to the frozen one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters.base import Adapter, PartConfig
from orthokit.adapters.layer import Inner
from orthokit.adapters.sites import Site
from orthokit.errors import ParameterError

__all__ = ["FullAdapter", "FullFineTuning"]


@dataclass(frozen=True)
class FullFineTuning(PartConfig):
    r"""Options of full fine-tuning, of which there are none: ``T(W) = W + D`` with ``D`` trained, 0 at the start.

    It stacks, switches off, merges, saves and rewinds like every other adapter, so that methods are compared by one
    code path.

    Example:
        >>> plain = nn.Linear(6, 4)
        >>> x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        >>> before, layer = plain(x), FullFineTuning().wrap(plain)
        >>> torch.equal(layer(x), before), sum(p.numel() for p in layer.parameters() if p.requires_grad)
        (True, 24)

    Numerics:
        ``in * out`` trainable numbers, in at least float32: with a weight in bfloat16 it trains like one with a master
        copy in float32. The forward pass forms ``W + D`` and multiplies once. Biases stay frozen. Weight decay pulls
        towards the frozen weight, not towards 0.
    """

    kind: ClassVar[str] = "full"
    conv: ClassVar[str] = "patches"
    """Convolutions are read as matrices of patches."""

    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int = 0) -> FullAdapter:
        """The adapter of one layer; see :class:`FullAdapter`."""
        return FullAdapter(self, site)


class FullAdapter(Adapter):
    """The adapter of one layer: ``delta``, shaped like the weight as a matrix of patches.

    Args:
        config: Options.
        site: The layer.
    """

    turns_inputs = False
    view = "patches"

    def __init__(self, config: FullFineTuning, site: Site) -> None:
        super().__init__(config, site)
        columns = site.in_features // site.groups * site.patch
        self.delta = nn.Parameter(torch.zeros(site.out_features, columns, dtype=site.dtype, device=site.device))

    def merge(self, W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """``W + D``."""
        if self.strength == 0:
            return W
        return torch.add(W, self.delta.to(W.dtype), alpha=self.strength)

    def around(self, inner: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """One product with ``W + D``, where ``W`` has all that is closer to the weight."""
        if self.strength == 0:
            return inner(x)
        if not isinstance(inner, Inner):
            raise ParameterError("full fine-tuning needs the weight that is inside it; call it through AdaptedLayer.")
        return inner.dense(x, self.merge(inner.weight()))

    def look_up(self, rows: Float[Tensor, "*rows in"], index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows in"]:
        """``rows + D[index]``."""
        if self.strength == 0:
            return rows
        wide = torch.add(rows.to(self.delta.dtype), F.embedding(index, self.delta), alpha=self.strength)
        return wide.to(rows.dtype)
