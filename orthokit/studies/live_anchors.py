"""What anchors of real experts are like, small merges by them repeated with several seeds, and what the record says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.errors import OptionError, unknown_name
from orthokit.figures.intervals import mean_interval
from orthokit.merging import (
    Anchors,
    anchor_spectra,
    induced_update,
    merge_with_anchors,
    projection_energy,
    subspace_overlap,
)
from orthokit.studies.arena_claims import Finding
from orthokit.studies.dual_anchors import (
    ANCHOR_BLOCKS,
    ANCHOR_TOKENS,
    AnchorExperts,
    State,
    adapted_to,
    anchor_experts,
    anchor_inputs,
    anchor_scores,
    tuned_task_arithmetic,
)
from orthokit.studies.merging_results import merging_families, merging_margins, merging_unit

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ANCHOR_FINDINGS",
    "ANCHOR_QUESTIONS",
    "AnchorQuestion",
    "AnchorTrials",
    "anchor_changes",
    "anchor_findings",
    "anchor_looks",
    "anchor_looks_by_block",
    "anchor_marks",
    "anchor_record",
    "anchor_trials",
]

_PAPER, _OURS = "arXiv 2510.21223", "our question"

_EXPERT = "expert "
# From the pretrained model; the published 1e-5 is for models a thousand times as large, and for more steps.
_RATE = 1e-3
# Of the directions of the hidden states, as published for the overlap; the rest is called the tail.
_LEADING = 0.2


def anchor_looks(
    setting: AnchorExperts, anchors: Mapping[str, Sequence[Anchors | None]], *, examples: int = 48, seed: int = 0
) -> pd.DataFrame:
    """What anchors are like at the steps that were kept, beside random inputs and real ones.

    Args:
        setting: The experts.
        anchors: Block to the anchors of each expert, as in ``FDAReport.anchors``.
        examples: Real pictures whose updates span the cone; the row "real" is made of others.
        seed: Of the random inputs, Gaussian with the variance of the real ones.

    Returns:
        One row a block, task and kind of ``inputs`` ("step 0", ..., "random", "real"): ``cosine`` of the induced update
        with the task vector (all parameters together), ``tail`` (share of energy outside the leading 20 % of
        directions), ``overlap`` of the leading 20 % of directions with those of real hidden states, ``cone`` (share of
        the induced update's energy in the cone of real examples' updates) and ``norm`` (median length of a token).

    Raises:
        OptionError: Anchors of which no step was kept.
    """
    import pandas as pd

    rows = []
    for block, found in anchors.items():
        for index, (task, own) in enumerate(zip(setting.experts, found, strict=True)):
            if own is None:
                continue
            if not own.kept:
                raise OptionError(f"no step of the anchors of {block} was kept; construct them with keep=[0, ...].")
            real = anchor_inputs(setting, task=task, block=block, count=examples)
            other = anchor_inputs(setting, task=task, block=block, count=examples, skip=examples)
            generator = torch.Generator().manual_seed(seed + 1000 * index)
            noise = real.std() * torch.randn(next(iter(own.kept.values())).shape, generator=generator)
            inputs = {f"step {step}": X for step, X in own.kept.items()} | {"random": noise, "real": other}
            blocks = tuple(m.get_submodule(block) for m in (setting.base, setting.models[index]))
            update = partial(_update, *blocks)
            cone = torch.stack([update(h[None]) for h in real])
            change = torch.cat(
                [b.flatten() - a.flatten() for a, b in zip(*(m.parameters() for m in blocks), strict=True)]
            )
            for kind, X in inputs.items():
                u = update(X)
                rows.append(
                    {
                        **{"block": block, "task": task, "inputs": kind},
                        "cosine": float(F.cosine_similarity(u, change.detach(), dim=0)),
                        "tail": _tail(X),
                        "overlap": subspace_overlap(X, real, share=_LEADING),
                        "cone": projection_energy(u, cone),
                        "norm": float(X.norm(dim=-1).median()),
                    }
                )
    return pd.DataFrame(rows)


def anchor_looks_by_block(looks: pd.DataFrame, value: str) -> dict[str, list[float]]:
    """One column of :func:`anchor_looks`, block by block, as :func:`orthokit.figures.anchor_overlap` takes it.

    Args:
        looks: The rows.
        value: A column of numbers.

    Returns:
        Kind of inputs to the mean over tasks in each block.
    """
    means: Any = looks.groupby(["inputs", "block"], sort=False)[value].mean()
    return {str(kind): means[kind].tolist() for kind in looks["inputs"].unique()}


@dataclass(frozen=True, eq=False, repr=False)
class AnchorTrials:
    """The same small merge with several seeds.

    Args:
        looks: Rows of :func:`anchor_looks` with ``seed`` and ``init``.
        scores: Rows of :func:`anchor_scores` with ``seed`` and ``method``.
        first: Name of the initial inputs in ``looks``.
        last: Of those at the end of construction.
    """

    looks: pd.DataFrame
    scores: pd.DataFrame
    first: str
    last: str

    def __repr__(self) -> str:
        return f"AnchorTrials({self.looks['seed'].nunique()} seeds, {self.last} of construction)"


def anchor_trials(
    seeds: Sequence[int],
    *,
    count: int = 16,
    steps: int = 40,
    epochs: int = 40,
    inits: Sequence[str] = ("weights", "gaussian"),
    examples: int = 16,
    small: bool = False,
) -> AnchorTrials:
    """New experts, new anchors and new merges for each seed, small enough to be repeated.

    Merges are adapted to the anchors of the first of ``inits``, from the pretrained model and from tuned task
    arithmetic, and from there also to the inputs that construction began with, and to real hidden states, as many.

    Args:
        seeds: One of everything each.
        count: Anchors of a block and expert.
        steps: Of construction.
        epochs: Of adaptation.
        inits: Where construction begins.
        examples: As for :func:`anchor_looks`.
        small: As for :func:`orthokit.studies.anchor_experts`, with two steps of training.

    Returns:
        :class:`AnchorTrials`.
    """
    import pandas as pd

    looks, scores, last = [], [], f"step {steps}"
    for seed in seeds:
        setting = anchor_experts(seed=seed, steps=2 if small else None, small=small)
        scale, tuned = tuned_task_arithmetic(setting)
        found = {init: _constructed(setting, count, steps, init, seed) for init in inits}
        looks += [
            anchor_looks(setting, anchors, examples=examples, seed=seed).assign(seed=seed, init=init)
            for init, anchors in found.items()
        ]
        lead = {block: [a for a in own if a is not None] for block, own in found[inits[0]].items()}
        begun = {block: [a.kept[0] for a in own] for block, own in lead.items()}
        real = {
            block: [anchor_inputs(setting, task=task, block=block, count=count) for task in setting.experts]
            for block in lead
        }
        adapted = partial(adapted_to, setting, lead, scale=scale, epochs=epochs, seed=seed)
        trunks: dict[str, State] = {"pretrained": setting.trunk}
        trunks |= {_EXPERT + task: expert.trunk for task, expert in setting.experts.items()}
        trunks |= {
            "task arithmetic": tuned,
            "anchors from pretrained": adapted(start="pretrained", lr=_RATE),
            "anchors": adapted(),
            "initial inputs": adapted(inputs=begun),
            "real inputs": adapted(inputs=real),
        }
        scores.append(anchor_scores(setting, trunks).rename_axis("method").reset_index().assign(seed=seed))
    return AnchorTrials(pd.concat(looks, ignore_index=True), pd.concat(scores, ignore_index=True), "step 0", last)


def anchor_changes(trials: AnchorTrials, *, value: str, init: str, against: str | None = None) -> list[float]:
    """One number a seed: the mean of a column of ``looks`` at the end of construction minus that of other inputs.

    Args:
        trials: The runs.
        value: Column of :func:`anchor_looks`.
        init: Where construction began.
        against: The other inputs: "random", "real"; default the initial ones.

    Returns:
        Differences in the order of seeds.

    Raises:
        UnknownNameError: No such column, init or inputs.
    """
    rows = trials.looks
    columns = tuple(rows.select_dtypes("number").columns)
    if value not in columns:
        raise unknown_name("column", value, columns)
    if init not in set(rows["init"]):
        raise unknown_name("init", init, tuple(rows["init"].unique()))
    other = trials.first if against is None else against
    means = rows[rows["init"] == init].pivot_table(index="seed", columns="inputs", values=value)
    if other not in means:
        raise unknown_name("inputs", other, tuple(means.columns))
    return (means[trials.last] - means[other]).tolist()


@dataclass(frozen=True)
class AnchorQuestion:
    """A claim about what anchors are like that :func:`anchor_trials` decides.

    Args:
        name: Short unique name.
        value: Column of :func:`anchor_looks`.
        against: The inputs they are held against; None: those that construction began with.
        text: The claim, to be put after where construction began.
        lower: Whether the value should be lower at the end, not higher.
        paper: Where it is made; "our question" where no paper says so.
    """

    name: str
    value: str
    against: str | None
    text: str
    lower: bool = False
    paper: str = _PAPER


ANCHOR_QUESTIONS = (
    AnchorQuestion("rise", "cosine", None, "construction brings the induced update nearer to the task vector."),
    AnchorQuestion(
        "real",
        "cosine",
        "real",
        "the induced update ends nearer to the task vector than that of real pictures.",
        paper=_OURS,
    ),
    AnchorQuestion("tail", "tail", None, "construction gives the spectrum a long tail: energy leaves the tail.", True),
    AnchorQuestion("random", "overlap", "random", "anchors overlap real hidden states more than random inputs do."),
    AnchorQuestion("drawn", "overlap", None, "construction draws anchors towards real hidden states."),
    AnchorQuestion("cone", "cone", None, "construction draws the update into the cone of real pictures' updates."),
)
"""What the paper says of anchors, and what else one would ask."""


def anchor_findings(trials: AnchorTrials) -> list[tuple[AnchorQuestion, str, list[float]]]:
    """The questions with what decides them.

    Args:
        trials: The runs.

    Returns:
        Question, where construction began, and one number a seed, above 0 where the claim is right.
    """
    found = []
    for question in ANCHOR_QUESTIONS:
        for init in dict.fromkeys(trials.looks["init"]):
            values = anchor_changes(trials, value=question.value, init=str(init), against=question.against)
            found.append((question, str(init), [-v if question.lower else v for v in values]))
    return found


def anchor_marks(trials: AnchorTrials) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Accuracies of the merges with their intervals over seeds, as :func:`orthokit.figures.merge_scores` takes them.

    Args:
        trials: The runs, of two seeds at least.

    Returns:
        Column (each task, ``average``, ``retained``) to label to ``(mean, low, high)`` in per cent. ``"experts"`` are
        the experts, each on its own task.
    """
    every = [str(name) for name in dict.fromkeys(trials.scores["method"])]
    tasks = [name.removeprefix(_EXPERT) for name in every if name.startswith(_EXPERT)]
    rows: Any = trials.scores.set_index(["method", "seed"])
    own = {task: rows.loc[_EXPERT + task, task] for task in tasks}
    kept = [rows.loc[_EXPERT + task, "retained"] for task in tasks]
    experts = {**own, "mean": sum(own.values()) / len(tasks), "retained": sum(kept) / len(tasks)}
    names = [name for name in every if not name.startswith(_EXPERT)]
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for column in (*tasks, "mean", "retained"):
        marks = {name: mean_interval(100 * rows.loc[name, column]) for name in names}
        found["average" if column == "mean" else column] = marks | {"experts": mean_interval(100 * experts[column])}
    return found


def _duel(name: str, method: str, rival: str, text: str, paper: str = _PAPER) -> Finding:
    return Finding(
        name, text, lambda table, family: merging_margins(table, family, method, rival), (method, rival), paper=paper
    )


_SUM = "anchors from task_arithmetic"
ANCHOR_FINDINGS = (
    _duel("sum", _SUM, "task_arithmetic", "Anchors raise the average of the task arithmetic they start from."),
    _duel("tsv", "anchors from tsv", "tsv", "Anchors raise the average of the TSV-M they start from."),
    _duel("base", "anchors", "task_arithmetic", "Anchors from the pretrained model have a higher average than TA."),
    _duel("closed", _SUM, "fda", "Anchors of blocks, from TA, have a higher average than the closed form.", _OURS),
    _duel("fda-ta", "fda", "task_arithmetic", "FDA in closed form has a higher average than TA."),
    _duel("fda-tsv", "fda", "tsv", "FDA in closed form has a higher average than TSV-M.", _OURS),
    _duel("fda-regmean", "fda", "regmean", "FDA in closed form has a higher average than RegMean.", _OURS),
    _duel("fda-wudi", "fda", "wudi", "FDA in closed form has a higher average than WUDI.", _OURS),
    _duel("fda-iso", "fda", "iso_c", "FDA in closed form has a higher average than Iso-C.", _OURS),
)
"""What the recorded study decides about anchors of whole blocks, and about the closed form for single matrices."""


def anchor_record(table: pd.DataFrame) -> list[tuple[Finding, str, list[float], str]]:
    """What the recorded study of merging says about anchors.

    Args:
        table: The record.

    Returns:
        Finding, family, one difference of average scores a seed (above 0 where the claim is right) and its unit,
        wherever both sides were measured with two seeds or more.
    """
    found = []
    for family in merging_families(table):
        factor, unit = merging_unit(family)
        there = set(table.loc[(table["family"] == family) & (table["kind"] == "tuned"), "method"])
        for finding in ANCHOR_FINDINGS:
            values = [factor * v for v in finding.values(table, family)] if set(finding.needs) <= there else []
            if len(values) > 1:
                found.append((finding, family, values, unit))
    return found


def _constructed(
    setting: AnchorExperts, count: int, steps: int, init: str, seed: int
) -> dict[str, tuple[Anchors | None, ...]]:
    construct = {"count": count, "steps": steps, "init": init, "keep": [0, steps]}
    options: dict[str, Any] = {"blocks": ANCHOR_BLOCKS, "tokens": ANCHOR_TOKENS, "untouched": ["head.*"], "seed": seed}
    # Without a single epoch: the anchors are what is wanted.
    adapt = {"epochs": 0}
    return merge_with_anchors(setting.base, setting.models, construct=construct, adapt=adapt, **options)[1].anchors


def _update(block0: nn.Module, block1: nn.Module, X: Tensor) -> Tensor:
    return torch.cat([value.flatten() for value in induced_update(block0, block1, X).values()])


def _tail(X: Tensor) -> float:
    """The share of energy outside the leading directions."""
    squares = anchor_spectra(X).square()
    leading = max(1, round(_LEADING * X.shape[-1]))
    return float(1 - squares[:leading].sum() / squares.sum())
