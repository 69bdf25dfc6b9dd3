"""Phases of a curve of RankMe, and a test whether they are larger than what the choice of texts explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from orthokit.errors import OptionError, ReportError, ShapeError, unknown_name
from orthokit.figures.intervals import t_quantile
from orthokit.lab.contestants import CONTESTANTS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PHASES", "Phase", "false_alarms", "phase_test", "phases_by_run", "representation_phases", "turning_points"]

PHASES = ("collapse", "rise", "fall")
"""Warm-up collapse, entropy-seeking, compression-seeking, in the order of arXiv 2509.23024."""
LEAST = 0.05
"""A phase changes RankMe by more than 5 %, as ``|log ratio|``: less than that, a curve wanders by itself."""


@dataclass(frozen=True)
class Phase:
    """One phase of one curve.

    Args:
        name: One of :data:`PHASES`.
        start: Step at which it begins.
        end: Step at which it ends.
        size: ``|log|`` of the factor by which RankMe changes; 0.1 is about 10 %.
        low: Lower end of its interval.
        high: Upper end.
        verdict: ``"present"``, ``"absent"`` or ``"undecided"``.
    """

    name: str
    start: int
    end: int
    size: float
    low: float
    high: float
    verdict: str


def turning_points(values: Sequence[float] | np.ndarray) -> tuple[int, int]:
    """Where a curve has its largest rise: the places of the trough before it and of the peak after it.

    What comes before the trough is a fall to it, since no earlier value is lower; the same after the peak.

    Args:
        values: The curve, at least one value.

    Returns:
        ``(trough, peak)``, ``trough <= peak``; equal where the curve never rises.

    Example:
        >>> turning_points([5, 1, 2, 7, 6])
        (1, 3)
    """
    curve = np.asarray(values, dtype=float)
    if curve.ndim != 1 or not len(curve) or not np.isfinite(curve).all():
        raise ShapeError(f"a curve needs at least one value, all finite; got shape {curve.shape}.")
    rises = curve - np.minimum.accumulate(curve)
    peak = int(rises.argmax())
    return int(curve[: peak + 1].argmin()), peak


def phase_test(
    steps: Sequence[int],
    choosing: Sequence[float] | np.ndarray,
    measuring: Sequence[float] | np.ndarray,
    left_out: Sequence[Sequence[float]] | np.ndarray,
    *,
    least: float = LEAST,
    level: float = 0.95,
) -> list[Phase]:
    r"""Whether a curve of RankMe collapses, rises and falls by more than the choice of texts can explain.

    The turning points are those of the curve on one half of the texts; the sizes of the phases are measured on the
    other half. A search for the largest change on noise finds one; measured on other texts it has mean zero.

    Args:
        steps: Looks, ``(n,)``, increasing.
        choosing: RankMe on the half that chooses, ``(n,)``, above 0.
        measuring: RankMe on the half that measures, ``(n,)``.
        left_out: The same without each of its ``g >= 2`` blocks of texts, ``(g, n)``.
        least: Smallest ``|log ratio|`` that is a phase; default 0.05.
        level: Joint level of the three intervals (Bonferroni), in (0, 1); default 0.95.

    Returns:
        Collapse, rise and fall. A phase without a part of the curve to itself has size 0 and is absent. If there is no
        rise, collapse and fall cannot be told apart: the collapse is then the change from first to last.

    Raises:
        ShapeError: Shapes that do not fit together.
        OptionError: A value that is not above 0, or ``least`` below 0.

    Example:
        >>> curve = [10.0, 5.0, 20.0, 19.9]
        >>> [phase.verdict for phase in phase_test([0, 1, 2, 3], curve, curve, [curve, curve])]
        ['present', 'present', 'absent']

    Numerics:
        Delete-one-block jackknife of the log ratio, Student's t with ``g - 1`` degrees of freedom.

    References:
        The phases: arXiv 2509.23024, who read them off the curves; the test is ours.
    """
    a, b, parts = (np.asarray(x, dtype=float) for x in (choosing, measuring, left_out))
    n = len(steps)
    if a.shape != (n,) or b.shape != (n,) or parts.ndim != 2 or parts.shape[1] != n or len(parts) < 2:
        raise ShapeError(f"need {n} values in each curve and at least two blocks; got {a.shape, b.shape, parts.shape}.")
    if least < 0 or not all((x > 0).all() for x in (a, b, parts)):
        raise OptionError(f"RankMe must be above 0 at every look and least >= 0; got least={least}.")
    trough, peak = turning_points(np.log(a))
    b, parts = np.log(b), np.log(parts)

    def phase(name: str, first: int, last: int, sign: int) -> Phase:
        size = float(sign * (b[last] - b[first])) + 0.0  # no phase has size 0, not -0
        each = parts[:, last] - parts[:, first]
        blocks = len(each)
        error = math.sqrt((blocks - 1) / blocks * float(np.square(each - each.mean()).sum()))
        half = t_quantile(blocks - 1, level=1 - (1 - level) / 3) * error
        low, high = size - half, size + half
        verdict = "present" if low > least else "absent" if high <= least else "undecided"
        return Phase(name, int(steps[first]), int(steps[last]), size, low, high, verdict)

    rise = phase("rise", trough, peak, 1)
    if rise.verdict != "present":
        return [phase("collapse", 0, n - 1, -1), rise, phase("fall", n - 1, n - 1, -1)]
    return [phase("collapse", 0, trough, -1), rise, phase("fall", peak, n - 1, -1)]


def false_alarms(
    *, trials: int = 200, looks: int = 18, blocks: int = 16, noise: float = 0.1, least: float = 0.0, seed: int = 0
) -> dict[str, float]:
    """How often flat curves with noise seem to have a phase, if the texts that choose are others, or the same.

    Args:
        trials: Curves, ``>= 1``; default 200.
        looks: Looks of a curve, ``>= 2``; default 18.
        blocks: Blocks of texts in each half, ``>= 2``; default 16.
        noise: Standard deviation of a block's log RankMe, ``> 0``; default 0.1.
        least: See :func:`phase_test`; default 0, where a test is most easily fooled.
        seed: Default 0.

    Returns:
        ``"other texts"`` and ``"same texts"`` to the share of curves with at least one phase.

    Raises:
        OptionError: A number out of range.

    Example:
        >>> found = false_alarms(trials=50)
        >>> found["other texts"] < 0.1 < 0.3 < found["same texts"]
        True
    """
    if min(trials, looks - 1, blocks - 1) < 1 or not noise > 0:
        raise OptionError("need trials >= 1, looks >= 2, blocks >= 2 and noise > 0.")
    drawn = np.random.default_rng(seed).normal(scale=noise, size=(trials, 2, blocks, looks))
    alarms = {"other texts": 0, "same texts": 0}
    for choosing, measuring in drawn:
        whole, without = measuring.mean(0), (measuring.sum(0) - measuring) / (blocks - 1)
        for kind, curve in (("other texts", choosing.mean(0)), ("same texts", whole)):
            found = phase_test(range(looks), np.exp(curve), np.exp(whole), np.exp(without), least=least)
            alarms[kind] += any(phase.verdict == "present" for phase in found)
    return {kind: count / trials for kind, count in alarms.items()}


def representation_phases(
    table: pd.DataFrame, *, values: str = "eigen", least: float = LEAST, level: float = 0.95
) -> pd.DataFrame:
    """The test of :func:`phase_test` on every pretraining of a record: last layer, last token.

    Args:
        table: The recorded study, or a live one.
        values: Which RankMe: ``"eigen"`` (default, as the paper) or ``"singular"``.
        least: See :func:`phase_test`.
        level: See :func:`phase_test`.

    Returns:
        One row a run and phase: ``size, optimizer, seed, phase, start, end, change, low, high, verdict``.

    Raises:
        UnknownNameError: Unknown ``values``.
        ReportError: The table holds no parts to test with.
    """
    import pandas as pd

    if values not in ("eigen", "singular"):
        raise unknown_name("kind of values", values, ("eigen", "singular"))
    halves = table[table["kind"] == "half"]
    if halves.empty:
        raise ReportError("the table holds no rows of kind 'half'. Make it with: orthokit study representation")
    rows = []
    for key, run in halves.groupby(["size", "optimizer", "seed"], sort=False):
        size, optimizer, seed = cast("tuple[str, str, int]", key)
        wide = run.pivot(index="left_out", columns="step", values=f"rankme_{values}")
        blocks = wide[wide.index >= 0].to_numpy()
        chosen, measured = (wide.loc[part].to_numpy() for part in (-2, -1))
        found = phase_test([int(step) for step in wide.columns], chosen, measured, blocks, least=least, level=level)
        labels = {"size": size, "optimizer": CONTESTANTS[optimizer].label, "seed": int(seed)}
        rows += [
            {
                **{**labels, "phase": p.name, "start": p.start, "end": p.end},
                **{"change": p.size, "low": p.low, "high": p.high, "verdict": p.verdict},
            }
            for p in found
        ]
    return pd.DataFrame(rows)


def phases_by_run(phases: pd.DataFrame) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """The table of :func:`representation_phases` as ``figures.phase_forest`` draws it.

    Args:
        phases: The table.

    Returns:
        Phase to optimizer and size to ``(change, low, high)`` of each run.
    """
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for name in PHASES:
        rows = phases[phases["phase"] == name]
        found[name] = {
            f"{optimizer}, {size}": list(zip(run["change"], run["low"], run["high"], strict=True))
            for (size, optimizer), run in rows.groupby(["size", "optimizer"], sort=False)  # type: ignore[misc]
        }
    return found
