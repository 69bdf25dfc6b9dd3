"""Claims collected cell by cell."""

import pytest
import torch

from orthokit.errors import ShapeError
from orthokit.figures import mean_interval
from orthokit.reports import Claims, read_metrics, reading


def test_a_measured_claim_takes_interval_and_verdict_from_its_values():
    claims = Claims(paper="arXiv 2606.03899")
    values = torch.tensor([1.0, 1.5, 1.25])
    claim = claims.measure("gap", "The gap opens.", values, greater_than=0)
    mean, low, high = mean_interval(values)
    assert (claim.measured, claim.interval, claim.seeds) == (mean, (low, high), 3)
    assert (claim.verdict, claim.reference, claim.paper) == ("holds", 0, "arXiv 2606.03899")
    assert claims.measure("b", "It is small.", [1.0, 1.05, 1.1], less_than=0.5).verdict == "fails"
    assert claims.measure("c", "It lies here.", [0.0, 1.0], between=(0, 1)).verdict == "undecided"
    with pytest.raises(ShapeError):
        claims.measure("d", "One run.", [1.0], greater_than=0)


def test_running_a_cell_twice_keeps_one_claim_and_all_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOKIT_METRICS", str(tmp_path / "metrics.json"))
    claims = Claims()
    claims.state("same", "First.", 1.0, holds=False)
    claims.state("same", "Second.", 2.0, holds=True)
    assert len(claims.record(extra=3)) == 1
    written, numbers = read_metrics(tmp_path / "metrics.json")
    assert [(c.text, c.verdict) for c in written] == [("Second.", "holds")]
    assert numbers == {"extra": 3}


def test_a_reading_is_shown_as_markdown():
    assert reading("**2**")._repr_markdown_() == "**2**"
