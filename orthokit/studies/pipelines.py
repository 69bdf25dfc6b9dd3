"""Momentum before the polar factor, after it, or none: the three raced on a real language-modelling task."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthokit.lab.fit import fit
from orthokit.lab.models import TinyGPT
from orthokit.lab.tasks import language_modelling
from orthokit.optim.routing import for_model
from orthokit.studies._engine import Study

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ORDERS", "PIPELINES", "best_lr", "final_values", "race", "train_pipeline"]

ORDERS = ("pre", "post", "none")
_METRIC = "validation_bits_per_byte"


def train_pipeline(
    order: str,
    *,
    lr: float,
    seed: int,
    steps: int,
    size: str = "0.2M",
    batch: int = 8,
    context: int = 128,
    momentum: float = 0.95,
    windows: int = 128,
    evaluations: int = 6,
    root: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One run of one pipeline: TinyGPT on the addresses, Nesterov off, as the theory has it.

    Only the order differs between pipelines: the same initial weights, data, schedule (warm-up, stable, decay) and
    AdamW for embedding, head and norms.

    Args:
        order: ``"pre"``, ``"post"`` or ``"none"``.
        lr: Learning rate of the matrices; the rest has 6e-3 throughout.
        seed: Of the initial weights and of the data.
        steps: Length of the run.
        size: Size of the model; default ``"0.2M"``.
        batch: Windows a step; default 8.
        context: Bytes of a window; default 128.
        momentum: Default 0.95.
        windows: Validation windows; default 128.
        evaluations: Evaluations after the start; default 6.
        root: Folder of runs; default a temporary one that is removed.
        progress: Show a progress line.

    Returns:
        Rows ``order, lr, seed, step, value``: validation bits per byte.
    """
    model = TinyGPT(size, seed=seed)
    optimizer = for_model(
        model, "muon", lr=lr, fallback_lr=6e-3, weight_decay=0.0, momentum=momentum, nesterov=False, order=order
    )
    task = language_modelling("addresses", context=context, batch=batch, seed=seed, validation_windows=windows)
    with tempfile.TemporaryDirectory() as scratch:
        run = fit(
            model,
            task,
            optimizer,
            steps=steps,
            schedule="wsd",
            warmup=min(10, steps),
            clip=1.0,
            evaluate_every=max(1, steps // evaluations),
            run=f"{order}-lr{lr:g}-seed{seed}",
            root=scratch if root is None else root,
            config={"order": order, "momentum": momentum, "model_seed": seed},
            progress=progress,
        )
        at, values = run.series(_METRIC)
    key = {"order": order, "lr": lr, "seed": seed}
    return [{**key, "step": int(step), "value": float(value)} for step, value in zip(at, values, strict=True)]


def race(
    lrs: Mapping[str, float],
    *,
    seeds: Sequence[int],
    steps: int,
    root: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Every pipeline at its own learning rate on every seed.

    Args:
        lrs: Learning rate per order.
        seeds: The seeds, shared by the pipelines, so that differences are paired.
        steps: Length of each run.
        root: Folder of runs; default a temporary one.
        **options: Options of :func:`train_pipeline`.

    Returns:
        Columns ``order, lr, seed, step, value``.
    """
    import pandas as pd

    return pd.DataFrame(
        row
        for order, lr in lrs.items()
        for seed in seeds
        for row in train_pipeline(order, lr=lr, seed=seed, steps=steps, root=root, **options)
    )


def final_values(table: pd.DataFrame) -> pd.DataFrame:
    """The last value of every run, one row a seed, one column an (order, lr)."""
    last = table[table["step"] == table["step"].max()]
    return last.pivot(index="seed", columns=["order", "lr"], values="value")


def best_lr(table: pd.DataFrame) -> dict[str, float]:
    """For each order the learning rate with the lowest mean final value over the seeds."""
    means = final_values(table).mean()
    best: dict[str, tuple[float, float]] = {}
    for (order, lr), value in means.items():  # type: ignore[misc]
        best[order] = min(best.get(order, (float("inf"), 0.0)), (float(value), float(lr)))
    return {order: lr for order, (_, lr) in best.items()}


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    if size == "smoke":
        rates: Iterable[float] = (1e-2,)
        common: dict[str, Any] = {"steps": 4, "batch": 2, "context": 32, "windows": 4, "evaluations": 2}
    else:
        rates = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
        common = {"steps": 300, "batch": 8, "context": 128, "windows": 128, "evaluations": 6}
    return [
        {"order": order, "lr": lr, "seed": seed, **common} for seed in range(seeds) for order in ORDERS for lr in rates
    ]


def _measure(unit: dict[str, Any]) -> list[dict[str, Any]]:
    options = dict(unit)
    return train_pipeline(options.pop("order"), progress=False, **options)


PIPELINES = Study(
    name="pipelines",
    question="Momentum before the polar factor, after it, or none: which trains TinyGPT best, each at its best rate?",
    units=_units,
    measure=_measure,
    seeds=5,
)
