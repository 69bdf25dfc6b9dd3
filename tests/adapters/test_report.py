"""The spectrum report: growth splits exactly by cause, laws meet measurements, causes are named."""

import math

import pytest
import torch
from torch import nn

from orthokit.adapters import POET, attach, spectrum_report
from orthokit.adapters.block_rotation import rotate_sides
from orthokit.errors import ParameterError


def moved(rows=24, columns=24, *, merges=5, std=0.05, dtype=torch.float32, track=True, **options):
    """A layer after some merges of random generators, with a last one not merged yet."""
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=g, dtype=torch.float64) / columns**0.5)
    layer = attach(linear.to(dtype), POET(8, **options), track_spectrum=track)
    for i in range(merges + 1):
        if i:
            layer.merge_()
        with torch.no_grad():
            for side in (layer.input, layer.output):
                side.generator.normal_(std=std, generator=g)
    return layer


def row(layer):
    return spectrum_report(layer).iloc[0]


@pytest.mark.parametrize("options", [{"terms": 3}, {"terms": 2}, {"map": "exp_taylor", "order": 2}, {"map": "cayley"}])
@pytest.mark.parametrize("quantize", [None, "uint8"])
def test_growth_is_the_sum_of_its_causes(options, quantize):
    layer = moved(quantize=quantize, **options)
    found = row(layer)
    W, initial = layer.exact_rotations(), layer.ledger.initial
    now = rotate_sides(layer.dense(), *W)
    assert math.isclose(found["growth"], math.log(float(now.norm() / initial.norm())), abs_tol=1e-10)
    parts = found[["truncation", "rounding", "requantization"]].sum()
    assert math.isclose(found["growth"], parts, abs_tol=1e-14)


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_the_law_is_what_is_measured_where_rounding_is_none(terms):
    found = row(moved(dtype=torch.float64, terms=terms, std=0.1))
    assert math.isclose(found["mean log drift"], found["law"], rel_tol=1e-6)
    assert 0.5 < found["law"] / found["expected"] < 2  # a dozen small random generators
    assert found["cause"] == "truncation" and math.copysign(1, found["law"]) == (-1 if terms == 3 else 1)


def test_causes_are_told_apart():
    assert row(moved(map="cayley"))["cause"] == "rounding"
    assert row(moved(map="cayley", dtype=torch.bfloat16))["rounding noise"] > 1e-4
    assert row(moved(map="cayley", quantize="uint8"))["cause"] == "requantization"
    still = attach(nn.Linear(8, 8, dtype=torch.float64), POET(4))
    assert row(still)["cause"] == "none" and row(still)["drift"] < 1e-14


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"quantize": "uint8"}])
def test_noise_predicts_the_typical_change_of_a_singular_value(options):
    layer = moved(48, 48, merges=20, map="cayley", **options)
    found, initial = row(layer), layer.ledger.initial
    now = torch.linalg.svdvals(rotate_sides(layer.dense(), *layer.exact_rotations()))
    # The upper half: small values are also pushed apart, which is a second-order effect.
    measured = float((now - initial)[:24].square().mean().sqrt() / initial[0])
    predicted = math.hypot(found["rounding noise"], found["requantization noise"])
    assert 0.5 < measured / predicted < 2


def test_angle_is_that_of_the_largest_plane():
    layer = attach(nn.Linear(8, 8), POET(8, map="cayley"))
    with torch.no_grad():
        layer.output.generator[0] = math.tan(0.2)
    assert math.isclose(row(layer)["angle"], 0.4, rel_tol=1e-4)
    assert math.isclose(float(layer.output.angles()[0]), 0.4, rel_tol=1e-6) and len(layer.output.angles()) == 4


def test_a_spectrum_that_is_not_tracked_is_not_invented():
    found = row(moved(track=False))
    assert math.isnan(found["drift"]) and found["merges"] == 5 and found["truncation"] < 0


def test_zero_weights_and_plain_models():
    linear = nn.Linear(6, 6, bias=False)
    nn.init.zeros_(linear.weight)
    layer = attach(linear, POET(3))
    layer.merge_()
    assert row(layer)["drift"] == 0 and row(layer)["growth"] == 0
    with pytest.raises(ParameterError, match="no POET layer"):
        spectrum_report(nn.Linear(3, 3))
