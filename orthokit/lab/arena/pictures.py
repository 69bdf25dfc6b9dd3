"""The arenas of the small vision model: from some garments to the others, and to digits."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from orthokit.lab.arena.ground import Ground, fitted_head
from orthokit.lab.image_tasks import SomeClasses, some_classes
from orthokit.lab.vision import SmallViT, load_small_vit

__all__ = ["PICTURES"]

_KNOWN, _OTHERS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
# Pictures that a head is fitted to, and pictures whose similarities are compared.
_PROBED, _COMPARED = 2000, 200


def _task(which: str, seed: int, small: bool) -> SomeClasses:
    name, classes = ("digits", None) if which == "digits" else ("fashion", _OTHERS if which == "fashion" else _KNOWN)
    sizes = {"batch": 8, "test": 32} if small else {"batch": 64}
    return some_classes(name, classes, seed=seed, **sizes)


@lru_cache(maxsize=4)
def _head(which: str, small: bool) -> dict[str, Tensor]:
    """A logistic regression on the features of the pretrained model."""
    task = _task(which, 0, small)
    every = max(1, len(task.train_labels) // (200 if small else _PROBED))
    with torch.no_grad():
        vectors = load_small_vit().features(task.train_images[::every])
    return fitted_head(vectors, task.train_labels[::every], len(task.classes))


def _model(which: str, small: bool) -> SmallViT:
    model, head = load_small_vit(), _head(which, small)
    # Without a draw from the global generator.
    model.head = cast("nn.Linear", nn.utils.skip_init(nn.Linear, head["weight"].shape[1], len(head["bias"])))
    model.head.load_state_dict(head)
    return model


@lru_cache(maxsize=1)
def _old_head() -> nn.Linear:
    return load_small_vit().head


def _general(model: nn.Module, small: bool) -> dict[str, float]:
    """The garments that the model knew, by the head that it had."""
    task = _task("known", 0, small)
    with torch.no_grad():
        scores = _old_head()(model.features(task.test_images))  # type: ignore[operator]
        return {"general": float(nn.functional.cross_entropy(scores, task.test_labels))}


def _similarities(model: nn.Module, small: bool) -> Tensor:
    """Cosines of all pairs of garments that the model knew."""
    task = _task("known", 0, small)
    every = max(1, len(task.test_images) // _COMPARED)
    with torch.no_grad():
        features = model.features(task.test_images[::every])  # type: ignore[operator]
    # Without the mean, which all pictures share and which would make all cosines large.
    unit = nn.functional.normalize((features - features.mean(0)).double(), dim=-1)
    return (unit @ unit.mT)[*torch.triu_indices(len(unit), len(unit), 1)]


@lru_cache(maxsize=2)
def _similarities_before(small: bool) -> Tensor:
    return _similarities(load_small_vit(), small)


def _geometry(model: nn.Module, small: bool) -> float:
    """1 - Pearson correlation of the similarities of held-out pictures, before and after."""
    pair = torch.stack([_similarities_before(small), _similarities(model, small)])
    return float(1 - torch.corrcoef(pair)[0, 1])


def _picture_ground(which: str, label: str) -> Ground:
    def inputs(kind: str, small: bool) -> list[Tensor]:
        return list(_task("known" if kind == "general" else which, 0, small).test_images.split(64))

    return Ground(
        label=label,
        model=lambda small: _model(which, small),
        task=lambda seed, small: _task(which, seed, small),
        general=_general,
        targets=("blocks.*.attn.?", "blocks.*.mlp.up", "blocks.*.mlp.down"),
        few=("blocks.0.attn.?",),
        steps=60,
        loss="test_loss",
        unit="nats",
        error="test_error",
        other="nats on the garments it knew",
        head="head",
        head_lr=1e-3,
        block=16,
        inputs=inputs,
        seen=("blocks.*.attn.?", "blocks.*.mlp.down"),
        tokens=1024,
        geometry=_geometry,
        # Its own head instead of one that is fitted.
        bare=load_small_vit,
    )


PICTURES: dict[str, Ground] = {
    "fashion": _picture_ground("fashion", "ViT, from five garments to five others"),
    "digits": _picture_ground("digits", "ViT, from garments to digits"),
}
"""Grounds of the vision model, by name."""
