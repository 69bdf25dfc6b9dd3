"""Maps from skew to orthogonal: each against its exact error law, which is a function of the angles alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit import linalg
from orthokit.errors import NonFiniteError, OptionError, ShapeError, UnknownNameError


def skew(b, seed=0, *, norm=None, batch=(), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    Q = linalg.skew_part(torch.randn(*batch, b, b, generator=g, dtype=torch.float64))
    if norm is not None:
        Q = Q * norm / linalg.singular_values(Q)[..., :1, None]
    return Q.to(dtype)


def reference_polynomial(coefficients, X):
    """Term by term, in float64."""
    X = X.double()
    result, power = torch.zeros_like(X), torch.eye(X.shape[-1], dtype=torch.float64).expand_as(X)
    for c in coefficients:
        result, power = result + c * power, power @ X
    return result


def off_orthogonal(R):
    eye = torch.eye(R.shape[-1], dtype=R.dtype)
    return float(torch.linalg.matrix_norm(R.mT @ R - eye, 2).max())


class TestPacking:
    @given(st.integers(1, 12), st.integers(0, 100))
    def test_round_trip_and_norm(self, b, seed):
        Q = skew(b, seed)
        v = linalg.pack_skew(Q)
        assert v.shape == (linalg.packed_size(b),)
        if b > 1:
            assert torch.equal(linalg.unpack_skew(v), Q)
        assert float(Q.square().sum()) == pytest.approx(2 * float(v.square().sum()))

    def test_order_is_row_major_by_hand(self):
        Q = linalg.unpack_skew(torch.tensor([1.0, 2.0, 3.0]))
        assert Q.tolist() == [[0, 1, 2], [-1, 0, 3], [-2, -3, 0]]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
    def test_batches_and_dtypes(self, dtype):
        v = torch.arange(24).reshape(2, 4, 3).to(dtype)
        Q = linalg.unpack_skew(v)
        assert Q.shape == (2, 4, 3, 3) and Q.dtype == dtype and torch.equal(Q, -Q.mT)
        assert torch.equal(linalg.pack_skew(Q), v)

    def test_gradient_is_the_difference_of_both_triangles(self):
        v = torch.randn(6, dtype=torch.float64, requires_grad=True)
        C = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        (linalg.unpack_skew(v) * C).sum().backward()
        assert torch.allclose(v.grad, linalg.pack_skew(C - C.mT))
        assert torch.autograd.gradcheck(linalg.unpack_skew, (v,))

    def test_lengths_that_are_no_triangle_are_refused(self, unchecked):
        for shape in ((2,), (5,), ()):
            with pytest.raises(ShapeError, match="packed skew matrix"):
                linalg.unpack_skew(torch.zeros(shape))
        with pytest.raises(ShapeError, match="square"):
            linalg.pack_skew(torch.zeros(2, 3))


class TestCayley:
    @given(st.integers(1, 9), st.integers(0, 50), st.sampled_from([1e-3, 0.3, 1.0, 30.0]))
    def test_is_a_rotation_whose_inverse_is_the_transform_of_minus_q(self, b, seed, norm):
        Q = skew(b, seed, norm=norm if b > 1 else None)
        R = linalg.cayley(Q)
        assert off_orthogonal(R) < 1e-12
        assert float(torch.linalg.det(R)) == pytest.approx(1.0)
        assert torch.allclose(linalg.cayley(-Q), R.mT, atol=1e-12)
        assert torch.allclose(linalg.inverse_cayley(R), Q, atol=1e-10 * max(1.0, norm**2))

    def test_angle_is_twice_the_arctangent(self):
        R = linalg.cayley(torch.tensor([[0.0, 0.3], [-0.3, 0.0]], dtype=torch.float64))
        assert math.acos(float(R[0, 0])) == pytest.approx(2 * math.atan(0.3))

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
    def test_low_precision_keeps_its_dtype(self, dtype, tolerance):
        Q = skew(16, norm=0.5, batch=(3,), dtype=dtype)
        R = linalg.cayley(Q)
        assert R.dtype == dtype and R.shape == Q.shape and off_orthogonal(R.float()) < tolerance

    def test_differentiable(self):
        v = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: linalg.cayley(linalg.unpack_skew(x)), (v,))

    def test_half_turns_and_nan_are_refused(self):
        with pytest.raises(OptionError, match="eigenvalue -1"):
            linalg.inverse_cayley(-torch.eye(2))
        with pytest.raises(NonFiniteError):
            linalg.cayley(torch.full((2, 2), torch.nan))


class TestSeries:
    @pytest.mark.parametrize("k", range(1, 10))
    @pytest.mark.parametrize("theta", [0.1, 0.5, 0.9])
    def test_neumann_distance_from_cayley_is_exactly_the_next_power(self, k, theta):
        Q = skew(8, k, norm=theta)
        gap = linalg.cayley_neumann(Q, terms=k) - linalg.cayley(Q)
        assert float(torch.linalg.matrix_norm(gap, 2)) == pytest.approx(theta ** (k + 1), rel=1e-6, abs=1e-14)

    @pytest.mark.parametrize("k", [2, 4, 6])
    def test_even_numbers_of_terms_beat_the_next_odd_one(self, k):
        Q = skew(8, norm=0.3)
        even, odd = (off_orthogonal(linalg.cayley_neumann(Q, terms=n)) for n in (k, k + 1))
        assert even == pytest.approx(0.3 ** (2 * k + 2), rel=1e-3, abs=1e-14)
        assert odd > 10 * even

    @pytest.mark.parametrize("p", range(1, 7))
    def test_taylor_agrees_with_the_exponential_to_its_order(self, p):
        A = skew(6, norm=0.1)
        gap = float(torch.linalg.matrix_norm(linalg.exp_taylor(A, order=p) - linalg.exp(A), 2))
        assert gap <= 1.05 * 0.1 ** (p + 1) / math.factorial(p + 1)

    def test_second_order_identity(self):
        A = skew(6, norm=0.8)
        E = linalg.exp_taylor(A, order=2)
        assert torch.allclose(E.mT @ E, torch.eye(6).double() + A @ A @ A @ A / 4, atol=1e-14)

    @given(st.lists(st.floats(-2, 2), min_size=1, max_size=14), st.integers(1, 5))
    def test_polynomials_agree_with_their_terms(self, coefficients, b):
        X = 0.7 * torch.randn(2, b, b, dtype=torch.float64, generator=torch.Generator().manual_seed(b))
        expected = reference_polynomial(coefficients, X)
        assert torch.allclose(linalg.matrix_polynomial(coefficients, X), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(("k", "products"), [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4)])
    def test_products_are_as_few_as_the_best_grouping(self, k, products, monkeypatch):
        counted = []
        plain = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: counted.append(1) or plain(a, b))
        linalg.cayley_neumann(skew(4), terms=k)
        assert len(counted) == products

    @pytest.mark.parametrize(
        "call", [lambda Q: linalg.cayley_neumann(Q, terms=0), lambda Q: linalg.exp_taylor(Q, order=0)]
    )
    def test_lengths_below_one_are_refused(self, call):
        with pytest.raises(OptionError, match="at least 1"):
            call(skew(3))


class TestBounds:
    @pytest.mark.parametrize("theta", [0.0, 0.2, 0.9, 1.0, 1.7])
    @pytest.mark.parametrize("n", range(1, 8))
    @pytest.mark.parametrize("name", ["cayley_neumann", "exp_taylor"])
    def test_bounds_hold_and_are_reached(self, name, n, theta):
        option = {"terms": n} if name == "cayley_neumann" else {"order": n}
        low, high = linalg.singular_value_bounds(name, theta, **option)
        # One plane for each of many angles: the extremes over a fine grid come within its spacing of the bounds.
        angles = torch.linspace(0, theta, 2001, dtype=torch.float64)
        Q = linalg.unpack_skew(angles[:, None])
        s = linalg.singular_values(getattr(linalg, name)(Q, **option))
        assert low - 1e-12 <= float(s.min()) and float(s.max()) <= high + 1e-12
        assert float(s.min()) == pytest.approx(low, abs=5e-3) and float(s.max()) == pytest.approx(high, rel=1e-3)

    def test_hand_computed_laws(self):
        law = linalg.singular_value_bounds
        assert law("cayley", 9.0) == law("exp", 9.0) == (1.0, 1.0)
        assert law("cayley_neumann", 0.3, terms=2) == pytest.approx((1.0, math.sqrt(1 + 0.3**6)))
        assert law("cayley_neumann", 0.3, terms=1) == pytest.approx((1.0, 1.09))
        assert law("cayley_neumann", 1.0, terms=3) == pytest.approx((0.0, 1.0), abs=1e-7)
        assert law("exp_taylor", 0.5, order=1) == pytest.approx((1.0, math.sqrt(1.25)))

    def test_bad_input_is_refused(self):
        with pytest.raises(UnknownNameError, match="did you mean 'cayley'"):
            linalg.singular_value_bounds("caley", 0.1)
        with pytest.raises(OptionError, match="theta"):
            linalg.singular_value_bounds("cayley", -0.1)
        with pytest.raises(OptionError, match="needs terms="):
            linalg.singular_value_bounds("cayley_neumann", 0.1)


class TestPolish:
    def test_squares_the_error(self):
        R = linalg.exp_taylor(skew(12, norm=0.5), order=2)
        before, after = off_orthogonal(R), off_orthogonal(linalg.polish_orthogonal(R))
        assert before == pytest.approx(0.5**4 / 4, rel=1e-6) and after < before**2

    @pytest.mark.parametrize("shape", [(6, 3), (3, 6), (2, 4, 4)])
    def test_any_shape(self, shape):
        X = 1.02 * linalg.random_orthogonal(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        s = linalg.singular_values(linalg.polish_orthogonal(X, steps=3))
        assert float((s - 1).abs().max()) < 1e-12
        assert torch.equal(linalg.polish_orthogonal(X, steps=0), X)
        with pytest.raises(OptionError):
            linalg.polish_orthogonal(X, steps=-1)
