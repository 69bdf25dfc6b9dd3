"""Adapters side by side: real models and tasks, one number of trainable parameters, one optimizer."""

from __future__ import annotations

import math
from typing import Any

from orthokit.adapters.base import PartConfig
from orthokit.errors import NonFiniteError
from orthokit.lab.arena import GROUNDS, METHODS, Ground, Method, budget_settings, enter
from orthokit.lab.arena.grounds import figures_at_start, judged
from orthokit.studies.adapter_geometry import what_is_kept

__all__ = ["ADAPTER_METHODS", "ADAPTER_TRACKS", "adapt_once", "adapter_budget"]

ADAPTER_METHODS: dict[str, Method] = {name: METHODS[name] for name in ("full", "lora", "dora", "oft", "boft", "hra")}
"""Who is compared, by name."""
ADAPTER_TRACKS: dict[str, Ground] = {name: GROUNDS[name] for name in ("tinygpt", "noun", "verb")}
"""What they are compared on, by name."""


def adapter_budget(track: str, scale: float = 1.0) -> dict[str, tuple[int, int]]:
    """:func:`orthokit.lab.arena.budget_settings` of those compared."""
    found = budget_settings(track, scale)
    return {name: found[name] for name in ADAPTER_METHODS}


def adapt_once(
    track: str,
    method: str | PartConfig,
    *,
    lr: float,
    seed: int,
    evaluations: int = 1,
    kept: bool = False,
    other: bool = True,
    **options: Any,
) -> list[dict[str, float]]:
    """One fine-tuning.

    Args:
        track: See :func:`orthokit.lab.arena.enter`.
        method: See :func:`orthokit.lab.arena.enter`.
        lr: See :func:`orthokit.lab.arena.enter`.
        seed: See :func:`orthokit.lab.arena.enter`.
        evaluations: Evaluations after the start, ``>= 1``.
        kept: Add what is kept to the last row; see :func:`what_is_kept`.
        other: Evaluate what the model could do before, at the start and at the end; default ``True``.
        **options: ``size``, ``steps`` and ``small`` of :func:`orthokit.lab.arena.enter`.

    Returns:
        Rows ``step, value, error, other, seconds``: held-out loss, error rate (NaN where there is none), what the model
        could do before, and processor seconds of training so far. A run that diverges goes on with NaN.
    """
    racer = enter(track, method, lr=lr, seed=seed, **options)
    small = bool(options.get("small", False))
    length = racer.shape["steps"]
    due = sorted({round(length * k / evaluations) for k in range(evaluations + 1)})
    rows: list[dict[str, float]] = []
    alive = True
    for step in range(length + 1):
        if step in due:
            found = {}
            if step == 0:
                found = figures_at_start(track, small)
            elif alive:
                found = judged(track, racer.model, small, other and step == length)
            named = {"value": "target", "error": "error", "other": "general"}
            figures = {key: found.get(name, math.nan) for key, name in named.items()}
            rows.append({"step": step, **figures, "seconds": racer.seconds})
        if alive and step < length:
            try:
                racer.advance()
            except NonFiniteError:
                alive = False
    if kept and alive:
        rows[-1] |= what_is_kept(racer.model)
    return rows
