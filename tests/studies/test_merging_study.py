"""The study of merging: who takes part, with which budget, and rows that say what was judged."""

from __future__ import annotations

import json

from orthokit.lab import FAMILIES
from orthokit.merging import methods
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
    assert len(units) == 3 * len(FAMILIES) and {unit["budget"] for unit in units} == {MERGING_BUDGET}
    assert json.loads(json.dumps(units)) == units
    assert len({MERGING.depends(unit) for unit in units}) == 1


def test_a_unit_judges_all_on_every_task_and_on_what_is_retained(monkeypatch) -> None:
    some = {name: entry for name, entry in contestants(3).items() if name in ("ties", "regmean", "metrics_weighted")}
    monkeypatch.setattr("orthokit.studies.merging_study.contestants", lambda experts: some)
    (unit,) = (one for one in MERGING.units("smoke", 1) if one["family"] == "pictures")
    rows = MERGING.measure(unit)
    tasks = {*FAMILIES["pictures"].tasks, "retained"}
    kinds = {row["kind"] for row in rows}
    assert kinds == {"start", "expert", "default", "tuned"}
    for name in some:
        for kind in ("default", "tuned"):
            mine = [row for row in rows if row["method"] == name and row["kind"] == kind]
            assert {row["task"] for row in mine} == tasks and all(row["seconds"] >= 0 for row in mine)
            assert isinstance(json.loads(mine[0]["options"]), dict)
