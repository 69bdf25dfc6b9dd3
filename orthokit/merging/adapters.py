r"""Adapters merged in files, without the model that they were trained on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthokit.adapters._combine_parts import Made, Rule, agreement, combined_part, factored
from orthokit.adapters._install import Entry, install
from orthokit.adapters.base import Adapter
from orthokit.adapters.files import read_json, save
from orthokit.adapters.full import FullAdapter
from orthokit.adapters.lora import LoRA, LoRAAdapter
from orthokit.adapters.peft_export import save_peft
from orthokit.adapters.peft_read import CONFIG
from orthokit.errors import CheckpointError, OptionError, unknown_name
from orthokit.linalg.merged_rotations import INTENSITIES, normalised
from orthokit.merging._adapter_folders import (
    AdapterFolder,
    LayerFacts,
    common_layers,
    open_folder,
    part_of,
    site_of,
    skeleton,
)
from orthokit.merging._common import check_range
from orthokit.merging._registry import MergeMethod, method_named
from orthokit.merging.recipe import Recipe
from orthokit.merging.report import MergeReport

__all__ = ["ADAPTER_METHODS", "merge_adapters"]

PathLike = str | os.PathLike[str]
FORMATS = ("orthokit", "peft")
# What they are called where adapters of a model are combined.
_OF_ROTATIONS = {"orthomerge": "orthomerge", "linear": "lie", "geodesic": "geodesic"}
_EXACT = ("linear", "task_arithmetic")
_OF_CHANGES = (*_EXACT, "ties", "dare", "tsv", "iso_c", "knots")
ADAPTER_METHODS = tuple(dict.fromkeys((*_OF_ROTATIONS, *_OF_CHANGES)))
"""What :func:`merge_adapters` can be asked for."""


@torch.no_grad()
def merge_adapters(
    folders: Sequence[PathLike],
    out: PathLike,
    *,
    method: str = "orthomerge",
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    clip: float = 10.0,
    intensity: str = "mean",
    rank: int | None = None,
    format: str = "orthokit",
    name: str = "merged",
    seed: int = 0,
    **options: Any,
) -> MergeReport:
    r"""One adapter out of several, in files: the weights of the model are not needed and not read.

    OFT, BOFT and HRA are merged through their generators, layer by layer,

    .. math:: Q = c\,\bar Q, \quad \bar Q = \frac{\sum_i w_i Q_i}{\sum_i w_i}, \quad
        c = \min\Bigl(c_{max},\ \frac{\mathrm{mean}_i \|Q_i\|_F}{\|\bar Q\|_F}\Bigr)

    with one ``c`` for all blocks of a layer. LoRA and full fine-tuning are merged as changes of a weight of zeros.

    Args:
        folders: One or more, each with one adapter that ``orthokit.adapters.save`` or PEFT wrote; of one kind, on the
            same layers.
        out: The folder that is to come; must not exist.
        method: Rotations: ``"orthomerge"`` (default), ``"linear"`` (``c = 1``) or ``"geodesic"`` (the mean of the
            rotations themselves). LoRA and full fine-tuning: ``"linear"``, ``"task_arithmetic"``, ``"ties"``,
            ``"dare"``, ``"tsv"``, ``"iso_c"`` or ``"knots"``.
        weights: One per folder; default: all 1. For rotations at least 0 and not all 0.
        scale: Factor on the merged generator or change; default: 1 for rotations, else that of the method.
        clip: OrthoMerge: largest ``c``, ``>= 1``; default 10.
        intensity: OrthoMerge: length of the result, ``"mean"`` (default), ``"median"`` or ``"max"`` of theirs.
        rank: LoRA: largest rank of the result, ``>= 1``; default ``None``: the sum of theirs, or the smaller side of
            the layer if that is less. (That of ``"tsv"`` by itself is its default.)
        format: ``"orthokit"`` (default) or ``"peft"``.
        name: Of the adapter in a folder of orthokit's; default ``"merged"``.
        seed: Of random choices; default 0. Every layer draws by its own name.
        **options: Those of the method: ``methods()[method].options``.

    Returns:
        A row per layer: ``kind``; ``norms`` of the generators or changes, ``norm`` of the merged one, ``cosine``
        between them (mean over pairs); ``correction`` (``None`` where it is infinite) and ``clipped``; of LoRA ``rank``
        and ``kept``, the share of the squared merged change that it holds.

    Raises:
        CheckpointError: A folder is missing, damaged, a pickle, holds NaN, several adapters or weights of the model
            besides; or ``out`` exists. Nothing was written.
        ParameterError: Folders with different layers, or no such layer in PEFT.
        ShapeError: A layer that differs in size.
        OptionError: Adapters of different kinds, a method that is not for their kind, adapters that depend on the
            weights of the model (DoRA), an option out of range.
        UnknownNameError: Unknown method, option, format or intensity.

    Example:
        >>> from orthokit.adapters import OFT, attach, load
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for seed in range(2):
        ...         expert = attach(nn.Sequential(nn.Linear(8, 4)), OFT(4, init_std=0.1, seed=seed))
        ...         _ = save(expert, f"{place}/{seed}")
        ...     report = merge_adapters([f"{place}/0", f"{place}/1"], f"{place}/both")
        ...     model = load(nn.Sequential(nn.Linear(8, 4)), f"{place}/both")
        >>> row = report.rows[0]
        >>> math.isclose(row["norm"], sum(row["norms"]) / 2, rel_tol=1e-6), model[0].active
        (True, ('merged',))

    Numerics:
        Rotations and sums in float64, rounded once to the type of the folders (at least float32). LoRA: sums, TSV,
        Iso-C and the linear KnOTS in the span of the factors, at the cost of their ranks; the others, entry by entry,
        form the dense changes and take an SVD of the size of each layer. Smaller blocks of OFT are put into larger
        ones; BOFT is merged factor by factor, and its factors on outputs are averaged; HRA has as many reflections as
        all adapters together. A folder of PEFT's with rotations does not tell how many outputs a layer has: the result
        goes with any.

    References:
        Yang, Shi, Liu (2026), Orthogonal Model Merging, arXiv 2602.05943, section 3. There ``c`` has no bound and
        LoRA is first merged into the weights. The other methods: :func:`~orthokit.merging.methods`.
    """
    start = time.perf_counter()
    rule, recipe = _asked(folders, method, weights, scale, clip, intensity, rank, seed, options)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    target = Path(out)
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already; choose another name, or remove it first.")
    opened = [open_folder(path) for path in folders]
    layers = common_layers(opened)
    made: dict[str, Made] = {}
    rows, dtypes = [], {}
    for at, facts in layers.items():
        parts = _parts(at, facts, opened)
        made[at] = _merged(parts, rule, recipe, at)
        dtypes[at] = parts[0].site.dtype
        rows.append(_row(at, facts, parts, made[at], method))
    if format == "peft":
        _check_kernels(layers)
    model = skeleton(layers, dtypes)
    entries = {at: Entry(one.config, one.values) for at, one in made.items()}
    model = install(model, {name: entries}, source=str(target))
    _write(model, target, name, format, opened)
    asked = {"weights": weights, "scale": scale, "clip": clip, "intensity": intensity, "rank": rank, "seed": seed}
    asked |= {"folders": [str(path) for path in folders], "format": format, **options}
    return MergeReport(method, rows, asked, time.perf_counter() - start)


def _asked(
    folders: Sequence[PathLike],
    method: str,
    weights: Sequence[float] | None,
    scale: float | None,
    clip: float,
    intensity: str,
    rank: int | None,
    seed: int,
    options: dict[str, Any],
) -> tuple[Rule, Recipe | None]:
    """What is asked for, checked: as for rotations and sums, and as for a method on changes."""
    if isinstance(folders, str | os.PathLike):
        raise OptionError(f"folders must be a list of paths; got the one path {folders!r}. Pass [{folders!r}].")
    if not folders:
        raise OptionError("folders is empty; pass at least one path.")
    if method not in ADAPTER_METHODS:
        raise unknown_name("method", method, ADAPTER_METHODS)
    if intensity not in INTENSITIES:
        raise unknown_name("intensity", intensity, INTENSITIES)
    check_range("clip", clip, least=1.0)
    if scale is not None:
        check_range("scale", scale)
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise OptionError(f"rank must be a whole number at least 1, or None; got {rank!r}.")
    given = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(folders) or not all(map(math.isfinite, given)):
        raise OptionError(f"weights must hold one finite number per folder; got {given} for {len(folders)} folders.")
    if method in ("orthomerge", "geodesic"):
        for unknown in options:
            raise unknown_name(f"option of {method} on adapters", unknown, ("weights", "scale", "clip", "intensity"))
        return Rule(method, normalised(given, len(given)), clip, intensity, scale=1.0 if scale is None else scale), None
    recipe = Recipe(method, weights, scale, {}, options, seed)
    recipe.check_count(len(folders))
    if method == "linear":
        total = math.fsum(given)
        if abs(total) <= 1e-12 * max(map(abs, given)):
            raise OptionError(f"linear takes a mean: weights must not sum to 0; got {given}.")
        given = [weight / total for weight in given]
    default = signature(method_named(method).function).parameters["scale"].default
    return Rule("lie", given, scale=default if scale is None else scale, rank=rank), recipe


def _parts(at: str, facts: LayerFacts, opened: Sequence[AdapterFolder]) -> list[Adapter]:
    """The adapters of one layer, in one type."""
    site = site_of(at, facts)
    entries = [folder.entry(at, site) for folder in opened]
    families = ["oft" if str(entry.config.kind).startswith("oft") else str(entry.config.kind) for entry in entries]
    for family, folder in zip(families, opened, strict=True):
        if family != families[0]:
            raise OptionError(
                f"adapters of one kind can be merged; {at!r} has {families[0]} in {opened[0].path} and {family} in "
                f"{folder.path}."
            )
    dtype = torch.float32
    for entry in entries:
        for tensor in entry.tensors.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
    typed = site_of(at, facts, dtype)
    return [part_of(entry, typed, folder.path) for entry, folder in zip(entries, opened, strict=True)]


def _merged(parts: Sequence[Adapter], rule: Rule, recipe: Recipe | None, at: str) -> Made:
    """The adapter of one layer."""
    adding = isinstance(parts[0], LoRAAdapter | FullAdapter)
    kind = parts[0].config.kind
    if rule.rank is not None and not isinstance(parts[0], LoRAAdapter):
        raise OptionError(f"rank is for LoRA, and {at!r} has {kind}; leave it out.")
    if adding and recipe is None and rule.method == "geodesic":
        raise OptionError(f"geodesic is for rotations, and {at!r} has {kind}; take one of {', '.join(_OF_CHANGES)}.")
    if not adding and recipe is not None and recipe.method != "linear":
        raise OptionError(
            f"{recipe.method} merges changes of weights, and {at!r} has {kind}, which rotates them; take one of "
            f"{', '.join(_OF_ROTATIONS)}."
        )
    if not adding or recipe is None or recipe.method in _EXACT:
        return combined_part(parts, rule, at)
    spec, own = recipe.for_tensor(at)
    try:
        if isinstance(parts[0], LoRAAdapter):
            return _low_rank(parts, spec, own, rule.rank)  # type: ignore[arg-type]
        changes = [part.strength * part.get_parameter("delta") for part in parts]
        merged = spec.function(torch.zeros_like(changes[0]), changes, **own)
    except Exception as error:
        error.add_note(f"(while merging {at!r})")
        raise
    facts = {**agreement(changes), "norm": float(torch.linalg.vector_norm(merged))}
    return Made(parts[0].config, {"delta": merged}, facts)  # type: ignore[arg-type]


def _low_rank(parts: Sequence[LoRAAdapter], spec: MergeMethod, own: dict[str, Any], limit: int | None) -> Made:
    """LoRA merged as changes of a weight of zeros, and pressed to a rank again."""
    factors = [part.factors() for part in parts]
    rows, columns = len(factors[0][1]), factors[0][0].shape[1]
    if spec.name in ("tsv", "iso_c") or (spec.name == "knots" and own.get("inner", "linear") == "linear"):
        # These merge alike in any orthonormal bases: in those of the factors the matrices are as small as the ranks.
        if spec.name == "tsv":
            own = {"rank": max(1, min(rows, columns) // len(parts)), **own}
        left = torch.linalg.qr(torch.cat([up.double() for _, up in factors], dim=1))[0]
        right = torch.linalg.qr(torch.cat([down.double() for down, _ in factors]).mT)[0]
        changes = [(left.mT @ up.double()) @ (down.double() @ right) for down, up in factors]
    else:
        left = right = None
        changes = [up @ down for down, up in factors]
    merged = spec.function(torch.zeros_like(changes[0]), changes, **own)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    rank = min(sum(len(down) for down, _ in factors), rows, columns)
    rank = rank if limit is None else min(rank, limit)
    down, up, kept = factored(U, S, Vh, rank)
    if left is not None and right is not None:
        down, up = down @ right.mT, left @ up
    config = LoRA(rank=rank, dropout=max(part.config.dropout for part in parts), seed=parts[0].config.seed)
    facts = {**agreement(changes), "norm": float(torch.linalg.vector_norm(S[:rank])), "kept": kept}
    return Made(config, {"down": down, "up": up}, facts)


def _row(at: str, facts: LayerFacts, parts: Sequence[Adapter], made: Made, method: str) -> dict[str, Any]:
    notes = [] if facts.out_features else ["outputs not known: goes with any"]
    if not made.facts:
        notes.append("one adapter: as it is")
    told = {"rank": made.config.rank} if hasattr(made.config, "rank") else {}  # type: ignore[attr-defined]
    return {
        "name": at,
        "shape": [facts.out_features or None, facts.in_features],
        "method": method,
        "note": "; ".join(notes),
        "kind": str(made.config.kind),
        **told,
        **made.facts,
    }


def _check_kernels(layers: dict[str, LayerFacts]) -> None:
    """Raise for convolutions of which PEFT would have to know more than the folders tell."""
    unknown = [at for at, facts in layers.items() if facts.kind == "conv" and facts.kernel is None]
    if unknown:
        raise OptionError(
            f"PEFT's format needs the kernels of convolutions, and no folder tells that of {unknown[0]!r}; take "
            "format='orthokit', load the result into the model and write it from there with save_peft."
        )


def _write(model: nn.Module, target: Path, name: str, format: str, opened: Sequence[AdapterFolder]) -> None:
    """The folder, made in a hidden one beside it and renamed when it is whole."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as cause:
        raise CheckpointError(f"{target} cannot be written: {cause}.") from cause
    try:
        # Inside, since the hidden folder itself is closed to others.
        making = hidden / target.name
        if format == "orthokit":
            save(model, making, name=name)
        else:
            save_peft(model, making, name=name)
            _sign(making / CONFIG, model, opened)
        if os.path.lexists(target):
            raise CheckpointError(f"{target} exists by now; choose another name, or remove it first.")
        making.rename(target)
    except OSError as cause:
        raise CheckpointError(f"{target} cannot be written: {cause}.") from cause
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _sign(file: Path, model: nn.Module, opened: Sequence[AdapterFolder]) -> None:
    """Say in PEFT's config what only the folders know: the model and its task. Layers are named by an expression.

    The modules here are not all of the model: the end of another one's name may be the name of a layer.
    """
    values = read_json(file)
    for key in ("base_model_name_or_path", "task_type"):
        told = {json.dumps(folder.config.get(key)) for folder in opened}
        if len(told) == 1:
            values[key] = json.loads(told.pop())
    paths = [at.removesuffix(".base") for at, _ in model.named_modules() if at.endswith(".base")]
    values["target_modules"] = "|".join(re.escape(at) for at in sorted(paths))
    file.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
