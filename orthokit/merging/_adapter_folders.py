"""Folders with adapters, read without the model that they were trained on, and layers that stand for its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.adapters._install import Entry
from orthokit.adapters.base import Adapter
from orthokit.adapters.boft import BOFT
from orthokit.adapters.files import MANIFEST, read
from orthokit.adapters.lora import LoRA, LoRAAdapter
from orthokit.adapters.peft_read import CONFIG, PeftFile, entry_of, read_peft
from orthokit.adapters.sites import Site
from orthokit.errors import CheckpointError, OptionError, ParameterError, ShapeError

__all__ = ["AdapterFolder", "LayerFacts", "common_layers", "open_folder", "part_of", "site_of", "skeleton"]

# Starts of LoRA that are functions of the frozen weight, which is not there.
_OF_THE_WEIGHT = ("pissa", "olora")
_STARTS = ("down_start", "up_start")


@dataclass(frozen=True)
class LayerFacts:
    """What a folder tells about a layer.

    Args:
        kind: ``"linear"``, ``"conv1d_transposed"``, ``"conv"`` or ``"embedding"``.
        out_features: Rows of the weight as a matrix; 0: not known, since a rotation of inputs goes with any.
        in_features: Columns: inputs or channels.
        groups: Of a convolution.
        patch: Entries of its kernel.
        kernel: Its sides; ``None``: not known.
        sure: Whether these are the layer's own. Otherwise ``in_features`` is the width of the rotation, which of a
            convolution may be that of its patches, and ``"linear"`` may be one.
    """

    kind: str
    out_features: int
    in_features: int
    groups: int = 1
    patch: int = 1
    kernel: tuple[int, ...] | None = None
    sure: bool = True

    def __str__(self) -> str:
        """In words."""
        rows = self.out_features or "any"
        text = f"{self.family} ({rows}, {self.in_features})"
        return text if self.kind != "conv" else f"{text} with {self.groups} groups and {self.patch} places"

    @property
    def family(self) -> str:
        """The kind; a transposed layer is linear: what was trained on one works on the other."""
        return self.kind if self.kind in ("conv", "embedding") else "linear"

    def agrees(self, other: LayerFacts) -> bool:
        """Whether both can be of one layer, as far as they tell; shapes of adapters tell the rest."""
        if self.out_features and other.out_features and self.out_features != other.out_features:
            return False
        if self.sure == other.sure:
            return (self.family, self.in_features, self.groups, self.patch) == (
                other.family,
                other.in_features,
                other.groups,
                other.patch,
            )
        known, guess = (self, other) if self.sure else (other, self)
        return known.family == guess.family or (known.family, guess.family) == ("conv", "linear")

    def with_facts_of(self, other: LayerFacts) -> LayerFacts:
        """What both tell."""
        known, more = (other, self) if other.sure and not self.sure else (self, other)
        kernel = known.kernel if known.kernel is not None or not more.sure else more.kernel
        return replace(known, out_features=known.out_features or more.out_features, kernel=kernel)


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with one adapter.

    Args:
        path: The folder.
        layers: Its layers, as far as it tells.
        entry: The adapter of a layer, given what the layer is.
        config: ``adapter_config.json``, of one that PEFT wrote.
    """

    path: Path
    layers: Mapping[str, LayerFacts]
    entry: Callable[[str, Site], Entry]
    config: Mapping[str, Any] = field(default_factory=dict)


def open_folder(path: str | os.PathLike[str]) -> AdapterFolder:
    """A folder that ``orthokit.adapters.save`` or PEFT wrote.

    Raises:
        CheckpointError: It holds neither, is damaged, or holds more than an adapter.
    """
    place = Path(path)
    if (place / CONFIG).is_file() and not (place / MANIFEST).is_file():
        return _peft(place)
    if not (place / MANIFEST).is_file():
        there = ", ".join(sorted(one.name for one in place.iterdir())[:4]) if place.is_dir() else None
        found = "there is no such folder" if there is None else f"it holds {there or 'nothing'}"
        raise CheckpointError(f"{place} must have {MANIFEST} (orthokit) or {CONFIG} (PEFT); {found}.")
    stored = read(place)
    if len(stored.plan) > 1:
        raise CheckpointError(
            f"{place} must hold one adapter; it has {sorted(stored.plan)}. Write them one by one, with save(name=...)."
        )
    if stored.beside:
        raise CheckpointError(_whole(place, list(stored.beside)))
    ((_, entries),) = stored.plan.items()
    layers = {}
    for layer in entries:
        facts = stored.layers[layer]
        kind = "linear" if str(facts["kind"]).startswith("quantized") else str(facts["kind"])
        (rows, columns), sure = facts["shape"], facts["shape"][0] > 0
        layers[layer] = LayerFacts(kind, rows, columns, int(facts["groups"]), int(facts["patch"]), None, sure)
    return AdapterFolder(place, layers, lambda layer, site: entries[layer])


def _peft(place: Path) -> AdapterFolder:
    file = read_peft(place)
    if file.others:
        raise CheckpointError(_whole(place, list(file.others)))
    if (start := file.config.get("init_lora_weights")) in _OF_THE_WEIGHT:
        raise CheckpointError(
            f"{place} began with {start!r}, so that what it changes depends on the weights of the model. Load it into "
            "the model with load_peft and save it from there with save_peft, which makes a plain LoRA of it."
        )
    try:
        layers = {layer: _peft_facts(file, tensors) for layer, tensors in file.layers.items()}
    except (KeyError, IndexError, TypeError, ValueError) as cause:
        raise CheckpointError(f"{place} cannot be read: {type(cause).__name__}: {cause}.") from cause

    def entry(layer: str, site: Site) -> Entry:
        found = entry_of(file, layer, site)
        # PEFT's BOFT always has factors on outputs; where they are all 1 there are none.
        if isinstance(found.config, BOFT) and bool((found.tensors["scale"] == 1).all()):
            rotation = {"generator": found.tensors["generator"]}
            return Entry(replace(found.config, scale_outputs=False), rotation, found.strength)
        return found

    return AdapterFolder(place, layers, entry, file.config)


def _whole(place: Path, names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{place} must hold an adapter alone; it has weights of the model besides ({shown}), which were trained beside "
        "it. Merge the adapters into their models and these with merge_checkpoints."
    )


def _peft_facts(file: PeftFile, tensors: Mapping[str, Tensor]) -> LayerFacts:
    if file.type == "LORA" and "lora_embedding_A" in tensors:
        return LayerFacts("embedding", tensors["lora_embedding_A"].shape[1], tensors["lora_embedding_B"].shape[0])
    if file.type == "LORA":
        A, B = tensors["lora_A"], tensors["lora_B"]
        if A.ndim > 2:
            kernel = tuple(A.shape[2:])
            return LayerFacts("conv", B.shape[0], A.shape[1], patch=math.prod(kernel), kernel=kernel)
        return LayerFacts("conv1d_transposed" if file.config.get("fan_in_fan_out") else "linear", len(B), A.shape[1])
    if file.type == "HRA":
        return LayerFacts("linear", 0, tensors["hra_u"].shape[0], sure=False)
    if file.type == "BOFT":
        R, scale = tensors["boft_R"], tensors["boft_s"]
        conv = scale.ndim == 2 and scale.shape[0] == 1 and scale.numel() > 1
        shape = (scale.numel(), R.shape[1] * R.shape[-1])
        return LayerFacts("conv" if conv else "linear", *shape, kernel=(1, 1) if conv else None, sure=False)
    dense, embedding = "oft_r" in tensors, "oft_embedding_R" in tensors
    v = tensors["oft_r" if dense else "oft_embedding_R" if embedding else "oft_R"]
    b = v.shape[-1] if dense else (1 + math.isqrt(1 + 8 * v.shape[-1])) // 2
    blocks = int(file.config.get("r") or 0) if file.config.get("block_share") else len(v)
    if not blocks:
        raise CheckpointError(
            f"{file.folder} shares one block among all of a layer and does not say how many there are. Load it into "
            "its model with load_peft, and save it from there with orthokit.adapters.save."
        )
    rows = tensors["oft_s"].numel() if dense else 0
    return LayerFacts("embedding" if embedding else "linear", rows, blocks * b, sure=False)


def common_layers(folders: Sequence[AdapterFolder]) -> dict[str, LayerFacts]:
    """The layers of folders that all have the same ones.

    Raises:
        ParameterError: Some have layers that others lack.
        ShapeError: A layer is of one size in one folder and of another in the next.
    """
    first = folders[0]
    layers = dict(first.layers)
    for folder in folders[1:]:
        lacking, more = (
            [at for at in layers if at not in folder.layers],
            [at for at in folder.layers if at not in layers],
        )
        if lacking or more:
            said = [f"lacks {_few(lacking)}"] * bool(lacking) + [f"has {_few(more)} besides"] * bool(more)
            raise ParameterError(
                f"all folders must adapt the same layers; {folder.path} {' and '.join(said)}, against {first.path}."
            )
        if other := [at for at in layers if not layers[at].agrees(folder.layers[at])]:
            at = other[0]
            raise ShapeError(
                f"all folders must be for one model; {at!r} is {layers[at]} in {first.path} and {folder.layers[at]} in "
                f"{folder.path}, and so {len(other)} of {len(layers)} layers differ."
            )
        layers = {at: facts.with_facts_of(folder.layers[at]) for at, facts in layers.items()}
    return layers


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def site_of(at: str, facts: LayerFacts, dtype: torch.dtype = torch.float32) -> Site:
    """A layer as adapters know it, on the CPU."""
    sizes = (facts.in_features, facts.out_features, facts.groups, facts.patch)
    return Site(at, facts.kind, *sizes, dtype=dtype, device=torch.device("cpu"))


def part_of(entry: Entry, site: Site, source: Path) -> Adapter:
    """An adapter of a layer that is not there.

    Args:
        entry: As read.
        site: The layer.
        source: The folder, for messages.

    Raises:
        CheckpointError: Numbers and options do not fit the layer.
        OptionError: The adapter is a function of the weight.
    """

    def weight() -> Tensor:
        raise OptionError(
            f"{entry.config.kind} ({site.name!r} in {source}) depends on the weights of the model, so it cannot be "
            "merged without them; merge the whole models."
        )

    config, tensors = entry.config, dict(entry.tensors)
    starts = {leaf: tensors.pop(leaf) for leaf in _STARTS if leaf in tensors}
    if type(config) is LoRA and starts:
        # Where it began is in the folder: it need not be found in the weight again.
        config = replace(config, init="kaiming")
    if config.kind == "dora":
        weight()
    try:
        part = config.part(site, weight, stream=0)
    except OptionError as cause:
        raise CheckpointError(f"{source} does not fit its own layers: {cause}") from cause
    own = part.state_dict()
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in tensors.items()}
    wanted = {leaf: tuple(tensor.shape) for leaf, tensor in own.items()}
    if shapes != wanted:
        raise CheckpointError(f"{source}: {site.name!r} must have the tensors {wanted}; it has {shapes}.")
    with torch.no_grad():
        for leaf, tensor in tensors.items():
            own[leaf].copy_(tensor)
    if isinstance(part, LoRAAdapter):
        for leaf, tensor in starts.items():
            setattr(part, leaf, tensor.to(site.dtype))
    part.strength = entry.strength
    return part


def skeleton(layers: Mapping[str, LayerFacts], dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """Modules with these layers, whose weights are one zero each: adapters are put in and written as from a model.

    Args:
        layers: By name; the name ``""`` is that of a bare layer.
        dtypes: Of the weights.
    """
    made = {at: _layer(facts, dtypes[at]) for at, facts in layers.items()}
    if "" in made:
        return made[""]
    root = nn.Module()
    for at, layer in sorted(made.items(), key=lambda item: item[0].count(".")):
        place: nn.Module = root
        *way, last = at.split(".")
        for step in way:
            if step not in place._modules:
                setattr(place, step, nn.Module())
            place = getattr(place, step)
        setattr(place, last, layer)
    return root


class Conv1D(nn.Module):
    """Stands for GPT-2's, which is known by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 0


def _layer(facts: LayerFacts, dtype: torch.dtype) -> nn.Module:
    """The layer with one zero for a weight, seen in all its entries."""
    rows, columns, meta = facts.out_features, facts.in_features, {"device": "meta", "dtype": dtype}
    shape: tuple[int, ...] = (rows, columns)
    layer: Any
    if facts.kind == "conv":
        kernel = facts.kernel or (facts.patch,)
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1](1, 1, 1, bias=False, **meta)
        layer.out_channels, layer.in_channels, layer.groups, layer.kernel_size = rows, columns, facts.groups, kernel
        shape = (rows, columns // facts.groups, *kernel)
    elif facts.kind == "embedding":
        layer = nn.Embedding(1, 1, **meta)
        layer.num_embeddings, layer.embedding_dim = rows, columns
    elif facts.kind == "conv1d_transposed":
        layer, shape = Conv1D(), (columns, rows)
        layer.nf = rows
    else:
        layer = nn.Linear(1, 1, bias=False, **meta)
        layer.out_features, layer.in_features = rows, columns
    layer.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
    return layer
