"""A model as something whose tensors can be asked for one at a time: a module, a mapping, or a checkpoint on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.checkpoints import open_checkpoint
from orthokit.errors import DtypeError
from orthokit.matrices import MatrixTable, matrices

__all__ = ["Source", "opened", "place_in_model", "source_name"]

_PLAIN = ("", ".", "model", "pytorch_model", "consolidated", "checkpoint")
Model = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """A model that is open for reading.

    Args:
        name: What to call it.
        table: Its matrices, and what is left out.
        shapes: By name, the shapes of its tensors.
        dtypes: And their types, as they are read.
        read: Gives a tensor by its name.
        stored: Says how a tensor is kept, such as ``"bfloat16"`` or ``"Q4_1"``.
        rounding: Root mean square rounding error of a tensor's entries as they are kept; ``None``: as of its type.
        digest: Changes when the model does; empty where nothing can tell.
    """

    name: str
    table: MatrixTable
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    stored: Callable[[str], str]
    rounding: Callable[[str], float | None]
    digest: str


def source_name(model: Model) -> str:
    """What to call a model: the name of the file or folder, or of the class."""
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        # Many files are called like every other: then the folder around them tells more.
        while path.stem in _PLAIN and path.parent.name:
            path = path.parent
        return path.name
    return type(model).__name__ if isinstance(model, nn.Module) else "state dict"


@contextmanager
def opened(model: Model, **options: Any) -> Iterator[Source]:
    """The model, open until the end of the ``with`` block.

    Args:
        model: A module, a mapping of names to tensors, or the path of a checkpoint.
        options: Of :func:`orthokit.matrices.matrices`.

    Raises:
        DtypeError: It is none of these.
        CheckpointError: The path holds no model that can be read.
    """
    if isinstance(model, str | os.PathLike):
        with open_checkpoint(model) as found:
            # Files hold layer 10 before layer 2.
            names = sorted(found.names(), key=_natural)
            meta = {name: torch.empty(found.shape(name), dtype=found.dtype(name), device="meta") for name in names}

            def kept(name: str) -> str:
                return found.quantization(name) or _type(found.dtype(name))

            yield Source(
                source_name(model),
                matrices(meta, **options),
                {name: found.shape(name) for name in names},
                {name: found.dtype(name) for name in names},
                found.tensor,
                kept,
                lambda name: None if found.quantization(name) is None else found.rounding(name),
                found.digest,
            )
        return
    if not isinstance(model, nn.Module | Mapping):
        raise DtypeError(
            f"a model is an nn.Module, a mapping of names to tensors, or a path; found {type(model).__name__}."
        )
    module = isinstance(model, nn.Module)
    held: Mapping[str, Any] = dict(model.named_parameters(remove_duplicate=False)) if module else model
    tensors = {name: value.detach() for name, value in held.items() if isinstance(value, Tensor)}
    yield Source(
        source_name(model),
        matrices(model, **options),
        {name: tuple(value.shape) for name, value in tensors.items()},
        {name: value.dtype for name, value in tensors.items()},
        tensors.__getitem__,
        lambda name: _type(tensors[name].dtype),
        lambda name: None,
        "",
    )


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Names in the order of the numbers in them."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in re.split(r"(\d+)", name) if word]


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place_in_model(name: str) -> tuple[int | None, str]:
    """Depth and role of a matrix, as its name tells: the first number in it, and the rest without numbers.

    Example:
        >>> place_in_model("encoder.layer.3.attention.self.query.weight")
        (3, 'attention.self.query')
        >>> place_in_model("blk.11.ffn_down.weight"), place_in_model("proj.weight[q][2]")
        ((11, 'ffn_down'), (None, 'proj[q]'))
    """
    bare, *parts = name.split("[")
    words = bare.split(".")
    suffix = "".join(f"[{part}" for part in parts if not re.fullmatch(r"[\d,]+\]", part))
    if len(words) > 1 and words[-1] == "weight":
        words = words[:-1]
    at = next((index for index, word in enumerate(words) if word.isdigit()), None)
    if at is None:
        return None, ".".join(words) + suffix
    # What lies inside the numbered block; a matrix that is itself the numbered one is named by what holds it.
    inside = [word for word in words[at + 1 :] if not word.isdigit()] or words[:at] or words[at:]
    return int(words[at]), ".".join(inside) + suffix
