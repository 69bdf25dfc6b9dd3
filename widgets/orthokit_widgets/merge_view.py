"""The page "Merge": experts of one pretrained model, merged by any method, and what that keeps of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import panel as pn

from orthokit_widgets.components import Chart, Download, Facts, Form, Message, stylesheets
from orthokit_widgets.fields import describe
from orthokit_widgets.merge_data import STORE, Store
from orthokit_widgets.merge_options import OPTIONS, idle_options
from orthokit_widgets.merge_run import file_name
from orthokit_widgets.merge_state import MergeState
from orthokit_widgets.page import Page, columns, in_turn, stack

__all__ = ["MergePage"]

_EXPLANATION = """
One pretrained model was fine-tuned to several tasks. A merge makes one model of these experts without training:
from their changes <span class="formula">Δ<i>ᵢ</i> = <i>Wᵢ</i> − <i>W</i>₀</span> it makes one change that serves all
tasks, and adds it at a <b>scale</b>, <span class="formula"><i>W</i>(<i>s</i>) = <i>W</i>(0) +
<i>s</i> (<i>W</i>(1) − <i>W</i>(0))</span>. Choose experts, method and weights, press the button, then pull the scale:
how well is each task done, and what is left of what the model could before? OrthoMerge takes the part of each change
that is a rotation, <span class="formula"><i>Wᵢ</i> ≈ <i>W</i>₀ <i>Rᵢ</i></span>, apart from the rest.
"""
_HEIGHTS = {"tasks": 190, "retained": 180, "recorded": 430, "scales": 290, "rotations": 190, "conflicts": 190}
_EMPTY, _BESIDE = 80, ("tasks", "retained")  # height of a chart without a figure; those that keep theirs
_TITLES = {
    "tasks": "How well does the merged model do each task?",
    "retained": "What is left of what the model could before?",
    "recorded": "What did each method reach in the recorded study?",
    "scales": "Which scale of the change is best?",
    "rotations": "In which layers is the change a rotation?",
    "conflicts": "In which layers do rows oppose the mean change?",
}
_FORMS = {
    "who": ("What is merged", ("experts", "seed", "method")),
    "how": ("Options of the method", ()),
    "scale": ("Scale", ("scale",)),
    "part": ("Judged on", ("part",)),
    "value": ("Map of the changes", ("value",)),
    "below": ("Map of conflicts", ("below",)),
}
_MODEL = ("family",)
_CARD = ":host { background: #fff; border: 1px solid #d8dee4; border-radius: 10px; padding: 12px 16px; }"


class MergePage(Page[MergeState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        evidence: Folder of recorded evidence; default the checkout's.
        small: Models and data of the size for tests.
        steps: Of an expert's training; default each family's.
        store: Where experts and merges are kept; default those of the process, which all visitors share.
        **settings: Settings to start from; see :class:`orthokit_widgets.merge_state.MergeState`.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(
        self,
        *,
        links: bool = False,
        evidence: str | Path | None = None,
        small: bool = False,
        steps: int | None = None,
        store: Store = STORE,
        **settings: Any,
    ) -> None:
        state = MergeState(evidence=evidence, small=small, steps=steps, store=store, **settings)
        self.facts = Facts()
        self.reading, self.about = Message(role="note"), Message(role="note")
        self.charts = {name: Chart(plot_height=height, heard=self._heard) for name, height in _HEIGHTS.items()}
        self.download = Download(heard=self._fetched, label="Save the merged model")
        # One form asks the server to send everything again, which is enough.
        self.forms = {name: Form(heard=self._heard, label=label, answered=True) for name, (label, _) in _FORMS.items()}
        self._told: list[str] = []
        self._sent: dict[str, tuple[dict[str, Any] | None, str]] = {}
        super().__init__(state, title="Merge", explanation=_EXPLANATION, links=links)

    def side(self) -> list[pn.viewable.Viewable]:
        """Below the model: its experts, the method with its options, the file."""
        title = pn.pane.HTML("<h2>The merged model</h2>", margin=0, stylesheets=stylesheets())
        return [self.forms["who"], self.about, self.forms["how"], title, self.download]

    def parts(self) -> list[pn.viewable.Viewable]:
        """The slider, numbers, sentences, six charts."""
        charts, forms = self.charts, self.forms
        card: dict[str, Any] = {"sizing_mode": "stretch_width", "margin": 0, "stylesheets": [_CARD]}
        slider = pn.Column(columns(forms["scale"], forms["part"], least=240), **card)
        maps = pn.Column(columns(forms["value"], forms["below"], least=240), **card)
        return [
            slider,
            self.facts,
            columns(stack(charts["tasks"], charts["retained"]), charts["recorded"]),
            self.reading,
            charts["scales"],
            maps,
            charts["rotations"],
            charts["conflicts"],
        ]

    def paint(self) -> bool:
        """Show the snapshot; more to come while something is merged or a file is made."""
        state = self.state
        # Asked before the snapshot too: what ends while it is taken is not in it, so another look is due.
        going = state.active or state.exporter.job is not None
        found = state.snapshot()
        for name in self.charts:
            self._show(name, found["figures"][name])
        self.facts.items = found["facts"]
        self.reading.text = found["reading"] or "Nothing is merged yet."
        self.about.text = found["about"]
        self.status.text = found["sentence"]
        self._told = found["problems"]
        self._show_fields(found["status"])
        self._show_file()
        self.hurry = found["status"] in ("waiting", "merging", "stopping") or state.exporter.job is not None
        return going or state.active or state.exporter.job is not None

    def problems(self) -> list[str]:
        """What does not go together, or failed."""
        return self._told

    def acted(self, message: dict[str, Any]) -> None:
        """A button, or a point of the recorded study."""
        presses = {"start": self.state.start, "stop": self.state.stop}
        pick, press = message.get("pick"), presses.get(str(message.get("action")))
        if isinstance(pick, list) and len(pick) == 1:
            self.state.pick(str(pick[0]))
        elif press is not None:
            press()

    def close(self) -> None:
        """A closed page merges no further."""
        super().close()
        self.state.close()

    # --- painting

    def _show(self, name: str, figure: dict[str, Any] | None) -> None:
        """A chart, sent if it or the sentence in its place is another than before."""
        why = "" if figure else self._why(name)
        if name not in _BESIDE:
            self.charts[name].plot_height = _HEIGHTS[name] if figure else _EMPTY
        before = self._sent.get(name)
        if before is None or before[0] is not figure or before[1] != why:
            self._sent[name] = (figure, why)
            self.charts[name].show(figure, title="" if figure else _TITLES[name], empty=why)

    def _why(self, chart: str) -> str:
        """What an empty chart says."""
        state = self.state
        if chart == "recorded":
            return state.unrecorded
        if state.active:
            return "Shown as soon as it is measured."
        return "Press the button to merge." if not state.refusal() else "Nothing is merged with these settings."

    def _show_fields(self, status: str) -> None:
        """Controls with what can be chosen now."""
        state, weights = self.state, self.state.weights
        fields = {field["name"]: field for field in describe(state)}
        for name, task in weights.items():
            fields[name]["label"] = f"Weight of {task}"
        own = (*OPTIONS[state.method].values(), *weights)
        values = state.values()
        shown = {place: names for place, (_, names) in _FORMS.items()} | {"how": own, "model": _MODEL}
        for place, form in {**self.forms, "model": self.form}.items():
            wanted = [fields[name] for name in shown[place]]
            if form.fields != wanted:
                form.fields = wanted
            form.values = values
        self.forms["how"].disabled = idle_options(state, state.method)
        trained = not state.store.lacking(state.asked)
        going = state.active and status != "stopping"
        start = {"name": "start", "label": "Merge" if trained else "Train and merge", "primary": not state.active}
        stop = {"name": "stop", "label": "Stop", "primary": False, "disabled": not going}
        actions = [start | {"disabled": state.active or status == "refused"}, stop]
        if self.forms["who"].actions != actions:
            self.forms["who"].actions = actions

    # --- the file

    def _show_file(self) -> None:
        state, ready = self.state, self.state.can_export
        making = state.exporter.job is not None
        self.download.disabled = making or not ready
        self.download.note = "Making the file." if making else file_name(state.asked, state.scale) if ready else ""
        file, state.file = state.file, None
        if file is not None:
            self.download.give(file.name, file.content)

    @in_turn
    def _fetched(self, message: dict[str, Any]) -> None:
        """The button was pressed, or a piece of the file is asked for."""
        if message.get("action") == "export":
            self.state.export()
            self.repaint()
        else:
            self.download.answer(message)
