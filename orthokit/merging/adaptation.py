"""Adaptation of one block to several experts on their anchors: the merging stage of functional dual anchors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from orthokit.errors import NonFiniteError, OptionError, ShapeError, unknown_name
from orthokit.merging._called import DISTANCES, Call, Called, check_fit, check_parameters, distances
from orthokit.merging._common import check_range

__all__ = ["Adapted", "adapt_block"]

_STARTS = ("pretrained", "task_arithmetic")


@dataclass(frozen=True, eq=False, repr=False)
class Adapted:
    """A block after its adaptation.

    Args:
        parameters: Name to value.
        losses: Mean distance in each epoch while it ran, and at the end, shape ``(epochs + 1,)``.
        before: Mean distance on the anchors of each expert at the start; None where it has none.
        after: The same at the end.
        kept: Epoch to parameters before it, for the epochs that were asked for.
    """

    parameters: dict[str, Tensor]
    losses: Tensor
    before: tuple[float | None, ...]
    after: tuple[float | None, ...]
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Adapted({len(self.parameters)} tensors, loss {float(self.losses[0]):.3g} to {float(self.losses[-1]):.3g})"
        )


def adapt_block(
    block0: nn.Module,
    experts: Sequence[nn.Module],
    anchors: Sequence[Tensor | None],
    *,
    start: Literal["pretrained", "task_arithmetic"] | Mapping[str, Tensor] = "pretrained",
    weights: Sequence[float] | None = None,
    scale: float = 0.3,
    distance: Literal["cosine", "l2", "l1"] = "cosine",
    lr: float | None = None,
    epochs: int = 100,
    batch: int = 128,
    seed: int = 0,
    keep: Sequence[int] = (),
    call: Call | None = None,
    progress: Callable[[int, dict[str, float]], object] | None = None,
) -> Adapted:
    r"""One block that does on each expert's anchors what that expert does.

    .. math:: \min \textstyle\sum_i w_i \sum_j
              \mathrm{Dist}\big(\varphi(\theta, x_{ij}), \varphi(\theta_i, x_{ij})\big)

    over ``theta`` itself from the base on, over elementwise ``A_i`` in ``theta_0 + sum_i A_i * tau_i``, or over ``A``
    in ``theta_0 + A * (merged - theta_0)``.

    Args:
        block0: The base's block. It is copied, not changed.
        experts: Blocks with parameters of the same names and shapes, at least one.
        anchors: Hidden states of each expert, shape ``(n_i, tokens, d)``; None for an expert without, which then has no
            part in the loss.
        start: ``"pretrained"`` (default), ``"task_arithmetic"`` (``A_i = scale``), or the parameters of a merged block
            by name (``A = 1``).
        weights: Of the experts in the loss, ``>= 0``; default all 1.
        scale: First value of the coefficients for ``"task_arithmetic"``; default 0.3.
        distance: As for :func:`induced_update`.
        lr: Of Adam, above 0, falling to 0 along half a cosine; default 1e-5 for ``"pretrained"``, else 1e-2.
        epochs: Passes over all anchors, ``>= 0``; default 100.
        batch: Anchors a step, ``>= 1``; default 128.
        seed: Of the order of anchors.
        keep: Epochs, ``0 ... epochs``, before which the parameters are kept (``epochs``: at the end).
        call: How a block is run on hidden states; default ``block(X)``.
        progress: Called as ``progress(epoch, {"loss": ...})`` after each epoch.

    Returns:
        :class:`Adapted`.

    Raises:
        OptionError: Options out of range, no expert, or no anchors at all.
        UnknownNameError: Unknown ``start`` or ``distance``.
        ShapeError: Blocks built differently, or a start that does not fit.
        NonFiniteError: Parameters with a NaN, or a loss that left the finite numbers.

    Example:
        >>> old, new = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> found = adapt_block(old, [new], [torch.eye(3)[:, None]], distance="l2", lr=0.05)
        >>> bool(found.losses[-1] < 0.1 * found.losses[0])
        True

    Numerics:
        The blocks' dtype, float32 at least; a step costs one forward and backward pass.

    References:
        K. Shi, Y. Wen, W. Liu, arXiv 2510.21223, section 3.3 and appendix C.3 (published rates: 1e-5 for vision, 5e-5
        for sentences from pretrained; 1e-2 for coefficients). The rate falls with every step here.
    """
    if not isinstance(start, Mapping) and start not in _STARTS:
        raise unknown_name("start", start, _STARTS)
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    if not experts or len(anchors) != len(experts):
        raise OptionError(f"need one entry of anchors for each expert; got {len(anchors)} for {len(experts)} experts.")
    check_range("epochs", epochs, least=0)
    check_range("batch", batch, least=1)
    shares = _shares(weights, len(experts))
    rate = check_range("lr", (1e-5 if start == "pretrained" else 1e-2) if lr is None else lr, above=0)
    check_parameters(block0, what="the base")
    for index, expert in enumerate(experts):
        check_fit(block0, expert, what=f"expert {index}")
        check_parameters(expert, what=f"expert {index}")
    base = Called(block0, call)
    own = base.own()
    tuned, built = _parametrised(own, [dict(e.named_parameters()) for e in experts], start, scale)
    X, Y, share, whose = _data(own, experts, anchors, shares, call)
    generator = torch.Generator().manual_seed(seed)
    steps_of_epoch = -(-len(X) // batch)
    optimizer = torch.optim.Adam(tuned, lr=rate)

    def per_anchor(some: Tensor | slice = slice(None)) -> Tensor:
        return distances(base.on(X[some], built()), Y[some], distance)

    def by_expert() -> tuple[float | None, ...]:
        with torch.no_grad():
            found = per_anchor()
        return tuple(float(found[whose == i].mean()) if bool((whose == i).any()) else None for i in range(len(experts)))

    before, losses, kept = by_expert(), [], {}
    for epoch in range(epochs):
        if epoch in keep:
            kept[epoch] = _values(built())
        order, total = torch.randperm(len(X), generator=generator).to(X.device), 0.0
        for index, some in enumerate(order.split(batch)):
            at = (epoch * steps_of_epoch + index) / (epochs * steps_of_epoch)
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * at))
            loss = (share[some] * per_anchor(some)).mean()
            for p, g in zip(tuned, torch.autograd.grad(loss, tuned, materialize_grads=True), strict=True):
                p.grad = g
            optimizer.step()
            total += float(loss.detach()) * len(some) / len(X)
        losses.append(_finite(total, epoch))
        if progress is not None:
            progress(epoch, {"loss": total})
    after = by_expert()
    with torch.no_grad():
        losses.append(_finite(float((share * per_anchor()).mean()), epochs))
    result = _values(built())
    if epochs in keep:
        kept[epochs] = result
    return Adapted(result, torch.tensor(losses, dtype=torch.float64), before, after, kept)


def _parametrised(
    own: dict[str, Tensor], experts: list[dict[str, Tensor]], start: str | Mapping[str, Tensor], scale: float
) -> tuple[list[Tensor], Callable[[], dict[str, Tensor]]]:
    """What is tuned, and the parameters it makes."""
    if start == "pretrained":
        tuned = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
        return list(tuned.values()), lambda: tuned
    if isinstance(start, Mapping):
        changes, first = [_changes(own, start)], 1.0
    else:
        changes, first = [{name: e[name].detach().to(p) - p for name, p in own.items()} for e in experts], scale
    # Where nothing changed a coefficient has nothing to scale.
    factors = [
        {n: torch.full_like(t, first, requires_grad=True) for n, t in of.items() if bool(t.any())} for of in changes
    ]

    def built() -> dict[str, Tensor]:
        result = {name: p.detach() for name, p in own.items()}
        for change, factor in zip(changes, factors, strict=True):
            for name, A in factor.items():
                result[name] = result[name] + A * change[name]
        return result

    tuned = [A for factor in factors for A in factor.values()]
    if not tuned:
        raise OptionError("the start equals the base, so there is no change to scale; start from 'pretrained'.")
    return tuned, built


def _changes(own: dict[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, p in own.items():
        if name not in start or start[name].shape != p.shape:
            found = tuple(start[name].shape) if name in start else "nothing"
            raise ShapeError(f"start must hold {name} with shape {tuple(p.shape)}; it holds {found}.")
        if not bool(torch.isfinite(start[name]).all()):
            raise NonFiniteError(f"start holds a NaN or an infinity in {name}; merge again.")
    return {name: start[name].detach().to(p) - p for name, p in own.items()}


def _data(
    own: dict[str, Tensor],
    experts: Sequence[nn.Module],
    anchors: Sequence[Tensor | None],
    shares: list[float],
    call: Call | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All anchors, what their experts put out for them, their weight in the loss, and whose they are."""
    like = next(iter(own.values()))
    found = [(i, X.detach().to(like)) for i, X in enumerate(anchors) if X is not None]
    if not found:
        raise OptionError("no expert has anchors; there is nothing to adapt to.")
    with torch.no_grad():
        targets = [Called(experts[i], call).to(like).on(X) for i, X in found]
    whose = torch.cat([torch.full((len(X),), i, device=like.device) for i, X in found])
    # Experts count equally however many anchors they have.
    each = [shares[i] * sum(len(Z) for _, Z in found) / (len(found) * len(X)) for i, X in found]
    share = torch.cat([like.new_full((len(X),), s) for s, (_, X) in zip(each, found, strict=True)])
    return torch.cat([X for _, X in found]), torch.cat(targets), share, whose


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(w) for w in weights]
    if len(given) != count or not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given):
        raise OptionError(f"weights must be {count} numbers >= 0, not all 0; got {given}.")
    return given


def _values(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}


def _finite(loss: float, epoch: int) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} in epoch {epoch}; lower lr.")
    return loss
