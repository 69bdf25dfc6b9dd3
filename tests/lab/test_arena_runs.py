"""The arena in the run store: one run a combination, finished ones kept, failures that stop nobody."""

import math
from dataclasses import replace
from functools import partial

import pytest

from orthokit.errors import OptionError, RunError, UnknownNameError
from orthokit.lab import Run, runs
from orthokit.lab.arena import GROUNDS, arena_rows, compete, run_arena, running
from orthokit.lab.arena.grounds import pretrained_model

SMALL = {"steps": 2, "small": True, "progress": False, "evaluations": 1, "portrait": False}


def _place(row):
    return row.get("path", ""), row.get("layer", ""), row.get("alpha", 0), row.get("index", 0), row["step"]


def test_each_combination_is_one_run_and_is_read_back_as_it_was_made(tmp_path):
    options = SMALL | {"portrait": True, "paths": True}
    frame = run_arena("tinygpt", "oft", rates=1e-2, seeds=[0], root=tmp_path, **options)
    made = compete("tinygpt", "oft", lr=1e-2, seed=0, **{k: v for k, v in options.items() if k != "progress"})
    name = "tinygpt-oft-lr0.01-seed0"
    run = Run.open(name, root=tmp_path)
    assert run.status == "finished" and run.config["arena"]["lr"] == 1e-2 and run.last_step == 2
    found = arena_rows(run)
    for kind in ("run", "layer", "profile", "path"):
        old, new = (sorted((row for row in rows if row["kind"] == kind), key=_place) for rows in (made, found))
        assert len(old) == len(new) > 0
        for a, b in zip(old, new, strict=True):
            assert set(a) == set(b)
            for column, value in a.items():
                if column != "seconds":
                    assert (
                        b[column] == pytest.approx(value, rel=1e-6, nan_ok=True)
                        if isinstance(value, float)
                        else b[column] == value
                    )
    assert len(frame) == len(made) and set(frame["run"]) == {name} and set(frame["status"]) == {"finished"}


def test_finished_runs_are_kept_and_others_start_over(tmp_path, monkeypatch):
    made = []

    def counted(ground, method, **options):
        made.append((method, options["seed"]))
        if options["seed"] == 1 and len(made) == 2:
            raise KeyboardInterrupt
        return compete(ground, method, **options)

    monkeypatch.setattr(running, "compete", counted)
    with pytest.raises(KeyboardInterrupt):
        run_arena("tinygpt", "lora", seeds=[0, 1], root=tmp_path, **SMALL)
    assert set(runs(root=tmp_path)["status"]) == {"finished", "interrupted"}
    frame = run_arena("tinygpt", "lora", seeds=[0, 1], root=tmp_path, **SMALL)
    assert made == [("lora", 0), ("lora", 1), ("lora", 1)]
    assert frame.groupby("seed")["step"].max().tolist() == [2, 2]


def test_a_failure_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def failing(ground, method, **options):
        if method == "oft":
            raise RuntimeError("no memory left")
        return compete(ground, method, **options)

    monkeypatch.setattr(running, "compete", failing)
    frame = run_arena("tinygpt", ["oft", "lora"], seeds=[0], root=tmp_path, **SMALL)
    bad, good = frame[frame["method"] == "oft"], frame[frame["method"] == "lora"]
    assert bad["kind"].tolist() == ["failed"] and "no memory left" in bad["message"].iloc[0]
    assert good["target"].notna().all() and (good["status"] == "finished").all()
    failed = Run.open("tinygpt-oft-lr0.002-seed0", root=tmp_path)
    assert failed.status == "failed" and "no memory left" in failed.error
    monkeypatch.setattr(running, "compete", compete)
    again = run_arena("tinygpt", ["oft", "lora"], seeds=[0], root=tmp_path, **SMALL)
    assert set(again["status"]) == {"finished"}, "what failed is tried again"


def test_a_run_that_another_process_writes_is_left_to_it(tmp_path):
    with Run.create("tinygpt-lora-lr0.01-seed0", root=tmp_path):
        frame = run_arena("tinygpt", "lora", rates=1e-2, seeds=[0], root=tmp_path, **SMALL)
    assert "another process" in frame["message"].iloc[0]


def test_processes_make_the_same_runs(tmp_path):
    alone = run_arena("tinygpt", "lora", seeds=[0, 1], root=tmp_path / "a", **SMALL)
    shared = run_arena("tinygpt", "lora", seeds=[0, 1], root=tmp_path / "b", jobs=2, **SMALL)
    assert shared["target"].tolist() == pytest.approx(alone["target"].tolist(), abs=1e-5)


def test_other_processes_know_a_ground_that_was_added(tmp_path, monkeypatch):
    # All its functions are ones that a module defines, as those of a file of one's own would be.
    mine = replace(GROUNDS["tinygpt"], model=partial(pretrained_model, "tinygpt"), label="mine")
    monkeypatch.setitem(GROUNDS, "mine", mine)
    frame = run_arena("mine", "lora", rates=1e-2, seeds=[0, 1], root=tmp_path, jobs=2, **SMALL)
    assert set(frame["status"]) == {"finished"} and frame["target"].notna().all()


def test_a_ground_that_other_processes_cannot_have_is_refused_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(GROUNDS, "mine", replace(GROUNDS["tinygpt"], label="mine"))
    with pytest.raises(OptionError, match=r"'mine' cannot be handed to other processes .* Use jobs=1."):
        run_arena(["tinygpt", "mine"], "lora", rates=1e-2, seeds=[0], root=tmp_path, jobs=2, **SMALL)
    assert not list(tmp_path.iterdir())
    frame = run_arena("mine", "lora", rates=1e-2, seeds=[0], root=tmp_path, **SMALL)
    assert set(frame["status"]) == {"finished"}


def test_a_finished_run_with_other_options_is_refused(tmp_path):
    run_arena("tinygpt", "lora", seeds=[0], root=tmp_path, **SMALL)
    with pytest.raises(RunError, match="made with another steps"):
        run_arena("tinygpt", "lora", seeds=[0], root=tmp_path, **(SMALL | {"steps": 1}))


def test_a_diverged_run_is_read_back_with_nan(tmp_path, monkeypatch):
    def diverged(ground, method, **options):
        rows = compete(ground, method, **{**options, "on_row": None})
        rows[-1] |= {"target": math.nan, "general": math.nan}
        for row in rows:
            options["on_row"](row)
        return rows

    monkeypatch.setattr(running, "compete", diverged)
    frame = run_arena("tinygpt", "lora", seeds=[0], root=tmp_path, **SMALL)
    assert math.isnan(frame["target"].iloc[-1]) and frame["status"].iloc[-1] == "finished"


def test_other_runs_are_not_read_as_ones_of_the_arena(tmp_path):
    with Run.create("other", root=tmp_path) as run, pytest.raises(RunError, match="no run of the arena"):
        arena_rows(run)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"grounds": "moon"}, UnknownNameError, "ground 'moon'"),
        ({"methods": ["lora", "nora"]}, UnknownNameError, "method 'nora'"),
        ({"rates": {"oft": 1e-3}}, UnknownNameError, "method in rates"),
        ({"rates": -1.0}, OptionError, "above 0; got -1.0 for 'lora'"),
        ({"rates": {"lora": [1e-3, math.inf]}}, OptionError, "got inf"),
        ({"seeds": []}, OptionError, "one method and one seed"),
        ({"jobs": 0}, OptionError, "jobs=0"),
        ({"evaluations": 0}, OptionError, "evaluations=0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, change, error, text):
    options = SMALL | {"grounds": "tinygpt", "methods": "lora", "seeds": [0], "root": tmp_path} | change
    with pytest.raises(error, match=text):
        run_arena(**options)
    assert not list(tmp_path.iterdir())
