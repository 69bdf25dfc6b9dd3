"""The page "Forgetting" without its looks: settings and buttons in, figures and sentences out."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import param

from orthokit.errors import OrthokitError
from orthokit.lab.arena import GROUNDS, METHODS
from orthokit.lab.arena.rates import first_rate
from orthokit.lab.runs import Run, runs_root
from orthokit_widgets import forgetting_charts as charts
from orthokit_widgets.fields import Settings
from orthokit_widgets.forgetting_data import PATHS, Portrait, Record, recorded
from orthokit_widgets.forgetting_run import LiveEntry, kept_runs, load
from orthokit_widgets.forgetting_words import PATH_WORDS, explained, facts
from orthokit_widgets.worker import Job, Worker

__all__ = ["ENTRY", "ForgettingState", "ForgettingView"]

#: Settings of a new run.
ENTRY = ("method", "rate", "steps", "seed")
_LIVE = ("tinygpt", "fashion")  # grounds on which a run takes seconds
_SENTENCES = {
    "ready": "Ready: choose a run, or press Start.",
    "preparing": "Preparing: reading the model and the data.",
    "running": "Running: step {step} of {steps}.",
    "paused": "Paused after step {step}.",
    "measuring": "Trained; measuring layers and ways back.",
    "stopping": "Stopping.",
    "finished": "Finished all {steps} steps.",
    "stopped": "Stopped after step {step}.",
    "failed": "Failed after step {step}.",
}
_MOST_KEPT, _MEAN = 20, "mean"  # runs of the store that are offered; what stands for all seeds


class ForgettingView(Settings):
    """What the charts of layers show."""

    layer = param.Selector(default="", objects=[""], label="Layer shown")

    SETTINGS = ("layer",)
    WORDS: ClassVar = {"layer": {"": "none recorded"}}


class ForgettingState(Settings):
    """What the page knows: the recorded arena, runs of the store, the run that trains, and what is looked at.

    Args:
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        evidence: Folder of evidence; default the checkout's.
        small: Models and texts of the size for tests.
        **settings: Settings to start from.
    """

    ground = param.Selector(default="tinygpt", objects=list(GROUNDS), label="Model and tasks")
    shown = param.Selector(default="oft", objects=list(METHODS), label="Method or run shown")
    which = param.Selector(default=_MEAN, objects=[_MEAN], label="Seed")
    path = param.Selector(default="cayley_sqrt", objects=list(PATHS), label="Way back")
    alpha = param.Number(1.0, bounds=(0.0, 1.0), step=0.01, label="Rewind α", doc="1: as trained; 0: as before.")
    method = param.Selector(default="oft", objects=list(METHODS), label="Method")
    rate = param.Number(1.0, bounds=(1 / 32, 32.0), label="Learning rate")
    steps = param.Integer(50, bounds=(5, 500), label="Steps")
    seed = param.Integer(0, bounds=(0, 99), label="Seed of the run")

    SETTINGS: ClassVar[tuple[str, ...]] = ("ground", "shown", "which", "path", "alpha", *ENTRY)
    LOGARITHMIC = frozenset({"rate"})
    TYPED = frozenset({"steps", "seed"})
    SEGMENTS: ClassVar = {"which": {_MEAN: _MEAN}, "path": PATH_WORDS}

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        evidence: str | Path | None = None,
        small: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.root, self.small = runs_root(root), small
        self._records, self.missing = recorded(evidence)
        self.view = ForgettingView()
        #: Trains; the other reads the run store, so that one does not wait for the other.
        self.worker = Worker(lambda key, result: None, self._fail)
        self.reader = Worker(self._keep, self._fail)
        self.live: LiveEntry | None = None
        #: What went wrong besides the run itself, by what was asked for.
        self.errors: dict[Hashable, str] = {}
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        self._kept: dict[str, dict[str, Any]] = dict(list(kept_runs(self.root).items())[:_MOST_KEPT])
        self._loaded: dict[str, Portrait] = {}
        self._figures: dict[str, tuple[Hashable, dict[str, Any] | None]] = {}
        self._bases: dict[Hashable, dict[str, Any]] = {}
        grounds = [name for name in GROUNDS if name in self._records or name in _LIVE]
        self.param["ground"].objects = grounds
        self.WORDS = {  # type: ignore[misc]
            "ground": {name: GROUNDS[name].label for name in grounds},
            "method": {name: _offered(name) for name in METHODS},
        }
        self._fit_shown()
        self.set(settings)
        if self._kept:
            self.reader.want("runs", self._read_kept)

    # --- what can be chosen

    @property
    def record(self) -> Record | None:
        """The recorded runs of the ground."""
        return self._records.get(self.ground)

    @param.depends("ground", watch=True)
    def _fit_shown(self) -> None:
        """Methods, recorded or not, and the runs of the store on this ground."""
        found = {} if self.record is None else self.record.runs
        words = {name: each.label + ", not recorded" * (name not in found) for name, each in METHODS.items()}
        kept = [name for name, asked in self._kept.items() if asked["ground"] == self.ground]
        if self.live is not None and self.live.ground == self.ground:
            kept = [self.live.name, *(name for name in kept if name != self.live.name)]
        for name in kept:
            asked = self.live.asked if self.live is not None and name == self.live.name else self._kept[name]
            label = METHODS[asked["method"]].label if asked["method"] in METHODS else asked["method"]
            words[name] = f"your run: {label}, {asked['steps']} steps, seed {asked['seed']} ({name})"
        self.WORDS = {**self.WORDS, "shown": words}  # type: ignore[misc]
        self.param["shown"].objects = list(words)
        if self.shown not in words:
            self.shown = next(iter(found), "oft")
        self._fit_which()

    @param.depends("shown", watch=True)
    def _fit_which(self) -> None:
        """The seeds of the method that is shown."""
        seeds = [] if self.record is None else list(self.record.runs.get(self.shown, {}))
        self.param["which"].objects = [_MEAN, *map(str, seeds)]
        if self.which not in self.param["which"].objects:
            self.which = _MEAN

    @property
    def can_start(self) -> bool:
        """Whether a run on this ground takes seconds."""
        return self.ground in _LIVE

    @property
    def tuned(self) -> float:
        """The learning rate that the slider's 1 stands for."""
        run = self._recorded_run
        return first_rate(self.ground, self.method) if run is None else run.lr

    @property
    def _recorded_run(self) -> Portrait | None:
        """One run of the method that is to be started."""
        runs = {} if self.record is None else self.record.runs.get(self.method, {})
        return next(iter(runs.values()), None)

    # --- buttons

    def start(self) -> None:
        """Train with the settings as they are and look at it; nothing happens while a run is active."""
        if self.active or not self.can_start:
            return
        self._forget_live()
        self.errors.clear()
        before = self._recorded_run
        options = {"size": None if before is None else before.size, "root": self.root, "small": self.small}
        asked = {"lr": self.rate * self.tuned, "steps": self.steps, "seed": self.seed}
        self.live = LiveEntry(self.ground, self.method, **asked, **options)
        self._fit_shown()
        self.shown, self.alpha = self.live.name, 1.0
        self.worker.want(self.live.name, self.live.go)

    def pause(self, on: bool = True) -> None:
        """Let the run wait after the current step, or go on."""
        if self.live is not None:
            self.live.paused.set() if on else self.live.paused.clear()

    def stop(self) -> None:
        """End the run at the next chance."""
        if self.live is not None:
            self.live.stop()

    def close(self) -> None:
        """Nobody looks any more: train and read no further."""
        # The worker keeps its request: dropped before it began, it would never be told to have ended.
        self.stop()
        self.reader.forget()

    def pick(self, shown: str, which: str) -> None:
        """Look at a point of the chart; one that is there no more is passed over."""
        if shown in self.param["shown"].objects:
            self.shown = shown
            self.which = which if which in self.param["which"].objects else _MEAN
            self.alpha = 1.0

    # --- asking

    @property
    def active(self) -> bool:
        """Whether a run is on, waiting included."""
        return self.live is not None and self.live.active

    @property
    def status(self) -> str:
        """``"ready"``, ``"preparing"``, ``"running"``, ``"paused"``, ``"measuring"``, ``"stopping"`` and so on."""
        live = self.live
        if live is None:
            return "ready"
        if live.active and live.stopping.is_set():
            return "stopping"
        return "paused" if live.status == "running" and live.paused.is_set() else live.status

    @property
    def sentence(self) -> str:
        """The status as a page says it."""
        live = self.live
        counted = {"step": 0, "steps": self.steps} if live is None else {"step": live.step, "steps": live.steps}
        return _SENTENCES[self.status].format(**counted)

    def portrait(self) -> Portrait | None:
        """What is shown; ``None`` where there is nothing, or not yet."""
        if self.shown in METHODS:
            seed = None if self.which == _MEAN else int(self.which)
            return None if self.record is None else self.record.portrait(self.shown, seed)
        if self.live is not None and self.shown == self.live.name:
            found = self.live.read()
            return None if found is None else replace(found, label="your run")
        found = self._loaded.get(self.shown)
        return None if found is None else replace(found, label=f"your run {self.shown}")

    def way(self, portrait: Portrait | None) -> str:
        """The path that is walked: the one chosen, or the only one there is."""
        walks = {} if portrait is None else portrait.walks
        return self.path if self.path in walks or not walks else next(iter(walks))

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows now; copies and figures only, nothing is decomposed and no model is called here.

        Returns:
            ``status``, ``sentence``, ``reading`` (sentences on the run shown), ``facts`` (named numbers), ``problems``
            (sentences), ``way`` (the path walked), ``ways`` (how many there are) and ``figures`` (front, ways,
            retention, adaptation, spectrum, geometry, weights: a figure dictionary or ``None``). A figure that has not
            changed is the same object as before.
        """
        started = time.perf_counter()
        self._drop_deleted()
        portrait = self.portrait()
        self._choose_layer(portrait)
        way, place = self.way(portrait), GROUNDS[self.ground]
        found = {
            "status": self.status,
            "sentence": self.sentence,
            "reading": self._unread() if portrait is None else explained(portrait, place, path=way, alpha=self.alpha),
            "facts": [] if portrait is None else facts(portrait, place, path=way, alpha=self.alpha),
            "problems": self._problems(),
            "way": way,
            "ways": 0 if portrait is None else len(portrait.walks),
            "figures": self._draw(portrait, way),
        }
        self.last_ms = 1e3 * (time.perf_counter() - started)
        return found

    # --- what there is

    def _unread(self) -> str:
        """Why no run is described."""
        if self.shown in METHODS:
            start = " Press Start to make one." if self.can_start else ""
            return f"No run of {METHODS[self.shown].label} is recorded here.{start}"
        if self.shown in self.errors:
            return f"The run {self.shown} cannot be read."
        return "Reading the run." if self.reader.job is not None else "This run has not been judged yet."

    def _problems(self) -> list[str]:
        live, record = self.live, self.record
        told = [self.missing] if self.missing else []
        if record is not None and record.diverged:
            named = ", ".join(f"{METHODS[method].label} (seed {seed})" for method, seed in record.diverged)
            told.append(f"Not drawn, as their loss is no number any more: {named}.")
        if live is not None and live.error:
            told.append(f"The run {live.name} failed: {live.error}")
        return [*told, *self.errors.values()]

    def _drop_deleted(self) -> None:
        """A run that was deleted while it was shown is told and offered no more."""
        gone = [name for name in (*self._loaded, *self._kept) if not Run.exists(name, root=self.root)]
        live = self.live
        if live is not None and live.recorded and not live.active and live.status != "failed":
            gone += [] if Run.exists(live.name, root=self.root) else [live.name]
        for name in dict.fromkeys(gone):
            if name == self.shown:
                self.errors["deleted"] = f"The run {name} was deleted while it was shown; it is offered no more."
            self._loaded.pop(name, None)
            self._kept.pop(name, None)
            if live is not None and name == live.name and not live.active:
                self.live = None
        if gone:
            self._fit_shown()

    def _forget_live(self) -> None:
        """The run before becomes one of the store."""
        if self.live is not None:
            found = self.live.read()
            if found is not None and Run.exists(self.live.name, root=self.root):
                self._kept = {self.live.name: self.live.asked, **self._kept}
                self._loaded[self.live.name] = found
            self.live = None

    def _choose_layer(self, portrait: Portrait | None) -> None:
        names = [] if portrait is None else list(portrait.profiles)
        objects = names or [""]
        if self.view.param["layer"].objects != objects:
            self.view.param["layer"].objects = objects
        if self.view.layer not in objects:
            # The middle of the model is more telling than its ends.
            self.view.layer = objects[len(objects) // 2]

    # --- drawing

    def _draw(self, portrait: Portrait | None, way: str) -> dict[str, dict[str, Any] | None]:
        place, layer, alpha = GROUNDS[self.ground], self.view.layer, self.alpha
        # A portrait is made once and then only replaced, so it stands for its contents while the key holds it.
        who: Hashable = (self.ground, self.shown, self.which, self._seen(portrait))
        others = self._others()
        found: dict[str, dict[str, Any] | None] = {
            "front": self._cached(
                "front",
                (who, way, alpha, tuple(others)),
                lambda: charts.front(self._base(), portrait, way=way, alpha=alpha, others=others),
            )
        }
        if portrait is None:
            return found | dict.fromkeys(("ways", "profile", "spectrum", "geometry", "weights"))
        profile, beside = portrait.profiles.get(layer), self._beside(portrait)
        made: dict[str, tuple[Hashable, Callable[[], dict[str, Any] | None]]] = {
            "ways": ((who, way, alpha), lambda: charts.ways(portrait, place, way=way, alpha=alpha)),
            "profile": ((who, layer), lambda: charts.profile(portrait, layer, beside)),
            "spectrum": ((who, layer), lambda: None if profile is None else charts.spectrum(profile)),
            "geometry": (who, lambda: charts.layers(portrait, of="geometry")),
            "weights": (who, lambda: charts.layers(portrait, of="weights")),
        }
        return found | {name: self._cached(name, key, make) for name, (key, make) in made.items()}

    def _beside(self, portrait: Portrait) -> Portrait | None:
        """The recorded run that profiles are held against: full fine-tuning, and for that LoRA."""
        other = "lora" if portrait.method == "full" else "full"
        return None if self.record is None else self.record.portrait(other, None)

    def _seen(self, portrait: Portrait | None) -> Hashable:
        """What changes when the portrait of the run shown does."""
        return None if portrait is None else (portrait.steps, len(portrait.travel), len(portrait.layers))

    def _others(self) -> dict[str, Portrait]:
        """Runs of the store on this ground, but the one shown."""
        here = {name for name, asked in self._kept.items() if asked["ground"] == self.ground} - {self.shown}
        return {name: found for name, found in self._loaded.items() if name in here}

    def _base(self) -> dict[str, Any]:
        key = (self.ground, id(self.record))
        if key not in self._bases:
            self._bases[key] = charts.front_base(self.record, GROUNDS[self.ground])
        return self._bases[key]

    def _cached(self, chart: str, key: Hashable, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        if chart not in self._figures or self._figures[chart][0] != key:
            self._figures[chart] = (key, make())
        return self._figures[chart][1]

    # --- called in the reader's thread

    def _read_kept(self, job: Job) -> dict[str, Portrait]:
        """The runs of the store; one that cannot be read is told."""
        found = {}
        for name in list(self._kept):
            if job.cancelled.is_set():
                break
            try:
                found[name] = load(name, self.root)
            except OrthokitError as error:
                self.errors[name] = str(error)
        return found

    def _keep(self, key: Hashable, result: dict[str, Portrait]) -> None:
        self._loaded = {**result, **self._loaded}

    def _fail(self, key: Hashable, error: Exception) -> None:
        self.errors[key] = f"{type(error).__name__}: {error}"


def _offered(name: str) -> str:
    """A method in a list; with what it needs if that is not installed."""
    entry = METHODS[name]
    missing = entry.package and importlib.util.find_spec(entry.package) is None
    return f"{entry.label}, needs the package {entry.package}" if missing else entry.label
