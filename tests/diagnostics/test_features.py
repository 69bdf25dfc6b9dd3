"""RankMe and decay exponents: against their formulas, known laws, published values, and errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics import effective_rank
from orthokit.diagnostics.features import alpha_req, decay_fit, feature_values, rankme
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import random_orthogonal


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(n, seed=0):
    return random_orthogonal(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rankme_reference(Z, eps=1e-7, eigen=False, centre=False):
    Z = Z.double().numpy()
    Z = Z - Z.mean(0) if centre else Z
    s = np.linalg.svd(Z, compute_uv=False) ** (2 if eigen else 1)
    p = s / s.sum() + eps
    return math.exp(-sum(x * math.log(x) for x in p))


@pytest.mark.parametrize("shape", [(30, 5), (11, 5), (5, 5), (3, 8), (1, 4), (7, 1)])
@pytest.mark.parametrize("values", ["singular", "eigen"])
@pytest.mark.parametrize("centre", [False, True])
def test_rankme_follows_its_definition(shape, values, centre):
    Z = gaussian(*shape) + 2
    if shape[0] == 1 and centre:
        assert rankme(Z, centre=True) == 0  # a single sample has no spread
        return
    # Shapes with a zero singular value: its rounding error is far below eps.
    expected = rankme_reference(Z, eigen=values == "eigen", centre=centre)
    assert rankme(Z, values=values, centre=centre).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("shape", [(40, 4), (6, 4), (4, 40), (2, 3, 9, 4)])
def test_feature_values_are_those_of_numpy(shape):
    Z = gaussian(*shape)
    s = np.linalg.svd(Z.numpy(), compute_uv=False)
    np.testing.assert_allclose(feature_values(Z).numpy(), s, rtol=1e-12)
    np.testing.assert_allclose(feature_values(Z, values="eigen").numpy(), s**2 / shape[-2], rtol=1e-12)
    if len(shape) == 2:
        spread = np.linalg.eigvalsh(np.cov(Z.numpy().T, bias=True))[::-1][: min(shape)]
        found = feature_values(Z, values="eigen", centre=True).numpy()
        np.testing.assert_allclose(found, spread, rtol=1e-9, atol=1e-12)


def test_published_values_of_gaussian_features():
    Z = gaussian(4000, 64, dtype=torch.float32)
    # 63.86 and 63.45; between draws they differ in the second decimal.
    assert rankme(Z).item() == pytest.approx(63.86, abs=0.05)
    assert rankme(Z, values="eigen").item() == pytest.approx(63.45, abs=0.1)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    d=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-20, -1.0, 1e20]),
)
def test_rankme_is_bounded_and_ignores_rotation_and_scale(n, d, seed, scale):
    Z = gaussian(n, d, seed=seed)
    found = rankme(Z).item()
    # The guard eps lifts the sum of p above 1, by at most a few millionths here.
    assert 1 - 1e-5 <= found <= min(n, d) * (1 + 1e-5)
    turned = scale * rotation(n, seed) @ Z @ rotation(d, seed + 1)
    assert rankme(turned).item() == pytest.approx(found, rel=1e-7)
    assert rankme(Z, values="eigen").item() <= found * (1 + 1e-5)
    assert rankme(Z, eps=0).item() == pytest.approx(effective_rank(Z).item(), rel=1e-9)


def test_rankme_of_collapsed_zero_batched_half_and_strided_features():
    ones = torch.ones(50, 6)
    assert rankme(ones).item() == pytest.approx(1, abs=1e-4)
    assert rankme(ones, centre=True) == 0 and rankme(torch.zeros(4, 3)) == 0
    Z = gaussian(2, 3, 12, 5)
    torch.testing.assert_close(rankme(Z)[1, 2], rankme(Z[1, 2]))
    half = Z[0, 0].bfloat16()
    assert rankme(half).dtype == torch.float32
    assert rankme(half).item() == pytest.approx(rankme_reference(half), rel=1e-6)
    assert rankme(Z[0, 0].mT.contiguous().mT).item() == pytest.approx(rankme(Z[0, 0]).item(), rel=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_decay_of_sampled_power_law_features_is_recovered(exponent):
    i = torch.arange(1, 201, dtype=torch.float64)
    Z = gaussian(8000, 200) * i ** (-exponent / 2)
    assert alpha_req(Z).item() == pytest.approx(exponent, abs=0.03)


@settings(max_examples=40, deadline=None)
@given(exponent=st.floats(-1, 4), scale=st.floats(1e-3, 1e3), size=st.integers(12, 150), first=st.integers(1, 8))
def test_an_exact_law_is_fitted_exactly_over_any_range(exponent, scale, size, first):
    values = scale * torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
    fit = decay_fit(values, first=first)
    assert (fit.exponent, fit.scale) == (pytest.approx(exponent, abs=1e-9), pytest.approx(scale, rel=1e-8))
    assert (fit.first, fit.last, fit.shrunk) == (first, min(size, 99), size < 99)
    assert fit.r2 == pytest.approx(1, abs=1e-6) or abs(exponent) < 1e-3


def test_the_fit_is_weighted_least_squares_and_says_how_good_it_is():
    values = torch.arange(1, 121, dtype=torch.float64) ** -1.2 * (0.3 * gaussian(120)).exp()
    values = values.sort(descending=True).values
    i = np.arange(5, 100)
    x, y = np.log(i), np.log(values.numpy()[4:99])
    slope, offset = np.polyfit(x, y, 1, w=np.sqrt(1 / i))  # polyfit squares its weights
    fit = decay_fit(values)
    assert (fit.exponent, fit.scale) == (pytest.approx(-slope), pytest.approx(math.exp(offset)))
    left, spread = y - slope * x - offset, y - np.average(y, weights=1 / i)
    assert fit.r2 == pytest.approx(1 - (left**2 / i).sum() / (spread**2 / i).sum())
    assert 0.5 < fit.r2 < 1 and not fit.shrunk


def test_the_range_ends_with_the_directions_that_are_there():
    i = torch.arange(1, 13, dtype=torch.float64)
    Z = (
        random_orthogonal(60, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * i**-0.5
    ) @ gaussian(12, 12).fill_(0).fill_diagonal_(1)
    wide = torch.cat([Z, torch.zeros(60, 20, dtype=torch.float64)], dim=1) @ rotation(32)
    fit = decay_fit(feature_values(wide, values="eigen"))
    assert (fit.last, fit.shrunk) == (12, True)
    assert fit.exponent == pytest.approx(1, abs=1e-6)
    assert alpha_req(wide, centre=False).item() == pytest.approx(1, abs=1e-6)
    assert alpha_req(wide.bfloat16(), last=12).dtype == torch.float32


def test_a_shift_of_all_samples_changes_nothing_unless_asked():
    Z = gaussian(400, 30) * torch.arange(1, 31, dtype=torch.float64) ** -0.5
    assert alpha_req(Z + 100).item() == pytest.approx(alpha_req(Z).item(), rel=1e-9)
    assert alpha_req(Z + 100, first=1, centre=False).item() > alpha_req(Z, first=1).item() + 0.5


def test_bad_input_is_named(unchecked):
    Z = gaussian(20, 6)
    for measure in (rankme, feature_values, alpha_req):
        with pytest.raises(NonFiniteError, match="Z must be finite"):
            measure(Z / 0)
        with pytest.raises(DtypeError, match="Z must be floating"):
            measure(Z.long())
        with pytest.raises(DtypeError, match="Z must be real"):
            measure(Z * 1j)
        with pytest.raises(ShapeError, match="at least 2 dimensions"):
            measure(Z[0])
        with pytest.raises(ShapeError, match="at least one sample"):
            measure(Z[:0])
    with pytest.raises(UnknownNameError, match="did you mean 'eigen'"):
        rankme(Z, values="eigens")
    with pytest.raises(OptionError, match="eps must be >= 0"):
        rankme(Z, eps=-1e-7)
    with pytest.raises(OptionError, match=r"first=5, last=99 and 6 nonzero values leave 2\. Lower first"):
        alpha_req(Z)
    with pytest.raises(OptionError, match="0 nonzero values leave 0"):
        alpha_req(torch.ones(20, 8))
    with pytest.raises(OptionError, match="first must be an index >= 1"):
        alpha_req(Z, first=0)
    with pytest.raises(ShapeError, match="one spectrum"):
        decay_fit(Z)
    with pytest.raises(OptionError, match="0 nonzero values"):
        decay_fit(Z[0, :0])
    with pytest.raises(NonFiniteError, match="values must be finite"):
        decay_fit(Z[0] / 0)
