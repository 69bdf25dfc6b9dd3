"""The families of experts: what is fine-tuned to which tasks, and which examples options are chosen by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from orthokit.lab.arena import GROUNDS
from orthokit.lab.arena.ground import fitted_head
from orthokit.lab.arena.texts import ground_texts
from orthokit.lab.glosses import glosses
from orthokit.lab.image_tasks import SomeClasses
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.tasks import LanguageModelling, Task, language_modelling
from orthokit.lab.vision import load_small_vit

__all__ = ["FAMILIES", "HEAD", "PARTS", "Family", "FamilyTask", "parted", "with_part"]

PARTS = ("validation", "test")
HEAD = "head."
# Examples of a task that options are chosen by; all others of its half are not looked at.
_CHOSEN_BY = 384


@dataclass(frozen=True)
class FamilyTask:
    """What an expert is trained on.

    Args:
        model: ``model(small)``: the pretrained model with a head fitted to the task, the rest as it was.
        task: ``task(seed, small)``: data, loss and evaluation.
        lr: Learning rate of the trunk.
        steps: Length of the training.
    """

    model: Callable[[bool], nn.Module]
    task: Callable[[int, bool], Task]
    lr: float
    steps: int


@dataclass(frozen=True)
class Family:
    """A pretrained model and the tasks that experts of it are trained on.

    Args:
        label: What figures call it.
        tasks: By name; their models differ in the head alone.
        score: What tasks are scored by, higher is better, with its unit.
        retained: What the model could do before, likewise.
        general: ``general(model, small)``: that figure of a model of one of the tasks.
        blocks: The blocks that anchors are constructed for, as a pattern of names.
    """

    label: str
    tasks: Mapping[str, FamilyTask]
    score: str
    retained: str
    general: Callable[[nn.Module, bool], float]
    blocks: str


def parted(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a model without its head, and those of its head."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    head = {name: state.pop(name) for name in list(state) if name.startswith(HEAD)}
    return state, head


def with_part(task: Task, part: str) -> Task:
    """The task with the examples of one part to be judged on.

    The classes of pictures have training examples set apart to choose options by. Of other tasks it is every second of
    the held-out examples, evenly spaced and not too many, and the rest is the test.
    """
    found, which = copy.copy(task), PARTS.index(part)
    if isinstance(found, _Pictures):
        if part == "validation":
            found.test_images, found.test_labels = found.apart_images, found.apart_labels
        return found
    for name in ("test_ids", "test_labels", "validation_starts"):
        if hasattr(found, name):
            kept = getattr(found, name)[which::2]
            every = -(-len(kept) // _CHOSEN_BY) if part == "validation" else 1
            setattr(found, name, kept[::every])
    return found


class _Definitions(LanguageModelling):
    """Next-byte prediction on the definitions of nouns, one a line."""

    def __init__(self, *, context: int, batch: int, seed: int, validation_windows: int) -> None:
        super().__init__("moby_dick", context=context, batch=batch, seed=seed, validation_windows=1)
        self.name = "definitions"
        self.train, self.validation = _lines("train"), _lines("test")
        last = len(self.validation) - context - 1
        self.validation_starts = torch.linspace(0, last, validation_windows).long()


@lru_cache(maxsize=2)
def _lines(split: str) -> Tensor:
    text = "\n".join(definition for definition, _ in getattr(glosses("noun"), split))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _language(which: str, seed: int, small: bool) -> LanguageModelling:
    sizes = {"context": 32, "batch": 2} if small else {"context": 128, "batch": 8}
    windows = 4 if small else 64
    if which == "definitions":
        return _Definitions(**sizes, seed=seed, validation_windows=windows)
    return language_modelling(which, **sizes, seed=seed, validation_windows=windows)


def _addresses(model: nn.Module, small: bool) -> float:
    return -GROUNDS["tinygpt"].general(model, small)["general"]


class _Pictures(SomeClasses):
    """Some classes of pictures, with every fourth training example set apart: so few digits are held out."""

    def __init__(self, name: str, classes: tuple[int, ...], *, seed: int, batch: int, test: int | None) -> None:
        super().__init__(name, classes, seed=seed, batch=batch, side=28, test=test)
        images, labels = self.train_images, self.train_labels
        apart = torch.arange(len(labels)) % 4 == 3
        self.train_images, self.apart_images = images[~apart], images[apart]
        self.train_labels, self.apart_labels = labels[~apart], labels[apart]


def _pictures(name: str, classes: tuple[int, ...], seed: int, small: bool) -> _Pictures:
    return _Pictures(name, classes, seed=seed, batch=8 if small else 64, test=32 if small else None)


def _vit(name: str, classes: tuple[int, ...], small: bool) -> nn.Module:
    model, head = load_small_vit(), _picture_head(name, classes, small)
    # Without a draw from the global generator.
    model.head = cast("nn.Linear", nn.utils.skip_init(nn.Linear, head["weight"].shape[1], len(classes)))
    model.head.load_state_dict(head)
    return model


@lru_cache(maxsize=8)
def _picture_head(name: str, classes: tuple[int, ...], small: bool) -> dict[str, Tensor]:
    task = _pictures(name, classes, 0, small)
    every = max(1, len(task.train_labels) // (200 if small else 2000))
    with torch.no_grad():
        vectors = load_small_vit().features(task.train_images[::every])
    return fitted_head(vectors, task.train_labels[::every], len(classes))


def _garments(model: nn.Module, small: bool) -> float:
    """Accuracy on the five garments that the model knew, by the head that it had."""
    task, old = _pictures("fashion", (0, 1, 2, 3, 4), 0, small), load_small_vit()
    old.load_state_dict({**parted(old)[1], **parted(model)[0]})
    return 1 - task.evaluate(old.eval())["test_error"]


def _picture_task(name: str, *classes: int) -> FamilyTask:
    return FamilyTask(partial(_vit, name, classes), partial(_pictures, name, classes), lr=2e-3, steps=60)


def _texts(part: str, seed: int, small: bool) -> Task:
    # More than the ground has, since differences between merged models are small.
    return ground_texts(part, seed, small, test=None if small else 1024 if part == "era" else 1536)


def _text_task(part: str) -> FamilyTask:
    return FamilyTask(GROUNDS[part].model, partial(_texts, part), lr=1e-4, steps=160)


def _similar(model: nn.Module, small: bool) -> float:
    geometry = cast("Callable[[nn.Module, bool], float]", GROUNDS["noun"].geometry)
    return 1 - geometry(model, small)


def _gpt(small: bool) -> nn.Module:
    return load_pretrained()


FAMILIES: dict[str, Family] = {
    "pictures": Family(
        label="ViT of five garments, to other garments and to digits",
        tasks={
            "footwear": _picture_task("fashion", 5, 7, 9),
            "low digits": _picture_task("digits", 0, 1, 2, 3, 4),
            "high digits": _picture_task("digits", 5, 6, 7, 8, 9),
        },
        score="accuracy",
        retained="accuracy on the garments it knew",
        general=_garments,
        blocks="blocks.*",
    ),
    "texts": Family(
        label="MiniLM, to classes of nouns, of verbs, and to eras",
        tasks={part: _text_task(part) for part in ("noun", "verb", "era")},
        score="accuracy",
        retained="correlation of sentence similarities with those before",
        general=_similar,
        blocks="encoder.encoder.layer.*",
    ),
    "language": Family(
        label="TinyGPT of the addresses, to Moby-Dick and to definitions",
        tasks={
            "moby_dick": FamilyTask(_gpt, partial(_language, "moby_dick"), lr=3e-3, steps=50),
            "definitions": FamilyTask(_gpt, partial(_language, "definitions"), lr=3e-3, steps=50),
        },
        score="minus bits per byte",
        retained="minus bits per byte of the addresses",
        general=_addresses,
        blocks="blocks.*",
    ),
}
"""The families of the recorded study, by name."""
