"""The page "Optimizer race": several optimizers train side by side on equal batches."""

from __future__ import annotations

from typing import Any

import panel as pn

from orthokit.studies import tuned_rates
from orthokit_widgets.components import Chart, Facts, Form
from orthokit_widgets.fields import describe
from orthokit_widgets.page import columns
from orthokit_widgets.race_state import RATES, RaceState
from orthokit_widgets.run_page import RunPage

__all__ = ["RacePage"]

_EXPLANATION = """
The rivals start from the same weights and take turns: one step of each on the same batch, then the next. Their learning
rates are those tuned for a full race; each slider multiplies one of them: pull it to see how much a method forgives.
Against <b>steps</b> all have seen the same data; against <b>seconds</b> a costly update counts. The row of numbers has
the training loss in nats and the time of a step; below the losses are the singular values of one matrix.
"""
# The first has the legend of all four.
_HEIGHTS = {"loss": 290, "trials": 290, "spectrum": 220, "drift": 220}
_TITLES = {
    "loss": "Which one is ahead?",
    "trials": "Which one generalises best?",
    "spectrum": "What becomes of the singular values?",
    "drift": "How far have the singular values moved?",
}


class RacePage(RunPage[RaceState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        **settings: Settings to start from; see :class:`orthokit_widgets.race_state.RaceState`.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(self, *, links: bool = False, **settings: Any) -> None:
        state = RaceState(**settings)
        self.facts = Facts()
        self.charts = {name: Chart(plot_height=height) for name, height in _HEIGHTS.items()}
        self.rates = Form(heard=self._heard, label="Learning rates, over the tuned ones")
        self._was = ""
        super().__init__(state, title="Optimizer race", explanation=_EXPLANATION, links=links)
        self.form.fields = [field for field in describe(state) if field["name"] not in RATES]
        self._show_rates()

    def side(self) -> list[pn.viewable.Viewable]:
        """Below the settings: the learning rates, and what the charts show."""
        return [self.rates, self.view]

    def parts(self) -> list[pn.viewable.Viewable]:
        """Numbers, four charts."""
        charts = self.charts
        return [
            self.facts,
            columns(charts["loss"], charts["trials"]),
            columns(charts["spectrum"], charts["drift"]),
        ]

    def paint(self) -> bool:
        """Show the snapshot; more to come while a race is on."""
        state = self.state
        # Asked before the snapshot too: what ends while it is taken is not in it, so another look is due.
        going = state.active
        found = state.snapshot()
        if found["status"] != self._was:
            self._was = found["status"]
            self.form.actions = self.actions()
            locked = list(state.SETTINGS) if state.active else []
            self.form.disabled, self.rates.disabled = locked, locked
        for name, chart in self.charts.items():
            figure = found["figures"][name]
            chart.show(figure, title="" if figure else _TITLES[name], empty=self._why())
        self.facts.items = [_fact(lane) for lane in found["lanes"]]
        self.status.text = found["sentence"]
        self._told = found["problems"]
        self.show_view()
        self.rates.values = state.values()
        self.hurry = found["status"] in ("preparing", "stopping")
        return going or state.active

    def problems(self) -> list[str]:
        """Who gave up, and why a race failed."""
        return self._told

    def changed(self, name: str) -> None:
        """Other rivals, or another task, have other learning rates."""
        if name in ("racers", "track"):
            self._show_rates()

    def _why(self) -> str:
        """What an empty chart says."""
        return "Nothing measured yet." if self.state.active else "Press Start."

    def _show_rates(self) -> None:
        """Sliders for those that race, with the rate that 1 stands for."""
        tuned = tuned_rates(self.state.track)
        fields = []
        for field in describe(self.state):
            name = RATES.get(field["name"], "")
            if name in self.state.racers:
                fields.append(field | {"label": f"{field['label']} × {tuned[name]:g}"})
        self.rates.fields = fields
        self.rates.values = self.state.values()


def _fact(lane: dict[str, Any]) -> dict[str, str]:
    if lane["error"]:
        return {"name": lane["label"], "value": "–", "unit": f"gave up at step {lane['step']}"}
    if lane["ms"] is None:
        return {"name": lane["label"], "value": "–", "unit": ""}
    return {"name": lane["label"], "value": f"{lane['loss']:.3f}", "unit": f"{lane['ms']:.0f}\u00a0ms"}
