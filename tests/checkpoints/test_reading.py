"""Model files on disk: every bit comes back, and what is damaged is an error in words before anything is read."""

import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthokit.checkpoints import open_checkpoint
from orthokit.checkpoints._header import DTYPES
from orthokit.errors import CheckpointError, UnknownNameError

INDEX = "model.safetensors.index.json"


def one_of_each() -> dict[str, Tensor]:
    """A tensor of random bytes in every type that safetensors itself writes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for code, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (3 * 5 * dtype.itemsize,), generator=generator)
        tensors[f"of.{code}"] = raw.to(torch.uint8).view(dtype).view(3, 5)
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def f32(start: int, end: int, shape: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def test_every_type_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = one_of_each()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path / "model.safetensors") as model:
        assert set(model.names()) == set(tensors) == set(model)
        assert len(model) == len(tensors) and "scalar" in model
        assert model.bytes == sum(t.nbytes for t in tensors.values())
        assert model.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert (model.shape(name), model.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert same_bits(model.tensor(name), tensor), name


def test_a_tensor_that_was_read_belongs_to_the_caller(tmp_path: Path) -> None:
    save_file({"W": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as model:
        model.tensor("W").zero_()
        assert torch.equal(model.tensor("W"), torch.ones(4, 4))


def test_memory_can_be_given_to_read_into(tmp_path: Path) -> None:
    save_file({"W": torch.arange(6, dtype=torch.bfloat16), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    scratch = torch.zeros(64, dtype=torch.uint8)
    with open_checkpoint(tmp_path) as model:
        W = model.tensor("W", out=scratch)
        assert W.untyped_storage().data_ptr() == scratch.untyped_storage().data_ptr()
        assert torch.equal(W, torch.arange(6, dtype=torch.bfloat16))


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as model, pytest.raises(UnknownNameError, match=r"layer\.weight"):
        model.tensor("layer.wieght")


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    save_file({"W": torch.ones(2)}, tmp_path / "model.safetensors")
    model = open_checkpoint(tmp_path)
    model.close()
    with pytest.raises(CheckpointError, match="closed"):
        model.tensor("W")


def sharded(folder: Path, shards: dict[str, dict[str, Tensor]], index: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PARTS = {ONE: {"a": torch.ones(2)}, TWO: {"b": torch.zeros(3), "c": torch.ones(1)}}
LISTED = {"c": TWO, "a": ONE, "b": TWO}


@pytest.mark.parametrize("index", [LISTED, None], ids=["listed", "not listed"])
def test_shards_are_one_model(tmp_path: Path, index: dict[str, str] | None) -> None:
    folder = sharded(tmp_path / "model", PARTS, index)
    with open_checkpoint(folder) as model:
        assert set(model.names()) == {"a", "b", "c"}
        assert [file.name for file in model.files] == [ONE, TWO]
        assert torch.equal(model.tensor("b"), torch.zeros(3))
    if index is not None:
        with open_checkpoint(folder / INDEX) as model:
            assert model.names() == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("shards", "index", "words"),
    [
        ({ONE: PARTS[ONE]}, LISTED, f"lists 2 tensors in {TWO}, which is not there"),
        ({ONE: PARTS[ONE]}, None, "1 of 2 shards; missing is 'model-00002-of-00002.safetensors'"),
        (PARTS, {"a": ONE, "b": TWO}, "holds 'c' besides"),
        (PARTS, LISTED | {"d": TWO}, "lacks 'd'"),
        (PARTS, LISTED | {"d": "../other.safetensors"}, "names files outside its folder"),
        (PARTS, {}, "lists nothing"),
        (PARTS, {"a": 3}, "no list of shards"),
        (PARTS, {"a": "/etc/model.safetensors"}, "names files outside its folder"),
        ({"x.safetensors": PARTS[ONE], "y.safetensors": PARTS[ONE]}, None, "both hold 'a'"),
        ({"model.safetensors": PARTS[ONE]} | PARTS, LISTED, "both model.safetensors and"),
        ({"adapter_model.safetensors": PARTS[ONE]}, None, "an adapter, not a model"),
        ({}, None, "no .safetensors file; it holds nothing"),
    ],
)
def test_folders_that_are_no_one_model_are_refused(
    tmp_path: Path, shards: dict[str, dict[str, Tensor]], index: dict[str, Any] | None, words: str
) -> None:
    folder = sharded(tmp_path / "model", shards, index)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    assert words in str(raised.value)


def test_pickles_are_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"W": [1.0]}, protocol=2))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=r"looks like a plain pickle, which could run code and is never read"):
            open_checkpoint(path)


def test_sizes_beyond_counting_are_refused(tmp_path: Path) -> None:
    for shape in ([0, 2**70], [2**62, 4, 0]):
        path = raw_file(tmp_path / "model.safetensors", {"a": f32(0, 0, shape)})
        with pytest.raises(CheckpointError, match="more than there can be"):
            open_checkpoint(path)


def test_a_missing_path_is_told_what_is_beside_it(tmp_path: Path) -> None:
    save_file({"W": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has 'model\.gguf', 'model\.safetensors'\. Check the path"):
        open_checkpoint(tmp_path / "modell.safetensors")


LIES = {
    "nothing": b"",
    "a few bytes": b"\x05\x00\x00",
    "a header of terabytes": struct.pack("<Q", 1 << 42) + b"{}",
    "a header to the end of numbers": b"\xff" * 8 + b"{}",
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_files_that_lie_about_their_header_are_refused_without_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no whole safetensors file.*(Copy|download)"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"[]", b"", "no valid JSON"),
        (b'{"a": ', b"", "no valid JSON"),
        (b'{"a": NaN}', b"", "NaN is no JSON"),
        (b"{" + b'"a":{' * 30000, b"", "no valid JSON"),
        (b'{"a": {"dtype":"F32"}, "a": {"dtype":"F32"}}', b"", "stands in it twice"),
        (b'{"\xff": 1}', b"", "no valid JSON"),
        ({"a": 3}, b"", "has to have dtype, shape and data_offsets"),
        ({"a": f32(0, 8, [2]) | {"more": 1}}, bytes(8), "has to have dtype"),
        ({"a": f32(0, 8, [2]) | {"dtype": "F4"}}, bytes(8), "type 'F4'"),
        ({"a": f32(0, 8, [2]) | {"dtype": ["F32"]}}, bytes(8), "the type"),
        ({"a": f32(0, 8, [3])}, bytes(8), "needs 12 bytes and has 8"),
        ({"a": f32(0, 8, [2, True])}, bytes(8), "the shape"),
        ({"a": f32(0, 8, [-1, -2])}, bytes(8), "the shape"),
        ({"a": f32(8, 0, [2])}, bytes(8), "the offsets"),
        ({"a": f32(0, 1 << 62, [1 << 60])}, bytes(8), "cut off"),
        ({"a": f32(0, 8, [2]), "b": f32(4, 12, [2])}, bytes(12), "lies over 'a'"),
        ({"a": f32(0, 8, [2]), "b": f32(0, 8, [2])}, bytes(8), "lies over 'a'"),
        ({"a": f32(0, 8, [2]), "b": f32(12, 20, [2])}, bytes(20), "leaves 4 bytes before it"),
        ({"a": f32(0, 8, [2])}, bytes(7), "cut off"),
        ({"a": f32(0, 8, [2])}, bytes(9), "stands behind its tensors"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
        ({"__metadata__": [1]}, b"", "metadata"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, data: bytes, words: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert words in str(raised.value) and str(path) in str(raised.value)


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"W": torch.ones(3, 2), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"W": torch.ones(1 << 16)}, path)
    with open_checkpoint(path) as model:
        os.truncate(path, 1 << 12)
        with pytest.raises(CheckpointError, match="became shorter"):
            model.tensor("W")


def test_truth_values_other_than_0_and_1_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}
    path = raw_file(tmp_path / "model.safetensors", {"m": entry}, b"\x01\x02\x00")
    with open_checkpoint(path) as model, pytest.raises(CheckpointError, match="true or false"):
        model.tensor("m")


def test_the_digest_tells_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"W": torch.ones(4)}, path)
    with open_checkpoint(path) as model:
        before = model.digest
    with open_checkpoint(path) as model:
        assert model.digest == before
    os.utime(path, ns=(1, 1))
    with open_checkpoint(path) as model:
        assert model.digest != before


WHOLE = {
    "a": f32(0, 8, [2]),
    "b": {"dtype": "I8", "shape": [2, 2], "data_offsets": [8, 12]},
    "__metadata__": {"k": "v"},
}


@settings(max_examples=75)
@given(st.integers(0, 2**32 - 1))
@example(0)
def test_a_damaged_header_is_an_error_or_reads_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """Bytes are changed, removed and doubled; whatever we accept, the format's own reader accepts as the same."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    draw = random.Random(seed)
    for _ in range(20):
        content = damaged(draw)
        path.write_bytes(content)
        try:
            with open_checkpoint(path) as model:
                read = {name: model.tensor(name) for name in model.names()}
        except CheckpointError:
            continue
        try:
            with safe_open(path, framework="pt") as peer:
                theirs = {name: peer.get_tensor(name) for name in peer.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            pytest.fail(f"we read what safetensors refuses ({error}): {content!r}")
        assert read.keys() == theirs.keys()
        assert all(same_bits(read[name], theirs[name]) for name in read)


def damaged(draw: random.Random) -> bytes:
    text = json.dumps(WHOLE).encode()
    content = bytearray(struct.pack("<Q", len(text)) + text + bytes(range(12)))
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(content))
        what = draw.randrange(4)
        if what == 0:
            content[at] = draw.randrange(256)
        elif what == 1:
            content[at : at + 1] = draw.choice([b"0", b"9", b"-1", b"1e9", b"[", b"}", b'"', b"null", b"true"])
        elif what == 2:
            del content[at : at + draw.randrange(1, 9)]
        else:
            content[at:at] = content[at : at + draw.randrange(1, 40)]
    return bytes(content)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=5), _VALUES | st.fixed_dictionaries(
    {"dtype": st.sampled_from([*DTYPES, "F3"]) | _VALUES, "shape": _VALUES, "data_offsets": _VALUES}
), max_size=3), st.binary(max_size=30))  # fmt: skip
def test_any_json_is_a_header_or_an_error_in_words(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], data: bytes
) -> None:
    path = raw_file(tmp_path_factory.getbasetemp() / "any.safetensors", header, data)
    try:
        with open_checkpoint(path) as model:
            assert model.bytes == len(data)
    except CheckpointError as error:
        assert str(path) in str(error)
