"""The Marchenko-Pastur law against quadrature, noise with and without planted directions, spectra without a bulk."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from orthokit.diagnostics import bulk_fit, marchenko_pastur_cdf, marchenko_pastur_quantile, noise_edge
from orthokit.diagnostics.randommatrix import survival_threshold
from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.linalg import random_orthogonal

RATIOS = [1.0, 0.999, 0.7, 0.25, 0.01, 1e-4, 1e-7]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit_of(W):
    return bulk_fit(torch.linalg.svdvals(W), shape=tuple(W.shape))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_law_is_the_integral_of_its_density(ratio):
    """By quadrature over the angle, where the density is smooth."""
    root = math.sqrt(ratio)

    def density(angle):
        x = (1 - root) ** 2 + 4 * root * math.cos(angle / 2) ** 2
        return 2 / math.pi * math.sin(angle) ** 2 / x if x > 0 else 2 / math.pi * 2

    for angle in (0.03, 0.5, 1.2, 2.0, 2.9, 3.1):
        x = (1 - root) ** 2 + 4 * root * math.cos(angle / 2) ** 2
        exact = quad(density, angle, math.pi, epsabs=1e-13, epsrel=1e-13, limit=200)[0]
        # For small ratios x itself has its digits in 1: the angle is known to about 1e-16 / sqrt(ratio).
        assert marchenko_pastur_cdf(x, ratio=ratio).item() == pytest.approx(exact, abs=1e-12 + 1e-14 / root)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.03])
def test_the_law_has_the_density_of_marchenko_and_pastur(ratio):
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    x = torch.linspace(low, high, 41, dtype=torch.float64)[1:-1]
    step = 1e-5
    slope = (marchenko_pastur_cdf(x + step, ratio=ratio) - marchenko_pastur_cdf(x - step, ratio=ratio)) / (2 * step)
    density = ((high - x) * (x - low)).sqrt() / (2 * math.pi * ratio * x)
    # A difference quotient: rounding of F over the step, and step^2 times the curvature of the density.
    torch.testing.assert_close(slope, density, rtol=1e-5, atol=1e-9)


@given(ratio=st.floats(1e-9, 1), p=st.floats(0, 1))
@settings(max_examples=100)
def test_quantiles_are_where_the_law_has_their_share(ratio, p):
    x = marchenko_pastur_quantile(p, ratio=ratio)
    root = math.sqrt(ratio)
    assert (1 - root) ** 2 * (1 - 1e-12) <= x <= (1 + root) ** 2 * (1 + 1e-12)
    assert marchenko_pastur_cdf(x, ratio=ratio).item() == pytest.approx(p, abs=1e-9 + 1e-14 / root)


def test_the_law_begins_at_0_ends_at_1_and_rises():
    x = torch.linspace(-1, 6, 500)
    for ratio in RATIOS:
        F = marchenko_pastur_cdf(x, ratio=ratio)
        assert F.dtype == torch.float64 and F.shape == x.shape
        assert F[0] == 0 and F[-1] == 1 and bool((F.diff() >= -1e-12).all())


@pytest.mark.parametrize("shape", [(200, 200), (64, 512), (512, 64), (100, 1000), (300, 200), (30, 30)])
def test_noise_is_recognised(shape):
    fits = [fit_of(0.02 * gaussian(*shape, seed=seed)) for seed in range(6)]
    k = min(shape)
    # The median of k eigenvalues that repel each other: 1.5 / k a matrix, three standard deviations of the mean.
    assert np.mean([fit.noise for fit in fits]) == pytest.approx(0.02, rel=max(0.01, 3 * 1.5 / k / math.sqrt(6)))
    for fit in fits:
        # Eigenvalues repel: 3 / k, where independent ones would have 1 / sqrt(k).
        assert fit.refused is None and fit.values == k and fit.distance < 6 / k
        assert fit.edge == pytest.approx(noise_edge(shape, fit.noise, 0.0).item(), rel=1e-12)
        assert fit.edge < fit.threshold < 1.2 * fit.edge
    assert sum(fit.above for fit in fits) == 0


def test_pure_noise_shows_a_value_above_in_one_of_a_hundred_matrices_or_fewer():
    above = [fit_of(gaussian(40, 60, seed=seed)).above for seed in range(300)]
    assert np.mean(np.array(above) > 0) <= 0.02


@pytest.mark.parametrize("shape", [(150, 150), (400, 100), (60, 240)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_planted_directions_above_the_threshold_of_detection_are_counted_exactly(shape, count):
    threshold = survival_threshold(shape, 0.1, 0.0).item()
    U = random_orthogonal(shape[0], count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    V = random_orthogonal(shape[1], count, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    noise = 0.1 * gaussian(*shape)
    strong = fit_of(noise + U * threshold * torch.linspace(1.7, 4, count, dtype=torch.float64) @ V.mT)
    weak = fit_of(noise + U * threshold * 0.5 @ V.mT)
    assert (strong.above, weak.above) == (count, 0)
    # They move the median by half their number of places.
    assert strong.noise == pytest.approx(0.1, rel=2 * count / min(shape))


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-30, 1e30), rows=st.integers(10, 40), columns=st.integers(10, 40))
@settings(max_examples=30)
def test_scale_order_and_transposition_change_nothing(seed, scale, rows, columns):
    sigma = torch.linalg.svdvals(gaussian(rows, columns, seed=seed))
    fit = bulk_fit(sigma, shape=(rows, columns))
    scaled = bulk_fit(scale * sigma.flip(0), shape=(columns, rows))
    assert (scaled.above, scaled.distance) == (fit.above, pytest.approx(fit.distance, abs=1e-12))
    assert scaled.noise == pytest.approx(scale * fit.noise) and scaled.edge == pytest.approx(scale * fit.edge)
    array = sigma.numpy()[::-1]
    assert bulk_fit(array, shape=(rows, columns)) == fit == bulk_fit(array.tolist(), shape=(rows, columns))


def test_a_spectrum_that_is_no_noise_is_far_from_the_law():
    orthogonal = bulk_fit(torch.ones(80), shape=(80, 80))
    assert orthogonal.distance > 0.4
    decaying = bulk_fit(1 / torch.arange(1, 101).double(), shape=(100, 100))
    assert decaying.distance > 0.2 and decaying.above > 0


def test_float32_spectra_give_the_same_numbers():
    sigma = torch.linalg.svdvals(gaussian(90, 120))
    single, double = bulk_fit(sigma.float(), shape=(90, 120)), bulk_fit(sigma, shape=(90, 120))
    assert single.noise == pytest.approx(double.noise, rel=1e-6) and single.distance == pytest.approx(double.distance)


def test_spectra_without_a_bulk_are_refused_in_words():
    for sigma, shape, reason in (
        (torch.zeros(20), (20, 30), "half of the singular values are zero"),
        (torch.cat([torch.ones(9), torch.zeros(11)]), (20, 30), "half of the singular values are zero"),
        (
            torch.linalg.svdvals((gaussian(60, 8) @ gaussian(8, 50)).float()),
            (60, 50),
            "a matrix of low rank has no bulk",
        ),
        (torch.ones(1), (1, 30), "1 singular values are too few"),
        (torch.ones(9), (9, 30), "9 singular values are too few"),
    ):
        fit = bulk_fit(sigma, shape=shape)
        assert fit.refused is not None and reason in fit.refused
        assert fit.noise is fit.edge is fit.threshold is fit.above is fit.distance is None and fit.values == len(sigma)
    # Rounding errors are noise like any other where more than half of the values are not.
    assert bulk_fit(torch.cat([torch.ones(11), torch.zeros(9)]), shape=(20, 30)).refused is None


def test_bad_input_is_named(unchecked):
    with pytest.raises(ShapeError, match="has 20 singular values; got 19"):
        bulk_fit(torch.ones(19), shape=(20, 30))
    with pytest.raises(ShapeError, match="sizes >= 1"):
        bulk_fit(torch.ones(0), shape=(0, 3))
    with pytest.raises(NonFiniteError, match="sigma must be finite"):
        bulk_fit(torch.full((20,), math.nan), shape=(20, 30))
    with pytest.raises(OptionError, match="singular values are >= 0; got -1"):
        bulk_fit(torch.linspace(-1, 3, 20), shape=(20, 30))
    for ratio in (0.0, 1.1, math.nan):
        with pytest.raises(OptionError, match="ratio must be"):
            marchenko_pastur_cdf(1.0, ratio=ratio)
    with pytest.raises(OptionError, match="p must be a share"):
        marchenko_pastur_quantile(1.5, ratio=1.0)
