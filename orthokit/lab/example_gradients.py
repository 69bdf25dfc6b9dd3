"""Gradients of single examples, vectorised, with the labels of the data or labels drawn from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthokit.diagnostics._modes import evaluating
from orthokit.errors import OptionError, ParameterError, unknown_name
from orthokit.lab.tasks import Task, _step_generator

__all__ = ["example_rows", "gradients_of_rows", "per_example_gradients", "task_scores", "trainable_parameters"]

KINDS = ("true", "empirical")
Rows = tuple[Tensor, Tensor]
Value = Callable[[nn.Module, Tensor, Tensor], Tensor]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name: with adapters attached, theirs.

    Raises:
        ParameterError: There is none.

    Example:
        >>> list(trainable_parameters(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ParameterError("the model has no trainable parameter; all of them are frozen.")
    return found


def task_scores(task: Task, model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits that a task judges: ``task.scores(model, inputs)`` if it has that method, else ``model(inputs)``.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> task_scores(image_classification("digits"), SmallCNN(), torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    scores = getattr(task, "scores", None)
    inputs = inputs.to(next(model.parameters()).device)
    return model(inputs) if scores is None else scores(model, inputs)


def per_example_gradients(
    model: nn.Module,
    task: Task,
    *,
    samples: int = 256,
    kind: str = "empirical",
    seed: int = 0,
    first: int = 10**6,
    chunk: int = 32,
    value: Value | None = None,
) -> Iterator[dict[str, Tensor]]:
    r"""Gradients of the loss of single examples, a few at a time.

    Args:
        model: Not changed; runs in evaluation mode.
        task: Source of examples. An example is a row of a batch: an image, or a whole window of text with the mean
            loss of its positions.
        samples: How many examples, ``>= 1``; default 256.
        kind: ``"empirical"`` (default): labels of the data; ``"true"``: labels drawn from the model's predictions.
        seed: Seed of the labels that are drawn; default 0.
        first: Step of the first batch; default far behind any training run, so that the batches are fresh.
        chunk: Examples at a time, ``>= 1``; default 32. 1 takes them one by one without ``torch.func``, for models that
            cannot be vectorised.
        value: ``value(model, inputs, targets)`` to differentiate; default the task's loss.

    Yields:
        Name of a trainable parameter to gradients, shape ``(examples, *shape)``.

    Raises:
        UnknownNameError: Unknown kind.
        OptionError: A number out of range, or a task whose batches are not ``(inputs, targets)``.
        ParameterError: No trainable parameter.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> task, model = image_classification("digits", batch=8), SmallCNN(width=2)
        >>> [len(g["head.bias"]) for g in per_example_gradients(model, task, samples=5, chunk=3)]
        [3, 2]

    Numerics:
        One backward pass an example, vectorised; ``chunk`` gradients are held at a time.
    """
    rows = example_rows(model, task, samples=samples, kind=kind, seed=seed, first=first)
    yield from gradients_of_rows(model, task, rows, chunk=chunk, value=value)


def example_rows(model: nn.Module, task: Task, *, samples: int, kind: str, seed: int, first: int) -> list[Rows]:
    """Batches that hold together ``samples`` examples, with their labels; see :func:`per_example_gradients`."""
    if kind not in KINDS:
        raise unknown_name("kind of Fisher information", kind, KINDS)
    if samples < 1:
        raise OptionError(f"samples must be at least 1; got {samples}.")
    device = next(model.parameters()).device
    generator, rows, left = _step_generator(seed, first), [], samples
    with evaluating(model), torch.no_grad():
        for step in range(first, first + samples):
            batch = task.batch(step)
            if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
                raise OptionError(
                    f"examples are rows of batches (inputs, targets); those of {type(task).__name__} are more. Take "
                    "the Fisher information of each of its tasks."
                )
            inputs, targets = (part[:left].to(device) for part in batch)
            if kind == "true":
                p = task_scores(task, model, inputs).float().softmax(-1).cpu()
                drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
                targets = drawn.reshape(p.shape[:-1]).to(device)
            rows.append((inputs, targets))
            left -= len(inputs)
            if left <= 0:
                break
    return rows


def gradients_of_rows(
    model: nn.Module, task: Task, rows: list[Rows], *, chunk: int, value: Value | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gradients of these examples; see :func:`per_example_gradients`."""
    if chunk < 1:
        raise OptionError(f"chunk must be at least 1; got {chunk}.")
    parameters = trainable_parameters(model)
    now = {name: p.detach() for name, p in parameters.items()}

    def of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        frame = _Bound(model, values)
        return task.loss(frame, (x[None], y[None])) if value is None else value(frame, x[None], y[None])

    for inputs, targets in rows:
        for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
            with evaluating(model):
                if chunk > 1:
                    # Fused attention has no vectorised form; the plain kernel is the same function.
                    with sdpa_kernel(SDPBackend.MATH):
                        found = vmap(grad(of_one), in_dims=(None, 0, 0))(now, x, y)
                else:
                    result = task.loss(model, (x, y)) if value is None else value(model, x, y)
                    parts = torch.autograd.grad(result, list(parameters.values()), allow_unused=True)
                    found = {
                        name: (torch.zeros_like(p) if part is None else part)[None]
                        for (name, p), part in zip(now.items(), parts, strict=True)
                    }
            yield found


class _Bound(nn.Module):
    """A model with other values for its parameters, to be passed where a module is expected."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._values = values

    def forward(self, *inputs: Tensor) -> Tensor:
        return functional_call(self.model, self._values, inputs)
