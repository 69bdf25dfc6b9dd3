"""Adapters of a model as PEFT reads them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from orthokit.adapters.dora import DoRAAdapter
from orthokit.adapters.files import write_pair
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.peft_layers import Parts, Written, check_layer, common, pattern, target_modules
from orthokit.adapters.peft_read import CONFIG, PREFIX, TENSORS
from orthokit.adapters.peft_turns import boft_state, hra_state, oft_state
from orthokit.adapters.stack import stacked_layers
from orthokit.adapters.targets import trained_beside
from orthokit.errors import ParameterError

__all__ = ["PEFT_VERSION", "save_peft"]

PEFT_VERSION = "0.21.2"
"""The release of PEFT whose format is written."""


def save_peft(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
    r"""Write one adapter of a model as PEFT reads it: ``PeftModel.from_pretrained(model, folder)`` computes the same.

    Args:
        model: A model with adapters; not changed. PEFT is to be given the model without them (``detach``).
        folder: Made if it is not there; ``adapter_config.json`` and ``adapter_model.safetensors`` are replaced.
        name: The adapter; default ``None``: the only one. Modules that are trained beside it become PEFT's
            ``modules_to_save``. Several are written one by one into folders of their own.
            PEFT's forward pass applies several OFT adapters in the order in which they are active, as here; its merge
            takes them the other way round.

    Returns:
        The folder.

    Raises:
        ParameterError: There is no such adapter, or several and no name; it holds NaN or an infinity; or PEFT has
            nothing that computes the same, in words. Nothing was written.
        OptionError: Options that PEFT has once for all layers differ between layers.

    Example:
        >>> import json, tempfile
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 4)), OFT(4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = json.loads((save_peft(model, folder) / "adapter_config.json").read_text())
        >>> config["peft_type"], config["oft_block_size"], config["use_cayley_neumann"]
        ('OFT', 4, False)

    Numerics:
        What has no name there goes into the numbers, exactly: ``angle_scale``, ``block_rate``, the strength of
        ``rewind``, the projection of COFT, the exponential map (as the Cayley transform of another generator), several
        butterfly factors (one of larger blocks, which PEFT applies without its CUDA kernel), convolutions read by
        channels (by patches), and the starts of PiSSA and MiLoRA (a LoRA of twice the rank). A series within its
        tolerance may become the exact map. OFT on a convolution with a kernel of several places is written as a BOFT
        of one factor: what PEFT's OFT computes there is not what it merges. The format is that of
        :data:`PEFT_VERSION`, and it is named in the file.
    """
    found = stacked_layers(model, name)
    names = list(dict.fromkeys(one for layer in found.values() for one in layer.adapters if name in (None, one)))
    if len(names) != 1:
        raise ParameterError(f"a folder of PEFT's holds one adapter and the model has {names}; say which with name=.")
    parts: Parts = {path: (layer, cast(Any, layer.adapters[names[0]])) for path, layer in found.items()}
    kinds = sorted({str(part.config.kind) for _, part in parts.values()})
    if "" in parts:
        raise ParameterError("PEFT adapts layers inside a model, and this is a bare layer; put it into a module.")
    for path, (layer, part) in parts.items():
        if layer.blend != 1.0:
            raise ParameterError(f"{path!r} is rewound on the dense path; call rewind(model, 1.0) first.")
        for leaf, tensor in part.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ParameterError(f"{path!r}: {leaf} holds NaN or an infinity; nothing was written.")
    with torch.no_grad():
        config, tensors = _writer(kinds)(parts)
    beside = trained_beside(model)
    values = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": beside or None,
        "peft_version": PEFT_VERSION,
        "target_modules": target_modules(model, parts),
        "task_type": None,
    }
    for module in beside:
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in model.get_submodule(module).state_dict().items()}
    named = {PREFIX + key: tensor for key, tensor in tensors.items()}
    return write_pair(Path(folder), TENSORS, named, CONFIG, values | config)


def _writer(kinds: list[str]) -> Callable[[Parts], Written]:
    writers = {
        "oft": oft_state,
        "oft_neumann_sum": oft_state,
        "boft": boft_state,
        "hra": hra_state,
        "lora": _lora_state,
        "dora": _lora_state,
    }
    if unknown := [kind for kind in kinds if kind not in writers]:
        raise ParameterError(
            f"PEFT has nothing like an adapter of kind {unknown[0]!r}; written are oft, boft, hra, lora and dora. "
            "Merge it and save the model instead."
        )
    if len(kinds) > 1 and {writers[kind] for kind in kinds} != {oft_state}:
        raise ParameterError(f"an adapter of PEFT is of one kind and this one is {kinds}; attach them under two names.")
    return writers[kinds[0]]


def _lora_state(parts: Parts) -> Written:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    stabilised = all(part.config.rank_stabilised for _, part in parts.values())
    for path, (layer, part) in parts.items():
        dora = isinstance(part, DoRAAdapter)
        kinds = ("linear", "conv1d_transposed", "conv", *(() if dora else ("embedding",)))
        check_layer(path, layer, kinds, "DoRA" if dora else "LoRA", any_conv=True)
        if dora and part.strength != 1:
            raise ParameterError(f"{path!r} is DoRA rewound to {part.strength:g}; call rewind(model, 1.0) first.")
        down, up = part.factors()
        ranks[path] = len(down)
        divisor = math.sqrt(len(down)) if stabilised else len(down)
        if part.down_start is None and part.strength == 1:
            # PEFT is told the scale, so that training goes on as it did.
            up, alphas[path] = part.up, part.config.scale * divisor
        else:
            alphas[path] = divisor
        tensors |= _lora_tensors(path, layer, down, up)
        if dora:
            places = layer.base.weight.ndim - 2  # type: ignore[union-attr]
            shape = (1, -1, *[1] * places) if layer.site.kind == "conv" else (-1,)
            tensors[f"{path}.lora_magnitude_vector"] = part.magnitude.reshape(shape)
    r, alpha = common(ranks.values()), common(alphas.values())
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": pattern(ranks, parts, r),
        "alpha_pattern": {path: _whole(value) for path, value in pattern(alphas, parts, alpha).items()},
        "use_rslora": stabilised,
        "use_dora": any(isinstance(part, DoRAAdapter) for _, part in parts.values()),
        "lora_dropout": common(part.config.dropout for _, part in parts.values()),
        "init_lora_weights": True,
        "fan_in_fan_out": any(layer.site.kind == "conv1d_transposed" for layer, _ in parts.values()),
    }
    return config, tensors


def _lora_tensors(path: str, layer: AdaptedLayer, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    if layer.site.kind == "embedding":
        return {f"{path}.lora_embedding_A": up.mT, f"{path}.lora_embedding_B": down.mT}
    if layer.site.kind == "conv":
        kernel: Any = layer.base.weight.shape[2:]  # type: ignore[union-attr]
        down, up = down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel))
    return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}


def _whole(value: float) -> float | int:
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value
