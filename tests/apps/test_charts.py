"""The live charts: smoothed and thinned without inventing anything, on scales that hold still."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orthokit_widgets import _charts
from orthokit_widgets.components import Chart
from orthokit_widgets.training_view import _said

numbers = st.lists(st.floats(-1e3, 1e3) | st.just(float("nan")), min_size=1, max_size=60)


@given(numbers, st.integers(1, 20))
def test_smoothing_is_the_mean_of_the_last_values(values: list[float], window: int) -> None:
    given_values = np.array(values)
    expected = [given_values[max(0, i + 1 - window) : i + 1].mean() for i in range(len(values))]
    # Differences of running sums of up to 60 values below 1e3 in double precision.
    np.testing.assert_allclose(_charts.smooth(given_values, window), expected, atol=1e-9)


@given(st.integers(1, 5000), st.integers(2, 1000))
def test_thinning_keeps_order_and_both_ends(size: int, most: int) -> None:
    steps = np.arange(size)
    kept, values = _charts.thin(steps, steps * 2.0, most)
    assert len(kept) <= most or len(kept) == size <= most
    assert (kept[0], kept[-1]) == (0, size - 1)
    assert (np.diff(kept) > 0).all()
    assert (values == 2 * kept).all()


def test_a_long_run_is_sent_as_at_most_a_thousand_points() -> None:
    steps = np.arange(1, 5001)
    figure = _charts.losses({"run": (steps, 1 / steps)})
    assert len(figure["data"][0]["x"]) <= 1000
    assert figure["data"][0]["x"][-1] == 5000
    seven = _charts.losses({f"run {k}": (steps, 1 / steps) for k in range(7)})
    assert sum(len(trace["x"]) for trace in seven["data"]) <= 1500
    assert figure["layout"]["meta"]["caption"].endswith("Each point is the mean of 125 steps.")


def test_names_lose_what_all_end_with_and_stay_apart() -> None:
    assert _charts.short(["muon-pre-1M-digits", "adamw-1M-digits"]) == ["muon-pre", "adamw"]
    assert _charts.short(["muon-pre-1M-digits"]) == ["muon-pre-1M-digits"]
    assert _charts.short(["a-b", "a-b-2"]) == ["a-b", "a-b-2"]
    assert _charts.short(["b", "a-b"]) == ["b", "a-b"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("-".join), min_size=1, unique=True))
def test_short_names_are_as_different_as_the_names(names: list[str]) -> None:
    short = _charts.short(names)
    assert len(set(short)) == len(names)
    assert all(short)


def test_the_colours_of_the_heat_map_hold_still_while_values_move_a_little() -> None:
    spectra = [np.linspace(2.6 + 0.001 * i, 0.1, 64, dtype=np.float32) for i in range(300)]
    few = _charts.live_spectrum(list(range(10)), spectra[:10], matrix="m.weight", of="spectrum")["data"][0]
    many = _charts.live_spectrum(list(range(300)), spectra, matrix="m.weight", of="spectrum")["data"][0]
    assert (few["zmin"], few["zmax"]) == (-2.0, 0.5)
    assert (many["zmin"], many["zmax"]) == (few["zmin"], few["zmax"])
    assert np.shape(many["z"]) == (64, 120)


def test_a_run_without_values_keeps_the_colours_of_the_others() -> None:
    full = _charts.history({"a": ([0, 1], [1.0, 2.0]), "b": ([0, 1], [3.0, 4.0])}, quantity="energy")
    part = _charts.history({"a": ([], []), "b": ([0, 1], [3.0, 4.0])}, quantity="energy")
    assert part["data"][1]["line"] == full["data"][1]["line"]
    assert part["data"][0]["y"] == [None]


@pytest.mark.parametrize("quantity", ["gap", "gap_ratio", "energy", "stable_rank", "alignment"])
def test_every_quantity_of_the_page_has_its_chart(quantity: str) -> None:
    figure = _charts.history({"a": ([0, 1], [1.0, 2.0])}, quantity=quantity)
    assert figure["layout"]["title"]["text"].endswith("?")


def test_arrows_keep_their_angles_and_the_longest_lies_in_view() -> None:
    figure = _charts.arrows({"signal": (15.0, 0.0), "gradient": (15.0, 100.0)})
    assert figure["layout"]["yaxis"]["scaleanchor"] == "x"
    assert figure["layout"]["xaxis"]["range"][1] > 100
    assert [figure["data"][1]["x"][1], figure["data"][1]["y"][1]] == [100, 15]
    assert all((head["ax"], head["ay"]) == (0, 0) for head in figure["layout"]["annotations"])


def test_a_chart_sends_question_answer_and_data_and_an_empty_one_says_why() -> None:
    chart = Chart()
    chart.show(_charts.history({"a": ([0, 1], [1.0, 2.0])}, quantity="energy"))
    sent = json.loads(chart.figure)
    assert sent["heading"] == "Do the neurons stay spread out?"
    assert sent["text"].startswith("a: from 1 to 2")
    assert "title" not in sent["layout"]
    chart.show(None, title="Loss", empty="Press Start.")
    assert json.loads(chart.figure)["message"] == "Press Start."


def test_of_the_monitor_s_periods_only_the_latest_is_said() -> None:
    notes = ["looking every 9 steps instead of 5", "gap is not measured", "looking every 5 steps again"]
    assert _said(notes) == ["Monitor: gap is not measured.", "Monitor: looking every 5 steps again."]
    # The same sentence twice is the same news.
    assert _said([notes[0], notes[2], notes[0]]) == [f"Monitor: {notes[0]}."]
