"""What spectra are worth: noise, what is within it, what replacing by it costs, exponents, which models there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthokit.diagnostics import inspect, power_law_alpha
from orthokit.errors import CheckpointError, MissingExtraError, OptionError
from orthokit.lab import load_pretrained
from orthokit.studies import checkpoint_geometry as module


def test_noise_is_that_of_the_law_and_follows_the_seed() -> None:
    table = module.noise_spectra([(80, 60), (60, 80)], draws=3, seed=5)
    assert list(table["shape"].unique()) == ["80 x 60", "60 x 80"] and len(table) == 6
    assert (table["mp_distance"] < 0.1).all() and table["refused"].all() and (table["above_edge"] <= 1).all()
    assert table.equals(module.noise_spectra([(80, 60), (60, 80)], draws=3, seed=5))
    assert not table.equals(module.noise_spectra([(80, 60), (60, 80)], draws=3, seed=6))


def test_the_exponent_is_that_of_the_power_law_fit() -> None:
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(64, 64, generator=generator)
    (exponent,) = module.noise_spectra([(64, 64)], draws=1, seed=2)["exponent"]
    assert exponent == pytest.approx(power_law_alpha(W).alpha, rel=1e-6)


def test_unequal_rows_alone_make_exponents_that_are_shown() -> None:
    even = module.noise_spectra([(128, 128)], draws=8)
    uneven = module.noise_spectra([(128, 128)], draws=8, row_spread=0.8)
    assert even["refused"].mean() > 0.9 > 0.5 > uneven["refused"].mean()
    assert uneven["mp_distance"].min() > even["mp_distance"].max()


@pytest.mark.parametrize("options", [{"draws": 0}, {"row_spread": -0.1}, {"row_spread": float("nan")}])
def test_noise_refuses_what_cannot_be(options) -> None:
    with pytest.raises(OptionError, match="draws >= 1"):
        module.noise_spectra([(32, 32)], **options)


def test_near_random_tells_noise_from_a_spike_and_skips_what_has_no_law() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 96, generator=g)
    heavy = noise * torch.logspace(0, 1, 64)[:, None]
    found = inspect({"noise.weight": noise, "heavy.weight": heavy, "small.weight": torch.ones(3, 3)})
    table = module.near_random(found, draws=10)
    assert list(table.index) == ["noise.weight", "heavy.weight"]
    assert table["within"].tolist() == [True, False]
    # One shape and its transpose share their noise.
    assert table["noise"].nunique() == 1


def test_replacing_by_noise_costs_what_it_costs_and_leaves_the_asset_alone() -> None:
    before = {name: p.clone() for name, p in load_pretrained().named_parameters()}
    table = module.replaced_by_noise(draws=2, windows=2, matrices=3, seed=1)
    assert len(table) == 6 and set(table["part"]) <= {"attention", "MLP"}
    assert table["bits"].max() > 0.05
    assert table.groupby("name")["bits"].nunique().eq(2).all()  # other noise each time
    assert all(torch.equal(before[name], p) for name, p in load_pretrained().named_parameters())
    with pytest.raises(OptionError, match="draws"):
        module.replaced_by_noise(draws=0)


def test_the_census_counts_exponents_and_names_the_commonest_refusal() -> None:
    rng = np.random.default_rng(0)
    heavy = torch.from_numpy((1 - (np.arange(200) + 0.5) / 200) ** -0.5).float()
    weights = {f"{i}.noise.weight": torch.from_numpy(rng.standard_normal((80, 80))).float() for i in range(3)}
    weights["heavy.weight"] = torch.diag(heavy)
    row = module.exponent_census({"m": inspect(weights)}).loc["m"]
    assert (row["matrices"], row["exponents"], row["refused"]) == (4, 1, "near random")
    assert row["smallest"] == row["median"] == row["largest"] == pytest.approx(2.0, abs=0.1)
    assert row["from 2 to 6"] + (row["smallest"] < 2) == 1


def test_models_that_are_not_installed_are_told_and_the_rest_goes_on(monkeypatch, tmp_path) -> None:
    def absent(name: str):
        raise MissingExtraError("not installed")

    monkeypatch.setattr(module, "pretrained_weights", absent)
    monkeypatch.setattr(module, "_packaged", lambda: None)
    models, missing = module.checkpoints_at_hand()
    assert list(models) == ["TinyGPT"] and len(missing) == 2
    file = tmp_path / "some.gguf"
    file.touch()
    models, missing = module.checkpoints_at_hand(str(file))
    assert models["SmolLM2"] == file and missing == ["not installed"]
    with pytest.raises(CheckpointError, match="there is no file"):
        module.checkpoints_at_hand(str(tmp_path / "none.gguf"))


def test_the_package_of_a_model_is_found_without_importing_it(monkeypatch, tmp_path) -> None:
    place = tmp_path / "some_model"
    place.mkdir()
    (place / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (place / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "_SMOLLM2", "some_model")
    assert module._packaged() == place / "weights.gguf"
    monkeypatch.setattr(module, "_SMOLLM2", "no_such_model")
    assert module._packaged() is None
