"""The numbers behind the page "Forgetting": recorded runs of the arena, and what a page shows of one of them.

A :class:`Portrait` is the same for a recorded run, the mean of several, a run that trains on the page and one read back
from the run store, so that all are drawn and told alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orthokit.errors import ReportError
from orthokit.studies import evidence_stamp, load_evidence

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "DIAGNOSTICS",
    "PATHS",
    "Portrait",
    "Profile",
    "Record",
    "Walk",
    "from_rows",
    "points_of",
    "recorded",
]

Point = tuple[float, float]
Row = Mapping[str, Any]

#: Paths back, in the order they are offered.
PATHS = ("cayley_sqrt", "cayley_linear", "dense")
#: What is measured of a finished model, on the whole and of every layer.
DIAGNOSTICS = (
    *("moved", "stable_rank", "retention", "fluctuation", "adaptation_fluctuation", "spectrum", "strength"),
    *("csd_general", "csd_general_unaligned", "csd_target", "raw", "procrustes", "gram", "cka"),
)
_FIELDS = ("sigma", "after", "retention", "adaptation")


@dataclass(frozen=True)
class Walk:
    """A way back from the trained model (1) to the plain one (0): what is learnt and forgotten along it."""

    alphas: np.ndarray
    gain: np.ndarray
    forgetting: np.ndarray

    def at(self, alpha: float) -> Point:
        """Gain and forgetting there; straight between the places that were measured."""
        return float(np.interp(alpha, self.alphas, self.gain)), float(np.interp(alpha, self.alphas, self.forgetting))


@dataclass(frozen=True)
class Profile:
    """One layer, singular value by singular value of the weight before."""

    sigma: np.ndarray
    retention: np.ndarray
    """``u_i^T W v_i`` of the weight after."""
    adaptation: np.ndarray
    """``||(W - W_0) v_i||``."""
    after: np.ndarray | None = None
    """Singular values after; ``None`` where they were not recorded."""


@dataclass(frozen=True)
class Portrait:
    """What a page shows of one run."""

    label: str
    method: str
    point: Point
    """Gain and forgetting."""
    start: Point
    """Target and general loss before."""
    size: int | None = None
    trainable: int | None = None
    lr: float = math.nan
    steps: int = 0
    errors: Point = (math.nan, math.nan)
    """Classification error before and after; NaN where there is none."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    walks: Mapping[str, Walk] = field(default_factory=dict)
    marks: Mapping[str, Point] = field(default_factory=dict)
    """Gain and forgetting at layer-wise scales: ``"safe"``, ``"min"``, ``"uniform"``."""
    travel: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    """Gain and forgetting over the steps judged."""
    seeds: int = 1
    """How many runs it is the mean of."""
    of_seed: int | None = None
    """The run that layers and profiles are those of, where they are not this one's."""


# --- rows, as the arena makes them


def points_of(rows: Iterable[Row]) -> tuple[np.ndarray, np.ndarray, Point]:
    """Steps, (gain, forgetting) at each, and the losses before, from rows with ``step, target, general``."""
    ordered = sorted(rows, key=lambda row: row["step"])
    losses = np.array([_losses(row) for row in ordered], dtype=float).reshape(-1, 2)
    steps = np.array([row["step"] for row in ordered], dtype=int)
    if not len(losses):
        return steps, losses, (math.nan, math.nan)
    start = losses[0]
    return steps, (losses - start) * (-1.0, 1.0), (float(start[0]), float(start[1]))


def _losses(row: Row) -> Point:
    """NaN where a run diverged: files leave such a place empty."""
    return float(row.get("target", math.nan)), float(row.get("general", math.nan))


def from_rows(
    portrait: Portrait,
    *,
    summary: Row | None = None,
    layers: Iterable[Row] = (),
    profiles: Iterable[Row] = (),
    paths: Iterable[Row] = (),
) -> Portrait:
    """A portrait with what the rows of the arena say besides the scores.

    Args:
        portrait: What is known already; its ``start`` turns losses into gain and forgetting.
        summary: Diagnostics of the whole model.
        layers: One row a layer.
        profiles: One row a singular value, with ``layer`` and ``index``.
        paths: One row a place, with ``path, alpha, target, general``.

    Returns:
        The portrait.
    """
    walks, marks = _walks(paths, portrait.start)
    return replace(
        portrait,
        diagnostics=_finite(summary or {}),
        layers={str(row["layer"]): _finite(row) for row in layers},
        profiles=_profiles(profiles),
        walks=walks,
        marks=marks,
    )


def _finite(row: Row) -> dict[str, float]:
    given = {name: row.get(name) for name in DIAGNOSTICS}
    return {name: float(value) for name, value in given.items() if value is not None and math.isfinite(value)}


def _profiles(rows: Iterable[Row]) -> dict[str, Profile]:
    by_layer: dict[str, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(str(row["layer"]), []).append(row)
    found = {}
    for layer, of in by_layer.items():
        of.sort(key=lambda row: row["index"])
        columns = {name: np.array([row.get(name, math.nan) for row in of], dtype=float) for name in _FIELDS}
        after = columns.pop("after")
        found[layer] = Profile(**columns, after=after if np.isfinite(after).all() else None)
    return found


def _walks(rows: Iterable[Row], start: Point) -> tuple[dict[str, Walk], dict[str, Point]]:
    """Paths with several places, averaged over the seeds, and single points."""
    by_path: dict[str, dict[float, list[Point]]] = {}
    for row in rows:
        places = by_path.setdefault(str(row["path"]), {})
        alpha = float(row["alpha"]) if row["path"] in PATHS else math.nan
        # NaN is no key of its own: single points share one.
        target, general = _losses(row)
        pair = (start[0] - target, general - start[1])
        places.setdefault(alpha if math.isfinite(alpha) else -1.0, []).append(pair)
    walks, marks = {}, {}
    for path, places in by_path.items():
        means = {alpha: np.mean(pairs, axis=0) for alpha, pairs in sorted(places.items())}
        table = np.array(list(means.values()))
        if path in PATHS and len(means) > 1:
            walks[path] = Walk(np.array(list(means)), table[:, 0], table[:, 1])
        elif path not in PATHS:
            marks[path] = (float(table[0, 0]), float(table[0, 1]))
    return {path: walks[path] for path in PATHS if path in walks}, marks


# --- the recorded study


class Record:
    """The runs of one ground, method by method.

    Args:
        frame: Rows of the study for that ground.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self._frames: dict[tuple[str, str], Any] = {
            (str(kind), str(method)): part[part["kind"] == kind]
            for method, part in frame.groupby("method", sort=False)
            for kind in part["kind"].unique()
        }
        #: Method to seed to portraits without layers and paths.
        self.runs: dict[str, dict[int, Portrait]] = {}
        #: Runs whose losses are not finite: (method, seed).
        self.diverged: list[tuple[str, int]] = []
        for (kind, method), part in self._frames.items():
            if kind == "run":
                self._add(method, part)
        self._portraits: dict[tuple[str, int | None], Portrait] = {}

    def _add(self, method: str, part: pd.DataFrame) -> None:
        for key, of in part.groupby("seed"):
            seed, rows = int(str(key).partition(".")[0]), _rows(of)
            steps, points, start = points_of(rows)
            last = max(rows, key=lambda row: row["step"])
            if not np.isfinite(points).all():
                self.diverged.append((method, seed))
                continue
            if steps[-1] == 0:
                continue  # an unfinished study: no more than the start is there
            first = min(rows, key=lambda row: row["step"])
            size, trainable = (None if last.get(name) is None else int(last[name]) for name in ("size", "trainable"))
            self.runs.setdefault(method, {})[seed] = Portrait(
                label=f"seed {seed}",
                method=method,
                point=(float(points[-1, 0]), float(points[-1, 1])),
                start=start,
                lr=float(last.get("lr") or math.nan),
                steps=int(steps[-1]),
                errors=(_number(first.get("error")), _number(last.get("error"))),
                diagnostics=_finite(last),
                travel=points,
                size=size,
                trainable=trainable,
            )

    @property
    def start(self) -> Point:
        """Target and general loss before."""
        return next((run.start for runs in self.runs.values() for run in runs.values()), (math.nan, math.nan))

    def points(self) -> dict[str, dict[int, Point]]:
        """Method to seed to gain and forgetting."""
        return {method: {seed: run.point for seed, run in runs.items()} for method, runs in self.runs.items()}

    def portrait(self, method: str, seed: int | None) -> Portrait | None:
        """One run, or with ``seed=None`` the mean of all of a method; ``None`` if there is none."""
        runs = self.runs.get(method, {})
        if not runs or (seed is not None and seed not in runs):
            return None
        if (method, seed) not in self._portraits:
            self._portraits[method, seed] = self._make(method, seed)
        return self._portraits[method, seed]

    def _make(self, method: str, seed: int | None) -> Portrait:
        runs = self.runs[method]
        base = runs[seed] if seed is not None else _mean(list(runs.values()))
        rows = {kind: _rows(self._frames.get((kind, method))) for kind in ("layer", "profile", "path")}
        paths = [row for row in rows["path"] if seed is None or _seed(row) == seed]
        one = {_seed(row) for row in rows["layer"]} - {None, seed}
        made = from_rows(base, layers=rows["layer"], profiles=rows["profile"], paths=paths)
        return replace(made, diagnostics=base.diagnostics, of_seed=min(one) if one else None)  # type: ignore[type-var]


def _rows(part: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Rows as dictionaries, without what is empty."""
    if part is None:
        return []
    records = part.to_dict("records")
    return [{str(key): value for key, value in row.items() if value == value and value is not None} for row in records]


def _seed(row: Row) -> int | None:
    return int(row["seed"]) if "seed" in row else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _mean(runs: list[Portrait]) -> Portrait:
    points = np.array([run.point for run in runs]).mean(axis=0)
    names = [name for name in DIAGNOSTICS if all(name in run.diagnostics for run in runs)]
    travel = np.mean([run.travel for run in runs], axis=0) if len({len(run.travel) for run in runs}) == 1 else None
    errors = np.array([run.errors for run in runs]).mean(axis=0)
    start = np.array([run.start for run in runs]).mean(axis=0)
    return replace(
        runs[0],
        label=f"mean of {len(runs)} seeds" if len(runs) > 1 else "1 seed",
        point=(float(points[0]), float(points[1])),
        start=(float(start[0]), float(start[1])),
        errors=(float(errors[0]), float(errors[1])),
        diagnostics={name: float(np.mean([run.diagnostics[name] for run in runs])) for name in names},
        travel=runs[0].travel if travel is None else travel,
        seeds=len(runs),
    )


def recorded(root: str | Path | None = None) -> tuple[dict[str, Record], str]:
    """The recorded arena, kept until its file changes.

    Args:
        root: Folder of evidence; default the checkout's.

    Returns:
        Ground to its record, and why there is none; one of the two is empty.
    """
    return _recorded(*evidence_stamp("arena", root=root))


@functools.lru_cache(maxsize=2)
def _recorded(folder: str, stamp: int) -> tuple[dict[str, Record], str]:
    if not stamp:
        return (
            {},
            "No recorded arena is here; “orthokit study arena” makes one, in hours. Runs of your own work without.",
        )
    try:
        frame, _ = load_evidence("arena", root=folder)
        records = {str(ground): Record(part) for ground, part in frame.groupby("ground", sort=False)}
    except (ReportError, KeyError, ValueError) as error:
        return {}, f"The recorded arena cannot be read: {error}"
    return {ground: record for ground, record in records.items() if record.runs}, ""
