"""Files of ``torch.save``, read through torch's weights-only loading and nothing else."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from orthokit.checkpoints._header import Header, Place
from orthokit.errors import CheckpointError

__all__ = ["is_torch", "read_torch"]

_AGAIN = "Copy or download the file again."
_STATE = "Where you trust the file, load it and write model.state_dict() with safetensors or torch.save."

# How the two forms begin: the zip archive of today, and the row of pickles from before torch 1.6, whose first is a
# number of ten bytes that only torch writes.
_ZIP, _ROW = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
# The pickle of a model is a list of names and places; the numbers lie beside it. It takes some 30 steps for a tensor,
# with tuples of tuples of numbers; each step may make an object of Python's, of 50 bytes and more.
_LONGEST, _STEPS, _DEEPEST = 100_000_000, 4_000_000, 100
# A tensor whose strides are 0 has more numbers than the file. Up to here that is a mask; beyond, a trap.
_REPEATED = 1 << 26
# How many dictionaries may lie in each other around the model: each is searched, and they may hold each other.
_NESTED = 8
# What lies beside a model in a file of a training run, by how a word in its name begins.
_BESIDE = re.compile(r"(?:^|_)(?:optim|sched|rng|scaler|callback|loop|hyper|config|args)", re.IGNORECASE)


def is_torch(start: bytes) -> bool:
    """Whether a file that begins so is one of ``torch.save``.

    Args:
        start: Its first 16 bytes.
    """
    return start.startswith((_ZIP, _ROW))


def read_torch(path: Path) -> Header:
    """Load the names of a file of ``torch.save`` by weights-only loading; the numbers are mapped, not read.

    A dictionary that holds the model under a name, such as ``{"state_dict": ...}`` or ``{"model": ...}``, is entered
    if all tensors are there, or if the others belong to the optimizer and the like; the metadata then say so.

    Args:
        path: The file. One from before torch 1.6 cannot be mapped, and is read whole.

    Returns:
        The header, with the tensors.

    Raises:
        CheckpointError: It cannot be read, is cut off, holds more than weights, or no one model.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            mapped = stream.read(len(_ZIP)) == _ZIP
            text = _archive(path, size) if mapped else b""
            stream.seek(0)
            _check_pickles(path, io.BytesIO(text if mapped else stream.read(_LONGEST)), 1 if mapped else 4)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror or cause}. Check the path.") from cause
    tensors, metadata = _model(path, _loaded(path, mapped))
    places = {name: _place(path, name, tensor, size) for name, tensor in tensors.items()}
    return Header(places, metadata, text, {name: tensors[name] for name in tensors if places[name].stored is None})


def _refuse(path: Path, found: str, todo: str = _AGAIN) -> NoReturn:
    raise CheckpointError(f"{path} is no file of weights that torch.save wrote: {found}. {todo}") from None


def _archive(path: Path, size: int) -> bytes:
    """The pickle in an archive, once nothing in it can become larger than it is in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            if len(names) < len(entries):
                _refuse(path, "names stand twice in the archive")
            packed = [one for one in entries if one.compress_type or one.file_size != one.compress_size]
            if packed:
                _refuse(path, f"{packed[0].filename!r:.80} in it is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                _refuse(path, f"its archive claims more than the {size:,} bytes of the file")
            if any(name.endswith("/constants.pkl") for name in names):
                _refuse(path, "it is a TorchScript program", _STATE)
            wanted = [one for one in entries if re.fullmatch(r"[^/]+/data\.pkl", one.filename)]
            if len(wanted) != 1:
                _refuse(path, f"its archive has {len(wanted)} entries 'data.pkl' and has to have 1")
            if wanted[0].file_size > _LONGEST:
                _refuse(path, f"its list of names has {wanted[0].file_size:,} bytes")
            return archive.read(wanted[0])
    except CheckpointError:
        raise
    except Exception as cause:  # a damaged directory raises whatever Python raises on the way
        _refuse(path, f"its archive is damaged or cut off ({_short(cause)})")


def _check_pickles(path: Path, pickles: io.BytesIO, many: int) -> None:
    try:
        for _ in range(many):
            _check_pickle(path, pickles)
    except CheckpointError:
        raise
    except Exception as cause:  # pickletools raises as many kinds of errors as there are ways to be no pickle
        _refuse(path, f"its pickle is damaged ({_short(cause)})")


def _check_pickle(path: Path, stream: io.BytesIO) -> None:
    """Refuse what weights-only loading lets pass and a file could harm by.

    A ``bytearray``, and objects without end, take memory that the file does not have; tuples in tuples overflow the
    machine's stack when Python hashes them. So the pickle is gone through with nothing but the depth of each tuple.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step == _STEPS:
            _refuse(path, f"its pickle takes more than {_STEPS:,} steps", _STATE)
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name == "GLOBAL" and str(argument).endswith(" bytearray"):
            _refuse(path, "it makes a bytearray, which weights do not need", _STATE)
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name.endswith("PUT"):
            memo[argument] = stack[-1]
            continue
        marked = pickletools.markobject in before
        start = marks.pop() - before.index(pickletools.markobject) if marked else len(stack) - len(before)
        if start < 0:
            raise ValueError(f"{name} takes what is not there")
        depth = memo[argument] if name.endswith("GET") else 0
        if after == [pickletools.pytuple]:
            depth = 1 + max(stack[start:], default=0)
        if depth > _DEEPEST:
            _refuse(path, f"it has tuples in tuples, more than {_DEEPEST} deep", _STATE)
        stack[start:] = [depth] * len(after)


def _loaded(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            # Old files make torch warn of its own old classes, which is nothing to the reader of the file.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as cause:  # weights-only loading of a damaged file raises errors of many kinds
        refused = re.search(r"GLOBAL (\S+) was not an allowed", str(cause))
        if refused or "is blocked" in str(cause):
            what = f"{refused[1]!r:.80}" if refused else "a blocked module"
            _refuse(path, f"besides weights it needs {what}, which could run code", _STATE)
        _refuse(path, f"weights-only loading refuses it ({_short(cause)})")


def _short(cause: Exception) -> str:
    """The words of an error without torch's advice, which is to load with less care."""
    words = str(cause).split("WeightsUnpickler error:")[-1].strip().splitlines()
    return f"{type(cause).__name__}: {words[0] if words else ''}"[:160]


def _model(path: Path, values: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the one model in what was loaded, and what else is told there."""
    metadata: dict[str, str] = {}
    entered: list[str] = []
    while True:
        if not isinstance(values, Mapping):
            where = f" in {'.'.join(entered)!r}" if entered else ""
            _refuse(path, f"it holds a {type(values).__name__}{where} and has to hold tensors by name", _STATE)
        own = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        inside = [name for name, value in values.items() if name not in own and _has_tensors(value)]
        if len(inside) > 1 or (own and inside):
            kept = [name for name in inside if not _BESIDE.search(str(name))]
            if left := [str(name) for name in inside if name not in kept]:
                metadata["left out"] = ", ".join(filter(None, [metadata.get("left out"), *left]))
            inside = kept
        told = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
        metadata |= {_plain(name): _plain(value) for name, value in told.items()}
        if not inside:
            break
        if own or len(inside) > 1:
            shown = ", ".join(f"{name!r:.40}" for name in [*inside, *own][:4])
            _refuse(
                path, f"it holds tensors at several places ({shown})", "Write the one that is meant to its own file."
            )
        entered.append(str(inside[0]))
        if len(entered) > _NESTED:
            _refuse(path, f"its tensors are in more than {_NESTED} dictionaries within each other", _STATE)
        values = values[inside[0]]
    if not own:
        _refuse(path, "it holds no tensor", "Check that it is the file that is meant.")
    if odd := [name for name in own if not isinstance(name, str) or name != _plain(name)]:
        _refuse(path, f"its tensors have to have names, and one has {odd[0]!r:.40}", _STATE)
    if entered:
        metadata["entered"] = ".".join(entered)
    return own, metadata


def _plain(value: object) -> str:
    """As text that can be written: a pickle may hold halves of characters."""
    return str(value).encode("utf-8", "replace").decode()


def _has_tensors(value: Any) -> bool:
    """Whether there is a tensor in nested mappings and lists, which may hold each other."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            return True
        if isinstance(one, Mapping | list | tuple | set) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(_members(one))
    return False


def _members(value: Mapping[Any, Any] | list[Any] | tuple[Any, ...] | set[Any]) -> Iterator[Any]:
    yield from value.values() if isinstance(value, Mapping) else value


def _place(path: Path, name: str, tensor: Tensor, size: int) -> Place:
    """What is known of a tensor without touching its numbers."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.is_nested:
        kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else None
        kind = kind or (f"of the device {tensor.device}" if tensor.device.type != "cpu" else str(tensor.layout))
        return Place(path, tensor.dtype, tuple(tensor.shape), -1, 0, f"a tensor {kind.removeprefix('torch.')}")
    if tensor.nbytes > max(size, _REPEATED):
        _refuse(path, f"{name!r:.80} has {tensor.nbytes:,} bytes in a file of {size:,}, so that numbers repeat", _STATE)
    return Place(path, tensor.dtype, tuple(tensor.shape), -1, tensor.nbytes)
