"""``orthokit inspect``: tables, files, exit codes, one sentence per mistake."""

import json

import pytest
import torch
from safetensors.torch import save_file

from orthokit import cli
from orthokit.diagnostics import Inspection


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A base, and a model that is 1 % away from it."""
    monkeypatch.setenv("ORTHOKIT_CACHE", str(tmp_path / "cache"))
    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.up.weight": torch.randn(40, 30, generator=g) for i in range(3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {name: W + 0.01 * torch.randn(40, 30, generator=g) for name, W in base.items()}, tmp_path / "a.safetensors"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_is_printed(files, capsys):
    assert cli.main(["inspect", "a.safetensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a.safetensors: 3 matrices hold 3,600 numbers (float32)") and len(lines) == 5


def test_a_base_brings_verdicts_and_files_are_written(files, capsys):
    arguments = ["--base", "base.safetensors", "--json", "x.json", "--csv", "x.csv"]
    assert cli.main(["inspect", "a.safetensors", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "compared with base.safetensors" in printed and "All 3 matrices" in printed
    assert printed.splitlines()[-2:] == ["x.json", "x.csv"]
    assert len(Inspection.from_json("x.json")) == 3 and json.loads((files / "x.json").read_text())["base_name"]


def test_only_the_summary_and_a_sample(files, capsys):
    assert cli.main(["inspect", "a.safetensors", "--quiet", "--sample", "1", "--detail", "norms", "--no-cache"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "1 matrix holds" in printed[0] and printed[1] == "Note: 1 of 3 matrices, evenly spread over the model."
    assert not (files / "cache").exists()


def test_one_page_shows_several_models(files, capsys):
    assert cli.main(["inspect", "a.safetensors", "base.safetensors", "--quiet", "--html", "x.html"]) == 0
    page = (files / "x.html").read_text()
    assert "a.safetensors" in page and "base.safetensors" in page and len(page) < 6e6
    assert capsys.readouterr().out.splitlines()[-1] == "x.html"


def test_a_file_without_matrices_says_so(files, capsys):
    save_file({"norm.weight": torch.ones(4)}, "norm.safetensors")
    assert cli.main(["inspect", "norm.safetensors"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith("orthokit: No parameter is treated as a matrix") and "0 matrices hold" in told.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.safetensors"], 1, "is not there"),
        (["a.safetensors", "--base", "none"], 1, "is not there"),
        (["a.safetensors", "--rank", "0"], 1, "rank must be at least 1"),
        (["a.safetensors", "--json", "no/x.json"], 1, "cannot be written"),
        (["a.safetensors", "a.safetensors", "--json", "x.json"], 2, "take one model"),
        (["a.safetensors"] * 5, 2, "at most 4"),
    ],
)
def test_mistakes_are_one_sentence(files, capsys, arguments, code, words):
    assert cli.main(["inspect", *arguments]) == code
    told = capsys.readouterr().err
    assert told.startswith("orthokit: ") and words in told and "Traceback" not in told
