"""The page "Forgetting": what fine-tuning taught and cost a model, run by run, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import panel as pn

from orthokit_widgets.components import Chart, Facts, Form, Message, stylesheets
from orthokit_widgets.fields import describe
from orthokit_widgets.forgetting_state import ENTRY, ForgettingState
from orthokit_widgets.page import columns
from orthokit_widgets.run_page import RunPage

__all__ = ["ForgettingPage"]

_EXPLANATION = """
A pretrained model is fine-tuned on something new, by adapters of equal size or by its own weights. Each point is a run:
further right it has <b>learnt</b> more of the new (its loss there fell), further up it has <b>forgotten</b> less of
what it could before (its loss there rose less). Press a point, or choose in the list, and see what became of the
weights <span class="formula"><i>W</i>₀ = <i>U</i>Σ<i>V</i><sup>T</sup></span>: how much is done otherwise along each
old direction, <span class="formula">|<i>uᵢ</i><sup>T</sup><i>W vᵢ</i> − <i>σᵢ</i>|</span>, and where the new was
written, <span class="formula">‖(<i>W</i> − <i>W</i>₀) <i>vᵢ</i>‖</span>. Pull <b>α</b> to rewind: from 1, as trained,
back to 0, as it was.
"""
_HEIGHTS = {"front": 370, "ways": 290, "geometry": 290, "profile": 250, "spectrum": 260, "weights": 260}
_TITLES = {
    "front": "Who learns more, and who forgets less?",
    "ways": "What would going back keep, and what save?",
    "geometry": "Which layers answer otherwise than before?",
    "profile": "Which directions moved?",
    "spectrum": "Do the singular values stay, and their directions?",
    "weights": "In which layers did the weights change?",
}


class ForgettingPage(RunPage[ForgettingState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        evidence: Folder of recorded evidence; default the checkout's.
        small: Models and texts of the size for tests.
        **settings: Settings to start from; see :class:`orthokit_widgets.forgetting_state.ForgettingState`.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(
        self,
        *,
        links: bool = False,
        root: str | Path | None = None,
        evidence: str | Path | None = None,
        small: bool = False,
        **settings: Any,
    ) -> None:
        state = ForgettingState(root=root, evidence=evidence, small=small, **settings)
        self.facts = Facts()
        self.reading = Message(role="note")
        self.charts = {name: Chart(plot_height=height, heard=self._heard) for name, height in _HEIGHTS.items()}
        self.entry = Form(heard=self._heard, label="A run of your own")
        self._told: list[str] = []
        super().__init__(state, title="Forgetting", explanation=_EXPLANATION, links=links)

    def side(self) -> list[pn.viewable.Viewable]:
        """Below what is shown: the layer, and a run of one's own."""
        title = pn.pane.HTML("<h2>A run of your own</h2>", margin=0, stylesheets=stylesheets())
        return [self.view, title, self.entry]

    def parts(self) -> list[pn.viewable.Viewable]:
        """The sentences, numbers, six charts."""
        charts = self.charts
        return [
            charts["front"],
            self.reading,
            self.facts,
            columns(charts["ways"], charts["geometry"]),
            charts["profile"],
            columns(charts["spectrum"], charts["weights"]),
        ]

    def paint(self) -> bool:
        """Show the snapshot; more to come while a run is on or the run store is read."""
        state = self.state
        # Asked before the snapshot too: what ends while it is taken is not in it, so another look is due.
        going = state.active or state.reader.job is not None
        found = state.snapshot()
        for name, chart in self.charts.items():
            figure = found["figures"][name]
            chart.show(figure, title="" if figure else _TITLES[name], empty=self._why(name))
        self.facts.items = found["facts"]
        self.reading.text = found["reading"]
        self.status.text = found["sentence"]
        self._told = found["problems"]
        self._show_fields(found["way"])
        self.show_view()
        idle = [
            *(["which"] if len(state.param["which"].objects) == 1 else []),
            *(["path"] if found["ways"] < 2 else []),
        ]
        self.form.disabled = [*idle, *(["alpha"] if not found["ways"] else [])]
        self.entry.disabled = list(ENTRY) if state.active or not state.can_start else []
        self.hurry = found["status"] in ("preparing", "stopping")
        return going or state.active or state.reader.job is not None

    def problems(self) -> list[str]:
        """What is missing, could not be read, failed or was deleted."""
        return self._told

    def actions(self) -> list[dict[str, Any]]:
        """Start only where a run takes seconds."""
        start, *others = super().actions()
        return [start | {"disabled": start["disabled"] or not self.state.can_start}, *others]

    def acted(self, message: dict[str, Any]) -> None:
        """A point was pressed, or what every run is told."""
        pick = message.get("pick")
        if isinstance(pick, list) and len(pick) == 2:
            self.state.pick(str(pick[0]), str(pick[1]))
        else:
            super().acted(message)

    def _show_fields(self, way: str) -> None:
        """Controls with what can be chosen now, and the way that is walked."""
        state = self.state
        fields = {field["name"]: field for field in describe(state)}
        fields["rate"]["label"] += f" × {state.tuned:g}"
        own = [fields[name] for name in state.SETTINGS if name not in ENTRY]
        entry = [fields[name] for name in ENTRY]
        actions = self.actions()
        for form, wanted in ((self.form, own), (self.entry, entry)):
            if form.fields != wanted:
                form.fields = wanted
            form.values = state.values() | {"path": way}
        if self.entry.actions != actions:
            self.entry.actions = actions

    def _why(self, chart: str) -> str:
        """What an empty chart says."""
        state = self.state
        if state.active:
            return "Measured when the run has finished."
        return "Nothing recorded of this run." if state.shown else "Choose a run."
