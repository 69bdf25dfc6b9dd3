"""One thread for what takes longer than an answer may: it works on the newest request and drops the others."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

__all__ = ["Job", "Worker"]

_PATIENCE = 20.0  # seconds for what was given up at the end of the process; the longest step takes a few
_WORKERS: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Let no thread be inside torch when the interpreter is taken down: that ends the process with an abort."""
    for worker in list(_WORKERS):
        worker.forget()
    for worker in list(_WORKERS):
        worker.join(_PATIENCE)


class Job:
    """What a computation is given: whether to give up, and where to say how far it is."""

    def __init__(self, key: Hashable, compute: Callable[[Job], Any]) -> None:
        self.key, self.compute = key, compute
        #: Set when the result is not wanted any more.
        self.cancelled = threading.Event()
        #: How much is done, 0 to 1.
        self.progress = 0.0


class Worker:
    """Runs the newest requested computation in a daemon thread.

    Args:
        done: Called in that thread as ``done(key, result)``; a computation that returns ``None`` gave up.
        failed: Called in that thread as ``failed(key, error)``.
    """

    def __init__(self, done: Callable[[Hashable, Any], None], failed: Callable[[Hashable, Exception], None]) -> None:
        self._done, self._failed = done, failed
        self._lock = threading.Condition()
        self._running: Job | None = None
        self._next: Job | None = None
        self._thread: threading.Thread | None = None
        _WORKERS.add(self)

    def want(self, key: Hashable, compute: Callable[[Job], Any]) -> None:
        """Compute this next; asking again for what is running or waiting changes nothing."""
        with self._lock:
            newest = self._next or self._running
            if newest is not None and newest.key == key and not newest.cancelled.is_set():
                return
            if self._running is not None:
                self._running.cancelled.set()
            self._next = Job(key, compute)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="orthokit-page-worker", daemon=True)
                self._thread.start()

    def forget(self) -> None:
        """Give up what is running and waiting."""
        with self._lock:
            self._next = None
            if self._running is not None:
                self._running.cancelled.set()

    @property
    def job(self) -> Job | None:
        """What is being computed or waits to be; ``None`` when there is nothing to wait for."""
        with self._lock:
            job = self._next or self._running
            return None if job is None or job.cancelled.is_set() else job

    def join(self, timeout: float) -> bool:
        """Wait until there is nothing to do; whether that came true within ``timeout`` seconds."""
        with self._lock:
            return self._lock.wait_for(lambda: self._thread is None, timeout)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._running, self._next = self._next, None
                job = self._running
                if job is None:
                    self._thread = None
                    self._lock.notify_all()
                    return
            try:
                result = job.compute(job)
                if result is not None:
                    self._done(job.key, result)
            except Exception as error:
                # The thread has no caller: the page shows the error.
                self._failed(job.key, error)
