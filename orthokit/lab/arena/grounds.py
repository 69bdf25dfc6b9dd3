"""Where methods meet, by name, and how a model is judged there."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import nn

from orthokit.errors import OptionError, unknown_name
from orthokit.lab.arena.ground import Ground
from orthokit.lab.arena.language import LANGUAGE
from orthokit.lab.arena.pictures import PICTURES
from orthokit.lab.arena.texts import TEXTS
from orthokit.lab.tasks import Task

__all__ = [
    "GROUNDS",
    "Ground",
    "add_ground",
    "figures_at_start",
    "ground_named",
    "judged",
    "pretrained_model",
    "target_task",
]


GROUNDS: dict[str, Ground] = {**LANGUAGE, **PICTURES, **TEXTS}
"""What is fine-tuned on what, by name; one more entry is one more arena."""
_OWN = frozenset(GROUNDS)


def add_ground(name: str, ground: Ground) -> None:
    """Enter a ground under a name, for this process and for those that :func:`~orthokit.lab.arena.run_arena` starts.

    The latter get a copy, so with ``jobs`` above 1 its functions have to be ones that a module defines.

    Args:
        name: Not taken yet; letters, digits, ``_``.
        ground: For example of :func:`orthokit.lab.arena.hugging_face_ground`.

    Raises:
        OptionError: The name is taken or unfit.

    Example:
        >>> add_ground("tinygpt", GROUNDS["tinygpt"])
        Traceback (most recent call last):
        orthokit.errors.OptionError: there is a ground 'tinygpt' already; choose another name.
    """
    if not name.isidentifier():
        raise OptionError(f"the name of a ground has letters, digits and '_' and begins with no digit; got {name!r}.")
    if name in GROUNDS:
        # What was measured of the old one is kept by name.
        raise OptionError(f"there is a ground {name!r} already; choose another name.")
    GROUNDS[name] = ground


def handed_on(names: Iterable[str]) -> dict[str, Ground]:
    """Those of the grounds that another process would lack, which are the ones that were added in this one.

    Raises:
        OptionError: One of them cannot be sent there.
    """
    added = {name: GROUNDS[name] for name in names if name not in _OWN}
    for name, ground in added.items():
        try:
            pickle.dumps(ground)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise OptionError(
                f"with jobs above 1 the functions of a ground must be defined in a module; {name!r} cannot be handed "
                f"to other processes ({error}). Use jobs=1."
            ) from error
    return added


def ground_named(name: str) -> Ground:
    """The ground of a name, or an error that lists them."""
    if name not in GROUNDS:
        raise unknown_name("ground", name, GROUNDS)
    return GROUNDS[name]


def targets_of(ground: Ground, small: bool) -> Sequence[str]:
    """The layers that are adapted; in the smallest runs a few of them."""
    return ground.few if small else ground.targets


def pretrained_model(name: str, small: bool) -> nn.Module:
    """The model before fine-tuning."""
    return ground_named(name).model(small)


def target_task(name: str, seed: int, small: bool) -> Task:
    """What it is fine-tuned on; the seed is that of the batches."""
    return ground_named(name).task(seed, small)


def judged(name: str, model: nn.Module, small: bool, general: bool = True) -> dict[str, float]:
    """Held-out figures: ``target``, ``error`` and, if asked for, what the model could do before.

    With the latter comes ``geometry`` where the ground has one: how much the similarities of held-out inputs changed.
    """
    ground = ground_named(name)
    model.eval()
    found = target_task(name, 0, small).evaluate(model)
    result = {"target": found[ground.loss], "error": found.get(ground.error, math.nan)}
    if not general:
        return result
    with torch.no_grad():
        result |= ground.general(model, small)
        return result if ground.geometry is None else result | {"geometry": ground.geometry(model, small)}


@lru_cache(maxsize=16)
def figures_at_start(name: str, small: bool) -> dict[str, float]:
    """The figures before the first step: the same for all methods, since a method at rest changes nothing."""
    return judged(name, pretrained_model(name, small), small)
