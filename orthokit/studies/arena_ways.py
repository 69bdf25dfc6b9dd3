"""The ways back of the recorded arena: paths from finished models to the pretrained one, and what they are worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orthokit.diagnostics.front import hypervolume
from orthokit.errors import ReportError, unknown_name
from orthokit.lab.arena import SCALES
from orthokit.studies.arena_results import Path, _grid, _labels, _of, _pairs, _start, arena_finals

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "arena_areas",
    "arena_paths",
    "arena_stops",
    "equal_gain_savings",
    "forgetting_at_gain",
    "overshoot",
    "overshoot_gain",
    "own_path",
    "path_savings",
    "stop_savings",
]

_GRID, _FINER = 50, 20


def arena_areas(table: pd.DataFrame, ground: str) -> dict[str, float]:
    """How much of the plane each way back covers: all trade-offs that one training offers, as one number.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        Label to the hypervolume of its mean path over (gain, less forgetting than the most forgetful final model of
        the ground), as a share of the rectangle with the largest gain of all; rotations go their own path, others
        straight back.
    """
    finals = arena_finals(table, ground)[["gain", "forgetting"]].dropna().to_numpy(dtype=float)
    best, worst = (float(axis.max(initial=0.0)) for axis in finals.T)
    whole = best * worst
    if not whole > 0:
        return {}
    areas = {}
    for label, paths in arena_paths(table, ground).items():
        _, gains, forgettings = own_path(paths)
        points = np.stack([np.mean(gains, axis=0), -np.mean(forgettings, axis=0)], axis=1)
        if np.isfinite(points).all():
            areas[label] = float(hypervolume(torch.from_numpy(points), reference=(0.0, -worst))) / whole
    return areas


def arena_paths(table: pd.DataFrame, ground: str) -> dict[str, dict[str, Path]]:
    """The ways back from the finished models to the pretrained one.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        Label to path (``"dense"``; of rotations also ``"cayley_sqrt"`` and ``"cayley_linear"``) to ``(alphas, gains,
        forgettings)``, one row a seed.
    """
    rows = _rewound(table, ground)
    rows = rows[~rows["path"].isin(SCALES)]
    found: dict[str, dict[str, Path]] = {}
    for (label, path), part in rows.groupby(["label", "path"], sort=False):
        found.setdefault(str(label), {})[str(path)] = _grid(part, "alpha")
    return found


def arena_stops(table: pd.DataFrame, ground: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Where the layer-wise scales and the uniform one end.

    Args:
        table: The recorded study.
        ground: One of its grounds.

    Returns:
        Label to rule (``"safe"``, ``"min"``, ``"uniform"``) to pairs ``(gain, forgetting)``, one a seed; only methods
        that have them.
    """
    rows = _rewound(table, ground)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (label, rule), part in rows[rows["path"].isin(SCALES)].groupby(["label", "path"], sort=False):
        found.setdefault(str(label), {})[str(rule)] = _pairs(part.sort_values("seed"))
    return found


def forgetting_at_gain(gains: Any, forgettings: Any, gain: float) -> float:
    """What a way back has forgotten where it first reaches a gain, linear between its points.

    Args:
        gains: Along the path from the pretrained model on, ``(n,)``.
        forgettings: At the same points, ``(n,)``.
        gain: The gain asked for.

    Returns:
        The forgetting; NaN if the path never gains that much.

    Example:
        >>> forgetting_at_gain([0.0, 1.0, 2.0], [0.0, 0.5, 2.0], 1.5)
        1.25
    """
    x, y = np.asarray(gains, dtype=float), np.asarray(forgettings, dtype=float)
    there = np.flatnonzero(x >= gain)
    if not len(there) or not np.isfinite(x).all():
        return math.nan
    at = int(there[0])
    if at == 0:
        return float(y[0])
    share = (gain - x[at - 1]) / (x[at] - x[at - 1])
    return float(y[at - 1] + share * (y[at] - y[at - 1]))


def equal_gain_savings(
    table: pd.DataFrame, ground: str, first: tuple[str, str | None], second: tuple[str, str | None]
) -> list[float]:
    r"""How much less the first way has forgotten than the second at the same gain, on average over all gains of both.

    .. math:: \frac{1}{g^*}\int_0^{g^*} \big(F_{second}(g) - F_{first}(g)\big)\, dg

    with $g^*$ the smaller of the two largest gains: the area between two curves in the plane of gain and forgetting.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        first: Label of a method and its path; ``None`` for the path that belongs to it.
        second: The same of the other; it may be another path of the same method.

    Returns:
        One number a seed that both have: above zero the first forgets less. NaN where one of them never gains.

    Raises:
        ReportError: The record lacks that method or path.

    Numerics:
        Both scores are smooth in alpha and ten points are few: they are refined by cubic Hermite interpolation, exact
        for parabolas. Straight lines would add a hundredth of the forgetting, more where points are further apart.
    """
    one, other = (_by_seed(table, ground, *way) for way in (first, second))
    savings = []
    for seed in sorted(one.keys() & other.keys()):
        (g, f), (h, k) = one[seed], other[seed]
        most = min(max(g), max(h))
        grid = most * (np.arange(_GRID) + 0.5) / _GRID
        gaps = [forgetting_at_gain(h, k, gain) - forgetting_at_gain(g, f, gain) for gain in grid]
        savings.append(float(np.mean(gaps)) if most > 0 else math.nan)
    return savings


def path_savings(table: pd.DataFrame, ground: str, label: str) -> list[float]:
    """How much less the path of rotations has forgotten than the dense one, as a share of all that is forgotten.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        label: Label of a method that turns.

    Returns:
        :func:`equal_gain_savings` over the forgetting of the finished model, one number a seed; NaN where that forgot
        nothing.

    Raises:
        ReportError: The record lacks that method or one of the paths.
    """
    savings = equal_gain_savings(table, ground, (label, "cayley_linear"), (label, "dense"))
    _, _, forgettings = _way(table, ground, label, "dense")
    ends = [row[-1] for row in forgettings]
    return [saved / end if end > 0 else math.nan for saved, end in zip(savings, ends, strict=True)]


def overshoot(
    table: pd.DataFrame, ground: str, label: str, *, path: str | None = None, at: float | None = None
) -> list[float]:
    r"""By going back to a point of the path: the share of forgetting undone minus the share of gain given up.

    $(1 - F(\alpha)/F(1)) - (1 - G(\alpha)/G(1))$, above zero where the last stretch forgot more than it gained.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        label: Label of a method.
        path: Its path; default that of rotations with the root, as published, else the dense one.
        at: The point, one of those of the path; default the one nearest to halfway.

    Returns:
        One number a seed; NaN where nothing was gained or forgotten.

    Raises:
        ReportError: The record lacks that method, path or point.
    """
    if path is None and "cayley_sqrt" in arena_paths(table, ground).get(label, {}):
        path = "cayley_sqrt"
    alphas, gains, forgettings = _way(table, ground, label, path)
    place = int(np.abs(np.asarray(alphas) - (0.5 if at is None else at)).argmin())
    if at is not None and not math.isclose(alphas[place], at, abs_tol=1e-9):
        raise ReportError(f"the path of {label} has no point {at:g}; it has {', '.join(f'{a:g}' for a in alphas)}.")
    shares = []
    for g, f in zip(gains, forgettings, strict=True):
        whole = g[-1] > 0 and f[-1] > 0
        shares.append(g[place] / g[-1] - f[place] / f[-1] if whole else math.nan)
    return shares


def overshoot_gain(table: pd.DataFrame, ground: str, label: str, *, path: str | None = None) -> list[float]:
    """What going back adds to the gain itself: the target is better before the end of the path.

    The point is the best of the *other* seeds, so that choosing it is not counted as a success of this one.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        label: Label of a method.
        path: Its path; default the one that belongs to it.

    Returns:
        Gain there minus gain at the end, one number a seed; 0 where the others are best at the end, NaN where there are
        no others.

    Raises:
        ReportError: The record lacks that method or path.
    """
    _, gains, _ = _way(table, ground, label, path)
    each = np.asarray(gains, dtype=float)
    if len(each) < 2:
        return [math.nan] * len(each)
    chosen = [int(np.delete(each, seed, axis=0).mean(axis=0).argmax()) for seed in range(len(each))]
    return [float(row[at] - row[-1]) for row, at in zip(each, chosen, strict=True)]


def stop_savings(table: pd.DataFrame, ground: str, label: str, rule: str, *, path: str | None = None) -> list[float]:
    """How much less a layer-wise scale forgets than the uniform path where that gains as much.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        label: Label of a method that turns.
        rule: ``"safe"`` or ``"min"``.
        path: The uniform path; default the one that belongs to the method.

    Returns:
        One number a seed: above zero the layer-wise scale is the better one. NaN where the path never gains as much.

    Raises:
        UnknownNameError: The method has no such point.
    """
    stops = arena_stops(table, ground).get(label, {})
    if rule not in stops:
        raise unknown_name(f"rule of {label}", rule, stops)
    curves = _by_seed(table, ground, label, path).values()
    return [
        forgetting_at_gain(g, f, gain) - forgetting
        for (g, f), (gain, forgetting) in zip(curves, stops[rule], strict=True)
    ]


def _refined(values: Any, across: Any) -> np.ndarray:
    """Twenty points for one, on the cubic Hermite curve whose slopes are central differences."""
    v, x = np.asarray(values, dtype=float), np.asarray(across, dtype=float)
    if len(v) < 3:
        return v
    t, slopes, widths = np.arange(_FINER) / _FINER, np.gradient(v, x, edge_order=2), np.diff(x)
    a, b, down, up = (each[:, None] for each in (v[:-1], v[1:], slopes[:-1] * widths, slopes[1:] * widths))
    fine = a * (1 + 2 * t) * (1 - t) ** 2 + down * t * (1 - t) ** 2 + b * t**2 * (3 - 2 * t) + up * t**2 * (t - 1)
    return np.append(fine.ravel(), v[-1])


def _way(table: pd.DataFrame, ground: str, label: str, path: str | None) -> Path:
    paths = arena_paths(table, ground).get(label)
    if not paths or (path is not None and path not in paths):
        raise ReportError(
            f"the record has no {path or 'way back'} of {label!r} on {ground!r}. Run: orthokit study arena"
        )
    return own_path(paths) if path is None else paths[path]


def _by_seed(table: pd.DataFrame, ground: str, label: str, path: str | None) -> dict[int, tuple[Any, Any]]:
    """Seed to the refined gains and forgettings; rows of a path are in the order of the seeds."""
    rows = _rewound(table, ground)
    seeds = sorted(set(rows.loc[rows["label"] == label, "seed"]))
    alphas, gains, forgettings = _way(table, ground, label, path)
    curves = ((_refined(g, alphas), _refined(f, alphas)) for g, f in zip(gains, forgettings, strict=True))
    return dict(zip(map(int, seeds), curves, strict=True))


def own_path(paths: dict[str, Path]) -> Path:
    """The way back that belongs to a method: rotations stay rotations, everything else goes straight.

    With and without the root a rotation's path is the same curve; only its points lie elsewhere. Without it they are
    spaced as those of the dense path, and scores are smooth in alpha.

    Args:
        paths: Path to ``(alphas, gains, forgettings)``, as :func:`arena_paths` gives them for a method.

    Returns:
        The one of them.
    """
    return next(paths[name] for name in ("cayley_linear", "cayley_sqrt", "dense") if name in paths)


def _rewound(table: pd.DataFrame, ground: str) -> Any:
    rows, begun = _of(table, ground, "path"), _start(table, ground)
    labels = _labels(rows)
    rows = rows.assign(
        label=rows["method"].map(labels),
        gain=begun["target"] - rows["target"],
        forgetting=rows["general"] - begun["general"],
    )
    return rows.sort_values(
        "label", key=lambda found: found.map({v: i for i, v in enumerate(labels.values())}), kind="stable"
    )
