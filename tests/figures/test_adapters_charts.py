"""The charts of adapters say in words what their marks show."""

import numpy as np
import pytest

from orthokit import figures as F
from orthokit.errors import OptionError, ShapeError


def test_what_is_kept_is_told_from_what_is_broken():
    changes = {
        "OFT": {"spectrum": [1e-7, 1e-9], "angles": [0.0, 0.0]},
        "LoRA": {"spectrum": [0.01, 0.04], "angles": [1e-7, 1e-7]},
    }
    figure = F.kept_and_broken(changes)
    caption = figure["layout"]["meta"]["caption"]
    assert caption == "Everything is kept to 1e−05 by OFT. LoRA changes spectrum (0.02)."
    spectrum, angles = figure["data"][:2]
    assert spectrum["x"] == pytest.approx([1e-8, 0.02]) and angles["x"][0] is None, "zero has no place on a log axis"
    assert spectrum["error_x"]["array"][1] == pytest.approx(0.02)
    assert spectrum["error_x"]["arrayminus"][1] == pytest.approx(0.01)


def test_a_threshold_decides_what_counts_as_rounding():
    figure = F.kept_and_broken({"OFT": {"spectrum": [1e-3]}}, threshold=0.01)
    assert figure["layout"]["meta"]["caption"] == "Everything is kept to 0.01 by OFT."


def test_best_rates_at_an_edge_are_called_so():
    rates = {"A": ([1, 2, 4], [[2, 1, 3], [2, 1, 3]]), "B": ([1, 2], [1.0, 2.0]), "C": ([1, 2], [np.nan, np.nan])}
    figure = F.tuned_rates(rates, {"A": (2, [1.1, 1.2, 1.3])}, ylabel="nats", most=2.5)
    assert figure["layout"]["meta"]["caption"].startswith("Best rates: A 2, B 1 (at the edge).")
    assert [trace["name"] for trace in figure["data"]] == ["A", "A", "B"]
    assert figure["data"][1]["x"] == [2, 2, 2] and figure["layout"]["yaxis"]["range"] == [0.85, 2.5]


def test_budgets_are_told_with_their_losses():
    figure = F.loss_by_budget({"A": ([1000, 4000], [[2.0, 1.0], [3.0, 1.0]])}, ylabel="nats", start=4, full=0.5)
    assert figure["layout"]["meta"]["caption"] == "From 4 before training: A 2.5 with 1,000, 1 with 4,000."
    assert figure["data"][-1]["name"] == "full fine-tuning" and figure["data"][-1]["y"] == [0.5, 0.5]


def test_slopes_of_rates_are_fitted():
    blocks = [8, 16, 64]
    figure = F.rates_by_block((blocks, [8**-0.5, 16**-0.5, 64**-0.5]), (blocks, [1, 1, 1]))
    assert "to the power −0.5 without scaling and 0 with it" in figure["layout"]["meta"]["caption"]
    guide = figure["data"][-1]
    assert guide["y"][0] / guide["y"][1] == pytest.approx(8**0.5, rel=1e-5)


def test_costs_above_the_limit_are_named():
    costs = {"a model": {"OFT": 1.1, "BOFT": 1.6}, "a layer": {"OFT": 1.4, "BOFT": 1.2}}
    caption = F.step_costs(costs)["layout"]["meta"]["caption"]
    assert caption.endswith("Above 1.3: BOFT (a model) and OFT (a layer).")
    assert "Above" not in F.step_costs(costs, limit=None)["layout"]["meta"]["caption"]


def test_changes_of_rows_are_told_at_the_largest_distance():
    changes = {"OFT": {"merged": [0.0, 0.0], "requantised": [0.01, 0.02]}}
    figure = F.requantised([0.1, 0.4], changes)
    assert figure["layout"]["meta"]["caption"] == "At a change of 0.4: OFT merged 0, requantised 0.02."
    assert figure["data"][0]["y"] == [None, None] and figure["data"][1]["line"]["dash"] == "dot"


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ShapeError, lambda: F.kept_and_broken({"A": {"x": [1.0]}, "B": {"y": [1.0]}})),
        (OptionError, lambda: F.kept_and_broken({"A": {"x": [-1.0]}})),
        (OptionError, lambda: F.kept_and_broken({"A": {"x": [1.0]}}, threshold=0.0)),
        (OptionError, lambda: F.tuned_rates({"A": ([0.0, 1.0], [1.0, 2.0])}, ylabel="")),
        (ShapeError, lambda: F.tuned_rates({"A": ([1.0, 2.0], [np.nan, np.nan])}, ylabel="")),
        (ShapeError, lambda: F.loss_by_budget({"A": ([1.0, 2.0], [1.0])}, ylabel="")),
        (ShapeError, lambda: F.rates_by_block(([8], [1.0]), ([8], [1.0]))),
        (ShapeError, lambda: F.step_costs({"a": {"OFT": 1.0}, "b": {"LoRA": 1.0}})),
        (OptionError, lambda: F.step_costs({"a": {"OFT": 0.0}})),
        (ShapeError, lambda: F.requantised([0.1], {"A": {"x": [1.0]}, "B": {"y": [1.0]}})),
    ],
)
def test_bad_input_gets_one_of_our_errors(error, make):
    with pytest.raises(error):
        make()
