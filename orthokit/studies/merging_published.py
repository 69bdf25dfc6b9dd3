"""The published tables of merging, and what OrthoMerge adds here beside what it adds there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orthokit.errors import unknown_name
from orthokit.studies.adapter_results import _told
from orthokit.studies.merging_results import (
    AVERAGE,
    RETAINED,
    _of,
    merging_families,
    merging_label,
    merging_margins,
    merging_unit,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["orthomerge_gains", "published_anchors", "published_orthomerge"]

# Model to residual merger: alone, with OrthoMerge-C, with OrthoMerge-G; each pair is the mean in the experts' domains
# and the mean outside, in per cent.
_RESIDUALS: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = {
    "Llama-3.2-3B, MergeBench": {
        "TA": ((34.16, 44.01), (34.31, 44.23), (35.48, 44.21)),
        "TIES": ((39.16, 44.20), (41.57, 44.69), (39.34, 44.17)),
        "TSV-M": ((41.52, 44.53), (42.07, 44.68), (40.03, 44.74)),
    },
    "Qwen2.5-VL-7B": {
        "TA": ((62.04, 71.98), (62.73, 72.43), (63.15, 72.38)),
        "TIES": ((63.54, 69.16), (64.04, 69.25), (63.96, 70.19)),
        "TSV-M": ((63.10, 68.99), (63.36, 69.16), (63.63, 70.86)),
    },
}
# Base, and experts by the way they were trained, each on its own task.
_ENDS: Mapping[str, tuple[tuple[float, float], Mapping[str, float]]] = {
    "Llama-3.1-8B": ((32.83, 38.31), {"LoRA": 45.30, "OFT": 44.71}),
    "Llama-3.2-3B, MergeBench": ((27.18, 43.03), {"full": 55.18}),
    "Qwen2.5-VL-7B": ((61.51, 72.88), {"full": 63.78}),
}
_ADAPTERS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "LoRA": {"TA": (43.89, 40.85), "TIES": (43.45, 40.83), "DARE": (44.10, 40.83), "TSV-M": (40.68, 38.98)},
    "OFT": {
        **{"TA": (41.46, 40.78), "TIES": (44.61, 40.43), "DARE": (40.88, 40.78), "TSV-M": (44.97, 40.48)},
        "OrthoMerge": (46.25, 41.80),
    },
}
# Method to means in per cent; with anchors from Gaussian starts and from rows of weights.
_ANCHORS: Mapping[str, Mapping[str, float | tuple[float, float]]] = {
    "ViT-B/16, 8 tasks": {
        **{"TA": 73.94, "TSV-M": 87.38, "WUDI": 88.85, "FDA": (87.07, 87.26), "FDA from TA": (87.77, 87.79)},
        **{"FDA from TSV-M": (88.42, 88.25), "FDA from WUDI": (89.23, 89.19), "experts": 92.65},
    },
    "ViT-B/32, 8 tasks": {
        **{"TA": 69.16, "TSV-M": 84.15, "WUDI": 85.26, "FDA": (83.03, 83.75), "FDA from TA": (84.41, 84.76)},
        **{"FDA from TSV-M": (85.55, 85.62), "FDA from WUDI": (86.00, 86.04), "experts": 90.52},
    },
    "ViT-L/14, 8 tasks": {
        **{"TA": 84.54, "TSV-M": 91.52, "WUDI": 92.49, "FDA": (90.99, 91.05), "FDA from TA": (91.40, 91.33)},
        **{"FDA from TSV-M": (91.93, 91.71), "FDA from WUDI": (92.51, 92.45), "experts": 94.13},
    },
    "RoBERTa-large, GLUE": {
        **{"TA": 59.18, "TSV-M": 65.99, "WUDI": 64.47, "FDA": (66.32, 68.27), "FDA from TA": (72.20, 71.83)},
        **{"FDA from TSV-M": (71.27, 71.53), "FDA from WUDI": (69.84, 69.64), "experts": 87.54},
    },
    "RoBERTa-base, GLUE": {
        **{"TA": 62.67, "TSV-M": 65.71, "WUDI": 67.51, "FDA": (67.73, 65.50), "FDA from TA": (69.26, 68.53)},
        **{"FDA from TSV-M": (67.27, 67.17), "FDA from WUDI": (68.50, 69.13), "experts": 85.31},
    },
}


def published_orthomerge() -> pd.DataFrame:
    """The published tables of OrthoMerge, in per cent.

    Returns:
        One row a result: ``model``, ``experts`` (how they were trained), ``method`` (``"base"``, ``"experts"``,
        ``"alone"``, ``"OrthoMerge-C"``, ``"OrthoMerge-G"``, or ``"OrthoMerge"`` of rotation adapters), ``merger`` (of
        all, or of the residual), ``score`` in the experts' domains, ``outside`` of them, and where OrthoMerge stands on
        a residual merger ``gain`` and ``gain outside`` over it alone. NaN where nothing is published.

    Example:
        >>> table = published_orthomerge()
        >>> gains = table["gain"].dropna()
        >>> len(gains), f"{gains.min():+.2f} to {gains.max():+.2f}"
        (12, '-1.49 to +2.41')

    References:
        Yang, Shi, Liu (2026), Orthogonal Model Merging, arXiv 2602.05943, tables of its project page.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for model, ((score, outside), experts) in _ENDS.items():
        rows.append({"model": model, "experts": "", "method": "base", "score": score, "outside": outside})
        rows += [{"model": model, "experts": way, "method": "experts", "score": own} for way, own in experts.items()]
    for way, of in _ADAPTERS.items():
        for merger, (score, outside) in of.items():
            method, by = ("OrthoMerge", "") if merger == "OrthoMerge" else ("alone", merger)
            entry = {"model": "Llama-3.1-8B", "experts": way, "method": method, "merger": by}
            rows.append({**entry, "score": score, "outside": outside})
    for model, of in _RESIDUALS.items():
        for merger, results in of.items():
            for method, (score, outside) in zip(("alone", "OrthoMerge-C", "OrthoMerge-G"), results, strict=True):
                row = {"model": model, "experts": "full", "method": method, "merger": merger}
                row |= {"score": score, "outside": outside}
                if method != "alone":
                    row |= {"gain": score - results[0][0], "gain outside": outside - results[0][1]}
                rows.append(row)
    return pd.DataFrame(rows).fillna({"merger": ""}).round(2)


def published_anchors() -> pd.DataFrame:
    """The published averages of Functional Dual Anchors and of what they start from, in per cent.

    Returns:
        One row a result: ``model``, ``method``, ``start`` of the anchors (``"Gaussian"``, ``"weights"``, or empty for
        methods without anchors) and ``score``.

    Example:
        >>> table = published_anchors()
        >>> best = table[(table["model"] == "ViT-B/16, 8 tasks") & (table["method"] != "experts")]
        >>> best.loc[best["score"].idxmax(), "method"]
        'FDA from WUDI'

    References:
        Shi, Wen, Liu (2025), Model Merging with Functional Dual Anchors, arXiv 2510.21223, main tables.
    """
    import pandas as pd

    rows = []
    for model, of in _ANCHORS.items():
        for method, score in of.items():
            pairs = zip(("Gaussian", "weights"), score, strict=True) if isinstance(score, tuple) else [("", score)]
            rows += [{"model": model, "method": method, "start": start, "score": value} for start, value in pairs]
    return pd.DataFrame(rows)


def orthomerge_gains(table: pd.DataFrame, *, task: str = AVERAGE) -> pd.DataFrame:
    """What OrthoMerge adds to each residual merger, here and as published.

    Args:
        table: The recorded study.
        task: ``"average"`` (default) or ``"retained"``, which is published as the mean outside the experts' domains.

    Returns:
        One row a form of OrthoMerge, one column a family and a published model. Ours are paired means with half widths
        of 95 % intervals, in points or bits per byte; published ones are in points and have no interval.

    Raises:
        UnknownNameError: Another ``task``.
    """
    import pandas as pd

    if task not in (AVERAGE, RETAINED):
        raise unknown_name("task", task, (AVERAGE, RETAINED))
    columns: dict[str, Any] = {}
    for family in merging_families(table):
        factor, unit = merging_unit(family)
        names = list(dict.fromkeys(_of(table, family, "tuned")["method"]))
        told = columns.setdefault(f"{family} ({unit})", {})
        for name in names:
            words = name.split()
            if words[0] == "orthomerge" and words[2] in names:
                margins = merging_margins(table, family, name, words[2], task=task)
                told[merging_label(name)] = _told([factor * margin for margin in margins])
    published = published_orthomerge().dropna(subset=["gain"])
    column = "gain" if task == AVERAGE else "gain outside"
    for model, part in published.groupby("model", sort=False):
        columns[f"{model} (published)"] = {
            f"{row['method']} + {row['merger']}": f"{row[column]:+.2f}" for _, row in part.iterrows()
        }
    return pd.DataFrame(columns).fillna("").sort_index()
