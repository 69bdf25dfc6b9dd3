"""Model files read one tensor at a time: safetensors, GGUF and files of torch.save, or a folder with one model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from orthokit.checkpoints._files import memory as memory_of
from orthokit.checkpoints._files import read_at
from orthokit.checkpoints._folders import INDEX, SINGLE, WEIGHTS, few, model_files, weight_map
from orthokit.checkpoints._gguf_blocks import BLOCKS, block_rounding, dequantize
from orthokit.checkpoints._header import Header, Place, read_header
from orthokit.checkpoints._rounding import rounding_error
from orthokit.checkpoints.gguf import MAGIC, read_gguf
from orthokit.checkpoints.torch_files import is_torch, read_torch
from orthokit.errors import CheckpointError, OptionError, unknown_name

__all__ = ["INDEX", "SINGLE", "Checkpoint", "open_checkpoint"]


class Checkpoint:
    """The tensors of a model on disk, each read when it is asked for.

    Made by :func:`open_checkpoint`. Several threads may read at a time. A copy of one tensor is all that a reading
    keeps in memory: files are read, not mapped, so that pages of a large model do not count as memory of the process
    and a file that shrinks meanwhile is an error in words. Files of ``torch.save`` are the exception: torch maps them,
    or holds the whole of one from before torch 1.6.

    Args:
        path: What was opened.
        headers: By file, what it says of itself; names of tensors stand in one of them only.
        order: The names in another order than that of the files.

    Attributes:
        path: What was opened.
        files: The files with tensors.
        bytes: Of all tensors together, as they lie in the files.
        metadata: Text beside the tensors; of long lists in GGUF only how long they are.
        digest: Of the names, sizes, times and headers of the files: another one, and something was written since.
    """

    def __init__(self, path: Path, headers: Mapping[Path, Header], *, order: Iterable[str] | None = None) -> None:
        self._open: dict[Path, int] = {}
        self.path, self.files = path, sorted(headers)
        self.metadata: dict[str, str] = {}
        places: dict[str, Place] = {}
        self._held: dict[str, Tensor] = {}
        for file in self.files:
            self.metadata |= headers[file].metadata
            places |= headers[file].places
            self._held |= headers[file].held
        self._lengths: dict[Path, int] = {}
        self._places = places if order is None else {name: places[name] for name in order}
        self.bytes: int = sum(place.bytes for place in places.values())
        digest = hashlib.sha256()
        try:
            for file in self.files:
                self._open[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                facts = os.fstat(self._open[file])
                self._lengths[file] = facts.st_size
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
        """The type that :meth:`tensor` gives, without reading it: float32 for what is quantised in GGUF."""
        return self._place(name).dtype

    def quantization(self, name: str) -> str | None:
        """How the file keeps a tensor, such as ``"Q4_K"``; ``None``: as a plain row of numbers of its type."""
        return self._place(name).stored

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
            The tensor, on the CPU and contiguous, in the type and shape that it has in the file, every bit as it is
            there; what is quantised, as the float32 numbers that it stands for.

        Raises:
            UnknownNameError: No tensor of this name.
            CheckpointError: The file is gone, or shorter than when it was opened; or the tensor is kept in a way that
                is not read.
        """
        place = self._place(name)
        if place.start >= 0 and place.stored is None:
            memory = torch.empty(place.bytes, dtype=torch.uint8) if out is None else out[: place.bytes]
            return self._plain(name, place, memory)
        found = self._other(name, place)
        if out is None:
            return found.contiguous() if place.stored else found.clone(memory_format=torch.contiguous_format)
        return out[: found.nbytes].view(found.dtype).view(found.shape).copy_(found)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read some rows of a tensor, and no others.

        Args:
            name: One of :meth:`names`, with at least one dimension.
            start: The first row, ``0 <= start <= stop``.
            stop: The row behind the last, at most as many as there are.

        Returns:
            What ``tensor(name)[start:stop]`` gives.

        Raises:
            UnknownNameError: No tensor of this name.
            OptionError: There are no such rows.
            CheckpointError: As of :meth:`tensor`.
        """
        place = self._place(name)
        if not place.shape or not 0 <= start <= stop <= place.shape[0]:
            raise OptionError(f"{name!r} has the shape {place.shape} and no rows {start}:{stop}; ask for rows it has.")
        if place.start < 0 or (place.stored is not None and len(place.shape) < 2):
            # Mapped, or a single row of blocks, which has no bytes between them that begin a number.
            return self._other(name, place)[start:stop].clone(memory_format=torch.contiguous_format)
        # Of no rows, the bytes of all are 0 as well.
        row = place.bytes // max(place.shape[0], 1)
        part = replace(
            place, shape=(stop - start, *place.shape[1:]), start=place.start + start * row, bytes=(stop - start) * row
        )
        if place.stored is not None:
            return self._other(name, part)
        return self._plain(name, part, torch.empty(part.bytes, dtype=torch.uint8))

    def rounding(self, name: str, *, tensor: Tensor | None = None) -> float:
        r"""The error that the numbers of a tensor have because the file keeps them as it does, root mean square.

        .. math:: \sqrt{\mathrm{mean}(\mathrm{step}^2) / 12}

        with the distance to the next number of the type, or in GGUF the distance of the levels of each block.

        Args:
            name: One of :meth:`names`.
            tensor: What :meth:`tensor` gave, if it is at hand: a plain one is then not read again.

        Returns:
            In the units of the numbers; 0 for whole numbers and truth values, which are exact.

        Raises:
            UnknownNameError, CheckpointError: As of :meth:`tensor`.

        Numerics:
            Errors are taken as uniform within half a step, which is right to 4 % for Gaussian numbers in the types of
            32; what an encoder of the others gains by a search for its scales is not known. Nor is what came before the
            file: float32 numbers that were once bfloat16 count as float32.

        References:
            B. Widrow, I. Kollar (2008), Quantization Noise, for ``step^2 / 12``.
        """
        place = self._place(name)
        if place.stored is not None:
            return block_rounding(self._blocks(name, place), place.stored)
        return rounding_error(self.tensor(name) if tensor is None else tensor, place.dtype)

    def close(self) -> None:
        """Close the files; the tensors that were read stay."""
        self._held = {}
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

    def _plain(self, name: str, place: Place, memory: Tensor) -> Tensor:
        """A tensor that lies in the file as it is, read into memory."""
        self._read(place, memory)
        return _true_or_false(name, place, memory.view(place.dtype).view(place.shape))

    def _other(self, name: str, place: Place) -> Tensor:
        """A tensor that torch has mapped, or the numbers of one in blocks."""
        if place.stored is not None:
            return dequantize(self._blocks(name, place), place.stored).view(place.shape)
        # A mapped page that the file no longer has would end the process.
        if os.fstat(self._handle(place)).st_size < self._lengths[place.file]:
            raise CheckpointError(f"{place.file} became shorter while it was open; copy it again.")
        # A conjugate or a negative may be a mark on a tensor rather than numbers.
        return _true_or_false(name, place, self._held[name].detach().resolve_conj().resolve_neg())

    def _blocks(self, name: str, place: Place) -> Tensor:
        """The bytes of a quantised tensor."""
        if place.stored not in BLOCKS:
            raise CheckpointError(
                f"{name!r} in {place.file} is {place.stored}, which is not read; read are plain tensors and the GGUF "
                f"types {', '.join(BLOCKS)}. Convert it to one of them."
            )
        raw = torch.empty(place.bytes, dtype=torch.uint8)
        self._read(place, raw)
        return raw

    def _handle(self, place: Place) -> int:
        if place.file not in self._open:
            raise CheckpointError(f"{self.path} was closed; open it again with open_checkpoint({str(self.path)!r}).")
        return self._open[place.file]

    def _read(self, place: Place, memory: Tensor) -> None:
        handle = self._handle(place)
        target, done = memory_of(memory), 0
        while done < place.bytes:
            try:
                got = read_at(handle, target[done:], place.start + done)
            except OSError as cause:
                raise CheckpointError(f"{place.file} cannot be read: {cause.strerror or cause}.") from cause
            if got == 0:
                raise CheckpointError(f"{place.file} became shorter while it was read; copy it again.")
            done += got


def _true_or_false(name: str, place: Place, tensor: Tensor) -> Tensor:
    """The tensor; a truth value that is neither 0 nor 1 is no value to compute with."""
    if place.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise CheckpointError(f"{place.file} is damaged: {name!r} is to be true or false and holds other values.")
    return tensor


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A model on disk, its headers checked and nothing else read yet.

    Args:
        path: A safetensors file, a GGUF file of version 2 or 3, or a file of ``torch.save``, told apart by how they
            begin; a folder with ``model.safetensors``, with ``model.safetensors.index.json`` and the files that it
            lists, or with one or several ``.safetensors`` files whose names of tensors are disjoint; without these,
            with ``pytorch_model.bin``, its index and the files, or one ``.gguf`` model in one or several files; or such
            an index itself.

    Returns:
        The :class:`Checkpoint`; ``with`` closes it.

    Raises:
        CheckpointError: A file is missing, cut off or damaged; the index and the files disagree; several files hold
            the same names; a pickle holds more than weights; or the folder holds something else, such as an adapter.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"W": torch.eye(2), "b": torch.zeros(2)}, f"{folder}/model.safetensors")
        ...     with open_checkpoint(folder) as model:
        ...         model.shape("W"), bool((model.tensor("W") == torch.eye(2)).all())
        ((2, 2), True)

    Numerics:
        Every bit as it is in the file. Opening costs the reading of the headers; a tensor costs one read. GGUF: the
        blocks are computed in float32, as the format's own reader does, and names and the order of rows are those of
        the format, which in Llama models puts the rows of queries and keys in pairs of rotary angles.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _folder(place)
        if not place.exists():
            beside = place.parent.iterdir() if place.parent.is_dir() else ()
            near = sorted(one.name for one in beside if one.suffix in WEIGHTS)
            there = f"; {place.parent} has {few(near)}" if near else ""
            raise CheckpointError(f"{place} is not there{there}. Check the path.")
    except OSError as cause:
        raise CheckpointError(f"{place} cannot be read: {cause.strerror or cause}. Check who may read it.") from cause
    if place.name.endswith(".index.json"):
        return _indexed(place)
    return _together(place, [place])


def _folder(folder: Path) -> Checkpoint:
    found = model_files(folder)
    return _indexed(found) if isinstance(found, Path) else _together(folder, found)


def _header(file: Path) -> Header:
    """What a file says of itself, in the format that its first bytes tell: its name is only a name."""
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
    except OSError as cause:
        raise CheckpointError(f"{file} cannot be read: {cause.strerror or cause}. Check the path.") from cause
    return read_gguf(file) if start.startswith(MAGIC) else read_torch(file) if is_torch(start) else read_header(file)


def _together(path: Path, files: Sequence[Path]) -> Checkpoint:
    """Files whose tensors have different names, as one model."""
    headers: dict[Path, Header] = {}
    for file in files:
        header = _header(file)
        for other, before in headers.items():
            if both := [name for name in header.places if name in before.places]:
                raise CheckpointError(
                    f"{path} has no {INDEX}, and {other.name} and {file.name} both hold {few(both)}; give the path of "
                    "the file that is meant."
                )
        headers[file] = header
    return Checkpoint(path, headers)


def _indexed(index: Path) -> Checkpoint:
    """The files that an index lists."""
    listed = weight_map(index)
    wanted: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        wanted.setdefault(name, set()).add(tensor)
    headers: dict[Path, Header] = {}
    for name, tensors in wanted.items():
        file = index.parent / name
        if not file.is_file():
            raise CheckpointError(f"{index} lists {len(tensors)} tensors in {name}, which is not there; copy it too.")
        header = headers[file] = _header(file)
        if header.places.keys() != tensors:
            lack, extra = sorted(tensors - header.places.keys()), sorted(header.places.keys() - tensors)
            found = f"it lacks {few(lack)}" if lack else f"it holds {few(extra)} besides"
            raise CheckpointError(f"{file} is not the file that {index.name} lists: {found}. Copy both again.")
    return Checkpoint(index.parent, headers, order=listed)
