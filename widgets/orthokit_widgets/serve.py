"""``orthokit dash``: the pages on a port of this machine."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from orthokit.errors import OrthokitError

__all__ = ["main", "make_server"]

_ABOUT = {
    "momentum": "Pull momentum, noise and rank; see the singular values part into signal and noise.",
    "training": "Start, pause and stop a small training; watch its loss, spectra, gap and energy.",
    "race": "Let several optimizers train side by side; watch loss, spectra and drift, per step or per second.",
    "adapters": "Put OFT, BOFT, HRA or LoRA on real weights; see what stays and how orthogonal the rotation is.",
    "forgetting": "See what fine-tuning learnt and forgot, run by run; pull a run back along its path; start your own.",
    "inspect": "Look into any model file: spectra, ranks and rows of each matrix, and what fine-tuning changed.",
    "merge": "Merge experts by any method; see what each task, the old knowledge and the layers make of it; save it.",
}


def make_server(*, port: int, address: str = "127.0.0.1", root: str | Path | None = None, threads: int = 4) -> Any:
    """A server of the pages, listening and not yet answering: ``server.io_loop.start()`` does that.

    Args:
        port: Port to listen on; 0 takes any free one (``server.port`` says which).
        address: Address to listen on; default this machine only.
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        threads: Threads that answer, so that one session's work does not hold up another's; default 4.

    Returns:
        The Bokeh server.

    Raises:
        OSError: The port is taken.
    """
    import panel as pn
    from panel.io.server import get_server
    from tornado.web import RequestHandler

    from orthokit.lab.runs import runs_root
    from orthokit_widgets.adapters_view import AdaptersPage
    from orthokit_widgets.forgetting_view import ForgettingPage
    from orthokit_widgets.inspect_view import InspectPage
    from orthokit_widgets.merge_view import MergePage
    from orthokit_widgets.momentum_view import MomentumPage
    from orthokit_widgets.page import PAGES
    from orthokit_widgets.race_view import RacePage
    from orthokit_widgets.training_view import TrainingPage

    folder = runs_root(root).resolve()
    pn.config.nthreads = threads  # type: ignore[assignment]

    def momentum() -> Any:
        pn.extension("plotly")
        return MomentumPage(links=True)

    def training() -> Any:
        pn.extension("plotly")
        return TrainingPage(links=True, root=folder)

    def race() -> Any:
        pn.extension("plotly")
        return RacePage(links=True)

    def adapters() -> Any:
        pn.extension("plotly")
        return AdaptersPage(links=True)

    def forgetting() -> Any:
        pn.extension("plotly")
        return ForgettingPage(links=True, root=folder)

    def merge() -> Any:
        pn.extension("plotly")
        return MergePage(links=True)

    def inspect() -> Any:
        pn.extension("plotly")
        # Whoever reaches a public address must not read this machine's files.
        return InspectPage(links=True, local=_is_local(address))

    links = "".join(f'<li><a href="{url}"><strong>{name}</strong>{_ABOUT[url]}</a></li>' for name, url in PAGES.items())
    template = Template((Path(__file__).parent / "assets" / "index.html").read_text(encoding="utf-8"))
    index = template.substitute(items=links, root=escape(str(folder)))

    class Index(RequestHandler):
        def get(self) -> None:
            self.write(index)

    hosts = {address, "localhost", "127.0.0.1"}
    if not _is_local(address):
        hosts |= {socket.gethostname(), socket.getfqdn()}
    options: dict[str, Any] = {
        "address": address,
        "title": {url: f"{name} · orthokit" for name, url in PAGES.items()},
        "extra_patterns": [(r"/", Index)],
        # A session that is forgotten before a slow browser has loaded the scripts would be made anew, with addresses of
        # style sheets that point to the network. Closed pages stop their work by themselves, long before this.
        "unused_session_lifetime_milliseconds": 60_000,
        "check_unused_sessions_milliseconds": 5_000,
        "websocket_origin": [f"{host}:{port}" for host in hosts],
        "use_index": False,
    }
    pages: Any = {made.__name__: made for made in (momentum, training, race, adapters, forgetting, merge, inspect)}
    server = get_server(pages, port=port, **options)
    if port == 0:
        # The origins have to name the port that the system chose.
        server._tornado._websocket_origins = {f"{host}:{server.port}" for host in hosts}
    return server


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the pages until Ctrl-C.

    Args:
        argv: Arguments of ``orthokit dash``; default those of the process.

    Returns:
        0, or 1 when the server could not start.
    """
    parser = argparse.ArgumentParser(prog="orthokit dash", description="Serve the live pages on this machine.")
    parser.add_argument(
        "--port", type=int, default=5006, help="port; 0 or a taken one: the next that is free (%(default)s)"
    )
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument("--open", action=argparse.BooleanOptionalAction, default=False, help="open a browser")
    parser.add_argument("--root", default=None, help="folder of runs ($ORTHOKIT_RUNS, else ./runs)")
    parser.add_argument("--num-threads", type=int, default=4, help="threads that answer (%(default)s)")
    given = parser.parse_args(argv)
    from orthokit_widgets.training_run import stop_all

    if not 0 <= given.port <= 65535:
        parser.error(f"--port must lie in 0 to 65535; got {given.port}.")
    if given.num_threads < 1:
        parser.error(f"--num-threads must be at least 1; got {given.num_threads}.")
    if not _is_local(given.address):
        _say(
            f"Warning: {given.address} can be reached from other machines. Whoever reaches it can start trainings, "
            "upload model files to be inspected, and read the recorded runs; there is no password."
        )
    try:
        port = _free_port(given.address, given.port)
        server = make_server(port=port, address=given.address, root=given.root, threads=given.num_threads)
    except OSError as error:
        where = f"{given.address}, port {given.port}"
        _say(f"The pages cannot be served at {where}: {error}. Choose others by --address and --port.")
        return 1
    if port != given.port:
        _say(f"Port {given.port} is taken; using {port}." if given.port else f"Using the free port {port}.")
    host = given.address if given.address not in ("0.0.0.0", "::") else "127.0.0.1"
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    # A plain kill ends as Ctrl-C does, from the moment that the address is told: the runs under way are stopped, and
    # resumable.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _say(f"Live pages at {url} (Ctrl-C ends)")
            server.start()
            threading.Thread(target=_read_ahead, daemon=True).start()
            if given.open:
                import webbrowser

                server.io_loop.call_later(0.2, lambda: webbrowser.open(url))
            server.io_loop.start()
        stop_all()
    finally:
        signal.signal(signal.SIGTERM, before)
    _say("Ended.")
    return 0


def _read_ahead() -> None:
    """Read the recorded studies, which the first visitor of the pages Forgetting and Merge would wait a second for."""
    from orthokit_widgets import forgetting_data, merge_data

    # What is wrong with them is told on the page.
    for data in (forgetting_data, merge_data):
        with contextlib.suppress(OrthokitError):
            data.recorded()


def _say(text: str) -> None:
    sys.stdout.write(text + os.linesep)
    sys.stdout.flush()


def _is_local(address: str) -> bool:
    """Whether only this machine reaches an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _free_port(address: str, wanted: int) -> int:
    """``wanted`` or the next port that is free; any free one for 0."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    last: OSError | None = None
    for port in [0] if wanted == 0 else range(wanted, min(wanted + 50, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                last = error
                continue
            return probe.getsockname()[1]
    raise last or OSError("no port is free")


if __name__ == "__main__":
    sys.exit(main())
