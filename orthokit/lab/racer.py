"""A training that is advanced one step at a time, so that rivals can take turns."""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from orthokit.diagnostics.safe_step import StepController
from orthokit.errors import NonFiniteError, OptionError
from orthokit.lab.projection import GradientProjection, constrained
from orthokit.lab.regularisers import Penalties, Penalty
from orthokit.lab.schedules import lr_factor
from orthokit.lab.tasks import Task

__all__ = ["Racer"]


class Racer:
    """One training that is advanced a step at a time, so that rivals can take turns.

    Step ``t`` takes ``task.batch(t)``, clips the gradient to norm ``clip`` and scales all learning rates by
    ``lr_factor(t)``, as :func:`orthokit.lab.fit` does; nothing is recorded but the time.

    Args:
        model: Trained in place.
        task: Data, loss and evaluation.
        optimizer: Over ``model``'s parameters; its learning rates now are the base rates.
        steps: Length of the run, ``>= 1``.
        schedule: See :func:`orthokit.lab.lr_factor`; default ``"cosine"``.
        warmup: Steps of linear warm-up; default a twentieth of the run.
        clip: Largest global norm of the gradient, ``> 0``; default 1.
        penalty: As for :func:`orthokit.lab.fit`; default none.
        project: As for :func:`orthokit.lab.fit`; default none.
        step_controller: As for :func:`orthokit.lab.fit`; default none.

    Raises:
        OptionError: A number out of range.

    Example:
        >>> from orthokit.lab import SmallCNN, contestant, image_classification
        >>> model = SmallCNN(width=4)
        >>> racer = Racer(model, image_classification("digits", batch=8), contestant("lion", model, lr=1e-3), steps=2)
        >>> losses = [racer.advance(), racer.advance()]
        >>> racer.step, racer.seconds > 0
        (2, True)
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        schedule: str = "cosine",
        warmup: int | None = None,
        clip: float = 1.0,
        penalty: Penalty | Penalties | None = None,
        project: GradientProjection | None = None,
        step_controller: StepController | None = None,
    ) -> None:
        if steps < 1 or not clip > 0:
            raise OptionError(f"need steps >= 1 and clip > 0; got steps={steps}, clip={clip}.")
        self.model, self.task, self.optimizer, self.clip = model, task, optimizer, clip
        self.penalty, self.project, self.step_controller = penalty, project, step_controller
        self.shape = {
            "steps": steps,
            "schedule": schedule,
            "warmup": min(steps, max(1, steps // 20)) if warmup is None else warmup,
        }
        lr_factor(0, **self.shape)  # refuses a bad schedule before the first step
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        #: Steps done.
        self.step = 0
        #: Processor time of this thread spent in them, and the share of it that the optimizer took.
        self.seconds = 0.0
        self.update_seconds = 0.0

    def advance(self) -> float:
        """One step.

        Returns:
            The loss of its batch before the update, in nats.

        Raises:
            NonFiniteError: The loss or the gradient is NaN or infinite; nothing was updated.
        """
        begun = time.thread_time()
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        batch = self.task.batch(self.step)
        loss = self.task.loss(self.model, batch)
        (loss if self.penalty is None else loss + self.penalty(self.model)).backward()
        if self.project is not None:
            self.project.gradients(self.model)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"loss and gradient must stay finite; at step {self.step + 1} they are {value} and {float(norm)}. "
                "Lower the learning rate."
            )
        factor = lr_factor(self.step, **self.shape)
        for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = rate * factor
        between = time.thread_time()
        limits = {"project": self.project, "step_controller": self.step_controller}
        with constrained(self.model, batch[0], self.task, **limits):
            self.optimizer.step()
        now = time.thread_time()
        self.seconds += now - begun
        self.update_seconds += now - between
        self.step += 1
        return value

    def evaluate(self) -> dict[str, float]:
        """The task's held-out figures; takes no part in the time."""
        self.model.eval()
        return self.task.evaluate(self.model)
