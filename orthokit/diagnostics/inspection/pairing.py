"""Which tensor of the base belongs to which of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orthokit.diagnostics.entries import rounding_noise
from orthokit.diagnostics.inspection.measures import relative_change
from orthokit.diagnostics.inspection.sources import Source

__all__ = ["Pairing", "paired"]


@dataclass(frozen=True)
class Pairing:
    """The base beside the model.

    Args:
        here: The model.
        there: The base; ``None``: there is none.
        names: By name in the model, the name in the base, where both have the same shape.
        unmatched: The other tensors, and why.
        notes: What was assumed.
    """

    here: Source
    there: Source | None = None
    names: dict[str, str] = field(default_factory=dict)
    unmatched: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str | None:
        """What the base is called."""
        return None if self.there is None else self.there.name

    def read(self, name: str) -> Tensor | None:
        """The tensor of the base that belongs to one of the model."""
        return self.there.read(self.names[name]) if self.there is not None and name in self.names else None

    def precision(self, name: str, W: Tensor, W0: Tensor) -> dict[str, Any]:
        """How exactly the two files keep a tensor, as an option of :func:`~orthokit.diagnostics.weight_change`.

        Args:
            name: In the model.
            W: The matrix in the model.
            W0: That in the base.
        """
        if self.there is None:
            return {}
        sides = ((self.here, name, W), (self.there, self.names[name], W0))
        types = [source.dtypes[own] for source, own, _ in sides]
        errors = [source.rounding(own) for source, own, _ in sides]
        if errors == [None, None]:
            # What was rounded most decides what can be told apart.
            return {"dtype": max(types, key=lambda dtype: torch.finfo(dtype).eps)}
        both = [
            rounding_noise(values, dtype=dtype) if error is None else error
            for error, dtype, (_, _, values) in zip(errors, types, sides, strict=True)
        ]
        return {"rounding": math.hypot(*both)}

    def change(self, name: str) -> float | None:
        """The relative change of a tensor that is no matrix; ``None`` where there is nothing to compare."""
        other = self.read(name)
        if other is None or not other.is_floating_point():
            return None
        own = self.here.read(name)
        return relative_change(own, other.to(own.device))


def paired(here: Source, there: Source | None) -> Pairing:
    """Tensors of equal name and shape; where one model puts a beginning before all names, without it.

    Args:
        here: The model.
        there: The base, or ``None``.
    """
    if there is None:
        return Pairing(here)
    add, drop = _beginning(here.shapes, there.shapes)
    names: dict[str, str] = {}
    unmatched: list[dict[str, str]] = []
    for name, shape in here.shapes.items():
        own = add + name if add else name.removeprefix(drop)
        if own not in there.shapes:
            unmatched.append({"name": name, "reason": f"not in {there.name}"})
        elif there.shapes[own] != shape:
            sizes = f"{_times(shape)} in {here.name} and {_times(there.shapes[own])} in {there.name}"
            unmatched.append({"name": name, "reason": f"another shape: {sizes}"})
        else:
            names[name] = own
    taken = set(names.values()) | {add + name if add else name.removeprefix(drop) for name in here.shapes}
    unmatched += [{"name": name, "reason": f"not in {here.name}"} for name in there.shapes if name not in taken]
    notes = []
    if add or drop:
        longer = there.name if add else here.name
        notes.append(f"names of {longer} are compared without their beginning {(add or drop)!r}")
    if not names:
        notes.append(
            f"{there.name} is no base of {here.name}: no tensor has the same name and shape, so nothing is compared"
        )
    elif unmatched:
        many = "1 tensor is" if len(unmatched) == 1 else f"{len(unmatched)} tensors are"
        notes.append(f"{many} in one of the two models only, or of another shape there")
    return Pairing(here, there, names, unmatched, notes)


def _beginning(here: Iterable[str], there: Iterable[str]) -> tuple[str, str]:
    """What to put before the names of the model, or to take from them, so that more are found in the base."""
    ours, theirs = set(here), set(there)
    best, found = ("", ""), len(ours & theirs)
    for longer, shorter, adds in ((theirs, ours, True), (ours, theirs, False)):
        beginnings = {
            name[: len(name) - len(end)]
            for name in longer
            for end in (name.split(".", words)[-1] for words in (1, 2, 3))
            if end in shorter
        } - {""}
        for beginning in sorted(beginnings):
            many = sum(beginning + name in longer for name in shorter)
            if many > found:
                best, found = ((beginning, "") if adds else ("", beginning)), many
    return best


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
