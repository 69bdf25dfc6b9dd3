"""Singular values: exact, by the Gram matrix, and the largest alone."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import random_orthogonal, singular_values, top_singular_value

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (3, 4, 8), (2, 3, 8, 4)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(values: list[float], *, seed: int = 0, extra: int = 2) -> Tensor:
    g, k = torch.Generator().manual_seed(seed), len(values)
    U = random_orthogonal(k, k, generator=g, dtype=torch.float64)
    V = random_orthogonal(k, k + extra, generator=g, dtype=torch.float64)
    return (U * torch.tensor(values, dtype=torch.float64)) @ V


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_values_solve_the_eigenvalue_problem_of_the_gram_matrix(shape, dtype):
    W = randn(*shape).to(dtype)
    s = singular_values(W)
    assert s.shape == (*shape[:-2], min(shape[-2:])) and not s.is_complex()
    assert (s.diff(dim=-1) <= 0).all() and (s >= 0).all()
    wide = W.to(torch.complex128 if W.is_complex() else torch.float64)
    gram = wide @ wide.mH if shape[-2] <= shape[-1] else wide.mH @ wide
    expected = torch.linalg.eigvalsh(gram).flip(-1)
    atol = (1e-5 if s.dtype == torch.float32 else 1e-12) * float(expected.max())
    torch.testing.assert_close(s.double().square(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_gram_values_are_right_above_the_root_of_epsilon(dtype, seed):
    spectrum = [1.0, 0.9, 0.1, 0.01, 1e-3, 1e-4]
    W = with_spectrum(spectrum, seed=seed).to(dtype)
    error = (singular_values(W, method="gram") - singular_values(W)).abs().double()
    # |s^2 - s'^2| <= c eps s_1^2, so the error of s is that over s, and never more than its root.
    eps = torch.finfo(dtype).eps
    bound = torch.minimum(8 * eps / torch.tensor(spectrum), torch.tensor((8 * eps) ** 0.5)).double()
    assert (error <= bound).all()


@pytest.mark.parametrize("method", ["gram", "gram64"])
def test_gram_of_a_zero_matrix_is_zero(method):
    assert not singular_values(torch.zeros(3, 5), method=method).any()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (60, 60), (1, 2500), (2500, 3), (2, 30, 20)], ids=str)
@pytest.mark.parametrize("power", [0.0, 2.0, 4.0])
def test_gram_in_float64_is_no_worse_than_an_svd_in_float32(shape, power):
    W = randn(*shape)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    W = ((U * torch.arange(1, s.shape[-1] + 1, dtype=torch.float64) ** -power) @ Vh).float()
    exact = torch.linalg.svdvals(W.double())
    ours, theirs = ((singular_values(W, method=m).double() - exact).abs() / exact[..., :1] for m in ("gram64", "svd"))
    # 6e-8 is the rounding of the answer to float32.
    assert ours.max() <= max(float(theirs.max()), 6e-8)


def test_gram_in_float64_keeps_small_values_and_the_scale_of_the_matrix():
    spectrum = [1.0, 1e-2, 1e-4, 1e-5]
    W = with_spectrum(spectrum).float()
    found = singular_values(2.0**100 * W, method="gram64").double() / 2.0**100
    torch.testing.assert_close(found, torch.linalg.svdvals(W.double()), rtol=2e-5, atol=0)


@pytest.mark.parametrize("method", ["svd", "gram", "gram64"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 4), (0, 4, 3)], ids=str)
def test_empty_matrices_have_no_values_and_norm_zero(method, shape):
    W = torch.zeros(shape)
    assert singular_values(W, method=method).shape == (*shape[:-2], min(shape[-2:]))
    top = top_singular_value(W)
    assert top.shape == shape[:-2] and not top.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_top_value_is_the_spectral_norm(shape, dtype):
    W = randn(*shape).to(dtype)
    torch.testing.assert_close(top_singular_value(W, tol=0.0), singular_values(W)[..., 0], rtol=1e-3, atol=0)
    assert not top_singular_value(W).is_complex()


@settings(max_examples=150, deadline=None)
@given(
    ratios=st.lists(st.sampled_from([1.0, 1 - 1e-12, 1 - 1e-6, 1 - 1e-3, 0.99, 0.9, 0.5, 1e-3, 0.0]), max_size=6),
    scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e6, 1e18]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 10_000),
)
def test_top_value_never_exceeds_the_truth(ratios, scale, dtype, seed):
    spectrum = [1.0]
    for ratio in ratios:
        spectrum.append(spectrum[-1] * ratio)
    W = (scale * with_spectrum(spectrum, seed=seed)).to(dtype)
    truth = torch.linalg.svdvals(W.double())[0]
    # Rounding of one product and one norm of at most 9 entries.
    assert top_singular_value(W) <= truth * (1 + 8 * torch.finfo(dtype).eps)


@settings(max_examples=100, deadline=None)
@given(gap=st.floats(1e-7, 1.0), others=st.integers(1, 7), seed=st.integers(0, 10_000))
def test_top_value_is_close_for_every_gap(gap, others, seed):
    W = with_spectrum([1.0] + [1.0 - gap] * others, seed=seed)
    assert top_singular_value(W) >= 1 - 1e-3


@pytest.mark.parametrize("column", range(4))
def test_a_start_vector_that_misses_the_top_direction_is_not_believed(column):
    # The start lies along the second direction: with this vector alone the answer would be 0.5.
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, [column]]
    Q = torch.linalg.qr(torch.cat([start, randn(6, 5, seed=5)], dim=1)).Q
    W = torch.diag(torch.tensor([0.5, 1.0, 0.3, 0.2, 0.1, 0.1], dtype=torch.float64)) @ Q.T
    found = top_singular_value(W, generator=torch.Generator().manual_seed(0))
    assert float(found) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(300, 300), (600, 200), (200, 700)], ids=str)
def test_a_spectrum_without_gaps_needs_few_products(shape):
    W = randn(*shape)
    truth = float(torch.linalg.svdvals(W)[0])
    for iterations, error in ((12, 2e-3), (20, 1e-5)):
        assert (
            truth * (1 - error) <= float(top_singular_value(W, iterations=iterations, tol=0.0)) <= truth * (1 + 1e-12)
        )


def test_matrices_of_low_rank_end_the_search():
    W = randn(60, 3) @ randn(3, 80, seed=1)
    many = torch.stack([W, torch.zeros(60, 80, dtype=torch.float64), randn(60, 80)])
    expected = torch.linalg.svdvals(many)[:, 0]
    torch.testing.assert_close(top_singular_value(many, tol=0.0), expected, rtol=1e-12, atol=0)


def test_the_search_repeats_and_follows_its_generator():
    W, state = randn(20, 30), torch.get_rng_state()
    assert torch.equal(top_singular_value(W), top_singular_value(W))
    one, two = (top_singular_value(W, iterations=1, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert one != two
    assert torch.equal(state, torch.get_rng_state())


def test_more_iterations_never_lower_the_estimate():
    W = randn(30, 40)
    found = [float(top_singular_value(W, iterations=k, tol=0.0)) for k in (1, 2, 4, 8, 16, 32)]
    assert all(a <= b * (1 + 1e-14) for a, b in pairwise(found))
    assert found[-1] > found[0]


def test_zero_and_rank_one_matrices():
    assert top_singular_value(torch.zeros(3, 4)) == 0
    assert top_singular_value(torch.stack([torch.zeros(2, 2), torch.eye(2)])).tolist() == pytest.approx([0.0, 1.0])
    u, v = randn(6, 1), randn(1, 4, seed=1)
    torch.testing.assert_close(top_singular_value(u @ v), u.norm() * v.norm())


def test_layout_in_memory_does_not_matter():
    W = randn(8, 12)
    for view in (W.T, W[::2], W[:, ::3]):
        assert torch.equal(singular_values(view), singular_values(view.contiguous()))
        torch.testing.assert_close(top_singular_value(view), top_singular_value(view.contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    W = randn(3, 4)
    W[0, 0] = bad
    for call in (singular_values, top_singular_value):
        with pytest.raises(NonFiniteError, match="W must be finite"):
            call(W)


def test_options_out_of_range_are_refused():
    with pytest.raises(UnknownNameError, match="method"):
        singular_values(randn(3, 4), method="qr")
    for options in ({"iterations": 0}, {"tol": -1.0}, {"tol": float("nan")}):
        with pytest.raises(OptionError, match="iterations"):
            top_singular_value(randn(3, 4), **options)


@pytest.mark.usefixtures("unchecked")
def test_vectors_and_integers_are_refused():
    for call in (singular_values, top_singular_value):
        with pytest.raises(ShapeError):
            call(randn(4))
        with pytest.raises(DtypeError):
            call(torch.ones(3, 4, dtype=torch.int32))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gram_route_survives_entries_whose_squares_do_not_fit(size):
    W = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    found = singular_values(size * W, method="gram") / size
    assert torch.allclose(found, singular_values(W), rtol=1e-4)
