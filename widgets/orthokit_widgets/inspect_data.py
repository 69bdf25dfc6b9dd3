"""What the page "Inspect" can look at: models that are here, demonstrations made of one, and files of the visitor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthokit.adapters import OFT, AdapterConfig, LoRA, attach, merge
from orthokit.diagnostics import Inspection
from orthokit.errors import MissingExtraError
from orthokit.lab import load_pretrained
from orthokit.lab.pretrained import sentence_files
from orthokit_widgets.merge_data import Shelf

__all__ = ["STORE", "Asked", "Model", "catalogue"]

_INSPECTIONS = 32

STORE: Shelf[Inspection] = Shelf(_INSPECTIONS)
"""What was measured of the models that every visitor sees."""


@dataclass(frozen=True)
class Model:
    """Something that can be inspected.

    Args:
        key: Its name in settings and addresses.
        label: What lists and charts call it.
        load: Gives what :func:`orthokit.diagnostics.inspect` takes.
        base: Key of the model that it was made from; empty: none that is here.
        own: It belongs to one visitor.
        cached: A file on this machine, whose measurements may be remembered.
    """

    key: str
    label: str
    load: Callable[[], Any]
    base: str = ""
    own: bool = False
    cached: bool = False


@dataclass(frozen=True)
class Asked:
    """One look at one model.

    Args:
        model: Its key.
        base: That of its base; empty: none.
        detail: ``"spectrum"`` or ``"norms"``.
        sample: Most matrices.
    """

    model: str
    base: str
    detail: str
    sample: int


# --- models that are here


def catalogue() -> dict[str, Model]:
    """Models that every visitor can choose, by key."""
    found = [
        Model("tinygpt", "TinyGPT", _tinygpt),
        Model("tinygpt-oft", "TinyGPT turned by OFT", lambda: _adapted("oft"), base="tinygpt"),
        Model("tinygpt-lora", "TinyGPT with LoRA", lambda: _adapted("lora"), base="tinygpt"),
        Model("tinygpt-full", "TinyGPT with noise", _noisy, base="tinygpt"),
        Model("tinygpt-bfloat16", "TinyGPT in bfloat16", _rounded, base="tinygpt"),
    ]
    path = _minilm()
    if path is not None:
        found.append(Model("minilm", "MiniLM", lambda: path, cached=True))
    return {model.key: model for model in found}


def _tinygpt() -> dict[str, Tensor]:
    """Its weights, in the order of its layers."""
    return dict(load_pretrained().state_dict())


def _minilm() -> Path | None:
    try:
        path = sentence_files() / "model.safetensors"
    except MissingExtraError:
        return None
    return path if path.is_file() else None


# Options of the adapters, and the standard deviation of what is added to their parameters.
_ADAPTERS: dict[str, tuple[AdapterConfig, float]] = {"oft": (OFT(block_size=8), 0.006), "lora": (LoRA(rank=8), 0.05)}
_NOISE = 0.05


@functools.cache
def _adapted(kind: str) -> dict[str, Tensor]:
    """TinyGPT with random adapters merged into it: synthetic, nothing is trained."""
    config, size = _ADAPTERS[kind]
    model = attach(load_pretrained(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (one for one in model.parameters() if one.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    merge(model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@functools.cache
def _noisy() -> dict[str, Tensor]:
    """TinyGPT with independent noise on the entries of every matrix, in proportion to their size."""
    generator = torch.Generator().manual_seed(0)

    def noisy(W: Tensor) -> Tensor:
        return W + _NOISE * W.std() * torch.randn(W.shape, generator=generator) if W.ndim == 2 else W

    return {name: noisy(value) for name, value in _tinygpt().items()}


@functools.cache
def _rounded() -> dict[str, Tensor]:
    return {name: value.bfloat16() for name, value in _tinygpt().items()}
