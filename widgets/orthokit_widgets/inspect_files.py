"""Files of a visitor of the page "Inspect": by their path, or uploaded piece by piece; checked before they are read."""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orthokit.checkpoints import open_checkpoint
from orthokit.checkpoints._header import read_header
from orthokit.checkpoints.gguf import MAGIC
from orthokit.checkpoints.torch_files import is_torch
from orthokit.errors import CheckpointError, OptionError
from orthokit_widgets.inspect_data import Model, catalogue

__all__ = ["MOST_BYTES", "Incoming", "Own", "megabytes", "path_model"]

#: Of an uploaded file, and of all of one visitor.
MOST_BYTES, _MOST_OF_ONE = 200_000_000, 800_000_000
# Of all visitors of this process, and what stays free on the disk.
_MOST_TOGETHER, _LEFT_FREE = 8_000_000_000, 1_000_000_000
_PIECE = 2 << 20  # bytes that the browser sends at once; the server's sockets take messages of up to 20 MB
_SMALLEST = 8


def path_model(text: str, key: str) -> Model:
    """A model on this machine by its path, its headers checked.

    Args:
        text: What was typed; quotes around it and a leading ``~`` are understood.
        key: What to call it.

    Raises:
        OptionError: Nothing was typed.
        CheckpointError: There is no model that can be read.
    """
    typed = text.strip().strip("\"'")
    if not typed:
        raise OptionError("type the path of a model file, or of a folder with one.")
    try:
        path = Path(typed).expanduser().resolve()
        with open_checkpoint(path):
            pass
    except (ValueError, RuntimeError) as cause:  # a path with a zero byte, an unknown user's home
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{typed!r:.80} is no path: {cause}. Check it.") from cause
    named = path.parent if path.stem in ("model", "pytorch_model") and path.is_file() else path
    return Model(key, named.name or str(path), lambda: path, own=True, cached=True)


def megabytes(size: int) -> str:
    """A size in words."""
    return f"{size / 1e6:,.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"


class _Room:
    """How much all visitors have uploaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken = 0

    def take(self, size: int) -> bool:
        with self._lock:
            if self.taken + size > _MOST_TOGETHER:
                return False
            self.taken += size
            return True

    def free(self, size: int) -> None:
        with self._lock:
            self.taken -= size


ROOM = _Room()


class Incoming:
    """A file that is on its way from the browser, piece by piece, into a file of this process.

    Args:
        name: As the visitor calls it.
        size: In bytes, as the browser tells.
        folder: Where to write.
        token: Number of this upload.
        use: What is to be done with it then.

    Raises:
        OptionError: It is empty, too large, or there is no room.
    """

    def __init__(self, name: str, size: int, folder: Path, *, token: int, use: str) -> None:
        self.name, self.size, self.token, self.use = name, size, token, use
        # In a folder of its own, since the name is told where the model is compared with another.
        self.path = folder / f"{token}" / (re.sub(r"[^\w.+-]", "_", name)[-80:].lstrip(".") or "file")
        self.received, self._checked = 0, False
        if size < _SMALLEST:
            raise OptionError(f"{name} has {size} bytes, fewer than any model file. Choose another.")
        if size > MOST_BYTES:
            raise OptionError(
                f"{name} has {megabytes(size)}; a file may have up to {megabytes(MOST_BYTES)}. Inspect it on your own "
                "machine: orthokit inspect FILE."
            )
        if shutil.disk_usage(folder).free < size + _LEFT_FREE or not ROOM.take(size):
            raise OptionError(f"there is no room for {megabytes(size)} on the server at the moment. Try again later.")
        self._end = weakref.finalize(self, _forget, self.path, size)
        self.path.parent.mkdir()
        with self.path.open("wb") as stream:
            # A file with holes: its header can be checked against the whole size before the rest has come.
            stream.truncate(size)

    @property
    def wanted(self) -> dict[str, int]:
        """The piece that comes next, ``start`` to ``stop``; empty when all is here."""
        if self.received >= self.size:
            return {}
        return {
            "token": self.token,
            "start": self.received,
            "stop": min(self.received + _PIECE, self.size),
            "size": self.size,
        }

    def take(self, start: int, data: str) -> None:
        """Write a piece; one that is not the wanted one is passed over.

        Raises:
            CheckpointError: The beginning of the file is that of no model, or the piece is damaged.
        """
        if not self.wanted or start != self.received:
            return
        try:
            piece = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as cause:
            raise CheckpointError(f"{self.name} was damaged on its way. Upload it again.") from cause
        if len(piece) != self.wanted["stop"] - start:
            raise CheckpointError(f"{self.name} changed while it was uploaded. Upload it again.")
        with self.path.open("r+b") as stream:
            stream.seek(start)
            stream.write(piece)
        self.received += len(piece)
        self._check_start()

    def finish(self, key: str) -> Model:
        """The uploaded model, its headers checked.

        Raises:
            CheckpointError: It is no model that can be read.
        """
        with self._in_its_name(), open_checkpoint(self.path):
            pass
        # The model keeps the file: it is deleted when nobody holds either.
        return Model(key, self.name, lambda: self.path, own=True)

    def forget(self) -> None:
        """Delete the file."""
        self._end()

    def _check_start(self) -> None:
        """Refuse what is no model as soon as that can be known."""
        if self._checked:
            return
        with self.path.open("rb") as stream:
            start = stream.read(16)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(MAGIC) or is_torch(start):
            self._checked = True  # their headers are checked when all is here
        elif self.received >= min(length + 8, self.size):
            with self._in_its_name():
                read_header(self.path)
            self._checked = True
        elif length + 8 > self.size:
            with self._in_its_name():
                read_header(self.path)

    def _in_its_name(self) -> _Renamed:
        return _Renamed(str(self.path), self.name)


class _Renamed:
    """Errors that name a file of this process name the visitor's instead."""

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = path, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CheckpointError):
            raise CheckpointError(str(error).replace(self._path, self._name)) from error


def _forget(path: Path, size: int) -> None:
    shutil.rmtree(path.parent, ignore_errors=True)
    ROOM.free(size)


class Own:
    """The files of one visitor: added under ``file-1``, ``file-2`` ..., deleted with :meth:`close` or at the end."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self._incoming: dict[str, Incoming] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def receive(self, name: str, size: int, use: str, *, needed: Iterable[str] = ()) -> Incoming:
        """Begin an upload.

        Args:
            name: As the visitor calls it.
            size: In bytes.
            use: What for.
            needed: Keys of models that are in use; older ones make room.

        Raises:
            OptionError: It cannot be taken.
        """
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="orthokit-inspect-", ignore_cleanup_errors=True)
        kept = set(needed)
        for key in [key for key in self._incoming if key not in kept]:
            if sum(one.size for one in self._incoming.values()) + size <= _MOST_OF_ONE:
                break
            self.drop(key)
        if sum(one.size for one in self._incoming.values()) + size > _MOST_OF_ONE:
            raise OptionError(f"your files may have {megabytes(_MOST_OF_ONE)} together. Choose other models first.")
        self._count += 1
        return Incoming(name, size, Path(self._folder.name), token=self._count, use=use)

    def next_key(self) -> str:
        """A name that is free."""
        taken = [int(key.removeprefix("file-")) for key in self.models]
        return f"file-{max(taken, default=0) + 1}"

    def add(self, model: Model, incoming: Incoming | None = None) -> Model:
        """Keep a model; a second one of a name gets a number."""
        labels = [one.label for one in [*catalogue().values(), *self.models.values()]]
        label, count = model.label, 1
        while label in labels:
            count += 1
            label = f"{model.label} ({count})"
        model = Model(model.key, label, model.load, own=True, cached=model.cached)
        self.models[model.key] = model
        if incoming is not None:
            self._incoming[model.key] = incoming
        return model

    def drop(self, key: str) -> None:
        """Forget a model, and delete its file if it was uploaded."""
        self.models.pop(key, None)
        incoming = self._incoming.pop(key, None)
        if incoming is not None:
            incoming.forget()

    def close(self) -> None:
        """Delete everything that was uploaded."""
        for key in list(self.models):
            self.drop(key)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
