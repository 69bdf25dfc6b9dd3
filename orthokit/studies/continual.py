"""Tasks learned one after another: what is forgotten, by method, each at a strength tuned on seeds of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import NonFiniteError, OptionError, unknown_name
from orthokit.lab.continual import ClassSplit, Replay, class_sequence
from orthokit.lab.fisher import Collinearity, fisher_diagonal, rank_one_fisher
from orthokit.lab.input_subspaces import InputSubspaces
from orthokit.lab.models import SmallCNN
from orthokit.lab.projection import GradientProjection, GradientSubspace
from orthokit.lab.racer import Racer
from orthokit.lab.regularisers import EWC, L2SP, Penalties, Penalty, RankOneEWC
from orthokit.studies._engine import Study

__all__ = [
    "CONTINUAL",
    "CONTINUAL_METHODS",
    "CONTINUAL_PROTOCOLS",
    "ContinualMethod",
    "SequenceRun",
    "learn_in_turn",
    "tune_strength",
]

CONTINUAL_PROTOCOLS: dict[str, str] = {
    "shared": "two outputs for all tasks",
    "own": "an output for every class",
}
"""How tasks share the last layer, by name."""

# What every run has: found in trials of plain fine-tuning.
_LR, _WIDTH, _BATCH, _SAMPLES, _SHRINK = 3e-3, 4, 32, 64, 2
#: Examples that replay keeps of each task.
MEMORY = 20
# The order in which classes are dealt decides much: one seed would tune for its own order.
_TUNE_SEEDS = (1000, 1001, 1002)
_MOST_TRIALS = 5


@dataclass
class _Held:
    """What a method keeps of the tasks that were learned."""

    shared: bool
    samples: int
    seed: int
    penalties: list[Penalty] = field(default_factory=list)
    space: InputSubspaces | GradientSubspace | None = None
    readouts: list[Collinearity] = field(default_factory=list)


Consolidate = Callable[[_Held, nn.Module, ClassSplit, float], None]


def _nothing(held: _Held, model: nn.Module, task: ClassSplit, strength: float) -> None:
    pass


def _distance(held: _Held, model: nn.Module, task: ClassSplit, strength: float) -> None:
    held.penalties = [L2SP(model, weight=strength)]


def _diagonal(kind: str) -> Consolidate:
    def consolidate(held: _Held, model: nn.Module, task: ClassSplit, strength: float) -> None:
        fisher = fisher_diagonal(model, task, samples=held.samples, kind=kind, seed=held.seed)
        held.penalties.append(EWC(model, fisher, weight=strength))

    return consolidate


def _rank_one(held: _Held, model: nn.Module, task: ClassSplit, strength: float) -> None:
    fisher = rank_one_fisher(model, task, samples=held.samples, seed=held.seed)
    held.readouts.append(fisher.collinearity)
    held.penalties.append(RankOneEWC(model, fisher, weight=strength))


def _inputs(held: _Held, model: nn.Module, task: ClassSplit, strength: float) -> None:
    space = held.space
    if not isinstance(space, InputSubspaces):
        # With outputs of their own, later tasks leave the rows of earlier ones in the head alone anyway.
        space = InputSubspaces(free=() if held.shared else ("head.*",))
    held.space = space.extend(model, task, samples=held.samples, energy=strength)


def _gradients(held: _Held, model: nn.Module, task: ClassSplit, strength: float) -> None:
    space = held.space if isinstance(held.space, GradientSubspace) else GradientSubspace()
    held.space = space.extend(model, task, samples=int(strength))


@dataclass(frozen=True)
class ContinualMethod:
    """One way not to forget.

    Args:
        label: What figures call it.
        strengths: Values of its one setting that are tried; none if it has none.
        knob: What the setting is.
        consolidate: What it does after a task was learned.
        factor: Further values beyond an end of ``strengths``, this factor apart, are tried while the best lies there;
            0 (default) for a setting with natural ends.
        replay: Share of old examples in the loss: ``None`` (default) none, ``"strength"`` the setting, or a number.
    """

    label: str
    strengths: tuple[float, ...] = ()
    knob: str = ""
    consolidate: Consolidate = _nothing
    factor: float = 0.0
    replay: float | str | None = None


_WEIGHTS = {"knob": "weight", "factor": 10.0}
CONTINUAL_METHODS: dict[str, ContinualMethod] = {
    "plain": ContinualMethod("fine-tuning"),
    "l2sp": ContinualMethod("L2-SP", (0.01, 0.1, 1.0), consolidate=_distance, **_WEIGHTS),
    "ewc_true": ContinualMethod("EWC", (10.0, 100.0, 1000.0), consolidate=_diagonal("true"), **_WEIGHTS),
    "ewc_empirical": ContinualMethod(
        "EWC, empirical", (10.0, 100.0, 1000.0), consolidate=_diagonal("empirical"), **_WEIGHTS
    ),
    "rank_one": ContinualMethod("rank-1 EWC", (0.1, 1.0, 10.0), consolidate=_rank_one, **_WEIGHTS),
    "inputs": ContinualMethod("GPM", (0.8, 0.95, 0.99), "energy", _inputs),
    "gradients": ContinualMethod("OGD", (10.0, 30.0, 100.0), "examples", _gradients),
    "replay": ContinualMethod("replay", (0.25, 0.5, 0.75), "share", replay="strength"),
    "ewc_replay": ContinualMethod(
        "EWC + replay", (1.0, 10.0, 100.0), consolidate=_diagonal("true"), replay=0.5, **_WEIGHTS
    ),
    "rank_one_replay": ContinualMethod(
        "rank-1 EWC + replay", (0.1, 1.0, 10.0), consolidate=_rank_one, replay=0.5, **_WEIGHTS
    ),
}
"""What is compared, by name."""


@dataclass(frozen=True, eq=False)
class SequenceRun:
    """What :func:`learn_in_turn` gives.

    Args:
        errors: Error rate on task ``k`` after task ``t``, shape ``(T, T)``; NaN above the diagonal.
        readouts: Collinearity of the gradients after each task but the last, for methods that look at it.
    """

    errors: Tensor
    readouts: tuple[Collinearity, ...]


def learn_in_turn(
    tasks: Sequence[ClassSplit], method: str, *, strength: float = 0.0, steps: int = 40, seed: int = 0
) -> SequenceRun:
    """A small convolutional network that learns tasks one after another, by one method against forgetting.

    Args:
        tasks: At least two, all with the same kind of head.
        method: A name in :data:`CONTINUAL_METHODS`.
        strength: Its setting.
        steps: Steps a task, ``>= 1``; default 40.
        seed: Of the initial weights and of what the method draws.

    Returns:
        The :class:`SequenceRun`. A run that diverges errs by chance, in half of the cases, on all tasks from then on.

    Raises:
        UnknownNameError: No such method.
        OptionError: Fewer than two tasks.

    Example:
        >>> run = learn_in_turn(class_sequence("digits", parts=5)[:2], "plain", steps=1)
        >>> run.errors.shape
        torch.Size([2, 2])

    Numerics:
        AdamW with a fresh state for every task, at one rate for all methods, cosine schedule after a short warm-up,
        gradients clipped to norm 1.
    """
    if method not in CONTINUAL_METHODS:
        raise unknown_name("method", method, CONTINUAL_METHODS)
    if len(tasks) < 2:
        raise OptionError(f"forgetting needs at least two tasks; got {len(tasks)}.")
    way, model = CONTINUAL_METHODS[method], SmallCNN(width=_WIDTH, seed=seed)
    held = _Held(shared=tasks[0].head == "shared", samples=min(_SAMPLES, 4 * steps), seed=seed)
    errors = torch.full((len(tasks), len(tasks)), math.nan)
    for k, task in enumerate(tasks):
        try:
            _learn(model, task, tasks[:k], way, held, strength, steps)
            found = [one.evaluate(model)["test_error"] for one in tasks[: k + 1]]
        except NonFiniteError:
            found = None
        if found is None:
            errors[k:] = torch.where(torch.ones_like(errors).tril().bool(), 0.5, math.nan)[k:]
            break
        errors[k, : k + 1] = torch.tensor(found)
        if k + 1 < len(tasks):
            way.consolidate(held, model, task, strength)
    return SequenceRun(errors, tuple(held.readouts))


def _learn(
    model: nn.Module,
    task: ClassSplit,
    before: Sequence[ClassSplit],
    way: ContinualMethod,
    held: _Held,
    strength: float,
    steps: int,
) -> None:
    course: ClassSplit | Replay = task
    if before and way.replay is not None:
        share = strength if way.replay == "strength" else float(way.replay)
        course = Replay(task, before, share=share, memory=MEMORY, seed=held.seed)
    racer = Racer(
        model,
        course,
        torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0),
        steps=steps,
        penalty=Penalties(held.penalties) if held.penalties else None,
        project=GradientProjection(held.space) if held.space is not None else None,
    )
    for _ in range(steps):
        racer.advance()


def tune_strength(
    protocol: str,
    method: str,
    *,
    steps: int = 40,
    seeds: Sequence[int] = _TUNE_SEEDS,
    trials: int = _MOST_TRIALS,
) -> dict[float, float]:
    """What a method reaches at several strengths, tried until the best lies inside.

    Args:
        protocol: A name in :data:`CONTINUAL_PROTOCOLS`.
        method: A name in :data:`CONTINUAL_METHODS`.
        steps: Steps a task.
        seeds: Of everything; none of those that are compared.
        trials: Strengths at most.

    Returns:
        Strength to the error at the end, its mean over tasks and seeds; empty for a method without a setting.

    Raises:
        UnknownNameError: No such protocol or method.
    """
    way, courses = CONTINUAL_METHODS[method], {seed: _tasks(protocol, seed) for seed in seeds}
    found: dict[float, float] = {}
    todo = list(way.strengths[:trials])
    while todo:
        for strength in todo:
            runs = [
                learn_in_turn(tasks, method, strength=strength, steps=steps, seed=seed)
                for seed, tasks in courses.items()
            ]
            found[strength] = float(torch.stack([run.errors[-1] for run in runs]).mean())
        best, todo = min(found, key=found.__getitem__), []
        if way.factor and len(found) < trials:
            todo = [best * way.factor] if best == max(found) else [best / way.factor] if best == min(found) else []
    return found


def _tasks(protocol: str, seed: int) -> list[ClassSplit]:
    if protocol not in CONTINUAL_PROTOCOLS:
        raise unknown_name("protocol", protocol, CONTINUAL_PROTOCOLS)
    return class_sequence("fashion", parts=5, head=protocol, batch=_BATCH, seed=seed, shrink=_SHRINK)


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    small = size == "smoke"
    shape = {"seeds": seeds, "steps": 2 if small else 40, "trials": 1 if small else _MOST_TRIALS}
    methods = ("plain", "rank_one") if small else tuple(CONTINUAL_METHODS)
    return [{"protocol": p, "method": m, **shape} for p in CONTINUAL_PROTOCOLS for m in methods]


def _measure(unit: dict[str, Any]) -> list[dict[str, Any]]:
    """Tunes a method, then runs it at its best strength with other seeds."""
    protocol, method, steps = unit["protocol"], unit["method"], unit["steps"]
    blank = {"strength": math.nan, "after": -1, "task": -1, "cosine": math.nan, "top_share": math.nan}
    blank |= {"protocol": protocol, "method": method, "mean_share": math.nan, "error": math.nan}
    trials = tune_strength(protocol, method, steps=steps, trials=unit["trials"])
    rows = [
        {**blank, "kind": "trial", "seed": -1, "strength": strength, "error": error}
        for strength, error in sorted(trials.items())
    ]
    strength = min(trials, key=trials.__getitem__) if trials else 0.0
    for seed in range(unit["seeds"]):
        run = learn_in_turn(_tasks(protocol, seed), method, strength=strength, steps=steps, seed=seed)
        mine = {**blank, "seed": seed, "strength": strength}
        for after, row in enumerate(run.errors.tolist()):
            rows += [
                {**mine, "kind": "run", "after": after, "task": task, "error": error}
                for task, error in enumerate(row[: after + 1])
            ]
        for after, said in enumerate(run.readouts):
            shares = {"cosine": said.cosine, "top_share": said.top_share, "mean_share": said.mean_share}
            rows.append({**mine, "kind": "collinearity", "after": after, **shares})
    return rows


CONTINUAL = Study(
    name="continual",
    question="Which method forgets least when tasks are learned one after another, and what does it cost in learning?",
    units=_units,
    measure=_measure,
    seeds=5,
    depends=lambda unit: (
        "studies/continual.py",
        "lab/continual.py",
        "lab/example_gradients.py",
        "lab/fisher.py",
        "lab/input_subspaces.py",
        "lab/projection.py",
        "lab/regularisers.py",
        "lab/racer.py",
        "lab/models.py",
        "lab/images.py",
        "lab/schedules.py",
        "lab/tasks.py",
    ),
)
