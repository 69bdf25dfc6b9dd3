"""Spectra and rank summaries."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics.spectrum import effective_rank, low_rank_part, spectrum, stable_rank
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from orthokit.linalg import random_orthogonal


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(sigma, m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    s = torch.tensor(sigma, dtype=torch.float64)
    U = random_orthogonal(m, len(s), generator=g, dtype=torch.float64)
    V = random_orthogonal(n, len(s), generator=g, dtype=torch.float64)
    return (U * s) @ V.mT


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 4), (4, 1), (2, 3, 4, 5)])
def test_spectrum_equals_numpy(shape):
    W = gaussian(*shape)
    np.testing.assert_allclose(spectrum(W).numpy(), np.linalg.svd(W.numpy(), compute_uv=False), rtol=1e-12)
    assert spectrum(W.mT).shape == spectrum(W).shape  # not contiguous


@settings(max_examples=40, deadline=None)
@given(
    sigma=st.lists(st.floats(1e-3, 10), min_size=1, max_size=5), tall=st.integers(0, 4), wide=st.integers(0, 4),
    scale=st.sampled_from([1e-25, 1.0, 1e25]),
)  # fmt: skip
def test_ranks_follow_their_formulas_bounds_and_scale_invariance(sigma, tall, wide, scale):
    sigma = sorted(sigma, reverse=True)
    W = with_spectrum(sigma, len(sigma) + tall, len(sigma) + wide) * scale
    s = np.array(sigma)
    p = s / s.sum()
    assert stable_rank(W).item() == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
    # The null directions of W have singular values of 1e-16 or so; their entropy is far below the tolerance.
    assert effective_rank(W).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert 1 - 1e-9 <= stable_rank(W) <= len(sigma) + 1e-9
    assert 1 - 1e-9 <= effective_rank(W) <= len(sigma) + 1e-9


def test_hand_computed_ranks():
    W = torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    assert stable_rank(W).item() == pytest.approx(6 / 4)
    assert effective_rank(W).item() == pytest.approx(2 * math.sqrt(2))  # p = 1/2, 1/4, 1/4: entropy 1.5 log 2
    assert stable_rank(torch.eye(6)).item() == pytest.approx(6)


@pytest.mark.parametrize("rank", [stable_rank, effective_rank])
def test_zero_empty_and_batched(rank):
    W = gaussian(3, 2, 5, 4)
    W[1, 0] = 0
    values = rank(W)
    assert values.shape == (3, 2)
    assert values[1, 0] == 0
    assert values[2, 1].item() == pytest.approx(rank(W[2, 1]).item(), rel=1e-12)
    assert rank(torch.zeros(2, 0, 3)).tolist() == [0, 0]
    assert rank(W.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(rank(W.float()).double(), values, rtol=1e-5, atol=0)


def test_power_iteration_reaches_the_exact_stable_rank_from_above():
    W = with_spectrum([5.0, 3.0, 2.0, 1.0], 20, 30)
    exact = stable_rank(W)
    assert stable_rank(W, iterations=1) >= exact
    torch.testing.assert_close(stable_rank(W, iterations=200), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 5)])
def test_low_rank_part_is_the_nearest_of_its_rank(shape):
    W = gaussian(*shape)
    s = spectrum(W)
    part = low_rank_part(W, rank=2)
    torch.testing.assert_close(spectrum(part)[..., :2], s[..., :2])
    torch.testing.assert_close(torch.linalg.matrix_norm(W - part), s[..., 2:].norm(dim=-1))
    torch.testing.assert_close(low_rank_part(W, rank=min(shape[-2:])), W)


def test_bad_input_is_named(unchecked):
    for function in (spectrum, stable_rank, effective_rank):
        with pytest.raises(ShapeError, match="at least 2 dimensions"):
            function(torch.ones(3))
        with pytest.raises(DtypeError, match="int64"):
            function(torch.ones(3, 3, dtype=torch.int64))
        with pytest.raises(NonFiniteError, match="1 of its 9"):
            function(torch.diag(torch.tensor([1.0, float("nan"), 1.0])))
    for rank in (0, 4):
        with pytest.raises(OptionError, match="rank must satisfy"):
            low_rank_part(torch.eye(3), rank=rank)
    with pytest.raises(OptionError, match="iterations"):
        stable_rank(torch.eye(3), iterations=0)
