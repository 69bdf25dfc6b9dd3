"""Model files read one tensor at a time: a safetensors file, or a folder as Hugging Face lays it out."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from orthokit.checkpoints._files import memory as memory_of
from orthokit.checkpoints._files import read_at
from orthokit.checkpoints._header import Header, Place, read_header
from orthokit.errors import CheckpointError, unknown_name

__all__ = ["INDEX", "SINGLE", "Checkpoint", "open_checkpoint"]

#: The names that Hugging Face gives to a model in one file and to the list of the files of one in several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


class Checkpoint:
    """The tensors of a model on disk, each read when it is asked for.

    Made by :func:`open_checkpoint`. Several threads may read at a time. A copy of one tensor is all that a reading
    keeps in memory: files are read, not mapped, so that pages of a large model do not count as memory of the process
    and a file that shrinks meanwhile is an error in words.

    Args:
        path: What was opened.
        headers: By file, what it says of itself; names of tensors stand in one of them only.
        order: The names in another order than that of the files.

    Attributes:
        path: What was opened.
        files: The files with tensors.
        bytes: Of all tensors together.
        metadata: Text beside the tensors.
        digest: Of the names, sizes, times and headers of the files: another one, and something was written since.
    """

    def __init__(self, path: Path, headers: Mapping[Path, Header], *, order: Iterable[str] | None = None) -> None:
        self._open: dict[Path, int] = {}
        self.path, self.files = path, sorted(headers)
        self.metadata: dict[str, str] = {}
        places: dict[str, Place] = {}
        for file in self.files:
            self.metadata |= headers[file].metadata
            places |= headers[file].places
        self._places = places if order is None else {name: places[name] for name in order}
        self.bytes: int = sum(place.bytes for place in places.values())
        digest = hashlib.sha256()
        try:
            for file in self.files:
                self._open[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                facts = os.fstat(self._open[file])
                digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns} ".encode() + headers[file].text)
        except OSError as cause:
            self.close()
            raise CheckpointError(f"{path} cannot be read: {cause}. Check who may read it.") from cause
        self.digest = digest.hexdigest()

    def names(self) -> list[str]:
        """The names of the tensors, in the order in which they lie in the files."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, without reading it."""
        return self._place(name).dtype

    def place(self, name: str) -> Place:
        """In which file a tensor lies, and where in it."""
        return self._place(name)

    def tensor(self, name: str, *, out: Tensor | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: One of :meth:`names`.
            out: Memory to read into, ``uint8`` on the CPU, 1-D and contiguous, at least as long as the tensor has
                bytes; the result is a view of it. Default: new memory, which belongs to the caller.

        Returns:
            The tensor, on the CPU, in the type and shape that it has in the file, every bit as it is there.

        Raises:
            UnknownNameError: No tensor of this name.
            CheckpointError: The file is gone, or shorter than when it was opened.
        """
        place = self._place(name)
        memory = torch.empty(place.bytes, dtype=torch.uint8) if out is None else out[: place.bytes]
        self._read(place, memory)
        if place.dtype == torch.bool and place.bytes and int(memory.max()) > 1:
            raise CheckpointError(f"{place.file} is damaged: {name!r} is to be true or false and holds other values.")
        return memory.view(place.dtype).view(place.shape)

    def close(self) -> None:
        """Close the files; the tensors that were read stay."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __repr__(self) -> str:
        many = f"{len(self)} tensors, {self.bytes / 1e6:,.1f} MB in {len(self.files)} file(s)"
        return f"Checkpoint({str(self.path)!r}: {many})"

    def _place(self, name: str) -> Place:
        try:
            return self._places[name]
        except KeyError:
            raise unknown_name("tensor", name, self._places) from None

    def _read(self, place: Place, memory: Tensor) -> None:
        if place.file not in self._open:
            raise CheckpointError(f"{self.path} was closed; open it again with open_checkpoint({str(self.path)!r}).")
        target, done = memory_of(memory), 0
        while done < place.bytes:
            try:
                got = read_at(self._open[place.file], target[done:], place.start + done)
            except OSError as cause:
                raise CheckpointError(f"{place.file} cannot be read: {cause.strerror or cause}.") from cause
            if got == 0:
                raise CheckpointError(f"{place.file} became shorter while it was read; copy it again.")
            done += got


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A model on disk, its headers checked and nothing else read yet.

    Args:
        path: A ``.safetensors`` file; a folder with ``model.safetensors``, with ``model.safetensors.index.json`` and
            the files that it lists, or with one or several ``.safetensors`` files whose names of tensors are disjoint;
            or such an index itself.

    Returns:
        The :class:`Checkpoint`; ``with`` closes it.

    Raises:
        CheckpointError: A file is missing, cut off or damaged; the index and the files disagree; several files hold
            the same names; or the folder holds something else, such as an adapter or pickles.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"W": torch.eye(2), "b": torch.zeros(2)}, f"{folder}/model.safetensors")
        ...     with open_checkpoint(folder) as model:
        ...         model.shape("W"), bool((model.tensor("W") == torch.eye(2)).all())
        ((2, 2), True)

    Numerics:
        Every bit as it is in the file. Opening costs the reading of the headers; a tensor costs one read.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place)
        if not place.exists():
            near = sorted(one.name for one in place.parent.glob("*.safetensors")) if place.parent.is_dir() else []
            there = f"; {place.parent} has {_few(near)}" if near else ""
            raise CheckpointError(f"{place} is not there{there}. Check the path.")
    except OSError as cause:
        raise CheckpointError(f"{place} cannot be read: {cause.strerror or cause}. Check who may read it.") from cause
    if place.name.endswith(".index.json"):
        return _indexed(place)
    return _together(place, [place])


def _folder(folder: Path) -> Checkpoint:
    """What a folder holds, one way of reading it or an error."""
    files = sorted(folder.glob("*.safetensors"))
    names = [file.name for file in files]
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        if single in files and set(_weight_map(index).values()) != {SINGLE}:
            raise CheckpointError(f"{folder} holds both {SINGLE} and {INDEX}; give the path of the one that is meant.")
        return _indexed(index)
    if single in files:
        return _together(folder, [single])
    if "adapter_model.safetensors" in names or (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter, not a model; load it onto its model, merge it in and save the model first."
        )
    if not files:
        there = sorted(one.name for one in folder.iterdir())
        pickled = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf"))]
        hint = f"convert {_few(pickled)} to safetensors" if pickled else "check the path"
        raise CheckpointError(f"{folder} has no .safetensors file; it holds {_few(there) or 'nothing'}: {hint}.")
    parts = [found for name in names if (found := _SHARD.fullmatch(name))]
    # Without an index the count in the names is all that tells a whole model from a part of one.
    for stem, total in sorted({(part[1], part[3]) for part in parts}):
        have = {int(part[2]) for part in parts if part[1] == stem and part[3] == total}
        if missing := sorted(set(range(1, int(total) + 1)) - have if len(total) < 7 else []):
            shown = _few([f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors" for number in missing])
            raise CheckpointError(f"{folder} has {len(have)} of {int(total)} shards; missing is {shown}. Copy it too.")
    return _together(folder, files)


def _together(path: Path, files: Sequence[Path]) -> Checkpoint:
    """Files whose tensors have different names, as one model."""
    headers: dict[Path, Header] = {}
    for file in files:
        header = read_header(file)
        for other, before in headers.items():
            if both := [name for name in header.places if name in before.places]:
                raise CheckpointError(
                    f"{path} has no {INDEX}, and {other.name} and {file.name} both hold {_few(both)}; give the path of "
                    "the file that is meant."
                )
        headers[file] = header
    return Checkpoint(path, headers)


def _indexed(index: Path) -> Checkpoint:
    """The files that an index lists."""
    listed = _weight_map(index)
    wanted: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        wanted.setdefault(name, set()).add(tensor)
    headers: dict[Path, Header] = {}
    for name, tensors in wanted.items():
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{index} lists {len(tensors)} tensors in {name}, which is not there; copy it too.")
        header = headers[file] = read_header(file)
        if header.places.keys() != tensors:
            lack, extra = sorted(tensors - header.places.keys()), sorted(header.places.keys() - tensors)
            found = f"it lacks {_few(lack)}" if lack else f"it holds {_few(extra)} besides"
            raise CheckpointError(f"{file} is not the file that {index.name} lists: {found}. Copy both again.")
    return Checkpoint(index.parent, headers, order=listed)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        values: Any = json.loads(index.read_text(encoding="utf-8"))
        listed = values["weight_map"]
        if not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("a file is no text")
        plain = all(
            isinstance(name, str) and Path(name).name == name and name not in ("", "..") for name in listed.values()
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(
            f"{index} is no list of shards: {type(cause).__name__}: {cause}. Copy it again."
        ) from cause
    if not listed or not plain:
        found = "names files outside its folder" if listed else "lists nothing"
        raise CheckpointError(f"{index} {found}; copy it again from where the model comes from.")
    return listed


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
