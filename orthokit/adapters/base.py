"""What every adapter is to the model it sits in: a layer that can be merged away or taken off again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["AdapterConfig", "AdapterLayer"]


class AdapterLayer(nn.Module, ABC):
    """A layer in the place of an ``nn.Linear``."""

    in_features: int
    out_features: int

    @abstractmethod
    def effective_weight(self) -> Float[Tensor, "out in"]:
        """The weight of the plain layer that computes the same."""

    @abstractmethod
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same; the adapter stays as it is."""

    @abstractmethod
    def original(self) -> nn.Linear:
        """The plain layer that was there before.

        Raises:
            ParameterError: It was not kept.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """``adapter``, ``trainable`` and ``detail`` for the table of adapters."""


class AdapterConfig(ABC):
    """Options of one kind of adapter; makes the layer that stands in for an ``nn.Linear``."""

    @abstractmethod
    def wrap(self, linear: nn.Linear, *, name: str, stream: int, keep_base: bool, track_spectrum: bool) -> AdapterLayer:
        """The adapted layer.

        Args:
            linear: The plain layer; not changed.
            name: Its name in the model, for messages.
            stream: Its number in the model, for its randomness.
            keep_base: Keep a copy of the weight, so that the adapter can be taken off again.
            track_spectrum: Keep the initial singular values.
        """
