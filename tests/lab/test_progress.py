"""The progress line in a terminal, a log, a notebook and a report."""

import io
import json
import sys

import pytest

from orthokit.lab import progress as module
from orthokit.lab.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.delenv("ORTHOKIT_PROGRESS_FILE", raising=False)
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when told to."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_terminal_rewrites_one_line_and_ends_it(monkeypatch, clock):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("train", steps=10) as bar:
        for step in range(1, 11):
            clock[0] += 1.0
            bar.update(step, {"loss": 2.0 / step})
    text = stream.getvalue()
    assert text.count("\r\x1b[2K") == 10 and text.count("\n") == 1 and text.endswith("\n")
    assert "train 10/10 " + "█" * 24 in text and "1.0 steps/s" in text and "loss 0.2" in text
    assert "train 5/10 " + "█" * 12 + "·" * 12 in text and "5 s left" in text


def test_terminal_draws_only_now_and_then_but_always_the_last(monkeypatch, clock):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("train", steps=1000) as bar:
        for step in range(1, 1001):
            clock[0] += 0.001
            bar.update(step, {})
    assert 2 <= stream.getvalue().count("\r") <= 8
    assert "1000/1000" in stream.getvalue()


def test_log_gets_whole_lines_without_control_characters(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("train", steps=60) as bar:
        for step in range(1, 61):
            clock[0] += 1.0
            bar.update(step, {"loss": 1.0})
    lines = stream.getvalue().splitlines()
    # The first look, one every ten seconds, and the last.
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 11, 21, 31, 41, 51, 60]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_report_gets_json_rows_in_its_file(monkeypatch, clock, tmp_path):
    file = tmp_path / "progress.jsonl"
    monkeypatch.setenv("ORTHOKIT_PROGRESS_FILE", str(file))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("train", steps=3) as bar:
        for step in (1, 2, 3):
            clock[0] += 1.0
            bar.update(step, {"loss": 0.5})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"label": "train", "step": step, "steps": 3, "loss": 0.5} for step in (1, 2, 3)]
    assert sys.stderr.getvalue() == ""


def test_notebook_updates_one_display(monkeypatch, clock):
    IPython = pytest.importorskip("IPython")
    display = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, content, raw):
            shown.append(("update", content["text/plain"]))

    def first(content, raw, display_id):
        shown.append(("first", content["text/plain"]))
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython", IPython)
    monkeypatch.setattr(IPython, "get_ipython", lambda: type("Shell", (), {"kernel": object()})())
    monkeypatch.setattr(display, "display", first)
    with Progress("train", steps=3) as bar:
        for step in (1, 2, 3):
            clock[0] += 1.0
            bar.update(step, {})
    assert [kind for kind, _ in shown] == ["first", "update", "update"]
    assert shown[-1][1].startswith("train 3/3")


def test_switched_off_it_writes_nothing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("train", steps=2, enabled=False) as bar:
        bar.update(2, {"loss": 1.0})
    assert stream.getvalue() == ""


def test_pace_counts_the_steps_of_this_call_only():
    bar = Progress("train", steps=100, start=50, enabled=False)
    line = bar.line(60, {"loss": 1.5, "lr": 1e-3}, elapsed=5.0)
    assert "60/100" in line and "2.0 steps/s" in line and "20 s left" in line and line.endswith("loss 1.5, lr 0.001")
    assert "starting" in bar.line(50, {}, elapsed=0.0)
