"""The front page of a report: what ran, what it looks like, and what held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthokit.reports.claims import measured, said
from orthokit.reports.ledger import Entry, counts, error_bar
from orthokit.reports.notebook import version
from orthokit.reports.page import environment, first_picture, write_text
from orthokit.reports.status import Folder, Status

__all__ = ["write_index"]

_WORDS = {
    "queued": "waiting",
    "running": "running",
    "ok": "finished",
    "failed": "failed",
    "timeout": "timed out",
    "interrupted": "interrupted",
}


def write_index(folder: Folder, statuses: Sequence[Status], found: Sequence[Entry], *, running: bool) -> None:
    """Writes ``index.html``: pictures, times, states and the ledger, in one file without references.

    Args:
        folder: The report.
        statuses: Its notebooks, in order.
        found: The claims of those that finished.
        running: The page reloads itself until the report is complete.
    """
    devices = sorted({status.device for status in statuses if status.device})
    total = sum(status.seconds or 0.0 for status in statuses)
    done = sum(status.state == "ok" for status in statuses)
    text = (
        environment()
        .get_template("index.html.j2")
        .render(
            cards=[_card(folder, status) for status in statuses],
            claims=[_row(entry) for entry in found],
            counts=counts(found),
            devices=devices,
            done=done,
            number=len(statuses),
            total=total,
            running=running,
            name=folder.path.name,
            version=version(),
        )
    )
    write_text(folder.index, text)


def _card(folder: Folder, status: Status) -> dict[str, Any]:
    """One notebook on the front page."""
    return {
        "status": status,
        "word": _WORDS[status.state],
        "picture": first_picture(folder.notebook(status.name)),
        "page": f"{status.name}.html" if folder.page(status.name).is_file() else "",
        "parameters": ", ".join(f"{name} = {value}" for name, value in status.parameters.items()),
    }


def _row(entry: Entry) -> dict[str, Any]:
    """One claim on the front page."""
    claim = entry.claim
    return {
        "origin": entry.origin,
        "claim": claim,
        "measured": measured(claim),
        "predicted": said(claim.predicted),
        "bar": error_bar(claim),
    }
