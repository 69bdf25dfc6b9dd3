"""Two bodies of English text, as bytes, split by document into a training and a validation part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.lab._assets import asset_bytes, asset_json, provenance

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Corpus", "Document", "corpora", "corpus"]

_NAMES = ("addresses", "moby_dick")


def corpora() -> pd.DataFrame:
    """The corpora in the package, one row each, without reading their texts.

    Returns:
        A frame with the columns ``name``, ``train_bytes``, ``validation_bytes``, ``documents``, ``licence`` and
        ``description``.

    Raises:
        AssetError: The record of a corpus is missing or damaged.

    Example:
        >>> frame = corpora()
        >>> sorted(frame["name"])
        ['addresses', 'moby_dick']
        >>> bool((frame["train_bytes"] > 5 * frame["validation_bytes"]).all())
        True
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for name in _NAMES:
        record = provenance(name)
        counts = record["counts"]
        rows.append(
            {
                "name": name,
                "train_bytes": counts["train_bytes"],
                "validation_bytes": counts["validation_bytes"],
                "documents": counts["documents"],
                "licence": record["licence"],
                "description": record["description"],
            }
        )
    return pd.DataFrame(rows)


@lru_cache(maxsize=len(_NAMES))
def _load(name: str) -> Corpus:
    record = provenance(name)
    index = asset_json(name, "index.json")
    # One writable copy: torch refuses to share memory that Python holds read-only.
    text = torch.from_numpy(np.frombuffer(asset_bytes(name, "text.xz"), dtype=np.uint8).copy())
    cut = int(index["train_bytes"])
    return Corpus(
        name=name,
        description=record["description"],
        licence=record["licence"],
        source=f"{record['package']['name']} {record['package']['version']} ({record['package']['kind']})",
        train=text[:cut],
        validation=text[cut:],
        documents=tuple(Document(**document) for document in index["documents"]),
    )


def corpus(name: str) -> Corpus:
    """One corpus: its bytes in two parts, and where each document lies in them.

    Args:
        name: ``"addresses"`` (State of the Union, 1790-2021) or ``"moby_dick"``.

    Returns:
        The :class:`Corpus`. It is read once and shared by all callers, so its tensors are not to be written to.

    Raises:
        UnknownNameError: There is no corpus of that name.
        AssetError: A data file is missing or does not have the recorded content.

    Example:
        >>> addresses = corpus("addresses")
        >>> addresses.train.dtype, addresses.train.ndim
        (torch.uint8, 1)
        >>> first = addresses.documents[0]
        >>> first.year, first.author, first.split
        (1790, 'George Washington', 'train')
        >>> addresses.text(first)[:15]
        'Fellow-Citizens'

    Numerics:
        The text is UTF-8; one token is one byte, so bits per byte are comparable across corpora. Every tenth
        document, in order of year or chapter, is in the validation part: no document is in both.
    """
    if name not in _NAMES:
        raise unknown_name("corpus", name, _NAMES)
    return _load(name)


@dataclass(frozen=True)
class Document:
    """One speech or chapter, and its place in the bytes of its split.

    Args:
        title: Unique within the corpus.
        author: Who spoke or wrote it.
        year: Year it was given or published.
        party: Party of the speaker as the source has it, ``None`` where there is none.
        split: ``"train"`` or ``"validation"``.
        start: Offset of its first byte in the tensor of its split.
        stop: Offset behind its last byte; a blank line follows before the next document.
    """

    title: str
    author: str
    year: int
    party: str | None
    split: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Bytes of a corpus in two parts, with the documents they are made of.

    Args:
        name: Name in :func:`corpora`.
        description: One line.
        licence: SPDX expression of the data; the full text lies beside the data file.
        source: Package, version and registry kind it was built from.
        train: All training documents, joined by blank lines.
        validation: All validation documents, joined by blank lines.
        documents: Every document, in order of year or chapter.
    """

    name: str
    description: str
    licence: str
    source: str
    train: UInt8[Tensor, " train_bytes"]
    validation: UInt8[Tensor, " validation_bytes"]
    documents: tuple[Document, ...]

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name!r}, train={len(self.train):,} bytes, validation={len(self.validation):,} bytes, "
            f"documents={len(self.documents)})"
        )

    def document(self, title: str) -> Document:
        """The document of that title.

        Raises:
            UnknownNameError: There is none.

        Example:
            >>> corpus("moby_dick").document("Chapter 1. Loomings.").start
            0
        """
        for document in self.documents:
            if document.title == title:
                return document
        raise unknown_name("document", title, (document.title for document in self.documents))

    def text(self, document: Document | str) -> str:
        """The text of one document.

        Args:
            document: An element of ``documents``, or its title.

        Returns:
            The decoded text.

        Raises:
            UnknownNameError: There is no document of that title.
            OptionError: The document is not one of this corpus.

        Example:
            >>> whale = corpus("moby_dick")
            >>> whale.text("Chapter 1. Loomings.").split("\\n\\n")[1][:16]
            'Call me Ishmael.'
        """
        found = self.document(document) if isinstance(document, str) else document
        if found not in self.documents:
            raise OptionError(f"{found.title!r} is not a document of the corpus {self.name!r}; take one of .documents.")
        part = self.train if found.split == "train" else self.validation
        return bytes(part[found.start : found.stop].numpy()).decode("utf-8")
