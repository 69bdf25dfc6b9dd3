"""GGUF files: the numbers of every block as the layout says, and headers that lie refused before they are trusted."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import BOOL, F32, LIST, TEXT, TYPES, U32, U64, entry, gguf_file, reference, text, value_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.checkpoints import open_checkpoint
from orthokit.checkpoints._gguf_blocks import BLOCKS, dequantize
from orthokit.errors import CheckpointError, OptionError
from orthokit.merging import merge_checkpoints

PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALES |= {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}


def random_blocks(kind: str, count: int, seed: int = 0) -> bytes:
    """Blocks of random bytes with finite scales."""
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (count, TYPES[kind][2]), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = draw.standard_normal(count).astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.tobytes()


def written(path: Path, tensors: dict[str, Any], metadata: dict[str, Any] | None = None, **options: Any) -> Path:
    path.write_bytes(gguf_file(tensors, metadata, **options))
    return path


def as_stored(tensor: Tensor, kind: str = "F32") -> tuple[str, list[int], bytes]:
    return kind, list(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_plain_types_come_back_bit_for_bit_in_the_shape_of_torch(tmp_path: Path, version: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for kind, dtype in PLAIN.items():
        raw = torch.randint(0, 256, (3 * 5 * dtype.itemsize,), generator=generator).to(torch.uint8)
        tensors[kind] = raw.view(dtype).view(3, 5)
    path = written(tmp_path / "m.gguf", {k: as_stored(t, k) for k, t in tensors.items()}, version=version)
    with open_checkpoint(path) as model:
        assert model.names() == list(PLAIN) and len(model) == len(PLAIN) and "I8" in model
        assert model.bytes == sum(t.nbytes for t in tensors.values())
        for kind, tensor in tensors.items():
            read = model.tensor(kind)
            assert (model.shape(kind), model.dtype(kind), model.quantization(kind)) == ((3, 5), PLAIN[kind], None)
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("kind", BLOCKS)
@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_blocks_are_the_numbers_that_the_layout_says(kind: str, seed: int) -> None:
    """Against one number at a time in float64: both products and the sum round once each in float32."""
    raw = random_blocks(kind, 3, seed)
    found = dequantize(torch.frombuffer(bytearray(raw), dtype=torch.uint8), kind).tolist()
    size = TYPES[kind][2]
    expected = [pair for at in range(0, len(raw), size) for pair in reference(kind, raw[at : at + size])]
    assert len(found) == len(expected) == 3 * TYPES[kind][1]
    for value, (product, offset) in zip(found, expected, strict=True):
        assert abs(value - (product + offset)) <= 2**-22 * (abs(product) + abs(offset))


@pytest.mark.parametrize("kind", BLOCKS)
def test_quantised_tensors_are_read_as_float32(tmp_path: Path, kind: str) -> None:
    """A matrix of many blocks, more than one step of the computing, and any rows of it."""
    row = 2 * BLOCKS[kind].numbers
    rows = (1 << 18) // row + 3
    raw = random_blocks(kind, 2 * rows)
    path = written(tmp_path / "m.gguf", {"first": as_stored(torch.ones(3)), "W": (kind, [rows, row], raw)})
    with open_checkpoint(path) as model:
        assert (model.shape("W"), model.dtype("W"), model.quantization("W")) == ((rows, row), torch.float32, kind)
        W = model.tensor("W")
        assert W.is_contiguous() and torch.isfinite(W).all()
        last = [sum(pair) for pair in reference(kind, raw[-BLOCKS[kind].bytes :])]
        assert torch.allclose(W[-1, -BLOCKS[kind].numbers :], torch.tensor(last), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.rows("W", 1, rows - 1), W[1:-1])
        assert model.rows("W", 2, 2).shape == (0, row)
        memory = torch.zeros(W.nbytes + 8, dtype=torch.uint8)
        assert torch.equal(model.tensor("W", out=memory), W)
        assert torch.equal(memory[: W.nbytes].view(torch.float32), W.view(-1))


def test_rows_of_any_tensor_and_of_a_single_row_of_blocks(tmp_path: Path) -> None:
    b = random_blocks("Q8_0", 2)
    path = written(tmp_path / "m.gguf", {"b": ("Q8_0", [64], b), "W": as_stored(torch.arange(12.0).view(4, 3))})
    with open_checkpoint(path) as model:
        assert torch.equal(model.rows("b", 5, 40), model.tensor("b")[5:40])
        assert torch.equal(model.rows("W", 1, 3), torch.arange(12.0).view(4, 3)[1:3])
        with pytest.raises(OptionError, match="no rows 1:5"):
            model.rows("W", 1, 5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_numbers_that_were_rounded_to_blocks_come_back_within_a_step(kind: str, seed: int, size: float) -> None:
    """Half a step of Q8_0; a whole one of Q4_0, whose far end is one step short. The scale has 11 bits."""
    x = np.random.default_rng(seed).standard_normal((4, 32)) * size
    blocks = b""
    steps = []
    for row in x:
        peak = row[np.abs(row).argmax()]
        d = abs(peak) / 127 if kind == "Q8_0" else peak / -8
        q = np.rint(row / d) if kind == "Q8_0" else np.clip(np.floor(row / d + 8.5), 0, 15)
        q = q.astype(np.int8).view(np.uint8)
        blocks += struct.pack("<e", d) + (q if kind == "Q8_0" else q[:16] | q[16:] << 4).tobytes()
        steps.append(abs(d))
    found = dequantize(torch.frombuffer(bytearray(blocks), dtype=torch.uint8), kind).view(4, 32).numpy()
    whole, largest = (0.5, 127) if kind == "Q8_0" else (1.0, 8)
    # 2^-25 is half the spacing of the smallest half-precision numbers, for scales that are that small.
    bound = [d * whole + largest * (d * 2**-11 + 2**-25) * 1.001 + 1e-9 for d in steps]
    assert (np.abs(found - x).max(axis=1) <= np.array(bound)).all()


def test_a_scale_that_is_no_number_gives_no_numbers_and_nothing_else(tmp_path: Path) -> None:
    raw = bytearray(random_blocks("Q8_0", 2))
    raw[:2] = struct.pack("<e", float("nan"))
    with open_checkpoint(written(tmp_path / "m.gguf", {"W": ("Q8_0", [2, 32], bytes(raw))})) as model:
        W = model.tensor("W")
        assert W[0].isnan().all() and W[1].isfinite().all()


def test_unread_types_are_named_when_the_tensor_is_asked_for(tmp_path: Path) -> None:
    tensors = {
        "a": ("IQ4_NL", [2, 32], bytes(36)),
        "b": ("TQ1_0", [1, 256], bytes(54)),
        "c": as_stored(torch.ones(2)),
    }
    with open_checkpoint(written(tmp_path / "m.gguf", tensors)) as model:
        assert model.quantization("a") == "IQ4_NL" and torch.equal(model.tensor("c"), torch.ones(2))
        for name, kind in (("a", "IQ4_NL"), ("b", "TQ1_0")):
            with pytest.raises(CheckpointError, match=rf"{name}.* is {kind}, which is not read; read are .*Q6_K"):
                model.tensor(name)
            with pytest.raises(CheckpointError, match=kind):
                model.rows(name, 0, 1)


def test_metadata_are_texts(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": (TEXT, "llama"),
        "general.alignment": (U32, 64),
        "n": (U64, 2**63),
        "eps": (F32, 0.5),
        "yes": (BOOL, 1),
        "few": (LIST, (U32, [1, 2])),
        "words": (LIST, (TEXT, ["a", "bc"])),
        "many words": (LIST, (TEXT, ["a"] * 1000)),
        "many": (LIST, (F32, [0.0] * 1000)),
        "nested": (LIST, (LIST, [(U32, [1]), (TEXT, ["x"])])),
    }
    with open_checkpoint(written(tmp_path / "m.gguf", {"W": as_stored(torch.ones(2, 2))}, metadata)) as model:
        assert torch.equal(model.tensor("W"), torch.ones(2, 2))
        assert model.place("W").start % 64 == 0
        assert model.metadata == {
            "general.architecture": "llama",
            "general.alignment": "64",
            "n": str(2**63),
            "eps": "0.5",
            "yes": "true",
            "few": "[1, 2]",
            "words": '["a", "bc"]',
            "many words": "1000 texts",
            "many": "1000 numbers",
            "nested": "2 lists",
        }


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"empty": as_stored(torch.zeros(0, 4)), "scalar": as_stored(torch.tensor(2.5))}
    with open_checkpoint(written(tmp_path / "m.gguf", tensors)) as model:
        assert model.tensor("scalar").item() == 2.5 and model.tensor("empty").shape == (0, 4)
        assert model.rows("empty", 0, 0).shape == (0, 4)
        with pytest.raises(OptionError, match="no rows"):
            model.rows("scalar", 0, 1)


def head(tensors: int, metadata: int, rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, metadata) + rest


def one(*, name: str = "W", sizes: tuple[int, ...] = (2,), code: int = 0, start: int = 0, data: int = 8) -> bytes:
    content = head(1, 0, entry(name, sizes, code, start))
    return content + bytes(-len(content) % 32 + data)


def deep(levels: int) -> bytes:
    return head(0, 1, text("k") + struct.pack("<I", LIST) + struct.pack("<IQ", LIST, 1) * levels + bytes(16))


TWICE = text("k") + struct.pack("<I", BOOL) + b"\1"
LIES = {
    "nothing but the beginning": (b"GGUF", "the version needs 4 bytes"),
    "version 1": (head(0, 0, b"", 1), "it is of version 1. Convert it"),
    "version 9": (head(0, 0, b"", 9), "it is of version 9. Read are 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "in big endian"),
    "terabytes of tensors": (head(1 << 60, 0, b""), "the number of tensors is 1,152,921,504,606,846,976, and"),
    "terabytes of metadata": (head(0, 1 << 40, b""), "the number of metadata is"),
    "more tensors than are read": (head(1 << 19, 0, bytes(24 << 19)), "more than 262,144 are not read"),
    "a key of terabytes": (head(0, 1, struct.pack("<Q", 1 << 62) + bytes(9)), "the length of a key of the metadata is"),
    "a text of terabytes": (head(0, 1, text("k") + struct.pack("<IQ", TEXT, 2**64 - 1)), "the length of the metadata"),
    "a list of terabytes": (
        head(0, 1, text("k") + struct.pack("<IIQ", LIST, U64, 1 << 61)),
        "the length of the metadata 'k' is",
    ),
    "texts that end": (
        head(0, 1, text("k") + struct.pack("<IIQ", LIST, TEXT, 17) + bytes(128) + struct.pack("<Q", 99)),
        "needs 99",
    ),
    "lists in lists": (deep(30), "more than 4 deep"),
    "a key twice": (head(0, 2, TWICE * 2), "'k' stands twice"),
    "a key that is no text": (head(0, 1, struct.pack("<Q", 1) + b"\xff" + bytes(9)), "no UTF-8"),
    "neither true nor false": (head(0, 1, text("k") + struct.pack("<IB", BOOL, 7)), "true or false and is 7"),
    "an unknown metadata type": (head(0, 1, text("k") + struct.pack("<IQ", 13, 7)), "type 13"),
    "a list of an unknown type": (head(0, 1, text("k") + struct.pack("<IIQ", LIST, 99, 0)), "a list of the type 99"),
    "no alignment": (head(0, 1, text("general.alignment") + struct.pack("<II", U32, 0)), "alignment has to be"),
    "odd alignment": (head(0, 1, text("general.alignment") + struct.pack("<II", U32, 24)), "power of two and is 24"),
    "alignment in words": (
        head(0, 1, text("general.alignment") + struct.pack("<I", TEXT) + value_bytes(TEXT, "many")),
        "power of two and is many",
    ),
    "a tensor twice": (head(2, 0, entry("W", (1,), 0, 0) * 2 + bytes(64)), "'W' stands in it twice"),
    "an unknown type": (one(code=99), "'W' has the type 99, which is not known. Known are F32"),
    "five dimensions": (one(sizes=(1, 1, 1, 1, 2)), "has 5 dimensions"),
    "sizes beyond counting": (one(sizes=(1 << 62, 1 << 62)), "more than there can be"),
    "nothing times beyond counting": (one(sizes=(1 << 63, 0), data=0), "more than there can be"),
    "a tensor of terabytes": (one(sizes=(1 << 42,)), "it is cut off"),
    "half a block": (one(sizes=(33,), code=8), "'W' is Q8_0 and has rows of 33, no multiple of 32"),
    "out of line": (one(start=3), "starts at 3, no multiple of the alignment 32"),
    "a hole": (one(start=64, data=100), "leaves 64 bytes before it"),
    "far out": (one(start=(1 << 64) - 32), "leaves 18,446,744,073,709,551,584 bytes before it"),
    "one over the other": (
        head(2, 0, entry("a", (8,), 0, 0) + entry("b", (16,), 0, 0) + bytes(128)),
        "'b' lies over 'a'",
    ),
    "cut off": (one(data=7), "it is cut off"),
}


@pytest.mark.parametrize(("content", "words"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert words in str(raised.value) and str(path) in str(raised.value)
    assert str(raised.value).endswith(".")


def test_every_cut_of_a_file_is_noticed(tmp_path: Path) -> None:
    tensors = {"W": ("Q8_0", [1, 32], random_blocks("Q8_0", 1)), "b": as_stored(torch.ones(8))}
    whole = gguf_file(tensors, {"k": (LIST, (TEXT, ["a", "b"])), "n": (U32, 1)})
    path = tmp_path / "m.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    path.write_bytes(whole)
    open_checkpoint(path).close()


def test_a_header_longer_than_one_reading_is_read(tmp_path: Path) -> None:
    words = [f"word {i}" * 40 for i in range(6000)]
    metadata = {"tokens": (LIST, (TEXT, words)), "after": (TEXT, "x" * 2_000_000)}
    with open_checkpoint(written(tmp_path / "m.gguf", {"W": as_stored(torch.ones(2))}, metadata)) as model:
        assert model.metadata == {"tokens": "6000 texts", "after": "2000000 bytes of text"}
        assert torch.equal(model.tensor("W"), torch.ones(2))


def test_a_file_that_shrinks_while_it_is_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", {"W": ("Q8_0", [64, 32], random_blocks("Q8_0", 64))})
    with open_checkpoint(path) as model:
        os.truncate(path, 512)
        with pytest.raises(CheckpointError, match="became shorter"):
            model.tensor("W")


ONE, TWO = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"


def test_a_folder_with_one_model_opens_it(tmp_path: Path) -> None:
    written(tmp_path / "any name.gguf", {"W": as_stored(torch.ones(2))})
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as model:
        assert [file.name for file in model.files] == ["any name.gguf"]


def test_a_split_model_is_one(tmp_path: Path) -> None:
    written(tmp_path / ONE, {"a": as_stored(torch.ones(2))}, {"general.name": (TEXT, "m")})
    with pytest.raises(CheckpointError, match=rf"1 of 2 shards; missing is '{TWO}'"):
        open_checkpoint(tmp_path)
    written(tmp_path / TWO, {"b": as_stored(torch.zeros(2))})
    with open_checkpoint(tmp_path) as model:
        assert model.names() == ["a", "b"] and model.metadata == {"general.name": "m"}
        assert torch.equal(model.tensor("b"), torch.zeros(2))


def test_a_folder_with_several_models_is_refused(tmp_path: Path) -> None:
    for name in ("m-Q4.gguf", "m-Q8.gguf"):
        written(tmp_path / name, {"W": as_stored(torch.ones(2))})
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models, 'm-Q4\.gguf', 'm-Q8\.gguf'; give the path"):
        open_checkpoint(tmp_path)
    (tmp_path / "m-Q8.gguf").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin and 'm-Q4\.gguf'; give the path"):
        open_checkpoint(tmp_path)


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    path = written(tmp_path / "misnamed.safetensors", {"W": as_stored(torch.ones(2))})
    with open_checkpoint(path) as model:
        assert torch.equal(model.tensor("W"), torch.ones(2))


def test_quantised_models_are_merged_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    raws = [random_blocks("Q8_0", 4, seed) for seed in range(3)]
    paths = [written(tmp_path / f"{i}.gguf", {"W": ("Q8_0", [4, 32], raw)}) for i, raw in enumerate(raws)]
    values = []
    for path in paths:
        with open_checkpoint(path) as model:
            values.append(model.tensor("W"))
    told = merge_checkpoints(paths[0], paths[1:], tmp_path / "out", method="linear")
    with open_checkpoint(told.folder) as merged:
        assert merged.dtype("W") == torch.float32
        assert torch.allclose(merged.tensor("W"), (values[1] + values[2]) / 2, atol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_bit_for_bit_those_of_the_formats_own_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    raw = np.frombuffer(random_blocks(kind, 500), dtype=np.uint8).reshape(500, -1)
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(-1)
    ours = dequantize(torch.from_numpy(raw.copy()).view(-1), kind).numpy()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.peers
def test_a_file_of_the_formats_own_writer_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("words", ["a", "b"])
    writer.add_tensor("plain", x)
    packed = gguf.quantize(x, gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "m.gguf") as model:
        assert json.loads(model.metadata["words"]) == ["a", "b"]
        assert model.metadata["general.architecture"] == "llama"
        assert np.array_equal(model.tensor("plain").numpy(), x)
        theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q5_1)
        assert model.shape("packed") == (3, 64) and np.array_equal(model.tensor("packed").numpy(), theirs)
