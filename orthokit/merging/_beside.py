"""The files of a model folder that are no weights, and what a merged model takes of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from orthokit.errors import CheckpointError

__all__ = ["files_beside"]

# By what they are called: configuration, tokenizer, template, licence, and code that the configuration may name.
_ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")
_BEGINNINGS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_LARGEST = 200_000_000


def files_beside(model: Path, *, dtype: torch.dtype | None) -> dict[str, bytes | Path]:
    """What to copy from the folder of a model into that of another with the same architecture and tokenizer.

    Args:
        model: The folder, or a file of weights, beside which nothing is taken to belong to it.
        dtype: The type that the copy's weights get, to be named in its ``config.json``; ``None``: that of the model.

    Returns:
        By name, the file, or its new content.

    Raises:
        CheckpointError: ``config.json`` is no JSON and has to be changed.
    """
    if not model.is_dir():
        return {}
    found: dict[str, bytes | Path] = {}
    for file in sorted(model.iterdir()):
        wanted = file.name.endswith(_ENDINGS) or file.name.startswith(_BEGINNINGS)
        weights = file.name.endswith(".index.json") or file.name.startswith("adapter_")
        if wanted and not weights and file.is_file() and file.stat().st_size <= _LARGEST:
            found[file.name] = file
    if dtype is not None and "config.json" in found:
        found["config.json"] = _with_dtype(model / "config.json", dtype)
    return found


def _with_dtype(config: Path, dtype: torch.dtype) -> bytes:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        # The newer name and the older one; whichever is there is what loads the model.
        for key in [key for key in ("dtype", "torch_dtype") if key in values] or ["torch_dtype"]:
            values[key] = str(dtype).removeprefix("torch.")
    except (OSError, ValueError, TypeError) as cause:
        raise CheckpointError(f"{config} cannot be read: {cause}. Copy it again.") from cause
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
