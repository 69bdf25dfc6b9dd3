"""The page "Live training" without its looks: settings and buttons in, figures and sentences out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import param

from orthokit.errors import OrthokitError
from orthokit.figures import COLOURS
from orthokit.lab.runs import runs, runs_root
from orthokit_widgets import _charts
from orthokit_widgets.fields import Settings
from orthokit_widgets.training_run import Curves, LiveRun, load
from orthokit_widgets.worker import Worker

__all__ = ["TrainingState", "ViewSettings"]

_DATA = {"0.2M": ["addresses", "moby_dick"], "1M": ["addresses", "moby_dick"], "cnn": ["fashion", "digits"]}
_SENTENCES = {
    "ready": "Ready: press Start.",
    "preparing": "Preparing: reading the data.",
    "running": "Running.",
    "paused": "Paused after step {step}.",
    "stopping": "Stopping after this step.",
    "finished": "Finished all {step} steps.",
    "stopped": "Stopped after step {step}.",
    "failed": "Failed after step {step}.",
}
# As many lines as there are colours and dashes to tell them apart.
_MOST_DRAWN = len(COLOURS)


class ViewSettings(Settings):
    """Which matrix and quantities the charts show."""

    matrix = param.Selector(default="", objects=[""], label="Matrix shown")
    spectrum = param.Selector(default="spectrum", objects=["spectrum", "momentum_spectrum"], label="Spectrum of the")
    quantity = param.Selector(
        default="energy", objects=["energy", "stable_rank", "alignment", "gap_ratio"], label="Fourth chart"
    )

    SETTINGS = ("matrix", "spectrum", "quantity")
    SEGMENTS: ClassVar = {"spectrum": {"spectrum": "weight", "momentum_spectrum": "momentum"}}
    WORDS: ClassVar = {
        "matrix": {"": "chosen when a run starts"},
        "quantity": {
            "energy": "hyperspherical energy",
            "stable_rank": "stable rank",
            "alignment": "alignment with slow signal",
            "gap_ratio": "gap as a ratio",
        },
    }


class TrainingState(Settings):
    """What the page knows: settings, the run that trains, earlier runs that are drawn, and the folder of runs.

    Args:
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        **settings: Settings to start from.
    """

    optimizer = param.Selector(default="muon", objects=["muon", "adamw"], label="Optimizer")
    order = param.Selector(default="pre", objects=["pre", "post", "none"], label="Order (Muon)")
    momentum = param.Number(0.95, bounds=(0.0, 0.99), step=0.01, label="Momentum β")
    lr = param.Number(0.01, bounds=(1e-4, 0.1), label="Learning rate")
    model = param.Selector(default="0.2M", objects=list(_DATA), label="Model")
    data = param.Selector(default="addresses", objects=_DATA["0.2M"], label="Data")
    steps = param.Integer(400, bounds=(20, 5000), label="Steps")
    seed = param.Integer(0, bounds=(0, 99), label="Seed")
    budget = param.Number(
        0.15,
        bounds=(0.01, 0.5),
        step=0.01,
        label="Monitor's share",
        doc="Of the training time; it looks less often to keep it.",
    )

    SETTINGS = ("optimizer", "order", "momentum", "lr", "model", "data", "steps", "seed", "budget")
    LOGARITHMIC = frozenset({"lr"})
    TYPED = frozenset({"steps", "seed"})
    SEGMENTS: ClassVar = {
        "optimizer": {"muon": "Muon", "adamw": "AdamW"},
        "order": {"pre": "pre", "post": "post", "none": "none"},
    }
    WORDS: ClassVar = {
        "model": {"0.2M": "TinyGPT 0.2M", "1M": "TinyGPT 1M", "cnn": "SmallCNN"},
        "data": {
            "addresses": "State of the Union, bytes",
            "moby_dick": "Moby-Dick, bytes",
            "fashion": "Fashion-MNIST subset",
            "digits": "optical digits 8 × 8",
        },
    }

    def __init__(self, *, root: str | Path | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = runs_root(root)
        self.view = ViewSettings()
        self.worker = Worker(self._keep, self._fail)
        self.live: LiveRun | None = None
        #: Names of the runs that are drawn, oldest first.
        self.drawn: list[str] = []
        #: The rows of the table of runs.
        self.rows: list[dict[str, Any]] = []
        #: What went wrong besides the run itself, by what was asked for.
        self.errors: dict[Hashable, str] = {}
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        self._past: dict[str, Curves] = {}
        self._listed = 0
        self._figures: dict[str, tuple[Hashable, dict[str, Any] | None]] = {}

    @param.depends("model", watch=True, on_init=True)
    def _fit_data(self) -> None:
        """Only data that the model can read can be chosen."""
        self.param["data"].objects = _DATA[self.model]
        if self.data not in _DATA[self.model]:
            self.data = _DATA[self.model][0]

    # --- buttons

    def start(self) -> None:
        """Train with the settings as they are; nothing happens while a run is active."""
        if self.live is not None and self.live.active:
            return
        if self.live is not None:
            self._past[self.live.name] = self.live.read()[0]
        self.errors.clear()
        self.live = LiveRun(self.values(), self.root)
        self.draw(self.live.name, True)

    def pause(self, on: bool = True) -> None:
        """Let the run wait, or go on."""
        if self.live is not None:
            self.live.pause(on)

    def stop(self) -> None:
        """End the run after the current step."""
        if self.live is not None:
            self.live.stop()

    def close(self) -> None:
        """Nobody looks any more: train no further."""
        self.stop()
        self.worker.forget()

    def draw(self, name: str, on: bool) -> None:
        """Draw a run over the others, or no longer; beyond as many as there are colours, the oldest goes."""
        self.drawn = [other for other in self.drawn if other != name] + [name] * on
        for old in self.drawn[: max(0, len(self.drawn) - _MOST_DRAWN)]:
            self.drawn.remove(old)
        self._past = {kept: curves for kept, curves in self._past.items() if kept in self.drawn}
        self._mark_rows()

    def reread(self) -> None:
        """List the folder of runs again, in the thread."""
        self._listed += 1
        root = self.root
        self.worker.want(("list", self._listed), lambda job: _rows(root))

    # --- asking

    @property
    def status(self) -> str:
        """``"ready"``, ``"preparing"``, ``"running"``, ``"paused"``, ``"stopping"``, ``"finished"`` and so on."""
        if self.live is None:
            return "ready"
        return "stopping" if self.live.stopping else "paused" if self.live.paused else self.live.status

    @property
    def sentence(self) -> str:
        """The status as a page says it."""
        return _SENTENCES[self.status].format(step=0 if self.live is None else self.live.step)

    @property
    def active(self) -> bool:
        """Whether a run is under way, waiting included."""
        return self.live is not None and self.live.active

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows now; copies and figures only, nothing is decomposed here.

        Returns:
            ``status``, ``sentence``, ``step``, ``steps``, ``loss``, ``ms_per_step``, ``share`` (of the monitor),
            ``notes``, ``matrices``, ``figures`` (loss, spectrum, gap, quantity: a figure dictionary or ``None``) and
            ``rows``. A figure that has not changed is the same object as before.
        """
        started = time.perf_counter()
        curves, losses = self._collect()
        live, monitor = self.live, None if self.live is None else self.live.monitor
        focus = next((curves[name] for name in reversed(self.drawn) if name in curves), None)
        if live is not None and live.name in curves and live.active:
            focus = curves[live.name]
        matrices = self._choose_matrix(focus)
        found = {
            "status": self.status,
            "sentence": self.sentence,
            "step": 0 if live is None else live.step,
            "steps": self.steps if live is None else live.settings["steps"],
            "loss": None if live is None or not live.curves.losses else live.curves.losses[-1],
            "ms_per_step": 0.0 if live is None else live.ms_per_step,
            "share": 0.0 if monitor is None else monitor.share,
            "notes": [] if monitor is None else list(monitor.notes),
            "matrices": matrices,
            "figures": self._draw(curves, losses, focus),
            "rows": self.rows,
        }
        self.last_ms = 1e3 * (time.perf_counter() - started)
        return found

    # --- collecting

    def _collect(self) -> tuple[dict[str, Curves], dict[str, tuple[np.ndarray, np.ndarray]]]:
        """The runs that are drawn and at hand; one that is not is asked for."""
        curves: dict[str, Curves] = {}
        losses: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in self.drawn:
            if self.live is not None and name == self.live.name:
                curves[name], *pair = self.live.read()
                losses[name] = (pair[0], pair[1])
            elif name in self._past:
                past = curves[name] = self._past[name]
                losses[name] = (np.array(past.steps), np.array(past.losses))
            elif ("run", name) not in self.errors and self.worker.job is None:
                self.worker.want(("run", name), lambda job, name=name, root=self.root: load(name, root))
        return curves, losses

    def _choose_matrix(self, focus: Curves | None) -> list[str]:
        names = [] if focus is None else list(focus.matrices)
        if names and self.view.matrix not in names:
            self.view.param["matrix"].objects = names
            # The middle of the model is more telling than its ends.
            self.view.matrix = names[len(names) // 2]
        elif names and self.view.param["matrix"].objects != names:
            self.view.param["matrix"].objects = names
        return names

    def _draw(
        self, curves: dict[str, Curves], losses: dict[str, tuple[np.ndarray, np.ndarray]], focus: Curves | None
    ) -> dict[str, dict[str, Any] | None]:
        view = self.view
        shown = [name for name in self.drawn if name in curves]
        sizes = tuple((name, len(losses[name][0])) for name in shown)
        spectra = ([], []) if focus is None else focus.get(view.matrix, view.spectrum)
        found = {}
        for chart, quantity in (("gap", "gap"), ("quantity", view.quantity)):
            series = {name: curves[name].get(view.matrix, quantity) for name in shown}
            series = series if any(pair[0] for pair in series.values()) else {}
            key = (quantity, view.matrix, *((name, len(pair[0])) for name, pair in series.items()))
            found[chart] = self._cached(
                chart,
                key,
                lambda s=series, q=quantity: _charts.history(s, quantity=q) if s else None,
            )
        key = (None if focus is None else focus.name, view.matrix, view.spectrum, len(spectra[0]))
        found["spectrum"] = self._cached(
            "spectrum",
            key,
            lambda: _charts.live_spectrum(*spectra, matrix=view.matrix, of=view.spectrum) if spectra[0] else None,
        )
        drawable = {name: pair for name, pair in losses.items() if len(pair[0])}
        found["loss"] = self._cached("loss", sizes, lambda: _charts.losses(drawable) if drawable else None)
        return found

    def _cached(self, chart: str, key: Hashable, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        if chart not in self._figures or self._figures[chart][0] != key:
            self._figures[chart] = (key, make())
        return self._figures[chart][1]

    def _mark_rows(self) -> None:
        self.rows = [row | {"chosen": row["name"] in self.drawn} for row in self.rows]

    # --- called in the worker's thread

    def _keep(self, key: Hashable, result: Any) -> None:
        if isinstance(result, Curves):
            if not result.steps and not result.matrices:
                self.errors[key] = f"The run {result.name} has recorded nothing to draw yet."
            self._past = self._past | {result.name: result}
        else:
            self.rows = result
            self._mark_rows()
            self.errors.pop("list", None)

    def _fail(self, key: Hashable, error: Exception) -> None:
        text = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"
        self.errors[key if isinstance(key, tuple) and key[0] == "run" else "list"] = text


def _rows(root: Path) -> list[dict[str, Any]]:
    """The table of runs as plain text, newest first."""
    frame = runs(root)
    return [_row({str(key): value for key, value in row.items()}) for row in frame.to_dict("records")]


def _row(run: dict[str, Any]) -> dict[str, Any]:
    def word(key: str, form: str = "{}") -> str:
        value = run.get(key)
        return "" if value is None or value != value else form.format(value)

    if word("config.page.model"):
        order = f" {word('config.page.order')}" if word("config.page.optimizer") == "muon" else ""
        what = (
            f"{word('config.page.optimizer')}{order}, β {word('config.page.momentum')}, lr {word('config.page.lr')}, "
            f"{word('config.page.model')} on {word('config.page.data')}, seed {word('config.page.seed')}"
        )
    else:
        parts = [word(f"config.{key}") for key in ("model", "optimizer", "task", "corpus", "images")]
        what = ", ".join(part for part in parts if part)
    created = run["created"]
    return {
        "name": run["name"],
        "status": run["status"],
        "what": what,
        "steps": "" if run["steps"] is None or run["steps"] != run["steps"] else str(run["steps"]),
        "loss": word("last.loss", "{:.3f}"),
        "created": created.strftime("%d %b %H:%M") if hasattr(created, "strftime") and created == created else "",
        "error": word("error"),
        "chosen": False,
        "drawable": run["status"] != "damaged",
    }
