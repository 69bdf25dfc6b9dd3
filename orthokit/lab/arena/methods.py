"""Who competes: adapters, optimizers of the weights themselves, and what PEFT has; one entry each, as data."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from orthokit.errors import MissingExtraError, OptionError
from orthokit.lab.arena.grounds import ground_named, pretrained_model
from orthokit.optim.routing import for_model

__all__ = ["METHODS", "Method", "budget_settings", "trainable"]

Parameters = list[Tensor]
Groups = list[dict[str, Any]]
Prepare = Callable[[nn.Module, Any, int, int], Parameters]
"""``prepare(model, targets, size, seed)``: the model is made ready in place; what is to be trained."""


def _adamw(model: nn.Module, groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _routed(model: nn.Module, groups: Groups, *, name: str, **options: Any) -> torch.optim.Optimizer:
    """The first group's matrices by an optimizer for matrices, a head by the AdamW that it has with every method."""
    chosen = {id(p) for p in groups[0]["params"]}
    rest = {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in chosen}
    return for_model(
        model,
        name,
        lr=groups[0]["lr"],
        fallback_lr=groups[-1]["lr"],
        fallback_betas=(0.9, 0.999),
        # A head is a matrix too, and by its name alone may not look like one.
        exclude=(lambda parameter: parameter in rest) if rest else None,
        weight_decay=0.0,
        **options,
    )


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
        optimizer: ``optimizer(model, groups)``: first what is prepared, then a head; default AdamW without decay.
        package: A package that must be installed, or ``""``.
        config: ``config(size)``: the options of an adapter of ours, or ``None``.
    """

    label: str
    sizes: tuple[int, ...]
    says: str
    prepare: Prepare
    count: Callable[[int, int, int], int]
    optimizer: Callable[[nn.Module, Groups], torch.optim.Optimizer] = _adamw
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


def _injected(model: nn.Module, targets: Any, size: int, seed: int, *, make: Callable[..., Any]) -> Parameters:
    """Adapters of PEFT in the place of the layers; nothing else trains."""
    from peft import get_peft_model  # pyright: ignore[reportMissingImports]

    before = {name for name, _ in model.named_parameters()}
    names = list(chosen_layers(model, targets, FullFineTuning()))
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
        torch.manual_seed(seed)
        # In place; the wrapper that comes back is not needed. VeRA refuses the function that makes none.
        get_peft_model(cast("Any", model), make(names, size, seed))
    new = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in before}
    model.requires_grad_(False)
    for p in new.values():
        p.requires_grad_(True)
    return list(new.values())


def _vera(names: list[str], size: int, seed: int) -> Any:
    from peft import VeraConfig  # pyright: ignore[reportMissingImports]

    # Default d_initial is 0.1 and B starts at 0. The projections are drawn from the seed, not stored with the weights.
    return VeraConfig(r=size, target_modules=names, projection_prng_key=seed)


def _ia3(names: list[str], size: int, seed: int) -> Any:
    from peft import IA3Config  # pyright: ignore[reportMissingImports]

    return IA3Config(target_modules=names, feedforward_modules=[])


def _adapter(
    label: str, sizes: tuple[int, ...], make: Callable[[int], PartConfig], says: str, *, like: str = ""
) -> Method:
    def prepare(model: nn.Module, targets: Any, size: int, seed: int) -> Parameters:
        return attached(model, targets, make(size), seed)

    def count(size: int, rows: int, columns: int) -> int:
        if like:  # another start of the same numbers, which would look at a weight
            return METHODS[like].count(size, rows, columns)
        # Shapes are enough to count.
        layer = AdaptedLayer(nn.Linear(columns, rows, device="meta"))
        layer.add("default", make(size))
        return sum(p.numel() for p in layer.adapters.parameters())

    return Method(label, sizes, says, prepare, count, config=make)


def _whole(label: str, optimizer: Callable[[nn.Module, Groups], torch.optim.Optimizer]) -> Method:
    return Method(label, (), "all weights of the layers", _weights, lambda _, rows, columns: rows * columns, optimizer)


_RANKS = tuple(range(1, 33))
METHODS: dict[str, Method] = {
    "full": _adapter("full fine-tuning", (), lambda _: FullFineTuning(), "all weights of the layers"),
    "lora": _adapter("LoRA", _RANKS, lambda size: LoRA(rank=size), "rank {}"),
    "dora": _adapter("DoRA", _RANKS, lambda size: DoRA(rank=size), "rank {} and row lengths"),
    "oft": _adapter("OFT", (2, 4, 8, 16, 32, 64, 128), lambda size: OFT(block_size=size), "blocks of {}"),
    "boft": _adapter("BOFT", (2, 4, 8, 16, 32, 64), lambda size: BOFT(block_size=size), "2 factors, blocks of {}"),
    "hra": _adapter("HRA", tuple(range(2, 65, 2)), lambda size: HRA(rank=size), "{} reflections"),
    "pissa": _adapter("PiSSA", _RANKS, lambda size: LoRA(rank=size, init="pissa"), "rank {}", like="lora"),
    "milora": _adapter("MiLoRA", _RANKS, lambda size: LoRA(rank=size, init="milora"), "rank {}", like="lora"),
    "muon": _whole("Muon", partial(_routed, name="muon")),
    "pion": _whole("Pion", partial(_routed, name="pion")),
    "vera": Method(
        "VeRA",
        (64, 128, 256),
        "rank {}, shared and frozen",
        partial(_injected, make=_vera),
        lambda size, rows, columns: size + rows,
        package="peft",
    ),
    "ia3": Method(
        "IA3",
        (),
        "a scale for each output",
        partial(_injected, make=_ia3),
        lambda size, rows, columns: rows,
        package="peft",
    ),
}
"""Who competes, by name; one more entry is one more method. Muon and Pion train the weights themselves."""


def check_installed(recipe: Method) -> None:
    """Raise where the package a method comes from is missing."""
    if recipe.package and importlib.util.find_spec(recipe.package) is None:
        raise MissingExtraError(
            f"{recipe.label} comes from the package {recipe.package}, which is not installed. Install it with: "
            f"pip install {recipe.package}"
        )


def trainable(model: nn.Module) -> int:
    """How many numbers the adapters of a model train.

    Example:
        >>> trainable(attach(nn.Sequential(nn.Linear(8, 4)), LoRA(rank=2), targets="0"))
        24
    """
    return sum(p.numel() for p in adapter_parameters(model).values())


def target_shapes(ground: str) -> Counter[tuple[int, int]]:
    """Shapes ``(out, in)`` of the layers that are adapted, and how many there are of each; no weight is looked at."""
    place = ground_named(ground)
    model = pretrained_model(ground, True) if place.bare is None else place.bare()
    layers = chosen_layers(model, place.targets, LoRA()).values()
    return Counter((layer.out_features, layer.in_features) for layer in cast("Iterable[nn.Linear]", layers))


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
    shapes = target_shapes(ground)

    def total(name: str, size: int) -> int:
        return sum(places * METHODS[name].count(size, *shape) for shape, places in shapes.items())

    def totals(name: str, sizes: Sequence[int]) -> dict[int, int]:
        counts = {}
        for size in sizes:
            with contextlib.suppress(OptionError):  # a size that does not suit one of the shapes
                counts[size] = total(name, size)
        return counts

    aim = scale * total("oft", place.block)
    found = {}
    for name, method in METHODS.items():
        counts = totals(name, method.sizes or (0,))
        size = min(counts, key=lambda size: abs(math.log(counts[size] / aim)))
        found[name] = (size, counts[size])
    return found
