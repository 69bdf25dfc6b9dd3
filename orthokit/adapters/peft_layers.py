"""The layers that PEFT adapts, and its options that are one for all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from orthokit.adapters.base import Adapter
from orthokit.adapters.layer import AdaptedLayer
from orthokit.errors import OptionError, ParameterError

__all__ = ["Parts", "Written", "check_layer", "common", "only", "pattern", "place_copies", "target_modules"]

Parts = Mapping[str, tuple[AdaptedLayer, Any]]
"""An adapter by layer: the layer and its part there."""
Written = tuple[dict[str, Any], dict[str, Tensor]]
"""Options and tensors as PEFT names them."""


def check_layer(path: str, layer: AdaptedLayer, kinds: Sequence[str], method: str, *, any_conv: bool = False) -> None:
    """Raise unless PEFT adapts such a layer, and computes with it what the layer computes.

    Args:
        path: Its name.
        layer: The layer.
        kinds: That the method of PEFT knows.
        method: Its name.
        any_conv: Whether it knows convolutions of all sizes.
    """
    site, base = layer.site, layer.base
    kind = "linear" if site.kind.startswith("quantized") else site.kind
    if kind not in kinds:
        raise ParameterError(f"PEFT has no {method} for {path!r}, a layer of kind {site.kind!r}; leave it out.")
    if kind != "conv":
        return
    if site.groups > 1:
        raise ParameterError(
            f"PEFT's {method} cannot adapt the groups of {path!r}; merge it and save the model instead."
        )
    # Of Conv2d it reads the first number of each of these.
    if not any_conv and not (isinstance(base, nn.Conv2d) and _square(base)):
        raise ParameterError(
            f"PEFT's {method} computes another convolution than {path!r}: it knows square Conv2d without dilation, "
            "padded with zeros. Merge it and save the model instead."
        )


def _square(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or set(conv.dilation) != {1}:
        return False
    return all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))


def place_copies(layer: AdaptedLayer, part: Adapter) -> int:
    """How many places of a kernel one rotation of channels stands for; 1 where it is of patches already."""
    return layer.site.patch if layer.site.kind == "conv" and part.view == "channels" else 1


def target_modules(model: nn.Module, paths: Iterable[str]) -> list[str] | str:
    """What PEFT finds these layers with, and no others: names, or where it would find more, an expression."""
    wanted = sorted(paths)
    inside = tuple(f"{path}." for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer))
    every = [path for path, _ in model.named_modules() if not path.startswith(inside)]
    endings = tuple(f".{path}" for path in wanted)
    if any(path.endswith(endings) and path not in wanted for path in every):
        return "|".join(re.escape(path) for path in wanted)
    return wanted


def pattern(values: Mapping[str, Any], paths: Iterable[str], default: Any) -> dict[str, Any]:
    """A value for each layer as PEFT looks it up: the first key that the name ends in; so longer names come first."""
    differing = {value for value in values.values() if value != default}
    if not differing:
        return {}
    # With one exception in it, a key of a short name may be the end of a longer one: then all are listed.
    listed = sorted(paths, key=lambda path: (-len(path), path))
    nested = any(path.endswith(f".{other}") for path in listed for other in listed)
    return {re.escape(path): values[path] for path in listed if nested or values[path] != default}


def only(values: Iterable[Any], what: str) -> Any:
    """The one value that PEFT has for all layers."""
    found = set(values)
    if len(found) != 1:
        raise OptionError(
            f"PEFT has one value for all layers, and this adapter has several {what}: {sorted(found)}. Attach layers "
            "that differ under different names, and write these one by one."
        )
    return found.pop()


def common(values: Iterable[Any]) -> Any:
    """The most frequent value."""
    return Counter(values).most_common(1)[0][0]
