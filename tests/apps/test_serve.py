"""``orthokit dash``: what it says, which port it takes, and that a closed page stops its training."""

from __future__ import annotations

import asyncio
import doctest
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orthokit_widgets
import pytest
from orthokit_widgets import _charts, serve
from orthokit_widgets.page import PAGES
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from orthokit.lab.runs import runs


class Loop:
    def start(self) -> None: ...

    def call_later(self, delay: float, function: Any) -> None: ...


class Stub:
    """Stands for a server that ends at once."""

    io_loop = Loop()

    def start(self) -> None: ...


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of the servers that were made, none of which listens."""
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(serve, "make_server", lambda **given: options.append(given) or Stub())
    return options


def test_a_taken_port_gives_the_next_free_one_and_says_so(
    made: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port), "--no-open"]) == 0
    said = capsys.readouterr().out
    assert made[0]["port"] > port
    assert f"Port {port} is taken; using {made[0]['port']}." in said
    assert f"http://127.0.0.1:{made[0]['port']}/" in said


def test_port_nought_takes_any_free_port(made: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--port", "0"]) == 0
    assert made[0]["port"] > 0
    assert f"Using the free port {made[0]['port']}." in capsys.readouterr().out


@pytest.mark.parametrize(("address", "warned"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_an_address_that_others_reach_is_warned_about(
    made: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], address: str, warned: bool
) -> None:
    assert serve.main(["--port", "0", "--address", address]) == 0
    assert ("can be reached from other machines" in capsys.readouterr().out) == warned
    assert made[0]["address"] == address


def test_an_address_that_is_not_this_machine_is_one_sentence(
    made: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["--address", "192.0.2.1", "--port", "5006"]) == 1
    assert "The pages cannot be served at 192.0.2.1" in capsys.readouterr().out
    assert made == []


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--num-threads", "0"], ["--port", "x"]])
def test_bad_arguments_are_refused(made: list[dict[str, Any]], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main(arguments)
    assert ended.value.code == 2
    assert made == []


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.status == 200
        return answer.read().decode()


def test_the_index_leads_to_all_pages_and_each_is_whole(server: str, runs_folder: Path) -> None:
    index = get(server)
    assert str(runs_folder) in index
    for title, page in PAGES.items():
        assert f'href="{page}"' in index
        html = get(server + page)
        assert f"<title>{title} · orthokit</title>" in html
        # Bokeh names its own scripts by relative addresses here; nothing may point elsewhere.
        assert "https://" not in "".join(part.split(">")[0] for part in html.split("<script")[1:])
        assert "https://" not in "".join(part.split(">")[0] for part in html.split("<link")[1:])


def test_only_pages_of_this_server_may_open_its_sockets(server: str) -> None:
    async def status(origin: str) -> int:
        request = HTTPRequest(server.replace("http", "ws") + "momentum/ws", headers={"Origin": origin})
        try:
            await websocket_connect(request)
        except HTTPClientError as refused:
            return refused.code
        return 101

    # In a thread of its own: a browser of other tests may keep an event loop running in this one.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(lambda: asyncio.run(status("http://elsewhere.example"))).result(60) == 403


KILLED = """
import sys, threading, time
from orthokit_widgets import serve, training_run

settings = dict(optimizer="muon", order="pre", momentum=0.9, lr=0.01, model="cnn", data="digits", seed=0, budget=0.1)
run = training_run.LiveRun(settings | {"steps": 100_000}, sys.argv[1])

def wait():
    while run.step < 3:
        time.sleep(0.05)
    print("training", flush=True)

threading.Thread(target=wait, daemon=True).start()
raise SystemExit(serve.main(["--port", "0"]))
"""


def test_a_killed_server_leaves_its_runs_resumable(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "training" not in said or "Live pages" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.terminate()
        assert "Ended." in process.stdout.read()
        assert process.wait(60) == 0
    assert runs(tmp_path)["status"].tolist() == ["interrupted"]


@pytest.mark.parametrize("module", [orthokit_widgets, _charts])
def test_the_examples_run(module: Any) -> None:
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (found.attempted > 0, found.failed) == (True, 0)
