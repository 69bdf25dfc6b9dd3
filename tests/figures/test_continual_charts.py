"""Charts of tasks in turn: what they draw and what they say."""

import math

import numpy as np
import pytest

from orthokit.errors import OptionError, ShapeError
from orthokit.figures.continual import forgetting_matrices, penalty_weights

A = [[2.0, math.nan, math.nan], [10.0, 4.0, math.nan], [20.0, 30.0, 6.0]]


def test_seeds_are_averaged_and_what_was_not_measured_is_empty():
    other = np.where(np.isnan(A), 99.0, A) + 2
    figure = forgetting_matrices({"a": np.stack([np.where(np.isnan(A), 50.0, A), other]), "b": A}, columns=1)
    first, second = figure["data"]
    assert first["z"] == [[3, None, None], [11, 5, None], [21, 31, 7]]
    assert second["text"] == [["2", "", ""], ["10", "4", ""], ["20", "30", "6"]]
    assert (first["zmax"], second["zmax"], first["showscale"], second["showscale"]) == (31, 31, True, False)
    caption = figure["layout"]["meta"]["caption"]
    assert caption.endswith("mean error when learned and at the end: a: 4 → 26 %; b: 3 → 25 %.")


def test_panels_stand_in_rows_and_do_not_overlap():
    figure = forgetting_matrices({str(i): A for i in range(5)}, columns=2)
    boxes = [
        (figure["layout"][f"xaxis{s}"]["domain"], figure["layout"][f"yaxis{s}"]["domain"]) for s in ("", 2, 3, 4, 5)
    ]
    apart = lambda p, q: p[1] <= q[0] or q[1] <= p[0]  # noqa: E731
    assert all(apart(a[0], b[0]) or apart(a[1], b[1]) for i, a in enumerate(boxes) for b in boxes[:i])
    assert [a["text"] for a in figure["layout"]["annotations"]] == list("01234")


def test_a_model_without_errors_can_be_drawn():
    assert forgetting_matrices({"a": np.zeros((2, 2))})["data"][0]["zmax"] == 1


def test_weights_are_shown_over_the_one_that_was_taken():
    figure = penalty_weights({"A": ([1, 10, 100], [30.0, 20.0, 25.0], 10), "B": ([0.5, 5], [9.0, 8.0], 5.0)})
    assert figure["data"][0]["x"] == [0.1, 1, 10] and figure["data"][1]["x"] == [0.1, 1]
    wanted = "At ten times the best weight more by 5 (A); at a tenth of it by 10 (A) and 1 (B)."
    assert figure["layout"]["meta"]["caption"] == wanted
    alone = penalty_weights({"A": ([1], [30.0], 1)})
    assert alone["layout"]["meta"]["caption"].startswith("No method was tried")


def test_bad_input_is_named():
    with pytest.raises(ShapeError, match="square"):
        forgetting_matrices({"a": [[1.0, 2.0]]})
    with pytest.raises(ShapeError, match="same size"):
        forgetting_matrices({"a": A, "b": [[1.0, 1.0], [1.0, 1.0]]})
    with pytest.raises(ShapeError, match="on and below"):
        forgetting_matrices({"a": [[1.0, 1.0], [math.nan, 1.0]]})
    for bad in ({"columns": 0}, {"top": 0}):
        with pytest.raises(OptionError, match="columns"):
            forgetting_matrices({"a": A}, **bad)
    with pytest.raises(OptionError, match="hold 3"):
        penalty_weights({"A": ([1, 10], [1.0, 2.0], 3)})
    with pytest.raises(OptionError, match="positive"):
        penalty_weights({"A": ([0, 10], [1.0, 2.0], 10)})
