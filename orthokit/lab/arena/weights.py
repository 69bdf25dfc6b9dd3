"""The weights that a fine-tuned model computes with, whatever kind of method made it."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.targets import chosen_layers
from orthokit.diagnostics.profiles import ThinSVD, thin_svd
from orthokit.errors import ParameterError, ShapeError
from orthokit.lab.arena.grounds import ground_named, pretrained_model, targets_of

__all__ = ["effective_bias", "effective_weight", "target_names", "weights_after", "weights_before"]


@torch.no_grad()
def effective_weight(layer: nn.Module) -> Float[Tensor, "out in"]:
    r"""The matrix that a linear layer computes with now, in float32 and detached.

    Args:
        layer: ``nn.Linear``, one with adapters, or one that PEFT put in its place.

    Returns:
        Shape ``(out, in)``: the weight; with adapters the effective one; of a layer of PEFT what it makes of the
        identity, less its bias.

    Raises:
        ParameterError: The layer is none of these.

    Example:
        >>> from orthokit.adapters import LoRA
        >>> plain = nn.Linear(4, 3)
        >>> torch.equal(effective_weight(LoRA(rank=2).wrap(plain)), effective_weight(plain))
        True
    """
    if isinstance(layer, AdaptedLayer):
        return layer.effective_weight(dtype=torch.float32).detach()
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().float().clone()
    return _read_off(layer)[0]


@torch.no_grad()
def effective_bias(layer: nn.Module) -> Float[Tensor, " out"] | None:
    """The bias that a linear layer adds now, float32, or ``None``; a scale of outputs scales it too.

    Args:
        layer: As for :func:`effective_weight`.
    """
    if isinstance(layer, AdaptedLayer | nn.Linear):
        return None if layer.bias is None else layer.bias.detach().float().clone()
    _, bias = _read_off(layer)
    return None if layer.base_layer.bias is None else bias  # type: ignore[union-attr]


def _read_off(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer of PEFT: what it makes of the identity and of zero."""
    base = getattr(layer, "base_layer", None)
    if not isinstance(base, nn.Linear):
        raise ParameterError(f"a {type(layer).__name__} is no linear layer; name the layers that were fine-tuned.")
    training = layer.training
    layer.eval()
    try:
        like = base.weight
        zero = layer(like.new_zeros(1, base.in_features))
        rows = layer(torch.eye(base.in_features, dtype=like.dtype, device=like.device))
    finally:
        layer.train(training)
    return (rows - zero).mT.float().contiguous(), zero[0].float()


@lru_cache(maxsize=16)
def target_names(ground: str, small: bool) -> tuple[str, ...]:
    """The layers that are fine-tuned on a ground, in the order of the model."""
    model = pretrained_model(ground, small)
    return tuple(chosen_layers(model, targets_of(ground_named(ground), small), FullFineTuning()))


@lru_cache(maxsize=4)
def weights_before(ground: str, small: bool) -> dict[str, Tensor]:
    """Layer to pretrained weight, float32; shared, not to be written to."""
    model = pretrained_model(ground, small)
    return {name: effective_weight(model.get_submodule(name)) for name in target_names(ground, small)}


@lru_cache(maxsize=4)
def decomposed_before(ground: str, small: bool) -> dict[str, ThinSVD]:
    """Layer to the thin SVD of its pretrained weight."""
    return {name: thin_svd(W) for name, W in weights_before(ground, small).items()}


def weights_after(ground: str, model: nn.Module, *, small: bool = False) -> dict[str, Tensor]:
    """Layer to the weight that a fine-tuned model computes with.

    Args:
        ground: Where it was fine-tuned.
        model: The model.
        small: As it was entered.

    Returns:
        Name to float32 matrix ``(out, in)``.

    Raises:
        UnknownNameError: No such ground.
        ParameterError: The model lacks a layer of the ground's.
        ShapeError: A layer has another shape than the pretrained one.

    Example:
        >>> from orthokit.lab.arena import enter
        >>> racer = enter("tinygpt", "lora", lr=1e-2, seed=0, steps=2, small=True)
        >>> before = weights_before("tinygpt", True)
        >>> after = weights_after("tinygpt", racer.model, small=True)
        >>> all(torch.equal(before[name], W) for name, W in after.items())
        True
    """
    found = {}
    for name, before in weights_before(ground, small).items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise ParameterError(
                f"the model has no layer {name!r} ({error}); it is not one that was fine-tuned on {ground!r}."
            ) from error
        W = effective_weight(layer)
        if W.shape != before.shape:
            raise ShapeError(
                f"{name!r} has the shape {tuple(W.shape)} and {tuple(before.shape)} in the pretrained model of "
                f"{ground!r}; the two are different models."
            )
        found[name] = W
    return found


def head_of(ground: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the head that trains along, if the ground has one."""
    head = ground_named(ground).head
    return dict(cast("nn.Module", getattr(model, head)).named_parameters()) if head else {}
