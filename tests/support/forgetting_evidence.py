"""A small record of the study ``arena`` made of formulas, for tests of the page that shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from orthokit.lab.arena import METHODS

GROUND = "tinygpt"
#: Method to gain and forgetting of the mean run; "vera" has no runs at all.
MEANS = {"full": (0.80, 0.30), "lora": (0.60, 0.20), "oft": (0.70, 0.10), "pissa": (0.5, 0.4)}
SEEDS = (0, 1, 2)
START = (3.2, 1.5)
LAYERS = tuple(f"blocks.{block}.{part}" for block in range(2) for part in ("attn.q", "attn.k", "mlp.gate", "mlp.up"))
SHOWN = (LAYERS[0], LAYERS[5])
WIDTH = 16
TURNED = ("oft",)


def runs(method: str, gain: float, forgetting: float) -> list[dict[str, Any]]:
    rows = []
    for seed in SEEDS:
        shift = 0.02 * (seed - 1)
        for step, done in ((0, 0.0), (25, 0.7), (50, 1.0)):
            row: dict[str, Any] = {"kind": "run", "seed": seed, "step": step}
            row |= {"target": START[0] - done * (gain + shift), "general": START[1] + done**2 * (forgetting + shift)}
            rows.append(row | (diagnostics(method, forgetting) if step == 50 else {}))
    return rows


def diagnostics(method: str, forgetting: float) -> dict[str, float]:
    raw = 0.5 * forgetting
    return {
        **{"moved": 0.1, "stable_rank": 3.0, "retention": 0.02, "fluctuation": 0.001, "adaptation_fluctuation": 0.01},
        **{"csd_general": 0.01, "csd_general_unaligned": 0.5, "csd_target": 0.02, "raw": raw},
        **{"procrustes": raw * (0.4 if method in TURNED else 0.95), "gram": 0.6 * raw, "cka": 1 - raw},
        "spectrum": 1e-6 if method in TURNED else 0.04,
    }


def layers(method: str, forgetting: float) -> list[dict[str, Any]]:
    found = diagnostics(method, forgetting)
    rows: list[dict[str, Any]] = []
    for place, layer in enumerate(LAYERS):
        row = {name: value * (1 + 0.1 * place) for name, value in found.items() if name != "cka"}
        row["cka"] = 1 - found["raw"] * (1 + 0.1 * place)
        if "mlp" in layer:  # outputs of a few layers are judged
            row |= dict.fromkeys(("raw", "procrustes", "gram", "cka"), math.nan)
        rows.append({"kind": "layer", "seed": 0, "layer": layer, **row})
    return rows


def profiles(method: str, *, after: bool) -> list[dict[str, Any]]:
    rows = []
    for layer in SHOWN:
        for index in range(WIDTH):
            sigma = 2.0 / (1 + index)
            row = {"layer": layer, "index": index, "sigma": sigma, "retention": 0.97 * sigma, "adaptation": 0.05}
            row |= {"after": sigma if method in TURNED else 1.03 * sigma} if after else {}
            rows.append({"kind": "profile", "seed": 0, **row})
    return rows


def paths(method: str, gain: float, forgetting: float) -> list[dict[str, Any]]:
    """Straight back forgets in proportion; the rotation keeps more of the gain for the same forgetting."""
    rows = []
    turned = {"cayley_sqrt": 0.5, "cayley_linear": 0.7} if method in TURNED else {}
    for path, power in {**turned, "dense": 1.0}.items():
        for seed in SEEDS:
            shift = 0.02 * (seed - 1)
            for place in range(11):
                alpha = place / 10
                row = {"kind": "path", "seed": seed, "path": path, "alpha": alpha}
                row["target"] = START[0] - alpha**power * (gain + shift)
                rows.append(row | {"general": START[1] + alpha * (forgetting + shift)})
    for rule in ("safe", "min", "uniform") if method in TURNED else ():
        row = {"kind": "path", "seed": 0, "path": rule, "alpha": 0.4}
        rows.append(row | {"target": START[0] - 0.6 * gain, "general": START[1] + 0.3 * forgetting})
    return rows


def table(*, after: bool = True) -> pd.DataFrame:
    """All rows."""
    rows: list[dict[str, Any]] = []
    for method, (gain, forgetting) in MEANS.items():
        of = [{"kind": "tune", "seed": 100, "step": 50, "target": 2.6, "general": 1.6}]
        of += [*runs(method, gain, forgetting), *layers(method, forgetting)]
        of += [*profiles(method, after=after), *paths(method, gain, forgetting)]
        label = {"ground": GROUND, "method": method, "size": 8, "trainable": 1000, "lr": 4e-3}
        rows += [label | row for row in of]
    assert set(MEANS) < set(METHODS)
    return pd.DataFrame(rows)


def write(root: Path, **options: Any) -> Path:
    """The record as a folder of evidence under ``root``; the folder."""
    folder = root / "arena"
    folder.mkdir(parents=True)
    table(**options).to_csv(folder / "results.csv", index=False)
    (folder / "study.json").write_text(json.dumps({"study": "arena", "seeds": len(SEEDS)}))
    return root
