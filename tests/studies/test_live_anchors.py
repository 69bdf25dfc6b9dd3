"""What anchors are like, checked on inputs whose numbers are known; trials and duels against sums by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from merging_record import LAW, SEEDS, merging_record

from orthokit.errors import OptionError, UnknownNameError
from orthokit.merging import construct_anchors
from orthokit.studies.dual_anchors import ANCHOR_TASKS, anchor_experts, anchor_inputs
from orthokit.studies.live_anchors import (
    ANCHOR_FINDINGS,
    ANCHOR_QUESTIONS,
    AnchorTrials,
    anchor_changes,
    anchor_findings,
    anchor_looks,
    anchor_looks_by_block,
    anchor_marks,
    anchor_record,
    anchor_trials,
)


@pytest.fixture(scope="module")
def setting():
    return anchor_experts(steps=2, small=True)


@pytest.fixture(scope="module")
def trials():
    return anchor_trials([0, 1], count=3, steps=2, epochs=1, examples=4, small=True)


def _looked(setting, X):
    """The row of given inputs, as if they were the anchors of the first expert."""
    made = construct_anchors(setting.base.blocks[0], setting.models[0].blocks[0], tokens=16, count=2, steps=0)
    rows = anchor_looks(setting, {"blocks.0": [replace(made, X=X, kept={7: X}), None]}, examples=8)
    assert rows["inputs"].tolist() == ["step 7", "random", "real"] and set(rows["task"]) == {"footwear"}
    return rows.set_index("inputs").loc["step 7"], rows.set_index("inputs")


def test_real_inputs_as_anchors_lie_in_the_subspace_and_in_the_cone(setting):
    X = anchor_inputs(setting, task="footwear", block="blocks.0", count=8)
    row, rows = _looked(setting, X)
    # The update of all is the mean of the updates of each.
    assert row["overlap"] == pytest.approx(1, abs=1e-4) and row["cone"] == pytest.approx(1, abs=1e-4)
    assert row["norm"] == pytest.approx(float(X.norm(dim=-1).median()))
    assert rows.loc["random", "overlap"] < 0.5 < rows.loc["real", "overlap"]


def test_the_tail_is_the_energy_outside_the_leading_fifth(setting):
    # 64 directions of equal size, of which round(0.2 * 64) = 13 lead.
    X = torch.eye(64).reshape(4, 16, 64)
    assert _looked(setting, X)[0]["tail"] == pytest.approx(1 - 13 / 64, abs=1e-5)


def test_the_cosine_is_that_of_all_parameters_together(setting):
    blocks = [m.blocks[0] for m in (setting.base, setting.models[0])]
    made = construct_anchors(*blocks, tokens=16, count=3, steps=1, per_tensor=False)
    # Construction leaves out what has no gradient: the bias of the keys.
    assert _looked(setting, made.X)[0]["cosine"] == pytest.approx(made.cosine, abs=0.02)


def test_anchors_without_a_kept_step_are_refused(setting):
    made = construct_anchors(setting.base.blocks[0], setting.models[0].blocks[0], tokens=16, count=2, steps=0)
    with pytest.raises(OptionError, match="keep="):
        anchor_looks(setting, {"blocks.0": [made, made]})


def test_trials_hold_every_seed_with_its_merges(trials):
    assert set(trials.looks["seed"]) == {0, 1} and set(trials.looks["init"]) == {"weights", "gaussian"}
    assert set(trials.looks["inputs"]) == {trials.first, trials.last, "random", "real"}
    methods = ["pretrained", *(f"expert {task}" for task in ANCHOR_TASKS), "task arithmetic"]
    methods += ["anchors from pretrained", "anchors", "initial inputs", "real inputs"]
    assert trials.scores[trials.scores["seed"] == 1]["method"].tolist() == methods
    assert not trials.scores.isna().any(axis=None) and "2 seeds" in repr(trials)
    cosines = trials.looks.groupby(["init", "inputs"])["cosine"].mean()
    assert all(cosines[init, trials.last] > cosines[init, trials.first] for init in ("weights", "gaussian"))


def test_changes_are_differences_of_means_seed_by_seed():
    rows = [
        {
            "seed": seed,
            "init": "weights",
            "inputs": kind,
            "block": block,
            "tail": value + block + 10 * seed * (kind != "random"),
        }
        for seed in (0, 1)
        for block in (0, 1)
        for kind, value in (("step 0", 1.0), ("step 5", 4.0), ("random", 0.5))
    ]
    trials = AnchorTrials(pd.DataFrame(rows), pd.DataFrame(), "step 0", "step 5")
    assert anchor_changes(trials, value="tail", init="weights") == [3.0, 3.0]
    assert anchor_changes(trials, value="tail", init="weights", against="random") == [3.5, 13.5]
    for wrong in ({"value": "head"}, {"init": "zeros"}, {"against": "step 9"}):
        with pytest.raises(UnknownNameError):
            anchor_changes(trials, **{"value": "tail", "init": "weights", **wrong})


def test_findings_are_above_zero_where_the_claim_is_right():
    better = {"cosine": 0.9, "tail": 0.1, "overlap": 0.8, "cone": 0.7}
    kinds = {"end": better, "start": dict.fromkeys(better, 0.5), "random": dict.fromkeys(better, 0.2)}
    kinds["real"] = {**better, "cosine": 0.3}
    rows = [{"seed": s, "init": "weights", "inputs": kind, **of} for s in (0, 1) for kind, of in kinds.items()]
    found = anchor_findings(AnchorTrials(pd.DataFrame(rows), pd.DataFrame(), "start", "end"))
    assert [question for question, _, _ in found] == list(ANCHOR_QUESTIONS)
    by_hand = {"rise": 0.4, "real": 0.6, "tail": 0.4, "random": 0.6, "drawn": 0.3, "cone": 0.2}
    for question, init, values in found:
        assert init == "weights" and values == pytest.approx([by_hand[question.name]] * 2), question.name


def test_values_by_block_are_means_over_tasks(trials):
    rows = trials.looks[(trials.looks["seed"] == 0) & (trials.looks["init"] == "weights")]
    found = anchor_looks_by_block(rows, "overlap")
    assert list(found) == ["step 0", "step 2", "random", "real"] and all(len(of) == 3 for of in found.values())
    second = rows[(rows["inputs"] == "real") & (rows["block"] == "blocks.1")]
    assert found["real"][1] == pytest.approx(second["overlap"].mean()) and len(second) == 2


def test_marks_are_means_in_per_cent_and_experts_count_on_their_own_task():
    table = pd.DataFrame(
        [
            {"method": name, "seed": seed, "a": a + seed / 100, "b": b, "mean": (a + b) / 2, "retained": kept}
            for seed in (0, 1)
            for name, a, b, kept in (
                ("merged", 0.5, 0.7, 0.9),
                ("expert a", 0.8, 0.1, 0.4),
                ("expert b", 0.2, 0.9, 0.6),
            )
        ]
    )
    marks = anchor_marks(AnchorTrials(pd.DataFrame(), table, "", ""))
    assert list(marks) == ["a", "b", "average", "retained"] and list(marks["a"]) == ["merged", "experts"]
    assert marks["a"]["merged"][0] == pytest.approx(50.5) and marks["a"]["experts"][0] == pytest.approx(80.5)
    assert marks["average"]["experts"][0] == pytest.approx((80.5 + 90) / 2)
    assert marks["retained"]["experts"][0] == pytest.approx(50)
    low, high = marks["a"]["merged"][1:]
    assert high - 50.5 == pytest.approx(12.706 * 0.5, rel=1e-3) and low == pytest.approx(101 - high)


def test_the_record_is_paired_by_seed_and_what_lacks_a_side_is_left_out():
    law = LAW | {"anchors from task_arithmetic": (0.15, 0.04), "iso_c": (0.2, 0.04)}
    found = {(f.name, family): (v, unit) for f, family, v, unit in anchor_record(merging_record(law=law))}
    # The law: gains of 0.15, 0.12, 0.16 and 0.2 on every task, in points.
    by_hand = {"sum": 3, "closed": -1, "fda-iso": -4, "fda-ta": 4, "fda-tsv": 1, "fda-regmean": -4}
    assert {name for name, _ in found} == set(by_hand)
    for name, margin in by_hand.items():
        values, unit = found[name, "pictures"]
        assert values == pytest.approx([margin] * len(SEEDS)) and unit == "points"


def test_findings_have_their_own_names_and_two_sides():
    names = [finding.name for finding in ANCHOR_FINDINGS]
    assert len(set(names)) == len(names)
    assert all(len(set(finding.needs)) == 2 for finding in ANCHOR_FINDINGS)
