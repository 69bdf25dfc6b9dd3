"""Tasks that follow one another: a set of images split by classes, and new data mixed with old."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import OptionError, unknown_name
from orthokit.lab.images import images
from orthokit.lab.tasks import Batch, Task, _step_generator, _to_model

__all__ = ["ClassSplit", "Replay", "class_sequence", "class_split"]

HEADS = ("own", "shared")


def class_split(
    name: str = "fashion",
    *,
    classes: Sequence[int],
    head: str = "own",
    batch: int = 32,
    seed: int = 0,
    shrink: int = 1,
) -> ClassSplit:
    """Some classes of a set of images as a task of their own.

    Args:
        name: ``"fashion"`` or ``"digits"``.
        classes: At least two of its classes, by index.
        head: Which outputs of the model are the task's: ``"own"`` (default), those of its classes, so that every task
            has outputs of its own; or ``"shared"``, the first ``len(classes)``, which all tasks use.
        batch: Images a step, ``>= 1``; default 32.
        seed: Seed of the stream of batches; default 0.
        shrink: Pixels are averaged over squares of this side, ``>= 1``; default 1. Steps get cheaper.

    Returns:
        The task.

    Raises:
        UnknownNameError: No such image set or head.
        OptionError: Fewer than two classes, one twice or unknown, or ``batch`` or ``shrink`` out of range.

    Example:
        >>> task = class_split("digits", classes=(3, 8), batch=4)
        >>> task.batch(0)[0].shape, task.class_names
        (torch.Size([4, 1, 8, 8]), ('3', '8'))
    """
    return ClassSplit(name, classes=classes, head=head, batch=batch, seed=seed, shrink=shrink)


def class_sequence(
    name: str = "fashion", *, parts: int = 5, head: str = "own", batch: int = 32, seed: int = 0, shrink: int = 1
) -> list[ClassSplit]:
    """All classes of a set of images, dealt into tasks that are to be learned one after another.

    Args:
        name: ``"fashion"`` or ``"digits"``.
        parts: Number of tasks; a divisor of the number of classes, with two classes or more to a task. Default 5.
        head: See :func:`class_split`.
        batch: See :func:`class_split`.
        seed: Seed of the order of the classes and of the batches; default 0.
        shrink: See :func:`class_split`.

    Returns:
        The tasks, in order.

    Raises:
        OptionError: ``parts`` does not fit.

    Example:
        >>> tasks = class_sequence("digits", parts=5)
        >>> sorted(c for task in tasks for c in task.classes)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    count = len(images(name).classes)
    if parts < 1 or count % parts or count // parts < 2:
        raise OptionError(f"parts must divide {count} into tasks of at least 2 classes; got {parts}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).reshape(parts, -1).tolist()
    options = {"head": head, "batch": batch, "seed": seed, "shrink": shrink}
    return [class_split(name, classes=some, **options) for some in order]


class ClassSplit(Task):
    """Some classes of a set of images; see :func:`class_split`."""

    metric = "test_error"
    unit = "share of test images"

    def __init__(self, name: str, *, classes: Sequence[int], head: str, batch: int, seed: int, shrink: int) -> None:
        if head not in HEADS:
            raise unknown_name("head", head, HEADS)
        if min(batch, shrink) < 1:
            raise OptionError(f"batch and shrink must be at least 1; got {batch} and {shrink}.")
        data, self.classes = images(name), tuple(int(c) for c in classes)
        known = range(len(data.classes))
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes) or not set(self.classes) <= set(known):
            raise OptionError(f"classes must be at least two different ones below {len(known)}; got {self.classes}.")
        self.name, self.head, self.batch_size, self.seed, self.shrink = name, head, batch, seed, shrink
        #: Names of the classes.
        self.class_names = tuple(data.classes[c] for c in self.classes)
        self.outputs = torch.tensor(self.classes if head == "own" else range(len(self.classes)))
        self.train_images, self.train_labels = self._part(data.train_images, data.train_labels)
        self.test_images, self.test_labels = self._part(data.test_images, data.test_labels)

    def _part(self, pictures: Tensor, labels: Tensor) -> Batch:
        mine = labels[:, None] == torch.tensor(self.classes)
        kept = mine.any(1)
        small = pictures[kept] if self.shrink == 1 else F.avg_pool2d(pictures[kept], self.shrink)
        return small, mine[kept].int().argmax(1)

    def batch(self, step: int) -> Batch:
        """Training images drawn with replacement; labels count within the task."""
        g = _step_generator(self.seed, step)
        index = torch.randint(len(self.train_labels), (self.batch_size,), generator=g)
        return self.train_images[index], self.train_labels[index]

    def scores(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """The task's outputs of the model."""
        found = model(inputs)
        return found[..., self.outputs.to(found.device)]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy among the task's classes in nats."""
        inputs, targets = _to_model(model, batch)
        return F.cross_entropy(self.scores(model, inputs), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Error rate and loss on all test images of the task's classes."""
        inputs, targets = _to_model(model, (self.test_images, self.test_labels))
        scores = self.scores(model, inputs)
        wrong = (scores.argmax(-1) != targets).double().mean()
        return {self.metric: float(wrong), "test_loss": float(F.cross_entropy(scores, targets))}

    def describe(self) -> dict[str, object]:
        """Name, classes and sizes."""
        return {
            "task": "class_split",
            "images": self.name,
            "classes": list(self.classes),
            "head": self.head,
            "batch": self.batch_size,
            "data_seed": self.seed,
            "shrink": self.shrink,
        }


class Replay(Task):
    r"""A new task mixed with what is kept of old ones: step ``t`` adds a batch of old task ``t mod K``.

    .. math:: (1 - s)\,\ell_{\text{new}} + s\,\ell_{\text{old}}

    Args:
        new: The task to learn.
        old: One task or more, learned before.
        share: ``s``, in [0, 1]; default 0.5.
        memory: How many examples of each old task are kept, ``>= 1``; default ``None``, all.
        seed: Seed of what is drawn from the memory; default 0.

    Raises:
        OptionError: No old task, or a number out of range.

    Example:
        >>> from orthokit.lab import SmallCNN
        >>> first, second = (class_split("digits", classes=c, batch=4) for c in ((0, 1), (2, 3)))
        >>> task = Replay(second, [first], memory=8)
        >>> sorted(task.evaluate(SmallCNN()))
        ['old_test_error', 'old_test_loss', 'test_error', 'test_loss']

    Numerics:
        A step costs as much as one of the new and one of an old task. A batch is still a function of the seed and the
        step alone, so runs resume bit for bit. The optimizer sees the mixed gradient, whatever it is.

    References:
        A. Robins (1995), Catastrophic forgetting, rehearsal and pseudorehearsal; A. Chaudhry et al. (2019), On tiny
        episodic memories in continual learning, arXiv 1902.10486.
    """

    def __init__(
        self,
        new: Task,
        old: Sequence[Task],
        *,
        share: float = 0.5,
        memory: int | None = None,
        seed: int = 0,
    ) -> None:
        if not old or not 0 <= share <= 1 or (memory is not None and memory < 1):
            raise OptionError(
                f"need an old task, 0 <= share <= 1 and memory >= 1; got {len(old)} tasks, {share} and {memory}."
            )
        self.new, self.old, self.share, self.memory, self.seed = new, tuple(old), float(share), memory, seed
        self.name, self.metric, self.unit = f"{new.name} with replay", new.metric, new.unit
        self._kept = None if memory is None else [_first_examples(task, memory) for task in self.old]

    def batch(self, step: int) -> Any:
        """``(batch of the new task, batch of an old one, its index)``."""
        index = step % len(self.old)
        if self._kept is None:
            return self.new.batch(step), self.old[index].batch(step), index
        inputs, targets = self._kept[index]
        count = getattr(self.old[index], "batch_size", len(inputs))
        drawn = torch.randint(len(inputs), (count,), generator=_step_generator(self.seed, step))
        return self.new.batch(step), (inputs[drawn], targets[drawn]), index

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mixed loss in nats."""
        new, old, index = batch
        if self.share == 0:
            return self.new.loss(model, new)
        return (1 - self.share) * self.new.loss(model, new) + self.share * self.old[index].loss(model, old)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The figures of the new task, and those of the old ones with ``old_`` before them (means over tasks)."""
        found = [task.evaluate(model) for task in self.old]
        keys = [key for key in found[0] if all(key in one for one in found)]
        means = {f"old_{key}": sum(one[key] for one in found) / len(found) for key in keys}
        return {**self.new.evaluate(model), **means}

    def describe(self) -> dict[str, object]:
        """Both tasks and how they are mixed."""
        return {
            **self.new.describe(),
            "replay_of": [task.describe() for task in self.old],
            "replay_share": self.share,
            "replay_memory": self.memory,
            "replay_seed": self.seed,
        }


def _first_examples(task: Task, count: int) -> Batch:
    """So many examples of a task, from batches far behind any training run."""
    rows: list[Batch] = []
    step = 10**6
    while sum(len(inputs) for inputs, _ in rows) < count:
        rows.append(task.batch(step))
        step += 1
    return torch.cat([x for x, _ in rows])[:count], torch.cat([y for _, y in rows])[:count]
