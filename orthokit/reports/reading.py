"""Sentences and verdicts with computed numbers: what a notebook says about a figure is never typed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthokit.figures.intervals import mean_interval
from orthokit.reports.claims import Claim, Ledger, decide, record_metrics

__all__ = ["Claims", "Reading", "reading"]


class Reading:
    """A sentence that a notebook shows as text and a terminal as it is.

    Args:
        text: Markdown.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text


def reading(text: str) -> Reading:
    """The one-sentence reading of a figure; put the numbers in with an f-string.

    Args:
        text: One sentence of Markdown.

    Returns:
        What the notebook displays when it is the last line of a cell.

    Example:
        >>> reading(f"The gap is {2.5:.1f} times the noise.")
        The gap is 2.5 times the noise.
    """
    return Reading(text)


class Claims:
    """Collects the claims of a notebook as it goes, and writes them down at its end.

    Args:
        paper: Where the claims come from, unless one says otherwise.

    Example:
        >>> claims = Claims(paper="arXiv 2606.03899")
        >>> claims.measure("positive", "It is positive.", [1.0, 1.1, 0.9], greater_than=0.0).verdict
        'holds'
    """

    def __init__(self, *, paper: str = "") -> None:
        self.paper = paper
        self.claims: list[Claim] = []

    def measure(
        self,
        name: str,
        text: str,
        values: Sequence[float] | Any,
        *,
        greater_than: float | int | None = None,
        less_than: float | int | None = None,
        between: tuple[float | int, float | int] | None = None,
        **details: Any,
    ) -> Claim:
        """Add a claim whose measured value, interval and verdict all come from one value per seed.

        Args:
            name: Short unique name.
            text: The claim in one sentence.
            values: One number a seed, at least two; the interval is Student's, 95 %.
            greater_than: The claim holds if the whole interval lies above.
            less_than: The claim holds if the whole interval lies below.
            between: The claim holds if the whole interval lies inside.
            **details: Other fields of :class:`Claim`, such as ``unit``, ``source``, ``how``.

        Returns:
            The claim; its ``seeds`` is the number of values.
        """
        numbers = [float(v) for v in values]
        mean, low, high = mean_interval(numbers)
        limits = {"greater_than": greater_than, "less_than": less_than, "between": between}
        given = {key: limit for key, limit in limits.items() if limit is not None}
        details.setdefault("reference", greater_than if greater_than is not None else less_than)
        details.setdefault("predicted", _expectation(**given))
        verdict = decide((low, high), **given)
        return self._keep(
            Claim(
                name,
                text,
                measured=mean,
                interval=(low, high),
                seeds=len(numbers),
                verdict=verdict,
                **self._of(details),
            )
        )

    def state(self, name: str, text: str, measured: float | str, *, holds: bool, **details: Any) -> Claim:
        """Add a claim that is decided without an interval: an identity, or a comparison with a tolerance.

        Args:
            name: Short unique name.
            text: The claim in one sentence.
            measured: What came out.
            holds: Whether that agrees with the claim.
            **details: Other fields of :class:`Claim`.

        Returns:
            The claim.
        """
        return self._keep(
            Claim(name, text, measured=measured, verdict="holds" if holds else "fails", **self._of(details))
        )

    def record(self, **numbers: Any) -> Ledger:
        """Write all claims and ``numbers`` to ``metrics.json``; the last act of a notebook.

        Args:
            **numbers: Other figures worth keeping.

        Returns:
            The claims as a table.
        """
        return record_metrics(claims=self.claims, **numbers)

    def _of(self, details: dict[str, Any]) -> dict[str, Any]:
        return {"paper": self.paper, **details}

    def _keep(self, claim: Claim) -> Claim:
        # Running a cell twice replaces its claim instead of adding a second one of the same name.
        self.claims = [*(c for c in self.claims if c.id != claim.id), claim]
        return claim


def _expectation(
    *,
    greater_than: float | int | None = None,
    less_than: float | int | None = None,
    between: tuple[float | int, float | int] | None = None,
) -> str:
    if between is not None:
        return f"between {between[0]:g} and {between[1]:g}"
    return f"above {greater_than:g}" if greater_than is not None else f"below {less_than:g}"
