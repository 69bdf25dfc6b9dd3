"""What adapters are compared on: pretrained models, tasks, and what a model could do before."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import unknown_name
from orthokit.lab.encoder import SentenceClassifier, SentenceEncoder
from orthokit.lab.glosses import glosses
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.tasks import Task, language_modelling
from orthokit.lab.text_tasks import TextClassification, text_classification

__all__ = [
    "ADAPTER_TRACKS",
    "AdapterTrack",
    "figures_at_start",
    "judged",
    "pretrained_model",
    "track_named",
    "track_task",
]


@dataclass(frozen=True)
class AdapterTrack:
    """What is fine-tuned on what.

    Args:
        label: What figures call it.
        targets: Layers that are adapted.
        steps: Length of a run of the recorded study.
        loss: Key of the evaluation that methods are compared by, and its ``unit``.
        unit: Unit of the loss.
        error: Key of a second figure, or ``""``.
        other: What the model could do before and may forget, with its unit.
        head_lr: Learning rate of the head, the same for all methods; 0 where there is none to train.
        block: Block size of OFT, which sets the number of trainable parameters for all.
    """

    label: str
    targets: str | tuple[str, ...]
    steps: int
    loss: str
    unit: str
    error: str
    other: str
    head_lr: float
    block: int = 32


_BITS = "validation_bits_per_byte"
_LM_TARGETS = ("blocks.*.attn.?", "blocks.*.mlp.gate", "blocks.*.mlp.up")
_TEXT = {
    "targets": ("encoder.encoder.layer.*",),
    "steps": 40,
    "loss": "test_loss",
    "unit": "nats",
    "error": "test_error",
    "head_lr": 1e-3,
}
ADAPTER_TRACKS: dict[str, AdapterTrack] = {
    "tinygpt": AdapterTrack(
        label="TinyGPT, from the addresses to Moby-Dick",
        # Every input is 128 wide there; the 344 of the down projections have no block of 32.
        targets=_LM_TARGETS,
        steps=50,
        loss=_BITS,
        unit="bits per byte",
        error="",
        other="bits per byte of the addresses",
        head_lr=0.0,
    ),
    "noun": AdapterTrack(label="MiniLM, class of a noun", other="nats on the verbs", **_TEXT),  # type: ignore[arg-type]
    "verb": AdapterTrack(label="MiniLM, class of a verb", other="nats on the nouns", **_TEXT),  # type: ignore[arg-type]
}
_OTHER = {"noun": "verb", "verb": "noun"}
# Definitions that a head is fitted to, and the weight of its ridge.
_PROBED, _RIDGE = 2000, 1e-3


def track_named(track: str) -> AdapterTrack:
    """The track of a name, or an error that lists them."""
    if track not in ADAPTER_TRACKS:
        raise unknown_name("track", track, ADAPTER_TRACKS)
    return ADAPTER_TRACKS[track]


def targets_of(course: AdapterTrack, small: bool) -> str | Sequence[str]:
    """The layers that are adapted; in the smallest runs a few of them."""
    if not small:
        return course.targets
    return ("blocks.0.attn.?",) if course.head_lr == 0 else ("encoder.encoder.layer.5.attention.self.*",)


def bare_model(track: str) -> nn.Module:
    """The pretrained model, with a head that is not fitted yet."""
    if track == "tinygpt":
        return load_pretrained()
    return SentenceClassifier(copy.deepcopy(_encoder()), len(glosses(track).classes))


def pretrained_model(track: str, small: bool) -> nn.Module:
    """The model before fine-tuning."""
    model = bare_model(track)
    if isinstance(model, SentenceClassifier):
        model.head.load_state_dict(_probe(track, small))
    return model


def track_task(track: str, seed: int, small: bool) -> Task:
    """The task; the seed is that of its batches."""
    if track != "tinygpt":
        return _text_task(track, seed, small)
    context, batch, windows = (32, 2, 4) if small else (128, 8, 64)
    return language_modelling("moby_dick", context=context, batch=batch, seed=seed, validation_windows=windows)


def _text_task(track: str, seed: int, small: bool, *, test: int | None = None) -> TextClassification:
    sizes = {"batch": 4, "train": 64, "test": 16} if small else {"batch": 16, "train": 8000, "test": 768}
    return text_classification(track, seed=seed, **(sizes if test is None else {**sizes, "test": test}))


def judged(track: str, model: nn.Module, small: bool, other: bool = True) -> dict[str, float]:
    """Held-out figures of the task and, if asked for, of what the model could do before."""
    course = track_named(track)
    model.eval()
    found = track_task(track, 0, small).evaluate(model)
    result = {"value": found[course.loss], "error": found.get(course.error, math.nan)}
    if not other:
        return result
    if track == "tinygpt":
        context, windows = (32, 4) if small else (128, 64)
        before = language_modelling("addresses", context=context, validation_windows=windows).evaluate(model)[_BITS]
    else:
        before = _other_loss(track, model, small)
    return result | {"other": before}


def _other_loss(track: str, model: nn.Module, small: bool) -> float:
    """The other text task by this encoder, with the head that was fitted to the frozen one."""
    other = _OTHER[track]
    twin = SentenceClassifier(cast("SentenceEncoder", model.encoder), len(glosses(other).classes))
    twin.head.load_state_dict(_probe(other, small))
    return _text_task(other, 0, small, test=16 if small else 512).evaluate(twin.eval())["test_loss"]


@lru_cache(maxsize=8)
def figures_at_start(track: str, small: bool) -> dict[str, float]:
    """The figures before the first step: the same for all methods, since an adapter at rest changes nothing."""
    return judged(track, pretrained_model(track, small), small)


@lru_cache(maxsize=4)
def _probe(track: str, small: bool) -> dict[str, Tensor]:
    """Weight and bias of a logistic regression on the vectors of the frozen encoder."""
    task = _text_task(track, 0, small)
    every = max(1, len(task.train_ids) // _PROBED)
    with torch.no_grad():
        vectors = torch.cat([_encoder()(ids) for ids in task.train_ids[::every].split(64)])
    weight = torch.zeros(len(task.classes), vectors.shape[1], requires_grad=True)
    bias = torch.zeros(len(task.classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = F.linear(vectors, weight, bias)
        loss = F.cross_entropy(scores, task.train_labels[::every]) + _RIDGE * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return {"weight": weight.detach(), "bias": bias.detach()}


@lru_cache(maxsize=1)
def _encoder() -> SentenceEncoder:
    return load_pretrained("all-minilm-l6-v2")
