r"""The numbers that the blocks of GGUF stand for.

A quantised row is cut into blocks of 32 or 256 numbers. A block holds small whole numbers ``q`` and a scale ``d`` in
half precision, some also a minimum; those of 256 ("K") have a scale of a few bits for every 16 or 32 numbers besides:

.. math:: y = d \cdot s \cdot q - d_{\min} \cdot m

Each function takes the blocks as rows of bytes and gives the numbers as rows of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["BLOCKS", "Block", "block_rounding", "dequantize"]

# Numbers at a time: what a step needs besides its result stays in the caches.
_STEP = 1 << 18


@dataclass(frozen=True)
class Block:
    """How a quantised type is laid out.

    Args:
        numbers: In a block.
        bytes: Of a block.
        read: From blocks to numbers.
        steps: From blocks to the distances of neighbouring levels ``d s``, ``(blocks, parts)`` for parts of equal size.
    """

    numbers: int
    bytes: int
    read: Callable[[Tensor], Tensor]
    steps: Callable[[Tensor], Tensor]


def dequantize(raw: UInt8[Tensor, " bytes"], kind: str) -> Float[Tensor, " numbers"]:
    """The numbers of a row of blocks.

    Args:
        raw: Whole blocks, one after the other.
        kind: One of :data:`BLOCKS`.

    Returns:
        float32, as many as the blocks hold.
    """
    block = BLOCKS[kind]
    blocks = raw.view(-1, block.bytes)
    result = torch.empty(len(blocks), block.numbers)
    step = _STEP // block.numbers
    for start in range(0, len(blocks), step):
        result[start : start + step] = block.read(blocks[start : start + step])
    return result.view(-1)


def block_rounding(raw: UInt8[Tensor, " bytes"], kind: str) -> float:
    """The error that the numbers of a row of blocks have because they were rounded to levels, root mean square.

    Args:
        raw: Whole blocks, one after the other.
        kind: One of :data:`BLOCKS`.

    Returns:
        Root of the mean of ``step^2 / 12``: errors uniform within half a step; 0 for no blocks, and for those whose
        scale is not finite.
    """
    block = BLOCKS[kind]
    blocks = raw.view(-1, block.bytes)
    if len(blocks) == 0:
        return 0.0
    total, step = 0.0, _STEP // block.numbers
    for start in range(0, len(blocks), step):
        steps = torch.nan_to_num(block.steps(blocks[start : start + step]).double(), nan=0.0, posinf=0.0, neginf=0.0)
        total += steps.square_().mean(1).sum().item()
    return math.sqrt(total / (12 * len(blocks)))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The half-precision number at a place of each block."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(qs: Tensor) -> Tensor:
    """The lower halves of the bytes, then the upper ones."""
    return torch.cat((qs & 15, qs >> 4), dim=-1)


def _fifth_bits(qh: Tensor) -> Tensor:
    """32 bits out of 4 bytes, each as 0 or 16."""
    bits = (qh.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1) << 4


def _first(blocks: Tensor) -> Tensor:
    """The scale of blocks that begin with their only one."""
    return _half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (q.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * q.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _pairs_of_bits(qs: Tensor) -> Tensor:
    """2 bits each out of 64 bytes: ``(blocks, half, shift, 32)``, in the order of the numbers."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    return (qs.view(-1, 2, 1, 32) >> shifts) & 3


def _q2_k_steps(blocks: Tensor) -> Tensor:
    return _half(blocks, 80) * (blocks[:, :16] & 15).float()


def _q2_k(blocks: Tensor) -> Tensor:
    scale, q = _q2_k_steps(blocks), _pairs_of_bits(blocks[:, 16:80].contiguous())
    low = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return (scale.unsqueeze(-1) * q.view(-1, 16, 16).float() - low.unsqueeze(-1)).flatten(1)


def _q3_k_steps(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    two = (packed[:, None, 8:] >> torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)) & 3
    scales = (_nibbles(packed[:, :8]) | (two.flatten(1) << 4)).float() - 32
    return _half(blocks, 108) * scales


def _q3_k(blocks: Tensor) -> Tensor:
    low = _pairs_of_bits(blocks[:, 32:96].contiguous())
    # One bit of each of 32 bytes for every 32 numbers; where it is not set, 4 is taken off.
    high = (blocks[:, None, :32] >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1
    q = (low.reshape(-1, 8, 32) | (high << 2)).float() - 4
    return (_q3_k_steps(blocks).unsqueeze(-1) * q.view(-1, 16, 16)).flatten(1)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits out of 12 bytes."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), dim=1)
    minima = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), dim=1)
    return scales.float(), minima.float()


def _eight_steps(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _scales_and_minima(blocks[:, 4:16])[0]


def _scaled_by_eight(blocks: Tensor, q: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale, low = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scale.unsqueeze(-1) * q.view(-1, 8, 32).float() - low.unsqueeze(-1)).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_by_eight(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1
    return _scaled_by_eight(blocks, low | (high << 4))


def _q6_k_steps(blocks: Tensor) -> Tensor:
    return _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    q = (low | (_pairs_of_bits(blocks[:, 128:192].contiguous()) << 4)).float() - 32
    return (_q6_k_steps(blocks).unsqueeze(-1) * q.view(-1, 16, 16)).flatten(1)


#: The quantised types that are read, by the format's name.
BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18, _q4_0, _first),
    "Q4_1": Block(32, 20, _q4_1, _first),
    "Q5_0": Block(32, 22, _q5_0, _first),
    "Q5_1": Block(32, 24, _q5_1, _first),
    "Q8_0": Block(32, 34, _q8_0, _first),
    "Q2_K": Block(256, 84, _q2_k, _q2_k_steps),
    "Q3_K": Block(256, 110, _q3_k, _q3_k_steps),
    "Q4_K": Block(256, 144, _q4_k, _eight_steps),
    "Q5_K": Block(256, 176, _q5_k, _eight_steps),
    "Q6_K": Block(256, 210, _q6_k, _q6_k_steps),
}
