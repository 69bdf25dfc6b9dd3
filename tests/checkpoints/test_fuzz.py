"""Headers that nobody wrote: whatever the bytes, opening ends with a model or an error in words.

``ORTHOKIT_FUZZ_HEADERS`` sets how many headers of each format are tried, ``ORTHOKIT_FUZZ_SEED`` from which seed on: a
million take minutes to an hour, so by hand: ``ORTHOKIT_FUZZ_HEADERS=1000000 pytest -s tests/checkpoints/test_fuzz.py``.
"""

import io
import json
import os
import random
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import BOOL, F32, LIST, TEXT, TYPES, U32, U64, entry, gguf_file, text
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.checkpoints import open_checkpoint
from orthokit.errors import CheckpointError

HEADERS = int(os.environ.get("ORTHOKIT_FUZZ_HEADERS", "300"))
SEED = int(os.environ.get("ORTHOKIT_FUZZ_SEED", "0"))

# What memory may grow by over a run of any length: the caches of the allocators, not what a header asks for.
MEGABYTES = 256

# Where counting goes wrong: at the ends of the widths, and just beside them.
EDGES = [
    0,
    1,
    2,
    31,
    32,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def damaged(whole: bytes, draw: random.Random, words: list[bytes]) -> bytes:
    """Bytes changed, removed, doubled, cut off; whole numbers set to their edges; words of the format strewn in."""
    content = bytearray(whole)
    for _ in range(draw.choice([1, 1, 2, 3, 4])):
        at = draw.randrange(len(content) + 1)
        what = draw.randrange(7)
        if what == 0 and at < len(content):
            content[at] = draw.randrange(256)
        elif what == 1:
            content[at : at + draw.randrange(5)] = draw.choice(words)
        elif what == 2:
            del content[at : at + draw.randrange(1, 9)]
        elif what == 3:
            content[at:at] = content[at : at + draw.randrange(1, 40)]
        elif what == 4:
            width = draw.choice([1, 2, 4, 8])
            content[at : at + width] = (draw.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
        elif what == 5 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif what == 6 and draw.random() < 0.3:
            del content[at:]
    return bytes(content)


def noise(draw: random.Random, start: bytes) -> bytes:
    return start + draw.randbytes(draw.randrange(200))


SAFE_WORDS = [
    b"0",
    b"9",
    b"-1",
    b"1e9",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"null",
    b"true",
    b"NaN",
    b'"F32"',
    b'"BOOL"',
    b",",
]
SAFE = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "I8", "shape": [2, 2], "data_offsets": [8, 12]},
        "m": {"dtype": "BOOL", "shape": [1], "data_offsets": [12, 13]},
        "__metadata__": {"k": "v"},
    }
).encode()


def safetensors_header(draw: random.Random) -> bytes:
    kind = draw.randrange(10)
    if kind == 0:
        return noise(draw, b"")
    if kind == 1:  # the length fits, whatever the JSON is
        inside = damaged(SAFE, draw, SAFE_WORDS)
        return struct.pack("<Q", len(inside)) + inside + bytes(13)
    return damaged(struct.pack("<Q", len(SAFE)) + SAFE + bytes(13), draw, SAFE_WORDS)


GGUF_WORDS = [
    text("W"),
    text(""),
    struct.pack("<I", LIST),
    struct.pack("<IQ", LIST, 1),
    b"GGUF",
    entry("W", (32,), 8, 0),
]
GGUF_WORDS += [struct.pack("<I", TYPES[kind][0]) for kind in ("Q4_K", "Q8_0", "IQ4_NL", "I8")]
GGUF = gguf_file(
    {
        "W": ("Q4_0", [2, 32], bytes(36)),
        "k": ("Q6_K", [1, 256], bytes(210)),
        "b": ("F32", [2, 2], bytes(16)),
        "i": ("IQ4_NL", [1, 32], bytes(18)),
    },
    {
        "general.alignment": (U32, 32),
        "name": (TEXT, "m"),
        "yes": (BOOL, 1),
        "words": (LIST, (TEXT, ["a", "bc"])),
        "numbers": (LIST, (F32, [0.0] * 20)),
        "nested": (LIST, (LIST, [(U32, [1]), (TEXT, ["x"])])),
    },
)


def gguf_header(draw: random.Random) -> bytes:
    kind = draw.randrange(10)
    if kind == 0:
        return noise(draw, b"GGUF" + struct.pack("<I", draw.choice([1, 2, 3, 4])))
    if kind <= 2:  # every field of its own making
        return any_gguf(draw)
    return damaged(GGUF, draw, GGUF_WORDS)


def any_gguf(draw: random.Random) -> bytes:
    """Entries with the fields where they belong, and anything in them."""

    def edge() -> int:
        return draw.choice(EDGES) if draw.random() < 0.2 else draw.randrange(70)

    count, entries = draw.randrange(4), draw.randrange(3)
    content = b""
    for _ in range(entries):
        content += text(draw.choice(["a", "b", "general.alignment"])) + struct.pack("<I", draw.randrange(14))
        content += draw.choice([text("x"), struct.pack("<I", 64), struct.pack("<IQ", U64, edge()), draw.randbytes(8)])
    for _ in range(count):
        sizes = [edge() for _ in range(draw.randrange(6))]
        code = draw.choice([0, 1, 2, 8, 10, 12, 14, 16, 30, draw.randrange(50)])
        content += entry(draw.choice("abc"), sizes, code, 32 * edge() % 2**64)
    head = b"GGUF" + struct.pack("<IQQ", draw.choice([2, 3]), count, entries)
    return head + content + bytes(draw.randrange(400))


def saved(*, zipped: bool) -> bytes:
    stream = io.BytesIO()
    W = torch.ones(4, 2)
    model = {"W": W, "turned": W.T, "b": torch.ones(3, dtype=torch.bfloat16), "m": torch.ones(2, dtype=torch.bool)}
    torch.save({"epoch": 1, "model": model}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


ZIPPED, ROW = saved(zipped=True), saved(zipped=False)
with zipfile.ZipFile(io.BytesIO(ZIPPED)) as _archive:
    ENTRIES = {one.filename: _archive.read(one) for one in _archive.infolist()}
PICKLE = next(name for name in ENTRIES if name.endswith("data.pkl"))
TORCH_WORDS = [
    b".",
    b"R",
    b"K\x02\x86",
    b"(",
    b"}",
    b"q\x00",
    b"h\x00",
    b"Q",
    b"ctorch\nFloatStorage\n",
    b"\x85",
    b"0",
    b"N",
]
TORCH_WORDS += [b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"M\xff\xff", b"J\xff\xff\xff\xff"]
TORCH_WORDS += [
    b"ccollections\nOrderedDict\n",
    b"cbuiltins\nset\n",
    b"ctorch\nTensor\n",
    b"\x81",
    b"PK\x01\x02",
    b"big",
]


def torch_header(draw: random.Random) -> bytes:
    kind = draw.randrange(10)
    if kind == 0:
        return noise(draw, draw.choice([b"PK\x03\x04", ROW[:15]]))
    if kind <= 3:
        return damaged(ROW, draw, TORCH_WORDS)
    if kind <= 5:
        return damaged(ZIPPED, draw, TORCH_WORDS)
    # Its checksum is right, so that the damage reaches the unpickling.
    which = PICKLE if kind < 9 else draw.choice(list(ENTRIES))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        for name, content in ENTRIES.items():
            out.writestr(name, damaged(content, draw, TORCH_WORDS) if name == which else content)
    return stream.getvalue()


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "safetensors": safetensors_header,
    "gguf": gguf_header,
    "torch": torch_header,
}


def outcome(path: Path, content: bytes) -> str:
    """What became of a header: everything but these ends is a failure of the test."""
    path.write_bytes(content)
    try:
        model = open_checkpoint(path)
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return "refused"
    with model:
        for name in model:
            try:
                tensor = model.tensor(name)
            except CheckpointError as error:
                assert str(path) in str(error)
            else:
                assert (tuple(tensor.shape), tensor.dtype) == (model.shape(name), model.dtype(name))
    return "opened"


def peak_megabytes() -> float:
    """The most memory that this process had so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@pytest.mark.timeout(0 if HEADERS > 10_000 else 300)
@pytest.mark.parametrize("kind", MAKERS)
def test_damaged_headers_are_a_model_or_an_error_in_words(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "fuzzed"
    found: Counter[str] = Counter()
    slowest = (0.0, 0)
    for seed in range(SEED, SEED + 50):  # what is loaded on first use is no growth
        outcome(path, MAKERS[kind](random.Random(seed)))
    before, start = peak_megabytes(), time.perf_counter()
    for seed in range(SEED, SEED + HEADERS):
        content = MAKERS[kind](random.Random(seed))
        began = time.process_time()
        try:
            found[outcome(path, content)] += 1
        except Exception as error:
            pytest.fail(f"{kind}, seed {seed}: {type(error).__name__}: {error}; the bytes: {content!r}")
        slowest = max(slowest, (time.process_time() - began, seed))
    grown, seconds = peak_megabytes() - before, time.perf_counter() - start
    print(
        f"\n{kind}: {HEADERS:,} headers from seed {SEED} in {seconds:.0f} s, {dict(found)}, slowest {slowest[0]:.3f} s "
        f"(seed {slowest[1]}), memory grew by {grown:.0f} MB"
    )
    assert found["refused"] > 0 and found["opened"] > 0
    assert grown < MEGABYTES


@settings(max_examples=min(HEADERS, 1000))
@given(
    start=st.sampled_from([b"", b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0", b"PK\x03\x04", ROW[:15]]),
    rest=st.binary(max_size=300),
)
def test_any_bytes_are_an_error_in_words(start: bytes, rest: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    outcome(tmp_path_factory.getbasetemp() / "any", start + rest)


@settings(max_examples=min(HEADERS, 1000))
@given(data=st.data())
def test_any_fields_of_a_gguf_are_a_model_or_an_error_in_words(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As hypothesis draws them, which tries the simplest first and shrinks what it finds."""
    number = st.sampled_from(EDGES) | st.integers(0, 70)
    tensors = data.draw(
        st.lists(st.tuples(st.text(max_size=3), st.lists(number, max_size=5), st.integers(0, 45), number), max_size=3)
    )
    content = b"".join(entry(name, sizes, code, start) for name, sizes, code, start in tensors)
    count = data.draw(st.just(len(tensors)) | number)
    room = data.draw(st.binary(max_size=100)) + bytes(400)
    content = b"GGUF" + struct.pack("<IQQ", 3, count, 0) + content + room
    outcome(tmp_path_factory.getbasetemp() / "fields.gguf", content)
