"""Rows, columns and rounding: against plain formulas and against errors that were really made."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.checkpoints import _rounding
from orthokit.diagnostics import entry_stats, noise_floor, rounding_noise
from orthokit.errors import DtypeError, OptionError, ShapeError

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lines_reference(norms):
    """The rule for outliers, word by word."""
    with np.errstate(divide="ignore"):
        logs = np.log(norms)
    # torch takes the lower of two medians.
    median = np.sort(logs)[(len(logs) - 1) // 2]
    deviation = 1.482602 * np.sort(np.abs(logs - median))[(len(logs) - 1) // 2]
    middle = np.sort(norms)[(len(norms) - 1) // 2]
    return int(((logs > median + 6 * deviation) & (norms >= 2 * middle)).sum()), norms.max() / middle


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 40), (40, 1)])
@pytest.mark.parametrize("step", [1 << 18, 64])
def test_norms_are_those_of_the_rows_and_columns(dtype, shape, step, monkeypatch):
    monkeypatch.setattr(_rounding, "_STEP", step)
    W = gaussian(*shape).to(dtype)
    W[0] *= 5
    found = entry_stats(W)
    exact = W.to(torch.complex128).abs().numpy() if W.is_complex() else W.double().numpy()
    assert found.frobenius == pytest.approx(np.linalg.norm(exact), rel=1e-12) and found.nonfinite == 0
    for lines, norms in ((found.rows, np.linalg.norm(exact, axis=1)), (found.columns, np.linalg.norm(exact, axis=0))):
        np.testing.assert_allclose(lines.norms.numpy(), norms, rtol=1e-12)
        assert lines.spread == pytest.approx(norms.std() / norms.mean(), rel=1e-9, abs=1e-12)
        outliers, largest = lines_reference(norms)
        assert lines.outliers == outliers and lines.largest == pytest.approx(largest, rel=1e-12)
        assert lines.top[0] == norms.argmax() and len(lines.top) == min(5, len(norms))


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-300, 1e-30, 1e30, 1e300]), rows=st.integers(2, 20))
@settings(max_examples=30)
def test_scale_changes_norms_alone_and_transposing_swaps_them(seed, scale, rows):
    W = gaussian(rows, 12, seed=seed)
    one, scaled, turned = entry_stats(W), entry_stats(scale * W), entry_stats(W.mT)
    assert scaled.frobenius == pytest.approx(scale * one.frobenius)
    assert scaled.rows.spread == pytest.approx(one.rows.spread) and scaled.rows.outliers == one.rows.outliers
    assert scaled.columns.largest == pytest.approx(one.columns.largest) and scaled.rows.top == one.rows.top
    torch.testing.assert_close(turned.columns.norms, one.rows.norms)
    assert turned.rows.top == one.columns.top


def test_outliers_are_lines_that_stick_out_and_no_others():
    W = gaussian(300, 200)
    assert (entry_stats(W).rows.outliers, entry_stats(W).columns.outliers) == (0, 0)
    W[[3, 70]] *= 12
    W[:, 9] *= 6
    found = entry_stats(W)
    assert found.rows.outliers == 2 and set(found.rows.top[:2]) == {3, 70}
    assert found.columns.outliers == 1 and found.columns.top[0] == 9
    # Equal rows but for one: any difference is many robust deviations, but less than twice the norm is no outlier.
    equal = torch.ones(20, 20)
    equal[4] *= 1.9
    assert entry_stats(equal).rows.outliers == 0
    equal[4] *= 1.1
    assert entry_stats(equal).rows.outliers == 1
    # Norms that are spread over decades, as in trained embeddings: the largest of them is none.
    assert entry_stats(W[:1] * torch.linspace(0, 4, 300).exp()[:, None]).rows.outliers == 0


def test_nan_and_infinities_are_counted_and_left_out():
    W = gaussian(40, 30).float()
    clean = W.clone()
    W[2, 3], W[2, 4], W[9, 9] = math.nan, math.inf, -math.inf
    clean[2, 3] = clean[2, 4] = clean[9, 9] = 0
    found, expected = entry_stats(W), entry_stats(clean)
    assert found.nonfinite == 3 and expected.nonfinite == 0
    torch.testing.assert_close(found.rows.norms, expected.rows.norms)
    torch.testing.assert_close(found.columns.norms, expected.columns.norms)
    assert found.frobenius == pytest.approx(expected.frobenius)
    assert entry_stats(torch.full((3, 3), math.nan)).nonfinite == 9


def test_zero_empty_and_half_zero_matrices():
    zero = entry_stats(torch.zeros(6, 4))
    assert (zero.frobenius, zero.rows.spread, zero.rows.largest, zero.rows.outliers) == (0, 0, None, 0)
    assert entry_stats(torch.zeros(0, 4)).columns.norms.tolist() == [0] * 4
    pruned = torch.zeros(9, 4)
    pruned[:4] = 1
    found = entry_stats(pruned).rows
    assert (found.largest, found.outliers, found.median) == (None, 0, 0) and found.spread > 1
    pruned[:6] = 1
    found = entry_stats(pruned).rows
    assert (found.largest, found.outliers, found.median) == (1, 0, 2)


def test_large_float32_entries_do_not_overflow_and_strides_do_not_matter():
    W = torch.full((5, 4), 3e38)
    assert entry_stats(W).frobenius == pytest.approx(3e38 * math.sqrt(20), rel=1e-6)
    base = gaussian(20, 30)
    assert entry_stats(base.mT[::2]).frobenius == pytest.approx(base[:, ::2].norm().item())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6, 1e-9])
def test_rounding_noise_is_the_error_that_rounding_makes(dtype, scale):
    """Entries that are normal, subnormal, and lost in ``dtype``; 60,000 of them know their mean square to 1 %."""
    W = scale * gaussian(300, 200)
    made = (W - W.to(dtype).double()).square().mean().sqrt().item()
    assert rounding_noise(W, dtype=dtype) == pytest.approx(made, rel=0.03)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_was_stored_tells_the_error_of_storing_it(dtype):
    W = 0.02 * gaussian(300, 200)
    stored = W.to(dtype)
    made = (W - stored.double()).square().mean().sqrt().item()
    assert rounding_noise(stored, dtype=dtype) == pytest.approx(made, rel=0.03)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(200, 200), (400, 100)])
def test_the_floor_is_the_top_singular_value_of_the_errors(dtype, shape):
    W = 0.02 * gaussian(*shape)
    error = W - W.to(dtype).double()
    floor = noise_floor(rounding_noise(W.to(dtype), dtype=dtype), shape)
    assert floor == pytest.approx(torch.linalg.matrix_norm(error, ord=2).item(), rel=0.1)


@given(st.floats(1e-300, 1e300), st.booleans())
@settings(max_examples=60)
def test_one_number_has_the_ulp_that_numpy_says(x, negative):
    W = torch.tensor([[-x if negative else x]], dtype=torch.float64)
    assert rounding_noise(W, dtype=torch.float64) == pytest.approx(np.spacing(x) / math.sqrt(12), rel=1e-12)
    if 1e-37 < x < 3e38:
        single = W.float()
        ulp = float(np.spacing(np.float32(abs(single.item()))))
        assert rounding_noise(single, dtype=torch.float32) == pytest.approx(ulp / math.sqrt(12), rel=1e-12)


def test_zeros_are_exact_and_what_is_not_finite_has_no_error():
    assert rounding_noise(torch.zeros(3, 3), dtype=torch.float16) == 0
    assert rounding_noise(torch.zeros(0, 3), dtype=torch.float16) == 0
    W = torch.tensor([0.0, 1.0, math.nan, math.inf])
    assert rounding_noise(W, dtype=torch.float32) == pytest.approx(2**-23 / math.sqrt(12 * 4))
    assert rounding_noise(torch.tensor(1.0), dtype=torch.float32) == pytest.approx(2**-23 / math.sqrt(12))
    # The distance of the smallest numbers of float16 is 2^-24, whatever their size.
    tiny = torch.tensor([2.0**-24, 2.0**-20, 2.0**-15], dtype=torch.float16)
    assert rounding_noise(tiny, dtype=torch.float16) == pytest.approx(2**-24 / math.sqrt(12))
    complex_ = torch.complex(torch.ones(2, 2), torch.ones(2, 2))
    assert rounding_noise(complex_, dtype=torch.complex64) == pytest.approx(math.sqrt(2) * 2**-23 / math.sqrt(12))


def test_bad_input_is_named(unchecked):
    with pytest.raises(ShapeError, match="one matrix"):
        entry_stats(torch.ones(2, 3, 4))
    with pytest.raises(DtypeError, match="W must be floating or complex"):
        entry_stats(torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(DtypeError, match="dtype must be floating"):
        rounding_noise(torch.ones(3), dtype=torch.int8)
    with pytest.raises(DtypeError, match="the type of W must be floating"):
        rounding_noise(torch.ones(3, dtype=torch.int8), dtype=torch.float32)
    with pytest.raises(OptionError, match="rounding must be finite"):
        noise_floor(-1.0, (3, 4))
    with pytest.raises(OptionError, match="rounding must be finite"):
        noise_floor(math.inf, (3, 4))
    with pytest.raises(ShapeError, match="sizes >= 1"):
        noise_floor(1.0, (0, 4))
