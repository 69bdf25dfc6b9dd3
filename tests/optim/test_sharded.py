"""Matrices shared by several processes: real processes over gloo, and the arithmetic of who owns and sends what."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_worker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import OptionError
from orthokit.optim import Muon
from orthokit.optim._sharded_plan import Item, assign_owners, chunk, overlap, shard_boxes, transfers, volume

SIZES = (1, 2, 4)
LOADS = [name for name in sharded_worker.CHECKS if name.startswith("load")]
# Seconds for one group of processes. They take some twenty, but have to wait for each other at every collective.
PATIENCE = 900


def names_for(size: int) -> list[str]:
    return [name for name, (_, sizes) in sharded_worker.CHECKS.items() if size in sizes]


class Launches:
    """Groups of processes, each started once for all of its checks; what they said is read from files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[tuple[int, str], list[str]] = {}
        # One server has imported everything, and every process is a fork of it: seconds instead of minutes.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["sharded_worker"])

    def of(self, size: int, name: str) -> list[str]:
        """What the processes said to a check, made now if it was not yet made."""
        if (size, name) not in self.said:
            if name in LOADS:
                for other in SIZES:  # what is to be loaded
                    self.of(other, "save_a_model")
            self.run(size, [other for other in names_for(size) if (other in LOADS) == (name in LOADS)])
        return self.said[size, name]

    def run(self, size: int, names: list[str], backend: str = "gloo") -> None:
        """Run the checks; once more if a process was killed by a signal, which no check of ours does.

        A group was once seen to lose a process without a word on a busy machine. A check that fails is not run again.
        """
        found, codes = self.launch(size, names, backend)
        if any(code is not None and code < 0 for code in codes):
            print(f"a process of {size} was killed: exit codes {codes}; done before: {[list(said) for said in found]}")
            for left in self.folder.glob(f"*{size}*"):  # what was saved before must not be taken for the second try's
                if not left.name.startswith("launch"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            found, codes = self.launch(size, names, backend)
        ends = [f"ended with {code} before this check was done" for code in codes]
        for name in names:
            self.said[size, name] = [said.get(name, end) for said, end in zip(found, ends, strict=True)]

    def launch(self, size: int, names: list[str], backend: str) -> tuple[list[dict[str, str]], list[int | None]]:
        """Start a group once: what each process said, check by check, and how it ended."""
        folder = self.folder / f"launch{len(list(self.folder.glob('launch*')))}"
        folder.mkdir()
        arguments = (size, str(folder), names, backend)
        processes = [
            self.context.Process(target=sharded_worker.serve, args=(rank, *arguments), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=PATIENCE)
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
        files = [folder / f"{rank}.json" for rank in range(size)]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        return found, codes


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("sharded"))


@pytest.mark.timeout(2 * PATIENCE)  # the first test of a group waits for all of it
@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in names_for(size)])
def test_processes(launches, size, name):
    for rank, said in enumerate(launches.of(size, name)):
        if said != "passed":
            pytest.fail(f"process {rank}: {said}", pytrace=False)


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path):
    script = Path(__file__).resolve().parents[2] / "examples" / "train_sharded.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    sizes = ["--size", "0.2M", "--batch", "2", "--context", "16", "--steps", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launcher, *sizes, "--checkpoints", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "muon, fsdp, 2 processes" in done.stdout and "busiest process: 1.00" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step000001"]


@pytest.mark.gpu
@pytest.mark.timeout(2 * PATIENCE)
def test_processes_on_gpus(launches):
    """One process a GPU, over nccl; with a single GPU the collectives are those of one process."""
    size = min(torch.cuda.device_count(), 4)
    names = [
        "muon_in_every_order_and_placement",
        "pion_on_every_side",
        "fully_sharded_model_trains_as_one_process_would",
    ]
    launches.run(size, names, backend="nccl")
    assert [launches.said[size, name] for name in names] == [["passed"] * size] * len(names)


def best_possible(costs: list[int], processes: int) -> int:
    """The smallest possible work of the busiest process, by trying every assignment."""
    found = []
    for owners in itertools.product(range(processes), repeat=len(costs)):
        found.append(max(sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(processes)))
    return min(found)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=7), st.integers(1, 3))
def test_the_busiest_owner_is_within_a_third_of_the_best_assignment(costs, processes):
    loads = [0.0] * processes
    owners = assign_owners(costs, loads)
    assert loads == [sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(processes)]
    assert max(loads) <= (4 / 3 - 1 / (3 * processes)) * best_possible(costs, processes) + 1e-9


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 9), st.data())
def test_owners_never_leave_more_than_one_matrix_between_busiest_and_idlest(costs, processes, data):
    start = data.draw(st.lists(st.integers(0, 100), min_size=processes, max_size=processes))
    loads = [float(x) for x in start]
    owners = assign_owners(costs, loads)
    assert sum(loads) == sum(costs) + sum(start)
    # The last matrix given to the busiest was given when it was the idlest.
    busiest = max(range(processes), key=loads.__getitem__)
    smallest = min((c for c, o in zip(costs, owners, strict=True) if o == busiest), default=None)
    if smallest is not None:
        assert loads[busiest] - smallest <= min(loads)


@given(st.integers(0, 30), st.integers(1, 9))
def test_chunks_are_those_of_torch(size, parts):
    expected = [len(piece) for piece in torch.arange(size).chunk(parts)] if size else []
    found = [b - a for a, b in (chunk(size, parts, i) for i in range(parts))]
    assert found == expected + [0] * (parts - len(expected))


BOXES = st.tuples(
    st.lists(st.integers(1, 7), min_size=2, max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.lists(st.sampled_from([None, 0, 1]), min_size=2, max_size=2),
    st.lists(st.sampled_from([None, 0, 1]), min_size=2, max_size=2),
)


@settings(max_examples=200)
@given(BOXES)
def test_every_wanted_entry_is_handed_over_exactly_once_and_by_a_holder(drawn):
    shape, mesh, before, after = drawn
    have = shard_boxes(shape, mesh, before[: len(mesh)])
    want = shard_boxes(shape, mesh, after[: len(mesh)])
    found = transfers(Item(tuple(have), tuple(want)))
    filled = [torch.zeros(shape, dtype=torch.int64) for _ in want]
    for box, source, target in found:
        assert overlap(box, have[source]) == box and overlap(box, want[target]) == box
        filled[target][tuple(slice(a, b) for a, b in box)] += 1
        assert source == target or overlap(have[target], want[target]) != want[target]
    for count, box in zip(filled, want, strict=True):
        inside = count[tuple(slice(a, b) for a, b in box)]
        assert (inside == 1).all() and count.sum() == volume(box)


def test_the_work_of_a_gpt_is_balanced_to_a_few_percent():
    shapes = 6 * [(384, 384)] * 4 + 6 * [(1024, 384), (1024, 384), (384, 1024)]
    costs = [float(min(shape) ** 2 * max(shape)) for shape in shapes]
    for processes in (2, 4, 8):
        loads = [0.0] * processes
        assign_owners(costs, loads)
        assert max(loads) <= 1.1 * sum(costs) / processes
    assert math.isclose(sum(loads), sum(costs))


def test_without_processes_a_group_is_an_error():
    with pytest.raises(OptionError, match="init_process_group"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], process_group="world")
