"""The benchmark of diagnostics runs, and all its candidates compute the same numbers."""

import pytest
import torch

from benchmarks.diagnostics import GEOMETRY, PROFILES, candidates, case, errors
from benchmarks.harness import Options


@pytest.mark.parametrize("model", ["10.6 M", "135 M"])
def test_the_plain_formulas_and_ours_agree(model):
    found = {name: call() for name, call in candidates("profiles", model, True).items()}
    for name in PROFILES.keys() - {"SVD of W0 alone", "plain formula"}:
        for ours, plain in zip(found[name], found["plain formula"], strict=True):
            for a, b in zip(ours, plain, strict=True):
                # Singular vectors of close values mix a little, and another way in either SVD.
                torch.testing.assert_close(a, b, rtol=0.01, atol=1e-3)
    found = {name: call() for name, call in candidates("activations", model, True).items()}
    for name in GEOMETRY:
        for ours, plain in zip(found[name], found["plain formula"], strict=True):
            assert ours == pytest.approx(plain, rel=0.02, abs=1e-3), name


def test_a_case_carries_memory_and_accuracy():
    made = case("profiles", "135 M", Options(threads=1, rounds=1, quick=True), errors("profiles", True))
    assert made.columns["extra MiB"].keys() == PROFILES.keys()
    assert all(float(size) >= 0 for size in made.columns["extra MiB"].values())
    drift = {name: float(text) for name, text in made.columns["drift error"].items()}
    assert drift["orthokit"] < 1e-4 and drift["orthokit, frozen SVD"] < 1e-4 < drift["plain formula"]
    leaves = {name: float(text) for name, text in errors("activations", True).items()}
    assert leaves["orthokit"] < 1e-12 and leaves["plain formula, float32"] > 1e-8
