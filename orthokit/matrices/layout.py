"""How a parameter is read as a (batch of) ``out x in`` matrices, and written back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from jaxtyping import Shaped
from torch import Tensor

from orthokit.errors import OptionError

__all__ = ["Axes", "Layout"]

BATCH, OUT, IN = "batch", "out", "in"


@dataclass(frozen=True)
class Layout:
    """Steps that turn a parameter-shaped tensor into ``(*batch, out, in)``.

    ``steps`` only split, slice and permute dimensions, which is possible as a view whatever the strides are.
    ``counts`` says how many of the resulting dimensions belong to batch, rows and columns; only the merging of
    several dimensions into one row or column index can need a copy, and it comes last.
    """

    parameter_shape: tuple[int, ...]
    steps: tuple[tuple, ...]
    counts: tuple[int, int, int]

    def expand(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*expanded"]:
        """The part of ``tensor`` this layout covers, before rows and columns are merged. Always a view."""
        for kind, *args in self.steps:
            if kind == "unflatten":
                tensor = tensor.unflatten(args[0], args[1])
            elif kind == "slice":
                dim, start, stop, step = args
                tensor = tensor[(slice(None),) * dim + (slice(start, stop, step),)]
            elif kind == "select":
                tensor = tensor.select(args[0], args[1])
            else:
                tensor = tensor.permute(args[0])
        return tensor

    def merged(self, expanded: tuple[int, ...]) -> tuple[int, ...]:
        """The matrix shape that belongs to an expanded shape."""
        n_batch, n_out, _ = self.counts
        rows, columns = expanded[n_batch : n_batch + n_out], expanded[n_batch + n_out :]
        return (*expanded[:n_batch], prod(rows), prod(columns))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape ``(*batch, out, in)`` of the block."""
        return self.merged(tuple(self.expand(torch.empty(self.parameter_shape, device="meta")).shape))


class Axes:
    """Builds a :class:`Layout`: every dimension of a parameter carries the label batch, out or in.

    Args:
        shape: Shape of the parameter.
        labels: One of ``"batch"``, ``"out"``, ``"in"`` per dimension.
    """

    def __init__(self, shape: tuple[int, ...], labels: tuple[str, ...]) -> None:
        self.parameter_shape = tuple(shape)
        self.sizes = list(shape)
        self.labels = list(labels)
        self.steps: list[tuple] = []

    def copy(self) -> Axes:
        """An independent copy, to branch off one part."""
        twin = Axes(self.parameter_shape, ())
        twin.sizes, twin.labels, twin.steps = list(self.sizes), list(self.labels), list(self.steps)
        return twin

    def dim(self, label: str) -> int:
        """Index of the first dimension with this label."""
        return self.labels.index(label)

    def size(self, label: str) -> int:
        """Product of the sizes with this label: the number of rows, of columns or of matrices."""
        return prod(n for n, found in zip(self.sizes, self.labels, strict=True) if found == label)

    def split(self, dim: int, sizes: tuple[int, ...], labels: tuple[str, ...]) -> Axes:
        """Split one dimension into several."""
        if prod(sizes) != self.sizes[dim]:
            raise OptionError(
                f"A dimension of {self.sizes[dim]} does not split into {' x '.join(map(str, sizes))}; "
                "the product of the parts must be the whole."
            )
        self.steps.append(("unflatten", dim, sizes))
        self.sizes[dim : dim + 1] = sizes
        self.labels[dim : dim + 1] = labels
        return self

    def take(self, dim: int, start: int, stop: int, step: int = 1) -> Axes:
        """Keep ``start:stop:step`` of one dimension."""
        self.steps.append(("slice", dim, start, stop, step))
        self.sizes[dim] = len(range(start, stop, step))
        return self

    def pick(self, dim: int, index: int) -> Axes:
        """Keep one index of a dimension and drop the dimension."""
        self.steps.append(("select", dim, index))
        del self.sizes[dim], self.labels[dim]
        return self

    def layout(self) -> Layout:
        """The finished layout: batch dimensions first, then rows, then columns."""
        order = tuple(i for label in (BATCH, OUT, IN) for i, found in enumerate(self.labels) if found == label)
        steps = list(self.steps)
        if order != tuple(range(len(order))):
            steps.append(("permute", order))
        counts = (self.labels.count(BATCH), self.labels.count(OUT), self.labels.count(IN))
        return Layout(self.parameter_shape, tuple(steps), counts)
