"""The record of a report on disk: one folder, one status file per notebook, one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from orthokit.errors import ReportError
from orthokit.reports.claims import write_json

__all__ = ["STATES", "Folder", "Status", "latest", "new_folder"]

STATES = ("queued", "running", "ok", "failed", "timeout", "interrupted")
# Kernel's files beside the notebook: what a page, the ledger or a curious reader may want to open.
_LOCK = ".lock"


@dataclass
class Status:
    """What is known about one notebook of a report.

    Attributes:
        name: The notebook.
        title: Its heading.
        state: One of :data:`STATES`.
        key: Hash of source, parameters and orthokit's code; the same key means the same result.
        parameters: The overrides it ran with.
        reason: Why it is not ``"ok"``, in one sentence.
        started: Local time with zone, ISO.
        finished: The same.
        seconds: Wall time.
        cells: Per code cell: index, state, seconds.
        device: What the notebook said it ran on.
        version: Version and code hash of orthokit.
        reused: Taken over from an earlier run of this report.
    """

    name: str
    title: str = ""
    state: str = "queued"
    key: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    started: str = ""
    finished: str = ""
    seconds: float | None = None
    cells: list[dict[str, Any]] = field(default_factory=list)
    device: str = ""
    version: str = ""
    reused: bool = False


class Folder:
    """The files of one report."""

    def __init__(self, path: Path) -> None:
        """``path`` need not exist yet."""
        self.path = path
        self.index = path / "index.html"
        self.manifest = path / "report.json"
        self.ledger = path / "ledger.json"

    def work(self, name: str) -> Path:
        """Where the notebook's kernel works: its metrics, progress, log and training runs."""
        return self.path / "work" / name

    def notebook(self, name: str) -> Path:
        """The executed notebook."""
        return self.path / "notebooks" / f"{name}.ipynb"

    def page(self, name: str) -> Path:
        """Its HTML page."""
        return self.path / f"{name}.html"

    def metrics(self, name: str) -> Path:
        """What its last cell wrote."""
        return self.work(name) / "metrics.json"

    def write(self, status: Status) -> None:
        """Stores one notebook's status."""
        write_json(self.work(status.name) / "status.json", asdict(status))

    def read(self, name: str) -> Status | None:
        """One notebook's status, or None when there is none that can be read."""
        try:
            record = json.loads((self.work(name) / "status.json").read_text(encoding="utf-8"))
            status = Status(**record)
        except (OSError, ValueError, TypeError):
            return None
        if status.state == "running" and not self.busy():
            # The process that wrote this was killed: nobody is running anything.
            status.state, status.reason = "interrupted", "the report was killed while this notebook ran"
        return status

    def statuses(self) -> list[Status]:
        """The notebooks of the report, in its order; files of other notebooks in the folder do not count."""
        try:
            names = json.loads(self.manifest.read_text(encoding="utf-8"))["notebooks"]
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise ReportError(f"{self.path} is not a report: its report.json is missing or damaged.") from cause
        return [self.read(name) or Status(name, reason="no status was recorded") for name in names]

    def clear(self, name: str) -> None:
        """Removes everything an earlier version of the notebook left, so that nothing of it can be taken for new."""
        shutil.rmtree(self.work(name), ignore_errors=True)
        for path in (self.notebook(name), self.page(name)):
            path.unlink(missing_ok=True)
        try:
            self.work(name).mkdir(parents=True)
            self.notebook(name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise ReportError(f"cannot write in {self.path}: {cause.strerror}.") from cause

    def busy(self) -> bool:
        """Whether a living process is writing this report."""
        try:
            with self.locked():
                return False
        except ReportError:
            return True
        except OSError:
            return False

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the report for writing; the operating system frees it when the process ends, however it ends."""
        if self._mine:
            yield
            return
        try:
            import fcntl
        except ImportError:  # no such locks on Windows: a second writer is not detected there
            yield
            return
        descriptor = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            os.close(descriptor)
            raise ReportError(f"another process is writing {self.path}; wait for it, or use another --out.") from cause
        self._mine = True
        try:
            yield
        finally:
            self._mine = False
            os.close(descriptor)

    _mine = False


def new_folder(root: Path) -> Folder:
    """A fresh ``root/<date>``, or ``<date>-2`` and so on when there was one today.

    Raises:
        ReportError: The folder cannot be made.
    """
    today = date.today().isoformat()
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 10_000):
            path = root / (today if attempt == 1 else f"{today}-{attempt}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return Folder(path)
    except OSError as cause:
        raise ReportError(f"cannot make a report folder in {root}: {cause.strerror}. Name one with --out.") from cause
    raise ReportError(f"{root} is full of reports of today; name a folder with --out.")


def latest(root: Path) -> Folder:
    """The report under ``root`` that was begun last.

    Raises:
        ReportError: There is none.
    """
    found = [path for path in root.glob("*/report.json") if path.is_file()]
    if not found:
        raise ReportError(f"there is no report in {root}; run 'orthokit report' first, or name one.")
    return Folder(max(found, key=lambda path: path.stat().st_mtime_ns).parent)


def now() -> str:
    """Local time with its zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
