"""The study of merging: who takes part, with which budget, and rows that say what was judged."""

from __future__ import annotations

import json

from orthokit.lab import FAMILIES
from orthokit.merging import methods
from orthokit.studies.merging_blocks import BLOCK_FAMILIES
from orthokit.studies.merging_study import MERGING, MERGING_BUDGET, contestants


def test_every_method_takes_part_where_it_can() -> None:
    two, three = contestants(2), contestants(3)
    assert set(methods()) - {"orthomerge"} <= set(two) and "slerp" not in three
    assert {name.split()[0] for name in three} == set(methods()) - {"slerp"}
    for method, fixed, space in two.values():
        known = {"scale", *methods()[method].options}
        assert set(fixed) <= known and set(space) <= known and not set(fixed) & set(space)


def test_units_are_families_and_seeds_with_one_budget() -> None:
    units = MERGING.units("full", 3)
    assert [(u["family"], u["seed"]) for u in units if u["part"] == "tensors"] == [
        (family, seed) for seed in range(3) for family in FAMILIES
    ]
    assert {u["family"] for u in units if u["part"] == "blocks"} == set(BLOCK_FAMILIES) < set(FAMILIES)
    assert set(MERGING_BUDGET) == set(FAMILIES) and len(MERGING.units("full", 5)) < 5 * (len(FAMILIES) + 2)
    assert all(unit["budget"] == MERGING_BUDGET[unit["family"]] for unit in units)
    assert json.loads(json.dumps(units)) == units
    assert len({tuple(MERGING.depends(unit)) for unit in units}) == 2


def test_a_unit_judges_all_on_every_task_and_on_what_is_retained(monkeypatch) -> None:
    some = {name: entry for name, entry in contestants(3).items() if name in ("ties", "regmean", "metrics_weighted")}
    monkeypatch.setattr("orthokit.studies.merging_study.contestants", lambda experts: some)
    unit = next(one for one in MERGING.units("smoke", 1) if one["family"] == "pictures")
    rows = MERGING.measure(unit)
    tasks = {*FAMILIES["pictures"].tasks, "retained"}
    kinds = {row["kind"] for row in rows}
    assert kinds == {"start", "expert", "default", "tuned"}
    for name in some:
        for kind in ("default", "tuned"):
            mine = [row for row in rows if row["method"] == name and row["kind"] == kind]
            assert {row["task"] for row in mine} == tasks and all(row["seconds"] >= 0 for row in mine)
            assert isinstance(json.loads(mine[0]["options"]), dict)


def test_blocks_are_merged_from_three_starts_with_anchors_that_were_constructed_once() -> None:
    unit = next(u for u in MERGING.units("smoke", 1) if (u["family"], u["part"]) == ("pictures", "blocks"))
    rows = MERGING.measure(unit)
    names = {"anchors", "anchors from task_arithmetic", "anchors from tsv"}
    assert {row["method"] for row in rows if "method" in row} == names
    made = [row for row in rows if row["kind"] == "anchors"]
    assert {row["task"] for row in made} == set(FAMILIES["pictures"].tasks)
    assert all(row["cosine"] >= row["cosine_before"] for row in made)
