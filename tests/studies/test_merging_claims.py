"""The findings on merging as numbers, on a record made by law."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from merging_record import LAW, merging_record

from orthokit.errors import UnknownNameError
from orthokit.studies import merging_claims as claims
from orthokit.studies.merging_results import merging_groups


@pytest.fixture
def table():
    return merging_record()


def found(table, family, *parts):
    return {finding.name: (values, unit) for finding, values, unit in claims.merging_findings(table, family, *parts)}


def test_findings_are_paired_margins_in_points(table) -> None:
    told = found(table, "pictures", "orthomerge")
    assert told["c-ta"] == (pytest.approx([2.0] * 3), "points")
    assert told["g-ties"][0] == pytest.approx([-1.0] * 3) and told["c-tsvm"][0] == pytest.approx([-4.0] * 3)
    # Retained above the mergers alone: C 0.01, 0.01 and 0.02, G 0.02, 0.03 and 0.04.
    assert told["c-keeps"][0] == pytest.approx([4 / 3] * 3) and told["g-keeps"][0] == pytest.approx([3.0] * 3)
    assert told.keys() == {finding.name for finding in claims.MERGING_FINDINGS["orthomerge"]}


def test_findings_of_several_parts_follow_each_other(table) -> None:
    told = found(table, "pictures", "others", "orthomerge")
    assert list(told)[:4] == ["tsv-ta", "above-base", "tuned", "c-ta"], "no Iso-C in this record"
    assert told["tsv-ta"][0] == pytest.approx([3.0] * 3) and told["above-base"][0] == pytest.approx([7.0] * 3)


def test_contestants_with_fewer_seeds_and_other_rows_disturb_nothing(table) -> None:
    late = merging_record(seeds=(0,), law={"anchors from tsv": (0.01, 0.5)})
    late = late[late["kind"].isin(["default", "tuned"])]
    other = pd.DataFrame([{"kind": "anchors", "family": "pictures", "seed": 0, "task": "footwear", "cosine": 0.9}])
    more = pd.concat([table, late, other], ignore_index=True)
    assert found(more, "pictures", "others", "orthomerge") == found(table, "pictures", "others", "orthomerge")


def test_language_is_told_in_bits_per_byte() -> None:
    told = found(merging_record(("language",)), "language", "others")
    assert told["tsv-ta"] == (pytest.approx([0.03] * 3), "bits per byte")


def test_one_seed_decides_nothing() -> None:
    parts = list(claims.MERGING_FINDINGS)
    assert claims.merging_findings(merging_record(seeds=(0,)), "pictures", *parts) == []
    assert len(claims.merging_findings(merging_record(seeds=(0, 1)), "pictures", *parts)) > 10


def test_the_best_of_a_group_is_chosen_on_other_seeds(table) -> None:
    # FDA is the best of weights alone, the two at 0.14 of OrthoMerge.
    assert claims.best_margins(table, "pictures", "OrthoMerge", "weights alone") == pytest.approx([-0.02] * 3)
    lucky = (table["method"] == "orthomerge global ties") & (table["seed"] == 0) & (table["kind"] == "tuned")
    table.loc[lucky & (table["task"] != "retained"), "score"] += 0.5
    margins = claims.best_margins(table, "pictures", "OrthoMerge", "weights alone")
    # The seed itself does not see its luck; the others choose by it and lose.
    assert margins == pytest.approx([-0.02, 0.07 - 0.16, 0.07 - 0.16])
    alone = claims.best_margins(merging_record(seeds=(0,)), "pictures", "OrthoMerge", "weights alone")
    assert len(alone) == 1 and math.isnan(alone[0])
    with pytest.raises(UnknownNameError, match="group"):
        claims.best_margins(table, "pictures", "OrthoMerge", "rotations")


def test_groups_part_the_contestants(table) -> None:
    groups = merging_groups(table, "pictures")
    assert len(groups) == len(LAW) and groups["RegMean"] == "with data or losses"
    assert {label for label, group in groups.items() if group == "OrthoMerge"} == {
        label for label in groups if label.startswith("OrthoMerge-")
    }
    assert groups["FDA"] == groups["averaging"] == "weights alone"


def test_the_least_margin_is_that_of_the_worst_contestant_of_each_seed(table) -> None:
    assert claims.least_margins(table, "pictures") == pytest.approx([0.07] * 3)
    broken = (table["method"] == "regmean") & (table["seed"] == 1) & (table["kind"] == "tuned")
    table.loc[broken & (table["task"] != "retained"), "score"] -= 0.4
    assert claims.least_margins(table, "pictures") == pytest.approx([0.07, -0.2, 0.07])
    assert claims.least_margins(table, "pictures", task="retained") == pytest.approx([-0.06] * 3)
    assert claims.least_margins(table, "pictures", kind="default") == pytest.approx([0.035] * 3)


def test_tuning_is_judged_by_the_mean_over_contestants(table) -> None:
    half = sum(gain for gain, _ in LAW.values()) / len(LAW) / 2
    assert claims.tuning_margins(table, "pictures") == pytest.approx([half] * 3)


def test_findings_have_names_of_their_own_and_a_sentence() -> None:
    every = [finding for part in claims.MERGING_FINDINGS.values() for finding in part]
    assert len({finding.name for finding in every}) == len(every) == len({finding.text for finding in every})
    assert all(finding.text.endswith(".") and finding.paper for finding in every)


def test_unknown_parts_and_families_are_refused(table) -> None:
    with pytest.raises(UnknownNameError, match="part"):
        claims.merging_findings(table, "pictures", "anchors")
    with pytest.raises(UnknownNameError, match="family"):
        claims.merging_findings(table, "picture", "others")
