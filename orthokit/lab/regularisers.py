r"""Penalties that hold a model near what it was: EWC with several Fisher informations, and plain distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, ParameterError
from orthokit.lab.example_gradients import trainable_parameters
from orthokit.lab.fisher import RankOneFisher

__all__ = ["EWC", "L2SP", "Penalties", "Penalty", "RankOneEWC"]


class Penalty(ABC):
    r"""A term that :func:`orthokit.lab.fit` adds to the loss: ``penalty(model)`` is a scalar.

    The model at the time of construction is the anchor :math:`\theta^*`. Only parameters that are trainable then enter:
    with adapters attached, theirs, so build the penalty after attaching. Parameters that come later are free.

    Args:
        model: At the anchor; copied, not kept.
        weight: :math:`\lambda \ge 0`. With 0 the penalty is the constant 0 and training is the same to the bit.
        free: Patterns of names that do not enter, such as ``("head.*",)``; default none.

    Raises:
        OptionError: ``weight`` negative or not finite.
        ParameterError: No parameter is left.
    """

    def __init__(self, model: nn.Module, *, weight: float, free: Sequence[str] = ()) -> None:
        if not 0 <= weight < float("inf"):
            raise OptionError(f"weight must be finite and at least 0; got {weight}.")
        self.weight = float(weight)
        held = {n: p for n, p in trainable_parameters(model).items() if not any(fnmatchcase(n, f) for f in free)}
        if not held:
            raise ParameterError(f"no trainable parameter is left; all of them match free = {tuple(free)}.")
        self.anchor = {name: p.detach().clone() for name, p in held.items()}

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty at the model's present parameters, differentiable.

        Raises:
            ParameterError: A parameter of the anchor is not in the model, or has another shape.
        """
        if self.weight == 0:
            return torch.zeros((), device=next(model.parameters()).device)
        return self.weight / 2 * self._value(self._moved(model))

    def _moved(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        missing = [n for n, a in self.anchor.items() if n not in parameters or parameters[n].shape != a.shape]
        if missing:
            raise ParameterError(
                f"the penalty holds parameters that the model lacks or has in another shape: {missing[:3]}"
                f"{' ...' if len(missing) > 3 else ''}. Build it after attaching adapters, from the model that trains."
            )
        return {name: parameters[name] - anchor.to(parameters[name]) for name, anchor in self.anchor.items()}

    @abstractmethod
    def _value(self, moved: Mapping[str, Tensor]) -> Tensor:
        """The penalty for unit weight, times 2."""

    def describe(self) -> dict[str, Any]:
        """Name and weight: for the record of a run."""
        return {"penalty": type(self).__name__, "penalty_weight": self.weight}


class EWC(Penalty):
    r"""Elastic weight consolidation: parameters that matter for what was learned are held harder.

    .. math:: \frac{\lambda}{2} \sum_p F_p (\theta_p - \theta^*_p)^2

    Args:
        model: At the anchor.
        fisher: The diagonal of the Fisher information by name, from :func:`orthokit.lab.fisher_diagonal`, true or
            empirical.
        weight: :math:`\lambda \ge 0`.
        free: Patterns of names that do not enter; default none.

    Raises:
        ParameterError: ``fisher`` lacks a trainable parameter or has it in another shape.
        OptionError: ``weight`` or an entry of ``fisher`` out of range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> penalty = EWC(model, {"weight": torch.tensor([[4.0, 0.0]]), "bias": torch.ones(1)}, weight=3.0)
        >>> float(penalty(model).detach())
        0.0
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> round(float(penalty(model).detach()), 4)
        6.0

    Numerics:
        As precise as the parameters; the gradient is :math:`\lambda F_p (\theta_p - \theta^*_p)`, 0 at the anchor. Two
        copies of the parameters are held.

    References:
        J. Kirkpatrick et al. (2017), arXiv 1612.00796. For several tasks, one penalty each: :class:`Penalties`.
    """

    def __init__(
        self, model: nn.Module, fisher: Mapping[str, Tensor], *, weight: float, free: Sequence[str] = ()
    ) -> None:
        super().__init__(model, weight=weight, free=free)
        self.fisher = _fitting(fisher, self.anchor, "the Fisher information")
        for name, F in self.fisher.items():
            if not bool((F >= 0).all()):
                raise OptionError(f"the Fisher information must be at least 0 and no NaN; that of {name!r} is not.")

    def _value(self, moved: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([(self.fisher[n].to(d) * d.square()).sum() for n, d in moved.items()]).sum()


class RankOneEWC(Penalty):
    r"""Elastic weight consolidation with a Fisher information of rank one: one direction is held, all others are free.

    .. math:: \frac{\lambda}{2}\, c\, \big(\mu^\top (\theta - \theta^*)\big)^2

    Args:
        model: At the anchor.
        fisher: From :func:`orthokit.lab.rank_one_fisher`; look at its ``collinearity`` before you trust it.
        weight: :math:`\lambda \ge 0`.
        scale: ``"optimal"`` (default): :math:`c = c^*`, nearest to the Fisher information; ``"one"``: :math:`c = 1`.
        free: Patterns of names that do not enter; default none.

    Raises:
        ParameterError: The mean gradient lacks a trainable parameter or has it in another shape.
        OptionError: ``weight`` or ``scale`` out of range.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> from orthokit.lab.fisher import rank_one_fisher
        >>> model, task = SmallCNN(width=2), image_classification("digits", batch=8)
        >>> penalty = RankOneEWC(model, rank_one_fisher(model, task, samples=4), weight=1.0)
        >>> float(penalty(model).detach())
        0.0

    Numerics:
        The inner product is summed in the dtype of the parameters. With ``free`` the scale stays that of the whole
        gradient.

    References:
        arXiv 2509.23593 (ICLR 2026), for diffusion models. Where gradients are not collinear, a rank-one form leaves
        nearly all that matters free.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: RankOneFisher,
        *,
        weight: float,
        scale: str = "optimal",
        free: Sequence[str] = (),
    ) -> None:
        super().__init__(model, weight=weight, free=free)
        if scale not in ("optimal", "one"):
            raise OptionError(f"scale must be 'optimal' or 'one'; got {scale!r}.")
        self.mean = _fitting(fisher.mean, self.anchor, "the mean gradient")
        self.scale = fisher.scale if scale == "optimal" else 1.0

    def _value(self, moved: Mapping[str, Tensor]) -> Tensor:
        along = torch.stack([(self.mean[n].to(d) * d).sum() for n, d in moved.items()]).sum()
        return self.scale * along.square()

    def describe(self) -> dict[str, Any]:
        """Name, weight and scale: for the record of a run."""
        return {**super().describe(), "penalty_scale": self.scale}


class L2SP(Penalty):
    r"""Distance from the starting point, the same for every parameter.

    .. math:: \frac{\lambda}{2} \lVert \theta - \theta^* \rVert^2

    Args:
        model: At the anchor.
        weight: :math:`\lambda \ge 0`.
        free: Patterns of names that do not enter, such as a new head; default none.

    Raises:
        OptionError: ``weight`` out of range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> penalty = L2SP(model, weight=2.0, free=("bias",))
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> round(float(penalty(model).detach()), 4)
        2.0

    References:
        X. Li, Y. Grandvalet, F. Davoine (2018), Explicit inductive bias for transfer learning, arXiv 1802.01483.
    """

    def _value(self, moved: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([d.square().sum() for d in moved.values()]).sum()


class Penalties:
    """Several penalties as one: their sum, such as one EWC for every task so far.

    Args:
        parts: The penalties; none gives the constant 0.

    Example:
        >>> from orthokit.lab.regularisers import L2SP, Penalties
        >>> model = nn.Linear(2, 1)
        >>> both = Penalties([L2SP(model, weight=1.0), L2SP(model, weight=3.0)])
        >>> both.describe()["penalty"]
        'L2SP + L2SP'
    """

    def __init__(self, parts: Sequence[Penalty]) -> None:
        self.parts = tuple(parts)

    def __call__(self, model: nn.Module) -> Tensor:
        """The sum at the model's present parameters."""
        total = torch.zeros((), device=next(model.parameters()).device)
        for part in self.parts:
            total = total + part(model)
        return total

    def describe(self) -> dict[str, Any]:
        """Names and weights: for the record of a run."""
        return {
            "penalty": " + ".join(type(part).__name__ for part in self.parts) or "none",
            "penalty_weight": [part.weight for part in self.parts],
        }


def _fitting(found: Mapping[str, Tensor], anchor: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    missing = [name for name, a in anchor.items() if name not in found or found[name].shape != a.shape]
    if missing:
        raise ParameterError(
            f"{what} lacks trainable parameters or has them in another shape: {missing[:3]}"
            f"{' ...' if len(missing) > 3 else ''}. Compute it on the same model, after attaching adapters."
        )
    return {name: found[name].detach().clone() for name in anchor}
