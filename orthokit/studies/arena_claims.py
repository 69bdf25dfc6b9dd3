"""What PEFT-Arena says, held against the recorded arena: one number a seed for each finding, and published tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthokit.errors import unknown_name
from orthokit.lab.arena import GROUNDS
from orthokit.studies.arena_results import arena_runs
from orthokit.studies.arena_ways import (
    arena_paths,
    equal_gain_savings,
    overshoot,
    overshoot_gain,
    path_savings,
    stop_savings,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "FINDINGS",
    "PUBLISHED_CORRELATIONS",
    "Finding",
    "arena_findings",
    "budget_rivals",
    "forgetting_margins",
    "front_margins",
    "published_distortions",
    "published_rewinding",
    "published_scores",
]

_PAPER = "arXiv 2605.28819"
# Of what is forgotten: a difference between two paths that anyone would change a path for.
_NOTICEABLE = 0.01


@dataclass(frozen=True)
class Finding:
    """One finding of a paper, and what of the record decides it.

    Args:
        name: Short unique name.
        text: The claim in one sentence; it holds where the numbers lie above ``above``.
        values: ``values(table, ground)``: one number a seed.
        needs: Labels that must be there; ground by ground, what is not there is left out.
        turns: Whether a rotation's own path must be there too.
        share: Whether the numbers are shares; otherwise they have the unit of the ground's losses.
        above: What the numbers must exceed; above 0 where less would be of no use.
        paper: Where it is made.
    """

    name: str
    text: str
    values: Callable[[Any, str], list[float]]
    needs: tuple[str, ...] = ("OFT",)
    turns: bool = False
    share: bool = False
    above: float = 0.0
    paper: str = _PAPER


def _path_beats(label: str) -> Callable[[Any, str], list[float]]:
    return lambda table, ground: path_savings(table, ground, label)


def _half_way(label: str) -> Callable[[Any, str], list[float]]:
    return lambda table, ground: overshoot(table, ground, label)


FINDINGS: dict[str, tuple[Finding, ...]] = {
    "front": (
        Finding(
            "oft-front",
            "OFT is on the front at equal budget.",
            lambda table, ground: front_margins(table, ground, rivals=budget_rivals(table, ground)),
        ),
        Finding(
            "oft-front-all", "OFT is on the front of all methods.", lambda table, ground: front_margins(table, ground)
        ),
        Finding(
            "oft-forgets",
            "OFT forgets less than LoRA, each at its best rate.",
            lambda table, ground: forgetting_margins(table, ground, "OFT", "LoRA"),
            ("OFT", "LoRA"),
        ),
        Finding(
            "oft-equal-gain",
            "OFT forgets less than LoRA at equal gain, each on its way back.",
            lambda table, ground: equal_gain_savings(table, ground, ("OFT", None), ("LoRA", None)),
            ("OFT", "LoRA"),
        ),
        Finding(
            "lora-forgets",
            "LoRA forgets less than full fine-tuning, each at its best rate.",
            lambda table, ground: forgetting_margins(table, ground, "LoRA", "full fine-tuning"),
            ("LoRA", "full fine-tuning"),
            paper="arXiv 2405.09673",
        ),
    ),
    "rewinding": (
        Finding(
            "path-oft",
            "OFT: on the rotation path at least 1 % less is forgotten than on the dense one, at equal gain.",
            _path_beats("OFT"),
            turns=True,
            share=True,
            above=_NOTICEABLE,
        ),
        Finding(
            "path-boft",
            "BOFT: on the rotation path at least 1 % less is forgotten than on the dense one, at equal gain.",
            _path_beats("BOFT"),
            ("BOFT",),
            turns=True,
            share=True,
            above=_NOTICEABLE,
        ),
        Finding(
            "half-oft",
            "OFT, halfway back: more of the forgetting is undone than of the gain.",
            _half_way("OFT"),
            share=True,
        ),
        Finding(
            "half-lora",
            "LoRA, halfway back: more of the forgetting is undone than of the gain.",
            _half_way("LoRA"),
            ("LoRA",),
            share=True,
        ),
        Finding(
            "half-full",
            "Full fine-tuning, halfway back: more of the forgetting is undone than of the gain.",
            _half_way("full fine-tuning"),
            ("full fine-tuning",),
            share=True,
        ),
        Finding(
            "target-oft",
            "OFT: the target itself is better before the end of the way.",
            lambda table, ground: overshoot_gain(table, ground, "OFT"),
        ),
        Finding(
            "safe-oft",
            "OFT: layer-wise safe scales forget less than the uniform path at equal gain.",
            lambda table, ground: stop_savings(table, ground, "OFT", "safe"),
            turns=True,
        ),
        Finding(
            "min-oft",
            "OFT: all layers turned as little as the least turned one forget less than the uniform path at equal gain.",
            lambda table, ground: stop_savings(table, ground, "OFT", "min"),
            turns=True,
        ),
    ),
}
"""What is held against the record, by notebook."""


def arena_findings(table: pd.DataFrame, ground: str, part: str) -> list[tuple[Finding, list[float], str]]:
    """The findings that a record can decide on a ground.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        part: ``"front"`` or ``"rewinding"``.

    Returns:
        Finding, its finite numbers (one a seed, two at least) and their unit. Findings about what is not there are left
        out, such as a method that never gained.

    Raises:
        UnknownNameError: No such ground or part.
    """
    if part not in FINDINGS:
        raise unknown_name("part", part, FINDINGS)
    labels = set(arena_runs(table, ground)["label"])
    turned = {label for label, paths in arena_paths(table, ground).items() if "cayley_linear" in paths}
    found = []
    for finding in FINDINGS[part]:
        if set(finding.needs) <= (turned if finding.turns else labels):
            values = [value for value in finding.values(table, ground) if math.isfinite(value)]
            if len(values) > 1:
                found.append((finding, values, "" if finding.share else GROUNDS[ground].unit))
    return found


# Supervised fine-tuning of Qwen2.5-7B on mathematics: target and general scores in per cent.
_BASE = (35.30, 46.97)
_SCORES = {
    "full fine-tuning": (50.63, 34.22),
    "OFT": (46.93, 44.37),
    "LoRA": (42.47, 39.22),
    "DoRA": (42.33, 40.25),
    "MiLoRA": (42.60, 37.62),
    "PiSSA": (44.53, 24.78),
    "VeRA": (39.43, 47.25),
    "IA3": (35.13, 44.71),
}
_DISTORTIONS = {
    "full fine-tuning": (0.1640, 0.2500, 0.8654, 17.31),
    "LoRA": (0.1808, 0.2430, 0.8564, 15.97),
    "OFT": (0.1279, 0.1906, 0.9340, 7.81),
    "MiLoRA": (0.1635, 0.2476, 0.8651, 16.35),
    "PiSSA": (0.4376, 0.8655, 0.4402, 34.56),
}
_REWINDING = {
    "dense, α = 0.3": (43.93, 43.91),
    "rotation, √0.3 Q": (45.77, 48.64),
    "uniform 0.4": (48.10, 47.53),
    "safe scales": (47.17, 46.69),
    "smallest scale": (47.83, 46.86),
    "finished": (46.93, 44.37),
}
PUBLISHED_CORRELATIONS: dict[str, tuple[float, float]] = {
    "drift on general inputs (CSD)": (0.347, 0.317),
    "the same, unaligned": (0.481, 0.603),
    "Procrustes residual": (0.711, 0.568),
    "Gram distortion": (0.485, 0.361),
    "1 − CKA": (0.761, 0.711),
}
"""Diagnostic to Pearson's and Spearman's correlation with forgetting in arXiv 2605.28819; CKA turned over."""


def published_scores() -> pd.DataFrame:
    """Gain and forgetting in per cent of the published runs whose methods are here too.

    Returns:
        One row a method: ``gain`` on mathematics and ``forgetting`` of general abilities, of Qwen2.5-7B after
        supervised fine-tuning.

    Example:
        >>> published_scores().loc["OFT"].tolist()
        [11.63, 2.6]

    References:
        Z. Huang et al. (2026), PEFT-Arena, arXiv 2605.28819, main table and poster.
    """
    import pandas as pd

    rows = {name: (target - _BASE[0], _BASE[1] - general) for name, (target, general) in _SCORES.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["gain", "forgetting"]).round(2)


def published_distortions() -> pd.DataFrame:
    """Distortion of activations and forgetting, as published.

    Returns:
        One row a method: ``procrustes``, ``gram``, ``cka`` and ``forgetting`` in per cent.

    Example:
        >>> published_distortions()["procrustes"].idxmin()
        'OFT'

    References:
        Z. Huang et al. (2026), PEFT-Arena, arXiv 2605.28819, activation geometry.
    """
    import pandas as pd

    return pd.DataFrame.from_dict(_DISTORTIONS, orient="index", columns=["procrustes", "gram", "cka", "forgetting"])


def published_rewinding() -> pd.DataFrame:
    """Gain and forgetting in per cent along the published ways back of OFT.

    Returns:
        One row a point, of Qwen2.5-7B after supervised fine-tuning on mathematics with blocks of 32.

    Example:
        >>> published_rewinding().loc["rotation, √0.3 Q"].tolist()
        [10.47, -1.67]

    References:
        Z. Huang et al. (2026), PEFT-Arena, arXiv 2605.28819, path-wise rewinding.
    """
    import pandas as pd

    rows = {name: (target - _BASE[0], _BASE[1] - general) for name, (target, general) in _REWINDING.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["gain", "forgetting"]).round(2)


def budget_rivals(table: pd.DataFrame, ground: str, *, label: str = "OFT", factor: float = 1.5) -> list[str]:
    """Who trains about as many numbers as a method.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        label: The method.
        factor: How many times more or fewer still count as equal, ``>= 1``; default 1.5.

    Returns:
        Labels of the others within the factor.

    Raises:
        UnknownNameError: No such method there.
    """
    counts: dict[Any, int] = arena_runs(table, ground).groupby("label", sort=False)["trainable"].first().to_dict()
    if label not in counts:
        raise unknown_name("method", label, list(counts))
    return [
        str(other)
        for other, count in counts.items()
        if other != label and abs(math.log(count / counts[label])) <= math.log(factor)
    ]


def front_margins(
    table: pd.DataFrame, ground: str, *, label: str = "OFT", rivals: list[str] | None = None
) -> list[float]:
    r"""How far a method is from being beaten on both axes, seed by seed.

    .. math:: \min_{\text{rival}} \max(g - g_{\text{rival}},\ f_{\text{rival}} - f)

    with gain $g$ and forgetting $f$: its advantage over each rival on its better axis, against the most dangerous one.
    Above zero it is on the front; below, some rival is better on both axes by that much.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        label: The method.
        rivals: Labels of the others; default all.

    Returns:
        One number a seed, in the unit of the losses.

    Raises:
        UnknownNameError: No such method there.

    References:
        The additive indicator of E. Zitzler et al. (2003), Performance assessment of multiobjective optimizers. The
        smallest of several noisy numbers is small by chance too, so this errs against the method.
    """
    gains, forgotten = (_wide(table, ground, axis) for axis in ("gain", "forgetting"))
    if label not in gains:
        raise unknown_name("method", label, list(gains))
    others = [name for name in (gains if rivals is None else rivals) if name != label]
    ahead = gains[others].rsub(gains[label], axis=0)
    kept = forgotten[others].sub(forgotten[label], axis=0)
    # A rival that diverged threatens nobody.
    return ahead.where(ahead > kept, kept).min(axis=1).tolist()


def forgetting_margins(table: pd.DataFrame, ground: str, winner: str, loser: str) -> list[float]:
    """How much less one method forgets than another, each at its own best rate.

    Args:
        table: The recorded study.
        ground: One of its grounds.
        winner: Label of the method that is said to forget less.
        loser: Label of the other.

    Returns:
        The loser's forgetting minus the winner's, one number a seed.

    Raises:
        UnknownNameError: No such method there.
    """
    wide = _wide(table, ground, "forgetting")
    for label in (winner, loser):
        if label not in wide:
            raise unknown_name("method", label, list(wide))
    return (wide[loser] - wide[winner]).tolist()


def _wide(table: pd.DataFrame, ground: str, value: str) -> Any:
    """One row a seed, one column a method."""
    runs = arena_runs(table, ground)
    return runs.pivot(index="seed", columns="label", values=value)[list(dict.fromkeys(runs["label"]))]
