"""What is read from the record of the race, on a table made by hand."""

import pandas as pd
import pytest

from orthokit.errors import UnknownNameError
from orthokit.studies import (
    TRACKS,
    race_costs,
    race_curves,
    race_differences,
    race_finals,
    race_rates,
    race_results,
    race_summary,
    tuned_rates,
)
from orthokit.studies.race_study import RATES


def _runs(kind, name, lr, steps, values, error=float("nan")):
    """Rows of one contestant: values by seed, one for each step."""
    return [
        {"kind": kind, "track": "cnn", "name": name, "lr": lr, "seed": seed, "step": step, "value": v, "error": error}
        for seed, row in enumerate(values)
        for step, v in zip(steps, row, strict=True)
    ]


@pytest.fixture
def table():
    rows = [
        {"kind": "cost", "track": "cnn", "name": "adamw", "step": 9, "step_ms": 10.0, "update_ms": 1.0, "ratio": 1.1},
        {
            "kind": "cost",
            "track": "cnn",
            "name": "muon_pre",
            "step": 9,
            "step_ms": 50.0,
            "update_ms": 30.0,
            "ratio": 2.0,
        },
        *_runs("tune", "adamw", 0.01, [4], [[1.0], [1.2]]),
        *_runs("tune", "adamw", 0.02, [4], [[2.0], [2.2]]),
        *_runs("tune", "muon_pre", 0.1, [4], [[0.5], [0.7]]),
        *_runs("race", "adamw", 0.01, [0, 2, 4], [[3, 2, 1.0], [3, 2, 1.2]], error=0.5),
        *_runs("race", "muon_pre", 0.1, [0, 2, 4], [[3, 1, 0.4], [3, 1, 0.8]], error=0.25),
        *_runs("timed", "muon_pre", 0.1, [0, 1, 2], [[3, 1, 1.1], [3, 1, 1.3]], error=0.75),
        {"kind": "race", "track": "tinygpt", "name": "adamw", "lr": 1.0, "seed": 0, "step": 4, "value": 9.0},
    ]
    return pd.DataFrame(rows)


def test_finals_and_differences_are_paired_by_seed(table):
    finals = race_finals(table, "cnn")
    assert list(finals) == ["AdamW", "Muon"] and finals["Muon"].tolist() == [0.4, 0.8]
    assert race_differences(table, "cnn")["Muon"] == pytest.approx([-0.6, -0.4])
    assert race_differences(table, "cnn", baseline="Muon")["AdamW"] == pytest.approx([0.6, 0.4])


def test_equal_time_takes_the_shortened_runs_and_adamws_own(table):
    assert race_finals(table, "cnn", budget="time")["Muon"].tolist() == [1.1, 1.3]
    assert race_differences(table, "cnn", budget="time")["Muon"] == pytest.approx([0.1, 0.1])
    assert race_finals(table, "cnn", budget="time", value="error")["Muon"].tolist() == [0.75, 0.75]


def test_curves_run_over_samples_or_over_the_seconds_a_step_costs(table):
    across, values = race_curves(table, "cnn")["Muon"]
    assert across == [step * TRACKS["cnn"].samples / 1000 for step in (0, 2, 4)]
    assert values == [[3, 1, 0.4], [3, 1, 0.8]]
    # The ratio measured in turns times AdamW's own 10 ms, not the 50 ms of a loaded moment.
    assert race_costs(table, "cnn")["seconds a step"].tolist() == pytest.approx([0.01, 0.02])
    across, values = race_curves(table, "cnn", against="seconds")["Muon"]
    assert across == pytest.approx([0, 0.02, 0.04]) and values[0] == [3, 1, 1.1]
    assert race_curves(table, "cnn", against="seconds")["AdamW"][0] == pytest.approx([0, 0.02, 0.04])


def test_rates_and_the_summary(table):
    rates, values = race_rates(table, "cnn")["AdamW"]
    assert rates == [0.01, 0.02] and values == [[1.0, 2.0], [1.2, 2.2]]
    summary = race_summary(table, "cnn")
    assert list(summary.index) == ["Muon", "AdamW"]
    assert summary["learning rate"].tolist() == ["0.1", "0.01"]
    assert summary.loc["AdamW", "nats, equal tokens"] == "1.1 ± 1.3"
    assert summary.loc["Muon", "step, of AdamW's"] == "2.00"


def test_tuned_rates_come_from_the_record_and_else_from_the_grid(table, monkeypatch):
    monkeypatch.setattr(race_results, "load_evidence", lambda name: (table, {}))
    tuned = tuned_rates("cnn")
    assert tuned["adamw"] == 0.01 and tuned["muon_pre"] == 0.1
    assert tuned["sgd"] == RATES["cnn"]["sgd"][1]


@pytest.mark.parametrize(
    "call",
    [
        lambda t: race_finals(t, "cn"),
        lambda t: race_finals(t, "cnn", budget="money"),
        lambda t: race_curves(t, "cnn", against="steps"),
        lambda t: race_differences(t, "cnn", baseline="Adam"),
        lambda t: tuned_rates("cn"),
    ],
)
def test_unknown_names_are_refused(table, call):
    with pytest.raises(UnknownNameError):
        call(table)
