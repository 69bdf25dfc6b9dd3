"""What papers say about adapters, held against the recorded comparison."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orthokit
from orthokit.studies.adapter_results import adapter_finals

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ADAPTER_DUELS", "AdapterDuel", "adapter_margins", "oftv2_costs", "oftv2_widest"]

_ALL = ("tinygpt", "noun", "verb")
_OLD, _NEW = "OFT 32, weight-centric", "OFT 32"


@dataclass(frozen=True)
class AdapterDuel:
    """One published ranking of two methods.

    Args:
        name: Short unique name.
        winner: Label of the method that is said to end lower.
        loser: Label of the other.
        text: The claim in one sentence.
        paper: Where it is made.
        value: What is compared: ``"value"`` (default), the loss on the new task, or ``"other"``, that on what the model
            could do before.
        tracks: Where it is held against the recorded study; default everywhere.
    """

    name: str
    winner: str
    loser: str
    text: str
    paper: str
    value: str = "value"
    tracks: tuple[str, ...] = _ALL


ADAPTER_DUELS: tuple[AdapterDuel, ...] = (
    AdapterDuel("oft-lora", "OFT", "LoRA", "OFT ends lower than LoRA.", "arXiv 2506.19847, table 2"),
    AdapterDuel(
        "oft-forgets", "OFT", "LoRA", "OFT forgets less than LoRA.", "PEFT's benchmark of methods, 2026", "other"
    ),
    AdapterDuel("boft-oft", "BOFT", "OFT", "BOFT ends lower than OFT.", "arXiv 2311.06243, table 1"),
    AdapterDuel("hra-oft", "HRA", "OFT", "HRA ends lower than OFT.", "arXiv 2405.17484"),
    AdapterDuel("dora-lora", "DoRA", "LoRA", "DoRA ends lower than LoRA.", "arXiv 2402.09353"),
    AdapterDuel(
        "full-learns", "full fine-tuning", "LoRA", "Full fine-tuning learns more than LoRA.", "arXiv 2405.09673"
    ),
    AdapterDuel(
        "lora-forgets",
        "LoRA",
        "full fine-tuning",
        "LoRA forgets less than full fine-tuning.",
        "arXiv 2405.09673",
        "other",
    ),
)


def adapter_margins(table: pd.DataFrame, duel: AdapterDuel, track: str) -> list[float]:
    """By how much the supposed winner ended lower, seed by seed.

    Args:
        table: The recorded study.
        duel: Who against whom.
        track: Where.

    Returns:
        The loser's number minus the winner's, one a seed: above zero the claim is right.
    """
    finals = adapter_finals(table, track, value=duel.value)
    return (finals[duel.loser] - finals[duel.winner]).tolist()


def oftv2_costs(*, root: str | Path | None = None) -> pd.DataFrame:
    """What the recorded benchmark says of input-centric OFT: against the weight-centric form, LoRA and PEFT.

    Args:
        root: Folder of the benchmark's results; default that of the checkout.

    Returns:
        One row a case that has the weight-centric form: ``time saved`` and ``memory saved``, the weight-centric form
        over ours; ``of LoRA's time``, ours over our LoRA's; ``PEFT's time``, PEFT's OFT over ours. No rows where the
        benchmark was not recorded; NaN where a rival was not there.

    Example:
        >>> import tempfile
        >>> len(oftv2_costs(root=tempfile.mkdtemp()))
        0

    References:
        ``benchmarks/adapters.py``; memory is what lies between the two passes and the optimizer's state.
    """
    import pandas as pd

    columns = ["time saved", "memory saved", "of LoRA's time", "PEFT's time"]
    rows = {}
    for title, found in _benchmark(root).items():
        times = {name: one["median_ratio"] for name, one in found.items()}
        held = {name: float(found[name]["kept"]) + float(found[name]["moments"]) for name in (_OLD, _NEW)}
        ratios = (
            times[_OLD] / times[_NEW],
            held[_OLD] / held[_NEW],
            times[_NEW] / times.get("LoRA 16", math.nan),
            times.get(f"{_NEW}, PEFT", math.nan) / times[_NEW],
        )
        rows[title] = dict(zip(columns, ratios, strict=True))
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def oftv2_widest(*, root: str | Path | None = None) -> tuple[str, list[float]]:
    """The widest layer of the recorded benchmark, and the time that input-centric OFT saves there, round by round.

    Args:
        root: Folder of the benchmark's results; default that of the checkout.

    Returns:
        Title of the case, and the time of the weight-centric form over ours, one number a round; ``("", [])`` where the
        benchmark was not recorded.
    """
    cases = _benchmark(root)
    widths = {title: int(found[1]) for title in cases if (found := re.search(r"width:? (\d+)", title))}
    if not widths:
        return "", []
    title = max(widths, key=lambda title: widths[title])
    old, new = (cases[title][name]["wall_seconds"] for name in (_OLD, _NEW))
    return title, [a / b for a, b in zip(old, new, strict=True)]


def _benchmark(root: str | Path | None) -> dict[str, dict[str, Any]]:
    """The cases with the weight-centric form: title to what was measured of each candidate."""
    folder = Path(orthokit.__file__).parents[1] / "benchmarks" / "results" if root is None else Path(root)
    try:
        record = json.loads((folder / "adapters.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    cases = {case["title"]: case["candidates"] for case in record["cases"]}
    return {title: found for title, found in cases.items() if _OLD in found and _NEW in found}
