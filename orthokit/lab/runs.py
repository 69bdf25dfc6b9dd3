"""The run store: one folder per training run, written by one process and read by any number while it is written.

A run is a folder with ``config.json``, ``run.sqlite`` (scalars, spectra, notes), ``checkpoints/step-*.safetensors``
and ``writer.lock``. What a call of a writer has recorded when it returns is not lost by a kill of the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import re
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, RunError, ShapeError, unknown_name
from orthokit.lab import _store
from orthokit.lab._run_reader import DATABASE, RunReader, is_run, runs, runs_root

if TYPE_CHECKING:
    import sqlite3


__all__ = ["Run", "runs", "runs_root"]

_STATUSES = ("running", "finished", "interrupted", "failed")


def _step(value: Any) -> int:
    try:
        step = operator.index(value)
    except TypeError as error:
        raise DtypeError(f"a step must be a whole number; found {type(value).__name__} ({value!r:.40}).") from error
    if step < 0:
        raise OptionError(f"a step must be 0 or more; found {step}.")
    return step


def _scalar(name: str, value: Any) -> float | None:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DtypeError(
            f"the scalar {name!r} must be one number; found {type(value).__name__} ({value!r:.60}). "
            "Use log_spectrum() for vectors and note() for text."
        ) from error
    return None if math.isnan(number) else number  # SQLite has infinities but no NaN: NULL stands for it


def _release(db: sqlite3.Connection, lock: _store.WriterLock, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not touch its parent's connection
        db.close()
        lock.release()


class Run(RunReader):
    """One run: its configuration, scalars, spectra, notes and checkpoints, for one writer and many readers.

    Make one with :meth:`create` or :meth:`open`; ``with`` closes it and sets its status. All methods may be called
    from several threads. Readers, here or in other processes, see every row as soon as the writing call has returned.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> with Run.create("first", root=root, config={"lr": 0.02}) as run:
        ...     for step in range(3):
        ...         run.log(step, loss=1.0 / (step + 1))
        >>> again = Run.open("first", root=root)
        >>> again.status, again.last_step, again.config
        ('finished', 2, {'lr': 0.02})
        >>> steps, loss = again.series("loss")
        >>> bool((np.diff(loss) < 0).all())
        True

    Numerics:
        Scalars are float64, NaN and infinities included (-0.0 becomes 0.0); spectra float32; checkpoint tensors keep
        every bit and carry a hash. A recorded row survives the kill of the process at once (it is with the operating
        system), and a power cut up to the last few moments (SQLite write-ahead log, ``synchronous=NORMAL``).
        Checkpoints are on the disk when :meth:`save_checkpoint` returns.
    """

    # --- making and opening

    def __init__(self, path: Path, *, writer: bool) -> None:
        self._mutex = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._owner = os.getpid()
        if not writer:
            super().__init__(path)
            return
        lock = _store.WriterLock(path)
        try:
            super().__init__(path)  # before the first write: nothing is made in a damaged folder
            self._db = _store.connect_writer(self._database)
            for rest in (*path.glob("*.tmp"), *path.glob("checkpoints/*.tmp")):  # of a writer that was killed
                rest.unlink(missing_ok=True)
        except BaseException:
            if self._db is not None:
                self._db.close()
            lock.release()
            raise
        self._finalizer = weakref.finalize(self, _release, self._db, lock, self._owner)

    @property
    def writable(self) -> bool:
        """Whether this object is the writer."""
        return self._db is not None

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
        exist_ok: bool = False,
    ) -> Run:
        """A new run, open for writing, with status ``"running"``.

        Args:
            name: Letters, digits and ``. _ - + = ,``; default date, time and four random characters.
            root: Folder that holds runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
            config: What was asked for: numbers, strings, lists and dicts.
            exist_ok: Go on with a run of that name if there is one; a changed configuration is replaced and noted.

        Returns:
            The run.

        Raises:
            OptionError: The name holds other characters.
            RunError: The run exists, or the folder cannot be written to.
            RunBusyError: The run exists and another process is writing it.
            DtypeError: The configuration holds something that JSON has no form for.
        """
        name = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2) if name is None else name
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+=,-]{0,119}", name):
            raise OptionError(
                f"the name of a run must be 1 to 120 letters, digits or '. _ - + = ,' and not start with a sign; "
                f"found {name!r:.140}."
            )
        folder, text = runs_root(root), _store.to_json(dict(config or {}), "the config of a run")
        path = folder / name
        if not path.exists():
            # Made aside and renamed: a kill at any instant leaves a whole run or none.
            aside = folder / f".making-{name}-{secrets.token_hex(4)}"
            with _store.folder_errors(folder, "make a run"):
                aside.mkdir(parents=True)
                try:
                    (aside / "checkpoints").mkdir()
                    _store.write_whole(aside / "config.json", text.encode("utf-8"))
                    with contextlib.closing(_store.connect_writer(aside / DATABASE)) as db:
                        first = {"format": _store.FORMAT, "created": time.time(), "status": "running", "error": None}
                        rows = [(key, json.dumps(value)) for key, value in first.items()]
                        db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                    aside.rename(path)
                except OSError:
                    if not path.exists():
                        raise
                    # else someone made it in the meantime: met below
                else:
                    return cls(path, writer=True)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
        if not exist_ok:
            raise RunError(f"the run {path} exists already. Choose another name, or go on with it by exist_ok=True.")
        run = cls.open(path, mode="w")
        given = json.loads(text)
        if run.config != given:
            changed = [key for key in {**run.config, **given} if run.config.get(key) != given.get(key)]
            with _store.folder_errors(path, "write config.json"):
                _store.write_whole(path / "config.json", text.encode("utf-8"))
            run.config = given
            run.note(f"configuration changed: {', '.join(changed)}")
        run.set_status("running")
        return run

    @staticmethod
    def exists(name: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> bool:
        """Whether there is a run of that name under ``root``, whole or damaged."""
        return is_run(runs_root(root) / name)

    @classmethod
    def open(
        cls, name: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None, mode: Literal["r", "w"] = "r"
    ) -> Run:
        """A run that exists.

        Args:
            name: Its name under ``root``, or the path of its folder.
            root: Folder that holds runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
            mode: ``"r"`` to read, also while it is written; ``"w"`` to go on writing.

        Returns:
            The run. Opening changes nothing, its status included.

        Raises:
            UnknownNameError: There is no such run.
            RunBusyError: ``mode="w"`` and another writer is at work.
            RunDamagedError: A file of the run is damaged; the message names it.
        """
        if mode not in ("r", "w"):
            raise OptionError(f"mode must be 'r' or 'w'; found {mode!r}.")
        folder = runs_root(root)
        given = Path(name)
        path = given if root is None and is_run(given) else folder / given
        if not is_run(path):
            known = [entry.name for entry in folder.iterdir() if is_run(entry)] if folder.is_dir() else []
            raise unknown_name(f"run in {folder}:", name, known)
        return cls(path, writer=mode == "w")

    def close(self) -> None:
        """Stop writing and let others write; a run still ``"running"`` becomes ``"interrupted"``. May be repeated."""
        with self._mutex:
            if self._db is None:
                return
            try:
                if self._owner == os.getpid() and self._meta("status") == "running":
                    self.set_status("interrupted")
            finally:
                self._db = None
                self._finalizer()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that is gone must not hide the error that ended it.
        with contextlib.suppress(*((RunError,) if kind else ())):
            try:
                if self._db is not None and self._meta("status") == "running":
                    if kind is None:
                        self.set_status("finished")
                    elif issubclass(kind, Exception):
                        self.set_status("failed", error=f"{kind.__name__}: {error}")
            finally:
                self.close()

    # --- writing

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            if self._db is None or self._owner != os.getpid():
                raise RunError(f"the run {self.path} is open for reading here. Open it with mode='w' to write to it.")
            if not self._database.exists():  # SQLite would go on writing to the deleted file
                raise RunError(f"the run {self.path} is gone: it was deleted or moved while in use.")
            with _store.database_errors(self._database):
                try:
                    if self._db.in_transaction:  # an interrupt fell between two statements
                        self._db.execute("ROLLBACK")
                    self._db.execute("BEGIN IMMEDIATE")
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise

    def log(self, step: int, **scalars: SupportsFloat) -> None:
        """Record scalars of one step; they are kept when the call returns. A repeated (step, name) is replaced.

        Args:
            step: 0 or more.
            **scalars: One number each; NaN and infinities are kept.

        Raises:
            DtypeError: A value is not one number.
            RunError: The run is not open for writing, or was deleted.
        """
        self.log_many((step, name, value) for name, value in scalars.items())

    def log_many(self, rows: Iterable[tuple[int, str, SupportsFloat]]) -> None:
        """Record many scalars in one transaction: all of them, or none when one is not valid.

        Args:
            rows: Triples of step, name and value.

        Raises:
            DtypeError: A value is not one number.
            RunError: The run is not open for writing, or was deleted.
        """
        now = time.time()
        ready = [(_step(step), str(name), _scalar(name, value), now) for step, name, value in rows]
        with self._writing() as db:
            db.executemany("INSERT OR REPLACE INTO scalars VALUES (?, ?, ?, ?)", ready)

    def log_spectrum(self, step: int, name: str, values: Tensor | np.ndarray | Iterable[float]) -> None:
        """Record a vector of numbers (singular values, say) of one step, as float32.

        Args:
            step: 0 or more.
            name: What it belongs to, such as the name of a matrix.
            values: One-dimensional.

        Raises:
            ShapeError: ``values`` is not one-dimensional.
            RunError: The run is not open for writing, or was deleted.
        """
        if isinstance(values, Tensor):
            values = values.detach().to("cpu", torch.float32).numpy()
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype="<f4")
        if array.ndim != 1:
            raise ShapeError(f"a spectrum must be one-dimensional; {name!r} has shape {array.shape}. Log rows apart.")
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO spectra VALUES (?, ?, ?)", (_step(step), name, array.tobytes()))

    def note(self, text: str) -> None:
        """Record a sentence about the run, with the time."""
        with self._writing() as db:
            db.execute("INSERT INTO notes (wall, text) VALUES (?, ?)", (time.time(), text))

    def set_status(self, status: str, *, error: str | None = None) -> None:
        """Say how the run stands: ``"running"``, ``"finished"``, ``"interrupted"`` or ``"failed"``, and why."""
        if status not in _STATUSES:
            raise unknown_name("status", status, _STATUSES)
        with self._writing() as db:
            rows = [("status", json.dumps(status)), ("error", json.dumps(error))]
            db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def truncate_after(self, step: int) -> None:
        """Drop every scalar, spectrum and checkpoint of a later step, as when training goes on from ``step``."""
        with self._writing() as db:
            db.execute("DELETE FROM scalars WHERE step > ?", (_step(step),))
            db.execute("DELETE FROM spectra WHERE step > ?", (step,))
            for _, path in (entry for entry in self.checkpoints() if entry[0] > step):
                path.unlink(missing_ok=True)

    def save_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any] | None = None,
        *,
        keep: int = 2,
        best: bool = False,
    ) -> Path:
        """Write ``checkpoints/step-<step>.safetensors``, whole or not at all, then drop old ones.

        Args:
            step: 0 or more.
            tensors: Any tensors by name; they are stored bit by bit from the device they are on.
            meta: Numbers, strings, lists and dicts to go with them.
            keep: How many checkpoints remain, 1 or more, the new one included.
            best: Keep this one as ``checkpoints/best.safetensors`` too, until the next best.

        Returns:
            The file.

        Raises:
            RunError: The run is not open for writing, or the disk is full.
        """
        if keep < 1:
            raise OptionError(f"keep must be 1 or more; found {keep}.")
        folder = self.path / "checkpoints"
        path = folder / f"step-{_step(step):08d}.safetensors"
        with self._mutex, _store.folder_errors(folder, "save a checkpoint"):
            if not self.writable or not self._database.exists():
                with self._writing():  # raises the error that fits
                    pass
            folder.mkdir(exist_ok=True)
            _store.write_checkpoint(path, tensors, {"step": step, **(meta or {})})
            if best:
                copy = folder / "best.safetensors.tmp"
                shutil.copyfile(path, copy)
                copy.replace(folder / "best.safetensors")
            older = [old for number, old in self.checkpoints() if number <= step and old != path]
            for old in older[: max(0, len(older) + 1 - keep)]:
                old.unlink(missing_ok=True)
        return path
