"""Adapters side by side: real models and tasks, one number of trainable parameters, one optimizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
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
from orthokit.errors import NonFiniteError, OptionError, unknown_name
from orthokit.lab.racer import Racer
from orthokit.studies.adapter_geometry import what_is_kept
from orthokit.studies.adapter_tracks import (
    bare_model,
    figures_at_start,
    judged,
    pretrained_model,
    targets_of,
    track_named,
    track_task,
)

__all__ = ["ADAPTER_METHODS", "AdapterMethod", "adapt", "adapt_once", "budget_settings", "trainable"]


@dataclass(frozen=True)
class AdapterMethod:
    """One kind of adapter.

    Args:
        label: What figures call it.
        sizes: Sizes to choose from for a budget, increasing in trainable numbers; empty if it has none.
        make: ``make(size)`` gives its options.
        says: ``says.format(size)`` says the size.
    """

    label: str
    sizes: tuple[int, ...]
    make: Callable[[int], PartConfig]
    says: str


_RANKS = tuple(range(1, 33))
ADAPTER_METHODS: dict[str, AdapterMethod] = {
    "full": AdapterMethod("full fine-tuning", (), lambda _: FullFineTuning(), "all weights of the layers"),
    "lora": AdapterMethod("LoRA", _RANKS, lambda size: LoRA(rank=size), "rank {}"),
    "dora": AdapterMethod("DoRA", _RANKS, lambda size: DoRA(rank=size), "rank {} and row lengths"),
    "oft": AdapterMethod("OFT", (2, 4, 8, 16, 32, 64, 128), lambda size: OFT(block_size=size), "blocks of {}"),
    "boft": AdapterMethod("BOFT", (2, 4, 8, 16, 32, 64), lambda size: BOFT(block_size=size), "2 factors, blocks of {}"),
    "hra": AdapterMethod("HRA", tuple(range(2, 65, 2)), lambda size: HRA(rank=size), "{} reflections"),
}
"""Who is compared, by name."""


def trainable(model: nn.Module) -> int:
    """How many numbers the adapters of a model train.

    Example:
        >>> trainable(attach(nn.Sequential(nn.Linear(8, 4)), LoRA(rank=2), targets="0"))
        24
    """
    return sum(p.numel() for p in adapter_parameters(model).values())


@lru_cache(maxsize=8)
def budget_settings(track: str, scale: float = 1.0) -> dict[str, tuple[int, int]]:
    """The size of every method whose number of trainable parameters is nearest to that of OFT at the track's block.

    Args:
        track: One of the tracks.
        scale: Multiple of OFT's number to be near to; default 1.

    Returns:
        Method to ``(size, trainable numbers)``; full fine-tuning has the size 0 and all numbers.

    Raises:
        UnknownNameError: No such track.

    Example:
        >>> settings = budget_settings("tinygpt")
        >>> abs(settings["lora"][1] / settings["oft"][1] - 1) < 0.1
        True
    """
    course = track_named(track)
    layers = chosen_layers(bare_model(track), course.targets, LoRA()).values()
    shapes = Counter((layer.out_features, layer.in_features) for layer in cast("Iterable[nn.Linear]", layers))

    def count(name: str, size: int) -> int:
        config, total = ADAPTER_METHODS[name].make(size), 0
        for (rows, columns), places in shapes.items():
            # Shapes are enough to count.
            layer = AdaptedLayer(nn.Linear(columns, rows, device="meta"))
            layer.add("default", config)
            total += places * sum(p.numel() for p in layer.adapters.parameters())
        return total

    aim = scale * count("oft", course.block)
    found = {}
    for name, method in ADAPTER_METHODS.items():
        counts = {size: count(name, size) for size in method.sizes or (0,)}
        size = min(counts, key=lambda size: abs(math.log(counts[size] / aim)))
        found[name] = (size, counts[size])
    return found


def adapt(
    track: str,
    method: str | PartConfig,
    *,
    lr: float,
    seed: int,
    size: int | None = None,
    steps: int | None = None,
    small: bool = False,
) -> Racer:
    """A pretrained model with adapters at the start of its fine-tuning, ready to be advanced.

    Args:
        track: One of the tracks.
        method: A name in :data:`ADAPTER_METHODS`, or options of an adapter.
        lr: Learning rate of the adapters (AdamW, no weight decay).
        seed: Of the batches and of what an adapter draws.
        size: Its size; default the one of the budget.
        steps: Length of the run; default the track's.
        small: Fewer and shorter texts and a part of the layers, for tests and the smallest notebooks.

    Returns:
        The racer: cosine schedule to zero after a warm-up over a twentieth of the run, gradients clipped to norm 1.
        The text classifiers begin with a head that was fitted to the frozen encoder.

    Raises:
        UnknownNameError: No such track or method.
        OptionError: A rate or seed that cannot be.

    Example:
        >>> racer = adapt("tinygpt", "oft", lr=1e-3, seed=0, size=8, steps=2, small=True)
        >>> racer.advance() > 0
        True
    """
    course = track_named(track)
    if not lr > 0:
        raise OptionError(f"the learning rate must be above 0; got {lr}.")
    if isinstance(method, str):
        if method not in ADAPTER_METHODS:
            raise unknown_name("method", method, ADAPTER_METHODS)
        size = budget_settings(track)[method][0] if size is None else size
        method = ADAPTER_METHODS[method].make(size)
    if any(field.name == "seed" for field in fields(method)):  # type: ignore[arg-type]
        method = cast("PartConfig", replace(method, seed=seed))  # type: ignore[type-var]
    model = pretrained_model(track, small)
    attach(model, method, targets=targets_of(course, small))
    rest: list[Tensor] = []
    if course.head_lr:
        rest = list(model.head.parameters())  # type: ignore[union-attr,operator]
        for p in rest:
            p.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": list(adapter_parameters(model).values()), "lr": lr}]
    groups += [{"params": rest, "lr": course.head_lr}] if rest else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    return Racer(model, track_task(track, seed, small), optimizer, steps=course.steps if steps is None else steps)


def adapt_once(
    track: str,
    method: str | PartConfig,
    *,
    lr: float,
    seed: int,
    evaluations: int = 1,
    kept: bool = False,
    other: bool = True,
    **options: Any,
) -> list[dict[str, float]]:
    """One fine-tuning.

    Args:
        track: See :func:`adapt`.
        method: See :func:`adapt`.
        lr: See :func:`adapt`.
        seed: See :func:`adapt`.
        evaluations: Evaluations after the start, ``>= 1``.
        kept: Add what is kept to the last row; see :func:`what_is_kept`.
        other: Evaluate what the model could do before, at the start and at the end; default ``True``.
        **options: ``size``, ``steps`` and ``small`` of :func:`adapt`.

    Returns:
        Rows ``step, value, error, other, seconds``: held-out loss, error rate (NaN where there is none), what the model
        could do before, and processor seconds of training so far. A run that diverges goes on with NaN.
    """
    racer = adapt(track, method, lr=lr, seed=seed, **options)
    small = bool(options.get("small", False))
    length = racer.shape["steps"]
    due = sorted({round(length * k / evaluations) for k in range(evaluations + 1)})
    rows: list[dict[str, float]] = []
    alive = True
    for step in range(length + 1):
        if step in due:
            found = {}
            if step == 0:
                found = figures_at_start(track, small)
            elif alive:
                found = judged(track, racer.model, small, other and step == length)
            keys = ("value", "error", "other")
            rows.append({"step": step, **{key: found.get(key, math.nan) for key in keys}, "seconds": racer.seconds})
        if alive and step < length:
            try:
                racer.advance()
            except NonFiniteError:
                alive = False
    if kept and alive:
        rows[-1] |= what_is_kept(racer.model)
    return rows
