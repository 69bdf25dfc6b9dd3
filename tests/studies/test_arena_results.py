"""What is read from the record of the arena, on a record made by law."""

import math

import numpy as np
import pandas as pd
import pytest
from arena_record import ALPHAS, LAW, SEEDS, arena_record
from scipy import stats

from orthokit.errors import ReportError, UnknownNameError
from orthokit.figures import mean_interval
from orthokit.studies import arena_correlations as correlations
from orthokit.studies import arena_results as results
from orthokit.studies import arena_ways as ways


@pytest.fixture
def table():
    return arena_record()


def _diverged(table, method, seed):
    broken = (table["method"] == method) & (table["seed"] == seed) & (table["step"] == 50)
    table.loc[broken, ["target", "general"]] = math.nan
    return table


def test_grounds_are_those_with_finished_runs(table):
    other = arena_record("noun")
    assert results.arena_grounds(pd.concat([other, table])) == ["tinygpt", "noun"]
    assert results.arena_grounds(other[other["kind"] == "tune"]) == []


def test_gain_and_forgetting_are_against_the_start_and_keep_their_sign(table):
    runs = results.arena_runs(table, "tinygpt")
    assert list(dict.fromkeys(runs["label"])) == ["full fine-tuning", "LoRA", "DoRA", "OFT", "HRA"]
    assert len(runs) == len(LAW) * len(SEEDS) and set(runs["step"]) == {50}
    oft = runs[runs["method"] == "oft"]
    assert oft["gain"].tolist() == pytest.approx([0.8, 0.81, 0.82])
    assert oft["forgetting"].tolist() == pytest.approx([0.2, 0.21, 0.22])
    table.loc[(table["method"] == "oft") & (table["step"] == 50), "general"] = 1.5
    assert results.arena_points(table, "tinygpt")["OFT"] == [pytest.approx((g, -0.5)) for g in (0.8, 0.81, 0.82)]


def test_tuning_runs_are_told_apart_by_their_rate(table):
    assert len(results.arena_runs(table, "tinygpt", kinds=("tune", "run"))) == len(LAW) * (3 + len(SEEDS))


def test_finals_have_students_intervals_and_the_front(table):
    finals = results.arena_finals(table, "tinygpt")
    assert finals.loc["LoRA", ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx(
        mean_interval([0.8, 0.81, 0.82])
    )
    assert finals.loc["OFT", "forgetting_high"] == pytest.approx(mean_interval([0.2, 0.21, 0.22])[2])
    # LoRA gains what OFT gains and forgets more; DoRA is beaten by both.
    assert finals.index[finals["front"]].tolist() == ["full fine-tuning", "OFT", "HRA"]
    assert finals.loc["HRA", ["seeds", "trainable", "lr"]].tolist() == [3, 1050, 1e-3]


def test_a_method_with_a_diverged_run_has_no_mean_and_is_not_on_the_front(table):
    finals = results.arena_finals(_diverged(table, "full", 1), "tinygpt")
    assert finals.loc["full fine-tuning", ["gain", "gain_low", "forgetting_high"]].isna().all()
    assert finals.index[finals["front"]].tolist() == ["OFT", "HRA"]
    assert "diverged" in results.arena_summary(table, "tinygpt").loc["full fine-tuning"].tolist()


def test_one_seed_gives_points_without_intervals(table):
    finals = results.arena_finals(table[table["seed"].isin([0, 100])], "tinygpt")
    assert finals["gain"].notna().all() and finals["gain_low"].isna().all()


def test_summary_is_sorted_by_gain_and_has_the_losses_before(table):
    summary = results.arena_summary(table, "tinygpt")
    assert list(summary.index) == ["full fine-tuning", "LoRA", "OFT", "DoRA", "HRA", "before"]
    assert summary.loc["before", "target (bits per byte)"] == "3.000" and summary.loc["before", "gain"] == ""
    assert summary["on the front"].tolist() == ["yes", "", "yes", "", "yes", ""]
    assert "error rate" not in summary and "geometry lost" not in summary
    table["geometry"] = 0.25
    assert results.arena_summary(table, "tinygpt").loc["OFT", "geometry lost"] == "0.250 ± 0.000"


def test_settings_say_size_budget_and_where_the_best_rate_lies(table):
    edge = (table["method"] == "hra") & (table["kind"] == "tune") & (table["lr"] > 1e-3)
    settings = results.arena_settings(table[~edge], "tinygpt")
    assert settings.loc["LoRA", ["size", "of OFT's", "rates tried"]].tolist() == [
        "rank 8",
        "1.00",
        "3, 0.0002 to 0.0008",
    ]
    assert settings["best lies"].to_dict() == dict.fromkeys(settings.index, "inside") | {"HRA": "at the edge"}
    assert results.arena_notes(table, "tinygpt")["LoRA"] == "rank 8; 1,000 numbers; rate 0.0004"


def test_rates_have_both_scores_on_the_tuning_seed(table):
    rates, gains, forgettings = results.arena_rates(table, "tinygpt")["LoRA"]
    assert rates == [2e-4, 4e-4, 8e-4]
    assert gains[0] == pytest.approx([0.64, 0.8, 0.64]) and forgettings[0] == pytest.approx([0.25, 0.5, 1.0])


def test_paths_have_a_row_for_each_seed(table):
    paths = ways.arena_paths(table, "tinygpt")
    assert list(paths["OFT"]) == ["dense", "cayley_sqrt", "cayley_linear"] and list(paths["LoRA"]) == ["dense"]
    alphas, gains, forgettings = paths["OFT"]["cayley_sqrt"]
    assert alphas == ALPHAS and np.shape(gains) == (3, 11)
    assert gains[1][5] == pytest.approx(0.405) and forgettings[1][5] == pytest.approx(0.21 / 4)


def test_stops_are_single_points_of_those_who_turn(table):
    stops = ways.arena_stops(table, "tinygpt")
    assert list(stops) == ["OFT", "HRA"] and list(stops["OFT"]) == ["safe", "min", "uniform"]
    assert stops["OFT"]["safe"][0] == pytest.approx((0.72, 0.1))


def test_areas_are_shares_of_the_largest_rectangle(table):
    areas = ways.arena_areas(table, "tinygpt")
    # Full fine-tuning, straight: a staircase of ten steps under the diagonal.
    assert areas["full fine-tuning"] == pytest.approx(sum(0.1 * (1 - 0.1 * k) for k in range(1, 11)))
    assert areas["OFT"] > areas["LoRA"] > areas["DoRA"]


def test_areas_need_something_gained_and_forgotten(table):
    table["general"] = 2.0
    assert ways.arena_areas(table, "tinygpt") == {}


def test_layers_are_a_table_of_those_that_were_judged(table):
    judged = results.arena_layers(table, "tinygpt", "procrustes")
    assert list(judged.index) == ["blocks.1.attn.q"] and judged.loc["blocks.1.attn.q", "LoRA"] == 1.0
    assert list(results.arena_layers(table, "tinygpt", "strength")) == ["OFT", "HRA"]
    with pytest.raises(UnknownNameError, match="procrustes"):
        results.arena_layers(table, "tinygpt", "procrust")


def test_profiles_are_in_shares_of_the_largest_singular_value_and_of_the_change(table):
    layer, found = results.arena_profiles(table, "tinygpt")
    assert layer == "blocks.0.attn.q" and list(found) == ["full fine-tuning", "LoRA", "DoRA", "OFT", "HRA"]
    assert found["OFT"]["retention"] == pytest.approx([0.1] * 3)
    assert found["OFT"]["adaptation"] == pytest.approx([3**-0.5] * 3)
    with pytest.raises(UnknownNameError, match=r"blocks\.1"):
        results.arena_profiles(table, "tinygpt", "blocks.9.attn.q")


def test_correlations_are_those_of_scipy(table):
    found = correlations.forgetting_correlations(table, "tinygpt", draws=200)
    runs = results.arena_runs(table, "tinygpt", kinds=("tune", "run"))
    assert (found.runs, found.methods) == (30, 5)
    for label, column in correlations.ARENA_DIAGNOSTICS.items():
        x = -runs[column] if column == "cka" else runs[column]
        for kind, rule in (("Pearson", stats.pearsonr), ("Spearman", stats.spearmanr)):
            value, low, high = found.found[kind][label]
            assert value == pytest.approx(rule(x, runs["forgetting"]).statistic, abs=1e-9)
            assert low <= high
    ranks = runs[["moved", "forgetting"]].rank()
    within = ranks - ranks.groupby(runs["method"]).transform("mean")
    assert found.found["within methods"]["size of the change ‖ΔW‖/‖W‖"][0] == pytest.approx(within.corr().iloc[0, 1])
    assert found.found["Spearman"]["Procrustes residual"] == pytest.approx((1, 1, 1))


def test_weights_are_resampled_copies(table):
    """Ranks and moments with weights against a table in which methods really occur twice."""
    runs = results.arena_runs(table, "tinygpt", kinds=("tune", "run"))
    place = np.unique(runs["method"].to_numpy(str), return_inverse=True)[1]
    counts = np.array([2, 0, 1, 0, 2])
    x, y = runs["gram"].to_numpy(), runs["forgetting"].to_numpy()
    weights = counts[place][None].astype(float)
    ranks = [correlations._ranks(v, weights) for v in (x, y)]
    copies = np.repeat(np.arange(len(x)), counts[place])
    assert correlations._pearson(*ranks, weights)[0] == pytest.approx(stats.spearmanr(x[copies], y[copies]).statistic)
    plain = [v[None] for v in (x, y)]
    assert correlations._pearson(*plain, weights)[0] == pytest.approx(stats.pearsonr(x[copies], y[copies]).statistic)


def test_intervals_of_correlations_repeat_with_the_seed_and_draw_methods_not_runs(table):
    one, again = (correlations.forgetting_correlations(table, "tinygpt", draws=200) for _ in range(2))
    assert one == again
    # Runs that occur ten times over say no more: methods are what is drawn.
    many = pd.concat([table, *(table[table["kind"] == "tune"].assign(seed=200 + k) for k in range(9))])
    few = correlations.forgetting_correlations(table, "tinygpt", kinds=("tune",), draws=200)
    more = correlations.forgetting_correlations(many, "tinygpt", kinds=("tune",), draws=200)
    name = "size of the change ‖ΔW‖/‖W‖"
    assert more.runs == 10 * few.runs and more.found["Pearson"][name] == pytest.approx(few.found["Pearson"][name])


def test_a_diagnostic_that_few_have_does_not_choose_the_runs(table):
    table.loc[table["method"] != "oft", "moved"] = math.nan
    table["stable_rank"] = 1.0
    found = correlations.forgetting_correlations(table, "tinygpt", draws=100)
    assert found.runs == 30 and "size of the change ‖ΔW‖/‖W‖" not in found.found["Pearson"]
    assert "stable rank of ΔW" not in found.found["Pearson"], "the same everywhere"


def test_a_gap_of_a_diagnostic_to_itself_is_nothing(table):
    pair = ("Procrustes residual", "drift on general inputs (CSD)")
    gap = correlations.correlation_gap(table, "tinygpt", *pair, draws=200)
    assert gap[0] > 0.3 and gap[1] <= gap[0] <= gap[2]
    assert correlations.correlation_gap(table, "tinygpt", pair[0], pair[0], draws=100) == pytest.approx((0, 0, 0))
    with pytest.raises(UnknownNameError, match="Procrustes"):
        correlations.correlation_gap(table, "tinygpt", "Procrustes", pair[1])
    with pytest.raises(UnknownNameError, match="Spearman"):
        correlations.correlation_gap(table, "tinygpt", *pair, kind="Kendall")


def test_what_is_not_recorded_is_said(table):
    with pytest.raises(UnknownNameError, match="tinygpt"):
        results.arena_runs(table, "gpt")
    with pytest.raises(ReportError, match="orthokit study arena"):
        results.arena_runs(table, "noun")
    with pytest.raises(ReportError, match="before training"):
        results.arena_runs(table[table["step"] > 0], "tinygpt")
    with pytest.raises(ReportError, match="three methods"):
        correlations.forgetting_correlations(table[table["method"].isin(["oft", "lora"])], "tinygpt")
