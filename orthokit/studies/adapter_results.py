"""What the recorded comparison of adapters says: finals, what is kept, rates, budgets, costs; and a short one live."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from orthokit.errors import ReportError, unknown_name
from orthokit.figures.intervals import mean_interval
from orthokit.studies._engine import load_evidence
from orthokit.studies.adapter_study import ADAPTER_RATES
from orthokit.studies.adapters import ADAPTER_METHODS, ADAPTER_TRACKS, adapt_once, adapter_budget

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "KEPT",
    "adapter_costs",
    "adapter_curves",
    "adapter_differences",
    "adapter_finals",
    "adapter_live",
    "adapter_rates",
    "adapter_settings",
    "adapter_summary",
    "adapter_trade",
    "adapters_by_budget",
    "adapters_kept",
    "best_rates_by_block",
    "block_exponents",
]

KEPT: dict[str, str] = {
    "singular values": "spectrum_max",
    "row lengths": "norm",
    "angles between rows (rad)": "angle_max",
    "hyperspherical energy": "energy",
}
"""What :func:`adapters_kept` gives, and the columns of the study that hold it; all are largest changes."""
Curves = dict[str, tuple[list[float], list[list[float]]]]


def adapter_finals(table: pd.DataFrame, track: str, *, value: str = "value") -> pd.DataFrame:
    """The last value of every run at the common budget, one row a seed, one column a method.

    Args:
        table: The recorded study.
        track: One of its tracks.
        value: ``"value"`` (default), ``"error"``, ``"other"`` or a column of what is kept.

    Returns:
        Columns are labels in the order of the methods.
    """
    rows = _of(table, track, "run")
    last = rows[rows["step"] == rows["step"].max()]
    wide = last.pivot(index="seed", columns="name", values=value)
    return wide.loc[:, list(_labels(rows))].rename(columns=_labels(rows)).rename_axis(columns=None)


def adapter_differences(
    table: pd.DataFrame, track: str, *, baseline: str = "LoRA", value: str = "value"
) -> dict[str, list[float]]:
    """Each method's final value minus the baseline's, seed by seed: below zero is better for losses.

    Args:
        table: The recorded study.
        track: One of its tracks.
        baseline: Label to compare with; default ``"LoRA"``.
        value: See :func:`adapter_finals`.

    Returns:
        Label to one difference a seed, without the baseline itself.

    Raises:
        UnknownNameError: No such method in the table.
    """
    finals = adapter_finals(table, track, value=value)
    if baseline not in finals:
        raise unknown_name("method", baseline, list(finals))
    return {label: (finals[label] - finals[baseline]).tolist() for label in finals if label != baseline}


def adapter_curves(table: pd.DataFrame, track: str) -> Curves:
    """Held-out loss along training.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        Label to ``(steps, values)``, one row a seed.
    """
    rows = _of(table, track, "run")
    curves: Curves = {}
    for name, label in _labels(rows).items():
        grid = rows[rows["name"] == name].pivot(index="seed", columns="step", values="value")
        curves[label] = ([float(step) for step in grid.columns], grid.to_numpy().tolist())
    return curves


def adapter_rates(table: pd.DataFrame, track: str) -> tuple[Curves, dict[str, tuple[float, list[float]]]]:
    """Final loss against the learning rate on the tuning seed, and at the chosen rate on the others.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        Label to ``(rates, values)``, one row for the tuning seed; label to ``(rate, values of the other seeds)``.
    """
    rows = _of(table, track, "tune")
    finals, rates = adapter_finals(table, track), _of(table, track, "run").groupby("name")["lr"].first()
    curves: Curves = {}
    chosen = {}
    for name, label in _labels(rows).items():
        grid = rows[rows["name"] == name].pivot(index="seed", columns="lr", values="value")
        curves[label] = ([float(lr) for lr in grid.columns], grid.to_numpy().tolist())
        chosen[label] = (float(rates[name]), finals[label].tolist())
    return curves, chosen


def adapters_kept(table: pd.DataFrame, track: str) -> dict[str, dict[str, list[float]]]:
    """What each method changed of what describes the weights, as :data:`KEPT` lists it.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        Label to measure to one number a seed: the largest relative change over all layers, of angles in radians.
    """
    found = {measure: adapter_finals(table, track, value=column) for measure, column in KEPT.items()}
    angles = next(measure for measure, column in KEPT.items() if column == "angle_max")
    found[angles] = found[angles] * (math.pi / 180)
    return {label: {measure: of[label].tolist() for measure, of in found.items()} for label in found[angles]}


def adapter_trade(table: pd.DataFrame, track: str) -> dict[str, list[tuple[float, float]]]:
    """What was gained on the task and what was lost of what the model could do before, run by run.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        Label to pairs ``(gain, loss)``, one a seed, both as positive numbers where they go the usual way.
    """
    rows = _of(table, track, "run")
    begun = rows[rows["step"] == 0].iloc[0]
    finals, others = adapter_finals(table, track), adapter_finals(table, track, value="other")
    pairs = {label: zip(finals[label], others[label], strict=True) for label in finals}
    return {
        label: [(float(begun["value"] - value), float(other - begun["other"])) for value, other in found]
        for label, found in pairs.items()
    }


def adapter_costs(table: pd.DataFrame, track: str) -> pd.DataFrame:
    """What a step costs on one core.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        One row a method: ``trainable``, ``of LoRA's step`` (measured in turns with LoRA, so that other load hits both)
        and ``seconds a step``, that ratio times LoRA's own seconds.
    """
    rows = _of(table, track, "cost").set_index("name")
    # LoRA against itself would be 1 but for the scatter of the clock.
    ratio = rows["ratio"].where(rows.index != "lora", 1.0)
    result = rows["trainable"].astype(int).to_frame("trainable")
    result["of LoRA's step"] = ratio
    result["seconds a step"] = ratio * rows["step_ms"]["lora"] / 1e3
    return result.rename(index=_labels(rows.reset_index()))


def adapters_by_budget(table: pd.DataFrame, track: str = "tinygpt") -> Curves:
    """Final loss against the number of trainable parameters.

    Args:
        table: The recorded study.
        track: One of its tracks; default the language model, the only one with several budgets.

    Returns:
        Label to ``(numbers, values)``, one row a seed, for methods that ran at more than one budget.
    """
    rows = table.loc[(table["track"] == track) & (table["kind"] == "run")]
    rows = rows[rows["step"] == rows["step"].max()]
    curves: Curves = {}
    for name, label in _labels(rows).items():
        grid = rows[rows["name"] == name].pivot(index="seed", columns="trainable", values="value")
        if len(grid.columns) > 1:
            curves[label] = ([float(count) for count in grid.columns], grid.to_numpy().tolist())
    return curves


def best_rates_by_block(table: pd.DataFrame, track: str = "tinygpt") -> dict[str, tuple[list[float], list[float]]]:
    """The best learning rate of OFT for every block size, as it is and with the rate that follows the block.

    The minimum of the parabola through the best rate and its neighbours, over the logarithm of the rate; losses are
    means over the seeds.

    Args:
        table: The recorded study.
        track: ``"tinygpt"`` (default) or ``"noun"``, which was measured with the scale alone.

    Returns:
        ``"plain"`` and ``"block_rate"`` to ``(block sizes, rates)``.
    """
    return _by_block(_of(table, track, "block"))


def block_exponents(table: pd.DataFrame, track: str = "tinygpt") -> dict[str, list[float]]:
    """With which power of the block size the best learning rate of OFT goes, seed by seed.

    Args:
        table: The recorded study.
        track: As above.

    Returns:
        ``"plain"`` and ``"block_rate"`` to one slope a seed, of a straight line through logarithms.
    """
    each = [_by_block(part) for _, part in cast("Any", _of(table, track, "block").groupby("seed"))]
    return {key: [float(np.polyfit(np.log(one[key][0]), np.log(one[key][1]), 1)[0]) for one in each] for key in each[0]}


def _by_block(rows: Any) -> dict[str, tuple[list[float], list[float]]]:
    found: dict[tuple[int, bool], float] = {}
    for (block, scaled), part in rows.groupby(["block", "block_rate"]):
        means = part.groupby("lr")["value"].mean()
        found[int(block), str(scaled) == "True"] = _vertex(means.index.to_numpy(), means.to_numpy())
    blocks = sorted({block for block, _ in found})
    names = {"plain": False, "block_rate": True} if any(not scaled for _, scaled in found) else {"block_rate": True}
    # Where the scale is 1, one measurement serves both.
    return {
        key: ([float(block) for block in blocks], [found.get((block, scaled), found[block, True]) for block in blocks])
        for key, scaled in names.items()
    }


def adapter_settings(table: pd.DataFrame, track: str) -> pd.DataFrame:
    """How the budgets were matched and how the rates were found.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        One row a method: ``size`` in words, ``trainable``, ``of OFT's``, ``learning rate``, ``rates tried`` and
        ``best lies``: ``"inside"`` the rates, or ``"at the edge"`` of them.
    """
    import pandas as pd

    runs, tuned = _of(table, track, "run"), _of(table, track, "tune")
    counts = runs.groupby("name")["trainable"].first()
    rows = {}
    for name, label in _labels(runs).items():
        first = runs[runs["name"] == name].iloc[0]
        rates = sorted(tuned[tuned["name"] == name]["lr"])
        rows[label] = {
            "size": ADAPTER_METHODS[name].says.format(int(first["size"])),
            "trainable": int(counts[name]),
            "of OFT's": f"{counts[name] / counts['oft']:.2f}",
            "learning rate": f"{first['lr']:g}",
            "rates tried": f"{len(rates)}, {rates[0]:g} to {rates[-1]:g}",
            "best lies": "inside" if rates[0] < first["lr"] < rates[-1] else "at the edge",
        }
    return pd.DataFrame(rows).T


def adapter_summary(table: pd.DataFrame, track: str) -> pd.DataFrame:
    """The comparison as a table, best first.

    Args:
        table: The recorded study.
        track: One of its tracks.

    Returns:
        One row a method: final loss, error rate where the task has one, what became of what the model could do before,
        each with the half width of its 95 % interval, and the cost of a step over LoRA's and in milliseconds.
    """
    import pandas as pd

    course = ADAPTER_TRACKS[track]
    columns = {course.unit: "value", **({"error rate": "error"} if course.error else {}), course.other: "other"}
    finals = {heading: adapter_finals(table, track, value=value) for heading, value in columns.items()}
    found = {heading: {label: _told(of[label].tolist()) for label in of} for heading, of in finals.items()}
    costs = adapter_costs(table, track)
    found["step, of LoRA's"] = {str(label): f"{cost:.2f}" for label, cost in costs["of LoRA's step"].items()}
    found["ms a step"] = {str(label): f"{1e3 * cost:.0f}" for label, cost in costs["seconds a step"].items()}
    order = finals[course.unit].mean().sort_values().index
    start = _of(table, track, "run").query("step == 0").iloc[0]
    begun = {heading: f"{start[value]:.3f}" for heading, value in columns.items()}
    return pd.concat([pd.DataFrame(found).loc[order], pd.DataFrame({"before": begun}).T]).fillna("")


def adapter_live(
    track: str,
    *,
    seeds: Sequence[int],
    steps: int,
    evaluations: int = 4,
    names: Sequence[str] | None = None,
    small: bool = False,
) -> pd.DataFrame:
    """A short comparison here and now, in the form of the recorded one: each method at its tuned rate.

    Args:
        track: One of the tracks.
        seeds: Seeds of the batches and of the adapters.
        steps: Length of every run, ``>= 1``.
        evaluations: Evaluations of a run after the start; default 4.
        names: Which methods; default all.
        small: Far fewer layers and data, for tests.

    Returns:
        Rows as the recorded study has them, all of kind ``"run"``.
    """
    import pandas as pd

    rates, settings = _tuned_rates(track), adapter_budget(track)
    options = {"steps": steps, "evaluations": evaluations, "small": small, "kept": True}
    return pd.DataFrame(
        {
            **{"kind": "run", "track": track, "name": name, "scale": 1.0, "lr": rates[name], "seed": seed},
            **{"size": settings[name][0], "trainable": settings[name][1]},
            **row,
        }
        for name in (ADAPTER_METHODS if names is None else names)
        for seed in seeds
        for row in adapt_once(track, name, lr=rates[name], seed=seed, **options)
    )


def _tuned_rates(track: str) -> dict[str, float]:
    """Name to the rate that the recorded study found best; where none is recorded, the second of those it tries."""
    rates = {name: grid[1] for name, grid in ADAPTER_RATES[track].items()}
    try:
        table, _ = load_evidence("adapters")
    except ReportError:
        return rates
    found = _of(table, track, "run").groupby("name")["lr"].first().to_dict()
    return rates | {name: float(lr) for name, lr in found.items() if name in rates}


def _of(table: pd.DataFrame, track: str, kind: str) -> Any:
    """Rows of a kind at the common budget, which rows of blocks have no multiple of."""
    if track not in ADAPTER_TRACKS:
        raise unknown_name("track", track, ADAPTER_TRACKS)
    return table.loc[(table["track"] == track) & (table["kind"] == kind) & table["scale"].isin([1.0, math.nan])]


def _labels(rows: pd.DataFrame) -> dict[str, str]:
    """Name to label of those in the rows, in the order of the methods."""
    present = set(rows["name"])
    return {name: entry.label for name, entry in ADAPTER_METHODS.items() if name in present}


def _told(values: list[float]) -> str:
    """Mean and half width of its interval."""
    if not np.isfinite(values).all():
        return "diverged"
    if len(values) < 2:
        return f"{values[0]:.3f}"
    mean, low, high = mean_interval(values)
    half = (high - low) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 3
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _vertex(rates: np.ndarray, values: np.ndarray) -> float:
    """Where the parabola through the lowest value and its neighbours has its minimum; at an edge, the edge."""
    best = int(np.nanargmin(values))
    if not 0 < best < len(rates) - 1 or not np.isfinite(values[best - 1 : best + 2]).all():
        return float(rates[best])
    curve = np.polyfit(np.log(rates[best - 1 : best + 2]), values[best - 1 : best + 2], 2)
    return float(np.exp(-curve[1] / (2 * curve[0])))
