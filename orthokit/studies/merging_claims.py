"""What the papers on merging say, held against the recorded study: one number a seed for each finding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from orthokit.errors import unknown_name
from orthokit.studies.arena_claims import Finding
from orthokit.studies.merging_results import (
    AVERAGE,
    BASE,
    EXPERTS,
    KINDS,
    RETAINED,
    _by_seed,
    merging_groups,
    merging_label,
    merging_margins,
    merging_unit,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MERGING_FINDINGS", "best_margins", "least_margins", "merging_findings", "tuning_margins"]

_ORTHOMERGE = "arXiv 2602.05943"
_RESIDUALS = ("task_arithmetic", "ties", "tsv")
_FORMS = {"C": "conflict", "G": "global"}


def _over(method: str, rival: str) -> Callable[[Any, str], list[float]]:
    return lambda table, family: merging_margins(table, family, method, rival)


def _kept(target: str) -> Callable[[Any, str], list[float]]:
    """Retained above the residual mergers alone, mean over these."""
    pairs = [(f"orthomerge {target} {residual}", residual) for residual in _RESIDUALS]

    def values(table: pd.DataFrame, family: str) -> list[float]:
        each = [merging_margins(table, family, *pair, task=RETAINED) for pair in pairs]
        return np.mean(each, axis=0).tolist()

    return values


def _form(letter: str, residual: str) -> Finding:
    name = f"orthomerge {_FORMS[letter]} {residual}"
    label = merging_label(residual)
    text = f"OrthoMerge-{letter} with {label} for the residual has a higher average than {label} alone."
    slug = label.lower().replace("-", "")
    return Finding(f"{letter.lower()}-{slug}", text, _over(name, residual), (name, residual), paper=_ORTHOMERGE)


def _keeps(letter: str) -> Finding:
    names = [f"orthomerge {_FORMS[letter]} {residual}" for residual in _RESIDUALS]
    text = f"OrthoMerge-{letter} retains more of the base than its residual mergers alone (mean of TA, TIES, TSV-M)."
    needs = (*names, *_RESIDUALS)
    return Finding(f"{letter.lower()}-keeps", text, _kept(_FORMS[letter]), needs, paper=_ORTHOMERGE)


MERGING_FINDINGS: dict[str, tuple[Finding, ...]] = {
    "orthomerge": (
        *(_form(letter, residual) for letter in _FORMS for residual in _RESIDUALS),
        *(_keeps(letter) for letter in _FORMS),
        Finding(
            "orthomerge-best",
            "The best form of OrthoMerge has a higher average than the best other merge of weights alone.",
            lambda table, family: best_margins(table, family, "OrthoMerge", "weights alone"),
            ("orthomerge global task_arithmetic", "task_arithmetic"),
            paper=_ORTHOMERGE,
        ),
    ),
    "others": (
        Finding(
            "tsv-ta",
            "TSV-M has a higher average than TA.",
            _over("tsv", "task_arithmetic"),
            ("tsv", "task_arithmetic"),
            paper="arXiv 2412.00081",
        ),
        Finding(
            "iso-ta",
            "Iso-C has a higher average than TA.",
            _over("iso_c", "task_arithmetic"),
            ("iso_c", "task_arithmetic"),
            paper="arXiv 2502.04959",
        ),
        Finding(
            "above-base",
            "Every tuned merge has a higher average than the base (the least of all margins).",
            lambda table, family: least_margins(table, family),
            (),
            paper="our question",
        ),
        Finding(
            "tuned",
            "Tuned options have a higher average on test examples than defaults (mean over methods).",
            lambda table, family: tuning_margins(table, family),
            (),
            paper="our question",
        ),
    ),
}
"""What is held against the record, by part; names in ``needs`` are those of the record."""


def merging_findings(table: pd.DataFrame, family: str, *parts: str) -> list[tuple[Finding, list[float], str]]:
    """The findings that a record can decide for a family.

    Args:
        table: The recorded study.
        family: One of its families.
        parts: ``"orthomerge"``, ``"others"`` or both.

    Returns:
        Finding, its finite numbers (one a seed, two at least) and their unit. Findings about contestants that are not
        there are left out.

    Raises:
        UnknownNameError: No such family or part.
        ReportError: The record has no merges of the family, or lacks its base or an expert.
    """
    for part in parts:
        if part not in MERGING_FINDINGS:
            raise unknown_name("part", part, MERGING_FINDINGS)
    factor, unit = merging_unit(family)
    there = set(table.loc[(table["family"] == family) & (table["kind"] == "tuned"), "method"])
    found = []
    for finding in (finding for part in parts for finding in MERGING_FINDINGS[part]):
        if set(finding.needs) <= there:
            values = [factor * value for value in finding.values(table, family) if math.isfinite(value)]
            if len(values) > 1:
                found.append((finding, values, unit))
    return found


def best_margins(
    table: pd.DataFrame, family: str, ours: str, others: str, *, task: str = AVERAGE, kind: str = "tuned"
) -> list[float]:
    """How much higher the best of one group scores than the best of another, seed by seed.

    Which is best is chosen on the other seeds, so that no group wins by having more members to be lucky with.

    Args:
        table: The recorded study.
        family: One of its families.
        ours: A group of :func:`merging_groups`.
        others: Another.
        task: ``"average"`` (default), ``"retained"`` or a task.
        kind: ``"tuned"`` (default) or ``"default"``.

    Returns:
        One difference per seed; NaN if there is no other seed to choose on.

    Raises:
        UnknownNameError: No such family, group, task or kind.
        ReportError: The record has no merges of the family.
    """
    groups = merging_groups(table, family)
    for name in (ours, others):
        if name not in groups.values():
            raise unknown_name("group", name, sorted(set(groups.values())))
    above = _above_base(table, family, task, kind)
    sides = [[name for name in above if groups[merging_label(name)] == side] for side in (ours, others)]
    margins = []
    for seed in range(len(next(iter(above.values())))):
        scores = []
        for side in sides:
            rest = {name: np.delete(above[name], seed) for name in side}
            best = max(side, key=lambda name: float(rest[name].mean()) if len(rest[name]) else 0.0)
            scores.append(above[best][seed] if len(rest[best]) else math.nan)
        margins.append(float(scores[0] - scores[1]))
    return margins


def least_margins(table: pd.DataFrame, family: str, *, task: str = AVERAGE, kind: str = "tuned") -> list[float]:
    """How far the worst contestant is above the base, seed by seed.

    Args:
        table: The recorded study.
        family: One of its families.
        task: ``"average"`` (default), ``"retained"`` or a task.
        kind: ``"tuned"`` (default) or ``"default"``.

    Returns:
        The least margin of each seed: the smallest of several noisy numbers is small by chance too, so this errs
        against the claim that all are above.
    """
    return np.min(list(_above_base(table, family, task, kind).values()), axis=0).tolist()


def tuning_margins(table: pd.DataFrame, family: str, *, task: str = AVERAGE) -> list[float]:
    """What tuning on validation examples changed on test examples: mean over contestants, seed by seed.

    Args:
        table: The recorded study.
        family: One of its families.
        task: ``"average"`` (default), ``"retained"`` or a task.
    """
    tuned, plain = (_above_base(table, family, task, kind) for kind in KINDS)
    return np.mean([tuned[name] - plain[name] for name in tuned if name in plain], axis=0).tolist()


def _above_base(table: pd.DataFrame, family: str, task: str, kind: str) -> dict[str, np.ndarray]:
    """Margin over the base of every contestant that all seeds have."""
    wide = _by_seed(table, family, kind)
    if task not in wide:
        raise unknown_name("task", task, list(wide))
    scores = wide[task].unstack("method")
    margins = scores.drop(columns=[BASE, EXPERTS]).sub(scores[BASE], axis=0).dropna(axis=1)
    return {str(name): margins[name].to_numpy() for name in margins}
