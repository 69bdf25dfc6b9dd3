"""The corpora: whole, split by document, checked before they are read."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orthokit.errors import AssetError, OptionError, UnknownNameError
from orthokit.lab import _assets
from orthokit.lab.corpora import Document, _load, corpora, corpus

NAMES = ["addresses", "moby_dick"]


@pytest.fixture
def copied_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of one corpus that a test may harm."""
    shutil.copytree(_assets.ASSETS / "moby_dick", tmp_path / "moby_dick")
    monkeypatch.setattr(_assets, "ASSETS", tmp_path)
    _load.cache_clear()
    yield tmp_path / "moby_dick"
    _load.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_documents_tile_their_split_and_every_tenth_is_held_out(name: str) -> None:
    found = corpus(name)
    for split, part in (("train", found.train), ("validation", found.validation)):
        assert part.dtype == torch.uint8 and part.ndim == 1
        inside = [document for document in found.documents if document.split == split]
        position = 0
        for document in inside:
            assert document.start == position and document.bytes > 0
            position = document.stop + 2
            assert bytes(part[document.stop : position].tolist()) == b"\n\n"
        assert position == len(part)
    held_out = [number for number, document in enumerate(found.documents, 1) if document.split == "validation"]
    assert held_out == list(range(10, len(found.documents) + 1, 10))
    assert len({document.title for document in found.documents}) == len(found.documents)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_valid_distinct_and_free_of_control_characters(name: str) -> None:
    found = corpus(name)
    texts = [found.text(document) for document in found.documents]
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert text == text.strip() and "\r" not in text
        assert all(character in "\n\t" or character.isprintable() or character == "\xa0" for character in text)


def test_the_addresses_run_from_1790_to_2021_with_their_speakers() -> None:
    addresses = corpus("addresses")
    years = [document.year for document in addresses.documents]
    assert years == sorted(years) and (years[0], years[-1], len(years)) == (1790, 2021, 233)
    lincoln = addresses.document("1863 Abraham Lincoln")
    assert (lincoln.author, lincoln.party) == ("Abraham Lincoln", "Republican")
    assert addresses.documents[0].party is None
    assert len(addresses.train) + len(addresses.validation) > 10_000_000


def test_moby_dick_is_its_135_chapters_once() -> None:
    whale = corpus("moby_dick")
    assert len(whale.documents) == 135
    numbers = [int(document.title.split()[1].rstrip(".")) for document in whale.documents]
    assert numbers == list(range(1, 136))
    assert (bytes(whale.train.tolist()) + bytes(whale.validation.tolist())).count(b"Call me Ishmael.") == 1


def test_the_listing_agrees_with_the_data() -> None:
    frame = corpora().set_index("name")
    assert frame.index.tolist() == NAMES
    for name in NAMES:
        found = corpus(name)
        row = frame.loc[name]
        assert (row["train_bytes"], row["validation_bytes"]) == (len(found.train), len(found.validation))
        assert row["documents"] == len(found.documents) and row["licence"] == found.licence


def test_a_corpus_is_read_once() -> None:
    assert corpus("moby_dick") is corpus("moby_dick")
    assert "135" in repr(corpus("moby_dick"))


def test_unknown_names_are_answered_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'moby_dick'"):
        corpus("moby-dick")
    with pytest.raises(UnknownNameError, match=r"did you mean 'Chapter 1\. Loomings\.'"):
        corpus("moby_dick").text("Chapter 1. Looming")
    with pytest.raises(OptionError, match="not a document"):
        corpus("moby_dick").text(Document("x", "y", 1, None, "train", 0, 1))


@pytest.mark.parametrize("file", ["text.xz", "index.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "missing"])
def test_a_harmed_file_is_named_with_both_hashes_and_the_way_out(copied_assets: Path, file: str, harm: str) -> None:
    path = copied_assets / file
    raw = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[: len(raw) // 2] if harm == "truncate" else bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(AssetError) as caught:
        corpus("moby_dick")
    message = str(caught.value)
    assert str(path) in message
    assert "pip install --force-reinstall orthokit" in message
    assert "python tools/build_assets.py --only moby_dick" in message
    if harm != "missing":
        assert _assets.provenance("moby_dick")["files"][file]["sha256"] in message and "found" in message
        path.write_bytes(raw)
        assert len(corpus("moby_dick").documents) == 135  # nothing of the failure is remembered


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"files": {}}', b"\xff"])
def test_a_harmed_record_is_named(copied_assets: Path, content: bytes) -> None:
    (copied_assets / "PROVENANCE.json").write_bytes(content)
    with pytest.raises(AssetError, match=r"PROVENANCE\.json"):
        _assets.asset_bytes("moby_dick", "text.xz")
