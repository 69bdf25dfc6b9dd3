"""The page "Inspect": the geometry of every matrix of a model, alone, against its base, or beside others."""

from __future__ import annotations

from typing import Any

import panel as pn

from orthokit.diagnostics import COLUMNS, Inspection
from orthokit_widgets.components import Chart, Download, Facts, Form, Message, stylesheets
from orthokit_widgets.fields import describe
from orthokit_widgets.inspect_data import STORE
from orthokit_widgets.inspect_files import MOST_BYTES, megabytes
from orthokit_widgets.inspect_options import BESIDE, LOOKED
from orthokit_widgets.inspect_parts import Files, MatrixTable
from orthokit_widgets.inspect_state import InspectState
from orthokit_widgets.inspect_words import EXPLAINED
from orthokit_widgets.merge_data import Shelf
from orthokit_widgets.page import Page, in_turn

__all__ = ["InspectPage"]

_EXPLANATION = """
What is inside a model, and what did fine-tuning do to it? Every weight matrix is measured: all its singular values
<span class="formula"><i>σ</i>₁ ≥ <i>σ</i>₂ ≥ …</span>, norms and ranks, how far it is from random entries and from an
orthogonal matrix, its rows and columns, and how exactly it is stored. With the <b>base</b> it was trained from, the
change is taken apart: is it a rotation, <span class="formula"><i>W</i> ≈ <i>W</i>₀<i>R</i></span>, is it of low rank,
or neither? Norms come first, then exact values, matrix by matrix. Press the head of a column to sort; tick a matrix, or
press its cell in the map, to draw its spectrum.
"""
_HEIGHTS = {"map": 240, "depth": 300, "spectra": 360, "density": 300, "profiles": 300, "compare": 340}
_TITLES = {
    "map": "Which layers and roles stand out?",
    "depth": "How does it change with the depth?",
    "spectra": "How do the singular values fall off?",
    "density": "Is the spectrum more than noise?",
    "profiles": "Which singular directions changed?",
    "compare": "Where do the models differ?",
}
_EMPTY = 80  # height of a chart without a figure
# Height of the map: of its frame, and of a row; up to a bound beyond which it is scrolled less than read.
_FRAME, _ROW, _HIGHEST = 110, 21, 1100
_FORMS = {
    "measure": ("What is measured", ("detail", "sample")),
    "columns": ("Columns of the table", ("groups",)),
    "column": ("Charts", ("column",)),
    "spectra": ("Spectra", ("of", "across", "height", "unit")),
    "beside": ("Comparison", BESIDE),
    "save": ("File", ("file",)),
}
_FIRST = ("model", "base")
_CARD = ":host { background: #fff; border: 1px solid #d8dee4; border-radius: 10px; padding: 12px 16px; }"
_ROWS = "form {{ display: grid; grid-template-columns: repeat(auto-fit, minmax({least}px, 1fr)); gap: 10px 18px; }}"
_SEVERAL = ".several { grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); }"
_SAVED = {"html": "one page with everything, offline", "json": "all singular values", "csv": "the table, every column"}


class InspectPage(Page[InspectState]):
    """The page as a Panel object: serve it, or show it in a notebook cell.

    Args:
        links: Show links to the other pages.
        local: Whether the visitor sits at this machine, and may name files on it by their path.
        store: Where measurements are kept that every visitor may see.
        **settings: Settings to start from; see :class:`orthokit_widgets.inspect_state.InspectState`.

    Raises:
        OptionError: A setting out of range; the message names the range.
    """

    def __init__(
        self, *, links: bool = False, local: bool = False, store: Shelf[Inspection] = STORE, **settings: Any
    ) -> None:
        state = InspectState(local=local, store=store, **settings)
        self.facts = Facts()
        self.reading, self.about = Message(role="note"), Message(role="note")
        self.table = MatrixTable(heard=self._heard)
        limit = f"One file of up to {megabytes(MOST_BYTES)}: safetensors, GGUF, or torch.save (weights only)."
        self.files = Files(heard=self._heard, paths=local, help=f"{limit} It is deleted when you leave.")
        self.charts = {name: Chart(plot_height=height, heard=self._heard) for name, height in _HEIGHTS.items()}
        self.download = Download(heard=self._fetched, label="Save what was measured")
        styles = {"columns": [_SEVERAL], "spectra": [_ROWS.format(least=170)], "beside": [_ROWS.format(least=190)]}
        # One form asks the server to send everything again, which is enough.
        self.forms = {
            name: Form(heard=self._heard, label=label, answered=True, stylesheets=styles.get(name, []))
            for name, (label, _) in _FORMS.items()
        }
        self._told: list[str] = []
        self._sent: dict[str, tuple[Any, str]] = {}
        self._begun = False
        super().__init__(state, title="Inspect", explanation=_EXPLANATION, links=links)
        if self._served():
            pn.state.on_session_destroyed(lambda context: state.end())

    def side(self) -> list[pn.viewable.Viewable]:
        """Below the models: what the model is, files of one's own, what is measured, the way to take it along."""
        title = pn.pane.HTML("<h2>Take it along</h2>", margin=0, stylesheets=stylesheets())
        return [self.about, self.files, self.forms["measure"], title, self.forms["save"], self.download]

    def parts(self) -> list[pn.viewable.Viewable]:
        """Numbers, sentences, the table, six charts."""
        charts, forms = self.charts, self.forms
        return [
            self.facts,
            self.reading,
            _card(forms["columns"]),
            self.table,
            _card(forms["column"]),
            charts["map"],
            charts["depth"],
            _card(forms["spectra"]),
            charts["spectra"],
            charts["density"],
            charts["profiles"],
            _card(forms["beside"]),
            charts["compare"],
        ]

    def paint(self) -> bool:
        """Show the snapshot; more to come while something is measured, on its way, or made."""
        state = self.state
        # Asked before the snapshot too: what ends while it is taken is not in it, so another look is due.
        going = state.active
        found = state.snapshot()
        self.status.text = found["sentence"]
        self._told = found["problems"]
        self.facts.items = found["facts"]
        self.reading.text = found["reading"] or "Nothing is measured yet."
        own = self.state.models[self.state.model].own
        self.about.text = "A file of your own." if own else EXPLAINED[self.state.model]
        self._show_table(found)
        for name in self.charts:
            self._show(name, found["figures"][name])
        self._show_fields(found["status"])
        self._show_files()
        self.hurry = found["status"] in ("waiting", "opening", "stopping", "reading", "receiving")
        return going or state.active

    def problems(self) -> list[str]:
        """What cannot be read or compared."""
        return self._told

    def query(self) -> str:
        """The settings without the visitor's own files."""
        return self.state.query(self.state.own.models)

    def changed(self, name: str) -> None:
        """A model or a base that somebody chose brings what goes with it, and is measured."""
        if name in LOOKED:
            self.state.suggest(name)

    def acted(self, message: dict[str, Any]) -> None:
        """A button, the table, a cell of the map, or a file."""
        state = self.state
        pick, presses = message.get("pick"), {"start": state.start, "stop": state.stop}
        if isinstance(pick, list) and len(pick) == 1 and isinstance(pick[0], int):
            state.tick(pick[0], pick[0] not in state.drawn)
        elif isinstance(message.get("tick"), int):
            state.tick(message["tick"], bool(message.get("on")))
        elif "sort" in message:
            state.order_by(str(message["sort"]))
        elif "open" in message:
            state.open_path(str(message["open"]), str(message.get("use")))
        elif "upload" in message and isinstance(message.get("size"), int):
            state.upload(str(message["upload"])[:200], message["size"], str(message.get("use")))
        elif "piece" in message:
            state.take(message.get("of"), message.get("start"), str(message["piece"]))
        elif "unreadable" in message:
            state.unreadable(message["unreadable"])
        elif message.get("action") in presses:
            presses[message["action"]]()

    def close(self) -> None:
        """A closed page measures no further."""
        super().close()
        self.state.close()

    def _resend(self) -> None:
        super()._resend()
        # Not before: a page that no browser has drawn yet counts as closed after a second, and a closed one stops.
        if not self._begun:
            self._begun = True
            self.state.start()

    # --- painting

    def _show_table(self, found: dict[str, Any]) -> None:
        table = found["table"]
        if self._sent.get("table", (None, ""))[0] is not table:
            self._sent["table"] = (table, "")
            self.table.show(table)
        self.table.sort = {"name": self.state.sort, "falling": self.state.falling == "yes"}
        self.table.ticked, self.table.tickable = found["ticked"], found["tickable"]
        self.table.empty = self._why("table")

    def _show(self, name: str, figure: dict[str, Any] | None) -> None:
        """A chart, sent if it or the sentence in its place is another than before."""
        chart, why = self.charts[name], "" if figure else self._why(name)
        before = self._sent.get(name)
        if before is not None and before[0] is figure and before[1] == why:
            return
        self._sent[name] = (figure, why)
        height = _HEIGHTS[name] if figure else _EMPTY
        if name == "map" and figure:
            height = min(_FRAME + _ROW * len(figure["data"][0]["y"]), _HIGHEST)
        chart.plot_height = height
        chart.visible = figure is not None or name != "profiles"
        chart.show(figure, title="" if figure else _TITLES[name], empty=why)

    def _why(self, part: str) -> str:
        """What stands in the place of something empty."""
        state = self.state
        look = state.look
        if part == "compare" and len(state.wanted) < 2:
            return "Choose another model to compare with."
        if look is not None and look.error:
            return "Nothing could be measured."
        if look is None or not look.over:
            return "Shown as soon as it is measured." if state.active else "Press Inspect."
        if part in ("spectra", "density") and state.detail == "norms":
            return "Only norms are measured: choose all singular values."
        if part == "depth":
            return f"No matrix of a numbered layer has a value of “{COLUMNS[str(state.column)].label}”."
        return "Nothing to show."

    def _show_fields(self, status: str) -> None:
        """Controls with what can be chosen now."""
        fields = {field["name"]: field for field in describe(self.state)}
        values = self.state.values()
        for form, names in [(self.forms[name], names) for name, (_, names) in _FORMS.items()] + [(self.form, _FIRST)]:
            wanted = [fields[name] for name in names]
            if form.fields != wanted:
                form.fields = wanted
            form.values = {name: values[name] for name in names}
        self.forms["spectra"].disabled = [] if self.state.compared else ["of"]
        busy = status in ("waiting", "opening", "first look", "measuring", "stopping", "receiving")
        actions = [
            {"name": "start", "label": "Inspect", "primary": not busy, "disabled": busy},
            {"name": "stop", "label": "Stop", "primary": False, "disabled": not busy or status == "stopping"},
        ]
        if self.form.actions != actions:
            self.form.actions = actions

    def _show_files(self) -> None:
        state = self.state
        incoming = state.incoming
        self.files.wanted = {} if incoming is None else incoming.wanted
        making, file = state.exporter.job is not None, state.ready
        self.download.disabled = making or not state.can_export
        self.download.note = "Making the file." if making else _SAVED[str(state.file)]
        state.ready = None
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


def _card(form: Form) -> pn.Column:
    return pn.Column(form, sizing_mode="stretch_width", margin=0, stylesheets=[_CARD])
