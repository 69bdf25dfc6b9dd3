"""OFT against its definition, and what it promises: nothing at rest, merge = forward, nothing but angles changed."""

import copy
import itertools
import math

import pytest
import torch
from adapted import Conv1D, assert_merged_is_forward, inputs, linear, moved, part, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orthokit.adapters._turn import generator_bound, plane_angles, turn_rows
from orthokit.adapters.boft import BOFT
from orthokit.adapters.hra import HRA
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.oft import OFT
from orthokit.errors import NonFiniteError, OptionError, UnknownNameError
from orthokit.linalg import (
    block_diagonal,
    cayley,
    cayley_neumann,
    exp,
    exp_taylor,
    packed_size,
    singular_values,
    unpack_skew,
)

MAPS = {
    "cayley": cayley,
    "cayley_neumann": lambda Q: cayley_neumann(Q, terms=5),
    "exp": exp,
    "exp_taylor": lambda Q: exp_taylor(Q, order=4),
}


def dense_rotation(config, v, width):
    """``Diag(f(Q_1), ..., f(Q_k))`` written out from the options."""
    b = config.block_size
    scale = config.angle_scale * ((32 / b) ** 0.75 if config.block_rate else 1.0)
    blocks = []
    for packed in v.expand(width // b, -1):
        Q = scale * unpack_skew(packed)
        if config.radius is not None:
            length = torch.linalg.matrix_norm(Q)
            Q = Q * config.radius / length if length > config.radius else Q
        blocks.append(MAPS[config.map](Q))
    return block_diagonal(torch.stack(blocks))


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("options", [{}, {"share": True}, {"radius": 0.5}, {"angle_scale": 0.3, "block_rate": False}])
@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12), (12,), (0, 12), (300, 12)])
def test_forward_and_all_gradients_are_those_of_the_dense_formulation(map, options, shape):
    config = OFT(4, map=map, tolerance=None, **options)
    layer = moved(config.wrap(linear()), turn=0.1)
    x, v = inputs(*shape, grad=True), part(layer).generator
    weights = inputs(*shape[:-1], 7, seed=2)
    W, bias = layer.base.weight, layer.base.bias
    expected = F.linear(x, W @ dense_rotation(config, v, 12), bias)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    pairs = zip(
        torch.autograd.grad((layer(x) * weights).sum(), [x, v]),
        torch.autograd.grad((expected * weights).sum(), [x, v]),
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in pairs)
    assert torch.allclose(layer.effective_weight(dtype=torch.float64), W @ dense_rotation(config, v, 12), atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"share": True}, {"map": "cayley_neumann"}, {"radius": 0.2}, {"map": "exp"}])
@pytest.mark.parametrize("merging", [False, True])
def test_gradients_pass_the_numerical_check(options, merging):
    layer = moved(OFT(2, **options).wrap(linear(4, 3)), turn=0.2)
    v, x = part(layer).generator, inputs(2, 4, grad=True)

    def function(v, x):
        with torch.nn.utils.stateless._reparametrize_module(part(layer), {"generator": v}):
            return x @ part(layer).merge(layer.base.weight).mT if merging else layer(x)

    assert torch.autograd.gradcheck(function, (v.detach().requires_grad_(), x))


@settings(max_examples=80)
@given(sites(), st.sampled_from([{}, {"share": True}, {"map": "exp"}, {"radius": 0.4}]), st.integers(0, 9))
def test_merged_layer_computes_the_same_for_every_kind_and_type(site, options, seed):
    plain, x = site
    layer = moved(OFT(4, **options).wrap(plain), seed)
    assert_merged_is_forward(layer, x)


@settings(max_examples=25)
@given(sites(kinds=("conv",)), st.integers(0, 9))
def test_merged_convolution_read_as_patches_computes_the_same(site, seed):
    plain, x = site
    assert_merged_is_forward(moved(OFT(4, conv="patches").wrap(plain), seed), x)


@settings(max_examples=40)
@given(sites(groups=False), st.permutations([OFT(4), BOFT(4, 2), HRA(4), OFT(8, map="exp")]), st.integers(0, 9))
def test_several_adapters_of_different_kinds_merge_in_their_order(site, configs, seed):
    plain, x = site
    layer = AdaptedLayer(plain)
    for name, config in zip("abc", configs[:3], strict=True):
        layer.add(name, config)
    assert_merged_is_forward(moved(layer, seed, turn=0.1), x)


@settings(max_examples=40)
@given(sites(), st.sampled_from([OFT(4), OFT(8, share=True), OFT(2, map="cayley_neumann"), OFT(4, map="exp")]))
def test_at_rest_outputs_and_weights_are_the_same_bits(site, config):
    plain, x = site
    before, weight = plain(x), plain.weight.detach().clone()
    layer = config.wrap(plain)
    if isinstance(plain, (nn.Linear, nn.Embedding, Conv1D)):
        assert torch.equal(layer(x), before)
    else:  # the same inputs in another order of memory: convolutions sum in another order
        rows = x.movedim(1, -1)
        assert torch.equal(part(layer).turn(rows), rows)
        assert_merged_is_forward(layer, x)
    assert torch.equal(layer.merged().weight, weight)


def test_attaching_changes_nothing_where_the_weight_is_transposed():
    x, plain = inputs(3, 8, dtype=torch.float32), Conv1D(5, 8)
    assert torch.equal(OFT(4).wrap(plain)(x), plain(x))


def cosines(W):
    return F.normalize(W, dim=1) @ F.normalize(W, dim=1).mT


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (6, 32)])
@pytest.mark.parametrize("map", ["cayley", "cayley_neumann", "exp"])
def test_singular_values_row_lengths_and_angles_between_rows_are_kept(shape, map):
    layer = moved(OFT(8, map=map).wrap(linear(shape[1], shape[0], dtype=torch.float32)), turn=0.5)
    W, turned = layer.base.weight.detach(), layer.merged().weight.detach()
    assert float((turned - W).abs().max()) > 0.1
    assert torch.allclose(singular_values(turned), singular_values(W), atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), W.norm(dim=1), atol=1e-5)
    assert torch.allclose(cosines(turned), cosines(W), atol=1e-5)


@pytest.mark.parametrize("map", ["cayley", "exp"])
def test_the_rotation_is_orthogonal_to_rounding_whatever_the_angle(map):
    layer = moved(OFT(8, map=map).wrap(linear(16, dtype=torch.float32)), turn=2.1)
    assert part(layer).orthogonality_error() < 1e-5
    assert 2.0 < part(layer).largest_angle() <= math.pi


@pytest.mark.parametrize("map", MAPS)
def test_the_largest_angle_is_that_of_the_eigenvalues(map):
    layer = moved(OFT(4, map=map, tolerance=None).wrap(linear()), turn=0.3)
    found = torch.linalg.eigvals(part(layer).dense()).angle().abs().max()
    assert part(layer).largest_angle() == pytest.approx(float(found), abs=1e-9)


def test_an_exponential_beyond_half_a_turn_is_measured_on_the_shorter_side():
    angles = plane_angles(torch.tensor([[4.0]]), OFT(2, map="exp").spec)
    assert float(angles) == pytest.approx(2 * math.pi - 4.0)


def test_sharing_uses_one_block_everywhere():
    layer = moved(OFT(4, share=True).wrap(linear()))
    (stack,) = part(layer).rotations()
    assert part(layer).generator.shape == (1, 6) and stack.shape == (3, 4, 4)
    assert torch.equal(stack[0], stack[2])


def test_strength_scales_the_generator_and_zero_is_no_change_at_all():
    layer, x = moved(OFT(4).wrap(linear())), inputs(5, 12)
    Q = (32 / 4) ** 0.75 * unpack_skew(part(layer).generator.detach())
    part(layer).strength = 0.25
    assert torch.allclose(part(layer).dense(), block_diagonal(cayley(0.25 * Q)))
    assert_merged_is_forward(layer, x)
    part(layer).strength = 0.0
    assert torch.equal(layer(x), layer.base(x)) and torch.equal(layer.merged().weight, layer.base.weight)


# --- one rate for all block sizes


def first_turn(block_size: int, *, agree: bool) -> float:
    """Largest angle of the generators after one step of Adam, on average over blocks."""
    layer = OFT(block_size).wrap(linear(256, 3, dtype=torch.float32))
    v = part(layer).generator
    optimizer = torch.optim.Adam([v], lr=1e-3)
    # The first step is +-lr for each entry, whatever the size of its gradient.
    v.grad = torch.ones_like(v) if agree else torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    return float(torch.linalg.matrix_norm(unpack_skew(part(layer).packed().detach()), 2).mean())


@pytest.mark.parametrize("block_size", [8, 16, 128, 256])
def test_a_step_of_adam_turns_less_with_the_block_for_random_signs_and_more_for_signs_that_agree(block_size):
    free, agreeing = (first_turn(block_size, agree=agree) / first_turn(32, agree=agree) for agree in (False, True))
    # sqrt(b) and b against b^(3/4); small blocks meet the edge of the semicircle from below.
    assert free == pytest.approx((32 / block_size) ** 0.25, rel=0.25)
    assert agreeing == pytest.approx((block_size / 32) ** 0.25, rel=0.05)


def test_the_rate_is_one_at_the_published_block_size_and_can_be_left_out():
    assert OFT(32).rate == 1.0 and OFT(2).rate == 8.0 and OFT(512).rate == 0.125
    assert OFT(8, block_rate=False).rate == 1.0 and OFT(2, angle_scale=3.0).rate == 24.0


# --- the constrained form


@settings(max_examples=40)
@given(st.floats(0.01, 3.0), st.floats(0.01, 2.0), st.sampled_from([2, 4, 6]))
def test_no_generator_is_longer_than_the_radius(radius, turn, block_size):
    layer = moved(OFT(block_size, radius=radius).wrap(linear()), turn=turn)
    lengths = torch.linalg.matrix_norm(unpack_skew(part(layer).packed().detach()))
    free = torch.linalg.matrix_norm(OFT(block_size).rate * unpack_skew(part(layer).generator.detach()))
    assert torch.allclose(lengths, free.clamp_max(radius), rtol=1e-9)
    assert part(layer).largest_angle() <= 2 * math.atan(radius / math.sqrt(2)) + 1e-9
    assert_merged_is_forward(layer, inputs(4, 12))


def test_the_projection_has_a_finite_gradient_at_rest():
    layer = OFT(4, radius=0.1).wrap(linear())
    layer(inputs(3, 12)).square().sum().backward()
    gradient = part(layer).generator.grad
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


# --- dropout


def test_dropout_puts_each_block_at_rest_with_its_chance_and_only_in_training():
    layer = moved(OFT(4, dropout=0.3).wrap(linear(400, 3))).train()
    torch.manual_seed(0)
    eye, full = torch.eye(4, dtype=torch.float64), part(layer).rotations()[0]
    rests = []
    for _ in range(40):
        blocks = part(layer).factors(torch.float64, drop=True)
        at_rest = (blocks == eye).all(-1).all(-1)
        assert torch.equal(blocks[~at_rest], full[~at_rest])
        rests.append(at_rest.double())
    share = torch.stack(rests)
    # 4000 draws: five standard errors
    assert abs(float(share.mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert bool((share.mean(0) < 1).all()) and bool((share.mean(0) > 0).all())
    x = inputs(2, 400)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert_merged_is_forward(layer, x)


def test_a_shared_block_rests_place_by_place():
    layer = moved(OFT(4, share=True, dropout=0.5).wrap(linear(400, 3))).train()
    torch.manual_seed(0)
    blocks = part(layer).factors(torch.float64, drop=True)
    assert 0 < int((blocks == torch.eye(4)).all(-1).all(-1).sum()) < 100


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_drops_the_same_blocks_twice(reentrant):
    layer = moved(OFT(4, dropout=0.5).wrap(linear())).train()
    x = inputs(5, 12, grad=True)

    def gradients(function):
        torch.manual_seed(3)
        return torch.autograd.grad(function(x).square().sum(), [x, part(layer).generator])

    if reentrant:  # the form that cannot be asked for gradients by name
        torch.manual_seed(3)
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        found = [x.grad, part(layer).generator.grad]
    else:
        found = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(layer), strict=True))


# --- the series and its remainder


@given(st.integers(2, 24), st.floats(0.001, 3.0), st.integers(0, 99))
def test_the_bound_is_never_below_the_norm_and_close_to_it(b, size, seed):
    g = torch.Generator().manual_seed(seed)
    v = size * torch.randn(3, packed_size(b), generator=g)
    norm = float(torch.linalg.matrix_norm(unpack_skew(v.double()), 2).max())
    assert norm <= generator_bound(v) <= 1.5 * norm
    assert norm <= generator_bound(v, enough=1e9)


@pytest.mark.parametrize("terms", [2, 3, 5])
def test_a_series_beyond_the_tolerance_gives_way_to_the_exact_map(terms):
    config = OFT(4, map="cayley_neumann", terms=terms, tolerance=1e-4)
    layer, x = config.wrap(linear()), inputs(5, 12)
    v = part(layer).generator
    with torch.no_grad():
        v[1, 0] = 1e-3
    layer(x)
    assert not part(layer).switched and part(layer).remainder() < 1e-4
    with torch.no_grad():
        v[1, 0] = 0.5
    layer(x)
    assert part(layer).switched and "switched to exact" in part(layer).detail()
    assert part(layer).orthogonality_error() < 1e-12
    assert_merged_is_forward(layer, x)
    with torch.no_grad():
        v[1, 0] = 1e-3
    layer(x)
    assert not part(layer).switched
    free = moved(OFT(4, map="cayley_neumann", terms=terms, tolerance=None).wrap(linear()), turn=0.3)
    assert part(free).orthogonality_error() > 1e-3 and not part(free).switched


@settings(max_examples=40)
@given(st.floats(1e-8, 1e-2), st.integers(1, 6), st.floats(0.001, 1.0))
def test_the_distance_from_the_exact_map_is_never_beyond_the_tolerance(tolerance, terms, turn):
    config = OFT(4, map="cayley_neumann", terms=terms, tolerance=tolerance, block_rate=False)
    layer = moved(config.wrap(linear()), turn=turn)
    exact = cayley(unpack_skew(part(layer).generator.detach()))
    distance = torch.linalg.matrix_norm(part(layer).rotations()[0].detach() - exact, 2).max()
    assert float(distance) <= tolerance * (1 + 1e-6)


# --- kept factors


def spoil(layer):
    part(layer)._kept[2].fill_(float("nan"))  # what is kept, if it is used


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_factors_are_kept_while_nothing_changes_and_made_again_after_a_step(options):
    layer, x = moved(OFT(4).wrap(linear(dtype=torch.float32))), inputs(5, 12, dtype=torch.float32)
    optimizer = torch.optim.AdamW([part(layer).generator], lr=0.1, **options)
    with torch.no_grad():
        first = layer(x)
        spoil(layer)
        assert bool(layer(x).isnan().any())  # so it was kept
        layer(x).sum()
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        second = layer(x)
    assert not torch.allclose(first, second, atol=1e-2)
    assert torch.allclose(second, layer(x))


def test_every_way_to_change_an_adapter_is_seen():
    layer, x = moved(OFT(4).wrap(linear(dtype=torch.float32))), inputs(5, 12, dtype=torch.float32)
    state = {k: 2 * p for k, p in part(layer).state_dict().items()}

    def cast():
        layer.double().float()

    changes = {
        "state": lambda: part(layer).load_state_dict(state),
        "data": lambda: part(layer).generator.data.mul_(0.5),
        "new data": lambda: setattr(part(layer).generator, "data", torch.ones(3, 6)),
        "strength": lambda: setattr(part(layer), "strength", 0.5),
        "cast": cast,
    }
    for name, change in changes.items():
        with torch.no_grad():
            layer(x)
            spoil(layer)
        change()
        with torch.no_grad():
            found = layer(x)
        assert torch.allclose(found, layer(x)), name


def test_a_copy_and_other_types_have_factors_of_their_own():
    layer, x = moved(OFT(4).wrap(linear(dtype=torch.float32))).eval(), inputs(5, 12, dtype=torch.float32)
    with torch.inference_mode():
        layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        part(twin).generator.zero_()
        assert torch.equal(twin(x), layer.base(x)) and not torch.equal(layer(x), layer.base(x))
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert part(half).generator.dtype == torch.float32
        assert half(x.bfloat16()).dtype == torch.bfloat16


# --- bad input


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 1},
        {"terms": 0},
        {"order": 0},
        {"tolerance": 0.0},
        {"radius": -1.0},
        {"dropout": 1.0},
        {"angle_scale": 0.0},
        {"init_std": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError):
        OFT(**options)


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'cayley'"):
        OFT(map="caley")
    with pytest.raises(UnknownNameError, match="channels"):
        OFT(conv="channel")


@pytest.mark.parametrize(
    "width, block_size, offered", [(12, 5, "4 or 6"), (12, 32, "12"), (30, 4, "3 or 5"), (7, 2, "7"), (1, 2, "none")]
)
def test_a_block_size_that_does_not_divide_is_refused_with_the_nearest_that_do(width, block_size, offered):
    with pytest.raises(OptionError, match=f"must divide the {width} inputs.*Nearest: {offered}"):
        OFT(block_size).wrap(nn.Linear(width, 3), name="up")


def test_a_block_never_straddles_groups():
    conv = nn.Conv2d(12, 4, 3, groups=2)
    with pytest.raises(OptionError, match=r"6 channels of a group.*Nearest: 3 or 6"):
        OFT(4).wrap(conv)
    OFT(6).wrap(conv)
    OFT(27, conv="patches").wrap(conv)


def test_dropout_of_what_is_turned_in_the_weight_is_refused():
    with pytest.raises(OptionError, match="dropout acts on the inputs"):
        OFT(4, dropout=0.1, conv="patches").wrap(nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("map", MAPS)
def test_a_generator_that_is_not_finite_stops_a_merge_by_name_but_not_a_training_step(bad, map):
    layer = OFT(4, map=map).wrap(linear(), name="blocks.3.up")
    weight = layer.base.weight.clone()
    with torch.no_grad():
        part(layer).generator[0, 0] = bad
    if math.isnan(bad):  # an infinite generator has a limit under the Cayley transform, a half turn
        assert bool(layer(inputs(2, 12)).isnan().any())
    with pytest.raises(NonFiniteError, match=r"blocks\.3\.up"):
        layer.merged()
    with pytest.raises(NonFiniteError, match="generator"):
        layer.fold()
    assert torch.equal(layer.base.weight, weight) and not layer.folded


# --- the product itself


@given(st.sampled_from([(6, 2), (3, 4), (1, 12), (1, 3)]), st.sampled_from([(), (1,), (7,), (2, 5)]), st.booleans())
def test_rows_through_blocks_are_the_dense_product_in_any_layout(blocks, rows, transposed):
    k, b = blocks
    stack = inputs(k, b, b)
    x = inputs(*rows, 12, seed=2)
    x = x.mT.contiguous().mT if x.ndim > 1 else x
    stack = stack.mT.contiguous().mT if transposed else stack
    assert torch.allclose(turn_rows(stack, x), x @ block_diagonal(stack.expand(12 // b, b, b)), atol=1e-12)


def test_half_precision_rows_meet_blocks_rounded_once():
    layer = moved(OFT(4).wrap(linear(dtype=torch.bfloat16)))
    x = inputs(64, 12, dtype=torch.bfloat16)
    expected, found = x.double() @ part(layer).dense().mT, part(layer).turn(x).detach().double()
    # Blocks are rounded by 2^-9 of themselves, results as well.
    assert float((found - expected).abs().max()) < 2**-7 * float(expected.abs().max())


@pytest.mark.parametrize("map", MAPS)
def test_gradients_of_single_rows_sum_to_the_plain_gradient(map):
    layer, x = moved(OFT(4, map=map, tolerance=1e-12).wrap(linear()), turn=0.1), inputs(5, 12)
    expected = torch.autograd.grad(layer(x).square().sum(), [part(layer).generator])[0]
    parameters = {k: p.detach() for k, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters, row):
        return torch.func.functional_call(layer, parameters, (row[None],)).square().sum()

    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert torch.allclose(next(iter(single.values())).sum(0), expected, atol=1e-10)


def test_the_same_numbers_for_the_same_seed_and_others_for_other_layers():
    config = OFT(4, init_std=0.1, seed=5)
    first, again, other = (part(config.wrap(linear(), stream=s)).generator for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(first, 2))
