"""One fine-tuning of the arena in a worker's thread, recorded in the run store, and read back from there."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn.modules.module import register_module_forward_pre_hook

from orthokit.errors import OrthokitError, RunDamagedError
from orthokit.lab.arena import budget_settings, enter
from orthokit.lab.arena.grounds import judged
from orthokit.lab.arena.portraits import portrait
from orthokit.lab.arena.rewinding import paths_of, rewound
from orthokit.lab.racer import Racer
from orthokit.lab.runs import Run
from orthokit_widgets.forgetting_data import PATHS, Portrait, Profile, Walk, from_rows, points_of
from orthokit_widgets.training_run import reserve
from orthokit_widgets.worker import Job

__all__ = ["LiveEntry", "asked_of", "kept_runs", "load"]

_LOOKS = 10  # judgements of a run, the first and the last among them
_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # a judgement each: with more of them measuring takes longer than training


class _Given(Exception):
    """Raised inside a forward pass when nobody wants its result any more."""


class LiveEntry:
    """One run, advanced by :meth:`go` in a worker's thread.

    Args:
        ground: One of ``orthokit.lab.arena.GROUNDS``.
        method: One of ``orthokit.lab.arena.METHODS``.
        lr: Learning rate.
        steps: Length of the run.
        seed: Of the batches and of what the method draws.
        root: Folder of runs.
        size: Size of the method; default the one of the budget.
        small: A model and texts of the size for tests.
    """

    def __init__(
        self,
        ground: str,
        method: str,
        *,
        lr: float,
        steps: int,
        seed: int,
        root: Path,
        size: int | None = None,
        small: bool = False,
    ) -> None:
        self.asked = {"ground": ground, "method": method, "lr": lr, "steps": steps, "seed": seed, "small": small}
        self.ground, self.method, self.root, self.steps, self.small = ground, method, root, steps, small
        self.name = reserve(root, f"arena-{ground}-{method}")
        #: ``"preparing"``, ``"running"``, ``"measuring"``, ``"finished"``, ``"stopped"`` or ``"failed"``.
        self.status = "preparing"
        self.error = ""
        self.step = 0
        #: Whether the run store has it, or had.
        self.recorded = False
        self.paused, self.stopping = threading.Event(), threading.Event()
        self.stop_requested = self.ended = 0.0
        #: Counts what has been seen of the run so far.
        self.version = 0
        self._size = size
        self._judged: list[dict[str, float]] = []
        self._portrait: Portrait | None = None
        self._lock = threading.Lock()

    # --- the page's side

    @property
    def active(self) -> bool:
        """Whether it still goes on, or could."""
        return self.status in ("preparing", "running", "measuring")

    def stop(self) -> None:
        """End at the next chance."""
        if not self.stopping.is_set():
            self.stop_requested = time.perf_counter()
            self.stopping.set()

    @property
    def stop_ms(self) -> float:
        """Milliseconds from the request to stop to the end; 0 before."""
        return 1e3 * (self.ended - self.stop_requested) if self.ended and self.stop_requested else 0.0

    def read(self) -> Portrait | None:
        """What is known so far; ``None`` before the first judgement."""
        with self._lock:
            if self._portrait is not None or not self._judged:
                return self._portrait
            return _so_far(self.asked, self._judged)

    # --- the thread's side

    def go(self, job: Job) -> bool:
        """Train, judge and measure, or end when told to; called in the worker's thread.

        Returns:
            ``True``: this run has ended.
        """

        def given_up() -> bool:
            return self.stopping.is_set() or job.cancelled.is_set()

        ended = "failed"
        try:
            with _interruptible(given_up):
                racer = self._enter(given_up)
                with Run.create(self.name, root=self.root, config={"arena": self.asked}) as run:
                    self.recorded = True
                    try:
                        self._train(run, racer, given_up)
                    except _Given:
                        run.set_status("interrupted")
                        raise
            ended = "finished"
        except _Given:
            ended = "stopped"
        except Exception as error:
            # The thread has no caller: the page shows the error.
            self.error = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"
        self.ended = time.perf_counter()
        self.status = ended
        self.version += 1
        return True

    def _enter(self, given_up: Callable[[], bool]) -> Racer:
        if given_up():
            raise _Given
        # The budget of all methods takes seconds to find the first time; the record knows what came out.
        size = budget_settings(self.ground)[self.method][0] if self._size is None else self._size
        options = {name: self.asked[name] for name in ("lr", "seed", "steps", "small")}
        racer = enter(self.ground, self.method, size=size, **options)
        trainable = sum(p.numel() for p in racer.model.parameters() if p.requires_grad)
        self.asked |= {"size": size, "trainable": trainable}
        return racer

    def _train(self, run: Run, racer: Racer, given_up: Callable[[], bool]) -> None:
        looks = set(np.linspace(0, self.steps, min(self.steps + 1, _LOOKS)).round().astype(int).tolist())
        self._judge(run, racer)
        self.status = "running"
        while racer.step < self.steps:
            while self.paused.is_set() and not given_up():
                time.sleep(0.02)
            if given_up():
                raise _Given
            loss = racer.advance()
            run.log(racer.step, loss=loss)
            self.step = racer.step
            self.version += 1
            if racer.step in looks:
                self._judge(run, racer)
        self.status = "measuring"
        self._measure(run, racer)

    def _judge(self, run: Run, racer: Racer) -> None:
        found = judged(self.ground, racer.model, self.small)
        run.log(racer.step, **{name: value for name, value in found.items() if math.isfinite(value)})
        with self._lock:
            self._judged.append({"step": racer.step, **found})
            self.version += 1

    def _measure(self, run: Run, racer: Racer) -> None:
        """Layers, profiles and ways back of the finished model."""
        found = portrait(self.ground, racer.model, small=self.small)
        paths = [path for path in paths_of(racer.model) if path in PATHS]
        places = rewound(self.ground, racer.model, alphas=_ALPHAS, paths=paths, small=self.small)
        whole = from_rows(
            _so_far(self.asked, self._judged),
            summary=found.summary,
            layers=found.layers,
            profiles=found.profiles,
            paths=places,
        )
        _write(run, whole)
        with self._lock:
            self._portrait = whole


@contextmanager
def _interruptible(given_up: Callable[[], bool]) -> Iterator[None]:
    """Every module that this thread calls looks whether it is still wanted: judging takes longer than Stop may."""
    mine = threading.get_ident()

    def look(*_: Any) -> None:
        if threading.get_ident() == mine and given_up():
            raise _Given

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _so_far(asked: dict[str, Any], rows: list[dict[str, Any]]) -> Portrait:
    steps, points, start = points_of(rows)
    errors = [float(row.get("error", math.nan)) for row in (rows[0], rows[-1])]
    return Portrait(
        label="",
        method=asked["method"],
        point=(float(points[-1, 0]), float(points[-1, 1])),
        start=start,
        size=asked.get("size"),
        trainable=asked.get("trainable"),
        lr=asked["lr"],
        steps=int(steps[-1]),
        errors=(errors[0], errors[1]),
        travel=points,
    )


# --- the run store


# Names under which a finished run keeps what is not of a layer.
_WHOLE, _MARK, _PATH = "whole", "place ", "path "
_AXES = ("gain", "forgetting")


def _write(run: Run, found: Portrait) -> None:
    """Record a finished run's portrait; :func:`load` reads it."""
    step = found.steps
    groups = {_WHOLE: found.diagnostics, **found.layers}
    groups |= {f"{_MARK}{mark}": dict(zip(_AXES, pair, strict=True)) for mark, pair in found.marks.items()}
    run.log_many((step, f"{group}/{name}", value) for group, of in groups.items() for name, value in of.items())
    vectors = {f"{layer}/{name}": values for layer, of in found.profiles.items() for name, values in vars(of).items()}
    for path, walk in found.walks.items():
        vectors |= {f"{_PATH}{path}/{name}": values for name, values in vars(walk).items()}
    for name, values in vectors.items():
        if values is not None:
            run.log_spectrum(step, name, values)


def kept_runs(root: Path) -> dict[str, dict[str, Any]]:
    """Runs of the arena in a folder, newest first, with what was asked of them; no database is opened."""
    try:
        with os.scandir(root) as entries:
            folders = sorted(((entry.stat().st_mtime, Path(entry.path)) for entry in entries), reverse=True)
    except OSError:
        return {}
    found = {folder.name: asked_of(folder) for _, folder in folders if not folder.name.startswith(".")}
    return {name: asked for name, asked in found.items() if asked is not None}


def asked_of(folder: Path) -> dict[str, Any] | None:
    """What was asked of a run; ``None`` if it is not one of the arena, or gone."""
    try:
        asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("arena")
    except (OSError, ValueError, AttributeError):
        return None
    wanted = {"ground", "method", "lr", "steps", "seed"}
    return asked if isinstance(asked, dict) and wanted <= asked.keys() else None


def load(name: str, root: Path) -> Portrait:
    """What a page shows of a run of the arena in the run store.

    Args:
        name: Name of the run.
        root: Folder of runs.

    Returns:
        Its portrait, as far as the run came.

    Raises:
        RunError: The run is gone or damaged; the message names the file.
    """
    run = Run.open(name, root=root)
    asked = run.config.get("arena")
    scalars: dict[str, dict[int, float]] = {}
    for title, step, value in run.scalars()[["name", "step", "value"]].itertuples(index=False):
        scalars.setdefault(str(title), {})[int(step)] = float(value)
    steps = sorted(scalars.get("general", {}).keys() & scalars.get("target", {}).keys())
    if asked is None or not steps:
        raise RunDamagedError(f"the run {run.path} holds no judged step; it ended before the first. Start it again.")
    judged_at = [
        {name: scalars.get(name, {}).get(step, math.nan) for name in ("target", "general", "error")} | {"step": step}
        for step in steps
    ]
    whole, layers, marks = _sorted_out(scalars)
    return replace(
        _so_far(asked, judged_at),
        diagnostics=whole,
        layers=layers,
        marks=marks,
        **_vectors(run),
    )


def _sorted_out(scalars: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], Any, dict[str, Any]]:
    """Diagnostics of the whole, of the layers, and single places, from scalars named as :func:`_write` does."""
    groups: dict[str, dict[str, float]] = {}
    for title, values in scalars.items():
        group, slash, name = title.rpartition("/")
        if slash:
            groups.setdefault(group, {})[name] = values[max(values)]
    whole = groups.pop(_WHOLE, {})
    marks = {group.removeprefix(_MARK): of for group, of in groups.items() if group.startswith(_MARK)}
    layers = {group: of for group, of in groups.items() if not group.startswith(_MARK)}
    return whole, layers, {mark: (of["gain"], of["forgetting"]) for mark, of in marks.items()}


def _vectors(run: Run) -> dict[str, Any]:
    """Profiles and ways back."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for title in run.spectra():
        group, _, name = title.rpartition("/")
        groups.setdefault(group, {})[name] = run.spectra(title)[1][-1].astype(float)
    paths = {group.removeprefix(_PATH): of for group, of in groups.items() if group.startswith(_PATH)}
    profiles = {group: Profile(**of) for group, of in groups.items() if not group.startswith(_PATH)}
    return {"profiles": profiles, "walks": {path: Walk(**paths[path]) for path in PATHS if path in paths}}
