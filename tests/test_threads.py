"""Work through a few threads: bounded memory, an order that can be chosen, an error or a stop that ends it."""

import threading

import pytest
import torch

from orthokit._threads import clock, run_bounded


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
