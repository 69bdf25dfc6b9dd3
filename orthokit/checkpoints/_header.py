"""The header of a safetensors file, read and checked before anything trusts it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from orthokit.errors import CheckpointError

__all__ = ["CODES", "DTYPES", "LARGEST", "Header", "Place", "encode_header", "read_header"]

#: The types of the format that torch has, by the format's name.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

# Of the format: 8 bytes of length, and a bound on what a reader has to take into memory before it knows anything.
_LENGTH, _LONGEST = 8, 100_000_000
#: What torch can count to: sizes of a tensor, and how many numbers it has.
LARGEST = 2**63 - 1
_AGAIN = "Copy or download the file again."


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Args:
        file: The file.
        dtype: Its type, as it is read.
        shape: Its shape.
        start: Its first byte, counted from the start of the file; -1 where torch itself finds it.
        bytes: How many bytes it has in the file.
        stored: How the file keeps it, where that is not as a plain row of numbers of the type.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int
    stored: str | None = None


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        places: By name, in the order of the bytes.
        metadata: The text beside the tensors.
        text: The header as it stands in the file.
        held: Tensors that are there without reading, since torch has mapped the file.
    """

    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    text: bytes
    held: Mapping[str, Tensor] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; nothing else of it is touched.

    Args:
        path: The file.

    Returns:
        The header: every tensor lies inside the file, none over another, and its bytes are those of its shape.

    Raises:
        CheckpointError: It cannot be read, is cut off, or its header lies.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(_LENGTH)
            if len(start) < _LENGTH:
                _refuse(path, f"it begins with 8 bytes of length and this one has {size} in all", _what(start))
            length = int.from_bytes(start, "little")
            if length > min(size - _LENGTH, _LONGEST):
                _refuse(path, f"its header claims {length:,} bytes and the file has {size:,}", _what(start))
            text = stream.read(length)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror or cause}. Check the path.") from cause
    if len(text) < length:
        _refuse(path, f"its header ends after {len(text):,} of {length:,} bytes", _AGAIN)
    return Header(*_checked(path, _parsed(path, text), _LENGTH + length, size), text)


def _what(start: bytes) -> str:
    """A guess what a file is that is no safetensors file."""
    if start.startswith(b"version"):
        return "It is a Git LFS pointer, not the file that it stands for: fetch that (git lfs pull)."
    if start.startswith(b"\x80"):
        return "It looks like a plain pickle, which could run code and is never read: write it with safetensors."
    return f"It is no safetensors file. {_AGAIN}"


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name!r:.80} stands in it twice")
            found[name] = value
        return found

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        values = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except (ValueError, RecursionError) as cause:
        _refuse(path, f"its header is no valid JSON ({cause})", _AGAIN)
    return values


def _checked(path: Path, values: dict[str, Any], data: int, size: int) -> tuple[dict[str, Place], dict[str, str]]:
    metadata = values.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its metadata are no names with texts", _AGAIN)
    places = {name: _place(path, name, fields, data) for name, fields in values.items()}
    ordered = sorted(places.items(), key=lambda item: (item[1].start, item[1].bytes))
    end, before = data, None
    for name, place in ordered:
        if place.start != end:
            found = f"lies over {before!r}" if place.start < end else f"leaves {place.start - end:,} bytes before it"
            _refuse(path, f"the bytes of its tensors have to follow each other, and {name!r} {found}", _AGAIN)
        end, before = place.start + place.bytes, name
    if end != size:
        found = "it is cut off" if size < end else "something stands behind its tensors"
        _refuse(path, f"its header describes {end:,} bytes and the file has {size:,}: {found}", _AGAIN)
    return dict(ordered), metadata


def _place(path: Path, name: str, fields: Any, data: int) -> Place:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"the entry of {name!r} has to have dtype, shape and data_offsets, and is {fields!r:.80}", _AGAIN)
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{name!r} has the shape {shape!r:.80} and the offsets {offsets!r:.80}", _AGAIN)
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        todo = f"Known are {', '.join(DTYPES)}; write the tensor in one of them."
        _refuse(path, f"{name!r} has the type {fields['dtype']!r:.40}, which torch has no tensors of", todo)
    if math.prod(max(one, 1) for one in shape) > LARGEST:
        _refuse(path, f"{name!r} has the shape {shape!r:.80}, more than there can be", _AGAIN)
    dtype = DTYPES[fields["dtype"]]
    need, found = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if need != found:
        _refuse(path, f"{name!r} of the shape {shape!r:.80} needs {need:,} bytes and has {found:,}", _AGAIN)
    return Place(path, dtype, tuple(shape), data + offsets[0], found)


def _counts(values: Any) -> bool:
    # bool is an int in Python, and JSON has true.
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse(path: Path, found: str, todo: str) -> NoReturn:
    raise CheckpointError(f"{path} is no whole safetensors file: {found}. {todo}") from None


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file that holds ``tensors``, and where in the file each starts.

    Args:
        tensors: By name, type and shape.
        metadata: Text beside them.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    # Wide types first: every tensor then starts at a multiple of its own width.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        starts[name], size = end, math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    offset = _LENGTH + len(text)
    return len(text).to_bytes(_LENGTH, "little") + text, {name: offset + start for name, start in starts.items()}
