"""Tasks on short texts: the broad class of meaning of a dictionary definition, the era of a piece of a speech."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import MissingExtraError, OptionError, unknown_name
from orthokit.lab.eras import EraSet, eras
from orthokit.lab.glosses import GlossSet, glosses
from orthokit.lab.pretrained import sentence_files
from orthokit.lab.tasks import Batch, Task, _step_generator, _to_model

__all__ = ["TextClassification", "text_classification", "tokenize"]

_AT_ONCE = 64
_PARTS = ("noun", "verb", "era")


@lru_cache(maxsize=1)
def _tokenizer() -> object:
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingExtraError(
            "texts are cut into tokens by the package tokenizers. Install it with: pip install 'orthokit[pretrained]'"
        )
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(sentence_files() / "tokenizer.json"))


def tokenize(texts: list[str] | tuple[str, ...], *, length: int = 24) -> Int64[Tensor, "texts length"]:
    """Texts as the tokens of all-MiniLM-L6-v2, padded with 0.

    Args:
        texts: At least one.
        length: Tokens kept of each, the two marks at its ends included, ``>= 3``; default 24.

    Returns:
        Shape ``(texts, length)``.

    Raises:
        OptionError: No text, or ``length`` too small.
        MissingExtraError: The tokenizer or its vocabulary is not installed.

    Example:
        >>> tokenize(["a dog", "a small dog"], length=6).tolist()  # doctest: +SKIP
        [[101, 1037, 3899, 102, 0, 0], [101, 1037, 2235, 3899, 102, 0]]
    """
    if not texts or length < 3:
        raise OptionError(f"need at least one text and length >= 3; got {len(texts)} texts, length={length}.")
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(length)  # type: ignore[attr-defined]
    tokenizer.enable_padding(pad_id=0, length=length)  # type: ignore[attr-defined]
    found = tokenizer.encode_batch(list(texts))  # type: ignore[attr-defined]
    return torch.tensor([one.ids for one in found], dtype=torch.int64)


def _texts(part: str) -> GlossSet | EraSet:
    if part not in _PARTS:
        raise unknown_name("text task", part, _PARTS)
    return eras() if part == "era" else glosses(part)


@lru_cache(maxsize=16)
def _tokens(part: str, split: str, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced texts of a split and their labels, made once."""
    rows = getattr(_texts(part), split)
    index = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().unique().tolist()
    return tokenize([rows[i][0] for i in index], length=length), torch.tensor([rows[i][1] for i in index])


class TextClassification(Task):
    """Class prediction on short texts; see :func:`text_classification`."""

    metric = "test_error"
    unit = "share of test texts"

    def __init__(self, part: str, *, batch: int, seed: int, length: int, train: int, test: int) -> None:
        if min(batch, train, test) < 1:
            raise OptionError(f"every size must be at least 1; got batch={batch}, train={train}, test={test}.")
        self.name, self.batch_size, self.seed, self.length = part, batch, seed, length
        self.classes = _texts(part).classes
        self.train_ids, self.train_labels = _tokens(part, "train", train, length)
        self.test_ids, self.test_labels = _tokens(part, "test", test, length)

    def batch(self, step: int) -> Batch:
        """Training texts drawn with replacement, cut to the longest of them."""
        g = _step_generator(self.seed, step)
        index = torch.randint(len(self.train_labels), (self.batch_size,), generator=g)
        return _trimmed(self.train_ids[index]), self.train_labels[index]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the class in nats."""
        inputs, targets = _to_model(model, batch)
        return F.cross_entropy(model(inputs), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Error rate and loss on the test texts."""
        # Sorted by length, a batch has little padding.
        order = (self.test_ids != 0).sum(1).argsort(stable=True)
        wrong, loss = 0.0, 0.0
        for index in order.split(_AT_ONCE):
            inputs, targets = _to_model(model, (_trimmed(self.test_ids[index]), self.test_labels[index]))
            scores = model(inputs)
            wrong += float((scores.argmax(-1) != targets).sum())
            loss += float(F.cross_entropy(scores, targets, reduction="sum"))
        return {self.metric: wrong / len(order), "test_loss": loss / len(order)}

    def describe(self) -> dict[str, object]:
        """Name and sizes."""
        return {
            "task": "text_classification",
            "part": self.name,
            "batch": self.batch_size,
            "data_seed": self.seed,
            "length": self.length,
            "train": len(self.train_labels),
            "test": len(self.test_labels),
        }


def text_classification(
    part: str = "noun", *, batch: int = 16, seed: int = 0, length: int = 24, train: int = 8000, test: int = 512
) -> TextClassification:
    """Class of a short text, for models that take tokens of all-MiniLM-L6-v2.

    Args:
        part: ``"noun"`` (24 classes) or ``"verb"`` (14 classes): the supersense of a definition. ``"era"`` (4 classes):
            when a piece of an address was given, with test pieces from other speeches.
        batch: Texts a step, ``>= 1``; default 16.
        seed: Seed of the stream of batches; default 0.
        length: Tokens kept of a text; default 24.
        train: Texts of the training split that are used, evenly spaced; default 8000.
        test: The same of the test split; default 512.

    Returns:
        The task; its texts are cut into tokens once.

    Raises:
        UnknownNameError: No such task.
        OptionError: A size out of range.
        MissingExtraError: The tokenizer or its vocabulary is not installed.

    Example:
        >>> task = text_classification("verb", batch=4, train=50, test=10)  # doctest: +SKIP
        >>> task.batch(0)[1].shape  # doctest: +SKIP
        torch.Size([4])

    References:
        The definitions are those of :func:`orthokit.lab.glosses`, the pieces those of :func:`orthokit.lab.eras.eras`.
    """
    return TextClassification(part, batch=batch, seed=seed, length=length, train=train, test=test)


def _trimmed(ids: Tensor) -> Tensor:
    return ids[:, : int((ids != 0).sum(1).max())]
