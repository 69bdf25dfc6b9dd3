"""Some classes of an image set as a task of their own, at the size a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from orthokit.errors import OptionError
from orthokit.lab.images import images
from orthokit.lab.tasks import Batch, ImageClassification, _step_generator

__all__ = ["SomeClasses", "some_classes"]


@lru_cache(maxsize=8)
def _chosen(name: str, classes: tuple[int, ...], side: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures and new labels of both splits, made once."""
    data = images(name)
    number = torch.full((len(data.classes),), -1)
    number[list(classes)] = torch.arange(len(classes))
    found = {}
    splits = {"train": (data.train_images, data.train_labels), "test": (data.test_images, data.test_labels)}
    for split, (pictures, labels) in splits.items():
        kept = number[labels] >= 0
        some = pictures[kept]
        if some.shape[-1] != side:
            some = F.interpolate(some, size=(side, side), mode="bilinear", align_corners=False)
        found[split] = some, number[labels[kept]]
    return found


class SomeClasses(ImageClassification):
    """Class prediction among some classes; see :func:`some_classes`."""

    def __init__(
        self, name: str, classes: Sequence[int] | None, *, batch: int, seed: int, side: int, test: int | None
    ) -> None:
        super().__init__(name, batch=batch, seed=seed)
        known = range(len(self.data.classes))
        chosen = tuple(known) if classes is None else tuple(classes)
        if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not set(chosen) <= set(known):
            raise OptionError(f"classes are at least two different numbers of 0 ... {known[-1]}; got {chosen}.")
        if side < 1 or (test is not None and test < 1):
            raise OptionError(f"side and test must be at least 1; got side={side}, test={test}.")
        self.labels, self.side = chosen, side
        self.classes = tuple(self.data.classes[one] for one in chosen)
        found = _chosen(name, chosen, side)
        (self.train_images, self.train_labels), (whole, labels) = found["train"], found["test"]
        count = len(labels) if test is None else min(test, len(labels))
        every = torch.linspace(0, len(labels) - 1, count).long()
        self.test_images, self.test_labels = whole[every], labels[every]

    def batch(self, step: int) -> Batch:
        """Training pictures drawn with replacement."""
        index = torch.randint(len(self.train_labels), (self.batch_size,), generator=_step_generator(self.seed, step))
        return self.train_images[index], self.train_labels[index]

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Error rate and loss on the test pictures."""
        device = next(model.parameters()).device
        scores, targets = model(self.test_images.to(device)), self.test_labels.to(device)
        wrong = (scores.argmax(-1) != targets).double().mean()
        return {self.metric: float(wrong), "test_loss": float(F.cross_entropy(scores, targets))}

    def describe(self) -> dict[str, object]:
        """Name, classes and sizes."""
        sizes = {"side": self.side, "test": len(self.test_labels)}
        return {**super().describe(), "task": "some_classes", "classes": list(self.labels), **sizes}


def some_classes(
    name: str = "fashion",
    classes: Sequence[int] | None = None,
    *,
    batch: int = 64,
    seed: int = 0,
    side: int = 28,
    test: int | None = None,
) -> SomeClasses:
    """Class prediction on some classes of an image set, numbered anew from 0.

    Args:
        name: ``"fashion"`` or ``"digits"``.
        classes: Numbers of at least two different classes; default all.
        batch: Pictures a step, ``>= 1``; default 64.
        seed: Of the stream of batches; default 0.
        side: Pictures of another size are resized to ``side x side``, bilinearly; default 28.
        test: Test pictures that are judged, evenly spaced; default all.

    Returns:
        The task.

    Raises:
        UnknownNameError: No such image set.
        OptionError: A class that is not there or stands twice, or a size out of range.

    Example:
        >>> task = some_classes("fashion", [5, 6, 7, 8, 9], batch=8)
        >>> pictures, labels = task.batch(0)
        >>> pictures.shape, int(labels.max()) < 5, task.classes[0]
        (torch.Size([8, 1, 28, 28]), True, 'Sandal')
    """
    return SomeClasses(name, classes, batch=batch, seed=seed, side=side, test=test)
