"""A real server in its own process, and a real browser that fails a test when anything is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60_000  # ms; a wait is for a sentence on the page, never for a time


def start(command: list[str], log: Path, sign: str, env: dict[str, str] | None = None) -> tuple[subprocess.Popen, str]:
    """Start a server; its process and the first line of its output that holds ``sign``."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for line in log.read_text(errors="replace").splitlines():
            if sign in line:
                return process, line
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')}")


def end(process: subprocess.Popen) -> None:
    """End a server that was started here."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def started() -> Iterator[Callable[..., str]]:
    """Starts servers, as :func:`start` does, and gives the line they answered with; all end with the tests."""
    processes = []

    def launch(*arguments: Any, **options: Any) -> str:
        process, line = start(*arguments, **options)
        processes.append(process)
        return line

    yield launch
    for process in processes:
        end(process)


CLOSED_TAB = re.compile(
    r"Task exception was never retrieved\nfuture: [^\n]*WebSocketClosedError\(\)>\n"
    r"Traceback(?:(?!Task exception).)*?\ntornado\.websocket\.WebSocketClosedError\n",
    re.DOTALL,
)


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of the server."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def server(started: Callable[..., str], runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of ``orthokit dash`` in its own process, ending with a slash."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = ["-m", "orthokit_widgets.serve", "--port", "0", "--root", str(runs_folder)]
    line = started(command, log, "Live pages at")
    yield line.split("Live pages at ")[1].split(" ")[0]
    # A tab that closes while a message is on its way: the web server says so itself and drops the message.
    text = CLOSED_TAB.sub("", log.read_text())
    assert "Traceback" not in text, text[-4000:]


@pytest.fixture
def watched(browser: Any) -> Iterator[Any]:
    """A fresh page; afterwards: nothing fetched from elsewhere, no error in the console or on the page."""
    from playwright.sync_api import expect

    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page = context.new_page()
    external: list[str] = []
    errors: list[str] = []

    def seen(request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1", "ws://127.0.0.1", "http://localhost", "data:", "blob:")):
            external.append(request.url)

    def heard(message: Any) -> None:
        if message.type == "error":
            errors.append(f"console: {message.text} ({message.location.get('url', '')})")

    page.on("request", seen)
    page.on("pageerror", lambda error: errors.append(f"page: {error}"))
    page.on("console", heard)
    page.on("response", lambda answer: errors.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.external, page.errors = external, errors
    yield page
    context.close()
    assert not external, external
    assert not errors, errors
