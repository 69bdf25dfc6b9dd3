"""What a model is made of: one entry per parameter name, from a module, a state dict or named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from orthokit.errors import DtypeError, ParameterError

__all__ = ["Entry", "collect", "is_number"]

_UNINITIALISED = (UninitializedParameter, UninitializedBuffer)


@dataclass(frozen=True)
class Entry:
    """One parameter name.

    Args:
        name: As the model gives it.
        path: The name without ``parametrizations.`` and ``.original``, which say how a weight is made.
        tensor: The parameter; ``None`` for extra state that is no tensor.
        shape: Its shape; empty if it is not initialised.
        trainable: ``None`` where the source does not say.
        owner: The module that holds it; ``None`` when only the name is known.
        tied_to: The first name of the same tensor.
    """

    name: str
    path: str
    tensor: Tensor | None
    shape: tuple[int, ...]
    trainable: bool | None
    owner: nn.Module | None = None
    tied_to: str | None = None

    @property
    def segments(self) -> list[str]:
        """The parts of :attr:`path`."""
        return self.path.split(".")

    @property
    def leaf(self) -> str:
        """The last part of :attr:`path`: ``weight``, ``in_proj_weight``, ``gate_up_proj``."""
        return self.segments[-1]

    @property
    def role(self) -> str:
        """The part that says what the parameter is for: the module's name, or the parameter's own when it has one."""
        segments = self.segments
        generic = self.leaf in ("weight", "bias", "weight_orig", "weight_v", "weight_g")
        return segments[-2] if generic and len(segments) > 1 else self.leaf

    @property
    def initialised(self) -> bool:
        """Whether the tensor has a shape yet."""
        return self.tensor is not None and not isinstance(self.tensor, _UNINITIALISED)


def _parametrized(name: str) -> tuple[str, str, str] | None:
    """Module path, parameter and ``original...`` of a parametrized weight; ``None`` for any other name."""
    head, found, tail = name.rpartition("parametrizations.")
    leaf, _, original = tail.partition(".")
    if not found or not original.startswith("original") or (head and not head.endswith(".")):
        return None
    return head, leaf, original


def _path(name: str) -> str:
    parts = _parametrized(name)
    if parts is None:
        return name
    head, leaf, original = parts
    # weight_norm keeps a magnitude (original0) and a direction (original1); everything else keeps one original.
    return head + leaf + {"original0": "_g", "original1": "_v"}.get(original, "")


def _entry(name: str, tensor: object, owner: nn.Module | None, tied_to: str | None) -> Entry:
    if not isinstance(tensor, Tensor):
        if name.split(".")[-1].startswith("_extra_state"):
            return Entry(name, name, None, (), None, owner, tied_to)
        found = type(tensor).__name__
        hint = " Pass the inner state dict, for example checkpoint['model']." if isinstance(tensor, Mapping) else ""
        raise DtypeError(f"A state dict maps names to tensors; {name!r} holds {found}.{hint}")
    known = isinstance(tensor, nn.Parameter) or owner is not None or tensor.requires_grad
    shape = () if isinstance(tensor, _UNINITIALISED) else tuple(tensor.shape)
    return Entry(name, _path(name), tensor, shape, tensor.requires_grad if known else None, owner, tied_to)


def _identity(tensor: object) -> object:
    """Two names with equal identity are one parameter."""
    # A state dict holds detached tensors: the same parameter under two names is two objects over one memory.
    if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta":
        try:
            start = tensor.data_ptr()
        except RuntimeError:  # tensors without plain storage, such as sparse ones
            return id(tensor)
        if start and tensor.numel():
            return (start, tensor.device, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
    return id(tensor)


def _owner(model: nn.Module, name: str) -> nn.Module:
    parts = _parametrized(name)
    return model.get_submodule(parts[0].rstrip(".") if parts else name.rpartition(".")[0])


def collect(model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> list[Entry]:
    """One entry per parameter name, in order; later names of one tensor say which was first.

    Args:
        model: Module, state dict, or (name, tensor) pairs such as ``model.named_parameters()``.

    Returns:
        Entries in the order of the source.

    Raises:
        DtypeError: The source or one of its values has the wrong type.
        ParameterError: A name is given twice.
    """
    owner_of = None
    if isinstance(model, nn.Module):
        pairs: list[tuple[str, object]] = list(model.named_parameters(remove_duplicate=False))
        owner_of = {name: _owner(model, name) for name, _ in pairs}
    elif isinstance(model, Mapping):
        pairs = [(str(name), value) for name, value in model.items()]
    elif isinstance(model, Iterable) and not isinstance(model, str | bytes | Tensor):
        pairs = []
        for item in model:
            if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)):
                raise DtypeError(
                    f"matrices() takes (name, tensor) pairs; found {type(item).__name__}. "
                    "Pass the model itself, its state dict, or model.named_parameters()."
                )
            pairs.append((item[0], item[1]))
    else:
        raise DtypeError(
            f"matrices() takes a module, a state dict or (name, tensor) pairs; found {type(model).__name__}."
        )
    first: dict[object, str] = {}
    entries, names = [], set()
    for name, tensor in pairs:
        if name in names:
            raise ParameterError(f"Each name stands for one parameter; {name!r} is given twice.")
        names.add(name)
        earlier = first.setdefault(_identity(tensor), name)
        owner = owner_of[name] if owner_of is not None else None
        entries.append(_entry(name, tensor, owner, None if earlier == name else earlier))
    return entries


def is_number(dtype: torch.dtype) -> bool:
    """Whether a type holds weights: real or complex floating point."""
    return dtype.is_floating_point or dtype.is_complex
