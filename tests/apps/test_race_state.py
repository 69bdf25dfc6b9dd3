"""The page "Optimizer race" without a browser: fair turns, what the buttons do, what the charts hold."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from orthokit_widgets import race_run
from orthokit_widgets.fields import describe, read_query, write_query
from orthokit_widgets.race_run import LiveRace
from orthokit_widgets.race_state import RATES, RaceState
from orthokit_widgets.race_view import RacePage

from orthokit.errors import OptionError
from orthokit.lab import contestants
from orthokit.studies import enter, tuned_rates

SMALL = {"track": "cnn", "racers": ["adamw", "muon_pre"], "steps": 20}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and batches of the size for tests."""
    monkeypatch.setattr(race_run, "enter", lambda *args, **options: enter(*args, **options, small=True))


@pytest.fixture
def make() -> Iterator[Callable[..., RaceState]]:
    """States; whatever still races at the end is stopped."""
    states: list[RaceState] = []

    def build(**settings: Any) -> RaceState:
        states.append(RaceState(**(SMALL | settings)))
        return states[-1]

    yield build
    for state in states:
        state.close()
        assert state.worker.join(60)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def finish(state: RaceState) -> dict[str, Any]:
    assert state.worker.join(120)
    return state.snapshot()


def test_a_race_from_start_to_end_draws_every_rival(make: Callable[..., RaceState]) -> None:
    state = make()
    assert (state.status, state.sentence) == ("ready", "Ready: press Start.")
    assert set(state.snapshot()["figures"].values()) == {None}
    state.start()
    found = finish(state)
    assert (found["status"], found["sentence"], found["problems"]) == ("finished", "Finished all 20 steps.", [])
    assert [lane["label"] for lane in found["lanes"]] == ["AdamW", "Muon"]
    assert all(lane["step"] == 20 and lane["ms"] > 0 for lane in found["lanes"])
    for name, figure in found["figures"].items():
        assert [trace["name"] for trace in figure["data"]] == ["AdamW", "Muon"], name
    assert found["figures"]["loss"]["data"][0]["x"] == list(range(1, 21))
    json.dumps(found["figures"], allow_nan=False)


def test_rivals_race_as_they_would_alone(make: Callable[..., RaceState]) -> None:
    state = make(rate_muon_pre=2.0, seed=3)
    state.start()
    finish(state)
    assert state.race is not None
    for lane in state.race.read():
        lr = tuned_rates("cnn")[lane["name"]] * (2.0 if lane["name"] == "muon_pre" else 1.0)
        alone = enter("cnn", lane["name"], lr=lr, seed=3, steps=20, small=True)
        assert lane["losses"][1:].tolist() == [alone.advance() for _ in range(20)]


def test_no_rival_is_ever_more_than_one_step_ahead(make: Callable[..., RaceState]) -> None:
    state = make(racers=["adamw", "sgd", "muon_none"], steps=40)
    state.start()
    seen = 0
    while state.active:
        steps = [len(lane["steps"]) for lane in state.race.read()]  # type: ignore[union-attr]
        assert max(steps) - min(steps) <= 1
        seen += 1
        time.sleep(0.002)  # the thread needs the interpreter too
    assert seen > 1


def test_drift_and_change_are_those_of_the_singular_values(make: Callable[..., RaceState]) -> None:
    state = make()
    state.start()
    finish(state)
    state.view.matrix = "conv2.weight"
    figures = state.snapshot()["figures"]
    looks = state.race.read()[1]["spectra"]["conv2.weight"]  # type: ignore[union-attr]
    fresh = (
        enter("cnn", "muon_pre", lr=0.1, seed=0, steps=20, small=True).model.get_parameter("conv2.weight").flatten(1)
    )
    np.testing.assert_allclose(looks[0][1], torch.linalg.svdvals(fresh.detach().double()), rtol=1e-5)
    drift = np.linalg.norm(looks[-1][1] - looks[0][1]) / np.linalg.norm(looks[0][1])
    assert figures["drift"]["data"][1]["y"][-1] == pytest.approx(drift, rel=1e-5)
    assert figures["spectrum"]["data"][1]["y"] == pytest.approx(
        (looks[-1][1] - looks[0][1]).tolist(), rel=1e-5, abs=1e-6
    )


def test_against_seconds_every_rival_has_its_own_clock(make: Callable[..., RaceState]) -> None:
    state = make()
    state.start()
    by_steps = finish(state)["figures"]
    state.view.across = "seconds"
    by_seconds = state.snapshot()["figures"]
    assert by_seconds["loss"]["layout"]["xaxis"]["title"]["text"] == "seconds of training"
    for before, after in zip(by_steps["loss"]["data"], by_seconds["loss"]["data"], strict=True):
        assert after["y"] == before["y"] and 0 < after["x"][0] < after["x"][-1]
    assert by_seconds["loss"]["data"][0]["x"] != by_seconds["loss"]["data"][1]["x"]
    assert by_seconds["spectrum"] is by_steps["spectrum"]


def test_a_look_that_found_nothing_new_makes_no_new_figure(make: Callable[..., RaceState]) -> None:
    state = make()
    state.start()
    first, second = finish(state)["figures"], state.snapshot()["figures"]
    assert all(second[name] is first[name] for name in first)


def test_a_look_decomposes_nothing(make: Callable[..., RaceState], monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    for module, name in [(torch.linalg, "svdvals"), (torch.linalg, "svd"), (race_run, "singular_values")]:
        original = getattr(module, name)

        def guarded(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread(), f"{name} in a look"
            return original(*args, **options)

        monkeypatch.setattr(module, name, guarded)
    state.start()
    while state.active:
        state.snapshot()
    assert state.snapshot()["status"] == "finished"


def test_pause_holds_the_steps_until_resume_and_stop_ends_a_pause(make: Callable[..., RaceState]) -> None:
    state = make(steps=2000)
    state.start()
    until(lambda: state.race.step >= 2, "two steps")  # type: ignore[union-attr]
    state.pause()
    assert state.status == "paused"
    time.sleep(0.4)  # the step under way
    held = state.race.step  # type: ignore[union-attr]
    time.sleep(0.3)
    assert state.race.step == held  # type: ignore[union-attr]
    assert state.sentence == f"Paused after step {held}."
    state.pause(False)
    until(lambda: state.race.step > held, "a step after resuming")  # type: ignore[union-attr]
    state.pause()
    state.stop()
    found = finish(state)
    assert found["status"] == "stopped" and held < state.race.step < 2000  # type: ignore[union-attr]


def test_a_closed_page_races_no_further_and_another_race_can_follow(make: Callable[..., RaceState]) -> None:
    state = make(steps=2000)
    state.start()
    first = state.race
    until(lambda: state.race.step >= 1, "a step")  # type: ignore[union-attr]
    state.start()
    assert state.race is first, "start does nothing while a race is on"
    state.close()
    assert finish(state)["status"] == "stopped"
    state.steps = 20
    state.start()
    assert finish(state)["status"] == "finished"


def test_who_diverges_gives_up_and_the_others_go_on(
    make: Callable[..., RaceState], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthokit_widgets.race_state.tuned_rates", lambda track: {"adamw": 1e-2, "sgd": 1e30})
    state = make(racers=["adamw", "sgd"])
    state.start()
    found = finish(state)
    assert found["status"] == "finished" and found["lanes"][0]["step"] == 20 and found["lanes"][1]["step"] < 20
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith("SGD gave up: loss and gradient must stay finite")
    assert [trace["name"] for trace in found["figures"]["loss"]["data"]] == ["AdamW", "SGD"]
    json.dumps(found["figures"], allow_nan=False)


def test_an_error_of_the_thread_is_told(make: Callable[..., RaceState], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no data")

    monkeypatch.setattr(race_run, "enter", broken)
    state = make()
    state.start()
    found = finish(state)
    assert found["status"] == "failed"
    assert found["problems"] == ["The race failed: RuntimeError: no data"]


@pytest.mark.parametrize("track", ["tinygpt", "cnn"])
def test_every_contestant_can_race_on_every_track(make: Callable[..., RaceState], track: str) -> None:
    state = make(track=track, racers=contestants(), steps=20)
    state.start()
    found = finish(state)
    assert found["status"] == "finished" and found["problems"] == []
    assert len(found["figures"]["drift"]["data"]) == len(contestants())


def test_settings_go_into_an_address_and_come_back() -> None:
    state = RaceState(racers=["lion", "adamw"], rate_lion=4.0, seed=7)
    query = write_query(state)
    assert query == "racers=adamw,lion&seed=7&rate_lion=4"
    again = RaceState()
    assert read_query(again, "?" + query) == [] and again.values() == state.values()
    problems = read_query(again, "racers=adamw,adem&rate_sgd=100")
    assert problems[0].startswith("In the address: Optimizers must be one or more of adamw, sgd")
    assert "SGD must be a number from 0.03125 to 32; got 100." in problems[1]
    assert "got none" in read_query(again, "racers=")[0]
    with pytest.raises(OptionError, match="Steps must be a number from 20 to 2000"):
        RaceState(steps=3)


def test_the_page_shows_rates_of_those_that_race_only() -> None:
    page = RacePage(**SMALL)
    names = [field["name"] for field in page.rates.fields]
    assert names == ["rate_adamw", "rate_muon_pre"]
    assert page.rates.fields[0]["label"] == f"AdamW × {tuned_rates('cnn')['adamw']:g}"
    assert not set(RATES) & {field["name"] for field in page.form.fields}
    page._heard({"set": "racers", "value": ["sgd"]})
    assert [field["name"] for field in page.rates.fields] == ["rate_sgd"]
    page._heard({"set": "racers", "value": []})
    assert "Optimizers must be one or more of" in page.alert.text
    assert page.state.racers == ["sgd"]


def test_the_buttons_of_the_page_start_and_stop(make: Callable[..., RaceState]) -> None:
    page = RacePage(**(SMALL | {"steps": 2000}))
    assert [action["disabled"] for action in page.form.actions] == [False, True, True]
    page._heard({"action": "start"})
    assert page.state.active and "steps" in page.form.disabled and "rate_adamw" in page.rates.disabled
    until(lambda: page.state.race.step >= 1, "a step")  # type: ignore[union-attr]
    page._heard({"action": "stop"})
    assert page.state.worker.join(60)
    page.repaint()
    assert page.status.text.startswith("Stopped after step")
    assert [action["disabled"] for action in page.form.actions] == [False, True, True]
    assert len(page.facts.items) == 2
    page.close()


def test_some_of_several_choices_are_described_for_the_form() -> None:
    field = next(field for field in describe(RaceState()) if field["name"] == "racers")
    assert field["kind"] == "several"
    assert [choice["value"] for choice in field["choices"]] == contestants()


def test_a_race_without_its_page_ends_when_it_is_told() -> None:
    race = LiveRace(track="cnn", rates={"sgd": 0.1}, steps=100_000, seed=0)
    job = type("Job", (), {"cancelled": threading.Event()})()
    thread = threading.Thread(target=race.go, args=(job,))
    thread.start()
    until(lambda: race.step >= 1, "a step")
    job.cancelled.set()
    thread.join(60)
    assert race.status == "stopped" and not thread.is_alive()
