"""Activations of chosen layers of a model, gathered by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from orthokit.diagnostics._modes import evaluating
from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name

__all__ = ["collect_activations"]


def collect_activations(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str],
    *,
    what: Literal["output", "input"] = "output",
    keep: Callable[[Any], Tensor] | None = None,
    tokens: int | None = None,
    call: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Tensor]:
    r"""What chosen layers put out (or take in) on given batches, one token a row, ready for the metrics here.

    Call it for the base and for the finetuned model with the same batches, so that row ``n`` is the same token.

    Args:
        model: Any module. It is put in evaluation mode (no dropout) while this runs, and no gradients are kept.
        batches: Inputs; a tensor is passed as the argument, a tuple or list as arguments, a mapping by keywords.
        layers: Names as in ``model.named_modules()``, for example ``"blocks.3.mlp.down"``; ``""`` is the model itself.
        what: ``"output"`` of the layers (default; the first part of a tuple) or ``"input"`` (the first argument).
        keep: From a batch, a boolean mask shaped like the activations without their last dimension; false is padding
            and left out. Default: all positions are kept.
        tokens: Stop as soon as every layer has so many rows, ``>= 1``; default all. Published: 4096.
        call: How to run the model on a batch, ``call(model, batch)``, if the rules of ``batches`` do not fit.

    Returns:
        Layer name to a tensor ``(rows, width)``, in the dtype and on the device of the activations. Activations
        ``(batch, channels, ...)`` of convolutions give one row a position, one column a channel.

    Raises:
        UnknownNameError: No layer of that name, or unknown ``what``.
        OptionError: No batches, no layers, ``tokens`` below 1, or a layer that did not run exactly once a batch.
        ShapeError: A mask that does not fit.
        DtypeError: A layer whose output is not a tensor, or a mask that is not boolean.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> found = collect_activations(model, [torch.ones(2, 5, 3)], ["0", "1"])
        >>> found["1"].shape, bool((found["1"] == found["0"].relu()).all())
        (torch.Size([10, 4]), True)

    Numerics:
        Nothing is converted; one forward pass a batch.

    References:
        The protocol of Z. Huang et al., PEFT-Arena, arXiv 2605.28819: the same prompts through both models, padding
        removed.
    """
    if what not in ("output", "input"):
        raise unknown_name("kind of activation", what, ("output", "input"))
    if tokens is not None and tokens < 1:
        raise OptionError(f"tokens must be an integer >= 1; got {tokens}.")
    if not layers:
        raise OptionError("layers is empty; name at least one, as in model.named_modules().")
    modules = dict(model.named_modules())
    for name in layers:
        if name not in modules:
            raise unknown_name("layer", name, modules)
    seen: dict[str, list[Tensor]] = {}
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [_hooked(modules[name], seen, name, what) for name in rows]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                seen.clear()
                (call or _call)(model, batch)
                mask = None if keep is None else keep(batch)
                for name, parts in rows.items():
                    parts.append(_kept(_once(seen, name), mask, name))
                if tokens is not None and all(sum(map(len, parts)) >= tokens for parts in rows.values()):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if not any(rows.values()):
        raise OptionError("batches is empty; give at least one.")
    return {name: torch.cat(parts)[:tokens] for name, parts in rows.items()}


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _hooked(module: nn.Module, seen: dict[str, list[Tensor]], name: str, what: str) -> RemovableHandle:
    def record(found: Any) -> None:
        found = found[0] if isinstance(found, tuple) and found else found
        if not isinstance(found, Tensor):
            raise DtypeError(f"the {what} of layer {name!r} must be a tensor; got {type(found).__name__}.")
        found = found.detach().clone()  # now: the next layer may work in place
        channels_first = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        seen.setdefault(name, []).append(found.movedim(1, -1) if channels_first else found)

    # Inputs before the layer runs, because the layer itself may work in place.
    if what == "input":
        return module.register_forward_pre_hook(lambda module, inputs: record(inputs))
    return module.register_forward_hook(lambda module, inputs, output: record(output))


def _once(seen: dict[str, list[Tensor]], name: str) -> Tensor:
    calls = seen.get(name, [])
    if len(calls) != 1:
        raise OptionError(f"layer {name!r} must run exactly once a batch; it ran {len(calls)} times. Choose another.")
    return calls[0]


def _kept(X: Tensor, mask: Tensor | None, name: str) -> Tensor:
    if mask is None:
        return X.reshape(-1, X.shape[-1])
    if mask.dtype != torch.bool:
        raise DtypeError(f"keep must give a boolean mask; got {mask.dtype}. Use mask.bool().")
    if mask.shape != X.shape[:-1]:
        raise ShapeError(
            f"keep must give a mask of shape {tuple(X.shape[:-1])} for layer {name!r}; got {tuple(mask.shape)}."
        )
    return X[mask.to(X.device)]
