"""What papers say about who beats whom, held against the recorded race; and the race's loop held against ``fit``."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthokit.lab.fit import fit
from orthokit.studies.optimizer_race import enter
from orthokit.studies.race_results import race_finals

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PUBLISHED_DUELS", "Duel", "duel_margins", "race_and_fit"]


@dataclass(frozen=True)
class Duel:
    """One published ranking of two contestants.

    Args:
        name: Short unique name.
        winner: Label of the contestant that is said to end lower.
        loser: Label of the other.
        text: The claim in one sentence.
        paper: Where it is made.
        budget: ``"tokens"`` (default) or ``"time"``.
    """

    name: str
    winner: str
    loser: str
    text: str
    paper: str
    budget: str = "tokens"


PUBLISHED_DUELS: tuple[Duel, ...] = (
    Duel("muon-adamw", "Muon", "AdamW", "Muon ends lower than AdamW.", "Jordan et al. 2024; arXiv 2502.16982"),
    Duel(
        "muon-adamw-time", "Muon", "AdamW", "Muon ends lower than AdamW after equal time.", "Jordan et al. 2024", "time"
    ),
    Duel("normuon-muon", "NorMuon", "Muon", "NorMuon ends lower than Muon.", "arXiv 2510.05491"),
    Duel("pion-adamw", "Pion", "AdamW", "Pion ends lower than AdamW.", "arXiv 2605.12492, table 1"),
    Duel("muon-pion", "Muon", "Pion", "Muon ends lower than Pion.", "arXiv 2605.12492, table 1"),
    Duel("poet-adamw", "POET", "AdamW", "POET ends lower than AdamW.", "arXiv 2506.08001, table 2"),
    Duel("adamw-poet", "AdamW", "POET", "A tuned AdamW ends lower than POET.", "notes of POET's first author, 2026"),
    Duel("pre-post", "Muon", "Muon post", "Momentum before the polar factor beats after it.", "arXiv 2606.03899"),
    Duel("pre-none", "Muon", "Muon none", "Momentum before the polar factor beats none.", "arXiv 2606.03899"),
    Duel("lion-adamw", "Lion", "AdamW", "Lion ends lower than AdamW.", "arXiv 2302.06675"),
    Duel("adamw-sgd", "AdamW", "SGD", "AdamW ends lower than SGD on a transformer.", "arXiv 1912.03194"),
)


def duel_margins(table: pd.DataFrame, duel: Duel, *, track: str = "tinygpt") -> list[float]:
    """By how much the supposed winner ended lower, seed by seed.

    Args:
        table: The recorded race.
        duel: Who against whom.
        track: Where; default the language model, which the papers are about.

    Returns:
        Loss of the loser minus loss of the winner, one number a seed: above zero the claim is right.
    """
    finals = race_finals(table, track, budget=duel.budget)
    return (finals[duel.loser] - finals[duel.winner]).tolist()


def race_and_fit(
    track: str, name: str, *, lr: float, seed: int, steps: int, small: bool = False
) -> tuple[list[float], list[float]]:
    """The same training by the race's loop and by ``lab.fit``.

    Args:
        track: A track of the race.
        name: A contestant.
        lr: Learning rate.
        seed: Seed of weights and data.
        steps: Length, ``>= 1``.
        small: A much smaller model.

    Returns:
        Training losses of both; equal bit for bit.

    Example:
        >>> ours, theirs = race_and_fit("cnn", "lion", lr=1e-3, seed=0, steps=2, small=True)
        >>> ours == theirs
        True
    """
    options = {"lr": lr, "seed": seed, "steps": steps, "small": small}
    racer, twin = enter(track, name, **options), enter(track, name, **options)
    losses = [racer.advance() for _ in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        run = fit(
            twin.model,
            twin.task,
            twin.optimizer,
            **twin.shape,
            clip=twin.clip,
            precision="float32",
            evaluate_every=steps,
            run="twin",
            root=folder,
            progress=False,
        )
        return losses, [float(value) for value in run.series("loss")[1]]
