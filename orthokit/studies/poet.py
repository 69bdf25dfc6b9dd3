"""POET in training: against other optimizers, with other merges and initial norms, and what its spectrum does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orthokit.adapters import POET, POETOptimizer, attach, spectrum_report
from orthokit.errors import unknown_name
from orthokit.lab.models import TinyGPT
from orthokit.lab.tasks import image_classification
from orthokit.optim.routing import for_model
from orthokit.studies._engine import Study
from orthokit.studies.pipelines import train_tinygpt

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "DRIFT_VARIANTS",
    "POET_METHODS",
    "POET_STUDY",
    "compare_methods",
    "drift_curves",
    "identity_errors",
    "initial_norms",
    "merge_schedules",
    "spectrum_along_training",
    "train_method",
    "train_poet",
]

POET_METHODS = ("AdamW", "Muon", "Pion", "POET")
# Embedding, head and norms of every method: what they are trained with must not decide between rotations.
_REST_LR = 6e-3
_BETAS = (0.9, 0.95)
# The fastest for narrow layers and many rows; all modes compute the same.
_MEMORY = "weight"

DRIFT_VARIANTS: dict[str, dict[str, Any]] = {
    "3 terms (published)": {"terms": 3},
    "4 terms": {"terms": 4},
    "4 terms, polished": {"terms": 4, "polish": 2},
    "exact Cayley": {"map": "cayley"},
    "exact Cayley, uint8": {"map": "cayley", "quantize": "uint8"},
}


def train_poet(
    key: Mapping[str, Any],
    config: POET,
    *,
    lr: float,
    seed: int,
    steps: int,
    **options: Any,
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """One run of TinyGPT with POET on its hidden layers; embedding, head and norms have AdamW at 6e-3.

    Args:
        key: What names the run; becomes columns of the rows.
        config: Options of POET.
        lr: Learning rate of the generators, radians.
        seed: Of weights, data and orders.
        steps: Length of the run.
        **options: Options of ``train_tinygpt``.

    Returns:
        Rows ``*key, seed, step, value`` (validation bits per byte), and the spectrum report at the end.
    """
    trained: list[TinyGPT] = []

    def make(model: TinyGPT) -> torch.optim.Optimizer:
        trained.append(model)
        attach(model, config, keep_base=False)
        return POETOptimizer(model, lr=_REST_LR, generator_lr=lr, betas=_BETAS)

    rows = train_tinygpt(key, make, seed=seed, steps=steps, **options)
    return rows, spectrum_report(trained[0])


def train_method(
    method: str,
    *,
    lr: float,
    seed: int,
    steps: int,
    config: POET | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """One run of one optimizer on the hidden matrices, all else with AdamW at 6e-3.

    Args:
        method: One of ``POET_METHODS``.
        lr: Learning rate of the hidden matrices (of the generators for POET).
        seed: Of weights and data, so that rivals see the same of both.
        steps: Length of the run.
        config: Options of POET; default ``POET(16, merge_every=50, map="cayley", memory="weight")``.
        **options: Options of ``train_tinygpt``.

    Returns:
        Rows ``method, lr, seed, step, value``.

    Raises:
        UnknownNameError: No such method.
    """
    if method not in POET_METHODS:
        raise unknown_name("method", method, POET_METHODS)
    key = {"method": method, "lr": lr}
    if method == "POET":
        default = POET(16, merge_every=50, map="cayley", memory=_MEMORY, seed=seed)
        chosen = default if config is None else config
        return train_poet(key, chosen, lr=lr, seed=seed, steps=steps, **options)[0]
    return train_tinygpt(key, _maker(method, lr), seed=seed, steps=steps, **options)


def _maker(method: str, lr: float) -> Callable[[TinyGPT], torch.optim.Optimizer]:
    def make(model: TinyGPT) -> torch.optim.Optimizer:
        if method == "AdamW":
            hidden = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
            matrices = [p for p in model.parameters() if id(p) in hidden]
            rest = [p for p in model.parameters() if id(p) not in hidden]
            groups = [{"params": matrices, "lr": lr}, {"params": rest, "lr": _REST_LR}]
            return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.0)
        return for_model(model, method.lower(), lr=lr, fallback_lr=_REST_LR, weight_decay=0.0)

    return make


def compare_methods(
    rates: Mapping[str, float], *, seeds: Sequence[int], steps: int, config: POET | None = None, **options: Any
) -> pd.DataFrame:
    """Several optimizers, each at its own learning rate, on the same seeds and the same number of tokens.

    Args:
        rates: Learning rate by method.
        seeds: The seeds, shared.
        steps: Length of each run.
        config: Options of POET.
        **options: Options of ``train_tinygpt``.

    Returns:
        Columns ``method, lr, seed, step, value``.
    """
    import pandas as pd

    return pd.DataFrame(
        row
        for method, lr in rates.items()
        for seed in seeds
        for row in train_method(method, lr=lr, seed=seed, steps=steps, config=config, **options)
    )


def merge_schedules(
    periods: Sequence[int], *, lr: float, seeds: Sequence[int], steps: int, block_size: int = 16, **options: Any
) -> pd.DataFrame:
    """POET with several periods between merges, three Neumann terms as published.

    Args:
        periods: Updates between merges.
        lr: Learning rate of the generators.
        seeds: The seeds.
        steps: Length of each run.
        block_size: ``b``; default 16.
        **options: Options of ``train_tinygpt``.

    Returns:
        Columns ``merge_every, seed, step, value, drift, angle``: bits per byte, the largest change of a singular value
        relative to the largest, and the largest angle that was merged.
    """
    import pandas as pd

    rows = []
    for period in periods:
        for seed in seeds:
            config = POET(block_size, merge_every=period, memory=_MEMORY, seed=seed)
            found, report = train_poet({"merge_every": period}, config, lr=lr, seed=seed, steps=steps, **options)
            ends = {"drift": max(report["drift"].tolist()), "angle": max(report["largest angle"].tolist())}
            rows += [row | ends for row in found]
    return pd.DataFrame(rows)


def initial_norms(
    scales: Sequence[float], *, lr: float, seeds: Sequence[int], steps: int, block_size: int = 16, **options: Any
) -> pd.DataFrame:
    """POET from a frozen weight of several sizes: the spectrum never changes, so its size is a choice for life.

    Args:
        scales: Factors on the model's own initial weight.
        lr: Learning rate of the generators.
        seeds: The seeds.
        steps: Length of each run.
        block_size: ``b``; default 16.
        **options: Options of ``train_tinygpt``.

    Returns:
        Columns ``scale, seed, step, value``.
    """
    import pandas as pd

    rows = []
    for scale in scales:
        for seed in seeds:
            options_of = {"merge_every": 50, "map": "cayley", "scale": float(scale), "memory": _MEMORY}
            config = POET(block_size, seed=seed, **options_of)
            rows += train_poet({"scale": float(scale)}, config, lr=lr, seed=seed, steps=steps, **options)[0]
    return pd.DataFrame(rows)


def identity_errors(*, seed: int, inputs: int = 48, outputs: int = 40, block_size: int = 8) -> dict[str, float]:
    """What must be 0 but for rounding: how far the memory modes and a merge are from the dense formulation.

    Args:
        seed: Of weights, inputs and orders.
        inputs: ``in``; default 48.
        outputs: ``out``; default 40.
        block_size: ``b``; default 8.

    Returns:
        ``gradients``: largest difference of any gradient between a memory mode and the dense product;
        ``merge``: largest difference of an output across a merge. In float64, for a layer with a bias.

    Example:
        >>> max(identity_errors(seed=0).values()) < 1e-10
        True
    """
    g = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(torch.randn(outputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5)
    linear.bias = nn.Parameter(torch.randn(outputs, generator=g, dtype=torch.float64))
    x = torch.randn(64, inputs, generator=g, dtype=torch.float64)
    turn = [torch.randn(d * (block_size - 1) // 2, generator=g, dtype=torch.float64) for d in (inputs, outputs)]
    errors = {"gradients": 0.0, "merge": 0.0}
    for memory in ("fast", "low", "weight"):
        layer = POET(block_size, memory=memory, seed=seed).wrap(linear)
        generators = [layer.input.generator, layer.output.generator]
        for p, values in zip(generators, turn, strict=True):
            p.data.copy_(0.05 * values)
        outputs_of = (layer(x), nn.functional.linear(x, layer.effective_weight(), layer.bias))
        found = [torch.autograd.grad(y.square().mean(), generators) for y in outputs_of]
        errors["gradients"] = max(
            errors["gradients"], *(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
        )
        layer.merge_()
        errors["merge"] = max(errors["merge"], float((layer(x) - outputs_of[0]).abs().max().detach()))
    return errors


def spectrum_along_training(
    variant: str,
    *,
    seed: int,
    steps: int,
    looks: int = 8,
    lr: float = 2e-3,
    merge_every: int = 200,
    width: int = 64,
) -> list[dict[str, Any]]:
    """How far spectra move while a small network learns digits, and through what, at steps spaced evenly in log.

    The network has three linear layers, the first two of them with POET in blocks of 16; the head has AdamW.

    Args:
        variant: One of ``DRIFT_VARIANTS``.
        seed: Of weights, data and orders.
        steps: Length of the run.
        looks: Reports along the way, the last one at the end.
        lr: Learning rate of the generators, radians; default 2e-3.
        merge_every: Updates between merges; default 200.
        width: Of the hidden layers; default 64.

    Returns:
        Rows ``variant, seed, step, loss, drift, angle, law, expected, growth, truncation, rounding, requantization``:
        loss of the last batch in nats, then the largest of each over the layers, signed ones by size. ``rounding`` and
        ``requantization`` are the typical change of a singular value.

    Raises:
        UnknownNameError: No such variant.
    """
    if variant not in DRIFT_VARIANTS:
        raise unknown_name("variant", variant, DRIFT_VARIANTS)
    task = image_classification("digits", batch=16, seed=seed)
    model = _network(64, width, 10, seed=seed)
    config = POET(16, merge_every=merge_every, seed=seed, **DRIFT_VARIANTS[variant])
    attach(model, config, targets=["1", "3"], keep_base=False)
    optimizer = POETOptimizer(model, lr=1e-3, generator_lr=lr)
    first = min(merge_every, steps)
    at = {round(first * (steps / first) ** (i / max(looks - 1, 1))) for i in range(looks)} | {steps}
    rows = []
    for step in range(1, steps + 1):
        loss = task.loss(model, task.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in at:
            found = {"loss": float(loss.detach()), **_worst(spectrum_report(model))}
            rows.append({"variant": variant, "seed": seed, "step": step, **found})
    return rows


def _network(inputs: int, width: int, classes: int, *, seed: int) -> nn.Sequential:
    """Three linear layers, drawn from their own generator."""
    g = torch.Generator().manual_seed(seed)
    layers: list[nn.Linear] = []
    for rows, columns in ((width, inputs), (width, width), (classes, width)):
        linear = nn.Linear(columns, rows, device="meta")  # on meta nothing is drawn
        linear.weight = nn.Parameter(torch.randn(rows, columns, generator=g) * (2 / columns) ** 0.5)
        linear.bias = nn.Parameter(torch.zeros(rows))
        layers.append(linear)
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def _worst(report: pd.DataFrame) -> dict[str, float]:
    """The largest of every quantity over the layers."""
    names = {
        "drift": "drift",
        "angle": "largest angle",
        "law": "law",
        "expected": "expected",
        "growth": "growth",
        "truncation": "truncation",
        "rounding": "rounding noise",
        "requantization": "requantization noise",
    }
    return {name: float(max(report[column].tolist(), key=abs)) for name, column in names.items()}


def drift_curves(table: pd.DataFrame) -> dict[str, tuple[list[float], list[list[float]]]]:
    """What ``figures.spectrum_drift`` draws: variant to steps and one row of drifts a seed."""
    result = {}
    for variant in table["variant"].unique():
        rows = table.loc[table["variant"] == variant].pivot(index="seed", columns="step", values="drift")
        result[str(variant)] = ([float(step) for step in rows.columns], rows.to_numpy().tolist())
    return result


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    common = {"steps": 10_000, "merge_every": 200, "looks": 8}
    if size == "smoke":
        common = {"steps": 2, "merge_every": 1, "looks": 1}
    return [{"variant": variant, "seed": seed, **common} for seed in range(seeds) for variant in DRIFT_VARIANTS]


def _measure(unit: dict[str, Any]) -> list[dict[str, Any]]:
    options = dict(unit)
    return spectrum_along_training(options.pop("variant"), **options)


POET_STUDY = Study(
    name="poet_drift",
    question="How far do POET's singular values drift in 10,000 steps, through what, and with which rotations?",
    units=_units,
    measure=_measure,
    seeds=2,
    depends=lambda unit: ("adapters/*.py", "linalg/*.py", "lab/images.py", "lab/tasks.py", "studies/poet.py"),
)
