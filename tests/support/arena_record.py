"""A record of an arena made by law: known gains and forgettings, and diagnostics that follow them or do not."""

from __future__ import annotations

import numpy as np
import pandas as pd

START = {"target": 3.0, "general": 2.0}
# Method to (best rate, gain, forgetting, trainable numbers) of its runs at that rate.
LAW = {
    "full": (1e-4, 1.0, 0.9, 10_000),
    "lora": (4e-4, 0.8, 0.5, 1_000),
    "dora": (4e-4, 0.7, 0.6, 1_100),
    "oft": (1e-3, 0.8, 0.2, 1_000),
    "hra": (1e-3, 0.4, 0.1, 1_050),
}
TURNING = ("oft", "hra")
ALPHAS = [round(0.1 * k, 1) for k in range(11)]
SEEDS = (0, 1, 2)


def _row(kind, ground, method, seed, step, lr, gain=0.0, forgetting=0.0, **more):
    return {
        **{"kind": kind, "ground": ground, "method": method, "size": 8, "trainable": LAW[method][3]},
        **{"lr": lr, "seed": seed, "step": step, "target": START["target"] - gain, "error": np.nan},
        **{"general": START["general"] + forgetting, "geometry": np.nan, "seconds": 1.0},
        **more,
    }


def diagnostics(method, gain, forgetting, rng):
    """Procrustes follows forgetting exactly, CKA nearly; the size of the change follows nothing."""
    return {
        **{"procrustes": forgetting / 2, "raw": forgetting / 2 + 0.1, "gram": forgetting**2 + 0.01 * rng.random()},
        **{"cka": 1 - forgetting / 3 + 0.01 * rng.random(), "moved": rng.random(), "stable_rank": 1 + 5 * rng.random()},
        **{"csd_general": rng.random(), "csd_general_unaligned": rng.random(), "csd_target": gain},
        **{"retention": rng.random(), "fluctuation": rng.random(), "adaptation_fluctuation": rng.random()},
        **{"spectrum": 0.0 if method in TURNING else forgetting},
    }


def arena_record(ground="tinygpt", methods=tuple(LAW)):
    """The rows of one ground.

    Seed ``s`` gains and forgets ``0.01 s`` more. A rate of half or twice the best one gains 0.8 of it and forgets half
    or twice as much. Back on the dense path gain is linear and forgetting linear too; on a rotation's own path
    forgetting is quadratic in alpha. ``safe`` has 0.9 of the gain for half the forgetting.
    """
    rng, rows = np.random.default_rng(0), []
    for method in methods:
        lr, gain, forgetting, _ = LAW[method]
        for factor, share in ((0.5, 0.8), (1.0, 1.0), (2.0, 0.8)):
            g, f = gain * share, forgetting * factor
            figures = diagnostics(method, g, f, rng)
            rows.append(_row("tune", ground, method, 100, 50, lr * factor, g, f, **figures))
        for seed in SEEDS:
            g, f = gain + 0.01 * seed, forgetting + 0.01 * seed
            rows += [_row("run", ground, method, seed, 0, lr), _row("run", ground, method, seed, 25, lr, g / 2, f / 2)]
            rows.append(_row("run", ground, method, seed, 50, lr, g, f, **diagnostics(method, g, f, rng)))
            paths = {"dense": 1, **({"cayley_sqrt": 2, "cayley_linear": 2} if method in TURNING else {})}
            for path, power in paths.items():
                for alpha in ALPHAS:
                    forgot = f * alpha**power
                    rows.append(_row("path", ground, method, seed, 50, lr, g * alpha, forgot, path=path, alpha=alpha))
            for path in ("safe", "min", "uniform") if method in TURNING else ():
                rows.append(_row("path", ground, method, seed, 50, lr, 0.9 * g, 0.5 * f, path=path))
        for index, layer in enumerate(("blocks.0.attn.q", "blocks.1.attn.q")):
            figures = {"moved": 0.1 + index, "procrustes": forgetting * (1 + index) if index else np.nan}
            figures |= {"strength": 0.3} if method in TURNING else {}
            rows.append(_row("layer", ground, method, 0, 50, lr, layer=layer, **figures))
            for place, sigma in enumerate((4.0, 2.0, 1.0)):
                along = {"layer": layer, "index": place, "sigma": sigma, "retention": sigma - 0.4, "adaptation": 0.5}
                rows.append(_row("profile", ground, method, 0, 50, lr, **along))
    return pd.DataFrame(rows)
