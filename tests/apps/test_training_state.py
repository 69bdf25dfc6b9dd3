"""The page "Live training" without a browser: what the buttons do, what the folder of runs shows, what errors say."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orthokit_widgets.training_run import LiveRun, load
from orthokit_widgets.training_state import TrainingState

from orthokit.diagnostics.monitor import Monitor
from orthokit.lab.runs import Run

SMALL = {"model": "cnn", "data": "digits", "budget": 0.5}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., TrainingState]]:
    """States over one folder; whatever still trains at the end is stopped."""
    states: list[TrainingState] = []

    def build(root: Path = tmp_path, **settings: Any) -> TrainingState:
        states.append(TrainingState(root=root, **(SMALL | {"steps": 20} | settings)))
        return states[-1]

    yield build
    for state in states:
        state.close()
        assert state.live is None or state.live.join(60)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def finish(state: TrainingState) -> dict[str, Any]:
    assert state.live is not None
    assert state.live.join(120)
    return state.snapshot()


def test_a_run_from_start_to_end_draws_points_and_is_recorded(make: Callable[..., TrainingState]) -> None:
    state = make()
    assert (state.status, state.sentence) == ("ready", "Ready: press Start.")
    assert set(state.snapshot()["figures"].values()) == {None}
    state.start()
    found = finish(state)
    assert (found["status"], found["sentence"], found["step"]) == ("finished", "Finished all 20 steps.", 20)
    assert found["figures"]["loss"]["data"][0]["x"] == list(range(1, 21))
    heat = found["figures"]["spectrum"]["data"][0]
    assert heat["type"] == "heatmap"
    assert heat["zmax"] - heat["zmin"] == 2.5
    json.dumps(found["figures"], allow_nan=False)
    assert found["matrices"] == state.live.monitor.matrices  # type: ignore[union-attr]
    run = Run.open("muon-pre-cnn-digits", root=state.root)
    assert run.status == "finished"
    assert run.config["page"] == state.values()
    assert state.last_ms > 0


def test_a_look_that_found_nothing_new_makes_no_new_figure(make: Callable[..., TrainingState]) -> None:
    state = make()
    state.start()
    first, second = finish(state)["figures"], state.snapshot()["figures"]
    assert all(second[name] is first[name] for name in first)


def test_a_look_decomposes_nothing(make: Callable[..., TrainingState], monkeypatch: pytest.MonkeyPatch) -> None:
    state = make(steps=40)
    state.start()
    for module, name in [(torch.linalg, n) for n in ("svd", "svdvals", "eigvalsh", "eigh", "qr")] + [
        (np.linalg, "svd")
    ]:
        original = getattr(module, name)

        def guarded(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread(), f"{name} in a look"
            return original(*args, **options)

        monkeypatch.setattr(module, name, guarded)
    while state.active:
        state.snapshot()
    assert state.snapshot()["status"] == "finished"


def test_stop_ends_the_run_after_the_step_and_leaves_it_resumable(make: Callable[..., TrainingState]) -> None:
    state = make(steps=5000)
    state.start()
    until(lambda: state.snapshot()["step"] >= 3, "three steps")
    state.stop()
    assert state.status in ("stopping", "stopped")
    found = finish(state)
    assert found["status"] == "stopped"
    assert 3 <= found["step"] < 5000
    assert state.live is not None
    assert state.live.stop_ms > 0
    run = Run.open(state.live.name, root=state.root)
    assert (run.status, run.checkpoints()[-1][0]) == ("interrupted", found["step"])


def test_pause_holds_the_steps_until_resume_and_stop_ends_a_pause(make: Callable[..., TrainingState]) -> None:
    state = make(steps=5000)
    state.start()
    until(lambda: state.snapshot()["step"] >= 2, "two steps")
    state.pause()
    assert state.status == "paused"
    time.sleep(0.5)  # the step under way
    held = state.snapshot()["step"]
    time.sleep(0.3)
    assert state.snapshot()["step"] == held
    assert state.sentence == f"Paused after step {held}."
    state.pause(False)
    until(lambda: state.snapshot()["step"] > held, "a step after resuming")
    state.pause()
    state.stop()
    assert finish(state)["status"] == "stopped"


def test_a_closed_page_trains_no_further(make: Callable[..., TrainingState]) -> None:
    state = make(steps=5000)
    state.start()
    until(lambda: state.snapshot()["step"] >= 1, "a step")
    state.close()
    assert finish(state)["status"] == "stopped"


def test_start_does_nothing_while_a_run_is_active(make: Callable[..., TrainingState]) -> None:
    state = make(steps=5000)
    state.start()
    first = state.live
    state.start()
    assert state.live is first
    assert state.drawn == ["muon-pre-cnn-digits"]


def test_sessions_share_no_state_and_never_write_one_run(make: Callable[..., TrainingState]) -> None:
    one, other = make(), make()
    one.start()
    other.start()
    assert one.live is not None
    assert other.live is not None
    assert one.live.name != other.live.name
    assert finish(one)["status"] == finish(other)["status"] == "finished"
    assert one.drawn == [one.live.name]
    assert make().snapshot()["status"] == "ready"


def test_runs_are_drawn_over_each_other_also_those_of_other_sessions(make: Callable[..., TrainingState]) -> None:
    first = make()
    first.start()
    finish(first)
    state = make(optimizer="adamw")
    state.start()
    finish(state)
    state.draw("muon-pre-cnn-digits", True)
    state.snapshot()
    assert state.worker.join(60)
    figures = state.snapshot()["figures"]
    assert [trace["name"] for trace in figures["loss"]["data"]] == ["adamw", "muon-pre"]
    ours, theirs = figures["loss"]["data"][1]["y"], first.snapshot()["figures"]["loss"]["data"][0]["y"]
    assert ours == theirs
    assert len(figures["gap"]["data"]) == 2
    state.draw("muon-pre-cnn-digits", False)
    assert [trace["name"] for trace in state.snapshot()["figures"]["loss"]["data"]] == ["adamw-cnn-digits"]


def test_what_is_loaded_from_the_folder_is_what_was_drawn_live(make: Callable[..., TrainingState]) -> None:
    state = make()
    state.start()
    finish(state)
    assert state.live is not None
    live, loaded = state.live.read()[0], load(state.live.name, state.root)
    assert (list(loaded.steps), list(loaded.losses)) == (list(live.steps), list(live.losses))
    assert loaded.matrices.keys() == live.matrices.keys()
    for matrix, quantities in live.matrices.items():
        for quantity, (steps, values) in quantities.items():
            again = loaded.get(matrix, quantity)
            assert again[0] == steps
            np.testing.assert_allclose(np.array(again[1]), np.array(values), rtol=1e-6)


def test_the_table_shows_damaged_runs_as_such_and_recorded_ones_of_notebooks(
    make: Callable[..., TrainingState], tmp_path: Path
) -> None:
    with Run.create("from-a-notebook", root=tmp_path, config={"model": "TinyGPT", "corpus": "addresses"}) as run:
        run.log(1, loss=2.5)
    Run.create("broken", root=tmp_path).close()
    (tmp_path / "broken" / "run.sqlite").write_bytes(b"no database" * 100)
    state = make()
    state.reread()
    assert state.worker.join(60)
    rows = {row["name"]: row for row in state.snapshot()["rows"]}
    assert rows["broken"]["status"] == "damaged"
    assert "run.sqlite" in rows["broken"]["error"]
    assert not rows["broken"]["drawable"]
    assert rows["from-a-notebook"]["loss"] == "2.500"
    assert "TinyGPT" in rows["from-a-notebook"]["what"]
    assert rows["from-a-notebook"]["drawable"]
    assert all(isinstance(value, str | bool) for row in rows.values() for value in row.values())


def test_a_run_that_vanished_is_told_and_the_others_stay(make: Callable[..., TrainingState]) -> None:
    state = make()
    state.start()
    finish(state)
    state.draw("gone", True)
    state.snapshot()
    assert state.worker.join(60)
    found = state.snapshot()
    assert "gone" in "".join(state.errors.values())
    assert len(found["figures"]["loss"]["data"]) == 1
    assert state.worker.job is None


def test_a_folder_that_cannot_be_written_is_a_sentence_not_a_crash(
    make: Callable[..., TrainingState], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    state = make(root=tmp_path / "file")
    state.start()
    assert finish(state)["status"] == "failed"
    assert state.live is not None
    assert str(tmp_path / "file") in state.live.error


def test_a_diverging_loss_fails_the_run_with_advice(tmp_path: Path) -> None:
    settings = TrainingState(root=tmp_path, **SMALL, optimizer="adamw").values()
    run = LiveRun(settings | {"lr": 1e12, "steps": 50}, tmp_path)
    assert run.join(120)
    assert run.status == "failed"
    assert "the loss must stay finite" in run.error
    assert "Lower the learning rate" in run.error


def test_a_model_only_offers_the_data_it_can_read(make: Callable[..., TrainingState]) -> None:
    state = make()
    assert (state.data, state.param["data"].objects) == ("digits", ["fashion", "digits"])
    state.model = "0.2M"
    assert (state.data, state.param["data"].objects) == ("addresses", ["addresses", "moby_dick"])


def test_the_language_model_runs_in_every_order_and_without_momentum_there_is_no_gap(
    make: Callable[..., TrainingState],
) -> None:
    state = make(model="0.2M", data="moby_dick", order="none", steps=20)
    state.start()
    found = finish(state)
    assert found["status"] == "finished"
    assert found["figures"]["spectrum"] is not None
    assert found["figures"]["gap"] is None
    assert isinstance(state.live.monitor, Monitor)  # type: ignore[union-attr]
    assert any("no momentum" in note for note in found["notes"])


def test_not_more_runs_are_drawn_than_can_be_told_apart(make: Callable[..., TrainingState]) -> None:
    state = make()
    for number in range(12):
        state.draw(f"run-{number}", True)
    assert state.drawn == [f"run-{number}" for number in range(5, 12)]
