"""The entry point: model or state dict to table."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from orthokit.errors import NothingMatchedWarning, OptionError
from orthokit.matrices.collect import Entry, collect
from orthokit.matrices.rules import Context, Verdict, decide
from orthokit.matrices.splits import Sizes, split
from orthokit.matrices.table import LeftOut, MatrixBlock, MatrixTable

__all__ = ["Pattern", "matrices"]

Pattern = str | Callable[[str], bool] | Sequence[str | Callable[[str], bool]]


def matrices(
    model_or_state_dict: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    split_heads: int | Mapping[str, int] | None = None,
    split_fused: bool | Mapping[str, Sizes] | None = None,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
) -> MatrixTable:
    r"""Which parameters of a model are matrices, how each is read, and why the others are not.

    Every parameter name gets a row: as one or more blocks ``(*batch, out, in)``, or left out with a reason.

    ==================  ===========================  =========================================
    parameter           stored                       read as
    ==================  ===========================  =========================================
    linear              (out, in)                    the same
    convolution         (out, in / groups, k...)     (out, in k); with groups (groups, out / groups, in k / groups)
    its transpose       (in, out / groups, k...)     (out k, in); with groups batched likewise
    Conv1D of GPT-2     (in, out)                    (out, in), a transposed view
    stack (experts)     (n, out, in)                 a batch of n
    bilinear            (out, in1, in2)              a batch of out forms (in1, in2)
    LSTM, GRU           (gates hidden, in)           the same; ``split_fused`` takes the gates apart
    fused q, k, v       (q + k + v, in)              the same; ``split_fused`` takes the parts apart
    ==================  ===========================  =========================================

    Left out: embeddings, the output head over the vocabulary, second names of tied tensors, norms, biases, vectors,
    scalars, matrices with one row or one column, empty tensors, integer tensors, and what ``include`` and ``exclude``
    say. A module tells its layer types; a state dict is judged by names (Hugging Face Llama, GPT-2, BERT and the like)
    and shapes, and the reason says what was assumed.

    Args:
        model_or_state_dict: Module, state dict, or (name, tensor) pairs such as ``model.named_parameters()``. Tensors
            on the meta device will do: only shapes are read.
        split_heads: Number of query heads, for all attention projections found by name; or ``{pattern: heads}`` with
            shell patterns over parameter names. q, k and v are batched by rows, ``(heads, d_head, in)``; the output
            projection by columns, ``(heads, out, d_head)``. With one number, k and v get as many heads of the same
            width as they have room for (grouped-query attention). A fused projection is split into q, k, v as
            well. Default: none.
        split_fused: ``True`` takes fused projections and recurrent gates apart where names and shapes tell how;
            ``{pattern: [q_rows, k_rows, v_rows]}`` or ``{pattern: {"q": rows, ...}}`` says how. Default: none.
        include: Shell pattern(s) or function(s) of the name; only parameters that match one can be blocks.
        exclude: The same; what matches one is left out.

    Returns:
        The table: length, iteration and indexing give :class:`MatrixBlock` rows.

    Raises:
        DtypeError: The source is no model, state dict or list of pairs.
        ParameterError: A name is given twice.
        OptionError: An option has the wrong form.
        ShapeError: Given heads or row counts do not fit a parameter they match.

    Warns:
        NothingMatchedWarning: A pattern matches no parameter, or no parameter is a matrix.

    Example:
        >>> import torch
        >>> from orthokit.matrices import matrices
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 5))
        >>> table = matrices(net)
        >>> {block.name: block.shape for block in table}
        {'0.weight': (8, 27), '2.weight': (5, 8)}
        >>> [(row.name, row.reason) for row in table.left_out][1]
        ('1.weight', 'norm scale: a vector')

        A fused projection and its heads:

        >>> weights = {"h.0.attn.c_attn.weight": torch.randn(12, 36), "h.0.attn.c_attn.bias": torch.zeros(36)}
        >>> {block.name: block.shape for block in matrices(weights, split_fused=True, split_heads=4)}
        {'h.0.attn.c_attn.weight[q]': (4, 3, 12), 'h.0.attn.c_attn.weight[k]': (4, 3, 12),
        'h.0.attn.c_attn.weight[v]': (4, 3, 12)}

    Numerics:
        No arithmetic is done; the cost is a few microseconds per parameter. The blocks of a parameter cover each of its
        entries exactly once.

    References:
        The flattening of convolutions to ``(out, in k)`` follows K. Jordan et al., "Muon: an optimizer for hidden
        layers in neural networks" (2024). Unlike there, grouped convolutions and stacks are batched, so that a block is
        always one linear map.
    """
    _check_options(split_heads, split_fused)
    entries = collect(model_or_state_dict)
    context = Context(entries)
    wanted, unwanted = _predicates("include", include, entries), _predicates("exclude", exclude, entries)
    for option, value in (("split_heads", split_heads), ("split_fused", split_fused)):
        if isinstance(value, Mapping):
            _predicates(option, list(value), entries)
    rows: list[MatrixBlock | LeftOut] = []
    for entry in entries:
        verdict = decide(entry, context)
        if verdict.axes is not None and wanted and not any(test(entry.name) for test in wanted):
            verdict = Verdict("excluded", "not asked for: include does not match it")
        elif verdict.axes is not None and any(test(entry.name) for test in unwanted):
            verdict = Verdict("excluded", "taken out: exclude matches it")
        rows += _rows(entry, verdict, context, split_fused, split_heads)
    table = MatrixTable(rows)
    if not table.parameters():
        _warn_empty(table)
    return table


def _rows(
    entry: Entry,
    verdict: Verdict,
    context: Context,
    split_fused: bool | Mapping[str, Sizes] | None,
    split_heads: int | Mapping[str, int] | None,
) -> list[MatrixBlock | LeftOut]:
    dtype = entry.tensor.dtype if entry.tensor is not None else None
    parts = split(entry, verdict, context, split_fused, split_heads)
    if not parts or dtype is None:
        return [LeftOut(entry.name, entry.shape, verdict.rule, verdict.reason, dtype, entry.trainable)]
    block = MatrixBlock(entry.name, entry.name, parts[0].axes.layout(), verdict.rule, "", dtype, entry.trainable)
    return [
        replace(
            block,
            name=f"{entry.name}[{part.suffix}]" if part.suffix else entry.name,
            layout=part.axes.layout(),
            reason=verdict.reason + part.note,
        )
        for part in parts
    ]


def _check_options(split_heads: object, split_fused: object) -> None:
    if isinstance(split_heads, bool) or not isinstance(split_heads, int | Mapping | None):
        raise OptionError(f"split_heads is a number of heads or a dict of pattern: heads; found {split_heads!r}.")
    if not isinstance(split_fused, bool | Mapping | None):
        raise OptionError(f"split_fused is True or a dict of pattern: row counts; found {split_fused!r}.")


def _predicates(option: str, pattern: object, entries: list[Entry]) -> list[Callable[[str], bool]]:
    """Functions of a name; warns for each pattern that fits no name."""
    if pattern is None:
        return []
    given = [pattern] if isinstance(pattern, str) or callable(pattern) else pattern
    if not isinstance(given, Sequence) or not all(isinstance(one, str) or callable(one) for one in given):
        raise OptionError(f"{option} takes patterns such as '*.attn.*' or functions of a name; found {pattern!r}.")
    tests = []
    names = [entry.name for entry in entries]
    for one in given:
        test = (lambda name, p=one: fnmatchcase(name, p)) if isinstance(one, str) else one
        if not any(test(name) for name in names):
            shown, near = (repr(one), one.strip("*")) if isinstance(one, str) else ("the function", "weight")
            close = difflib.get_close_matches(near, names, n=3, cutoff=0.0)
            hint = f" Closest: {', '.join(map(repr, close))}." if close else " The model has no parameters."
            warnings.warn(f"{option}: {shown} matches no parameter.{hint}", NothingMatchedWarning, stacklevel=3)
        tests.append(test)
    return tests


def _warn_empty(table: MatrixTable) -> None:
    left = table.left_out
    examples = "; ".join(f"{row.name!r} ({row.reason})" for row in left[:3]) + (" ..." if len(left) > 3 else "")
    found = f"all {len(left)} are left out: {examples}" if left else "the model has none at all"
    warnings.warn(f"No parameter is treated as a matrix; {found}.", NothingMatchedWarning, stacklevel=3)
