"""The page "Adapters": what an adapter does to a real weight, at the pull of a slider."""

from __future__ import annotations

from typing import Any

import panel as pn

from orthokit_widgets.adapters_state import OPTIONS, AdaptersState
from orthokit_widgets.components import Chart, Facts, Form, Message
from orthokit_widgets.fields import describe
from orthokit_widgets.page import Page, columns

__all__ = ["AdaptersPage"]

_EXPLANATION = """
An orthogonal adapter turns the inputs of a frozen weight, <span class="formula"><i>W</i>′ = <i>W R</i></span>, with
<span class="formula"><i>R</i> = <i>f</i>(<i>Q</i>)</span> made from a skew matrix <i>Q</i>: singular values, lengths of
rows and the angles between them stay, as far as <span class="formula"><i>R</i>ᵀ<i>R</i> = <i>I</i></span>. Here
generators are random, scaled to the angle you choose, and the weights are those of trained models. LoRA and full
fine-tuning add a random change instead, as long as the one that OFT makes with the same blocks and angle.
"""
_OWN = frozenset(name for names in OPTIONS.values() for name in names)
_HEIGHTS = {"error": 300, "picture": 300, "spectrum": 250, "angles": 250}


class AdaptersPage(Page[AdaptersState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        **settings: Settings to start from; see :class:`orthokit_widgets.adapters_state.AdaptersState`.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(self, *, links: bool = False, **settings: Any) -> None:
        state = AdaptersState(**settings)
        self.facts = Facts()
        self.reading = Message(role="note")
        self.charts = {name: Chart(plot_height=height) for name, height in _HEIGHTS.items()}
        self.own = Form(heard=self._heard, label="Settings of the adapter")
        super().__init__(state, title="Adapters", explanation=_EXPLANATION, links=links)
        self.form.fields = [field for field in describe(state) if field["name"] not in _OWN]
        self._show_own()

    def side(self) -> list[pn.viewable.Viewable]:
        """Below the settings: those of the adapter chosen."""
        return [self.own]

    def parts(self) -> list[pn.viewable.Viewable]:
        """The sentence, numbers, four charts."""
        charts = self.charts
        return [
            self.reading,
            self.facts,
            columns(charts["error"], charts["picture"]),
            columns(charts["spectrum"], charts["angles"]),
        ]

    def paint(self) -> bool:
        """Show the snapshot; there is nothing to wait for."""
        state = self.state
        found = state.snapshot()
        for name, chart in self.charts.items():
            chart.show(found["figures"].get(name), title="" if found["figures"] else "…", empty="Nothing to show.")
        self.facts.items = found["facts"]
        self.reading.text = found["reading"]
        current = found["settings"] == state.values()
        self.status.text = "Up to date." if current else "The charts show the last settings."
        idle = [name for name in state.idle if name in state.options]
        self.own.disabled = idle
        self.own.values = state.values()
        self.form.disabled = [] if state.choice.turns else ["picture"]
        return False

    def problems(self) -> list[str]:
        """Settings that do not suit the matrix."""
        return [self.state.error] if self.state.error else []

    def changed(self, name: str) -> None:
        """Another adapter has other settings."""
        if name == "adapter":
            self._show_own()

    def _show_own(self) -> None:
        """Controls of the adapter chosen, in their order."""
        fields = {field["name"]: field for field in describe(self.state)}
        self.own.fields = [fields[name] for name in self.state.options]
        self.own.values = self.state.values()
