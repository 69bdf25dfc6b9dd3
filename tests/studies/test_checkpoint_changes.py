"""What fine-tuning leaves behind: methods named from two checkpoints, models or files; and spectra in four bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import load_pretrained
from orthokit.studies import checkpoint_changes as module

METHODS = ("full", "lora", "pissa", "oft", "hra")


@pytest.fixture(scope="module")
def models():
    return module.finetuned_tinygpts(METHODS, seed=1, steps=2, small=True)


@pytest.fixture(scope="module")
def looks(models):
    return module.finetuned_looks(models, include="blocks.0.*")


def test_each_method_is_named_from_the_weights_alone(looks) -> None:
    table = module.told_apart(looks, small=True)
    assert (table["trained"] == 4).all() and (table["still"] == 3).all()
    assert (table["named"] == 4).all() and (table["unchanged"] == 3).all()
    assert (table["kinds"] == "").all() and (table["change"] > 1e-4).all()


def test_rotations_keep_the_spectrum_and_the_rank_is_that_of_the_adapter(looks) -> None:
    table = module.told_apart(looks, small=True)
    assert (table.loc[["OFT", "HRA"], "spectrum change"] < 1e-6).all()
    assert (table.loc[["full fine-tuning", "LoRA", "PiSSA"], "spectrum change"] > 1e-5).all()
    assert table["rank"].to_dict() == {"full fine-tuning": "full", "LoRA": "4", "PiSSA": "8", "OFT": "full", "HRA": "8"}


def test_files_of_sixteen_bits_are_compared_as_files(models) -> None:
    found = module.finetuned_looks({"oft": models["oft"]}, dtype=torch.bfloat16, include="blocks.0.attn.*")["oft"]
    assert {row["stored"] for row in found.rows} == {"bfloat16"} and found.name == "oft.safetensors"
    # Rounding moves the spectrum, but by no more than it can.
    assert 1e-5 < max(row["spectrum_change"] for row in found.rows) < 2e-3


def test_wrong_names_are_listed(looks) -> None:
    row = module.told_apart({"lora": looks["full"]}, small=True).loc["LoRA"]
    assert row["named"] == 0 and row["kinds"] == "general"


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="method"):
        module.finetuned_tinygpts(["boft"], steps=1, small=True)


def test_training_one_method_does_not_depend_on_the_others(models) -> None:
    alone = module.finetuned_tinygpts(["hra"], seed=1, steps=2, small=True)["hra"]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), models["hra"].parameters(), strict=True))


def test_four_bits_hide_what_is_below_their_floor() -> None:
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(96, 96, generator=g)).Q for _ in range(2))
    sigma = torch.logspace(1, -4, 96)
    table, spectra = module.four_bit_spectra({"W.weight": U * sigma @ V.mT})
    row = table.loc["W.weight"]
    np.testing.assert_allclose(spectra["W.weight"]["before"], sigma, rtol=1e-2)
    # What is left below the floor is the rounding's own spectrum: it fills up to the floor and no further.
    small = spectra["W.weight"]["four bits"][int((sigma > row["floor"]).sum()) :]
    assert small.max() < 1.3 * row["floor"] and small[0] > 0.5 * row["floor"]
    assert row["above"] < 96 and row["off below"] > 1 > row["off above"]


def test_a_matrix_of_low_rank_has_its_rank_above_the_floor_and_rounding_below() -> None:
    name = "blocks.2.mlp.up.weight"
    table, spectra = module.four_bit_spectra(load_pretrained(), [name], rank=64)
    row, both = table.loc[name], spectra[name]
    assert row["above"] == 64 and len(both["before"]) == 64 and len(both["four bits"]) == row["values"] == 128
    assert np.isnan(row["off below"]) and 0 < row["off above"] < 0.05
    assert (both["four bits"][64:] < row["floor"]).all() and both["four bits"][-1] > 0.01 * row["floor"]
    with pytest.raises(OptionError, match="rank"):
        module.four_bit_spectra(load_pretrained(), [name], rank=0)


def test_four_bit_spectra_take_models_and_names() -> None:
    name = "blocks.0.attn.v.weight"
    table, spectra = module.four_bit_spectra(load_pretrained(), [name])
    assert list(table.index) == list(spectra) == [name] and table.loc[name, "values"] == 128
    with pytest.raises(UnknownNameError, match="matrix"):
        module.four_bit_spectra(load_pretrained(), ["head"])
