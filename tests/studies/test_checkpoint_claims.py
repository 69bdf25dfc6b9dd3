"""Findings about checkpoints: numbers with a rule, the right way round, and as many as there should be."""

from __future__ import annotations

import pandas as pd
import pytest

from orthokit.diagnostics.inspection import COLUMNS, Inspection
from orthokit.errors import OptionError
from orthokit.reports import Claims
from orthokit.studies import checkpoint_claims as module
from orthokit.studies.training_spectra import SpectraAlong


def look(distance: float, rank: float, alpha: float | None = None) -> Inspection:
    """One matrix whose eigenvalues are a power law, with the columns that are asked for."""
    row = dict.fromkeys(COLUMNS) | {"name": "W", "mp_distance": distance, "above_edge": 1, "effective_rank": rank}
    sigma = (1 - (pd.Series(range(60)) + 0.5) / 60) ** -0.25
    return Inspection("m", rows=[row | {"alpha": alpha}], spectra={"W": sigma.to_numpy()[::-1]})


@pytest.fixture
def trained() -> SpectraAlong:
    ends = {"AdamW": (0.3, 50.0, 2.9), "Muon": (0.1, 60.0, 2.7)}
    looks, bits = {}, {}
    for label, (distance, rank, loss) in ends.items():
        for seed in (0, 1, 2):
            looks[label, seed, 0], bits[label, seed, 0] = look(0.02, 64.0), 8.0
            looks[label, seed, 9] = look(distance + 0.01 * seed, rank, alpha=3.0)
            bits[label, seed, 9] = loss + 0.01 * seed
    return SpectraAlong(looks, bits)


def test_findings_of_trainings_become_claims_with_the_right_verdicts(trained) -> None:
    claims = Claims(paper="p")
    found = module.training_findings(trained)
    verdicts = {finding["name"]: claims.measure(**finding).verdict for finding in found}
    assert verdicts == {
        "leave-adamw": "holds",
        "leave-muon": "holds",
        "above-adamw": "fails",  # one value above the edge at both ends
        "above-muon": "fails",
        "falls-adamw": "fails",  # the same spectrum at both ends
        "falls-muon": "fails",
        "shown-adamw": "holds",
        "shown-muon": "holds",
        "muon-bits": "holds",
        "muon-noise": "fails",
        "muon-exponent": "fails",
        "muon-rank": "holds",
    }
    values = {finding["name"]: finding["values"] for finding in found}
    assert values["muon-bits"] == pytest.approx([-0.2] * 3) and values["muon-rank"] == pytest.approx([10] * 3)


def test_one_optimizer_alone_has_no_rival(trained) -> None:
    alone = SpectraAlong(
        {key: value for key, value in trained.looks.items() if key[0] == "Muon"},
        {key: value for key, value in trained.bits.items() if key[0] == "Muon"},
    )
    names = [finding["name"] for finding in module.training_findings(alone)]
    assert names == ["leave-muon", "above-muon", "falls-muon", "shown-muon"]


def test_the_summary_has_the_means_of_both_ends(trained) -> None:
    table = module.training_summary(trained)
    assert list(table.columns) == list(module.SPECTRUM_QUANTITIES.values())
    assert table.loc[("AdamW", 9), "from random"] == pytest.approx(0.31)
    assert table.loc[("AdamW", 0), "shown"] == 0 and table.loc[("AdamW", 9), "shown"] == 1


def test_near_random_findings_are_shares_over_seeds() -> None:
    tables = [
        pd.DataFrame({"within": [True, False, False, False]}),
        pd.DataFrame({"within": [True, True, False, False]}),
    ]
    (finding,) = module.near_random_findings({"Some": tables})
    assert finding["values"] == [0.25, 0.5] and finding["less_than"] == 0.05 and finding["name"] == "within-some"


def test_exponents_outside_the_range_are_counted_one_by_one() -> None:
    rows = [{"alpha": alpha} for alpha in (1.5, 3.0, None, 6.5)]
    (finding,) = module.exponent_findings({"Some": Inspection("s", rows=rows), "few": Inspection("f", rows=rows[:1])})
    assert finding["values"] == [1.0, 0.0, 1.0] and finding["name"] == "range-some"


def test_noise_findings_agree_with_their_table() -> None:
    found, table = module.noise_findings(seeds=[0, 1, 2], draws=3)
    by_name = {finding["name"]: finding for finding in found}
    assert sum(by_name["noise-range"]["values"]) / 3 == pytest.approx(table.loc["128 x 128", "from 2 to 6"])
    assert sum(by_name["rows-shown"]["values"]) / 3 == pytest.approx(table.loc["128 x 128, unequal rows", "shown"])
    assert table.loc["128 x 128", "shown"] < 0.2 < table.loc["128 x 128", "from 2 to 6"]
    with pytest.raises(OptionError, match="draws"):
        module.noise_findings(draws=0)


def test_naming_findings_are_shares_of_the_trained_matrices() -> None:
    table = pd.DataFrame({"trained": [4, 4], "named": [4, 1]}, index=["full fine-tuning", "LoRA"])
    found = module.naming_findings([table, table], [table])
    assert {finding["name"]: finding["values"] for finding in found} == {
        "named-full": [1.0, 1.0],
        "named-lora": [0.25, 0.25],
        "named-bfloat16": [0.625],
    }


def test_identities_hold_and_ranks_are_found_in_every_type() -> None:
    assert max(module.checkpoint_identities(seed=2).values()) < 1e-5
    table = module.stored_ranks(size=48, rank=12, seed=1)
    assert list(table.index) == ["float32", "float16", "bfloat16"] and table["above_floor"].tolist() == [12] * 3
    assert (table["condition"] > 100).all()  # of the rounding: that of the matrix is infinite
    for rank in (0, 48):
        with pytest.raises(OptionError, match="rank"):
            module.stored_ranks(size=48, rank=rank)
