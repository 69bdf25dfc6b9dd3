"""The page "Forgetting" without a browser: what is read from a record, what is said of a run, runs of one's own."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forgetting_evidence as made
import numpy as np
import pytest
import torch
from orthokit_widgets import forgetting_run
from orthokit_widgets.fields import describe, read_query, write_query
from orthokit_widgets.forgetting_charts import layers, short
from orthokit_widgets.forgetting_data import Portrait, Walk, from_rows, points_of, recorded
from orthokit_widgets.forgetting_run import LiveEntry, asked_of, kept_runs, load
from orthokit_widgets.forgetting_state import ForgettingState
from orthokit_widgets.forgetting_view import ForgettingPage
from orthokit_widgets.forgetting_words import explained, facts
from orthokit_widgets.worker import Job

from orthokit.errors import OptionError, RunError
from orthokit.lab.arena import GROUNDS, METHODS
from orthokit.lab.runs import Run, runs

PLACE = GROUNDS[made.GROUND]
CHARTS = ("ways", "profile", "spectrum", "geometry", "weights")


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of evidence with a small record of the arena."""
    return made.write(tmp_path_factory.mktemp("evidence"))


@pytest.fixture
def make(evidence: Path, tmp_path: Path) -> Iterator[Callable[..., ForgettingState]]:
    """States; whatever still trains at the end is stopped."""
    states: list[ForgettingState] = []

    def build(**settings: Any) -> ForgettingState:
        options = {"evidence": evidence, "root": tmp_path / "runs", "small": True, "steps": 5}
        states.append(ForgettingState(**(options | settings)))
        return states[-1]

    yield build
    for state in states:
        state.close()
        assert state.worker.join(60) and state.reader.join(60)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def finish(state: ForgettingState) -> dict[str, Any]:
    assert state.worker.join(120) and state.reader.join(60)
    return state.snapshot()


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in figure["data"] if each["name"] == name)


def at(figure: dict[str, Any]) -> tuple[float, float]:
    """Where the run that is looked at lies."""
    found = trace(figure, "shown")
    return found["x"][0], found["y"][0]


# --- what is recorded


def test_gain_and_forgetting_are_differences_of_losses_from_the_start() -> None:
    rows = [{"step": 10, "target": 2.0, "general": 1.2}, {"step": 0, "target": 3.0, "general": 1.5}]
    steps, points, start = points_of(rows)
    assert steps.tolist() == [0, 10] and start == (3.0, 1.5)
    np.testing.assert_allclose(points, [[0, 0], [1.0, -0.3]])


def test_a_record_gives_every_seed_and_the_mean_of_all(evidence: Path) -> None:
    records, why = recorded(evidence)
    assert not why and list(records) == [made.GROUND]
    record = records[made.GROUND]
    assert {method: list(of) for method, of in record.runs.items()} == {
        method: list(made.SEEDS) for method in made.MEANS
    }
    for method, (gain, forgetting) in made.MEANS.items():
        mean = record.portrait(method, None)
        assert mean is not None and mean.point == pytest.approx((gain, forgetting))
        one = record.portrait(method, 2)
        assert one is not None and one.point == pytest.approx((gain + 0.02, forgetting + 0.02))
        for found in (mean, one):
            for path, walk in found.walks.items():
                assert walk.at(1.0) == pytest.approx(found.point), path
                assert walk.at(0.0) == pytest.approx((0.0, 0.0), abs=1e-12)
    assert record.portrait("oft", 7) is None and record.portrait("vera", None) is None


def test_layers_and_profiles_are_told_to_be_those_of_another_seed(evidence: Path) -> None:
    record = recorded(evidence)[0][made.GROUND]
    one, first = record.portrait("oft", 2), record.portrait("oft", 0)
    assert one is not None and first is not None
    assert one.of_seed == 0 and first.of_seed is None
    assert list(one.layers) == list(made.LAYERS) and list(one.profiles) == list(made.SHOWN)
    assert "raw" not in one.layers["blocks.0.mlp.up"]
    np.testing.assert_allclose(one.profiles[made.SHOWN[0]].retention, 0.97 * one.profiles[made.SHOWN[0]].sigma)


def test_a_run_that_diverged_is_named_and_not_drawn(tmp_path: Path, make: Callable[..., ForgettingState]) -> None:
    frame = made.table()
    frame.loc[(frame["method"] == "lora") & (frame["seed"] == 1) & (frame["step"] == 50), "target"] = math.nan
    (tmp_path / "arena").mkdir()
    frame.to_csv(tmp_path / "arena" / "results.csv", index=False)
    (tmp_path / "arena" / "study.json").write_text("{}")
    state = make(evidence=tmp_path, shown="lora")
    found = state.snapshot()
    assert found["problems"] == ["Not drawn, as their loss is no number any more: LoRA (seed 1)."]
    assert state.param["which"].objects == ["mean", "0", "2"]
    json.dumps(found["figures"], allow_nan=False)


def test_half_a_study_shows_what_there_is(tmp_path: Path, make: Callable[..., ForgettingState]) -> None:
    frame = made.table(after=False)
    frame = frame[~frame["kind"].isin(["path", "profile"])].drop(columns=["alpha", "path", "sigma"])
    (tmp_path / "arena").mkdir()
    frame.to_csv(tmp_path / "arena" / "results.csv", index=False)
    (tmp_path / "arena" / "study.json").write_text("{}")
    found = make(evidence=tmp_path).snapshot()
    assert found["figures"]["geometry"] is not None and found["ways"] == 0
    assert found["figures"]["ways"] is None and found["figures"]["profile"] is None
    assert "What it learnt" in found["reading"] and "rewinding" not in found["reading"]


@pytest.mark.parametrize("damage", ["missing", "no record", "other columns"])
def test_without_evidence_the_page_says_how_to_make_it_and_runs_still_start(
    tmp_path: Path, make: Callable[..., ForgettingState], damage: str
) -> None:
    if damage != "missing":
        (tmp_path / "arena").mkdir()
        (tmp_path / "arena" / "results.csv").write_text("a,b\n1,2\n")
    if damage == "other columns":
        (tmp_path / "arena" / "study.json").write_text("{}")
    state = make(evidence=tmp_path)
    found = state.snapshot()
    told = "orthokit study arena" if damage != "other columns" else "cannot be read"
    assert len(found["problems"]) == 1 and told in found["problems"][0]
    assert found["figures"]["front"] is not None and found["figures"]["ways"] is None
    assert found["reading"] == "No run of OFT is recorded here. Press Start to make one."
    state.start()
    assert finish(state)["status"] == "finished"


@pytest.mark.parametrize("ground", ["tinygpt", "fashion"])
def test_every_method_has_a_rate_to_begin_with(
    ground: str, tmp_path: Path, make: Callable[..., ForgettingState]
) -> None:
    state = make(evidence=tmp_path, ground=ground)
    for method in METHODS:
        state.method = method
        assert state.tuned > 0 and state.can_start


# --- what is shown


def test_the_front_has_every_run_and_a_point_pressed_is_the_one_shown(make: Callable[..., ForgettingState]) -> None:
    state = make()
    figure = state.snapshot()["figures"]["front"]
    assert figure is not None
    pressed = {tuple(data) for each in figure["data"] for data in each.get("customdata", ())}
    assert pressed == {(method, which) for method in made.MEANS for which in ("mean", *map(str, made.SEEDS))}
    line = trace(figure, "front")
    assert (line["x"][1:], line["y"][1:]) == (pytest.approx([0.7, 0.8]), pytest.approx([0.1, 0.3]))
    assert "forgets less: OFT and full fine-tuning." in figure["layout"]["meta"]["caption"]
    state.alpha = 0.3
    state.pick("lora", "2")
    assert (state.shown, state.which, state.alpha) == ("lora", "2", 1.0)
    assert at(state.snapshot()["figures"]["front"]) == pytest.approx((0.62, 0.22))
    state.pick("gone", "2")
    assert state.shown == "lora"


def test_the_slider_moves_the_point_along_its_path_without_computing(
    make: Callable[..., ForgettingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make()
    state.snapshot()
    for module, name in [(torch.linalg, "svdvals"), (torch.linalg, "svd"), (torch.nn.Module, "__call__")]:
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed in a look"))
    seen = []
    for place in range(11):
        state.alpha = place / 10
        found = state.snapshot()["figures"]
        seen.append(at(found["front"]))
        assert found["ways"]["layout"]["meta"]["caption"].startswith(f"At α = {place / 10:.2f}")
    gains, forgettings = np.array(seen).T
    np.testing.assert_allclose(gains, 0.7 * np.linspace(0, 1, 11) ** 0.5, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(forgettings, 0.1 * np.linspace(0, 1, 11), rtol=1e-5, atol=1e-9)
    state.alpha = 0.35  # between two places that were measured
    assert at(state.snapshot()["figures"]["front"])[1] == pytest.approx(0.035)
    state.path = "dense"
    assert at(state.snapshot()["figures"]["front"]) == pytest.approx((0.245, 0.035))


def test_a_method_with_one_way_back_walks_it_whatever_is_chosen(make: Callable[..., ForgettingState]) -> None:
    state = make(shown="lora", path="cayley_linear", alpha=0.5)
    found = state.snapshot()
    assert (found["way"], found["ways"], state.path) == ("dense", 1, "cayley_linear")
    assert at(found["figures"]["front"]) == pytest.approx((0.3, 0.1))


def test_a_look_that_found_nothing_new_makes_no_new_figure(make: Callable[..., ForgettingState]) -> None:
    state = make()
    first, second = state.snapshot()["figures"], state.snapshot()["figures"]
    assert all(second[name] is first[name] for name in first)
    state.alpha = 0.5
    third = state.snapshot()["figures"]
    assert {name for name in first if third[name] is not first[name]} == {"front", "ways"}


def test_every_chart_is_drawn_and_is_json(make: Callable[..., ForgettingState]) -> None:
    for method in made.MEANS:
        found = make(shown=method).snapshot()
        assert all(found["figures"][name] is not None for name in CHARTS)
        json.dumps(found["figures"], allow_nan=False)


def test_the_layer_shown_is_one_of_the_recorded(make: Callable[..., ForgettingState]) -> None:
    state = make()
    state.snapshot()
    assert state.view.param["layer"].objects == list(made.SHOWN)
    state.view.layer = made.SHOWN[0]
    assert made.SHOWN[0] in state.snapshot()["figures"]["profile"]["layout"]["title"]["text"].replace("<br>", " ")
    drift = trace(state.snapshot()["figures"]["profile"], "OFT")["y"]
    assert drift[0] == pytest.approx(0.03)
    assert trace(state.snapshot()["figures"]["profile"], "full fine-tuning")


def test_spectra_without_those_after_are_told_along_the_old_directions(
    tmp_path: Path, make: Callable[..., ForgettingState]
) -> None:
    found = make(evidence=made.write(tmp_path, after=False)).snapshot()["figures"]["spectrum"]
    assert [each["name"] for each in found["data"]] == ["before", "along the old directions"]
    assert (
        found["layout"]["meta"]["caption"] == "As shares of σ₁: along the old directions up to 3 % is no longer done."
    )


def test_names_of_layers_lose_what_all_share() -> None:
    assert short(["encoder.layer.0.q", "encoder.layer.1.q"]) == ["0.q", "1.q"]
    assert short(["head"]) == ["head"]
    assert layers(Portrait("", "oft", (1.0, 0.1), (3.0, 1.0)), of="weights") is None


# --- what is said


def portrait(gain: float, forgetting: float, **more: Any) -> Portrait:
    alphas = np.linspace(0, 1, 11)
    walks = {"dense": Walk(alphas, gain * alphas**0.5, forgetting * alphas)}
    return Portrait("seed 0", "lora", (gain, forgetting), (3.0, 1.5), **({"steps": 50, "walks": walks} | more))


def test_sentences_say_what_the_numbers_are(make: Callable[..., ForgettingState]) -> None:
    said = make().snapshot()["reading"]
    for part in (
        "OFT (blocks of 8, 1\u00a0000 trained numbers), 50 steps at the learning rate 0.004; mean of 3 seeds (its",
        "layers are those of seed 0).",
        "What it learnt: the loss on the new task fell from 3.200 to 2.500 bits per byte.",
        "rose from 1.500 to 1.600 bits per byte of the addresses: 0.143 for every 1 gained.",
        "the weights moved by 10 % of their length and their singular values stayed, as a rotation keeps them.",
        "outputs of its layers moved by 5 % of their length; much of that is one common turn",
        "at α = 0.82 along the path “turn, √α”, 91 % of the gain is kept and 18 % of the forgetting undone.",
    ):
        assert part in said, part


@pytest.mark.parametrize(
    ("gain", "forgetting", "told", "not_told"),
    [
        (1.0, 0.01, "What it forgot is little", "nothing"),
        (1.0, -0.1, "It forgot nothing: the loss on what it could before fell from 1.500 to 1.400", "little"),
        (-0.2, 0.3, "It learnt nothing: the loss on the new task went from 3.000 to 3.200", "rewinding"),
        (1.0, -0.1, "nothing, as nothing was forgotten", "undone"),
    ],
)
def test_odd_outcomes_have_their_own_words(gain: float, forgetting: float, told: str, not_told: str) -> None:
    said = explained(portrait(gain, forgetting), PLACE, path="dense", alpha=1.0)
    assert told in said and not_told not in said.replace(told, "")


def test_a_gain_that_is_larger_on_the_way_is_told() -> None:
    alphas = np.linspace(0, 1, 11)
    over = Walk(alphas, np.where(alphas > 0.75, 0.8, alphas), 0.2 * alphas)
    over.gain[7] = 1.1
    said = explained(portrait(0.8, 0.2, walks={"dense": over}), PLACE, path="dense", alpha=1.0)
    assert "at α = 0.70 the gain is 1.1" in said


def test_numbers_follow_the_slider() -> None:
    found = portrait(1.0, 0.2, diagnostics={"moved": 0.1, "spectrum": 3e-7, "stable_rank": 2.5})
    values = {fact["name"]: fact["value"] for fact in facts(found, PLACE, path="dense", alpha=0.25)}
    assert values["forgot"] == "0.050" and values["weights moved"] == "10 %"
    assert values["σ moved"] == "≈ 0 %" and values["outputs moved"] == "–" and values["rank of ΔW"] == "2.5"
    said = explained(found, PLACE, path="dense", alpha=0.25)
    assert "at α = 0.25, 50 % of the gain is kept and 25 % of the forgetting is left." in said


def test_errors_of_a_classifier_are_told_beside_its_loss() -> None:
    said = explained(portrait(1.0, 0.2, errors=(0.8, 0.15)), GROUNDS["noun"], path="dense", alpha=1.0)
    assert "it is wrong in 15 % of the cases, and was in 80 %" in said


# --- runs of one's own


def test_a_run_from_start_to_end_is_recorded_and_read_back_as_it_was(make: Callable[..., ForgettingState]) -> None:
    state = make(method="oft", seed=3)
    state.start()
    assert state.live is not None and state.shown == state.live.name
    found = finish(state)
    assert (found["status"], found["problems"]) == ("finished", [])
    whole = state.portrait()
    assert whole is not None and whole.trainable and whole.steps == 5
    assert set(whole.walks) == {"cayley_sqrt", "cayley_linear", "dense"}
    assert whole.walks["dense"].at(1.0) == pytest.approx(whole.point, abs=1e-6)
    assert whole.diagnostics["spectrum"] < 1e-4 < whole.diagnostics["moved"]
    for profile in whole.profiles.values():
        assert profile.after is not None
        np.testing.assert_allclose(profile.after, profile.sigma, atol=1e-4 * profile.sigma[0])
    assert all(found["figures"][name] is not None for name in CHARTS)
    name = state.live.name
    again = load(name, state.root)
    assert (again.method, again.lr, again.size, again.trainable) == ("oft", state.tuned, whole.size, whole.trainable)
    assert again.point == pytest.approx(whole.point) and again.diagnostics == pytest.approx(dict(whole.diagnostics))
    assert list(again.layers) and again.layers == {k: pytest.approx(v) for k, v in whole.layers.items()}
    for path, walk in whole.walks.items():
        np.testing.assert_allclose(again.walks[path].gain, walk.gain, atol=1e-6)
    for layer, profile in whole.profiles.items():
        np.testing.assert_allclose(again.profiles[layer].retention, profile.retention, rtol=1e-6, atol=1e-7)
    assert runs(state.root)["status"].tolist() == ["finished"]
    # Another session of the page offers it.
    other = make(shown=name)
    until(lambda: other.portrait() is not None, "the run is read")
    assert f"your run {name}" in other.snapshot()["reading"]
    assert at(other.snapshot()["figures"]["front"]) == pytest.approx(whole.point, abs=1e-5)


def test_a_run_goes_as_one_entered_by_hand(make: Callable[..., ForgettingState]) -> None:
    from orthokit.lab.arena import enter

    state = make(method="lora", rate=2.0, seed=4, shown="full")
    state.start()
    finish(state)
    assert state.live is not None and state.live.asked["lr"] == pytest.approx(2.0 * 4e-3)
    racer = enter("tinygpt", "lora", lr=8e-3, seed=4, steps=5, size=8, small=True)
    losses = [racer.advance() for _ in range(5)]
    steps, recorded_losses = Run.open(state.live.name, root=state.root).series("loss")
    assert steps.tolist() == [1, 2, 3, 4, 5] and recorded_losses.tolist() == losses


def test_the_point_travels_while_it_trains(make: Callable[..., ForgettingState]) -> None:
    state = make(method="full", steps=200)
    state.start()
    until(lambda: (found := state.portrait()) is not None and len(found.travel) > 2, "two judgements")
    state.pause()
    figure = state.snapshot()["figures"]["front"]
    way = trace(figure, "its way")
    assert (way["x"][0], way["y"][0]) == (0, 0) and len(way["x"]) > 2
    assert (way["x"][-1], way["y"][-1]) == at(figure)
    state.stop()
    found = finish(state)
    assert found["status"] == "stopped" and found["figures"]["geometry"] is None
    assert runs(state.root)["status"].tolist() == ["interrupted"]
    assert "What it learnt" in found["reading"] or "It learnt nothing" in found["reading"]


def test_stop_interrupts_a_judgement(make: Callable[..., ForgettingState], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = threading.Event()

    def endless(ground: str, model: torch.nn.Module, small: bool) -> dict[str, float]:
        ids = torch.zeros(1, 4, dtype=torch.long)
        while True:
            calls.set()
            model(ids)

    monkeypatch.setattr(forgetting_run, "judged", endless)
    state = make()
    state.start()
    assert calls.wait(60)
    state.stop()
    assert state.worker.join(30) and state.status == "stopped"
    assert torch.nn.Linear(2, 2)(torch.zeros(2)).shape == (2,), "other threads and later calls are not stopped"


def test_stop_interrupts_the_measuring(make: Callable[..., ForgettingState], monkeypatch: pytest.MonkeyPatch) -> None:
    state = make(method="lora")
    original = forgetting_run.rewound
    monkeypatch.setattr(
        forgetting_run, "rewound", lambda *args, **options: (state.stop(), original(*args, **options))[1]
    )
    state.start()
    assert finish(state)["status"] == "stopped"
    assert state.portrait() is not None and not state.portrait().layers  # type: ignore[union-attr]


def test_a_run_deleted_while_it_trains_is_told_and_another_can_follow(make: Callable[..., ForgettingState]) -> None:
    state = make(method="lora", steps=500)
    state.start()
    until(lambda: state.live.step > 1, "a step")  # type: ignore[union-attr]
    name = state.live.name  # type: ignore[union-attr]
    shutil.rmtree(state.root / name)
    found = finish(state)
    assert found["status"] == "failed"
    assert any(name in told and "is gone: it was deleted" in told for told in found["problems"])
    state.steps = 5
    state.start()
    assert finish(state)["status"] == "finished"


def test_a_run_deleted_while_it_is_shown_is_told_and_offered_no_more(make: Callable[..., ForgettingState]) -> None:
    first = make(method="lora")
    first.start()
    finish(first)
    name = first.live.name  # type: ignore[union-attr]
    other = make(shown=name)
    until(lambda: other.portrait() is not None, "the run is read")
    other.snapshot()
    shutil.rmtree(other.root / name)
    for state in (first, other):
        found = state.snapshot()
        assert found["problems"] == [f"The run {name} was deleted while it was shown; it is offered no more."]
        assert state.shown in METHODS and name not in state.param["shown"].objects
        assert found["figures"]["front"] is not None and "What it learnt" in found["reading"]


def test_a_damaged_run_is_told_and_the_others_are_read(make: Callable[..., ForgettingState]) -> None:
    first = make(method="lora")
    first.start()
    finish(first)
    good = first.live.name  # type: ignore[union-attr]
    shutil.copytree(first.root / good, first.root / "broken")
    (first.root / "broken" / "run.sqlite").write_bytes(b"no database")
    other = make(shown="broken")
    found = finish(other)
    assert len(found["problems"]) == 1 and "run.sqlite" in found["problems"][0]
    assert "cannot be read" in found["reading"]
    assert trace(found["figures"]["front"], "your runs")["customdata"] == [[good, "mean"]]
    other.pick(good, "mean")
    assert other.snapshot()["facts"]


def test_only_runs_of_the_arena_are_offered(tmp_path: Path) -> None:
    Run.create("other", root=tmp_path, config={"page": {}}).close()
    (tmp_path / "file").write_text("")
    assert kept_runs(tmp_path) == {} and kept_runs(tmp_path / "nowhere") == {}
    assert asked_of(tmp_path / "other") is None
    asked = {"ground": "tinygpt", "method": "oft", "lr": 1e-3, "steps": 5, "seed": 0}
    Run.create("mine", root=tmp_path, config={"arena": asked}).close()
    assert kept_runs(tmp_path) == {"mine": asked}
    with pytest.raises(RunError, match="no judged step"):
        load("mine", tmp_path)


def test_a_method_whose_package_is_missing_fails_in_words(
    make: Callable[..., ForgettingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orthokit.errors import MissingExtraError

    def refuse(*_: Any, **__: Any) -> None:
        raise MissingExtraError("VeRA comes from the package peft, which is not installed.")

    monkeypatch.setattr(forgetting_run, "enter", refuse)
    state = make(method="vera")
    state.start()
    found = finish(state)
    assert found["status"] == "failed" and "which is not installed" in found["problems"][-1]
    assert runs(state.root).empty


def test_start_does_nothing_while_a_run_is_on(make: Callable[..., ForgettingState]) -> None:
    state = make(steps=500)
    state.start()
    first = state.live
    state.start()
    assert state.live is first
    state.close()
    assert finish(state)["status"] == "stopped"


def test_a_closed_page_trains_no_further(make: Callable[..., ForgettingState]) -> None:
    state = make(steps=500)
    state.start()
    until(lambda: state.live.step >= 1, "a step")  # type: ignore[union-attr]
    state.close()
    assert finish(state)["status"] == "stopped"


def test_a_run_without_its_page_ends_when_it_is_told(tmp_path: Path) -> None:
    entry = LiveEntry("tinygpt", "lora", lr=1e-3, steps=500, seed=0, root=tmp_path, small=True)
    job = Job("run", entry.go)
    thread = threading.Thread(target=entry.go, args=(job,))
    thread.start()
    until(lambda: entry.step >= 1, "a step")
    job.cancelled.set()
    thread.join(60)
    assert entry.status == "stopped" and not thread.is_alive()


# --- settings and the page


def test_settings_make_the_address_and_come_back(make: Callable[..., ForgettingState]) -> None:
    state = make(shown="lora", which="1", alpha=0.35, method="hra", rate=2.0, steps=60, seed=7)
    query = write_query(state)
    assert query == "shown=lora&which=1&alpha=0.35&method=hra&rate=2&steps=60&seed=7"
    again = make(steps=50)
    assert read_query(again, query) == [] and again.values() == state.values()
    problems = read_query(make(), "alpha=2&which=9&shown=gone")
    assert [text for text in problems if "Rewind α must be a number from 0 to 1; got 2" in text]
    assert len(problems) == 3
    with pytest.raises(OptionError, match="Steps must be a number from 5 to 500"):
        make(steps=3)


def test_methods_that_are_not_recorded_are_offered_as_such(make: Callable[..., ForgettingState]) -> None:
    words = {c["value"]: c["label"] for f in describe(make()) if f["name"] == "shown" for c in f["choices"]}
    assert words["oft"] == "OFT" and words["vera"] == "VeRA, not recorded"


def test_the_page_shows_picks_starts_and_stops(evidence: Path, tmp_path: Path) -> None:
    page = ForgettingPage(evidence=evidence, root=tmp_path, small=True, steps=500)
    assert [action["disabled"] for action in page.entry.actions] == [False, True, True]
    assert [field["name"] for field in page.form.fields] == ["ground", "shown", "which", "path", "alpha"]
    assert page.entry.fields[1]["label"] == "Learning rate × 0.004"
    page._heard({"pick": ["lora", "1"]})
    assert page.state.which == "1" and page.form.values["shown"] == "lora"
    assert page.form.disabled == ["path"] and page.reading.text.startswith("LoRA")
    page._heard({"set": "alpha", "value": "0.5"})
    assert json.loads(page.charts["front"].figure)["data"][-1]["x"] == [pytest.approx(0.3)]
    page._heard({"action": "start"})
    assert page.state.active and page.entry.disabled == ["method", "rate", "steps", "seed"]
    until(lambda: page.state.live.step >= 1, "a step")  # type: ignore[union-attr]
    assert page.state.live is not None
    page._heard({"action": "stop"})
    assert page.state.worker.join(60)
    page.repaint()
    assert page.status.text.startswith("Stopped after step")
    page.close()


def test_rows_of_paths_that_are_not_known_are_passed_over() -> None:
    rows = [{"path": "spiral", "alpha": 0.5, "target": 1.0, "general": 1.0}]
    found = from_rows(portrait(1.0, 0.1), paths=rows)
    assert not found.walks and found.marks["spiral"] == (2.0, -0.5)
