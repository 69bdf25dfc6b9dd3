r"""How far a step may go before the softmax leaves the reach of its Taylor series, and steps that stay inside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthokit.diagnostics._modes import evaluating
from orthokit.errors import NonFiniteError, OptionError, ParameterError, ShapeError

__all__ = ["SafeStep", "StepController", "logit_slopes", "safe_radius", "safe_step_radius"]

#: ``scores(model, inputs)`` gives the logits, classes last.
Scores = Callable[[nn.Module, Tensor], Tensor]


def safe_radius(
    slopes: Float[Tensor, "*examples classes"], *, logits: Float[Tensor, "*examples classes"] | None = None
) -> Shaped[Tensor, "*examples"]:
    r"""How far logits that move in straight lines can go before the loss leaves its disc of convergence.

    With ``z(t) = z + t a`` the partition function ``sum_k exp(z_k + t a_k)`` has no zero in the complex disc

    .. math:: |t| < \rho_a = \pi / \Delta_a, \qquad \Delta_a = \max_k a_k - \min_k a_k

    and with two classes the nearest zero is known: :math:`\rho^* = \sqrt{\delta^2 + \pi^2} / \Delta_a` with the gap
    :math:`\delta = z_1 - z_0`.

    Args:
        slopes: ``a``, derivatives of the logits along the step, shape ``(..., classes)``.
        logits: ``z``, same shape; with two classes the exact radius is given instead of the bound. Default none.

    Returns:
        Shape ``(...)``, in units of ``t``; infinite where all slopes are equal.

    Raises:
        ShapeError: Fewer than two classes, or shapes that differ.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> abs(safe_radius(torch.tensor([1.0, 3.0, -1.0])).item() - torch.pi / 4) < 1e-6
        True

    Numerics:
        float32 or better. The bound holds for the linearised logits; the network's own are curved.

    References:
        Ghosts of Softmax (2026), arXiv 2603.13552.
    """
    if slopes.ndim < 1 or slopes.shape[-1] < 2:
        raise ShapeError(f"slopes need shape (..., classes) with classes >= 2; got {tuple(slopes.shape)}.")
    if not bool(slopes.isfinite().all()):
        raise NonFiniteError("slopes of the logits must be finite; the model or the step holds a NaN or an infinity.")
    a = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    spread = a.amax(-1) - a.amin(-1)
    if logits is None or slopes.shape[-1] != 2:
        return math.pi / spread
    if logits.shape != slopes.shape:
        raise ShapeError(f"logits must have the shape {tuple(slopes.shape)} of the slopes; got {tuple(logits.shape)}.")
    gap = (logits[..., 1] - logits[..., 0]).to(a.dtype)
    return torch.hypot(gap, torch.full_like(gap, math.pi)) / spread


def logit_slopes(
    model: nn.Module, inputs: Tensor, direction: Mapping[str, Tensor], *, scores: Scores | None = None
) -> tuple[Tensor, Tensor]:
    r"""Logits of a batch and their derivatives along a direction in the space of parameters, by one forward pass.

    .. math:: a = \frac{d}{dt}\, z(\theta + t v)\Big|_{t=0}

    Args:
        model: Not changed; runs in evaluation mode.
        inputs: What the model takes.
        direction: Name of a parameter to its part of ``v``; those left out stand still.
        scores: ``scores(model, inputs)`` gives the logits; default ``model(inputs)``.

    Returns:
        ``(logits, slopes)``, classes last.

    Raises:
        ParameterError: A name that is no parameter of the model.
        ShapeError: A part of another shape than its parameter.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> v = {"bias": torch.tensor([1.0, 0.0, -1.0])}
        >>> logit_slopes(layer, torch.zeros(1, 2), v)[1].tolist()
        [[1.0, 0.0, -1.0]]

    Numerics:
        Forward-mode derivatives: about two forward passes, and the memory of two.
    """
    parameters = dict(model.named_parameters())
    for name, part in direction.items():
        if name not in parameters:
            raise ParameterError(f"the direction names {name!r}, which is no parameter of the model.")
        if part.shape != parameters[name].shape:
            raise ShapeError(f"{name!r} has shape {tuple(parameters[name].shape)}; its direction {tuple(part.shape)}.")
    moving = {name: parameters[name].detach() for name in direction}
    parts = {name: part.detach().to(moving[name]) for name, part in direction.items()}
    frame = _Frame(model, scores)

    def logits_at(values: dict[str, Tensor]) -> Tensor:
        return functional_call(frame, {f"model.{name}": value for name, value in values.items()}, (inputs,))

    # The fused attention kernels have no forward derivative; the plain one is the same function.
    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # The first forward derivative of a process makes torch compile helpers in a way that torch itself deprecates.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        found = jvp(logits_at, (moving,), (parts,))
    return found[0], found[1]


def safe_step_radius(
    model: nn.Module, inputs: Tensor, direction: Mapping[str, Tensor], *, scores: Scores | None = None
) -> SafeStep:
    r"""The safe radius of every example of a batch for a proposed step.

    Args:
        model: At the point where the step begins; not changed.
        inputs: What the model takes.
        direction: Name of a parameter to its part of the step; see :func:`logit_slopes`. Give the update itself, or a
            unit vector: radii are in multiples of it.
        scores: See :func:`logit_slopes`.

    Returns:
        The :class:`SafeStep`. Its ``ratio`` is ``r = tau / rho_a`` of the step that was given: above 1 it leaves the
        disc for some example.

    Raises:
        ParameterError: A name that is no parameter of the model.
        ShapeError: Shapes that do not fit, or fewer than two classes.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> found = safe_step_radius(layer, torch.zeros(4, 2), {"bias": torch.tensor([1.0, 0.0, -1.0])})
        >>> abs(found.radius - torch.pi / 2) < 1e-6, abs(found.ratio - 2 / torch.pi) < 1e-6
        (True, True)

    Numerics:
        One forward-mode pass. ``rho_a(c v) = rho_a(v) / c``; a constant added to all slopes changes nothing.

    References:
        Ghosts of Softmax (2026), arXiv 2603.13552. With two classes we take the exact radius, not the bound.
    """
    logits, slopes = logit_slopes(model, inputs, direction, scores=scores)
    return SafeStep(safe_radius(slopes, logits=logits), slopes.amax(-1) - slopes.amin(-1))


@dataclass(frozen=True, eq=False)
class SafeStep:
    """Safe radii of a batch; made by :func:`safe_step_radius`.

    Args:
        radii: One an example (and position), in multiples of the direction.
        spreads: Largest minus smallest slope of each.
    """

    radii: Float[Tensor, "*examples"]
    spreads: Float[Tensor, "*examples"]

    @property
    def radius(self) -> float:
        """The smallest radius of the batch."""
        return float(self.radii.min())

    @property
    def ratio(self) -> float:
        """The length of the given step over the smallest radius; 0 for a step that moves no logit."""
        return 1 / self.radius


class StepController:
    r"""Shortens the steps of any optimizer to a share of the safe radius.

    The optimizer makes its step; the step that was made is measured at the point where it began and, if it is longer
    than allowed, shortened along its own line: :math:`\tau \le s\,\rho_a`.

    Args:
        safety: ``s``, ``> 0``; default 1, the radius itself.
        examples: How many examples of the batch are measured, ``>= 1``; default all.

    Raises:
        OptionError: A number out of range.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1e4)
        >>> torch.nn.functional.cross_entropy(layer(torch.ones(1, 2)), torch.tensor([0])).backward()
        >>> controller = StepController(safety=0.5)
        >>> with controller.around(layer, torch.ones(1, 2)):
        ...     _ = optimizer.step()
        >>> controller.ratio > 1, round(controller.ratio * controller.scale, 4)
        (True, 0.5)

    Numerics:
        A copy of the trainable parameters and one forward-mode pass a step. The optimizer's own state (moments, counts)
        advances as if the whole step had been taken. A step that is short enough is left as it is, bit for bit.

    References:
        Ghosts of Softmax (2026), arXiv 2603.13552: a controller that survives spikes of the learning rate. Theirs
        scales the learning rate; scaling the update does the same to plain gradient descent, and works for optimizers
        whose step is not proportional to their rate.
    """

    def __init__(self, *, safety: float = 1.0, examples: int | None = None) -> None:
        if not (safety > 0 and math.isfinite(safety)) or (examples is not None and examples < 1):
            raise OptionError(f"need a finite safety > 0 and examples >= 1; got {safety} and {examples}.")
        self.safety, self.examples = float(safety), examples
        #: ``r = tau / rho_a`` of the last step that the optimizer proposed.
        self.ratio = 0.0
        #: What the last step was multiplied with, in (0, 1].
        self.scale = 1.0

    @contextmanager
    def around(self, model: nn.Module, inputs: object, *, scores: Scores | None = None) -> Iterator[None]:
        """Put this around ``optimizer.step()``.

        Args:
            model: Whose parameters the optimizer moves.
            inputs: The inputs of the batch.
            scores: See :func:`logit_slopes`.

        Raises:
            OptionError: ``inputs`` is no tensor.
            ParameterError: The step changed more than trainable parameters, as one that merges adapters does: it
                cannot be shortened. It stays as the optimizer made it.
            NonFiniteError: The step is not finite; the parameters are back where they were.
        """
        if not isinstance(inputs, Tensor):
            raise OptionError(
                f"a step is measured on the inputs of one batch, a tensor; got {type(inputs).__name__}. Train without "
                "step_controller, or on a task whose batches are (inputs, targets)."
            )
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in moving.items()}
        rest = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
        versions = [t._version for t in rest]
        yield
        if any(t._version != version for t, version in zip(rest, versions, strict=True)):
            raise ParameterError(
                "the optimizer changed frozen weights or buffers with its step, as a merge does; such a step cannot be "
                "shortened. Train without step_controller."
            )
        self._shorten(model, moving, before, inputs[: self.examples], scores)

    @torch.no_grad()
    def _shorten(
        self,
        model: nn.Module,
        moving: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        inputs: Tensor,
        scores: Scores | None,
    ) -> None:
        after = {name: p.detach().clone() for name, p in moving.items()}
        update = {name: after[name] - before[name] for name in moving}
        for name, p in moving.items():
            p.copy_(before[name])
        self.ratio = safe_step_radius(model, inputs, update, scores=scores).ratio
        self.scale = min(1.0, self.safety / self.ratio) if self.ratio > 0 else 1.0
        for name, p in moving.items():
            # The whole step is put back as it was made: before + (after - before) would round.
            p.copy_(after[name] if self.scale == 1.0 else before[name] + self.scale * update[name])

    def describe(self) -> dict[str, Any]:
        """What would rebuild the controller: for the record of a run."""
        return {"step_controller": "safe radius", "safety": self.safety, "examples": self.examples}


class _Frame(nn.Module):
    """A model and the way its logits are read off, as one module that :func:`functional_call` can take."""

    def __init__(self, model: nn.Module, scores: Scores | None) -> None:
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs) if self.scores is None else self.scores(self.model, inputs)
