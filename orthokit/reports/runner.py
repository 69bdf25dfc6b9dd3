"""Notebooks in, report out: strict about parameters, honest about states, resumable after a kill."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthokit.errors import MissingExtraError, OptionError, ReportError, unknown_name
from orthokit.reports import index, ledger, page
from orthokit.reports.claims import read_metrics, write_json
from orthokit.reports.execution import Outcome, Worker, inject
from orthokit.reports.notebook import SIZES, duration
from orthokit.reports.progress import Console, last_step
from orthokit.reports.sources import Source, code_version, read_source, select
from orthokit.reports.status import Folder, Status, latest, new_folder, now

__all__ = ["Report", "report", "resolve"]

_POLL = 0.5


@dataclass
class Report:
    """A finished (or interrupted) report."""

    folder: Path
    statuses: list[Status]
    interrupted: bool = False

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"

    @property
    def ok(self) -> bool:
        """Every notebook ran to its end."""
        return not self.interrupted and all(status.state == "ok" for status in self.statuses)


def report(
    names: Sequence[str] = (),
    *,
    size: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    jobs: int = 1,
    resume: bool = False,
    out: str | os.PathLike[str] | None = None,
    timeout: float | int | None = None,
    notebooks: str | os.PathLike[str] | None = None,
    stream: Any = None,
) -> Report:
    """Executes notebooks and writes a report: executed notebooks, an offline HTML page each, an index and a ledger.

    Everything that can be wrong with the request is found before the first kernel starts.

    Args:
        names: Notebooks, by name or unique beginning; empty means all.
        size: ``"smoke"``, ``"laptop"`` or ``"gpu"``, given to every notebook that has a parameter ``size``.
        parameters: Overrides; each must be a parameter of every chosen notebook. ``"NAME:parameter"`` addresses one.
        jobs: Notebooks at a time; the cores are shared among their kernels.
        resume: Continue the newest report (or the one in ``out``): what finished with the same source, parameters
            and code is kept, the rest runs.
        out: The report's folder; default ``reports/<date>``.
        timeout: Seconds each cell may take; None for no limit.
        notebooks: Folder of notebook sources; default the project's.
        stream: An open text stream for progress; default the standard error stream.

    Returns:
        Where the report is and how each notebook ended.

    Raises:
        UnknownNameError: A notebook, size or parameter does not exist.
        ReportError: A value of the wrong type; an unreadable notebook; a folder that cannot be written.
        OptionError: ``jobs`` or ``timeout`` is out of range.
    """
    _require()
    if jobs < 1 or (timeout is not None and timeout < 1):
        raise OptionError(f"jobs and timeout must be at least 1; got jobs={jobs}, timeout={timeout}.")
    chosen = select(names, Path(notebooks) if notebooks else None)
    sources = [read_source(path) for path in chosen.values()]
    values = resolve(sources, parameters or {}, size=size)
    folder = _folder(out, resume)
    with folder.locked():
        plan = []
        for source in sources:
            key = source.key(values[source.name])
            known = folder.read(source.name) if resume else None
            if known and known.state == "ok" and known.key == key and folder.page(source.name).is_file():
                known.reused = True
                plan.append((source, known))
                continue
            folder.clear(source.name)
            status = Status(source.name, source.title, key=key, parameters=values[source.name], version=code_version())
            folder.write(status)
            plan.append((source, status))
        write_json(folder.manifest, {"notebooks": [s.name for s in sources], "begun": now(), "version": code_version()})
        return _Run(folder, plan, jobs=jobs, timeout=timeout, stream=stream or sys.stderr).go()


def resolve(
    sources: Sequence[Source], parameters: Mapping[str, Any], *, size: str | None = None
) -> dict[str, dict[str, Any]]:
    """The overrides of each notebook, checked.

    Args:
        sources: The chosen notebooks.
        parameters: Name, or ``notebook:name``, to value.
        size: The common size.

    Returns:
        Notebook name to its overrides.

    Raises:
        UnknownNameError: A notebook lacks a parameter that is meant for it.
        ReportError: A value does not fit.
    """
    if size is not None and size not in SIZES:
        raise unknown_name("size", size, SIZES)
    own: dict[str, dict[str, Any]] = {source.name: {} for source in sources}
    for name, value in parameters.items():
        where, colon, parameter = name.rpartition(":")
        fits = [n for n in own if n == where] or [n for n in own if n.startswith(where)] if colon else list(own)
        if not fits or (colon and len(fits) > 1):
            raise unknown_name("notebook", where, own)
        for notebook in fits:
            own[notebook][parameter] = value
    if size is not None:
        for source in sources:
            if "size" in source.parameters:
                own[source.name].setdefault("size", size)
    return {source.name: source.resolve(own[source.name]) for source in sources}


class _Run:
    """One call of :func:`report`, from the first kernel to the last page."""

    def __init__(
        self, folder: Folder, plan: list[tuple[Source, Status]], *, jobs: int, timeout: Any, stream: Any
    ) -> None:
        self.folder = folder
        self.plan = plan
        self.jobs = min(jobs, max(len(plan), 1))
        self.timeout = timeout
        self.console = Console(stream)
        self.workers: dict[str, Worker] = {}
        self.at: dict[str, tuple[int, int]] = {}
        self.stopping = threading.Event()
        self.guard = threading.Lock()

    def go(self) -> Report:
        """Runs the plan and writes the pages."""
        todo = [(source, status) for source, status in self.plan if not status.reused]
        for _, status in self.plan:
            if status.reused:
                self.console.line(f"kept   {status.name}  (finished before with the same source and parameters)")
        self._index(final=not todo)
        interrupted = False
        futures: list[Future[None]] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                with _terminable():
                    futures = [pool.submit(self._one, source, status) for source, status in todo]
                    self._watch(futures)
            except KeyboardInterrupt:
                interrupted = True
                self.stopping.set()
                self.console.line("stopping: the notebooks that run are interrupted, their status is kept")
                for worker in list(self.workers.values()):
                    worker.stop()
                wait(futures)
        for future in futures:
            future.result()
        for _, status in todo:
            if status.state in ("queued", "running"):
                status.state, status.reason = "interrupted", "the report was stopped before it ran"
                self.folder.write(status)
        self._index(final=True)
        self.console.status("")
        return Report(self.folder.path, [status for _, status in self.plan], interrupted)

    def _watch(self, futures: list[Future[None]]) -> None:
        """Shows progress until all are done."""
        while True:
            _, waiting = wait(futures, timeout=_POLL)
            if not waiting:
                return
            self.console.status(" | ".join(self._now()))

    def _now(self) -> Iterator[str]:
        """What each running notebook is at."""
        for name in sorted(self.workers):
            done, total = self.at.get(name, (0, 0))
            step = last_step(self.folder.work(name) / "progress.jsonl")
            where = f"cell {min(done + 1, total)} of {total}" if total else "starting"
            yield f"{name}: {where}" + (f", {step}" if step else "")

    def _one(self, source: Source, status: Status) -> None:
        """Runs one notebook and leaves its status, notebook file and page."""
        import nbformat

        if self.stopping.is_set():
            return
        work = self.folder.work(source.name)
        notebook = nbformat.read(source.path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        status.state, status.started = "running", now()
        self._record(status)
        self.console.line(f"start  {source.name}")
        begun = time.perf_counter()

        def changed(done: int, total: int) -> None:
            self.at[source.name] = (done, total)
            page.save_notebook(self.folder.notebook(source.name), notebook)

        worker = Worker(work, environment=self._environment(work), timeout=self.timeout, changed=changed)
        self.workers[source.name] = worker
        try:
            if self.stopping.is_set():
                worker.stopped.set()
            inject(notebook, status.parameters)
            outcome = worker.run(notebook)
            outcome = self._verify(source, outcome)
        except Exception as error:
            outcome = Outcome("failed", f"{type(error).__name__}: {error}")
        finally:
            self.workers.pop(source.name, None)
        status.seconds = round(time.perf_counter() - begun, 2)
        status.finished, status.cells = now(), outcome.cells
        status.state, status.reason = outcome.state, outcome.reason
        status.device = page.device_line(notebook)
        notebook.metadata["orthokit"] = {"parameters": status.parameters, "key": status.key, "state": status.state}
        if not self.stopping.is_set():
            page.add_pictures(notebook)
        page.save_notebook(self.folder.notebook(source.name), notebook)
        page.write_page(self.folder, status, notebook)
        # Only now is it finished: a kill between the run and here must not leave an "ok" without its page.
        self._record(status)
        word = {"ok": "done  ", "failed": "FAILED", "timeout": "FAILED", "interrupted": "halted"}[status.state]
        why = f": {status.reason}" if status.reason else ""
        self.console.line(f"{word} {source.name}  {duration(status.seconds)}{why}")

    def _verify(self, source: Source, outcome: Outcome) -> Outcome:
        """A notebook is finished when its last cell left its metrics, whatever the kernel said."""
        if outcome.state != "ok":
            return outcome
        try:
            read_metrics(self.folder.metrics(source.name))
        except ReportError:
            outcome.state = "failed"
            outcome.reason = "every cell ran, but no metrics.json was written: the last cell must call record_metrics"
        return outcome

    def _record(self, status: Status) -> None:
        """Writes a status and the index that shows it."""
        self.folder.write(status)
        self._index(final=False)

    def _index(self, *, final: bool) -> None:
        """Rewrites index and ledger."""
        with self.guard:
            statuses = [status for _, status in self.plan]
            entries = ledger.entries(self.folder, statuses)
            write_json(self.folder.ledger, ledger.as_json(entries))
            index.write_index(self.folder, statuses, entries, running=not final)

    def _environment(self, work: Path) -> dict[str, str]:
        """What a kernel sees: its share of the cores, its own run store, where to report."""
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        ours = {
            "ORTHOKIT_METRICS": str(work / "metrics.json"),
            "ORTHOKIT_PROGRESS_FILE": str(work / "progress.jsonl"),
            # The debugger's notice about frozen modules would fill every log.
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        defaults = {"OMP_NUM_THREADS": threads, "ORTHOKIT_RUNS": str(work / "runs"), "ORTHOKIT_RENDERER": "plotly"}
        return {**defaults, **os.environ, **ours}


def _folder(out: str | os.PathLike[str] | None, resume: bool) -> Folder:
    """The folder to write: a new one, the named one, or the one to continue."""
    root = Path("reports")
    if out is None:
        return latest(root.resolve()) if resume else new_folder(root.resolve())
    folder = Folder(Path(out).resolve())
    if folder.manifest.exists() and not resume:
        raise ReportError(f"{folder.path} already holds a report; continue it with --resume or name another --out.")
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ReportError(f"cannot make {folder.path}: {cause.strerror}.") from cause
    return folder


def _require() -> None:
    """The packages a report needs, or one sentence."""
    import importlib.util

    needed = ("nbformat", "nbclient", "papermill", "ipykernel", "mistune", "jinja2", "plotly")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"a report needs {', '.join(missing)}: pip install 'orthokit[notebooks]'.")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the report as Ctrl-C does: with truthful states and no kernels left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
