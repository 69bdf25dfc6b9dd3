"""Which diagnostic goes along with forgetting, over all runs of the recorded arena, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from orthokit.errors import ReportError, unknown_name
from orthokit.studies.arena_results import arena_runs

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ARENA_DIAGNOSTICS", "Correlations", "correlation_gap", "forgetting_correlations"]

ARENA_DIAGNOSTICS: dict[str, str] = {
    "size of the change ‖ΔW‖/‖W‖": "moved",
    "stable rank of ΔW": "stable_rank",
    "largest change of a singular value": "spectrum",
    "retention drift |ΔP|/σ₁": "retention",
    "its fluctuation": "fluctuation",
    "fluctuation of E/‖ΔW‖": "adaptation_fluctuation",
    "drift on general inputs (CSD)": "csd_general",
    "the same, unaligned": "csd_general_unaligned",
    "drift on target inputs (CSD)": "csd_target",
    "raw distance of activations": "raw",
    "Procrustes residual": "procrustes",
    "Gram distortion": "gram",
    "1 − CKA": "cka",
}
"""What a figure calls a diagnostic, and the study's column of it. CKA is turned over, so that all are distances."""
KINDS = ("Pearson", "Spearman", "within methods")
Bounded = tuple[float, float, float]
_COMMON = 0.9


@dataclass(frozen=True)
class Correlations:
    """Correlations with their intervals.

    Attributes:
        found: Kind to diagnostic to ``(value, low, high)``; kinds are ``"Pearson"``, ``"Spearman"`` and ``"within
            methods"`` (of ranks, each method's mean rank taken off on both sides).
        runs: How many runs they are over.
        methods: How many methods, which is how many independent things there are.
    """

    found: dict[str, dict[str, Bounded]]
    runs: int
    methods: int


def forgetting_correlations(
    table: pd.DataFrame,
    ground: str,
    *,
    against: str = "forgetting",
    kinds: Sequence[str] = ("tune", "run"),
    draws: int = 2000,
    seed: int = 0,
) -> Correlations:
    """Correlation of every diagnostic with forgetting.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        against: ``"forgetting"`` (default) or ``"gain"``.
        kinds: Runs at all rates and at the best one (default), or ``("run",)``.
        draws: Resamplings for the intervals, ``>= 100``.
        seed: Of the resamplings.

    Returns:
        :class:`Correlations` with 95 % intervals. Runs of a method are not independent, so whole *methods* are drawn
        with replacement, not runs. Diagnostics that are missing or the same everywhere are left out.

    Raises:
        ReportError: Fewer than three methods.

    Numerics:
        A drawn method with weight ``w`` counts ``w`` times; ranks and moments are weighted, so no table is copied.

    References:
        A. C. Cameron, J. B. Gelbach, D. L. Miller (2008), Bootstrap-based improvements for inference with clustered
        errors; with few clusters such intervals are too narrow rather than too wide.
    """
    runs, columns = _diagnosed(table, ground, against, kinds)
    found: dict[str, dict[str, Bounded]] = {kind: {} for kind in KINDS}
    for label, column in columns.items():
        for kind, values in _correlated(runs, column, against, draws, seed).items():
            found[kind][label] = _bounded(values)
    return Correlations(found, len(runs), runs["method"].nunique())


def correlation_gap(
    table: pd.DataFrame,
    ground: str,
    first: str,
    second: str,
    *,
    kind: str = "Spearman",
    against: str = "forgetting",
    kinds: Sequence[str] = ("tune", "run"),
    draws: int = 2000,
    seed: int = 0,
) -> Bounded:
    """By how much one diagnostic correlates more than another, with an interval from the same resamplings.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        first: Name of a diagnostic in :data:`ARENA_DIAGNOSTICS`.
        second: The other.
        kind: ``"Spearman"`` (default), ``"Pearson"`` or ``"within methods"``.
        against: See :func:`forgetting_correlations`.
        kinds: See :func:`forgetting_correlations`.
        draws: See :func:`forgetting_correlations`.
        seed: See :func:`forgetting_correlations`.

    Returns:
        ``(difference, low, high)``.

    Raises:
        UnknownNameError: No such diagnostic in the record, or no such kind.
    """
    runs, columns = _diagnosed(table, ground, against, kinds)
    for name in (first, second):
        if name not in columns:
            raise unknown_name("diagnostic", name, columns)
    if kind not in KINDS:
        raise unknown_name("kind of correlation", kind, KINDS)
    one, other = (_correlated(runs, columns[name], against, draws, seed)[kind] for name in (first, second))
    return _bounded(one - other)


def _diagnosed(table: pd.DataFrame, ground: str, against: str, kinds: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Runs that ended with finite figures, and the diagnostics that nearly all of them have and that vary."""
    runs: Any = arena_runs(table, ground, kinds=kinds)
    runs = runs[np.isfinite(runs[against].to_numpy(dtype=float))]
    present = [column for column in ARENA_DIAGNOSTICS.values() if column in runs]
    runs = runs[runs[present].notna().any(axis=1)]
    finite = np.isfinite(runs[present].to_numpy(dtype=float))
    # What few runs have (only rotations have an angle) must not decide which runs are compared.
    common = [column for column, share in zip(present, finite.mean(axis=0), strict=True) if share >= _COMMON]
    runs = runs[np.isfinite(runs[common].to_numpy(dtype=float)).all(axis=1)]
    if runs["method"].nunique() < 3:
        raise ReportError(f"correlations need three methods at least; {ground!r} has {runs['method'].nunique()}.")
    columns = {label: column for label, column in ARENA_DIAGNOSTICS.items() if column in common}
    return runs, {label: column for label, column in columns.items() if runs[column].nunique() > 1}


def _correlated(runs: Any, column: str, against: str, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Kind to ``(1 + draws,)`` correlations: of the runs as they are first, then of resampled methods."""
    x, y = runs[column].to_numpy(dtype=float), runs[against].to_numpy(dtype=float)
    x = -x if column == "cka" else x
    names, place = np.unique(runs["method"].to_numpy(dtype=str), return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    weights = np.concatenate([np.ones((1, len(names))), drawn])[:, place]
    ranks = [_ranks(values, weights) for values in (x, y)]
    apart = [_without_means(rank, weights, place) for rank in ranks]
    spread = [np.broadcast_to(values, weights.shape) for values in (x, y)]
    return {kind: _pearson(a, b, weights) for kind, (a, b) in zip(KINDS, (spread, ranks, apart), strict=True)}


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks of a sample in which entry i occurs ``weights[:, i]`` times; ``(draws, n)``."""
    below = (values[None] > values[:, None]) + 0.5 * (values[None] == values[:, None])
    return weights @ below


def _without_means(ranks: np.ndarray, weights: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Every method's mean taken off; all runs of a method weigh the same, so it is a plain mean."""
    each = np.eye(place.max() + 1)[place]
    return ranks - (ranks @ each / each.sum(axis=0)) @ each.T


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    x, y = (v - (weights * v).sum(axis=1, keepdims=True) / total for v in (x, y))
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights * x * y).sum(axis=1) / spread


def _bounded(values: np.ndarray) -> Bounded:
    """The value itself, and the middle 95 % of what resampling gives."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)
