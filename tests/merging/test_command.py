"""``orthokit merge``: the same result as the function, one sentence for an error, a table at the end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthokit import cli
from orthokit.merging.files import merge_checkpoints


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = torch.Generator().manual_seed(2)
    base = {"layers.0.mlp.weight": torch.randn(5, 4, generator=generator), "norm.weight": torch.ones(4)}
    for name in ("base", "a", "b"):
        moved = {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in base.items()}
        (tmp_path / name).mkdir()
        save_file(base if name == "base" else moved, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODELS = ["--base", "base", "--expert", "a", "--expert", "b"]


def test_a_merge_is_that_of_the_function_and_ends_in_a_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "ties", "--weight", "1", "--weight", "0.5", "--scale", "0", "--option", "density=[0.5, 1]"]
    layers = ["--option", 'layers={"norm*": {"method": "linear"}}', "--dtype", "bfloat16", "--json", "report.json"]
    assert cli.main(["merge", *MODELS, *options, *layers, "--out", "out"]) == 0
    layer = {"norm*": {"method": "linear"}}
    weights, density = [1.0, 0.5], [0.5, 1]
    told = merge_checkpoints(
        "base",
        ["a", "b"],
        "same",
        method="ties",
        weights=weights,
        scale=0.0,
        density=density,
        layers=layer,
        dtype="bfloat16",
    )
    assert (place / "out/model.safetensors").read_bytes() == (place / "same/model.safetensors").read_bytes()
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[:3] == [["merged", "by", "tensors", "numbers"], ["ties", "1", "20"], ["linear", "1", "4"]]
    assert "2 tensors merged" in said.out and said.err == ""
    rows = json.loads((place / "report.json").read_text())["rows"]
    assert rows == [dict(row) for row in told.rows]


def test_a_recipe_for_mergekit_is_carried_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "recipe.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1, int8_mask: true}\n"
        "models: [{model: a}, {model: b}]\n"
    )
    assert cli.main(["merge", "--config", "recipe.yml", "--out", "out"]) == 0
    assert "int8_mask" in capsys.readouterr().err
    models = {name: load_file(place / name / "model.safetensors") for name in ("base", "a", "b", "out")}
    for name, start in models["base"].items():
        assert torch.allclose(models["out"][name], models["a"][name] + models["b"][name] - start, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "base"], "name what to merge"),
        (["--base", "base", "--adapter", "a"], "leave out --base"),
        ([*MODELS, "--config", "x.yml"], "leave out --base"),
        (["--scale", "0", "--config", "x.yml"], "leave out --scale"),
        ([*MODELS, "--method", "tise"], "did you mean 'ties'"),
        ([*MODELS, "--option", "density"], "--option takes NAME=VALUE"),
        ([*MODELS, "--option", "method=ties"], "a flag of its own"),
        ([*MODELS, "--method", "linear", "--weight", "1"], "weights"),
        (["--base", "nowhere", "--expert", "a"], "nowhere is not there"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["merge", *arguments, "--out", "out"]) == 1
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("orthokit: ") and said.err.count("\n") == 1
    assert said.out == "" and not (place / "out").exists()


def test_an_output_that_exists_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", *MODELS, "--method", "linear", "--out", "a"]) == 1
    assert "a exists already" in capsys.readouterr().err


def test_on_a_terminal_there_is_one_line_of_progress(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli.main(["merge", *MODELS, "--method", "linear", "--out", "out"]) == 0
    error = capsys.readouterr().err
    assert error.count("\r") == 2 and error.count("\n") == 1 and "merge 2/2 tensors" in error


def test_the_command_is_in_the_list_and_describes_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "merge model files"), (["merge", "--help"], "--no-resume")):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
        assert words in capsys.readouterr().out


def test_adapters_are_merged_without_their_base(tmp_path, capsys) -> None:
    from torch import nn

    from orthokit.adapters import OFT, attach, load, save

    for seed in (0, 1):
        save(attach(nn.Sequential(nn.Linear(8, 4)), OFT(4, init_std=0.2, seed=seed)), tmp_path / f"a{seed}")
    named = [part for seed in (0, 1) for part in ("--adapter", str(tmp_path / f"a{seed}"))]
    assert cli.main(["merge", *named, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "report.json")]) == 0
    assert "orthomerge" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["kind"] == "oft"
    load(nn.Sequential(nn.Linear(8, 4)), tmp_path / "out")
