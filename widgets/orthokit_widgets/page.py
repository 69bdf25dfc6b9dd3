"""What all pages share: the frame, the address, the alert, and repainting while a thread is at work."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import panel as pn
from panel.viewable import Viewer

from orthokit.errors import OrthokitError
from orthokit_widgets.components import Address, Form, Message, Part, header
from orthokit_widgets.fields import Settings, describe, read, read_query, write_query

State = TypeVar("State", bound=Settings)
Method = TypeVar("Method", bound=Callable[..., None])

__all__ = ["PAGES", "Page", "columns", "in_turn", "stack"]

#: Titles of the pages to their addresses.
PAGES = {
    **{"Momentum gap": "momentum", "Live training": "training", "Optimizer race": "race"},
    **{"Adapters": "adapters", "Forgetting": "forgetting", "Merge": "merge", "Inspect": "inspect"},
}
_PERIOD, _SOON = 200, 50  # ms between two looks at what a thread has done; when an answer is awaited
_PATIENCE = 15  # looks without a browser until the page counts as closed; a reload or a hiccup takes fewer

# Panel's column ends with a button that is never shown here and yet takes a row of the grid.
_BARE = ".scroll-button { display: none !important; } "
_STACK = _BARE + ":host { gap: 12px; }"
_GROUND = _STACK + ":host { background: #f4f6f8; padding: 14px 18px 20px; box-sizing: border-box; }"
_SIDE = f"""{_BARE}
:host {{ background: #fff; border: 1px solid #d8dee4; border-radius: 10px; padding: 14px 16px; gap: 14px;
  box-sizing: border-box; align-self: start !important; }}
"""
_GRID = _STACK + ":host { display: grid !important; } :host > * { width: auto !important; min-width: 0; }"
_BODY = """
:host { grid-template-columns: minmax(240px, 290px) minmax(0, 1fr); }
@media (max-width: 860px) { :host { grid-template-columns: minmax(0, 1fr); } }
"""


def columns(*parts: pn.viewable.Viewable, least: int = 400) -> pn.Column:
    """Parts of equal width side by side; under each other where ``least`` pixels each do not fit."""
    fit = f":host {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, {least}px), 1fr)); }}"
    return pn.Column(*parts, sizing_mode="stretch_width", margin=0, stylesheets=[_GRID, fit])


def stack(*parts: pn.viewable.Viewable) -> pn.Column:
    """Parts under each other."""
    return pn.Column(*parts, sizing_mode="stretch_width", margin=0, stylesheets=[_STACK])


def in_turn(method: Method) -> Method:
    """A method of a page that runs one at a time: a server hears messages, and looks at threads, in several threads."""

    @functools.wraps(method)
    def alone(page: Page[Any], *args: Any) -> None:
        with page.turn:
            method(page, *args)

    return cast("Method", alone)


class Page(Viewer, Generic[State]):
    """A page around a state: settings on the left, charts on the right, one alert above, one status beside.

    Args:
        state: The settings and what is computed from them.
        title: Name of the page.
        explanation: HTML for the head.
        links: Show links between the pages; a server that serves them side by side wants it.
    """

    def __init__(self, state: State, *, title: str, explanation: str, links: bool = False) -> None:
        super().__init__()
        self.turn = threading.RLock()
        self.state = state
        self.alert = Message(role="alert")
        self.status = Message(role="status")
        self.form = Form(heard=self._heard, label="Settings", fields=describe(state), values=state.values())
        self.address = Address(active=self._served())
        self._problems: list[str] = []
        self._callback: Any = None
        self._context: Any = None
        self._lonely = 0
        #: Look more often: somebody waits for an answer.
        self.hurry = False
        self._read_address()
        wide: dict[str, Any] = {"sizing_mode": "stretch_width", "margin": 0}
        side = pn.Column(self.status, self.form, *self.side(), stylesheets=[_SIDE], **wide)
        main = stack(*self.parts())
        body = pn.Column(side, main, stylesheets=[_GRID, _BODY], **wide)
        head = header(title, explanation, links=PAGES if links else None)
        self._layout = pn.Column(head, self.alert, body, self.address, stylesheets=[_GROUND], **wide)
        self.repaint()

    # --- what a page fills in

    def side(self) -> list[pn.viewable.Viewable]:
        """What stands below the settings."""
        return []

    def parts(self) -> list[pn.viewable.Viewable]:
        """The charts, from top to bottom."""
        return []

    def paint(self) -> bool:
        """Show the state's snapshot; whether something is still going on that needs another look."""
        return False

    def changed(self, name: str) -> None:
        """A setting has a new value; the page is repainted after this."""

    def acted(self, message: dict[str, Any]) -> None:
        """A button was pressed or a run ticked."""

    def problems(self) -> list[str]:
        """What to say in the alert besides bad values."""
        return []

    def query(self) -> str:
        """The settings as the query of the address."""
        return write_query(self.state)

    # --- what pages share

    def __panel__(self) -> pn.viewable.Viewable:
        return self._layout

    def panel(self) -> pn.viewable.Viewable:
        """The page as a Panel object."""
        return self._layout

    @in_turn
    def repaint(self) -> None:
        """Show what is known now, and keep looking while a thread is at work."""
        # In a notebook nothing would be sent at the end of the hold.
        with pn.io.hold() if self._context is not None else contextlib.nullcontext():
            more = self.paint()
            self.alert.text = "\n".join([*self._problems, *self.problems()])
            self.address.query = self.query()
        if self._callback is not None:
            self._callback.period = _SOON if self.hurry else _PERIOD
        # In a notebook, what is sent before the browser has drawn the page is lost and can put the channel out of step.
        drawn = self._context is not None or self.form.answered
        if more and drawn and self._callback is None:
            with contextlib.suppress(RuntimeError):  # outside of a server and a notebook nothing can call back
                self._callback = pn.state.add_periodic_callback(self._tick, period=_PERIOD, start=True)
        elif not more and self._callback is not None:
            self._callback.stop()
            self._callback = None

    def close(self) -> None:
        """Stop looking; the page was closed."""
        if self._callback is not None:
            self._callback.stop()
            self._callback = None

    def _tick(self) -> None:
        # The context knows its session only after the page was made.
        session = getattr(self._context, "session", None)
        seen = session is None or session.connection_count > 0
        self._lonely = 0 if seen else self._lonely + 1
        if self._lonely > _PATIENCE:
            self.close()
        elif self.turn.acquire(blocking=False):  # or an answer is on its way, which repaints as well
            try:
                self.repaint()
            finally:
                self.turn.release()

    @staticmethod
    def _served() -> bool:
        """Whether the page has an address of its own: in a server's session, not in a notebook."""
        return getattr(pn.state.curdoc, "session_context", None) is not None

    def _read_address(self) -> None:
        if not self._served():
            return
        if pn.state.location is not None:
            self._problems = read_query(self.state, pn.state.location.search or "")
        self.form.values = self.state.values()
        self._context = getattr(pn.state.curdoc, "session_context", None)
        pn.state.on_session_destroyed(lambda context: self.close())

    @in_turn
    def _heard(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._resend()
        elif "set" in message:
            self._set(str(message["set"]), message.get("value"))
        else:
            self.acted(message)
        self.repaint()

    def _set(self, name: str, text: Any) -> None:
        try:
            value = read(self.state, name, text)
        except OrthokitError as error:
            self._problems = [f"{error} It stays at {getattr(self.state, name, '')}."]
            return
        self._problems = []
        setattr(self.state, name, value)
        self.changed(name)
        self.form.values = self.state.values()

    def _resend(self) -> None:
        """The browser has just drawn the page: what was sent before may be lost."""
        self.form.answered = True
        for part in self._layout.select(Part):
            if isinstance(part, Part):
                part.resend()
