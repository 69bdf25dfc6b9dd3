"""The construction of coefficient tables: optimality, the published rows, the closing interval."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.errors import OptionError
from orthokit.linalg import orthogonalize, singular_values
from orthokit.linalg.coefficients import _MINIMAX
from orthokit.linalg.minimax import landing_interval, minimax_quintic, minimax_table


def values(row, s):
    a, b, c = row
    return a * s + b * s**3 + c * s**5


def composed(table, s):
    for row in table:
        s = values(row, s)
    return s


@given(st.floats(1e-6, 0.99), st.floats(0.1, 10))
def test_the_error_is_taken_four_times_with_alternating_signs(share, upper):
    # By Chebyshev's theorem that is what makes it the best odd quintic.
    row, error = minimax_quintic(share * upper, upper)
    # In the angle the extrema are broad: a grid sees their values to the square of its spacing.
    grid = upper * (1 + share) / 2 - upper * (1 - share) / 2 * np.cos(np.linspace(0, np.pi, 20001))
    misses = 1 - values(row, grid)
    assert np.abs(misses).max() == pytest.approx(error, rel=1e-6, abs=1e-9)
    signs = np.sign(misses[np.abs(misses) >= error * (1 - 1e-4) - 1e-9])
    if error > 1e-7:  # below, rounding of the values decides the sign
        assert np.count_nonzero(np.diff(signs)) == 3


@given(st.floats(1e-5, 0.9), st.floats(0.1, 10))
def test_the_best_row_scales_with_the_interval(share, factor):
    (a, b, c), error = minimax_quintic(share, 1.0)
    scaled, same = minimax_quintic(share * factor, factor)
    np.testing.assert_allclose(scaled, (a / factor, b / factor**3, c / factor**5), rtol=1e-6)
    assert same == pytest.approx(error, rel=1e-9, abs=1e-13)


def test_published_rows_come_out_to_their_last_digits():
    table = minimax_table(1e-3, steps=7)
    np.testing.assert_allclose(table[:6], _MINIMAX[:6], rtol=1e-13)
    # The seventh is fitted to an interval 0.01 long, where the published digits carry its rounding.
    np.testing.assert_allclose(table[6], _MINIMAX[6], rtol=1e-9)


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.05, 0.5])
@pytest.mark.parametrize("cushion", [0.0, 0.02407327424182761])
def test_each_row_hands_a_shorter_interval_on_centred_at_one(lower, cushion):
    widths = []
    for steps in range(1, 7):
        low, high = landing_interval(minimax_table(lower, steps=steps, cushion=cushion), lower)
        assert low + high == pytest.approx(2, abs=1e-9)
        widths.append(high - low)
    # An interval that is as short as float64 resolves cannot shrink further.
    assert all(after < before or before < 1e-12 for before, after in pairwise(widths))


@pytest.mark.parametrize("half", [3e-3, 1e-2, 3e-2])
def test_a_short_interval_closes_with_the_third_power(half):
    # The best quadratic in y = s^2 to y^(-1/2) on [1 - 2h, 1 + 2h] misses by its third derivative, 15/8, over 3!,
    # times (2h)^3 / 4, to leading order.
    _, error = minimax_quintic(1 - half, 1 + half)
    assert error == pytest.approx(5 / 8 * half**3, rel=3 * half)


def test_no_random_table_of_the_same_length_does_better():
    table = minimax_table(0.05, steps=2, cushion=0)
    best = landing_interval(table, 0.05)[1] - 1
    rng, s = np.random.default_rng(0), np.linspace(0.05, 1, 2001)
    for spread in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            other = np.array(table) * (1 + spread * rng.standard_normal((2, 3)))
            assert np.abs(composed(other, s) - 1).max() > best - 1e-12


@given(
    st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=1, max_size=3),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_landing_interval_holds_all_values_and_is_reached(table, lower, length):
    low, high = landing_interval(table, lower, upper=lower + length)
    reached = composed(table, np.linspace(lower, lower + length, 4001))
    size = max(abs(low), abs(high), 1)
    assert low - 1e-9 * size <= reached.min() and reached.max() <= high + 1e-9 * size
    # One row is smooth enough for the grid to come near both ends.
    if len(table) == 1:
        assert reached.min() - low < 1e-4 * size and high - reached.max() < 1e-4 * size


def test_safety_is_what_keeps_values_above_the_bound_from_diverging():
    # What rounded products may do: singular values up to one per cent above the bound.
    bare, safe = (minimax_table(1e-3, steps=5, safety=safety) for safety in (1.0, 1.01))
    promised = landing_interval(safe, 1e-3)
    low, high = landing_interval(safe, 1e-3, upper=1.01)
    assert promised[0] - 1e-12 <= low and high <= promised[1] + 1e-12
    assert landing_interval(bare, 1e-3, upper=1.01)[1] > 1e6


def test_a_table_for_the_spectrum_at_hand_beats_the_general_one():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(32, 128, generator=g, dtype=torch.float64)
    share = float(singular_values(X)[-1] / torch.linalg.matrix_norm(X)) / 1.02
    table = minimax_table(share, steps=4)
    made = orthogonalize(X, method="newton_schulz", coefficients=table, steps=4)
    general = orthogonalize(X, steps=4)
    ours, theirs = ((singular_values(Q) - 1).abs().max() for Q in (made, general))
    assert ours < theirs / 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: minimax_quintic(0.0, 1.0), "0 < lower <= upper"),
        (lambda: minimax_quintic(2.0, 1.0), "0 < lower <= upper"),
        (lambda: minimax_table(0.0, steps=3), "0 < lower <= 1"),
        (lambda: minimax_table(1e-3, steps=0), "steps >= 1"),
        (lambda: minimax_table(1e-3, steps=3, safety=0.9), "safety >= 1"),
        (lambda: minimax_table(1e-3, steps=3, cushion=1.0), "cushion < 1"),
        (lambda: landing_interval([(1, 0, 0)], 1.0, upper=0.5), "lower <= upper"),
    ],
)
def test_impossible_intervals_and_options_are_refused(call, words):
    with pytest.raises(OptionError, match=words):
        call()
