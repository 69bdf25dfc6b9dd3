"""One optimizer for a model with POET layers: trains rotations and the rest, and merges when it is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthokit.adapters.poet import POETLinear
from orthokit.errors import OptionError, ParameterError
from orthokit.optim.base import check_rate
from orthokit.optim.blocks import check_gradients

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["POETOptimizer"]

_RAMP_START = 0.1


class POETOptimizer(torch.optim.Optimizer):
    r"""AdamW on the generators of all POET layers and on everything else, with the merges in its ``step``.

    After an update, every layer whose ``merge_every`` or ``merge_angle`` is reached merges: its rotations go into the
    frozen weight, new orders are drawn, its generators and their moments and step counts are 0 again. No gradient from
    before a merge reaches a moment after it.

    Args:
        model: With POET layers; only parameters that require gradients are updated.
        lr: Learning rate of what is no generator, ``>= 0``; default 1e-3.
        generator_lr: Of the generators, in radians; default ``0.5 * lr`` as published, for blocks of 256. Double it
            when you halve the block: a step of AdamW turns a block by about ``4 lr sqrt(b)`` radians.
        betas: Averaging of AdamW, for all; default (0.9, 0.999).
        eps: Of AdamW for the rest, ``> 0``; default 1e-8.
        generator_eps: Of AdamW for the generators, ``> 0``; default 1e-6 as published.
        weight_decay: Of the rest, ``>= 0``; default 0. Generators have none.
        clip: Largest norm of the gradient of all generators together, ``> 0``, or ``None``; default 0.1 as published.
        ramp: After a merge the layer's clip rises from a tenth to all of ``clip`` over this many updates, ``>= 0``;
            default 10 as published. Without ``clip`` it has no effect.

    Raises:
        ParameterError: The model has no trainable POET layer.
        OptionError: An option out of range.
        NonFiniteError: At a step: a gradient holds NaN or infinity. Nothing was changed.

    Example:
        >>> from orthokit.adapters import POET, attach
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> _ = attach(model, POET(block_size=4, merge_every=2))
        >>> optimizer = POETOptimizer(model, lr=1e-2)
        >>> for step in range(4):
        ...     model(torch.ones(1, 8)).square().sum().backward()
        ...     _ = optimizer.step()
        ...     optimizer.zero_grad()
        >>> model[0].ledger.merges
        2

    Numerics:
        The state is that of torch's AdamW. With the weights and buffers of the model it is all that the next step
        depends on: orders are drawn from the seed and the number of merges, so a resumed run gives the same bits.

    References:
        Z. Qiu et al. (2025), arXiv 2506.08001, section 3 and appendix; POET-X, arXiv 2603.05500. The published code
        resets moments by a count of its own, up to one step before the merge; here the merge does it.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        generator_lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        generator_eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip: float | None = 0.1,
        ramp: int = 10,
    ) -> None:
        rate = 0.5 * lr if generator_lr is None else generator_lr
        check_rate({"lr": rate})
        check_rate(
            {"lr": lr, "weight_decay": weight_decay, "eps": eps, "generator_eps": generator_eps},
            *("weight_decay", "eps", "generator_eps"),
        )
        if clip is not None and not clip > 0:
            raise OptionError(f"clip must be greater than 0, or None; got {clip}.")
        if ramp < 0:
            raise OptionError(f"ramp must be at least 0; got {ramp}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise OptionError(f"betas must be in [0, 1); got {betas}.")
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, POETLinear)}
        # By the tensors themselves, not by names: any module may call a parameter "generator".
        self._layers = {
            name: layer
            for name, layer in layers.items()
            if layer.input.generator.requires_grad or layer.output.generator.requires_grad
        }
        generators = {id(side.generator) for layer in self._layers.values() for side in (layer.input, layer.output)}
        if not generators:
            raise ParameterError(
                f"{type(model).__name__} has no trainable POET layer; call adapters.attach(model, POET(...)) first."
            )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        own = [(name, p) for name, p in named if id(p) in generators]
        rest = [(name, p) for name, p in named if id(p) not in generators]
        groups: list[dict[str, Any]] = [
            {"params": own, "lr": rate, "eps": generator_eps, "weight_decay": 0.0, "clip": clip, "ramp": ramp}
        ]
        if rest:
            groups.append({"params": rest, "lr": lr, "eps": eps, "weight_decay": weight_decay})
        self._adamw = torch.optim.AdamW(groups, betas=betas)
        self._names = {p: name for name, p in named}
        super().__init__(self._adamw.param_groups, dict(self._adamw.defaults))
        self._link()

    def _link(self) -> None:
        """Let AdamW work on this optimizer's own groups and state, so that there is one copy of everything."""
        self._adamw.param_groups, self._adamw.state = self.param_groups, self.state

    def __getstate__(self) -> dict[str, Any]:
        own = {"_adamw": self._adamw, "_layers": self._layers, "_names": self._names}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` gave; load the model's own as well, it holds the orders and the merges."""
        super().load_state_dict(state_dict)
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the construction: a new parameter may belong to a layer that has to be merged.

        Raises:
            ParameterError: Called after the optimizer was made.
        """
        if len(self.param_groups) >= len(self._adamw.param_groups):
            raise ParameterError("a POETOptimizer takes no further groups; make a new one of the model instead.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters, then merge the layers for which it is due.

        Args:
            closure: Recomputes and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        check_gradients((self._names[p], p.grad) for p in moved)
        self._clip()
        self._adamw.step()
        for layer in self._layers.values():
            if self._due(layer):
                self._merge(layer)
        return loss

    def merge(self) -> None:
        """Merge every layer now, whatever is due: the moments and step counts of all generators are 0 afterwards."""
        for layer in self._layers.values():
            self._merge(layer)

    @property
    def merges(self) -> dict[str, int]:
        """How often each layer was merged."""
        return {name: layer.ledger.merges for name, layer in self._layers.items()}

    @property
    def routing(self) -> pd.DataFrame:
        """One row per trained parameter: its ``name``, ``shape``, ``role`` (generator or other) and group's ``lr``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "name": self._names[p],
                "shape": tuple(p.shape),
                "role": "generator" if "clip" in group else "other",
                "optimizer": "AdamW",
                "lr": float(group["lr"]),
            }
            for group in self.param_groups
            for p in group["params"]
        )

    def _updates(self, layer: POETLinear) -> int:
        """AdamW's own count for the layer: updates since its last merge."""
        counts = [float(self.state[p]["step"]) for p in _generators(layer) if p in self.state]
        return int(max(counts, default=0))

    def _due(self, layer: POETLinear) -> bool:
        config, updates = layer.config, self._updates(layer)
        if updates == 0:
            return False  # nothing moved since the last merge
        if config.merge_every is not None and updates >= config.merge_every:
            return True
        angle = config.merge_angle
        return angle is not None and any(side.exceeds(angle) for side in (layer.input, layer.output))

    def _merge(self, layer: POETLinear) -> None:
        layer.merge_()
        for p in _generators(layer):
            # It belonged to coordinates that are no more, and would be added to by the next backward pass.
            p.grad = None
            for value in self.state.get(p, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()

    def _clip(self) -> None:
        """Scale the generators' gradients to the clip, layer by layer according to its ramp."""
        group = self.param_groups[0]
        if group["clip"] is None:
            return
        gradients = {p: p.grad for p in group["params"] if p.grad is not None}
        if not gradients:
            return
        norms = torch._foreach_norm(list(gradients.values()))
        total = float(torch.linalg.vector_norm(torch.stack([n.double().cpu() for n in norms])))
        for layer in self._layers.values():
            limit = group["clip"] * self._ramp(layer, group["ramp"])
            if total > limit:
                for p in _generators(layer):
                    if p in gradients:
                        gradients[p].mul_(limit / total)

    def _ramp(self, layer: POETLinear, length: int) -> float:
        if layer.ledger.merges == 0 or length == 0:
            return 1.0
        return min(1.0, _RAMP_START + (1 - _RAMP_START) * self._updates(layer) / length)


def _generators(layer: POETLinear) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.input.generator, layer.output.generator
