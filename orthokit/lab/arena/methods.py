"""Who competes: adapters, optimizers of the weights themselves, and what PEFT has; one entry each, as data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthokit.adapters.attach import attach
from orthokit.adapters.base import PartConfig
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.stack import adapter_parameters
from orthokit.adapters.targets import chosen_layers
from orthokit.lab.arena.grounds import ground_named, pretrained_model

__all__ = ["METHODS", "Method", "budget_settings", "trainable"]

Parameters = list[Tensor]
Prepare = Callable[[nn.Module, Any, int, int], Parameters]
"""``prepare(model, targets, size, seed)``: the model is made ready in place; what is to be trained."""


_adamw = partial(torch.optim.AdamW, weight_decay=0.0)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        label: What figures call it.
        sizes: Sizes to choose from for a budget, increasing in trainable numbers; empty if it has none.
        says: ``says.format(size)`` says the size.
        prepare: ``prepare(model, targets, size, seed)`` makes the model ready, in place, and returns the parameters to
            train (a head apart).
        count: ``count(size, rows, columns)``: the numbers it trains in a linear layer of that shape.
        optimizer: ``optimizer(groups)`` of what is prepared; default AdamW without weight decay.
        package: A package that must be installed, or ``""``.
        config: ``config(size)``: the options of an adapter of ours, or ``None``.
    """

    label: str
    sizes: tuple[int, ...]
    says: str
    prepare: Prepare
    count: Callable[[int, int, int], int]
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = _adamw
    package: str = ""
    config: Callable[[int], PartConfig] | None = None


def attached(model: nn.Module, targets: Any, config: PartConfig, seed: int) -> Parameters:
    """Attach an adapter whose draws follow the seed."""
    if any(field.name == "seed" for field in fields(config)):  # type: ignore[arg-type]
        config = cast("PartConfig", replace(config, seed=seed))  # type: ignore[type-var]
    attach(model, config, targets=targets)
    return list(adapter_parameters(model).values())


def _weights(model: nn.Module, targets: Any, size: int, seed: int) -> Parameters:
    """The weights themselves train; everything else is frozen."""
    chosen = [cast("Tensor", layer.weight) for layer in chosen_layers(model, targets, FullFineTuning()).values()]
    model.requires_grad_(False)
    for weight in chosen:
        weight.requires_grad_(True)
    return chosen


def _adapter(label: str, sizes: tuple[int, ...], make: Callable[[int], PartConfig], says: str) -> Method:
    def prepare(model: nn.Module, targets: Any, size: int, seed: int) -> Parameters:
        return attached(model, targets, make(size), seed)

    def count(size: int, rows: int, columns: int) -> int:
        # Shapes are enough to count.
        layer = AdaptedLayer(nn.Linear(columns, rows, device="meta"))
        layer.add("default", make(size))
        return sum(p.numel() for p in layer.adapters.parameters())

    return Method(label, sizes, says, prepare, count, config=make)


_RANKS = tuple(range(1, 33))
METHODS: dict[str, Method] = {
    "full": _adapter("full fine-tuning", (), lambda _: FullFineTuning(), "all weights of the layers"),
    "lora": _adapter("LoRA", _RANKS, lambda size: LoRA(rank=size), "rank {}"),
    "dora": _adapter("DoRA", _RANKS, lambda size: DoRA(rank=size), "rank {} and row lengths"),
    "oft": _adapter("OFT", (2, 4, 8, 16, 32, 64, 128), lambda size: OFT(block_size=size), "blocks of {}"),
    "boft": _adapter("BOFT", (2, 4, 8, 16, 32, 64), lambda size: BOFT(block_size=size), "2 factors, blocks of {}"),
    "hra": _adapter("HRA", tuple(range(2, 65, 2)), lambda size: HRA(rank=size), "{} reflections"),
}
"""Who competes, by name; one more entry is one more method."""


def trainable(model: nn.Module) -> int:
    """How many numbers the adapters of a model train.

    Example:
        >>> trainable(attach(nn.Sequential(nn.Linear(8, 4)), LoRA(rank=2), targets="0"))
        24
    """
    return sum(p.numel() for p in adapter_parameters(model).values())


@lru_cache(maxsize=16)
def budget_settings(ground: str, scale: float = 1.0) -> dict[str, tuple[int, int]]:
    """The size of every method whose number of trainable parameters is nearest to that of OFT at the ground's block.

    Args:
        ground: One of the grounds.
        scale: Multiple of OFT's number to be near to; default 1.

    Returns:
        Method to ``(size, trainable numbers)``; full fine-tuning has the size 0 and all numbers.

    Raises:
        UnknownNameError: No such ground.

    Example:
        >>> settings = budget_settings("tinygpt")
        >>> abs(settings["lora"][1] / settings["oft"][1] - 1) < 0.1
        True
    """
    place = ground_named(ground)
    layers = chosen_layers(pretrained_model(ground, True), place.targets, LoRA()).values()
    shapes = Counter((layer.out_features, layer.in_features) for layer in cast("Iterable[nn.Linear]", layers))

    def total(name: str, size: int) -> int:
        return sum(places * METHODS[name].count(size, *shape) for shape, places in shapes.items())

    aim = scale * total("oft", place.block)
    found = {}
    for name, method in METHODS.items():
        counts = {size: total(name, size) for size in method.sizes or (0,)}
        size = min(counts, key=lambda size: abs(math.log(counts[size] / aim)))
        found[name] = (size, counts[size])
    return found
