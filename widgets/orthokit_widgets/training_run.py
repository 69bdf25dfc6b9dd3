"""A training in its own thread that can be paused and stopped, and what of it a page draws; the same from a folder."""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orthokit.diagnostics.monitor import Monitor
from orthokit.errors import OrthokitError
from orthokit.lab.fit import fit
from orthokit.lab.models import SmallCNN, TinyGPT
from orthokit.lab.runs import Run
from orthokit.lab.tasks import image_classification, language_modelling
from orthokit.matrices import matrices
from orthokit.optim import for_model

__all__ = ["RANK", "Curves", "LiveRun", "load", "reserve", "stop_all"]

#: The gap shown is that between this singular value of the momentum and the next.
RANK = 5
_LOOK_EVERY = 5
_MATRICES = 8
_CONTEXT, _BATCH, _IMAGES = 64, 8, 32
# Judging must not delay Stop: the text models are judged on a few windows, the images at the ends only.
_WINDOWS = 32

_reserving = threading.Lock()
_reserved: set[Path] = set()
_all: weakref.WeakSet[LiveRun] = weakref.WeakSet()


@dataclass
class Curves:
    """What a page draws of one run."""

    name: str
    steps: array = field(default_factory=lambda: array("q"))
    losses: array = field(default_factory=lambda: array("d"))
    #: Matrix to quantity to steps and values; spectra are arrays.
    matrices: dict[str, dict[str, tuple[list[int], list[Any]]]] = field(default_factory=dict)

    def add(self, matrix: str, quantity: str, step: int, value: Any) -> None:
        """One measurement more."""
        steps, values = self.matrices.setdefault(matrix, {}).setdefault(quantity, ([], []))
        steps.append(step)
        values.append(value)

    def get(self, matrix: str, quantity: str) -> tuple[list[int], list[Any]]:
        """Steps and values of a quantity; empty when it was not measured."""
        return self.matrices.get(matrix, {}).get(quantity, ([], []))


class LiveRun:
    """One training, started at once.

    Args:
        settings: ``optimizer``, ``order``, ``momentum``, ``lr``, ``model``, ``data``, ``steps``, ``seed``, ``budget``.
        root: Folder of runs.
    """

    def __init__(self, settings: dict[str, Any], root: str | Path) -> None:
        self.settings, self.root = settings, Path(root)
        kind = [settings["optimizer"]] if settings["optimizer"] == "adamw" else ["muon", settings["order"]]
        self.name = reserve(self.root, "-".join([*kind, settings["model"], settings["data"]]))
        self.curves = Curves(self.name)
        #: ``"preparing"``, ``"running"``, ``"finished"``, ``"stopped"`` or ``"failed"``.
        self.status = "preparing"
        self.error = ""
        self.monitor: Monitor | None = None
        self.stop_requested = self.ended = 0.0
        self._began = time.perf_counter()
        self._stop, self._pause = threading.Event(), threading.Event()
        self._seen = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._train, name=f"orthokit-{self.name}", daemon=True)
        _all.add(self)
        self._thread.start()

    # --- the page's side

    @property
    def active(self) -> bool:
        """Whether it still trains, or could go on."""
        return self.status in ("preparing", "running")

    @property
    def paused(self) -> bool:
        """Whether it waits between two steps."""
        return self.active and self._pause.is_set()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop and has not yet."""
        return self.active and self._stop.is_set()

    @property
    def stop_ms(self) -> float:
        """Milliseconds from the request to stop to the end; 0 before."""
        return 1e3 * (self.ended - self.stop_requested) if self.ended and self.stop_requested else 0.0

    def stop(self) -> None:
        """End after the current step; the run stays resumable."""
        if not self._stop.is_set():
            self.stop_requested = time.perf_counter()
            self._stop.set()

    def pause(self, on: bool) -> None:
        """Wait after the current step, or go on."""
        self._pause.set() if on else self._pause.clear()

    def join(self, timeout: float) -> bool:
        """Wait for the end; whether it came within ``timeout`` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def step(self) -> int:
        """Steps done."""
        return self.curves.steps[-1] if self.curves.steps else 0

    @property
    def ms_per_step(self) -> float:
        """Mean time of a step so far, pauses included; 0 before the first."""
        return 1e3 * ((self.ended or time.perf_counter()) - self._began) / self.step if self.step else 0.0

    def read(self) -> tuple[Curves, np.ndarray, np.ndarray]:
        """Take over what the monitor has recorded since the last call.

        Returns:
            The curves, and copies of steps and losses that no thread changes.
        """
        if self.monitor is not None:
            records = self.monitor.records
            for row in records[self._seen : (end := len(records))]:
                for quantity, value in row.items():
                    if quantity not in ("step", "matrix"):
                        self.curves.add(row["matrix"], quantity, row["step"], value)
            self._seen = end
        with self._lock:
            return self.curves, np.array(self.curves.steps), np.array(self.curves.losses)

    # --- the thread's side

    def _record(self, step: int, loss: float) -> None:
        with self._lock:
            self.curves.steps.append(step)
            self.curves.losses.append(loss)

    def _train(self) -> None:
        try:
            chosen = self.settings
            images = chosen["model"] == "cnn"
            if images:
                task = image_classification(chosen["data"], batch=_IMAGES, seed=chosen["seed"])
                model = SmallCNN(seed=chosen["seed"])
            else:
                size = {"context": _CONTEXT, "batch": _BATCH, "validation_windows": _WINDOWS}
                task = language_modelling(chosen["data"], seed=chosen["seed"], **size)
                model = TinyGPT(chosen["model"], seed=chosen["seed"])
            optimizer = _optimizer(model, chosen)
            self.monitor = Monitor(
                model, optimizer, every=_LOOK_EVERY, budget=chosen["budget"], rank=RANK, matrices=_watched(model)
            )
            self.status, self._began = "running", time.perf_counter()
            run = fit(
                model,
                task,
                optimizer,
                steps=chosen["steps"],
                evaluate_every=chosen["steps"] if images else None,
                monitor=self.monitor,
                run=self.name,
                root=self.root,
                config={"page": chosen},
                progress=False,
                stop=self._stop,
                pause=self._pause,
                on_step=self._record,
            )
            ended = "finished" if run.status == "finished" else "stopped"
        except Exception as error:
            # The thread has no caller: the page shows the error.
            self.error = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"
            ended = "failed"
        self.ended = time.perf_counter()
        self.status = ended


def stop_all(timeout: float = 5.0) -> None:
    """Stop every run of this process, so that each ends with a checkpoint; waits up to ``timeout`` seconds."""
    runs = [run for run in _all if run.active]
    for run in runs:
        run.stop()
    end = time.monotonic() + timeout
    for run in runs:
        run.join(max(0.0, end - time.monotonic()))


def _optimizer(model: torch.nn.Module, chosen: dict[str, Any]) -> torch.optim.Optimizer:
    if chosen["optimizer"] == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=chosen["lr"], betas=(chosen["momentum"], 0.95), weight_decay=0.0
        )
    return for_model(model, "muon", lr=chosen["lr"], momentum=chosen["momentum"], order=chosen["order"])


def _watched(model: torch.nn.Module) -> list[str]:
    """Some matrices, evenly spread through the model: a look has to fit into the budget of a small step."""
    names = [str(name) for name in matrices(model).parameters()]
    places = np.linspace(0, len(names) - 1, min(len(names), _MATRICES)).round().astype(int)
    return [names[place] for place in places]


def reserve(root: Path, name: str) -> str:
    """A name that no run has, here or in another session of this server: ``name``, or with a number after it."""
    with _reserving:
        number = 1
        while (path := root / (name if number == 1 else f"{name}-{number}")) in _reserved or path.exists():
            number += 1
        _reserved.add(path)
        return path.name


def load(name: str, root: str | Path) -> Curves:
    """What a page draws of a recorded run.

    Args:
        name: Name of the run.
        root: Folder of runs.

    Returns:
        Its loss and what a monitor recorded.

    Raises:
        RunError: The run is damaged or gone; the message names the file.
    """
    run = Run.open(name, root=root)
    curves = Curves(name)
    frame = run.scalars()
    for title, part in frame.groupby("name"):
        steps, values = part["step"].tolist(), part["value"].tolist()
        if title == "loss":
            curves.steps, curves.losses = array("q", steps), array("d", values)
        elif "/" in str(title):
            matrix, quantity = str(title).rsplit("/", 1)
            curves.matrices.setdefault(matrix, {})[quantity] = (steps, values)
    for title in run.spectra():
        steps, values = run.spectra(title)
        matrix, quantity = title.rsplit("/", 1) if "/" in title else (title, "spectrum")
        curves.matrices.setdefault(matrix, {})[quantity] = (steps.tolist(), list(values))
    return curves
