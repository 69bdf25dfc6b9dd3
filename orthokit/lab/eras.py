"""Pieces of the State of the Union addresses, labelled with the era they were given in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from orthokit.lab.corpora import corpus

__all__ = ["ERA_CUTS", "EraSet", "eras"]

ERA_CUTS = (1850, 1900, 1950)
"""First years of the second, third and fourth era."""
_SENTENCES = 3
# A full stop, a question or an exclamation mark, a space, and what looks like a beginning.
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass(frozen=True, eq=False, repr=False)
class EraSet:
    """Pieces of speeches and labels in two parts.

    Args:
        licence: Licence of the data.
        source: Package, version and registry kind it was built from.
        train: Pairs of a text and an index into ``classes``.
        test: The same, of other speeches.
        classes: The eras, in order.
    """

    licence: str
    source: str
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"EraSet({len(self.train):,} train + {len(self.test):,} test pieces, {len(self.classes)} eras)"


@lru_cache(maxsize=1)
def eras() -> EraSet:
    """Three sentences at a time of the State of the Union addresses, and which of four eras they are from.

    Returns:
        The :class:`EraSet`: before 1850, to 1899, to 1949, since 1950. It is made once and shared by all callers, so
        its lists are not to be changed.

    Raises:
        AssetError: A data file is missing or does not have the recorded content.

    Example:
        >>> found = eras()
        >>> found.classes
        ('before 1850', '1850-1899', '1900-1949', 'since 1950')
        >>> text, label = found.train[0]
        >>> label, text.startswith("Fellow-Citizens")
        (0, True)

    Numerics:
        Split by speech, as the corpus is: pieces of one speech share its subject and its speaker, and a random split
        would reward knowing them.

    References:
        The texts are those of :func:`orthokit.lab.corpus`.
    """
    addresses = corpus("addresses")
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "validation": []}
    for document in addresses.documents:
        label = sum(document.year >= cut for cut in ERA_CUTS)
        sentences = _END.split(" ".join(addresses.text(document).split()))
        pieces = [" ".join(sentences[i : i + _SENTENCES]) for i in range(0, len(sentences), _SENTENCES)]
        rows[document.split] += [(piece, label) for piece in pieces]
    spans = [f"{begin}-{end - 1}" for begin, end in pairwise(ERA_CUTS)]
    return EraSet(
        licence=addresses.licence,
        source=addresses.source,
        train=rows["train"],
        test=rows["validation"],
        classes=(f"before {ERA_CUTS[0]}", *spans, f"since {ERA_CUTS[-1]}"),
    )
