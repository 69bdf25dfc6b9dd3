"""The benchmark pattern: order, ratios, what is called disturbed, and the files."""

import json
from itertools import pairwise

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.harness import Case, Options, Result, compare, machine, save, table


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    threads = torch.get_num_threads()
    yield tmp_path / "results"
    torch.set_num_threads(threads)


@pytest.fixture
def clock(monkeypatch):
    """Wall and processor clocks that candidates move themselves."""
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(harness.time, "process_time", lambda: now["cpu"])
    return now


def spend(clock, name: str, wall, cpu, calls: list[str]):
    """A candidate whose i-th call takes ``wall(i)`` and ``cpu(i)`` seconds."""

    def call() -> None:
        i = calls.count(name)
        calls.append(name)
        clock["wall"] += wall(i)
        clock["cpu"] += cpu(i)

    return call


def result(wall: dict[str, list[float]], cpu: dict[str, list[float]] | None = None, **options) -> Result:
    case = Case("demo", {name: lambda: None for name in wall}, **{"baseline": "b", **options})
    return Result(case, wall, cpu or wall)


def test_each_round_has_an_order_of_its_own(clock):
    calls: list[str] = []
    one = lambda i: 1.0  # noqa: E731
    case = Case("demo", {name: spend(clock, name, one, one, calls) for name in "abc"}, baseline="a")
    compare(case, rounds=30, warmup=0)
    # One look at each, to see how long it takes, then the rounds.
    looks = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert looks[0] == "abc" and all(sorted(look) == ["a", "b", "c"] for look in looks)
    assert len(set(looks)) == 6, "whoever follows a large candidate must not always be the same"
    again: list[str] = []
    compare(Case("demo", {name: spend(clock, name, one, one, again) for name in "abc"}, "a"), rounds=30, warmup=0)
    assert again == calls


def test_slow_rounds_do_not_change_the_ratio(clock):
    calls: list[str] = []
    load = lambda i: 10.0 if i == 3 else 1.0  # noqa: E731
    case = Case(
        "demo",
        {"ours": spend(clock, "ours", lambda i: 0.5 * load(i), lambda i: 0.5, calls),
         "theirs": spend(clock, "theirs", load, lambda i: 1.0, calls)},
        baseline="theirs",
    )  # fmt: skip
    found = compare(case, rounds=5, warmup=1)
    assert found.ratios("ours") == pytest.approx([0.5] * 5) and found.median("ours") == 0.5
    assert found.disturbed("ours") == [False, True, False, False, False]


def test_short_calls_are_repeated_and_divided(clock):
    calls: list[str] = []
    case = Case("demo", {"a": spend(clock, "a", lambda i: 0.001, lambda i: 0.001, calls)}, baseline="a")
    found = compare(case, rounds=2, warmup=0)
    assert len(calls) == 1 + 2 * 5 and found.wall["a"] == pytest.approx([0.001] * 2)


def test_a_call_on_many_threads_is_held_to_its_own_best_round():
    found = result({"b": [1.0, 1.0, 1.0]}, {"b": [1.9, 1.0, 1.85]})
    assert found.disturbed("b") == [False, True, False]


def test_share_of_the_roof_is_taken_within_rounds():
    wall = {"b": [1.0, 4.0, 2.0], "roof": [0.5, 2.0, 1.0]}
    found = result(wall, work={"b": 100.0, "roof": 200.0}, roof="roof")
    assert found.roof_share("b") == pytest.approx(0.25) and found.roof_share("roof") == 1.0
    assert result(wall).roof_share("b") is None


def test_table_is_sorted_and_aligned():
    text = table(result({"b": [2.0, 2.0], "fast": [1.0, 1.0], "slow": [9.0, 9.0]}, columns={"note": {"fast": "x"}}))
    title, header, *rows = text.splitlines()
    assert "2 rounds" in title and header.split()[-1] == "note"
    assert [row.split()[0] for row in rows] == ["fast", "b", "slow"] and rows[1].startswith("b *")
    assert "0.50" in rows[0] and "4.50" in rows[2]


def test_saved_file_holds_machine_options_and_samples(results):
    path = save("demo", Options(threads=1, rounds=2, quick=True), machine(), [result({"b": [1.0, 2.0]})])
    content = json.loads(path.read_text())
    assert path == results / "demo.json" and [p.name for p in results.iterdir()] == ["demo.json"]
    assert content["cases"][0]["candidates"]["b"]["wall_seconds"] == [1.0, 2.0]
    assert content["options"] == {"threads": 1, "rounds": 2, "quick": True}
    assert {"cpu", "threads", "torch", "load_average", "date"} <= content["machine"].keys()


@pytest.mark.parametrize(
    "options", [{"baseline": "x"}, {"work": {"x": 1.0}}, {"roof": "b"}, {"columns": {"note": {"x": "1"}}}], ids=str
)
def test_names_that_are_no_candidates_are_refused(options):
    with pytest.raises(ValueError, match="demo"):
        result({"b": [1.0]}, **options)


def test_a_benchmark_can_have_a_file_for_each_number_of_threads(results, capsys):
    for threads in ("1", "2"):
        arguments = ["--save", "--rounds", "1", "--threads", threads]
        harness.run("demo", "Demo.", lambda options: [Case("t", {"b": list}, "b")], arguments, by_threads=True)
    harness.run("demo", "Demo.", lambda options: [Case("t", {"b": list}, "b")], [*arguments, "--label", "other"])
    names = ["demo_1thread.json", "demo_2threads.json", "demo_other.json"]
    assert sorted(path.name for path in results.iterdir()) == names


def test_notes_stand_under_the_table_and_in_the_file(results):
    found = result({"b": [1.0]}, notes=("Rivals: none.",))
    assert table(found).splitlines()[-1] == "Rivals: none."
    assert found.as_json()["notes"] == ["Rivals: none."]


def test_every_benchmark_is_listed_with_its_first_line(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == command.names() and len(lines) >= 2
    assert all(len(line.split()) > 5 for line in lines)
    assert all(a < b for a, b in pairwise(lines))


def test_unknown_benchmark_is_named_with_the_closest(capsys):
    assert command.main(["optimiser"]) == 2
    assert "did you mean 'optimizers'" in capsys.readouterr().err
