"""Charts about Pion: what they draw, say and refuse."""

import json

import numpy as np
import pytest
import torch

from orthokit.errors import OptionError, ShapeError
from orthokit.figures import COLOURS
from orthokit.figures.pion import drift_budget, rate_range, spectrum_kept, stationarity_split

STEPS = [10, 20, 40]


def charts():
    rng = np.random.default_rng(0)
    ways = {
        "order 2": {"truncation": [1e-6, 2e-6, 4e-6], "rounding": [1e-9, -2e-9, 1e-9]},
        "Cayley": {"truncation": [0, 0, 0], "rounding": [1e-9, 2e-9, -1e-9]},
    }
    return {
        "spectrum_kept": spectrum_kept([3.0, 2.0, 1.0], {"AdamW": [4, 2, 0.5], "Pion": torch.tensor([3.0, 2, 1])}),
        "drift_budget": drift_budget(STEPS, ways),
        "stationarity_split": stationarity_split(STEPS, {"in": rng.random((3, 3)), "radial": [0.1, 0.2, 0.1]}),
        "rate_range": rate_range([1e-3, 1e-2], {"A": [[2.0, np.nan], [2.1, 3.0]], "B": [2.2, 2.1]}),
    }


@pytest.mark.parametrize(("name", "figure"), list(charts().items()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_chart_is_plain_json_with_a_question_and_a_caption(name, figure):
    import plotly.graph_objects as go

    assert json.loads(json.dumps(figure, allow_nan=False)) == figure
    go.Figure(figure)
    assert figure["layout"]["meta"]["chart"] == name
    assert figure["layout"]["title"]["text"].endswith("?") and figure["layout"]["meta"]["caption"].endswith(".")


def test_kept_spectrum_is_drawn_as_a_ratio():
    traces = charts()["spectrum_kept"]["data"]
    assert traces[0]["y"] == pytest.approx([4 / 3, 1, 0.5]) and traces[1]["y"] == [1, 1, 1]
    assert "AdamW ×0.5 and Pion ×1" in charts()["spectrum_kept"]["layout"]["meta"]["caption"]


def test_budget_has_one_panel_for_each_way_and_one_legend_entry_for_each_cause():
    figure = charts()["drift_budget"]
    assert {trace["xaxis"] for trace in figure["data"]} == {"x", "x2"}
    assert [trace["name"] for trace in figure["data"] if trace["showlegend"]] == ["truncation", "rounding"]
    cut = figure["data"][2]
    assert cut["y"] == [None, None, None]  # an exact map has nothing to draw on a logarithmic axis
    assert figure["data"][1]["y"] == [1e-9, 2e-9, 1e-9]
    assert "rounding −1e−09" in figure["layout"]["meta"]["caption"]


def test_runs_that_diverged_are_crosses_and_counted():
    figure = charts()["rate_range"]
    crosses = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    assert len(crosses) == 1 and crosses[0]["x"] == [0.01] and crosses[0]["marker"]["color"] == COLOURS[0]
    assert figure["data"][0]["y"] == [2.05, 3.0]
    caption = figure["layout"]["meta"]["caption"]
    assert "A 2.05 at 0.001, 1 of 4 runs diverged; B 2.1 at 0.01, none diverged" in caption
    dead = rate_range([1.0, 2.0], {"A": [np.nan, np.nan]})
    assert "none lived" in dead["layout"]["meta"]["caption"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: spectrum_kept([1.0, 0.0], {"a": [1, 1]}), OptionError),
        (lambda: spectrum_kept([1.0, 0.5], {"a": [1]}), ShapeError),
        (lambda: drift_budget([1, 2], {"a": {"x": [1]}}), ShapeError),
        (lambda: drift_budget([1, 2], {"a": {"x": [1, 2]}, "b": {"y": [1, 2]}}), ShapeError),
        (lambda: stationarity_split([1, 2], {"a": [1]}), ShapeError),
        (lambda: stationarity_split([1, 2], {"a": [1, -1]}), OptionError),
        (lambda: rate_range([1, 2], {"a": [1]}), ShapeError),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, error):
    with pytest.raises(error):
        call()
