"""The measuring loops of POET, at a size of seconds."""

import pytest

from orthokit.adapters import POET
from orthokit.errors import UnknownNameError
from orthokit.studies._engine import load_evidence, run_study
from orthokit.studies.poet import (
    DRIFT_VARIANTS,
    POET_STUDY,
    compare_methods,
    drift_curves,
    initial_norms,
    merge_schedules,
    spectrum_along_training,
    train_method,
)
from orthokit.studies.poet_memory import LAYER_KINDS, layer_bytes, memory_on_paper, memory_table

SMALL = {"steps": 3, "batch": 2, "context": 16, "windows": 2, "evaluations": 1, "progress": False}


def test_methods_see_the_same_start_and_the_same_number_of_steps():
    table = compare_methods({"AdamW": 6e-3, "Muon": 1e-2, "POET": 4e-3}, seeds=[0], **SMALL)
    starts = table.loc[table["step"] == 0].set_index("method")["value"]
    # POET's layers compute the same at the start, up to rounding.
    assert starts.max() - starts.min() < 1e-4
    assert table.groupby("method")["step"].max().tolist() == [3, 3, 3]


def test_pion_takes_part():
    table = compare_methods({"Pion": 6e-3}, seeds=[0], **SMALL)
    assert table["value"].iloc[-1] < table["value"].iloc[0]


def test_unknown_methods_and_variants_are_refused():
    with pytest.raises(UnknownNameError, match="Muon"):
        train_method("Moun", lr=1e-3, seed=0, **SMALL)
    with pytest.raises(UnknownNameError, match="exact Cayley"):
        spectrum_along_training("Cayley", seed=0, steps=2)
    with pytest.raises(UnknownNameError, match="13B"):
        memory_on_paper("14B")
    with pytest.raises(UnknownNameError, match="dense"):
        layer_bytes("dens", 8, 8, rows=2)


def test_shorter_periods_merge_smaller_angles():
    table = merge_schedules([1, 3], lr=4e-3, seeds=[0], **SMALL)
    angles = table.groupby("merge_every")["angle"].max()
    assert 0 < angles[1] < angles[3] and (table["drift"] >= 0).all()


def test_the_initial_norm_changes_where_training_begins():
    table = initial_norms([1.0, 4.0], lr=4e-3, seeds=[0], **SMALL)
    starts = table.loc[table["step"] == 0].set_index("scale")["value"]
    assert starts[1.0] != starts[4.0]


def test_configurations_can_be_given():
    rows = train_method("POET", lr=4e-3, seed=0, config=POET(0.5, "full", merge_every=2), **SMALL)
    assert rows[-1]["step"] == 3 and rows[-1]["method"] == "POET"


def test_drift_is_reported_along_the_way_with_its_cause():
    rows = spectrum_along_training("3 terms (published)", seed=0, steps=6, looks=2, merge_every=2, lr=2e-2)
    assert [row["step"] for row in rows] == [2, 6]
    assert rows[-1]["truncation"] < 0 and rows[-1]["drift"] > rows[0]["drift"] > 0
    exact = spectrum_along_training("exact Cayley", seed=0, steps=4, looks=1, merge_every=2, lr=2e-2)
    assert abs(exact[-1]["truncation"]) < 1e-13 < exact[-1]["rounding"]


def test_the_study_runs_at_smoke_size(tmp_path):
    import pandas as pd

    folder = run_study(POET_STUDY, out=tmp_path, size="smoke", seeds=2, progress=False)
    table = pd.read_csv(folder / "results.csv")
    curves = drift_curves(table)
    assert curves.keys() == DRIFT_VARIANTS.keys()
    assert all(len(values) == 2 and len(values[0]) == len(steps) for steps, values in curves.values())


def test_the_recorded_study_has_every_variant_and_exact_rotations_within_a_hundred_thousandth():
    table, record = load_evidence("poet_drift")
    ends = table[table["step"] == 10_000]
    assert record["size"] == "full" and set(ends["variant"]) == set(DRIFT_VARIANTS)
    assert (ends.groupby("variant")["seed"].nunique() == record["seeds"]).all()
    worst = ends.groupby("variant")["drift"].max()
    assert worst["exact Cayley"] <= 1e-5 and worst["4 terms, polished"] <= 1e-5
    assert worst["3 terms (published)"] > 1e-2  # what the published series does
    exact = ends[ends["variant"] == "exact Cayley"]
    assert (exact["rounding"] > 1e3 * exact["truncation"].abs()).all()


def test_memory_modes_are_ordered_as_they_should_be():
    table = memory_table(64, 96, rows=500, block_size=16)
    assert list(table.index) == list(LAYER_KINDS)
    assert table.loc["low", "kept"] == table.loc["weight", "kept"] < table.loc["fast", "kept"]
    assert table.loc["fast", "kept"] - table.loc["low", "kept"] > 500 * 96 * 4 * 0.9
    assert table.loc["low, uint8", "weights"] < 0.6 * table.loc["low", "weights"]
    # Gradients and moments: (out + in) (b - 1) / 2 numbers against out * in.
    share = table.loc["low", "moments"] / table.loc["plain", "moments"]
    assert share == pytest.approx((64 + 96) * 15 / 2 / (64 * 96))


def test_large_models_stay_below_the_published_peaks_and_in_their_order():
    # At 512 tokens there is little besides what is counted: one published peak is met to a tenth of a per cent.
    for model in ("8B", "13B"):
        for length in (512, 2048):
            paper = memory_on_paper(model, length=length)
            published = paper["published peak"].dropna()
            assert (paper.loc[published.index, "counted"] < 1.01 * published).all()
            assert paper["counted"].is_monotonic_decreasing
