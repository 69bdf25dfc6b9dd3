"""The benchmark of inspect runs, and what it compares is the same."""

import pytest
import torch

from benchmarks.harness import Options
from benchmarks.inspect import by_threads, cases, power_iteration, stable_rank, weights
from benchmarks.inspect_large import inspected, main
from orthokit.diagnostics.inspection.measures import exact_spectrum
from orthokit.lab import TinyGPT


def test_all_candidates_find_the_same_values():
    found = weights(TinyGPT("0.2M").state_dict())
    for name, sigma in by_threads(exact_spectrum, found, 2).items():
        exact = torch.linalg.svdvals(found[name].double())
        torch.testing.assert_close(torch.as_tensor(sigma), exact, rtol=0, atol=1e-7 * float(exact[0]))
        rank = float(exact.square().sum() / exact[0] ** 2)
        assert stable_rank(found[name]) == pytest.approx(rank, rel=4e-3)
        assert power_iteration(found[name]) == pytest.approx(rank, rel=0.3)


def test_every_candidate_runs():
    titles = []
    # The files of a case are there until the next one is asked for.
    for case in cases(Options(threads=1, rounds=1, quick=True)):
        titles.append(case.title)
        assert {"orthokit"} <= case.candidates.keys()
        for call in case.candidates.values():
            call()
    assert len(titles) == 3


def test_growth_is_measured_and_the_whole_is_said(capsys):
    found = main(["--layers", "1", "--width", "64", "--threads", "1"])
    (row,) = found["models"]
    assert row["matrices"] == 7 and row["first_look_seconds"] > 0 and "models" in capsys.readouterr().out


def test_a_look_tells_its_time_and_its_memory(tmp_path):
    torch.save({"layers.0.w.weight": torch.ones(40, 30)}, tmp_path / "m.pt")
    seconds, peak, matrices = inspected(tmp_path / "m.pt", {"detail": "norms"}, torch.get_num_threads())
    assert seconds > 0 and peak >= 0 and matrices == 1
