"""Which tensor of each expert belongs to which of the base, and whether they fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orthokit.checkpoints import Checkpoint
from orthokit.errors import CheckpointError, OptionError, ShapeError

__all__ = ["Matched", "Rename", "matched"]

Rename = Mapping[str, str] | Callable[[str], str | None] | None

# Tensors with a row per token, by the names that models give them.
_VOCABULARY = re.compile(r"embed|lm_head|wte|word|output\.weight|decoder\.bias|shared")


@dataclass(frozen=True)
class Matched:
    """The tensors of the experts under the names of the base.

    Args:
        names: By name in the base, the name in each expert, ``None`` where it has no such tensor.
        left_out: By expert, the names of its tensors that the base does not have.
    """

    names: dict[str, tuple[str | None, ...]]
    left_out: dict[int, list[str]]


def matched(base: Checkpoint, experts: Sequence[Checkpoint], *, rename: Rename, missing: str) -> Matched:
    """Bring the names of the experts to those of the base.

    Args:
        base: The model that says which tensors there are.
        experts: The others.
        rename: Name in an expert to name in the base, as mapping (others stay) or function (``None``: leave it out).
        missing: ``"error"`` or ``"base"``, for a tensor that an expert does not have.

    Raises:
        OptionError: Two tensors get one name, or ``missing`` is something else.
        CheckpointError: An expert lacks tensors.
        ShapeError: Tensors of one name have different shapes.
    """
    if missing not in ("error", "base"):
        raise OptionError(f"missing must be 'error' or 'base'; got {missing!r}.")
    found = [_renamed(expert, rename) for expert in experts]
    names = {name: tuple(there.get(name) for there in found) for name in base}
    left_out = {i: sorted(own for name, own in there.items() if name not in base) for i, there in enumerate(found)}
    for index, (expert, there) in enumerate(zip(experts, found, strict=True)):
        if not any(name in base for name in there):
            raise CheckpointError(
                f"no tensor of expert {index} ({expert.path}) has a name of the base ({base.path}): the expert has "
                f"{_few(list(there))}, the base {_few(base.names())}. {_hint(base, there)}"
            )
        lacking = [name for name in base if name not in there]
        if lacking and missing == "error":
            raise CheckpointError(
                f"expert {index} ({expert.path}) lacks {len(lacking)} of the {len(base)} tensors of the base: "
                f"{_few(lacking)}. {_hint(base, there)} To keep the base there, pass missing='base'."
            )
    _check_shapes(base, experts, names)
    return Matched(names, {index: own for index, own in left_out.items() if own})


def _renamed(expert: Checkpoint, rename: Rename) -> dict[str, str]:
    """By new name, the old one."""
    found: dict[str, str] = {}
    for own in expert:
        name = own if rename is None else rename.get(own, own) if isinstance(rename, Mapping) else rename(own)
        if name is None:
            continue
        if name in found:
            raise OptionError(f"rename gives {found[name]!r} and {own!r} of {expert.path} the one name {name!r}.")
        found[name] = own
    return found


def _hint(base: Checkpoint, there: Mapping[str, str]) -> str:
    """What to pass when all names differ by one beginning."""
    for name in there:
        for own in (one for one in base if one != name):
            if name.endswith(f".{own}") and all(f"{name.removesuffix(own)}{one}" in there for one in base):
                beginning = name.removesuffix(own)
                return f"Its names begin with {beginning!r}: pass rename=lambda name: name.removeprefix({beginning!r})."
            if own.endswith(f".{name}") and all(one.removeprefix(own.removesuffix(name)) in there for one in base):
                beginning = own.removesuffix(name)
                return f"It leaves out {beginning!r}: pass rename=lambda name: {beginning!r} + name."
        break
    return "Where names differ only, pass rename=."


def _check_shapes(base: Checkpoint, experts: Sequence[Checkpoint], names: Mapping[str, Sequence[str | None]]) -> None:
    wrong = []
    vocabulary = True
    for name, owns in names.items():
        for index, (expert, own) in enumerate(zip(experts, owns, strict=True)):
            if own is None or expert.shape(own) == base.shape(name):
                continue
            ours, theirs = base.shape(name), expert.shape(own)
            wrong.append(f"{name!r} is {ours} in the base and {theirs} in expert {index}")
            vocabulary &= bool(_VOCABULARY.search(name)) and len(ours) > 0 and ours[1:] == theirs[1:]
    if not wrong:
        return
    shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    if vocabulary:
        raise ShapeError(
            f"the vocabularies differ: {shown}. Row i stands for another token there; give the expert the tokenizer "
            "of the base (resize its embeddings) before merging."
        )
    raise ShapeError(f"tensors of one name must have one shape: {shown}. Merge models of one architecture only.")


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
