"""What the page "Inspect" says of a model, in sentences and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.diagnostics import COLUMNS, Inspection, describe_changes
from orthokit.figures._inspection import words
from orthokit.figures.template import listing

__all__ = ["EXPLAINED", "apart", "facts", "not_finite", "reading", "sentence", "table"]

Rows = Sequence[Mapping[str, Any]]

EXPLAINED = {
    "tinygpt": "A small language model of this package, trained on the State of the Union addresses.",
    "tinygpt-oft": "Synthetic: the inputs of every matrix of TinyGPT turned by OFT in blocks of 8, at random.",
    "tinygpt-lora": "Synthetic: a random LoRA of rank 8 added to every matrix of TinyGPT.",
    "tinygpt-full": "Synthetic: independent noise, 5 % of the entries' spread, added to every matrix of TinyGPT.",
    "tinygpt-bfloat16": "The weights of TinyGPT rounded to bfloat16.",
    "minilm": "The sentence encoder all-MiniLM-L6-v2.",
}
# Distance to the Marchenko-Pastur law that a random matrix with about a hundred columns may have.
_NEAR = 0.05
_MOST_LINES = 200


def sentence(status: str, name: str, *, done: int, total: int, rows: Rows, seconds: float, others: int) -> str:
    """The status as the page says it.

    Args:
        status: That of a look, or ``"ready"``.
        name: Of the model.
        done: Parameters that are done.
        total: Of so many.
        rows: What is known.
        seconds: How long it took.
        others: How many models are measured beside it.
    """
    full = sum(row["measured"] == "full" for row in rows)
    beside = f" {others} more beside it." if others else ""
    texts = {
        "ready": "Ready: press Inspect.",
        "waiting": f"{name} is next.",
        "opening": f"Opening {name}.",
        "first look": f"First look at {name}: {done} of {total} parameters.",
        "measuring": f"All singular values of {name}: {done} of {total} parameters.",
        "stopping": "Stopping: the matrix under way comes to its end.",
        "finished": f"Up to date: {len(rows)} matrices of {name} in {seconds:.2g} s.{beside}",
        "stopped": f"Stopped: {full} of {len(rows)} matrices measured in full. Press Inspect to go on.",
        "failed": "Failed.",
    }
    return texts[status]


def reading(rows: Rows, found: Inspection | None, *, name: str, base: str) -> str:
    """The model in a few sentences, each on its line; empty before anything is known.

    Args:
        rows: What is known of its matrices.
        found: The whole, once the look has ended.
        name: Of the model.
        base: Of its base; empty: none.
    """
    if not rows:
        return ""
    lines = [found.summary() if found is not None else f"{name}: {len(rows)} matrices so far."]
    if base:
        lines += describe_changes(rows)
    lines += _spectra_said(rows)
    # Nothing that was compared: an alert says it.
    lines += [f"{note[:1].upper()}{note[1:]}." for note in (found.notes if found is not None else [])]
    return "\n".join(lines)


def _spectra_said(rows: Rows) -> list[str]:
    near = {str(row["name"]): float(row["mp_distance"]) for row in rows if row["mp_distance"] is not None}
    if not near:
        return []
    least, most = min(near, key=near.__getitem__), max(near, key=near.__getitem__)
    count = sum(value < _NEAR for value in near.values())
    said = f"{count or 'None'} of {len(near)} spectra {'lies' if count == 1 else 'lie'} within {_NEAR} of the law of "
    said += f"random entries; the closest is {_short(least)} ({near[least]:.2g}), "
    said += f"the furthest {_short(most)} ({near[most]:.2g})."
    alphas = [float(row["alpha"]) for row in rows if row["alpha"] is not None]
    if not alphas:
        return [said, "No spectrum has a tail that a power law fits."]
    found = f"A power-law tail fits {len(alphas)} of {len(near)}, with exponents from {min(alphas):.2f} to "
    found += f"{max(alphas):.2f}"
    return [said, f"{found}, median {float(np.median(alphas)):.2f}."]


_ALONE = ["stable_rank", "effective_rank", "mp_distance", "alpha"]


def facts(rows: Rows, *, compared: bool) -> list[dict[str, str]]:
    """The model in numbers."""
    bad = sum(row["nonfinite"] or 0 for row in rows)
    found = [("matrices", f"{len(rows):,}", ""), ("numbers in them", _count(sum(row["numel"] for row in rows)), "")]
    found += [("not finite", f"{bad:,}", "entries")] if bad else []
    columns = ["relative_change", "spectrum_change", "rotation_fraction", "rotation_angle", "change_stable_rank"]
    found += [_median(rows, name) for name in (columns if compared else _ALONE)]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in found]


def _median(rows: Rows, column: str) -> tuple[str, str, str]:
    values = [float(row[column]) for row in rows if row[column] is not None and math.isfinite(row[column])]
    text = "…" if rows else ""
    if values:
        middle = float(np.median(values))
        # Two digits are enough for what is small, and short.
        text = COLUMNS[column].text(float(f"{middle:.3g}")) if abs(middle) >= 1e-3 or middle == 0 else f"{middle:.0e}"
    return words(COLUMNS[column]), text, "median" if values else ""


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number:,}"


def table(
    rows: Rows, found: Inspection | None, groups: Sequence[str], *, compared: bool
) -> dict[str, list[dict[str, Any]]]:
    """The table, ready for the browser.

    Args:
        rows: What is known.
        found: The whole, once the look has ended.
        groups: Which columns, of ``orthokit.diagnostics.inspection.GROUPS``.
        compared: Whether there is a base.

    Returns:
        ``columns`` (name, label, help, kind), ``rows`` (lists of cells: text, and for columns of numbers the number
        to sort by) and ``lists`` (kind, title, lines: what is not in the table).
    """
    names = _columns(rows, groups, compared=compared)
    heads = [
        {
            "name": name,
            "label": COLUMNS[name].label,
            "help": " ".join(part for part in (COLUMNS[name].meaning, _exactness(name)) if part),
            "kind": "text" if COLUMNS[name].kind == "text" else "number",
        }
        for name in names
    ]
    lines = [{"cells": [COLUMNS[name].text(row[name]) for name in names], "keys": [_key(row[name]) for name in names]}
             for row in rows]  # fmt: skip
    return {"columns": heads, "rows": lines, "lists": _rest(found)}


def _columns(rows: Rows, groups: Sequence[str], *, compared: bool) -> list[str]:
    first = ["name", "shape"]
    if any(row["note"] for row in rows):
        first += ["nonfinite", "note"] if any(row["nonfinite"] for row in rows) else ["note"]
    if compared and "change" in groups:
        first.append("verdict")
    more = [name for name, column in COLUMNS.items() if column.group in groups and (compared or not column.compared)]
    # A verdict ends with the words for its kind.
    return list(dict.fromkeys([*first, *(name for name in more if name not in ("kind", "note"))]))


def _exactness(name: str) -> str:
    text = COLUMNS[name].exactness
    return f"Exactness: {text}." if text else ""


def _key(value: Any) -> Any:
    """What a column is sorted by; JSON knows no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(1e308, value)
    return value


def _rest(found: Inspection | None) -> list[dict[str, Any]]:
    """What is not in the table, as lists with a title."""
    if found is None:
        return []
    left = [_left_out(one) for one in found.left_out]
    apart = [f"{one['name']}: {one['reason']}" for one in found.unmatched]
    lists = [
        ("apart", _counted(len(apart), "tensor that is not compared", "tensors that are not compared"), apart),
        ("left", _counted(len(left), "parameter that is no matrix", "parameters that are no matrices"), left),
    ]
    return [{"kind": kind, "title": title, "lines": _shortened(lines)} for kind, title, lines in lists if lines]


def _counted(count: int, one: str, several: str) -> str:
    return f"One {one}" if count == 1 else f"{count:,} {several}"


def _left_out(one: Mapping[str, Any]) -> str:
    change = one.get("relative_change")
    moved = "" if change is None else "; unchanged" if change == 0 else f"; changed by {100 * change:.2g} %"
    return f"{one['name']}, {one['shape']}: {one['reason']}{moved}"


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"and {more:,} more"]


def not_finite(rows: Rows) -> str:
    """Matrices with entries that are no numbers, for the alert."""
    bad = [str(row["name"]) for row in rows if row["nonfinite"]]
    if not bad:
        return ""
    names = listing([_short(name) for name in bad[:3]]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return f"NaN or infinite entries in {names}: they are counted and measured as 0."


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def apart(found: Inspection) -> str:
    """That a base has nothing in common with a model; empty where it has."""
    if found.base_name is None or any(row["relative_change"] is not None for row in found.rows):
        return ""
    return (
        f"{found.base_name} is no base of {found.name}: none of its matrices has the same name and shape, so nothing "
        "is compared. Choose another base, or none."
    )
