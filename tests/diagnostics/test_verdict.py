"""Verdicts: every kind in words with its own numbers, never more certain than they are, and the summary of a model."""

import dataclasses
import math

import pytest
import torch

from orthokit.diagnostics import describe_changes, verdict, weight_change
from orthokit.diagnostics.verdict import _SENTENCES, percent


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, *, seed=0):
    A = gaussian(n, n, seed=seed) * 0.1 / math.sqrt(8 * n)
    return torch.linalg.solve(
        torch.eye(n, dtype=torch.float64) - (A - A.mT), torch.eye(n, dtype=torch.float64) + (A - A.mT)
    )


W0 = gaussian(64, 80)
ROWS = 1 + 0.1 * gaussian(64, 1, seed=1)
LOW = 0.05 * gaussian(64, 3, seed=2) @ gaussian(3, 80, seed=3)
U, S, VH = torch.linalg.svd(W0, full_matrices=False)
# Both factors of the leading part trained: B A with B and A a little beside the singular vectors.
B, A = (
    U[:, :2] * S[:2].sqrt() + 0.02 * gaussian(64, 2, seed=4),
    S[:2].sqrt()[:, None] * VH[:2] + 0.02 * gaussian(2, 80, seed=5),
)
HOUSEHOLDER = torch.eye(80, dtype=torch.float64)
for i in range(4):
    u = torch.nn.functional.normalize(gaussian(80, seed=10 + i), dim=0)
    HOUSEHOLDER = HOUSEHOLDER - 2 * torch.outer(HOUSEHOLDER @ u, u)
CASES = {
    "unchanged": W0,
    "rounded": W0.bfloat16().double(),
    "scaled": 0.9 * W0,
    "rows": ROWS * W0,
    "columns": W0 * (1 + 0.1 * gaussian(1, 80, seed=1)),
    "oft": W0 @ torch.block_diag(*(rotation(16, seed=i) for i in range(5))),
    "orthogonal_in": W0 @ rotation(80),
    "orthogonal_both": rotation(64, seed=1) @ W0 @ rotation(80),
    "hra": W0 @ HOUSEHOLDER,
    "lora": W0 + LOW,
    "pissa": W0 - (U[:, :2] * S[:2]) @ VH[:2] + B @ A,
    "dora": ROWS * (W0 + LOW),
    "general": W0 + 0.02 * gaussian(64, 80, seed=6),
}


@pytest.fixture(scope="module")
def changes():
    return {kind: weight_change(W0, W) for kind, W in CASES.items()}


def test_every_kind_has_a_case_here_and_is_found(changes):
    assert set(CASES) == set(_SENTENCES)
    for kind, change in changes.items():
        slug, words = verdict(change)
        assert slug == kind
        assert change.verdict == words
        assert not words.endswith(".")


def test_words_say_consistent_with_and_never_is(changes):
    for kind, change in changes.items():
        words = verdict(change)[1]
        assert " is " not in words
        assert ("consistent with" in words) == (kind != "unchanged")
        assert "None" not in words
        assert "unknown" not in words


def test_the_numbers_in_the_words_are_those_measured(changes):
    def words(kind):
        return verdict(changes[kind])[1]

    angle = float(changes["oft"].rotation_angle)
    assert "every entry as conversion to a shorter format leaves it" in words("rounded")
    assert words("oft").startswith(f"rotated by {angle:.2g} degrees in blocks of 16, spectrum kept:")
    over = dataclasses.replace(changes["oft"], rotation_angle=170.2)
    assert verdict(over)[1].startswith("rotated by 170 degrees")
    assert words("lora").startswith("change of rank 3 (stable rank ")
    assert f"{100 * changes['lora'].relative_change:.1f} %" in words("lora")
    assert words("lora").endswith("LoRA of rank 3")
    assert "the 2 leading directions" in words("pissa")
    assert words("hra").endswith("HRA of rank 4")
    assert words("dora").endswith("DoRA of rank 3")
    assert words("scaled").startswith("multiplied by 0.9:")
    general = changes["general"]
    assert f"{100 * general.rotation_fraction:.1f} % of it rotation-like" in words("general")
    assert f"(a random change has {100 * general.random_rotation:.1f} %)" in words("general")


def test_a_change_near_the_rounding_of_the_file_says_so_and_a_zero_base_too(changes):
    base = W0.bfloat16()
    near = weight_change(base, (base.double() + 0.006 * gaussian(64, 80, seed=7)).bfloat16())
    assert near.kind == "general"
    assert "rounding of bfloat16" in near.verdict
    assert "rounding" not in changes["general"].verdict
    below = weight_change(base, (base.double() + 0.001 * gaussian(64, 80, seed=7)).bfloat16())
    assert below.kind == "rounded"
    assert f"storing it in bfloat16 can do ({percent(below.noise)})" in below.verdict
    assert "the base is zero" in weight_change(torch.zeros(4, 5), torch.ones(4, 5)).verdict
    # Turned by a map that is only nearly orthogonal: by how much the spectrum was kept.
    loose = dataclasses.replace(changes["orthogonal_in"], spectrum_change=0.002)
    assert "spectrum kept to 0.20 %" in verdict(loose)[1]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0423, "4.2 %"),
        (0.51, "51.0 %"),
        (1.0, "100 %"),
        (0.0, "0 %"),
        (0.00031, "0.031 %"),
        (0.05, "5.0 %"),
        (1.43, "143 %"),
        (2e-9, "2e-07 %"),
        (0.09999, "10 %"),
    ],
)
def test_percentages_keep_the_digits_that_count(share, text):
    assert percent(share) == text
    assert percent(None) == "an unknown share"


def row(i, kind, change, **others):
    return {"name": f"h.{i}.attn.q", "kind": kind, "relative_change": change, "layer": i, "role": "attn.q"} | others


def test_a_model_of_one_kind_is_one_sentence_and_where_it_changed_most():
    rows = [row(i, "lora", 0.01 * (i + 1), change_rank=8 if i else 4) for i in range(3)]
    found = describe_changes([*rows, row(9, None, None)])
    assert found == [
        "All 3 matrices are consistent with LoRA (rank 4 to 8).",
        "The largest change is 3.0 % of the weight, in h.2.attn.q; on average it is largest in layer 2 (3.0 %).",
    ]


def test_mixed_kinds_are_counted_most_common_first_and_the_rest_is_named():
    rows = [row(i, "oft", 0.02, block_size=32) for i in range(5)]
    rows += [row(5, "general", 0.01, role="mlp.up"), row(6, "unchanged", 0.0)]
    rows += [row(7 + i, "rounded", 0.001) for i in range(3)]
    census, largest, kept = describe_changes(rows)
    assert census == (
        "Of 10 matrices, 5 consistent with OFT (block 32), 3 changed by rounding only, "
        "1 consistent with ordinary finetuning and 1 unchanged."
    )
    assert "layer 0 (2.0 %) and role attn.q (2.0 %)" in largest
    assert kept == "Not trained, to rounding: h.6.attn.q, h.7.attn.q, h.8.attn.q and 1 more."


def test_little_to_say_is_said_in_little():
    assert describe_changes([]) == []
    assert describe_changes([row(0, None, None)]) == []
    assert describe_changes([row(0, "unchanged", 0.0)]) == ["The one matrix compared is unchanged."]
    assert describe_changes([row(0, "unchanged", 0.0), row(1, "unchanged", 0.0)]) == ["All 2 matrices are unchanged."]
    assert describe_changes([row(0, "hra", 0.02, change_rank=4)])[1] == "h.0.attn.q changed by 2.0 %."
    # A base of zeros has no relative change: it counts, but is not ranked.
    assert describe_changes([row(0, "general", None), row(1, "unchanged", 0.0)]) == [
        "Of 2 matrices, 1 consistent with ordinary finetuning and 1 unchanged.",
        "Not trained, to rounding: h.1.attn.q.",
    ]


def test_the_rows_of_real_changes_are_understood(changes):
    rows = [{"name": kind, "layer": None, "role": kind} | change.row() for kind, change in changes.items()]
    census, largest, kept = describe_changes(rows)
    assert census.startswith(f"Of {len(CASES)} matrices, ")
    assert "role" in largest
    assert "layer" not in largest
    assert "unchanged, rounded" in kept
