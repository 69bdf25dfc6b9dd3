"""Tasks: where a batch comes from, what the loss is, how a model is judged.

A batch is a function of ``(seed, step)`` alone. That is what lets a run resume bit for bit, two optimizers see the same
data, and a frozen probe draw fresh minibatches without disturbing the training stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import OptionError, unknown_name
from orthokit.lab.corpora import corpora, corpus
from orthokit.lab.images import images

__all__ = [
    "ImageClassification",
    "LanguageModelling",
    "Task",
    "image_classification",
    "language_modelling",
    "task",
    "tasks",
]

Batch = tuple[Tensor, Tensor]


def _step_generator(seed: int, step: int) -> torch.Generator:
    # One multiplication by a large odd number decorrelates neighbouring (seed, step) pairs in the generator's state.
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 0x9E3779B97F4A7C15 % 2**63)


class Task(ABC):
    """Data, loss and evaluation of one learning problem."""

    name: str
    metric: str
    """The key of :meth:`evaluate` that a figure shows first."""
    unit: str

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The minibatch of a step: ``(inputs, targets)`` on the CPU; equal steps give equal batches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of the batch in nats, differentiable."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures; always holds the key :attr:`metric`."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """What would rebuild the task: for the record of a run."""


def _to_model(model: nn.Module, batch: Batch) -> Batch:
    device = next(model.parameters()).device
    return batch[0].to(device), batch[1].to(device)


class LanguageModelling(Task):
    """Next-byte prediction on a corpus; see :func:`language_modelling`."""

    metric = "validation_bits_per_byte"
    unit = "bits per byte"

    def __init__(self, name: str, *, context: int, batch: int, seed: int, validation_windows: int) -> None:
        if min(context, batch, validation_windows) < 1:
            found = f"context={context}, batch={batch}, validation_windows={validation_windows}"
            raise OptionError(f"every size of a task must be at least 1; got {found}.")
        self.name, self.context, self.batch_size, self.seed = name, context, batch, seed
        data = corpus(name)
        self.train, self.validation = data.train, data.validation
        shorter = min(len(self.train), len(self.validation))
        if context + 1 >= shorter:
            raise OptionError(
                f"context must be below {shorter - 1}, one less than the bytes of the smaller split; got {context}."
            )
        # Evenly spaced windows cover all years of the corpus with a fraction of its bytes.
        last = len(self.validation) - context - 1
        self.validation_starts = torch.linspace(0, last, validation_windows).long()

    def _windows(self, data: Tensor, starts: Tensor) -> Batch:
        rows = data[starts[:, None] + torch.arange(self.context + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step: int) -> Batch:
        """Windows that start at random bytes of the training split."""
        g = _step_generator(self.seed, step)
        starts = torch.randint(len(self.train) - self.context - 1, (self.batch_size,), generator=g)
        return self._windows(self.train, starts)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the next byte in nats."""
        inputs, targets = _to_model(model, batch)
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte over the fixed validation windows."""
        total = 0.0
        for starts in self.validation_starts.split(16):
            total += float(self.loss(model, self._windows(self.validation, starts))) * len(starts)
        return {self.metric: total / len(self.validation_starts) / math.log(2)}

    def describe(self) -> dict[str, object]:
        """Name and sizes."""
        windows = len(self.validation_starts)
        return {
            "task": "language_modelling",
            "corpus": self.name,
            "context": self.context,
            "batch": self.batch_size,
            "data_seed": self.seed,
            "validation_windows": windows,
        }


class ImageClassification(Task):
    """Class prediction on small images; see :func:`image_classification`."""

    metric = "test_error"
    unit = "share of test images"

    def __init__(self, name: str, *, batch: int, seed: int) -> None:
        if batch < 1:
            raise OptionError(f"batch must be at least 1; got {batch}.")
        self.name, self.batch_size, self.seed = name, batch, seed
        self.data = images(name)

    def batch(self, step: int) -> Batch:
        """Training images drawn with replacement."""
        g = _step_generator(self.seed, step)
        index = torch.randint(len(self.data.train_labels), (self.batch_size,), generator=g)
        return self.data.train_images[index], self.data.train_labels[index]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the class in nats."""
        inputs, targets = _to_model(model, batch)
        return F.cross_entropy(model(inputs), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Error rate and loss on the whole test split."""
        inputs, targets = _to_model(model, (self.data.test_images, self.data.test_labels))
        scores = model(inputs)
        wrong = (scores.argmax(-1) != targets).double().mean()
        return {self.metric: float(wrong), "test_loss": float(F.cross_entropy(scores, targets))}

    def describe(self) -> dict[str, object]:
        """Name and sizes."""
        return {
            "task": "image_classification",
            "images": self.name,
            "batch": self.batch_size,
            "data_seed": self.seed,
        }


def language_modelling(
    name: str = "addresses", *, context: int = 128, batch: int = 16, seed: int = 0, validation_windows: int = 256
) -> LanguageModelling:
    """Next-byte prediction on a corpus of the package.

    Args:
        name: A name in :func:`corpora`; default ``"addresses"``.
        context: Bytes of a training window, ``>= 1``; default 128.
        batch: Windows a step, ``>= 1``; default 16.
        seed: Seed of the stream of windows; default 0.
        validation_windows: Evenly spaced windows of the validation split that are judged; default 256.

    Returns:
        The task.

    Raises:
        UnknownNameError: No such corpus.
        OptionError: A size out of range.

    Example:
        >>> inputs, targets = language_modelling("moby_dick", context=32, batch=4).batch(0)
        >>> inputs.shape, bool((inputs[:, 1:] == targets[:, :-1]).all())
        (torch.Size([4, 32]), True)
    """
    return LanguageModelling(name, context=context, batch=batch, seed=seed, validation_windows=validation_windows)


def image_classification(name: str = "fashion", *, batch: int = 64, seed: int = 0) -> ImageClassification:
    """Class prediction on the small images of the package.

    Args:
        name: ``"fashion"`` or ``"digits"``.
        batch: Images a step, ``>= 1``; default 64.
        seed: Seed of the stream of batches; default 0.

    Returns:
        The task.

    Raises:
        UnknownNameError: No such image set.
        OptionError: ``batch`` out of range.

    Example:
        >>> image_classification("digits", batch=8).batch(0)[0].shape
        torch.Size([8, 1, 8, 8])
    """
    return ImageClassification(name, batch=batch, seed=seed)


def tasks() -> dict[str, str]:
    """The names that :func:`task` takes, each with what it is."""
    text = {f"{name}": f"next byte of {name}" for name in corpora()["name"]}
    return {**text, "fashion": "class of a garment, 28 x 28", "digits": "class of a digit, 8 x 8"}


def task(name: str, **options: int) -> Task:
    """A task by its name in :func:`tasks`.

    Args:
        name: One of :func:`tasks`.
        **options: Options of :func:`language_modelling` or :func:`image_classification`.

    Returns:
        The task.

    Raises:
        UnknownNameError: No such task.

    Example:
        >>> task("digits", batch=4).metric
        'test_error'
    """
    if name not in tasks():
        raise unknown_name("task", name, tasks())
    return (
        image_classification(name, **options) if name in ("fashion", "digits") else language_modelling(name, **options)
    )
