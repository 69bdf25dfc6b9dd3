"""The optimizer race: every contestant on two tasks, each at the learning rate that suits it, on the same batches."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orthokit.errors import NonFiniteError, unknown_name
from orthokit.lab.contestants import contestant
from orthokit.lab.models import SmallCNN, TinyGPT
from orthokit.lab.racer import Racer
from orthokit.lab.tasks import Task, image_classification, language_modelling

__all__ = ["TRACKS", "Track", "enter", "measure_race", "next_rate", "race_once"]

_YARDSTICK = "adamw"
_FACTOR = 2.0


@dataclass(frozen=True)
class Track:
    """What is raced on.

    Args:
        label: What figures call it.
        steps: Length of a run of the recorded study.
        rest_lr: Learning rate of the AdamW that has what is no matrix; near AdamW's own best in short trials on other
            seeds.
        loss: Key of the task's evaluation that is raced for, and its ``unit``.
        unit: Unit of the loss.
        error: Key of a second figure, or ``""``.
        sample: What a batch is made of, and how many a step, ``samples``.
    """

    label: str
    steps: int
    rest_lr: float
    loss: str
    unit: str
    error: str
    sample: str
    samples: int


TRACKS: dict[str, Track] = {
    "tinygpt": Track(
        label="TinyGPT on the addresses",
        steps=400,
        rest_lr=6e-3,
        loss="validation_bits_per_byte",
        unit="bits per byte",
        error="",
        sample="bytes",
        samples=512,
    ),
    "cnn": Track(
        label="CNN on the garments",
        steps=300,
        rest_lr=2e-2,
        loss="test_loss",
        unit="nats",
        error="test_error",
        sample="images",
        samples=64,
    ),
}


def _model_and_task(track: str, seed: int, small: bool) -> tuple[nn.Module, Task]:
    """The fresh model and the data of a seed; rivals of one seed get the same of both."""
    if track == "cnn":
        width, batch = (4, 8) if small else (8, TRACKS[track].samples)
        return SmallCNN(width=width, seed=seed), image_classification("fashion", batch=batch, seed=seed)
    context, batch, windows = (16, 2, 4) if small else (64, TRACKS[track].samples // 64, 256)
    model = TinyGPT("0.2M", seed=seed, **({"layers": 1} if small else {}))
    return model, language_modelling("addresses", context=context, batch=batch, seed=seed, validation_windows=windows)


def enter(
    track: str,
    name: str,
    *,
    lr: float,
    seed: int,
    steps: int | None = None,
    rest_lr: float | None = None,
    small: bool = False,
) -> Racer:
    """A contestant at the start of a track, ready to :meth:`~orthokit.lab.Racer.advance`.

    Args:
        track: ``"tinygpt"`` or ``"cnn"``.
        name: One of :func:`orthokit.lab.contestants`.
        lr: Its learning rate.
        seed: Of the initial weights and of the batches, so that rivals of one seed share both.
        steps: Length of the run, which the schedule needs; default the track's.
        rest_lr: Learning rate of the AdamW that has what is no matrix; default the track's.
        small: A much smaller model and batch, for tests.

    Returns:
        The racer: cosine schedule to zero after a warm-up over a twentieth of the run, gradients clipped to norm 1.

    Raises:
        UnknownNameError: No such track or contestant.

    Example:
        >>> racer = enter("cnn", "lion", lr=1e-3, seed=0, steps=2, small=True)
        >>> racer.advance() > 0
        True
    """
    if track not in TRACKS:
        raise unknown_name("track", track, TRACKS)
    model, task = _model_and_task(track, seed, small)
    rest = TRACKS[track].rest_lr if rest_lr is None else rest_lr
    optimizer = contestant(name, model, lr=lr, rest_lr=rest)
    return Racer(model, task, optimizer, steps=TRACKS[track].steps if steps is None else steps)


def race_once(
    track: str,
    name: str,
    *,
    lr: float,
    seed: int,
    steps: int | None = None,
    evaluations: int = 20,
    rest_lr: float | None = None,
    small: bool = False,
) -> list[dict[str, Any]]:
    """One run of one contestant.

    Args:
        track: Where; see :func:`enter`.
        name: Who.
        lr: Learning rate.
        seed: Seed of weights and data.
        steps: Length; default the track's.
        evaluations: Evaluations after the one at the start, ``>= 1``.
        rest_lr: See :func:`enter`.
        small: See :func:`enter`.

    Returns:
        Rows ``track, name, lr, seed, step, value, error, seconds``: held-out loss, error rate (NaN where there is
        none) and processor seconds of training so far, evaluations excluded. A run that diverges goes on with NaN.
    """
    racer = enter(track, name, lr=lr, seed=seed, steps=steps, rest_lr=rest_lr, small=small)
    length = racer.shape["steps"]
    due = sorted({round(length * k / evaluations) for k in range(evaluations + 1)})
    rows, alive = [], True
    for step in range(length + 1):
        if step in due:
            found = racer.evaluate() if alive else {}
            value = found.get(TRACKS[track].loss, math.nan)
            rows.append(
                {
                    **{"track": track, "name": name, "lr": lr, "seed": seed, "step": step},
                    "value": value if math.isfinite(value) else math.nan,
                    "error": found.get(TRACKS[track].error, math.nan),
                    "seconds": racer.seconds,
                }
            )
        if alive and step < length:
            try:
                racer.advance()
            except NonFiniteError:
                alive = False
    return rows


def next_rate(scores: dict[float, float], *, factor: float = _FACTOR) -> float | None:
    """The learning rate to try next so that the best one lies inside the grid.

    Args:
        scores: Learning rate to mean final loss; NaN or infinity where a run diverged.
        factor: Ratio between neighbours.

    Returns:
        A rate beyond the edge at which the best one lies, or ``None`` when it lies inside.

    Example:
        >>> next_rate({0.1: 3.0, 0.2: 2.0, 0.4: 2.5}), next_rate({0.1: 3.0, 0.2: 2.0})
        (None, 0.4)
    """
    rates = sorted(scores)
    best = _best(scores)
    if best == rates[0]:
        return rates[0] / factor
    return rates[-1] * factor if best == rates[-1] else None


def _best(scores: dict[float, float]) -> float:
    # All diverged: the lowest rate, so that the grid is widened downwards.
    return min(sorted(scores), key=lambda lr: scores[lr] if math.isfinite(scores[lr]) else math.inf)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processor time is that of one thread; it is the cost of a step only if there is no other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tune(unit: dict[str, Any], options: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """The best learning rate on the tuning seeds, and the final rows of all that were tried."""
    scores: dict[float, float] = {}
    rows: list[dict[str, Any]] = []
    waiting = list(unit["rates"])
    while waiting:
        lr = waiting.pop(0)
        final = [race_once(lr=lr, seed=seed, **options)[-1] for seed in unit["tuning_seeds"]]
        rows += [{"kind": "tune", **row} for row in final]
        scores[lr] = statistics.fmean(row["value"] for row in final)
        if not waiting and len(scores) < len(unit["rates"]) + unit["extensions"]:
            further = next_rate(scores)
            waiting += [] if further is None else [further]
    return _best(scores), rows


def _cost(unit: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Processor time of a step beside one of AdamW, in turns, so that what else the machine does hits both alike."""
    length = unit["cost_steps"]
    pair = [
        enter(unit["track"], name, lr=lr, seed=0, **{**options, "steps": length})
        for name, lr in ((unit["name"], unit["rates"][1]), (_YARDSTICK, unit["yardstick_rate"]))
    ]
    times: list[list[tuple[float, float]]] = [[], []]
    for _ in range(length):
        for racer, seen in zip(pair, times, strict=True):
            before = racer.seconds, racer.update_seconds
            racer.advance()
            seen.append((racer.seconds - before[0], racer.update_seconds - before[1]))
    warm = [seen[length // 5 :] for seen in times]  # the first steps allocate state and fill caches
    step, yardstick = (statistics.median(total for total, _ in seen) for seen in warm)
    return {
        **{"kind": "cost", "track": unit["track"], "name": unit["name"], "step": len(warm[0])},
        "step_ms": 1e3 * step,
        "update_ms": 1e3 * statistics.median(update for _, update in warm[0]),
        "ratio": step / yardstick,
    }


def measure_race(unit: dict[str, Any]) -> list[dict[str, Any]]:
    """Cost, tuning, the race over equal steps and, shortened or lengthened by the cost, the race over equal time."""
    options = {key: unit[key] for key in ("small", "rest_lr")}
    running = {**options, **{key: unit[key] for key in ("track", "name", "evaluations")}}
    with _one_thread():
        cost = _cost(unit, options)
        best, rows = _tune(unit, {**running, "steps": unit["steps"], "evaluations": 1})
        lengths = {"race": unit["steps"]}
        if unit["name"] != _YARDSTICK:
            lengths["timed"] = max(1, round(unit["steps"] / cost["ratio"]))
        for kind, steps in lengths.items():
            for seed in unit["seeds"]:
                rows += [{"kind": kind, **row} for row in race_once(lr=best, seed=seed, steps=steps, **running)]
    return [cost, *rows]
