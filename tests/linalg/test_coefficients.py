"""The coefficient tables: against an independent construction, and the steps one gets from them."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from orthokit.errors import OptionError, UnknownNameError
from orthokit.linalg import COEFFICIENTS, coefficient_table, orthogonalize
from orthokit.linalg.coefficients import _MINIMAX, _SAFETY
from orthokit.linalg.minimax import landing_interval, minimax_table

# The published construction never fits below this share of the interval's upper end, for numerical stability.
CUSHION = 0.02407327424182761


def minimax_quintic(lower: float, upper: float) -> tuple[np.ndarray, float]:
    """The odd quintic closest to 1 on ``[lower, upper]`` and its error: a linear program on a Chebyshev grid."""
    grid = (lower + upper) / 2 - (upper - lower) / 2 * np.cos(np.linspace(0, np.pi, 2001))
    # In t = (x^2 - middle) / half the monomials 1, t, t^2 stay independent also when the interval is short.
    middle, half = (upper**2 + lower**2) / 2, (upper**2 - lower**2) / 2
    t = (grid**2 - middle) / half
    powers = grid[:, None] * np.stack([np.ones_like(t), t, t**2], axis=1)
    ones = np.ones((len(grid), 1))
    constraints = np.block([[powers, -ones], [-powers, -ones]])
    bounds = np.concatenate([np.ones(len(grid)), -np.ones(len(grid))])
    found = linprog([0, 0, 0, 1], A_ub=constraints, b_ub=bounds, bounds=[(None, None)] * 4, method="highs-ds")
    assert found.status == 0, found.message
    p, q, r, error = found.x
    a, b, c = p - q * middle / half + r * (middle / half) ** 2, q / half - 2 * r * middle / half**2, r / half**2
    return np.array([a, b, c]), error


def composed(rows: int, lower: float = 1e-3) -> list[np.ndarray]:
    """Each row optimal for the interval its predecessor leaves, centred around 1 again after the cushion."""
    table, upper = [], 1.0
    for _ in range(rows):
        row, _ = minimax_quintic(max(lower, CUSHION * upper), upper)
        low, high = (row @ [s, s**3, s**5] for s in (lower, upper))
        row = row * 2 / (low + high)
        table.append(row)
        lower = float(row @ [lower, lower**3, lower**5])
        upper = 2 - lower
    return table


def test_polar_express_rows_are_the_composed_minimax_polynomials():
    # HiGHS solves to 1e-7 in the error, and the error is flat in the coefficients near its minimum.
    for ours, published in zip(composed(5), _MINIMAX, strict=False):
        np.testing.assert_allclose(published, ours, rtol=2e-4)


def test_late_polar_express_rows_are_as_good_as_the_best():
    # From the sixth row on the interval is so short that the coefficients are loose and only the error is not.
    lower, upper = 1e-3, 1.0
    for number, published in enumerate(_MINIMAX):
        grid = np.linspace(lower, upper, 4001)
        values = np.stack([grid, grid**3, grid**5], axis=1) @ np.array(published)
        if lower > CUSHION * upper:
            best = minimax_quintic(lower, upper)[1]
            assert np.abs(values - 1).max() <= best * 1.001 + 1e-7, number
        lower, upper = values.min(), values.max()
        assert (1 - lower) == pytest.approx(upper - 1, rel=1e-2, abs=1e-6), number
    assert upper - lower < 1e-6


def test_safety_evaluates_a_row_at_a_smaller_argument():
    for raw, safe in zip(_MINIMAX, COEFFICIENTS["polar_express"], strict=False):
        for s in (0.01, 0.4, 1.0):
            at = [s / _SAFETY, (s / _SAFETY) ** 3, (s / _SAFETY) ** 5]
            assert np.dot(safe, [s, s**3, s**5]) == pytest.approx(np.dot(raw, at), rel=1e-12)


def test_limit_row_keeps_one_to_third_order():
    a, b, c = COEFFICIENTS["polar_express"][-1]
    assert (a + b + c, a + 3 * b + 5 * c, 6 * b + 20 * c) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "steps", "low", "high"),
    [
        ("jordan", 5, 0.68, 1.21),
        ("baseline", 5, 0.57, 1.01),
        ("you", 5, 0.85, 1.15),
        ("you_six", 6, 0.98, 1.03),
        ("cesista", 8, 0.999, 1.001),
        ("polar_express", 5, 0.83, 1.14),
        ("polar_express_safe", 6, 0.98, 1.02),
        ("polar_express_safer", 6, 0.98, 1.02),
        ("modded_nanogpt", 5, 0.85, 1.15),
        ("gram_newton_schulz", 5, 0.84, 1.13),
        ("cans", 5, 0.88, 1.12),
        ("deepseek_v4", 10, 0.999, 1.001),
        ("relaxed_cubic", 5, 0.7, 1.3),
        ("quintic", 12, 0.999, 1.001),
        ("cubic", 14, 0.999, 1.001),
    ],
)
def test_tables_bring_singular_values_near_one(name, steps, low, high):
    # From 0.02 of the bound on: the spectra of random matrices, for which most of these tables were made.
    s = np.geomspace(0.02, 1 / 1.01, 500)
    for a, b, c in coefficient_table(name, steps):
        s = a * s + b * s**3 + c * s**5
    assert low <= s.min() <= s.max() <= high


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("polar_express_safe", {"steps": 8, "safety": 1.01, "cushion": 0.02}),
        ("polar_express_safer", {"steps": 8, "safety": 1.02, "cushion": 0.02}),
        ("modded_nanogpt", {"steps": 5, "safety": 1.02, "cushion": 0.02}),
        ("cans", {"steps": 5, "cushion": 0.0}),
    ],
)
def test_shipped_variants_are_the_construction_with_other_options(name, options):
    digits = 5e-5 if name == "cans" else 1e-10  # published with four decimals
    for number, (ours, made) in enumerate(zip(COEFFICIENTS[name], minimax_table(1e-3, **options), strict=True)):
        # The eighth row is made for an interval about 1e-6 long, which leaves its coefficients that much freedom.
        np.testing.assert_allclose(ours, made, rtol=1e-5 if number == 7 else 1e-10, atol=digits)


def test_gram_newton_schulz_rows_are_the_minimax_rows_at_a_smaller_argument():
    s = np.linspace(0, 1, 101)
    for raw, (a, b, c) in zip(_MINIMAX, COEFFICIENTS["gram_newton_schulz"], strict=False):
        expected = np.polynomial.Polynomial([0, raw[0], 0, raw[1], 0, raw[2]])(s / 1.05)
        np.testing.assert_allclose(a * s + b * s**3 + c * s**5, expected, atol=1e-12)


def test_turbo_muon_lands_only_below_its_sign_change():
    table = coefficient_table("turbo_muon", 4)
    low, high = landing_interval(table, 0.05, upper=0.85)
    assert 0.7 < low < high < 1.1
    # Its first row is negative from 0.884 on: a dominant direction would be stepped in the wrong way.
    assert landing_interval(table, 0.95)[1] < 0


@pytest.mark.parametrize("scaling", ["frobenius", "aol"])
def test_turbo_muon_turns_a_gradient_of_rank_one_round(scaling):
    g = torch.Generator().manual_seed(0)
    X = torch.outer(*torch.randn(2, 16, generator=g).double())
    turned = orthogonalize(X, method="newton_schulz", coefficients="turbo_muon", steps=4, scaling=scaling)
    safe = orthogonalize(X, scaling=scaling)
    assert (turned * X).sum() < 0 < (safe * X).sum()


def test_no_table_diverges_from_the_norm_bound():
    # A minimax row leaves [l, 2 - l]: nothing may pass 2 on the way, and twenty steps must settle.
    for name in COEFFICIENTS:
        s = np.linspace(0, 1, 1001)
        for a, b, c in coefficient_table(name, 20):
            s = a * s + b * s**3 + c * s**5
            assert np.abs(s).max() < 2, name
        # The relaxed rows aim at [0.7, 1.3] for good.
        assert np.abs(s).max() < (1.301 if name == "relaxed_cubic" else 1.21), name


def test_the_last_row_repeats_and_zero_steps_are_empty():
    one, two = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert coefficient_table([one, two], 4) == [one, two, two, two]
    assert coefficient_table((1.0, 2.0, 3.0), 2) == [(1, 2, 3)] * 2
    assert coefficient_table("you", 0) == []
    assert coefficient_table("you", 3) == list(COEFFICIENTS["you"][:3])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [(), (1.0, 2.0), [(1.0, 2.0)], [(1, 2, 3), (1, 2)], [1.0, (1, 2, 3)]])
def test_rows_that_are_no_triples_are_refused(bad):
    with pytest.raises(OptionError, match="three numbers"):
        coefficient_table(bad, 5)


def test_unknown_table_and_negative_steps_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'jordan'"):
        coefficient_table("jordaan", 5)
    with pytest.raises(OptionError, match="steps"):
        coefficient_table("jordan", -1)
