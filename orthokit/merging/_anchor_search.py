"""The search for anchors: which parameters count, where it begins, one step of it, and its state on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.merging._called import Called, distances, twice_differentiable
from orthokit.merging._saved import read_saved, write_saved

__all__ = ["Objective", "Search", "initial_anchors", "updates", "without_part"]

# torch's own for AdamW; the published settings name only the rate.
_DECAY = 0.01
# A gradient so much smaller than the largest, in float64, is what rounding left of zero.
_NOTHING = 1e-10
# Steps between two states on disk.
_EVERY = 100


def updates(
    base: Called, expert: Called, parameters: Mapping[str, Tensor], X: Tensor, distance: str, *, again: bool
) -> dict[str, Tensor]:
    """``-g`` for each of ``parameters``; with ``again``, as a function of ``X`` that can be differentiated."""
    with twice_differentiable():
        away = distances(base.on(X, parameters), expert.on(X), distance).mean()
        if not away.requires_grad:
            return {name: torch.zeros_like(p) for name, p in parameters.items()}
        found = torch.autograd.grad(away, list(parameters.values()), create_graph=again, materialize_grads=True)
    return {name: -g for name, g in zip(parameters, found, strict=True)}


def without_part(
    base: Called, expert: Called, tau: Mapping[str, Tensor], shape: tuple[int, int, int], distance: str
) -> dict[str, str]:
    """Parameter name to why it cannot be aligned: it did not change, or no input gives it a gradient."""
    left = {name: "did not change" for name, t in tau.items() if not bool(t.any())}
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base, expert = copy.deepcopy(base).double(), copy.deepcopy(expert).double()
    parameters = {name: p.requires_grad_() for name, p in base.own().items() if name not in left}
    try:
        found = updates(base, expert, parameters, probe.to(next(iter(tau.values())).device), distance, again=False)
    except RuntimeError as cause:
        raise ShapeError(
            f"the block cannot be run on hidden states of shape {shape}: {cause}. Give their width with width=, or how "
            "the block is run with call= (in float64, too)."
        ) from cause
    sizes = {name: float(g.norm()) for name, g in found.items()}
    least = _NOTHING * max(sizes.values(), default=0.0)
    return left | {name: "has no gradient at any input" for name, size in sizes.items() if size <= least}


def initial_anchors(expert: nn.Module, shape: tuple[int, int, int], init: str, sigma: float, seed: int) -> Tensor:
    """Where the search begins, on the CPU in float32: ``sigma * N(0, I)`` or rows of the expert's matrices."""
    generator = torch.Generator().manual_seed(seed)
    if init == "gaussian":
        return sigma * torch.randn(shape, generator=generator)
    n, tokens, d = shape
    fitting = [p.detach().cpu().float() for p in expert.parameters() if p.ndim == 2 and p.shape[1] == d]
    if not fitting:
        raise OptionError(f"init='weights' needs a matrix with {d} columns, and the block has none; use 'gaussian'.")
    rows = torch.cat(fitting)
    anchors = []
    for _ in range(n):
        some = rows[torch.randperm(len(rows), generator=generator)[:tokens]]
        pairs = torch.randint(len(rows), (tokens - len(some), 2), generator=generator)
        anchors.append(torch.cat([some, rows[pairs].mean(1)]))
    return torch.stack(anchors)


class Objective:
    """How well the update that inputs induce points along the task vector.

    Args:
        base: The base's block.
        expert: The expert's block.
        tau: Parameter name to its change, for the parameters that count.
        distance: Of outputs.
        per_tensor: One cosine a tensor, or one for all together.
    """

    def __init__(
        self, base: Called, expert: Called, tau: Mapping[str, Tensor], distance: str, per_tensor: bool
    ) -> None:
        self.base, self.expert, self.tau, self.distance, self.per_tensor = base, expert, tau, distance, per_tensor
        own = base.own()
        self.parameters = {name: own[name].detach().clone().requires_grad_() for name in tau}

    def __call__(self, X: Tensor) -> Tensor:
        """The cosines, shape ``(tensors,)`` or ``(1,)``, differentiable in ``X``."""
        found = updates(self.base, self.expert, self.parameters, X, self.distance, again=True)
        if self.per_tensor:
            return torch.stack([_cosine(found[name].flatten(), t.flatten()) for name, t in self.tau.items()])
        together = (torch.cat([side[name].flatten() for name in self.tau]) for side in (found, self.tau))
        return _cosine(*together)[None]


class Search:
    """AdamW on the inputs, with the best ones seen so far.

    Args:
        X: Initial inputs.
        lr: Of AdamW.
        keep: Steps whose inputs are kept.
    """

    def __init__(self, X: Tensor, lr: float, keep: frozenset[int]) -> None:
        self.X = X.clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.X], lr=lr, weight_decay=_DECAY)
        self.best, self.cosine = X.clone(), -float("inf")
        self.cosines: list[float] = []
        self.keep, self.kept = keep, dict[int, Tensor]()

    def observe(self, cosines: Tensor) -> None:
        """Record the inputs as they are, whose cosines these are."""
        cosine = float(cosines.detach().double().mean())
        if cosine != cosine:
            raise NonFiniteError(
                f"the cosine of the anchors is NaN at step {len(self.cosines)}; lower lr, or use another init."
            )
        if len(self.cosines) in self.keep:
            self.kept[len(self.cosines)] = self.X.detach().clone()
        if cosine > self.cosine:
            self.best, self.cosine = self.X.detach().clone(), cosine
        self.cosines.append(cosine)

    def advance(self, cosines: Tensor) -> None:
        """One step up these cosines."""
        (self.X.grad,) = torch.autograd.grad((1 - cosines).sum(), self.X)
        self.optimizer.step()

    def due(self, steps: int) -> bool:
        """Whether the state belongs on disk now."""
        done = len(self.cosines)
        return done % _EVERY == 0 or done > steps

    def save(self, path: Path, recipe: str) -> None:
        """Everything that the next step depends on."""
        moments = {f"adam/{k}": v for k, v in self.optimizer.state[self.X].items()}
        kept = {f"kept/{step}": X for step, X in self.kept.items()}
        cosines = torch.tensor(self.cosines, dtype=torch.float64)
        write_saved(path, {"X": self.X, "best": self.best, "cosines": cosines} | moments | kept, {}, recipe=recipe)

    def restore(self, path: Path, recipe: str) -> None:
        """Go on from a state on disk, if there is one."""
        found = read_saved(path, recipe=recipe)
        if found is None:
            return
        tensors = {name: t if name.endswith("/step") else t.to(self.X.device) for name, t in found[0].items()}
        with torch.no_grad():
            self.X.copy_(tensors["X"])
        self.best, self.cosines = tensors["best"], tensors["cosines"].tolist()
        self.cosine = max(self.cosines)
        self.kept = {int(k.removeprefix("kept/")): t for k, t in tensors.items() if k.startswith("kept/")}
        moments = {k.removeprefix("adam/"): t for k, t in tensors.items() if k.startswith("adam/")}
        if moments:
            self.optimizer.state[self.X] = moments


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of two vectors of any length: half squares of small differences fall below the usual guard of 1e-8."""
    a, b = (v / v.detach().abs().amax().clamp(min=torch.finfo(v.dtype).tiny) for v in (a, b))
    return nn.functional.cosine_similarity(a, b, dim=0)
