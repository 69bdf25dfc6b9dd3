"""What the recorded study of tasks in turn says: matrices, summaries, trials, collinearity, and what papers claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from orthokit.diagnostics.forgetting import ForgettingMatrix, forgetting_matrix
from orthokit.errors import ReportError, unknown_name
from orthokit.studies.continual import CONTINUAL_METHODS, _tasks, learn_in_turn

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CONTINUAL_DUELS",
    "CONTINUAL_VALUES",
    "ContinualDuel",
    "continual_collinearity",
    "continual_differences",
    "continual_live",
    "continual_margins",
    "continual_matrices",
    "continual_summary",
    "continual_trade",
    "continual_trials",
]

CONTINUAL_VALUES: dict[str, str] = {
    "error": "mean error at the end",
    "forgetting": "forgotten",
    "learned": "error when learned",
    "transfer": "backward transfer",
}
"""What is read off a matrix of errors, by name; all in percentage points."""


def continual_matrices(table: pd.DataFrame, protocol: str) -> dict[str, ForgettingMatrix]:
    """The errors of every run of a protocol, by method.

    Args:
        table: The recorded study.
        protocol: One of its protocols.

    Returns:
        Label to the matrix of errors ``(seeds, T, T)``, in the order of the methods.

    Raises:
        UnknownNameError: No such protocol in the table.
    """
    rows = _rows(table, kind="run", protocol=protocol)
    if not len(rows):
        raise unknown_name("protocol", protocol, set(table["protocol"]))
    found = {}
    for name, way in CONTINUAL_METHODS.items():
        mine = _rows(rows, method=name)
        if not len(mine):
            continue
        seeds, tasks = sorted(set(mine["seed"])), int(max(mine["task"])) + 1
        errors = torch.full((len(seeds), tasks, tasks), float("nan"), dtype=torch.float64)
        place = {seed: i for i, seed in enumerate(seeds)}
        for row in mine.itertuples():
            errors[place[row.seed], int(row.after), int(row.task)] = row.error  # type: ignore[index,arg-type]
        found[way.label] = forgetting_matrix(errors, lower_is_better=True)
    return found


def continual_values(matrix: ForgettingMatrix, value: str) -> Tensor:
    """One of :data:`CONTINUAL_VALUES` for every run, in percentage points."""
    if value not in CONTINUAL_VALUES:
        raise unknown_name("value", value, CONTINUAL_VALUES)
    found = {
        "error": lambda: matrix.average,
        "forgetting": lambda: matrix.mean_forgetting,
        "learned": lambda: matrix.learned,
        "transfer": lambda: matrix.backward_transfer,
    }[value]()
    return 100 * found


def continual_summary(table: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Every method with its tuned setting and the means over seeds.

    Args:
        table: The recorded study.
        protocol: One of its protocols.

    Returns:
        One row a method: ``setting`` and :data:`CONTINUAL_VALUES` in percentage points.
    """
    import pandas as pd

    rows = _rows(table, kind="run", protocol=protocol)
    strengths = rows.groupby("method")["strength"].first()
    matrices, lines = continual_matrices(table, protocol), {}
    for name, way in CONTINUAL_METHODS.items():
        if way.label in matrices:
            setting = f"{way.knob} {strengths[name]:g}" if way.knob else ""
            means = {
                text: float(continual_values(matrices[way.label], v).mean()) for v, text in CONTINUAL_VALUES.items()
            }
            lines[way.label] = {"setting": setting} | {text: round(mean, 1) for text, mean in means.items()}
    return pd.DataFrame.from_dict(lines, orient="index")


def continual_differences(
    table: pd.DataFrame, protocol: str, *, value: str = "error", baseline: str = "fine-tuning"
) -> dict[str, list[float]]:
    """Each method's value minus the baseline's, seed by seed.

    Args:
        table: The recorded study.
        protocol: One of its protocols.
        value: A name in :data:`CONTINUAL_VALUES`; default the mean error at the end.
        baseline: Label to compare with; default ``"fine-tuning"``.

    Returns:
        Label to one difference a seed, in percentage points, without the baseline itself.

    Raises:
        UnknownNameError: No such value or label.
    """
    matrices = continual_matrices(table, protocol)
    if baseline not in matrices:
        raise unknown_name("method", baseline, matrices)
    start = continual_values(matrices[baseline], value)
    return {
        label: (continual_values(matrix, value) - start).tolist()
        for label, matrix in matrices.items()
        if label != baseline
    }


def continual_trade(table: pd.DataFrame, protocol: str) -> dict[str, list[list[float]]]:
    """What was learned against what was forgotten, one pair a run.

    Args:
        table: The recorded study.
        protocol: One of its protocols.

    Returns:
        Label to pairs (share answered right when learned, forgotten), in percentage points.
    """
    return {
        label: torch.stack([100 - continual_values(m, "learned"), continual_values(m, "forgetting")], 1).tolist()
        for label, m in continual_matrices(table, protocol).items()
    }


def continual_trials(table: pd.DataFrame, protocol: str) -> dict[str, tuple[list[float], list[float], float]]:
    """The trials that set the weight of every penalty.

    Args:
        table: The recorded study.
        protocol: One of its protocols.

    Returns:
        Label to ``(weights, mean errors at the end in percentage points, the weight that was taken)``, for methods
        whose setting is a weight.
    """
    rows = _rows(table, kind="trial", protocol=protocol)
    found = {}
    for name, way in CONTINUAL_METHODS.items():
        mine = _rows(rows, method=name).sort_values("strength")
        if way.factor and len(mine):
            best = float(mine["strength"].iloc[int(mine["error"].to_numpy().argmin())])
            found[way.label] = (mine["strength"].tolist(), (100 * mine["error"]).tolist(), best)
    return found


def continual_collinearity(table: pd.DataFrame, *, method: str = "rank_one") -> pd.DataFrame:
    """How collinear the gradients were after each task.

    Args:
        table: The recorded study.
        method: A method that looked.

    Returns:
        Rows of the table with the columns ``protocol, seed, after, cosine, top_share, mean_share``.

    Raises:
        ReportError: That method did not look.
    """
    rows = _rows(table, kind="collinearity", method=method)
    if not len(rows):
        raise ReportError(
            f"the study holds no collinearity of {method!r}; make it again with: orthokit study continual"
        )
    return rows.loc[:, ["protocol", "seed", "after", "cosine", "top_share", "mean_share"]].reset_index(drop=True)


def continual_live(
    methods: Sequence[str], *, protocol: str = "own", seeds: Sequence[int], steps: int, table: pd.DataFrame
) -> dict[str, ForgettingMatrix]:
    """A few methods again, live, at the settings of the recorded study.

    Args:
        methods: Names of methods.
        protocol: Which protocol; default ``"own"``.
        seeds: Seeds, at least one.
        steps: Steps a task.
        table: The recorded study.

    Returns:
        Label to the matrix of errors ``(seeds, T, T)``.

    Raises:
        UnknownNameError: No such method or protocol.
    """
    rows = _rows(table, kind="run", protocol=protocol)
    found = {}
    for name in methods:
        if name not in CONTINUAL_METHODS:
            raise unknown_name("method", name, CONTINUAL_METHODS)
        strength = float(_rows(rows, method=name)["strength"].iloc[0])
        runs = [
            learn_in_turn(_tasks(protocol, seed), name, strength=strength, steps=steps, seed=seed).errors
            for seed in seeds
        ]
        found[CONTINUAL_METHODS[name].label] = forgetting_matrix(torch.stack(runs), lower_is_better=True)
    return found


def _rows(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """The rows with these values in these columns."""
    for column, value in values.items():
        table = cast("pd.DataFrame", table[table[column] == value])
    return table


@dataclass(frozen=True)
class ContinualDuel:
    """One published ranking of two methods.

    Args:
        name: Short unique name.
        winner: Label of the method that is said to have the smaller value.
        loser: Label of the other.
        value: A name in :data:`CONTINUAL_VALUES`.
        text: The claim in one sentence.
        paper: Where it is made.
    """

    name: str
    winner: str
    loser: str
    value: str
    text: str
    paper: str


CONTINUAL_DUELS: tuple[ContinualDuel, ...] = (
    ContinualDuel(
        "ewc-plain", "EWC", "fine-tuning", "forgetting", "EWC forgets less than fine-tuning.", "arXiv 1612.00796"
    ),
    ContinualDuel(
        "ewc-l2", "EWC", "L2-SP", "error", "EWC ends with a lower error than equal pull on all weights.",
        "arXiv 1612.00796, figure 2A",
    ),
    ContinualDuel(
        "true-empirical", "EWC", "EWC, empirical", "error",
        "EWC with the true Fisher information ends with a lower error than with the empirical one.",
        "arXiv 1905.12558 (of optimisation)",
    ),
    ContinualDuel(
        "rank-one", "rank-1 EWC", "EWC", "forgetting", "Rank-1 EWC forgets less than diagonal EWC.",
        "arXiv 2509.23593 (of diffusion models)",
    ),
    ContinualDuel(
        "rank-one-replay", "rank-1 EWC + replay", "EWC + replay", "forgetting",
        "With replay, rank-1 EWC forgets less than diagonal EWC.", "arXiv 2509.23593 (of diffusion models)",
    ),
    ContinualDuel(
        "replay-ewc", "replay", "EWC", "error", "Replay from a tiny memory ends with a lower error than EWC.",
        "arXiv 1902.10486",
    ),
    ContinualDuel(
        "projection-ewc", "GPM", "EWC", "error", "Gradient projection ends with a lower error than EWC.",
        "arXiv 2103.09762, table 1",
    ),
    ContinualDuel(
        "inputs-gradients", "GPM", "OGD", "error",
        "Projecting off inputs of layers ends with a lower error than projecting off gradients.",
        "arXiv 2103.09762, table 1",
    ),
)  # fmt: skip
"""What papers say about who forgets less."""


def continual_margins(table: pd.DataFrame, duel: ContinualDuel, protocol: str) -> list[float]:
    """By how much the supposed winner was lower, seed by seed.

    Args:
        table: The recorded study.
        duel: Who against whom.
        protocol: Where.

    Returns:
        The loser's value minus the winner's in percentage points, one a seed: above zero the claim is right.
    """
    matrices = continual_matrices(table, protocol)
    return (
        continual_values(matrices[duel.loser], duel.value) - continual_values(matrices[duel.winner], duel.value)
    ).tolist()
