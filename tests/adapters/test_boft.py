"""BOFT against the butterfly matrix written out; products of factors against factor by factor."""

import math

import pytest
import torch
from adapted import assert_merged_is_forward, inputs, linear, moved, part, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from orthokit.adapters import boft
from orthokit.adapters.boft import BOFT, fused
from orthokit.adapters.oft import OFT
from orthokit.errors import NonFiniteError, OptionError
from orthokit.linalg import (
    apply_butterfly,
    block_diagonal,
    butterfly_depth,
    butterfly_matrix,
    cayley,
    singular_values,
    unpack_skew,
)


def dense_rotation(config, v, width):
    """``F_0 F_1 ... F_{m-1}`` with every factor written out by linalg."""
    Q = (32 / config.block_size) ** 0.75 * unpack_skew(v.expand(-1, width // config.block_size, -1))
    return butterfly_matrix(cayley(Q))


@pytest.mark.parametrize("block_size, factors", [(4, 1), (4, 2), (4, 3), (2, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("largest", [0, 8, 128])
def test_forward_and_all_gradients_are_those_of_the_dense_butterfly(block_size, factors, share, largest, monkeypatch):
    monkeypatch.setattr(boft, "_LARGEST_FUSED", largest)
    config, width = BOFT(block_size, factors, share=share), 24 if block_size == 3 else 16
    layer = moved(config.wrap(linear(width)), turn=0.1)
    x, v = inputs(2, 3, width, grad=True), part(layer).generator
    weights = inputs(2, 3, 7, seed=2)
    W = layer.base.weight
    expected = F.linear(x, W @ dense_rotation(config, v, width), layer.base.bias)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    pairs = zip(
        torch.autograd.grad((layer(x) * weights).sum(), [x, v]),
        torch.autograd.grad((expected * weights).sum(), [x, v]),
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in pairs)
    assert torch.allclose(layer.effective_weight(dtype=torch.float64), apply_butterfly(stacked(layer), W), atol=1e-12)


def stacked(layer):
    return torch.stack(part(layer).rotations())


@settings(max_examples=40)
@given(st.sampled_from([(2, 32), (4, 32), (4, 24), (6, 24), (8, 32)]), st.integers(1, 5), st.integers(1, 5))
def test_any_grouping_of_the_factors_gives_the_same_product(sizes, factors, together):
    b, width = sizes
    factors = min(factors, butterfly_depth(width, b))
    layer = moved(BOFT(b, factors).wrap(linear(width)))
    whole, x = part(layer).dense(), inputs(5, width)
    original, boft.run_length = boft.run_length, lambda block_size: together
    try:
        assert torch.allclose(part(layer).dense(), whole, atol=1e-13)
        assert torch.allclose(part(layer).turn(x), x @ whole.mT, atol=1e-12)
        assert len(part(layer).factors(torch.float64)) == -(-factors // together)
    finally:
        boft.run_length = original


def test_one_run_of_factors_is_the_butterfly_of_its_blocks():
    R = cayley(unpack_skew(inputs(3, 8, 6)))  # 3 factors of 8 blocks of 4
    assert torch.allclose(block_diagonal(fused(R, 0, 3)), butterfly_matrix(R), atol=1e-13)
    assert fused(R, 0, 3).shape == (2, 16, 16) and fused(R, 1, 1).shape == (8, 4, 4)


def test_products_of_two_factors_are_always_formed_and_more_while_they_stay_small():
    assert [boft.run_length(b) for b in (4, 8, 32, 64, 512)] == [6, 5, 3, 2, 2]


@pytest.mark.parametrize("options", [{}, {"share": True}, {"map": "exp"}, {"radius": 0.3}])
def test_one_factor_is_oft(options):
    butterfly, plain = moved(BOFT(4, 1, **options).wrap(linear(16))), OFT(4, **options).wrap(linear(16))
    with torch.no_grad():
        part(plain).generator.copy_(part(butterfly).generator[0])
    x = inputs(5, 16)
    assert torch.allclose(butterfly(x), plain(x), atol=1e-14)
    assert torch.allclose(butterfly.merged().weight, plain.merged().weight, atol=1e-14)
    assert part(butterfly).largest_angle() == pytest.approx(part(plain).largest_angle(), abs=1e-7)


@settings(max_examples=40)
@given(
    sites(), st.sampled_from([BOFT(2, 3), BOFT(4, 2), BOFT(4, 2, share=True), BOFT(4, 1, map="exp")]), st.integers(0, 9)
)
def test_merged_layer_computes_the_same_for_every_kind_and_type(site, config, seed):
    plain, x = site
    assert_merged_is_forward(moved(config.wrap(plain), seed), x)


@settings(max_examples=30)
@given(sites(kinds=("linear", "transposed")), st.integers(0, 9))
def test_scaled_outputs_merge_and_leave_the_bias_alone(site, seed):
    plain, x = site
    layer = BOFT(4, 2, scale_outputs=True).wrap(plain)
    assert torch.equal(layer.merged().weight, plain.weight)
    assert_merged_is_forward(layer, x)
    assert_merged_is_forward(moved(layer, seed), x)


@settings(max_examples=15)
@given(sites(kinds=("conv",)), st.booleans(), st.integers(0, 9))
def test_merged_convolution_read_as_patches_computes_the_same(site, scaled, seed):
    plain, x = site
    assert_merged_is_forward(moved(BOFT(4, 2, conv="patches", scale_outputs=scaled).wrap(plain), seed), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("largest", [0, 128])
def test_at_rest_outputs_and_weights_are_the_same_bits(dtype, factors, largest, monkeypatch):
    monkeypatch.setattr(boft, "_LARGEST_FUSED", largest)
    plain, x = linear(16, dtype=dtype), inputs(200, 16).to(dtype)
    layer = BOFT(4, factors).wrap(plain)
    assert torch.equal(layer(x), plain(x)) and torch.equal(layer.merged().weight, plain.weight)


def cosines(W):
    return F.normalize(W, dim=1) @ F.normalize(W, dim=1).mT


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (6, 32)])
def test_singular_values_row_lengths_and_angles_between_rows_are_kept(shape):
    layer = moved(BOFT(4, 3).wrap(linear(shape[1], shape[0], dtype=torch.float32)), turn=0.5)
    W, turned = layer.base.weight.detach(), layer.merged().weight.detach()
    assert float((turned - W).abs().max()) > 0.1
    assert torch.allclose(singular_values(turned), singular_values(W), atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), W.norm(dim=1), atol=1e-5)
    assert torch.allclose(cosines(turned), cosines(W), atol=1e-5)


@pytest.mark.parametrize("largest", [0, 128])
@pytest.mark.parametrize("map", ["cayley", "exp", "cayley_neumann"])
def test_orthogonality_and_the_largest_angle_are_those_of_the_whole_matrix(largest, map, monkeypatch):
    monkeypatch.setattr(boft, "_LARGEST_FUSED", largest)
    layer = moved(BOFT(4, 3, map=map).wrap(linear(16, dtype=torch.float32)), turn=0.2)
    R = part(layer).dense()
    assert part(layer).orthogonality_error() < 5e-6
    assert part(layer).largest_angle() == pytest.approx(float(torch.linalg.eigvals(R).angle().abs().max()), abs=1e-4)


def test_enough_factors_reach_every_coordinate():
    full = moved(BOFT(4, 3).wrap(linear(16)))
    assert bool((part(full).dense() != 0).all())
    half = part(moved(BOFT(4, 2).wrap(linear(16)))).dense()
    assert int(half.count_nonzero()) == 16 * 8


def test_strength_zero_is_no_change_at_all_and_between_scales_every_generator():
    layer, x = moved(BOFT(4, 2, scale_outputs=True).wrap(linear(16))), inputs(3, 16)
    part(layer).strength = 0.0
    assert torch.allclose(layer(x), layer.base(x), rtol=1e-15) and torch.equal(layer.merged().weight, layer.base.weight)
    part(layer).strength = 0.5
    Q = 0.5 * 8**0.75 * unpack_skew(part(layer).generator.detach())
    scale = 1 + 0.5 * (part(layer).scale.detach() - 1)
    expected = scale[:, None] * (layer.base.weight @ butterfly_matrix(cayley(Q)))
    assert torch.allclose(layer.merged().weight, expected, atol=1e-12)
    assert_merged_is_forward(layer, x)


def test_dropout_rests_blocks_of_every_factor_in_training_alone():
    layer, x = moved(BOFT(4, 2, dropout=0.5).wrap(linear(400, 3))), inputs(2, 400)
    layer.train()
    torch.manual_seed(0)
    eye = torch.eye(4, dtype=torch.float64)
    at_rest = [(part(layer)._rotations(torch.float64, drop=True) == eye).all(-1).all(-1) for _ in range(20)]
    share = torch.stack(at_rest).double()
    assert share.shape == (20, 2, 100)
    assert bool(((share.mean((0, 2)) - 0.5).abs() < 5 * 0.5 / math.sqrt(2000)).all())
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert_merged_is_forward(layer, x)


def test_factors_are_kept_while_nothing_changes():
    layer, x = moved(BOFT(4, 2).wrap(linear(16))), inputs(3, 16)
    with torch.no_grad():
        first = layer(x)
        kept = part(layer)._kept[2]
        layer(x)
        assert part(layer)._kept[2] is kept
        part(layer).generator.mul_(2)
        assert not torch.allclose(layer(x), first)


@pytest.mark.parametrize("factors", [1, 3])
def test_gradients_pass_the_numerical_check(factors):
    layer = moved(BOFT(2, factors, scale_outputs=True).wrap(linear(8, 3)), turn=0.2)
    names = ("generator", "scale")
    x = inputs(2, 8, grad=True)

    def function(*tensors):
        with torch.nn.utils.stateless._reparametrize_module(part(layer), dict(zip(names, tensors[:2], strict=True))):
            return layer(tensors[2]), part(layer).merge(layer.base.weight)

    values = [getattr(part(layer), name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (*values, x))


def test_sizes_that_do_not_fit_are_refused_with_what_would():
    with pytest.raises(OptionError, match="Nearest: 4 or 6"):
        BOFT(5).wrap(nn.Linear(12, 3))
    with pytest.raises(OptionError, match="at most 2 butterfly factors; got factors=3"):
        BOFT(4, 3).wrap(nn.Linear(24, 3), name="up")
    with pytest.raises(OptionError, match="at most 1 butterfly factors"):
        BOFT(3, 2).wrap(nn.Linear(12, 3))
    with pytest.raises(OptionError, match="factors must be at least 1"):
        BOFT(4, 0)
    # 8 channels a group: two blocks of 4, so two factors, though all 16 channels would allow three
    BOFT(4, 2).wrap(nn.Conv1d(16, 4, 3, groups=2))
    with pytest.raises(OptionError, match=r"8 coordinates.*at most 2"):
        BOFT(4, 3).wrap(nn.Conv1d(16, 4, 3, groups=2))


def test_scaled_outputs_need_outputs():
    with pytest.raises(OptionError, match="words"):
        BOFT(4, 2, scale_outputs=True).wrap(nn.Embedding(5, 8))
    with pytest.raises(OptionError, match="patches"):
        BOFT(4, 2, scale_outputs=True).wrap(nn.Conv1d(8, 4, 3))


def test_a_generator_that_is_not_finite_stops_a_merge_by_name():
    layer = BOFT(4, 2, scale_outputs=True).wrap(linear(16), name="blocks.0.down")
    with torch.no_grad():
        part(layer).scale[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"scale of boft on 'blocks\.0\.down'"):
        layer.merged()
