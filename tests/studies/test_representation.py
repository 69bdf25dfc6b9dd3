"""The geometry of representations: what is measured, the test of phases, what is read from a record made by hand."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.diagnostics.features import alpha_req, rankme
from orthokit.diagnostics.spectrum import effective_rank
from orthokit.errors import OptionError, ReportError, ShapeError, UnknownNameError
from orthokit.lab import TinyGPT, corpus, load_pretrained
from orthokit.studies._engine import run_study, source_hash
from orthokit.studies.representation import (
    FINETUNED,
    MEASURES,
    OPTIMIZER_RATES,
    asset_features,
    feature_geometry,
    finetuned_features,
    held_out_windows,
    pretraining_features,
    pretraining_looks,
    representation_live,
    window_features,
)
from orthokit.studies.representation_phases import (
    PHASES,
    false_alarms,
    phase_test,
    phases_by_run,
    representation_phases,
    turning_points,
)
from orthokit.studies.representation_results import (
    alpha_against_rank,
    asset_against_curve,
    byte_variety,
    curve_turns,
    finetuning_changes,
    layer_ranks,
    phase_sizes,
    phase_variants,
    rank_against_loss,
    rank_at_equal_loss,
    rank_change,
    representation_curves,
    representation_summary,
)
from orthokit.studies.representation_study import REPRESENTATION

SHORT = {"context": 8, "batch": 2, "windows": 96, "layers": 1}
STEPS = [0, 1, 2, 4]


# ---- what is measured


def test_windows_are_evenly_spaced_pieces_of_the_validation_split():
    found = held_out_windows("moby_dick", count=5, context=16)
    text = corpus("moby_dick").validation.long()
    assert torch.equal(found[0], text[:16]) and torch.equal(found[-1], text[-16:])
    assert torch.equal(found, held_out_windows("moby_dick", count=5, context=16))


@pytest.mark.parametrize("bad", [{"count": 0}, {"context": 0}, {"context": 10**9}])
def test_windows_of_impossible_sizes_are_refused(bad):
    with pytest.raises(OptionError, match="need count >= 1"):
        held_out_windows("moby_dick", **bad)


def test_features_are_those_of_the_last_token_and_of_the_mean_over_tokens():
    model, windows = TinyGPT("0.2M"), held_out_windows(count=70, context=8)  # more than one chunk
    found = window_features(model, windows, layers=["embed", "norm"])
    embedded = model.embed.weight[windows]
    assert torch.equal(found["embed", "last"], embedded[:, -1])
    assert torch.allclose(found["embed", "mean"], embedded.mean(1), atol=1e-6)
    # What the head reads: its logits are those of the model.
    logits = model(windows)[:, -1]
    assert torch.allclose(found["norm", "last"] @ model.head.weight.T, logits, atol=1e-4)


def test_the_measures_are_those_of_the_library_on_the_features_themselves():
    Z = torch.randn(300, 40, generator=torch.Generator().manual_seed(1)) * torch.linspace(2, 0.1, 40) + 0.3
    found = feature_geometry(Z)
    expected = {
        "rankme_singular": rankme(Z),
        "rankme_eigen": rankme(Z, values="eigen"),
        "rankme_centred": rankme(Z, values="eigen", centre=True),
        "effective_rank": effective_rank(Z),
        "alpha": alpha_req(Z, last=30),
    }
    assert tuple(found) == MEASURES
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name


def test_features_of_rank_one_have_rank_one_and_no_exponent():
    Z = torch.outer(torch.arange(1.0, 31), torch.ones(20))
    assert float(rankme(Z)) == pytest.approx(1, abs=1e-4)
    with pytest.raises(OptionError, match="at least 5 indices"):
        feature_geometry(Z)


@given(steps=st.integers(1, 5000), between=st.booleans())
def test_looks_begin_with_the_first_step_double_and_end_with_the_last(steps, between):
    looks = pretraining_looks(steps, between=between)
    assert looks[:2] == [0, 1] and looks[-1] == steps and looks == sorted(set(looks))
    assert all(later <= 2 * earlier for earlier, later in pairwise(looks[1:]))
    assert steps - max(1, round(0.2 * steps)) in looks


def test_looks_need_a_step():
    with pytest.raises(OptionError, match="at least 1"):
        pretraining_looks(0)


def test_a_look_does_not_disturb_the_training_and_rivals_share_their_start():
    options = {"seed": 0, "steps": 4, **SHORT}
    often = pd.DataFrame(pretraining_features("0.2M", "adamw", **options))
    # At the rate of nothing but another optimizer the first look is the same, the last is not.
    other = pd.DataFrame(pretraining_features("0.2M", "muon_pre", **options))
    first, last = (t[(t["kind"] == "look") & (t["step"].isin([0, 4]))] for t in (often, other))
    for measure in MEASURES:
        a, b = (t[t["step"] == 0][measure].to_numpy() for t in (first, last))
        assert np.array_equal(a, b)
    a, b = (t[(t["step"] == 4) & (t["layer"] == "norm")]["rankme_eigen"].to_numpy() for t in (first, last))
    assert not np.allclose(a, b)
    rare = pd.DataFrame(pretraining_features("0.2M", "adamw", between=False, deep=False, **options))
    ends = [t[(t["kind"] == "look") & (t["step"] == 4) & (t["layer"] == "norm")]["bits"].iloc[0] for t in (often, rare)]
    assert ends[0] == ends[1]


def test_halves_are_blocks_that_alternate_and_are_left_out_one_by_one():
    options = {"seed": 0, "steps": 1, **SHORT}
    rows = pd.DataFrame(pretraining_features("0.2M", "adamw", deep=False, **options))
    start = rows[(rows["kind"] == "half") & (rows["step"] == 0)].set_index("left_out")["rankme_eigen"]
    Z = window_features(TinyGPT("0.2M", seed=0, layers=1), held_out_windows(count=96, context=8))["norm", "last"]
    blocks = Z.reshape(32, 3, -1)
    expected = {
        -2: blocks[::2],
        -1: blocks[1::2],
        0: blocks[1::2][1:],
        5: torch.cat([blocks[1::2][:5], blocks[1::2][6:]]),
    }
    assert list(start.index) == [-2, -1, *range(16)]
    for left_out, part in expected.items():
        assert start[left_out] == pytest.approx(float(rankme(part.flatten(0, 1), values="eigen")), rel=1e-5)


def test_windows_that_make_no_blocks_are_refused():
    with pytest.raises(ShapeError, match="multiple of 32"):
        pretraining_features("0.2M", "adamw", seed=0, steps=1, **{**SHORT, "windows": 100}, deep=False)


def test_an_optimizer_or_method_without_a_rate_is_refused():
    with pytest.raises(UnknownNameError, match="sgd"):
        pretraining_features("0.2M", "sgd", seed=0, steps=1, **SHORT)
    with pytest.raises(UnknownNameError, match="hra"):
        finetuned_features("hra", seed=0, steps=1, small=True)


def test_fine_tuning_starts_at_the_pretrained_model_and_the_control_sees_the_old_text():
    options = {"seed": 0, "steps": 2, "windows": 96, "context": 8, "small": True}
    new = pd.DataFrame(finetuned_features("full", **options))
    old = pd.DataFrame(finetuned_features("full", text="addresses", **options))
    keys = ["text", "tokens", "layer"]
    starts = [t[t["step"] == 0].set_index(keys)[[*MEASURES, "bits"]] for t in (new, old)]
    asset = pd.DataFrame(asset_features(windows=96, context=8, deep=False)).set_index(keys)[[*MEASURES, "bits"]]
    pd.testing.assert_frame_equal(starts[0], asset)
    pd.testing.assert_frame_equal(starts[1], asset)
    ends = [t[t["step"] == 2].set_index(keys)["rankme_eigen"] for t in (new, old)]
    assert (ends[0] != ends[1]).all() and (ends[0] != starts[0]["rankme_eigen"]).all()


def test_the_asset_is_measured_as_any_model_is():
    rows = {(row["text"], row["layer"], row["tokens"]): row for row in asset_features(windows=96, context=8)}
    Z = window_features(load_pretrained(), held_out_windows("moby_dick", count=96, context=8), layers=["blocks.2"])
    assert rows["moby_dick", "blocks.2", "last"]["rankme_eigen"] == pytest.approx(
        feature_geometry(Z["blocks.2", "last"])["rankme_eigen"], rel=1e-6
    )


# ---- the study


def test_the_smoke_study_is_recorded_and_read(tmp_path):
    units = REPRESENTATION.units("smoke", 2)
    few = [u for u in units if u["kind"] != "finetune" or u["method"] == "oft"]
    folder = run_study(
        replace(REPRESENTATION, units=lambda size, seeds: few), out=tmp_path, seeds=2, size="smoke", progress=False
    )
    table = pd.read_csv(folder / "results.csv")
    assert set(table["kind"]) == {"look", "half", "asset", "finetune"}
    assert set(representation_phases(table)["phase"]) == set(PHASES)
    assert set(representation_curves(table, size="1M")) == {"AdamW", "Muon"}
    assert len(finetuning_changes(table)) == 4


def test_every_unit_names_files_that_are_there_and_a_recipe_of_its_own():
    units = REPRESENTATION.units("full", 5)
    assert len({str(sorted(u.items(), key=str)) for u in units}) == len(units)
    for unit in units:
        files = REPRESENTATION.depends(unit)
        assert len(source_hash(files)) == 12
        assert {"studies/representation.py", "diagnostics/features.py", "lab/models.py"} <= set(files)
        assert ("optim/muon.py" in files) == (unit.get("optimizer") == "muon_pre")
        assert ("adapters/oft.py" in files) == (unit.get("method") == "oft")
    assert {u["optimizer"] for u in units if u["kind"] == "pretrain"} == set(OPTIMIZER_RATES)
    assert {u["method"] for u in units if u["kind"] == "finetune"} == set(FINETUNED)
    assert all(u["windows"] % 32 == 0 for u in units)
    assert all(u["batch"] >= 1 and u["steps"] >= 1 for u in units if u["kind"] == "pretrain")


# ---- the test of phases


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12))
def test_turning_points_bound_the_largest_rise_and_what_is_left_are_falls(values):
    trough, peak = turning_points(values)
    largest = max(values[j] - values[i] for i in range(len(values)) for j in range(i, len(values)))
    assert trough <= peak and values[peak] - values[trough] == pytest.approx(largest, abs=1e-12)
    assert min(values[: peak + 1]) == values[trough]
    assert max(values[trough:]) == pytest.approx(values[peak], abs=1e-12)


def test_a_curve_must_hold_finite_values():
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ShapeError, match="at least one value"):
            turning_points(bad)


def verdicts(curve, *, noise=0.001, seed=0, **options):
    rng = np.random.default_rng(seed)
    blocks = np.log(curve) + rng.normal(scale=noise, size=(16, len(curve)))
    whole, without = blocks.mean(0), (blocks.sum(0) - blocks) / 15
    return phase_test(range(len(curve)), curve, np.exp(whole), np.exp(without), **options)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([20, 5, 2, 10, 30, 25], "present present present"),
        ([20, 5, 2, 10, 30, 31], "present present absent"),
        ([2, 10, 30, 25], "absent present present"),
        ([1, 2, 4, 8], "absent present absent"),
        ([8, 4, 2, 1], "present absent absent"),
        ([8, 8, 8, 8], "absent absent absent"),
        # Falls after a hint of a rise: one fall, not a collapse and a compression.
        ([8, 4, 4.04, 1], "present absent absent"),
    ],
)
def test_phases_are_found_where_they_are_and_only_there(curve, expected):
    found = verdicts([float(v) for v in curve])
    assert [phase.name for phase in found] == list(PHASES)
    assert " ".join(phase.verdict for phase in found) == expected


def test_the_sizes_are_log_ratios_between_the_turning_points():
    collapse, rise, fall = verdicts([20.0, 5, 2, 10, 30, 25], noise=1e-9)
    assert (collapse.start, collapse.end, rise.end, fall.end) == (0, 2, 4, 5)
    assert [p.size for p in (collapse, rise, fall)] == pytest.approx([math.log(10), math.log(15), math.log(1.2)])


def test_noise_as_large_as_a_phase_leaves_it_undecided_and_the_interval_is_the_jackknifes():
    curve = [20.0, 5.0, 5.6]
    blocks = np.log(curve) + np.random.default_rng(3).normal(scale=0.3, size=(16, 3))
    whole, without = blocks.mean(0), (blocks.sum(0) - blocks) / 15
    rise = phase_test(range(3), curve, np.exp(whole), np.exp(without))[1]
    each = blocks[:, 2] - blocks[:, 1]
    # For a mean, the jackknife's error is the standard error; t with 15 degrees of freedom at 1 - 0.05 / 3.
    half = 2.69374 * each.std(ddof=1) / 4
    assert rise.size == pytest.approx(each.mean()) and rise.high - rise.size == pytest.approx(half, rel=1e-4)
    assert rise.verdict == "undecided"


def test_on_noise_alone_choosing_by_other_texts_keeps_its_level_and_choosing_by_the_same_does_not():
    found = false_alarms(trials=200)
    # 5 % at most, and the standard error of 200 trials is 1.5 %.
    assert found["other texts"] <= 0.095 and found["same texts"] > 0.25


def test_phase_test_refuses_what_does_not_fit(unchecked):
    curve = [1.0, 2.0]
    with pytest.raises(ShapeError, match="at least two blocks"):
        phase_test([0, 1], curve, curve, [curve])
    with pytest.raises(ShapeError, match="need 2 values"):
        phase_test([0, 1], [1.0], curve, [curve, curve])
    with pytest.raises(OptionError, match="above 0"):
        phase_test([0, 1], curve, curve, [curve, [0.0, 1.0]])
    with pytest.raises(OptionError, match="least >= 0"):
        phase_test([0, 1], curve, curve, [curve, curve], least=-1)
    for bad in ({"trials": 0}, {"looks": 1}, {"blocks": 1}, {"noise": 0}):
        with pytest.raises(OptionError, match="need trials"):
            false_alarms(**bad)


# ---- what is read from a record


def look(optimizer, seed, curve, *, bits=(8, 4, 3, 2), layer="norm", tokens="last", size="1M"):
    return [
        {
            **{"kind": "look", "size": size, "optimizer": optimizer, "seed": seed, "step": step, "bits": b},
            **{"layer": layer, "tokens": tokens, "rankme_eigen": value, "rankme_singular": 2 * value},
            **{"rankme_centred": 1.1 * value, "effective_rank": 2 * value, "alpha": 1 / value},
        }
        for step, value, b in zip(STEPS, curve, bits, strict=True)
    ]


def half(optimizer, seed, curve, *, size="1M"):
    return [
        {
            **{"kind": "half", "size": size, "optimizer": optimizer, "seed": seed, "step": step, "left_out": k},
            **{"rankme_eigen": value, "rankme_singular": 2.0},
        }
        for step, value in zip(STEPS, curve, strict=True)
        for k in range(-2, 4)
    ]


def tuned(method, seed, step, text, value, bits, trained="moby_dick"):
    return {
        **{"kind": "finetune", "method": method, "trained_on": trained, "seed": seed, "step": step, "text": text},
        **{"layer": "norm", "tokens": "last", "bits": bits, "rankme_eigen": value, "rankme_singular": 2 * value},
    }


@pytest.fixture
def table():
    curves = {
        ("adamw", 0): [16.0, 2, 8, 10],
        ("adamw", 1): [16.0, 4, 8, 12],
        ("muon_pre", 0): [16.0, 4, 20, 18],
        ("muon_pre", 1): [16.0, 4, 20, 16],
    }
    rows = []
    for (optimizer, seed), curve in curves.items():
        bits = (8, 4, 3, 2.5) if optimizer == "adamw" else (8, 4, 2.5, 2)
        rows += look(optimizer, seed, curve, bits=bits) + half(optimizer, seed, curve)
        rows += look(optimizer, seed, [2 * v for v in curve], bits=bits, tokens="mean")
        for layer in ("embed", "blocks.0", "blocks.1"):
            rows += look(optimizer, seed, [9.0] * 4, bits=bits, layer=layer)
    rows.append({"kind": "asset", "text": "addresses", "bits": 1.0, "layer": "norm", "tokens": "last"})
    rows[-1] |= {"rankme_eigen": 18 * math.e, "rankme_singular": 50.0}
    rows.append(rows[-1] | {"text": "moby_dick", "rankme_eigen": 1.0})
    for seed in (0, 1):
        rows += [tuned("lora", seed, 0, t, 20.0, 3.0) for t in ("addresses", "moby_dick")]
        rows += [tuned("lora", seed, 30, "moby_dick", 22.0, 2.0), tuned("lora", seed, 30, "addresses", 10.0, 3.5)]
        rows += [tuned("full", seed, 0, "addresses", 20.0, 3.0, "addresses")]
        rows += [tuned("full", seed, 30, "addresses", 21.0, 2.9, "addresses")]
    return pd.DataFrame(rows)


def test_curves_have_one_row_a_seed_and_choose_layer_token_and_measure(table):
    curves = representation_curves(table, size="1M")
    assert curves["AdamW"] == ([0, 1, 2, 4], [[16, 2, 8, 10], [16, 4, 8, 12]])
    assert representation_curves(table, size="1M", tokens="mean")["AdamW"][1][0] == [32, 4, 16, 20]
    assert representation_curves(table, size="1M", measure="bits")["Muon"][1][0] == [8, 4, 2.5, 2]
    assert curve_turns(curves) == {"AdamW": (1, 4), "Muon": (1, 2)}
    with pytest.raises(UnknownNameError, match="measure"):
        representation_curves(table, size="1M", measure="rank")
    with pytest.raises(ReportError, match="no looks"):
        representation_curves(table, size="0.2M")


def test_every_run_is_tested_and_drawn(table):
    found = representation_phases(table)
    assert len(found) == 4 * 3 and set(found["verdict"]) == {"present", "absent"}
    muon = found[(found["optimizer"] == "Muon") & (found["seed"] == 1)].set_index("phase")
    assert muon.loc["fall", "change"] == pytest.approx(math.log(20 / 16)) and muon.loc["fall", "verdict"] == "present"
    assert found[(found["optimizer"] == "AdamW") & (found["phase"] == "fall")]["verdict"].tolist() == ["absent"] * 2
    assert set(representation_phases(table, values="singular")["verdict"]) == {"absent"}
    assert set(representation_phases(table, least=10.0)["verdict"]) == {"absent"}
    drawn = phases_by_run(found)
    assert list(drawn) == list(PHASES) and list(drawn["fall"]) == ["AdamW, 1M", "Muon, 1M"]
    assert drawn["fall"]["Muon, 1M"][1] == pytest.approx((math.log(1.25),) * 3)
    with pytest.raises(UnknownNameError):
        representation_phases(table, values="both")
    with pytest.raises(ReportError, match="half"):
        representation_phases(table[table["kind"] == "look"])


def test_over_seeds_the_turning_points_are_those_of_the_other_seeds(table):
    sizes = phase_sizes(table, size="1M", optimizer="Muon")
    assert sizes["collapse"] == pytest.approx([math.log(4)] * 2)
    assert sizes["fall"] == pytest.approx([math.log(20 / 18), math.log(20 / 16)])
    # A seed whose own peak lies elsewhere is measured where the others have theirs, also against itself.
    other = pd.DataFrame(look("adamw", 0, [16.0, 2, 8, 10]) + look("adamw", 1, [16.0, 4, 12, 8]))
    assert phase_sizes(other, size="1M", optimizer="AdamW")["fall"] == pytest.approx([math.log(8 / 10), 0.0])
    with pytest.raises(ShapeError, match="other seeds"):
        phase_sizes(other[other["seed"] == 0], size="1M", optimizer="AdamW")


def test_variants_are_told_as_mean_and_half_width(table):
    found = phase_variants(table, size="1M")
    assert found.loc[("Muon", "centred"), "collapse"] == f"{math.log(4):.2f} ± 0.00"
    assert found.loc[("AdamW", "before the last norm"), "rise"] == "0.00 ± 0.00"
    assert list(found.columns) == list(PHASES) and len(found) == 12


def test_optimizers_are_compared_at_equal_steps_and_at_equal_loss(table):
    found = rank_at_equal_loss(table, size="1M")
    assert found["equal steps"] == pytest.approx([math.log(18 / 10), math.log(16 / 12)])
    # AdamW ends at 2.5 bits, which Muon reaches at its third look with RankMe 20.
    assert found["equal loss"] == pytest.approx([math.log(20 / 10), math.log(20 / 12)])
    bits, ranks = rank_against_loss(table, size="1M")["AdamW"]
    assert bits == [8, 4, 3, 2.5] and ranks == [16, 3, 8, 11]
    assert rank_change(table, size="1M", start=1, end=4)["AdamW"] == pytest.approx([math.log(5), math.log(3)])


def test_a_loss_between_two_looks_is_met_on_the_line_between_them():
    rows = look("adamw", 0, [16.0, 4, 8, 8], bits=(8, 4, 3, 3)) + look("muon_pre", 0, [16, 4, 4, 16], bits=(8, 4, 4, 2))
    found = rank_at_equal_loss(pd.DataFrame(rows), size="1M")
    assert found["equal loss"] == pytest.approx([math.log(math.sqrt(4 * 16) / 8)])


def test_alpha_mirrors_rank_where_it_is_its_inverse(table):
    assert alpha_against_rank(table, size="1M")["AdamW"] == pytest.approx([-1, -1])


def test_layers_are_told_at_the_start_the_trough_and_the_end(table):
    found = layer_ranks(table, size="1M", optimizer="Muon")
    assert list(found) == ["norm", "embed", "blocks.0", "blocks.1"]
    assert found["norm"] == {0: [32, 32], 1: [8, 8], 4: [36, 32]}
    assert found["embed"][1] == [18, 18]


def test_the_asset_is_held_against_ends_and_against_the_line_through_the_last_looks(table):
    found = asset_against_curve(table)
    assert (found["bits"], found["rank"]) == (1.0, pytest.approx(18 * math.e))
    assert found["above_end"] == pytest.approx([1.0, 1 + math.log(18 / 16)])
    # Within four times the end's distance of 1 bit lie the looks at 4, 2.5 and 2 bits.
    slope, start = np.polyfit([4, 2.5, 2], np.log([4, 20, 18]), 1)
    assert found["above_line"][0] == pytest.approx(1 + math.log(18) - (start + slope))


def test_fine_tuning_is_told_by_text_and_the_control_by_name(table):
    found = finetuning_changes(table).set_index(["method", "text", "seed"])
    assert found.loc[("LoRA", "moby_dick", 0), "change"] == pytest.approx(math.log(1.1))
    assert found.loc[("LoRA", "addresses", 1), "bits"] == pytest.approx(0.5)
    control = found.loc["full fine-tuning, the old text again"]
    assert control["change"].tolist() == pytest.approx([math.log(1.05)] * 2)


def test_the_summary_holds_start_trough_and_end(table):
    row = representation_summary(table, size="1M").loc["AdamW"]
    assert (row["RankMe, eigen: start"], row["trough"], row["at step"], row["end"]) == (16, 3, 1, 11)
    assert row["RankMe, singular"] == 22 and row["bits per byte"] == 2.5


def test_the_variety_of_bytes_is_the_rank_of_orthogonal_embeddings():
    windows = torch.tensor([[1, b] for b in (3, 3, 3, 5, 5, 9)])
    Z = torch.eye(12, dtype=torch.float64)[windows[:, -1]]
    assert byte_variety(windows) == pytest.approx(float(rankme(Z, values="eigen", eps=0.0)), rel=1e-9)


def test_a_live_run_has_the_form_of_the_record():
    live = representation_live(["adamw"], seeds=(0, 1), steps=1, deep=False, **SHORT)
    assert set(live["kind"]) == {"look", "half"}
    assert len(representation_curves(live, size="0.2M")["AdamW"][1]) == 2
    assert len(representation_phases(live)) == 6
