"""Work through a few threads: bounded memory, an order that can be chosen, an error or a stop that ends it."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orthokit import _threads
from orthokit._threads import clock, run_bounded, seat, share_out


@pytest.mark.parametrize("threads", [1, 3])
def test_everything_is_done_once_and_told_in_this_thread(threads):
    done, told = [], []
    assert run_bounded(
        done.append,
        dict.fromkeys("abcde", 1),
        threads=threads,
        done=lambda name: told.append((name, threading.current_thread() is threading.main_thread())),
    )
    assert sorted(done) == list("abcde") and sorted(told) == [(name, True) for name in "abcde"]


@pytest.mark.parametrize(("order", "expected"), [("given", ["b", "a", "c"]), ("dearest", ["a", "b", "c"])])
def test_the_order_is_the_given_one_or_that_of_the_costs(order, expected):
    done: list[str] = []
    run_bounded(done.append, {"b": 5, "a": 9, "c": 1}, threads=1, done=lambda name: None, order=order)
    assert done == expected


def test_large_tensors_are_worked_on_alone_and_small_ones_together() -> None:
    lock, running, together = threading.Lock(), set(), []
    costs = {f"small{i}": 10 for i in range(20)} | {"large": 1 << 40, "larger": 1 << 41}

    def work(name: str) -> None:
        with lock:
            running.add(name)
            together.append(frozenset(running))
        with lock:
            running.discard(name)

    done: list[str] = []
    run_bounded(work, costs, threads=4, done=done.append)
    assert sorted(done) == sorted(costs)
    assert all(len(names) == 1 for names in together if "larger" in names)


def test_an_error_ends_the_rest():
    done: list[str] = []

    def work(name: str) -> None:
        if name == "b":
            raise ValueError("b is bad")
        done.append(name)

    with pytest.raises(ValueError, match="b is bad"):
        run_bounded(work, dict.fromkeys("abcdef", 1), threads=1, done=lambda name: None, order="given")
    assert done == ["a"]


def test_a_stop_begins_nothing_more_and_finishes_what_runs():
    stop, done = threading.Event(), []
    whole = run_bounded(
        done.append, dict.fromkeys("abcdef", 1), threads=1, done=lambda name: stop.set(), order="given", stop=stop
    )
    assert not whole and done == ["a"]


def test_the_threads_share_the_cores_of_torch_and_give_them_back():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        run_bounded(
            lambda name: seen.append(torch.get_num_threads()), {"a": 1, "b": 1}, threads=2, done=lambda name: None
        )
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_nothing_to_do_is_done():
    assert run_bounded(lambda name: None, {}, threads=2, done=lambda name: None)


def test_a_clock_counts_from_its_call():
    assert 0 <= clock()() < 5


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_pieces_are_shared_out_to_threads_of_one_core_without_gradients() -> None:
    found, both = [], threading.Barrier(2, timeout=60)

    def work(item: int) -> None:
        if item < 2:
            both.wait()  # only two threads at once get past it
        found.append((item, seat(), torch.get_num_threads(), torch.is_grad_enabled()))

    with torch.enable_grad():
        share_out(work, range(10), [1.0] * 10)
    assert sorted(item for item, *_ in found) == [*range(10)]
    assert {seat for _, seat, *_ in found} == {1, 2}
    assert all(cores == 1 and not grad for *_, cores, grad in found)
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled() and seat() == 0


@pytest.mark.usefixtures("two_threads")
def test_a_piece_that_would_keep_the_others_waiting_gets_all_cores_first() -> None:
    found: list[tuple[str, int, int]] = []
    share_out(lambda name: found.append((name, seat(), torch.get_num_threads())), "abcde", [1, 1, 9, 1, 1])
    assert found[0] == ("c", 0, 2)
    assert all(seat > 0 and cores == 1 for _, seat, cores in found[1:])


@pytest.mark.parametrize("costs", [[1.0] * 4, [1.0, 50.0, 2.0, 3.0]])
def test_with_one_thread_everything_stays_here_in_order(costs) -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    share_out(lambda item: found.append((item, seat())), range(4), costs)
    torch.set_num_threads(before)
    assert found == [(item, 0) for item in range(4)]


@pytest.mark.usefixtures("two_threads")
def test_the_first_error_ends_what_has_not_begun_and_is_raised_here() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            raise ValueError("1 is bad")
        torch.ones(300, 300).mm(torch.ones(300, 300))

    with pytest.raises(ValueError, match="1 is bad"):
        share_out(work, range(1000), [1.0] * 1000)
    assert len(begun) < 1000
    share_out(begun.append, range(2), [1.0, 1.0])  # and the threads are still there


@pytest.mark.usefixtures("two_threads")
def test_what_watches_this_thread_sees_everything() -> None:
    ones = torch.ones(8, 8)
    with FlopCounterMode(display=False) as counter:
        share_out(lambda item: ones @ ones, range(5), [1.0] * 5)
    assert counter.get_total_flops() == 5 * 2 * 8**3


@pytest.mark.usefixtures("two_threads")
def test_inference_tensors_can_be_written_in_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.zeros(4)
        share_out(lambda i: x[i : i + 1].add_(i), range(4), [1.0] * 4)
    assert x.tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("two_threads")
def test_shared_work_inside_shared_work_stays_in_its_thread() -> None:
    found: list[tuple[int, int]] = []

    def outer(item: int) -> None:
        here = seat()
        share_out(lambda inner: found.append((here, seat())), range(3), [1.0] * 3)

    share_out(outer, range(4), [1.0] * 4)
    assert len(found) == 12 and all(outer == inner for outer, inner in found)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_a_forked_process_gets_threads_of_its_own() -> None:
    program = """
import os, torch
from orthokit._threads import share_out
torch.set_num_threads(2)
share_out(print, ["parent"] * 2, [1.0, 1.0])
child = os.fork()
done = []
share_out(done.append, range(6), [1.0] * 6)
assert sorted(done) == [*range(6)], done
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
else:
    os._exit(0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120, capture_output=True)


def test_work_goes_on_in_a_thread_that_outlives_the_main_one() -> None:
    program = """
import threading, torch
from orthokit._threads import share_out
torch.set_num_threads(2)
def train():
    threading.main_thread().join()
    done = []
    for _ in range(3):
        share_out(done.append, range(6), [1.0] * 6)
    print(sorted(done))
threading.Thread(target=train).start()
if {hired}:
    share_out(lambda item: None, range(2), [1.0, 1.0])
"""
    for hired in ("True", "False"):
        given = [sys.executable, "-c", program.replace("{hired}", hired)]
        found = subprocess.run(given, check=True, timeout=120, capture_output=True, text=True)
        assert found.stdout.strip() == str(sorted([*range(6)] * 3)) and not found.stderr


@pytest.mark.usefixtures("two_threads")
def test_a_system_without_threads_to_give_leaves_the_work_here(monkeypatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_threads, "_CREWS", {})
    monkeypatch.setattr(threading.Thread, "start", refuse)
    found: list[tuple[int, int]] = []
    share_out(lambda item: found.append((item, seat())), range(4), [1.0] * 4)
    assert sorted(found) == [(item, 0) for item in range(4)] and torch.get_num_threads() == 2
