"""The benchmark of orthogonality: its columns, and the rule by which a recipe reaches the aims."""

import pytest
import torch

from benchmarks import harness, orthogonality
from benchmarks.harness import Case, Options, Result


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_spectrum_is_a_case_whose_columns_are_the_quality_of_each_recipe():
    made = list(orthogonality.cases(Options(threads=1, rounds=1, quick=True)))
    assert [case.title.split(":")[0] for case in made] == list(orthogonality.AIMS)
    for case in made:
        errors = {name: float(value) for name, value in case.columns["mean |s-1|"].items()}
        assert errors.keys() == case.candidates.keys() and case.baseline == "jordan x5"
        assert errors["svd"] < errors["polar_express x6"] < errors["jordan x5"]


def results(errors: dict[str, list[str]], seconds: dict[str, float]) -> list[Result]:
    found = []
    for i in range(3):
        columns = {"mean |s-1|": {name: values[i] for name, values in errors.items()}}
        case = Case("demo", dict.fromkeys(errors, list), "plain", columns=columns)
        times = {name: [seconds[name]] for name in errors}
        found.append(Result(case, times, times))
    return found


def test_reached_are_those_within_all_aims_and_the_time():
    errors = {
        "plain": ["0.13", "0.13", "0.3"],
        "good": ["0.002", "0.003", "0.08"],
        "cheap": ["0.003", "0.005", "0.1"],
        "dear": ["0.001", "0.001", "0.01"],
        "once bad": ["0.001", "0.006", "0.01"],
        "diverged": ["inf", "0.001", "0.01"],
    }
    seconds = {"plain": 1.0, "good": 1.3, "cheap": 1.1, "dear": 1.4, "once bad": 1.0, "diverged": 1.0}
    assert orthogonality.reached(results(errors, seconds)) == ["cheap (1.10x)", "good (1.30x)"]


def test_quick_run_says_what_reaches_the_aims(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    orthogonality.main(["--quick", "--rounds", "1", "--save"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("mean |s-1| at most 0.003 (gaussian), 0.005 (1/k), 0.1 (log-uniform) within 1.35x:")
    assert (tmp_path / "orthogonality.json").is_file()
