"""What an arena is made of: a pretrained model, what it is fine-tuned on, and what it could do and may forget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.lab.tasks import Task

__all__ = ["Ground", "fitted_head"]

# Weight of the ridge of a head that is fitted to a frozen model.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Ground:
    """A pretrained model and what it is fine-tuned on; all scores are losses, so less is better.

    Args:
        label: What figures call it.
        model: ``model(small)``: the pretrained model; its head, if it has one, is fitted to the frozen rest.
        task: ``task(seed, small)``: what it is fine-tuned on; the seed is that of the batches.
        general: ``general(model, small)``: what the model could do before, as a dictionary whose key ``"general"`` is
            the loss that forgetting is measured by.
        targets: Layers that are adapted; ``few`` of them in the smallest runs.
        steps: Length of a run of the recorded studies.
        loss: Key of the task's evaluation that is the target loss, and its ``unit``.
        error: Key of a second figure, or ``""``.
        other: What ``general`` is, with its unit.
        head: Attribute of the model that holds a head to train along, or ``""``.
        head_lr: Its learning rate, the same for all methods.
        block: Block size of OFT, which sets the number of trainable parameters for all.
        inputs: ``inputs(which, small)``: batches of held-out inputs of the ``"general"`` or the ``"target"`` task, for
            diagnostics; ``None``: there are none.
        seen: Layers whose outputs are compared before and after, as patterns of names.
        tokens: Tokens compared, at least four for each of their outputs.
        padded: Whether inputs are tokens padded with 0.
        geometry: ``geometry(model, small)``: how much the similarities of held-out inputs changed, or ``None``.
        bare: ``bare()``: a model of the same layers without weights, which is all that counting parameters needs;
            ``None``: they are counted on ``model(True)``.
    """

    label: str
    model: Callable[[bool], nn.Module]
    task: Callable[[int, bool], Task]
    general: Callable[[nn.Module, bool], dict[str, float]]
    targets: tuple[str, ...]
    few: tuple[str, ...]
    steps: int
    loss: str
    unit: str
    error: str
    other: str
    head: str = ""
    head_lr: float = 0.0
    block: int = 32
    inputs: Callable[[str, bool], list[Tensor]] | None = None
    seen: tuple[str, ...] = ()
    tokens: int = 0
    padded: bool = False
    geometry: Callable[[nn.Module, bool], float] | None = None
    bare: Callable[[], nn.Module] | None = None


def fitted_head(
    vectors: Float[Tensor, "samples width"], labels: Int64[Tensor, " samples"], classes: int
) -> dict[str, Tensor]:
    """Weight and bias of a ridge logistic regression."""
    weight = torch.zeros(classes, vectors.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(vectors, weight, bias), labels) + _RIDGE * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return {"weight": weight.detach(), "bias": bias.detach()}
