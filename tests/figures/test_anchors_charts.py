"""Charts of anchors: what they draw, what they say, what they refuse."""

import json

import pytest

from orthokit.errors import OptionError, ShapeError, UnknownNameError
from orthokit.figures.anchors import anchor_alignment, anchor_overlap, anchor_spectra, loss_landscape


def caption(figure):
    json.dumps(figure, allow_nan=False)
    return figure["layout"]["meta"]["caption"]


def test_alignment_is_the_mean_of_seeds_and_tells_when_the_best_is_reached():
    figure = anchor_alignment({"A": ([0, 10, 20], [[0.1, 0.8, 0.7], [0.3, 1.0, 0.9]])}, bounds={"A": 0.95})
    assert figure["data"][0]["y"] == [0.2, 0.9, 0.8]
    assert figure["data"][1]["x"] == [0, 20] and figure["data"][1]["y"] == [0.95, 0.95]
    said = caption(figure)
    assert said == "A: from 0.2 to 0.8, within 0.01 of the best from step 10 on; no inputs can exceed 0.95."


def test_spectra_count_the_directions_of_the_energy_and_leave_zeros_out():
    figure = anchor_spectra({"0": [1.0, 1.0, 0.0], "9": [2.0, 2.0, 2.0]}, energy=0.6)
    assert caption(figure) == "Directions that hold 60 % of the energy: 0: 2 of 3 and 9: 2 of 3."
    assert figure["data"][0]["y"] == [1, 1, None] and figure["data"][1]["y"] == [1, 1, 1]
    assert figure["layout"]["yaxis"]["type"] == "log"


def test_overlaps_stand_over_their_layers_with_what_chance_would_give():
    figure = anchor_overlap({"end": [[0.2, 0.4], [0.4, 0.6]]}, layers=[0, 1], chance=0.25)
    assert figure["data"][0]["x"] == ["0", "1"] and figure["data"][0]["y"] == pytest.approx([0.3, 0.5])
    assert caption(figure) == "Mean over layers: end 0.4; random subspaces 0.25."
    assert len(anchor_overlap({"end": [0.2, 0.4]}, layers=["a", "b"])["data"]) == 1


def test_the_landscape_tells_where_paths_begin_and_end_and_differs_by_more_than_colour():
    paths = {"TA": ([[0, 0], [1, 0], [2, 0]], [3.0, 1.0, 2.0]), "FDA": ([[0, 0], [1, 1]], [3.0, 0.5])}
    figure = loss_landscape([0, 2], [0, 1], [[3, 2], [1, 4]], paths=paths, points={"base": (0, 0)})
    assert caption(figure) == "Lowest on the plane: 1. TA: from 3 to 2, lowest 1. FDA: from 3 to 0.5, lowest 0.5."
    ground, first, second, models = figure["data"]
    assert ground["z"] == [[3, 2], [1, 4]] and first["customdata"] == [3, 1, 2]
    assert first["line"]["dash"] != second["line"]["dash"] and first["marker"]["symbol"] != second["marker"]["symbol"]
    assert models["text"] == ["base"]
    off = loss_landscape([0, 2], [0, 1], [[3, 2], [1, 4]], paths=paths, off={"TA": [0, 0, 1e-6], "FDA": [0.0, 0.7]})
    assert caption(off).endswith("FDA: from 3 to 0.5, lowest 0.5, up to 0.7 off the plane.")
    assert "TA: from 3 to 2, lowest 1, all of it on the plane." in caption(off)
    assert (
        figure["layout"]["showlegend"] and not loss_landscape([0, 1], [0, 1], [[1, 2], [3, 4]])["layout"]["showlegend"]
    )


@pytest.mark.parametrize(
    ("error", "make"),
    [
        (UnknownNameError, lambda: anchor_alignment({"A": ([0], [0.1])}, bounds={"B": 0.9})),
        (ShapeError, lambda: anchor_alignment({"A": ([0, 1], [0.1])})),
        (ShapeError, lambda: anchor_alignment({"A": 3})),
        (OptionError, lambda: anchor_alignment({"A": ([0], [1.5])})),
        (OptionError, lambda: anchor_spectra({"A": [0.5, 1.0]})),
        (OptionError, lambda: anchor_spectra({"A": [0.0, 0.0]})),
        (OptionError, lambda: anchor_spectra({"A": [1.0]}, energy=1.0)),
        (ShapeError, lambda: anchor_overlap({"A": [0.5]}, layers=["a", "b"])),
        (OptionError, lambda: anchor_overlap({"A": [1.5]}, layers=["a"])),
        (ShapeError, lambda: loss_landscape([0, 1], [0, 1], [[1, 2]])),
        (OptionError, lambda: loss_landscape([1, 0], [0, 1], [[1, 2], [3, 4]])),
        (ShapeError, lambda: loss_landscape([0, 1], [0, 1], [[1, 2], [3, 4]], paths={"A": ([[0, 0]], [1.0, 2.0])})),
        (ShapeError, lambda: loss_landscape([0, 1], [0, 1], [[1, 2], [3, 4]], paths={"A": 1})),
        (UnknownNameError, lambda: loss_landscape([0, 1], [0, 1], [[1, 2], [3, 4]], off={"A": [0.0]})),
        (ShapeError, lambda: loss_landscape([0, 1], [0, 1], [[1, 2], [3, 4]], points={"A": (0.0,)})),
    ],
)
def test_bad_input_gets_one_of_our_errors(unchecked, error, make):
    with pytest.raises(error):
        make()
