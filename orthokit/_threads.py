"""Work through a few threads: long pieces with bounded memory and progress, short ones on one core each."""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["clock", "run_bounded", "seat", "share_out"]

T = TypeVar("T")

# Elements that may be in the works per thread beside each other. Whatever is larger is worked on by itself.
_AT_ONCE = 1 << 26
# Seconds between two looks at whether to stop.
_LOOK = 0.2
# How much longer than with equal shares the fullest core may work before the dearest piece gets all cores instead.
_UNEVEN = 1.2


def run_bounded(
    work: Callable[[str], None],
    costs: Mapping[str, int],
    *,
    threads: int,
    done: Callable[[str], None],
    order: str = "dearest",
    stop: threading.Event | None = None,
) -> bool:
    """Call ``work`` for every name on a few threads, and ``done`` in this thread after each.

    Args:
        work: What is to be done with a name. The first error it raises ends the rest and is raised here.
        costs: By name, the elements that it has in memory.
        threads: How many at a time, ``>= 1``. Fewer run while their costs together would pass the cost of the dearest
            and the share of memory that each thread has.
        done: Told of each name, in the order in which they come to an end.
        order: ``"dearest"`` first (default), which ends soonest; or ``"given"``, the order of ``costs``.
        stop: Once set, no more work begins; default never.

    Returns:
        Whether all of it was done.
    """
    # Taken from the end.
    waiting = sorted(costs, key=costs.__getitem__) if order == "dearest" else [*costs][::-1]
    if not waiting:
        return True
    room = max(*costs.values(), threads * _AT_ONCE)
    running: dict[Future[None], str] = {}
    share = max(1, torch.get_num_threads() // threads)
    # The number of threads of LAPACK belongs to the thread that asks for it: set here alone, every worker would take
    # all cores, and two of them wait for each other.
    pool = ThreadPoolExecutor(threads, "orthokit", initializer=torch.set_num_threads, initargs=(share,))
    with _shared_cores(share), pool:
        try:
            while running or (waiting and not (stop is not None and stop.is_set())):
                while waiting and len(running) < threads and not (stop is not None and stop.is_set()):
                    if running and sum(costs[name] for name in running.values()) + costs[waiting[-1]] > room:
                        break
                    name = waiting.pop()
                    running[pool.submit(work, name)] = name
                for future in wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    future.result()
                    done(name)
        finally:
            pool.shutdown(cancel_futures=True)
    return not waiting


@contextlib.contextmanager
def _shared_cores(share: int) -> Iterator[None]:
    """Give this thread as many cores as each of the others has, and put the number back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(share)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def share_out(work: Callable[[T], object], items: Sequence[T], costs: Sequence[float]) -> None:
    """Call ``work`` for every item without gradients, several at a time on one core each.

    One matrix on all cores waits for the slowest of them at every operation, and for the interpreter between two: many
    matrices on one core each do not. It pays from about a millisecond of work on.

    Args:
        work: What is to be done with an item. It writes nothing that the work for another item reads or writes, and
            takes scratch memory by :func:`seat`. The first error it raises ends the rest and is raised here.
        items: Whatever it takes; those for which it takes longest begin.
        costs: How long each takes, in any unit.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2 or _watched():
        for item in items:
            work(item)
        return
    order, rest = sorted(range(len(items)), key=costs.__getitem__), sum(costs)
    while order and _fullest([costs[i] for i in reversed(order)], threads) > _UNEVEN * rest / threads:
        rest -= costs[order[-1]]
        work(items[order.pop()])
    waiting = deque(items[i] for i in reversed(order))
    inference = torch.is_inference_mode_enabled()

    def take() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                try:
                    work(item)
                except BaseException:
                    waiting.clear()
                    raise

    running: list[Future[None]] = []
    try:
        try:
            crew = _crew(threads)
            running.extend(crew.submit(take) for _ in range(min(threads, len(order))))
        except RuntimeError:
            # No thread begins any more: the main thread has ended, or the system gives none. What is left is done here.
            take()
        for future in running:
            future.result()
    finally:
        waiting.clear()
        wait(running)


def seat() -> int:
    """Which of the threads of :func:`share_out` this one is, from 1; 0 for any other thread."""
    return getattr(_HERE, "seat", 0)


_HERE = threading.local()
_CREWS: dict[int, ThreadPoolExecutor] = {}
_HIRING = threading.Lock()
# A forked process has none of the threads of its parent.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_CREWS.clear)


def _crew(size: int) -> ThreadPoolExecutor:
    """That many threads of one core each; they stay, since new ones would have to set up their products again."""
    with _HIRING:
        if size not in _CREWS:
            crew, present = ThreadPoolExecutor(size, "orthokit-core"), threading.Barrier(size + 1)

            def sit_down(number: int) -> None:
                torch.get_num_threads()  # a thread's first look takes over the number of the process: have it now
                torch.set_num_threads(1)
                _HERE.seat = number
                present.wait()

            try:
                for number in range(1, size + 1):
                    crew.submit(sit_down, number)
                present.wait()
            except BaseException:
                present.abort()  # or those that sit would wait for the others for good, and the process with them
                crew.shutdown()
                raise
            finally:
                # What one thread asks for becomes the number of every thread that begins later.
                torch.set_num_threads(size)
            _CREWS[size] = crew
        return _CREWS[size]


def _fullest(costs: Sequence[float], threads: int) -> float:
    """How long the last of the threads works if each takes the dearest piece left; ``costs`` begin with the dearest."""
    ends = [0.0] * threads
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def _watched() -> bool:
    """Whether something of this thread alone looks at, or changes, each operation: other threads would escape it."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )


def clock() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
