"""Two ways to collect the gradients a momentum buffer sees: at frozen weights, and along a training run.

A *stationary* probe freezes the weights and draws independent minibatches: the signal stands still, as the theory of
momentum as a filter assumes. A *trajectory* probe records beside training: the signal moves with the weights. Numbers
from the two differ, so every figure says which one it shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.errors import OptionError, unknown_name
from orthokit.lab.tasks import Task
from orthokit.matrices import MatrixBlock, matrices

__all__ = ["GradientRecorder", "chosen_blocks", "stationary_gradients"]


def chosen_blocks(model: nn.Module, names: Sequence[str]) -> list[MatrixBlock]:
    """The matrix blocks of ``model`` with these names, in this order.

    Args:
        model: Any module.
        names: Names in ``matrices(model)``.

    Returns:
        The blocks.

    Raises:
        UnknownNameError: A name is not among the matrices of the model.
        OptionError: No name, or a block that is a batch of matrices.

    Example:
        >>> [block.shape for block in chosen_blocks(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), ["0.weight"])]
        [(4, 3)]
    """
    table = matrices(model)
    known = [block.name for block in table]
    if not names:
        raise OptionError(f"name at least one matrix. The model has {', '.join(known[:8])} ...")
    for name in names:
        if name not in known:
            raise unknown_name("matrix", name, known)
    blocks = [table[name] for name in names]
    batched = [block.name for block in blocks if block.count != 1]
    if batched:
        raise OptionError(f"a probe follows single matrices; {batched} are batches. Choose others.")
    return blocks


def stationary_gradients(
    model: nn.Module, task: Task, names: Sequence[str], *, count: int, first: int = 10**6
) -> dict[str, Float[Tensor, "count out in"]]:
    """Minibatch gradients at frozen weights.

    Args:
        model: Not changed: neither weights nor gradients.
        task: Source of minibatches.
        names: Matrices to keep; see :func:`chosen_blocks`.
        count: How many minibatches, ``>= 1``.
        first: Step number of the first minibatch; default far behind any training run, so that the data are fresh.

    Returns:
        For each name the gradients, shape ``(count, out, in)``.

    Raises:
        UnknownNameError: A name is not among the matrices of the model.
        OptionError: ``count`` is below 1.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> task = image_classification("digits", batch=8)
        >>> stationary_gradients(SmallCNN(), task, ["hidden.weight"], count=2)["hidden.weight"].shape
        torch.Size([2, 64, 512])

    Numerics:
        One forward and backward a minibatch; ``count * out * in`` numbers are kept for each name.
    """
    if count < 1:
        raise OptionError(f"count must be at least 1; got {count}.")
    blocks = chosen_blocks(model, names)
    parameters = dict(model.named_parameters())
    watched = [parameters[block.parameter] for block in blocks]
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for step in range(first, first + count):
        # torch.autograd.grad leaves .grad of every parameter alone and skips the branches that lead to none of these.
        grads = torch.autograd.grad(task.loss(model, task.batch(step)), watched)
        for block, grad in zip(blocks, grads, strict=True):
            kept[block.name].append(block.read(grad).detach().clone())
    return {name: torch.stack(grads) for name, grads in kept.items()}


class GradientRecorder:
    """Keeps the last gradients of chosen matrices while a model trains; use as a context manager around ``fit``.

    Args:
        model: The model that trains.
        optimizer: Its optimizer; the recorder reads ``p.grad`` just before each step.
        names: Matrices to keep; see :func:`chosen_blocks`.
        keep: Length of the sliding window in steps, ``>= 1``.

    Raises:
        UnknownNameError: A name is not among the matrices of the model.
        OptionError: ``keep`` is below 1.

    Example:
        >>> from orthokit.optim import for_model
        >>> model = nn.Linear(3, 2)
        >>> optimizer = for_model(model, lr=0.1)
        >>> with GradientRecorder(model, optimizer, ["weight"], keep=2) as recorder:
        ...     for _ in range(3):
        ...         model(torch.ones(1, 3)).sum().backward()
        ...         _ = optimizer.step()
        >>> recorder.gradients("weight").shape
        torch.Size([2, 2, 3])
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str], *, keep: int) -> None:
        if keep < 1:
            raise OptionError(f"keep must be at least 1; got {keep}.")
        self.blocks = {block.name: block for block in chosen_blocks(model, names)}
        self.keep = keep
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer
        self._kept: dict[str, deque[Tensor]] = {name: deque(maxlen=keep) for name in names}
        self._handle: Any = None

    def __enter__(self) -> GradientRecorder:
        self._handle = self._optimizer.register_step_pre_hook(self._record)
        return self

    def __exit__(self, *details: object) -> None:
        self._handle.remove()

    def _record(self, optimizer: object, args: object, kwargs: object) -> None:
        for name, block in self.blocks.items():
            grad = self._parameters[block.parameter].grad
            if grad is not None:
                self._kept[name].append(block.read(grad).detach().clone())

    def gradients(self, name: str) -> Float[Tensor, "count out in"]:
        """The kept gradients of a matrix, oldest first, shape ``(count, out, in)`` with ``count <= keep``.

        Raises:
            UnknownNameError: The recorder does not follow this matrix.
            OptionError: No step was recorded yet.
        """
        if name not in self._kept:
            raise unknown_name("matrix", name, self._kept)
        if not self._kept[name]:
            raise OptionError(f"no gradient of {name!r} was recorded yet; train inside the with block first.")
        return torch.stack(list(self._kept[name]))
