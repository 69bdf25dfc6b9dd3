"""Merging by functional dual anchors: exactly for one matrix, and block by block for networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.errors import OptionError, ShapeError
from orthokit.merging._called import Call, find_blocks
from orthokit.merging._common import check_finite, check_range, finished, gathered, task_vectors, weighted_sum
from orthokit.merging._fda_parts import (
    Ticker,
    adapted_block,
    block_rows,
    check_anchors,
    constructed,
    matched,
    options_of,
    outside_rule,
    put,
    rest,
)
from orthokit.merging._saved import file_name
from orthokit.merging.anchors import Anchors
from orthokit.merging.report import as_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FDAReport", "fda", "merge_with_anchors"]

_CONSTRUCT = ("count", "width", "init", "sigma", "distance", "per_tensor", "steps", "lr", "keep")
_ADAPT = ("distance", "lr", "epochs", "batch", "keep")
# Between the seeds of two blocks: more than there are experts.
_FAR = 1_000_003


def fda(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    count: int | None = None,
    pull: float = 0.5,
    start: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""A matrix that does to each expert's most changed inputs what that expert does, with the least change.

    .. math:: \min_W \textstyle\sum_i w_i \lVert (W - W_i) V_i \rVert_F^2 + \rho \lVert W - W_s \rVert_F^2

    ``V_i``, the top right singular vectors of ``tau_i = W_i - W_0``, are the anchors of a linear layer: no other inputs
    induce an update closer to ``tau_i`` (:func:`linear_bound` is attained). For ``rho = 0`` it is the solution nearest
    to ``W_s``; weights are scaled to a mean of 1.

    Args:
        base: Tensor of the base model, shape ``(..., out, in)``. A vector or scalar gets the weighted mean of changes,
            times ``scale``, and none of the other options has a meaning for it.
        experts: One tensor each, of that shape.
        weights: Of the experts, ``>= 0``; only their ratios count. Default equal.
        scale: Factor on the change against ``base``; default 1.
        count: Anchors of an expert, ``1 <= count <= min(out, in)``; default ``min(out, in) // experts`` (at least 1),
            as many as find room beside each other. With all ``in`` of them every expert speaks about every direction,
            and the result is the weighted mean (shrunk by ``pull``).
        pull: ``rho >= 0``, towards the start; default 0.5. What a single expert asks for is shrunk by
            ``1 / (1 + rho)``. Real experts disagree about directions that are nearly one; 0 solves that exactly, with
            a change many times as large as theirs.
        start: ``W_s``, such as another merged tensor; default ``base``.

    Returns:
        Merged tensor, of the shape and dtype of ``base``.

    Raises:
        OptionError: No expert, weights below 0, or another option out of range.
        ShapeError, DtypeError, NonFiniteError: Tensors that do not fit, or hold a NaN or an infinity.

    Example:
        Experts that changed different inputs are both kept whole:

        >>> base, a, b = torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
        >>> bool(torch.allclose(fda(base, [a, b], pull=0), a + b))
        True

    Numerics:
        At least float32; one SVD of each change and one of all anchors beside each other, ``in x (experts * count)``.
        Directions whose singular value is rounding of the largest count as not changed.

    References:
        K. Shi, Y. Wen, W. Liu (2025), Model merging with functional dual anchors, arXiv 2510.21223; the closed form for
        linear layers is ours, where the paper searches for anchors and adapts by gradient steps.
    """
    inputs = gathered(base, experts, weights, positive=True)
    check_range("scale", scale)
    check_range("pull", pull, least=0)
    changes = task_vectors(inputs)
    first = None if start is None else _from_start(start, inputs.base)
    if base.ndim < 2 or base.numel() == 0:
        mean = weighted_sum(changes, inputs.weights / inputs.weights.sum())
        return finished(mean, inputs, scale=scale, moved=True)
    least = min(base.shape[-2:])
    number = max(1, least // len(changes)) if count is None else int(check_range("count", count, least=1, most=least))
    anchors, asked = [], []
    for change, weight in zip(changes, inputs.weights / inputs.weights.mean(), strict=True):
        _, s, Vh = torch.linalg.svd(change, full_matrices=False)
        moved = s > s[..., :1] * max(base.shape[-2:]) * torch.finfo(s.dtype).eps
        V = (Vh * moved[..., None])[..., :number, :].mT * weight.sqrt()
        anchors.append(V)
        asked.append((change if first is None else change - first) @ V)
    merged = _least_squares(torch.cat(asked, -1), torch.cat(anchors, -1), pull)
    return finished(merged if first is None else merged.add_(first), inputs, scale=scale, moved=True)


def _from_start(start: Tensor, base: Tensor) -> Tensor:
    if start.shape != base.shape or not start.is_floating_point():
        raise ShapeError(
            f"start must be floating, of shape {tuple(base.shape)}; got {start.dtype} {tuple(start.shape)}."
        )
    check_finite("start", start)
    return start.detach().to(base) - base


def _least_squares(B: Tensor, C: Tensor, pull: float) -> Tensor:
    """The smallest ``M`` that minimises ``||M C - B||^2 + pull ||M||^2``."""
    U, s, Zh = torch.linalg.svd(C, full_matrices=False)
    least = s[..., :1] * max(C.shape[-2:]) * torch.finfo(s.dtype).eps
    inverse = torch.where(s > least, s / (s.square() + pull), torch.zeros_like(s))
    return (B @ Zh.mT * inverse[..., None, :]) @ U.mT


@dataclass(frozen=True, eq=False, repr=False)
class FDAReport:
    """What was done to each block.

    Args:
        rows: One mapping a block and expert: ``block``, ``expert``, ``cosine_before``, ``cosine``, ``norm`` (median
            length of an anchor token), ``loss_before``, ``loss_after`` (mean distance on that expert's anchors) and
            ``moved`` (change of the block, relative). Cosines and losses are None where the expert did not change.
        left_out: Block to parameters that had no part in its anchors, and why.
        outside: How the tensors outside blocks were merged.
        anchors: Block to the anchors of each expert.
        trajectory: Epoch to the whole state dict, for the epochs in ``keep`` of ``adapt``.
    """

    rows: list[dict[str, Any]]
    left_out: dict[str, dict[str, str]]
    outside: str
    anchors: dict[str, tuple[Anchors | None, ...]] = field(default_factory=dict)
    trajectory: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Rows, what was left out and what was done outside blocks as JSON, also written to ``path``."""
        return as_json({"rows": self.rows, "left_out": self.left_out, "outside": self.outside}, path)

    def __repr__(self) -> str:
        cosines = [row["cosine"] for row in self.rows if row["cosine"] is not None]
        mean = sum(cosines) / max(len(cosines), 1)
        return f"FDAReport({len(self.anchors)} blocks, mean cosine {mean:.3f}, outside: {self.outside})"


def merge_with_anchors(
    base: nn.Module,
    experts: Sequence[nn.Module],
    *,
    blocks: str | Sequence[str] | Callable[[str, nn.Module], bool],
    tokens: int,
    start: Literal["pretrained", "task_arithmetic"] | Mapping[str, Tensor] = "pretrained",
    weights: Sequence[float] | None = None,
    scale: float = 0.3,
    outside: Literal["mean", "task_arithmetic", "base", "start"] | None = None,
    untouched: Sequence[str] = (),
    anchors: Mapping[str, Sequence[Anchors | None]] | None = None,
    construct: Mapping[str, Any] | None = None,
    adapt: Mapping[str, Any] | None = None,
    call: Call | None = None,
    seed: int = 0,
    progress: Callable[[int, dict[str, float]], object] | None = None,
    resume: str | Path | None = None,
) -> tuple[dict[str, Tensor], FDAReport]:
    r"""A network merged block by block: anchors for every expert, then one block that agrees with all of them.

    Needs no data and no forward pass of a whole network; a block never sees what the blocks before
    it make of its input.

    Args:
        base: The model that the experts were trained from. Nothing is changed in place.
        experts: Models built like it, at least one.
        blocks: Which modules are blocks: a pattern such as ``"blocks.*"``, several, or ``blocks(name, module)``. Of
            modules inside each other the outer one is taken; ``""`` is the whole model.
        tokens: Hidden states of one anchor; published 50 to 257 for vision, 5 for sentences.
        start: As for :func:`adapt_block`; a mapping is the state dict of any merged model.
        weights: Of the experts, ``>= 0``; default all 1.
        scale: ``lambda`` of task arithmetic, where the coefficients begin and for ``outside``; default 0.3.
        outside: What becomes of tensors outside blocks: ``"mean"`` of the experts (weighted), ``"task_arithmetic"``,
            ``"base"``, or ``"start"``, the mapping's. Default: the mapping's where there is one, else what ``start``
            says (``"mean"`` for ``"pretrained"``). Buffers and integers stay the base's.
        untouched: Patterns of tensors outside blocks that stay the base's and may differ in shape: ``"head.*"``.
        anchors: Block to the anchors of each expert, where a merge of the same models has constructed them before
            (``.anchors`` of its report); default: construct them. ``construct`` must not be given then.
        construct: Options of :func:`construct_anchors`: count, width, init, sigma, distance, per_tensor, steps, lr,
            keep.
        adapt: Options of :func:`adapt_block`: distance, lr, epochs, batch, keep.
        call: How a block is run on hidden states; default ``block(x)``. Blocks that take more, such as a mask or
            positions, need one: ``lambda block, x: block(x, None)``.
        seed: Every block and expert draws from its own generator, made from it.
        progress: Called as ``progress(done, values)`` after each step; ``values["of"]`` is how many there are.
        resume: A folder for finished anchors and blocks and for the state of the unfinished one. If it holds some, work
            goes on from there and ends as if it had never stopped. Whatever is in it for other weights or options is
            refused.

    Returns:
        The state dict of the merged model, in the dtypes of ``base``, and an :class:`FDAReport`.

    Raises:
        OptionError: Options out of range, no expert, parameters shared between blocks, or anchors of other blocks.
        UnknownNameError: A pattern that matches nothing, or an unknown option.
        ShapeError: Models built differently.
        NonFiniteError: A NaN or an infinity in a model, or in the search.
        CheckpointError: The folder is damaged, or is of another merge.

    Example:
        >>> base, a, b = (torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)) for _ in range(3))
        >>> sizes = {"construct": {"steps": 20, "count": 4}, "adapt": {"epochs": 30, "lr": 0.02, "distance": "l2"}}
        >>> merged, report = merge_with_anchors(base, [a, b], blocks="*", tokens=1, **sizes)
        >>> all(row["loss_after"] < row["loss_before"] for row in report.rows if row["expert"] == 0)
        True

    Numerics:
        Blocks in their dtype, float32 at least, in evaluation mode. ``blocks x experts x steps`` passes of the cost
        given at :func:`construct_anchors`; besides the models, the memory is that of one block.

    References:
        K. Shi, Y. Wen, W. Liu (2025), Model merging with functional dual anchors, arXiv 2510.21223, section 3 and
        appendix C.3. An expert that did not change a block has no anchors and no say in it.
    """
    searched, tuned = options_of("construct", construct, _CONSTRUCT), options_of("adapt", adapt, _ADAPT)
    steps, epochs = searched.get("steps", 1200), tuned.get("epochs", 100)
    rule = outside_rule(outside, start)
    if not experts:
        raise OptionError("experts is empty; pass at least one model.")
    names = find_blocks(base, blocks)
    pairs = matched(base, experts, names)
    if anchors is not None:
        check_anchors(anchors, names, len(experts), searched)
    state = rest(base, experts, names, rule, weights, scale, start, untouched)
    folder = None if resume is None else Path(resume)
    ticker = Ticker(progress, len(names) * ((len(experts) * (steps + 1) if anchors is None else 0) + epochs))
    rows, left_out, used, made = [], {}, {}, {}
    for place, name in enumerate(names):
        block0, others = pairs[name]
        found = []
        for index, other in enumerate(others):
            if anchors is not None:
                found.append(anchors[name][index])
                continue
            path = None if folder is None else folder / f"{file_name(name)}.expert{index}.safetensors"
            own = {"tokens": tokens, "seed": seed + _FAR * place + index, "call": call, "resume": path}
            found.append(constructed(block0, other, steps, searched | own, ticker))
        begun = {k: start[whole] for k, whole in _inside(name, start)} if isinstance(start, Mapping) else start
        options = {**tuned, "start": begun, "weights": weights, "scale": scale, "seed": seed + _FAR * place}
        path = None if folder is None else folder / f"{file_name(name)}.merged.safetensors"
        made[name] = adapted_block(block0, others, found, options, epochs, call, path, ticker)
        used[name] = tuple(found)
        left_out[name] = {key: why for one in found if one is not None for key, why in one.left_out.items()}
        rows += block_rows(name, block0, found, made[name])
    trajectory = {
        epoch: put(state, {name: one.kept.get(epoch, one.parameters) for name, one in made.items()})
        for epoch in sorted({epoch for one in made.values() for epoch in one.kept})
    }
    report = FDAReport(rows, left_out, rule, used, trajectory)
    return put(state, {name: one.parameters for name, one in made.items()}), report


def _inside(block: str, start: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names within a block, and whole."""
    prefix = f"{block}." if block else ""
    return [(name.removeprefix(prefix), name) for name in start if name.startswith(prefix)]
