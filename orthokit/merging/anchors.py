r"""Functional dual anchors: inputs to a block whose gradients point from the base to the expert.

A task vector ``tau`` says where an expert lies; anchors say what it does there. They are found without data: inputs
``X`` of a block such that one step of the base towards the expert's outputs on ``X`` goes along ``tau``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype
from orthokit.merging._anchor_search import Objective, Search, initial_anchors, updates, without_part
from orthokit.merging._called import DISTANCES, Call, Called, check_fit, check_parameters, width_of
from orthokit.merging._common import check_range
from orthokit.merging._saved import digest

__all__ = ["Anchors", "anchor_cosine", "construct_anchors", "induced_update", "linear_bound"]

Told: TypeAlias = Callable[[int, dict[str, float]], object]

_INITS = ("weights", "gaussian")


def linear_bound(dW: Float[Tensor, "*batch out in"], n: int) -> Float[Tensor, "*batch"]:
    r"""The largest cosine between ``dW`` and an update that ``n`` inputs of a linear layer can induce.

    .. math:: \Big(\textstyle\sum_{i \le n} \sigma_i^2 \Big/ \sum_i \sigma_i^2\Big)^{1/2}

    An update from ``n`` inputs has rank at most ``n``, whatever the distance of outputs, and this is what the best
    approximation of that rank keeps. Attained by :func:`anchor_cosine` with the top ``n`` right singular vectors.

    Args:
        dW: Change of the layer, or batch, shape ``(..., out, in)``, not zero.
        n: Number of input vectors (anchors times tokens), ``>= 1``.

    Returns:
        Shape ``(...)``, in (0, 1], float32 or better; 1 for ``n >= rank``.

    Raises:
        OptionError: ``n`` below 1, or a change that is zero and has no direction.
        ShapeError, DtypeError, NonFiniteError: Not a finite real matrix.

    Example:
        >>> round(linear_bound(torch.diag(torch.tensor([4.0, 3.0])), 1).item(), 6)
        0.8

    Numerics:
        One SVD, values only; a few epsilon.

    References:
        The inequality behind section 3 of K. Shi, Y. Wen, W. Liu, Model merging with functional dual anchors,
        arXiv 2510.21223, by Cauchy-Schwarz; stated here for any distance.
    """
    check_matrix(dW, name="dW")
    check_finite(dW, name="dW")
    check_range("n", n, least=1)
    squares = torch.linalg.svdvals(dW.to(working_dtype(dW))).square()
    total = squares.sum(-1)
    if bool((total == 0).any()):
        raise OptionError("dW is zero and has no direction; leave such layers out.")
    return (squares[..., :n].sum(-1) / total).sqrt().clamp(max=1)


def anchor_cosine(dW: Float[Tensor, "*#batch out in"], X: Float[Tensor, "*#batch n in"]) -> Float[Tensor, "*result"]:
    r"""The cosine between ``dW`` and the update that inputs ``X`` of a linear layer induce, in closed form.

    .. math:: \cos(dW\,X^\top X,\; dW) \quad\text{(inputs are rows; distance } \tfrac12\|\cdot\|^2)

    Args:
        dW: Change of the layer, or batch, shape ``(..., out, in)``.
        X: Inputs, one a row, shape ``(..., n, in)``; anchors as ``anchors.X.flatten(0, 1)``.

    Returns:
        Shape ``(...)``, in [0, 1], float32 or better; never above ``linear_bound(dW, n)``. NaN where the update is 0.

    Raises:
        ShapeError: Widths that differ.
        DtypeError, NonFiniteError: Not finite real matrices.

    Example:
        >>> anchor_cosine(torch.ones(3, 4), torch.eye(4)).item()
        1.0

    Numerics:
        Two products; a few epsilon times the condition of the sum.

    References:
        K. Shi, Y. Wen, W. Liu, arXiv 2510.21223, section 3. The update is the descent direction ``-g``.
    """
    for name, value in (("dW", dW), ("X", X)):
        check_matrix(value, name=name)
        check_finite(value, name=name)
    if dW.shape[-1] != X.shape[-1]:
        raise ShapeError(f"rows of X must be as long as those of dW; got {tuple(X.shape)} and {tuple(dW.shape)}.")
    work = torch.promote_types(working_dtype(dW), working_dtype(X))
    dW, X = dW.to(work), X.to(work)
    update = (dW @ X.mT) @ X
    scale = torch.linalg.matrix_norm(update) * torch.linalg.matrix_norm(dW)
    # Both are the same inner product; the square cannot come out negative.
    return ((dW @ X.mT).square().sum((-2, -1)) / scale).clamp(max=1)


def induced_update(
    block0: nn.Module,
    block1: nn.Module,
    X: Float[Tensor, "n tokens d"],
    *,
    distance: Literal["cosine", "l2", "l1"] = "cosine",
    call: Call | None = None,
) -> dict[str, Tensor]:
    r"""The direction in which inputs ``X`` pull the base's parameters towards the expert's outputs.

    .. math:: -g(X) = -\nabla_\theta \tfrac1n \textstyle\sum_j \mathrm{Dist}\big(\varphi(\theta, x_j),
              \varphi(\theta_1, x_j)\big) \big|_{\theta_0}

    Args:
        block0: The base's block.
        block1: The expert's, with parameters of the same names and shapes.
        X: Hidden states, shape ``(n, tokens, d)``.
        distance: Of all tokens of one input at once: ``"cosine"`` (default), ``"l2"`` (half the square) or ``"l1"``.
        call: How a block is run on hidden states; default ``block(X)``.

    Returns:
        Parameter name to its direction; zeros for a parameter that has no influence.

    Raises:
        ShapeError: Blocks that do not fit.
        UnknownNameError: Unknown distance.
        NonFiniteError, DtypeError: Parameters that are not finite and floating.

    Example:
        >>> old, new = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
        >>> found = induced_update(old, new, torch.eye(3)[:, None], distance="l2")["weight"]
        >>> torch.allclose(3 * found, new.weight - old.weight, atol=1e-6)
        True

    Numerics:
        One forward and backward pass in the blocks' dtype, float32 at least.

    References:
        K. Shi, Y. Wen, W. Liu, arXiv 2510.21223, equation 1.
    """
    base, expert = _pair(block0, block1, distance, call)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in base.own().items()}
    X = X.to(next(iter(parameters.values())))
    return {name: value.detach() for name, value in updates(base, expert, parameters, X, distance, again=False).items()}


@dataclass(frozen=True, eq=False, repr=False)
class Anchors:
    """Inputs of a block that stand for what an expert changed in it.

    Args:
        X: Hidden states, shape ``(n, tokens, d)``: the best that were seen.
        cosine: Between the update they induce and the task vector, the mean over tensors (or of all at once).
        cosines: The same at each step, from the initial inputs on, shape ``(steps + 1,)``.
        by_tensor: Parameter name to its cosine at ``X``.
        bound: What ``cosine`` cannot exceed, where the block is one linear layer; None elsewhere.
        left_out: Parameter name to why it has no part in ``cosine``.
        kept: Step to the inputs at that step, for the steps that were asked for.
    """

    X: Tensor
    cosine: float
    cosines: Tensor
    by_tensor: dict[str, float]
    bound: float | None
    left_out: dict[str, str]
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def norms(self) -> Tensor:
        """Length of every token, shape ``(n, tokens)``: anchors may lie far from any real hidden state."""
        return self.X.norm(dim=-1)

    def __repr__(self) -> str:
        n, tokens, d = self.X.shape
        limit = "" if self.bound is None else f" of at most {self.bound:.3f}"
        return (
            f"Anchors({n} x {tokens} tokens x {d}, cosine {self.cosine:.3f}{limit} after {float(self.cosines[0]):.3f}, "
            f"{len(self.left_out)} tensors left out)"
        )


def construct_anchors(
    block0: nn.Module,
    block1: nn.Module,
    *,
    tokens: int,
    count: int = 64,
    width: int | None = None,
    init: Literal["weights", "gaussian"] = "weights",
    sigma: float = 0.01,
    distance: Literal["cosine", "l2", "l1"] = "cosine",
    per_tensor: bool = True,
    steps: int = 1200,
    lr: float = 1e-2,
    seed: int = 0,
    call: Call | None = None,
    keep: Sequence[int] = (),
    progress: Told | None = None,
    resume: str | Path | None = None,
) -> Anchors:
    r"""Inputs of a block whose gradients, from the base towards the expert, point along the task vector.

    .. math:: \min_X \textstyle\sum_p \big(1 - \cos(-g_p(X),\, \tau_p)\big),\quad \tau = \theta_1 - \theta_0

    with ``g`` of :func:`induced_update`. The sign is that of descent: for a linear layer and half squares,
    ``<g, tau> = -||tau X||^2`` is never positive, so aligning ``+g`` would reward inputs that say nothing.

    Args:
        block0: The base's block; a linear layer is one, too. It is copied, not changed.
        block1: The expert's, with parameters of the same names and shapes.
        tokens: Hidden states of one anchor, ``>= 1``. One token leaves attention without anything to attend to.
        count: Anchors, ``>= 1``; published 64 for vision and sentences.
        width: Of a hidden state; default the commonest number of columns among the block's matrices.
        init: ``"weights"`` (default): every token is a row of one of the expert's matrices with ``width`` columns,
            drawn without repetition within an anchor, and the mean of two where there are too few. ``"gaussian"``:
            ``sigma * N(0, I)``. Both are meant to put little into directions that the task vector hardly uses, where
            the gradient cannot move an anchor either.
        sigma: For ``"gaussian"``, above 0; default 0.01. Try several for a few steps and take the best cosine.
        distance: As for :func:`induced_update`.
        per_tensor: One cosine a parameter tensor (default, as released) or one for all together (as printed).
        steps: AdamW steps, ``>= 0``; published 1200, 200 for language models.
        lr: Above 0; default 1e-2.
        seed: Of the initial inputs.
        call: How a block is run on hidden states; default ``block(X)``. It must work in float64, too.
        keep: Steps, ``0 ... steps``, whose inputs are kept in the result.
        progress: Called as ``progress(step, {"cosine": ...})`` after each step.
        resume: A file that holds the state every 100 steps and the result at the end. If it is there, work goes on from
            it and ends as if it had never stopped.

    Returns:
        :class:`Anchors`: the best inputs seen, and how they got there.

    Raises:
        OptionError: Options out of range, or blocks that do not differ.
        UnknownNameError: Unknown ``init`` or ``distance``.
        ShapeError: Blocks built differently.
        NonFiniteError: Parameters with a NaN, or a search that left the finite numbers.
        CheckpointError: ``resume`` is damaged, or is of another search.

    Example:
        >>> old, new = torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(6, 5, bias=False)
        >>> found = construct_anchors(old, new, tokens=1, count=2, distance="l2", steps=50)
        >>> bool(found.cosines[0] < found.cosine <= found.bound + 1e-6)
        True

    Numerics:
        The blocks' dtype, float32 at least; attention is computed from plain products, because fused kernels have no
        second derivative. A step costs about seven forward and backward passes of the block on all anchors.

        Tensors that did not change, and tensors whose gradient is zero for every input (the bias of attention keys:
        softmax does not see it), have no cosine and are left out and named. In floating point the latter would have
        the cosine of their rounding, and would steer by it.

    References:
        K. Shi, Y. Wen, W. Liu (2025), Model merging with functional dual anchors, arXiv 2510.21223, sections 3.1-3.2
        and appendix C.3. Sign and cosine per tensor follow the released code. Ours: tensors without a gradient are left
        out; rows for ``"weights"`` come from all fitting matrices together.
    """
    for what, value, least in (("tokens", tokens, 1), ("count", count, 1), ("steps", steps, 0)):
        check_range(what, value, least=least)
    check_range("lr", lr, above=0)
    check_range("sigma", sigma, above=0)
    if init not in _INITS:
        raise unknown_name("initialisation", init, _INITS)
    if not all(0 <= step <= steps for step in keep):
        raise OptionError(f"keep must name steps between 0 and steps={steps}; got {list(keep)}.")
    base, expert = _pair(block0, block1, distance, call)
    tau = {name: expert.own()[name] - p for name, p in base.own().items()}
    if not any(bool(t.any()) for t in tau.values()):
        raise OptionError("block1 equals block0: there is no task vector to align with. Leave such blocks out.")
    shape = (count, tokens, width_of(base.block) if width is None else width)
    left_out = without_part(base, expert, tau, (min(count, 4), *shape[1:]), distance)
    used = {name: t for name, t in tau.items() if name not in left_out}
    if not used:
        raise OptionError(f"no changed parameter has a gradient on inputs of {tokens} token(s); use more tokens.")
    objective = Objective(base, expert, used, distance, per_tensor)
    X = initial_anchors(expert, shape, init, sigma, seed).to(next(iter(tau.values())))
    search = Search(X, lr, frozenset(keep))
    path, recipe = None if resume is None else Path(resume), ""
    if path is not None:
        options = {"init": init, "sigma": sigma, "distance": distance, "per_tensor": per_tensor, "seed": seed}
        options |= {"shape": shape, "steps": steps, "lr": lr, "keep": sorted(keep)}
        both = ((f"{i}/{name}", p) for i, of in enumerate((base, expert)) for name, p in of.own().items())
        recipe = digest(options, both)
        search.restore(path, recipe)
    for step in range(len(search.cosines), steps + 1):
        cosines = objective(search.X)
        search.observe(cosines)
        if step < steps:
            search.advance(cosines)
        if path is not None and search.due(steps):
            search.save(path, recipe)
        if progress is not None:
            progress(step, {"cosine": search.cosines[-1]})
    apart = Objective(base, expert, used, distance, True)(search.best.requires_grad_()).tolist()
    return Anchors(
        X=search.best.detach(),
        cosine=search.cosine,
        cosines=torch.tensor(search.cosines, dtype=torch.float64),
        by_tensor=dict(zip(used, apart, strict=True)),
        bound=_bound(used, count * tokens, per_tensor) if isinstance(block0, nn.Linear) else None,
        left_out=left_out,
        kept=search.kept,
    )


def _pair(block0: nn.Module, block1: nn.Module, distance: str, call: Call | None) -> tuple[Called, Called]:
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    check_fit(block0, block1)
    check_parameters(block0, what="block0")
    check_parameters(block1, what="block1")
    return Called(block0, call), Called(block1, call)


def _bound(tau: dict[str, Tensor], inputs: int, per_tensor: bool) -> float:
    """Of a linear layer: a bias, if it counts, can be met exactly."""
    parts = [linear_bound(t, inputs) if t.ndim == 2 else torch.ones((), dtype=t.dtype) for t in tau.values()]
    if per_tensor:
        return float(torch.stack([part.cpu() for part in parts]).mean())
    squares = [t.square().sum().cpu() for t in tau.values()]
    total = torch.stack(squares).sum()
    return float((sum((p.cpu() ** 2 * s for p, s in zip(parts, squares, strict=True)), torch.zeros(())) / total).sqrt())
