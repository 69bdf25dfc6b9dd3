"""Charts of representation geometry: what they draw, what they say, what they refuse."""

import json

import numpy as np
import pytest

from orthokit.errors import OptionError, ShapeError, UnknownNameError
from orthokit.figures.intervals import mean_interval
from orthokit.figures.representation import (
    phase_forest,
    rank_after_finetuning,
    rank_and_loss,
    rank_by_layer,
    rank_phases,
)

CURVES = {
    "AdamW": ([0, 1, 2, 4], [[17.0, 2.0, 8.0, 12.0], [19.0, 4.0, 8.0, 14.0]]),
    "Muon": ([0, 1, 2, 4], [17.0, 3.0, 20.0, 18.0]),
}


def caption(figure):
    json.dumps(figure, allow_nan=False)
    return figure["layout"]["meta"]["caption"]


def test_step_zero_stands_before_step_one_and_says_zero():
    figure = rank_phases(CURVES)
    trace = next(t for t in figure["data"] if t.get("name") == "Muon")
    assert trace["x"] == [0.5, 1, 2, 4] and trace["y"] == [17, 3, 20, 18]
    axis = figure["layout"]["xaxis"]
    assert dict(zip(axis["tickvals"], axis["ticktext"], strict=True))[0.5] == "0"
    late = rank_phases({"A": ([1, 2], [1.0, 2.0])})["layout"]["xaxis"]
    assert "0" not in late["ticktext"]


def test_the_band_is_the_interval_of_the_mean_and_one_seed_has_none():
    figure = rank_phases(CURVES)
    bands = [t for t in figure["data"] if t.get("fill")]
    assert len(bands) == 1
    _, low, high = mean_interval([12.0, 14.0])
    assert bands[0]["y"][3] == pytest.approx(high, rel=1e-6) and bands[0]["y"][4] == pytest.approx(low, rel=1e-6)
    assert "Bands" in caption(figure) and "Bands" not in caption(rank_phases({"A": CURVES["Muon"]}))


def test_turning_points_are_marked_where_the_mean_is_and_told():
    figure = rank_phases(CURVES, turns={"AdamW": (1, 4)})
    marks = next(t for t in figure["data"] if t.get("name", "").startswith("turning"))
    assert (marks["x"], marks["y"]) == ([1, 4], [3, 13])
    assert caption(figure).startswith("AdamW: 18 at the start, lowest 3 at step 1, highest after it 13 at step 4, at")
    with pytest.raises(UnknownNameError, match="SGD"):
        rank_phases(CURVES, turns={"SGD": (0, 1)})
    with pytest.raises(OptionError, match="3 is not"):
        rank_phases(CURVES, turns={"Muon": (0, 3)})


def test_a_phase_is_present_where_its_whole_interval_counts():
    runs = {
        "rise": {"AdamW": [[1.0, 0.9, 1.1], [0.06, 0.04, 0.08]], "Muon": [[2.0, 1.9, 2.1]]},
        "fall": {"AdamW": [[0.0, 0.0, 0.0], [-0.3, -0.4, -0.2]], "Muon": [[0.2, 0.1, 0.3]]},
    }
    figure = phase_forest(runs)
    assert caption(figure).startswith("rise: present in 2 of 3 runs; fall: in 1 of 3.")
    line, adamw, muon = figure["data"]
    assert set(line["x"]) == {0.05} and len(set(adamw["y"] + muon["y"])) == 6
    assert [s.endswith("-open") for s in adamw["marker"]["symbol"]] == [False, True, True, True]
    assert adamw["error_x"]["arrayminus"] == pytest.approx([0.1, 0.02, 0, 0.1])
    assert "in 3 of 3" in caption(phase_forest(runs, least=0.0))


def test_layers_keep_their_order_and_seeds_give_bars():
    figure = rank_by_layer({"step 0": [[3, 9], [5, 9]], "end": [1, 2]}, layers=["norm", "embed"])
    first, last = figure["data"]
    assert first["x"] == ["norm", "embed"] and first["y"] == [4, 9]
    assert first["error_y"]["array"][0] == pytest.approx(mean_interval([3, 5])[2] - 4, rel=1e-6)
    assert "error_y" not in last
    assert caption(figure).startswith("step 0: lowest 4 in norm, highest 9 in embed; end: lowest 1 in norm")


def test_training_runs_from_left_to_right_and_models_without_a_curve_are_points():
    figure = rank_and_loss({"A": ([8, 4, 4.1], [17, 3, 20])}, points={"longer": (1.5, 25)})
    assert figure["layout"]["xaxis"]["autorange"] == "reversed"
    assert figure["data"][1]["x"] == [1.5] and figure["data"][1]["mode"] == "markers"
    assert caption(figure) == "Ends: A 20 at 4.1 bits per byte; longer 25 at 1.5."


def test_fine_tuning_is_judged_by_its_interval():
    changes = {
        "new": {"full": [-0.4, -0.41], "OFT": [0.1, 0.11], "LoRA": [-1.0, 1.0]},
        "old": {"full": [-0.1, -0.11], "OFT": [-0.1, -0.11], "LoRA": [-0.1, -0.12]},
    }
    figure = rank_after_finetuning(changes)
    assert caption(figure).startswith("On new: raised by OFT; lowered by full; undecided for LoRA. On old: lowered by")
    assert [s.endswith("-open") for s in figure["data"][0]["marker"]["symbol"]] == [False, False, True]
    assert figure["data"][0]["x"] == pytest.approx([np.mean(v) for v in changes["new"].values()])
    assert not rank_after_finetuning({"new": changes["new"]})["layout"]["showlegend"]


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (ShapeError, lambda: rank_phases({})),
        (ShapeError, lambda: rank_phases({"A": ([0, 1], [1.0])})),
        (ShapeError, lambda: rank_phases({"A": 3})),
        (OptionError, lambda: rank_phases({"A": ([-1, 1], [1.0, 2.0])})),
        (OptionError, lambda: rank_phases({"A": ([1, 0], [1.0, 2.0])})),
        (ShapeError, lambda: phase_forest({"rise": {"A": [[1.0, 0.9]]}})),
        (OptionError, lambda: phase_forest({"rise": {"A": [[1.0, 1.1, 1.2]]}})),
        (ShapeError, lambda: phase_forest({"rise": {"A": [[1, 1, 1]]}, "fall": {"B": [[1, 1, 1]]}})),
        (ShapeError, lambda: rank_by_layer({"a": [1, 2]}, layers=["x"])),
        (OptionError, lambda: rank_by_layer({"a": [-1]}, layers=["x"])),
        (ShapeError, lambda: rank_and_loss({"A": ([2, 1], [[1, 2], [1, 2]])})),
        (ShapeError, lambda: rank_and_loss({"A": ([2, 1], [1, 2])}, points={"B": (1, 2, 3)})),
        (ShapeError, lambda: rank_after_finetuning({"new": {"A": [1.0]}})),
        (ShapeError, lambda: rank_after_finetuning({"new": {"A": [1, 2]}, "old": {"B": [1, 2]}})),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, error, make):
    with pytest.raises(error):
        make()
