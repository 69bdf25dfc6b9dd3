"""Two short probes of training: steps against a protected space, and one step that is far too long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from orthokit.diagnostics.safe_step import StepController
from orthokit.errors import NonFiniteError, OptionError, unknown_name
from orthokit.lab.continual import class_split
from orthokit.lab.input_subspaces import InputSubspaces
from orthokit.lab.models import SmallCNN
from orthokit.lab.projection import GradientProjection
from orthokit.lab.racer import Racer
from orthokit.lab.tasks import image_classification
from orthokit.optim.routing import for_model

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["steps_in_span", "survive_spike"]

_WIDTH = 4
_OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1),
    "muon": lambda model: for_model(model, "muon", lr=0.02),
    "pion": lambda model: for_model(model, "pion", lr=0.02),
}


def steps_in_span(
    optimizers: Sequence[str] = tuple(_OPTIMIZERS), *, steps: int = 10, seed: int = 0, energy: float = 0.95
) -> pd.DataFrame:
    """How much of what an optimizer does to a layer lies along the inputs that an earlier task gave it.

    Args:
        optimizers: ``"sgd"``, ``"adamw"``, ``"muon"`` or ``"pion"``; default all.
        steps: Steps on the second task, ``>= 1``; default 10.
        seed: Of weights and batches.
        energy: See :class:`orthokit.lab.InputSubspaces`; default 0.95.

    Returns:
        One row an optimizer: the share of the length of the hidden layer's change, in [0, 1], when nothing, the
        gradient, or the step as well is projected.

    Raises:
        UnknownNameError: No such optimizer.

    Example:
        >>> found = steps_in_span(["sgd"], steps=1)
        >>> bool(found.loc["sgd", "projected step"] < 1e-4 < found.loc["sgd", "free"])
        True
    """
    import pandas as pd

    for name in optimizers:
        if name not in _OPTIMIZERS:
            raise unknown_name("optimizer", name, _OPTIMIZERS)
    first, second = (class_split("digits", classes=c, batch=16, seed=seed) for c in ((0, 1), (2, 3)))
    start = SmallCNN(width=_WIDTH, seed=seed)
    space = InputSubspaces(free=("head.*",)).extend(start, first, samples=64, energy=energy)
    ways = {
        "free": None,
        "projected gradient": GradientProjection(space, update=False),
        "projected step": GradientProjection(space),
    }
    rows = {}
    for name in optimizers:
        rows[name] = {}
        for way, project in ways.items():
            model = SmallCNN(width=_WIDTH, seed=seed)
            racer = Racer(model, second, _OPTIMIZERS[name](model), steps=steps, project=project)
            for _ in range(steps):
                racer.advance()
            layers = [
                (start.hidden.weight, model.hidden.weight),
                (start.hidden.bias[:, None], model.hidden.bias[:, None]),
            ]
            change = torch.cat([(after - before).detach() for before, after in layers], 1).double()
            rows[name][way] = float((change @ space.bases["hidden"]).norm() / change.norm())
    return pd.DataFrame.from_dict(rows, orient="index")


def survive_spike(
    factors: Sequence[float], *, seeds: Sequence[int], steps: int = 40, lr: float = 0.05, safety: float = 1.0
) -> pd.DataFrame:
    """Training with the learning rate multiplied for one step in the middle, with and without a step controller.

    Args:
        factors: What it is multiplied with, each ``>= 1``.
        seeds: Of weights and batches.
        steps: Length, ``>= 2``; default 40.
        lr: Learning rate of plain gradient descent otherwise; default 0.05.
        safety: Of the controller; default 1, the safe radius itself.

    Returns:
        Columns ``factor, seed, way, error, ratio``: test error on the digits at the end, and the length of the long
        step over the safe radius (NaN without a controller). ``way`` is ``"free"`` or ``"controlled"``. A run that
        diverges errs by chance, in nine of ten cases.

    Raises:
        OptionError: A factor below 1, or too few steps.

    Example:
        >>> found = survive_spike([1e4], seeds=[0], steps=2)
        >>> sorted(found["way"]), bool(found["ratio"].max() > 1)
        (['controlled', 'free'], True)

    References:
        Ghosts of Softmax (2026), arXiv 2603.13552.
    """
    import pandas as pd

    if min(factors) < 1 or steps < 2:
        raise OptionError(f"need factors >= 1 and steps >= 2; got {list(factors)} and {steps}.")
    rows = []
    for factor in factors:
        for seed in seeds:
            for way, controller in (("free", None), ("controlled", StepController(safety=safety))):
                error, ratio = _spiked(factor, seed, steps, lr, controller)
                rows.append({"factor": factor, "seed": seed, "way": way, "error": error, "ratio": ratio})
    return pd.DataFrame(rows)


def _spiked(factor: float, seed: int, steps: int, lr: float, controller: StepController | None) -> tuple[float, float]:
    model, ratio = SmallCNN(width=_WIDTH, seed=seed), float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    racer = Racer(
        model,
        image_classification("digits", batch=32, seed=seed),
        optimizer,
        steps=steps,
        schedule="constant",
        warmup=0,
        step_controller=controller,
    )
    try:
        for step in range(steps):
            racer.base = [lr * (factor if step == steps // 2 else 1.0)]
            racer.advance()
            if controller is not None and step == steps // 2:
                ratio = controller.ratio
        return racer.evaluate()["test_error"], ratio
    except NonFiniteError:
        return 0.9, ratio
