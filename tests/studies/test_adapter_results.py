"""What is read from the record of the adapters, on a table made by hand."""

import json
import math

import pandas as pd
import pytest

from orthokit.errors import ReportError, UnknownNameError
from orthokit.studies import (
    ADAPTER_DUELS,
    ADAPTER_METHODS,
    ADAPTER_TRACKS,
    adapter_costs,
    adapter_curves,
    adapter_differences,
    adapter_finals,
    adapter_live,
    adapter_margins,
    adapter_rates,
    adapter_results,
    adapter_settings,
    adapter_summary,
    adapter_trade,
    adapters_by_budget,
    adapters_kept,
    best_rates_by_block,
    block_exponents,
    load_evidence,
    oftv2_costs,
    oftv2_widest,
)

KEPT = {"spectrum_max": 0.1, "norm": 0.2, "angle_max": 90.0, "energy": 0.01}


def _runs(name, lr, values, *, others, scale=1.0, trainable=100):
    """Rows of one method: values and what became of the old task, by seed, at steps 0, 2 and 4."""
    return [
        {
            **{"kind": "run", "track": "tinygpt", "name": name, "scale": scale, "size": 4, "trainable": trainable},
            **{"lr": lr, "seed": seed, "step": step, "value": value, "error": math.nan},
            **{"other": {0: 1.0, 4: other}.get(step, math.nan)},
            **(KEPT if step == 4 else {}),
        }
        for seed, (row, other) in enumerate(zip(values, others, strict=True))
        for step, value in zip((0, 2, 4), row, strict=True)
    ]


def _tried(name, losses):
    return [
        {"kind": "tune", "track": "tinygpt", "name": name, "scale": 1.0, "lr": lr, "seed": 100, "step": 4, "value": v}
        for lr, v in losses.items()
    ]


def _cost(name, ratio, step_ms):
    return {
        **{"kind": "cost", "track": "tinygpt", "name": name, "scale": 1.0, "trainable": 100},
        **{"ratio": ratio, "step_ms": step_ms},
    }


def _blocks(block, scaled, best):
    """Losses with their minimum at the rate ``best``, seed 100, and at twice that, seed 101."""
    return [
        {
            **{"kind": "block", "track": "tinygpt", "name": "oft", "block": block, "block_rate": scaled},
            **{"lr": lr, "seed": seed, "step": 4, "value": math.log(lr / (best * factor)) ** 2},
        }
        for lr in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
        for seed, factor in ((100, 1.0), (101, 2.0))
    ]


@pytest.fixture
def table():
    return pd.DataFrame(
        [
            *_tried("lora", {0.1: 3.0, 0.2: 1.1, 0.4: 2.0}),
            *_tried("oft", {0.01: 1.0, 0.02: 1.5}),
            *_runs("lora", 0.2, [[3, 2, 1.0], [3, 2, 1.2]], others=[1.6, 1.8]),
            *_runs("oft", 0.01, [[3, 2, 1.5], [3, 2, 1.3]], others=[1.1, 1.2], trainable=120),
            *_runs("oft", 0.01, [[3, 2, 0.5], [3, 2, 0.3]], others=[1.1, 1.2], scale=4.0, trainable=480),
            _cost("lora", 1.1, 10.0),
            _cost("oft", 1.2, 50.0),
            *_blocks(8, True, 1.0),
            *_blocks(32, True, 1.0),
            *_blocks(8, False, 2.0),
        ]
    )


def test_finals_and_differences_are_paired_by_seed_and_of_one_budget(table):
    finals = adapter_finals(table, "tinygpt")
    assert list(finals) == ["LoRA", "OFT"] and finals["OFT"].tolist() == [1.5, 1.3]
    assert adapter_differences(table, "tinygpt")["OFT"] == pytest.approx([0.5, 0.1])
    assert adapter_differences(table, "tinygpt", value="other")["OFT"] == pytest.approx([-0.5, -0.6])


def test_curves_hold_every_evaluation(table):
    assert adapter_curves(table, "tinygpt")["LoRA"] == ([0.0, 2.0, 4.0], [[3, 2, 1.0], [3, 2, 1.2]])


def test_rates_hold_the_tuning_seed_and_the_others_at_the_chosen_rate(table):
    curves, chosen = adapter_rates(table, "tinygpt")
    assert curves["LoRA"] == ([0.1, 0.2, 0.4], [[3.0, 1.1, 2.0]]) and chosen["OFT"] == (0.01, [1.5, 1.3])


def test_gain_and_loss_are_against_the_start(table):
    assert adapter_trade(table, "tinygpt")["LoRA"] == [pytest.approx((2.0, 0.6)), pytest.approx((1.8, 0.8))]


def test_angles_are_told_in_radians(table):
    kept = adapters_kept(table, "tinygpt")["OFT"]
    assert kept["angles between rows (rad)"] == pytest.approx([math.pi / 2] * 2)
    assert kept["singular values"] == [0.1, 0.1]


def test_costs_are_ratios_to_lora_and_its_seconds(table):
    costs = adapter_costs(table, "tinygpt")
    assert costs["of LoRA's step"].to_dict() == {"LoRA": 1.0, "OFT": 1.2}
    assert costs.loc["OFT", "seconds a step"] == pytest.approx(0.012)


def test_settings_say_where_the_best_rate_lies(table):
    settings = adapter_settings(table, "tinygpt")
    assert settings["best lies"].to_dict() == {"LoRA": "inside", "OFT": "at the edge"}
    assert settings.loc["LoRA", "of OFT's"] == "0.83" and settings.loc["LoRA", "rates tried"] == "3, 0.1 to 0.4"


def test_summary_is_sorted_and_has_the_start(table):
    summary = adapter_summary(table, "tinygpt")
    assert list(summary.index) == ["LoRA", "OFT", "before"]
    assert summary.loc["before"].tolist() == ["3.000", "1.000", "", ""]
    assert summary.loc["OFT", ["step, of LoRA's", "ms a step"]].tolist() == ["1.20", "12"]


def test_budgets_are_told_where_there_are_several(table):
    assert adapters_by_budget(table) == {"OFT": ([120.0, 480.0], [[1.5, 0.5], [1.3, 0.3]])}


def test_best_rates_are_vertices_of_parabolas(table):
    found = best_rates_by_block(table)
    # The mean of two parabolas in log lr has its minimum between theirs.
    assert found["block_rate"] == ([8.0, 32.0], pytest.approx([2**0.5, 2**0.5]))
    assert found["plain"] == ([8.0, 32.0], pytest.approx([2 * 2**0.5, 2**0.5]))
    assert block_exponents(table)["plain"] == pytest.approx([-0.5, -0.5])
    assert block_exponents(table)["block_rate"] == pytest.approx([0, 0], abs=1e-9)


def test_booleans_that_went_through_a_file_are_read_right(table, tmp_path):
    table.to_csv(tmp_path / "t.csv", index=False)
    assert best_rates_by_block(pd.read_csv(tmp_path / "t.csv")) == best_rates_by_block(table)


def test_a_best_rate_at_the_edge_stays_there(table):
    rows = table[(table["kind"] == "block") & (table["lr"] >= 4)]
    assert best_rates_by_block(rows)["plain"][1] == [4.0, 4.0]


def test_margins_are_above_zero_where_the_paper_is_right(table):
    lower, forgets = (duel for duel in ADAPTER_DUELS if duel.name in ("oft-lora", "oft-forgets"))
    assert adapter_margins(table, lower, "tinygpt") == pytest.approx([-0.5, -0.1])
    assert adapter_margins(table, forgets, "tinygpt") == pytest.approx([0.5, 0.6])


def test_duels_are_between_methods_and_on_tracks_that_there_are():
    labels = {method.label for method in ADAPTER_METHODS.values()}
    for duel in ADAPTER_DUELS:
        assert {duel.winner, duel.loser} <= labels and set(duel.tracks) <= ADAPTER_TRACKS.keys()
        assert duel.text.startswith(duel.winner[:1].upper() + duel.winner[1:]) and duel.loser in duel.text


def test_unknown_names_are_refused(table):
    with pytest.raises(UnknownNameError, match="tinygpt"):
        adapter_finals(table, "gpt")
    with pytest.raises(UnknownNameError, match="OFT"):
        adapter_differences(table, "tinygpt", baseline="OTF")


def test_a_live_comparison_has_the_form_of_the_record(monkeypatch):
    def missing(name):
        raise ReportError("nothing recorded")

    monkeypatch.setattr(adapter_results, "load_evidence", missing)
    monkeypatch.setattr(adapter_results, "adapter_budget", lambda track: dict.fromkeys(ADAPTER_METHODS, (2, 10)))
    live = adapter_live("tinygpt", seeds=[0, 1], steps=2, evaluations=1, names=["oft", "hra"], small=True)
    assert list(adapter_finals(live, "tinygpt")) == ["OFT", "HRA"] and len(live) == 2 * 2 * 2
    grid = adapter_study_rates("tinygpt")
    assert set(live["lr"]) == {grid["oft"][1], grid["hra"][1]}
    assert max(adapters_kept(live, "tinygpt")["OFT"]["singular values"]) < 1e-6


def adapter_study_rates(track):
    from orthokit.studies.adapter_study import ADAPTER_RATES

    return ADAPTER_RATES[track]


def test_the_record_has_every_method_on_every_track_with_its_best_rate_inside():
    table, how = load_evidence("adapters")
    for track in ADAPTER_TRACKS:
        finals = adapter_finals(table, track)
        assert finals.shape == (how["seeds"], len(ADAPTER_METHODS)) and finals.notna().all(axis=None)
        assert set(adapter_settings(table, track)["best lies"]) == {"inside"}
    counts = adapter_settings(table, "noun")["trainable"]
    assert counts["full fine-tuning"] == 10_616_832, "whole numbers are kept in full"


def test_the_ledger_of_costs_reads_the_benchmark(tmp_path):
    def one(ratio, kept, seconds=(1.0,)):
        return {"median_ratio": ratio, "kept": kept, "moments": "0.5", "wall_seconds": list(seconds)}

    full = {
        "OFT 32": one(1.2, "1.5", (1.0, 2.0)),
        "OFT 32, weight-centric": one(6.0, "7.5", (5.0, 8.0)),
        "LoRA 16": one(0.8, "1"),
    }
    cases = [
        {"title": "layer, width 64, 9 tokens", "candidates": full | {"OFT 32, PEFT": one(1.8, "2")}},
        {"title": "width: 512, 9 tokens", "candidates": full},
        {"title": "width: 1024, 9 tokens", "candidates": {"OFT 32": one(1.0, "1")}},
    ]
    (tmp_path / "adapters.json").write_text(json.dumps({"cases": cases}))
    found = oftv2_costs(root=tmp_path)
    assert list(found.index) == ["layer, width 64, 9 tokens", "width: 512, 9 tokens"]
    assert found.iloc[0].tolist() == pytest.approx([5.0, 4.0, 1.5, 1.5])
    assert math.isnan(found.loc["width: 512, 9 tokens", "PEFT's time"])
    assert oftv2_widest(root=tmp_path) == ("width: 512, 9 tokens", [5.0, 4.0])


def test_without_a_benchmark_the_ledger_is_empty(tmp_path):
    assert oftv2_costs(root=tmp_path).empty and oftv2_widest(root=tmp_path) == ("", [])
