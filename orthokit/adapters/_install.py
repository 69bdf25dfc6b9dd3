"""Adapters from a file into a model: everything is checked before anything changes, or it is taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.adapters.attach import adapted_layers, attach, detach
from orthokit.adapters.base import PartConfig
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.sites import Site, kind_of
from orthokit.adapters.targets import candidates
from orthokit.errors import CheckpointError, OptionError, ParameterError

__all__ = ["Entry", "Plan", "check_finite", "check_present", "install", "sharded", "sites_of"]

# They say how training begins or goes, not what the layer computes.
_OF_TRAINING = {"seed", "dropout", "init_std"}


@dataclass(frozen=True)
class Entry:
    """One adapter of one layer, as read.

    Args:
        config: Options.
        tensors: Its state, by name.
        strength: How far it is on its path.
        rest: What is to be kept as attaching makes it: states that ``tensors`` need not name.
    """

    config: PartConfig
    tensors: Mapping[str, Tensor]
    strength: float = 1.0
    rest: frozenset[str] = field(default=frozenset())


Plan = Mapping[str, Mapping[str, Entry]]
"""By adapter, then by layer."""


def check_finite(plan: Plan, *, source: str) -> None:
    """Raise for numbers that are none."""
    broken = [
        f"{path or 'the layer'}: {leaf}"
        for entries in plan.values()
        for path, entry in entries.items()
        for leaf, tensor in entry.tensors.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if broken:
        raise CheckpointError(f"{source} holds NaN or infinite entries: {_few(broken)}. The adapter is of no use.")


def sites_of(model: nn.Module) -> dict[str, Site]:
    """The layers of a model that an adapter can sit on, by name."""
    found = {}
    for path, layer in candidates(model):
        if isinstance(layer, AdaptedLayer):
            found[path] = layer.site
        elif (kind := kind_of(layer)) is not None:
            found[path] = kind.site(layer, path)
    return found


def check_present(model: nn.Module, wanted: Sequence[str], source: str) -> dict[str, Site]:
    """:func:`sites_of` the model; raises unless the wanted layers are among them.

    Args:
        model: The model.
        wanted: Names of layers.
        source: Where they are from, for messages.
    """
    sites = sites_of(model)
    if absent := [path for path in wanted if path not in sites]:
        modules = dict(model.named_modules())
        here = [f"{path!r} is a {type(modules[path]).__name__}" for path in absent if path in modules]
        shown = f" There no adapter can sit: {_few(here)}." if here else ""
        raise CheckpointError(
            f"{source} is for another model: {len(absent)} of its {len(wanted)} layers are not there (such as "
            f"{_few([repr(path) for path in absent])}). The model has {_few([repr(path) for path in sites]) or 'none'}."
            f"{shown} Nothing was loaded."
        )
    return sites


def install(
    model: nn.Module,
    plan: Plan,
    *,
    source: str,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    order: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Attach the adapters of a plan where they are not yet, and copy their numbers.

    Args:
        model: The model.
        plan: What to put in.
        source: Where it is from, for messages.
        layers: What the layers were; default ``None``: not known beyond the tensors.
        order: The adapters of the plan that act, by layer and in order; default ``None``: all.

    Raises:
        OptionError: A name is none that an adapter can have.
        CheckpointError: The plan is for another model. Nothing was changed.
        ParameterError: A layer cannot be adapted.
    """
    _check_layers(model, plan, layers or {}, source)
    there = {name: _attached(model, name, entries, source) for name, entries in plan.items()}
    done: list[str] = []
    root = model
    try:
        for name, entries in plan.items():
            if not there[name]:
                root = _attach_all(root, name, entries, done)
        problems = _misfits(root, plan)
        if problems:
            raise CheckpointError(f"{source} does not fit the model: {_few(problems)}. Nothing was loaded.")
    except Exception as cause:
        for name in reversed(done):
            root = detach(root, name)
        if isinstance(cause, OptionError) and all(map(_fit_name, plan)):
            raise CheckpointError(f"{source} does not fit the model: {cause} Nothing was loaded.") from cause
        raise
    _copy(root, plan)
    fresh = {name for name in plan if not there[name]}
    for path, layer in adapted_layers(root).items():
        if isinstance(layer, AdaptedLayer) and order is not None and path in order:
            before = [name for name in layer.active if name not in fresh]
            layer.active = (*before, *(name for name in order[path] if name in fresh))
    return root


def _fit_name(name: str) -> bool:
    """Whether an adapter can have this name: if so, it is the options that do not suit the layers."""
    return name.replace("_", "").replace("-", "").isalnum() and not hasattr(nn.ModuleDict, name) and name != "training"


def _attach_all(model: nn.Module, name: str, entries: Mapping[str, Entry], done: list[str]) -> nn.Module:
    groups: dict[PartConfig, set[str]] = {}
    for path, entry in entries.items():
        groups.setdefault(entry.config, set()).add(path)
    for config, paths in groups.items():
        model = attach(model, config, targets=lambda path, paths=paths: path in paths, name=name)
        if name not in done:
            done.append(name)
    return model


def _check_layers(model: nn.Module, plan: Plan, facts: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Raise unless the layers of the plan are in the model, with the sizes that they had."""
    wanted = list(dict.fromkeys(path for entries in plan.values() for path in entries))
    sites = check_present(model, wanted, source)
    other = []
    for path in wanted:
        if path in facts:
            now = _of_site(sites[path])
            # Rotations that were merged without their model are for any number of outputs, which they give as 0.
            rows, columns = facts[path]["shape"]
            old, now = _facts({**facts[path], "shape": (rows or now["shape"][0], columns)}), _facts(now)
            if old != now:
                other.append(f"{path!r}: {now} in the model, {old} in the file")
    if other:
        raise CheckpointError(
            f"{source} is for another model: {len(other)} of its {len(wanted)} layers differ ({_few(other)}). Nothing "
            "was loaded."
        )


def _of_site(site: Site) -> dict[str, Any]:
    shape = (site.out_features, site.in_features)
    return {"kind": site.kind, "shape": shape, "groups": site.groups, "patch": site.patch}


def _facts(layer: Mapping[str, Any]) -> str:
    # A quantised layer and a transposed one are linear: what was trained on one works on the other.
    family = layer["kind"] if layer["kind"] in ("conv", "embedding") else "linear"
    text = f"{family} {tuple(layer['shape'])}"
    return text if family != "conv" else f"{text} with {layer['groups']} groups and {layer['patch']} places"


def _attached(model: nn.Module, name: str, entries: Mapping[str, Entry], source: str) -> bool:
    """Whether the model has this adapter already, on the same layers and with the same options."""
    having = {
        path: layer
        for path, layer in adapted_layers(model, missing_ok=True).items()
        if isinstance(layer, AdaptedLayer) and name in layer.adapters
    }
    if not having:
        return False
    if having.keys() != entries.keys():
        differ = sorted(having.keys() ^ entries.keys())
        raise CheckpointError(
            f"the model has an adapter {name!r} on other layers than {source}: they differ in {_few(differ)}. Give "
            "another name, or take it off with detach."
        )
    for path, layer in having.items():
        if layer.folded:
            raise ParameterError(f"{path!r} has {layer.folded} merged in; call unmerge first.")
        own, read = layer.adapters[name].config, entries[path].config
        if differing := _differing(own, read):  # type: ignore[arg-type]
            raise CheckpointError(
                f"the adapter {name!r} of {path!r} has other options than {source}: {differing}. Give another name, or "
                "take it off with detach."
            )
    return True


def _differing(own: PartConfig, read: PartConfig) -> str:
    if type(own) is not type(read):
        return f"it is {own.kind}, and {read.kind} in the file"
    fields = [one.name for one in dataclasses.fields(own) if one.name not in _OF_TRAINING]  # type: ignore[arg-type]
    pairs = [(one, getattr(own, one), getattr(read, one)) for one in fields]
    return ", ".join(f"{one} {mine!r} and {theirs!r} in the file" for one, mine, theirs in pairs if mine != theirs)


def _parts(model: nn.Module, plan: Plan) -> list[tuple[str, Any, Entry]]:
    layers = adapted_layers(model)
    return [
        (path, layers[path].adapters[name], entry)  # type: ignore[union-attr,index]
        for name, entries in plan.items()
        for path, entry in entries.items()
    ]


def _misfits(model: nn.Module, plan: Plan) -> list[str]:
    problems = []
    for path, part, entry in _parts(model, plan):
        own = part.state_dict()
        for leaf in sorted((own.keys() | entry.tensors.keys()) - entry.rest):
            if leaf not in own or leaf not in entry.tensors:
                where = "the model" if leaf not in own else "the file"
                problems.append(f"{path!r} has no {leaf} in {where}")
            elif own[leaf].shape != entry.tensors[leaf].shape:
                shapes = f"{tuple(own[leaf].shape)} in the model, {tuple(entry.tensors[leaf].shape)} in the file"
                problems.append(f"{path!r}: {leaf} is {shapes}")
    return problems


@torch.no_grad()
def _copy(model: nn.Module, plan: Plan) -> None:
    for _, part, entry in _parts(model, plan):
        own = part.state_dict()
        for leaf, tensor in entry.tensors.items():
            own[leaf].copy_(_laid_out(tensor, own[leaf]))
        part.strength = entry.strength


def sharded(tensor: Tensor) -> bool:
    """Whether processes hold parts of it (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def _laid_out(tensor: Tensor, own: Any) -> Tensor:
    """A tensor in parts as ``own`` is."""
    if not sharded(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device, own.dtype), own.device_mesh, own.placements)


def _few(found: Sequence[str]) -> str:
    shown = ", ".join(found[:3])
    return f"{shown} and {len(found) - 3} more" if len(found) > 3 else shown
