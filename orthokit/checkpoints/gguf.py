"""The header of a GGUF file, read by hand and checked before anything trusts it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import IO, NoReturn

import torch

from orthokit.checkpoints._gguf_blocks import BLOCKS
from orthokit.checkpoints._header import LARGEST, Header, Place
from orthokit.errors import CheckpointError

__all__ = ["MAGIC", "read_gguf"]

#: How a file of the format begins.
MAGIC = b"GGUF"

_AGAIN = "Copy or download the file again."

# By the format's number: the types that are as torch has them.
_PLAIN: dict[int, tuple[str, torch.dtype]] = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    24: ("I8", torch.int8),
    25: ("I16", torch.int16),
    26: ("I32", torch.int32),
    27: ("I64", torch.int64),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
_QUANTISED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"}
_QUANTISED |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
# Name, numbers and bytes of a block: enough to know where the tensors lie, so that the others can be read.
_UNREAD: dict[int, tuple[str, int, int]] = {
    9: ("Q8_1", 32, 36),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# Metadata: the numbers of fixed width by their code, as struct writes them; then the truth values, texts and lists.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_TRUTH, _TEXT, _LIST = 7, 8, 9

# The longest header that is taken into memory (vocabularies of a quarter of a million words need 20 MB) and the most
# entries in it (each becomes objects of Python's, of several times its bytes); how deep lists may lie in lists, the
# dimensions that the format allows, and how long a list metadata show.
_LONGEST, _MOST, _DEEPEST, _DIMENSIONS, _SHOWN = 100_000_000, 1 << 18, 4, 4, 16
_CHUNK = 1 << 20


def read_gguf(path: Path) -> Header:
    """Read and check the header of a GGUF file of version 2 or 3; nothing else of it is touched.

    Args:
        path: The file.

    Returns:
        The header: every tensor lies inside the file, none over another, and its bytes are those of its shape. Shapes
        are as torch has them, so ``(out, in)`` for a matrix: the format itself names the length of a row first.

    Raises:
        CheckpointError: It cannot be read, is cut off, of another version, or its header lies.

    References:
        GGML, "GGUF", docs/gguf.md of the repository ggml-org/ggml. Stricter than that text where the format's own
        reader is: the tensors follow each other, with nothing but padding between them.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            return _read(_Cursor(path, stream, size))
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror or cause}. Check the path.") from cause


class _Cursor:
    """A place in a header that is brought into memory as far as it is needed, and never past the file's end."""

    def __init__(self, path: Path, stream: IO[bytes], size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._stream, self._buffer = stream, bytearray()

    @property
    def left(self) -> int:
        """How many bytes the file has from here on."""
        return self.size - self.at

    def refuse(self, found: str, todo: str = _AGAIN) -> NoReturn:
        """Say what is wrong with the file."""
        raise CheckpointError(f"{self.path} is no whole GGUF file: {found}. {todo}") from None

    def need(self, count: int, what: str) -> None:
        """Have the next ``count`` bytes in memory."""
        end = self.at + count
        if end <= len(self._buffer):
            return
        if count > self.left:
            self.refuse(f"{what} needs {count:,} bytes at byte {self.at:,} and the file has {self.size:,}")
        if end > _LONGEST:
            self.refuse(f"its header is longer than {_LONGEST:,} bytes (at {what})")
        while len(self._buffer) < end:
            more = self._stream.read(max(end - len(self._buffer), _CHUNK))
            if not more:
                self.refuse(f"it ends in {what}")
            self._buffer += more

    def number(self, code: str, what: str) -> int | float:
        """The next number, of a type that struct has a letter for."""
        width = struct.calcsize("<" + code)
        self.need(width, what)
        (value,) = struct.unpack_from("<" + code, self._buffer, self.at)
        self.at += width
        return value

    def count(self, code: str, what: str, *, smallest: int) -> int:
        """How many things of at least ``smallest`` bytes follow: no more than the file has room for."""
        value = int(self.number(code, what))
        if value * smallest > self.left:
            self.refuse(f"{what} is {value:,}, and {self.left:,} bytes follow")
        return value

    def text(self, what: str, *, exact: bool = True) -> str:
        """The next text; one that need not be exact may be no UTF-8, and is not shown if it is huge."""
        length = self.count("Q", f"the length of {what}", smallest=1)
        self.need(length, what)
        if length > _CHUNK and not exact:
            self.at += length
            return f"{length} bytes of text"
        raw = self._buffer[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8", errors="strict" if exact else "replace")
        except UnicodeDecodeError as cause:
            self.refuse(f"{what} is no UTF-8 ({cause.reason})")

    def skip(self, count: int, what: str) -> None:
        """Go on by ``count`` bytes."""
        self.need(count, what)
        self.at += count

    def skip_texts(self, count: int, what: str) -> None:
        """Go on by ``count`` texts: vocabularies have hundreds of thousands, so this is one plain loop."""
        width = struct.Struct("<Q")
        for _ in range(count):
            if self.at + 8 > len(self._buffer):
                self.need(8, what)
            (length,) = width.unpack_from(self._buffer, self.at)
            self.at += 8
            if self.at + length > len(self._buffer):
                self.need(length, what)
            self.at += length

    def seen(self) -> bytes:
        """All up to here."""
        return bytes(self._buffer[: self.at])


def _read(cursor: _Cursor) -> Header:
    cursor.need(4, "its beginning")
    cursor.skip(4, "its beginning")
    if cursor.seen() != MAGIC:
        cursor.refuse("it does not begin with 'GGUF'")
    version = int(cursor.number("I", "the version"))
    if version not in (2, 3):
        todo = "Convert it with a current llama.cpp." if version == 1 else "Read are 2 and 3, in little endian."
        big = version and not version & 0xFFFF
        cursor.refuse(f"it is {'in big endian' if big else f'of version {version}'}", todo)
    # A tensor's entry has at least a name's length, the number of its dimensions, its type and its place.
    tensors = cursor.count("Q", "the number of tensors", smallest=24)
    entries = cursor.count("Q", "the number of metadata", smallest=13)
    if max(tensors, entries) > _MOST:
        cursor.refuse(f"it claims {tensors:,} tensors and {entries:,} metadata, and more than {_MOST:,} are not read")
    metadata: dict[str, str] = {}
    for _ in range(entries):
        key = cursor.text("a key of the metadata")
        if key in metadata:
            cursor.refuse(f"{key!r:.80} stands twice in its metadata")
        metadata[key] = _value(cursor, key)
    alignment = _alignment(cursor, metadata)
    places: dict[str, Place] = {}
    for _ in range(tensors):
        name = cursor.text("the name of a tensor")
        if name in places:
            cursor.refuse(f"{name!r:.80} stands in it twice")
        places[name] = _place(cursor, name, alignment)
    data = -(-cursor.at // alignment) * alignment
    return Header(_checked(cursor, places, data, alignment), metadata, cursor.seen())


def _alignment(cursor: _Cursor, metadata: dict[str, str]) -> int:
    text = metadata.get("general.alignment", "32")
    alignment = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if alignment < 1 or alignment & (alignment - 1):
        cursor.refuse(f"its alignment has to be a power of two and is {text:.40}")
    return alignment


def _value(cursor: _Cursor, key: str) -> str:
    """A value of the metadata as text; of a long list only how long it is."""
    what = f"the metadata {key!r:.80}"
    code = int(cursor.number("I", what))
    if code == _TEXT:
        return cursor.text(what, exact=False)
    if code == _LIST:
        return _list(cursor, what, 1)
    return json.dumps(_scalar(cursor, code, what))


def _scalar(cursor: _Cursor, code: int, what: str) -> int | float | bool:
    if code == _TRUTH:
        value = cursor.number("B", what)
        if value > 1:
            cursor.refuse(f"{what} has to be true or false and is {value}")
        return bool(value)
    if code not in _NUMBERS:
        cursor.refuse(f"{what} has the type {code}, which the format does not have")
    return cursor.number(_NUMBERS[code], what)


def _list(cursor: _Cursor, what: str, depth: int) -> str:
    if depth > _DEEPEST:
        cursor.refuse(f"{what} has lists in lists, more than {_DEEPEST} deep")
    code = int(cursor.number("I", what))
    if code == _TEXT:
        count = cursor.count("Q", f"the length of {what}", smallest=8)
        if count <= _SHOWN:
            return json.dumps([cursor.text(what, exact=False) for _ in range(count)], ensure_ascii=False)
        cursor.skip_texts(count, what)
        return f"{count} texts"
    if code == _LIST:
        count = cursor.count("Q", f"the length of {what}", smallest=12)
        for _ in range(count):
            _list(cursor, what, depth + 1)
        return f"{count} lists"
    if code != _TRUTH and code not in _NUMBERS:
        cursor.refuse(f"{what} is a list of the type {code}, which the format does not have")
    width = struct.calcsize("<" + _NUMBERS.get(code, "B"))
    count = cursor.count("Q", f"the length of {what}", smallest=width)
    if count <= _SHOWN:
        return json.dumps([_scalar(cursor, code, what) for _ in range(count)])
    cursor.skip(count * width, what)
    return f"{count} numbers"


def _place(cursor: _Cursor, name: str, alignment: int) -> Place:
    """A tensor's entry; its start is counted from that of the data, which is not known yet."""
    what = f"the entry of {name!r:.80}"
    many = int(cursor.number("I", what))
    if many > _DIMENSIONS:
        cursor.refuse(f"{name!r:.80} has {many:,} dimensions, and the format at most {_DIMENSIONS}")
    sizes = [int(cursor.number("Q", what)) for _ in range(many)]
    code, start = int(cursor.number("I", what)), int(cursor.number("Q", what))
    shape = tuple(reversed(sizes))
    # Sizes of 0 hide the others from the product, and torch counts in 63 bits.
    if math.prod(max(one, 1) for one in shape) > LARGEST:
        cursor.refuse(f"{name!r:.80} has the shape {shape}, more than there can be")
    if start % alignment:
        cursor.refuse(f"{name!r:.80} starts at {start:,}, no multiple of the alignment {alignment}")
    if code in _PLAIN:
        dtype = _PLAIN[code][1]
        return Place(cursor.path, dtype, shape, start, math.prod(shape) * dtype.itemsize)
    if code in _QUANTISED:
        kind = _QUANTISED[code]
        numbers, width = BLOCKS[kind].numbers, BLOCKS[kind].bytes
    elif code in _UNREAD:
        kind, numbers, width = _UNREAD[code]
    else:
        known = [entry[0] for entry in _PLAIN.values()] + list(_QUANTISED.values())
        cursor.refuse(f"{name!r:.80} has the type {code}, which is not known", f"Known are {', '.join(known)}.")
    row = shape[-1] if shape else 1
    if row % numbers:
        cursor.refuse(f"{name!r:.80} is {kind} and has rows of {row:,}, no multiple of {numbers}")
    return Place(cursor.path, torch.float32, shape, start, math.prod(shape) // numbers * width, kind)


def _checked(cursor: _Cursor, places: dict[str, Place], data: int, alignment: int) -> dict[str, Place]:
    """Where the tensors lie, in that order, once it is sure that they are in the file and follow each other."""
    ordered: dict[str, Place] = {}
    end, before = data, None
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].bytes)):
        start, expected = data + place.start, -(-end // alignment) * alignment
        if start != expected:
            found = f"lies over {before!r:.80}" if start < expected else f"leaves {start - expected:,} bytes before it"
            cursor.refuse(f"its tensors have to follow each other, and {name!r:.80} {found}")
        ordered[name] = replace(place, start=start)
        end, before = start + place.bytes, name
    if ordered and end > cursor.size:
        cursor.refuse(f"its header describes {end:,} bytes and the file has {cursor.size:,}: it is cut off")
    return ordered
