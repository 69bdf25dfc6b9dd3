"""What the page "Merge" keeps: experts, merges and their scores, shared by all visitors and bounded; and the record."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from torch import Tensor

from orthokit.errors import MissingExtraError, OrthokitError
from orthokit.lab import FAMILIES
from orthokit.lab.families import Expert
from orthokit.lab.pretrained import sentence_files
from orthokit.merging import MergeLine
from orthokit.studies import evidence_stamp, load_evidence

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "BASE",
    "PARTS",
    "RETAINED",
    "SCALES",
    "STORE",
    "Asked",
    "Entry",
    "Grid",
    "Recorded",
    "Shelf",
    "Store",
    "available",
    "average",
    "recorded",
]

Value = TypeVar("Value")
Key = tuple[Hashable, ...]

PARTS = ("validation", "test")
BASE, RETAINED = "base", "retained"
#: The scales that are measured, eighths: a slider's answers between them are interpolated.
SCALES = tuple(i / 8 for i in range(17))
_MOST_BYTES = 1 << 30  # of experts; the three of MiniLM with AdamW's second moments take half of it
_LINE_BYTES = 1 << 29
_STATISTICS_BYTES = 1 << 30  # three experts of MiniLM take three quarters of it
_MOST_GRIDS, _MOST_MARKS = 128, 4096


@dataclass(frozen=True)
class Asked:
    """One merge, whatever its scale.

    Args:
        family: One of ``orthokit.lab.FAMILIES``.
        tasks: Those of the experts, in the family's order.
        seed: Of their training.
        method: One of ``orthokit.merging.methods()``.
        options: Those of the method.
        weights: One per expert; ``None`` where the method takes none.
        small: Of the size for tests.
        steps: Of training; default the family's.
    """

    family: str
    tasks: tuple[str, ...]
    seed: int
    method: str
    options: tuple[tuple[str, Any], ...] = ()
    weights: tuple[float, ...] | None = None
    small: bool = False
    steps: int | None = None

    def expert(self, task: str) -> Key:
        """What an expert is kept under."""
        return (self.family, task, self.seed, self.small, self.steps)

    @property
    def crew(self) -> Key:
        """What is kept of the experts together, whatever merges them."""
        return (self.family, self.tasks, self.seed, self.small, self.steps)


@dataclass
class Grid:
    """Scores of one merge at the scales measured so far.

    Args:
        found: ``(part, place in SCALES)`` to task to score; what is retained under the part ``"retained"``.
        rows: Of the merge's report.
        seconds: How long the two merges took.
        size: Numbers in the model.
    """

    found: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    size: int = 0

    def lacks(self, part: str, index: int) -> list[str]:
        """What is not measured yet at a scale: ``part``, ``"retained"``, both or none."""
        return [kind for kind in (part, RETAINED) if (kind, index) not in self.found]

    def measured(self, part: str) -> dict[int, dict[str, float]]:
        """Place in ``SCALES`` to scores, what is retained among them, where both are measured."""
        whole = (index for index in range(len(SCALES)) if not self.lacks(part, index))
        return {index: {**self.found[part, index], **self.found[RETAINED, index]} for index in whole}

    def at(self, scale: float, part: str) -> tuple[dict[str, float], tuple[float, ...]]:
        """Scores at a scale, and the scales they come from: one that was measured, or two that it lies between.

        Args:
            scale: Where.
            part: Which half of the held-out examples.

        Returns:
            Task to score, straight between the nearest measured scales, and those; both empty when there are none yet.
        """
        points = self.measured(part)
        below = [index for index in points if SCALES[index] <= scale]
        above = [index for index in points if SCALES[index] >= scale]
        if not below or not above:
            return {}, ()
        low, high = max(below), min(above)
        if low == high:
            return points[low], (SCALES[low],)
        share = (scale - SCALES[low]) / (SCALES[high] - SCALES[low])
        between = {task: (1 - share) * value + share * points[high][task] for task, value in points[low].items()}
        return between, (SCALES[low], SCALES[high])


class Shelf(Generic[Value]):
    """Things that are dear to make, made once for all threads; those used longest ago make room for new ones.

    Args:
        most: How much is kept, in the unit of ``size``; the newest is kept whatever its size.
        size: Size of one thing; default 1 each.
    """

    def __init__(self, most: int, size: Callable[[Value], int] = lambda one: 1) -> None:
        self._most, self._size = most, size
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        self._making: dict[Hashable, list[Any]] = {}

    def get(self, key: Hashable) -> Value | None:
        """What is kept under a key; ``None`` if there is nothing."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        """Keep it, and drop what was used longest ago if there is too much."""
        with self._lock:
            self._kept[key] = value
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(map(self._size, self._kept.values())) > self._most:
                self._kept.popitem(last=False)

    def made(self, key: Hashable, make: Callable[[], Value], *, look: Callable[[], None]) -> Value:
        """What is kept under a key, made now if there is nothing; who asks while it is being made waits for it.

        Args:
            key: Its name.
            make: Makes it; what it raises is raised here, and whoever waits makes it anew.
            look: Called while waiting; may raise to end that.
        """
        with self._turn(key, look):
            found = self.get(key)
            if found is None:
                found = make()
                self.put(key, found)
            return found

    @contextmanager
    def _turn(self, key: Hashable, look: Callable[[], None]) -> Iterator[None]:
        """One at a time for each key."""
        with self._lock:
            turn = self._making.setdefault(key, [threading.Lock(), 0])
            turn[1] += 1
        try:
            while not turn[0].acquire(timeout=0.05):
                look()
            try:
                yield
            finally:
                turn[0].release()
        finally:
            with self._lock:
                turn[1] -= 1
                if not turn[1]:
                    del self._making[key]


def _expert_bytes(expert: Expert) -> int:
    parts = (expert.trunk, expert.head, expert.second_moments)
    return sum(tensor.nbytes for part in parts for tensor in part.values())


def _line_bytes(line: MergeLine) -> int:
    return sum(tensor.nbytes for end in (line.start, line.end) for tensor in end.values())


def _statistics_bytes(found: Mapping[str, list[dict[str, Tensor]]]) -> int:
    return sum(tensor.nbytes for each in found.values() for one in each for tensor in one.values())


class Store:
    """Everything that visitors share."""

    def __init__(self) -> None:
        #: :meth:`Asked.expert` to expert.
        self.experts: Shelf[Expert] = Shelf(_MOST_BYTES, _expert_bytes)
        #: :meth:`Asked.expert` to what methods that look at data need of it.
        self.statistics: Shelf[Mapping[str, list[dict[str, Tensor]]]] = Shelf(_STATISTICS_BYTES, _statistics_bytes)
        self.lines: Shelf[MergeLine] = Shelf(_LINE_BYTES, _line_bytes)
        self.grids: Shelf[Grid] = Shelf(_MOST_GRIDS)
        #: ``Asked.expert(trunk) + (what, part)`` to how well the base or an expert does a task, or what it retains.
        self.marks: Shelf[float] = Shelf(_MOST_MARKS)
        #: :attr:`Asked.crew` to the layers' rotations and conflicts.
        self.layers: Shelf[list[dict[str, Any]]] = Shelf(_MOST_GRIDS)

    def grid(self, asked: Asked) -> Grid:
        """The grid of a merge, empty at first."""
        return self.grids.made(asked, Grid, look=lambda: None)

    def lacking(self, asked: Asked) -> list[str]:
        """Tasks whose experts are not trained."""
        return [task for task in asked.tasks if self.experts.get(asked.expert(task)) is None]


#: Of this process.
STORE = Store()


def available() -> list[str]:
    """Families whose models are installed."""
    return [name for name in FAMILIES if name != "texts" or _encoder_installed()]


def _encoder_installed() -> bool:
    try:
        return importlib.util.find_spec("tokenizers") is not None and sentence_files().is_dir()
    except (MissingExtraError, OSError):
        return False


# --- the recorded study


@dataclass(frozen=True)
class Entry:
    """What is recorded of one contestant.

    Args:
        label: What charts call it.
        name: Its name in the record.
        scores: Each task, ``"average"`` and ``"retained"`` to mean, low and high end of the interval.
        tuned: Seed to the options that were the best.
        seeds: How many.
    """

    label: str
    name: str
    scores: Mapping[str, tuple[float, float, float]]
    tuned: Mapping[int, Mapping[str, Any]]
    seeds: int

    def settings(self, seed: int) -> dict[str, Any]:
        """Method and options, for the experts of this seed or the first that is recorded."""
        method, *rest = self.name.split()
        fixed = dict(zip(("target", "residual"), rest, strict=False))
        return {"method": method, **fixed, **self.tuned.get(seed, next(iter(self.tuned.values()), {}))}


@dataclass(frozen=True)
class Recorded:
    """The record of one family: contestants, best average first, and what they lie between."""

    entries: Mapping[str, Entry]
    references: Mapping[str, Mapping[str, tuple[float, float, float]]]


def recorded(root: str | Path | None = None) -> tuple[Mapping[str, Recorded], str]:
    """The recorded study of merging, kept until its file changes.

    Args:
        root: Folder of evidence; default the checkout's.

    Returns:
        Family to its record, and why there is none; one of the two is empty.
    """
    return _recorded(*evidence_stamp("merging", root=root))


@functools.lru_cache(maxsize=2)
def _recorded(folder: str, stamp: int) -> tuple[Mapping[str, Recorded], str]:
    if not stamp:
        words = "No recorded study of merging is here; “orthokit study merging” makes one, in hours."
        return {}, f"{words} Merging on this page works without."
    from orthokit.studies.merging_results import merging_families

    found: dict[str, Recorded] = {}
    try:
        table, _ = load_evidence("merging", root=folder)
        for family in merging_families(table):
            found[family] = _of_family(table, family)
    except (OrthokitError, KeyError, ValueError) as error:
        return {}, f"The recorded study of merging cannot be read: {error}"
    return found, ""


def _of_family(table: pd.DataFrame, family: str) -> Recorded:
    from orthokit.studies.merging_results import merging_references, merging_scores, merging_tasks

    columns = [*merging_tasks(table, family), "average", RETAINED]

    def ends(row: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
        found = {name: tuple(float(row[f"{name}{end}"]) for end in ("", "_low", "_high")) for name in columns}
        return {name: (a, b, c) for name, (a, b, c) in found.items()}

    rows: Any = table[(table["family"] == family) & (table["kind"] == "tuned")]
    entries = {}
    for label, row in merging_scores(table, family).to_dict("index").items():
        one = rows[rows["method"] == row["method"]].drop_duplicates("seed")
        pairs = zip(one["seed"], one["options"], strict=True)
        tuned = {int(seed): json.loads(text) for seed, text in pairs if isinstance(text, str)}
        entries[str(label)] = Entry(str(label), str(row["method"]), ends(row), tuned, int(row["seeds"]))
    between = {str(name): ends(row) for name, row in merging_references(table, family).to_dict("index").items()}
    return Recorded(entries, between)


def average(scores: Mapping[str, float], tasks: tuple[str, ...]) -> float:
    """Mean over tasks."""
    return float(np.mean([scores[task] for task in tasks]))
