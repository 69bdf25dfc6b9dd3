"""The result of :func:`orthokit.matrices.matrices`: matrix blocks, left-out parameters, and the table of both."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, overload

import torch
from jaxtyping import Shaped
from torch import Tensor

from orthokit.errors import DtypeError, ShapeError, UnknownNameError, unknown_name
from orthokit.matrices.layout import Layout

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LeftOut", "MatrixBlock", "MatrixTable"]

_ROWS_IN_TEXT = 60


@dataclass(frozen=True)
class MatrixBlock:
    r"""One matrix, or one batch of equally shaped matrices, inside a parameter.

    A block is a rule, not data: it holds no tensor, and :meth:`view`, :meth:`read` and :meth:`write` work on any
    tensor shaped like the parameter (the weight, its gradient, its momentum).

    Args:
        name: Parameter name, plus a suffix such as ``[q]`` for a part of a fused parameter.
        parameter: Parameter name.
        layout: How the parameter is read.
        rule: One word for the reading: ``"linear"``, ``"conv"``, ``"conv_transposed"``, ``"conv1d_transposed"``,
            ``"stack"``, ``"stack_transposed"``, ``"bilinear"``, ``"recurrent"``, ``"fused"``.
        reason: The reading in plain words.
        dtype: Type of the parameter.
        trainable: Whether the parameter takes gradients; ``None`` where a state dict does not say.

    Example:
        >>> import torch
        >>> from orthokit.matrices import matrices
        >>> weight = torch.randn(6, 3, 5, 5)
        >>> block = matrices({"features.conv.weight": weight})[0]
        >>> block.shape
        (6, 75)
        >>> before = weight.clone()
        >>> _ = block.view(weight).mul_(2)          # in place: reaches the parameter
        >>> torch.equal(weight, 2 * before)
        True
    """

    name: str
    parameter: str
    layout: Layout
    rule: str
    reason: str
    dtype: torch.dtype
    trainable: bool | None

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self.layout.parameter_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(*batch, out, in)`` of the block."""
        return self.layout.shape

    @property
    def numel(self) -> int:
        """Number of entries of the block."""
        return prod(self.shape)

    @property
    def count(self) -> int:
        """Number of matrices in the block: 1, or the product of its batch dimensions."""
        return prod(self.shape[:-2])

    def _expand(self, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != self.parameter_shape:
            raise ShapeError(
                f"{self.name!r} reads tensors shaped like its parameter, {self.parameter_shape}; "
                f"found {tuple(tensor.shape)}. Pass the whole weight, gradient or momentum."
            )
        return self.layout.expand(tensor)

    def view(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*batch out in"]:
        """The block inside ``tensor`` as ``(*batch, out, in)``, sharing its memory; never a copy.

        Args:
            tensor: Any tensor shaped like the parameter.

        Returns:
            A view: writing into it in place writes into ``tensor``. For a contiguous tensor every rule has one.

        Raises:
            ShapeError: ``tensor`` is not shaped like the parameter, or its strides allow no view (a convolution in
                ``channels_last`` memory format). :meth:`read` and :meth:`write` work there too.
        """
        expanded = self._expand(tensor)
        try:
            return expanded.view(self.layout.merged(tuple(expanded.shape)))
        except RuntimeError as error:
            raise ShapeError(
                f"{self.name!r} has no view of a tensor with strides {tuple(tensor.stride())}: its rows or columns do "
                "not lie evenly in memory. Use .read(tensor) to look and .write(tensor, value) to change it."
            ) from error

    def read(self, tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*batch out in"]:
        """The block inside ``tensor``: the view where the strides allow one, otherwise a copy.

        Use it to look, and :meth:`write` to change: a write into a copy is lost.

        Args:
            tensor: Any tensor shaped like the parameter.

        Returns:
            Tensor ``(*batch, out, in)``.

        Raises:
            ShapeError: ``tensor`` is not shaped like the parameter.
        """
        expanded = self._expand(tensor)
        return expanded.reshape(self.layout.merged(tuple(expanded.shape)))

    @torch.no_grad()
    def write(self, tensor: Shaped[Tensor, "*shape"], value: Shaped[Tensor, "*batch out in"]) -> None:
        """Set the block inside ``tensor`` to ``value``, whatever the strides of ``tensor``; nothing else changes.

        Args:
            tensor: Any tensor shaped like the parameter; changed in place, outside autograd.
            value: Shape of the block.

        Raises:
            ShapeError: A shape does not fit; ``tensor`` is unchanged.
            DtypeError: ``value`` is complex and ``tensor`` is real; ``tensor`` is unchanged.
        """
        expanded = self._expand(tensor)
        if tuple(value.shape) != self.shape:
            raise ShapeError(f"{self.name!r} takes values of shape {self.shape}; found {tuple(value.shape)}.")
        if value.is_complex() and not tensor.is_complex():
            raise DtypeError(f"{self.name!r} is {tensor.dtype} and the value {value.dtype}; take its real part first.")
        expanded.copy_(value.reshape(expanded.shape))


@dataclass(frozen=True)
class LeftOut:
    """One parameter that is not treated as a matrix, and why.

    Args:
        name: Parameter name.
        shape: Its shape.
        rule: One word: ``"embedding"``, ``"head"``, ``"tied"``, ``"norm"``, ``"bias"``, ``"vector"``, ``"scalar"``,
            ``"empty"``, ``"buffer"``, ``"uninitialised"``, ``"excluded"``.
        reason: The same in plain words.
        dtype: Its type; ``None`` where there is no tensor.
        trainable: Whether it takes gradients; ``None`` where a state dict does not say.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    reason: str
    dtype: torch.dtype | None
    trainable: bool | None

    @property
    def numel(self) -> int:
        """Number of entries; 0 for a second name of a tied parameter and for what is not initialised."""
        return 0 if self.rule in ("tied", "uninitialised") or self.dtype is None else prod(self.shape)


class MatrixTable:
    """All parameters of a model, in order: as matrix blocks, or left out with a reason.

    ``len``, iteration and indexing (by position or by block name) give the :class:`MatrixBlock` rows.

    Args:
        rows: Blocks and left-out parameters in the order of the model.

    Example:
        >>> import torch
        >>> from orthokit.matrices import matrices
        >>> table = matrices(torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 6)))
        >>> [block.name for block in table], [row.name for row in table.left_out]
        (['1.weight'], ['0.weight', '1.bias'])
        >>> print(table.summary())
        1 matrix holds 48 of 454 parameters; 2 left out.
    """

    def __init__(self, rows: list[MatrixBlock | LeftOut]) -> None:
        self.rows = list(rows)
        self._blocks = [row for row in self.rows if isinstance(row, MatrixBlock)]
        self._by_name = {block.name: block for block in self._blocks}

    @property
    def left_out(self) -> list[LeftOut]:
        """The parameters that are not matrices, in order."""
        return [row for row in self.rows if isinstance(row, LeftOut)]

    def parameters(self) -> list[str]:
        """Names of the parameters that hold at least one block, in order, each once."""
        return list(dict.fromkeys(block.parameter for block in self._blocks))

    def blocks(self, parameter: str) -> list[MatrixBlock]:
        """The blocks of one parameter; empty if it is left out.

        Raises:
            UnknownNameError: The model has no such parameter.
        """
        found = [block for block in self._blocks if block.parameter == parameter]
        if not found and all(row.name != parameter for row in self.left_out):
            names = [row.parameter if isinstance(row, MatrixBlock) else row.name for row in self.rows]
            raise unknown_name("parameter", parameter, names)
        return found

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[MatrixBlock]:
        return iter(self._blocks)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in self._blocks

    @overload
    def __getitem__(self, key: int | str) -> MatrixBlock: ...
    @overload
    def __getitem__(self, key: slice) -> list[MatrixBlock]: ...
    def __getitem__(self, key: int | str | slice) -> MatrixBlock | list[MatrixBlock]:
        if not isinstance(key, str):
            return self._blocks[key]
        if key in self._by_name:
            return self._by_name[key]
        for row in self.left_out:
            if row.name == key:
                raise UnknownNameError(f"{key!r} is not a matrix here. {row.reason[0].upper()}{row.reason[1:]}.")
        raise unknown_name("matrix", key, self._by_name)

    def summary(self) -> str:
        """The table in one sentence."""
        matrices = sum(block.count for block in self._blocks)
        held = sum(block.numel for block in self._blocks)
        tied = sum(row.rule == "tied" for row in self.left_out)
        rest = len(self.left_out) - tied
        total = held + sum(row.numel for row in self.left_out)
        head = f"{matrices} matrices hold" if matrices != 1 else "1 matrix holds"
        if matrices != len(self):
            head = f"{matrices} matrices in {len(self)} {'block' if len(self) == 1 else 'blocks'} hold"
        names = f", {tied} more {'name' if tied == 1 else 'names'} tied" if tied else ""
        return f"{head} {_short(held)} of {_short(total)} parameters; {rest} left out{names}."

    def to_frame(self) -> pd.DataFrame:
        """One row per block or left-out parameter, in the order of the model.

        Returns:
            Frame with the columns ``name``, ``parameter``, ``rule``, ``shape``, ``matrix shape`` (``None`` where left
            out), ``numel``, ``dtype``, ``trainable``, ``reason``.
        """
        import pandas as pd

        columns = ["name", "parameter", "rule", "shape", "matrix shape", "numel", "dtype", "trainable", "reason"]
        records = [
            (
                row.name,
                row.parameter if isinstance(row, MatrixBlock) else row.name,
                row.rule,
                row.parameter_shape if isinstance(row, MatrixBlock) else row.shape,
                row.shape if isinstance(row, MatrixBlock) else None,
                row.numel,
                _dtype(row.dtype),
                row.trainable,
                row.reason,
            )
            for row in self.rows
        ]
        return pd.DataFrame.from_records(records, columns=columns)

    def _cells(self) -> list[tuple[str, str, str, str, str]]:
        return [
            (
                row.name,
                row.rule if isinstance(row, MatrixBlock) else f"({row.rule})",
                _times(row.shape) if isinstance(row, MatrixBlock) else "left out",
                _short(row.numel),
                row.reason,
            )
            for row in self.rows
        ]

    def __repr__(self) -> str:
        header = ("name", "rule", "matrix", "size", "reason")
        cells = self._cells()
        hidden = len(cells) - _ROWS_IN_TEXT
        if hidden > 0:
            keep = _ROWS_IN_TEXT // 2
            cells = [*cells[:keep], (f"... {hidden} more rows", "", "", "", "see .to_frame()"), *cells[-keep:]]
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(4)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}"
            for row in (header, *cells)
        ]
        return "\n".join(line.rstrip() for line in (self.summary(), *lines))

    def _repr_html_(self) -> str:
        header = "".join(f'<th scope="col">{name}</th>' for name in ("name", "rule", "matrix", "size", "reason"))
        body = "".join(
            f'<tr><th scope="row"><code>{html.escape(name)}</code></th>'
            f"<td>{html.escape(rule)}</td><td>{shape}</td><td>{size}</td><td>{html.escape(reason)}</td></tr>"
            for name, rule, shape, size, reason in self._cells()
        )
        return (
            '<div role="region" aria-label="Matrices of the model" tabindex="0" style="max-height:26em;overflow:auto">'
            f"<table><caption>{html.escape(self.summary())}</caption>"
            f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _dtype(dtype: torch.dtype | None) -> str:
    return "none" if dtype is None else str(dtype).removeprefix("torch.")


def _short(count: int) -> str:
    """A count with three figures: ``950``, ``10.6 M``."""
    for unit, factor in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:.0f} {unit}"
    return str(count)
