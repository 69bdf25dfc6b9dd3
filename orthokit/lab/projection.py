r"""Gradients and steps without their part in what earlier tasks need: by inputs of layers, or by stored gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.diagnostics.safe_step import StepController
from orthokit.errors import NonFiniteError, ParameterError
from orthokit.lab.example_gradients import per_example_gradients, task_scores, trainable_parameters
from orthokit.lab.input_subspaces import InputSubspaces
from orthokit.lab.tasks import Task

__all__ = ["GradientProjection", "GradientSubspace", "constrained"]


class GradientSubspace:
    r"""The directions in which a small step changes what the model says of stored examples.

    .. math:: \Delta\theta \leftarrow \Delta\theta - B B^\top \Delta\theta, \qquad
        \mathrm{span}(B) = \mathrm{span}\{\nabla_\theta z_{y_i}(x_i)\}

    Works for every parameter of every model, adapters included; costs a gradient an example in memory.

    Args:
        free: Patterns of names of parameters that move freely; default none.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> model, task = SmallCNN(width=2), image_classification("digits", batch=8)
        >>> space = GradientSubspace().extend(model, task, samples=4)
        >>> space.basis.shape[1]
        4

    Numerics:
        The basis is made orthonormal by two passes of Gram-Schmidt and a QR factorisation. A first-order protection:
        what a step changes at second order is not caught.

    References:
        M. Farajtabar et al. (2020), Orthogonal gradient descent for continual learning, arXiv 1910.07104; this is its
        variant with the logit of the label (OGD-GTL).
    """

    def __init__(self, *, free: Sequence[str] = ()) -> None:
        self.free = tuple(free)
        self._shapes: dict[str, torch.Size] = {}
        #: Orthonormal columns, shape ``(parameters, directions)``; None before the first :meth:`extend`.
        self.basis: Tensor | None = None

    def extend(self, model: nn.Module, task: Task, *, samples: int = 32, first: int = 10**6) -> GradientSubspace:
        """Add the gradients of a task's examples.

        Args:
            model: After the task was learned; not changed.
            task: Source of examples.
            samples: How many, ``>= 1``; default 32.
            first: Step of the first batch; default far behind any training run.

        Returns:
            Itself.

        Raises:
            OptionError: ``samples`` out of range.
            ParameterError: The trainable parameters are not those of the last call.
            NonFiniteError: A gradient is not finite.
        """

        def logit(frame: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return task_scores(task, frame, x).gather(-1, y[..., None]).mean()

        shapes = {
            n: p.shape for n, p in trainable_parameters(model).items() if not any(fnmatchcase(n, f) for f in self.free)
        }
        if not shapes or (self._shapes and shapes != self._shapes):
            raise ParameterError(
                f"a basis belongs to one set of trainable parameters; it has {list(self._shapes)[:3]} and the model "
                f"{list(shapes)[:3]}. Begin a new one."
            )
        self._shapes = shapes
        rows = [
            torch.cat([found[name].flatten(1) for name in shapes], 1)
            for found in per_example_gradients(model, task, samples=samples, first=first, value=logit)
        ]
        new = torch.cat(rows).mT
        if not bool(new.isfinite().all()):
            raise NonFiniteError("gradients must be finite; has the model diverged?")
        old = new[:, :0] if self.basis is None else self.basis.to(new)
        longest = float(new.norm(dim=0).max())
        for _ in range(2):  # the second pass takes what rounding of the first left
            new = new - old @ (old.mT @ new)
        Q, values, _ = torch.linalg.svd(new, full_matrices=False)
        kept = values > 1e-5 * longest
        self.basis = torch.cat([old, Q[:, kept]], 1)
        return self

    @torch.no_grad()
    def project(self, parts: dict[str, Tensor]) -> None:
        """Take the directions out of a change of the parameters, in place.

        Args:
            parts: Name of a parameter to its change (or gradient). One that is missing counts as 0.

        Raises:
            ParameterError: A change of another shape than its parameter.
        """
        if self.basis is None:
            return
        some = next(iter(parts.values()))
        wrong = [n for n, shape in self._shapes.items() if n in parts and parts[n].shape != shape]
        if wrong:
            raise ParameterError(f"the change of {wrong[0]!r} must have shape {tuple(self._shapes[wrong[0]])}.")
        flat = torch.cat(
            [(parts[n] if n in parts else some.new_zeros(shape)).flatten() for n, shape in self._shapes.items()]
        )
        B = self.basis.to(flat)
        flat = flat - B @ (B.mT @ flat)
        for name, part in zip(self._shapes, flat.split([s.numel() for s in self._shapes.values()]), strict=True):
            if name in parts:
                parts[name].copy_(part.reshape(self._shapes[name]))

    def describe(self) -> dict[str, Any]:
        """Size of the basis: for the record of a run."""
        return {
            "projection": "gradient subspace",
            "directions": 0 if self.basis is None else self.basis.shape[1],
        }


class GradientProjection:
    r"""Keeps training out of a space of directions; give it to :func:`orthokit.lab.fit` as ``project=``.

    Args:
        space: :class:`InputSubspaces` or :class:`GradientSubspace`.
        update: Project the step that the optimizer makes as well as the gradient. Default ``True``: the step of Adam
            and of weight decay leaves the subspace in which their gradient lies. ``False`` is the published method,
            which is meant for plain gradient descent.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> model, task = SmallCNN(width=2), image_classification("digits", batch=16)
        >>> project = GradientProjection(InputSubspaces().extend(model, task, samples=8))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> task.loss(model, task.batch(0)).backward()
        >>> project.gradients(model)
        >>> with project.around(model):
        ...     _ = optimizer.step()

    Numerics:
        With ``update`` a copy of the trainable parameters is held during a step.
    """

    def __init__(self, space: InputSubspaces | GradientSubspace, *, update: bool = True) -> None:
        self.space, self.update = space, update

    def gradients(self, model: nn.Module) -> None:
        """Project the gradients that a backward pass left, in place."""
        parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if parts:
            self.space.project(parts)

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Put this around ``optimizer.step()``: the step is projected too, unless ``update`` is off."""
        if not self.update:
            yield
            return
        parameters = trainable_parameters(model)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        yield
        with torch.no_grad():
            change = {name: p - before[name] for name, p in parameters.items()}
            self.space.project(change)
            for name, p in parameters.items():
                p.copy_(before[name] + change[name])

    def describe(self) -> dict[str, Any]:
        """What is avoided: for the record of a run."""
        return {**self.space.describe(), "projects_step": self.update}


@contextmanager
def constrained(
    model: nn.Module,
    inputs: Any,
    task: Task,
    *,
    project: GradientProjection | None = None,
    step_controller: StepController | None = None,
) -> Iterator[None]:
    """Put this around ``optimizer.step()``: the step is projected first and then, if it is too long, shortened.

    Args:
        model: Whose parameters move.
        inputs: The first part of the batch, for the controller.
        task: Says how logits are read.
        project: Default none.
        step_controller: Default none.
    """
    with ExitStack() as stack:
        if step_controller is not None:
            held = inputs.to(next(model.parameters()).device) if isinstance(inputs, Tensor) else inputs
            stack.enter_context(step_controller.around(model, held, scores=lambda m, x: task_scores(task, m, x)))
        if project is not None:
            stack.enter_context(project.around(model))
        yield
