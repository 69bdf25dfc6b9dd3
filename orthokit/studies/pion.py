"""Pion in training: spectra kept, drift by cause, momentum geometries, no normalisation, what rotations cannot use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthokit.errors import NonFiniteError
from orthokit.lab.models import TinyGPT
from orthokit.lab.tasks import Task, language_modelling
from orthokit.linalg.spectra import singular_values
from orthokit.optim.pion import MOMENTA, Pion
from orthokit.optim.routing import for_model
from orthokit.studies._engine import Study
from orthokit.studies.pipelines import train_tinygpt

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "PION_DRIFT",
    "PION_DRIFT_VARIANTS",
    "PION_RIVALS",
    "compare_geometries",
    "drift_histories",
    "drift_history",
    "gradient_split",
    "rivals_without_norms",
    "spectra_after_training",
    "strip_norms",
]

# Embedding, head and norms have AdamW at one rate in every run: only what moves the matrices differs.
_REST_LR = 6e-3

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    hidden = set(for_model(model, "muon", lr=lr).matrix.param_groups[0]["params"])
    rest = [p for p in model.parameters() if p not in hidden]
    groups = [{"params": list(hidden), "lr": lr}, {"params": rest, "lr": _REST_LR}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


PION_RIVALS: dict[str, Make] = {
    "AdamW": _adamw,
    "Muon": lambda model, lr: for_model(model, "muon", lr=lr, fallback_lr=_REST_LR, weight_decay=0.0),
    "Pion": lambda model, lr: for_model(model, "pion", lr=lr, fallback_lr=_REST_LR),
}
"""Makers of the optimizers compared here; all give an update of a hidden matrix the size 0.2 lr."""

# With this period the last of 10,000 steps is the last one before a restoration: the drift there is the largest.
_RESTORE = {"restore_every": 137}
_EXACT, _NARROW = {"dtype": torch.float32}, {"dtype": torch.bfloat16}
PION_DRIFT_VARIANTS: dict[str, dict[str, Any]] = {
    "order 2, bf16 products": _NARROW,
    "order 2, bf16 products, restored": _NARROW | _RESTORE,
    "order 2 (published)": _EXACT,
    "order 2, restored": _EXACT | _RESTORE,
    "order 2, all in float64": {"dtype": torch.float64},
    "Cayley-Neumann, bf16 products": _NARROW | {"map": "cayley_neumann"},
    "Cayley-Neumann": _EXACT | {"map": "cayley_neumann"},
    "exact Cayley": _EXACT | {"map": "cayley"},
}
"""Ways of making the step whose drift the study ``pion_drift`` compares; weights and, unless said, products float32."""


def _train(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[tuple[int, float]]:
    """Plain training; yields after every step, gradients still there, and ends early when the loss is not finite."""
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        try:
            optimizer.step()
        except NonFiniteError:
            return
        if not bool(loss.isfinite()):
            return
        yield step, float(loss.detach())


def spectra_after_training(
    rivals: Sequence[str],
    *,
    name: str,
    lr: float,
    seed: int,
    steps: int,
    size: str = "0.2M",
    context: int = 64,
    batch: int = 8,
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """The singular values of a matrix of TinyGPT before training and after it with each rival.

    Args:
        rivals: Names in :data:`PION_RIVALS`.
        name: The matrix.
        lr: Learning rate of the matrices.
        seed: Of weights and data.
        steps: Length of each run.
        size: Size of the model; default ``"0.2M"``.
        context: Bytes of a window; default 64.
        batch: Windows a step; default 8.

    Returns:
        The values at the start; those after each rival; and for each rival the largest change of a singular value, over
        the largest of its matrix, among all hidden matrices.
    """
    after, worst = {}, {}
    first: dict[str, Tensor] = {}
    for label in rivals:
        model = TinyGPT(size, seed=seed)
        optimizer = PION_RIVALS[label](model, lr)
        hidden = [key for key, p in model.named_parameters() if p.ndim == 2 and key.startswith("blocks.")]
        first = {key: singular_values(model.get_parameter(key).detach()) for key in hidden}
        for _ in _train(model, _task(seed, context, batch), optimizer, steps):
            pass
        found = {key: singular_values(model.get_parameter(key).detach()) for key in hidden}
        after[label] = found[name]
        worst[label] = max(float((found[key] - first[key]).abs().max() / first[key][0]) for key in hidden)
    return first[name], after, worst


def _task(seed: int, context: int, batch: int) -> Task:
    return language_modelling("addresses", context=context, batch=batch, seed=seed, validation_windows=8)


def drift_history(
    options: Mapping[str, Any],
    *,
    lr: float,
    steps: int,
    readings: int = 8,
    shape: tuple[int, int] = (64, 48),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> pd.DataFrame:
    """Drift by cause on a problem with a known answer: a matrix pulled to another of its size, with gradient noise.

    Args:
        options: Options of Pion; ``track`` is added.
        lr: Learning rate, held constant: the worst case, since drift falls with a high power of it.
        steps: Steps.
        readings: Rows, spread evenly over the steps; default 8.
        shape: Of the matrix; default (64, 48).
        dtype: Of the weight.
        seed: Of matrix, target and noise; weights have the standard deviation 0.02, as in a language model.

    Returns:
        Columns ``step, drift, norm_drift, truncation, rounding, angle``; see ``Pion.report``.
    """
    kept = {"lr": lr, "steps": steps, "readings": readings, "shape": shape, "dtype": dtype}
    return drift_histories(options, seeds=[seed], **kept).drop(columns="seed")


def drift_histories(
    options: Mapping[str, Any],
    *,
    lr: float,
    steps: int,
    seeds: Sequence[int],
    readings: int = 8,
    shape: tuple[int, int] = (64, 48),
    dtype: torch.dtype = torch.float32,
) -> pd.DataFrame:
    """:func:`drift_history` of several seeds, whose matrices step side by side in one optimizer.

    Args:
        options: As there.
        lr: As there.
        steps: As there.
        seeds: Of matrix, target and noise, each for itself.
        readings: As there.
        shape: As there.
        dtype: As there.

    Returns:
        Columns ``seed, step, drift, norm_drift, truncation, rounding, angle``.
    """
    import pandas as pd

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([0.02 * torch.randn(shape, generator=g) for g in generators])

    weights, targets = draw().to(dtype), draw()
    ps = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Pion(ps, lr=lr, track=True, **options)
    every, rows = max(1, steps // readings), []
    for step in range(1, steps + 1):
        pull = torch.stack([p.detach() for p in ps]).float() - targets + draw()
        for p, grad in zip(ps, pull.to(dtype), strict=True):
            p.grad = grad
        optimizer.step()
        if step % every == 0:
            for seed, row in zip(seeds, optimizer.report().to_dict("records"), strict=True):
                kept = {key: float(row[key]) for key in ("drift", "norm_drift", "truncation", "rounding")}
                angle = float(max(row["angle_in"], row["angle_out"]))
                rows.append({"seed": seed, "step": step} | kept | {"angle": angle})
    return pd.DataFrame(rows)


def compare_geometries(
    geometries: Sequence[str] = MOMENTA, *, lr: float, seeds: Sequence[int], steps: int, **options: Any
) -> pd.DataFrame:
    """TinyGPT with Pion whose momentum averages generators, gradients, or gradients carried along.

    Args:
        geometries: Values of ``momentum``; default all.
        lr: Learning rate of the matrices.
        seeds: The seeds, shared.
        steps: Length of a run.
        **options: Other options of ``train_tinygpt``.

    Returns:
        Columns ``momentum, seed, step, value``: validation bits per byte.
    """
    import pandas as pd

    def make(momentum: str) -> Callable[[TinyGPT], torch.optim.Optimizer]:
        return lambda model: for_model(model, "pion", lr=lr, fallback_lr=_REST_LR, momentum=momentum)

    return pd.DataFrame(
        row
        for momentum in geometries
        for seed in seeds
        for row in train_tinygpt({"momentum": momentum}, make(momentum), seed=seed, steps=steps, **options)
    )


def strip_norms(model: nn.Module) -> nn.Module:
    """Replace every normalisation layer of a model by nothing, in place; returns it.

    Example:
        >>> model = strip_norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.RMSNorm(2)))
        >>> [type(layer).__name__ for layer in model]
        ['Linear', 'Identity', 'Identity']
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.RMSNorm, nn.LayerNorm)):
                setattr(module, name, nn.Identity())
    return model


def rivals_without_norms(
    rates: Sequence[float],
    *,
    seeds: Sequence[int],
    steps: int,
    rivals: Sequence[str] = tuple(PION_RIVALS),
    norms: bool = False,
    size: str = "0.2M",
    context: int = 64,
    batch: int = 8,
    limit: float = 8.0,
) -> pd.DataFrame:
    """Final training loss of TinyGPT without normalisation layers, for each rival, rate and seed.

    Args:
        rates: Learning rates of the matrices.
        seeds: The seeds, shared.
        steps: Length of a run.
        rivals: Names in :data:`PION_RIVALS`; default all.
        norms: Keep the normalisation layers, for comparison; default ``False``.
        size: Size of the model; default ``"0.2M"``.
        context: Bytes of a window; default 64.
        batch: Windows a step; default 8.
        limit: A final loss above this many nats counts as diverged, as does one that is not finite; default 8. All 256
            bytes being equally likely has 5.5.

    Returns:
        Columns ``optimizer, lr, seed, loss``: the mean loss of the last tenth of the steps, NaN if it diverged.
    """
    import pandas as pd

    rows = []
    for label in rivals:
        for lr in rates:
            for seed in seeds:
                model = TinyGPT(size, seed=seed)
                if not norms:
                    strip_norms(model)
                optimizer = PION_RIVALS[label](model, lr)
                losses = [loss for _, loss in _train(model, _task(seed, context, batch), optimizer, steps)]
                tail = losses[-max(1, steps // 10) :]
                loss = sum(tail) / len(tail) if len(losses) == steps else float("nan")
                rows.append(
                    {"optimizer": label, "lr": lr, "seed": seed, "loss": loss if loss < limit else float("nan")}
                )
    return pd.DataFrame(rows)


def gradient_split(
    *,
    lr: float,
    seeds: Sequence[int],
    steps: int,
    readings: int = 6,
    optimizer: str = "Pion",
    size: str = "0.2M",
    context: int = 64,
    batch: int = 8,
) -> pd.DataFrame:
    """What rotations can use of the gradients of TinyGPT and what they cannot, over training; means over the matrices.

    Args:
        lr: Learning rate of the matrices.
        seeds: The seeds.
        steps: Length of a run.
        readings: Readings, the first before the first step; default 6.
        optimizer: Name in :data:`PION_RIVALS`; default ``"Pion"``.
        size: Size of the model; default ``"0.2M"``.
        context: Bytes of a window; default 64.
        batch: Windows a step; default 8. Gradients are read on a batch sixteen times as large, the same every time.

    Returns:
        Columns ``seed, step, tangential_in, tangential_out, radial``; see ``Pion.report``.
    """
    import pandas as pd

    from orthokit.optim._pion_report import stationarity_split

    def reading(model: nn.Module, task: Task) -> dict[str, float]:
        model.zero_grad()
        task.loss(model, task.batch(0)).backward()
        hidden = [p for key, p in model.named_parameters() if p.ndim == 2 and key.startswith("blocks.")]
        found = [stationarity_split(p.detach()[None], p.grad[None]) for p in hidden if p.grad is not None]
        return {key: sum(float(split[key]) for split in found) / len(found) for key in found[0]}

    every, rows = max(1, steps // max(1, readings - 1)), []
    for seed in seeds:
        model = TinyGPT(size, seed=seed)
        moving, large = _task(seed, context, batch), _task(seed + 10_000, context, 16 * batch)
        rows.append({"seed": seed, "step": 0} | reading(model, large))
        for step, _ in _train(model, moving, PION_RIVALS[optimizer](model, lr), steps):
            if (step + 1) % every == 0:
                rows.append({"seed": seed, "step": step + 1} | reading(model, large))
    return pd.DataFrame(rows)


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    toy = {"lr": 5e-3, "steps": 10_000, "readings": 8, "shape": [64, 48]}
    if size == "smoke":
        toy |= {"steps": 2, "readings": 1, "shape": [6, 4]}
    return [{"variant": variant, "seeds": seeds, **toy} for variant in PION_DRIFT_VARIANTS]


def _measure(unit: dict[str, Any]) -> list[dict[str, Any]]:
    options = PION_DRIFT_VARIANTS[unit["variant"]]
    wide = torch.float64 if options["dtype"] == torch.float64 else torch.float32
    toy = {key: unit[key] for key in ("lr", "steps", "readings")}
    found = drift_histories(options, seeds=range(unit["seeds"]), shape=tuple(unit["shape"]), dtype=wide, **toy)
    return [{"variant": unit["variant"], **row} for row in found.to_dict("records")]


PION_DRIFT = Study(
    name="pion_drift",
    question="How far do singular values drift in 10,000 steps of Pion at a large, constant rate, and through what?",
    units=_units,
    measure=_measure,
    seeds=5,
    depends=lambda unit: ("optim/_pion_*.py", "optim/pion.py", "optim/base.py", "studies/pion.py"),
)
