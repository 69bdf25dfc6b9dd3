"""Charts of a merge come from the rows of its report, and say so when the rows lack what they show."""

from __future__ import annotations

import pytest
import torch

from orthokit.errors import OptionError, ShapeError, UnknownNameError
from orthokit.figures import merge_energies, merge_map
from orthokit.merging import merge


@pytest.fixture(scope="module")
def rows():
    g = torch.Generator().manual_seed(0)
    base = {
        "a.weight": torch.randn(6, 5, generator=g),
        "b.weight": torch.randn(4, 7, generator=g),
        "b.bias": torch.ones(4),
    }
    experts = [{name: W + 0.1 * torch.randn(W.shape, generator=g) for name, W in base.items()} for _ in range(2)]
    return merge(base, experts, report="full").report.rows


def test_matrices_alone_have_a_column_and_experts_a_row(rows):
    figure = merge_map(rows, experts=["nouns", "verbs"])
    heat = figure["data"][0]
    assert list(heat["x"]) == ["a", "b"] and list(heat["y"]) == ["nouns", "verbs"]
    assert heat["z"][1][0] == pytest.approx(rows[0]["rotation_fraction"][1])
    for value in ("generator_norm", "conflict_share", "changes"):
        assert merge_map(rows, value=value)["data"]


def test_energies_are_those_of_the_report(rows):
    figure = merge_energies(rows)
    assert [trace["name"] for trace in figure["data"]] == ["merged", "base", "rotated"]
    assert figure["data"][1]["x"][0] == pytest.approx(rows[0]["energy_base"])


def test_reports_without_the_numbers_are_refused(rows):
    brief = [{"name": "a.weight", "method": "ties"}]
    with pytest.raises(ShapeError, match="report='full'"):
        merge_map(brief)
    with pytest.raises(ShapeError, match="report='full'"):
        merge_energies(brief)
    with pytest.raises(UnknownNameError, match="value"):
        merge_map(rows, value="angle")
    with pytest.raises(OptionError, match="2"):
        merge_map(rows, experts=["one"])
