"""What the geometry of representations says: curves, phases over seeds, rivals, the end of the curve, fine-tuning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from orthokit.errors import ReportError, ShapeError, unknown_name
from orthokit.figures.intervals import mean_interval
from orthokit.lab.arena import METHODS
from orthokit.lab.contestants import CONTESTANTS
from orthokit.studies.representation import MEASURES
from orthokit.studies.representation_phases import PHASES, turning_points

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "alpha_against_rank",
    "asset_against_curve",
    "byte_variety",
    "curve_turns",
    "finetuning_changes",
    "layer_ranks",
    "phase_sizes",
    "phase_variants",
    "rank_against_loss",
    "rank_at_equal_loss",
    "rank_change",
    "representation_curves",
    "representation_summary",
]

Curves = dict[str, tuple[list[float], list[list[float]]]]
_DEFAULT = {"layer": "norm", "tokens": "last"}


def phase_sizes(
    table: pd.DataFrame, *, size: str, optimizer: str, measure: str = "rankme_eigen", **where: str
) -> dict[str, list[float]]:
    """The sizes of the phases, one a seed, with turning points from the *other* seeds.

    Turning points are those of the mean curve of all other seeds, so that a seed's own wandering cannot choose them;
    the interval over seeds then holds what training does to a curve, beside what the texts do.

    Args:
        table: The recorded study, or a live one with at least two seeds.
        size: Size of the model.
        optimizer: Label of the optimizer.
        measure: One of :data:`~orthokit.studies.representation.MEASURES`.
        **where: ``layer`` and ``tokens``; default ``"norm"`` and ``"last"``.

    Returns:
        Phase to one log ratio a seed, above zero if the curve goes the phase's way.

    Raises:
        ShapeError: A single seed.
    """
    curves = np.log(representation_curves(table, size=size, measure=measure, **where)[optimizer][1])
    if len(curves) < 2:
        raise ShapeError("turning points come from other seeds; a single one has none.")
    found: dict[str, list[float]] = {name: [] for name in PHASES}
    for seed, curve in enumerate(curves):
        trough, peak = turning_points(np.delete(curves, seed, axis=0).mean(0))
        sizes = (curve[0] - curve[trough], curve[peak] - curve[trough], curve[peak] - curve[-1])
        for name, value in zip(PHASES, sizes, strict=True):
            found[name].append(float(value))
    return found


# What a phase might owe its being there to: the form of RankMe, the mean, the token, the place.
_VARIANTS: dict[str, dict[str, str]] = {
    "eigenvalues, last token": {},
    "singular values": {"measure": "rankme_singular"},
    "centred": {"measure": "rankme_centred"},
    "mean over tokens": {"tokens": "mean"},
    "before the last norm": {"layer": "last block"},
    "after the first block": {"layer": "blocks.0"},
}


def phase_variants(table: pd.DataFrame, *, size: str) -> pd.DataFrame:
    """The sizes of the phases for other forms of RankMe, other tokens and other layers.

    Args:
        table: The recorded study.
        size: Size of the model.

    Returns:
        One row an optimizer and variant; a cell is the mean of :func:`phase_sizes` and the half width of its interval.
    """
    import pandas as pd

    blocks = [name for name in _where(table, kind="look", size=size)["layer"].unique() if name.startswith("blocks.")]
    found = {}
    for optimizer in representation_curves(table, size=size):
        for name, options in _VARIANTS.items():
            if options.get("layer") == "last block":
                options = {"layer": max(blocks)}
            sizes = phase_sizes(table, size=size, optimizer=optimizer, **options)
            intervals = {phase: mean_interval(values) for phase, values in sizes.items()}
            found[optimizer, name] = {p: f"{mean:.2f} ± {high - mean:.2f}" for p, (mean, _, high) in intervals.items()}
    return pd.DataFrame.from_dict(found, orient="index")


def curve_turns(curves: Curves) -> dict[str, tuple[float, float]]:
    """The steps of trough and peak of the mean curve (of logarithms) of every optimizer, for a chart.

    Args:
        curves: As of :func:`representation_curves`.

    Returns:
        Label to ``(trough, peak)``.

    Example:
        >>> curve_turns({"A": ([0.0, 1.0, 2.0], [[5.0, 2.0, 3.0]])})
        {'A': (1.0, 2.0)}
    """
    places = {label: turning_points(np.log(values).mean(0)) for label, (_, values) in curves.items()}
    return {label: (curves[label][0][trough], curves[label][0][peak]) for label, (trough, peak) in places.items()}


def byte_variety(windows: Int64[Tensor, "count context"]) -> float:
    r"""The number of equally frequent bytes that would vary as much as those that end the windows.

    .. math:: \exp\Big(-\sum_b p_b \log p_b\Big)

    With mutually orthogonal embeddings of equal length it is the RankMe, by eigenvalues, of the embedded last bytes.

    Args:
        windows: Bytes, shape ``(count, context)``.

    Returns:
        At least 1.

    Example:
        >>> round(byte_variety(torch.tensor([[0, 7], [0, 9], [0, 7], [0, 9]])), 6)
        2.0
    """
    shares = torch.bincount(windows[:, -1]).double() / len(windows)
    return float(torch.special.entr(shares).sum().exp())


def representation_curves(
    table: pd.DataFrame, *, size: str, measure: str = "rankme_eigen", against: str = "step", **where: str
) -> Curves:
    """A measure along pretraining for every optimizer, one row a seed.

    Args:
        table: The recorded study, or a live one.
        size: Size of the model.
        measure: One of :data:`~orthokit.studies.representation.MEASURES`, or ``"bits"``.
        against: Column of the horizontal axis; default ``"step"``.
        **where: ``layer`` and ``tokens``; default ``"norm"`` and ``"last"``.

    Returns:
        Label of the optimizer to ``(steps, values)``.

    Raises:
        UnknownNameError: No such measure.
        ReportError: The table holds no such run.
    """
    if measure not in (*MEASURES, "bits"):
        raise unknown_name("measure", measure, (*MEASURES, "bits"))
    rows = _looks(table, size, where)
    return {
        CONTESTANTS[str(name)].label: (
            [float(step) for step in sorted(run[against].unique())],
            run.pivot(index="seed", columns=against, values=measure).to_numpy().tolist(),
        )
        for name, run in rows.groupby("optimizer", sort=False)
    }


def _looks(table: pd.DataFrame, size: str, where: dict[str, str]) -> pd.DataFrame:
    rows = _where(table, kind="look", size=size, **{**_DEFAULT, **where})
    if rows.empty:
        raise ReportError(f"no looks at a model of size {size!r} with {where or _DEFAULT} are recorded.")
    return rows


def _where(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in values.items():
        table = table.loc[table[column] == value]
    return table


def rank_change(
    table: pd.DataFrame, *, size: str, start: int, end: int, measure: str = "rankme_eigen"
) -> dict[str, list[float]]:
    """``log`` of the factor by which a measure changes between two looks, one a seed, for every optimizer."""
    found = {}
    for label, (steps, values) in representation_curves(table, size=size, measure=measure).items():
        curves = np.log(values)
        first, last = steps.index(start), steps.index(end)
        found[label] = (curves[:, last] - curves[:, first]).tolist()
    return found


def rank_against_loss(
    table: pd.DataFrame, *, size: str, measure: str = "rankme_eigen"
) -> dict[str, tuple[list[float], list[float]]]:
    """A measure against validation bits per byte, both as means over the seeds, for every optimizer.

    Args:
        table: The recorded study.
        size: Size of the model.
        measure: See :func:`representation_curves`.

    Returns:
        Label to ``(bits, values)`` with one value a look, in the order of the looks.
    """
    ranks = representation_curves(table, size=size, measure=measure)
    bits = representation_curves(table, size=size, measure="bits")
    return {
        label: (np.mean(bits[label][1], axis=0).tolist(), np.mean(values, axis=0).tolist())
        for label, (_, values) in ranks.items()
    }


def rank_at_equal_loss(
    table: pd.DataFrame, *, size: str, first: str = "Muon", second: str = "AdamW", measure: str = "rankme_eigen"
) -> dict[str, list[float]]:
    """``log`` of the ratio of two optimizers' RankMe, seed by seed, at equal steps and at equal loss.

    Args:
        table: The recorded study.
        size: Size of the model.
        first: Label of the numerator.
        second: Label of the denominator.
        measure: See :func:`representation_curves`.

    Returns:
        ``"equal steps"``: at the end. ``"equal loss"``: where the one that ends lower passes the loss the other ends at
        (linear in the bits per byte between two looks). Above zero the first has the higher rank.
    """
    ranks = representation_curves(table, size=size, measure=measure)
    bits = representation_curves(table, size=size, measure="bits")
    found: dict[str, list[float]] = {"equal steps": [], "equal loss": []}
    runs = [[np.asarray(curves[label][1]) for label in (first, second)] for curves in (bits, ranks)]
    for seed in range(len(runs[0][0])):
        (loss, other_loss), (rank, other) = ([each[seed] for each in pair] for pair in runs)
        found["equal steps"].append(float(np.log(rank[-1] / other[-1])))
        level = float(max(loss[-1], other_loss[-1]))
        found["equal loss"].append(_at_loss(loss, rank, level) - _at_loss(other_loss, other, level))
    return found


def _at_loss(bits: np.ndarray, ranks: np.ndarray, level: float) -> float:
    """``log`` rank where the loss first falls to ``level``."""
    lower = np.flatnonzero(np.diff(np.minimum.accumulate(bits), prepend=math.inf) < 0)
    return float(np.interp(-level, -bits[lower], np.log(ranks[lower])))


def alpha_against_rank(table: pd.DataFrame, *, size: str) -> dict[str, list[float]]:
    """Rank correlation, over the looks of a run, between changes of RankMe and of alpha: near -1 if they mirror.

    Args:
        table: The recorded study.
        size: Size of the model.

    Returns:
        Label to one correlation a seed.
    """
    ranks = representation_curves(table, size=size)
    alphas = representation_curves(table, size=size, measure="alpha")
    return {
        label: [
            float(np.corrcoef(_order(np.diff(np.log(rank))), _order(np.diff(alpha)))[0, 1])
            for rank, alpha in zip(values, alphas[label][1], strict=True)
        ]
        for label, (_, values) in ranks.items()
    }


def _order(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort()


def layer_ranks(
    table: pd.DataFrame, *, size: str, optimizer: str, measure: str = "effective_rank"
) -> dict[str, dict[int, list[float]]]:
    """A measure of every layer's features (last token) at the start, at the trough of the last layer and at the end.

    Args:
        table: The recorded study.
        size: Size of the model.
        optimizer: Label of the optimizer.
        measure: See :func:`representation_curves`.

    Returns:
        Layer, from the embedding up, to step to one value a seed.
    """
    layers = _where(table, kind="look", size=size, tokens="last")["layer"].unique()
    steps, last = representation_curves(table, size=size)[optimizer]
    shown = sorted({0, turning_points(np.log(last).mean(0))[0], len(steps) - 1})
    found: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        values = np.asarray(representation_curves(table, size=size, measure=measure, layer=layer)[optimizer][1])
        found[str(layer)] = {int(steps[at]): values[:, at].tolist() for at in shown}
    return found


def asset_against_curve(
    table: pd.DataFrame,
    *,
    size: str = "1M",
    optimizer: str = "Muon",
    octaves: float = 2.0,
    measure: str = "rankme_eigen",
) -> dict[str, Any]:
    """The pretrained TinyGPT of the package beside the end of the recorded curve of its size and optimizer.

    Args:
        table: The recorded study.
        size: Size of the model.
        optimizer: Label of its optimizer.
        octaves: The line through the curve's end is fitted to the looks at most ``2^octaves`` times as far from the
            asset's loss as the end is; default 2, that is four times.
        measure: See :func:`representation_curves`.

    Returns:
        ``bits`` and ``rank`` of the asset; ``above_end``: log of its RankMe over that of each run's end;
        ``above_line``: over where the line through the run's looks, log RankMe against bits per byte, meets its bits.
    """
    asset = _where(table, kind="asset", text="addresses", **_DEFAULT)
    bits, rank = float(asset["bits"].iloc[0]), float(asset[measure].iloc[0])
    losses = np.asarray(representation_curves(table, size=size, measure="bits")[optimizer][1])
    ranks = np.log(representation_curves(table, size=size, measure=measure)[optimizer][1])
    found: dict[str, Any] = {"bits": bits, "rank": rank, "above_end": (np.log(rank) - ranks[:, -1]).tolist()}
    found["above_line"] = []
    for loss, curve in zip(losses, ranks, strict=True):
        near = loss - bits <= 2**octaves * (loss[-1] - bits)
        slope, start = np.polyfit(loss[near], curve[near], 1)
        found["above_line"].append(float(np.log(rank) - (start + slope * bits)))
    return found


def finetuning_changes(table: pd.DataFrame, *, measure: str = "rankme_eigen", tokens: str = "last") -> pd.DataFrame:
    """What fine-tuning does to RankMe and to the loss, one row a run and text.

    Args:
        table: The recorded study.
        measure: See :func:`representation_curves`.
        tokens: ``"last"`` (default) or ``"mean"``.

    Returns:
        ``method`` (its label, with the control named), ``seed, text, change`` (log of after over before) and ``bits``
        (after minus before).
    """
    import pandas as pd

    rows = _where(table, kind="finetune", layer=_DEFAULT["layer"], tokens=tokens)
    found = []
    for key, run in rows.groupby(["method", "trained_on", "seed", "text"], sort=False):
        method, trained, seed, text = cast("tuple[str, str, int, str]", key)
        before, after = (run.loc[run["step"] == step].iloc[0] for step in (run["step"].min(), run["step"].max()))
        label = METHODS[method].label + ("" if trained == "moby_dick" else ", the old text again")
        found.append(
            {
                **{"method": label, "seed": int(seed), "text": text},
                **{"change": math.log(after[measure] / before[measure]), "bits": after["bits"] - before["bits"]},
            }
        )
    return pd.DataFrame(found)


def representation_summary(table: pd.DataFrame, *, size: str) -> pd.DataFrame:
    """Start, trough and end of RankMe (both forms), with alpha and loss at the end: means over seeds, by optimizer."""
    import pandas as pd

    found = {}
    for label, (steps, values) in representation_curves(table, size=size).items():
        mean = np.mean(values, axis=0)
        trough = turning_points(np.log(values).mean(0))[0]
        ends = {
            name: float(np.mean(representation_curves(table, size=size, measure=key)[label][1], axis=0)[-1])
            for name, key in (("RankMe, singular", "rankme_singular"), ("alpha", "alpha"), ("bits per byte", "bits"))
        }
        found[label] = {
            **{"seeds": len(values), "RankMe, eigen: start": mean[0], "trough": mean[trough]},
            **{"at step": int(steps[trough]), "end": mean[-1], **ends},
        }
    return pd.DataFrame.from_dict(found, orient="index").round(2)
