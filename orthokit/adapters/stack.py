"""Several adapters in one model: which act and in which order, none for a while, and their numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orthokit.adapters.attach import adapted_layers
from orthokit.adapters.layer import AdaptedLayer
from orthokit.errors import CheckpointError, OptionError, ParameterError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "adapter_parameters",
    "adapter_report",
    "adapter_state_dict",
    "disabled",
    "load_adapter_state_dict",
    "set_adapters",
    "stacked_layers",
]


def stacked_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLayer]:
    """The layers that can have several adapters, all of them or those that have one of this name.

    Args:
        model: A model with adapters.
        name: Of an adapter; default ``None``: any.

    Returns:
        Name to layer, in the order of the model.

    Raises:
        ParameterError: There is none.
    """
    layers = {path: layer for path, layer in adapted_layers(model).items() if isinstance(layer, AdaptedLayer)}
    if not layers:
        raise ParameterError(f"{type(model).__name__} has no adapter but POET's, which stands alone in its layers.")
    found = {path: layer for path, layer in layers.items() if name is None or name in layer.adapters}
    if not found:
        there = sorted({one for layer in layers.values() for one in layer.adapters})
        raise ParameterError(f"no layer of {type(model).__name__} has an adapter {name!r}; there are {there}.")
    return found


def set_adapters(model: nn.Module, names: str | Sequence[str], *, train: Sequence[str] | None = None) -> nn.Module:
    """Choose the adapters that act, in the order that inputs pass them; the last is closest to the weight.

    Args:
        model: A model with adapters.
        names: One name or several, each at most once; the others rest. An empty sequence: none acts.
        train: The ones of ``names`` whose parameters take gradients; default ``None``: all of ``names``.

    Returns:
        ``model``. A layer takes those of ``names`` that it has.

    Raises:
        OptionError: A name stands twice, or one of ``train`` is not among ``names``.
        ParameterError: No layer has an adapter of some name, or adapters are merged with ``keep=True``. Nothing was
            changed.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(attach(nn.Sequential(nn.Linear(8, 8)), OFT(4), name="a"), OFT(2), name="b")
        >>> set_adapters(model, ["b", "a"], train=["b"])[0].active
        ('b', 'a')
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.adapters.b.generator']
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    trained = wanted if train is None else tuple(train)
    if len(set(wanted)) != len(wanted) or not set(trained) <= set(wanted):
        raise OptionError(f"names are each given once and hold those of train; got names={wanted}, train={trained}.")
    layers = stacked_layers(model)
    for name in wanted:
        stacked_layers(model, name)
    for path, layer in layers.items():
        if layer.folded:
            raise ParameterError(f"{path!r} has {layer.folded} merged in; call unmerge first.")
    for layer in layers.values():
        layer.active = tuple(name for name in wanted if name in layer.adapters)
        for name, part in layer.adapters.items():
            part.requires_grad_(name in trained)
    return model


@contextmanager
def disabled(model: nn.Module, names: str | Sequence[str] | None = None) -> Iterator[nn.Module]:
    """The model without its adapters, or without some of them, for the length of a ``with`` block.

    Args:
        model: A model with adapters.
        names: The ones that rest; default ``None``: all.

    Raises:
        ParameterError: No layer has an adapter of some name, or adapters are merged with ``keep=True``.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(4, 2)), OFT(2, init_std=1.0))
        >>> x = torch.ones(1, 4)
        >>> with disabled(model):
        ...     plain = model(x)
        >>> torch.equal(plain, model[0].base(x)), torch.equal(plain, model(x))
        (True, False)
    """
    layers = stacked_layers(model)
    resting = {names} if isinstance(names, str) else set(names or ())
    for name in resting:
        stacked_layers(model, name)
    for path, layer in layers.items():
        if layer.folded:
            raise ParameterError(f"{path!r} has {layer.folded} merged in; call unmerge first.")
    before = [(layer, layer.active, layer.disabled) for layer in layers.values()]
    try:
        for layer in layers.values():
            layer.disabled = layer.disabled or names is None
            layer.active = tuple(name for name in layer.active if name not in resting)
        yield model
    finally:
        for layer, active, was_disabled in before:
            layer.active, layer.disabled = active, was_disabled


def adapter_parameters(model: nn.Module, name: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters of the adapters, by their names in the model.

    Args:
        model: A model with adapters.
        name: One adapter; default ``None``: all.

    Returns:
        Name to parameter, for an optimizer or a count.

    Raises:
        ParameterError: There is no such adapter.
    """
    return {
        f"{path}.adapters.{one}.{leaf}".lstrip("."): p
        for path, layer in stacked_layers(model, name).items()
        for one, part in layer.adapters.items()
        if name is None or one == name
        for leaf, p in part.named_parameters()
    }


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The state of the adapters alone, under the names it has in the state dict of the model.

    Args:
        model: A model with adapters.
        name: One adapter; default ``None``: all.

    Returns:
        Name to tensor; not copies.

    Raises:
        ParameterError: There is no such adapter.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 8)), OFT(4))
        >>> {key: tuple(value.shape) for key, value in adapter_state_dict(model).items()}
        {'0.adapters.default.generator': (2, 6)}
    """
    return {
        f"{path}.adapters.{one}.{leaf}".lstrip("."): tensor
        for path, layer in stacked_layers(model, name).items()
        for one, part in layer.adapters.items()
        if name is None or one == name
        for leaf, tensor in part.state_dict().items()
    }


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> nn.Module:
    """Copy the state of adapters into those of a model.

    Args:
        model: A model with the same adapters on the same layers.
        state: From :func:`adapter_state_dict`.
        name: One adapter; default ``None``: all.

    Returns:
        ``model``.

    Raises:
        ParameterError: The model has no such adapter.
        CheckpointError: Names or shapes differ. Nothing was changed.
    """
    own = adapter_state_dict(model, name)
    missing, surplus = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [
        f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or surplus or shapes:
        found = [
            f"{len(keys)} {what} (such as {', '.join(map(repr, keys[:3]))})"
            for what, keys in (("missing", missing), ("not in this model", surplus), ("of another shape", shapes))
            if keys
        ]
        raise CheckpointError(f"the adapter is for another model: {'; '.join(found)}. Nothing was loaded.")
    for key, tensor in own.items():
        tensor.copy_(state[key])
    return model


@torch.no_grad()
def adapter_report(model: nn.Module) -> pd.DataFrame:
    """How far every adapter has turned its layer, and how exactly.

    Args:
        model: A model with adapters.

    Returns:
        One row per layer and adapter: ``layer``, ``adapter``, ``kind``, ``active``, ``strength``, ``trainable``;
        ``angle``: largest angle of a plane in radians, and ``orthogonality error``: ``max |R^T R - I|``, both NaN for
        adapters that turn nothing.

    Raises:
        ParameterError: The model has no adapter.
    """
    import pandas as pd

    rows = []
    for path, layer in stacked_layers(model).items():
        for name, part in layer.adapters.items():
            angle, error = part.largest_angle(), part.orthogonality_error()  # type: ignore[operator]
            rows.append(
                {
                    "layer": path or "layer",
                    "adapter": name,
                    "kind": part.config.kind,  # type: ignore[union-attr]
                    "active": name in layer.active,
                    "strength": part.strength,
                    "trainable": sum(p.numel() for p in part.parameters() if p.requires_grad),
                    "angle": float("nan") if angle is None else angle,
                    "orthogonality error": float("nan") if error is None else error,
                }
            )
    return pd.DataFrame(rows)
