"""Which files of a folder are the model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthokit.errors import CheckpointError

__all__ = ["INDEX", "SINGLE", "WEIGHTS", "few", "model_files", "weight_map"]

#: The names that Hugging Face gives to a model in one file and to the list of the files of one in several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_TORCH, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.(safetensors|gguf)")
_OTHERS = (".bin", ".pt", ".pth", ".ckpt")
#: How the names of files with weights end.
WEIGHTS = (".safetensors", ".gguf", *_OTHERS)


def model_files(folder: Path) -> Path | list[Path]:
    """The index of a folder, or its files with weights; safetensors before the others.

    Args:
        folder: As Hugging Face lays it out, or with one model in any of the formats.

    Raises:
        CheckpointError: There is none, a part of one, or several.
    """
    for single, index in ((SINGLE, INDEX), (_TORCH, _TORCH_INDEX)):
        if index != INDEX and any(folder.glob("*.safetensors")):
            continue
        if (folder / index).is_file():
            if (folder / single).is_file() and set(weight_map(folder / index).values()) != {single}:
                raise CheckpointError(
                    f"{folder} holds both {single} and {index}; give the path of the one that is meant."
                )
            return folder / index
        if single == SINGLE and (folder / single).is_file():
            return [folder / single]
    names = sorted(file.name for file in folder.iterdir())
    if any(name in names for name in ("adapter_model.safetensors", "adapter_config.json")):
        raise CheckpointError(
            f"{folder} holds an adapter, not a model; load it onto its model, merge it in and save the model first."
        )
    found = [name for name in names if name.endswith(".safetensors")] or _other_model(folder, names)
    _check_shards(folder, found)
    return [folder / name for name in found]


def _other_model(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of the one model of a folder without safetensors."""
    gguf = [name for name in names if name.endswith(".gguf")]
    stems = {shard[1] if (shard := _SHARD.fullmatch(name)) else name for name in gguf}
    if gguf and _TORCH in names:
        raise CheckpointError(f"{folder} holds {_TORCH} and {few(gguf)}; give the path of the one that is meant.")
    if len(stems) > 1:
        raise CheckpointError(f"{folder} holds {len(stems)} GGUF models, {few(gguf)}; give the path of one of them.")
    if gguf or _TORCH in names:
        return gguf or [_TORCH]
    others = [name for name in names if name.endswith(_OTHERS)]
    hint = f"give the path of the file that is meant, such as {others[0]!r}" if others else "check the path"
    raise CheckpointError(f"{folder} has no .safetensors file; it holds {few(names) or 'nothing'}: {hint}.")


def _check_shards(folder: Path, names: Sequence[str]) -> None:
    """Without an index the count in the names is all that tells a whole model from a part of one."""
    parts = [part for name in names if (part := _SHARD.fullmatch(name))]
    for stem, total, kind in sorted({(part[1], part[3], part[4]) for part in parts}):
        have = {int(part[2]) for part in parts if (part[1], part[3]) == (stem, total)}
        if missing := sorted(set(range(1, int(total) + 1)) - have if len(total) < 7 else []):
            shown = few([f"{stem}-{number:0{len(total)}d}-of-{total}.{kind}" for number in missing])
            raise CheckpointError(f"{folder} has {len(have)} of {int(total)} shards; missing is {shown}. Copy it too.")


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index lists them.

    Args:
        index: A JSON file with ``weight_map``.

    Raises:
        CheckpointError: It is none, or names files elsewhere.
    """
    try:
        values: Any = json.loads(index.read_text(encoding="utf-8"))
        listed = values["weight_map"]
        if not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("a file is no text")
        plain = all(
            isinstance(name, str) and Path(name).name == name and name not in ("", "..") for name in listed.values()
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(
            f"{index} is no list of shards: {type(cause).__name__}: {cause}. Copy it again."
        ) from cause
    if not listed or not plain:
        found = "names files outside its folder" if listed else "lists nothing"
        raise CheckpointError(f"{index} {found}; copy it again from where the model comes from.")
    return listed


def few(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
