"""One run of the arena: fine-tuning, what it scores along the way, what it did to the model, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from orthokit.errors import NonFiniteError, OptionError
from orthokit.lab.arena import portraits
from orthokit.lab.arena.entry import Entered, entered
from orthokit.lab.arena.grounds import figures_at_start, judged
from orthokit.lab.arena.rewinding import ALPHAS, walked

__all__ = ["compete"]

Row = dict[str, Any]


def compete(
    ground: str,
    method: str,
    *,
    lr: float,
    seed: int,
    evaluations: int = 1,
    portrait: bool = False,
    paths: bool | Sequence[str] = False,
    alphas: Sequence[float] = ALPHAS,
    size: int | None = None,
    steps: int | None = None,
    small: bool = False,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """One fine-tuning, judged on what was learnt and on what was forgotten; all scores are losses.

    Args:
        ground: One of the grounds.
        method: One of the methods.
        lr: Learning rate, ``> 0``.
        seed: Of the batches and of what the method draws.
        evaluations: Evaluations after the start, ``>= 1``; default 1, at the end.
        portrait: Add the diagnostics of the finished model; see :func:`orthokit.lab.arena.portrait`.
        paths: Add the way back: ``True`` for all paths that the model has, or some by name; see
            :func:`orthokit.lab.arena.rewound`.
        alphas: Places on the paths; default 0, 0.1, ..., 1.
        size: Size of the method; default that of the budget.
        steps: Length; default the ground's.
        small: See :func:`orthokit.lab.arena.enter`.
        on_row: Called with each evaluation as it is made, for those who watch.

    Returns:
        Rows with ``kind, ground, method, size, trainable, lr, seed, step``. ``kind="run"`` at the start and at each
        evaluation: ``target, error, general``, on some grounds ``geometry``, and ``seconds`` of processor time spent on
        training; the last one with the diagnostics. ``"layer"`` and ``"profile"``: the rows of the portrait;
        ``"path"``: ``path, alpha, target, general``. A run that diverges goes on with NaN and has only rows of the
        first kind.

    Raises:
        UnknownNameError: No such ground, method or path.
        OptionError: A number out of range.
        MissingExtraError: A package is not installed.

    Example:
        >>> rows = compete("tinygpt", "lora", lr=1e-2, seed=0, steps=2, small=True)
        >>> [row["step"] for row in rows], all(row["general"] > 0 for row in rows)
        ([0, 2], True)
    """
    if evaluations < 1:
        raise OptionError(f"evaluations must be at least 1; got {evaluations}.")
    started = entered(ground, method, lr=lr, seed=seed, size=size, steps=steps, small=small)
    common = {"ground": ground, "method": method, "size": started.size, "trainable": started.trainable}
    common |= {"lr": lr, "seed": seed}

    def seen(row: Row) -> None:
        if on_row is not None:
            on_row({"kind": "run", **common, **row})

    rows, alive = _trained(ground, started, evaluations, small, seen)
    length, extra = rows[-1]["step"], []
    if alive and portrait:
        found = portraits.portrait(ground, started.racer.model, small=small)
        rows[-1] |= found.summary
        extra += [{"kind": "layer", **row} for row in found.layers]
        extra += [{"kind": "profile", **row} for row in found.profiles]
    if alive and paths:
        options: dict[str, Any] = {"alphas": alphas, "paths": None if paths is True else paths, "small": small}
        end = {key: rows[-1][key] for key in ("target", "general")}
        walk = walked(ground, started.racer.model, known={1.0: end}, **options)
        extra += [{"kind": "path", **row} for row in walk]
    return [{"kind": row.pop("kind", "run"), **common, "step": row.pop("step", length), **row} for row in rows + extra]


def _trained(
    ground: str, started: Entered, evaluations: int, small: bool, seen: Callable[[Row], None]
) -> tuple[list[Row], bool]:
    racer = started.racer
    length = racer.shape["steps"]
    due = sorted({round(length * k / evaluations) for k in range(evaluations + 1)})
    rows: list[Row] = []
    begun = figures_at_start(ground, small)
    found, alive = begun, True
    for step in range(length + 1):
        if step in due:
            if step > 0:
                found = judged(ground, racer.model, small) if alive else {}
                # A loss may overflow before a gradient does.
                alive = alive and math.isfinite(found["target"]) and math.isfinite(found["general"])
            figures = {key: found.get(key, math.nan) if alive else math.nan for key in begun}
            rows.append({"step": step, **figures, "seconds": racer.seconds})
            seen(rows[-1])
        if alive and step < length:
            try:
                racer.advance()
            except NonFiniteError:
                alive = False
    return rows, alive
