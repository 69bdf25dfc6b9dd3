"""Merging of model files of any size, with a few tensors in memory."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthokit.checkpoints import Checkpoint, open_checkpoint
from orthokit.errors import NothingMatchedWarning, OptionError
from orthokit.merging._file_merge import MergeOne, merge_files, signature_of
from orthokit.merging._matching import Rename
from orthokit.merging._stream import MergeProgress
from orthokit.merging.recipe import Recipe, merge_tensor, plan
from orthokit.merging.report import MergeReport

__all__ = ["FilesReport", "MergeProgress", "merge_by_recipes", "merge_checkpoints"]

PathLike = str | os.PathLike[str]
Statistics = Sequence[Mapping[str, Tensor] | PathLike] | None


@dataclass(frozen=True)
class FilesReport(MergeReport):
    """One row per tensor of a merged model in files, and what became of the files.

    Args:
        folder: The merged model.
        left_out: By expert, the names of its tensors that the base does not have, and that are in nothing merged.
        copied: The files beside the weights that came from the base.
        resumed: How many tensors an earlier, interrupted run had written.
        bytes: Of all tensors.
    """

    folder: Path = Path()
    left_out: Mapping[int, Sequence[str]] = field(default_factory=dict)
    copied: Sequence[str] = ()
    resumed: int = 0
    bytes: int = 0

    def told(self) -> dict[str, Any]:
        """The report as plain mappings and lists."""
        left_out = {str(index): list(names) for index, names in self.left_out.items()}
        more = {"folder": str(self.folder), "left_out": left_out, "copied": list(self.copied)}
        return {**super().told(), **more, "resumed": self.resumed, "bytes": self.bytes}

    def __str__(self) -> str:
        """How many tensors, by what, and what was not merged."""
        lines = [f"{super().__str__()}; {self.bytes / 1e6:,.1f} MB in {self.folder}"]
        if self.resumed:
            lines.append(f"{self.resumed} of them by an earlier run")
        for index, names in self.left_out.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left out of expert {index}, not in the base: {', '.join(names[:3])}{more}")
        return "\n".join(lines)


def merge_checkpoints(
    base: PathLike,
    experts: Sequence[PathLike],
    out: PathLike,
    *,
    method: str = "orthomerge",
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    statistics: Statistics = None,
    dtype: torch.dtype | str | None = "base",
    rename: Rename = None,
    missing: str = "error",
    threads: int = 2,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[MergeProgress], None] | None = None,
    resume: bool = True,
    seed: int = 0,
    report: str = "brief",
    **options: Any,
) -> FilesReport:
    r"""One model out of several in files, read, merged and written tensor by tensor.

    The result is what :func:`~orthokit.merging.merge` makes of the same tensors. It comes about in a hidden folder
    beside ``out`` and gets the name ``out`` when it is whole. A run that was killed is gone on with by the same call;
    another recipe, or files that have changed since, start anew. The base says which tensors there are, and its
    configuration, tokenizer and licence are copied: whatever weights it shares (ties) by its configuration, the result
    shares too.

    Args:
        base: The model that the experts were trained from: what :func:`~orthokit.checkpoints.open_checkpoint` takes,
            such as safetensors, GGUF or a file of ``torch.save``; safetensors are written.
        experts: Models with the same tensors.
        out: The folder that is to come; must not exist.
        method: One of :func:`~orthokit.merging.methods`; default ``"orthomerge"``.
        weights: One per expert; default: all 1.
        scale: Factor on the merged change; default: that of the method.
        layers: By shell pattern over names, other options for some tensors; as of :func:`~orthokit.merging.merge`.
        statistics: Of each expert what the method needs by parameter name: in memory, or a file of tensors.
        dtype: Of the floating tensors of the result: ``"base"`` (default), a type such as ``"bfloat16"``, or ``None``:
            the widest among the models, tensor by tensor. Computed is in float32 or wider in any case.
        rename: Names in the experts to names in the base: a mapping (names that it lacks stay), or a function
            (``None``: leave the tensor out).
        missing: What to do with a tensor that an expert lacks: ``"error"`` (default), or ``"base"``: that expert has
            the tensor of the base there.
        threads: Tensors at a time, ``>= 1``; default 2. Each thread reads, merges and writes, with its share of
            torch's threads, which for two threads of one is faster than for one of two.
        shard_bytes: Tensor bytes that a file may have.
        progress: Called after each tensor, in the thread of the caller.
        resume: Go on with what an interrupted run of the same recipe left.
        seed: Of random choices; default 0. Every tensor draws by its own name, so neither order nor threads matter.
        report: ``"brief"`` (default) or ``"full"``, as of :func:`~orthokit.merging.merge`.
        **options: Those of the method: ``methods()[method].options``.

    Returns:
        The :class:`FilesReport`.

    Raises:
        CheckpointError: A file cannot be read or is damaged, an expert lacks tensors, ``out`` exists or is being
            written by another process, or the disk is too small. ``out`` is then not there.
        ShapeError: Tensors of one name have different shapes; the message tells a differing vocabulary.
        ParameterError: Whole numbers or quantised weights that differ.
        NonFiniteError: A NaN or an infinity, and where.
        OptionError, UnknownNameError: An option out of its range.

    Warns:
        NothingMatchedWarning: A pattern of ``layers`` fits no tensor.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for name, value in {"base": 0.0, "a": 1.0, "b": 3.0}.items():
        ...         save_file({"W": torch.full((2, 2), value)}, f"{place}/{name}.safetensors")
        ...     experts = [f"{place}/a.safetensors", f"{place}/b.safetensors"]
        ...     told = merge_checkpoints(f"{place}/base.safetensors", experts, f"{place}/out", method="linear")
        ...     with open_checkpoint(told.folder) as merged:
        ...         merged.tensor("W").tolist()
        [[2.0, 2.0], [2.0, 2.0]]

    Numerics:
        As each method, and rounded once, from the working precision to ``dtype``. In memory at a time: of at most
        ``threads`` tensors, those of all models and what the method needs; very large tensors one by one. Sums over
        a tensor may differ in the last bit from those under another number of torch's threads.
    """
    recipe = Recipe(method, weights, scale, layers or {}, options, seed, report)

    def recipes(names: Sequence[str]) -> dict[str, Recipe]:
        for pattern in recipe.unmatched(names):
            warnings.warn(f"layers: {pattern!r} matches no tensor.", NothingMatchedWarning, stacklevel=4)
        return dict.fromkeys(names, recipe)

    return merge_by_recipes(
        base,
        experts,
        out,
        recipes,
        statistics=statistics,
        dtype=dtype,
        rename=rename,
        missing=missing,
        threads=threads,
        shard_bytes=shard_bytes,
        progress=progress,
        resume=resume,
    )


def merge_by_recipes(
    base: PathLike,
    experts: Sequence[PathLike],
    out: PathLike,
    recipes: Callable[[Sequence[str]], Mapping[str, Recipe]],
    *,
    statistics: Statistics = None,
    dtype: torch.dtype | str | None = "base",
    rename: Rename = None,
    missing: str = "error",
    threads: int = 2,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[MergeProgress], None] | None = None,
    resume: bool = True,
) -> FilesReport:
    """As :func:`merge_checkpoints`, with a recipe for each tensor.

    Args:
        base: As there.
        experts: As there.
        out: As there.
        recipes: From the names of the base to a recipe for each.
        statistics: As there.
        dtype: As there.
        rename: As there.
        missing: As there.
        threads: As there.
        shard_bytes: As there.
        progress: As there.
        resume: As there.
    """
    with open_checkpoint(base) as model:
        chosen = recipes(model.names())
    distinct = list({id(recipe): recipe for recipe in chosen.values()}.values())
    with ExitStack() as stack:
        known = [
            stack.enter_context(open_checkpoint(one)) if isinstance(one, str | os.PathLike) else one
            for one in statistics or ()
        ]
        if statistics is not None and len(known) != len(experts):
            raise OptionError(f"statistics must hold one mapping per expert; got {len(known)} for {len(experts)}.")

        def merging(start: Checkpoint, models: Sequence[Checkpoint]) -> MergeOne:
            for recipe in distinct:
                recipe.check_count(len(models))
            shapes = {name: torch.empty(start.shape(name), dtype=start.dtype(name), device="meta") for name in start}
            blocks = plan(shapes)

            def one(name: str, W0: Tensor, Ws: Sequence[Tensor]) -> tuple[Tensor, dict[str, Any]]:
                own = [_statistic(model, name) for model in known if name in model]
                given = own if own and len(own) == len(models) else None
                return merge_tensor(chosen[name], name, W0, Ws, block=blocks.get(name), statistics=given)

            return one

        made = merge_files(
            base,
            experts,
            out,
            merging,
            recipe=_signature(chosen, distinct, known),
            dtype=dtype,
            rename=rename,
            missing=missing,
            threads=threads,
            shard_bytes=shard_bytes,
            progress=progress,
            resume=resume,
        )
    first = distinct[0]
    asked = {"weights": first.weights, "scale": first.scale, "layers": first.layers, "seed": first.seed}
    asked = asked | dict(first.options) if len(distinct) == 1 else {"seed": first.seed, "recipes": len(distinct)}
    asked |= {"dtype": str(dtype), "missing": missing}
    return FilesReport(
        first.method, made.rows, asked, made.seconds, made.folder, made.left_out, made.copied, made.resumed, made.bytes
    )


def _statistic(model: Mapping[str, Tensor] | Checkpoint, name: str) -> Tensor:
    return model.tensor(name) if isinstance(model, Checkpoint) else model[name]


def _signature(
    chosen: Mapping[str, Recipe], distinct: Sequence[Recipe], known: Sequence[Mapping[str, Tensor] | Checkpoint]
) -> str | None:
    """All that the merged tensors depend on besides the models; ``None`` where that has no form to compare."""
    import orthokit

    places = {id(recipe): index for index, recipe in enumerate(distinct)}
    try:
        told = [signature_of([getattr(recipe, one.name) for one in fields(recipe)]) for recipe in distinct]
        beside = [one.digest if isinstance(one, Checkpoint) else signature_of(one) for one in known]
    except TypeError:
        return None
    return json.dumps([orthokit.__version__, told, {name: places[id(it)] for name, it in chosen.items()}, beside])
