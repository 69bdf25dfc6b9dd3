"""The benchmarks of merging run, and ours and the SVD route merge to the same."""

import json

import pytest
import torch

from benchmarks import merging, merging_large
from benchmarks.harness import Options


def test_orthomerge_and_the_svd_route_agree_on_every_shape():
    found = list(merging.orthomerge_cases(Options(threads=1, rounds=1, quick=True)))
    assert len(found) == 3
    for case in found:
        made = {name: call() for name, call in case.candidates.items()}
        ours, plain = made["orthokit"], made["SVD route"]
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
        assert all(float(error) < 1e-3 for error in case.columns["error of the change"].values())


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_files_are_merged_to_what_torch_merges_them_to(tmp_path, method):
    paths, out = merging.written(tmp_path, True), tmp_path / "out"
    merging.with_orthokit(paths, out, 1, method=method)
    if method == "linear":
        merging.with_torch(paths, tmp_path / "plain")
        ours, plain = (merging.load_file(path / "model.safetensors") for path in (out, tmp_path / "plain"))
        assert ours.keys() == plain.keys()
        assert all(torch.allclose(ours[name], plain[name], atol=1e-6) for name in ours)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2


def test_the_large_checkpoint_merges_with_as_many_layers_as_there_is_room_for(tmp_path, monkeypatch, capsys):
    for name, value in {"_WIDTH": 64, "_INNER": 96, "_WORDS": 200, "_SHARD": 100_000}.items():
        monkeypatch.setattr(merging_large, name, value)
    room = 4 * merging_large.size(2) + 2 * 10**9
    monkeypatch.setattr(merging_large.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": room}))
    # The process that merges would start without these small sizes; it needs none of them.
    found = merging_large.main(["--folder", str(tmp_path), "--layers", "3", "--threads", "1"])
    assert found["layers"] == 2 and found["extra_mib"] >= 0 and found["gigabytes_of_one_model"] >= 0
    assert json.loads(capsys.readouterr().out) == found
    assert not list(tmp_path.iterdir())
