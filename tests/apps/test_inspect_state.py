"""The page "Inspect" without a browser: what is measured, compared, opened, uploaded, saved, and what is refused."""

from __future__ import annotations

import base64
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthokit_widgets import inspect_data, inspect_files, inspect_run
from orthokit_widgets.fields import describe, read_query
from orthokit_widgets.inspect_charts import depth, first_choice, heat
from orthokit_widgets.inspect_data import catalogue
from orthokit_widgets.inspect_files import Incoming, Own
from orthokit_widgets.inspect_options import BESIDE
from orthokit_widgets.inspect_state import InspectState
from orthokit_widgets.inspect_view import InspectPage
from orthokit_widgets.inspect_words import table
from orthokit_widgets.merge_data import Shelf
from safetensors.torch import save, save_file
from torch import Tensor

from orthokit.diagnostics import COLUMNS, Inspection, inspect
from orthokit.errors import CheckpointError, OptionError
from orthokit.lab import load_pretrained

Make = Callable[..., InspectState]


@pytest.fixture
def store() -> Shelf[Inspection]:
    """What the visitors of one test share."""
    return Shelf(8)


@pytest.fixture
def make(store: Shelf[Inspection]) -> Iterator[Make]:
    """States; whatever still works at the end is stopped, and their files are deleted."""
    states: list[InspectState] = []

    def build(**given: Any) -> InspectState:
        options: dict[str, Any] = {"store": store}
        states.append(InspectState(**(options | given)))
        return states[-1]

    yield build
    for state in states:
        state.end()
        assert all(worker.join(60) for worker in (state.looks.worker, state.opener, state.exporter))


def model(layers: int = 3, *, size: int = 24, seed: int = 0) -> dict[str, Tensor]:
    """A small model of a few matrices."""
    g = torch.Generator().manual_seed(seed)
    parts = {"q": (size, 16), "up": (2 * size, 16)}
    found = {f"layers.{n}.{p}.weight": torch.randn(s, generator=g) for n in range(layers) for p, s in parts.items()}
    return found | {"norm.weight": torch.ones(16)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The model as a file."""
    save_file(model(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.005)


def finish(state: InspectState) -> dict[str, Any]:
    """Wait until nothing goes on; the last snapshot."""

    def quiet() -> bool:
        state.settle()
        return not state.active

    until(quiet, "an end")
    return state.snapshot()


def measured(state: InspectState) -> dict[str, Any]:
    state.start()
    return finish(state)


def opened(state: InspectState, path: Any, use: str = "model") -> dict[str, Any]:
    state.open_path(str(path), use)
    return finish(state)


def send(state: InspectState, content: bytes, name: str = "sent.safetensors", use: str = "model") -> dict[str, Any]:
    """Upload a file as the browser does."""
    state.upload(name, len(content), use)
    while state.incoming is not None:
        wanted = state.incoming.wanted
        state.take(wanted["token"], wanted["start"], coded(content[wanted["start"] : wanted["stop"]]))
    return finish(state)


def coded(piece: bytes) -> str:
    return base64.b64encode(piece).decode()


class Gate:
    """Holds a look at chosen points, as a large model would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: Callable[[Any], bool]) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self.calls: list[dict[str, Any]] = []
        real = inspect_run.inspect

        def held(*args: Any, progress: Any, **options: Any) -> Inspection:
            self.calls.append(options)

            def told(step: Any) -> None:
                progress(step)
                if at(step) and not self.go.is_set():
                    self.reached.set()
                    assert self.go.wait(60)

            return real(*args, progress=told, **options)

        monkeypatch.setattr(inspect_run, "inspect", held)


# --- measuring


def test_a_press_measures_what_inspect_measures(make: Make) -> None:
    state = make()
    assert state.snapshot()["sentence"] == "Ready: press Inspect."
    found = measured(state)
    assert state.status == "finished" and found["sentence"].startswith("Up to date: 35 matrices of TinyGPT in ")
    weights = dict(load_pretrained().state_dict())
    expected = inspect(weights).rows
    assert state.look is not None and state.look.rows == expected
    assert [row["cells"][0] for row in found["table"]["rows"]] == [row["name"] for row in expected]
    assert {name for name, figure in found["figures"].items() if figure} == {"map", "depth", "spectra", "density"}
    assert not found["problems"] and "35 matrices hold 988,160 numbers" in found["reading"]


def test_what_is_known_at_first_is_shown_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, at=lambda step: step.look == 1 and step.done == step.total)
    state = make()
    state.start()
    assert gate.reached.wait(60)
    found = state.snapshot()
    assert found["sentence"] == "First look at TinyGPT: 35 of 35 parameters."
    assert {row["measured"] for row in state.look.rows} == {"first look"} and len(found["table"]["rows"]) == 35  # type: ignore[union-attr]
    assert found["figures"]["map"] is not None and found["figures"]["spectra"] is None
    assert not found["tickable"] and found["ticked"] == []
    gate.go.set()
    assert len(finish(state)["ticked"]) == 3


def test_stop_keeps_what_is_done_and_a_press_goes_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, at=lambda step: step.look == 2 and step.done == 4)
    state = make()
    state.start()
    assert gate.reached.wait(60)
    state.stop()
    assert state.snapshot()["sentence"].startswith("Stopping")
    gate.go.set()
    found = finish(state)
    assert found["status"] == "stopped" and not state.following
    look = state.look
    assert look is not None and look.found is not None and look.stop_ms > 0
    full = sum(row["measured"] == "full" for row in look.rows)
    assert 4 <= full < 35 and f"Stopped: {full} of 35 matrices measured in full." in found["sentence"]
    assert len(look.found.spectra) == full and found["figures"]["spectra"] is not None and state.can_export
    state.export()
    finish(state)
    assert state.ready is not None and b"interrupted" in state.ready.content
    again = measured(state)
    assert again["status"] == "finished" and state.look.found.interrupted is False  # type: ignore[union-attr]


def test_what_was_stopped_is_nothing_that_others_see(
    make: Make, store: Shelf[Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, at=lambda step: step.look == 2 and step.done == 2)
    state = make()
    state.start()
    assert gate.reached.wait(60)
    state.stop()
    gate.go.set()
    finish(state)
    assert store.get(state.wanted[0]) is None
    measured(state)
    assert store.get(state.wanted[0]) is not None


def test_another_model_ends_the_look_at_the_one_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, at=lambda step: step.look == 2 and step.done == 2)
    state = make()
    state.start()
    assert gate.reached.wait(60)
    before = state.look
    state.model = "tinygpt-bfloat16"
    gate.go.set()
    found = finish(state)
    assert found["sentence"].startswith("Up to date: 35 matrices of TinyGPT in bfloat16")
    assert before is not None and before.status == "stopped" and state.look is not before


def test_pressing_start_and_stop_many_times_ends_quiet(make: Make) -> None:
    state = make()
    for turn in range(12):
        state.start()
        if turn % 3:
            time.sleep(0.01)
        state.model = ["tinygpt", "tinygpt-bfloat16"][turn % 2]
        state.stop()
    finish(state)
    assert not state.active
    assert measured(state)["status"] == "finished"


def test_a_second_visitor_need_not_wait(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(make())
    gate = Gate(monkeypatch, at=lambda step: False)
    other = make()
    found = measured(other)
    assert gate.calls == [] and found["status"] == "finished" and len(found["table"]["rows"]) == 35


def test_norms_alone_draw_no_spectra(make: Make) -> None:
    found = measured(make(detail="norms"))
    assert {name for name, figure in found["figures"].items() if figure} == {"map", "depth"}
    assert not found["tickable"] and found["status"] == "finished"


def test_a_sample_is_a_part(make: Make) -> None:
    found = measured(make(sample=5))
    assert len(found["table"]["rows"]) == 5 and "5 of 35 matrices, evenly spread over the model." in found["reading"]


def test_what_cannot_be_loaded_is_told_and_the_others_are_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make(second="tinygpt-bfloat16")

    def broken() -> Any:
        raise CheckpointError("the file is gone.")

    real = state.common["tinygpt"]
    state.common["tinygpt"] = inspect_data.Model("tinygpt", "TinyGPT", broken)
    found = measured(state)
    assert found["problems"] == ["TinyGPT could not be inspected: the file is gone."]
    assert found["status"] == "failed" and state.looks.known(state.wanted[1]).status == "finished"  # type: ignore[union-attr]
    state.common["tinygpt"] = real
    assert measured(state)["status"] == "finished"


# --- against a base, and beside others


@pytest.mark.parametrize(
    ("key", "kind"),
    [("tinygpt-oft", "oft"), ("tinygpt-lora", "lora"), ("tinygpt-full", "general"), ("tinygpt-bfloat16", "rounded")],
)
def test_the_demonstrations_are_what_they_say(make: Make, key: str, kind: str) -> None:
    state = make(model=key)
    state.suggest("model")
    found = finish(state)
    assert state.base == "tinygpt" and (state.column, state.groups) == ("relative_change", ["change"])
    assert {row["kind"] for row in state.look.rows} == {kind}  # type: ignore[union-attr]
    assert "All 35 matrices are " in found["reading"]
    assert [head["name"] for head in found["table"]["columns"]][:3] == ["name", "shape", "verdict"]
    assert found["figures"]["profiles"] is not None


def test_a_suggested_base_goes_with_its_model(make: Make, path: Path) -> None:
    state = make(local=True, model="tinygpt-lora")
    state.suggest("model")
    state.model = "tinygpt"
    state.suggest("model")
    assert (state.base, state.column, state.groups) == ("none", "stable_rank", ["norms", "spectrum"])
    state.model = "tinygpt-oft"
    state.suggest("model")
    opened(state, path)
    assert (state.model, state.base) == ("file-1", "none")
    opened(state, path, "base")
    opened(state, path, "model")
    assert (state.model, state.base) == ("file-3", "file-2"), "a base that somebody chose stays"


def test_a_change_has_its_own_singular_values(make: Make) -> None:
    state = make(model="tinygpt-lora", base="tinygpt", chosen=[0, 3])
    own = measured(state)["figures"]["spectra"]
    state.of = "changes"
    change = state.snapshot()["figures"]["spectra"]
    found = state.look.found  # type: ignore[union-attr]
    assert found is not None
    drawn = np.array(change["data"][0]["y"][:8])  # of a LoRA of rank 8 the others are rounding
    assert np.allclose(drawn, found.changes[found.rows[0]["name"]][:8], rtol=1e-6)
    assert len(own["data"]) > len(change["data"]) == 2  # the weights' base and noise edge
    state.base = "none"
    assert state.of == "weights"


def test_up_to_three_models_stand_beside(make: Make) -> None:
    state = make(second="tinygpt-full", third="tinygpt-oft", fourth="tinygpt-full")
    assert [asked.model for asked in state.wanted] == ["tinygpt", "tinygpt-full", "tinygpt-oft"]
    found = measured(state)
    names = [trace["name"] for trace in found["figures"]["compare"]["data"]]
    assert names == ["TinyGPT", "TinyGPT with noise", "TinyGPT turned by OFT"]
    assert found["sentence"].endswith(" 2 more beside it.")
    # A rotation keeps the spectrum, noise does not.
    base, noisy, turned = (np.array(trace["y"]) for trace in found["figures"]["compare"]["data"])
    assert np.abs(base - turned).max() < 1e-3 < np.abs(base - noisy).max()
    for name in BESIDE:
        setattr(state, name, "none")
    assert state.snapshot()["figures"]["compare"] is None


def test_models_beside_have_the_same_base(make: Make) -> None:
    state = make(model="tinygpt-lora", base="tinygpt", second="tinygpt-oft", third="tinygpt")
    assert [(asked.model, asked.base) for asked in state.wanted] == [
        ("tinygpt-lora", "tinygpt"),
        ("tinygpt-oft", "tinygpt"),
        ("tinygpt", ""),
    ]


def test_a_base_of_another_architecture_is_told(make: Make, path: Path, tmp_path: Path) -> None:
    state = make(local=True)
    opened(state, path, "base")
    found = finish(state)
    [told] = found["problems"]
    assert told.startswith("small.safetensors is no base of TinyGPT: none of its matrices has the same name and shape")
    assert len(found["table"]["rows"]) == 35 and found["figures"]["map"] is not None
    lines = {one["kind"]: one["lines"] for one in found["table"]["lists"]}
    assert "blocks.0.attn.q.weight: not in small.safetensors" in lines["apart"]
    assert "layers.0.q.weight: not in TinyGPT" in lines["apart"]


def test_the_part_that_fits_is_compared_and_the_rest_listed(make: Make, path: Path, tmp_path: Path) -> None:
    other = model()
    other["layers.0.q.weight"] = 2 * other["layers.0.q.weight"]
    other["layers.1.q.weight"] = torch.ones(5, 16)
    del other["layers.2.up.weight"]
    save_file(other, tmp_path / "tuned.safetensors")
    state = make(local=True)
    opened(state, tmp_path / "tuned.safetensors")
    found = opened(state, path, "base")
    kinds = {row["name"]: row["kind"] for row in state.look.rows}  # type: ignore[union-attr]
    assert kinds["layers.0.q.weight"] == "scaled" and kinds["layers.1.q.weight"] is None
    assert kinds["layers.0.up.weight"] == "unchanged" and not found["problems"]
    [apart] = [one["lines"] for one in found["table"]["lists"] if one["kind"] == "apart"]
    assert apart == [
        "layers.1.q.weight: another shape: 5 x 16 in tuned.safetensors and 24 x 16 in small.safetensors",
        "layers.2.up.weight: not in tuned.safetensors",
    ]


# --- files by their path


def test_a_path_is_opened_chosen_and_measured(make: Make, path: Path) -> None:
    state = make(local=True)
    found = opened(state, f'  "{path}" ')
    assert state.model == "file-1" and state.models["file-1"].label == "small.safetensors"
    assert found["sentence"].startswith("Up to date: 6 matrices of small.safetensors")
    assert "One parameter that is no matrix" in [one["title"] for one in found["table"]["lists"]]


def test_a_path_beside_takes_the_first_free_place(make: Make, path: Path) -> None:
    state = make(local=True, second="tinygpt-oft")
    opened(state, path, "beside")
    opened(state, path, "beside")
    assert (state.second, state.third, state.fourth) == ("tinygpt-oft", "file-1", "file-2")
    opened(state, path, "beside")
    assert state.fourth == "file-3"
    assert [state.models[f"file-{n}"].label for n in (1, 2, 3)] == [
        "small.safetensors",
        "small.safetensors (2)",
        "small.safetensors (3)",
    ]


def test_a_file_that_changed_is_measured_anew(make: Make, path: Path) -> None:
    state = make(local=True)
    opened(state, path)
    before = state.look.rows[0]["frobenius"]  # type: ignore[union-attr]
    save_file({name: 3 * value for name, value in model().items()}, path)
    measured(state)
    assert state.look.rows[0]["frobenius"] == pytest.approx(3 * before)  # type: ignore[union-attr]


def test_a_file_is_not_measured_again_for_another_beside_it(
    make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make(local=True)
    opened(state, path)
    look = state.look
    gate = Gate(monkeypatch, at=lambda step: False)
    state.second = "tinygpt"
    state.suggest("second")
    finish(state)
    assert state.look is look and len(gate.calls) <= 1
    measured(state)
    assert state.look is not look, "a press looks whether it has changed"


def test_a_path_of_the_server_is_refused_where_others_reach_it(make: Make, path: Path) -> None:
    state = make()
    found = opened(state, path)
    assert found["problems"] == ["Files of this server cannot be opened from here: upload one instead."]
    assert state.own.models == {} and state.opener.job is None


class Evil:
    """Would run a function when it is unpickled by a plain load."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no models, with a part of what is said of each."""
    whole = save(model())
    torch.save({"w": Evil()}, folder / "code.pt")
    made = {
        "words.safetensors": (b"This is no model at all, but a letter.", "is no whole safetensors file"),
        "cut.safetensors": (whole[:-100], "it is cut off"),
        "short.safetensors": (whole[:40], "is no whole safetensors file"),
        "claims.safetensors": ((10**13).to_bytes(8, "little") + whole[8:], "its header claims 10,000,000,000,000"),
        "pickle.bin": (pickle.dumps({"w": [1.0] * 99}), "could run code and is never read"),
        "code.pt": ((folder / "code.pt").read_bytes(), "code.pt"),
        "half.gguf": (b"GGUF" + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") + bytes(8), "half.gguf"),
        "dtype.safetensors": (whole.replace(b'"F32"', b'"Q77"', 1), "torch has no tensors of"),
    }
    for name, (content, _) in made.items():
        (folder / name).write_bytes(content)
    return {name: (folder / name, said) for name, (_, said) in made.items()}


BAD = (
    *("words.safetensors", "cut.safetensors", "short.safetensors", "claims.safetensors"),
    *("pickle.bin", "code.pt", "half.gguf", "dtype.safetensors"),
)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("way", ["path", "upload"])
def test_a_bad_file_is_a_sentence(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, way: str
) -> None:
    file, said = bad_files(tmp_path)[name]
    state = make(local=True)
    found = opened(state, file) if way == "path" else send(state, file.read_bytes(), name)
    [told] = found["problems"]
    assert told.startswith("Not opened: ") and said in told and name in told and told.endswith(".")
    assert state.own.models == {} and state.model == "tinygpt" and state.incoming is None
    assert "run" not in capsys.readouterr().out
    if way == "upload":
        assert "orthokit-inspect" not in told, "a visitor need not know where the server keeps files"


@pytest.mark.parametrize(
    ("typed", "said"),
    [("", "type the path"), ("/nowhere/at/all", "is not there"), ("a\0b", "is no path"), ("~nobody-here/x", "no path")],
)
def test_a_bad_path_is_a_sentence(make: Make, typed: str, said: str) -> None:
    state = make(local=True)
    [told] = opened(state, typed)["problems"]
    assert told.startswith("Not opened: ") and said in told


def test_a_folder_without_a_model_is_a_sentence(make: Make, tmp_path: Path) -> None:
    state = make(local=True)
    [told] = opened(state, tmp_path)["problems"]
    assert told.startswith("Not opened: ")


def test_a_folder_with_a_model_is_called_like_the_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    save_file(model(), tmp_path / "mine" / "model.safetensors")
    state = make(local=True)
    for place in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        opened(state, place)
    assert [one.label for one in state.own.models.values()] == ["mine", "mine (2)"]


def test_a_file_without_a_matrix_is_a_sentence(make: Make, tmp_path: Path) -> None:
    save_file({"bias": torch.zeros(8)}, tmp_path / "bias.safetensors")
    state = make(local=True)
    found = opened(state, tmp_path / "bias.safetensors")
    [told] = found["problems"]
    assert told.startswith("bias.safetensors could not be inspected: bias.safetensors has no matrix to measure")
    assert found["status"] == "failed" and all(figure is None for figure in found["figures"].values())


def test_nan_weights_are_shown_counted_and_excluded(make: Make, tmp_path: Path) -> None:
    weights = model()
    weights["layers.1.q.weight"][2, 3:5] = torch.nan
    weights["layers.2.up.weight"][0, 0] = torch.inf
    save_file(weights, tmp_path / "nan.safetensors")
    state = make(local=True)
    found = opened(state, tmp_path / "nan.safetensors")
    [told] = found["problems"]
    assert told.startswith("NaN or infinite entries in layers.1.q and layers.2.up")
    bad = {row["name"]: row["nonfinite"] for row in state.look.rows}  # type: ignore[union-attr]
    assert (bad["layers.1.q.weight"], bad["layers.2.up.weight"]) == (2, 1)
    assert {"nonfinite", "note"} <= {head["name"] for head in found["table"]["columns"]}
    assert {"name": "not finite", "value": "3", "unit": "entries"} in found["facts"]
    assert all(np.isfinite(values).all() for values in state.look.found.spectra.values())  # type: ignore[union-attr]


# --- uploads


def test_an_uploaded_model_is_measured_like_the_file(make: Make, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_files, "_PIECE", 1000)
    gate = Gate(monkeypatch, at=lambda step: False)
    state = make()
    found = send(state, path.read_bytes(), "mine.safetensors")
    assert state.model == "file-1" and found["sentence"].startswith("Up to date: 6 matrices of mine.safetensors")
    expected = inspect(path, cache=False).rows
    assert state.look.rows == expected and gate.calls[-1]["cache"] is False  # type: ignore[union-attr]
    assert state.look.found.name == "mine.safetensors"  # type: ignore[union-attr]


def test_what_is_on_its_way_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_files, "_PIECE", 1 << 10)
    content = save(model())
    state = make()
    state.upload("a.safetensors", len(content), "model")
    assert state.incoming is not None
    assert state.snapshot()["sentence"] == "Receiving a.safetensors: 0 %." and state.active
    wanted = state.incoming.wanted
    assert wanted == {"token": wanted["token"], "start": 0, "stop": 1024, "size": len(content)}
    state.take(wanted["token"], 0, coded(content[:1024]))
    assert state.snapshot()["sentence"].startswith("Receiving a.safetensors: ") and state.incoming.received == 1024
    state.stop()
    assert not state.active and state.incoming is None


def test_a_header_that_lies_is_refused_before_the_rest_is_sent(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_files, "_PIECE", 1 << 10)
    content = save(model())
    for size in (len(content) - 8, len(content) + 4096):
        state = make()
        state.upload("lies.safetensors", size, "model")
        assert state.incoming is not None and size > 4 * 1024
        token = state.incoming.token
        state.take(token, 0, coded(content[:1024]))
        assert state.incoming is None, "it went on"
        assert state.errors["file"].startswith("Not opened: lies.safetensors is no whole safetensors file")
        state.take(token, 1024, coded(content[1024:2048]))
        assert state.incoming is None


def test_a_file_that_is_too_large_is_refused_before_anything_is_sent(make: Make) -> None:
    state = make()
    state.upload("huge.gguf", 250_000_000, "model")
    assert state.incoming is None
    assert state.errors["file"].startswith("Not uploaded: huge.gguf has 250 MB; a file may have up to 200 MB.")
    state.upload("nothing", 0, "model")
    assert "fewer than any model file" in state.errors["file"]
    state.upload("a", 100, "something else")
    assert state.incoming is None and "opened as one of" in state.errors["file"]


def test_pieces_that_were_not_asked_for_change_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_files, "_PIECE", 1 << 10)
    content = save(model())
    state = make()
    state.upload("a.safetensors", len(content), "model")
    incoming = state.incoming
    assert incoming is not None
    for token, start in ((incoming.token + 1, 0), (incoming.token, 1024), (incoming.token, -1), (None, 0), ("x", None)):
        state.take(token, start, coded(content[:1024]))
        assert incoming.received == 0
    state.take(incoming.token, 0, coded(content[:1024]))
    state.take(incoming.token, 0, coded(content[:1024]))
    assert incoming.received == 1024 and state.incoming is incoming
    state.take(incoming.token, 1024, "not base64!")
    assert state.incoming is None and "damaged on its way" in state.errors["file"] and not incoming.path.exists()


def test_a_piece_of_the_wrong_length_is_refused(make: Make) -> None:
    content = save(model())
    state = make()
    state.upload("a.safetensors", len(content), "model")
    state.take(state.incoming.token, 0, coded(content[:-1]))  # type: ignore[union-attr]
    assert state.incoming is None and "changed while it was uploaded" in state.errors["file"]


def test_a_folder_that_was_dropped_is_a_sentence(make: Make) -> None:
    state = make()
    state.upload("folder", 4096, "model")
    state.unreadable(99)
    assert state.incoming is not None
    state.unreadable(state.incoming.token)
    assert state.incoming is None and "A folder is no file" in state.errors["file"]


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/x", "..", "", "a/b\\c\0d", ".hidden", "n" * 500, "Ä ö.gguf"]
)
def test_a_name_stays_inside_the_folder(tmp_path: Path, name: str) -> None:
    incoming = Incoming(name, 100, tmp_path, token=7, use="model")
    assert incoming.path.parent == tmp_path / "7" and incoming.path.resolve().parent == (tmp_path / "7").resolve()
    assert len(incoming.path.name) <= 80 and incoming.path.is_file()
    incoming.forget()
    assert list(tmp_path.iterdir()) == []


def test_uploads_are_deleted_when_the_visit_ends(make: Make) -> None:
    state = make()
    content = save(model())
    send(state, content)
    state.upload("second.safetensors", len(content), "base")
    assert state.incoming is not None
    folder = state.incoming.path.parent.parent
    assert len(list(folder.iterdir())) == 2
    taken = inspect_files.ROOM.taken
    state.end()
    assert not folder.exists() and inspect_files.ROOM.taken == taken - 2 * len(content)


def test_uploads_that_are_not_used_make_room(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    content = save(model())
    monkeypatch.setattr(inspect_files, "_MOST_OF_ONE", 2 * len(content) + 10)
    state = make()
    send(state, content)
    send(state, content)
    assert list(state.own.models) == ["file-1", "file-2"] and state.model == "file-2"
    send(state, content)
    assert list(state.own.models) == ["file-2", "file-3"] and state.model == "file-3"
    send(state, content, use="base")
    assert list(state.own.models) == ["file-3", "file-4"]
    state.upload("more.safetensors", len(content), "beside")
    assert state.incoming is None and "your files may have" in state.errors["file"]
    assert "file-1" not in state.param["model"].objects


def test_the_room_of_all_visitors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_files, "_MOST_TOGETHER", inspect_files.ROOM.taken + 150)
    first = Incoming("a", 100, tmp_path, token=1, use="model")
    with pytest.raises(OptionError, match="no room"):
        Incoming("b", 100, tmp_path, token=2, use="model")
    first.forget()
    Incoming("b", 100, tmp_path, token=3, use="model").forget()


def test_own_files_are_nobody_elses(make: Make, store: Shelf[Inspection], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(store, "put", lambda key, value: kept.append(key))
    state = make(second="tinygpt")
    send(state, save(model()))
    assert [asked.model for asked in kept] == ["tinygpt"]
    other = make()
    assert "file-1" not in other.param["model"].objects


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=8, max_size=400), st.integers(0, 3))
def test_no_bytes_bring_an_upload_down(content: bytes, begin: int) -> None:
    starts = (b"", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04", (60).to_bytes(8, "little") + b'{"a":')
    content = starts[begin] + content
    own = Own()
    incoming = own.receive("x.bin", len(content), "model")
    try:
        incoming.take(0, coded(content))
        incoming.finish("")
    except CheckpointError as error:
        assert "x.bin" in str(error) or "x_bin" in str(error)
    finally:
        incoming.forget()
        own.close()


# --- drawing


def test_ticks_choose_the_spectra_and_eight_are_the_most(make: Make) -> None:
    state = make()
    state.tick(1, True)
    assert state.chosen == [], "nothing is measured yet"
    measured(state)
    first = state.drawn
    assert first == first_choice(state.look.found)  # type: ignore[union-attr, arg-type]
    state.tick(first[0], False)
    assert state.drawn == first[1:]
    for place in range(9, 15):
        state.tick(place, True)
    assert len(state.drawn) == 8 and len(state.snapshot()["figures"]["spectra"]["data"]) == 16  # with the noise edges
    state.tick(20, True)
    assert "More than 8 spectra" in state.snapshot()["problems"][0] and len(state.drawn) == 8
    state.tick(9, False)
    assert not state.snapshot()["problems"] and len(state.drawn) == 7
    for place in (-1, 35, 10**9):
        state.tick(place, True)
    assert len(state.drawn) == 7
    for place in state.drawn:
        state.tick(place, False)
    assert state.drawn == first, "none: the page chooses"


def test_another_model_brings_its_own_choice(make: Make) -> None:
    state = make(chosen=[4, 5])
    measured(state)
    assert state.drawn == [4, 5]
    state.model = "tinygpt-bfloat16"
    assert state.chosen == []


def test_a_head_sorts_and_once_more_the_other_way(make: Make) -> None:
    state = make()
    state.order_by("stable_rank")
    assert (state.sort, state.falling) == ("stable_rank", "yes")
    state.order_by("stable_rank")
    assert (state.sort, state.falling) == ("stable_rank", "no")
    state.order_by("name")
    assert (state.sort, state.falling) == ("name", "no")
    state.order_by("nothing")
    assert state.sort == "name"


@pytest.mark.parametrize("column", ["stable_rank", "condition", "alpha", "energy_excess", "outlier_rows", "nonfinite"])
def test_every_column_is_drawn(make: Make, column: str) -> None:
    found = measured(make(column=column))["figures"]
    assert found["map"] is not None and found["depth"] is not None
    assert found["map"]["data"][0]["customdata"][0][0] == [0]


def test_ways_to_draw_spectra(make: Make) -> None:
    state = make(chosen=[2])
    measured(state)
    seen = []
    changes = (
        {},
        {"across": "linear"},
        {"across": "share"},
        {"height": "linear"},
        {"unit": "first"},
        {"unit": "frobenius"},
    )
    for change in changes:
        for name, value in change.items():
            setattr(state, name, value)
        figure = state.snapshot()["figures"]["spectra"]
        seen.append(
            (figure["layout"]["xaxis"].get("type"), figure["layout"]["yaxis"].get("type"), figure["data"][0]["y"][0])
        )
    assert seen[0][:2] == ("log", "log") and seen[1][0] is None and seen[3][1] is None
    assert seen[4][2] == pytest.approx(1.0) and 0 < seen[5][2] < 1


def test_figures_that_did_not_change_are_the_same(make: Make) -> None:
    state = make()
    before = measured(state)
    state.across = "linear"
    after = state.snapshot()
    assert after["table"] is before["table"]
    same = {name for name in after["figures"] if after["figures"][name] is before["figures"][name]}
    assert same == {"map", "depth", "density", "profiles", "compare"}


def test_matrices_without_a_layer_have_no_depth() -> None:
    rows = inspect({"a.weight": torch.eye(12), "b.weight": torch.eye(12) + 0.5}).rows
    assert depth({"one": rows}, "stable_rank") is None and heat(rows, "stable_rank") is not None
    assert heat([], "stable_rank") is None


def test_the_table_is_json_whatever_is_in_it() -> None:
    rows = inspect({"a.weight": torch.outer(torch.ones(12), torch.ones(12)), "b.weight": torch.zeros(4, 4)}).rows
    assert rows[0]["condition"] == float("inf")
    made = table(rows, None, ["spectrum", "tail"], compared=False)
    text = json.dumps(made, allow_nan=False)
    column = [head["name"] for head in made["columns"]].index("condition")
    assert made["rows"][0]["keys"][column] == 1e308 and "Infinity" not in text
    assert all(head["help"] for head in made["columns"])


def test_groups_are_the_columns(make: Make) -> None:
    state = make(groups=["rows", "storage"])
    names = [head["name"] for head in measured(state)["table"]["columns"]]
    wanted = [name for name, column in COLUMNS.items() if column.group in ("rows", "storage")]
    assert names == ["name", "shape", *wanted]


# --- settings and the address


def test_the_address_holds_every_setting(make: Make) -> None:
    changed = {
        **{"model": "tinygpt-lora", "base": "tinygpt", "detail": "norms", "sample": 12, "groups": ["change", "tail"]},
        **{"sort": "alpha", "falling": "no", "column": "change_rank", "chosen": [1, 7], "of": "changes"},
        **{"across": "share", "height": "linear", "unit": "first", "second": "tinygpt-oft", "third": "tinygpt-full"},
        **{"fourth": "tinygpt-bfloat16", "file": "csv"},
    }
    assert set(changed) == set(InspectState.SETTINGS)
    state = make(**changed)
    other = make()
    assert other.query({}) == "" and read_query(other, state.query({})) == []
    assert other.values() == state.values() == {**other.values(), **changed, "groups": ["tail", "change"]}


def test_what_does_not_fit_in_an_address_is_told(make: Make) -> None:
    state = make()
    told = read_query(state, "?model=file-1&sample=0&column=relative_change&chosen=1,x&nothing=1&groups=change")
    assert len(told) == 6 and state.query({}) == ""
    assert told[0].startswith("In the address: Model must be one of tinygpt, ")


def test_own_files_stand_in_no_address(make: Make, path: Path) -> None:
    state = make(local=True, detail="norms")
    opened(state, path)
    opened(state, path, "beside")
    state.chosen = [1]
    assert state.query(state.own.models) == "detail=norms"
    state.model = "tinygpt-oft"
    assert state.query(state.own.models) == "model=tinygpt-oft&detail=norms"


def test_columns_of_a_comparison_go_with_the_base(make: Make) -> None:
    state = make(base="tinygpt", model="tinygpt-oft", column="rotation_angle", groups=["change"])
    state.base = "none"
    assert (state.column, state.groups) == ("stable_rank", ["norms", "spectrum"])
    assert "change" not in state.param["groups"].objects and "rotation_angle" not in state.param["column"].objects


def test_catalogue_and_words_agree() -> None:
    from orthokit_widgets.inspect_words import EXPLAINED

    assert set(catalogue()) <= set(EXPLAINED)
    assert all(one.base in ("", *catalogue()) for one in catalogue().values())


# --- files to take along


def test_what_was_measured_is_saved(make: Make, tmp_path: Path) -> None:
    state = make(model="tinygpt-lora", base="tinygpt", second="tinygpt-oft")
    state.export()
    assert state.exporter.job is None, "there is nothing yet"
    measured(state)
    files = {}
    for kind in ("html", "json", "csv"):
        state.file = kind
        state.export()
        finish(state)
        assert state.ready is not None
        files[kind] = state.ready
    assert [file.name for file in files.values()] == [f"tinygpt-with-lora-inspection.{kind}" for kind in files]
    page = files["html"].content.decode()
    assert "TinyGPT with LoRA" in page and "TinyGPT turned by OFT" in page and len(page) < 6e6
    (tmp_path / "found.json").write_bytes(files["json"].content)
    again = Inspection.from_json(tmp_path / "found.json")
    assert again.rows == state.look.rows and again.base_name == "TinyGPT"  # type: ignore[union-attr]
    assert len(files["csv"].content.decode().splitlines()) == 36


# --- the page


@pytest.fixture
def page(store: Shelf[Inspection]) -> Iterator[InspectPage]:
    """A page that nobody has drawn yet."""
    made = InspectPage(store=store, local=True)
    yield made
    made.state.end()
    assert made.state.looks.worker.join(60)


def test_a_page_measures_only_when_a_browser_has_drawn_it(page: InspectPage) -> None:
    assert not page.state.active and page.status.text == "Ready: press Inspect."
    page._heard({"ready": True})
    finish(page.state)
    page.repaint()
    assert page.status.text.startswith("Up to date: 35 matrices") and len(json.loads(page.table.content)["rows"]) == 35
    page.state.stop()
    page._heard({"ready": True})
    assert not page.state.following, "asked twice, it begins once"


def test_what_the_browser_sends_is_done(page: InspectPage) -> None:
    page._heard({"ready": True})
    finish(page.state)
    page._heard({"sort": "condition"})
    page._heard({"tick": 5, "on": True})
    assert page.table.sort == {"name": "condition", "falling": True} and 5 in page.table.ticked
    page._heard({"pick": [5]})
    assert 5 not in page.table.ticked
    page._heard({"pick": [6]})
    assert 6 in page.table.ticked
    page._heard({"set": "model", "value": "tinygpt-oft"})
    finish(page.state)
    page.repaint()
    assert page.state.base == "tinygpt" and "consistent with OFT" in page.reading.text
    assert page.about.text.startswith("Synthetic: ")
    page._heard({"set": "sample", "value": "0"})
    assert "must be a number from 1 to 2000" in page.alert.text


NONSENSE: list[dict[str, Any]] = [
    *({"sort": None}, {"tick": "x"}, {"tick": 1.5, "on": True}, {"pick": "abc"}, {"pick": [None]}, {"pick": [1, 2]}),
    *({"upload": "a", "size": "x"}, {"upload": "a", "size": -1}, {"piece": "AA"}, {"piece": 5, "of": 1, "start": "0"}),
    *({"unreadable": None}, {"open": None, "use": 3}, {"action": "nothing"}, {"action": None}, {}),
]


@pytest.mark.parametrize("message", NONSENSE)
def test_nonsense_from_a_browser_changes_nothing(page: InspectPage, message: dict[str, Any]) -> None:
    before = page.state.values()
    page._heard(message)
    finish(page.state)
    assert page.state.values() == before and page.state.incoming is None and page.state.own.models == {}


def test_every_setting_has_a_control(page: InspectPage) -> None:
    shown = [field["name"] for form in (page.form, *page.forms.values()) for field in form.fields]
    assert len(shown) == len(set(shown))
    # These three are set in the table.
    assert set(shown) | {"sort", "falling", "chosen"} == set(page.state.SETTINGS)
    assert all(field["label"] for field in describe(page.state))


def test_a_saved_file_is_handed_over(page: InspectPage) -> None:
    page._heard({"ready": True})
    finish(page.state)
    page._heard({"set": "file", "value": "csv"})
    page._fetched({"action": "export"})
    finish(page.state)
    page.repaint()
    assert page.download.offer["name"] == "tinygpt-inspection.csv"
    page._fetched({"piece": 0, "of": page.download.offer["token"]})
    assert base64.b64decode(page.download.piece["data"]).decode().startswith("name,shape,")
