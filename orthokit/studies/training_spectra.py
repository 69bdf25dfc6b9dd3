"""Small language models trained from their first step, the spectra of their matrices looked at on the way."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orthokit.diagnostics import Monitor
from orthokit.diagnostics.inspection import COLUMNS, Inspection, inspect
from orthokit.diagnostics.tail import tail_fit
from orthokit.errors import unknown_name
from orthokit.lab.contestants import CONTESTANTS, contestant
from orthokit.lab.fit import fit
from orthokit.lab.models import TinyGPT
from orthokit.lab.tasks import language_modelling
from orthokit.studies.representation import OPTIMIZER_RATES

__all__ = [
    "SpectraAlong",
    "monitor_differences",
    "spectra_along_training",
    "training_changes",
    "training_curves",
]

# Of what is no matrix, where an optimizer for matrices trains the rest.
_REST_LR = 6e-3
_BITS = "validation_bits_per_byte"
_WATCHED = ("stable_rank", "effective_rank", "condition", "orthogonality_error", "edge", "alpha")
_RECORDED = (*_WATCHED[:4], "mp_edge", "above_edge", "alpha")


@dataclass(frozen=True, eq=False, repr=False)
class SpectraAlong:
    """Trainings whose matrices were looked at on the way.

    Args:
        looks: By optimizer, seed and step, what was seen of every matrix.
        bits: By the same, bits per byte of held-out text.
    """

    looks: dict[tuple[str, int, int], Inspection]
    bits: dict[tuple[str, int, int], float]

    @property
    def steps(self) -> list[int]:
        """The steps of the looks."""
        return sorted({step for _, _, step in self.looks})

    def __repr__(self) -> str:
        optimizers = list(dict.fromkeys(optimizer for optimizer, _, _ in self.looks))
        seeds = len({seed for _, seed, _ in self.looks})
        return f"SpectraAlong({' and '.join(optimizers)}, {seeds} seeds, steps {self.steps})"


def spectra_along_training(
    optimizers: Sequence[str] = ("adamw", "muon_pre"),
    *,
    seeds: Sequence[int],
    steps: int = 160,
    size: str = "1M",
    layers: int = 2,
    context: int = 64,
    batch: int = 8,
    windows: int = 64,
) -> SpectraAlong:
    """TinyGPT trained on the addresses from its first step, its matrices looked at on the way.

    Looks are at step 0, at an eighth, a quarter, a half and three quarters of the run, and at its end.

    Args:
        optimizers: Some of :data:`~orthokit.studies.representation.OPTIMIZER_RATES`.
        seeds: Of initial weights and batches, so that rivals share both.
        steps: Length of a run, ``>= 1``; default 160.
        size: Of the model; default ``"1M"``, 128 wide.
        layers: Its blocks; default 2.
        context: Bytes of a window; default 64.
        batch: Windows a step; default 8.
        windows: Held-out windows; default 64.

    Returns:
        :class:`SpectraAlong`.

    Raises:
        UnknownNameError: No such optimizer or size.

    Example:
        >>> tiny = {"size": "0.2M", "layers": 1, "context": 8, "batch": 1, "windows": 2}
        >>> found = spectra_along_training(["adamw"], seeds=[0], steps=1, **tiny)
        >>> found.steps, len(found.looks["AdamW", 0, 1].rows)
        ([0, 1], 7)
    """
    looks: dict[tuple[str, int, int], Inspection] = {}
    bits: dict[tuple[str, int, int], float] = {}
    due = {round(steps * share) for share in (0.125, 0.25, 0.5, 0.75, 1.0)} - {0}
    for name in optimizers:
        if name not in OPTIMIZER_RATES:
            raise unknown_name("optimizer", name, OPTIMIZER_RATES)
        label = CONTESTANTS[name].label
        for seed in seeds:
            model = TinyGPT(size, seed=seed, layers=layers)
            shape = {"context": context, "batch": batch, "seed": seed}
            task = language_modelling("addresses", validation_windows=windows, **shape)

            def look(step: int, label: str = label, seed: int = seed, model: Any = model, task: Any = task) -> None:
                looks[label, seed, step] = inspect(model)
                model.eval()
                bits[label, seed, step] = task.evaluate(model)[_BITS]

            def on_step(step: int, loss: float, look: Any = look) -> None:
                if step in due:
                    look(step)

            look(0)
            rival = contestant(name, model, lr=OPTIMIZER_RATES[name], rest_lr=_REST_LR)
            plan: dict[str, Any] = {"steps": steps, "schedule": "wsd", "warmup": min(20, steps), "clip": 1.0}
            with tempfile.TemporaryDirectory() as folder:
                fit(model, task, rival, evaluate_every=steps, root=folder, progress=False, on_step=on_step, **plan)
    return SpectraAlong(looks, bits)


def training_curves(trained: SpectraAlong, quantity: str) -> dict[str, tuple[list[int], list[list[float]]]]:
    """One quantity along the trainings, as :func:`orthokit.figures.loss_curves` takes it.

    Args:
        trained: The trainings.
        quantity: ``"bits"``; a column of numbers, for its mean over the matrices; ``"exponent"``, for the mean of the
            exponents of all matrices, those that are refused too; ``"with_alpha"``, for the share that is not refused.

    Returns:
        Optimizer to steps and values, ``(seeds, steps)``; NaN where no matrix has a value.

    Raises:
        UnknownNameError: No such quantity.

    Example:
        >>> tiny = {"size": "0.2M", "layers": 1, "context": 8, "batch": 1, "windows": 2}
        >>> found = spectra_along_training(["adamw"], seeds=[0], steps=1, **tiny)
        >>> training_curves(found, "with_alpha")
        {'AdamW': ([0, 1], [[0.0, 0.0]])}
    """
    numbers = [name for name, column in COLUMNS.items() if column.kind != "text"]
    if quantity not in ("bits", "exponent", "with_alpha", *numbers):
        raise unknown_name("quantity", quantity, ["bits", "exponent", "with_alpha", *numbers])

    def value(key: tuple[str, int, int]) -> float:
        found = trained.looks[key]
        if quantity == "bits":
            return trained.bits[key]
        if quantity == "exponent":
            return float(np.mean([_exponent(sigma) for sigma in found.spectra.values()]))
        if quantity == "with_alpha":
            return float(np.mean([row["alpha"] is not None for row in found.rows]))
        known = [float(row[quantity]) for row in found.rows if row[quantity] is not None]
        return float(np.mean(known)) if known else math.nan

    pairs = dict.fromkeys((optimizer, seed) for optimizer, seed, _ in trained.looks)
    curves: dict[str, tuple[list[int], list[list[float]]]] = {}
    for optimizer, seed in pairs:
        row = [value((optimizer, seed, step)) for step in trained.steps]
        curves.setdefault(optimizer, (trained.steps, []))[1].append(row)
    return curves


def training_changes(trained: SpectraAlong, quantity: str) -> dict[str, list[float]]:
    """A quantity of :func:`training_curves` at the end of the trainings minus that at step 0, one number a seed."""
    return {
        label: [row[-1] - row[0] for row in rows] for label, (_, rows) in training_curves(trained, quantity).items()
    }


def monitor_differences(*, steps: int = 8, seed: int = 0) -> dict[str, float]:
    """Whether what a monitor records while a model trains is what an inspection finds in it afterwards.

    Args:
        steps: Length of the training of a small TinyGPT, ``>= 1``.
        seed: Of weights and batches.

    Returns:
        Entry of a record to the largest difference over the matrices at the last step, relative to the larger value.

    Raises:
        OptionError: ``steps`` below 1.

    Example:
        >>> max(monitor_differences(steps=1).values()) < 1e-4
        True
    """
    model = TinyGPT("0.2M", seed=seed, layers=1)
    task = language_modelling("addresses", context=16, batch=4, seed=seed, validation_windows=4)
    rival = contestant("adamw", model, lr=OPTIMIZER_RATES["adamw"])
    monitor = Monitor(model, every=1, budget=1.0, quantities=_WATCHED)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, task, rival, steps=steps, monitor=monitor, root=folder, progress=False)
    rows = {row["name"]: row for row in inspect(model).rows}
    last = monitor.records[-1]["step"]
    found: dict[str, float] = {}
    for record in monitor.records:
        for name in _RECORDED:
            if record["step"] == last and name in record:
                pair = float(record[name]), float(rows[record["matrix"]][name])
                scale = max(map(abs, pair))
                gap = abs(pair[0] - pair[1]) / scale if scale > 0 else 0.0
                found[name] = max(found.get(name, 0.0), gap)
    return found


def _exponent(sigma: np.ndarray) -> float:
    """The exponent of the best tail, whether it would be shown or not."""
    return tail_fit(np.square(np.asarray(sigma, dtype=np.float64))).alpha
