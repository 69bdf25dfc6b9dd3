"""Running one notebook in a kernel of its own and telling the truth about every cell."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "Worker", "inject"]

# Kernels that start at the same instant compete for the disk and, over TCP, for ports.
_STAGGER = threading.Lock()
_PAUSE = 0.25
_STARTUP_SECONDS = 120


class _StoppedError(Exception):
    """Raised between two cells when the report is being stopped."""


@dataclass
class Outcome:
    """How a notebook ended: ``"ok"``, ``"failed"``, ``"timeout"`` or ``"interrupted"``, and why."""

    state: str
    reason: str = ""
    cells: list[dict[str, Any]] = field(default_factory=list)


def inject(notebook: Any, parameters: dict[str, Any]) -> None:
    """Adds an ``injected-parameters`` cell after the parameters cell, in place, as papermill writes it."""
    if not parameters:
        return
    from papermill.parameterize import parameterize_notebook

    notebook.metadata.setdefault("papermill", {})
    for cell in notebook.cells:  # papermill takes it that every cell has tags
        cell.metadata.setdefault("tags", [])
    made = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    notebook.cells = made.cells
    # papermill's own record would claim a run that it did not make.
    notebook.metadata.pop("papermill", None)


class Worker:
    """Runs one notebook; can be stopped from another thread.

    Args:
        folder: Working directory of the kernel; kept.
        environment: The kernel's whole environment.
        timeout: Seconds each cell may take, or None.
        changed: Called after each cell with ``(cells done, cells in all)``; the notebook holds its outputs by then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: dict[str, str],
        timeout: float | int | None = None,
        changed: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Keeps the settings; nothing starts yet."""
        self.folder = folder
        self.environment = environment
        self.timeout = timeout
        self.changed = changed
        self.stopped = threading.Event()
        self._process: int | None = None

    def run(self, notebook: Any) -> Outcome:
        """Executes the notebook in place.

        A kernel that dies before the first cell was sent is started once more: that is the machine, not the notebook.
        """
        outcome = self._attempt(notebook)
        if outcome.reason == _NO_KERNEL and not self.stopped.is_set():
            outcome = self._attempt(notebook)
        if self.stopped.is_set():
            outcome.state, outcome.reason = "interrupted", "stopped before it was finished"
        return outcome

    def stop(self, *, grace: float | int = 4.0) -> None:
        """Ends the kernel: first an interrupt, so that a training run saves itself, then by force."""
        self.stopped.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGINT)
        deadline = time.monotonic() + grace
        while self._process is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
                os.killpg(process, signal.SIGKILL)

    def _attempt(self, notebook: Any) -> Outcome:
        """One kernel from start to end."""
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

        steps = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
        cells: list[dict[str, Any]] = [{"index": index, "state": "not run", "seconds": None} for index in steps]
        at = dict(zip(steps, cells, strict=True))
        begun: dict[int, float] = {}

        def start(cell: Any, cell_index: int) -> None:
            if self.stopped.is_set():
                raise _StoppedError  # between two cells no kernel is busy that an interrupt could reach
            if cell_index in at:
                begun[cell_index] = time.perf_counter()
                at[cell_index]["state"] = "running"
                self.changed(len(begun) - 1, len(cells))

        def end(cell: Any, cell_index: int, execute_reply: Any) -> None:
            entry = at[cell_index]
            allowed = "raises-exception" in cell.metadata.get("tags", [])
            failed = execute_reply["content"]["status"] != "ok" and not allowed
            entry["state"] = "failed" if failed else "ok"
            entry["seconds"] = round(time.perf_counter() - begun[cell_index], 3)
            self.changed(len(begun), len(cells))

        state, reason = "ok", ""
        connection = Path(tempfile.mkdtemp(prefix="ok-"))
        client = self._client(notebook, connection, on_cell_execute=start, on_cell_executed=end)
        try:
            with (self.folder / "kernel.log").open("ab") as log:
                asyncio.run(
                    client.async_execute(cwd=str(self.folder), env=self.environment, stdout=log, stderr=log),
                )
        except CellTimeoutError:
            state, reason = "timeout", f"a cell took longer than {self.timeout:g} s"
        except CellExecutionError as error:
            state, reason = "failed", f"{error.ename}: {error.evalue}".strip().splitlines()[0][:300]
        except DeadKernelError:
            state, reason = "failed", "the kernel died (out of memory, or killed); see kernel.log"
        except Exception as error:  # whatever else the kernel machinery raises must end in a status, not in a thread
            state = "failed"
            reason = f"{type(error).__name__}: {str(error)[:300]}" if begun else _NO_KERNEL
        finally:
            self._process = None
            # A client whose kernel never came up leaves its clean-up registered, and it would fail at exit.
            atexit.unregister(client._cleanup_kernel)
            shutil.rmtree(connection, ignore_errors=True)
        if state == "failed" and not begun:
            reason = _NO_KERNEL
        for entry in cells:
            if entry["state"] == "running":
                entry["state"] = state if state != "ok" else "failed"
                entry["seconds"] = round(time.perf_counter() - begun[entry["index"]], 3)
        if state == "ok" and any(entry["state"] != "ok" for entry in cells):
            state, reason = "failed", "a cell did not complete"
        for index, entry in at.items():
            notebook.cells[index].metadata["orthokit"] = {"state": entry["state"], "seconds": entry["seconds"]}
        return Outcome(state, reason, cells)

    def _client(self, notebook: Any, connection: Path, **hooks: Any) -> Any:
        """A notebook client whose kernel is this very interpreter, whatever kernels the user has installed."""
        from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager
        from nbclient import NotebookClient

        worker = self

        class OwnKernel(KernelSpecManager):
            def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
                command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
                return KernelSpec(argv=command, display_name="orthokit", language="python")

        class Client(NotebookClient):
            def create_kernel_manager(self) -> Any:
                manager = AsyncKernelManager(kernel_spec_manager=OwnKernel(), kernel_name="python3")
                manager.connection_file = str(connection / "k.json")
                if os.name == "posix" and len(str(connection)) < 80:
                    # Sockets in a private folder: no port can be taken by somebody else.
                    manager.transport = "ipc"
                    manager.ip = str(connection / "k")
                self.km = manager
                return manager

            async def async_start_new_kernel(self, **options: Any) -> None:
                with _STAGGER:
                    await super().async_start_new_kernel(**options)
                    await asyncio.sleep(_PAUSE)
                worker._process = getattr(self.km.provisioner, "pid", None) if self.km else None

        return Client(
            notebook,
            timeout=int(self.timeout) if self.timeout else None,
            startup_timeout=_STARTUP_SECONDS,
            coalesce_streams=True,
            **hooks,
        )


_NO_KERNEL = "the kernel did not start; see kernel.log"
