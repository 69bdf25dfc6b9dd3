"""POET's charts: what they refuse, what their captions say, and that they draw what they are given."""

import pytest

from orthokit.errors import OptionError, ShapeError
from orthokit.figures.poet import drift_causes, memory_modes, spectrum_drift


def test_drift_of_several_seeds_is_their_geometric_mean_within_a_band():
    figure = spectrum_drift({"k = 3": ([10, 100], [[1e-4, 1e-3], [1e-2, 1e-1]])}, target=1e-5)
    names = [(trace["name"], trace.get("fill")) for trace in figure["data"]]
    assert names == [("k = 3", "toself"), ("k = 3", None), ("target 1e−05", None)]
    assert figure["data"][1]["y"] == pytest.approx([1e-3, 1e-2])
    assert figure["layout"]["meta"]["caption"] == "Largest drift at the last step: k = 3: 0.01."
    assert figure["layout"]["yaxis"]["type"] == "log"


def test_a_drift_of_zero_is_left_out_of_a_logarithmic_axis():
    assert spectrum_drift({"exact": ([1, 2], [0.0, 1e-9])})["data"][0]["y"] == [None, 1e-9]


def test_bad_drifts_are_refused():
    with pytest.raises(ShapeError, match="one per step"):
        spectrum_drift({"a": ([1, 2], [1e-3])})
    with pytest.raises(OptionError, match="at least 0"):
        spectrum_drift({"a": ([1], [-1e-3])})
    with pytest.raises(OptionError, match="target"):
        spectrum_drift({"a": ([1], [1e-3])}, target=0)


def test_causes_are_named_by_their_size():
    sizes = {"3 terms": {"truncation": 1e-2, "rounding": 1e-8}, "none": {"truncation": 0, "rounding": 0.0}}
    figure = drift_causes(sizes)
    assert figure["layout"]["meta"]["caption"] == "Largest cause: 3 terms: truncation (0.01); none: none."
    assert figure["data"][0]["x"] == [1e-2, None] and figure["data"][0]["y"] == ["3 terms", "none"]
    with pytest.raises(ShapeError, match="must have the causes"):
        drift_causes({"a": {"x": 1}, "b": {"y": 1}})
    with pytest.raises(OptionError, match=">= 0"):
        drift_causes({"a": {"x": -1}})


def test_memory_is_stacked_in_mebibytes():
    modes = {"plain": {"weights": 2**20, "moments": 2**21}, "low": {"weights": 2**20, "moments": 2**19}}
    figure = memory_modes(modes)
    assert [trace["y"] for trace in figure["data"]] == [[1, 1], [2, 0.5]]
    assert figure["layout"]["meta"]["caption"] == "Least: low, 1.5 MiB; most: plain, 3 MiB."
    with pytest.raises(ShapeError, match="must have the parts"):
        memory_modes({"a": {"x": 1}, "b": {"y": 1}})
