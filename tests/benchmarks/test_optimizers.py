"""The benchmark of optimizers: who takes part, that all do the same work, and what is written down."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, optimizers
from benchmarks.harness import Options

QUICK = Options(threads=1, rounds=1, quick=True)


@pytest.fixture
def none_installed(monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'rival'")

    monkeypatch.setattr(optimizers, "RIVALS", {"rival": absent})


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    threads = torch.get_num_threads()
    yield tmp_path / "results"
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("none_installed")
def test_quick_run_measures_saves_by_threads_and_names_the_absent(results, capsys):
    assert command.main(["optimizers", "--quick", "--save", "--rounds", "2"]) == 0
    content = json.loads((results / "optimizers_1thread.json").read_text())
    assert content["machine"]["threads"] == content["options"]["threads"] == 1
    for case in content["cases"]:
        names = case["candidates"].keys()
        assert {*optimizers.OURS, "torch.optim.Muon", "AdamW fused", case["roof"]} == set(names)
        assert case["baseline"] == "torch.optim.Muon"
        best, rivals = case["notes"]
        assert best.startswith("At best: products ")
        assert "rival absent (ModuleNotFoundError" in rivals and "torch 2." in rivals
        for name, row in case["candidates"].items():
            assert len(row["wall_seconds"]) == 2 and min(row["wall_seconds"]) > 0
            assert (row["median_ratio"] == 1.0) == (name == case["baseline"])
        assert case["candidates"][case["roof"]]["share_of_roof"] == 1.0
        assert 0 < case["candidates"]["orthokit Muon"]["share_of_roof"] < 1
    assert capsys.readouterr().out.count("rival absent") == len(content["cases"])


def test_layouts_hold_the_matrices_they_promise():
    split, fused = optimizers.gpt_shapes(6, 384), optimizers.gpt_shapes(6, 384, fused=True)
    assert (len(split), len(fused)) == (36, 24) and (1152, 384) in fused
    entries = [sum(rows * columns for rows, columns in shapes) for shapes in (split, fused)]
    assert entries == [10_616_832] * 2
    # Six layers of four square and two four times wider matrices, five steps of 4 m^2 n + 2 m^3 each.
    assert optimizers.newton_schulz_flop(split) == 6 * 5 * 384**3 * (4 * 6 + 2 * 18)
    assert optimizers.newton_schulz_flop([(8, 32)]) == optimizers.newton_schulz_flop([(32, 8)])


def test_the_roof_keeps_every_thread_busy():
    for threads in (1, 3):
        name, product, flop = optimizers.roof(8, threads)
        out = product()
        assert isinstance(out, torch.Tensor) and out.shape == (2 * threads, 8, 8)
        assert flop == 2 * threads * 2 * 8**3 and f"{2 * threads} of 8" in name


@pytest.mark.usefixtures("none_installed")
def test_gradients_are_given_anew_at_every_step():
    # Some optimizers drop or overwrite them; then later steps would measure nothing.
    class Greedy(torch.optim.SGD):
        seen = 0

        def step(self):
            for p in self.param_groups[0]["params"]:
                Greedy.seen += p.grad is not None
                p.grad = None

    step = optimizers.stepper(lambda p: Greedy(p, lr=0.0), [(2, 3), (3, 3)])
    step(), step()
    assert Greedy.seen == 4


@pytest.mark.peers
@pytest.mark.parametrize("name", list(optimizers.RIVALS))
def test_rivals_step_by_what_muon_steps(name):
    # With the same iteration the first update has the same direction; their scales and decay are their own.
    builders, found = optimizers.rivals()
    if found[name].startswith("absent"):
        pytest.skip(f"{name} {found[name]}")
    rivals = optimizers.RIVALS[name]()
    assert rivals and rivals.keys() <= builders.keys()
    for build in rivals.values():
        update = first_update(build)
        assert torch.cosine_similarity(update, first_update(builders["torch.optim.Muon"]), dim=0) > 0.9


def first_update(build) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(24, 48))
    p.grad = torch.randn(24, 48, generator=g)
    build([p]).step()
    return p.detach().flatten()
