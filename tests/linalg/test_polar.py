"""Orthogonalisation: every fast path against the scalar polynomial on the singular values, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import COEFFICIENTS, coefficient_table, orthogonalize, polar, procrustes, random_orthogonal

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (1, 1), (3, 4, 8), (2, 3, 8, 4)]
HEADROOM = {"polar_express": 1.01, "newton_schulz": 1.0}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(X: Tensor, *, method: str, steps: int = 5, polish: int = 0, coefficients=None) -> Tensor:
    """The scalar polynomials applied to the singular values of an SVD in double precision."""
    default = {"polar_express": "polar_express", "newton_schulz": "jordan"}[method]
    wide = X.to(torch.complex128 if X.is_complex() else torch.float64)
    U, s, Vh = torch.linalg.svd(wide, full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() * HEADROOM[method]).clamp(min=1e-7)
    for a, b, c in coefficient_table(default if coefficients is None else coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    for _ in range(polish):
        s = 1.5 * s - 0.5 * s**3
    return (U * s.unsqueeze(-2)) @ Vh


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", list(HEADROOM))
@pytest.mark.parametrize("polish", [0, 2])
def test_matrix_iteration_is_the_scalar_polynomial_on_the_spectrum(shape, method, polish):
    X = randn(*shape)
    torch.testing.assert_close(
        orthogonalize(X, method=method, polish=polish), reference(X, method=method, polish=polish), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("name", list(COEFFICIENTS))
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_every_table_and_number_of_steps_follows_the_reference(name, steps):
    X = randn(6, 10)
    result = orthogonalize(X, method="newton_schulz", coefficients=name, steps=steps)
    expected = reference(X, method="newton_schulz", coefficients=name, steps=steps)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", list(HEADROOM))
def test_complex_matrices_follow_the_reference(method):
    X = torch.complex(randn(5, 8), randn(5, 8, seed=1))
    torch.testing.assert_close(orthogonalize(X, method=method), reference(X, method=method), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 8e-3)])
@pytest.mark.parametrize("method", list(HEADROOM))
def test_lower_precisions_follow_the_reference_to_their_rounding(method, dtype, atol):
    # Five steps of slope up to 8 amplify the rounding of the first; the entries of a 24 x 48 factor are about 0.15.
    X = randn(24, 48).to(dtype)
    result = orthogonalize(X, method=method)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), reference(X, method=method), rtol=0, atol=atol)


def test_dtype_sets_the_precision_of_the_products_only():
    X = randn(16, 40, dtype=torch.float32)
    rough, fine = orthogonalize(X, dtype=torch.bfloat16), orthogonalize(X, dtype=torch.float64)
    assert rough.dtype == fine.dtype == torch.float32
    expected = reference(X, method="polar_express")
    assert (fine - expected).abs().max() < 1e-6 < (rough - expected).abs().max() < 4e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polished_result_converges_to_the_polar_factor(shape):
    # Well-conditioned input: the nearest value to zero is far above the 1e-3 the table is made for.
    X = random_orthogonal(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1 * randn(*shape)
    torch.testing.assert_close(orthogonalize(X, polish=6), polar(X), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128, torch.bfloat16])
def test_polar_factor_is_a_partial_isometry_that_leaves_a_positive_part(shape, dtype):
    X = randn(*shape).to(dtype)
    Q = polar(X)
    assert Q.dtype == dtype
    atol = {torch.float32: 1e-5, torch.bfloat16: 3e-2}.get(dtype, 1e-12)
    wide = torch.promote_types(dtype, torch.float32)
    Q, X = Q.to(wide), X.to(wide)
    small = Q @ Q.mH if shape[-2] <= shape[-1] else Q.mH @ Q
    torch.testing.assert_close(small, torch.eye(small.shape[-1], dtype=wide).expand_as(small), rtol=0, atol=atol)
    P = Q.mH @ X
    torch.testing.assert_close(P, P.mH, rtol=0, atol=20 * atol)
    assert torch.linalg.eigvalsh((P + P.mH) / 2).min() > -20 * atol


def test_polar_leaves_the_null_space_out():
    U, V = (random_orthogonal(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (8, 6))
    X = (U * torch.tensor([4.0, 1.0, 0.1])) @ V.T
    torch.testing.assert_close(polar(X), U @ V.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(polar(X, rtol=0.5), U[:, :1] @ V[:, :1].T, rtol=0, atol=1e-12)


def test_iterations_keep_the_null_space_too():
    U, V = (random_orthogonal(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (8, 6))
    result = orthogonalize((U * torch.tensor([2.0, 1.0])) @ V.T, polish=6)
    torch.testing.assert_close(result, U @ V.T, rtol=0, atol=1e-10)


def test_polar_of_a_batch_takes_each_matrix_by_its_own_scale():
    X = torch.stack([randn(4, 6), 1e-8 * randn(4, 6), torch.zeros(4, 6, dtype=torch.float64)])
    torch.testing.assert_close(polar(X), torch.stack([polar(x) for x in X]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz", "svd"])
class TestEveryMethod:
    def test_zero_stays_zero(self, method):
        for shape in [(3, 5), (2, 4, 3)]:
            assert not orthogonalize(torch.zeros(shape), method=method).any()

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
    def test_empty_matrices_come_back_empty(self, method, shape):
        assert orthogonalize(torch.zeros(shape), method=method).shape == shape

    def test_layout_in_memory_does_not_matter(self, method):
        X = randn(12, 10)
        for view in (X.T, X[::2], X[:, ::3], X.expand(3, 12, 10)):
            expected = orthogonalize(view.contiguous(), method=method)
            torch.testing.assert_close(orthogonalize(view, method=method), expected, rtol=0, atol=1e-12)

    def test_input_is_not_changed(self, method):
        X = randn(4, 6)
        before = X.clone()
        orthogonalize(X, method=method, polish=1)
        assert torch.equal(X, before)

    def test_transposing_transposes(self, method):
        X = randn(5, 9)
        torch.testing.assert_close(orthogonalize(X.T, method=method), orthogonalize(X, method=method).T)

    def test_a_batch_is_its_matrices_one_by_one(self, method):
        X = randn(2, 3, 5, 7)
        single = torch.stack([orthogonalize(x, method=method) for x in X.flatten(0, 1)]).unflatten(0, (2, 3))
        torch.testing.assert_close(orthogonalize(X, method=method), single, rtol=0, atol=1e-12)

    @settings(max_examples=20, deadline=None)
    @given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 1000), power=st.integers(-4, 12))
    def test_turning_and_scaling_commute(self, method, rows, columns, seed, power):
        X = randn(rows, columns, seed=seed)
        g = torch.Generator().manual_seed(seed)
        Q1, Q2 = (random_orthogonal(n, n, generator=g, dtype=torch.float64) for n in (rows, columns))
        turned = orthogonalize(10.0**power * Q1 @ X @ Q2, method=method)
        # The exact factor of a nearly singular matrix is discontinuous: rounding is amplified by 1 / s_min.
        s = torch.linalg.svdvals(X)
        atol = 1e-11 * max(1.0, float(s[0] / s[-1]))
        torch.testing.assert_close(turned, Q1 @ orthogonalize(X, method=method) @ Q2, rtol=0, atol=atol)

    def test_gradients_do_not_leak_into_the_input(self, method):
        X = randn(3, 4).requires_grad_()
        orthogonalize(X, method=method).sum().backward()
        assert X.grad is not None and X.grad.isfinite().all()


def test_a_norm_below_eps_is_not_blown_up():
    X = 1e-12 * randn(4, 6)
    assert orthogonalize(X, eps=1e-7).abs().max() < 0.05
    assert orthogonalize(X, eps=1e-20).abs().max() > 0.1


def test_not_a_number_stays_in_its_own_matrix():
    X = randn(3, 4, 5)
    X[1, 0, 0] = float("nan")
    result = orthogonalize(X)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_exact_routines_refuse_what_is_not_finite(bad):
    X = randn(3, 4)
    X[1, 2] = bad
    for call in (lambda: polar(X), lambda: orthogonalize(X, method="svd"), lambda: procrustes(X, randn(3, 4))):
        with pytest.raises(NonFiniteError, match="1 of its 12 entries"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "newton_shulz"}, UnknownNameError, "did you mean 'newton_schulz'"),
        ({"coefficients": "cubical"}, UnknownNameError, "did you mean 'cubic'"),
        ({"steps": -1}, OptionError, "steps=-1"),
        ({"polish": -2}, OptionError, "polish=-2"),
        ({"eps": 0.0}, OptionError, "eps"),
        ({"eps": float("nan")}, OptionError, "eps"),
    ],
)
def test_options_out_of_range_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        orthogonalize(randn(3, 4), **options)


@pytest.mark.usefixtures("unchecked")
def test_vectors_and_integers_are_refused():
    for call in (orthogonalize, polar):
        with pytest.raises(ShapeError, match="at least 2 dimensions"):
            call(randn(4))
        with pytest.raises(DtypeError, match=r"torch\.int64"):
            call(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(ShapeError, match="one shape"):
        procrustes(randn(4, 3), randn(4, 2))


def test_a_complex_matrix_keeps_its_imaginary_part():
    X = torch.complex(randn(3, 4), randn(3, 4, seed=1))
    with pytest.raises(DtypeError, match="complex"):
        orthogonalize(X, dtype=torch.float32)


class TestProcrustes:
    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(1, 9), dim=st.integers(1, 6), prior=st.floats(0, 3), seed=st.integers(0, 1000))
    def test_no_other_rotation_is_better(self, rows, dim, prior, seed):
        g = torch.Generator().manual_seed(seed)
        A, B = (torch.randn(rows, dim, generator=g, dtype=torch.float64) for _ in range(2))
        identity = torch.eye(dim, dtype=torch.float64)

        def cost(R: Tensor) -> float:
            return float((A @ R - B).square().sum() + prior * (R - identity).square().sum())

        R = procrustes(A, B, prior=prior)
        torch.testing.assert_close(R @ R.T, identity, rtol=0, atol=1e-12)
        others = [random_orthogonal(dim, dim, generator=g, dtype=torch.float64) for _ in range(20)]
        # Near rivals as well: R turned by a small generator.
        skew = torch.randn(dim, dim, generator=g, dtype=torch.float64)
        others += [R @ torch.matrix_exp(t * (skew - skew.T)) for t in (1e-3, -1e-3)]
        assert cost(R) <= min(map(cost, others)) + 1e-9

    def test_prior_makes_an_undetermined_direction_the_identity(self):
        A = torch.zeros(5, 3, dtype=torch.float64)
        A[:, 0] = 1.0
        torch.testing.assert_close(procrustes(A, A, prior=1e-3), torch.eye(3, dtype=torch.float64))

    def test_strong_prior_is_the_identity_and_complex_points_are_turned(self):
        A, B = randn(6, 3), randn(6, 3, seed=1)
        torch.testing.assert_close(procrustes(A, B, prior=1e9), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
        C = torch.complex(A, B)
        U = polar(torch.complex(randn(3, 3), randn(3, 3, seed=2)))
        torch.testing.assert_close(procrustes(C, C @ U), U, rtol=0, atol=1e-12)

    def test_a_batch_is_taken_pair_by_pair(self):
        A, B = randn(4, 7, 3), randn(4, 7, 3, seed=1)
        torch.testing.assert_close(procrustes(A, B), torch.stack([procrustes(a, b) for a, b in zip(A, B, strict=True)]))

    def test_negative_prior_is_refused(self):
        with pytest.raises(OptionError, match="prior"):
            procrustes(randn(3, 2), randn(3, 2), prior=-1.0)
