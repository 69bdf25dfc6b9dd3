"""A model written to disk tensor by tensor, in any order, resumable, and there only when it is whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from orthokit.checkpoints._files import claim, memory, sync_folder, write_at, write_whole
from orthokit.checkpoints._header import CODES, encode_header
from orthokit.checkpoints.reading import INDEX, SINGLE
from orthokit.errors import CheckpointError, DtypeError, OptionError, ShapeError, unknown_name

__all__ = ["CheckpointWriter", "planned_shards"]

_MODEL, _JOURNAL, _LOCK = "model", "journal.jsonl", "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is written is brought to the disk, and then noted as done, this often: a power cut costs no more than that.
_SECONDS, _BYTES = 0.5, 1 << 28

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class CheckpointWriter:
    r"""Write a model into a new folder, tensor by tensor, from one or several threads.

    The files are laid out at the start, from what is known of the tensors, so that each goes to its own bytes in any
    order. All of it happens in a hidden folder beside, ``.NAME.making``, which is renamed at the end: ``NAME`` is
    there when it is whole. A journal in that folder says which tensors are on the disk, and a writer with the same
    plan and signature goes on from there.

    Args:
        folder: The folder that is to come; must not exist.
        plan: By name, the type and the shape of each tensor, in the order in which they fill the files.
        shard_bytes: Tensor bytes that a file may have; a tensor that is larger has a file to itself. One file is
            named ``model.safetensors``; several ``model-00001-of-00003.safetensors`` and so on, with
            ``model.safetensors.index.json`` beside them, as Hugging Face names them.
        metadata: Text in the header of each file. ``{"format": "pt"}``, the default, is what transformers asks for.
        signature: What the tensors depend on, in words or as a digest. What was left by a writer with another
            signature is thrown away.
        resume: Go on where a writer with the same plan and signature stopped; ``False`` starts anew.

    Attributes:
        folder: The folder that is to come.
        notes: By name of the tensors that are written, the note that :meth:`write` was given.

    Raises:
        CheckpointError: The folder exists, another process is writing it, the place is not writable, or the disk has
            too little room for it.
        OptionError: There is no tensor, or ``shard_bytes`` is not positive.
        DtypeError: The format has no such type.

    Example:
        >>> import tempfile
        >>> from orthokit.checkpoints import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with CheckpointWriter(f"{place}/merged", {"W": (torch.float32, (2, 2))}) as writer:
        ...         writer.write("W", torch.eye(2))
        ...         folder = writer.finish()
        ...     with open_checkpoint(folder) as model:
        ...         model.names(), float(model.tensor("W").sum())
        (['W'], 2.0)

    Numerics:
        Every bit as given. In memory only what is being written; a journal entry follows the bytes to the disk, so
        that it holds after a power cut too.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        plan: Plan,
        *,
        shard_bytes: int = 5 * 10**9,
        metadata: Mapping[str, str] | None = None,
        signature: str = "",
        resume: bool = True,
    ) -> None:
        self._handles: dict[str, int] = {}
        self._lock: IO[bytes] | None = None
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100 (Path.resolve would follow a link at the end)
        self._plan = {name: (dtype, tuple(shape)) for name, (dtype, shape) in plan.items()}
        shards = planned_shards(self._plan, shard_bytes=shard_bytes)
        metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for file, names in shards.items():
            header, starts = encode_header({name: self._plan[name] for name in names}, metadata)
            self._headers[file] = header
            self._places |= {name: (file, start) for name, start in starts.items()}
        digest = hashlib.sha256(signature.encode())
        for file, header in self._headers.items():
            digest.update(file.encode() + b"\0" + header)
        self._signature = digest.hexdigest()
        self._making = self.folder.with_name(f".{self.folder.name}.making")
        self.notes: dict[str, Any] = {}
        self._waiting: dict[str, Any] = {}  # written, not yet known to be on the disk
        self._state = threading.Lock()
        self._synced, self._unsynced = time.monotonic(), 0
        # A thread of its own waits for the disk, so that those that compute do not.
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="orthokit-sync")
        self._ahead: Future[None] | None = None
        try:
            self._prepare(resume)
        except BaseException:
            self._let_go()
            raise

    @property
    def making(self) -> Path:
        """The hidden folder in which the model comes about."""
        return self._making

    @property
    def files(self) -> list[str]:
        """The names of the files with tensors."""
        return list(self._headers)

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(map(_size, self._plan.values()))

    def write(self, name: str, tensor: Tensor, *, note: Any = None) -> None:
        """Write one tensor to its place.

        Args:
            name: One of the plan; one that is written again replaces what was there.
            tensor: Of the type and shape that were planned; copied to the CPU if it is elsewhere.
            note: Kept beside it in the journal, so that it is there after a resumption: JSON.

        Raises:
            UnknownNameError: The plan has no such tensor.
            ShapeError: It has another shape than planned.
            DtypeError: It has another type than planned.
            CheckpointError: The disk is full, or cannot be written.
        """
        if name not in self._plan:
            raise unknown_name("planned tensor", name, self._plan)
        dtype, shape = self._plan[name]
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name!r} was planned with the shape {shape} and has {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise DtypeError(f"{name!r} was planned as {dtype} and is {tensor.dtype}; convert it first.")
        file, start = self._places[name]
        raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        with self._errors(name):
            if file not in self._handles:
                raise CheckpointError(f"the writer of {self.folder} is closed; make another to go on.")
            write_at(self._handles[file], memory(raw), start)
        with self._state:
            self._waiting[name] = note
            self._unsynced += raw.numel()
            due = self._unsynced >= _BYTES or time.monotonic() - self._synced >= _SECONDS
            if due and (self._ahead is None or self._ahead.done()):
                before, self._ahead = self._ahead, self._syncer.submit(self._sync)
                self._unsynced, self._synced = 0, time.monotonic()
            else:
                before = None
        if before is not None:
            before.result()

    def finish(self, beside: Mapping[str, bytes | Path] | None = None) -> Path:
        """Bring all to the disk, add the index and give the folder its name.

        Args:
            beside: Other files for the folder: by name, their content or where to copy them from.

        Returns:
            The folder.

        Raises:
            CheckpointError: Tensors of the plan were not written, the disk is full, or the folder exists by now.
        """
        self._syncer.submit(self._sync).result()
        if missing := [name for name in self._plan if name not in self.notes]:
            raise CheckpointError(f"{len(missing)} tensors of {self.folder} were not written, such as {missing[0]!r}.")
        self._close_files()
        model = self._making / _MODEL
        with self._errors("the files beside"):
            if len(self._headers) > 1:
                places = {name: self._places[name][0] for name in sorted(self._plan)}
                index = {"metadata": {"total_size": self.bytes}, "weight_map": places}
                write_whole(model / INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
            for name, source in (beside or {}).items():
                write_whole(model / name, source if isinstance(source, bytes) else source.read_bytes())
            sync_folder(model)
            _refuse_existing(self.folder)
            model.rename(self.folder)
            sync_folder(self.folder.parent)
        shutil.rmtree(self._making, ignore_errors=True)
        self._let_go()
        return self.folder

    def discard(self) -> None:
        """Throw away what was written so far."""
        self._syncer.shutdown()
        self._close_files()
        shutil.rmtree(self._making, ignore_errors=True)
        self._let_go()

    def close(self) -> None:
        """Stop; what was written stays for a later writer to go on with."""
        if self._lock is not None:
            # An error of the disk here was met, and raised, by the writing.
            with contextlib.suppress(CheckpointError):
                self._syncer.submit(self._sync).result()
        self._let_go()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __del__(self) -> None:
        self._close_files()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside

    def _prepare(self, resume: bool) -> None:
        """Take the hidden folder, see what it has, check the room and lay out the files."""
        _refuse_existing(self.folder)
        try:
            self._making.mkdir(parents=True, exist_ok=True)
            self._lock = claim(self._making / _LOCK)
        except OSError as cause:
            raise CheckpointError(
                f"{self.folder} cannot be made: {cause.strerror or cause}. Choose a place that can be written."
            ) from cause
        if self._lock is None:
            raise CheckpointError(f"another process is writing {self.folder}; wait for it, or choose another folder.")
        _refuse_existing(self.folder)
        model, journal = self._making / _MODEL, self._making / _JOURNAL
        with self._errors("the first bytes"):
            found = _journal(journal, self._signature) if resume else None
            ends = dict.fromkeys(self._headers, 0)
            for name, (file, start) in self._places.items():
                ends[file] = max(ends[file], start + _size(self._plan[name]))
            if found is not None and ends != {file: _length(model / file) for file in ends}:
                found = None
            if found is None:
                shutil.rmtree(model, ignore_errors=True)
                journal.unlink(missing_ok=True)
            else:
                self.notes = {name: note for name, note in found.items() if name in self._plan}
            self._check_room()
            model.mkdir(exist_ok=True)
            for file, header in self._headers.items():
                handle = os.open(model / file, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
                self._handles[file] = handle
                os.truncate(handle, ends[file])
                write_at(handle, memoryview(header), 0)
            # Written whole, after the files: no journal speaks of files that are not there, and a line that a kill cut
            # off does not run into the next one.
            lines = json.dumps({"signature": self._signature}) + "\n" + _entries(self.notes)
            write_whole(journal, lines.encode())
            sync_folder(model)

    def _check_room(self) -> None:
        need = sum(_size(self._plan[name]) for name in self._plan if name not in self.notes)
        need += sum(map(len, self._headers.values()))
        # What a run that was killed wrote after its last entry is there twice in this sum: that errs to the safe side
        # by at most what is written in half a second.
        free = shutil.disk_usage(self._making).free
        if need > free:
            if not self.notes:
                shutil.rmtree(self._making, ignore_errors=True)
            raise CheckpointError(
                f"{self.folder} needs {need:,} bytes and its disk has {free:,} free; free some, or choose another "
                "disk. Nothing was written."
            )

    def _sync(self) -> None:
        """Bring what is written to the disk and note it in the journal; called by one thread only."""
        with self._state:
            done, self._waiting = self._waiting, {}
        if not done:
            return
        with self._errors(next(iter(done))):
            for file in {self._places[name][0] for name in done}:
                (getattr(os, "fdatasync", None) or os.fsync)(self._handles[file])
            with (self._making / _JOURNAL).open("ab") as stream:
                stream.write(_entries(done).encode())
                stream.flush()
                os.fsync(stream.fileno())
        self.notes |= done

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn an error of the file system into one in words."""
        try:
            yield
        except OSError as cause:
            why = cause.strerror or str(cause)
            todo = "Free some room" if cause.errno in _FULL else "Mend that"
            raise CheckpointError(
                f"{self.folder} cannot be written ({doing}): {why}. {todo} and run the same again: it goes on from "
                f"what is in {self._making}, which may also be deleted."
            ) from cause

    def _close_files(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _let_go(self) -> None:
        self._syncer.shutdown()
        self._close_files()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def planned_shards(plan: Plan, *, shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors go to which file: each file takes the next ones of the plan while they fit.

    Args:
        plan: By name, type and shape.
        shard_bytes: Tensor bytes that a file may have, ``>= 1``.

    Returns:
        By file name, the names of its tensors.
    """
    if not plan:
        raise OptionError("a model needs at least one tensor; the plan has none.")
    if shard_bytes < 1:
        raise OptionError(f"shard_bytes must be at least 1; got {shard_bytes}. The default is 5 * 10**9.")
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, (dtype, shape) in plan.items():
        if dtype not in CODES:
            raise DtypeError(f"safetensors has no type for {dtype}, which {name!r} has; convert it to another.")
        if name == "__metadata__":
            raise OptionError("no tensor may be named '__metadata__', which safetensors keeps for itself.")
        size = _size((dtype, shape))
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    many = len(groups)
    return {f"model-{number:05d}-of-{many:05d}.safetensors": group for number, group in enumerate(groups, 1)}


def _entries(notes: Mapping[str, Any]) -> str:
    return "".join(json.dumps({"name": name, "note": note}) + "\n" for name, note in notes.items())


def _length(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def _size(tensor: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return math.prod(tensor[1]) * tensor[0].itemsize


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder} exists already; choose another name, or remove it first.")


def _journal(path: Path, signature: str) -> dict[str, Any] | None:
    """The notes of the tensors that are written, or ``None`` where there is nothing to go on with."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        if not lines or json.loads(lines[0]).get("signature") != signature:
            return None
        entries = []
        # A kill may cut the last line off; what it would have said is written again.
        for line in lines[1:]:
            if not line.endswith(b"\n"):
                break
            entries.append(json.loads(line))
        return {entry["name"]: entry["note"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
