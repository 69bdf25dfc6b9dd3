"""Adapters in files: the numbers in safetensors, all else in JSON beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.adapters._install import Entry, Plan, check_finite, install, sharded
from orthokit.adapters.base import PartConfig
from orthokit.adapters.stack import stacked_layers
from orthokit.adapters.targets import keep_trained, trained_beside
from orthokit.errors import CheckpointError, OptionError, ParameterError, unknown_name

__all__ = ["Stored", "load", "read", "read_json", "read_tensors", "save", "write_pair"]

# 2: generators follow the block size by another power, and modules that were trained beside are there.
FORMAT, VERSION = "orthokit adapters", 2
TENSORS, MANIFEST = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Args:
        plan: By adapter, then by layer.
        layers: By layer, what it was: ``kind``, ``shape``, ``groups``, ``patch``, and ``active``, the names of the
            adapters that acted, in order.
        writer: The program that wrote it, with its version.
        beside: By module, the state of what was trained as it is beside the adapters.
    """

    plan: Plan
    layers: Mapping[str, Mapping[str, Any]]
    writer: str
    beside: Mapping[str, Mapping[str, Tensor]]


def save(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
    """Write the adapters of a model into a folder: their numbers, their options and the layers that they belong to.

    Args:
        model: A model with adapters; not changed. Of the weights of the model itself only those of modules that
            ``attach`` was told to train beside are written. Of a model that FSDP2 has divided, all processes call this
            and the first one writes.
        folder: Made if it is not there. A pair of files that it held before is replaced.
        name: One adapter; default ``None``: all.

    Returns:
        The folder.

    Raises:
        ParameterError: There is no such adapter, one holds NaN or an infinity, or the model is rewound on the dense
            path, which is no state of an adapter. Nothing was written.

    Example:
        >>> import tempfile
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 4)), OFT(4, init_std=0.1))
        >>> fresh = nn.Sequential(nn.Linear(8, 4))
        >>> _ = fresh.load_state_dict(dict(zip(fresh.state_dict(), model[0].base.state_dict().values())))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = load(fresh, save(model, folder))
        >>> torch.equal(fresh(torch.ones(1, 8)), model(torch.ones(1, 8)))
        True

    Numerics:
        Exact: tensors are written in the type that they have. Each file is written beside its place and renamed, and
        the JSON file names the digest of the other, so that halves of two writings are noticed.
    """
    layers = stacked_layers(model, name)
    configs: list[PartConfig] = []
    tensors: dict[str, Tensor] = {}
    listed: dict[str, dict[str, Any]] = {}
    parted = False
    for path, layer in layers.items():
        if layer.blend != 1.0:
            raise ParameterError(
                f"{path or 'the layer'!r} is rewound on the dense path, which is no state of an adapter; call "
                "rewind(model, 1.0) first, or merge and save the model."
            )
        chosen = [one for one in layer.adapters if name in (None, one)]
        there = {}
        for one in chosen:
            part: Any = layer.adapters[one]
            if part.config not in configs:
                configs.append(part.config)
            there[one] = {"config": configs.index(part.config), "strength": part.strength}
            for leaf, tensor in part.state_dict().items():
                parted = parted or sharded(tensor)
                tensors[_key(path, one, leaf)] = tensor.full_tensor() if sharded(tensor) else tensor
        listed[path] = {
            **{field: getattr(layer.site, field) for field in ("kind", "groups", "patch")},
            "shape": [layer.out_features, layer.in_features],
            "adapters": there,
            "active": [one for one in layer.active if one in there],
        }
    beside = {module: sorted(model.get_submodule(module).state_dict()) for module in trained_beside(model)}
    for module in beside:
        for leaf, tensor in model.get_submodule(module).state_dict().items():
            parted = parted or sharded(tensor)
            tensors[_beside(module, leaf)] = tensor.full_tensor() if sharded(tensor) else tensor
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ParameterError(
            f"{_few(broken)} hold NaN or an infinity; nothing was written. Go back to an earlier state of the training."
        )
    manifest = {"format": FORMAT, "version": VERSION, "writer": _writer()}
    manifest |= {"configs": [described(config) for config in configs], "layers": listed}
    manifest |= {"beside": beside}
    if not parted or torch.distributed.get_rank() == 0:
        write_pair(Path(folder), TENSORS, tensors, MANIFEST, manifest, digest=True)
    if parted:
        torch.distributed.barrier()
    return Path(folder)


def load(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> nn.Module:
    """Read adapters from a folder into a model; those that it does not have yet are attached.

    Args:
        model: The model that they were trained on, adapted or not. A bare layer is not changed; its adapted layer is
            returned.
        folder: From :func:`save`.
        name: One of the adapters in the folder; default ``None``: all. If the folder has a single one, any name: the
            one that it gets here.

    Returns:
        ``model``. Adapters that are attached act in the order in which they acted when saved, after those that the
        model had before. The model is frozen as by ``attach``. Modules that were trained beside have their weights
        overwritten, which :func:`detach` does not undo, and are trained beside again.

    Raises:
        CheckpointError: The files are missing, damaged, of another version or of another model (which layers, which
            shapes), or the model has an adapter of this name with other options. Nothing was changed.
        ParameterError: Layers cannot be adapted, or adapters are merged with ``keep=True``.
        UnknownNameError: No adapter of this name.

    Numerics:
        Exact where the model computes in the precision it had; numbers are rounded to that of the model otherwise.
    """
    stored = read(folder)
    plan, renamed = dict(stored.plan), {}
    if name is not None:
        if len(plan) == 1:
            renamed = dict.fromkeys(plan, name)
            plan = dict(zip([name], plan.values(), strict=True))
        if name not in plan:
            raise unknown_name("adapter", name, plan)
        plan = {name: plan[name]}
    acting = {path: [renamed.get(one, one) for one in it["active"]] for path, it in stored.layers.items()}
    order = {path: [one for one in names if one in plan] for path, names in acting.items()}
    _check_beside(model, stored.beside, str(folder))
    model = install(model, plan, layers=stored.layers, order=order, source=str(folder))
    for module, state in stored.beside.items():
        place = model.get_submodule(module)
        place.load_state_dict(dict(state))
        place.requires_grad_(True)
    return keep_trained(model, list(stored.beside))


def _check_beside(model: nn.Module, beside: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Raise unless the modules that were trained beside the adapters are in the model, with the same shapes."""
    modules = dict(model.named_modules())
    for module, state in beside.items():
        own = {leaf: tuple(t.shape) for leaf, t in modules[module].state_dict().items()} if module in modules else {}
        read = {leaf: tuple(t.shape) for leaf, t in state.items()}
        if own != read:
            found = f"there {own}" if own else "there is no such module"
            raise CheckpointError(
                f"{source} has the weights of {module!r}, which was trained beside the adapters: {read}; in the model "
                f"{found}. Nothing was loaded."
            )


def read(folder: str | os.PathLike[str], *, finite: bool = True) -> Stored:
    """What :func:`save` wrote, checked.

    Args:
        folder: The folder.
        finite: Whether to refuse NaN and infinities.

    Raises:
        CheckpointError: The files are missing, damaged or of another version.
    """
    place = Path(folder)
    if not (place / MANIFEST).is_file() and (place / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{place} holds an adapter that PEFT wrote; read it with load_peft(model, {str(place)!r})."
        )
    manifest = read_json(place / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{place / MANIFEST} is no list of adapters: its format is {manifest.get('format')!r}.")
    if manifest.get("version") != VERSION:
        found = manifest.get("version")
        raise CheckpointError(
            f"{place} has version {found!r} of the format and this orthokit reads version {VERSION}; it was written by "
            f"{manifest.get('writer')}. Install that, or a later one."
        )
    tensors = read_tensors(place / TENSORS, digest=manifest.get("sha256"))
    try:
        configs = [_config(fields) for fields in manifest["configs"]]
        layers = {str(path): dict(layer) for path, layer in manifest["layers"].items()}
        plan: dict[str, dict[str, Entry]] = {}
        for path, layer in layers.items():
            layer["shape"], layer["active"] = tuple(map(int, layer["shape"])), [str(one) for one in layer["active"]]
            for one, facts in layer.pop("adapters").items():
                leaves = _leaves(tensors, path, one)
                entry = Entry(configs[facts["config"]], leaves, strength=float(facts["strength"]))
                plan.setdefault(one, {})[path] = entry
        beside = {
            str(module): {leaf: tensors.pop(_beside(module, leaf)) for leaf in leaves}
            for module, leaves in manifest["beside"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{place / MANIFEST} is damaged: {type(cause).__name__}: {cause}.") from cause
    if not plan or tensors:
        what = f"tensors of no adapter: {_few(list(tensors))}" if tensors else "no adapter"
        raise CheckpointError(f"{place} is damaged: it has {what}.")
    if finite:
        check_finite(plan, source=str(place))
    return Stored(plan, layers, str(manifest.get("writer")), beside)


def described(config: PartConfig) -> dict[str, Any]:
    """Options as JSON: ``kind`` and the fields."""
    fields: dict[str, Any] = {"kind": config.kind}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        fields[field.name] = described(value) if isinstance(value, PartConfig) else value
    return fields


def _config(fields: Mapping[str, Any]) -> PartConfig:
    """The inverse of :func:`described`."""
    values = {key: _config(value) if isinstance(value, Mapping) else value for key, value in fields.items()}
    kinds = {one.kind: one for one in _subclasses(PartConfig) if "kind" in one.__dict__}
    kind = values.pop("kind")
    if kind not in kinds:
        raise CheckpointError(f"the file has an adapter of kind {kind!r}; this orthokit knows {sorted(kinds)}.")
    known = {field.name for field in dataclasses.fields(kinds[kind])}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - known):
        raise CheckpointError(f"the file has options of {kind!r} that this orthokit does not know: {_few(unknown)}.")
    try:
        return kinds[kind](**values)
    except OptionError as cause:
        raise CheckpointError(f"the file has options that cannot be: {cause}") from cause


def _subclasses(cls: type) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def write_pair(
    folder: Path, tensors_name: str, tensors: Mapping[str, Tensor], json_name: str, values: Any, *, digest: bool = False
) -> Path:
    """Write tensors and JSON into a folder, each whole or not at all.

    Args:
        folder: Made if it is not there.
        tensors_name: Of the file of tensors.
        tensors: Copied to the CPU.
        json_name: Of the JSON file, renamed last.
        values: Mapping; ``sha256`` of the tensors is added where ``digest`` is set.
        digest: Say which tensors belong to it.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    # Copies: parameters that are views of one memory may not stand in one file.
    data = save({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, metadata={"format": "pt"})
    if digest:
        values = {**values, "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    pairs = [(folder / tensors_name, data), (folder / json_name, text.encode())]
    try:
        for path, content in pairs:
            with path.with_name(path.name + ".tmp").open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for path, _ in pairs:
            path.with_name(path.name + ".tmp").replace(path)
    finally:
        for path, _ in pairs:
            path.with_name(path.name + ".tmp").unlink(missing_ok=True)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: It is not there, or not JSON.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = sorted(one.name for one in path.parent.iterdir()) if path.parent.is_dir() else None
        found = f"it holds {_few(there) or 'nothing'}" if there is not None else "there is no such folder"
        raise CheckpointError(f"{path.parent} has no {path.name}; {found}.") from None
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}.") from cause
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(values).__name__}, not an object.")
    return values


def read_tensors(path: Path, *, digest: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        digest: SHA-256 that it has to have; default ``None``: any.

    Raises:
        CheckpointError: It is not there, cut off or changed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        tensors = load(data)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; copy it from where the adapter was saved.") from None
    except (OSError, SafetensorError, ValueError, KeyError) as cause:
        raise CheckpointError(f"{path} is no whole safetensors file: {cause}. Copy it again.") from cause
    # The reader gives them in any order; layers are listed as they are counted.
    tensors = dict(sorted(tensors.items(), key=lambda item: _counted(item[0])))
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{path} is not the file that the JSON beside it was written with; copy both again.")
    return tensors


def _counted(key: str) -> list[tuple[int, str]]:
    """A key to sort by, in which 2 stands before 10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", key)]


def _leaves(tensors: dict[str, Tensor], path: str, name: str) -> dict[str, Tensor]:
    """Take the tensors of one adapter of one layer out of ``tensors``."""
    start = _key(path, name, "")
    return {key.removeprefix(start): tensors.pop(key) for key in [key for key in tensors if key.startswith(start)]}


def _beside(module: str, leaf: str) -> str:
    return f"beside.{module}.{leaf}"


def _key(path: str, name: str, leaf: str) -> str:
    return f"{path}.adapters.{name}.{leaf}".lstrip(".")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _writer() -> str:
    import orthokit

    return f"orthokit {orthokit.__version__}"
