"""What the pages around a training run share: start, pause and stop, and settings of the charts beside their own."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, cast

from orthokit_widgets.components import Form
from orthokit_widgets.fields import Settings, describe, read
from orthokit_widgets.page import Page, in_turn

__all__ = ["RunPage"]

State = TypeVar("State", bound=Settings)


class _Run(Protocol):
    """What the state of such a page has besides settings."""

    view: Settings

    @property
    def active(self) -> bool: ...
    @property
    def status(self) -> str: ...
    def start(self) -> None: ...
    def pause(self, on: bool = True) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


class RunPage(Page[State]):
    """A page whose state starts, pauses and stops a run, and has the settings of the charts in ``state.view``.

    Args:
        state: The settings and the run.
        **head: Title, explanation and links; see :class:`orthokit_widgets.page.Page`.
    """

    def __init__(self, state: State, **head: Any) -> None:
        self._run = cast("_Run", state)
        label = "What the charts show"
        self.view = Form(heard=self._viewed, label=label, fields=describe(self._run.view))
        super().__init__(state, **head)

    def show_view(self) -> None:
        """Bring the settings of the charts up to date; what can be chosen may have changed."""
        fields = describe(self._run.view)
        if fields != self.view.fields:
            self.view.fields = fields
        self.view.values = self._run.view.values()

    def actions(self) -> list[dict[str, Any]]:
        """The buttons as the run's status wants them."""
        run = self._run
        again = "Resume" if run.status == "paused" else "Pause"
        ending = run.status == "stopping"
        return [
            {"name": "start", "label": "Start", "primary": not run.active, "disabled": run.active},
            {"name": "pause", "label": again, "primary": again == "Resume", "disabled": not run.active or ending},
            {"name": "stop", "label": "Stop", "primary": False, "disabled": not run.active or ending},
        ]

    def acted(self, message: dict[str, Any]) -> None:
        """Start, pause, go on, stop."""
        run = self._run
        presses = {"start": run.start, "pause": lambda: run.pause(run.status != "paused"), "stop": run.stop}
        press = presses.get(str(message.get("action")))
        if press is not None:
            press()

    def close(self) -> None:
        """A closed page trains no further."""
        super().close()
        self._run.close()

    @in_turn
    def _viewed(self, message: dict[str, Any]) -> None:
        if "set" in message:
            name = str(message["set"])
            setattr(self._run.view, name, read(self._run.view, name, message.get("value")))
        self.repaint()
