"""GGUF files for tests: a small writer, and the meaning of each block number by number, straight from the layout."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

# By the format's name: its number, and the numbers and bytes of a block.
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ4_NL": (20, 32, 18), "I8": (24, 1, 1), "I16": (25, 1, 2),
    "I32": (26, 1, 4), "I64": (27, 1, 8), "F64": (28, 1, 8), "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54),
}  # fmt: skip

# The codes of metadata: struct's letter by the format's number.
U32, F32, BOOL, TEXT, LIST, U64 = 4, 6, 7, 8, 9, 10
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}

# A tensor: the name of its type, its shape as torch has it, its bytes.
Stored = tuple[str, Sequence[int], bytes]


def gguf_file(
    tensors: Mapping[str, Stored], metadata: Mapping[str, tuple[int, Any]] | None = None, *, version: int = 3
) -> bytes:
    """The bytes of a file."""
    metadata = metadata or {}
    alignment = int(metadata["general.alignment"][1]) if "general.alignment" in metadata else 32
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (code, value) in metadata.items():
        head += text(key) + struct.pack("<I", code) + value_bytes(code, value)
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        head += entry(name, list(reversed(shape)), TYPES[kind][0], len(data))
        data += raw + bytes(-len(raw) % alignment)
    return head + bytes(-len(head) % alignment) + data


def entry(name: str, sizes: Sequence[int], code: int, start: int) -> bytes:
    """A tensor in the header, its sizes with the length of a row first."""
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, code, start)


def text(value: str) -> bytes:
    """A text with its length."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(code: int, value: Any) -> bytes:
    """A value of the metadata; a list is a code and values."""
    if code == TEXT:
        return text(value)
    if code == LIST:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(value_bytes(inner, one) for one in values)
    return struct.pack("<" + _LETTERS[code], value)


def _half(raw: bytes, at: int) -> float:
    return struct.unpack_from("<e", raw, at)[0]


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    """Number ``j`` of the eight 6-bit scales and minima of Q4_K and Q5_K."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4)


def reference(kind: str, raw: bytes) -> list[tuple[float, float]]:
    """Each number of one block as what is added: a multiple of the scale, and what the minimum takes off or adds."""
    count = TYPES[kind][1]
    found = [(0.0, 0.0)] * count
    for i in range(count):
        j, upper = i % 16, i >= 16  # of blocks of 32: byte and half of it
        if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
            at = {"Q4_0": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8}[kind]
            q = raw[at + j] >> 4 if upper else raw[at + j] & 15
            if kind.startswith("Q5"):
                (bits,) = struct.unpack_from("<I", raw, at - 4)
                q |= (bits >> i & 1) << 4
            if kind.endswith("_0"):
                found[i] = (_half(raw, 0) * (q - (16 if kind == "Q5_0" else 8)), 0.0)
            else:
                found[i] = (_half(raw, 0) * q, _half(raw, 2))
        elif kind == "Q8_0":
            found[i] = (_half(raw, 0) * _signed(raw[2 + i]), 0.0)
        elif kind == "Q2_K":
            scale, q = raw[i // 16], raw[16 + i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3
            found[i] = (_half(raw, 80) * (scale & 15) * q, -_half(raw, 82) * (scale >> 4))
        elif kind == "Q3_K":
            q = raw[32 + i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3
            q -= 0 if raw[i % 32] >> (i // 32) & 1 else 4
            s = i // 16
            low = raw[96 + s % 8] >> 4 if s >= 8 else raw[96 + s] & 15
            scale = (low | (raw[104 + s % 4] >> (s // 4 * 2) & 3) << 4) - 32
            found[i] = (_half(raw, 108) * scale * q, 0.0)
        elif kind in ("Q4_K", "Q5_K"):
            scale, low = _scale_and_minimum(raw[4:16], i // 32)
            byte = raw[(16 if kind == "Q4_K" else 48) + i // 64 * 32 + i % 32]
            q = byte >> 4 if i // 32 % 2 else byte & 15
            if kind == "Q5_K":
                q |= (raw[16 + i % 32] >> (i // 32) & 1) << 4
            found[i] = (_half(raw, 0) * scale * q, -_half(raw, 2) * low)
        elif kind == "Q6_K":
            half, part, place = i // 128, i % 128 // 32, i % 32
            byte = raw[half * 64 + part % 2 * 32 + place]
            q = byte >> 4 if part >= 2 else byte & 15
            q |= (raw[128 + half * 32 + place] >> (part * 2) & 3) << 4
            found[i] = (_half(raw, 208) * _signed(raw[192 + i // 16]) * (q - 32), 0.0)
    return found
