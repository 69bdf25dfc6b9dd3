"""The page "Optimizer race" without its looks: settings and buttons in, figures and sentences out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, ClassVar

import numpy as np
import param

from orthokit.errors import OrthokitError
from orthokit.figures import race_curves
from orthokit.figures.template import number
from orthokit.lab.contestants import CONTESTANTS
from orthokit.studies import TRACKS, tuned_rates
from orthokit_widgets._charts import most, smooth, thin
from orthokit_widgets.fields import Settings
from orthokit_widgets.race_run import LiveRace
from orthokit_widgets.worker import Worker

__all__ = ["RATES", "RaceState", "RaceView"]

_SENTENCES = {
    "ready": "Ready: press Start.",
    "preparing": "Preparing: reading the data.",
    "running": "Running: step {step} of {steps}.",
    "paused": "Paused after step {step}.",
    "stopping": "Stopping after this step.",
    "finished": "Finished all {steps} steps.",
    "stopped": "Stopped after step {step}.",
    "failed": "Failed after step {step}.",
}
_FEW = 20  # points of a line that still get markers
_AXES = {"steps": "step", "seconds": "seconds of training"}

#: Setting of a learning rate to the contestant it is for.
RATES = {f"rate_{name}": name for name in CONTESTANTS}


class RaceView(Settings):
    """What the charts show."""

    across = param.Selector(default="steps", objects=["steps", "seconds"], label="Against")
    matrix = param.Selector(default="", objects=[""], label="Matrix shown")

    SETTINGS = ("across", "matrix")
    SEGMENTS: ClassVar = {"across": {"steps": "steps", "seconds": "seconds"}}
    WORDS: ClassVar = {"matrix": {"": "chosen when a race starts"}}


class RaceState(Settings):
    """What the page knows: settings, and the race that is run or was run last.

    Args:
        **settings: Settings to start from.
    """

    track = param.Selector(default="tinygpt", objects=list(TRACKS), label="Task")
    racers = param.ListSelector(
        default=["adamw", "sgd", "muon_pre", "normuon"], objects=list(CONTESTANTS), label="Optimizers"
    )
    steps = param.Integer(200, bounds=(20, 2000), label="Steps")
    seed = param.Integer(0, bounds=(0, 99), label="Seed")

    SETTINGS: ClassVar[tuple[str, ...]] = ("track", "racers", "steps", "seed", *RATES)
    LOGARITHMIC = frozenset(RATES)
    TYPED = frozenset({"steps", "seed"})
    WORDS: ClassVar = {
        "track": {name: track.label for name, track in TRACKS.items()},
        "racers": {name: entry.label for name, entry in CONTESTANTS.items()},
    }

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.view = RaceView()
        self.worker = Worker(lambda key, result: None, self._fail)
        self.race: LiveRace | None = None
        #: Why the last race failed; empty when it did not.
        self.error = ""
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        self._number = 0
        self._figures: dict[str, tuple[Hashable, dict[str, Any] | None]] = {}

    # --- buttons

    def start(self) -> None:
        """Race with the settings as they are; nothing happens while a race is on."""
        if self.active:
            return
        tuned = tuned_rates(self.track)
        rates = {name: tuned[name] * getattr(self, f"rate_{name}") for name in self.racers}
        self.error = ""
        self._number += 1
        self.race = LiveRace(track=self.track, rates=rates, steps=self.steps, seed=self.seed)
        self.worker.want(("race", self._number), self.race.go)

    def pause(self, on: bool = True) -> None:
        """Let the race wait after the current step, or go on."""
        if self.race is not None:
            self.race.paused.set() if on else self.race.paused.clear()

    def stop(self) -> None:
        """End the race after the current step."""
        if self.race is not None:
            self.race.stopping.set()

    def close(self) -> None:
        """Nobody looks any more: race no further."""
        self.stop()
        self.worker.forget()

    # --- asking

    @property
    def active(self) -> bool:
        """Whether a race is on, waiting included."""
        return self.race is not None and self.race.active

    @property
    def status(self) -> str:
        """``"ready"``, ``"preparing"``, ``"running"``, ``"paused"``, ``"stopping"``, ``"finished"`` and so on."""
        if self.race is None:
            return "ready"
        if self.active and self.race.stopping.is_set():
            return "stopping"
        return "paused" if self.active and self.race.paused.is_set() else self.race.status

    @property
    def sentence(self) -> str:
        """The status as a page says it."""
        race = self.race
        counted = {"step": 0, "steps": self.steps} if race is None else {"step": race.step, "steps": race.steps}
        return _SENTENCES[self.status].format(**counted)

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows now; copies and figures only, nothing is decomposed here.

        Returns:
            ``status``, ``sentence``, ``lanes`` (name, label, error, loss, ms a step), ``problems`` (sentences) and
            ``figures`` (loss, trials, spectrum, drift: a figure dictionary or ``None``). A figure that has not changed
            is the same object as before.
        """
        started = time.perf_counter()
        race = self.race
        version = 0 if race is None else race.version
        lanes = [] if race is None else race.read()
        self._choose_matrix()
        found = {
            "status": self.status,
            "sentence": self.sentence,
            "lanes": [_facts(lane) for lane in lanes],
            "problems": [f"{lane['label']} gave up: {lane['error']}" for lane in lanes if lane["error"]],
            "figures": self._draw(lanes, (self._number, version)),
        }
        if self.error:
            found["problems"].append(f"The race failed: {self.error}")
        self.last_ms = 1e3 * (time.perf_counter() - started)
        return found

    # --- drawing

    def _choose_matrix(self) -> None:
        names = [] if self.race is None else self.race.matrices
        if names and self.view.param["matrix"].objects != names:
            self.view.param["matrix"].objects = names
            if self.view.matrix not in names:
                # The middle of the model is more telling than its ends.
                self.view.matrix = names[len(names) // 2]

    def _draw(self, lanes: list[dict[str, Any]], version: Hashable) -> dict[str, dict[str, Any] | None]:
        across, matrix = self.view.across, self.view.matrix
        looks = tuple(len(lane["spectra"].get(matrix, ())) for lane in lanes)
        trials = tuple(len(lane["trials"]) for lane in lanes)
        return {
            "loss": self._cached("loss", (version, across), lambda: _losses(lanes, across)),
            "trials": self._cached("trials", (self._number, trials, across), lambda: self._trials(lanes)),
            "spectrum": self._cached("spectrum", (self._number, looks, matrix), lambda: _spectrum(lanes, matrix)),
            "drift": self._cached(
                "drift", (self._number, looks, matrix, across), lambda: _drift(lanes, matrix, across)
            ),
        }

    def _trials(self, lanes: list[dict[str, Any]]) -> dict[str, Any] | None:
        across = self.view.across
        curves = {
            lane["label"]: (_at(lane, [step for step, _ in lane["trials"]], across), [v for _, v in lane["trials"]])
            for lane in lanes
            if lane["trials"]
        }
        unit = "" if self.race is None else TRACKS[self.race.track].unit
        title = "Which one generalises best?"
        return _lines(curves, lanes, xlabel=_AXES[across], ylabel=f"held-out loss ({unit})", title=title)

    def _cached(self, chart: str, key: Hashable, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        if chart not in self._figures or self._figures[chart][0] != key:
            self._figures[chart] = (key, make())
        return self._figures[chart][1]

    # --- called in the worker's thread

    def _fail(self, key: Hashable, error: Exception) -> None:
        self.error = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"


# One learning rate a contestant, as a multiple of the one tuned for it: the same slider means the same everywhere.
for _setting, _name in RATES.items():
    _rate = param.Number(1.0, bounds=(1 / 32, 32), label=CONTESTANTS[_name].label)
    RaceState.param.add_parameter(_setting, _rate)


def _facts(lane: dict[str, Any]) -> dict[str, Any]:
    steps = int(lane["steps"][-1])
    recent = lane["losses"][1:][-20:]
    return {
        **{"name": lane["name"], "label": lane["label"], "error": lane["error"], "step": steps},
        "loss": float(np.mean(recent)) if len(recent) else None,
        "ms": 1e3 * float(lane["seconds"][-1]) / steps if steps else None,
    }


def _at(lane: dict[str, Any], steps: list[int], across: str) -> np.ndarray:
    """Where steps lie on the horizontal axis; every step has one entry, from 0 on."""
    return np.array(steps) if across == "steps" else lane["seconds"][np.array(steps, dtype=int)]


def _lines(
    curves: dict[str, tuple[Any, Any]],
    lanes: list[dict[str, Any]],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    legend: bool = False,
) -> dict[str, Any] | None:
    """Curves of those that have one; the others keep their place, and so their colour."""
    if not curves:
        return None
    nothing = (np.array([0.0]), np.array([np.nan]))
    ordered = {lane["label"]: curves.get(lane["label"], nothing) for lane in lanes}
    figure = race_curves(ordered, xlabel=xlabel, ylabel=ylabel, title=title)
    for trace in figure["data"] if max(len(x) for x, _ in curves.values()) > _FEW else ():
        trace["mode"] = "lines"
        trace.pop("marker", None)
    caption = figure["layout"]["meta"]["caption"].replace("At the end", "Now").partition(" Diverged")[0]
    figure["layout"]["meta"]["caption"] = caption
    # One legend for the page: a rival has the same line in every chart.
    figure["layout"]["showlegend"] = legend
    return figure


def _losses(lanes: list[dict[str, Any]], across: str) -> dict[str, Any] | None:
    longest = max((len(lane["steps"]) for lane in lanes), default=0)
    window = max(1, longest // 25)
    limit = most(max(1, len(lanes)))
    curves = {}
    for lane in lanes:
        if len(lane["steps"]) > 1:
            values = smooth(lane["losses"][1:], window)
            curves[lane["label"]] = thin(_at(lane, lane["steps"][1:].tolist(), across), values, limit)
    title = "Which one is ahead?"
    figure = _lines(curves, lanes, legend=True, xlabel=_AXES[across], ylabel="training loss (nats)", title=title)
    if figure is not None and window > 1:
        figure["layout"]["meta"]["caption"] += f" Each point is the mean of {window} steps."
    return figure


def _spectrum(lanes: list[dict[str, Any]], matrix: str) -> dict[str, Any] | None:
    curves = {}
    for lane in lanes:
        seen = lane["spectra"].get(matrix, [])
        if seen:
            curves[lane["label"]] = (np.arange(1, len(seen[-1][1]) + 1), seen[-1][1] - seen[0][1])
    title = f"Which singular values of {matrix.removesuffix('.weight')} have moved?"
    xlabel, ylabel = "number of the singular value", "change since the start"
    figure = _lines(curves, lanes, xlabel=xlabel, ylabel=ylabel, title=title)
    if figure is not None:
        tops = [f"{label} {number(moved[0])}" for label, (_, moved) in curves.items()]
        figure["layout"]["meta"]["caption"] = f"Change of the largest: {', '.join(tops)}."
    return figure


def _drift(lanes: list[dict[str, Any]], matrix: str, across: str) -> dict[str, Any] | None:
    curves = {}
    for lane in lanes:
        seen = lane["spectra"].get(matrix, [])
        if len(seen) > 1:
            start = seen[0][1]
            drift = [float(np.linalg.norm(values - start) / np.linalg.norm(start)) for _, values in seen]
            curves[lane["label"]] = (_at(lane, [step for step, _ in seen], across), drift)
    title = "How far have the singular values moved, relatively?"
    return _lines(curves, lanes, xlabel=_AXES[across], ylabel="‖σ − σ₀‖ / ‖σ₀‖", title=title)
