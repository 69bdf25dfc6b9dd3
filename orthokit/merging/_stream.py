"""Many tensors through a few threads: how much is in memory is bounded, and somebody is told how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

__all__ = ["MergeProgress", "run_bounded"]

# Elements that may be in the works per thread beside each other. Whatever is larger is worked on by itself.
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class MergeProgress:
    """How far a merge of files is.

    Args:
        name: The tensor that was written last.
        done: Tensors that are written.
        total: Tensors of the model.
        bytes_done: Bytes that are written.
        bytes_total: Bytes of the model.
        bytes_resumed: Of those that are written, how many an earlier run wrote.
        seconds: Since the start of this run.
    """

    name: str
    done: int
    total: int
    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second of this run."""
        return (self.bytes_done - self.bytes_resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float:
        """Seconds to go at this rate; infinite at rate 0."""
        left = self.bytes_total - self.bytes_done
        return left / self.rate if self.rate > 0 else 0.0 if left == 0 else float("inf")

    def line(self) -> str:
        """One line of text.

        Example:
            >>> MergeProgress("W", 3, 12, 25 * 10**6, 10**8, 0, 0.5).line()
            'merge 3/12 tensors, 25 of 100 MB, 50 MB/s, 2 s left'
        """
        left = f"{self.remaining:.0f} s left" if self.remaining < float("inf") else "starting"
        sizes = f"{self.bytes_done / 1e6:,.0f} of {self.bytes_total / 1e6:,.0f} MB"
        return f"merge {self.done}/{self.total} tensors, {sizes}, {self.rate / 1e6:,.0f} MB/s, {left}"


def run_bounded(
    work: Callable[[str], None],
    costs: Mapping[str, int],
    *,
    threads: int,
    done: Callable[[str], None],
) -> None:
    """Call ``work`` for every name, the dearest first, on a few threads; ``done`` in this thread after each.

    Args:
        work: What is to be done with a name. The first error it raises ends the rest and is raised here.
        costs: By name, the elements that it has in memory.
        threads: How many at a time, ``>= 1``. Fewer run while their costs together would pass the cost of the dearest
            and the share of memory that each thread has.
        done: Told of each name, in the order in which they come to an end.
    """
    waiting = sorted(costs, key=costs.__getitem__)  # taken from the end
    if not waiting:
        return
    room = max(costs[waiting[-1]], threads * _AT_ONCE)
    running: dict[Future[None], str] = {}
    with _shared_cores(threads), ThreadPoolExecutor(threads, thread_name_prefix="orthokit-merge") as pool:
        try:
            while waiting or running:
                while waiting and len(running) < threads:
                    if running and sum(costs[name] for name in running.values()) + costs[waiting[-1]] > room:
                        break
                    name = waiting.pop()
                    running[pool.submit(work, name)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    future.result()
                    done(name)
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _shared_cores(threads: int) -> Iterator[None]:
    """Give each of the threads its share of the cores that torch may use, and put the number back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock() -> Callable[[], float]:
    """Seconds since this call."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
