"""Power-law tails: against a plain search, known laws, the gamma distribution and WeightWatcher; and when refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from orthokit.diagnostics import bulk_fit, power_law_alpha, tail, tail_fit
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from orthokit.linalg import random_orthogonal


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(n, seed=0):
    return random_orthogonal(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pareto(k, alpha, seed=0):
    return (1 - np.random.default_rng(seed).random(k)) ** (-1 / (alpha - 1))


def tail_reference(values, fewest=10):
    """Every start in turn, exponent and distance by their definitions."""
    values = np.sort(values)
    best = (math.inf, 0.0, 0.0, 0)
    for start in range(len(values) - fewest + 1):
        tail = values[start:]
        n = len(tail)
        alpha = 1 + n / np.log(tail / tail[0]).sum()
        law = 1 - (tail / tail[0]) ** (1 - alpha)
        steps = np.arange(n)
        distance = max(np.abs(law - steps / n).max(), np.abs(law - (steps + 1) / n).max())
        best = min(best, (distance, alpha, tail[0], n))
    return best


@pytest.mark.parametrize("shape", [(40, 40), (15, 60), (60, 12)])
@pytest.mark.parametrize("block", [64, 4])
def test_the_tail_is_the_one_a_plain_search_finds(shape, block, monkeypatch):
    monkeypatch.setattr(tail, "_BLOCK", block)
    W = gaussian(*shape) * torch.linspace(0.2, 2, shape[1], dtype=torch.float64).exp()
    distance, alpha, xmin, count = tail_reference(np.linalg.svd(W.numpy(), compute_uv=False) ** 2)
    found = power_law_alpha(W)
    assert (found.distance, found.alpha) == (pytest.approx(distance, rel=1e-8), pytest.approx(alpha, rel=1e-8))
    assert (found.xmin, found.tail, found.values) == (pytest.approx(xmin), count, min(shape))
    assert found.enough == (min(shape) >= 50)
    largest = torch.linalg.matrix_norm(W, ord=2).item() ** 2
    assert found.weighted == pytest.approx(found.alpha * math.log10(largest))
    assert power_law_alpha(W.mT).alpha == pytest.approx(found.alpha)


@given(k=st.integers(10, 150), alpha=st.floats(1.3, 8), seed=st.integers(0, 10**6), scale=st.floats(1e-6, 1e6))
@settings(max_examples=40)
def test_any_order_and_any_scale_give_the_tail_of_the_plain_search(k, alpha, seed, scale):
    values = pareto(k, alpha, seed)
    found = tail_fit(scale * values)
    distance, exponent, xmin, count = tail_reference(values)
    assert (found.distance, found.alpha) == (pytest.approx(distance, rel=1e-6), pytest.approx(exponent, rel=1e-6))
    assert (found.xmin, found.tail) == (pytest.approx(scale * xmin), count)
    again = tail_fit(torch.from_numpy(np.sort(scale * values)[::-1].copy()))
    assert again == found
    assert found.low < found.alpha < found.high


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_known_law_is_recovered_above_a_bulk(alpha):
    n = 400
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    heavy = 3 * (1 - u) ** (-1 / (alpha - 1))
    bulk = torch.linspace(0.5, 2.9, 60, dtype=torch.float64)
    W = rotation(n + 60) * torch.cat([bulk, heavy]).sqrt()
    found = power_law_alpha(W)
    assert found.alpha == pytest.approx(alpha, rel=0.03)
    assert found.distance < 0.02 and found.tail <= n + 5 and found.refused is None
    assert found.low < alpha < found.high
    assert power_law_alpha(7 * W).alpha == pytest.approx(found.alpha, rel=1e-6)
    assert power_law_alpha(7 * W).xmin == pytest.approx(49 * found.xmin, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 49, 500, 20000])
def test_the_interval_is_that_of_the_gamma_distribution(n):
    exact = stats.gamma.ppf([0.025, 0.975], n)
    np.testing.assert_allclose(tail._gamma_interval(n).numpy(), exact, rtol=1e-7)


def test_the_interval_holds_the_exponent_as_often_as_it_says_once_the_start_is_given(monkeypatch):
    # With fewest = k there is one candidate, the smallest value.
    hits = [fit.low < 3 < fit.high for fit in (tail_fit(pareto(60, 3.0, seed), fewest=60) for seed in range(400))]
    # 95 % of 400, within four standard deviations of that count.
    assert np.mean(hits) == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))


def test_the_scaled_distance_rejects_as_often_as_its_table_says_once_the_start_is_given():
    over = [tail_fit(pareto(80, 2.5, seed), fewest=80).scaled_distance > 1.094 for seed in range(400)]
    assert np.mean(over) == pytest.approx(0.05, abs=4 * math.sqrt(0.95 * 0.05 / 400))


def test_equal_singular_values_have_no_tail_and_rounding_is_no_eigenvalue():
    found = power_law_alpha(torch.eye(30))
    assert found.alpha == found.low == found.high == math.inf and found.distance == 1 and found.tail == 30
    low = (gaussian(80, 20) @ gaussian(20, 70, seed=1)).float()
    assert power_law_alpha(low).values == 20
    assert power_law_alpha(gaussian(60, 60, dtype=torch.bfloat16)).values >= 58


SHAPES = [(50, 50), (64, 64), (64, 128), (300, 60), (100, 100), (200, 300), (384, 384)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_matrices_have_no_exponent(shape):
    refused = []
    for seed in range(40 if min(shape) < 150 else 6):
        sigma = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), compute_uv=False)
        refused.append(tail_fit(sigma**2, bulk=bulk_fit(sigma, shape=shape)).refused is not None)
    assert np.mean(refused) >= 0.95
    assert power_law_alpha(gaussian(*shape, dtype=torch.float32)).refused is not None


@pytest.mark.parametrize("alpha", [2.0, 2.5, 3.0, 4.0, 5.0])
@pytest.mark.parametrize("k", [100, 300])
@pytest.mark.parametrize("longer", [1, 4, 10])
def test_heavy_tails_have_one_in_a_matrix_of_any_shape(alpha, k, longer):
    shown = []
    for seed in range(40):
        values = pareto(k, alpha, seed)
        bulk = bulk_fit(np.sqrt(values), shape=(longer * k, k))
        shown.append(tail_fit(values, bulk=bulk).refused is None)
    assert np.mean(shown) >= 0.9


def test_a_tail_above_a_random_bulk_is_shown_and_the_bulk_alone_is_not():
    noise = gaussian(400, 400, seed=3)
    u = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    heavy = rotation(400, 1)[:, :40] * (80 * (1 - u) ** -0.5) @ rotation(400, 2)[:40]
    assert power_law_alpha(noise + heavy).refused is None
    refused = power_law_alpha(noise).refused
    assert refused is not None and refused.startswith("the spectrum is near that of a random matrix")


def test_every_reason_is_in_words():
    u = (np.arange(200) + 0.5) / 200
    assert tail_fit(pareto(40, 2.5)).refused == "40 eigenvalues are too few for an exponent; it takes 50"
    narrow = tail_fit((1 - u) ** (-1 / 29))
    assert narrow.refused is not None and "lie within a factor of" in narrow.refused
    steep = tail_fit((1 - u) ** (-1 / 5.5), fewest=200)
    assert steep.refused is None
    steeper = tail_fit(np.concatenate([(1 - u) ** (-1 / 19), [3.0]]), fewest=201)
    assert steeper.refused is not None and "is an edge and no heavy tail" in steeper.refused
    flat = tail_fit(np.linspace(1, 5, 200), fewest=200)
    assert flat.refused is not None and "the tail is no power law" in flat.refused
    short = tail_fit(np.concatenate([np.linspace(0.9, 1, 60), 2 * 1.5 ** np.arange(12.0)]))
    assert short.tail < 20 and short.refused == f"the tail has {short.tail} eigenvalues; an exponent takes 20"


def test_zeros_are_left_out_by_the_floor():
    values = np.concatenate([np.zeros(30), np.full(5, 1e-9), pareto(100, 3.0)])
    assert tail_fit(values).values == 105
    assert tail_fit(values, floor=1e-6).values == 100
    assert tail_fit(values, floor=1e-6).alpha == tail_fit(values[-100:]).alpha


def test_bad_input_is_named(unchecked):
    Z = gaussian(20, 6)
    with pytest.raises(OptionError, match=r"fewest=10 nonzero eigenvalues; W of shape \(20, 6\) has 6"):
        power_law_alpha(Z)
    with pytest.raises(OptionError, match="has 0"):
        power_law_alpha(torch.zeros(20, 20))
    with pytest.raises(OptionError, match="has 0"):
        power_law_alpha(torch.zeros(0, 5))
    with pytest.raises(OptionError, match="fewest must be an integer >= 2"):
        power_law_alpha(Z, fewest=1)
    with pytest.raises(ShapeError, match="one matrix"):
        power_law_alpha(Z[None])
    with pytest.raises(DtypeError, match="W must be real floating"):
        power_law_alpha(Z.long())
    with pytest.raises(NonFiniteError, match="must be finite"):
        power_law_alpha(Z / 0)
    with pytest.raises(OptionError, match="fewest=10 nonzero eigenvalues; these are 3"):
        tail_fit([1.0, 2.0, 3.0])
    with pytest.raises(OptionError, match="these are 0"):
        tail_fit([])
    with pytest.raises(OptionError, match=">= 0; got -1"):
        tail_fit(np.linspace(-1, 5, 30))
    with pytest.raises(NonFiniteError, match="values must be finite"):
        tail_fit([1.0, math.nan])
    with pytest.raises(OptionError, match="fewest must be"):
        tail_fit([1.0, 2.0], fewest=0)


@pytest.mark.peers
def test_weightwatcher_finds_the_same_exponent_from_the_same_start():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("weightwatcher.WW_powerlaw", reason="weightwatcher is not installed")
    same, inside = [], []
    for seed in range(12):
        values = pareto(300, 2 + seed / 4, seed)
        theirs, ours = peer.WWFit(values), tail_fit(values)
        same.append(abs(theirs.xmin / ours.xmin - 1) < 1e-9)
        if same[-1]:
            assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-9)
            # Its distance looks at the lower side of each step only, and can be less by at most a step.
            assert -1e-9 <= ours.distance - theirs.D <= 1 / ours.tail + 1e-9
        inside.append(ours.low <= theirs.alpha <= ours.high)
    # The one-sided distance now and then prefers another start; both are then fits of nearly the same tail.
    assert np.mean(same) >= 0.4 and np.mean(inside) >= 0.9
