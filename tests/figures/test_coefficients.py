"""Charts of the coefficient lab: what they leave out, what they say, what they refuse."""

import numpy as np
import pytest

from orthokit import figures as F
from orthokit.errors import OptionError, ShapeError


def test_every_table_has_a_panel_and_rows_fill_from_the_top():
    x = [0.01, 0.1, 1.0]
    figure = F.table_maps({f"t{i}": (x, [0.1 * i, 0.5, 1.0]) for i in range(5)}, columns=2)
    assert [note["text"] for note in figure["layout"]["annotations"]] == [f"<b>t{i}</b>" for i in range(5)]
    assert len([key for key in figure["layout"] if key.startswith("xaxis")]) == 5
    tops = [figure["layout"][key]["domain"][1] for key in ("yaxis", "yaxis3", "yaxis5")]
    assert tops[0] == 1 and tops[0] > tops[1] > tops[2]
    # Only the lowest panel of each column carries numbers.
    shown = [figure["layout"][f"xaxis{i}"]["showticklabels"] for i in ("", 2, 3, 4, 5)]
    assert shown == [False, False, False, True, True]


def test_the_caption_of_the_maps_judges_the_wanted_inputs_only():
    x = [0.001, 0.02, 1.0]
    figure = F.table_maps({"slow": (x, [0.0, 1.0, 1.0]), "rough": (x, [1.0, 0.8, 1.2])})
    assert "slow comes closest to 1 (within 0)" in figure["layout"]["meta"]["caption"]
    assert "rough stays furthest" in figure["layout"]["meta"]["caption"]


def test_negative_values_stay_in_sight_and_divergence_does_not_flatten_the_rest():
    before = {"1/k": [1.0, 0.5, 0.25]}
    turned = F.before_after(before, {"1/k": {"a": [-0.9, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}})
    assert turned["layout"]["yaxis"]["range"][0] < -0.9
    wild = F.before_after(before, {"1/k": {"a": [900.0, 1.0, np.nan], "b": [1.0, 1.0, 1.0]}})
    assert wild["layout"]["yaxis"]["range"][1] < 2
    assert "a diverged" in wild["layout"]["meta"]["caption"]


def test_front_is_what_nothing_beats_and_the_diverged_are_named():
    points = {"1/k": {"a x5": (1.0, 0.1), "b x6": (1.2, 0.003), "c x5": (1.1, 0.2), "d x9": (2.0, np.inf)}}
    figure = F.accuracy_cost(points, limit=1.35)
    front = next(trace for trace in figure["data"] if trace["name"] == "front")
    assert (front["x"], front["y"]) == ([1, 1.2], [0.1, 0.003])
    assert figure["layout"]["meta"]["caption"].endswith("1/k: a x5 and b x6. Diverged: d x9 on 1/k.")
    drawn = [label for trace in figure["data"] for label in trace.get("customdata", [])]
    assert drawn == ["a x5", "b x6", "c x5"]


def test_labels_of_the_front_stand_apart():
    points = {"1/k": {"a": (1.0, 0.1), "b": (1.1, 0.095), "c": (1.2, 0.01)}}
    texts = {t for trace in F.accuracy_cost(points)["data"] for t in trace.get("text", [])}
    assert texts == {"a", "c", ""}


def test_each_scaling_is_a_bar_with_its_error_at_the_right():
    ranges = {"g": {"f": (0.01, 0.1), "s": (0.1, 1.0)}, "k": {"f": (0.02, 1.0), "s": (0.02, 1.0)}}
    figure = F.scaling_ranges(ranges, {"g": {"f": 0.2, "s": 0.1}, "k": {"f": 0.3, "s": 0.3}})
    assert [trace["x"] for trace in figure["data"]][:2] == [[0.01, 0.1], [0.1, 1]]
    assert [trace["text"][1].strip() for trace in figure["data"]] == ["0.2", "0.1", "0.3", "0.3"]
    heights = [trace["y"][0] for trace in figure["data"]]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 4
    assert [trace["showlegend"] for trace in figure["data"]] == [True, True, False, False]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.table_maps({"a": ([0.0, 1.0], [0.0, 1.0])}), OptionError, "positive"),
        (lambda: F.table_maps({"a": ([0.1, 1.0], [0.0, 1.0])}, columns=0), OptionError, "columns"),
        (lambda: F.before_after({"a": [1.0]}, {"b": {"x": [1.0]}}), ShapeError, "same spectra"),
        (
            lambda: F.before_after({"a": [1.0], "b": [1.0]}, {"a": {"x": [1.0]}, "b": {"y": [1.0]}}),
            ShapeError,
            "labels",
        ),
        (lambda: F.accuracy_cost({"a": {"x": (1.0, np.inf)}}), ShapeError, "at least one point"),
        (lambda: F.scaling_ranges({"a": {"x": (0.0, 1.0)}}, {"a": {"x": 0.1}}), OptionError, "0 < low"),
        (lambda: F.scaling_ranges({"a": {"x": (0.1, 1.0)}}, {"a": {}}), ShapeError, "errors needs"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
