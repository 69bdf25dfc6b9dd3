"""What the page "Merge" says of a merge, in sentences and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.figures.template import listing
from orthokit.lab import FAMILIES
from orthokit.merging import methods
from orthokit_widgets.merge_data import BASE, RETAINED, SCALES, Asked, Grid, average

__all__ = ["SENTENCES", "explained", "facts", "in_bits", "method_words", "model_words", "summary", "told"]

Marks = Mapping[str, Mapping[str, float]]

_NAMES = {
    **{"linear": "averaging", "task_arithmetic": "task arithmetic", "slerp": "SLERP", "ties": "TIES", "dare": "DARE"},
    **{"model_stock": "Model Stock", "tsv": "TSV-M", "iso_c": "Iso-C", "knots": "KnOTS", "wudi": "WUDI"},
    **{"regmean": "RegMean", "fisher": "Fisher", "curvature": "OTA", "metrics_weighted": "weighted by loss"},
    **{"orthomerge": "OrthoMerge", "fda": "FDA"},
}
_LITTLE = 0.01  # of accuracy, or bits per byte: a share of a smaller gain is mostly noise
#: What a page says of each status; with the merge's task, its steps, and the scales measured.
SENTENCES = {
    "ready": "Ready: press Train and merge.",
    "prepared": "Ready: press Merge; the experts are trained.",
    "refused": "Not merged: the settings do not go together.",
    "waiting": "Waiting for the experts.",
    "preparing": "Preparing the expert {task}: reading its data.",
    "training": "Training the expert {task}: step {step} of {steps}.",
    "reading": "Reading what {method} needs to know of the expert {task}.",
    "merging": "Merging.",
    "measuring": "Merged; {done} of {all} scales measured.",
    "stopping": "Stopping.",
    "finished": "Up to date: all {all} scales measured.",
    "stopped": "Stopped; {done} of {all} scales measured.",
    "failed": "Failed.",
}


def method_words(name: str) -> str:
    """What lists call a method."""
    return _NAMES.get(name, name)


def model_words(family: str) -> str:
    """What lists call the model of a family."""
    return FAMILIES[family].label.partition(",")[0]


def in_bits(family: str) -> bool:
    """Whether a family is scored in bits, and not by shares."""
    return "bits" in FAMILIES[family].score


def told(value: float, family: str) -> str:
    """A score as sentences have it: per cent, or minus bits per byte."""
    if not math.isfinite(value):
        return "no number"
    if in_bits(family):
        return f"{value:.3f}".replace("-", "−")
    return f"{100 * value:.1f}\u00a0%".replace("-", "−")


def gains(scores: Mapping[str, float], marks: Marks, asked: Asked) -> tuple[float, float] | None:
    """How far the merged model and each expert on its own task lie above the base, on average; ``None`` at first."""
    if any(task not in marks.get(BASE, {}) or task not in marks.get(task, {}) for task in asked.tasks):
        return None
    begun = average(marks[BASE], asked.tasks)
    best = float(np.mean([marks[task][task] for task in asked.tasks]))
    return average(scores, asked.tasks) - begun, best - begun


def explained(
    grid: Grid, marks: Marks, asked: Asked, *, part: str, scale: float, rows: Sequence[Mapping[str, Any]] | None
) -> str:
    """The merge in a few sentences.

    Args:
        grid: What was measured.
        marks: ``"base"`` and each expert to the scores known of it.
        asked: What is merged.
        part: Which half of the held-out examples.
        scale: Where the slider is.
        rows: Rotations and conflicts by layer, if they are known.

    Returns:
        Sentences on lines of their own; empty before anything is measured.
    """
    scores, between = grid.at(scale, part)
    if not between:
        return ""
    how = "measured" if len(between) == 1 else f"between {between[0]:g} and {between[1]:g}, which were measured"
    mean = told(average(scores, asked.tasks), asked.family)
    first = (
        f"{_upper(method_words(asked.method))} of {_counted(len(asked.tasks))} at scale {scale:g} ({how}; {part} "
        f"examples): {mean} on average over the tasks"
    )
    lines = [
        f"{first}{_gained_said(scores, marks, asked)}.",
        _retained_said(scores, marks, asked),
        _rotation_said(rows, asked),
    ]
    return "\n".join(line for line in lines if line)


def _upper(words: str) -> str:
    return words[:1].upper() + words[1:]


def _counted(count: int) -> str:
    return "one expert" if count == 1 else f"{count} experts"


def _gained_said(scores: Mapping[str, float], marks: Marks, asked: Asked) -> str:
    found = gains(scores, marks, asked)
    if found is None:
        return ""
    mine, best = found
    if mine < 0:
        return (
            f", {_points(-mine, asked.family)} below the pretrained model (the experts: {_signed(best, asked.family)})"
        )
    if best <= _LITTLE:
        return f", {_points(mine, asked.family)} above the pretrained model (experts: {_signed(best, asked.family)})"
    return f", {100 * mine / best:.0f}\u00a0% of what the experts gained over the pretrained model"


def _retained_said(scores: Mapping[str, float], marks: Marks, asked: Asked) -> str:
    before = marks.get(BASE, {}).get(RETAINED)
    if before is None:
        return ""
    now, what = scores[RETAINED], FAMILIES[asked.family].retained
    rest = [marks[task][RETAINED] for task in asked.tasks if RETAINED in marks.get(task, {})]
    alone = f"; the experts keep {told(float(np.mean(rest)), asked.family)} on average" if rest else ""
    return (
        f"Of what it could before ({what}), {told(now, asked.family)} is left of {told(before, asked.family)}{alone}."
    )


def _rotation_said(rows: Sequence[Mapping[str, Any]] | None, asked: Asked) -> str:
    if not rows:
        return ""
    shares = np.array([row["rotation_fraction"] for row in rows], dtype=float)
    each = [f"{task} {_percent(share)}" for task, share in zip(asked.tasks, shares.mean(0), strict=True)]
    return f"Mean over {len(rows)} matrices of the share of a change that is a rotation: {listing(each)}."


def facts(grid: Grid, marks: Marks, asked: Asked, *, part: str, scale: float) -> list[dict[str, str]]:
    """The same in numbers; all but the last three move with the slider."""
    scores, _ = grid.at(scale, part)
    unit = "bits/byte" if in_bits(asked.family) else ""
    mean, over, experts, left = "…", "…", "", "…"
    if scores:
        mean, left = told(average(scores, asked.tasks), asked.family), told(scores[RETAINED], asked.family)
        found = gains(scores, marks, asked)
        if found is not None:
            over, experts = (_signed(value, asked.family) for value in found)
    points = grid.measured(part)
    best = max(points, key=lambda index: average(points[index], asked.tasks)) if points else None
    counts = [
        ("mean over tasks", mean, unit),
        ("over pretrained", over, f"experts {experts}" if experts else ""),
        ("retained", left, unit),
        ("best scale", "…" if best is None else f"{SCALES[best]:g}", f"of {len(points)} measured"),
        ("merged", f"{grid.size / 1e6:.2f}" if grid.size else "…", "million numbers"),
        ("merge took", f"{grid.seconds:.2f}" if grid.size else "…", "s"),
    ]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in counts]


def summary(method: str) -> str:
    """What a method does, and where it is from."""
    spec = methods()[method]
    return f"{_upper(method_words(method))}: {spec.summary} ({spec.reference})."


def _points(value: float, family: str) -> str:
    """A difference of scores."""
    return f"{value:.3f} bits per byte" if in_bits(family) else f"{100 * value:.1f} points"


def _signed(value: float, family: str) -> str:
    """A difference of scores with its sign, in few characters."""
    return (f"{value:+.3f}" if in_bits(family) else f"{100 * value:+.1f}").replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%".replace("-", "−")
