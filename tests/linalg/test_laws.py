"""Laws of the maps: against singular values, against simulated merges, and against each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit import linalg
from orthokit.errors import NonFiniteError, OptionError, ShapeError, UnknownNameError

SERIES = [("cayley_neumann", {"terms": k}) for k in range(1, 9)] + [("exp_taylor", {"order": p}) for p in range(1, 8)]


def gaussian_skew(count, b, std, seed=0):
    g = torch.Generator().manual_seed(seed)
    return std * linalg.unpack_skew(torch.randn(count, linalg.packed_size(b), generator=g, dtype=torch.float64))


def log_change(map, Q, polish=0, **options):
    """Mean log singular value of each map of the stack, by its determinant."""
    R = linalg.polish_orthogonal(getattr(linalg, map)(Q, **options), steps=polish)
    return torch.linalg.slogdet(R).logabsdet / Q.shape[-1]


class TestPlanes:
    @pytest.mark.parametrize("polish", [0, 1, 2])
    @pytest.mark.parametrize(("map", "options"), [*SERIES, ("cayley", {}), ("exp", {})])
    def test_agrees_with_the_map_of_a_plane(self, map, options, polish):
        theta = torch.linspace(0, 1.3, 14, dtype=torch.float64)
        R = linalg.polish_orthogonal(getattr(linalg, map)(linalg.unpack_skew(theta[:, None]), **options), steps=polish)
        expected = linalg.singular_values(R)[:, 0]
        assert torch.allclose(linalg.plane_singular_values(map, theta, polish=polish, **options), expected, atol=1e-10)

    @given(st.floats(0.01, 1.6), st.integers(0, 2), st.sampled_from(SERIES))
    def test_polished_bounds_hold_and_are_reached(self, theta, polish, series):
        map, options = series
        low, high = linalg.polished_bounds(map, theta, polish=polish, **options)
        s = linalg.plane_singular_values(
            map, torch.linspace(0, theta, 4001, dtype=torch.float64), polish=polish, **options
        )
        assert low - 1e-9 <= float(s.min()) and float(s.max()) <= high * (1 + 1e-9)
        # The grid misses an interior extremum by at most its spacing times the slope there.
        slope = float(s.diff().abs().max()) + 1e-9
        assert float(s.min()) - low <= 2 * slope and high - float(s.max()) <= 2 * slope

    def test_without_polish_the_bounds_are_those_of_the_map(self):
        assert linalg.polished_bounds("cayley_neumann", 0.7, terms=3, polish=0) == linalg.singular_value_bounds(
            "cayley_neumann", 0.7, terms=3
        )

    def test_dtype_is_kept(self):
        theta = torch.tensor([0.3], dtype=torch.float32)
        assert linalg.plane_singular_values("exp_taylor", theta, order=2).dtype == torch.float32

    @pytest.mark.parametrize(("map", "options"), SERIES)
    def test_leading_law_is_the_limit_of_small_angles(self, map, options):
        c, q = linalg.leading_law(map, **options)
        low, high = linalg.singular_value_bounds(map, 0.4, **options)
        assert (c > 0) == (high - 1 > 1 - low)
        # Large enough an angle that the deviation from 1 is not lost to rounding.
        theta = max(0.05, 1e-12 ** (1 / q))
        s = float(linalg.plane_singular_values(map, torch.tensor(theta, dtype=torch.float64), **options))
        assert math.log(s) == pytest.approx(c * theta**q, rel=0.5 * theta, abs=1e-15)


class TestOrthogonalityError:
    @pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (2, 4, 3), (1, 4), (0, 3, 3)])
    def test_is_the_largest_deviation_of_a_squared_singular_value(self, shape):
        X = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = (linalg.singular_values(X).square() - 1).abs().amax(-1)
        assert torch.allclose(linalg.orthogonality_error(X), expected, atol=1e-12)

    def test_small_errors_and_low_precision(self):
        X = torch.diag(torch.tensor([1 + 1e-9, 1.0], dtype=torch.float64))
        assert float(linalg.orthogonality_error(X)) == pytest.approx(2e-9, rel=1e-6)
        assert linalg.orthogonality_error(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.float32
        assert float(linalg.orthogonality_error(torch.zeros(2, 0))) == 0

    def test_bad_input_is_refused(self, unchecked):
        with pytest.raises(ShapeError):
            linalg.orthogonality_error(torch.zeros(3))
        with pytest.raises(NonFiniteError):
            linalg.orthogonality_error(torch.full((2, 2), torch.nan))


class TestDrift:
    @pytest.mark.parametrize("b", [1, 2, 3, 6, 17, 64])
    def test_angle_densities_have_unit_mass_and_the_right_second_moment(self, b):
        from orthokit.linalg._angles import finite_angles, semicircle_angles

        theta, w = finite_angles(b)
        # An odd size keeps one angle at 0, outside the density.
        assert float(w.sum()) == pytest.approx(1 if b % 2 == 0 or b == 1 else 1 - 1 / b, rel=1e-12)
        # The sum of squared angles is the sum of squared entries: b (b - 1) of variance 1.
        assert float((w * theta**2).sum()) == pytest.approx(b - 1, rel=1e-12, abs=1e-12)
        theta, w = semicircle_angles(b)
        moments = [float((w * theta ** (2 * j)).sum()) / b**j for j in range(5)]
        assert moments == pytest.approx([1, 1, 2, 5, 14], rel=1e-12)

    def test_a_two_by_two_generator_by_hand(self):
        """One plane whose angle is |x| for normal x: E log(1 + x^2) by plain quadrature."""
        x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
        weight = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
        expected = float((weight * torch.log1p((0.3 * x) ** 2)).sum())
        assert linalg.expected_log_drift("cayley_neumann", 0.3, 2, terms=1) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("b", [5, 8, 32])
    @pytest.mark.parametrize(
        ("map", "options", "polish"),
        [
            ("cayley_neumann", {"terms": 1}, 0),
            ("cayley_neumann", {"terms": 2}, 0),
            ("cayley_neumann", {"terms": 3}, 0),
            ("cayley_neumann", {"terms": 3}, 1),
            ("exp_taylor", {"order": 2}, 0),
        ],
    )
    def test_the_finite_law_is_the_mean_of_random_generators(self, map, options, polish, b):
        std = 0.3 / math.sqrt(b)
        found = log_change(map, gaussian_skew(2000, b, std), polish=polish, **options)
        error = float(found.std()) / math.sqrt(len(found))
        expected = linalg.expected_log_drift(map, std, b, polish=polish, **options)
        # Five standard errors: one false alarm in two million draws, and the draw is fixed.
        assert abs(float(found.mean()) - expected) < 5 * error
        assert error < 0.2 * abs(expected)

    @pytest.mark.parametrize("map", ["cayley_neumann", "exp_taylor"])
    @pytest.mark.parametrize("n", [1, 2, 3, 4])
    def test_the_three_methods_meet_in_their_limits(self, map, n):
        options = {"terms": n} if map == "cayley_neumann" else {"order": n}

        def law(std, b, method):
            return linalg.expected_log_drift(map, std, b, method=method, **options)

        large, small = 4096, 1e-3 / math.sqrt(4096)
        if n < 4:
            # Deviations far above rounding, angles far below 1.
            small = 0.05 / math.sqrt(large)
        assert law(small, large, "semicircle") == pytest.approx(law(small, large, "leading"), rel=0.02, abs=1e-14)
        # Moments of a finite generator fall short of the semicircle's by a few parts in b.
        assert law(0.2 / 16, 256, "finite") == pytest.approx(law(0.2 / 16, 256, "semicircle"), rel=0.03)

    def test_merges_of_both_sides_lose_what_the_law_says(self):
        """200 merges with blocks of 32 and s = 0.03: three terms lose nearly half of the spectrum, two gain 2 %."""
        W = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for terms, leading, measured in ((3, -0.485, -0.47), (2, 0.0242, 0.0227)):
            g = torch.Generator().manual_seed(2)
            V = W
            for _ in range(200):
                Q = 0.03 * linalg.unpack_skew(torch.randn(4, 32 * 31 // 2, generator=g, dtype=torch.float64))
                L, R = linalg.cayley_neumann(Q, terms=terms).split(2)
                p, q = (linalg.random_permutation(64, generator=g) for _ in range(2))
                V = linalg.rotate_blocks(V[p][:, q], left=L, right=R)
            change = math.exp(float(torch.linalg.slogdet(V)[1] - torch.linalg.slogdet(W)[1]) / 64) - 1
            finite, first = (
                math.expm1(400 * linalg.expected_log_drift("cayley_neumann", 0.03, 32, terms=terms, method=method))
                for method in ("finite", "leading")
            )
            assert first == pytest.approx(leading, abs=2e-3) and finite == pytest.approx(measured, abs=2e-3)
            assert change == pytest.approx(finite, rel=0.03)

    def test_exact_maps_do_not_drift(self):
        for map in ("cayley", "exp"):
            for method in ("finite", "semicircle", "leading"):
                assert linalg.expected_log_drift(map, 0.1, 16, method=method) == pytest.approx(0, abs=1e-15)

    @pytest.mark.parametrize(("b", "count", "below"), [(32, 200, 0.10), (256, 8, 0.02)])
    def test_norm_of_random_generators(self, b, count, below):
        norms = linalg.singular_values(gaussian_skew(count, b, 0.01))[:, 0] / linalg.expected_generator_norm(0.01, b)
        assert float(norms.mean()) == pytest.approx(1 - below, abs=0.01)
        assert float(norms.max()) < 1.05

    def test_bad_input_is_refused(self, unchecked):
        law = linalg.expected_log_drift
        with pytest.raises(UnknownNameError, match="method"):
            law("cayley", 0.1, 8, method="limit")
        with pytest.raises(UnknownNameError, match="did you mean 'cayley_neumann'"):
            law("cayley_neuman", 0.1, 8)
        with pytest.raises(OptionError, match="needs terms="):
            law("cayley_neumann", 0.1, 8)
        with pytest.raises(OptionError, match="no polish"):
            law("cayley_neumann", 0.1, 8, terms=3, polish=1, method="leading")
        with pytest.raises(OptionError, match="std"):
            linalg.expected_generator_norm(-1.0, 8)
        with pytest.raises(OptionError, match="polish"):
            linalg.plane_singular_values("cayley", torch.zeros(1), polish=-1)
        with pytest.raises(OptionError, match="polish"):
            linalg.polished_bounds("cayley", 0.1, polish=-1)
