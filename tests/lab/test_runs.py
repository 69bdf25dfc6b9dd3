"""The run store: what is recorded stays, one writes and many read, damage is named."""

import contextlib
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import (
    DtypeError,
    OptionError,
    RunBusyError,
    RunDamagedError,
    RunError,
    ShapeError,
    UnknownNameError,
)
from orthokit.lab.runs import Run, runs


def child(source: str, *arguments: str) -> subprocess.Popen[str]:
    """Another Python process that runs ``source``; its standard output can be read line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *arguments], stdout=subprocess.PIPE, text=True, bufsize=1
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


# --- what is recorded can be read


def test_scalars_spectra_notes_and_config_come_back(tmp_path: Path) -> None:
    config = {"lr": 0.02, "shape": (2, 3), "device": torch.device("cpu"), "seed": np.int64(3), "path": Path("a")}
    with Run.create("one", root=tmp_path, config=config) as run:
        run.log(0, loss=torch.tensor(2.5), lr=np.float32(0.5), done=False)
        run.log_many([(1, "loss", 2.0), (2, "loss", 1)])
        run.log_spectrum(1, "w", torch.tensor([3.0, 2.0, 1.0], dtype=torch.bfloat16))
        run.log_spectrum(2, "w", [5.0])
        run.note("a sentence")
        assert run.status == "running"
    again = Run.open("one", root=tmp_path)
    assert again.config == {"lr": 0.02, "shape": [2, 3], "device": "cpu", "seed": 3, "path": "a"}
    assert (again.status, again.error, again.last_step, again.name) == ("finished", None, 2, "one")
    assert again.names() == ["done", "loss", "lr"]
    steps, loss = again.series("loss")
    assert steps.tolist() == [0, 1, 2] and loss.tolist() == [2.5, 2.0, 1.0]
    assert again.series("loss", since=1)[0].tolist() == [2]
    frame = again.scalars(["loss", "lr"])
    assert frame.columns.tolist() == ["step", "name", "value", "wall"] and len(frame) == 4
    assert again.scalars("done")["value"].tolist() == [0.0]
    assert again.spectra() == ["w"]
    steps, values = again.spectra("w")
    assert steps.tolist() == [1, 2] and values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array([[3, 2, 1], [5, np.nan, np.nan]], dtype=np.float32))
    assert again.notes() == ["a sentence"]
    assert again.created.tzinfo is not None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**40),
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
            st.floats(),
        ),
        max_size=12,
    )
)
def test_every_float_survives_and_the_last_of_a_step_wins(rows: list[tuple[int, str, float]]) -> None:
    root = tempfile.mkdtemp()
    try:
        with Run.create("r", root=root) as run:
            run.log_many(rows)
        expected = {(name, step): value for step, name, value in rows}
        frame = Run.open("r", root=root).scalars()
        found = dict(zip(zip(frame["name"], frame["step"], strict=True), frame["value"], strict=True))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == value or (math.isnan(value) and math.isnan(found[key]))
    finally:
        shutil.rmtree(root)


def test_a_scalar_may_be_called_like_an_argument(tmp_path: Path) -> None:
    with Run.create(root=tmp_path) as run:
        run.log_many([(0, "step", 1.0), (0, "loss/train", 2.0)])
        run.log(1, **{"loss/train": 3.0})
    assert run.series("loss/train")[1].tolist() == [2.0, 3.0]


def test_nothing_of_an_invalid_batch_is_kept(tmp_path: Path, unchecked: None) -> None:
    with Run.create(root=tmp_path) as run:
        for bad in ("1.0", torch.zeros(2), None, object()):
            with pytest.raises(DtypeError, match="one number"):
                run.log(0, good=1.0, bad=bad)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="0 or more"):
            run.log(-1, good=1.0)
        with pytest.raises(DtypeError, match="whole number"):
            run.log(1.5, good=1.0)  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match=r"\(2, 2\)"):
            run.log_spectrum(0, "w", torch.zeros(2, 2))
        with pytest.raises(UnknownNameError, match="finished"):
            run.set_status("finishd")
        assert run.names() == [] and run.last_step is None


def test_a_name_never_logged_is_empty_while_running_and_an_error_after(tmp_path: Path) -> None:
    with Run.create(root=tmp_path) as run:
        run.log(0, loss=1.0)
        assert run.series("los")[0].shape == (0,)
        assert run.spectra("w")[1].shape == (0, 0)
    with pytest.raises(UnknownNameError, match="did you mean 'loss'"):
        run.series("los")
    with pytest.raises(UnknownNameError, match="spectrum"):
        run.spectra("w")


def test_truncation_drops_all_that_came_later(tmp_path: Path) -> None:
    with Run.create(root=tmp_path) as run:
        for step in range(5):
            run.log(step, loss=step)
            run.log_spectrum(step, "w", [1.0])
            run.save_checkpoint(step, {"w": torch.zeros(1)}, keep=9)
        run.truncate_after(2)
        assert run.series("loss")[0].tolist() == run.spectra("w")[0].tolist() == [0, 1, 2]
        assert [step for step, _ in run.checkpoints()] == [0, 1, 2]
        assert run.last_step == 2


# --- names, places and states


def test_a_run_without_a_name_gets_one_from_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHOKIT_RUNS", str(tmp_path / "here"))
    with Run.create() as first, Run.create() as second:
        assert first.name != second.name
    assert {path.name for path in (tmp_path / "here").iterdir()} == {first.name, second.name}
    assert Run.open(first.name).status == "finished"
    assert Run.open(first.path).status == "finished"
    assert Run.exists(first.name) and not Run.exists("other")


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "-x", "a b", "n" * 121])
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="letters, digits"):
        Run.create(name, root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_run_is_answered_with_the_closest(tmp_path: Path) -> None:
    Run.create("baseline", root=tmp_path).close()
    with pytest.raises(UnknownNameError, match="did you mean 'baseline'"):
        Run.open("baselin", root=tmp_path)
    with pytest.raises(UnknownNameError, match="Known: none"):
        Run.open("x", root=tmp_path / "nowhere")


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path, config={"steps": 10, "lr": 1}) as run:
        run.log(0, loss=1.0)
    with pytest.raises(RunError, match="exists already"):
        Run.create("r", root=tmp_path)
    with Run.create("r", root=tmp_path, config={"steps": 20, "lr": 1}, exist_ok=True) as run:
        assert run.status == "running"
        assert run.series("loss")[1].tolist() == [1.0]
        assert run.notes() == ["configuration changed: steps"]
    assert Run.open("r", root=tmp_path).config == {"steps": 20, "lr": 1}


def test_the_status_tells_how_a_run_ended(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.create("failed", root=tmp_path):
        raise ZeroDivisionError("by hand")
    with pytest.raises(KeyboardInterrupt), Run.create("stopped", root=tmp_path):
        raise KeyboardInterrupt
    Run.create("closed", root=tmp_path).close()
    failed = Run.open("failed", root=tmp_path)
    assert (failed.status, failed.error) == ("failed", "ZeroDivisionError: by hand")
    assert Run.open("stopped", root=tmp_path).status == "interrupted"
    assert Run.open("closed", root=tmp_path).status == "interrupted"
    with Run.open("failed", root=tmp_path, mode="w") as run:
        run.note("looked at it")
    assert Run.open("failed", root=tmp_path).status == "failed"


def test_a_configuration_that_cannot_be_written_makes_no_run(tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match="object"):
        Run.create("r", root=tmp_path, config={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_reader_does_not_write(tmp_path: Path, unchecked: None) -> None:
    Run.create("r", root=tmp_path).close()
    run = Run.open("r", root=tmp_path)
    for write in (
        lambda: run.log(0, a=1.0),
        lambda: run.note("x"),
        lambda: run.set_status("running"),
        lambda: run.save_checkpoint(0, {}),
        lambda: run.truncate_after(0),
    ):
        with pytest.raises(RunError, match="mode='w'"):
            write()
    with pytest.raises(OptionError, match="mode"):
        Run.open("r", root=tmp_path, mode="rw")  # type: ignore[arg-type]


# --- kills, several processes, several threads

WRITER = """
    import sys
    import torch
    from orthokit.lab.runs import Run
    run = Run.create("r", root=sys.argv[1])
    for step in range(10**9):
        run.log(step, loss=step / 7, other=-step)
        run.log_spectrum(step, "w", [step, step + 1.0])
        if step % 10 == 0:
            run.save_checkpoint(step, {"w": torch.full((1000,), float(step))}, {"next": step + 1})
        print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_kill_at_any_instant_loses_nothing_acknowledged(tmp_path: Path) -> None:
    process = child(WRITER, str(tmp_path))
    acknowledged = 0
    while acknowledged < 25:
        acknowledged = int(line(process))
    run = Run.open("r", root=tmp_path)  # read while it is written
    assert run.status == "running" and (run.last_step or 0) >= acknowledged
    with pytest.raises(RunBusyError, match=f"process {process.pid}"):
        Run.open("r", root=tmp_path, mode="w")
    process.send_signal(signal.SIGKILL)
    rest = [int(text) for text in process.stdout.read().split("\n") if text.strip()]  # type: ignore[union-attr]
    acknowledged = max([acknowledged, *rest[:-1]])  # the last line may be cut
    end(process)

    run = Run.open("r", root=tmp_path)
    assert run.status == "killed"
    steps, loss = run.series("loss")
    assert steps.tolist() == list(range(len(steps))) and steps[-1] >= acknowledged
    np.testing.assert_array_equal(loss, steps / 7)
    assert run.spectra("w")[1][:, 1].tolist()[: acknowledged + 1] == [s + 1.0 for s in range(acknowledged + 1)]
    tensors, meta = run.load_checkpoint()
    assert meta["step"] >= acknowledged - acknowledged % 10
    assert tensors["w"].tolist() == [float(meta["step"])] * 1000
    with Run.open("r", root=tmp_path, mode="w") as run:  # and it can be gone on with
        run.set_status("running")
        run.truncate_after(meta["step"])
        run.log(meta["step"] + 1, loss=0.0)
    assert runs(tmp_path)["status"].tolist() == ["finished"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_second_writer_in_this_process_is_refused_and_readers_see_rows_at_once(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path) as run:
        reader = Run.open("r", root=tmp_path)
        for step in range(3):
            run.log(step, loss=1.0)
            assert reader.last_step == step
        assert reader.status == "running"
        with pytest.raises(RunBusyError, match=f"process {os.getpid()}"):
            Run.open("r", root=tmp_path, mode="w")
        with pytest.raises(RunBusyError):
            Run.create("r", root=tmp_path, exist_ok=True)
        run.log(3, loss=1.0)
    assert reader.status == "finished"


def test_another_process_reads_while_this_one_writes(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path) as run:
        process = child(
            """
            import sys
            from orthokit.lab.runs import Run
            run = Run.open("r", root=sys.argv[1])
            print("ready", flush=True)
            for wanted in (3, 9):
                while run.last_step != wanted:
                    pass
                print(run.last_step, run.status, flush=True)
            """,
            str(tmp_path),
        )
        try:
            assert line(process) == "ready"
            for wanted in (3, 9):
                for step in range(wanted - 2, wanted + 1):
                    run.log(step, loss=1.0)
                assert line(process) == f"{wanted} running"
        finally:
            end(process)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_neither_writes_nor_keeps_the_run_busy(tmp_path: Path) -> None:
    script = """
        import os, sys, time
        from orthokit.errors import RunError
        from orthokit.lab.runs import Run
        run = Run.create("r", root=sys.argv[1])
        if os.fork() == 0:
            try:
                run.log(0, loss=1.0)
            except RunError:
                print("refused", flush=True)
            time.sleep(60)
        time.sleep(60)
    """
    process = child(script, str(tmp_path))
    try:
        assert line(process) == "refused"
        assert Run.open("r", root=tmp_path).status == "running"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Run.open("r", root=tmp_path).status == "killed"  # though the child lives on
        Run.open("r", root=tmp_path, mode="w").close()
    finally:
        end(process)


def test_threads_write_and_read_one_run_together(tmp_path: Path) -> None:
    failures: list[BaseException] = []
    with Run.create("r", root=tmp_path) as run:

        def write(name: str) -> None:
            try:
                for step in range(40):
                    run.log(step, **{name: step})
                    run.log_spectrum(step, name, np.arange(5))
            except BaseException as error:
                failures.append(error)

        def read() -> None:
            try:
                seen = 0
                while seen < 160 and not failures:
                    now = len(run.scalars())
                    assert now >= seen
                    seen = now
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=write, args=(f"t{k}",)) for k in range(4)] + [threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not failures
    assert all(run.series(f"t{k}")[1].tolist() == list(range(40)) for k in range(4))


def test_an_interrupt_inside_a_write_leaves_the_run_usable(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path) as run:
        with pytest.raises(KeyboardInterrupt), run._writing() as db:
            db.execute("INSERT INTO notes (wall, text) VALUES (0, 'half')")
            raise KeyboardInterrupt
        run.note("whole")
        assert run.notes() == ["whole"]


# --- checkpoints


def test_checkpoints_keep_every_bit_and_only_the_last_ones(tmp_path: Path) -> None:
    shared = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "tied": shared,
        "tied too": shared,
        "view": shared.T,
        "bf16": shared.bfloat16(),
        "fp64": shared.double() / 3,
        "bool": shared > 0,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "parameter": torch.nn.Parameter(shared),
    }
    with Run.create("r", root=tmp_path) as run:
        for step in (1, 2, 3):
            best = step == 2
            path = run.save_checkpoint(step, {**tensors, "step": torch.tensor(step)}, {"lr": [0.1, step]}, best=best)
        assert [step for step, _ in run.checkpoints()] == [2, 3] and path == run.checkpoints()[-1][1]
        assert sorted(p.name for p in path.parent.iterdir()) == [
            "best.safetensors",
            "step-00000002.safetensors",
            "step-00000003.safetensors",
        ]
    again = Run.open("r", root=tmp_path)
    loaded, meta = again.load_checkpoint()
    assert meta == {"lr": [0.1, 3], "step": 3}
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        torch.testing.assert_close(loaded[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert again.load_checkpoint("best")[1]["step"] == again.load_checkpoint(2)[1]["step"] == 2
    with pytest.raises(UnknownNameError, match="'2', '3'"):
        again.load_checkpoint(1)


@pytest.mark.parametrize("harm", ["truncate", "flip", "garbage", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, harm: str) -> None:
    with Run.create("r", root=tmp_path) as run:
        for step in (1, 2):
            path = run.save_checkpoint(step, {"w": torch.full((64,), float(step))})
        raw = path.read_bytes()
        flipped = raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:]
        path.write_bytes({"truncate": raw[:-10], "flip": flipped, "garbage": b"\xff" * 99, "empty": b""}[harm])
        tensors, meta = run.load_checkpoint()
        assert meta["step"] == 1 and tensors["w"].tolist() == [1.0] * 64
        assert str(path) in run.notes()[0] and "Step 1 is used instead" in run.notes()[0]
    reader = Run.open("r", root=tmp_path)
    with pytest.warns(RuntimeWarning, match="Step 1 is used instead"):
        reader.load_checkpoint()
    with pytest.raises(RunDamagedError, match="step-00000002"):
        reader.load_checkpoint(2)
    run.checkpoints()[0][1].write_bytes(b"")
    with pytest.raises(RunDamagedError, match="safetensors"):
        reader.load_checkpoint()


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path) as run, pytest.raises(RunError, match="no checkpoint"):
        run.load_checkpoint()
    with Run.create("s", root=tmp_path) as run, pytest.raises(OptionError, match="keep"):
        run.save_checkpoint(0, {}, keep=0)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.create("r", root=tmp_path) as run:
        path = run.save_checkpoint(1, {"w": torch.ones(3)})

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunError, match=r"No space left on device.*free space"):
                run.save_checkpoint(1, {"w": torch.zeros(3)})
        assert list(path.parent.iterdir()) == [path]
        assert run.load_checkpoint()[0]["w"].tolist() == [1.0] * 3


# --- damage and bad places


@pytest.mark.parametrize("harm", ["garbage", "empty", "missing", "truncated", "config", "config missing", "other"])
def test_a_damaged_run_is_named_and_the_others_stay_readable(tmp_path: Path, harm: str) -> None:
    for name in ("good", "bad"):
        with Run.create(name, root=tmp_path, config={"lr": 1}) as run:
            run.log_many((step, f"s{step % 50}", step) for step in range(2000))
            run.log(2000, loss=0.5)
    database, config = tmp_path / "bad" / "run.sqlite", tmp_path / "bad" / "config.json"
    culprit = config if "config" in harm else database
    if harm == "garbage":
        database.write_bytes(b"not a database" * 1000)
    elif harm == "truncated":
        database.write_bytes(database.read_bytes()[:5000])
    elif harm == "empty":
        database.write_bytes(b"")
    elif harm == "other":
        database.unlink()
        with sqlite3.connect(database) as other:
            other.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        other.close()
    elif harm == "config":
        config.write_text('{"lr": ')
    else:
        culprit.unlink()
    for mode in ("r", "w"):
        with pytest.raises(RunDamagedError, match=culprit.name) as caught:
            Run.open("bad", root=tmp_path, mode=mode).scalars()
        assert str(culprit) in str(caught.value)
    frame = runs(tmp_path).set_index("name")
    assert frame["status"].to_dict() == {"bad": "damaged", "good": "finished"}
    assert str(culprit) in frame["error"].to_dict()["bad"]
    assert frame["last.loss"].to_dict()["good"] == 0.5
    with Run.open("good", root=tmp_path, mode="w") as run:  # the lock of a damaged run is not left behind either
        run.note("fine")


def test_a_run_of_a_later_layout_is_refused(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path) as run, run._writing() as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    with pytest.raises(RunError, match="layout 99"):
        Run.open("r", root=tmp_path)


def test_a_deleted_run_is_a_clear_error_for_writer_and_reader(tmp_path: Path) -> None:
    run = Run.create("r", root=tmp_path)
    run.log(0, loss=1.0)
    reader = Run.open("r", root=tmp_path)
    shutil.rmtree(tmp_path / "r")
    for use in (
        lambda: reader.series("loss"),
        lambda: reader.status,
        lambda: run.log(1, loss=1.0),
        lambda: run.save_checkpoint(1, {}),
    ):
        with pytest.raises(RunError, match=r"is gone|missing"):
            use()
    with pytest.raises(RunError):
        run.close()
    run.close()  # everything was given back by the first
    with pytest.raises(ZeroDivisionError), Run.create("r", root=tmp_path):
        shutil.rmtree(tmp_path / "r")
        raise ZeroDivisionError


def test_a_root_that_cannot_hold_runs_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunError, match="ORTHOKIT_RUNS") as caught:
            Run.create("r", root=root)
        assert str(root) in str(caught.value)
    with pytest.raises(RunError, match="list runs"):
        runs(tmp_path / "file")


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Give up the rights of root for a while: root may write to read-only folders."""
    if os.getuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="this system has no users to change to")
def test_a_read_only_folder_can_be_read_but_not_written() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with Run.create("r", root=root) as run:
            run.log(0, loss=1.0)
        files = [root, root / "r", *(root / "r").iterdir()]
        try:
            for path in files:
                path.chmod(0o555)
            with ordinary_user():
                assert Run.open("r", root=root).series("loss")[1].tolist() == [1.0]
                with pytest.raises(RunError, match="Make the folder writable"):
                    Run.open("r", root=root, mode="w")
                with pytest.raises(RunError, match=r"cannot make a run in .*ORTHOKIT_RUNS"):
                    Run.create("s", root=root)
        finally:
            for path in files:
                path.chmod(0o755)


def test_a_sealed_folder_is_read_without_side_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Run.create("r", root=tmp_path) as run:
        run.log(0, loss=1.0)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert Run.open("r", root=tmp_path).series("loss")[1].tolist() == [1.0]
    assert not (tmp_path / "r" / "run.sqlite-shm").exists()


def test_a_folder_that_refuses_the_lock_is_a_run_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run.create("r", root=tmp_path).close()
    original = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if "a" in mode:
            raise PermissionError(13, "Permission denied")
        return original(self, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RunError, match=r"Permission denied.*writable"):
        Run.open("r", root=tmp_path, mode="w")


# --- the listing


def test_runs_lists_newest_first_with_last_values_and_flat_configuration(tmp_path: Path) -> None:
    assert runs(tmp_path / "nowhere").columns.tolist() == ["name", "status", "created", "steps", "error", "path"]
    for number, name in enumerate(["older", "newer"]):
        with Run.create(name, root=tmp_path, config={"optimizer": {"lr": number, "name": "Muon"}, "seed": 1}) as run:
            for step in range(number + 2):
                run.log_many([(step, "loss", step / 2), (step, "stable_rank/w", 1.0), (step, "odd", math.nan)])
    (tmp_path / "not a run").mkdir()
    (tmp_path / "file").write_text("x")
    frame = runs(tmp_path)
    assert frame["name"].tolist() == ["newer", "older"]
    assert frame["steps"].tolist() == [2, 1]
    assert frame["last.loss"].tolist() == [1.0, 0.5] and all(map(math.isnan, frame["last.odd"]))
    assert frame["config.optimizer.lr"].tolist() == [1, 0]
    assert "last.stable_rank/w" not in frame
    assert frame["path"].tolist() == [str(tmp_path / "newer"), str(tmp_path / "older")]


def test_importing_the_store_does_not_import_pandas() -> None:
    code = "import sys, orthokit.lab.runs; sys.exit('pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_folder_is_plain_files(tmp_path: Path) -> None:
    with Run.create("r", root=tmp_path, config={"lr": 0.5}) as run:
        run.log(0, loss=1.0)
        run.save_checkpoint(0, {"w": torch.ones(1)})
    assert json.loads((run.path / "config.json").read_text()) == {"lr": 0.5}
    assert {path.name for path in run.path.iterdir()} == {"config.json", "run.sqlite", "writer.lock", "checkpoints"}
    with (run.path / "run.sqlite").open("rb") as stream:
        assert stream.read(15) == b"SQLite format 3"
