"""What every adapter is: its options, its part in one layer, and the layer that it makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from orthokit.adapters.sites import Site
from orthokit.errors import OptionError

__all__ = ["Adapter", "AdapterConfig", "AdapterLayer", "PartConfig"]

PATHS = ("cayley_sqrt", "cayley_linear", "dense")


class AdapterLayer(nn.Module, ABC):
    """A layer in the place of a plain one."""

    in_features: int
    out_features: int

    @abstractmethod
    def effective_weight(self) -> Float[Tensor, "*shape"]:
        """The weight of the plain layer that computes the same."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """The plain layer that computes the same; the adapter stays as it is."""

    @abstractmethod
    def original(self) -> nn.Module:
        """The plain layer that was there before.

        Raises:
            ParameterError: It was not kept.
        """

    def release(self) -> None:
        """Called when :meth:`original` takes the place of this layer."""
        return

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """``adapter``, ``trainable`` and ``detail`` for the table of adapters."""


class AdapterConfig(ABC):
    """Options of one kind of adapter; makes the layer that stands in for a plain one."""

    @abstractmethod
    def wrap(self, layer: Any, *, name: str, stream: int, keep_base: bool, track_spectrum: bool) -> AdapterLayer:
        """The adapted layer.

        Args:
            layer: The plain layer; not changed.
            name: Its name in the model, for messages.
            stream: Its number in the model, for its randomness.
            keep_base: Keep a copy of the weight, so that the adapter can be taken off again.
            track_spectrum: Keep the initial singular values.
        """


class PartConfig(AdapterConfig):
    """Options of an adapter that stands beside a frozen layer, alone or with others."""

    kind: ClassVar[str]
    """Name in files and tables, such as ``"oft"``."""
    seed: int = 0

    def wrap(
        self, layer: Any, *, name: str = "", stream: int = 0, keep_base: bool = True, track_spectrum: bool = True
    ) -> AdapterLayer:
        """An :class:`~orthokit.adapters.layer.AdaptedLayer` with this adapter, named ``"default"``."""
        from orthokit.adapters.layer import AdaptedLayer

        adapted = AdaptedLayer(layer, name=name)
        adapted.add("default", self, stream=stream)
        return adapted

    @abstractmethod
    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int) -> Adapter:
        """The adapter of one layer, at rest: it changes nothing yet.

        Args:
            site: The layer.
            weight: Gives the dense weight as the matrix that :attr:`Adapter.view` asks for, in ``site.dtype``; for
                adapters that begin from it.
            stream: Number of the layer in the model: layers draw different numbers from one seed.

        Raises:
            OptionError: The options do not suit the layer, in words and with what would.
        """


class Adapter(nn.Module, ABC):
    r"""The part of an adapter in one layer: a change of its weight, ``W -> T(W)``, and the same on activations.

    With several in one layer, the inputs pass them in the order they are listed: ``T_1(T_2(... T_k(W)))``, so the last
    is the one closest to ``W``.

    Args:
        config: Its options.
        site: Its layer.
    """

    scales_outputs: ClassVar[bool] = False
    """Whether outputs are scaled, so that a bias has to be added after it."""
    turns_inputs: ClassVar[bool] = True
    """Whether it is a change of the inputs alone: ``y = W turn(x)``."""
    no_matrices: ClassVar[dict[str, str]] = {
        "generator": "generators of rotations: packed skew matrices",
        "vectors": "directions of reflections: their lengths do not matter",
    }
    """Parameters that an orthogonal optimizer must not take for matrices, and why."""
    view: str = "channels"
    """How it reads the weight of a convolution: ``"channels"`` or ``"patches"``."""

    def __init__(self, config: PartConfig, site: Site) -> None:
        super().__init__()
        self.config, self.site = config, site
        #: How far the adapter is on its path from nothing (0) to all of itself (1); set by ``rewind``.
        self.strength = 1.0

    @abstractmethod
    def merge(self, W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """``T(W)``, differentiable in the adapter, in the type of ``W``."""

    def turn(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        """The rows of an adapter with ``turns_inputs``, in the type of ``x``."""
        raise NotImplementedError

    def around(self, inner: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """The layer with this adapter: ``inner`` is the layer with all that is closer to the weight.

        Args:
            inner: Rows to rows; its bias is in it unless :attr:`scales_outputs` holds for some adapter of the layer.
            x: Inputs.
        """
        return inner(self.turn(x))

    def look_up(self, rows: Float[Tensor, "*rows in"], index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows in"]:
        """Rows ``index`` of ``T(W)``: the adapter on an embedding.

        Args:
            rows: Those of ``W``, with all adapters closer to it.
            index: Where they were looked up.

        Raises:
            OptionError: The adapter has no form for embeddings.
        """
        raise OptionError(f"{self.config.kind} cannot adapt an embedding ({self.site.name!r}); leave it out.")

    def detail(self) -> str:
        """Its sizes in words, for the table."""
        return ""

    def orthogonality_error(self) -> float | None:
        """``max |R^T R - I|`` of the rotation of the inputs, or ``None`` for an adapter that is none."""
        return None

    def largest_angle(self) -> float | None:
        """The largest angle by which some plane is turned, in radians, or ``None``."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        # Generators of a few thousandths next to the ones of I would vanish in half precision: a model that is cast to
        # it keeps its adapters in float32.
        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device, torch.float32) if low else moved

        return super()._apply(careful, recurse)
