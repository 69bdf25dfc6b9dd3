"""The rounding error of a tensor as a file keeps it: against errors that were really made, type by type."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import TYPES, gguf_file
from safetensors.torch import save_file
from torch import Tensor

from orthokit.checkpoints import Checkpoint, open_checkpoint
from orthokit.checkpoints._gguf_blocks import BLOCKS, block_rounding, dequantize
from orthokit.errors import CheckpointError, UnknownNameError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
# By type: where the half-precision scales stand, the low bits of the numbers, their high bits; how many bits are low.
LAYOUT = {
    "Q4_0": ((0,), (2, 18), None, 4),
    "Q4_1": ((0, 2), (4, 20), None, 4),
    "Q5_0": ((0,), (6, 22), (2, 6), 4),
    "Q5_1": ((0, 2), (8, 24), (4, 8), 4),
    "Q8_0": ((0,), (2, 34), None, 8),
    "Q2_K": ((80, 82), (16, 80), None, 2),
    "Q3_K": ((108,), (32, 96), (0, 32), 2),
    "Q4_K": ((0, 2), (16, 144), None, 4),
    "Q5_K": ((0, 2), (48, 176), (16, 48), 4),
    "Q6_K": ((208,), (0, 128), (128, 192), 4),
}
LEVELS = {"Q2_K": 4, "Q3_K": 8, "Q5_0": 32, "Q5_1": 32, "Q5_K": 32, "Q6_K": 64, "Q8_0": 256}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def all_at_level(blocks: np.ndarray, kind: str, level: int) -> Tensor:
    """What the blocks stand for, were each of their whole numbers ``level``."""
    _, (first, last), high, bits = LAYOUT[kind]
    blocks = blocks.copy()
    low = level & ((1 << bits) - 1)
    blocks[:, first:last] = {8: low, 4: low * 0x11, 2: low * 0x55}[bits]
    if high is not None:
        rest = level >> bits
        blocks[:, high[0] : high[1]] = rest * 0x55 if kind == "Q6_K" else rest * 0xFF
    return dequantize(torch.from_numpy(blocks).view(-1), kind)


def blocks_of_random_scales(kind: str, count: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (count, TYPES[kind][2]), dtype=np.uint8)
    for at in LAYOUT[kind][0]:
        blocks[:, at : at + 2] = draw.standard_normal(count).astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks


def test_plain_types_have_the_error_of_their_rounding(tmp_path: Path) -> None:
    W = 0.02 * gaussian(200, 150)
    save_file({str(dtype): W.to(dtype) for dtype in FLOATS}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as model:
        for dtype in FLOATS[1:]:
            made = rms(W - W.to(dtype).double())
            assert model.rounding(str(dtype)) == pytest.approx(made, rel=0.1 if dtype.itemsize == 1 else 0.03)
        assert 0 < model.rounding("torch.float64") < 1e-18
        there = model.tensor("torch.bfloat16")
        expected = model.rounding("torch.bfloat16")
    # What is at hand is not read again: the file is closed by now.
    assert model.rounding("torch.bfloat16", tensor=there) == expected
    with pytest.raises(CheckpointError, match="was closed"):
        model.rounding("torch.bfloat16")


def test_whole_numbers_zeros_and_nothing_are_exact(tmp_path: Path) -> None:
    tensors = {"i": torch.arange(6), "b": torch.tensor([True, False]), "z": torch.zeros(3, 3), "e": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as model:
        assert [model.rounding(name) for name in tensors] == [0, 0, 0, 0]
        with pytest.raises(UnknownNameError):
            model.rounding("W")


def test_scalars_rows_and_files_of_torch_have_one_too(tmp_path: Path) -> None:
    torch.save({"x": torch.tensor(1.0), "v": torch.full((5,), 4.0), "T": torch.ones(2, 3).half().T}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as model:
        for name, ulp in {"x": 2**-23, "v": 2**-21, "T": 2**-10}.items():
            assert model.rounding(name) == pytest.approx(ulp / math.sqrt(12))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_have_the_error_of_taking_the_nearest_of_their_levels(kind: str) -> None:
    """Numbers anywhere between the ends of the levels; 20,000 and more know their mean square to 2 %."""
    blocks = blocks_of_random_scales(kind, 20480 // BLOCKS[kind].numbers)
    levels = torch.stack([all_at_level(blocks, kind, level) for level in range(LEVELS.get(kind, 16))]).double()
    # As int8 the numbers of Q8_0 run through 0.
    lowest, highest = levels.amin(0), levels.amax(0)
    share = torch.rand(levels.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = lowest + share * (highest - lowest)
    made = rms((levels - numbers).abs().amin(0))
    found = block_rounding(torch.from_numpy(blocks).view(-1), kind)
    assert found == pytest.approx(made, rel=0.05)


def opened(path: Path, kind: str, blocks: np.ndarray) -> Checkpoint:
    path.write_bytes(gguf_file({"W": (kind, [len(blocks), BLOCKS[kind].numbers], blocks.tobytes())}))
    return open_checkpoint(path)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_blocks_are_counted_over_all_steps_of_the_computing(tmp_path: Path, kind: str) -> None:
    blocks = blocks_of_random_scales(kind, (1 << 18) // BLOCKS[kind].numbers + 5)
    steps = all_at_level(blocks, kind, 1).double() - all_at_level(blocks, kind, 0).double()
    with opened(tmp_path / "m.gguf", kind, blocks) as model:
        assert model.rounding("W") == pytest.approx(rms(steps) / math.sqrt(12), rel=1e-5)


def test_a_scale_that_is_no_number_counts_as_none(tmp_path: Path) -> None:
    blocks = blocks_of_random_scales("Q4_0", 4)
    with opened(tmp_path / "a.gguf", "Q4_0", blocks[2:]) as model:
        half = model.rounding("W")
    blocks[:2, :2] = np.array([[math.nan], [math.inf]], dtype="<f2").view(np.uint8)
    with opened(tmp_path / "b.gguf", "Q4_0", blocks) as model:
        assert model.rounding("W") == pytest.approx(half / math.sqrt(2))


def test_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_file({"a": ("IQ4_NL", [2, 32], bytes(36))}))
    with (
        open_checkpoint(tmp_path / "m.gguf") as model,
        pytest.raises(CheckpointError, match="IQ4_NL, which is not read"),
    ):
        model.rounding("a")


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])  # the ones that the package writes
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_what_the_formats_own_package_quantises_has_the_error_that_is_told(
    tmp_path: Path, kind: str, spread: float
) -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    draw = np.random.default_rng(0)
    W = 0.02 * draw.standard_normal((256, 512)) * np.exp(spread * draw.standard_normal((256, 1)))
    W = W.astype(np.float32)
    packed = gguf.quantize(W, gguf.GGMLQuantizationType[kind])
    made = rms(torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]) - W))
    (tmp_path / "m.gguf").write_bytes(gguf_file({"W": (kind, W.shape, packed.tobytes())}))
    with open_checkpoint(tmp_path / "m.gguf") as model:
        assert model.rounding("W") == pytest.approx(made, rel=0.15)
