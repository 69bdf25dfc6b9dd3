"""Charts of the race: what they hold, what they say, and that rivals can be told apart."""

import json
import math

import numpy as np
import pytest

from orthokit.errors import DtypeError, OptionError, ShapeError
from orthokit.figures import mean_interval, race_curves, race_ranking, rate_sensitivity

NINE = {f"rival {k}": ([0.0, 1.0, 2.0], [[3.0, 2.0, 1.0 + k], [3.0, 2.2, 1.1 + k]]) for k in range(9)}
AXES = {"xlabel": "thousands of bytes", "ylabel": "loss (nats)"}


def lines(figure):
    return [trace for trace in figure["data"] if trace.get("showlegend", True)]


def test_nine_rivals_have_nine_styles():
    drawn = lines(race_curves(NINE, **AXES))
    styles = {(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for t in drawn}
    assert len(styles) == len(drawn) == 9


def test_the_band_is_the_interval_of_the_mean():
    figure = race_curves({"A": ([0, 1], [[3.0, 2.0], [3.0, 2.2], [3.3, 2.1]])}, **AXES)
    low, high = mean_interval([2.0, 2.2, 2.1])[1:]
    band = next(t for t in figure["data"] if not t.get("showlegend", True))
    assert band["y"][1] == pytest.approx(high, rel=1e-6) and band["y"][2] == pytest.approx(low, rel=1e-6)
    assert lines(figure)[0]["y"] == pytest.approx([3.1, 2.1])


def test_the_start_can_be_left_out_and_rivals_may_have_axes_of_their_own():
    curves = {"A": ([0, 5, 10], [3, 2, 1]), "B": ([0, 2, 4], [3, 2.5, 2])}
    figure = race_curves(curves, **AXES, skip=0.3)
    assert [t["x"] for t in figure["data"]] == [[5, 10], [4]]
    assert figure["layout"]["meta"]["caption"] == "At the end: A 1, B 2."
    for bad in (-0.1, 1.0):
        with pytest.raises(OptionError, match="skip must be in"):
            race_curves(curves, **AXES, skip=bad)


def test_who_diverged_is_named_and_drawn_as_far_as_it_came():
    figure = race_curves({"A": ([0, 1], [3, 2]), "B": ([0, 1], [3, math.nan])}, **AXES)
    assert figure["layout"]["meta"]["caption"] == "At the end: A 2. Diverged: B."
    assert figure["data"][1]["y"] == [3, None]
    json.dumps(figure, allow_nan=False)
    assert race_curves({"A": ([0], [math.nan])}, **AXES)["layout"]["meta"]["caption"].startswith("No run ended")


def test_the_ranking_is_ordered_by_the_first_kind_and_judges_every_kind():
    tokens = {"Muon": [-0.2, -0.21, -0.2], "SGD": [0.1, 0.11, 0.1], "Lion": [-0.1, 0.1, 0.0]}
    time = {"Muon": [-0.1, 0.12, 0.0], "SGD": [0.2, 0.21, 0.2], "Lion": [-0.3, -0.31, -0.3]}
    figure = race_ranking({"equal tokens": tokens, "equal time": time})
    assert figure["layout"]["yaxis"]["ticktext"] == ["Muon", "Lion", "SGD"]
    first, second = figure["data"]
    assert [s.endswith("-open") for s in first["marker"]["symbol"]] == [False, True, False]
    assert first["x"] == pytest.approx([np.mean(tokens[k]) for k in ("Muon", "Lion", "SGD")], abs=1e-7)
    mean, low, high = mean_interval(tokens["SGD"])
    assert first["error_x"]["array"][2] == pytest.approx(high - mean)
    assert first["error_x"]["arrayminus"][2] == pytest.approx(mean - low)
    assert second["y"] == pytest.approx([0.14, 1.14, 2.14])
    assert figure["layout"]["meta"]["caption"] == (
        "Equal tokens: better than AdamW: Muon; worse: SGD; undecided: Lion. "
        "Equal time: better than AdamW: Lion; worse: SGD; undecided: Muon. Markers: mean; bars: 95% interval."
    )


def test_the_ranking_names_who_diverged_and_wants_equal_labels():
    figure = race_ranking({"equal tokens": {"A": [-1.0, -1.1], "B": [math.nan, 1.0]}})
    assert "diverged: B" in figure["layout"]["meta"]["caption"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["A", "B"] and figure["data"][0]["text"] == ["A"]
    json.dumps(figure, allow_nan=False)
    with pytest.raises(ShapeError, match="same labels"):
        race_ranking({"one": {"A": [1.0, 2.0]}, "two": {"B": [1.0, 2.0]}})
    with pytest.raises(ShapeError, match="at least two"):
        race_ranking({"one": {"A": [1.0]}})


def test_sensitivity_is_measured_from_each_rivals_own_best():
    rates = {"A": ([1, 2, 4], [[3.0, 2.0, 2.5], [3.2, 2.0, 2.7]]), "B": ([10, 20], [5.0, math.nan])}
    figure = rate_sensitivity(rates, most=1.0)
    first, second = figure["data"]
    assert first["x"] == [0.5, 1, 2] and first["y"] == pytest.approx([1.1, 0, 0.6])
    assert second["x"] == [1, 2] and second["y"] == [0, None]
    assert figure["layout"]["meta"]["caption"] == "Twice the best rate costs: A 0.6, B diverges; half of it: A 1.1."
    assert figure["layout"]["yaxis"]["range"][1] == 1


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({}, ShapeError),
        ({"A": ([1, 2], [1.0])}, ShapeError),
        ({"A": [1.0, 2.0, 3.0]}, ShapeError),
        ({"A": ([2, 1], [1.0, 2.0])}, OptionError),
        ({"A": (["x"], [1.0])}, DtypeError),
    ],
)
def test_what_does_not_fit_together_is_refused(unchecked, bad, error):
    with pytest.raises(error):
        race_curves(bad, **AXES)
    with pytest.raises(error):
        rate_sensitivity(bad)


def test_rates_at_or_below_zero_and_nothing_but_failures_are_refused():
    with pytest.raises(OptionError, match="above 0"):
        rate_sensitivity({"A": ([0.0, 1.0], [1.0, 2.0])})
    with pytest.raises(ShapeError, match="every run diverged"):
        rate_sensitivity({"A": ([1.0, 2.0], [math.nan, math.nan])})
