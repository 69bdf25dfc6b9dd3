r"""Measured changes in plain words: one sentence a matrix, a few for a whole model.

The words say what a change is consistent with. They cannot say how it was made: any matrix can be reached by full
finetuning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orthokit.diagnostics._change_record import WeightChange

__all__ = ["describe_changes", "verdict"]

_NAMES = {
    "unchanged": "unchanged",
    "rounded": "changed by rounding only",
    "scaled": "rescaled as a whole",
    "rows": "rescaled by rows",
    "columns": "rescaled by columns",
    "oft": "consistent with OFT",
    "orthogonal_in": "consistent with a rotation of the inputs",
    "orthogonal_both": "consistent with rotations of both sides",
    "hra": "consistent with HRA",
    "lora": "consistent with LoRA",
    "pissa": "consistent with PiSSA",
    "dora": "consistent with DoRA",
    "general": "consistent with ordinary finetuning",
}
_KEPT = ("unchanged", "rounded")


def verdict(change: WeightChange) -> tuple[str, str]:
    r"""The kind of a change and one sentence that says on which numbers it rests.

    Args:
        change: From :func:`~orthokit.diagnostics.weight_change`.

    Returns:
        The slug, one of those of :class:`~orthokit.diagnostics.WeightChange`, and the sentence, without a full stop.

    Example:
        >>> import torch
        >>> from orthokit.diagnostics import weight_change
        >>> W0 = torch.eye(6) + torch.arange(36.0).reshape(6, 6) / 36
        >>> verdict(weight_change(W0, 1.25 * W0))
        ('scaled', 'multiplied by 1.25: consistent with weight decay or a rescaling')

    Numerics:
        Only words: every number is read from ``change``. Rotation fractions are always given beside that of a random
        change, :func:`~orthokit.diagnostics.random_rotation_fraction`.

    References:
        The thresholds are those of :func:`~orthokit.diagnostics.weight_change`.
    """
    return change.kind, _SENTENCES[change.kind](change)


def describe_changes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    r"""What finetuning did to a whole model, in two to four sentences.

    Args:
        rows: One mapping a matrix, with ``"name"``, ``"kind"`` and ``"relative_change"``, and where known ``"layer"``,
            ``"role"``, ``"change_rank"`` and ``"block_size"``; rows without a kind were not compared and are passed
            over.

    Returns:
        Sentences: which kinds there are, where the change is largest, what stayed as it was. Empty without a row that
        was compared.

    Example:
        >>> rows = [{"name": f"{i}.q", "kind": "lora", "relative_change": 0.01 * (i + 1), "layer": i, "role": "q",
        ...          "change_rank": 8} for i in range(3)]
        >>> describe_changes(rows)[0]
        'All 3 matrices are consistent with LoRA (rank 8).'
    """
    compared = [row for row in rows if row.get("kind")]
    if not compared:
        return []
    changed = [row for row in compared if row["kind"] not in _KEPT and row.get("relative_change") is not None]
    return [_census(compared), *_largest(changed), *_stayed(compared)]


def percent(share: float | None) -> str:
    """``0.0423`` as ``"4.2 %"``: two digits that count, three from ten per cent on."""
    if share is None:
        return "an unknown share"
    value = 100 * share
    if value >= 99.95 or value == 0:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 10 else f"{_digits(value)} %"


def _digits(value: float, count: int = 2) -> str:
    if value >= 10**count:
        return f"{value:.0f}"
    text = f"{value:.{count}g}"
    return text if "e" in text or len(text.replace(".", "").lstrip("0")) >= count else f"{value:#.{count}g}"


def _degrees(value: float | None) -> str:
    return f"{_digits(value or 0.0)} degrees"


def _turned(c: WeightChange) -> str:
    return f"rotated by {_degrees(c.rotation_angle)}"


def _spectrum(c: WeightChange) -> str:
    # Rounding moves the sorted singular values by less than the entries, all taken together.
    kept = c.spectrum_change is not None and c.noise is not None and c.spectrum_change <= c.noise
    return "spectrum kept" if kept else f"spectrum kept to {percent(c.spectrum_change)}"


def _rank(c: WeightChange) -> str:
    return f"change of rank {c.change_rank} (stable rank {c.change_stable_rank:.1f})"


def _oft(c: WeightChange) -> str:
    return f"{_turned(c)} in blocks of {c.block_size}, {_spectrum(c)}: consistent with OFT"


def _orthogonal_in(c: WeightChange) -> str:
    return f"{_turned(c)} over all inputs, not in blocks, {_spectrum(c)}: consistent with one rotation of the inputs"


def _hra(c: WeightChange) -> str:
    return (
        f"{_turned(c)} within {c.adapter_rank} directions, {_spectrum(c)}: consistent with HRA of rank {c.adapter_rank}"
    )


def _orthogonal_both(c: WeightChange) -> str:
    return (
        f"changed by {percent(c.relative_change)} with the {_spectrum(c)}, while an input rotation explains "
        f"{_share(c)}: consistent with rotations of both sides, as by POET or Pion"
    )


def _lora(c: WeightChange) -> str:
    return f"{_rank(c)}, {percent(c.relative_change)} of the weight: consistent with LoRA of rank {c.adapter_rank}"


def _pissa(c: WeightChange) -> str:
    return (
        f"{_rank(c)}, {percent(c.relative_change)} of the weight, along the {c.adapter_rank} leading directions of the "
        f"base: consistent with PiSSA of rank {c.adapter_rank}"
    )


def _dora(c: WeightChange) -> str:
    return (
        f"rows rescaled and a part of rank {c.adapter_rank}, together {percent(c.relative_change)} of the weight: "
        f"consistent with DoRA of rank {c.adapter_rank}"
    )


def _share(c: WeightChange) -> str:
    return f"{percent(c.rotation_fraction)} of it (of a random change {percent(c.random_rotation)})"


def _general(c: WeightChange) -> str:
    if c.relative_change is None:
        return "the base is zero, so there is nothing to compare with"
    rank = "full-rank change" if c.change_rank is None else "change without a clear rank"
    near = ""
    if c.noise is not None and c.relative_change < 5 * c.noise:
        near = f", so near to the rounding of {c.stored} ({percent(c.noise)}) that structure may be hidden"
    return (
        f"{rank} of {percent(c.relative_change)} of the weight, {percent(c.rotation_fraction)} of it rotation-like "
        f"(a random change has {percent(c.random_rotation)}){near}: consistent with ordinary finetuning"
    )


def _rounded(c: WeightChange) -> str:
    own, noise = c.relative_change or 0.0, c.noise or 0.0
    if own <= 1.2 * noise:
        why = f"no more than storing it in {c.stored} can do ({percent(c.noise)})"
    else:
        why = "every entry as conversion to a shorter format leaves it"
    return f"differs by {percent(own)}, {why}: consistent with rounding"


_SENTENCES: dict[str, Callable[[WeightChange], str]] = {
    "unchanged": lambda c: "unchanged, bit for bit",
    "rounded": _rounded,
    "scaled": lambda c: f"multiplied by {c.scale:.5g}: consistent with weight decay or a rescaling",
    "rows": lambda c: f"rows rescaled, {percent(c.relative_change)} of the weight: consistent with scaled outputs",
    "columns": lambda c: f"columns rescaled, {percent(c.relative_change)} of the weight: consistent with scaled inputs",
    "oft": _oft,
    "orthogonal_in": _orthogonal_in,
    "hra": _hra,
    "orthogonal_both": _orthogonal_both,
    "lora": _lora,
    "pissa": _pissa,
    "dora": _dora,
    "general": _general,
}


def _census(rows: list[Mapping[str, Any]]) -> str:
    kinds = Counter(row["kind"] for row in rows).most_common()
    if len(kinds) == 1:
        if len(rows) == 1:
            return f"The one matrix compared is {_kind(rows, kinds[0][0])}."
        return f"All {len(rows)} matrices are {_kind(rows, kinds[0][0])}."
    parts = [f"{count} {_kind(rows, kind)}" for kind, count in kinds]
    return f"Of {len(rows)} matrices, {', '.join(parts[:-1])} and {parts[-1]}."


def _kind(rows: list[Mapping[str, Any]], kind: str) -> str:
    """The name of a kind with the ranks or block sizes it was seen with."""
    own = [row for row in rows if row["kind"] == kind]
    for column, word in (("block_size", "block"), ("change_rank", "rank")):
        if kind in {"block_size": ("oft",), "change_rank": ("lora", "hra")}[column]:
            sizes = sorted({row[column] for row in own if row.get(column)})
            if sizes:
                text = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
                return f"{_NAMES[kind]} ({word} {text})"
    return _NAMES[kind]


def _largest(rows: list[Mapping[str, Any]]) -> list[str]:
    """Layer and role with the largest mean change, if there are several to choose from."""
    if len(rows) < 2:
        return [] if not rows else [f"{rows[0]['name']} changed by {percent(rows[0]['relative_change'])}."]
    most = max(rows, key=lambda row: row["relative_change"])
    sentence = f"The largest change is {percent(most['relative_change'])} of the weight, in {most['name']}"
    means = []
    for column, word in (("layer", "layer {}"), ("role", "role {}")):
        groups: dict[Any, list[float]] = {}
        for row in rows:
            if row.get(column) is not None:
                groups.setdefault(row[column], []).append(row["relative_change"])
        if len(groups) > 1:
            top, values = max(groups.items(), key=lambda item: sum(item[1]) / len(item[1]))
            means.append(f"{word.format(top)} ({percent(sum(values) / len(values))})")
    return [f"{sentence}; on average it is largest in {' and '.join(means)}." if means else f"{sentence}."]


def _stayed(rows: list[Mapping[str, Any]]) -> list[str]:
    names = [row["name"] for row in rows if row["kind"] in _KEPT]
    if not names or len(names) == len(rows):
        return []
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"Not trained, to rounding: {listed}."]
