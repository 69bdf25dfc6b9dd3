"""Worst-case bounds: they always hold, and say when they say nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics.bounds import gap_theorem_bounds, gap_theorem_window, wedin_bound, weyl_bounds
from orthokit.diagnostics.momentum import effective_samples, momentum_buffers, signal_persistence
from orthokit.diagnostics.spectrum import spectrum
from orthokit.diagnostics.subspace import subspace_error
from orthokit.diagnostics.synthetic import SignalPlusPerturbation
from orthokit.errors import OptionError, ShapeError

TINY = 1e-10


# 1.6.4 and 1.6.5, on buffers
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("noise", ["iid", "arch"])
@pytest.mark.parametrize("shape", [(20, 20), (30, 12)])
def test_weyl_and_wedin_hold_for_every_buffer(beta, noise, shape):
    for seed in range(5):
        source = SignalPlusPerturbation(shape, noise=noise, sigma=0.3, seed=seed, dtype=torch.float64)
        M = momentum_buffers(source.stream(60), beta)
        A = signal_persistence(beta, steps=60) * source.signal
        N = M - A
        lower, upper = weyl_bounds(A, N)
        s = spectrum(M)
        assert (s >= lower - TINY).all()
        assert (s <= upper + TINY).all()
        assert s[3] <= torch.linalg.matrix_norm(N, ord=2) + TINY
        bound = wedin_bound(A, N, rank=3)
        if bound < 1:
            for side in ("left", "right"):
                assert subspace_error(M, source.signal, rank=3, side=side) <= bound + TINY
        else:
            assert beta < 0.9  # the bound does speak for the longer windows, so the test above runs


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 8), n=st.integers(1, 8), rank=st.integers(1, 8), seed=st.integers(0, 10**6), size=st.floats(0, 1)
)
def test_weyl_and_wedin_hold_for_any_pair(m, n, rank, seed, size):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=g, dtype=torch.float64)
    N = size * torch.randn(m, n, generator=g, dtype=torch.float64)
    rank = min(rank, m, n)
    lower, upper = weyl_bounds(A, N)
    s = spectrum(A + N)
    assert (s >= lower - TINY).all()
    assert (s <= upper + TINY).all()
    bound = wedin_bound(A, N, rank=rank)
    for side in ("left", "right"):
        assert subspace_error(A + N, A, rank=rank, side=side) <= bound + 1e-7


def test_bounds_are_attained_by_aligned_noise():
    A, N = torch.diag(torch.tensor([5.0, 1.0])), torch.diag(torch.tensor([2.0, 2.0]))
    assert weyl_bounds(A, N)[1].tolist() == spectrum(A + N).tolist()
    assert weyl_bounds(A, N)[0].tolist() == [3.0, 0.0]
    assert wedin_bound(A, N, rank=1).item() == pytest.approx(2 / (5 - 1 - 2))
    assert wedin_bound(A, N, rank=2).item() == math.inf


def test_bounds_broadcast_over_a_batch_of_noise():
    A, N = torch.eye(4), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert weyl_bounds(A, N)[0].shape == (3, 2, 4)
    assert wedin_bound(A, 0.1 * N, rank=4).shape == (3, 2)


def test_the_gap_theorem_holds_with_its_probability_when_it_speaks():
    shape, sigma, steps, trials = (6, 5), 0.02, 400, 40
    strengths, eta = [1.0, 0.8], 0.02**2 * 30
    betas = [0.5, 0.9, 0.97]
    bounds = gap_theorem_bounds(strengths, eta, betas, steps=steps)
    assert not bounds.vacuous.any()
    assert not bounds.sine_vacuous.any()
    held = torch.zeros(3)
    for seed in range(trials):
        source = SignalPlusPerturbation(shape, strengths=strengths, sigma=sigma, noise="arch", seed=seed)
        M = source.final_buffers(betas, [sigma], steps=steps)[:, 0]
        s = spectrum(M).double()
        error = subspace_error(M, source.signal, rank=2).double()
        ok = (s[:, :2] >= bounds.head).all(1) & (s[:, 2] <= bounds.tail) & (error <= bounds.sine)
        held += ok & (s[:, 1] - s[:, 2] >= bounds.gap)
    assert (held / trials >= bounds.probability).all()


def test_the_gap_theorem_says_nothing_at_the_published_size():
    bounds = gap_theorem_bounds([12.0, 8.0, 5.0], 100.0 * 100, [0.0, 0.9, 0.995])
    assert bounds.vacuous.all()
    assert bounds.sine_vacuous.all()
    assert bounds.head.shape == (3, 3)
    window = gap_theorem_window(5.0, eta=100.0 * 100)
    assert window == pytest.approx(1.28e6, rel=0.001)
    for factor, vacuous in ((0.99, True), (1.01, False)):
        beta = 1 - 1 / (factor * window)
        assert bool(gap_theorem_bounds([5.0], 1e4, beta).vacuous) is vacuous


def test_gap_theorem_formulas_by_hand():
    bounds = gap_theorem_bounds([4.0, 3.0], 1.0, 0.875, steps=10**4)  # 2T - 1 = 15
    b = 15**-0.25
    assert effective_samples(0.875).item() == 15
    assert bounds.tail.item() == pytest.approx(b)
    assert bounds.head.tolist() == pytest.approx([4 - b, 3 - b])
    assert bounds.gap.item() == pytest.approx(3 - 2 * b)
    assert bounds.sine.item() == pytest.approx(b / (3 - b))
    assert bounds.probability.item() == pytest.approx(1 - 15**-0.5)
    assert gap_theorem_bounds([1.0], 0.0, 0.5).sine.item() == 0


def test_bad_input_is_named(unchecked):
    with pytest.raises(OptionError, match="eta"):
        gap_theorem_bounds([1.0], -1.0, 0.5)
    with pytest.raises(OptionError, match="eta"):
        gap_theorem_window(1.0, eta=math.inf)
    with pytest.raises(OptionError, match="strength"):
        gap_theorem_window(0.0, eta=1.0)
    with pytest.raises(ShapeError, match="one shape"):
        weyl_bounds(torch.eye(3), torch.eye(4))
    with pytest.raises(OptionError, match="rank must satisfy"):
        wedin_bound(torch.eye(3), torch.eye(3), rank=4)
