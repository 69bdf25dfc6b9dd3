"""Short definitions of English nouns and verbs, labelled with the broad class of meaning they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from orthokit.errors import unknown_name
from orthokit.lab._assets import asset_text, provenance

__all__ = ["GlossSet", "glosses"]

_PARTS = ("noun", "verb")


@lru_cache(maxsize=len(_PARTS))
def _load(part: str) -> GlossSet:
    record = provenance("glosses")
    classes = tuple(record["counts"][part]["classes"])
    number = {label: index for index, label in enumerate(classes)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for line in asset_text("glosses", f"{part}.tsv.xz").splitlines():
        split, label, text = line.split("\t")
        rows[split].append((text, number[label]))
    return GlossSet(
        part=part,
        licence=record["licence"],
        source=f"{record['package']['name']} {record['package']['version']} ({record['package']['kind']})",
        train=rows["train"],
        test=rows["test"],
        classes=classes,
    )


def glosses(part: str = "noun") -> GlossSet:
    """Definitions of one part of speech with their supersense, split into a training and a test part.

    Args:
        part: ``"noun"`` (24 classes) or ``"verb"`` (14 classes).

    Returns:
        The :class:`GlossSet`. It is read once and shared by all callers, so its lists are not to be changed.

    Raises:
        UnknownNameError: There is no such part.
        AssetError: A data file is missing or does not have the recorded content.

    Example:
        >>> verbs = glosses("verb")
        >>> text, label = verbs.train[0]
        >>> text, verbs.classes[label]
        ('draw air into, and expel out of, the lungs', 'body')
        >>> {text for text, _ in verbs.train}.isdisjoint(text for text, _ in verbs.test)
        True

    Numerics:
        The split follows a hash of the definition, so a text is never in both parts. A few texts define words of two
        classes and stand there with both labels: no classifier reaches 100 %.

    References:
        George A. Miller, WordNet: a lexical database for English, Communications of the ACM 38 (11), 1995; the classes
        are the lexicographer files of WordNet 3.0. Here only definitions, without examples, and without the classes
        that have fewer than 300 (noun) or 200 (verb) of them.
    """
    if part not in _PARTS:
        raise unknown_name("part of speech", part, _PARTS)
    return _load(part)


@dataclass(frozen=True, eq=False, repr=False)
class GlossSet:
    """Definitions and labels in two parts.

    Args:
        part: ``"noun"`` or ``"verb"``.
        licence: Licence of the data; the full text lies beside the data file.
        source: Package, version and registry kind it was built from.
        train: Pairs of a definition and an index into ``classes``.
        test: Pairs of a definition and an index into ``classes``.
        classes: Names of the classes (supersenses), sorted.
    """

    part: str
    licence: str
    source: str
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    classes: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"GlossSet({self.part!r}, {len(self.train):,} train + {len(self.test):,} test definitions, "
            f"{len(self.classes)} classes)"
        )
