"""The studies of Pion at their smallest size: what they measure is what they say."""

import math

import pytest
import torch
from torch import nn

from orthokit.lab.models import TinyGPT
from orthokit.studies import drift_curves, load_evidence
from orthokit.studies._engine import run_study
from orthokit.studies.pion import (
    PION_DRIFT,
    PION_DRIFT_VARIANTS,
    PION_RIVALS,
    compare_geometries,
    drift_histories,
    drift_history,
    gradient_split,
    rivals_without_norms,
    spectra_after_training,
    strip_norms,
)

TINY = {"size": "0.2M", "context": 16, "batch": 2}


def test_only_pion_keeps_the_spectra():
    start, after, worst = spectra_after_training(
        ["AdamW", "Pion"], name="blocks.0.attn.q.weight", lr=3e-3, seed=0, steps=4, **TINY
    )
    assert (start.diff() <= 0).all() and set(after) == {"AdamW", "Pion"}
    torch.testing.assert_close(after["Pion"], start, rtol=1e-3, atol=1e-3)
    assert worst["AdamW"] > 10 * worst["Pion"]


def test_rivals_move_hidden_matrices_alike_and_the_rest_at_one_rate():
    sizes = {}
    for label, make in PION_RIVALS.items():
        model = TinyGPT("0.2M")
        optimizer = make(model, 1e-3)
        assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-3, 6e-3]
        owned = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        assert owned == sum(p.numel() for p in model.parameters())
        weight = model.get_parameter("blocks.0.attn.q.weight")
        before = weight.detach().clone()
        # Many different bytes, so that the gradient has full rank and its polar factor has full size.
        ids = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(0))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1).flatten()).backward()
        optimizer.step()
        sizes[label] = float((weight.detach() - before).square().mean().sqrt())
    assert sizes["Pion"] == pytest.approx(2e-4, rel=0.02) and sizes["Muon"] == pytest.approx(2e-4, rel=0.2)
    # AdamW's very first step is the sign of the gradient times lr; it settles near 0.2 lr later.
    assert sizes["AdamW"] == pytest.approx(1e-3, rel=0.1)


def test_drift_is_read_with_its_causes():
    frame = drift_history({"dtype": torch.float32}, lr=5e-3, steps=16, readings=4, shape=(12, 8))
    assert list(frame["step"]) == [4, 8, 12, 16]
    total = frame["truncation"] + frame["rounding"]
    assert torch.allclose(torch.tensor(total.values), torch.tensor(frame["norm_drift"].values), atol=1e-12)
    assert (frame["truncation"].diff().dropna() > 0).all() and (frame["angle"] > 0).all()
    exact = drift_history({"map": "cayley", "dtype": torch.float32}, lr=5e-3, steps=4, readings=1, shape=(12, 8))
    assert (exact["truncation"] == 0).all()


def test_seeds_side_by_side_are_what_they_are_alone():
    toy = {"lr": 5e-3, "steps": 6, "readings": 2, "shape": (10, 12)}
    both = drift_histories({"dtype": torch.float32}, seeds=[3, 5], **toy)
    alone = drift_history({"dtype": torch.float32}, seed=5, **toy)
    assert list(both["seed"]) == [3, 5, 3, 5]
    for column in ("drift", "truncation", "angle"):
        # Products of a batch may sum in another order.
        assert list(both.loc[both["seed"] == 5, column]) == pytest.approx(list(alone[column]), rel=0.05, abs=2e-7)


def test_the_drift_study_runs_at_smoke_size(tmp_path):
    import pandas as pd

    folder = run_study(PION_DRIFT, out=tmp_path, size="smoke", seeds=2, progress=False)
    table = pd.read_csv(folder / "results.csv")
    curves = drift_curves(table)
    assert curves.keys() == PION_DRIFT_VARIANTS.keys()
    assert all(len(values) == 2 and len(values[0]) == len(steps) for steps, values in curves.values())


def test_the_recorded_drift_has_every_variant_and_float32_within_a_hundred_thousandth():
    table, record = load_evidence("pion_drift")
    ends = table[table["step"] == 10_000]
    assert record["size"] == "full" and set(ends["variant"]) == set(PION_DRIFT_VARIANTS)
    assert (ends.groupby("variant")["seed"].nunique() == record["seeds"]).all() and record["seeds"] >= 5
    worst = ends.groupby("variant")["drift"].max()
    assert worst["Cayley-Neumann"] <= 1e-5 and worst["exact Cayley"] <= 1e-5
    assert worst["order 2 (published)"] > 1e-3  # what the published series does
    assert worst["order 2, restored"] < 0.05 * worst["order 2 (published)"]
    # The cause: cutting the series where float64 drifts just as far, rounding where the map is exact.
    size = ends.groupby("variant")[["truncation", "rounding"]].agg(lambda values: values.abs().mean())
    for variant in ("order 2 (published)", "order 2, all in float64"):
        assert size.loc[variant, "rounding"] < 1e-3 * size.loc[variant, "truncation"]
    assert (
        size.loc["Cayley-Neumann, bf16 products", "truncation"]
        < 0.1 * size.loc["Cayley-Neumann, bf16 products", "rounding"]
    )
    assert (ends.loc[ends["variant"] == "exact Cayley", "truncation"] == 0).all()


def test_geometries_share_their_seeds():
    frame = compare_geometries(
        lr=3e-3, seeds=[0, 1], steps=2, size="0.2M", batch=1, context=16, windows=2, evaluations=1, progress=False
    )
    assert set(frame["momentum"]) == {"lie", "ambient", "transported"}
    starts = frame[frame["step"] == 0].groupby("seed")["value"].nunique()
    assert (starts == 1).all() and frame["value"].notna().all()


def test_norms_are_stripped_everywhere():
    model = strip_norms(TinyGPT("0.2M"))
    assert not any(isinstance(module, (nn.RMSNorm, nn.LayerNorm)) for module in model.modules())
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_runs_that_blow_up_count_as_diverged():
    frame = rivals_without_norms([1e-3, 1e3], seeds=[0], steps=3, rivals=["AdamW", "Pion"], **TINY)
    table = frame.set_index(["optimizer", "lr"])["loss"]
    assert math.isnan(table["AdamW", 1e3]) and table["AdamW", 1e-3] < 8 and table["Pion", 1e-3] < 8


def test_gradient_is_split_from_the_first_step_on():
    frame = gradient_split(lr=3e-3, seeds=[0], steps=4, readings=3, size="0.2M", context=16, batch=1)
    assert list(frame["step"]) == [0, 2, 4]
    assert frame["radial"].between(0, 1).all() and (frame[["tangential_in", "tangential_out"]] > 0).all().all()
    assert frame["tangential_in"].le(2).all()
