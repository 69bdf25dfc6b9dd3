"""The published rankings: every label exists, and a margin is on the claimed side when the winner ends lower."""

import pandas as pd
import pytest

from orthokit.lab import CONTESTANTS
from orthokit.studies import PUBLISHED_DUELS, Duel, duel_margins, load_evidence, race_and_fit
from orthokit.studies.race_study import RACE, RATES


def test_every_duel_is_between_contestants_and_has_its_own_name():
    labels = {entry.label for entry in CONTESTANTS.values()}
    assert all({duel.winner, duel.loser} <= labels and duel.winner != duel.loser for duel in PUBLISHED_DUELS)
    assert len({duel.name for duel in PUBLISHED_DUELS}) == len(PUBLISHED_DUELS)


def test_a_margin_is_above_zero_where_the_winner_ends_lower():
    rows = [
        {"kind": kind, "track": "tinygpt", "name": name, "seed": seed, "step": 4, "value": value + seed}
        for kind, name, value in (("race", "adamw", 3.0), ("race", "muon_pre", 2.5), ("timed", "muon_pre", 3.25))
        for seed in (0, 1)
    ]
    duel = Duel("a-b", "Muon", "AdamW", "Muon ends lower.", "nowhere")
    assert duel_margins(pd.DataFrame(rows), duel) == [0.5, 0.5]
    timed = Duel("a-b-time", "Muon", "AdamW", "Muon ends lower.", "nowhere", "time")
    assert duel_margins(pd.DataFrame(rows), timed) == [-0.25, -0.25]


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_loop_of_the_race_is_fit_bit_for_bit(name):
    ours, theirs = race_and_fit("tinygpt", name, lr=1e-2, seed=1, steps=4, small=True)
    assert len(ours) == 4 and ours == theirs


def test_the_record_has_every_contestant_on_every_track_and_no_best_rate_at_an_edge():
    table, record = load_evidence("race")
    assert record["size"] == "full" and record["seeds"] == 5
    for unit in RACE.units("full", 5):
        rows = table[(table["track"] == unit["track"]) & (table["name"] == unit["name"])]
        tuned = sorted(rows.loc[rows["kind"] == "tune", "lr"].unique())
        best = rows.loc[rows["kind"] == "race", "lr"].unique()
        where = f"{unit['name']} on {unit['track']}"
        assert len(best) == 1 and tuned[0] < best[0] < tuned[-1], f"{where}: best at the edge of its rates"
        kinds = rows[rows["seed"].isin(unit["seeds"])].groupby("kind")["seed"].nunique()
        assert kinds["race"] == 5 and (unit["name"] == "adamw" or kinds["timed"] == 5), where
    assert set(table["name"]) == set(RATES["tinygpt"])
