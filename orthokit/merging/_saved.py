"""Tensors of unfinished work on disk: each file whole or not there, and never mistaken for that of other work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from orthokit.checkpoints._files import write_whole
from orthokit.errors import CheckpointError

__all__ = ["digest", "file_name", "read_saved", "write_saved"]


def digest(options: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of options and tensors: what a result depends on."""
    found = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def file_name(name: str) -> str:
    """A file name for a module's name; the root has none of its own."""
    return name.replace("/", "_") or "root"


def write_saved(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, recipe: str) -> None:
    """Write beside and rename: at any instant the file is the old one or the new one.

    Args:
        path: Of the file; its folder is made.
        tensors: Copied to the CPU.
        values: Anything that JSON holds.
        recipe: Digest of what the tensors are made from.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    metadata = {"recipe": recipe, "values": json.dumps(values)}
    data = save({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be written: {cause}. Choose another place with resume=.") from cause


def read_saved(path: Path, *, recipe: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`write_saved` left, or None where there is no such file.

    Raises:
        CheckpointError: The file is damaged, or was made from other weights or with other options.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        found, values = metadata["recipe"], json.loads(metadata["values"])
    except (OSError, SafetensorError, KeyError, ValueError) as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}. Delete it to compute it again.") from cause
    if found != recipe:
        raise CheckpointError(
            f"{path} was made from other weights or with other options. Resume with those of the first run, or choose "
            "an empty folder."
        )
    return tensors, values
