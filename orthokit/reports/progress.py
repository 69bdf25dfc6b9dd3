"""What a running report says: one line per notebook, and the training step each has reached."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["Console", "last_step"]

PLAIN_SECONDS = 5.0


def last_step(path: Path, *, tail: int = 4096) -> str:
    """The newest training step a notebook reported, in words; empty when there is none.

    ``fit`` appends JSON lines ``{"label", "step", "steps", "loss"}`` to the file named by ``$ORTHOKIT_PROGRESS_FILE``.
    The last line may be half written while it is read: the one before it counts then.

    Args:
        path: The file; need not exist.
        tail: Bytes to read from its end.

    Returns:
        Such as ``"Muon, step 120 of 300, loss 2.31"``.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - tail))
            lines = stream.read().splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
            text = f"{record.get('label') or 'training'}, step {int(record['step'])} of {int(record['steps'])}"
            loss = record.get("loss")
            return text if loss is None else f"{text}, loss {float(loss):.4g}"
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return ""


class Console:
    """Writes progress to a terminal as one line that changes, elsewhere as plain lines now and then."""

    def __init__(self, stream: Any, *, every: float | int | None = None) -> None:
        """``every``: seconds between progress lines when the stream is no terminal; default five."""
        self.stream = stream
        self.every = PLAIN_SECONDS if every is None else every
        self.live = stream.isatty()
        self._guard = threading.Lock()
        self._shown = ""
        self._last = ("", 0.0)

    def line(self, text: str) -> None:
        """A line that stays."""
        with self._guard:
            self._erase()
            self.stream.write(f"{text}\n")
            self.stream.flush()

    def status(self, text: str) -> None:
        """What is going on now; the next call replaces it."""
        with self._guard:
            if self.live:
                if text != self._shown:
                    self._erase()
                    self._shown = text[:150]
                    self.stream.write(self._shown)
                    self.stream.flush()
            elif text and text != self._last[0] and time.monotonic() - self._last[1] >= self.every:
                self._last = (text, time.monotonic())
                self.stream.write(f"  {text}\n")
                self.stream.flush()

    def _erase(self) -> None:
        """Takes the changing line away."""
        if self.live and self._shown:
            self.stream.write("\r" + " " * len(self._shown) + "\r")
            self._shown = ""
