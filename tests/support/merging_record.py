"""A record of the study of merging made by law: known averages, margins and retained scores."""

from __future__ import annotations

import json

import pandas as pd

TASKS = {"pictures": ("footwear", "low digits", "high digits"), "language": ("moby_dick", "definitions")}
SEEDS = (0, 1, 2)
# Contestant to (above the base on every task, below the base in what is retained); experts gain 0.3 on their own task.
LAW = {
    "linear": (0.10, 0.02),
    "task_arithmetic": (0.12, 0.04),
    "ties": (0.08, 0.04),
    "tsv": (0.15, 0.05),
    "regmean": (0.20, 0.06),
    "fda": (0.16, 0.03),
    "orthomerge global linear": (0.09, 0.01),
    "orthomerge global task_arithmetic": (0.13, 0.02),
    "orthomerge global ties": (0.07, 0.01),
    "orthomerge global tsv": (0.14, 0.01),
    "orthomerge conflict task_arithmetic": (0.14, 0.03),
    "orthomerge conflict ties": (0.11, 0.03),
    "orthomerge conflict tsv": (0.11, 0.03),
}
BASE = {"pictures": 0.5, "language": -2.0}
KEPT = {"pictures": 0.9, "language": -1.0}


def merging_record(families=("pictures",), seeds=SEEDS, law=None):
    """The rows of some families.

    The base has the same score on every task; task ``t`` and seed ``s`` add ``0.01 t`` and ``0.001 s`` to every score.
    With defaults half of the gain is reached. An expert loses 0.1 on the tasks of others and retains 0.2 less.
    """
    rows = []
    for family in families:
        tasks = TASKS[family]
        for seed in seeds:

            def told(kind, method, scores, retained, family=family, seed=seed, tasks=tasks, **more):
                common = {"kind": kind, "family": family, "seed": seed, "method": method, "budget": 4, **more}
                found = {task: BASE[family] + 0.01 * t + 0.001 * seed + scores[t] for t, task in enumerate(tasks)}
                found["retained"] = KEPT[family] + 0.001 * seed - retained
                return [{**common, "task": task, "score": score} for task, score in found.items()]

            rows += told("start", "base", [0.0] * len(tasks), 0.0)
            for t, task in enumerate(tasks):
                own = [0.3 if t == other else -0.1 for other in range(len(tasks))]
                rows += told("expert", f"expert {task}", own, 0.2)
            for method, (gain, lost) in (LAW if law is None else law).items():
                for kind, share in (("default", 0.5), ("tuned", 1.0)):
                    options = {"scale": 0.5 + 0.1 * seed} if kind == "tuned" else {}
                    made = {"options": json.dumps(options), "seconds": 0.1 * (1 + seed)}
                    rows += told(kind, method, [share * gain] * len(tasks), share * lost, **made)
    return pd.DataFrame(rows)
