"""Optimizers to compare with that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from orthokit.errors import OptionError

__all__ = ["Lion"]


class Lion(torch.optim.Optimizer):
    r"""Sign of a blend of momentum and gradient: every entry moves by the learning rate.

    With gradient ``G`` and buffer ``M`` (zero at first)::

        W <- (1 - lr weight_decay) W - lr sign(beta1 M + (1 - beta1) G)
        M <- beta2 M + (1 - beta2) G

    Args:
        params: Tensors, named tensors or groups, as in every torch optimizer.
        lr: Learning rate, ``>= 0``; default 1e-4. The entry-wise step, so 3 to 10 times below AdamW's.
        betas: Blend of the step and of the buffer, each in ``[0, 1)``; default (0.9, 0.99).
        weight_decay: Decoupled decay, ``>= 0``; default 0.

    Raises:
        OptionError: An option is out of range.

    Example:
        >>> W = torch.nn.Parameter(torch.zeros(3))
        >>> W.grad = torch.tensor([2.0, -0.5, 0.0])
        >>> _ = Lion([W], lr=0.25).step()
        >>> W.tolist()
        [-0.25, 0.25, 0.0]

    Numerics:
        One buffer per parameter, in its dtype. An entry whose blend is exactly zero does not move.

    References:
        X. Chen et al. (2023), Symbolic discovery of optimization algorithms, arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0:
            raise OptionError(f"lr and weight_decay must be at least 0; got lr={lr}, weight_decay={weight_decay}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise OptionError(f"both betas must be in [0, 1); got {betas}.")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, else ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"]
                p.mul_(1 - lr * group["weight_decay"]).sub_(p.grad.lerp(buffer, beta1).sign_(), alpha=lr)
                buffer.lerp_(p.grad, 1 - beta2)
        return loss
