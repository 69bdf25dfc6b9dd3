"""Where methods meet: a pretrained model, what it is fine-tuned on, and what it could do before and may forget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import unknown_name
from orthokit.lab.encoder import SentenceClassifier, SentenceEncoder
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.tasks import Task, language_modelling
from orthokit.lab.text_tasks import TextClassification, text_classification

__all__ = ["GROUNDS", "Ground", "figures_at_start", "ground_named", "judged", "pretrained_model", "target_task"]


@dataclass(frozen=True)
class Ground:
    """A pretrained model and what it is fine-tuned on; all scores are losses, so less is better.

    Args:
        label: What figures call it.
        model: ``model(small)``: the pretrained model; its head, if it has one, is fitted to the frozen rest.
        task: ``task(seed, small)``: what it is fine-tuned on; the seed is that of the batches.
        general: ``general(model, small)``: what the model could do before, as a dictionary whose key ``"general"`` is
            the loss that forgetting is measured by.
        targets: Layers that are adapted; ``few`` of them in the smallest runs.
        steps: Length of a run of the recorded studies.
        loss: Key of the task's evaluation that is the target loss, and its ``unit``.
        error: Key of a second figure, or ``""``.
        other: What ``general`` is, with its unit.
        head: Attribute of the model that holds a head to train along, or ``""``.
        head_lr: Its learning rate, the same for all methods.
        block: Block size of OFT, which sets the number of trainable parameters for all.
    """

    label: str
    model: Callable[[bool], nn.Module]
    task: Callable[[int, bool], Task]
    general: Callable[[nn.Module, bool], dict[str, float]]
    targets: tuple[str, ...]
    few: tuple[str, ...]
    steps: int
    loss: str
    unit: str
    error: str
    other: str
    head: str = ""
    head_lr: float = 0.0
    block: int = 32


_BITS = "validation_bits_per_byte"
# Texts that a head is fitted to, and the weight of its ridge.
_PROBED, _RIDGE = 2000, 1e-3


def _moby_dick(seed: int, small: bool) -> Task:
    context, batch, windows = (32, 2, 4) if small else (128, 8, 64)
    return language_modelling("moby_dick", context=context, batch=batch, seed=seed, validation_windows=windows)


def _addresses(model: nn.Module, small: bool) -> dict[str, float]:
    context, windows = (32, 4) if small else (128, 64)
    task = language_modelling("addresses", context=context, validation_windows=windows)
    return {"general": task.evaluate(model)[_BITS]}


def _texts(part: str, seed: int, small: bool, *, test: int | None = None) -> TextClassification:
    sizes = {"batch": 4, "train": 64, "test": 16} if small else {"batch": 16, "train": 8000, "test": 768}
    return text_classification(part, seed=seed, **(sizes if test is None else {**sizes, "test": test}))


def _classifier(part: str, small: bool) -> SentenceClassifier:
    head = _probe(part, small)
    model = SentenceClassifier(copy.deepcopy(_encoder()), len(head["bias"]))
    model.head.load_state_dict(head)
    return model


def _held_out(part: str, model: nn.Module, small: bool) -> dict[str, float]:
    """Another text task by this encoder, with the head that was fitted to the frozen one."""
    head = _probe(part, small)
    twin = SentenceClassifier(cast("SentenceEncoder", model.encoder), len(head["bias"]))
    twin.head.load_state_dict(head)
    return {"general": _texts(part, 0, small, test=16 if small else 512).evaluate(twin.eval())["test_loss"]}


def _text_ground(part: str, other: str, label: str, what: str) -> Ground:
    return Ground(
        label=label,
        model=lambda small: _classifier(part, small),
        task=lambda seed, small: _texts(part, seed, small),
        general=lambda model, small: _held_out(other, model, small),
        targets=("encoder.encoder.layer.*",),
        few=("encoder.encoder.layer.5.attention.self.*",),
        steps=40,
        loss="test_loss",
        unit="nats",
        error="test_error",
        other=what,
        head="head",
        head_lr=1e-3,
    )


GROUNDS: dict[str, Ground] = {
    "tinygpt": Ground(
        label="TinyGPT, from the addresses to Moby-Dick",
        model=lambda _: load_pretrained(),
        task=_moby_dick,
        general=_addresses,
        # Every input is 128 wide there; the 344 of the down projections have no block of 32.
        targets=("blocks.*.attn.?", "blocks.*.mlp.gate", "blocks.*.mlp.up"),
        few=("blocks.0.attn.?",),
        steps=50,
        loss=_BITS,
        unit="bits per byte",
        error="",
        other="bits per byte of the addresses",
    ),
    "noun": _text_ground("noun", "verb", "MiniLM, class of a noun", "nats on the verbs"),
    "verb": _text_ground("verb", "noun", "MiniLM, class of a verb", "nats on the nouns"),
}
"""What is fine-tuned on what, by name; one more entry is one more arena."""


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
    """Held-out figures: ``target``, ``error`` and, if asked for, what the model could do before."""
    ground = ground_named(name)
    model.eval()
    found = target_task(name, 0, small).evaluate(model)
    result = {"target": found[ground.loss], "error": found.get(ground.error, math.nan)}
    if not general:
        return result
    with torch.no_grad():
        return result | ground.general(model, small)


@lru_cache(maxsize=16)
def figures_at_start(name: str, small: bool) -> dict[str, float]:
    """The figures before the first step: the same for all methods, since a method at rest changes nothing."""
    return judged(name, pretrained_model(name, small), small)


@lru_cache(maxsize=8)
def _probe(part: str, small: bool) -> dict[str, Tensor]:
    """Weight and bias of a logistic regression on the vectors of the frozen encoder."""
    task = _texts(part, 0, small)
    every = max(1, len(task.train_ids) // _PROBED)
    with torch.no_grad():
        vectors = torch.cat([_encoder()(ids) for ids in task.train_ids[::every].split(64)])
    return fitted_head(vectors, task.train_labels[::every], len(task.classes))


def fitted_head(vectors: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
    """Weight and bias of a ridge logistic regression."""
    weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(vectors, weight, bias), labels) + _RIDGE * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return {"weight": weight.detach(), "bias": bias.detach()}


@lru_cache(maxsize=1)
def _encoder() -> SentenceEncoder:
    return load_pretrained("all-minilm-l6-v2")
