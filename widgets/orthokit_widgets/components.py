"""The parts pages are made of: small Panel components around native HTML controls, charts and text.

Native controls bring labels, keyboard and screen-reader behaviour with them, and none of the parts loads anything from
outside. Everything a user typed or a file holds is set as text, never as HTML.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import panel as pn
import param
from panel.custom import JSComponent

__all__ = ["Address", "Chart", "Download", "Facts", "Form", "Message", "Part", "RunTable", "header", "stylesheets"]

_ASSETS = Path(__file__).parent / "assets"
_PIECE = 1 << 20  # bytes of a file that are sent at once
# The style of the charts' own parts, as Panel's pane for them uses it.
_PANEL = Path(pn.__file__).parent / "dist" / "css" / "models"


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def stylesheets(*names: str) -> list[str]:
    """The page's theme and the style sheets named, for one component."""
    return [_read("theme.css"), *map(_read, names)]


class Part(JSComponent):
    """A component that hands the browser's messages to ``heard``."""

    __abstract = True

    def __init__(self, *, heard: Callable[[dict[str, Any]], None] | None = None, **params: Any) -> None:
        super().__init__(sizing_mode="stretch_width", **({"margin": 0} | params))
        self._heard = heard

    def resend(self) -> None:
        """Send everything once more: a notebook loses what was sent before the browser had drawn the part."""
        own = [name for name in type(self).__dict__ if isinstance(type(self).__dict__[name], param.Parameter)]
        self.param.trigger(*(name for name in own if not self.param[name].constant and name not in ("fields", "label")))

    def _handle_msg(self, data: dict[str, Any]) -> None:
        if self._heard is not None:
            self._heard(data)


class Form(Part):
    """Labelled controls, buttons; a change comes as ``{"set": name, "value": value}``, a press as ``{"action"}``.

    Changes are numbered by the browser. A control takes a value from here once its last change has been heard, refused
    or not: with older ones it would jump back below a hand that is still moving it.
    """

    label = param.String("Settings", doc="What the form is for, to a screen reader.")
    fields = param.List([], doc="Descriptions of the controls, as orthokit_widgets.fields.describe() makes them.")
    values = param.Dict({}, doc="Name to value shown.")
    disabled = param.List([], doc="Names that cannot be changed now.")
    settled = param.Integer(0, doc="Number of the last change that was heard and dealt with.")
    answered = param.Boolean(False, doc="Whether the browser's first message has been heard.")
    actions = param.List([], doc="Buttons: name, label, primary, disabled.")

    _esm = _read("form.js")
    _stylesheets = stylesheets("form.css")

    def _handle_msg(self, data: dict[str, Any]) -> None:
        try:
            super()._handle_msg(data)
        finally:
            if isinstance(data.get("count"), int):
                self.settled = max(self.settled, data["count"])


class Chart(Part):
    """One chart of :mod:`orthokit.figures`, its question above and its answer below; a press on a point that carries
    data comes as ``{"pick": data}`` where somebody listens.
    """

    figure = param.String("{}", doc="What :meth:`show` sends.")
    plot_height = param.Integer(280, doc="Height of the plot in CSS pixels.")

    _esm = _read("chart.js")
    _stylesheets: ClassVar = [*stylesheets("chart.css"), (_PANEL / "plotly.css").read_text(encoding="utf-8")]

    def show(self, fig: dict[str, Any] | None, *, title: str = "", empty: str = "") -> None:
        """Send a figure to the browser, if it is not the one already there.

        Args:
            fig: A figure dictionary; ``None`` shows ``title`` and the sentence ``empty`` instead.
            title: Heading in place of the figure's own title.
            empty: What to say without a figure.
        """
        if fig is None:
            self.figure = json.dumps({"heading": title, "text": "", "data": [], "layout": {}, "message": empty})
            return
        layout = dict(fig["layout"])
        question = layout.pop("title")["text"].replace("<br>", " ")
        # The heading left the plot: only the rows of the legend still need room above it.
        rows = (layout["margin"]["t"] - 28) // 22 - 1 if layout["showlegend"] else 0
        layout["margin"] = {"l": 56, "r": 14, "t": 12 + 22 * max(rows, 0), "b": 44}
        layout.pop("height", None)
        layout["font"] = {"size": 12}
        content = {"heading": title or question, "text": layout["meta"]["caption"], "data": fig["data"]}
        self.figure = json.dumps(content | {"layout": layout}, separators=(",", ":"))


class Message(Part):
    """A sentence, announced when it changes: a status politely, an alert at once, a note not at all."""

    text = param.String("", doc="What to say; nothing is shown when empty.")
    role = param.Selector(default="status", objects=["status", "alert", "note"], constant=True)

    _esm = _read("message.js")
    _stylesheets = stylesheets("message.css")


class Facts(Part):
    """A row of named numbers."""

    items = param.List([], doc="Each with name, value and unit, as text.")

    _esm = _read("facts.js")
    _stylesheets = stylesheets("facts.css")


class Download(Part):
    """A button that saves a file; a press comes as ``{"action": "export"}``, and :meth:`give` answers it.

    The file goes over the page's own channel, piece by piece as the browser asks, so that it needs no address, works in
    a notebook, and holds nobody up however large it is.
    """

    label = param.String("Save", doc="What stands on the button.")
    note = param.String("", doc="A line below it.")
    disabled = param.Boolean(False, doc="Whether there is nothing to save.")
    offer = param.Dict({}, doc="The file that can be asked for: token, name, pieces.")
    piece = param.Dict({}, doc="The piece asked for last: of (a token), index, data (base64).")

    _esm = _read("download.js")
    _stylesheets = stylesheets("download.css")

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._content, self._given = b"", 0

    def give(self, name: str, content: bytes) -> None:
        """Let the browser save a file.

        Args:
            name: Of the file.
            content: What is in it.
        """
        self._given += 1
        self._content = content
        self.offer = {"token": self._given, "name": name, "pieces": max(1, -(-len(content) // _PIECE))}

    def answer(self, message: dict[str, Any]) -> None:
        """Send the piece that the browser asks for, or forget the file when it has all of it."""
        if message.get("saved") == self._given:
            self._content = b""
        elif message.get("of") == self._given and isinstance(message.get("piece"), int) and message["piece"] >= 0:
            start = message["piece"] * _PIECE
            data = base64.b64encode(self._content[start : start + _PIECE]).decode()
            self.piece = {"of": self._given, "index": message["piece"], "data": data}


class RunTable(Part):
    """Recorded runs with a tick each; a tick arrives as ``{"draw": name, "on": bool}``."""

    rows = param.List([], doc="Each with name, status, what, steps, loss, created, error (text), chosen, drawable.")
    folder = param.String("", doc="Where the runs lie.")

    _esm = _read("runs.js")
    _stylesheets = stylesheets("runs.css")


class Address(Part):
    """Writes the settings into the address of a served page; does nothing elsewhere."""

    query = param.String("", doc="The query, without its question mark.")
    active = param.Boolean(False, doc="Whether this page owns its address.")

    _esm = _read("address.js")


def header(title: str, explanation: str, *, links: dict[str, str] | None = None) -> pn.pane.HTML:
    """The head of a page: title, links between pages, one paragraph of explanation.

    Args:
        title: Name of this page.
        explanation: HTML (with MathML), written by us.
        links: Names of the pages to their addresses; the one called ``title`` is marked as this one.

    Returns:
        The pane.
    """
    marks = {name: ' aria-current="page"' if name == title else "" for name in links or {}}
    items = "".join(f'<a href="{url}"{marks[name]}>{name}</a>' for name, url in (links or {}).items())
    nav = f'<nav aria-label="Pages">{items}</nav>' if items else ""
    html = f'<header><h1>{title}</h1>{nav}</header><p class="say">{explanation}</p>'
    return pn.pane.HTML(html, sizing_mode="stretch_width", margin=0, stylesheets=stylesheets("header.css"))
