"""Charts of scores: rows sorted by one column, references as lines, groups told apart, the front of two scores."""

from __future__ import annotations

import numpy as np
import pytest

from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.figures import mean_interval
from orthokit.figures.merging_scores import merge_front, merge_scales, merge_scores

NAN = float("nan")
AVERAGE = {"TA": (80, 79, 81), "FDA": (85, 83, 87), "RegMean": (82, NAN, NAN), "base": (60, 59, 61)}
MARKS = {"digits": {label: (mean + 1, low, high) for label, (mean, low, high) in AVERAGE.items()}, "average": AVERAGE}
POINTS = {
    "TA": [(80, 70), (82, 72)],
    "FDA": [(85, 80), (84, 80)],
    "TIES": [(70, 82), (72, 84)],
    "base": [(50, 90), (52, 90)],
    "experts": [(95, 40), (95, 41)],
}


def test_rows_are_sorted_by_one_column_and_shared_by_the_panels() -> None:
    layout = merge_scores(MARKS, unit="points")["layout"]
    assert layout["yaxis"]["ticktext"] == ["FDA", "RegMean", "TA"]
    low, high = layout["yaxis"]["range"]
    assert low > high, "the best is on top"
    assert [layout[name]["title"]["text"] for name in ("xaxis", "xaxis2")] == [
        "digits<br>(points)",
        "average<br>(points)",
    ]
    assert layout["xaxis"]["domain"][1] < layout["xaxis2"]["domain"][0]


def test_groups_have_a_trace_a_panel_and_one_entry_in_the_legend() -> None:
    figure = merge_scores(MARKS, unit="points", groups={"RegMean": "with data"})
    merged = [trace for trace in figure["data"] if trace["name"] == "merged"]
    assert [trace["showlegend"] for trace in merged] == [True, False]
    assert [trace["xaxis"] for trace in merged] == ["x", "x2"]
    assert merged[1]["text"] == ["FDA", "TA"] and merged[1]["x"] == [85, 80] and merged[1]["y"] == [0, 2]
    assert merged[1]["error_x"]["array"] == [2, 1]
    (other,) = (trace for trace in figure["data"] if trace["name"] == "with data" and trace["showlegend"])
    assert other["marker"]["color"] != merged[0]["marker"]["color"]
    assert other["marker"]["symbol"] != merged[0]["marker"]["symbol"] and other["error_x"]["array"] == [None]


def test_groups_keep_the_order_they_are_given_in() -> None:
    groups = {"TIES": "with a vote", "RegMean": "with data", "TA": "weights", "FDA": "weights"}
    figure = merge_scores(MARKS, unit="points", groups=groups)
    assert [trace["name"] for trace in figure["data"] if trace["showlegend"]] == ["base", "with data", "weights"]


def test_long_bars_do_not_press_the_means_together() -> None:
    wide = {"average": AVERAGE | {"FDA": (85, -500, 600)}}
    low, high = merge_scores(wide, unit="points")["layout"]["xaxis"]["range"]
    assert 40 < low < 60 and 85 < high < 100
    assert "cut where a panel ends" in merge_scores(wide, unit="points")["layout"]["meta"]["caption"]
    assert "cut" not in merge_scores(MARKS, unit="points")["layout"]["meta"]["caption"]
    narrow = merge_scores({"average": AVERAGE}, unit="points")["layout"]["xaxis"]["range"]
    assert narrow[0] < 59 and narrow[1] > 87
    (level,) = (merge_scores({"average": {"TA": (0.0, NAN, NAN)}}, unit="points")["layout"]["xaxis"]["range"],)
    assert level[0] < 0 < level[1]


def test_references_are_upright_lines_in_every_panel() -> None:
    figure = merge_scores(MARKS, unit="points")
    lines = [trace for trace in figure["data"] if trace["name"] == "base"]
    assert [trace["x"] for trace in lines] == [[61, 61], [60, 60]]
    assert "base 60" in figure["layout"]["meta"]["caption"] and "experts" not in figure["layout"]["meta"]["caption"]


def test_what_cannot_be_drawn_as_scores_is_refused() -> None:
    with pytest.raises(OptionError, match="average"):
        merge_scores({"digits": AVERAGE}, unit="points")
    with pytest.raises(ShapeError, match="labels"):
        merge_scores({"digits": {"TA": (1, 1, 1)}, "average": AVERAGE}, unit="points")
    with pytest.raises(ShapeError, match="mean, low, high"):
        merge_scores({"average": {"TA": (1, 2)}}, unit="points")
    with pytest.raises(ShapeError, match="besides"):
        merge_scores({"average": {"base": (1, 1, 1)}}, unit="points")
    with pytest.raises(NonFiniteError, match="TA"):
        merge_scores({"average": {"TA": (NAN, 1, 1)}}, unit="points")


def test_the_front_is_of_means_and_leaves_references_out() -> None:
    figure = merge_front(POINTS, unit="points")
    caption = figure["layout"]["meta"]["caption"]
    assert "retains more: TIES and FDA." in caption and "Beaten on both axes: TA." in caption
    assert "experts" not in {trace["name"] for trace in figure["data"]}
    (star,) = (trace for trace in figure["data"] if trace["name"] == "base")
    assert (star["x"], star["y"]) == ([51], [90])
    words = figure["data"][-1]
    assert words["text"] == ["TIES", "FDA", "base"] and words["x"][:2] == [71, 84.5]


def test_bars_of_the_front_are_students_intervals_in_the_unit() -> None:
    shown = merge_front(POINTS, unit="points", factor=10)
    (trace,) = (trace for trace in shown["data"] if trace["name"] == "merged")
    at = trace["text"].index("TIES")
    mean, _, high = mean_interval([820, 840])
    assert trace["y"][at] == mean and trace["error_y"]["array"][at] == pytest.approx(high - mean)


def test_the_staircase_passes_through_the_front() -> None:
    edge = next(trace for trace in merge_front(POINTS, unit="points")["data"] if trace["name"] == "front")
    corners = list(zip(edge["x"], edge["y"], strict=True))
    assert (71, 83) in corners and (84.5, 80) in corners and np.all(np.diff(edge["y"]) <= 0)


def test_one_seed_has_no_bars_and_is_not_called_an_interval() -> None:
    figure = merge_front({"TA": [(80, 70)], "base": [(50, 90)]}, unit="points")
    assert "Bars" not in figure["layout"]["meta"]["caption"]
    assert figure["data"][1]["error_x"]["array"] == [0]


def test_what_cannot_be_a_front_is_refused() -> None:
    with pytest.raises(ShapeError, match="pairs"):
        merge_front({"TA": [(1, 2, 3)]}, unit="points")
    with pytest.raises(ShapeError, match="besides"):
        merge_front({"base": [(1, 2)], "experts": [(1, 2)]}, unit="points")


def test_scales_have_their_best_told_first_and_the_base_level() -> None:
    curves = {"TA": ([0.5, 1.0], [[0.1, 0.3], [0.3, 0.3]]), "TIES": ([0.25, 1.0, 2.0], [0.4, 0.5, 0.2])}
    figure = merge_scales(curves, unit="points", base=0.25, factor=100)
    assert figure["layout"]["meta"]["caption"] == "Highest: TIES 50 at 1, TA 30 at 1. At a scale of 1: TA 30, TIES 50."
    assert figure["data"][0]["y"] == [20, 30]
    assert figure["data"][-1]["x"] == [0.25, 2] and figure["data"][-1]["y"] == [25, 25]
    assert "scale of 1" not in merge_scales({"TA": ([0.5], [1])}, unit="points")["layout"]["meta"]["caption"]


def test_scales_that_have_no_place_are_refused() -> None:
    with pytest.raises(OptionError, match="above 0"):
        merge_scales({"TA": ([0.0, 1.0], [1, 2])}, unit="points")
    with pytest.raises(ShapeError, match="2 values"):
        merge_scales({"TA": ([0.5, 1.0], [1, 2, 3])}, unit="points")
