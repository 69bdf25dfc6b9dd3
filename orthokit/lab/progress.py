"""One progress line that suits where it is read: a terminal, a notebook, a log, or a report being built."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Progress"]

_PERIOD = {"terminal": 0.2, "notebook": 0.5, "report": 0.5, "log": 10.0}


def _surroundings() -> str:
    if os.environ.get("ORTHOKIT_PROGRESS_FILE"):
        return "report"
    # Asked through sys.modules: importing IPython to find out would cost half a second in a plain script.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if sys.stderr.isatty() else "log"


def _bar(share: float, width: int = 24) -> str:
    full = int(share * width)
    return "█" * full + "·" * (width - full)


class Progress:
    """Shows steps done, pace and the last loss; use as a context manager.

    Args:
        label: What is being done.
        steps: How many steps there are, ``>= 1``.
        start: Steps already done.
        enabled: ``False`` shows nothing.

    Example:
        >>> with Progress("demo", steps=2, enabled=False) as progress:
        ...     progress.update(1, {"loss": 0.5})
    """

    def __init__(self, label: str, *, steps: int, start: int = 0, enabled: bool = True) -> None:
        self.label, self.steps, self.first = label, max(steps, 1), start
        self.where = _surroundings() if enabled else "off"
        self.started = time.perf_counter()
        self._shown = float("-inf")
        self._handle = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.where == "terminal" and self._shown > 0:
            sys.stderr.write("\n")

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show ``step`` and ``values``; cheap to call at every step, drawn only now and then."""
        if self.where == "off":
            return
        now = time.perf_counter()
        if now - self._shown < _PERIOD[self.where] and step < self.steps:
            return
        self._shown = now
        if self.where == "report":
            self._to_file(step, values)
        else:
            self._draw(self.line(step, values, now - self.started), last=step >= self.steps)

    def line(self, step: int, values: dict[str, float], elapsed: float) -> str:
        """The text of one look, for example ``train 120/400 ███····· 8.1 steps/s, 35 s left, loss 2.13``."""
        pace = (step - self.first) / elapsed if elapsed > 0 else 0.0
        left = f"{(self.steps - step) / pace:.0f} s left" if pace > 0 else "starting"
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        return f"{self.label} {step}/{self.steps} {_bar(step / self.steps)} {pace:.1f} steps/s, {left}, {shown}"

    def _to_file(self, step: int, values: dict[str, float]) -> None:
        row = {"label": self.label, "step": step, "steps": self.steps, **values}
        with Path(os.environ["ORTHOKIT_PROGRESS_FILE"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _draw(self, text: str, *, last: bool) -> None:
        if self.where == "terminal":
            sys.stderr.write(f"\r\x1b[2K{text}")
        elif self.where == "log":
            sys.stderr.write(text + "\n")
        else:
            self._in_notebook(text)
        sys.stderr.flush()

    def _in_notebook(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
