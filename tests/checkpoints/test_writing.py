"""Models written tensor by tensor: whole at the end or not there, resumable, and as others read them."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from orthokit.checkpoints import CheckpointWriter, open_checkpoint
from orthokit.checkpoints import writing as module
from orthokit.checkpoints._header import DTYPES
from orthokit.checkpoints.writing import planned_shards
from orthokit.errors import CheckpointError, DtypeError, OptionError, ShapeError, UnknownNameError

INDEX = "model.safetensors.index.json"

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def plan_of(tensors: dict[str, Tensor]) -> Plan:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def some(count: int = 7, *, rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kinds = [torch.bfloat16, torch.float32, torch.float16]
    return {f"w.{i}": torch.randn(rows, 6, generator=generator).to(kinds[i % 3]) for i in range(count)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def write(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    with CheckpointWriter(folder, plan_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return writer.finish()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_type_comes_back_and_other_readers_agree(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).view(2, 3).T}
    for code, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), generator=generator)
        tensors[code] = raw.to(torch.uint8).view(dtype).view(2, 3)
    folder = write(tmp_path / "model", tensors)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
    theirs = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as model:
        assert model.metadata == {"format": "pt"}
        for name, tensor in tensors.items():
            assert same_bits(model.tensor(name), tensor), name
            assert same_bits(theirs[name], tensor), name


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(1, dtype=torch.float64), "c": torch.ones(1)}
    folder = write(tmp_path / "model", tensors)
    with open_checkpoint(folder) as model:
        assert all(model.place(name).start % model.dtype(name).itemsize == 0 for name in model)


def test_several_files_get_the_names_and_the_index_of_hugging_face(tmp_path: Path) -> None:
    tensors = some()
    folder = write(tmp_path / "model", tensors, shard_bytes=400)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        part = load_file(folder / file)
        assert sum(t.nbytes for t in part.values()) <= 400
        assert all(same_bits(part[name], tensors[name]) for name in part)
        assert {name for name, where in index["weight_map"].items() if where == file} == part.keys()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 120))
def test_shards_hold_each_tensor_once_in_order_and_no_more_than_they_may(sizes: list[int], room: int) -> None:
    plan: Plan = {f"t{i}": (torch.uint8, (size,)) for i, size in enumerate(sizes)}
    shards = planned_shards(plan, shard_bytes=room)
    assert [name for names in shards.values() for name in names] == list(plan)
    for names in shards.values():
        assert len(names) == 1 or sum(plan[name][1][0] for name in names) <= room


def test_the_order_of_writing_and_the_threads_do_not_show(tmp_path: Path) -> None:
    tensors = some(40)
    first = write(tmp_path / "first", tensors, shard_bytes=1500)
    order = list(tensors)
    random.Random(3).shuffle(order)
    with CheckpointWriter(tmp_path / "second", plan_of(tensors), shard_bytes=1500) as writer:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: writer.write(name, tensors[name]), order))
        second = writer.finish()
    assert content(first) == content(second)


def test_nothing_has_the_name_before_all_is_written(tmp_path: Path) -> None:
    tensors = some()
    with CheckpointWriter(tmp_path / "model", plan_of(tensors)) as writer:
        for name in list(tensors)[1:]:
            writer.write(name, tensors[name])
        with pytest.raises(CheckpointError, match=r"1 tensors .* were not written, such as 'w\.0'"):
            writer.finish()
        assert [file.name for file in tmp_path.iterdir()] == [".model.making"]
        writer.write("w.0", tensors["w.0"])
        writer.finish({"config.json": b"{}"})
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_exists_is_not_touched(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "model"
    if kind == "folder":
        place.mkdir()
    elif kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        CheckpointWriter(place, plan_of(some()))
    assert names(tmp_path) == ["model"]


def test_what_came_to_exist_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    tensors = some()
    with CheckpointWriter(tmp_path / "model", plan_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        (tmp_path / "model").mkdir()
        with pytest.raises(CheckpointError, match="exists already"):
            writer.finish()
    assert list((tmp_path / "model").iterdir()) == []


def test_a_writer_goes_on_where_another_stopped(tmp_path: Path) -> None:
    tensors = some(9)
    whole = write(tmp_path / "whole", tensors, shard_bytes=500)
    with CheckpointWriter(tmp_path / "model", plan_of(tensors), shard_bytes=500, signature="s") as writer:
        for name in list(tensors)[:4]:
            writer.write(name, tensors[name], note={"of": name})
    with CheckpointWriter(tmp_path / "model", plan_of(tensors), shard_bytes=500, signature="s") as writer:
        assert writer.notes == {name: {"of": name} for name in list(tensors)[:4]}
        for name in list(tensors)[4:]:
            writer.write(name, tensors[name])
        writer.finish()
    assert content(tmp_path / "model") == content(whole)


@pytest.mark.parametrize("change", ["signature", "shard_bytes", "plan", "metadata", "resume", "lost file", "cut file"])
def test_another_recipe_or_damage_starts_anew(tmp_path: Path, change: str) -> None:
    tensors = some(9)
    options: dict[str, Any] = {"shard_bytes": 500, "signature": "s"}
    with CheckpointWriter(tmp_path / "model", plan_of(tensors), **options) as writer:
        writer.write("w.0", tensors["w.0"])
        victim = writer.making / "model" / writer.files[1]
    if change == "signature":
        options["signature"] = "other"
    elif change == "shard_bytes":
        options["shard_bytes"] = 600
    elif change == "metadata":
        options["metadata"] = {"format": "pt", "more": "x"}
    elif change == "resume":
        options["resume"] = False
    elif change == "plan":
        tensors = {name: tensor for name, tensor in tensors.items() if name != "w.5"}
    elif change == "lost file":
        victim.unlink()
    else:
        os.truncate(victim, 10)
    with CheckpointWriter(tmp_path / "model", plan_of(tensors), **options) as writer:
        assert writer.notes == {}
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    with open_checkpoint(tmp_path / "model") as model:
        assert all(same_bits(model.tensor(name), tensors[name]) for name in tensors)


@pytest.mark.parametrize("tail", [b'{"name": "w.3", "no', b'{"name": "w.3", "note": nu', b"\x00" * 40])
def test_a_last_line_that_a_kill_cut_off_is_written_again(tmp_path: Path, tail: bytes) -> None:
    tensors = some()
    with CheckpointWriter(tmp_path / "model", plan_of(tensors)) as writer:
        writer.write("w.0", tensors["w.0"])
        journal = writer.making / "journal.jsonl"
    with journal.open("ab") as stream:
        stream.write(tail)
    for written in (["w.0"], ["w.0", "w.1"]):
        with CheckpointWriter(tmp_path / "model", plan_of(tensors)) as writer:
            assert list(writer.notes) == written
            writer.write("w.1", tensors["w.1"])


def test_two_writers_of_one_folder_are_one_too_many(tmp_path: Path) -> None:
    tensors = some()
    with (
        CheckpointWriter(tmp_path / "model", plan_of(tensors)),
        pytest.raises(CheckpointError, match="another process is writing"),
    ):
        CheckpointWriter(tmp_path / "model", plan_of(tensors))


def test_a_writer_in_another_process_is_noticed_and_its_death_too(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from orthokit.checkpoints import CheckpointWriter\n"
        "w = CheckpointWriter(sys.argv[1], {'a': (torch.float32, (2,))}); print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "model")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdin is not None
    try:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match="another process is writing"):
            CheckpointWriter(tmp_path / "model", {"a": (torch.float32, (2,))})
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdin.close()
        other.stdout.close()
    write(tmp_path / "model", {"a": torch.ones(2)})


def test_many_writers_at_one_output_leave_one_whole_model(tmp_path: Path) -> None:
    """Each either finishes or is told why not."""
    tensors, told = some(20), []

    def attempt(_: int) -> None:
        try:
            write(tmp_path / "model", tensors)
            told.append("done")
        except CheckpointError as error:
            told.append("busy" if "another process" in str(error) else "exists" if "exists" in str(error) else "?")

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.count("done") == 1 and set(told) <= {"done", "busy", "exists"}
    with open_checkpoint(tmp_path / "model") as model:
        assert all(same_bits(model.tensor(name), tensors[name]) for name in tensors)


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes and its disk has [\d,]+ free.*Nothing was written"):
        CheckpointWriter(tmp_path / "model", {"a": (torch.float32, (1 << 50,))})
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fills_up_leaves_what_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    tensors, real, calls = some(), module.write_at, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise OSError(code, os.strerror(code))
        real(*arguments)

    monkeypatch.setattr(module, "write_at", full)
    with pytest.raises(CheckpointError, match=r"cannot be written.*run the same again.*\.model\.making"):
        write(tmp_path / "model", tensors)
    assert names(tmp_path) == [".model.making"]
    monkeypatch.setattr(module, "write_at", real)
    with CheckpointWriter(tmp_path / "model", plan_of(tensors)) as writer:
        assert list(writer.notes) == ["w.0", "w.1", "w.2"]
    write(tmp_path / "model", tensors)
    assert names(tmp_path) == ["model"]


def test_a_limit_on_the_size_of_files_is_an_error_in_words(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch; from orthokit.checkpoints import CheckpointWriter\n"
        "from orthokit.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n    CheckpointWriter(sys.argv[1], {'a': (torch.float32, (1 << 16,))})\n"
        "except CheckpointError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout and "Free some room" in done.stdout
    assert not (tmp_path / "m").exists()


def test_an_error_of_the_disk_in_the_background_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "the disk is ill")

    tensors = some()
    monkeypatch.setattr(module.os, "fdatasync", broken)
    with CheckpointWriter(tmp_path / "model", plan_of(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        with pytest.raises(CheckpointError, match="the disk is ill"):
            writer.finish()
    assert not (tmp_path / "model").exists()


def test_discarding_leaves_nothing(tmp_path: Path) -> None:
    tensors = some()
    writer = CheckpointWriter(tmp_path / "model", plan_of(tensors))
    writer.write("w.0", tensors["w.0"])
    writer.discard()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (lambda writer: writer.write("w.x", torch.ones(8, 6)), UnknownNameError),
        (lambda writer: writer.write("w.1", torch.ones(6, 8)), ShapeError),
        (lambda writer: writer.write("w.1", torch.ones(8, 6, dtype=torch.float64)), DtypeError),
    ],
)
def test_a_tensor_that_was_not_planned_is_refused(
    tmp_path: Path, bad: Callable[[CheckpointWriter], None], error: type[Exception]
) -> None:
    with CheckpointWriter(tmp_path / "model", plan_of(some())) as writer, pytest.raises(error):
        bad(writer)


def test_plans_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least one tensor"):
        CheckpointWriter(tmp_path / "model", {})
    with pytest.raises(OptionError, match="shard_bytes"):
        CheckpointWriter(tmp_path / "model", plan_of(some()), shard_bytes=0)
    with pytest.raises(DtypeError, match="complex128"):
        CheckpointWriter(tmp_path / "model", {"a": (torch.complex128, (1,))})
    with pytest.raises(OptionError, match="__metadata__"):
        CheckpointWriter(tmp_path / "model", {"__metadata__": (torch.float32, (1,))})
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        CheckpointWriter(tmp_path / "file" / "model", plan_of(some()))
