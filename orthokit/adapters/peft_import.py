"""Adapters of PEFT into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.adapters._install import check_present, install
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.peft_read import PeftFile, entry_of, read_peft
from orthokit.adapters.sites import kind_of
from orthokit.errors import CheckpointError, unknown_name

__all__ = ["load_peft"]

WEIGHTS = ("refuse", "load", "leave")


def load_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    version: str | None = None,
    weights: str = "refuse",
) -> nn.Module:
    r"""Read an adapter that PEFT wrote into a model: it computes what PEFT computed.

    Args:
        model: The model that it was trained on, without PEFT around it.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``, of OFT, BOFT, HRA or LoRA (rank
            stabilised, DoRA, PiSSA and OLoRA included).
        name: That the adapter gets here; default ``None``: ``"default"``.
        version: The release of PEFT that wrote it, such as ``"0.17"``; default ``None``: the one that its config names,
            or that its tensors tell. Configs name it since 0.18, when the series of OFT changed its meaning; 0.16 and
            0.17 are told from 0.14 and 0.15 by the names of the tensors.
        weights: A folder may hold weights of the model as well: trained biases, or heads that were saved whole. What is
            to be done with those that differ from the model's: ``"refuse"`` (default): an error. ``"load"``: they
            overwrite those of the model, which ``detach`` does not undo. ``"leave"``.

    Returns:
        ``model``, frozen as by ``attach``. A series keeps its number of terms and is never switched to the exact map.

    Raises:
        CheckpointError: A file is missing, damaged or a pickle; of a type or with an option that is not read; or for
            another model (which layers, which shapes). Nothing was changed.
        OptionError: ``version`` contradicts the tensors.
        ParameterError: A layer cannot be adapted.

    Example:
        >>> import json, pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> layer, x = nn.Linear(4, 3), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        >>> u = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = pathlib.Path(folder)
        ...     save_file({"base_model.model.0.hra_u": u}, place / "adapter_model.safetensors")
        ...     _ = (place / "adapter_config.json").write_text(json.dumps({"peft_type": "HRA", "r": 1}))
        ...     model = load_peft(nn.Sequential(layer), folder)
        >>> torch.allclose(model(x), layer(x * torch.tensor([-1.0, 1, 1, 1])), atol=1e-6)  # a reflection
        True

    Numerics:
        Outputs agree with PEFT's to its own rounding, 1e-6 in float32. A convolution with a kernel of several places
        computes what PEFT *merges*; what PEFT's OFT computes before merging is another function, and not the identity
        at the start.

    References:
        Facts about PEFT 0.14 to 0.21, read in its source and measured; :mod:`orthokit.adapters.peft_forms`. Outputs
        scaled by the OFT of 0.14 and 0.15 are read as a BOFT of one factor.
    """
    if weights not in WEIGHTS:
        raise unknown_name("treatment of weights", weights, WEIGHTS)
    file = read_peft(folder, version=version)
    sites = check_present(model, list(file.layers), str(folder))
    overwrite = _weights(model, file, weights)
    layers = {path: model.get_submodule(path) for path in file.layers}
    entries = {path: entry_of(file, path, sites[path], lambda at=layer: _dense(at)) for path, layer in layers.items()}
    model = install(model, {name or "default": entries}, source=str(folder))
    with torch.no_grad():
        for own, new in overwrite:
            own.copy_(new)
    return model


def _weights(model: nn.Module, file: PeftFile, treatment: str) -> list[tuple[Tensor, Tensor]]:
    """The weights of the model that the file has other values for, with these."""
    own = _named_weights(model)
    found = {key.replace(".base_layer.", "."): tensor for key, tensor in file.others.items()}
    unknown = [key for key in found if key not in own or own[key].shape != found[key].shape]
    if unknown and treatment != "leave":
        raise CheckpointError(
            f"{file.folder} holds tensors that are neither the adapter's nor the model's: {_some(unknown)}. With "
            "weights='leave' they are passed over."
        )
    if treatment == "leave":
        return []
    differing = [key for key in found if not torch.equal(own[key].cpu(), found[key].to(own[key].dtype))]
    if differing and treatment == "refuse":
        raise CheckpointError(
            f"{file.folder} holds other weights of the model as well: {_some(differing)}. Overwrite the model's with "
            "weights='load', or pass over them with weights='leave'."
        )
    return [(own[key], found[key]) for key in differing]


def _named_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """The state of the model under the names that it had before adapters."""
    adapted = [f"{path}.base.".lstrip(".") for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer)]
    named = {}
    for key, tensor in model.state_dict().items():
        for start in adapted:
            if key.startswith(start):
                key = key.replace(start, start.removesuffix("base."), 1)
        named[key] = tensor
    return named


def _dense(layer: Any) -> Tensor:
    plain = layer.base if isinstance(layer, AdaptedLayer) else layer
    kind = kind_of(plain)
    return kind.matrix(plain, kind.weight(plain, torch.float32).detach(), "patches").cpu()  # type: ignore[union-attr]


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown
