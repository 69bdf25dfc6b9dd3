"""Student-t quantiles and intervals against scipy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.figures import mean_interval, t_quantile


@given(st.integers(1, 400), st.floats(0.01, 0.9999))
def test_quantile_agrees_with_scipy(freedom, level):
    # 1e-14 in the angle is amplified by the tangent near pi/2: 1e-7 covers level 0.9999 at one degree of freedom.
    assert t_quantile(freedom, level=level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-7)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_interval_agrees_with_scipy_and_holds_its_mean(values):
    mean, low, high = mean_interval(values)
    assert low <= mean <= high
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    half = stats.t.ppf(0.975, len(values) - 1) * spread
    assert high - mean == pytest.approx(half, rel=1e-7, abs=1e-9)


def test_a_higher_level_is_wider():
    assert t_quantile(4, level=0.99) > t_quantile(4, level=0.95)


def test_bad_input_is_refused(unchecked):
    with pytest.raises(ShapeError, match="at least two"):
        mean_interval([1.0])
    with pytest.raises(NonFiniteError):
        mean_interval([1.0, float("nan")])
    with pytest.raises(OptionError):
        t_quantile(0)
    with pytest.raises(OptionError):
        t_quantile(3, level=1.0)
