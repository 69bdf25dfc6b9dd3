"""Trainings that are looked at on the way: which looks there are, that looking changes nothing, curves and changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orthokit.diagnostics.inspection import Inspection
from orthokit.errors import UnknownNameError
from orthokit.lab import TinyGPT, contestant, fit, language_modelling
from orthokit.studies import training_spectra as module
from orthokit.studies.representation import OPTIMIZER_RATES

TINY = {"size": "0.2M", "layers": 1, "context": 8, "batch": 2, "windows": 2}


@pytest.fixture(scope="module")
def trained() -> module.SpectraAlong:
    return module.spectra_along_training(seeds=[3, 4], steps=8, **TINY)


def test_looks_are_at_the_start_on_the_way_and_at_the_end(trained) -> None:
    assert trained.steps == [0, 1, 2, 4, 6, 8]
    assert set(trained.looks) == set(trained.bits)
    assert {(label, seed) for label, seed, _ in trained.looks} == {(o, s) for o in ("AdamW", "Muon") for s in (3, 4)}
    assert "2 seeds" in repr(trained)


def test_step_zero_is_the_fresh_model_and_rivals_share_it(trained) -> None:
    fresh = TinyGPT("0.2M", seed=3, layers=1)
    for label in ("AdamW", "Muon"):
        for name, sigma in trained.looks[label, 3, 0].spectra.items():
            exact = torch.linalg.svdvals(fresh.get_parameter(name).detach().double()).numpy()
            np.testing.assert_allclose(sigma, exact, rtol=1e-5, atol=1e-6 * exact[0])


def test_looking_does_not_change_the_training(trained, tmp_path) -> None:
    model = TinyGPT("0.2M", seed=3, layers=1)
    task = language_modelling("addresses", context=8, batch=2, seed=3, validation_windows=2)
    rival = contestant("adamw", model, lr=OPTIMIZER_RATES["adamw"])
    plan = {"steps": 8, "schedule": "wsd", "warmup": 8, "clip": 1.0, "root": tmp_path, "progress": False}
    fit(model, task, rival, **plan)
    assert task.evaluate(model)["validation_bits_per_byte"] == trained.bits["AdamW", 3, 8]


def test_curves_are_means_over_matrices_and_changes_their_ends(trained) -> None:
    curves = module.training_curves(trained, "mp_distance")
    steps, rows = curves["Muon"]
    assert steps == trained.steps and np.shape(rows) == (2, 6)
    by_hand = np.mean([row["mp_distance"] for row in trained.looks["Muon", 4, 2].rows])
    assert rows[1][2] == pytest.approx(by_hand)
    assert module.training_changes(trained, "mp_distance")["Muon"][0] == pytest.approx(rows[0][-1] - rows[0][0])
    assert module.training_curves(trained, "bits")["AdamW"][1][0][0] == trained.bits["AdamW", 3, 0]
    assert module.training_curves(trained, "with_alpha")["AdamW"][1][0][0] == 0  # noise has none
    assert np.isfinite(module.training_curves(trained, "exponent")["AdamW"][1]).all()
    assert np.isnan(module.training_curves(trained, "alpha")["AdamW"][1]).all()


def test_a_column_without_a_value_gives_nan() -> None:
    looks = {("A", 0, 0): Inspection("m", rows=[{"mp_distance": None}, {"mp_distance": None}])}
    (value,) = module.training_curves(module.SpectraAlong(looks, {("A", 0, 0): 1.0}), "mp_distance")["A"][1][0]
    assert math.isnan(value)


def test_unknown_names_are_refused(trained) -> None:
    with pytest.raises(UnknownNameError, match="quantity"):
        module.training_curves(trained, "verdict")
    with pytest.raises(UnknownNameError, match="optimizer"):
        module.spectra_along_training(["sgd"], seeds=[0], steps=1, **TINY)


def test_a_monitor_and_an_inspection_agree_along_training() -> None:
    found = module.monitor_differences(steps=2, seed=1)
    assert {"stable_rank", "effective_rank", "condition", "orthogonality_error", "mp_edge", "above_edge"} <= set(found)
    assert max(found.values()) < 1e-4
