"""Claims that are tested, not told: what a paper says, what was measured, and a verdict that follows from the interval.

A notebook ends with :func:`record_metrics`; the report's ledger is made of the files it leaves.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from orthokit.errors import NonFiniteError, OptionError, ReportError

__all__ = ["SOURCES", "VERDICTS", "Claim", "Ledger", "decide", "read_metrics", "record_metrics", "write_json"]

Verdict = Literal["holds", "fails", "undecided"]
VERDICTS = ("holds", "fails", "undecided")
SOURCES = ("live", "recorded")
FORMAT = 1


def decide(
    interval: Any,
    *,
    greater_than: float | int | None = None,
    less_than: float | int | None = None,
    between: tuple[float | int, float | int] | None = None,
) -> Verdict:
    """The verdict that an interval allows: all of it on one side decides, anything else does not.

    Args:
        interval: ``(low, high)``, or one number that is known exactly.
        greater_than: The claim is that the quantity lies above this.
        less_than: The claim is that it lies below this.
        between: The claim is that it lies within ``(a, b)``, ends included.

    Returns:
        ``"holds"`` if the whole interval satisfies the rule, ``"fails"`` if none of it does, else ``"undecided"``.

    Raises:
        OptionError: Not exactly one rule, an interval the wrong way round.
        NonFiniteError: An end is NaN.

    Example:
        >>> decide((0.1, 0.3), greater_than=0), decide((-0.1, 0.3), greater_than=0), decide(0.5, between=(0, 0.4))
        ('holds', 'undecided', 'fails')
    """
    if sum(rule is not None for rule in (greater_than, less_than, between)) != 1:
        raise OptionError("give exactly one of greater_than=, less_than= and between=.")
    low, high = _ends(interval)
    if between is not None:
        below, above = between
        if below > above:
            raise OptionError(f"between needs (lower, upper); got ({below}, {above}).")
        inside, outside = below <= low and high <= above, high < below or low > above
    elif greater_than is not None:
        inside, outside = low > greater_than, high <= greater_than
    else:
        inside, outside = high < less_than, low >= less_than  # type: ignore[operator]
    return "holds" if inside else "fails" if outside else "undecided"


def record_metrics(
    *, claims: Iterable[Claim] = (), path: str | os.PathLike[str] | None = None, **numbers: Any
) -> Ledger:
    """Writes the claims and numbers of a notebook, as its last act; without it a report calls the notebook unfinished.

    Args:
        claims: The claims with their verdicts; ids must differ.
        path: Where to write; default ``$ORTHOKIT_METRICS``, else ``metrics.json`` in the working directory.
        **numbers: Anything else worth keeping: numbers, text, lists and mappings of them, arrays.

    Returns:
        The ledger of these claims, which a notebook shows as a table.

    Raises:
        OptionError: Two claims share an id, or a value cannot be written as JSON.
        ReportError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> c = Claim("sum", "1 + 1 is 2", measured=2.0, verdict=decide(1 + 1, between=(2, 2)))
        >>> print(record_metrics(claims=[c], path=tempfile.mkdtemp() + "/metrics.json", steps=3))
        holds      sum: 1 + 1 is 2 (measured 2, live)
    """
    ledger = Ledger(claims)
    target = Path(path or os.environ.get("ORTHOKIT_METRICS") or "metrics.json")
    record = {
        "format": FORMAT,
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
        "claims": [asdict(claim) for claim in ledger.claims],
        "numbers": {name: _plain(name, value) for name, value in numbers.items()},
    }
    write_json(target, record)
    return ledger


def read_metrics(path: str | os.PathLike[str]) -> tuple[list[Claim], dict[str, Any]]:
    """The claims and numbers of a file that :func:`record_metrics` wrote.

    Args:
        path: The file.

    Returns:
        ``(claims, numbers)``.

    Raises:
        ReportError: The file is missing, damaged or not of this format.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ReportError(f"{path} has format {record['format']}; this orthokit reads format {FORMAT}.")
        claims = [Claim(**{**entry, "interval": _pair(entry["interval"])}) for entry in record["claims"]]
        return claims, dict(record["numbers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        if isinstance(cause, ReportError):
            raise
        raise ReportError(f"{path} is not a metrics file that record_metrics wrote: {cause}.") from cause


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of either."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, allow_nan=False, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as cause:
        beside.unlink(missing_ok=True)
        raise ReportError(f"cannot write {path}: {cause.strerror or cause}. Is the folder writable?") from cause


@dataclass(frozen=True)
class Claim:
    """One statement, what was expected, what was found.

    Attributes:
        id: Short unique name, such as ``"gap-opens"``.
        text: The claim in one sentence.
        paper: Where it comes from; empty for an identity of our own.
        predicted: What was expected before measuring: a number or words.
        measured: What came out: a number or words.
        interval: Confidence interval of ``measured``, or None when it is exact.
        seeds: How many independent runs the interval rests on; 0 when nothing is random.
        unit: Unit of ``measured``; empty for a pure number.
        verdict: ``"holds"``, ``"fails"`` or ``"undecided"``; see :func:`decide`.
        source: ``"live"`` (measured in this notebook run) or ``"recorded"`` (read from a recorded study).
        how: One sentence: method, sizes, or the command that recorded it.
        reference: The number the interval is held against, drawn as a tick in the report.
    """

    id: str
    text: str
    paper: str = ""
    predicted: Any = None
    measured: Any = None
    interval: Any = None
    seeds: int = 0
    unit: str = ""
    verdict: str = "undecided"
    source: str = "live"
    how: str = ""
    reference: Any = None

    def __post_init__(self) -> None:
        """Checks the fields and turns numbers into plain ones."""
        if not self.id or not self.text:
            raise OptionError("a claim needs an id and a text.")
        for field, value, choices in (("verdict", self.verdict, VERDICTS), ("source", self.source, SOURCES)):
            if value not in choices:
                raise OptionError(f"{field} of claim {self.id!r} must be one of {', '.join(choices)}; got {value!r}.")
        object.__setattr__(self, "interval", None if self.interval is None else _ends(self.interval))
        for field in ("predicted", "measured", "reference"):
            object.__setattr__(self, field, _plain(f"{field} of claim {self.id!r}", getattr(self, field)))

    def _repr_markdown_(self) -> str:
        """The claim as a sentence with its verdict, for the end of a notebook cell."""
        expected = "" if self.predicted is None else f"; expected {said(self.predicted)}"
        return f"*{self.verdict}:* {self.text} Measured {measured(self)}{expected}."


class Ledger:
    """Claims as a table: text in a terminal, HTML in a notebook."""

    def __init__(self, claims: Iterable[Claim]) -> None:
        """Keeps the claims in order; ids must differ."""
        self.claims = list(claims)
        seen: set[str] = set()
        for claim in self.claims:
            if claim.id in seen:
                raise OptionError(f"two claims have the id {claim.id!r}; ids must differ within a notebook.")
            seen.add(claim.id)

    def __len__(self) -> int:
        """The number of claims."""
        return len(self.claims)

    def __str__(self) -> str:
        """One line per claim."""
        if not self.claims:
            return "no claims recorded"
        return "\n".join(f"{c.verdict:<10} {c.id}: {c.text} (measured {measured(c)}, {c.source})" for c in self.claims)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A table with the verdict in words, never in colour alone."""
        if not self.claims:
            return "<p>No claims recorded.</p>"
        head = "".join(
            f'<th scope="col">{name}</th>' for name in ("Claim", "Predicted", "Measured", "Seeds", "Verdict")
        )
        rows = []
        for c in self.claims:
            cells = (c.text, said(c.predicted), measured(c), str(c.seeds or "–"), f"{c.verdict} ({c.source})")
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        return f"<table class='ledger'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def measured(claim: Claim) -> str:
    """The measured value with interval and unit, as text."""
    text = said(claim.measured)
    if claim.interval is not None:
        text += f" [{said(claim.interval[0])}, {said(claim.interval[1])}]"
    return f"{text} {claim.unit}".strip()


def said(value: Any) -> str:
    """A number with three digits, words as they are, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.3g}".replace("-", "−")


def _ends(interval: Any) -> tuple[float, float]:
    """``(low, high)`` of an interval or of one number."""
    try:
        low, high = (interval, interval) if np.ndim(interval) == 0 else interval
        low, high = float(low), float(high)
    except (TypeError, ValueError) as cause:
        raise OptionError(f"an interval is (low, high) or one number; got {interval!r}.") from cause
    if math.isnan(low) or math.isnan(high):
        raise NonFiniteError(f"an interval must not hold NaN; got ({low}, {high}).")
    if low > high:
        raise OptionError(f"an interval must have low <= high; got ({low}, {high}).")
    return low, high


def _pair(value: Any) -> Any:
    return None if value is None else tuple(value)


def _plain(name: str, value: Any) -> Any:
    """A value as JSON holds it; NaN and infinities become words, since JSON has none."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    raise OptionError(f"{name} must be numbers, text, or lists and mappings of them; got {type(value).__name__}.")
