"""Momentum before the polar factor, after it, or none: the three raced on a real language-modelling task."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orthokit.lab.fit import fit
from orthokit.lab.models import TinyGPT
from orthokit.lab.tasks import language_modelling
from orthokit.optim.muon import ORDERS
from orthokit.optim.routing import for_model
from orthokit.studies._engine import Study

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ORDERS",
    "PIPELINES",
    "at_rates",
    "best_lr",
    "compare_optimizers",
    "curves",
    "final_values",
    "race",
    "rate_curves",
    "train_pipeline",
    "train_tinygpt",
]

_METRIC = "validation_bits_per_byte"


def train_tinygpt(
    key: Mapping[str, Any],
    make_optimizer: Callable[[TinyGPT], torch.optim.Optimizer],
    *,
    seed: int,
    steps: int,
    size: str = "0.2M",
    batch: int = 8,
    context: int = 128,
    windows: int = 128,
    evaluations: int = 6,
    root: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One recorded run of TinyGPT on the addresses, warm-up, stable, decay.

    Args:
        key: What names the run among its rivals; becomes columns of the rows and part of the run's name.
        make_optimizer: Makes the optimizer of the fresh model.
        seed: Of the initial weights and of the data, so that rivals see the same of both.
        steps: Length of the run.
        size: Size of the model; default ``"0.2M"``.
        batch: Windows a step; default 8.
        context: Bytes of a window; default 128.
        windows: Validation windows; default 128.
        evaluations: Evaluations after the start; default 6.
        root: Folder of runs; default a temporary one that is removed.
        progress: Show a progress line.

    Returns:
        Rows ``*key, seed, step, value``: validation bits per byte.
    """
    model = TinyGPT(size, seed=seed)
    task = language_modelling("addresses", context=context, batch=batch, seed=seed, validation_windows=windows)
    with tempfile.TemporaryDirectory() as scratch:
        run = fit(
            model,
            task,
            make_optimizer(model),
            steps=steps,
            schedule="wsd",
            warmup=min(10, steps),
            clip=1.0,
            evaluate_every=max(1, steps // evaluations),
            run="-".join([*map(str, key.values()), f"seed{seed}"]).replace(" ", "-"),
            root=scratch if root is None else root,
            config={**key, "model_seed": seed},
            progress=progress,
        )
        at, values = run.series(_METRIC)
    return [{**key, "seed": seed, "step": int(t), "value": float(v)} for t, v in zip(at, values, strict=True)]


def train_pipeline(order: str, *, lr: float, momentum: float = 0.95, **options: Any) -> list[dict[str, Any]]:
    """One run of one pipeline, Nesterov off, as the theory has it; only the order differs between pipelines.

    Args:
        order: ``"pre"``, ``"post"`` or ``"none"``.
        lr: Learning rate of the matrices; embedding, head and norms have AdamW at 6e-3 throughout.
        momentum: Default 0.95.
        **options: ``seed``, ``steps`` and other options of :func:`train_tinygpt`.

    Returns:
        Rows ``order, lr, seed, step, value``.
    """

    def make(model: TinyGPT) -> torch.optim.Optimizer:
        settings = {"momentum": momentum, "nesterov": False, "order": order, "weight_decay": 0.0}
        return for_model(model, "muon", lr=lr, fallback_lr=6e-3, **settings)

    return train_tinygpt({"order": order, "lr": lr}, make, **options)


def compare_optimizers(
    *, muon_lr: float, adamw_lrs: Sequence[float], seeds: Sequence[int], **options: Any
) -> pd.DataFrame:
    """Muon at one learning rate against AdamW at several, on the same seeds.

    Args:
        muon_lr: Learning rate of Muon, and of the AdamW that has what is no matrix.
        adamw_lrs: Learning rates of AdamW alone.
        seeds: The seeds, shared.
        **options: ``steps`` and other options of :func:`train_tinygpt`.

    Returns:
        Columns ``optimizer, seed, step, value``; ``optimizer`` reads ``"Muon 0.01"``.
    """
    import pandas as pd

    def adamw(lr: float) -> Callable[[TinyGPT], torch.optim.Optimizer]:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    makers: dict[str, Callable[[TinyGPT], torch.optim.Optimizer]] = {
        f"Muon {muon_lr:g}": lambda model: for_model(model, "muon", lr=muon_lr, weight_decay=0.0),
        **{f"AdamW {lr:g}": adamw(lr) for lr in adamw_lrs},
    }
    return pd.DataFrame(
        row
        for label, make in makers.items()
        for seed in seeds
        for row in train_tinygpt({"optimizer": label}, make, seed=seed, **options)
    )


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


def at_rates(table: pd.DataFrame, lrs: Mapping[str, float]) -> pd.DataFrame:
    """The rows of each order at its learning rate in ``lrs``."""
    return table.loc[[lrs.get(order) == lr for order, lr in zip(table["order"], table["lr"], strict=True)]]


def final_values(table: pd.DataFrame, *, by: str = "order") -> pd.DataFrame:
    """The last value of every run, one row a seed, one column for each rival; ``by`` names the column of rivals."""
    last = table.loc[table["step"] == table["step"].max()]
    return last.pivot(index="seed", columns=by, values="value")


def best_lr(table: pd.DataFrame) -> dict[str, float]:
    """For each order the learning rate with the lowest mean final value over the seeds."""
    last = table.loc[table["step"] == table["step"].max()]
    means = last.pivot_table(index="lr", columns="order", values="value", aggfunc="mean")
    return {order: float(means.index[int(means[order].argmin())]) for order in ORDERS if order in means}


def curves(
    table: pd.DataFrame, *, by: str = "order", across: str = "step"
) -> dict[str, tuple[list[float], list[list[float]]]]:
    """For each rival the values of ``across`` and one row of results a seed: what ``figures.loss_curves`` draws.

    Args:
        table: Columns ``seed``, ``value`` and the two below.
        by: Column of the rivals.
        across: Column of the horizontal axis.

    Returns:
        Label to ``(across, values)``, in order of appearance.
    """
    result = {}
    for label in table[by].unique():
        rows = table.loc[table[by] == label].pivot(index="seed", columns=across, values="value")
        result[str(label)] = (list(rows.columns), rows.to_numpy().tolist())
    return result


def rate_curves(table: pd.DataFrame) -> dict[str, tuple[list[float], list[list[float]]]]:
    """Final value against learning rate, one row a seed, for each order."""
    return curves(table.loc[table["step"] == table["step"].max()], across="lr")


# Four rates a pipeline, a factor of two apart, around where each was best in shorter runs: the step of `pre` adds up
# over its window while that of `none` wanders, so one grid for all would favour whichever it was centred on.
_RATES = {
    "pre": (2.5e-3, 5e-3, 1e-2, 2e-2),
    "post": (1e-2, 2e-2, 4e-2, 8e-2),
    "none": (5e-3, 1e-2, 2e-2, 4e-2),
}


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"steps": 1000, "batch": 8, "context": 64, "windows": 256, "evaluations": 5}
    rates: Mapping[str, Sequence[float]] = _RATES
    if size == "smoke":
        common |= {"steps": 4, "batch": 2, "context": 32, "windows": 4, "evaluations": 2}
        rates = {order: choices[1:2] for order, choices in _RATES.items()}
    return [
        {"order": order, "lr": lr, "seed": seed, **common}
        for seed in range(seeds)
        for order in ORDERS
        for lr in rates[order]
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
