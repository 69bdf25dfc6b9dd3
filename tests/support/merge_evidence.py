"""A small record of the study of merging, for tests of its page: two families, a few methods, three seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orthokit.lab import FAMILIES

SEEDS = (0, 1, 2)
#: Contestant to its mean over tasks, above the base; seeds lie 0.01 apart.
GAINS = {"linear": 0.05, "ties": 0.08, "orthomerge conflict ties": 0.06, "iso_c": 0.09}
BASE = {"pictures": 0.8, "language": -2.4}
EXPERTS = 0.1  # gain of each expert on its own task
OPTIONS = {"ties": {"density": 0.5, "scale": 0.75}, "orthomerge conflict ties": {"scale": 1.25}, "iso_c": {}}


def rows(families: Sequence[str] = ("pictures", "language"), gains: Mapping[str, float] = GAINS) -> Iterator[dict]:
    """The rows of the record."""
    for family in families:
        tasks = list(FAMILIES[family].tasks)
        for seed in SEEDS:
            common = {"family": family, "seed": seed, "seconds": 0.1}
            shift = 0.01 * (seed - 1)
            scores: dict[tuple[str, str], dict[str, float]] = {("start", "base"): dict.fromkeys(tasks, BASE[family])}
            for task in tasks:
                own = {one: BASE[family] + EXPERTS * (one == task) for one in tasks}
                scores["expert", f"expert {task}"] = own
            for method, gain in gains.items():
                for kind, factor in (("default", 0.5), ("tuned", 1.0)):
                    scores[kind, method] = dict.fromkeys(tasks, BASE[family] + factor * gain + shift)
            for (kind, method), found in scores.items():
                options = json.dumps(OPTIONS.get(method, {})) if kind == "tuned" else "{}"
                for task, score in {**found, "retained": BASE[family]}.items():
                    yield {**common, "kind": kind, "method": method, "task": task, "score": score, "options": options}


def write(folder: Path, **options: Any) -> Path:
    """Write the record into a folder of evidence, which is returned."""
    (folder / "merging").mkdir(parents=True)
    found = list(rows(**options))
    with (folder / "merging" / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    (folder / "merging" / "study.json").write_text(json.dumps({"name": "merging", "seeds": len(SEEDS)}))
    return folder
