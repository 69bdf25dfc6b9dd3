"""The ledger: every claim of a report with its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orthokit.reports.claims import Claim, measured, read_metrics, said
from orthokit.reports.notebook import version
from orthokit.reports.status import Folder, Status, latest

__all__ = ["Entry", "as_json", "as_text", "counts", "entries", "error_bar", "load"]


@dataclass(frozen=True)
class Entry:
    """A claim and the notebook it comes from."""

    origin: str
    claim: Claim


def entries(folder: Folder, statuses: Sequence[Status]) -> list[Entry]:
    """The claims of a report's finished notebooks; what did not finish has no say.

    Args:
        folder: The report.
        statuses: Its notebooks.

    Returns:
        In the order of the notebooks.
    """
    found = []
    for status in statuses:
        if status.state == "ok":
            claims, _ = read_metrics(folder.metrics(status.name))
            found += [Entry(status.name, claim) for claim in claims]
    return found


def counts(found: Sequence[Entry]) -> str:
    """``7 claims: 5 hold, 1 fails, 1 undecided``."""
    if not found:
        return "no claims"
    number = {verdict: sum(e.claim.verdict == verdict for e in found) for verdict in ("holds", "fails", "undecided")}
    words = {
        "holds": "holds" if number["holds"] == 1 else "hold",
        "fails": "fails" if number["fails"] == 1 else "fail",
        "undecided": "undecided",
    }
    parts = [f"{n} {words[verdict]}" for verdict, n in number.items() if n]
    return f"{len(found)} claim{'s' if len(found) > 1 else ''}: {', '.join(parts)}"


def as_json(found: Sequence[Entry]) -> dict[str, Any]:
    """The ledger as JSON holds it."""
    return {"orthokit": version(), "claims": [{"origin": e.origin, **asdict(e.claim)} for e in found]}


def as_text(found: Sequence[Entry]) -> str:
    """The ledger for a terminal: one block per claim."""
    if not found:
        return "no claims recorded"
    lines = []
    for entry in found:
        c = entry.claim
        seeds = f", {c.seeds} seeds" if c.seeds else ""
        lines.append(f"{c.verdict.upper():<10} {c.text}")
        predicted = "" if c.predicted is None else f"; predicted {said(c.predicted)}"
        lines.append(f"{'':<10} measured {measured(c)}{predicted}{seeds}; {c.source}")
        lines.append(f"{'':<10} {entry.origin} / {c.id}" + (f" · {c.paper}" if c.paper else ""))
    return "\n".join([*lines, "", counts(found)])


def error_bar(claim: Claim, *, width: int = 150, height: int = 26) -> str:
    """The interval as a small drawing: a bar with its middle, and a tick where the claim's border lies."""
    values = [v for v in (claim.measured, claim.reference) if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if claim.interval is None or not values:
        return ""
    low, high = claim.interval
    least, most = min(low, *values), max(high, *values)
    span = (most - least) or max(abs(most), 1.0) * 0.1

    def place(value: float | int) -> float:
        return round(10 + (value - least) / span * (width - 20), 1)

    middle = height / 2
    drawn = [f'<line class="bar" x1="{place(low)}" x2="{place(high)}" y1="{middle}" y2="{middle}"/>']
    drawn += [
        f'<line class="bar" x1="{place(e)}" x2="{place(e)}" y1="{middle - 4}" y2="{middle + 4}"/>' for e in (low, high)
    ]
    if isinstance(claim.measured, (int, float)):
        drawn.append(f'<circle class="dot" cx="{place(claim.measured)}" cy="{middle}" r="3.5"/>')
    if isinstance(claim.reference, (int, float)):
        tick = place(claim.reference)
        drawn.append(f'<line class="tick" x1="{tick}" x2="{tick}" y1="2" y2="{height - 2}"/>')
    border = f"; held against {said(claim.reference)}" if claim.reference is not None else ""
    label = f"interval from {said(low)} to {said(high)}{border}"
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg class="interval" role="img" aria-label="{label}" {box}>{"".join(drawn)}</svg>'


def load(path: Path | None, root: Path) -> tuple[Path, list[Entry]]:
    """The ledger of a report: the named one, or the newest under ``root``.

    Returns:
        The report's folder, and the claims.

    Raises:
        ReportError: There is no report, or the named folder is none.
    """
    folder = Folder(path) if path is not None else latest(root)
    return folder.path, entries(folder, folder.statuses())
