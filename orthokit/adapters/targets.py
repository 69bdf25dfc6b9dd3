"""Which layers of a model an adapter goes on, and why not on the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from orthokit.adapters.base import AdapterConfig, AdapterLayer, PartConfig
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.sites import kind_of
from orthokit.errors import NothingMatchedWarning, OptionError, ParameterError
from orthokit.matrices import LeftOut, matrices

__all__ = [
    "Targets",
    "candidates",
    "check_layers",
    "chosen_layers",
    "forget_trained",
    "keep_trained",
    "shared_weights",
    "trained_beside",
    "trained_modules",
    "why_not",
    "within",
]

Targets = str | Callable[[str], bool] | Sequence[str]
_KINDS = {
    "linear": ("linear", "conv1d_transposed"),
    "conv": ("conv",),
    "embedding": ("embedding",),
    "all": ("linear", "conv1d_transposed", "conv", "embedding"),
}
_TRAINED = "_trained_beside_adapters"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that an adapter could sit on or sits on, by name and once; not what is inside an adapted layer."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, AdapterLayer | nn.Linear) or kind_of(module) is not None:
            inside.update(id(part) for part in module.modules())
            yield name, module


def trained_modules(model: nn.Module, patterns: str | Sequence[str]) -> list[str]:
    """The outermost modules whose names match one of the patterns.

    Raises:
        ParameterError: A pattern matches none, or one that is frozen or has no weights.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ParameterError(f"train: {pattern!r} matches no module; there are {_some(names)}.")
        found += [name for name in matched if not within(name, found)]
    for name in found:
        parameters = list(model.get_submodule(name).parameters())
        if not parameters or not all(p.requires_grad for p in parameters):
            why = "is frozen, in part at least" if parameters else "has no weights"
            raise ParameterError(f"train: {name!r} {why}, so it cannot be trained; leave it out or unfreeze it first.")
    return found


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a name is one of the modules, or of what is inside them."""
    return any(name == one or name.startswith(f"{one}.") for one in modules)


def trained_beside(model: nn.Module) -> list[str]:
    """The modules that are trained as they are beside the adapters."""
    return list(model.__dict__.get(_TRAINED, ()))


def keep_trained(model: nn.Module, modules: Sequence[str]) -> nn.Module:
    """Remember, on the model, modules that are trained beside its adapters."""
    if modules:
        model.__dict__[_TRAINED] = sorted({*trained_beside(model), *modules})
    return model


def forget_trained(model: nn.Module) -> None:
    """Undo :func:`keep_trained`, when the last adapter is gone."""
    model.__dict__.pop(_TRAINED, None)


def chosen_layers(
    model: nn.Module, targets: Targets, config: AdapterConfig, *, without: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The layers to adapt by name, each once.

    Args:
        model: Any module.
        targets: A kind, patterns of names, or a function of the name.
        config: The adapter.
        without: Modules that are left out, with all that is inside them.

    Raises:
        ParameterError: Nothing matches.
        OptionError: ``targets`` has another form.
    """
    layers = {name: layer for name, layer in candidates(model) if not within(name, without)}
    if isinstance(targets, str) and targets in _KINDS:
        return _of_kind(model, layers, targets, config)
    if callable(targets):
        found = {name: layer for name, layer in layers.items() if targets(name)}
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        if not patterns or not all(isinstance(one, str) for one in patterns):
            kinds = ", ".join(map(repr, _KINDS))
            raise OptionError(f"targets is one of {kinds}, patterns of module names or a function; got {targets!r}.")
        for one in patterns:
            if not any(fnmatchcase(name, one) for name in layers):
                raise ParameterError(f"targets: {one!r} matches no layer to adapt; there are {_some(list(layers))}.")
        found = {name: layer for name, layer in layers.items() if any(fnmatchcase(name, one) for one in patterns)}
    if not found:
        raise ParameterError(
            f"targets match no layer to adapt of {type(model).__name__}; there are {_some(list(layers))}."
        )
    return found


def _of_kind(model: nn.Module, layers: dict[str, nn.Module], kind: str, config: AdapterConfig) -> dict[str, nn.Module]:
    reasons = why_not(model)
    of_kind = {name: layer for name, layer in layers.items() if _kind_name(layer) in _KINDS[kind]}
    refused = {name: reasons.get(name) or unfit(layer, config) for name, layer in of_kind.items()}
    found = {name: layer for name, layer in of_kind.items() if not refused[name]}
    if not found:
        listed = "; ".join(f"{name!r}: {why}" for name, why in refused.items()) or "it has none"
        raise ParameterError(f"{type(model).__name__} has no {kind} layer to adapt; {listed}.")
    return found


def _kind_name(layer: nn.Module) -> str:
    if isinstance(layer, AdaptedLayer):
        return "linear" if layer.site.kind.startswith("quantized") else layer.site.kind
    kind = kind_of(layer)
    if kind is None:
        return "linear"  # another class of linear layer, or one adapted in its own way: listed, and refused in words
    return "linear" if kind.name.startswith("quantized") else kind.name


def unfit(layer: nn.Module, config: AdapterConfig | None) -> str | None:
    """Why a layer cannot have this adapter (or any, without ``config``); ``None`` if it can."""
    if isinstance(config, PartConfig):
        if isinstance(layer, AdaptedLayer) or kind_of(layer) is not None:
            return None
    elif type(layer) is nn.Linear:
        return None
    if isinstance(layer, AdapterLayer):
        return f"it is adapted by {layer.describe()['adapter']} already, and POET shares a layer with no other"
    # Its owner may read its weight instead of calling it.
    return f"it is a {type(layer).__name__}, not a plain nn.Linear"


def check_layers(model: nn.Module, chosen: dict[str, nn.Module], config: AdapterConfig) -> None:
    """Raise for layers that cannot be replaced without a change that nobody asked for."""
    shared = shared_weights(model)
    for name, layer in chosen.items():
        if why := unfit(layer, config):
            raise ParameterError(f"{name!r} cannot be adapted: {why}. Leave it out of targets.")
        if name in shared and not isinstance(config, PartConfig):
            leaf, others = shared[name]
            raise ParameterError(
                f"{name!r} shares its {leaf} ({others}); adapting it would untie them. Untie them first, or leave it "
                "out of targets."
            )
        if not isinstance(layer, AdapterLayer) and any(getattr(layer, hooks, None) for hooks in _HOOKS):
            raise ParameterError(f"{name!r} carries hooks, which would be lost; remove them and add them afterwards.")


def shared_weights(model: nn.Module) -> dict[str, tuple[str, str]]:
    """Layers that share a parameter with another place of the model: which one, and ``"a.weight = b.weight"``."""
    owners: dict[int, list[str]] = {}
    plain = {name: getattr(layer, "base", layer) for name, layer in candidates(model)}
    inside = {id(module): name for name, module in plain.items()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        seen.add(id(module))
        # A layer that is adapted is called by its own name, not by that of what stands inside.
        name = inside.get(id(module), path)
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{leaf}".lstrip("."))
    found = {}
    for name, layer in plain.items():
        for leaf, parameter in layer._parameters.items():
            places = owners.get(id(parameter), []) if parameter is not None else []
            if len(places) > 1:
                found[name] = (leaf, " = ".join(places))
    return found


def why_not(model: nn.Module) -> dict[str, str]:
    """Why layers are no matrices, for those that are none, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingMatchedWarning)
        rows: dict[str, Any] = {row.name: row.reason for row in matrices(model).rows if isinstance(row, LeftOut)}
    found = {}
    for name, layer in candidates(model):
        inner = ".base" if isinstance(layer, AdaptedLayer) else ""
        reason = rows.get(f"{name}{inner}.weight".lstrip("."))
        plain = getattr(layer, "base", layer)
        # A table of embeddings is no matrix to an optimizer, but has rows to turn; a quantised weight is one of bytes.
        kept = isinstance(plain, nn.Embedding) or getattr(kind_of(plain), "name", "").startswith("quantized")
        if reason is not None and not kept:
            found[name] = reason
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"
