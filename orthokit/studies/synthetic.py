"""The published synthetic setting: how far the signal stands out of a momentum buffer, over noise and momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from orthokit.diagnostics.synthetic import SignalPlusPerturbation, published_sigmas, published_strengths
from orthokit.studies._engine import Study

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BETAS", "PUBLISHED_RANK_3", "SYNTHETIC_GAP", "compare_with_published", "measure_gap", "side_by_side"]

# 38 values from 0 to 0.995 as published; the published spacing is not given, this one is denser where curves bend.
BETAS: tuple[float, ...] = tuple(
    round(float(b), 4)
    for b in np.concatenate(
        [
            np.arange(0, 0.81, 0.05),
            np.arange(0.82, 0.905, 0.02),
            np.arange(0.91, 0.985, 0.01),
            [0.983, 0.985, 0.9875, 0.99, 0.991, 0.9925, 0.994, 0.995],
        ]
    )
)

# Rank 3, sigma 1, 10 trials of 1000 steps: the first four singular values of the buffer, by momentum. From the plot
# data of the project page of arXiv 2606.03899 (cited, not redistributed as a file).
PUBLISHED_RANK_3: dict[float, tuple[float, float, float, float]] = {
    0.0: (20.30, 19.43, 18.91, 18.38),
    0.5: (14.65, 12.05, 11.27, 10.84),
    0.9: (12.43, 8.56, 6.00, 4.42),
    0.95: (12.22, 8.25, 5.50, 3.09),
    0.99: (12.06, 8.03, 5.09, 1.36),
    0.995: (11.95, 7.97, 5.02, 0.97),
}

_QUANTITIES = ("sigma_1", "sigma_2", "sigma_r", "sigma_r_plus_1", "gap", "alignment_pre", "sin_left")


def measure_gap(unit: dict[str, Any]) -> list[dict[str, Any]]:
    """One trial at one rank: singular values, gap, alignment and subspace error for every noise level and momentum.

    Args:
        unit: ``rank``, ``trial``, ``steps``, ``size``, ``betas``, ``sigmas``.

    Returns:
        A row for every pair of sigma and beta.
    """
    r, n = unit["rank"], unit["size"]
    stream = SignalPlusPerturbation((n, n), strengths=published_strengths(r), noise="arch", seed=unit["trial"])
    rows = []
    for i, row in enumerate(stream.final_buffers(unit["betas"], unit["sigmas"], steps=unit["steps"])):
        U, S, Vh = torch.linalg.svd(row)
        # <U V^T, S> / ||S||_* from the factors at hand: the alignment of polar(M) without another decomposition.
        alignment = torch.einsum("bik,ij,bkj->b", U, stream.signal, Vh) / sum(stream.strengths)
        cosine = torch.linalg.svdvals(U[..., :r].mT @ stream.U)[..., -1]
        sine = (1 - cosine.square().clamp(max=1)).sqrt()
        below = S[:, r] if r < n else torch.zeros_like(S[:, 0])
        values = [S[:, 0], S[:, min(1, n - 1)], S[:, r - 1], below, S[:, r - 1] - below, alignment, sine]
        for j, sigma in enumerate(unit["sigmas"]):
            found = {name: float(v[j]) for name, v in zip(_QUANTITIES, values, strict=True)}
            rows.append({"rank": r, "trial": unit["trial"], "sigma": sigma, "beta": unit["betas"][i], **found})
    return rows


def _units(size: str, seeds: int) -> list[dict[str, Any]]:
    smoke = size == "smoke"
    common = {
        "steps": 60 if smoke else 1000,
        "size": 20 if smoke else 100,
        "betas": [0.0, 0.9] if smoke else list(BETAS),
        "sigmas": [0.5, 1.0] if smoke else published_sigmas(),
    }
    ranks = (1, 3) if smoke else (1, 3, 5, 10, 15)
    return [{"rank": rank, "trial": trial, **common} for rank in ranks for trial in range(seeds)]


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over trials: the trials themselves would be forty thousand rows."""
    table = rows.groupby(["rank", "sigma", "beta"])[list(_QUANTITIES)].agg(["mean", "std"])
    table.columns = [f"{quantity}_{statistic}" for quantity, statistic in table.columns]
    return table.reset_index()


SYNTHETIC_GAP = Study(
    name="synthetic_gap",
    question="How far does the signal stand out of the momentum buffer, over rank, noise and momentum?",
    units=_units,
    measure=measure_gap,
    summarise=_summary,
    seeds=10,
)


def compare_with_published(table: pd.DataFrame) -> pd.DataFrame:
    """The recorded singular values of rank 3 and sigma 1 beside the published ones.

    Args:
        table: The results of the study ``synthetic_gap``.

    Returns:
        A row for each published momentum and each of the first four singular values: ``beta``, ``k``, ``published``,
        ``ours`` (mean over trials), ``deviation`` (relative).
    """
    import pandas as pd

    chosen = table[(table["rank"] == 3) & np.isclose(table["sigma"], 1.0)].set_index("beta")
    names = ("sigma_1_mean", "sigma_2_mean", "sigma_r_mean", "sigma_r_plus_1_mean")
    rows = []
    for beta, published in PUBLISHED_RANK_3.items():
        for k, (name, value) in enumerate(zip(names, published, strict=True), start=1):
            ours = float(chosen.loc[beta, name])  # type: ignore[arg-type]
            rows.append({"beta": beta, "k": k, "published": value, "ours": ours, "deviation": abs(ours / value - 1)})
    return pd.DataFrame(rows)


def side_by_side(compared: pd.DataFrame) -> pd.DataFrame:
    """The comparison as people read it: a row a momentum, published and ours next to each other.

    Args:
        compared: The result of :func:`compare_with_published`.

    Returns:
        Columns ``σ₁`` ... ``σ₄`` of text ``"published / ours"``, indexed by momentum.
    """
    cells = [f"{p:.2f} / {o:.2f}" for p, o in zip(compared["published"], compared["ours"], strict=True)]
    names = ["σ₁", "σ₂", "σ₃", "σ₄"]
    wide = compared.assign(cell=cells).pivot(index="beta", columns="k", values="cell")
    wide.columns = names
    return wide.rename_axis(index="β")
