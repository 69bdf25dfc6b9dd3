"""Measurements of the maps: trained rotations, errors on them, merges, and the adviser's table."""

import math

import pytest
import torch

from orthokit import linalg, studies
from orthokit.errors import OptionError
from orthokit.studies.maps import apply_map, parse_map

SMALL = {"steps": 3, "batch": 2, "context": 16, "windows": 4}


@pytest.fixture(scope="module")
def run():
    return studies.adapt_by_rotation(lr=1e-2, **SMALL)


def skew(count, b, std, seed=0):
    g = torch.Generator().manual_seed(seed)
    return std * linalg.unpack_skew(torch.randn(count, linalg.packed_size(b), generator=g, dtype=torch.float64))


def test_names_of_maps_are_read():
    assert parse_map("exact") == ("cayley", {}, 0)
    assert parse_map("k = 12") == ("cayley_neumann", {"terms": 12}, 0)
    assert parse_map("p = 2 + polish") == ("exp_taylor", {"order": 2}, 1)
    for bad in ("k", "q = 2", "k = two", "k = 2 + shine", ""):
        with pytest.raises(OptionError, match="a map is written"):
            parse_map(bad)
    Q = skew(2, 4, 0.3)
    assert torch.equal(apply_map("k = 3", Q), linalg.cayley_neumann(Q, terms=3))
    assert torch.equal(apply_map("exact", Q), linalg.cayley(Q))
    assert torch.equal(apply_map("p = 2 + polish", Q), linalg.polish_orthogonal(linalg.exp_taylor(Q, order=2)))


def test_an_adaptation_keeps_its_generators_along_the_way(run):
    assert run.steps == [1, 2, 3] and len(run.losses) == 3
    for Q in run.generators:
        assert Q.shape[1:] == (32, 32) and torch.equal(Q, -Q.mT) and Q.dtype == torch.float64
    # Adam's first step moves every entry by lr.
    first = run.generators[0]
    assert float(first.abs().max()) == pytest.approx(1e-2, rel=1e-3)
    assert run.largest[0] == pytest.approx(float(run.norms[0].max())) and run.largest[0] < run.largest[-1]
    edge = linalg.expected_generator_norm(1e-2, 32)
    assert torch.allclose(run.norm_ratios[0], run.norms[0] / edge, rtol=0.1)


def test_an_adaptation_repeats_with_its_seed_and_starts_from_the_pretrained_loss(run):
    again = studies.adapt_by_rotation(lr=1e-2, **SMALL)
    assert again.losses == run.losses and torch.equal(again.generators[-1], run.generators[-1])
    other = studies.adapt_by_rotation(lr=1e-2, seed=1, look=[2], **SMALL)
    assert other.losses != run.losses and other.before == run.before and other.steps == [2]


def test_blocks_that_do_not_divide_get_a_smaller_last_block():
    # Widths are 128 and 344: blocks of 48 leave remainders of 32 and 8, which train but are not returned.
    run = studies.adapt_by_rotation(block_size=48, map="k = 3", **SMALL)
    assert run.generators[-1].shape[1:] == (48, 48)
    layers = 5
    assert len(run.generators[-1]) == layers * (6 * (128 // 48) + 344 // 48)


def test_bad_options_are_refused():
    for options in ({"steps": 0}, {"block_size": 1}, {"lr": 0.0}, {"map": "k"}):
        with pytest.raises(OptionError):
            studies.adapt_by_rotation(**options)


def test_measured_and_predicted_errors_agree_at_any_angle():
    Q = torch.cat([skew(5, 7, std, seed) for seed, std in enumerate((1e-3, 0.1, 0.5))])
    live = studies.live_errors(Q, ["k = 2", "k = 3", "k = 3 + polish", "p = 2", "exact"])
    assert float(live.angles.max()) > 1 and live.worst_gap < 1e-10
    assert set(live.points) == set(live.measured) and live.points["k = 2"][0] is live.angles
    for name, errors in live.measured.items():
        assert torch.allclose(errors, linalg.orthogonality_error(apply_map(name, Q)))


def test_curves_are_the_laws_and_bound_what_generators_do():
    grid = torch.linspace(0.05, 1.4, 28, dtype=torch.float64)
    curves = studies.error_curves(grid, ["k = 2", "k = 3"])
    planes = studies.plane_curves(grid, ["k = 2", "k = 3"])
    assert torch.allclose(curves["k = 2"], grid**6)
    assert torch.allclose(planes["k = 3"], (1 - grid**4).abs())
    assert bool((curves["k = 3"].diff() >= 0).all())
    for angle in (0.3, 1.1):
        scaled = skew(1, 6, 1.0)
        scaled = scaled * angle / linalg.singular_values(scaled)[:, :1, None]
        measured = studies.live_errors(scaled, ["k = 3"]).measured["k = 3"]
        assert float(measured) <= float(
            studies.error_curves(torch.linspace(0, angle, 500).double(), ["k = 3"])["k = 3"][-1]
        )


def test_parity_errors_are_the_closed_form():
    errors = studies.parity_errors(skew(3, 6, 0.1), 0.5, [2, 3, 4])
    assert errors == pytest.approx([0.5**6, 2 * 0.5**4 - 0.5**8, 0.5**10], rel=1e-9)


def test_the_top_plane_is_followed_through_every_map():
    found = studies.planes_at_norms(skew(1, 8, 0.2)[0], [0.5, 1.0, 1.2], ["k = 2", "k = 3", "exact"])
    angles, values = found["k = 3"]
    assert torch.allclose(angles, torch.tensor([0.5, 1.0, 1.2]).double(), atol=1e-7)
    assert torch.allclose(values, (1 - angles**4).abs(), atol=1e-10)
    assert torch.allclose(found["k = 2"][1], (1 + angles**6).sqrt(), atol=1e-10)
    assert torch.allclose(found["exact"][1], torch.ones(3).double(), atol=1e-12)


def test_merges_follow_the_law_and_exact_rotations_do_not_drift():
    at, measured, predicted = studies.simulate_merges(
        ["k = 2", "k = 3", "k = 3 + polish", "exact"],
        merges=40,
        every=15,
        size=32,
        block_size=16,
        std=0.06,
        seeds=[0, 1],
    )
    assert at == [0, 15, 30, 40]
    for name, values in measured.items():
        assert values.shape == (2, 4) and bool((values[:, 0] == 0).all()) and predicted[name][0] == 0
        # 80 generators of 16 x 16: the mean of theta^6, the worst of these, has a standard error of about 10 %.
        assert values[:, -1].tolist() == pytest.approx([predicted[name][-1]] * 2, rel=0.3, abs=1e-12)
    assert predicted["k = 3"][-1] < 0 < predicted["k = 2"][-1]
    for options in ({"merges": 0}, {"every": 0}, {"size": 33}, {"block_size": 0}):
        with pytest.raises(OptionError):
            studies.simulate_merges(["exact"], **options)


def test_live_drift_of_random_generators_is_the_law():
    Q = skew(2000, 8, 0.08)
    measured, predicted = studies.live_drift(Q, "k = 3")
    determinant = torch.linalg.slogdet(linalg.cayley_neumann(Q, terms=3)).logabsdet / 8
    assert measured == pytest.approx(float(determinant.mean()), rel=1e-9)
    # Each block's size is estimated from its own 28 entries: fourth powers of it are biased by a few per cent.
    assert measured / predicted == pytest.approx(1, abs=0.15)


def test_the_advisers_table_says_what_the_adviser_says():
    products, names = studies.adviser_table([0.1, 0.5, 3.0], [1e-2, 1e-6])
    assert list(products) == ["0.01", "1e-06"]
    for tolerance, row in products.items():
        chosen = [linalg.recommended_map(a, tolerance=float(tolerance)) for a in (0.1, 0.5, 3.0)]
        assert [c.products for c in chosen] == [None if math.isnan(p) else p for p in row]
        assert names[tolerance] == [str(c) for c in chosen]
