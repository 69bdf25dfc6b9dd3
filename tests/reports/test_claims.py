"""Verdicts follow from intervals; metrics survive the way to disk and back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.errors import NonFiniteError, OptionError, ReportError
from orthokit.reports.claims import Claim, Ledger, decide, read_metrics, record_metrics
from orthokit.reports.ledger import Entry, as_text

ENDS = st.tuples(st.floats(-10, 10), st.floats(-10, 10)).map(sorted).map(tuple)


@given(ENDS, st.floats(-10, 10))
def test_the_verdict_is_decided_only_when_every_point_of_the_interval_agrees(interval, border):
    points = np.linspace(*interval, 11)
    verdict = decide(interval, greater_than=border)
    assert (verdict == "holds") == bool((points > border).all())
    assert (verdict == "fails") == bool((points <= border).all())


@given(ENDS, ENDS)
def test_between_is_both_borders(interval, borders):
    low, high = interval
    verdict = decide(interval, between=borders)
    if verdict == "holds":
        assert borders[0] <= low and high <= borders[1]
    elif verdict == "fails":
        assert high < borders[0] or low > borders[1]
    else:
        assert not (borders[0] <= low and high <= borders[1])


def test_less_than_mirrors_greater_than():
    assert decide((-2, -1), less_than=0) == "holds"
    assert decide((0, 1), less_than=0) == "fails"
    assert decide((-1, 1), less_than=0) == "undecided"


def test_a_verdict_needs_one_rule_and_an_interval(unchecked):
    for call in (lambda: decide((0, 1)), lambda: decide((0, 1), less_than=1, greater_than=0)):
        with pytest.raises(OptionError, match="exactly one"):
            call()
    with pytest.raises(OptionError, match="low <= high"):
        decide((1, 0), less_than=2)
    with pytest.raises(NonFiniteError):
        decide((0, float("nan")), less_than=2)
    with pytest.raises(OptionError):
        decide("wide", less_than=2)


def test_metrics_come_back_as_they_went(tmp_path):
    claim = Claim("a", "A claim", measured=np.float32(0.5), interval=(np.float32(0.25), 1), seeds=3, verdict="holds")
    path = tmp_path / "deep" / "metrics.json"
    record_metrics(claims=[claim], path=path, steps=3, spectrum=torch.ones(2), odd=float("nan"), nested={"x": [1]})
    claims, numbers = read_metrics(path)
    assert claims == [claim]
    assert numbers == {"steps": 3, "spectrum": [1.0, 1.0], "odd": "nan", "nested": {"x": [1]}}
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_the_environment_says_where_metrics_go(tmp_path, monkeypatch):
    monkeypatch.setenv("ORTHOKIT_METRICS", str(tmp_path / "m.json"))
    record_metrics(steps=1)
    assert read_metrics(tmp_path / "m.json") == ([], {"steps": 1})


def test_a_value_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(OptionError, match="model"):
        record_metrics(path=tmp_path / "m.json", model=object())
    assert not list(tmp_path.iterdir())


def test_damaged_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.json"
    for text in ("{", "[]", '{"format": 1}', '{"format": 9, "claims": [], "numbers": {}}'):
        path.write_text(text)
        with pytest.raises(ReportError, match=r"metrics\.json"):
            read_metrics(path)
    with pytest.raises(ReportError):
        read_metrics(tmp_path / "absent.json")


def test_claims_are_checked():
    with pytest.raises(OptionError, match="verdict"):
        Claim("a", "A", verdict="true")
    with pytest.raises(OptionError, match="source"):
        Claim("a", "A", source="typed")
    with pytest.raises(OptionError, match="id"):
        Claim("", "A")
    with pytest.raises(OptionError, match="two claims"):
        Ledger([Claim("a", "A"), Claim("a", "B")])


def test_the_ledger_table_escapes_and_says_verdicts_in_words():
    shown = Ledger([Claim("a", "x < y & z", verdict="fails", measured=-1.5, unit="bits")])._repr_html_()
    assert "x &lt; y &amp; z" in shown
    assert "fails (live)" in shown
    assert "−1.5 bits" in shown
    assert "No claims" in Ledger([])._repr_html_()


def test_a_claim_says_what_was_expected_only_where_something_was():
    expected = Claim("a", "It is two.", measured=2.0, predicted=2, verdict="holds")._repr_markdown_()
    assert expected == "*holds:* It is two. Measured 2; expected 2."
    assert Claim("a", "It is two.", measured=2.0, predicted=0)._repr_markdown_().endswith("expected 0.")
    unexpected = Claim("a", "It is two.", measured=2.0, verdict="holds")
    assert unexpected._repr_markdown_() == "*holds:* It is two. Measured 2."
    text = as_text([Entry("01_a", unexpected), Entry("01_a", replace(unexpected, predicted=0))])
    assert "measured 2; live" in text and "measured 2; predicted 0; live" in text


def test_the_file_is_json_for_anybody(tmp_path):
    record_metrics(claims=[Claim("a", "A", interval=(0, 1))], path=tmp_path / "m.json")
    record = json.loads((tmp_path / "m.json").read_text())
    assert record["claims"][0]["interval"] == [0, 1]
