"""Merging of model files tensor by tensor, whatever is done to a tensor."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthokit._threads import clock, run_bounded
from orthokit.checkpoints import Checkpoint, CheckpointWriter, open_checkpoint
from orthokit.errors import OptionError
from orthokit.merging._beside import files_beside
from orthokit.merging._matching import Matched, Rename, matched
from orthokit.merging._stream import MergeProgress
from orthokit.merging.recipe import check_same, mergeable

__all__ = ["MergeOne", "MergedFiles", "merge_files", "signature_of"]

#: What is done to one tensor: its name, that of the base and those of the experts; the result and a row about it.
MergeOne = Callable[[str, Tensor, Sequence[Tensor]], tuple[Tensor, dict[str, Any]]]


@dataclass(frozen=True)
class MergedFiles:
    """What a merge of files has to tell.

    Args:
        folder: The merged model.
        rows: One per tensor, in the order of the base.
        left_out: By expert, the names of its tensors that the base does not have.
        copied: The files beside the weights that were copied from the base.
        resumed: How many tensors an earlier run had written.
        seconds: How long this run took.
        bytes: Of all tensors that were written.
    """

    folder: Path
    rows: list[dict[str, Any]]
    left_out: dict[int, list[str]]
    copied: list[str]
    resumed: int
    seconds: float
    bytes: int


def merge_files(
    base: str | os.PathLike[str],
    experts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    merging: Callable[[Checkpoint, Sequence[Checkpoint]], MergeOne],
    *,
    recipe: str | None,
    dtype: torch.dtype | str | None,
    rename: Rename,
    missing: str,
    threads: int,
    shard_bytes: int,
    progress: Callable[[MergeProgress], None] | None,
    resume: bool,
) -> MergedFiles:
    """Read, merge and write the tensors of models; see :func:`orthokit.merging.merge_checkpoints`.

    Args:
        merging: Called with the models once they are open; gives what is done to a floating tensor.
        recipe: What ``merging`` depends on, so that only its own work is gone on with; ``None``: it cannot be told.
        base, experts, out, dtype, rename, missing, threads, shard_bytes, progress, resume: As there.
    """
    if isinstance(experts, str | os.PathLike):
        raise OptionError(f"experts must be a list of paths; got the one path {experts!r}. Pass [{experts!r}].")
    if not experts:
        raise OptionError("experts is empty; pass at least one path.")
    if threads < 1:
        raise OptionError(f"threads must be at least 1; got {threads}.")
    elapsed = clock()
    with ExitStack() as stack:
        start = stack.enter_context(open_checkpoint(base))
        models = [stack.enter_context(open_checkpoint(path)) for path in experts]
        names = matched(start, models, rename=rename, missing=missing)
        types = _types(start, models, names, dtype)
        work = _Work(start, models, names, types, merging(start, models))
        beside = files_beside(Path(base), dtype=_widest(start, types))
        signature = "" if recipe is None else _signature(recipe, start, models, names)
        writer = CheckpointWriter(
            out,
            {name: (types[name], start.shape(name)) for name in start},
            shard_bytes=shard_bytes,
            metadata=start.metadata if start.metadata.get("format") else {**start.metadata, "format": "pt"},
            signature=signature,
            resume=resume and recipe is not None,
        )
        with writer:
            before = set(writer.notes)
            rows = _run(work, writer, threads=threads, progress=progress, elapsed=elapsed)
            folder = writer.finish(beside)
        return MergedFiles(folder, rows, names.left_out, sorted(beside), len(before), elapsed(), writer.bytes)


@dataclass(frozen=True)
class _Work:
    """The models and what is done to a tensor of them."""

    base: Checkpoint
    experts: Sequence[Checkpoint]
    names: Matched
    types: Mapping[str, torch.dtype]
    merge_one: MergeOne

    def cost(self, name: str) -> int:
        return math.prod(self.base.shape(name)) * (len(self.experts) + 2)

    def __call__(self, name: str) -> tuple[Tensor, dict[str, Any]]:
        """Read a tensor of all models and merge it."""
        start = self.base.tensor(name)
        owns = self.names.names[name]
        # An expert without the tensor has the base's there, when that is allowed at all.
        given = [start if own is None else model.tensor(own) for model, own in zip(self.experts, owns, strict=True)]
        row: dict[str, Any] = {"name": name, "shape": list(start.shape), "method": "copy"}
        if all(own is None for own in owns):
            return start.to(self.types[name]), {**row, "note": "in no expert: copied"}
        if not all(mergeable(one.dtype) for one in (start, *given)):
            check_same(name, start, given, places=[model.path for model in self.experts])
            return start, {**row, "note": "no floating numbers of 2 bytes or more: copied"}
        # Merged in a type that holds both what is read and what is written, so that it is rounded once.
        wide = torch.promote_types(start.dtype, self.types[name])
        result, row = self.merge_one(name, start.to(wide), given)
        return result.to(self.types[name]), row


def _run(
    work: _Work,
    writer: CheckpointWriter,
    *,
    threads: int,
    progress: Callable[[MergeProgress], None] | None,
    elapsed: Callable[[], float],
) -> list[dict[str, Any]]:
    """Merge what is not written yet; the rows of all."""
    rows: dict[str, dict[str, Any]] = {name: dict(note) for name, note in writer.notes.items()}
    sizes = {name: math.prod(work.base.shape(name)) * work.types[name].itemsize for name in work.base}
    resumed = written = sum(sizes[name] for name in rows)
    count = len(rows)

    def one(name: str) -> None:
        tensor, row = work(name)
        writer.write(name, tensor, note=row)
        rows[name] = row

    def done(name: str) -> None:
        nonlocal written, count
        written, count = written + sizes[name], count + 1
        if progress is not None:
            progress(MergeProgress(name, count, len(sizes), written, writer.bytes, resumed, elapsed()))

    run_bounded(one, {name: work.cost(name) for name in work.base if name not in rows}, threads=threads, done=done)
    return [rows[name] for name in work.base]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _types(
    base: Checkpoint, experts: Sequence[Checkpoint], names: Matched, dtype: torch.dtype | str | None
) -> dict[str, torch.dtype]:
    """By name, the type that is written."""
    asked = _named(dtype)
    found = {}
    for name in base:
        found[name] = base.dtype(name)
        if not mergeable(found[name]):
            continue
        if asked is not None:
            found[name] = asked
        elif dtype is None:
            for model, own in zip(experts, names.names[name], strict=True):
                if own is not None and mergeable(model.dtype(own)):
                    found[name] = torch.promote_types(found[name], model.dtype(own))
    return found


def _widest(base: Checkpoint, types: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The type that the most numbers are written in, if that is another than in the base."""
    counts: dict[torch.dtype, int] = {}
    for name in (name for name in base if types[name] != base.dtype(name)):
        counts[types[name]] = counts.get(types[name], 0) + math.prod(base.shape(name))
    return max(counts, key=counts.__getitem__, default=None)


def _named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type that was asked for, ``None`` for that of the models."""
    if dtype is None or dtype == "base":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not mergeable(found):
        raise OptionError(
            f"dtype must be 'base', None or a floating type of 2 bytes or more such as 'bfloat16'; got {dtype!r}."
        )
    return found


def signature_of(value: Any) -> Any:
    """A value as JSON that is equal only for equal values; tensors by their digest.

    Raises:
        TypeError: There is no such form, as of a function or a generator.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        content = _bytes(value.detach().cpu()).numpy().tobytes()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, torch.dtype | os.PathLike):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): signature_of(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [signature_of(one) for one in value]
    raise TypeError(f"{type(value).__name__} has no form that can be compared")


def _signature(recipe: str, base: Checkpoint, experts: Sequence[Checkpoint], names: Matched) -> str:
    inputs = [model.digest for model in (base, *experts)]
    return json.dumps([recipe, inputs, names.names])
