"""Many pieces of work through a few threads: how much is in memory is bounded, and somebody is told how far it is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

__all__ = ["clock", "run_bounded"]

# Elements that may be in the works per thread beside each other. Whatever is larger is worked on by itself.
_AT_ONCE = 1 << 26
# Seconds between two looks at whether to stop.
_LOOK = 0.2


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


def clock() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
