"""Charts of one adapter on one matrix: what they draw, what their captions say, what they refuse."""

import numpy as np
import pytest

from orthokit.errors import OptionError, ShapeError
from orthokit.figures import error_at_angle, matrix_picture, pair_angles, spectrum_before_after

LAWS = {"k = 2": [1e-6, 1e-3], "k = 3": [1e-4, 1e-2]}


def test_the_map_in_use_is_drawn_stronger_and_read_off_between_the_points_of_the_grid():
    figure = error_at_angle([0.1, 1.0], LAWS, current="k = 3", at=0.1**0.5, measured={"measured": 0.0009})
    widths = {trace["name"]: trace["line"]["width"] for trace in figure["data"] if "line" in trace}
    assert widths["k = 3"] > widths["k = 2"]
    # A power of the angle: halfway in the logarithm of the angle is halfway in that of the error.
    assert "gives 0.001; measured: 0.0009." in figure["layout"]["meta"]["caption"]
    marker = figure["data"][-1]
    assert marker["x"] == [pytest.approx(0.1**0.5, rel=1e-6)] and marker["y"] == [0.0009]


def test_without_a_rotation_there_is_no_marker_and_no_line_at_an_angle():
    figure = error_at_angle([0.1, 1.0], LAWS, floor=1e-7, span=(1e-9, 10))
    assert figure["layout"]["shapes"] == []
    assert [trace["name"] for trace in figure["data"]] == ["k = 2", "k = 3", "rounding"]
    assert figure["layout"]["meta"]["caption"].startswith("There is no rotation here")
    assert figure["layout"]["yaxis"]["range"] == [-9, 1]


def test_an_exact_map_says_so_and_an_error_of_zero_is_not_drawn():
    figure = error_at_angle([0.1, 1.0], LAWS, at=0.3, measured={"measured": 0.0})
    assert figure["layout"]["meta"]["caption"] == "At an angle of 0.3 the map is exact; measured: 0."
    assert figure["data"][-1]["y"] == [None]


@pytest.mark.parametrize(
    ("error", "given"),
    [
        (OptionError, {"angles": [0.0, 1.0]}),
        (OptionError, {"at": 0.0}),
        (OptionError, {"measured": {"a": 1.0}}),
        (ShapeError, {"current": "k = 9"}),
        (ShapeError, {"angles": [0.1, 0.2, 0.3]}),
    ],
)
def test_bad_laws_are_refused(error, given):
    with pytest.raises(error):
        error_at_angle(**({"angles": [0.1, 1.0], "laws": LAWS} | given))


def test_a_long_spectrum_is_thinned_to_its_ends_and_read_from_all_values():
    before = np.linspace(2.0, 1.0, 1001)
    after = before.copy()
    after[1] += 0.4  # not among the values drawn
    figure = spectrum_before_after(before, {"turned": before, "added": after})
    for trace in figure["data"]:
        assert len(trace["x"]) == 128
        assert (trace["x"][0], trace["x"][-1]) == (1, 1001)
    assert figure["layout"]["meta"]["caption"].endswith("turned 0 and added 0.2.")


def test_a_change_of_the_size_of_rounding_is_called_that():
    figure = spectrum_before_after([2.0, 1.0], {"turned": [2.0, 1.0 + 1e-15], "kept": [2.0, 1.0]})
    assert figure["layout"]["meta"]["caption"].endswith("turned rounding and kept 0.")
    figure = pair_angles([90.0], {"turned": [90.0 + 1e-13]})
    assert figure["layout"]["meta"]["caption"].endswith("turned rounding.")


def test_spectra_of_other_lengths_and_zero_matrices_are_refused():
    with pytest.raises(ShapeError):
        spectrum_before_after([2.0, 1.0], {"a": [2.0]})
    with pytest.raises(OptionError, match="first singular value"):
        spectrum_before_after([0.0, 0.0], {"a": [1.0, 0.0]})


def test_the_first_cloud_lies_on_top_and_the_caption_keeps_the_order():
    figure = pair_angles([90.0, 80.0], {"turned": [90.0, 80.0], "added": [91.0, 77.0]})
    assert [trace["name"] for trace in figure["data"]] == ["unchanged", "added", "turned"]
    assert figure["layout"]["meta"]["caption"] == "Largest change of an angle among 2 pairs: turned 0° and added 3°."
    with pytest.raises(ShapeError):
        pair_angles([90.0], {"a": [90.0, 1.0]})


def test_a_patch_is_its_entry_of_largest_size_with_its_sign():
    M = np.zeros((5, 4))
    M[0, 0], M[1, 1], M[4, 3] = 0.5, -2.0, 3.0
    figure = matrix_picture(M, name="R − I", cells=3)
    heat = figure["data"][0]
    # Patches of 2 x 2; the last row of patches has one row of the matrix.
    assert heat["z"] == [[-2, 0], [0, 0], [0, 3]]
    assert (heat["zmin"], heat["zmid"], heat["zmax"]) == (-3, 0, 3)
    caption = figure["layout"]["meta"]["caption"]
    assert (
        caption == "R − I: 85 % of the entries are exactly 0; the largest in size is 3. A cell is the largest of "
        "2 × 2 entries."
    )


def test_a_small_matrix_is_drawn_entry_by_entry_and_zero_is_drawn_too():
    assert matrix_picture([[1.0, 2.0]], name="A")["data"][0]["z"] == [[1, 2]]
    assert matrix_picture(np.zeros((2, 2)), name="A", zmax=0.5)["data"][0]["zmax"] == 0.5
    assert matrix_picture(np.zeros((2, 2)), name="A")["data"][0]["zmax"] == 1
    with pytest.raises(OptionError):
        matrix_picture([[1.0]], name="A", cells=0)
