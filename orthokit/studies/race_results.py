"""What the recorded optimizer race says: curves, paired differences, sensitivity to the learning rate, costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.errors import ReportError, unknown_name
from orthokit.figures.intervals import mean_interval
from orthokit.lab.contestants import CONTESTANTS, contestant
from orthokit.linalg import singular_values
from orthokit.studies._engine import load_evidence
from orthokit.studies.optimizer_race import TRACKS, race_once
from orthokit.studies.race_study import RATES

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "first_updates",
    "polar_overhead",
    "race_costs",
    "race_curves",
    "race_differences",
    "race_finals",
    "race_live",
    "race_rates",
    "race_summary",
    "tuned_rates",
]

Curves = dict[str, tuple[list[float], list[list[float]]]]
AGAINST = ("samples", "seconds")
BUDGETS = ("tokens", "time")
_BASELINE = "adamw"


def race_curves(table: pd.DataFrame, track: str, *, against: str = "samples", value: str = "value") -> Curves:
    """Held-out loss over a run for every contestant, one row a seed.

    Args:
        table: The recorded study.
        track: One of its tracks.
        against: ``"samples"`` (default): thousands of bytes or images, at equal steps. ``"seconds"``: processor time of
            one core, in runs that were shortened or lengthened to the time AdamW takes.
        value: ``"value"`` (default) or ``"error"``.

    Returns:
        Label to ``(across, values)``.

    Raises:
        UnknownNameError: No such track or axis.
    """
    if against not in AGAINST:
        raise unknown_name("axis", against, AGAINST)
    rows = _rows(table, track, "tokens" if against == "samples" else "time")
    labels = _labels(rows)
    if against == "seconds":
        steps = race_costs(table, track)["seconds a step"].to_dict()
    else:
        steps = dict.fromkeys(labels.values(), TRACKS[track].samples / 1000)
    curves: Curves = {}
    for name, label in labels.items():
        grid = rows[rows["name"] == name].pivot(index="seed", columns="step", values=value)
        each = steps[label]
        curves[label] = ([float(step * each) for step in grid.columns], grid.to_numpy().tolist())
    return curves


def race_finals(table: pd.DataFrame, track: str, *, budget: str = "tokens", value: str = "value") -> pd.DataFrame:
    """The last value of every run, one row a seed, one column a contestant.

    Args:
        table: The recorded study.
        track: One of its tracks.
        budget: ``"tokens"`` (default): equal numbers of steps. ``"time"``: equal processor time.
        value: ``"value"`` (default) or ``"error"``.

    Returns:
        Columns are labels in the order of the contestants.
    """
    rows = _rows(table, track, budget)
    last = rows[rows["step"] == rows.groupby("name")["step"].transform("max")]
    wide = last.pivot(index="seed", columns="name", values=value)
    labels = _labels(rows)
    wide = wide.loc[:, list(labels)]
    wide.columns = list(labels.values())
    return wide


def race_differences(
    table: pd.DataFrame, track: str, *, baseline: str = "AdamW", budget: str = "tokens", value: str = "value"
) -> dict[str, list[float]]:
    """Each contestant's final loss minus the baseline's, seed by seed: below zero is better.

    Args:
        table: The recorded study.
        track: One of its tracks.
        baseline: Label to compare with; default ``"AdamW"``.
        budget: See :func:`race_finals`.
        value: See :func:`race_finals`.

    Returns:
        Label to one difference a seed, without the baseline itself. NaN where a run diverged.

    Raises:
        UnknownNameError: No such contestant in the table.
    """
    finals = race_finals(table, track, budget=budget, value=value)
    if baseline not in finals:
        raise unknown_name("contestant", baseline, list(finals))
    others = (label for label in finals if label != baseline)
    return {label: (finals[label] - finals[baseline]).tolist() for label in others}


def race_rates(table: pd.DataFrame, track: str) -> Curves:
    """Final loss against learning rate on the tuning seeds.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        Label to ``(rates, values)``, one row a seed.
    """
    rows = _of(table, track, "tune")
    curves: Curves = {}
    for name, label in _labels(rows).items():
        grid = rows[rows["name"] == name].pivot(index="seed", columns="lr", values="value")
        curves[label] = (list(grid.columns), grid.to_numpy().tolist())
    return curves


def race_costs(table: pd.DataFrame, track: str) -> pd.DataFrame:
    """What a step costs on one core.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        One row a contestant: ``share of the update``, ``of AdamW's step`` (measured in turns with AdamW, so that other
        load hits both) and ``seconds a step``, that ratio times AdamW's own seconds.
    """
    rows = _of(table, track, "cost").set_index("name")
    # AdamW against itself would be 1 but for the scatter of the clock.
    ratio = rows["ratio"].where(rows.index != _BASELINE, 1.0)
    result = (rows["update_ms"] / rows["step_ms"]).to_frame("share of the update")
    result["of AdamW's step"] = ratio
    result["seconds a step"] = ratio * rows["step_ms"][_BASELINE] / 1e3
    return result.rename(index=_labels(rows.reset_index()))


def race_summary(table: pd.DataFrame, track: str) -> pd.DataFrame:
    """The race as a table, best first.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        One row a contestant: learning rate, final loss at equal tokens and at equal time with the half width of its
        95 % interval, error rate where the task has one, cost of a step over AdamW's.
    """
    import pandas as pd

    unit = TRACKS[track].unit
    columns: dict[str, Mapping[str, Any]] = {"learning rate": _best_rates(table, track)}
    for budget in BUDGETS:
        finals = race_finals(table, track, budget=budget)
        columns[f"{unit}, equal {budget}"] = {label: _told(finals[label].tolist()) for label in finals}
    if TRACKS[track].error:
        errors = race_finals(table, track, value="error")
        columns["error rate"] = {label: _told(errors[label].tolist()) for label in errors}
    costs = race_costs(table, track)["of AdamW's step"]
    columns["step, of AdamW's"] = {str(label): f"{cost:.2f}" for label, cost in costs.items()}
    means = race_finals(table, track).mean().sort_values()
    return pd.DataFrame(columns).loc[means.index]


def tuned_rates(track: str) -> dict[str, float]:
    """The learning rate of every contestant on a track.

    Args:
        track: One of the tracks.

    Returns:
        Name to the rate that the recorded study found best; where none is recorded, the second of those it tries first.

    Raises:
        UnknownNameError: No such track.

    Example:
        >>> tuned_rates("cnn")["adamw"] > 0
        True
    """
    if track not in TRACKS:
        raise unknown_name("track", track, TRACKS)
    rates = {name: grid[1] for name, grid in RATES[track].items()}
    try:
        table, _ = load_evidence("race")
    except ReportError:
        return rates
    found = _of(table, track, "race").groupby("name")["lr"].first().to_dict()
    return rates | {name: float(lr) for name, lr in found.items() if name in rates}


def race_live(
    track: str,
    *,
    seeds: Sequence[int],
    steps: int,
    evaluations: int = 5,
    names: Sequence[str] | None = None,
    small: bool = False,
) -> pd.DataFrame:
    """A short race here and now, in the form of the recorded one: each contestant at its tuned rate, equal tokens.

    Args:
        track: One of the tracks.
        seeds: Seeds of weights and data, shared by the rivals.
        steps: Length of every run, ``>= 1``.
        evaluations: Evaluations of a run after the start; default 5.
        names: Who races; default all contestants.
        small: A much smaller model, for tests.

    Returns:
        Rows as the recorded study has them, all of kind ``"race"``.
    """
    import pandas as pd

    rates = tuned_rates(track)
    options = {"steps": steps, "evaluations": evaluations, "small": small}
    return pd.DataFrame(
        {"kind": "race", **row}
        for name in (CONTESTANTS if names is None else names)
        for seed in seeds
        for row in race_once(track, name, lr=rates[name], seed=seed, **options)
    )


def polar_overhead(width: int, *, tokens: int, iterations: int = 5) -> float:
    r"""What Muon's polar factor costs, as a share of the forward and backward pass.

    For a hidden matrix ``m x n``, ``m <= n``, an iteration takes about ``6 m^2 n`` FLOP if ``m = n`` and ``4 m^2 n`` if
    ``m`` is much smaller; a pass over ``B`` tokens takes ``6 m n B``. The share is at most ``iterations * m / B``.

    Args:
        width: ``m``, the smaller side, ``>= 1``.
        tokens: ``B``, tokens of a batch, ``>= 1``.
        iterations: Newton-Schulz iterations; default 5.

    Returns:
        The bound on the share.

    Example:
        >>> polar_overhead(64, tokens=512), round(polar_overhead(4096, tokens=2**22), 4)
        (0.625, 0.0049)

    References:
        K. Jordan et al. (2024), Muon, section on its runtime.
    """
    return iterations * width / tokens


def first_updates(
    W: Float[Tensor, "out in"], G: Float[Tensor, "out in"], *, names: Sequence[str], lr: float = 0.1
) -> pd.DataFrame:
    """The first step of several contestants from one weight along one gradient.

    Args:
        W: The weight.
        G: Its gradient.
        names: Contestants that update a matrix as it is.
        lr: Learning rate of all; default 0.1.

    Returns:
        One row a contestant: the step over its largest entry, singular values of the step over the largest of them, and
        singular values of the new weight.

    Example:
        >>> import torch
        >>> W, G = torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([[3.0, 1.0], [1.0, 3.0]])
        >>> first_updates(W, G, names=["lion"]).loc["Lion", "its singular values"]
        '1.00, 0.00'
    """
    import pandas as pd

    rows = {}
    for name in names:
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        layer.weight.data.copy_(W)
        layer.weight.grad = G.clone()
        contestant(name, nn.Sequential(layer, nn.Identity()), lr=lr).step()
        step = layer.weight.detach() - W
        values, largest = singular_values(step).tolist(), float(step.abs().max())
        rows[CONTESTANTS[name].label] = {
            "the step": str([[round(entry / largest, 2) + 0.0 for entry in row] for row in step.tolist()]),
            "its singular values": ", ".join(f"{value / values[0]:.2f}" for value in values),
            "those of the new weight": ", ".join(f"{value:.3f}" for value in singular_values(layer.weight).tolist()),
        }
    return pd.DataFrame(rows).T


def _of(table: pd.DataFrame, track: str, *kinds: str) -> pd.DataFrame:
    if track not in TRACKS:
        raise unknown_name("track", track, TRACKS)
    return table.loc[(table["track"] == track) & table["kind"].isin(kinds)]


def _rows(table: pd.DataFrame, track: str, budget: str) -> pd.DataFrame:
    """The runs of the evaluation seeds; for equal time AdamW's are those of equal tokens."""
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    if budget == "tokens":
        return _of(table, track, "race")
    rows = _of(table, track, "race", "timed")
    return rows.loc[(rows["kind"] == "timed") | (rows["name"] == _BASELINE)]


def _labels(rows: pd.DataFrame) -> dict[str, str]:
    """Name to label of those in the rows, in the order of the contestants."""
    present = set(rows["name"])
    return {name: entry.label for name, entry in CONTESTANTS.items() if name in present}


def _best_rates(table: pd.DataFrame, track: str) -> dict[str, str]:
    rates = _of(table, track, "race").groupby("name")["lr"].first()
    return {CONTESTANTS[str(name)].label: f"{lr:g}" for name, lr in rates.items()}


def _told(values: list[float]) -> str:
    """Mean and half width of its interval."""
    if not np.isfinite(values).all():
        return "diverged"
    mean, low, high = mean_interval(values)
    half = (high - low) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 3
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
