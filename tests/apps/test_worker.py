"""The page's thread: the newest request wins, the others are given up, errors are handed over."""

from __future__ import annotations

import threading
from typing import Any

from orthokit_widgets.momentum_data import Cache
from orthokit_widgets.worker import Job, Worker


class Heard:
    def __init__(self) -> None:
        self.results: dict[Any, Any] = {}
        self.errors: dict[Any, Exception] = {}
        self.worker = Worker(self.results.__setitem__, self.errors.__setitem__)


def test_the_newest_request_wins_and_the_running_one_is_told_to_give_up() -> None:
    heard, running = Heard(), threading.Event()

    def slow(job: Job) -> str | None:
        running.set()
        assert job.cancelled.wait(20)

    heard.worker.want("slow", slow)
    assert running.wait(20)
    heard.worker.want("skipped", lambda job: "skipped")
    heard.worker.want("last", lambda job: "last")
    assert heard.worker.join(20)
    assert heard.results == {"last": "last"}
    assert heard.worker.job is None


def test_asking_again_for_what_runs_does_not_start_it_anew() -> None:
    heard, go, calls = Heard(), threading.Event(), []

    def compute(job: Job) -> int:
        calls.append(job.key)
        assert go.wait(20)
        return len(calls)

    for _ in range(5):
        heard.worker.want("same", compute)
    go.set()
    assert heard.worker.join(20)
    assert calls == ["same"]
    assert heard.results == {"same": 1}


def test_an_error_reaches_the_page_and_the_thread_goes_on() -> None:
    heard = Heard()
    heard.worker.want("bad", lambda job: 1 / 0)
    assert heard.worker.join(20)
    assert isinstance(heard.errors["bad"], ZeroDivisionError)
    heard.worker.want("good", lambda job: 1)
    assert heard.worker.join(20)
    assert heard.results == {"good": 1}


def test_what_is_forgotten_is_not_waited_for() -> None:
    heard, running = Heard(), threading.Event()

    def slow(job: Job) -> None:
        running.set()
        assert job.cancelled.wait(20)

    heard.worker.want("slow", slow)
    assert running.wait(20)
    heard.worker.forget()
    assert heard.worker.job is None
    assert heard.worker.join(20)
    assert heard.results == {}


def test_a_cache_drops_the_least_recently_used_and_keeps_the_newest_whatever_its_size() -> None:
    cache = Cache(10, len)
    cache.put("a", "xxxx")
    cache.put("b", "yyyy")
    assert cache.get("a") == "xxxx"
    cache.put("c", "zzzz")
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == ("xxxx", None, "zzzz")
    cache.put("huge", "x" * 50)
    assert (len(cache), cache.get("huge")) == (1, "x" * 50)
