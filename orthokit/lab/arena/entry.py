"""One fine-tuning of the arena, ready to be advanced."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from orthokit.adapters.base import PartConfig
from orthokit.errors import OptionError, unknown_name
from orthokit.lab.arena.grounds import ground_named, pretrained_model, target_task, targets_of
from orthokit.lab.arena.methods import METHODS, attached, budget_settings, check_installed
from orthokit.lab.racer import Racer

__all__ = ["enter"]


def enter(
    ground: str,
    method: str | PartConfig,
    *,
    lr: float,
    seed: int,
    size: int | None = None,
    steps: int | None = None,
    small: bool = False,
) -> Racer:
    """A pretrained model at the start of its fine-tuning, ready to be advanced.

    Args:
        ground: One of the grounds.
        method: A name in :data:`METHODS`, or options of an adapter.
        lr: Learning rate of what the method trains.
        seed: Of the batches and of what a method draws.
        size: Its size; default the one of the budget.
        steps: Length of the run; default the ground's.
        small: Fewer and shorter texts and a part of the layers, for tests and the smallest notebooks.

    Returns:
        The racer: cosine schedule to zero after a warm-up over a twentieth of the run, gradients clipped to norm 1.
        Classifiers begin with a head that was fitted to the frozen rest.

    Raises:
        UnknownNameError: No such ground or method.
        OptionError: A rate or seed that cannot be.
        MissingExtraError: The method comes from a package that is not installed.

    Example:
        >>> racer = enter("tinygpt", "oft", lr=1e-3, seed=0, size=8, steps=2, small=True)
        >>> racer.advance() > 0
        True
    """
    return entered(ground, method, lr=lr, seed=seed, size=size, steps=steps, small=small).racer


@dataclass(frozen=True)
class Entered:
    """A fine-tuning, the size of its method and how many numbers it trains, a head apart."""

    racer: Racer
    size: int
    trainable: int


def entered(
    ground: str,
    method: str | PartConfig,
    *,
    lr: float,
    seed: int,
    size: int | None = None,
    steps: int | None = None,
    small: bool = False,
) -> Entered:
    """:func:`enter`, with what a record of it says."""
    place = ground_named(ground)
    if not (lr > 0 and math.isfinite(lr)):
        raise OptionError(f"the learning rate must be above 0; got {lr}.")
    recipe = METHODS["full"]
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        recipe = METHODS[method]
        check_installed(recipe)
        size = budget_settings(ground)[method][0] if size is None else size
    model, targets = pretrained_model(ground, small), targets_of(place, small)
    if isinstance(method, str):
        chosen = recipe.prepare(model, targets, size or 0, seed)
    else:
        chosen = attached(model, targets, method, seed)
    groups: list[dict[str, Any]] = [{"params": chosen, "lr": lr}]
    if place.head:
        rest = list(getattr(model, place.head).parameters())
        for p in rest:
            p.requires_grad_(True)
        groups.append({"params": rest, "lr": place.head_lr})
    length = place.steps if steps is None else steps
    racer = Racer(model, target_task(ground, seed, small), recipe.optimizer(model, groups), steps=length)
    return Entered(racer, size or 0, sum(p.numel() for p in chosen))
