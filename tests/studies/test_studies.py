"""The studies themselves at their smallest size, and what is read from their records."""

import numpy as np
import pytest
import torch

from orthokit import diagnostics, studies
from orthokit.errors import OptionError
from orthokit.lab import TinyGPT, language_modelling
from orthokit.optim import for_model


def test_gap_rows_agree_with_the_definitions():
    unit = {"rank": 3, "trial": 4, "steps": 50, "size": 24, "betas": [0.0, 0.9], "sigmas": [0.3, 1.0]}
    rows = studies.measure_gap(unit)
    assert len(rows) == 4
    stream = diagnostics.SignalPlusPerturbation(
        (24, 24), strengths=diagnostics.published_strengths(3), sigma=1.0, noise="arch", seed=4
    )
    M = diagnostics.momentum_buffers(stream.stream(50), 0.9)
    found = rows[3]
    assert (found["beta"], found["sigma"]) == (0.9, 1.0)
    assert found["gap"] == pytest.approx(float(diagnostics.spectral_gap(M, rank=3)), abs=1e-4)
    from orthokit.linalg import polar

    assert found["alignment_pre"] == pytest.approx(float(diagnostics.alignment(polar(M), stream.signal)), abs=1e-4)
    sine = float(diagnostics.subspace_error(M, stream.signal, rank=3))
    assert found["sin_left"] == pytest.approx(sine, abs=1e-3)


def test_the_grids_are_those_published():
    assert len(studies.BETAS) == 38 and studies.BETAS[0] == 0 and studies.BETAS[-1] == 0.995
    assert set(studies.PUBLISHED_RANK_3) <= set(studies.BETAS)
    assert np.isclose(diagnostics.published_sigmas(), 1.0).any()


def test_the_recorded_table_is_within_three_per_cent_of_the_published_one():
    table, record = studies.load_evidence("synthetic_gap")
    compared = studies.compare_with_published(table)
    assert len(compared) == 24 and record["size"] == "full"
    assert compared["deviation"].max() <= 0.03


def test_the_recorded_race_has_every_pipeline_rate_and_seed():
    table, record = studies.load_evidence("pipelines")
    counts = table.groupby(["order", "lr"])["seed"].nunique()
    assert set(table["order"]) == set(studies.ORDERS) and record["seeds"] == 5
    assert (counts == 5).all()
    best = studies.best_lr(table)
    # A best rate at the edge of its grid would mean the pipeline was never given its best.
    for order in studies.ORDERS:
        rates = sorted(table.loc[table["order"] == order, "lr"].unique())
        assert rates[0] < best[order] < rates[-1], f"{order} is best at the edge of its grid"


def test_best_rates_curves_and_final_values_of_a_small_race(tmp_path):
    race = studies.race(
        {"pre": 1e-2, "none": 2e-3},
        seeds=[0, 1],
        steps=4,
        batch=2,
        context=16,
        windows=4,
        evaluations=2,
        progress=False,
    )
    assert studies.best_lr(race) == {"pre": 1e-2, "none": 2e-3}
    finals = studies.final_values(race)
    assert list(finals.index) == [0, 1] and set(finals.columns) == {"pre", "none"}
    steps, values = studies.curves(race)["pre"]
    assert steps == [0, 2, 4] and np.shape(values) == (2, 3)
    assert len(studies.at_rates(race, {"pre": 1e-2})) == 6
    # Equal seeds start from equal weights and judge on equal data: the first value is the same for every pipeline.
    first = race[race["step"] == 0].pivot(index="seed", columns="order", values="value")
    assert (first["pre"] == first["none"]).all()


def test_a_probe_measures_what_its_parts_measure():
    G = 0.3 + torch.randn(60, 8, 6, generator=torch.Generator().manual_seed(0))
    probe = studies.measure_probe(G, betas=[0.0, 0.9], windows=[1, 5], ranks=[1, 2], signal_rank=2)
    assert list(probe.spectra) == ["gradient", "beta 0", "beta 0.9", "mean gradient"]
    assert torch.allclose(probe.spectra["gradient"], probe.spectra["beta 0"], atol=1e-5)
    # Without momentum the three pipelines are one.
    assert torch.allclose(probe.full["pre"][0], probe.full["none"][0], atol=1e-5)
    assert probe.left[1].shape == (2,) and probe.suppression.shape == (2,)
    assert studies.pipeline_lead(G, beta=0.9, signal=G.mean(0)) > 0
    with pytest.raises(OptionError, match="at least 2 gradients"):
        studies.measure_probe(G[:1], betas=[0.0], windows=[1])


def test_probing_along_training_leaves_the_run_as_it_would_be():
    task = language_modelling("moby_dick", context=16, batch=2, validation_windows=2)
    name = "blocks.0.attn.o.weight"
    models = [TinyGPT("0.2M", layers=1) for _ in range(2)]
    full, cut = studies.probe_along_training(
        models[0], task, for_model(models[0], lr=1e-2), name, checkpoints=[0, 2], count=6
    )
    assert {len(v) for v in [*full.values(), *cut.values()]} == {2}
    studies.probe_along_training(models[1], task, for_model(models[1], lr=1e-2), name, checkpoints=[2], count=2)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    with pytest.raises(OptionError, match="must increase"):
        studies.probe_along_training(models[0], task, for_model(models[0], lr=1e-2), name, checkpoints=[2, 1], count=2)


def test_changes_of_equal_size_are_of_equal_size():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(20, 12, generator=g, dtype=torch.float64)
    from orthokit.studies.energy import CHANGES, _at_distance

    for change in CHANGES.values():
        moved = _at_distance(change(W, g), W, 0.2)
        assert float((moved - W).norm() / W.norm()) == pytest.approx(0.2, rel=1e-6)


def test_energies_follow_the_order_of_the_matrices():
    model = TinyGPT("0.2M", layers=1)
    from orthokit import matrices

    found = studies.energies(model)
    block = matrices(model)[2]
    expected = float(diagnostics.hyperspherical_energy(model.get_parameter(block.parameter).detach()))
    assert len(found) == len(matrices(model)) and found[2] == pytest.approx(expected)
