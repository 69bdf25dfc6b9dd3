"""Put adapters into a model, merge them into it, or take them off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from orthokit.adapters.base import AdapterConfig, AdapterLayer
from orthokit.errors import NothingMatchedWarning, OptionError, ParameterError
from orthokit.matrices import LeftOut, matrices

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["adapted_layers", "attach", "detach", "merge", "table"]

Targets = str | Callable[[str], bool] | Sequence[str]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def attach(
    model: nn.Module,
    config: AdapterConfig,
    *,
    targets: Targets = "linear",
    keep_base: bool = True,
    track_spectrum: bool = True,
) -> nn.Module:
    """Replace linear layers of ``model`` by adapted ones, in place.

    Args:
        model: Any module. A bare ``nn.Linear`` is not changed; its adapted layer is returned.
        config: The adapter and its options, such as ``POET(block_size=32)``.
        targets: ``"linear"`` (default): every ``nn.Linear`` that ``orthokit.matrices`` counts among the matrices, so
            not the output head. Or shell patterns of module names, such as ``"blocks.*.attn.?"``, or a function of the
            name: every ``nn.Linear`` they match, the head included.
        keep_base: Keep a copy of each weight, so that :func:`detach` can restore it; default ``True``. It costs as much
            memory as the weights.
        track_spectrum: Keep the initial singular values for ``spectrum_report``; default ``True``. One decomposition a
            layer.

    Returns:
        ``model``; :func:`table` says what was adapted, and why the rest was not.

    Raises:
        ParameterError: Nothing matched; a layer shares its weight with another, carries hooks, or is no plain
            ``nn.Linear``. Nothing was changed.
        OptionError: ``config`` is no adapter, or ``targets`` has the wrong form.
        DtypeError: A weight is not a real floating tensor.

    Example:
        >>> from orthokit.adapters import POET
        >>> model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16))
        >>> _ = attach(model, POET(block_size=4), targets="1")
        >>> [type(layer).__name__ for layer in model]
        ['Embedding', 'POETLinear', 'LayerNorm', 'Linear']
    """
    if not isinstance(config, AdapterConfig):
        raise OptionError(f"config must be an adapter such as POET(block_size=32); got {type(config).__name__}.")
    chosen = _chosen(model, targets)
    _check(model, chosen)
    options = {"keep_base": keep_base, "track_spectrum": track_spectrum}
    # All are made before the first is put in: an error leaves the model as it was.
    adapted = {
        linear: config.wrap(linear, name=name, stream=stream, **options).train(linear.training)
        for stream, (name, linear) in enumerate(chosen.items())
    }
    return _replace(model, adapted)


def merge(model: nn.Module) -> nn.Module:
    """Turn every adapted layer of ``model`` into the plain ``nn.Linear`` that computes the same, in place.

    Args:
        model: A model with adapters. A bare adapted layer is not changed; its plain layer is returned.

    Returns:
        ``model``. An optimizer made before still holds the adapters' parameters: make a new one.

    Raises:
        ParameterError: The model has no adapter.

    Example:
        >>> from orthokit.adapters import POET
        >>> model = attach(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), POET(block_size=4))
        >>> [type(layer).__name__ for layer in merge(model)]
        ['Linear', 'ReLU', 'Linear']
    """
    return _replace(model, {layer: layer.merged() for layer in adapted_layers(model).values()})


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off: the layers are again what they were before :func:`attach`, weights and biases alike.

    Args:
        model: A model with adapters, attached with ``keep_base=True``.

    Returns:
        ``model``.

    Raises:
        ParameterError: The model has no adapter, or a weight was not kept. Nothing was changed.

    Example:
        >>> import torch
        >>> from orthokit.adapters import POET
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> before = model[0].weight.clone()
        >>> torch.equal(detach(attach(model, POET(block_size=4, init="normalised")))[0].weight, before)
        True
    """
    return _replace(model, {layer: layer.original() for layer in adapted_layers(model).values()})


def adapted_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapted layers of ``model`` by name.

    Args:
        model: Any module.

    Returns:
        Name to layer, in the order of the model.

    Raises:
        ParameterError: There is none.
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdapterLayer)}
    if not found:
        raise ParameterError(f"{type(model).__name__} has no adapter; call adapters.attach(model, ...) first.")
    return found


def table(model: nn.Module) -> pd.DataFrame:
    """One row per linear layer: adapted or not, how, and why not.

    Args:
        model: Any module.

    Returns:
        Columns ``layer``, ``shape``, ``adapter`` (``"none"`` where there is none), ``trainable`` (numbers the adapter
        trains), ``weights`` (entries of the weight) and ``detail``.

    Example:
        >>> from orthokit.adapters import POET
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
        >>> table(attach(model, POET(block_size=4)))[["layer", "adapter", "trainable"]].values.tolist()
        [['0', 'POET', 24], ['2', 'POET', 19]]
    """
    import pandas as pd

    reasons = _reasons(model)
    rows = []
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLayer):
            rows.append({"layer": name, "shape": (layer.out_features, layer.in_features), **layer.describe()})
        elif isinstance(layer, nn.Linear):
            why = reasons.get(layer) or _unfit(layer) or "not among the targets"
            shape = (layer.out_features, layer.in_features)
            rows.append({"layer": name, "shape": shape, "adapter": "none", "trainable": 0, "detail": why})
    frame = pd.DataFrame(rows, columns=["layer", "shape", "adapter", "trainable", "detail"])
    frame.insert(4, "weights", [rows * columns for rows, columns in frame["shape"]])
    return frame


def _chosen(model: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """The layers to adapt by name, each once."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if isinstance(targets, str) and targets == "linear":
        reasons = _reasons(model)
        found = {n: layer for n, layer in linears.items() if not reasons.get(layer) and not _unfit(layer)}
        if not found:
            listed = "; ".join(f"{n!r}: {reasons.get(layer) or _unfit(layer)}" for n, layer in linears.items())
            raise ParameterError(f"{type(model).__name__} has no linear layer to adapt; {listed or 'it has none'}.")
        return found
    if callable(targets):
        found = {n: layer for n, layer in linears.items() if targets(n)}
    else:
        patterns = [targets] if isinstance(targets, str) else list(targets)
        if not patterns or not all(isinstance(one, str) for one in patterns):
            raise OptionError(f"targets is 'linear', patterns of module names or a function; got {targets!r}.")
        for one in patterns:
            if not any(fnmatchcase(n, one) for n in linears):
                raise ParameterError(f"targets: {one!r} matches no nn.Linear; there are {_some(list(linears))}.")
        found = {n: layer for n, layer in linears.items() if any(fnmatchcase(n, one) for one in patterns)}
    if not found:
        raise ParameterError(f"targets match no nn.Linear of {type(model).__name__}; there are {_some(list(linears))}.")
    return found


def _check(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    """Raise for layers that cannot be replaced without a change that nobody asked for."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{leaf}".lstrip("."))
    for name, linear in chosen.items():
        if why := _unfit(linear):
            raise ParameterError(f"{name!r} cannot be adapted: {why}. Leave it out of targets.")
        for leaf, parameter in linear._parameters.items():
            shared = owners.get(id(parameter), []) if parameter is not None else []
            if len(shared) > 1:
                raise ParameterError(
                    f"{name!r} shares its {leaf} ({' = '.join(shared)}); adapting it would untie them. Untie them "
                    "first, or leave it out of targets."
                )
        if any(getattr(linear, hooks, None) for hooks in _HOOKS):
            raise ParameterError(f"{name!r} carries hooks, which would be lost; remove them and add them afterwards.")


def _unfit(layer: nn.Linear) -> str | None:
    """Why a linear layer of another class is left alone: its owner may read its weight instead of calling it."""
    if type(layer) is nn.Linear:
        return None
    return f"it is a {type(layer).__name__}, not a plain nn.Linear"


def _reasons(model: nn.Module) -> dict[nn.Module, str]:
    """Why linear layers are no matrices, for those that are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingMatchedWarning)
        rows = {row.name: row.reason for row in matrices(model).rows if isinstance(row, LeftOut)}
    prefixed = ((layer, f"{name}.weight".lstrip(".")) for name, layer in model.named_modules())
    return {layer: rows[name] for layer, name in prefixed if isinstance(layer, nn.Linear) and name in rows}


def _replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> nn.Module:
    """Put layers in the places of others, wherever they are registered."""
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        # Not named_children(), which names a child once: a layer may stand in two places of one parent.
        for key, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, key, new[child])
    return model


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "none"
