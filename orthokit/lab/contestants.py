"""The contestants of the optimizer race: one recipe each, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from orthokit.adapters import POET, POETOptimizer, attach
from orthokit.errors import unknown_name
from orthokit.lab.baselines import Lion
from orthokit.optim.routing import for_model

__all__ = ["CONTESTANTS", "Contestant", "contestant", "contestants"]

_WHOLE_MODEL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": torch.optim.SGD,
    "Lion": Lion,
}


@dataclass(frozen=True)
class Contestant:
    """How one rival is made.

    Args:
        label: What figures call it.
        optimizer: ``"AdamW"``, ``"SGD"`` or ``"Lion"`` for the whole model; ``"POET"``, or a name that
            ``optim.for_model`` knows, for the matrices, with AdamW for the rest.
        options: Options of that optimizer; for POET of its layers, and ``betas``.
        note: What sets it apart, in a few words.
    """

    label: str
    optimizer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


_MUON = {"momentum": 0.95, "nesterov": True, "weight_decay": 0.0}

CONTESTANTS: dict[str, Contestant] = {
    # fused: torch's fastest, as a race against time should have it
    "adamw": Contestant(
        "AdamW", "AdamW", {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}, "adaptive, entry by entry"
    ),
    "sgd": Contestant("SGD", "SGD", {"momentum": 0.9, "nesterov": True, "fused": True}, "plain momentum"),
    "lion": Contestant("Lion", "Lion", {"betas": (0.9, 0.99)}, "the sign, entry by entry"),
    "muon_pre": Contestant("Muon", "muon", {"order": "pre", **_MUON}, "momentum, then polar factor"),
    "muon_post": Contestant("Muon post", "muon", {"order": "post", **_MUON}, "polar factor, then momentum"),
    "muon_none": Contestant("Muon none", "muon", {"order": "none", **_MUON}, "polar factor, no momentum"),
    "normuon": Contestant("NorMuon", "muon", {"normalize": "neuron", **_MUON}, "Muon with one scale a neuron"),
    "pion": Contestant("Pion", "pion", {"betas": (0.9, 0.95)}, "rotations by momentum; the spectrum stays"),
    # One block covers a side up to 64; merged as often, for the length of a race, as published.
    "poet": Contestant(
        "POET",
        "POET",
        {"block_size": 64, "merge_every": 100, "init": "keep", "betas": (0.9, 0.95)},
        "rotations as parameters; the spectrum stays",
    ),
}


def contestants() -> list[str]:
    """The names that :func:`contestant` takes.

    Example:
        >>> contestants()[:3]
        ['adamw', 'sgd', 'lion']
    """
    return list(CONTESTANTS)


def contestant(
    name: str, model: nn.Module, *, lr: float, rest_lr: float | None = None, options: Mapping[str, Any] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of one contestant for a fresh model.

    Args:
        name: One of :func:`contestants`.
        model: The model that will be trained; POET replaces its linear layers, in place.
        lr: Learning rate, ``>= 0``: of the whole model for AdamW, SGD and Lion, else of the matrices
            (for POET of the generators of its rotations, in radians).
        rest_lr: Learning rate of the AdamW that has what is no matrix, ``>= 0``; default ``lr``. The first three
            have no rest.
        options: Options to change.

    Returns:
        The optimizer.

    Raises:
        UnknownNameError: No such contestant.
        OptionError: An option out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> [type(contestant(name, model, lr=1e-3)).__name__ for name in ("lion", "muon_pre")]
        ['Lion', 'RoutedOptimizer']
    """
    if name not in CONTESTANTS:
        raise unknown_name("contestant", name, CONTESTANTS)
    recipe = CONTESTANTS[name]
    settings = {**recipe.options, **(options or {})}
    if recipe.optimizer in _WHOLE_MODEL:
        return _WHOLE_MODEL[recipe.optimizer](model.parameters(), lr=lr, **settings)
    if recipe.optimizer == "POET":
        return _poet(model, lr=lr, rest_lr=lr if rest_lr is None else rest_lr, **settings)
    return for_model(model, recipe.optimizer, lr=lr, fallback_lr=rest_lr, **settings)


def _poet(
    model: nn.Module, *, lr: float, rest_lr: float, betas: tuple[float, float], **layer: Any
) -> torch.optim.Optimizer:
    """The linear layers of the model become POET's; what is none of them has AdamW, as the other matrices' rest has."""
    attach(model, POET(**layer), keep_base=False, track_spectrum=False)
    return POETOptimizer(model, lr=rest_lr, generator_lr=lr, betas=betas)
