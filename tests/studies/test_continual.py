"""Tasks in turn: the run, the study and what is read off it."""

import math

import pandas as pd
import pytest
import torch

from orthokit.errors import OptionError, ReportError, UnknownNameError
from orthokit.lab.continual import class_sequence
from orthokit.studies import continual as study
from orthokit.studies._engine import load_evidence, run_study
from orthokit.studies.continual import CONTINUAL, CONTINUAL_METHODS, learn_in_turn, tune_strength
from orthokit.studies.continual_results import (
    CONTINUAL_DUELS,
    continual_collinearity,
    continual_differences,
    continual_live,
    continual_margins,
    continual_matrices,
    continual_summary,
    continual_trade,
    continual_trials,
)


def tasks(count=3, **options):
    return class_sequence("digits", parts=5, batch=8, seed=0, **options)[:count]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    root = tmp_path_factory.mktemp("evidence")
    run_study(CONTINUAL, out=root, size="smoke", seeds=2, progress=False)
    return load_evidence("continual", root=root)


@pytest.mark.parametrize("method", list(CONTINUAL_METHODS))
@pytest.mark.parametrize("head", ["own", "shared"])
def test_every_method_learns_in_turn(method, head):
    strength = (CONTINUAL_METHODS[method].strengths or (0.0,))[0]
    run = learn_in_turn(tasks(head=head), method, strength=strength, steps=2)
    seen = torch.ones(3, 3).tril().bool()
    assert bool(run.errors[seen].isfinite().all()) and bool(run.errors[~seen].isnan().all())
    assert len(run.readouts) == (2 if "rank_one" in method else 0)
    plain = learn_in_turn(tasks(head=head), "plain", steps=2)
    assert torch.equal(run.errors[0, :1], plain.errors[0, :1])  # the first task knows nothing of methods


def test_a_run_is_a_function_of_its_seed():
    runs = [learn_in_turn(tasks(), "ewc_true", strength=10.0, steps=3, seed=s).errors for s in (0, 0, 1)]
    assert runs[0].nan_to_num().equal(runs[1].nan_to_num()) and not runs[0].nan_to_num().equal(runs[2].nan_to_num())


def test_a_heavy_penalty_stops_learning_and_forgetting():
    free, held = (learn_in_turn(tasks(head="shared"), "l2sp", strength=s, steps=30).errors for s in (0.0, 1e3))
    assert held[-1, 0] <= free[-1, 0] and held[-1, -1] > free[-1, -1]


def test_a_run_that_diverges_errs_by_chance(monkeypatch):
    from orthokit.errors import NonFiniteError

    def fail(*args, **kwargs):
        raise NonFiniteError("diverged")

    original = study._learn
    monkeypatch.setattr(study, "_learn", lambda *a: fail() if len(a[2]) == 1 else original(*a))
    errors = learn_in_turn(tasks(), "plain", steps=1).errors
    assert errors[1, :2].tolist() == [0.5, 0.5] and errors[2].tolist() == [0.5] * 3 and errors[0, 0] < 1


def test_tuning_goes_on_while_the_best_lies_at_an_end(monkeypatch):
    asked = []

    def fake(tasks, method, *, strength, steps, seed):
        asked.append(strength)
        return study.SequenceRun(torch.full((2, 2), abs(math.log10(strength) - 4)), ())

    one = {"steps": 1, "seeds": [1000]}

    monkeypatch.setattr(study, "learn_in_turn", fake)
    found = tune_strength("own", "l2sp", trials=8, **one)
    assert asked == [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]
    assert min(found, key=found.__getitem__) == 10000.0
    asked.clear()
    tune_strength("own", "l2sp", trials=5, **one)
    assert len(asked) == 5
    asked.clear()
    tune_strength("own", "replay", **one)  # a share has natural ends
    assert asked == [0.25, 0.5, 0.75]
    assert tune_strength("own", "plain", steps=1) == {}


def test_the_study_records_trials_runs_and_collinearity(smoke):
    table, record = smoke
    assert record["study"] == "continual" and {"own", "shared"} == set(table["protocol"])
    for protocol in ("own", "shared"):
        matrices = continual_matrices(table, protocol)
        assert list(matrices) == ["fine-tuning", "rank-1 EWC"]
        assert matrices["fine-tuning"].scores.shape == (2, 5, 5)
        assert list(continual_trials(table, protocol)) == ["rank-1 EWC"]
        summary = continual_summary(table, protocol)
        assert summary.loc["rank-1 EWC", "setting"] == "weight 0.1"
    readouts = continual_collinearity(table)
    assert len(readouts) == 2 * 2 * 4 and readouts["top_share"].between(0, 1 + 1e-6).all()


def test_values_and_differences_are_those_of_the_matrices(smoke):
    table, _ = smoke
    matrices = continual_matrices(table, "own")
    plain, held = matrices["fine-tuning"], matrices["rank-1 EWC"]
    found = continual_differences(table, "own", value="forgetting")["rank-1 EWC"]
    wanted = 100 * (held.mean_forgetting - plain.mean_forgetting)
    assert found == pytest.approx(wanted.tolist())
    transfer = continual_differences(table, "own", value="transfer")["rank-1 EWC"]
    assert transfer == pytest.approx((100 * (held.backward_transfer - plain.backward_transfer)).tolist())
    pairs = torch.tensor(continual_trade(table, "own")["fine-tuning"], dtype=torch.float64)
    torch.testing.assert_close(pairs[:, 0], 100 - 100 * plain.learned)
    torch.testing.assert_close(pairs[:, 1], 100 * plain.mean_forgetting)


def test_every_duel_names_methods_that_exist():
    labels = {way.label for way in CONTINUAL_METHODS.values()}
    assert all({duel.winner, duel.loser} <= labels for duel in CONTINUAL_DUELS)
    assert len({duel.name for duel in CONTINUAL_DUELS}) == len(CONTINUAL_DUELS)
    rows = [
        {"kind": "run", "protocol": "own", "method": name, "seed": s, "strength": 1.0, "after": t, "task": k,
         "error": 0.1 * (t == 1) * (k == 0) * (name == "plain")}
        for name in CONTINUAL_METHODS for s in range(2) for t in range(2) for k in range(t + 1)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    assert continual_margins(table, CONTINUAL_DUELS[0], "own") == pytest.approx([10.0, 10.0])


def test_a_live_run_takes_the_recorded_settings(smoke):
    found = continual_live(["plain"], seeds=[0], steps=2, table=smoke[0])
    recorded = continual_matrices(smoke[0], "own")["fine-tuning"].scores[0]
    torch.testing.assert_close(
        found["fine-tuning"].scores[0].double().nan_to_num(), recorded.nan_to_num(), atol=1e-5, rtol=0
    )


def test_bad_input_is_named(smoke, unchecked):
    table, _ = smoke
    with pytest.raises(UnknownNameError, match="did you mean 'plain'"):
        learn_in_turn(tasks(), "plan")
    with pytest.raises(OptionError, match="at least two"):
        learn_in_turn(tasks(1), "plain")
    with pytest.raises(UnknownNameError, match="protocol"):
        tune_strength("mine", "plain")
    with pytest.raises(UnknownNameError, match="protocol"):
        continual_matrices(table, "mine")
    with pytest.raises(UnknownNameError, match="value"):
        continual_differences(table, "own", value="speed")
    with pytest.raises(UnknownNameError, match="method"):
        continual_differences(table, "own", baseline="mine")
    with pytest.raises(ReportError, match="no collinearity"):
        continual_collinearity(table, method="plain")
