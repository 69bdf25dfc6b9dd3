"""The arenas of the sentence encoder: classes of nouns and verbs, and the era a speech was given in."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from orthokit.lab.arena.ground import Ground, fitted_head
from orthokit.lab.encoder import SentenceClassifier, SentenceEncoder
from orthokit.lab.pretrained import load_pretrained
from orthokit.lab.text_tasks import TextClassification, text_classification

__all__ = ["TEXTS", "ground_texts"]

# Texts that a head is fitted to, and sentences whose similarities are compared, of each of two tasks.
_PROBED, _COMPARED = 2000, 100


def ground_texts(part: str, seed: int, small: bool, *, test: int | None = None) -> TextClassification:
    """The texts of a ground, in its batches; ``test``: so many to be judged on."""
    sizes: dict[str, int] = (
        {"batch": 4, "train": 64, "test": 16} if small else {"batch": 16, "train": 8000, "test": 768}
    )
    if part == "era" and not small:
        # Pieces of a speech are longer than definitions; fewer of them cost the same.
        sizes |= {"length": 32, "test": 512}
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
    return {"general": ground_texts(part, 0, small, test=16 if small else 512).evaluate(twin.eval())["test_loss"]}


def _similarities(encoder: nn.Module, small: bool) -> Tensor:
    """Cosines of all pairs of held-out sentences."""
    each = 4 if small else _COMPARED
    with torch.no_grad():
        ids = [ground_texts(part, 0, small, test=each).test_ids for part in ("noun", "verb")]
        vectors = torch.cat([encoder(some) for one in ids for some in one.split(50)])
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (unit @ unit.mT)[*torch.triu_indices(len(unit), len(unit), 1)]


@lru_cache(maxsize=2)
def _similarities_before(small: bool) -> Tensor:
    return _similarities(_encoder(), small)


def _geometry(model: nn.Module, small: bool) -> float:
    """1 - Pearson correlation of the similarities of held-out sentences, before and after."""
    encoder = cast("nn.Module", model.encoder)
    pair = torch.stack([_similarities_before(small), _similarities(encoder.eval(), small)])
    return float(1 - torch.corrcoef(pair)[0, 1])


def _bare() -> SentenceClassifier:
    with torch.device("meta"):
        encoder = SentenceEncoder()
    # Two classes: the head is not among the layers that are adapted.
    return SentenceClassifier(encoder, 2)


def _text_ground(part: str, other: str, label: str, what: str, *, steps: int = 40) -> Ground:
    def inputs(which: str, small: bool) -> list[Tensor]:
        task = ground_texts(other if which == "general" else part, 0, small)
        return list(task.test_ids.split(64))

    return Ground(
        label=label,
        model=lambda small: _classifier(part, small),
        task=lambda seed, small: ground_texts(part, seed, small),
        general=lambda model, small: _held_out(other, model, small),
        targets=("encoder.encoder.layer.*",),
        few=("encoder.encoder.layer.5.attention.self.*",),
        steps=steps,
        loss="test_loss",
        unit="nats",
        error="test_error",
        other=what,
        head="head",
        head_lr=1e-3,
        inputs=inputs,
        # What each layer adds to what goes past it; 384 wide.
        seen=("encoder.encoder.layer.?.output.dense",),
        tokens=1536,
        padded=True,
        geometry=_geometry,
        bare=_bare,
    )


TEXTS: dict[str, Ground] = {
    "noun": _text_ground("noun", "verb", "MiniLM, class of a noun", "nats on the verbs"),
    "verb": _text_ground("verb", "noun", "MiniLM, class of a verb", "nats on the nouns"),
    # The fitted head already tells eras about as well as a shorter fine-tuning does.
    "era": _text_ground("era", "noun", "MiniLM, era of a speech", "nats on the nouns", steps=64),
}
"""Grounds of the sentence encoder, by name."""


@lru_cache(maxsize=8)
def _probe(part: str, small: bool) -> dict[str, Tensor]:
    """Weight and bias of a logistic regression on the vectors of the frozen encoder."""
    task = ground_texts(part, 0, small)
    every = max(1, len(task.train_ids) // _PROBED)
    with torch.no_grad():
        vectors = torch.cat([_encoder()(ids) for ids in task.train_ids[::every].split(64)])
    return fitted_head(vectors, task.train_labels[::every], len(task.classes))


@lru_cache(maxsize=1)
def _encoder() -> SentenceEncoder:
    return load_pretrained("all-minilm-l6-v2")
