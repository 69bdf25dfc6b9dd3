"""Splits made on request: fused projections into their parts, attention projections into heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from orthokit.errors import OptionError, ShapeError
from orthokit.matrices.collect import Entry
from orthokit.matrices.layout import BATCH, IN, OUT, Axes
from orthokit.matrices.names import (
    FUSED_GATE,
    FUSED_KV,
    FUSED_QKV,
    INTERLEAVED_QKV,
    KEY_VALUE,
    QUERY,
    is_attention_output,
)
from orthokit.matrices.rules import Context, Verdict

__all__ = ["Heads", "Part", "Sizes", "split"]

Sizes = Sequence[int] | Mapping[str, int]
Heads = int | Mapping[str, int] | None

_RECURRENT = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n")}


@dataclass(frozen=True)
class Part:
    """One part of a parameter: the suffix of its name, its axes, and words that are added to the reason."""

    suffix: str
    axes: Axes
    note: str


def match(name: str, patterns: Mapping[str, object]) -> str | None:
    """The first pattern a name fits, or ``None``."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def split(
    entry: Entry, verdict: Verdict, context: Context, fused: bool | Mapping[str, Sizes] | None, heads: Heads
) -> list[Part]:
    """The parts of one matrix parameter: one part without suffix unless a split was asked for and is known.

    Args:
        entry: The parameter.
        verdict: How it is read as a whole.
        context: The rest of the model.
        fused: The option ``split_fused``.
        heads: The option ``split_heads``.

    Returns:
        Parts that together cover the parameter exactly once.

    Raises:
        ShapeError: Given sizes or heads do not fit the parameter.
    """
    axes = verdict.axes
    if axes is None:
        return []
    whole = [Part("", axes, "")]
    count = _heads_for(entry, heads)
    sizes = None
    if isinstance(fused, Mapping):
        pattern = match(entry.name, fused)
        sizes = fused[pattern] if pattern is not None else None
    # Heads belong to q, k and v, so a fused projection comes apart first.
    wanted = sizes is not None or fused is True or (count is not None and _is_fused_attention(entry))
    if sizes is None and wanted and INTERLEAVED_QKV.match(entry.role) and len(axes.sizes) == 2:
        note = "; query_key_value left whole: its rows alternate by head, give split_heads to split it"
        return _interleaved(axes, count) or [Part("", axes, note)]
    parts = whole
    if wanted:
        known = _given(entry, axes, sizes) if sizes is not None else _known(entry, axes, context)
        if known:
            parts = _cut(axes, known, entry, context)
        elif _is_fused_attention(entry):
            note = "; parts unknown, left whole: give split_fused={name: [q_rows, k_rows, v_rows]}"
            return [Part("", axes, note)]
    return parts if count is None else _split_heads(entry, parts, count, context, isinstance(heads, Mapping))


def _is_fused_attention(entry: Entry) -> bool:
    return bool(FUSED_QKV.match(entry.role) or FUSED_KV.match(entry.role) or INTERLEAVED_QKV.match(entry.role))


def _given(entry: Entry, axes: Axes, sizes: Sizes) -> list[tuple[str, int]]:
    if isinstance(sizes, Mapping):
        known = [(str(label), int(rows)) for label, rows in sizes.items()]
    else:
        labels = {3: ("q", "k", "v"), 2: ("gate", "up") if FUSED_GATE.match(entry.role) else ("k", "v")}
        names = labels.get(len(sizes), tuple(map(str, range(len(sizes)))))
        known = [(label, int(rows)) for label, rows in zip(names, sizes, strict=True)]
    rows = axes.size(OUT)
    if sum(size for _, size in known) != rows or any(size <= 0 for _, size in known):
        raise ShapeError(
            f"split_fused for {entry.name!r} must give positive row counts that add up to its {rows} rows; "
            f"found {[size for _, size in known]}."
        )
    if axes.labels.count(OUT) != 1:
        raise ShapeError(f"{entry.name!r} is read as {axes.labels}; only plain rows can be split.")
    return known


def _known(entry: Entry, axes: Axes, context: Context) -> list[tuple[str, int]] | None:
    """Parts that the name and the shapes around it give away."""
    rows, columns, role = axes.size(OUT), axes.size(IN), entry.role
    if axes.labels.count(OUT) != 1:
        return None
    if FUSED_GATE.match(role) and rows % 2 == 0:
        return [("gate", rows // 2), ("up", rows // 2)]
    if entry.leaf.startswith(("weight_ih", "weight_hh")):
        return _gates(entry, rows, context)
    if FUSED_QKV.match(role) and rows == 3 * columns:
        return [(label, columns) for label in ("q", "k", "v")]
    if FUSED_KV.match(role) and rows == 2 * columns:
        return [("k", columns), ("v", columns)]
    if FUSED_QKV.match(role):
        return _grouped(entry, rows, context)
    return None


def _gates(entry: Entry, rows: int, context: Context) -> list[tuple[str, int]] | None:
    suffix = entry.leaf[len("weight_ih") :]
    # With a projection (LSTM proj_size) weight_hh has fewer columns than hidden units; weight_hr has them all.
    source = context.sibling(entry, f"weight_hr{suffix}") or context.sibling(entry, f"weight_hh{suffix}")
    hidden = source.shape[1] if source is not None and len(source.shape) == 2 else 0
    names = _RECURRENT.get(rows // hidden if hidden and rows % hidden == 0 else 0, ())
    return [(name, hidden) for name in names] or None


def _grouped(entry: Entry, rows: int, context: Context) -> list[tuple[str, int]] | None:
    """Grouped-query attention: the output projection beside it has as many columns as q has rows."""
    parent = entry.segments[:-2]
    for path, other in context.by_path.items():
        segments = path.split(".")
        beside = segments[: len(parent)] == parent and segments[-1] == "weight" and len(other.shape) == 2
        if beside and len(segments) <= len(parent) + 3 and is_attention_output(segments):
            q = other.shape[1]
            if 0 < q < rows and (rows - q) % 2 == 0:
                return [("q", q), ("k", (rows - q) // 2), ("v", (rows - q) // 2)]
    return None


def _cut(axes: Axes, known: list[tuple[str, int]], entry: Entry, context: Context) -> list[Part]:
    dim, start, parts = axes.dim(OUT), 0, []
    # GPT-OSS keeps gate and up rows of its expert stacks alternating, and is alone in giving the stack a bias.
    alternating = len(axes.sizes) == 3 and [label for label, _ in known] == ["gate", "up"]
    alternating = alternating and context.sibling(entry, f"{entry.leaf}_bias") is not None
    for index, (label, rows) in enumerate(known):
        part = axes.copy()
        if alternating:
            part.take(dim, index, axes.sizes[dim], 2)
            parts.append(Part(label, part, f"; part {label}: every second row from {index}"))
        else:
            part.take(dim, start, start + rows)
            parts.append(Part(label, part, f"; part {label}: rows {start} to {start + rows - 1}"))
        start += rows
    return parts


def _interleaved(axes: Axes, heads: int | None) -> list[Part]:
    """GPT-NeoX and BLOOM: rows are (head, q | k | v, width)."""
    rows = axes.size(OUT)
    if heads is None or rows % (3 * heads) or axes.labels.count(OUT) != 1:
        return []
    parts = []
    for index, label in enumerate(("q", "k", "v")):
        part, dim = axes.copy(), axes.dim(OUT)
        part.split(dim, (heads, 3, rows // (3 * heads)), (BATCH, "part", OUT)).pick(dim + 1, index)
        parts.append(Part(label, part, f"; part {label} of each of {heads} heads (rows alternate by head)"))
    return parts


def _heads_for(entry: Entry, heads: Heads) -> int | None:
    if heads is None or len(entry.shape) != 2:
        return None
    if isinstance(heads, Mapping):
        pattern = match(entry.name, heads)
        count = heads[pattern] if pattern is not None else None
    else:
        projection = QUERY.match(entry.role) or KEY_VALUE.match(entry.role) or is_attention_output(entry.segments)
        count = heads if projection or _is_fused_attention(entry) else None
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise OptionError(f"split_heads takes a positive number of heads; found {count!r} for {entry.name!r}.")
    return count


def _split_heads(entry: Entry, parts: list[Part], heads: int, context: Context, own: bool) -> list[Part]:
    if is_attention_output(entry.segments):
        return [_by_heads(entry, parts[0], IN, heads)]
    sizes = {part.suffix: part.axes.size(OUT) for part in parts}
    if "q" in sizes and {"k", "v"} & set(sizes):
        counts = {label: _shared(entry, sizes["q"], rows, heads) for label, rows in sizes.items()}
    elif KEY_VALUE.match(entry.role) and not own and (query := _query_rows(entry, context)):
        counts = {"": _shared(entry, query, sizes[""], heads)}
    else:
        counts = dict.fromkeys(sizes, heads)
    return [_by_heads(entry, part, OUT, counts[part.suffix]) for part in parts]


def _query_rows(entry: Entry, context: Context) -> int | None:
    parent = entry.segments[: -1 if entry.leaf == entry.role else -2]
    for path, other in context.by_path.items():
        same = other.segments[: -1 if other.leaf == other.role else -2] == parent
        if same and len(other.shape) == 2 and QUERY.match(other.role) and path != entry.path:
            return other.shape[0]
    return None


def _shared(entry: Entry, query_rows: int, rows: int, heads: int) -> int:
    """Heads of k or v: as wide as the heads of q, and possibly fewer."""
    width = query_rows // heads
    if query_rows % heads or rows % width:
        raise ShapeError(f"{heads} heads do not fit {entry.name!r}: {query_rows} query rows, {rows} rows in this part.")
    return rows // width


def _by_heads(entry: Entry, part: Part, side: str, heads: int) -> Part:
    axes, size = part.axes.copy(), part.axes.size(side)
    if size % heads or axes.labels.count(side) != 1:
        raise ShapeError(
            f"split_heads={heads} does not divide the {size} {'rows' if side == OUT else 'columns'} of {entry.name!r}; "
            "give the number of heads of this projection, for example split_heads={'*.k_proj.weight': 8}."
        )
    axes.split(axes.dim(side), (heads, size // heads), (BATCH, side))
    where = "rows" if side == OUT else "columns"
    return Part(part.suffix, axes, f"{part.note}; {heads} heads of {size // heads} {where}")
