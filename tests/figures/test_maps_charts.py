"""Charts of the maps: what is drawn, what is said, and what is refused."""

import numpy as np
import pytest

from orthokit import figures as F
from orthokit.errors import OptionError, ShapeError


def test_errors_that_are_rounding_are_left_out():
    figure = F.error_laws([0.1, 1.0], {"k = 8": [1e-18, 1.0]}, measured={"k = 8": ([0.1, 0.5], [1e-16, 1e-5])})
    law, points = figure["data"]
    assert law["y"] == [None, 1] and points["y"] == [None, 1e-5]
    assert points["showlegend"] is False and points["legendgroup"] == law["legendgroup"]


def test_even_lengths_are_filled_and_the_gain_is_computed():
    figure = F.error_parity([1, 2, 3, 4, 5], {"0.2": [1, 1e-4, 1e-2, 1e-8, 1.3e-4]}, products=[1, 2, 2, 3, 3])
    symbols = figure["data"][0]["marker"]["symbol"]
    assert [s.endswith("-open") for s in symbols] == [True, False, True, False, True]
    caption = figure["layout"]["meta"]["caption"]
    assert caption == "At angle 0.2, k = 2 is 100 times more orthogonal than k = 3 and k = 4 is 13 000 times more " + (
        "orthogonal than k = 5."
    )
    assert figure["layout"]["xaxis"]["ticktext"][2] == "3<br>2"


def test_drift_is_drawn_by_size_and_named_by_direction():
    runs = np.array([[0, -0.4], [0, -0.5], [0, -0.6]])
    figure = F.merge_drift([0, 100], {"k = 3": runs, "k = 2": [0, 0.02]}, predicted={"k = 3": [0, -0.5]})
    band, shrinks, grows, law = figure["data"]
    mean, low, high = F.mean_interval(runs[:, 1])
    assert shrinks["name"] == "k = 3 (shrinks)" and grows["name"] == "k = 2 (grows)"
    assert shrinks["y"] == [None, pytest.approx(-100 * mean)]
    assert sorted(band["y"]) == pytest.approx(sorted([-100 * low, -100 * high]), rel=1e-6)
    assert law["y"] == [None, 50] and law["name"] == "predicted"


def test_an_interval_around_zero_ends_at_the_mean():
    figure = F.merge_drift([1, 2], {"a": [[0.01, 0.01], [-0.005, 0.02]]})
    low = min(figure["data"][0]["y"])
    assert low == pytest.approx(0.25) and all(v > 0 for v in figure["data"][0]["y"])


def test_angles_that_need_the_exact_map_stand_above_all_products():
    figure = F.map_adviser([0.1, 0.5, 1.0], {"1e-2": [1, 2, np.nan], "1e-6": [2, np.nan, np.nan], "1": [0, 0, 0]})
    heights = [trace["y"] for trace in figure["data"]]
    assert heights == [[1, 2, 3], [2, 3, 3], [0, 0, 0]]
    assert figure["layout"]["yaxis"]["ticktext"][-1].startswith("exact")
    caption = figure["layout"]["meta"]["caption"]
    assert "from an angle of 1 for 1e-2" in caption and "nowhere for 1." in caption


def test_the_angle_one_is_marked_where_it_is_in_range():
    names = [t["name"] for t in F.singular_values_by_angle([0, 0.5, 1.5], {"a": [1, 1, 2]})["data"]]
    assert names == ["a", "angle 1"]
    assert len(F.singular_values_by_angle([0, 0.5], {"a": [1, 1]})["data"]) == 1


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ShapeError, lambda: F.error_laws([0.1], {"a": [1.0]}, measured={"b": ([0.1], [1.0])})),
        (ShapeError, lambda: F.error_laws([0.1], {"a": [1.0]}, measured={"a": ([0.1, 0.2], [1.0])})),
        (ShapeError, lambda: F.error_laws([0.1], {"a": [1.0, 2.0]})),
        (OptionError, lambda: F.error_laws([0.0, 0.1], {"a": [0.0, 1.0]})),
        (OptionError, lambda: F.error_parity([1, 2], {"a": [1.0, 0.0]})),
        (ShapeError, lambda: F.error_parity([1, 2], {"a": [1.0, 2.0]}, products=[1])),
        (ShapeError, lambda: F.singular_values_by_angle([0, 1], {"a": [1, 1]}, measured={"b": ([1], [1])})),
        (ShapeError, lambda: F.merge_drift([0, 1], {"a": [0, 1, 2]})),
        (ShapeError, lambda: F.merge_drift([0, 1], {"a": [0, 1]}, predicted={"b": [0, 1]})),
        (ShapeError, lambda: F.map_adviser([0.1, 0.2], {"a": [1]})),
        (OptionError, lambda: F.map_adviser([0.0, 0.2], {"a": [1, 2]})),
    ],
)
def test_bad_input_gets_one_of_our_errors(error, make):
    with pytest.raises(error):
        make()
