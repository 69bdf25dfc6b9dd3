"""What a run folder rests on: whole-file writes, the writer's lock, the database and checkpoint files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sqlite3
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from orthokit.errors import DtypeError, RunBusyError, RunDamagedError, RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

__all__ = [
    "FORMAT",
    "WriterLock",
    "checkpoint_step",
    "connect_reader",
    "connect_writer",
    "database_errors",
    "folder_errors",
    "read_checkpoint",
    "read_json",
    "to_json",
    "write_checkpoint",
    "write_whole",
]

#: Version of the folder's layout, kept in its database.
FORMAT = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scalars (
    step INTEGER NOT NULL, name TEXT NOT NULL, value REAL, wall REAL NOT NULL, PRIMARY KEY (name, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spectra (
    step INTEGER NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (name, step)
);
CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, wall REAL NOT NULL, text TEXT NOT NULL);
"""

# Locks held by this process: a forked child (a data-loading worker) must not keep one alive after its parent.
_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


# --- files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folder_errors(folder: Path, doing: str) -> Iterator[None]:
    """Turn an error of the file system into a :class:`RunError` that names the folder and the way out."""
    try:
        yield
    except RunError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot {doing} in {folder}: {reason}. Make the folder writable, free space on its disk, "
            "or choose another place with root= or the variable ORTHOKIT_RUNS."
        ) from error


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Replace a file with ``parts`` so that at any instant it is the old one or the new one, also after a kill."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name lives in the folder, which has its own cache
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_json(value: Any, what: str) -> str:
    """JSON text of a configuration; paths, dtypes and devices become strings, tensors of one element numbers.

    Raises:
        DtypeError: A value has no such form.
    """

    def convert(item: Any) -> Any:
        if isinstance(item, os.PathLike | torch.dtype | torch.device):
            return str(item)
        if callable(getattr(item, "item", None)) and getattr(item, "size", None) is not None:
            with contextlib.suppress(ValueError, RuntimeError):
                return item.item()
        if isinstance(item, set | frozenset):
            return sorted(item)
        raise DtypeError(
            f"{what} must hold numbers, strings, lists and dicts only; found {type(item).__name__} ({item!r:.80}). "
            "Put a name or number there instead."
        )

    return json.dumps(value, indent=1, default=convert, ensure_ascii=False)


def read_json(path: Path) -> Any:
    """The JSON value in a file of a run.

    Raises:
        RunDamagedError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDamagedError(f"{path} cannot be read: {error}. Restore the file, or delete the run.") from error


# --- lock -----------------------------------------------------------------------------------------------------------


def _try_lock(stream: IO[str], *, shared: bool = False) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:  # a byte far behind the text, so that others can read who holds the lock
            stream.seek(1 << 30)
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[possibly-unbound]
    except OSError:
        return False
    return True


class WriterLock:
    """The right to write one run. The system takes it back when the process ends, however it ends.

    Args:
        folder: The run's folder.

    Raises:
        RunBusyError: Someone else holds it.
        RunError: The folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        with folder_errors(folder, "write"):
            self._stream: IO[str] | None = (folder / "writer.lock").open("a+", encoding="utf-8")
        # A reader that asks whether the writer lives holds the lock for microseconds: try again before giving up.
        patience = time.monotonic() + 0.3
        while not _try_lock(self._stream):
            if time.monotonic() > patience:
                self._stream.close()
                raise RunBusyError(
                    f"the run {folder} is being written by {self.holder(folder)}. "
                    "Wait until it ends or stop it; reading the run is possible at any time."
                )
            time.sleep(0.02)
        with folder_errors(folder, "write"):
            self._stream.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, self._stream)
            self._stream.flush()
        _held.add(self)

    @staticmethod
    def holder(folder: Path) -> str:
        """Who wrote last, in words."""
        try:
            record = json.loads((folder / "writer.lock").read_text(encoding="utf-8"))
            return f"process {record['pid']} on {record['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    @staticmethod
    def is_held(folder: Path) -> bool:
        """Whether a writer is alive."""
        try:
            with (folder / "writer.lock").open("r", encoding="utf-8") as stream:
                return not _try_lock(stream, shared=True)
        except OSError:
            return False

    def release(self) -> None:
        """Give the right back. A second call does nothing."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _drop_inherited_locks() -> None:
    for lock in list(_held):
        lock.release()  # closes the child's copy only: the parent keeps the lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited_locks)


# --- database -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite into one of ours that names the file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if not path.exists():
            raise RunError(f"{path} is gone: the run was deleted or moved while in use.") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise RunBusyError(f"{path} is locked by another process: {error}. Try again.") from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            raise RunError(
                f"{path} cannot be used: {error}. Make its folder writable, free space on its disk, or copy the "
                "run to another place."
            ) from error
        raise RunDamagedError(
            f"{path} is damaged: {error}. Its checkpoints may still be whole; other runs are not affected. "
            "Restore the file, or delete the run."
        ) from error


def connect_writer(path: Path) -> sqlite3.Connection:
    """A connection that writes: write-ahead log, every statement its own transaction unless one is begun.

    ``synchronous=NORMAL`` hands a committed transaction to the operating system before it returns. It survives the
    death of the process at any instant; after a power cut the last moments may be missing, the rest is whole.
    """
    with database_errors(path):
        db = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def connect_reader(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection for one reading, on which everything is seen that was committed before; it blocks no writer."""
    if not path.exists():
        if not path.parent.exists():
            raise RunError(f"the run {path.parent} is gone: it was deleted or moved while in use.")
        raise RunDamagedError(f"{path} is missing. Restore the file, or delete the run.")
    with database_errors(path):
        uri = path.absolute().as_uri()
        log = path.with_name(path.name + "-wal")
        # On a read-only medium SQLite cannot make its side files; with an empty log there is nothing to share.
        sealed = not os.access(path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
        mode = "immutable=1" if sealed else "mode=ro"
        db = sqlite3.connect(f"{uri}?{mode}", uri=True, timeout=10.0, isolation_level=None)
        try:
            yield db
        finally:
            db.close()


# --- checkpoints ----------------------------------------------------------------------------------------------------

_NO_DIGEST = "0" * 64


def _header_end(raw: bytes) -> int:
    return 8 + int.from_bytes(raw[:8], "little")


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """One safetensors file whose header holds ``meta`` and the SHA-256 of its tensor bytes."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, such as tied weights: each is stored in full.
        kept[name] = here.clone() if place in seen else here
        seen.add(place)
    text = to_json(dict(meta), "the meta of a checkpoint")
    raw = save(kept, metadata={"meta": text, "sha256": _NO_DIGEST})
    end = _header_end(raw)
    digest = hashlib.sha256(memoryview(raw)[end:]).hexdigest()
    header = raw[:end].replace(f'"sha256":"{_NO_DIGEST}"'.encode(), f'"sha256":"{digest}"'.encode(), 1)
    write_whole(path, header, memoryview(raw)[end:])


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the meta of a checkpoint.

    Raises:
        RunDamagedError: The file is not whole.
        FileNotFoundError: It is not there (any more).
    """
    raw = path.read_bytes()
    try:
        header = json.loads(raw[8 : _header_end(raw)])
        about = header["__metadata__"]
        if hashlib.sha256(memoryview(raw)[_header_end(raw) :]).hexdigest() != about["sha256"]:
            raise ValueError("its tensors do not have the recorded hash")
        return load(raw), json.loads(about["meta"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise RunDamagedError(
            f"the checkpoint {path} is damaged: {error!s:.200}. Delete it to go on from an earlier one."
        ) from error


def checkpoint_step(path: Path) -> int | None:
    """The step in a checkpoint's file name; ``None`` for other files."""
    found = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
    return int(found[1]) if found else None
