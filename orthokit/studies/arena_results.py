"""What the recorded arena says: points with intervals, the front, rates, ways back, layers; and a small one live."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orthokit.diagnostics.front import pareto_front
from orthokit.errors import ReportError, unknown_name
from orthokit.figures.intervals import mean_interval
from orthokit.lab.arena import GROUNDS, METHODS, compete
from orthokit.studies._engine import load_evidence
from orthokit.studies.adapter_results import _told

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "arena_best_rates",
    "arena_finals",
    "arena_grounds",
    "arena_layers",
    "arena_live",
    "arena_notes",
    "arena_points",
    "arena_profiles",
    "arena_rates",
    "arena_runs",
    "arena_settings",
    "arena_summary",
]

Points = dict[str, list[tuple[float, float]]]
Path = tuple[list[float], list[list[float]], list[list[float]]]
"""``(alphas, gains, forgettings)``, one row a seed."""


def arena_grounds(table: pd.DataFrame) -> list[str]:
    """The grounds that a record holds finished runs of.

    Args:
        table: The recorded study.

    Returns:
        Names in the order of the grounds.
    """
    present = set(table.loc[table["kind"] == "run", "ground"])
    return [name for name in GROUNDS if name in present]


def arena_runs(table: pd.DataFrame, ground: str, *, kinds: Sequence[str] = ("run",)) -> pd.DataFrame:
    """Every finished run with what it gained and what it forgot.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        kinds: ``("run",)`` (default): several seeds at the best rate; with ``"tune"`` also one seed at all rates.

    Returns:
        The last row of each run, in the order of the methods, with the columns ``label``, ``gain`` (the target loss at
        the start minus now) and ``forgetting`` (the general loss now minus that at the start; below zero: improved).

    Raises:
        UnknownNameError: No such ground.
        ReportError: The table has no runs there.
    """
    rows, begun = _of(table, ground, *kinds), _start(table, ground)
    rows = rows[rows["step"] == rows.groupby(["kind", "method", "lr", "seed"])["step"].transform("max")]
    labels, order = _labels(rows), {name: index for index, name in enumerate(METHODS)}
    return rows.sort_values("method", key=lambda names: names.map(order), kind="stable").assign(
        label=rows["method"].map(labels),
        gain=begun["target"] - rows["target"],
        forgetting=rows["general"] - begun["general"],
    )


def arena_points(table: pd.DataFrame, ground: str) -> Points:
    """Gain and forgetting of every seed at the best rate.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        Label to pairs ``(gain, forgetting)``, one a seed.
    """
    runs = arena_runs(table, ground)
    return {str(label): _pairs(part) for label, part in runs.groupby("label", sort=False)}


def arena_finals(table: pd.DataFrame, ground: str) -> pd.DataFrame:
    """Gain and forgetting of every method with intervals, and who is on the front.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        One row a label: ``gain``, ``gain_low``, ``gain_high``, ``forgetting``, ``forgetting_low``, ``forgetting_high``
        (means over seeds with Student's 95 % intervals; NaN where a run diverged), ``seeds``, ``front`` (no other mean
        is as good on both axes and better on one), ``trainable`` and ``lr``.
    """
    import pandas as pd

    runs, rows = arena_runs(table, ground), {}
    for label, part in runs.groupby("label", sort=False):
        row: dict[str, Any] = {}
        for axis in ("gain", "forgetting"):
            row |= dict(zip((axis, f"{axis}_low", f"{axis}_high"), _interval(part[axis]), strict=True))
        rows[label] = row | {"seeds": len(part), "trainable": int(part["trainable"].iloc[0]), "lr": part["lr"].iloc[0]}
    found: Any = pd.DataFrame.from_dict(rows, orient="index")
    good = found[["gain", "forgetting"]].notna().all(axis=1)
    found["front"] = False
    if good.any():
        found.loc[good, "front"] = pareto_front(_kept(found[good])).numpy()
    return found


def arena_summary(table: pd.DataFrame, ground: str) -> pd.DataFrame:
    """The ground as a table, most gained first.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        One row a method: losses after training, gain and forgetting with half widths of their 95 % intervals, error
        rate and change of the sentences' geometry where there are such, whether it is on the front, and the row before.
    """
    import pandas as pd

    place, begun = GROUNDS[ground], _start(table, ground)
    runs: Any = arena_runs(table, ground)
    columns = {f"target ({place.unit})": "target", "gain": "gain", place.other: "general", "forgetting": "forgetting"}
    extra = {"error rate": "error", "geometry lost": "geometry"}
    columns |= {heading: name for heading, name in extra.items() if name in runs and runs[name].notna().any()}
    parts = {str(label): part for label, part in runs.groupby("label", sort=False)}
    found = {
        heading: {label: _told(part[name].tolist()) for label, part in parts.items()}
        for heading, name in columns.items()
    }
    finals: Any = arena_finals(table, ground)
    found["on the front"] = {str(label): "yes" if front else "" for label, front in finals["front"].items()}
    before = {
        heading: f"{begun[name]:.3f}" for heading, name in columns.items() if name in ("target", "general", "error")
    }
    rows = pd.DataFrame(found).loc[finals.sort_values("gain", ascending=False).index]
    return pd.concat([rows, pd.DataFrame({"before": before}).T]).fillna("")


def arena_settings(table: pd.DataFrame, ground: str) -> pd.DataFrame:
    """How the budgets were matched and how the rates were found.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        One row a method: ``size`` in words, ``trainable``, ``of OFT's``, ``learning rate``, ``rates tried`` and
        ``best lies``: ``"inside"`` the rates, or ``"at the edge"`` of them.
    """
    import pandas as pd

    runs, tuned, rows = arena_runs(table, ground), _of(table, ground, "tune"), {}
    ours = runs.loc[runs["method"] == "oft", "trainable"]
    for name, label in _labels(runs).items():
        first = runs[runs["method"] == name].iloc[0]
        rates = sorted(set(tuned.loc[tuned["method"] == name, "lr"]))
        inside = len(rates) > 0 and rates[0] < first["lr"] < rates[-1]
        rows[label] = {
            "size": METHODS[name].says.format(_size(first["size"])),
            "trainable": int(first["trainable"]),
            "of OFT's": f"{first['trainable'] / ours.iloc[0]:.2f}" if len(ours) else "",
            "learning rate": f"{first['lr']:g}",
            "rates tried": f"{len(rates)}, {rates[0]:g} to {rates[-1]:g}" if rates else "",
            "best lies": "inside" if inside else "at the edge",
        }
    return pd.DataFrame(rows).T


def arena_notes(table: pd.DataFrame, ground: str) -> dict[str, str]:
    """What a chart says of a method when it is pointed at: size, trainable numbers, rate.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        Label to words.
    """
    rows = arena_settings(table, ground).to_dict("index")
    return {
        str(k): f"{row['size']}; {row['trainable']:,} numbers; rate {row['learning rate']}" for k, row in rows.items()
    }


def arena_rates(table: pd.DataFrame, ground: str) -> dict[str, Path]:
    """Gain and forgetting against the learning rate, on the seed that rates were tuned on.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        Label to ``(rates, gains, forgettings)``, one row a seed; NaN where a run diverged.
    """
    runs = arena_runs(table, ground, kinds=("tune",))
    return {str(label): _grid(part, "lr") for label, part in runs.groupby("label", sort=False)}


def arena_layers(table: pd.DataFrame, ground: str, value: str) -> pd.DataFrame:
    """One diagnostic layer by layer, at the best rate on the first seed.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        value: A column of the diagnostics, such as ``"procrustes"``, ``"moved"`` or ``"strength"``.

    Returns:
        One row a layer in the order of the model, one column a method; layers that were not judged are left out.
    """
    rows = _of(table, ground, "layer")
    if value not in rows:
        raise unknown_name("diagnostic", value, rows.columns)
    wide = rows.pivot(index="layer", columns="method", values=value).reindex(rows["layer"].unique())
    labels = _labels(rows)
    wide = wide[list(labels)].rename(columns=labels).dropna(how="all").dropna(axis=1, how="all")
    return wide.rename_axis(index=None, columns=None)


def arena_profiles(table: pd.DataFrame, ground: str, layer: str | None = None) -> tuple[str, dict[str, dict[str, Any]]]:
    r"""What happened along each singular direction of one weight.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        layer: One of the layers that were kept; default the first.

    Returns:
        The layer, and label to ``{"retention": |P(i) - sigma_i| / sigma_1, "adaptation": E(i) / ||dW||_F}``, arrays
        over the directions, the largest singular value first.

    Raises:
        UnknownNameError: No such layer.
    """
    rows = _of(table, ground, "profile")
    layers = list(rows["layer"].unique())
    chosen = layers[0] if layer is None and layers else layer
    if chosen not in layers:
        raise unknown_name("layer", str(chosen), layers)
    found, labels = {}, _labels(rows)
    for name, label in labels.items():
        part = rows[(rows["method"] == name) & (rows["layer"] == chosen)].sort_values("index")
        if len(part):
            sigma, moved = part["sigma"].to_numpy(), part["adaptation"].to_numpy()
            drift = np.abs(part["retention"].to_numpy() - sigma) / sigma[0]
            # E(i) sums in squares to ||dW||_F^2 where the right basis is whole, and to less where it is not.
            found[label] = {"retention": drift, "adaptation": moved / math.sqrt(float((moved**2).sum()) or 1.0)}
    return str(chosen), found


def arena_live(
    ground: str,
    methods: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    portrait: bool = False,
    paths: bool | Sequence[str] = False,
    small: bool = False,
) -> pd.DataFrame:
    """A small arena here and now, in the form of the record: each method at its tuned rate.

    Args:
        ground: One of the grounds.
        methods: Names of methods.
        seeds: Seeds of the batches and of what methods draw.
        steps: Length of every run, ``>= 1``.
        portrait: Add the diagnostics of the finished models.
        paths: Add their ways back: ``True`` for all, or some by name.
        small: Far fewer layers and data, for tests.

    Returns:
        Rows as the recorded study has them.
    """
    import pandas as pd

    rates = arena_best_rates(ground)
    return pd.DataFrame(
        row
        for method in methods
        for seed in seeds
        for row in compete(
            ground, method, lr=rates[method], seed=seed, steps=steps, portrait=portrait, paths=paths, small=small
        )
    )


def arena_best_rates(ground: str) -> dict[str, float]:
    """Method to the rate that the recorded study found best on a ground.

    Args:
        ground: One of the grounds.

    Returns:
        Method to rate; 1e-3 for methods without a record.
    """
    rates = dict.fromkeys(METHODS, 1e-3)
    try:
        table, _ = load_evidence("arena")
        found = _of(table, ground, "run").groupby("method")["lr"].first().to_dict()
    except ReportError:
        return rates
    return rates | {str(name): float(lr) for name, lr in found.items()}


def _of(table: pd.DataFrame, ground: str, *kinds: str) -> Any:
    if ground not in GROUNDS:
        raise unknown_name("ground", ground, GROUNDS)
    rows = table.loc[(table["ground"] == ground) & table["kind"].isin(kinds)]
    if rows.empty:
        raise ReportError(
            f"the record has no rows of kind {' or '.join(kinds)} on {ground!r}. Run: orthokit study arena"
        )
    return rows.reset_index(drop=True)


def _start(table: pd.DataFrame, ground: str) -> Any:
    """The losses before training: the same for all, as a method at rest changes nothing."""
    rows = _of(table, ground, "run")
    rows = rows[rows["step"] == 0]
    if rows.empty:
        raise ReportError(f"the record lacks the losses before training on {ground!r}. Run: orthokit study arena")
    return rows.iloc[0]


def _labels(rows: pd.DataFrame) -> dict[str, str]:
    """Name to label of those in the rows, in the order of the methods."""
    present = set(rows["method"])
    return {name: entry.label for name, entry in METHODS.items() if name in present}


def _pairs(part: Any) -> list[tuple[float, float]]:
    return list(zip(part["gain"].astype(float), part["forgetting"].astype(float), strict=True))


def _grid(part: Any, across: str) -> Path:
    gains, forgettings = (part.pivot(index="seed", columns=across, values=value) for value in ("gain", "forgetting"))
    return [float(x) for x in gains.columns], gains.to_numpy().tolist(), forgettings.to_numpy().tolist()


def _kept(finals: Any) -> torch.Tensor:
    """Points whose axes are both better when larger."""
    return torch.from_numpy(np.stack([finals["gain"].to_numpy(float), -finals["forgetting"].to_numpy(float)], axis=1))


def _interval(values: Any) -> tuple[float, float, float]:
    numbers = np.asarray(values, dtype=float)
    if not np.isfinite(numbers).all():
        return math.nan, math.nan, math.nan
    return mean_interval(numbers) if len(numbers) > 1 else (float(numbers[0]), math.nan, math.nan)


def _size(size: Any) -> int:
    return int(size) if np.isfinite(size) else 0
