"""The page "Live training": a small model trains in a thread, its loss and spectra are drawn while it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import panel as pn

from orthokit_widgets.components import Chart, Facts, RunTable
from orthokit_widgets.fields import describe
from orthokit_widgets.page import columns
from orthokit_widgets.run_page import RunPage
from orthokit_widgets.training_state import TrainingState

__all__ = ["TrainingPage"]

_EXPLANATION = """
A small model trains in the background, and a monitor looks at its matrices within the share of the time you grant it.
Muon moves each hidden matrix along the orthogonalised momentum,
<span class="formula"><i>W</i> ← <i>W</i> − <i>η</i> polar(<i>M</i>)</span>, where
<span class="formula">polar(<i>U</i>Σ<i>V</i><sup>T</sup>) = <i>UV</i><sup>T</sup></span>
gives all directions the same step. Watch the singular values of the weight or of the momentum, the gap of the momentum,
and how far the neurons are from an even spread. Every run is recorded: tick earlier ones, also those of notebooks, to
draw them over each other.
"""
_TITLES = {
    "loss": "How fast does the loss fall?",
    "spectrum": "How does the spectrum move while training?",
    "gap": "How wide is the momentum's gap?",
    "quantity": "What does the monitor see?",
}


class TrainingPage(RunPage[TrainingState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        **settings: Settings to start from; see :class:`orthokit_widgets.training_state.TrainingState`.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(self, *, links: bool = False, root: str | Path | None = None, **settings: Any) -> None:
        state = TrainingState(root=root, **settings)
        self.facts = Facts()
        self.charts = {name: Chart(plot_height=222) for name in _TITLES}
        self.table = RunTable(heard=self._heard, folder=str(state.root))
        self._was = ""
        super().__init__(state, title="Live training", explanation=_EXPLANATION, links=links)
        state.reread()
        self.repaint()

    def side(self) -> list[pn.viewable.Viewable]:
        """Below the settings: what the charts show."""
        return [self.view]

    def parts(self) -> list[pn.viewable.Viewable]:
        """Numbers, four charts, the table of runs."""
        charts = self.charts
        return [
            self.facts,
            columns(charts["loss"], charts["spectrum"]),
            columns(charts["gap"], charts["quantity"]),
            self.table,
        ]

    def paint(self) -> bool:
        """Show the snapshot; more to come while a run is active or the folder is read."""
        state = self.state
        # Asked before the snapshot too: what ends while it is taken is not in it, so another look is due.
        going = state.active or state.worker.job is not None
        found = state.snapshot()
        if found["status"] != self._was:
            if found["status"] in ("running", "finished", "stopped", "failed"):
                state.reread()
            self._was = found["status"]
            self.form.actions = self.actions()
            self.form.disabled = list(state.SETTINGS) if state.active else self._idle()
        for name, chart in self.charts.items():
            chart.show(
                found["figures"][name], title="" if found["figures"][name] else _TITLES[name], empty=self._why(name)
            )
        self.facts.items = _facts(found, state)
        self.status.text = "\n".join([found["sentence"], *_said(found["notes"])])
        self.table.rows = found["rows"]
        self.show_view()
        self.hurry = found["status"] in ("preparing", "stopping")
        return going or state.active or state.worker.job is not None

    def problems(self) -> list[str]:
        """Why the run failed, and what could not be read."""
        live = self.state.live
        failed = [f"The run {live.name} failed: {live.error}"] if live is not None and live.error else []
        return [*failed, *self.state.errors.values()]

    def changed(self, name: str) -> None:
        """Another model reads other data."""
        if name == "model":
            self.form.fields = describe(self.state)
        if name == "optimizer":
            self.form.disabled = self._idle()

    def acted(self, message: dict[str, Any]) -> None:
        """Draw a run, list the folder again, or what every run is told."""
        if "draw" in message:
            self.state.draw(str(message["draw"]), bool(message.get("on")))
        elif message.get("action") == "reread":
            self.state.reread()
        else:
            super().acted(message)

    def _idle(self) -> list[str]:
        """Settings without effect as the others are."""
        return ["order"] if self.state.optimizer == "adamw" else []

    def _why(self, chart: str) -> str:
        """What an empty chart says."""
        state = self.state
        if not state.drawn:
            return "Press Start, or tick a recorded run below."
        measured = "" if chart == "loss" or not state.active else " The monitor has not measured it yet."
        if chart == "gap" and state.active and (state.order, state.optimizer) == ("none", "muon"):
            return "The order none keeps no momentum."
        return measured.strip() or "Nothing recorded yet."


def _said(notes: list[str]) -> list[str]:
    """The monitor's notes as sentences; of those on its period, which may come and go, only the latest."""
    others = [note for note in notes if not note.startswith("looking every")]
    latest = [note for note in notes if note.startswith("looking every")][-1:]
    return [f"Monitor: {note}." for note in others + latest]


def _facts(found: dict[str, Any], state: TrainingState) -> list[dict[str, str]]:
    loss = found["loss"]
    return [
        {"name": "step", "value": f"{found['step']}", "unit": f"of {found['steps']}"},
        {"name": "training loss", "value": "–" if loss is None else f"{loss:.3f}", "unit": "nats"},
        {"name": "time per step", "value": f"{found['ms_per_step']:.0f}" if found["step"] else "–", "unit": "ms"},
        {"name": "monitor's share", "value": f"{found['share']:.1%}", "unit": f"of {state.budget:.0%} granted"},
    ]
