"""The page "Merge" without a browser: what is kept, measured, said and saved, and what is refused."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import merge_evidence as made
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from orthokit_widgets import merge_data, merge_options, merge_run
from orthokit_widgets.fields import describe, read, read_query, write_query
from orthokit_widgets.merge_charts import recorded_ranking
from orthokit_widgets.merge_data import BASE, RETAINED, SCALES, Grid, Shelf, Store, available, recorded
from orthokit_widgets.merge_state import WEIGHTS, MergeState
from orthokit_widgets.merge_view import MergePage
from safetensors.torch import load

from orthokit.errors import MissingExtraError, OptionError
from orthokit.lab import FAMILIES, expert_scores, family_base, family_retention, train_expert
from orthokit.merging import merge, merge_line, methods
from orthokit.merging.tuning import SPACES

STEPS = 2
FAMILY = "pictures"
TASKS = tuple(FAMILIES[FAMILY].tasks)
PAIR = ["footwear", "low digits"]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of evidence with a small record of merging."""
    return made.write(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def store() -> Store:
    """What the tests share: experts of two steps."""
    return Store()


def quick_scores(family: str, trunk: Any, experts: Any, *, part: str, small: bool) -> dict[str, float]:
    """Stands for the judging of a model, which takes most of a run."""
    rows = trunk["blocks.0.attn.q.weight"]
    return {task: float(rows[list(TASKS).index(task)].mean()) + merge_data.PARTS.index(part) for task in experts}


def quick_retention(family: str, trunk: Any, *, small: bool) -> float:
    return float(trunk["blocks.0.attn.q.weight"].std())


@pytest.fixture
def judged(evidence: Path, store: Store) -> Iterator[Callable[..., MergeState]]:
    """States; whatever still works at the end is stopped."""
    states: list[MergeState] = []

    def build(**settings: Any) -> MergeState:
        options = {"evidence": evidence, "store": store, "small": True, "steps": STEPS}
        states.append(MergeState(**(options | settings)))
        return states[-1]

    yield build
    for state in states:
        state.close()
        assert state.worker.join(60) and state.exporter.join(60)


@pytest.fixture
def fresh(store: Store) -> Store:
    """The shared experts, of which nothing is merged."""
    own = Store()
    own.experts, own.layers, own.statistics = store.experts, store.layers, store.statistics
    return own


@pytest.fixture
def make(judged: Callable[..., MergeState], fresh: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MergeState]:
    """States whose models are judged by :func:`quick_scores`."""
    monkeypatch.setattr(merge_run, "expert_scores", quick_scores)
    monkeypatch.setattr(merge_run, "family_retention", quick_retention)
    return lambda **settings: judged(**({"store": fresh} | settings))


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)


def finish(state: MergeState) -> dict[str, Any]:
    assert state.worker.join(120)
    return state.snapshot()


# --- options


def test_every_option_of_every_method_is_a_setting_or_left_out_on_purpose() -> None:
    for name, spec in methods().items():
        offered = set(merge_options.OPTIONS[name])
        assert set(spec.options) - offered <= merge_options.LEFT_OUT, name
    settings = merge_options.SETTINGS
    assert len(settings) == len(set(settings)) == sum(map(len, merge_options.OPTIONS.values()))


def test_the_ranges_of_the_tuner_are_those_of_the_sliders() -> None:
    state = MergeState()
    for name, space in SPACES.items():
        for option, values in space.items():
            if option == "scale":
                assert SCALES[0] <= values[0] and values[1] <= SCALES[-1]
            elif isinstance(values[0], str):
                assert set(values) <= set(state.param[f"{name}_{option}"].objects)
            else:
                assert state.param[f"{name}_{option}"].bounds == values[:2]


def test_whatever_a_control_can_say_is_taken_by_its_method() -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(6, 4, generator=g)}
    experts = [{"w": base["w"] + 0.1 * torch.randn(6, 4, generator=g)} for _ in range(2)]
    gram = torch.eye(4, dtype=torch.float64)
    known = {"grams": gram, "fishers": torch.ones(6, 4), "second_moments": torch.ones(6, 4)}
    state = MergeState()
    for name, spec in methods().items():
        more: dict[str, Any] = {"statistics": [{"w": known[spec.statistics]}] * 2} if spec.statistics else {}
        if name == "metrics_weighted":
            more["losses"] = [1.0, 2.0]
        for option, setting in merge_options.OPTIONS[name].items():
            parameter = state.param[setting]
            for value in getattr(parameter, "objects", None) or parameter.bounds:
                own = {**merge_options.option_values(state, name), option: value}
                merged = merge(base, experts, method=name, **own, **more)
                assert merged["w"].isfinite().all(), (name, own)


def test_options_without_effect_are_told(make: Callable[..., MergeState]) -> None:
    state = make(method="orthomerge")
    assert merge_options.idle_options(state, "orthomerge") == ["orthomerge_threshold"]
    state.orthomerge_target = "conflict"  # type: ignore[attr-defined]
    assert merge_options.idle_options(state, "orthomerge") == []


# --- what is kept


def test_a_grid_answers_exactly_where_it_was_measured_and_straight_between() -> None:
    grid = Grid()
    assert grid.at(0.5, "test") == ({}, ())
    for index, value in ((4, 1.0), (8, 3.0)):
        grid.found["test", index] = {"a": value, "b": -value}
        assert grid.lacks("test", index) == [RETAINED]
        grid.found[RETAINED, index] = {RETAINED: 10 * value}
    assert grid.at(0.5, "test") == ({"a": 1.0, "b": -1.0, RETAINED: 10.0}, (0.5,))
    scores, between = grid.at(0.625, "test")
    assert between == (0.5, 1.0) and scores == pytest.approx({"a": 1.5, "b": -1.5, RETAINED: 15.0})
    for outside in (0.475, 1.025):
        assert grid.at(outside, "test") == ({}, ())
    assert grid.at(0.5, "validation") == ({}, ())


@given(st.dictionaries(st.integers(0, len(SCALES) - 1), st.floats(-5, 5), min_size=1), st.floats(0, 2))
def test_answers_between_lie_between(points: dict[int, float], scale: float) -> None:
    found: dict[tuple[str, int], dict[str, float]] = {("test", i): {"a": value} for i, value in points.items()}
    grid = Grid(found | {(RETAINED, i): {RETAINED: 0.0} for i in points})
    scores, between = grid.at(scale, "test")
    if between:
        ends = [points[SCALES.index(one)] for one in between]
        assert min(ends) - 1e-9 <= scores["a"] <= max(ends) + 1e-9
        assert between[0] <= scale <= between[-1]
    else:
        assert all(SCALES[i] > scale for i in points) or all(SCALES[i] < scale for i in points)


def test_a_shelf_drops_what_was_used_longest_ago_and_never_the_newest() -> None:
    shelf: Shelf[int] = Shelf(10, size=lambda one: one)
    for key, size in (("a", 4), ("b", 5)):
        shelf.put(key, size)
    assert shelf.get("a") == 4
    shelf.put("c", 3)
    assert (shelf.get("a"), shelf.get("b"), shelf.get("c")) == (4, None, 3)
    shelf.put("d", 50)
    assert (shelf.get("a"), shelf.get("c"), shelf.get("d")) == (None, None, 50)


def test_what_two_want_at_once_is_made_once() -> None:
    shelf: Shelf[object] = Shelf(4)
    begun, go, calls, found = threading.Event(), threading.Event(), [], []

    def slow() -> object:
        calls.append(1)
        begun.set()
        assert go.wait(60)
        return object()

    def want() -> None:
        found.append(shelf.made("x", slow, look=lambda: None))

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1 and len(found) == 3 and len(set(map(id, found))) == 1


def test_who_waits_can_give_up_and_takes_over_from_one_who_failed() -> None:
    shelf: Shelf[int] = Shelf(4)
    begun, go = threading.Event(), threading.Event()

    def fails() -> int:
        begun.set()
        assert go.wait(60)
        raise OptionError("given up")

    def first() -> None:
        with pytest.raises(OptionError, match="given up"):
            shelf.made("x", fails, look=lambda: None)

    def look() -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with pytest.raises(KeyboardInterrupt):
        shelf.made("x", lambda: 1, look=look)
    go.set()
    assert shelf.made("x", lambda: 2, look=lambda: None) == 2
    thread.join(60)
    assert not shelf._making


# --- the record


def test_the_record_is_read_with_intervals_and_tuned_options(evidence: Path) -> None:
    found, why = recorded(evidence)
    assert not why and set(found) == set(made.BASE)
    of = found[FAMILY]
    assert [entry.name for entry in of.entries.values()] == sorted(made.GAINS, key=lambda name: -made.GAINS[name])
    mean, low, high = next(iter(of.entries.values())).scores["average"]
    assert mean == pytest.approx(made.BASE[FAMILY] + made.GAINS["iso_c"]) and low < mean < high
    assert of.references[BASE]["average"][0] == pytest.approx(made.BASE[FAMILY])
    assert of.references["experts"]["average"][0] == pytest.approx(made.BASE[FAMILY] + made.EXPERTS)


def test_the_recorded_chart_shows_its_lines_whole_and_one_seed_without_interval(evidence: Path) -> None:
    of = recorded(evidence)[0][FAMILY]
    figure = recorded_ranking(of, FAMILY, yours=0.99, label="here")
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < made.BASE[FAMILY] and high > 0.99 and "3 seeds" in figure["layout"]["meta"]["caption"]
    alone = {
        label: replace(
            entry, seeds=1, scores={name: (mean, np.nan, np.nan) for name, (mean, *_) in entry.scores.items()}
        )
        for label, entry in of.entries.items()
    }
    figure = recorded_ranking(replace(of, entries=alone), FAMILY, yours=None, label="")
    assert "one seed" in figure["layout"]["meta"]["caption"]
    json.dumps(figure, allow_nan=False)


def test_without_a_record_the_page_says_so_and_merging_works(tmp_path: Path, make: Callable[..., MergeState]) -> None:
    state = make(evidence=tmp_path, experts=PAIR, method="linear")
    assert "orthokit study merging" in state.unrecorded
    assert state.snapshot()["figures"]["recorded"] is None
    state.start()
    assert finish(state)["scores"]


def test_a_damaged_record_is_told(tmp_path: Path, make: Callable[..., MergeState]) -> None:
    (tmp_path / "merging").mkdir()
    (tmp_path / "merging" / "results.csv").write_text("kind,family\ntuned,pictures\n")
    (tmp_path / "merging" / "study.json").write_text("{}")
    assert "cannot be read" in make(evidence=tmp_path).unrecorded


def test_a_family_that_is_not_recorded_is_told(tmp_path: Path, make: Callable[..., MergeState]) -> None:
    state = make(evidence=made.write(tmp_path, families=("language",)))
    assert "Nothing is recorded of the experts of ViT" in state.unrecorded
    state.family = "language"
    assert not state.unrecorded and state.snapshot()["figures"]["recorded"] is not None


def test_a_point_of_the_record_brings_its_method_and_options(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, weight_1=0.5)
    labels = {entry.name: label for label, entry in recorded_of(state).items()}
    state.pick(labels["ties"])
    assert (state.method, state.scale, dict(state.asked.options)["density"]) == ("ties", 0.75, 0.5)
    assert state.experts == list(TASKS) and state.asked.weights == (1.0, 1.0, 1.0)
    state.pick(labels["orthomerge conflict ties"])
    own = dict(state.asked.options)
    assert (state.method, state.scale, own["target"], own["residual"]) == ("orthomerge", 1.25, "conflict", "ties")
    state.pick("nothing of that name")
    assert state.method == "orthomerge"


def test_recorded_options_out_of_range_are_told_and_nothing_changes(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR)
    before = state.values()
    (label,) = (label for label, entry in recorded_of(state).items() if entry.name == "ties")
    entry = recorded_of(state)[label]
    entries = {**recorded_of(state), label: replace(entry, tuned={0: {"density": 7.0}})}
    state._records = {FAMILY: replace(state._records[FAMILY], entries=entries)}
    state.pick(label)
    assert state.values() == before and "Density kept must be a number" in state.snapshot()["problems"][0]


def recorded_of(state: MergeState) -> Any:
    assert state.record is not None
    return state.record.entries


# --- merging


def test_nothing_is_trained_before_the_button_is_pressed(make: Callable[..., MergeState]) -> None:
    state = make(store=Store())
    found = state.snapshot()
    assert found["status"] == "ready" and state.run is None and state.worker.job is None
    assert found["figures"]["recorded"] is not None
    assert all(found["figures"][name] is None for name in ("tasks", "retained", "scales", "rotations", "conflicts"))
    state.method = "ties"
    assert state.run is None


def test_scores_are_those_of_a_merge_by_hand(judged: Callable[..., MergeState]) -> None:
    state = judged(experts=PAIR, method="ties", ties_density=0.5, weight_1=0.5, part="test", scale=0.75)
    state.start()
    found = finish(state)
    assert found["status"] == "finished" and found["between"] == (0.75,)
    experts = {task: train_expert(FAMILY, task, seed=0, steps=STEPS, small=True) for task in PAIR}
    options: dict[str, Any] = {"method": "ties", "density": 0.5, "weights": [0.5, 1.0]}
    line = merge_line(family_base(FAMILY, small=True), [expert.trunk for expert in experts.values()], **options)
    wanted = expert_scores(FAMILY, line.at(0.75), experts, part="test", small=True)
    assert found["scores"] == wanted | {RETAINED: family_retention(FAMILY, line.at(0.75), small=True)}
    kept = state.store.experts.get(state.asked.expert("footwear"))
    assert kept is not None, "the expert is kept"
    for name, tensor in experts["footwear"].trunk.items():
        assert torch.equal(kept.trunk[name], tensor), "watching an operation must not change its result"


def test_the_slider_starts_nothing_and_says_where_its_answer_comes_from(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="linear")
    state.start()
    finish(state)
    run, ends = state.run, []
    for scale in (0.25, 0.375):
        state.scale = scale
        found = state.snapshot()
        assert found["between"] == (scale,) and "(measured;" in found["reading"]
        ends.append(found["scores"])
    state.scale = 0.3
    found = state.snapshot()
    assert found["between"] == (0.25, 0.375) and "between 0.25 and 0.375, which were measured" in found["reading"]
    for task, value in found["scores"].items():
        assert value == pytest.approx(0.6 * ends[0][task] + 0.4 * ends[1][task])
    assert state.run is run and state.worker.job is None


@pytest.mark.parametrize("method", list(methods()))
def test_every_method_merges(make: Callable[..., MergeState], method: str) -> None:
    state = make(experts=PAIR, method=method)
    state.start()
    until(lambda: bool(state.snapshot()["between"]) or not state.active, "an answer")
    found = state.snapshot()
    assert found["between"] and not found["problems"], found["problems"]
    assert set(found["scores"]) == {*PAIR, RETAINED}


def test_every_chart_is_drawn_and_is_json(make: Callable[..., MergeState]) -> None:
    state = make(method="linear", part="test", scale=0.3)
    state.start()
    found = finish(state)
    for name, figure in found["figures"].items():
        assert figure is not None, name
        json.dumps(figure, allow_nan=False)
    assert "thick: here, seed 0" in found["figures"]["recorded"]["layout"]["meta"]["caption"]
    assert len(found["figures"]["rotations"]["data"][0]["y"]) == len(TASKS)
    assert len(found["reading"].splitlines()) == 3
    assert {fact["value"] for fact in found["facts"]}.isdisjoint({"…"})


def test_a_look_that_found_nothing_new_makes_no_new_figure(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="linear")
    state.start()
    before, after = finish(state)["figures"], state.snapshot()["figures"]
    assert all(before[name] is after[name] for name in before)


def test_conflicts_and_rotations_are_those_that_orthomerge_reports(make: Callable[..., MergeState]) -> None:
    state = make(method="linear")
    state.start()
    finish(state)
    trunks = [train_expert(FAMILY, task, seed=0, steps=STEPS, small=True).trunk for task in TASKS]
    base = family_base(FAMILY, small=True)
    rows = state.store.layers.get(state.asked.crew)
    assert rows
    for target, key in (("global", "rotation_fraction"), ("conflict", "conflict_share")):
        report = merge(base, trunks, method="orthomerge", target=target).report
        wanted = {row["name"]: row[key] for row in report.rows}
        for row in rows:
            shares = [np.searchsorted(one, 0.0) / len(one) for one in row["cosines"]]
            assert (row[key] if target == "global" else shares) == pytest.approx(wanted[row["name"]])


def test_changes_are_followed_after_the_button_and_old_grids_are_kept(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(*given: Any, part: str, **options: Any) -> Any:
        calls.append(part)
        return quick_scores(*given, part=part, **options)

    monkeypatch.setattr(merge_run, "expert_scores", counted)
    state = make(experts=PAIR, method="linear", weight_2=0.35)
    state.start()
    first = finish(state)["scores"]
    state.method = "task_arithmetic"
    assert state.active or state.status == "finished"
    second = finish(state)
    assert second["status"] == "finished" and second["scores"] != first
    calls.clear()
    state.method = "linear"
    assert finish(state)["scores"] == first and not calls
    state.part = "test"
    finish(state)
    assert set(calls) == {"test"}


def test_a_merge_that_broke_the_model_is_told_as_no_number(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_run, "family_retention", lambda *_, **__: float("nan"))
    state = make(experts=PAIR, method="linear")
    state.start()
    found = finish(state)
    assert found["status"] == "finished" and "no number is left" in found["reading"]
    json.dumps(found["figures"], allow_nan=False)


def test_another_half_of_the_examples_measures_no_retention_anew(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make(experts=PAIR, method="linear", weight_2=0.4)
    state.start()
    finish(state)

    def never(*_: Any, **__: Any) -> float:
        raise AssertionError("measured already")

    monkeypatch.setattr(merge_run, "family_retention", never)
    state.part = "test"
    assert finish(state)["status"] == "finished"


def test_the_charts_keep_the_merge_before_until_there_is_an_answer(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make(experts=PAIR, method="linear")
    state.start()
    before = finish(state)
    hold = threading.Event()

    def held(*given: Any, **options: Any) -> Any:
        assert hold.wait(60)
        return merge_line(*given, **options)

    monkeypatch.setattr(merge_run, "merge_line", held)
    state.weight_1 = 0.15
    found = state.snapshot()
    assert found["figures"]["tasks"] is before["figures"]["tasks"] and "merge before" in found["sentence"]
    hold.set()
    found = finish(state)
    assert "merge before" not in found["sentence"] and found["figures"]["tasks"] is not before["figures"]["tasks"]


def test_another_seed_waits_for_the_button(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="linear")
    state.start()
    finish(state)
    state.seed = 91
    assert not state.following and state.status == "ready" and state.sentence == "Ready: press Train and merge."
    state.seed = 0
    assert state.status == "finished"


def test_another_family_waits_for_the_button(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="linear")
    state.start()
    finish(state)
    run = state.run
    state.family = "language"
    assert not state.following and state.status == "ready" and state.run is run and not state.active


# --- stopping


def test_stop_ends_a_training_and_keeps_no_half_an_expert(make: Callable[..., MergeState]) -> None:
    state = make(experts=["footwear"], method="linear", steps=100_000)
    state.start()
    until(lambda: state.run is not None and state.run.step > 2, "a step")
    state.stop()
    assert state.worker.join(60) and state.status == "stopped" and state.run is not None and state.run.stop_ms > 0
    assert state.store.lacking(state.asked) == ["footwear"] and not state.active


@pytest.mark.parametrize("where", ["family_retention", "merge_line"])
def test_stop_interrupts_whatever_calls_torch(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    begun = threading.Event()

    def endless(*_: Any, **__: Any) -> Any:
        while True:
            torch.ones(3).sum()
            begun.set()

    monkeypatch.setattr(merge_run, where, endless)
    state = make(experts=PAIR, method="linear", weight_1=0.65 if where == "merge_line" else 0.7, store=Store())
    state.start()
    assert begun.wait(120)
    state.stop()
    assert state.worker.join(60) and state.status == "stopped"


def test_stop_before_the_thread_began_is_heard(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="linear", store=Store())
    state.start()
    state.stop()
    assert state.worker.join(60)
    assert state.status == "stopped" and state.store.lacking(state.asked) == PAIR


def test_many_changes_at_once_end_with_the_last(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="linear")
    state.start()
    for weight in np.arange(0.05, 1.0, 0.1).round(2):
        state.weight_1 = float(weight)
    found = finish(state)
    assert found["status"] == "finished" and state.asked.weights == (0.95, 1.0) and found["between"]


def test_a_failure_is_told_and_another_start_can_follow(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(merge_run, "merge_line", broken)
        state = make(experts=PAIR, method="linear", weight_1=0.85)
        state.start()
        found = finish(state)
    assert found["status"] == "failed" and "RuntimeError: out of memory" in found["problems"][0]
    state.start()
    assert finish(state)["status"] == "finished" and not state.snapshot()["problems"]


def test_two_visitors_share_experts_and_do_not_disturb_each_other(
    make: Callable[..., MergeState], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def counted(family: str, task: str, **options: Any) -> Any:
        trained.append(task)
        return train_expert(family, task, **options)

    monkeypatch.setattr(merge_run, "train_expert", counted)
    shared = Store()
    one = make(store=shared, experts=PAIR, method="linear")
    other = make(store=shared, experts=list(TASKS), method="ties", scale=0.5)
    one.start()
    other.start()
    first, second = finish(one), finish(other)
    assert sorted(trained) == sorted(TASKS)
    assert first["status"] == second["status"] == "finished"
    assert set(first["scores"]) == {*PAIR, RETAINED} and set(second["scores"]) == {*TASKS, RETAINED}
    one.stop()
    assert other.snapshot()["status"] == "finished" and other.scale == 0.5


def test_one_who_stops_leaves_the_training_to_the_other(make: Callable[..., MergeState]) -> None:
    shared = Store()
    one, other = (make(store=shared, experts=["footwear"], method="linear", steps=40) for _ in range(2))
    one.start()
    until(lambda: one.run is not None and one.run.step > 0, "a step")
    other.start()
    one.stop()
    assert one.worker.join(60) and one.status == "stopped"
    assert finish(other)["status"] == "finished"


# --- what does not go together


def test_no_expert_is_a_sentence() -> None:
    with pytest.raises(OptionError, match="Experts merged must be one or more of footwear, low digits"):
        read(MergeState(), "experts", [])


def test_slerp_of_three_is_a_sentence_and_two_are_followed(make: Callable[..., MergeState]) -> None:
    state = make(method="slerp")
    state.start()
    assert state.run is None and not state.can_export
    (told,) = state.snapshot()["problems"]
    assert "merges exactly 2 experts; got 3" in told and state.status == "refused"
    state.experts = ["footwear"]
    assert "got 1" in state.snapshot()["problems"][0]
    state.experts = PAIR
    state.start()
    found = finish(state)
    assert not found["problems"] and found["scores"] and state.asked.weights is None


def test_a_change_that_does_not_go_together_ends_what_is_going_on(make: Callable[..., MergeState]) -> None:
    state = make(method="linear")
    state.start()
    state.method = "slerp"
    assert state.worker.join(60) and state.status == "refused"
    state.method = "linear"
    assert finish(state)["status"] == "finished"


def test_weights_that_are_all_nought_are_a_sentence(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="task_arithmetic", weight_1=0.0, weight_2=0.0)
    assert "all 0" in state.snapshot()["problems"][0]
    state.start()
    assert state.run is None
    state.weight_2 = 0.5
    assert not state.snapshot()["problems"]


def test_bad_values_in_the_address_are_told_and_the_rest_is_taken() -> None:
    state = MergeState()
    query = "?scale=9&method=tie&experts=nobody&ties_density=x&seed=-1&weight_1=nan&part=train&weight_2=0.5&family=cats"
    problems = read_query(state, query)
    assert len(problems) == 8 and all(problem.startswith("In the address: ") for problem in problems)
    assert state.weight_2 == 0.5 and state.method == "orthomerge" and state.experts == list(TASKS)


def test_settings_make_the_address_and_come_back() -> None:
    state = MergeState(family="language", experts=["definitions"], method="ties", ties_density=0.5, scale=0.725)
    state.set({"part": "test", "value": "changes", "below": 0.35, "seed": 3, "ties_normalize": "False"})
    again = MergeState()
    assert read_query(again, write_query(state)) == []
    assert again.values() == state.values()
    assert write_query(MergeState()) == ""


def test_another_family_brings_its_experts_and_equal_weights(make: Callable[..., MergeState]) -> None:
    state = make(experts=["footwear"], weight_1=0.5)
    state.family = "language"
    assert state.experts == list(FAMILIES["language"].tasks)
    assert state.weights == dict(zip(WEIGHTS, state.experts, strict=False)) and state.asked.weights == (1.0, 1.0)
    assert max(len(family.tasks) for family in FAMILIES.values()) <= len(WEIGHTS)


def test_texts_are_offered_where_their_model_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MissingExtraError("not installed")

    monkeypatch.setattr(merge_data, "sentence_files", missing)
    assert available() == [name for name in FAMILIES if name != "texts"]
    state = MergeState()
    assert "texts" not in state.param["family"].objects and state.param["family"].doc
    assert "must be one of pictures, language" in read_query(state, "family=texts")[0]


# --- the file


def test_the_file_holds_the_merged_model_and_how_it_was_made(make: Callable[..., MergeState]) -> None:
    state = make(experts=PAIR, method="task_arithmetic", scale=0.3, weight_1=0.55)
    state.export()
    assert state.exporter.job is None, "nothing is merged yet"
    state.start()
    finish(state)
    state.export()
    assert state.exporter.join(60) and state.file is not None
    assert state.file.name == "pictures-task_arithmetic-footwear+low-digits-scale-0.3.safetensors"
    found = load(state.file.content)
    trunks = [train_expert(FAMILY, task, seed=0, steps=STEPS, small=True).trunk for task in PAIR]
    options: dict[str, Any] = {"method": "task_arithmetic", "scale": 0.3, "weights": [0.55, 1.0]}
    wanted = merge(family_base(FAMILY, small=True), trunks, **options)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)
    length = int.from_bytes(state.file.content[:8], "little")
    told = json.loads(json.loads(state.file.content[8 : 8 + length])["__metadata__"]["merge"])
    assert (told["method"], told["experts"], told["scale"]) == ("task_arithmetic", PAIR, 0.3)


def test_a_merge_that_is_kept_no_more_is_made_anew_for_its_file(make: Callable[..., MergeState]) -> None:
    own = Store()
    state = make(experts=["footwear"], method="linear", store=own)
    state.start()
    finish(state)
    state.export()
    assert state.exporter.join(60) and state.file is not None
    before = load(state.file.content)
    own.lines, own.experts = Store().lines, Store().experts
    state.export()
    assert state.exporter.join(60) and state.file is not None
    after = load(state.file.content)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


# --- the page


def test_the_page_merges_stops_saves_and_refuses(evidence: Path, fresh: Store, make: Any) -> None:
    page = MergePage(evidence=evidence, store=fresh, small=True, steps=STEPS, experts=PAIR, method="linear")
    state = page.state
    assert "Ready" in page.status.text and page.download.disabled
    labels = [field["label"] for field in page.forms["how"].fields]
    assert labels == ["Divide by the weights", "Weight of footwear", "Weight of low digits"]
    page._heard({"action": "start"})
    assert state.worker.join(120)
    page.repaint()
    assert page.status.text == f"Up to date: all {len(SCALES)} scales measured." and not page.download.disabled
    assert [action["label"] for action in page.forms["who"].actions] == ["Merge", "Stop"]
    page.forms["who"]._handle_msg({"set": "experts", "value": [], "count": 3})
    assert "must be one or more of" in page.alert.text and state.experts == PAIR
    assert page.forms["who"].settled == 3, "the browser must tick it again"
    page._heard({"set": "method", "value": "slerp"})
    assert state.worker.join(120)
    assert [field["name"] for field in page.forms["how"].fields] == ["slerp_t"]
    page._fetched({"action": "export"})
    assert state.exporter.join(60)
    page.repaint()
    offer = page.download.offer
    pieces = []
    for index in range(offer["pieces"]):
        page._fetched({"piece": index, "of": offer["token"]})
        assert page.download.piece["index"] == index
        pieces.append(base64.b64decode(page.download.piece["data"]))
    assert load(b"".join(pieces)).keys() == family_base(FAMILY, small=True).keys()
    page._fetched({"saved": offer["token"]})
    page._fetched({"piece": 0, "of": offer["token"]})
    assert page.download.piece["data"] == ""
    page.close()
    assert state.worker.join(60)


def test_every_setting_has_a_control_on_the_page() -> None:
    page = MergePage(store=Store())
    shown: set[str] = set()
    for method in methods():
        page._heard({"set": "method", "value": method})
        shown |= {field["name"] for form in (page.form, *page.forms.values()) for field in form.fields}
    assert shown == {field["name"] for field in describe(page.state)}
