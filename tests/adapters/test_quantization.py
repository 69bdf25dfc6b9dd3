"""Weights in eight bits: half a step of error, and exact where exactness is possible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.adapters import dequantize, quantize
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
