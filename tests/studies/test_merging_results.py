"""What is read from the record of merging, on a record made by law."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
from merging_record import LAW, SEEDS, TASKS, merging_record

from orthokit.errors import ReportError, UnknownNameError
from orthokit.figures import mean_interval
from orthokit.merging import methods
from orthokit.studies import merging_published as published
from orthokit.studies import merging_results as results
from orthokit.studies.merging_study import contestants


@pytest.fixture
def table():
    return merging_record()


def test_families_and_tasks_are_those_with_merges_in_the_order_of_the_families() -> None:
    both = merging_record(("language", "pictures"))
    assert results.merging_families(both) == ["pictures", "language"]
    assert results.merging_tasks(both, "language") == list(TASKS["language"])
    assert results.merging_families(both[both["kind"] == "start"]) == []


def test_scores_are_means_with_students_intervals_best_average_first(table) -> None:
    scores = results.merging_scores(table, "pictures")
    assert len(scores) == len(LAW) and scores.index[0] == "RegMean"
    assert scores["average"].is_monotonic_decreasing
    row = scores.loc["OrthoMerge-C + TIES"]
    assert row["method"] == "orthomerge conflict ties" and row["seeds"] == len(SEEDS)
    told = [row[name] for name in ("low digits", "low digits_low", "low digits_high")]
    assert told == pytest.approx(mean_interval([0.62, 0.621, 0.622]))
    assert row["average"] == pytest.approx(0.621) and row["retained"] == pytest.approx(0.871)
    assert row["seconds"] == pytest.approx(0.2) and row["options"] == "scale 0.6 (0.5 to 0.7)"


def test_seconds_are_those_of_the_default_merge_which_was_made(table) -> None:
    table.loc[table["kind"] == "tuned", "seconds"] = 9.0
    assert results.merging_scores(table, "pictures").loc["TA", "seconds"] == pytest.approx(0.2)
    only = table[table["kind"] != "default"]
    assert math.isnan(results.merging_scores(only, "pictures").loc["TA", "seconds"])


def test_margin_and_share_are_against_the_experts_on_their_own_tasks(table) -> None:
    scores = results.merging_scores(table, "pictures")
    for name, (gain, _) in LAW.items():
        row = scores.loc[results.merging_label(name)]
        assert row["margin"] == pytest.approx(gain - 0.3) and row["share"] == pytest.approx(gain / 0.3)
        assert row["margin_high"] - row["margin_low"] == pytest.approx(0, abs=1e-9)
    defaults = results.merging_scores(table, "pictures", kind="default")
    assert defaults.loc["RegMean", "share"] == pytest.approx(0.1 / 0.3) and set(defaults["options"]) == {"defaults"}


def test_share_pools_the_tasks_so_that_an_expert_without_gain_divides_nothing(table) -> None:
    own = (table["method"] == "expert low digits") & (table["task"] == "low digits")
    table.loc[own, "score"] -= 0.3
    scores = results.merging_scores(table, "pictures")
    assert scores.loc["TA", "share"] == pytest.approx(3 * 0.12 / 0.6)
    for task in TASKS["pictures"]:
        table.loc[(table["method"] == f"expert {task}") & (table["task"] == task), "score"] = 0.1
    assert results.merging_scores(table, "pictures")["share"].isna().all()


def test_references_are_the_base_and_each_expert_at_home(table) -> None:
    ends = results.merging_references(table, "pictures")
    assert ends.loc["base", "high digits"] == pytest.approx(0.521)
    assert ends.loc["experts", "high digits"] == pytest.approx(0.821)
    assert ends.loc["experts", "retained"] == pytest.approx(0.701)
    assert ends["share"].tolist() == pytest.approx([0, 1]) and ends["margin"].tolist() == pytest.approx([-0.3, 0])


def test_one_seed_has_scores_without_intervals() -> None:
    scores = results.merging_scores(merging_record(seeds=(4,)), "pictures")
    assert scores["average"].notna().all() and scores["average_low"].isna().all()
    assert results.merging_summary(merging_record(seeds=(4,)), "pictures").loc["TA", "retained"] == "86.400"


def test_a_base_that_was_judged_twice_counts_once(table) -> None:
    again = pd.concat([table, table[table["kind"].isin(["start", "expert"])]])
    pd.testing.assert_frame_equal(results.merging_scores(again, "pictures"), results.merging_scores(table, "pictures"))


def test_margins_are_paired_by_seed(table) -> None:
    one = (table["method"] == "ties") & (table["kind"] == "tuned") & (table["seed"] == 1)
    table.loc[one & (table["task"] == "footwear"), "score"] += 0.03
    assert results.merging_margins(table, "pictures", "ties", "linear") == pytest.approx([-0.02, -0.01, -0.02])
    footwear = results.merging_margins(table, "pictures", "ties", "linear", task="footwear")
    assert footwear == pytest.approx([-0.02, 0.01, -0.02])
    kept = results.merging_margins(table, "pictures", "orthomerge global tsv", "tsv", task="retained")
    assert kept == pytest.approx([0.04] * 3)
    assert results.merging_margins(table, "pictures", "experts", "base") == pytest.approx([0.3] * 3)
    assert results.merging_margins(table, "pictures", "tsv", "base", kind="default") == pytest.approx([0.075] * 3)


def test_a_seed_that_one_of_the_two_lacks_is_left_out(table) -> None:
    lacking = table[~((table["method"] == "ties") & (table["seed"] == 1))]
    assert len(results.merging_margins(lacking, "pictures", "ties", "linear")) == 2
    assert results.merging_scores(lacking, "pictures").loc["TIES", "seeds"] == 2


def test_the_front_has_a_pair_a_seed_and_the_references_last(table) -> None:
    points = results.merging_front(table, "pictures")
    assert list(points)[-2:] == ["base", "experts"] and len(points) == len(LAW) + 2
    assert points["FDA"][2] == pytest.approx((0.672, 0.872))
    assert points["base"][0] == pytest.approx((0.51, 0.9))


def test_marks_are_in_the_unit_of_the_family() -> None:
    both = merging_record(("language", "pictures"))
    pictures, language = (results.merging_marks(both, name) for name in ("pictures", "language"))
    assert list(pictures) == [*TASKS["pictures"], "average", "retained"]
    assert next(iter(pictures["average"])) == "RegMean" and list(pictures["average"])[-2:] == ["base", "experts"]
    assert pictures["average"]["base"][0] == pytest.approx(51.1)
    assert language["retained"]["TIES"][0] == pytest.approx(-1.039)


def test_summary_is_in_words_and_ends_with_the_references(table) -> None:
    summary = results.merging_summary(table, "pictures")
    assert list(summary.index[-2:]) == ["experts", "base"] and summary.index[0] == "RegMean"
    assert summary.loc["base", "margin to experts (points)"] == "-30.000 ± 0.000"
    assert summary.loc["TA", "average"] == "63.10 ± 0.25"


def test_options_of_seeds_are_summed_up() -> None:
    made = [{"scale": 1.0, "inner": "ties"}, {"scale": 0.5, "inner": "linear"}, {"scale": 0.7, "inner": "ties"}]
    texts = [json.dumps(one) for one in made]
    assert results._settings(texts) == "scale 0.7 (0.5 to 1), inner ties or linear"
    assert results._settings([*texts[:1], "{}"]) == "scale 1, inner ties, defaults for 1 of 2 seeds"
    assert results._settings(["{}", math.nan]) == "defaults"


def test_gains_of_orthomerge_stand_beside_the_published_ones(table) -> None:
    gains, kept = published.orthomerge_gains(table), published.orthomerge_gains(table, task="retained")
    assert gains.loc["OrthoMerge-C + TA", "pictures (points)"].startswith("2.000")
    assert kept.loc["OrthoMerge-G + TSV-M", "pictures (points)"].startswith("4.000")
    assert gains.loc["OrthoMerge-G + TSV-M", "Llama-3.2-3B, MergeBench (published)"] == "-1.49"
    assert kept.loc["OrthoMerge-G + TIES", "Qwen2.5-VL-7B (published)"] == "+1.03"
    assert gains.loc["OrthoMerge-G + averaging", "Qwen2.5-VL-7B (published)"] == ""
    with pytest.raises(UnknownNameError, match="task"):
        published.orthomerge_gains(table, task="footwear")


def test_every_contestant_and_method_has_a_label_of_its_own() -> None:
    names = {*contestants(2), *contestants(3)}
    labels = [results.merging_label(name) for name in names]
    assert len(set(labels)) == len(names) and all("_" not in label for label in labels)
    assert set(results._LABELS) == set(methods()) - {"orthomerge"}


def test_published_tables_are_those_of_the_papers() -> None:
    table = published.published_orthomerge()
    ours = table[table["method"].str.startswith("OrthoMerge")]
    assert len(ours) == 13 and ours["gain"].notna().sum() == 12
    assert ours.loc[ours["gain"].idxmin(), ["merger", "gain"]].tolist() == ["TSV-M", -1.49]
    llama = table[(table["model"] == "Llama-3.1-8B") & ~table["method"].isin(["base", "experts"])]
    assert llama.loc[llama["score"].idxmax(), "method"] == "OrthoMerge"
    ends = table[table["method"].isin(["base", "experts"])].groupby("model")["score"].agg(["min", "max"])
    between = table["score"] >= table["model"].map(ends["min"])
    assert between.all()
    anchors = published.published_anchors().groupby(["model", "method"])["score"].max().unstack()
    assert (anchors["FDA from TA"] > anchors["TA"]).all() and (anchors["experts"] == anchors.max(axis=1)).all()
    starts = published.published_anchors().groupby(["model", "method"]).size().unstack()
    assert (starts[[name for name in starts if name.startswith("FDA")]] == 2).all(axis=None)


def test_what_is_not_there_is_refused(table) -> None:
    with pytest.raises(UnknownNameError, match="family"):
        results.merging_scores(table, "picture")
    with pytest.raises(UnknownNameError, match="kind"):
        results.merging_scores(table, "pictures", kind="best")
    with pytest.raises(UnknownNameError, match="contestant"):
        results.merging_margins(table, "pictures", "ties", "tie")
    with pytest.raises(UnknownNameError, match="task"):
        results.merging_margins(table, "pictures", "ties", "tsv", task="digits")
    with pytest.raises(ReportError, match="orthokit study merging"):
        results.merging_scores(table, "texts")
    with pytest.raises(ReportError, match="expert footwear"):
        results.merging_front(table[table["method"] != "expert footwear"], "pictures")
