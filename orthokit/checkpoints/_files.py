"""Reading and writing at a place in a file, from several threads, and one process at a time in a folder."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import IO, Any

from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

__all__ = ["claim", "memory", "read_at", "sync_folder", "write_at", "write_whole"]

# Where the system has no reading at a place, the place and the reading are two calls that belong together.
_seeking = threading.Lock()


def memory(raw: Tensor) -> memoryview:
    """The bytes of a ``uint8`` tensor on the CPU, not copied."""
    array: Any = raw.numpy()
    return memoryview(array)


def read_at(file: int, target: memoryview, offset: int) -> int:
    """Read into ``target`` from ``offset``; how many bytes came, 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [target], offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        found = os.read(file, min(len(target), 1 << 26))
    target[: len(found)] = found
    return len(found)


def write_at(file: int, source: memoryview, offset: int) -> None:
    """Write all of ``source`` at ``offset``."""
    while len(source):
        if hasattr(os, "pwrite"):
            done = os.pwrite(file, source, offset)
        else:
            with _seeking:
                os.lseek(file, offset, os.SEEK_SET)
                done = os.write(file, source)
        source, offset = source[done:], offset + done


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, bring it to the disk and rename it."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system has that."""
    if os.name == "posix":
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def claim(path: Path) -> IO[bytes] | None:
    """Lock a file, made if need be, until the stream is closed or the process ends; ``None`` if it is locked."""
    stream = path.open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        # Whoever held it may have removed it since it was opened: then the lock is on nothing.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return stream
    except (BlockingIOError, PermissionError):
        pass  # held by another process; Windows says so by a denial
    except OSError:
        stream.close()
        raise  # a file system without locks is no other process
    stream.close()
    return None
