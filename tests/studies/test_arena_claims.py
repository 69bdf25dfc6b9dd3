"""The findings of PEFT-Arena as numbers, on a record made by law."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from arena_record import arena_record

from orthokit.errors import ReportError, UnknownNameError
from orthokit.lab.arena import METHODS
from orthokit.studies import arena_claims as claims
from orthokit.studies import arena_ways as ways
from orthokit.studies.arena_correlations import ARENA_DIAGNOSTICS


@pytest.fixture
def table():
    return arena_record()


def test_margins_to_the_front_are_against_the_most_dangerous_rival(table):
    # LoRA gains as much and forgets 0.3 more; HRA forgets 0.1 less but gains 0.4 less; full gains 0.2 more.
    assert claims.front_margins(table, "tinygpt") == pytest.approx([0.3] * 3)
    assert claims.front_margins(table, "tinygpt", rivals=["HRA"]) == pytest.approx([0.4] * 3)
    # DoRA is beaten by LoRA by 0.1 on both axes, and by OFT by 0.1 in gain and more in forgetting.
    assert claims.front_margins(table, "tinygpt", label="DoRA") == pytest.approx([-0.1] * 3)


def test_a_method_is_on_the_front_where_its_margin_is_above_zero(table):
    from orthokit.studies.arena_results import arena_finals

    front = arena_finals(table, "tinygpt")["front"]
    margins = {label: claims.front_margins(table, "tinygpt", label=label)[0] for label in front.index}
    assert {label for label, margin in margins.items() if margin > 1e-9} == set(front.index[front])


def test_a_rival_that_diverged_threatens_nobody(table):
    broken = table["method"].isin(["lora", "full", "dora"]) & (table["step"] == 50)
    table.loc[broken, ["target", "general"]] = math.nan
    assert claims.front_margins(table, "tinygpt") == pytest.approx([0.4] * 3)


def test_rivals_of_equal_budget_are_within_a_factor(table):
    assert claims.budget_rivals(table, "tinygpt") == ["LoRA", "DoRA", "HRA"]
    assert claims.budget_rivals(table, "tinygpt", factor=20.0) == ["full fine-tuning", "LoRA", "DoRA", "HRA"]


def test_forgetting_is_compared_seed_by_seed(table):
    table.loc[(table["method"] == "oft") & (table["seed"] == 2) & (table["step"] == 50), "general"] += 0.1
    assert claims.forgetting_margins(table, "tinygpt", "OFT", "LoRA") == pytest.approx([0.3, 0.3, 0.2])


@pytest.mark.parametrize(("gain", "forgotten"), [(0.0, 0.0), (0.5, 0.25), (1.5, 1.25), (2.0, 2.0)])
def test_forgetting_at_a_gain_is_linear_between_the_points(gain, forgotten):
    assert ways.forgetting_at_gain([0.0, 1.0, 2.0], [0.0, 0.5, 2.0], gain) == forgotten


def test_forgetting_at_a_gain_is_where_it_is_first_reached():
    assert ways.forgetting_at_gain([0, 1, 2, 1], [0, 1, 2, 9], 1.5) == 1.5
    assert math.isnan(ways.forgetting_at_gain([0, 1], [0, 1], 1.5))
    assert math.isnan(ways.forgetting_at_gain([0, math.nan], [0, 1], 0.5))


def test_the_area_between_a_straight_way_and_a_rounded_one_is_known(table):
    # F = f g/G against f (g/G)^2: on average f (1/2 - 1/3).
    savings = ways.equal_gain_savings(table, "tinygpt", ("OFT", "cayley_sqrt"), ("OFT", "dense"))
    assert savings == pytest.approx([0.2 / 6, 0.21 / 6, 0.22 / 6], rel=1e-3)
    assert ways.equal_gain_savings(table, "tinygpt", ("OFT", None), ("OFT", "cayley_sqrt")) == [0, 0, 0]


@pytest.mark.parametrize("x", [[0.0, 1.0, 2.0, 3.0], [0.0, 0.3, 0.6, 1.0]])
def test_parabolas_are_refined_exactly(x):
    x = np.array(x)
    fine = np.concatenate([np.linspace(a, b, 20, endpoint=False) for a, b in pairwise(x)] + [x[-1:]])
    assert ways._refined(2 * x**2 - x, x) == pytest.approx(2 * fine**2 - fine)
    assert ways._refined([1.0, 2.0], [0.0, 1.0]).tolist() == [1.0, 2.0]


def test_without_a_middle_the_nearest_point_counts(table):
    few = table[~table["alpha"].isin([0.1, 0.2, 0.4, 0.5, 0.7, 0.8, 0.9])]
    assert ways.overshoot(few, "tinygpt", "OFT") == pytest.approx([0.6 - 0.36] * 3)
    savings = ways.equal_gain_savings(few, "tinygpt", ("OFT", None), ("OFT", "dense"))
    assert savings == pytest.approx([0.2 / 6, 0.21 / 6, 0.22 / 6], rel=1e-3)


def test_methods_are_compared_up_to_the_smaller_of_their_gains(table):
    # OFT's way is f (g/G)^2 with f = 0.2, LoRA's 0.5 g/G, both up to the same gain.
    savings = ways.equal_gain_savings(table, "tinygpt", ("OFT", None), ("LoRA", None))
    assert savings[0] == pytest.approx(0.25 - 0.2 / 3, rel=1e-3)
    backward = ways.equal_gain_savings(table, "tinygpt", ("LoRA", None), ("OFT", None))
    assert backward == pytest.approx([-saving for saving in savings])
    # HRA reaches 0.4 only: there LoRA has forgotten 0.25.
    savings = ways.equal_gain_savings(table, "tinygpt", ("HRA", "dense"), ("LoRA", "dense"))
    assert savings[0] == pytest.approx(0.125 - 0.05)


def test_savings_of_a_path_are_shares_of_what_is_forgotten(table):
    assert ways.path_savings(table, "tinygpt", "OFT") == pytest.approx([1 / 6] * 3, rel=1e-3)
    table.loc[(table["method"] == "oft") & (table["path"] == "dense"), "general"] = 1.0
    assert all(math.isnan(share) for share in ways.path_savings(table, "tinygpt", "OFT"))


def test_what_never_gains_is_not_compared(table):
    table.loc[(table["method"] == "hra") & (table["kind"] == "path"), "target"] = 3.5
    assert all(math.isnan(s) for s in ways.equal_gain_savings(table, "tinygpt", ("HRA", None), ("LoRA", None)))


def test_overshoot_is_forgetting_undone_minus_gain_given_up(table):
    assert ways.overshoot(table, "tinygpt", "OFT") == pytest.approx([0.25] * 3)
    assert ways.overshoot(table, "tinygpt", "OFT", at=0.3) == pytest.approx([0.3 - 0.09] * 3)
    assert ways.overshoot(table, "tinygpt", "LoRA") == pytest.approx([0] * 3, abs=1e-12)
    with pytest.raises(ReportError, match="no point"):
        ways.overshoot(table, "tinygpt", "OFT", at=0.33)


def test_what_forgot_nothing_cannot_overshoot(table):
    table.loc[(table["method"] == "oft") & (table["kind"] == "path"), "general"] = 1.9
    assert all(math.isnan(share) for share in ways.overshoot(table, "tinygpt", "OFT"))


def test_the_best_point_is_chosen_on_other_seeds(table):
    assert ways.overshoot_gain(table, "tinygpt", "LoRA") == [0, 0, 0]
    rows = (table["method"] == "oft") & (table["path"] == "cayley_linear")
    # Seed 0 alone is best at 0.5: what the others choose, the end, counts for it; they lose by its choice.
    table.loc[rows & (table["seed"] == 0) & (table["alpha"] == 0.5), "target"] = 1.0
    found = ways.overshoot_gain(table, "tinygpt", "OFT")
    assert found[0] == 0 and found[1:] == pytest.approx([-0.405, -0.41])
    # All are better at 0.5 by 0.1.
    for seed in range(3):
        table.loc[rows & (table["seed"] == seed) & (table["alpha"] == 0.5), "target"] = 3 - (0.9 + 0.01 * seed)
    assert ways.overshoot_gain(table, "tinygpt", "OFT") == pytest.approx([0.1] * 3)
    alone = ways.overshoot_gain(table[table["seed"].isin([0])], "tinygpt", "OFT")
    assert len(alone) == 1 and math.isnan(alone[0])


def test_layer_wise_scales_are_held_against_the_path_at_their_gain(table):
    # The rounded path has 0.81 of the forgetting at 0.9 of the gain, the scales half; the straight one 0.9.
    savings = ways.stop_savings(table, "tinygpt", "OFT", "safe")
    assert savings == pytest.approx([0.31 * f for f in (0.2, 0.21, 0.22)])
    dense = ways.stop_savings(table, "tinygpt", "OFT", "min", path="dense")
    assert dense == pytest.approx([0.4 * f for f in (0.2, 0.21, 0.22)])
    with pytest.raises(UnknownNameError, match="LoRA"):
        ways.stop_savings(table, "tinygpt", "LoRA", "safe")


@pytest.mark.parametrize(
    "ask",
    [
        lambda table: claims.front_margins(table, "tinygpt", label="OTF"),
        lambda table: claims.budget_rivals(table, "tinygpt", label="OTF"),
        lambda table: claims.forgetting_margins(table, "tinygpt", "OTF", "LoRA"),
        lambda table: claims.forgetting_margins(table, "gpt", "OFT", "LoRA"),
    ],
)
def test_unknown_names_are_refused(table, ask):
    with pytest.raises(UnknownNameError):
        ask(table)


def test_a_way_that_is_not_recorded_is_said(table):
    with pytest.raises(ReportError, match="cayley_sqrt"):
        ways.equal_gain_savings(table, "tinygpt", ("LoRA", "cayley_sqrt"), ("LoRA", "dense"))
    with pytest.raises(ReportError, match="OTF"):
        ways.overshoot(table, "tinygpt", "OTF")


def test_published_tables_have_the_published_front():
    scores = claims.published_scores()
    assert scores.loc["OFT"].tolist() == [11.63, 2.60] and scores.loc["VeRA", "forgetting"] == -0.28
    beaten = scores[(scores["gain"] > 11.63) & (scores["forgetting"] < 2.6)]
    assert beaten.empty, "nobody beats OFT on both axes there"
    assert claims.published_distortions()["cka"].idxmax() == "OFT"
    rewound = claims.published_rewinding()
    assert rewound.loc["uniform 0.4", "gain"] > rewound.loc["finished", "gain"]
    assert claims.PUBLISHED_CORRELATIONS.keys() <= ARENA_DIAGNOSTICS.keys()


def test_published_methods_are_called_as_ours_where_ours_are_there():
    ours = {method.label.lower() for method in METHODS.values()}
    shared = {"oft", "lora", "dora", "full fine-tuning"}
    assert shared <= ours & {name.lower() for name in claims.published_scores().index}
    assert isinstance(claims.published_distortions(), pd.DataFrame)


def test_findings_are_what_a_record_can_decide(table):
    found = {finding.name: (values, unit) for finding, values, unit in claims.arena_findings(table, "tinygpt", "front")}
    assert found["oft-front"] == (pytest.approx([0.3] * 3), "bits per byte")
    assert found.keys() == {finding.name for finding in claims.FINDINGS["front"]}
    back = {
        finding.name: (values, unit) for finding, values, unit in claims.arena_findings(table, "tinygpt", "rewinding")
    }
    # No BOFT in this record.
    assert back.keys() == {finding.name for finding in claims.FINDINGS["rewinding"]} - {"path-boft"}
    assert back["half-oft"] == (pytest.approx([0.25] * 3), "") and back["safe-oft"][0][0] == pytest.approx(0.062)
    with pytest.raises(UnknownNameError, match="rewinding"):
        claims.arena_findings(table, "tinygpt", "back")


def test_findings_without_numbers_are_left_out(table):
    table.loc[(table["method"] == "oft") & (table["kind"] == "path"), "target"] = 3.5
    names = {finding.name for finding, _, _ in claims.arena_findings(table, "tinygpt", "rewinding")}
    assert "path-oft" not in names and "half-oft" not in names and "half-lora" in names
    names = {finding.name for finding, _, _ in claims.arena_findings(table, "tinygpt", "front")}
    assert "oft-equal-gain" not in names and "oft-front" in names


def test_findings_have_names_of_their_own():
    names = [finding.name for part in claims.FINDINGS.values() for finding in part]
    assert len(names) == len(set(names))
    for part in claims.FINDINGS.values():
        for finding in part:
            assert all(label.lower() in finding.text.lower() for label in finding.needs)
