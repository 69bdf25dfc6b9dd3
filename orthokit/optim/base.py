"""What every optimizer of matrices shares: blocks, names, checks, and a place where several processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from orthokit.errors import OptionError
from orthokit.matrices import MatrixBlock
from orthokit.optim.blocks import block_by_shape, check_gradients

__all__ = ["Exchange", "MatrixOptimizer", "check_rate"]


class Exchange(Protocol):
    """How several processes share the matrices: each one is updated whole, by the process that owns it."""

    def collect(self, tensors: list[Tensor], costs: list[float]) -> list[Tensor | None]:
        """The whole of every tensor this process owns, ``None`` for the others; costs in FLOP balance the owners."""
        ...

    def distribute(self, wholes: list[Tensor | None], likes: list[Tensor]) -> list[Tensor]:
        """This process's part of every owner's result, each laid out as the local part of ``likes``."""
        ...


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that update matrix blocks; a subclass writes ``_check_options`` and ``_update``.

    Args:
        params: Tensors, named tensors or groups, as in every torch optimizer.
        defaults: Default options of a group.
        blocks: The matrix blocks of each parameter, from ``matrices``; default read from the shape.
    """

    exchange: Exchange | None = None
    """Set when several processes share the work; ``None``: this process does it all."""

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, blocks: Mapping[Any, list[MatrixBlock]] | None
    ) -> None:
        # Before super().__init__, which already calls add_param_group. The blocks stay out of the param groups:
        # state_dict() would otherwise carry objects that only a pickle can store.
        self._blocks: dict[Tensor, list[MatrixBlock]] = dict(blocks or {})
        self._names: dict[Tensor, str] = {}
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in every torch optimizer; the options are checked here.

        Raises:
            OptionError: An option of the group is out of range.
            ParameterError: A parameter is no matrix.
        """
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Counted over all groups, as in state_dict(): a message must name one parameter only.
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:-1])
        names = group.get("param_names") or [f"parameter {first + i}" for i in range(len(group["params"]))]
        try:
            for name, parameter in zip(names, group["params"], strict=True):
                self._names[parameter] = name
                if parameter not in self._blocks:
                    self._blocks[parameter] = [block_by_shape(name, parameter)]
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps three attributes; a deep copy must know its blocks and names as well.
        return {**super().__getstate__(), "_blocks": self._blocks, "_names": self._names}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity; no parameter and no buffer was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.named_gradients())
        self.update()
        return loss

    def named_gradients(self) -> list[tuple[str, Tensor]]:
        """Every parameter's name and gradient, where it has one."""
        moved = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        return [(self._names[p], p.grad) for p in moved]

    @torch.no_grad()
    def update(self) -> None:
        """The step itself, for a caller that has checked the gradients."""
        for group in self.param_groups:
            self._update(group)

    def blocks(self, parameter: Tensor) -> list[MatrixBlock]:
        """The matrix blocks in which ``parameter`` is updated."""
        return self._blocks[parameter]


def check_rate(group: dict[str, Any], *names: str) -> None:
    """Raise unless ``lr`` is one number and it and the other named options are at least 0."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise OptionError(f"a tensor lr must hold one element; got {lr.numel()}.")
    for name in ("lr", *names):
        if not group[name] >= 0:
            raise OptionError(f"{name} must be at least 0; got {group[name]}.")
