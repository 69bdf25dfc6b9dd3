"""Merging live: rows in the form of the record, scores along scales, identities, and what a prior prevents."""

from __future__ import annotations

import math

import pytest
import torch

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import expert_scores, family_base, train_expert
from orthokit.linalg import cayley
from orthokit.merging import merge
from orthokit.studies import live_merges as live
from orthokit.studies.merging_results import merging_margins, merging_scores

NAMES = ("task_arithmetic", "regmean", "metrics_weighted", "orthomerge conflict ties")


@pytest.fixture(scope="module")
def experts():
    tasks = ("footwear", "low digits")
    return {task: train_expert("pictures", task, seed=0, steps=2, small=True) for task in tasks}


def test_live_rows_are_read_as_the_record_is(experts) -> None:
    table = live.merging_live("pictures", experts, seed=3, names=NAMES, small=True)
    scores = merging_scores(table, "pictures", kind="default")
    assert set(scores["method"]) == set(NAMES) and set(table["seed"]) == {3}
    trunks = [expert.trunk for expert in experts.values()]
    merged = merge(family_base("pictures", small=True), trunks, method="task_arithmetic")
    told = expert_scores("pictures", merged, experts, small=True)
    assert scores.loc["TA", "low digits"] == told["low digits"]
    assert len(merging_margins(table, "pictures", "regmean", "base", kind="default")) == 1
    assert (table.loc[table["kind"] == "default", "seconds"] >= 0).all()


def test_all_contestants_take_part_unless_some_are_named(experts, monkeypatch) -> None:
    known = {"linear": ("linear", {}, {}), "slerp": ("slerp", {}, {})}
    monkeypatch.setattr(live, "contestants", lambda count: known)
    table = live.merging_live("pictures", experts, small=True)
    assert set(table.loc[table["kind"] == "default", "method"]) == set(known)


def test_scales_are_those_of_merges(experts) -> None:
    curves = live.live_scales("pictures", experts, [0.5, 2.0], names=["ties"], part="test", small=True)
    scales, averages = curves["TIES"]
    trunks = [expert.trunk for expert in experts.values()]
    merged = merge(family_base("pictures", small=True), trunks, method="ties", scale=2.0)
    told = expert_scores("pictures", merged, experts, small=True)
    assert scales == [0.5, 2.0] and averages[1] == pytest.approx(sum(told.values()) / 2)


def test_names_that_cannot_take_part_are_refused(experts) -> None:
    with pytest.raises(UnknownNameError, match="contestant"):
        live.merging_live("pictures", experts, names=["tie"], small=True)
    with pytest.raises(UnknownNameError, match="contestant"):
        live.live_scales("pictures", experts, [1.0], names=["tie"], small=True)
    for name in ("regmean", "metrics_weighted"):
        with pytest.raises(OptionError, match="weights alone"):
            live.live_scales("pictures", experts, [1.0], names=[name], small=True)


def test_random_changes_have_the_size_of_the_expert_and_another_direction() -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(20, 30, generator=g), "same": torch.ones(3), "steps": torch.tensor(4)}
    expert = {"w": base["w"] + 0.1 * torch.randn(20, 30, generator=g), "same": torch.ones(3), "steps": torch.tensor(7)}
    found = live.random_changes(base, expert, seed=1)
    ours, theirs = found["w"] - base["w"], expert["w"] - base["w"]
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))) < 0.2
    assert torch.equal(found["same"], base["same"]) and int(found["steps"]) == 7
    again = live.random_changes(base, expert, seed=1)
    assert torch.equal(again["w"], found["w"]) and not torch.equal(live.random_changes(base, expert)["w"], found["w"])


def test_a_rotated_expert_has_more_rotation_than_chance_and_a_random_one_has_not() -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w.weight": torch.randn(24, 24, generator=g), "w.bias": torch.zeros(24)}
    turn = cayley(0.05 * (lambda A: A - A.mT)(torch.randn(24, 24, generator=g)))
    turned = {"w.weight": base["w.weight"] @ turn, "w.bias": torch.ones(24)}
    found = live.rotation_excess(base, {"turned": turned, "drawn": live.random_changes(base, turned, seed=9)})
    assert found["turned"] > 0.3 and abs(found["drawn"]) < 0.05


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_identities_hold_to_rounding_for_every_shape(shape) -> None:
    g = torch.Generator().manual_seed(0)
    W, *noise = torch.randn(4, *shape, generator=g)
    errors = live.orthomerge_identities(W, [W + 0.2 * one for one in noise])
    assert len(errors) == 5 and max(errors.values()) < 1e-9


def test_identities_tell_when_they_fail(monkeypatch) -> None:
    W, A = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(live, "orthomerge", lambda base, experts: base + experts[0])
    errors = live.orthomerge_identities(W, [W + 0.1 * A, W - 0.1 * A])
    assert errors["One expert is merged to itself."] > 0.1
    assert errors["The order of the experts does not matter."] > 0.01
    assert errors["The rotated base has the singular values of the base."] < 1e-9


def test_without_a_prior_wide_matrices_have_arbitrary_rotations() -> None:
    wide = live.prior_effects((16, 32), [0.0, 1e-3], draws=10)
    assert wide.loc[0.0, "refused"] > 0 and wide.loc[1e-3, "refused"] == 0
    assert wide.loc[0.0, "generator"] > 50 * wide.loc[1e-3, "generator"]
    assert wide.loc[1e-3, "most moved"] < 1 < wide.loc[0.0, "most moved"]
    tall = live.prior_effects((32, 16), [0.0, 1e-3], draws=5)
    assert tall["refused"].tolist() == [0, 0]
    assert tall.loc[0.0, "moved"] == pytest.approx(tall.loc[1e-3, "moved"], rel=0.01)


def test_a_prior_that_refuses_all_draws_has_no_numbers(monkeypatch) -> None:
    def refused(*args, **options):
        raise OptionError("half a turn")

    monkeypatch.setattr(live, "orthomerge_parts", refused)
    found = live.prior_effects((4, 4), [0.0], draws=2)
    assert found.loc[0.0, "refused"] == 1 and math.isnan(found.loc[0.0, "most moved"])


@pytest.mark.parametrize("bad", [{"draws": 0}, {"experts": 0}, {"priors": [-1.0]}])
def test_effects_of_nothing_are_refused(bad) -> None:
    with pytest.raises(OptionError, match="draws and experts"):
        live.prior_effects((4, 8), bad.pop("priors", [0.0]), **bad)
