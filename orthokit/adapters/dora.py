r"""DoRA: the lengths of a weight's rows and their directions trained apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters.layer import Inner
from orthokit.adapters.lora import LoRA, LoRAAdapter
from orthokit.adapters.sites import Site
from orthokit.errors import ParameterError

__all__ = ["DoRA", "DoRAAdapter"]

_SLICE = 512


@dataclass(frozen=True)
class DoRA(LoRA):
    r"""Options of DoRA: ``T(W) = Diag(m / |V_i|) V`` with ``V = W + s B A``: rows of length ``m`` (out,), trained.

    Args:
        rank: Of ``B A``; as for :class:`LoRA`, like all that follows.
        alpha: ``> 0``, or ``None`` (default) for a scale of 1.
        init: ``"kaiming"`` (default), ``"gaussian"``, ``"pissa"``, ``"milora"``.
        rank_stabilised: Scale ``alpha / sqrt(rank)``; default ``False``.
        dropout: In [0, 1); default 0.
        seed: Default 0.

    Raises:
        OptionError: An option out of range; on attaching, a rank above the smaller side.
        UnknownNameError: Unknown start.

    Example:
        >>> layer = DoRA(rank=2).wrap(nn.Linear(6, 4))
        >>> with torch.no_grad():
        ...     _ = layer.adapters["default"].magnitude.mul_(2)  # rows twice as long
        >>> torch.allclose(layer.effective_weight(), 2 * layer.base.weight)
        True

    Numerics:
        ``rank (in + out) + out`` trainable numbers. The lengths ``|V_i|`` are constants for the gradient, as in the
        paper (it saves memory and costs nothing measurable there); they are formed in float32 or better from ``V``
        itself, 512 rows at a time; a weight in another type, or quantised, is made dense for it. A row of ``V`` that is
        0 stays 0. ``strength`` scales ``B A`` and the way of ``m`` from ``|W_i|``.

    References:
        S.-Y. Liu et al. (2024), DoRA, arXiv 2402.09353, sections 4.1 and 4.3. The paper writes ``W`` as (in, out) and
        speaks of columns. ``W`` here is the weight with all adapters that are closer to it. The words of an embedding
        are its rows.
    """

    kind: ClassVar[str] = "dora"

    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int = 0) -> DoRAAdapter:
        """The adapter of one layer; see :class:`DoRAAdapter`."""
        return DoRAAdapter(self, site, weight, stream=stream)


class DoRAAdapter(LoRAAdapter):
    r"""The adapter of one layer: ``y = m / |V| * (inner(x) + s B (A x))``, a bias after it.

    Args:
        config: Options.
        site: The layer.
        weight: Gives its weight as a matrix.
        stream: Number of the layer in the model.
    """

    scales_outputs = True

    def __init__(self, config: DoRA, site: Site, weight: Callable[[], Tensor], *, stream: int) -> None:
        W = weight()
        super().__init__(config, site, lambda: W, stream=stream)
        self.magnitude = nn.Parameter(_row_norms(W, None, None))

    def merge(self, W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """``Diag(m / |V_i|) V``."""
        if self.strength == 0:
            return W
        V = super().merge(W)
        before = torch.linalg.vector_norm(W.detach(), dim=-1) if self.strength != 1 else None
        gains = self._gains(torch.linalg.vector_norm(V.detach(), dim=-1), before)
        return V * gains.to(W.dtype).unsqueeze(-1)

    def around(self, inner: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """``m / |V| * (inner(x) + s B (A x))``, in the type of ``x``."""
        if self.strength == 0:
            return inner(x)
        if not isinstance(inner, Inner):
            raise ParameterError("DoRA needs the weight that is inside it; call it through AdaptedLayer.")
        with torch.no_grad():
            W = inner.weight()
            # Sharding in mixed precision hands the factors over in less than the weight is formed in.
            down, up = (factor.to(W.dtype) for factor in self.factors())
            lengths = _row_norms(W, down, up)
            before = _row_norms(W, None, None) if self.strength != 1 else None
        # A gain is next to 1: rounded to bfloat16 before the product, most of what m learnt would be lost.
        return (self.added(inner(x), x) * self._gains(lengths, before)).to(x.dtype)

    def look_up(self, rows: Float[Tensor, "*rows in"], index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows in"]:
        """Rows ``index`` of ``T(W)``; their lengths are taken from the rows themselves."""
        if self.strength == 0:
            return rows
        wide = rows.to(torch.promote_types(self.magnitude.dtype, torch.float32))
        V = super().look_up(wide, index)
        before = torch.linalg.vector_norm(wide.detach(), dim=-1) if self.strength != 1 else None
        lengths = torch.linalg.vector_norm(V.detach(), dim=-1)
        magnitude = F.embedding(index, self.magnitude.unsqueeze(-1)).squeeze(-1)
        return (V * self._gains(lengths, before, magnitude).unsqueeze(-1)).to(rows.dtype)

    def _gains(self, lengths: Tensor, before: Tensor | None, magnitude: Tensor | None = None) -> Tensor:
        """``m / |V_i|``, 1 where ``V_i = 0``; part of the way, ``m`` begins at the lengths ``before``."""
        m = self.magnitude if magnitude is None else magnitude
        m = m.to(lengths.dtype)
        if before is not None:
            m = torch.lerp(before, m, self.strength)
        nothing = lengths == 0
        return torch.where(nothing, 1.0, m / torch.where(nothing, 1.0, lengths))


@torch.no_grad()
def _row_norms(W: Tensor, down: Tensor | None, up: Tensor | None) -> Tensor:
    """``|W_i + (up down)_i|``."""
    if down is None or up is None:
        return torch.linalg.vector_norm(W, dim=-1)
    # Expanding the square would need no W + B A, and cancel where B A takes most of a row away.
    slices = zip(W.split(_SLICE), up.split(_SLICE), strict=True)
    return torch.cat([torch.linalg.vector_norm(torch.addmm(w, u, down), dim=-1) for w, u in slices])
