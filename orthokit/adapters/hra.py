r"""Householder reflection adaptation: the inputs pass a chain of reflections, applied to activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters._householder import compact_factor, half_turn_gap, reflect_rows
from orthokit.adapters._initialise import stream_generator
from orthokit.adapters._rotating import Rotating, check_conv, parameter, width_of
from orthokit.adapters.base import PartConfig
from orthokit.adapters.sites import Site
from orthokit.errors import OptionError

__all__ = ["HRA", "HRAAdapter", "hra_penalty"]


@dataclass(frozen=True)
class HRA(PartConfig):
    r"""Options of Householder reflection adaptation: ``W -> W H_1 H_2 ... H_r`` with ``H_i = I - 2 u_i u_i^T``.

    The ``u_i`` are trained vectors, divided by their lengths. The product is exactly orthogonal; for even ``r`` it is a
    rotation of at most ``r`` dimensions, and ``r`` is to it what the rank is to LoRA.

    Args:
        rank: ``r >= 1``: the number of reflections, at most the width; default 8.
        symmetric: Begin with equal pairs ``u_1 = u_2, u_3 = u_4, ...``, whose reflections undo each other, so that
            nothing is changed; default ``True``, which needs an even ``rank``. ``False`` begins with ``rank`` random
            reflections: another function.
        orthogonal: Make the ``u_i`` orthogonal first: the product is ``I - 2 P`` with ``P`` the projector on their
            span; default ``False``. It never is the identity, so it needs ``symmetric=False``.
        conv: How a convolution is read: ``"channels"`` (default), without groups, or ``"patches"``.
        seed: Of the vectors; default 0.

    Raises:
        OptionError: An option out of range, or options that contradict each other or do not suit the layer.
        UnknownNameError: Unknown view.

    Example:
        >>> linear = torch.nn.Linear(12, 5)
        >>> layer, x = HRA(rank=4).wrap(linear), torch.ones(2, 12)
        >>> torch.allclose(layer(x), linear(x), atol=1e-5)
        True
        >>> layer = HRA(rank=3, symmetric=False).wrap(linear)
        >>> round(float(torch.linalg.det(layer.adapters["default"].dense())), 6)  # odd: a reflection
        -1.0

    Numerics:
        ``r in`` trainable numbers a layer. Through the compact form ``I - V T V^T`` rows cost ``2 N in r``
        multiplications, as with LoRA, in place of the ``in^2 r`` and ``out in^2`` of forming and multiplying the
        dense matrix. Vectors are handled in at least float32. At the start the identity holds to rounding.

    References:
        S. Yuan, H. Liu, H. Xu (2024), Bridging the gap between low-rank and orthogonal adaptation via Householder
        reflection adaptation, arXiv 2405.17484. C. Bischof, C. Van Loan (1987), The WY representation for products of
        Householder matrices. Ours: reflections on activations, and the path ``C(s Q)`` to the identity in closed form.
    """

    kind: ClassVar[str] = "hra"
    rank: int = 8
    symmetric: bool = True
    orthogonal: bool = False
    conv: str = "channels"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"rank must be at least 1; got {self.rank}.")
        check_conv(self.conv)
        if self.orthogonal and self.symmetric:
            raise OptionError("orthogonal reflections never make up the identity; give symmetric=False as well.")
        if self.symmetric and self.rank % 2:
            even = " or ".join(str(r) for r in (self.rank - 1, self.rank + 1) if r)
            raise OptionError(
                f"an odd number of reflections, here {self.rank}, never makes up the identity; take rank={even}, "
                "or symmetric=False to begin with another function."
            )

    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int) -> HRAAdapter:
        """The adapter of one layer; see :class:`~orthokit.adapters.base.PartConfig`."""
        width = width_of(site, self.conv)
        where = site.name or "the layer"
        if self.rank > width:
            raise OptionError(f"rank must be at most the {width} inputs of {where!r}; got {self.rank}.")
        if site.kind == "conv" and self.conv == "channels" and site.groups > 1:
            raise OptionError(
                f"reflections would mix the {site.groups} groups of {where!r}; take conv='patches' or OFT, whose "
                "blocks stay within groups."
            )
        return HRAAdapter(self, site, width=width, stream=stream)


class Reflections(NamedTuple):
    """``I - V T V^T`` as rows meet it: the side that is transposed is another product of few numbers."""

    V: Tensor
    T: Tensor


class HRAAdapter(Rotating):
    """:class:`HRA` on one layer; its parameter is ``vectors``, ``(rank, in)``.

    Args:
        config: Options.
        site: The layer.
        width: Coordinates that are turned.
        stream: Number of the layer.
    """

    config: HRA

    def __init__(self, config: HRA, site: Site, *, width: int, stream: int) -> None:
        super().__init__(config, site)
        self.view = config.conv
        source = stream_generator(config.seed, stream)
        drawn = config.rank // 2 if config.symmetric else config.rank
        # Entries of size 1: a step of Adam, lr an entry, then turns a vector by about lr, whatever the width.
        u = torch.randn(drawn, width, generator=source, dtype=torch.float64)
        self.vectors = parameter(u.repeat_interleave(2, 0) if config.symmetric else u, site)

    def factors(self, dtype: torch.dtype, *, drop: bool = False) -> Reflections:
        """The compact form.

        Raises:
            OptionError: ``strength`` is neither 0 nor 1 and there is no path of rotations to the identity.
        """
        u = self.vectors.to(torch.promote_types(dtype, self.dtype))
        if self.config.orthogonal:
            self._check_path(None)
            # The projector alone matters, and any orthonormal basis of the span gives it.
            V = torch.linalg.qr(u.mT)[0]
            return Reflections(V.to(dtype), 2 * torch.eye(len(u), dtype=dtype, device=u.device))
        V = nn.functional.normalize(u, dim=-1, eps=0.0).mT
        G = V.mT @ V
        self._check_path(G)
        return Reflections(V.to(dtype), compact_factor(G, self.strength).to(dtype))

    def through(
        self, factors: Reflections, x: Float[Tensor, "*rows in"], *, transposed: bool
    ) -> Float[Tensor, "*rows in"]:
        """``x R``, or ``x R^T``."""
        V, T = factors
        return reflect_rows(x, V, (T.mT if transposed else T) @ V.mT)

    def _check_path(self, G: Tensor | None) -> None:
        if self.strength in (0, 1) or torch.compiler.is_compiling():
            return
        gap = 0.0 if G is None or len(G) % 2 else half_turn_gap(G)
        if gap <= 1e-6:
            odd = "an odd number of reflections" if len(self.vectors) % 2 else "reflections with a half turn"
            raise OptionError(
                f"{self.site.name or 'the layer'!r} holds {odd}: no path of rotations leads from there to the "
                "identity; only path='dense' is possible."
            )

    @torch.no_grad()
    def largest_angle(self) -> float:
        """The largest angle by which a plane is turned, in radians; a reflection counts as a half turn."""
        if self.strength == 0:
            return 0.0
        V, T = self.factors(self.precise)
        C = torch.linalg.qr(V)[1]
        inside = torch.eye(len(C), dtype=C.dtype, device=C.device) - C @ T @ C.mT
        return float(torch.linalg.eigvals(inside).angle().abs().max())

    def detail(self) -> str:
        """How many reflections."""
        return f"{self.config.rank} {'orthogonal ' if self.config.orthogonal else ''}reflections"

    def extra_repr(self) -> str:
        """As :meth:`detail`."""
        return self.detail()


def hra_penalty(model: nn.Module) -> Float[Tensor, ""]:
    r"""``sum ||V^T V - I||_F^2`` over the layers with HRA: 0 where the reflections are orthogonal to each other.

    Times a factor and added to the loss it trades freedom for a stronger change, as the authors of HRA do.

    Args:
        model: A model with HRA adapters.

    Returns:
        A number, differentiable.

    Raises:
        OptionError: The model has no HRA adapter.

    Example:
        >>> layer = HRA(rank=4).wrap(torch.nn.Linear(64, 5))
        >>> float(hra_penalty(layer).detach()) >= 3.99  # two equal pairs: at least 1 in four places
        True

    References:
        S. Yuan, H. Liu, H. Xu (2024), arXiv 2405.17484, section 3.
    """
    parts = [part for part in model.modules() if isinstance(part, HRAAdapter)]
    if not parts:
        raise OptionError("the model has no HRA adapter; call adapters.attach(model, HRA(...)) first.")
    total = parts[0].vectors.new_zeros(())
    for part in parts:
        V = nn.functional.normalize(part.vectors, dim=-1, eps=0.0)
        G = V @ V.mT
        total = total + (G - torch.eye(len(G), dtype=G.dtype, device=G.device)).square().sum().to(total)
    return total
