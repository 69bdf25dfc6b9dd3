"""Weights in eight and four bits: half a step of error, and exact where exactness is possible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.adapters import dequantize, quantize
from orthokit.adapters.quantization import (
    dequantize_int8,
    dequantize_nf4,
    dequantize_scales,
    group_absmax,
    nf4_levels,
    quantize_int8,
    quantize_nf4,
    quantize_scales,
)
from orthokit.errors import OptionError, ShapeError


def matrix(rows, columns, *, shift=0.0, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    group=st.integers(2, 20),
    shift=st.sampled_from([0.0, 5.0, -300.0]),
    seed=st.integers(0, 50),
)
def test_no_entry_is_off_by_more_than_half_a_step(rows, columns, group, shift, seed):
    W = matrix(rows, columns, shift=shift, seed=seed)
    codes, scale, zero = quantize(W, group_size=group)
    error = (dequantize(codes, scale, zero, group_size=group) - W).abs().flatten()
    step = scale.repeat_interleave(group)[: W.numel()]
    # Half a step, plus float32's rounding of w / s where the range begins far from the values.
    assert bool((error <= 0.5 * step + 4 * torch.finfo(torch.float32).eps * W.abs().flatten()).all())


def test_groups_may_be_far_from_zero_which_the_published_formula_clips():
    W = torch.linspace(1.0, 1.1, 256).view(1, 256)
    assert float((dequantize(*quantize(W)) - W).abs().max()) < 0.5 * 1.1 / 255 + 1e-6


def test_what_bytes_can_hold_comes_back_exactly():
    steps = torch.randint(-128, 128, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    steps.view(2, 256)[:, 0], steps.view(2, 256)[:, 1] = -128, 127
    W = steps / 64  # steps of a power of two: no rounding anywhere
    assert torch.equal(dequantize(*quantize(W)), W)


def test_quantising_twice_changes_nothing_more():
    once = dequantize(*quantize(matrix(16, 48)))
    assert torch.allclose(dequantize(*quantize(once)), once, atol=1e-6)


@pytest.mark.parametrize("W", [torch.zeros(3, 5), torch.full((3, 5), 1e-9), torch.zeros(0, 4)])
def test_zero_tiny_and_empty_matrices(W):
    codes, scale, zero = quantize(W)
    assert torch.allclose(dequantize(codes, scale, zero), W, atol=1e-7) and codes.shape == W.shape


def test_bad_groups_are_refused():
    with pytest.raises(OptionError, match="group_size"):
        quantize(torch.zeros(2, 2), group_size=1)
    with pytest.raises(ShapeError, match="need 2 scales"):
        dequantize(torch.zeros(2, 256, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.uint8))


# The table of QLoRA, appendix E.
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_levels_of_nf4_are_the_published_ones_and_hold_0_and_1_exactly():
    levels = nf4_levels(dtype=torch.float64)
    assert torch.allclose(levels, torch.tensor(PUBLISHED_NF4, dtype=torch.float64), rtol=0, atol=2e-7)
    assert bool((levels.diff() > 0).all())
    assert [float(levels[i]) for i in (0, 7, 15)] == [-1.0, 0.0, 1.0] and not torch.signbit(levels[7])


def group_of_each_entry(per_group, columns, size):
    return per_group.repeat_interleave(size, dim=1)[:, :columns]


def nearest_level(W, absmax, size):
    """NF4 as it is defined, entry by entry, in float64."""
    scale = group_of_each_entry(absmax.double(), W.shape[1], size)
    levels = nf4_levels(dtype=torch.float64)
    return levels[(W.double()[..., None] - scale[..., None] * levels).abs().argmin(-1)] * scale


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    size=st.sampled_from([2, 3, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    exponent=st.sampled_from([-20, 0, 20]),
    transposed=st.booleans(),
    seed=st.integers(0, 50),
)
def test_symmetric_codes_are_the_nearest_ones(rows, columns, size, dtype, exponent, transposed, seed):
    W = matrix(columns, rows, seed=seed).mT if transposed else matrix(rows, columns, seed=seed)
    W = (W * 2.0**exponent).to(dtype)
    if rows > 1:
        W = torch.cat([W[:1] * 0, W[1:]])  # a row of zeros
    absmax = group_absmax(W, group_size=size)
    assert absmax.shape == (rows, -(-columns // size))
    scale = group_of_each_entry(absmax, columns, size)
    rounding = 8 * torch.finfo(torch.float32).eps
    eight = dequantize_int8(quantize_int8(W, absmax, group_size=size), absmax, group_size=size)
    assert bool(((eight - W.float()).abs() <= scale * (0.5 / 127 + rounding)).all())
    packed = quantize_nf4(W, absmax, group_size=size)
    assert packed.shape == ((rows * columns + 1) // 2,)
    four = dequantize_nf4(packed, absmax, columns=columns, group_size=size)
    best = (nearest_level(W, absmax, size) - W.double()).abs()
    # As near as the nearest level; in a tie, or within rounding of one, either will do.
    assert bool(((four.double() - W.double()).abs() <= best + scale * rounding).all())
    assert rows == 1 or not (eight[0].any() or four[0].any())


def test_the_largest_entry_of_a_group_is_exact_in_nf4():
    W = matrix(5, 33)
    absmax = group_absmax(W, group_size=8)
    error = dequantize_nf4(quantize_nf4(W, absmax, group_size=8), absmax, columns=33, group_size=8) - W
    largest = W.abs() == group_of_each_entry(absmax, 33, 8)
    assert int(largest.sum()) == 25 and float(error[largest].abs().max()) <= 1e-7 * float(absmax.max())


@given(count=st.integers(1, 33), seed=st.integers(0, 50))
def test_four_bit_codes_go_in_and_out_of_bytes(count, seed):
    codes = torch.randint(16, (1, count), generator=torch.Generator().manual_seed(seed))
    W = nf4_levels()[codes]
    one = torch.ones(1, 1)
    packed = quantize_nf4(W, one, group_size=64)
    assert torch.equal(dequantize_nf4(packed, one, columns=count, group_size=64), W)
    assert int(packed[0]) >> 4 == int(codes[0, 0])


@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    spread=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 50),
)
def test_scales_in_bytes_are_off_by_half_a_step_and_never_negative(rows, groups, scale, spread, seed):
    absmax = scale * (1 + spread * (torch.rand(rows, groups, generator=torch.Generator().manual_seed(seed)) - 1))
    codes, step, zero, mean = quantize_scales(absmax)
    found = dequantize_scales(codes, step, zero, mean)
    assert bool((found >= 0).all()) and len(step) == -(-rows * groups // 256)
    # Steps span the scales and their mean, so they are at most the widest range over 255.
    assert float((found - absmax).abs().max()) <= scale * (0.5 * spread / 255 + 3e-7)


def test_sizes_that_do_not_fit_are_refused():
    W, absmax = matrix(3, 10), torch.ones(3, 2)
    with pytest.raises(OptionError, match="group_size"):
        group_absmax(W, group_size=1)
    for call in (
        lambda: quantize_int8(W, absmax, group_size=4),
        lambda: quantize_nf4(W, absmax, group_size=4),
        lambda: dequantize_int8(torch.zeros(3, 10, dtype=torch.int8), absmax, group_size=4),
    ):
        with pytest.raises(ShapeError, match=r"groups of 4 .* \(3, 2\)"):
            call()
    with pytest.raises(ShapeError, match="15 bytes; got 14"):
        dequantize_nf4(torch.zeros(14, dtype=torch.uint8), absmax, columns=10, group_size=5)
