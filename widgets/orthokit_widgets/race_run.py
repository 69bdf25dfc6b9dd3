"""Several trainings that take turns in one thread, and what of them a page draws."""

from __future__ import annotations

import threading
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthokit.errors import NonFiniteError
from orthokit.lab.contestants import CONTESTANTS
from orthokit.lab.racer import Racer
from orthokit.lab.tasks import LanguageModelling
from orthokit.linalg import singular_values
from orthokit.matrices import matrices
from orthokit.studies.optimizer_race import TRACKS, enter
from orthokit_widgets.worker import Job

__all__ = ["Lane", "LiveRace"]

_MATRICES = 6
_LOOKS = 40  # looks at the spectra over a race: about as many as a chart has pixels to show
_TRIALS, _BETWEEN = 10, 10  # most held-out evaluations over a race, and fewest steps between two


@dataclass
class Lane:
    """One rival: what it has done so far, in plain numbers."""

    name: str
    lr: float
    steps: array = field(default_factory=lambda: array("q", [0]))
    seconds: array = field(default_factory=lambda: array("d", [0.0]))
    #: Training loss of each step; there is none before the first.
    losses: array = field(default_factory=lambda: array("d", [float("nan")]))
    #: Steps and held-out losses.
    trials: list[tuple[int, float]] = field(default_factory=list)
    #: Matrix to steps and singular values.
    spectra: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    #: Why it gave up; empty while it trains.
    error: str = ""

    @property
    def label(self) -> str:
        """What charts call it."""
        return CONTESTANTS[self.name].label

    @property
    def step(self) -> int:
        """Steps done."""
        return self.steps[-1]


class LiveRace:
    """A race, advanced by :meth:`go` in a worker's thread: one step of each, then the next.

    Args:
        track: One of ``orthokit.studies.TRACKS``.
        rates: Learning rate of each rival, by name.
        steps: Length of the race.
        seed: Of weights and batches, the same for all.
    """

    def __init__(self, *, track: str, rates: dict[str, float], steps: int, seed: int) -> None:
        self.track, self.steps, self.seed = track, steps, seed
        self.lanes = {name: Lane(name, lr) for name, lr in rates.items()}
        #: ``"preparing"``, ``"running"``, ``"finished"``, ``"stopped"`` or ``"failed"``.
        self.status = "preparing"
        self.paused = threading.Event()
        self.stopping = threading.Event()
        self.matrices: list[str] = []
        self.version = 0
        self.lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether it still goes on, or could."""
        return self.status in ("preparing", "running")

    @property
    def step(self) -> int:
        """Steps that the slowest has done, of those that still train."""
        return min((lane.step for lane in self.lanes.values() if not lane.error), default=0)

    def go(self, job: Job) -> bool:
        """Race to the end, or until the job is cancelled; called in the worker's thread.

        Returns:
            ``True``: this race has ended.
        """
        try:
            self.status = self._race(job)
        except BaseException:
            self.status = "failed"
            raise
        return True

    def _race(self, job: Job) -> str:
        racers: dict[str, Racer] = {}
        for name, lane in self.lanes.items():
            if self._cancelled(job):
                return "stopped"
            racers[name] = racer = enter(self.track, name, lr=lane.lr, seed=self.seed, steps=self.steps)
            if isinstance(racer.task, LanguageModelling):
                # Judging must not delay Stop.
                racer.task.validation_starts = racer.task.validation_starts[::4]
        names = [str(name) for name in matrices(next(iter(racers.values())).model).parameters()]
        places = np.linspace(0, len(names) - 1, min(len(names), _MATRICES)).round().astype(int)
        self.matrices = [names[place] for place in places]
        for name, racer in racers.items():
            self._look(self.lanes[name], racer)
        self.status = "running"
        while waiting := [lane for lane in self.lanes.values() if not lane.error and lane.step < self.steps]:
            while self.paused.is_set() and not self._cancelled(job):
                time.sleep(0.02)
            if self._cancelled(job):
                return "stopped"
            lane = min(waiting, key=lambda lane: lane.step)
            self._advance(lane, racers[lane.name])
        return "finished"

    def _cancelled(self, job: Job) -> bool:
        return self.stopping.is_set() or job.cancelled.is_set()

    def _advance(self, lane: Lane, racer: Racer) -> None:
        # By the clock on the wall: that of the thread would miss the other threads that products are spread over.
        begun = time.perf_counter()
        try:
            loss = racer.advance()
        except NonFiniteError as error:
            lane.error = str(error)
            self.version += 1
            return
        spent = time.perf_counter() - begun
        with self.lock:
            lane.steps.append(racer.step)
            lane.seconds.append(lane.seconds[-1] + spent)
            lane.losses.append(loss)
            self.version += 1
        last = racer.step == self.steps
        if last or racer.step % max(1, self.steps // _LOOKS) == 0:
            self._look(lane, racer)
        if last or racer.step % max(_BETWEEN, self.steps // _TRIALS) == 0:
            value = racer.evaluate()[TRACKS[self.track].loss]
            with self.lock:
                lane.trials.append((racer.step, value))

    def _look(self, lane: Lane, racer: Racer) -> None:
        """Singular values of the watched matrices."""
        for name in self.matrices:
            values = singular_values(_weight(racer.model, name)).double().numpy()
            with self.lock:
                lane.spectra.setdefault(name, []).append((racer.step, values))

    def read(self) -> list[dict[str, Any]]:
        """Copies of what there is, which no thread changes; one dict a lane, in order."""
        with self.lock:
            return [
                {
                    **{"name": lane.name, "label": lane.label, "error": lane.error},
                    "steps": np.array(lane.steps),
                    "seconds": np.array(lane.seconds),
                    "losses": np.array(lane.losses),
                    "trials": list(lane.trials),
                    "spectra": {matrix: list(looks) for matrix, looks in lane.spectra.items()},
                }
                for lane in self.lanes.values()
            ]


@torch.no_grad()
def _weight(model: torch.nn.Module, name: str) -> Tensor:
    """The matrix that a layer multiplies by, whatever its parameters are."""
    owner = model.get_submodule(name.rpartition(".")[0])
    effective = getattr(owner, "effective_weight", None)
    weight = model.get_parameter(name) if effective is None else effective()
    return weight.detach().float().reshape(weight.shape[0], -1)
