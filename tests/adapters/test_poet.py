"""The POET layer against a dense float64 formulation written from its definition."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orthokit.adapters import POET, POETLinear, attach, dequantize, merge, quantize
from orthokit.adapters.block_rotation import side_sizes, turn
from orthokit.diagnostics import hyperspherical_energy
from orthokit.errors import DtypeError, OptionError, UnknownNameError
from orthokit.linalg import (
    block_diagonal,
    cayley,
    cayley_neumann,
    expected_log_drift,
    packed_size,
    singular_values,
    unpack_skew,
)

SHAPES = [(12, 12), (12, 20), (20, 12), (13, 11), (9, 5)]  # (in, out); the last two leave smaller blocks at b = 4


def make(inputs=12, outputs=10, *, bias=True, dtype=torch.float64, seed=0, turn=0.1, **options):
    """A layer whose generators have already moved."""
    g = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / inputs**0.5)
        layer = POETLinear(linear.to(dtype), POET(**{"block_size": 4, **options}))
        for side in (layer.input, layer.output):
            noise = torch.randn(side.generator.shape, generator=g, dtype=torch.float64)
            side.generator.copy_(turn * noise)
    return layer


def factor(side, spec_terms=None):
    """``Psi^T Diag(f(Q)) Psi`` as a dense matrix, by the library's reference maps."""
    f = cayley if spec_terms is None else lambda Q: cayley_neumann(Q, terms=spec_terms)
    blocks = [f(unpack_skew(v)) for v in side.packed()]
    covered = sum(side.sizes)
    D = torch.eye(side.dim, dtype=side.generator.dtype)
    D = torch.cat([F.pad(block_diagonal(blocks), (0, side.dim - covered)), D[covered:]])
    P = torch.eye(side.dim, dtype=D.dtype)[side.index]
    return P.T @ D @ P


def reference(layer, x):
    """``x (A_out W A_in)^T + bias`` with everything dense."""
    terms = layer.config.terms if layer.config.map == "cayley_neumann" else None
    W = layer._frozen().dense(layer.dtype)[layer.output.inverse][:, layer.input.inverse]
    W = factor(layer.output, terms) @ W @ factor(layer.input, terms)
    return F.linear(x, W, layer.bias)


def gradients(function, layer, x, weights):
    wanted = [x, layer.input.generator, layer.output.generator]
    wanted += [layer.bias] if layer.bias is not None else []
    return torch.autograd.grad((function(x) * weights).sum(), wanted)


@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("memory", ["fast", "low", "weight"])
@pytest.mark.parametrize("variant, block_size", [("block", 4), ("block", 64), ("full", 5), ("full", 0.5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("map", ["cayley_neumann", "cayley"])
def test_forward_and_all_gradients_are_those_of_the_dense_formulation(
    inputs, outputs, memory, variant, block_size, bias, map
):
    layer = make(inputs, outputs, bias=bias, memory=memory, variant=variant, block_size=block_size, map=map)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, inputs, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, outputs, generator=g, dtype=torch.float64)
    assert torch.allclose(layer(x), reference(layer, x), atol=1e-12)
    pairs = zip(
        gradients(layer, layer, x, weights),
        gradients(lambda x: reference(layer, x), layer, x, weights),
        strict=True,
    )
    assert all(torch.allclose(ours, theirs, atol=1e-10) for ours, theirs in pairs)
    assert torch.allclose(F.linear(x, layer.effective_weight(), layer.bias), layer(x), atol=1e-12)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 3], [5]])
def test_many_rows_are_turned_as_few_are(dtype, tol, sizes):
    g = torch.Generator().manual_seed(0)
    stacks = [torch.randn(sizes.count(b), b, b, generator=g, dtype=torch.float64) for b in dict.fromkeys(sizes)]
    X = torch.randn(12, 300, generator=g, dtype=torch.float64).T  # not contiguous
    X = torch.cat([X, X[:, :1]], dim=1)[:, : max(sum(sizes), 12)].to(dtype)
    with torch.no_grad():
        turned = turn([S.mT.to(dtype) for S in stacks], X)
        few = torch.cat([turn([S.mT.to(dtype) for S in stacks], part) for part in X.split(50)])
    dense = F.pad(block_diagonal([S.mT for S in stacks]), (0, X.shape[1] - sum(sizes)))
    dense = torch.cat([dense, torch.eye(X.shape[1], dtype=torch.float64)[sum(sizes) :]])
    for found in (turned, few):
        assert found.dtype == dtype and torch.allclose(found.double(), X.double() @ dense, atol=tol, rtol=tol)


@pytest.mark.parametrize("quantize", [None, "uint8"])
@pytest.mark.parametrize("other", ["low", "weight"])
def test_memory_modes_agree_in_single_precision(quantize, other):
    fast, thrifty = (
        make(40, 24, dtype=torch.float32, block_size=8, quantize=quantize, memory=m) for m in ("fast", other)
    )
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weights = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(fast(x), thrifty(x), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(fast, fast, x, weights), gradients(thrifty, thrifty, x, weights), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    dense = copy.deepcopy(fast).double()
    for ours, theirs in zip(
        gradients(fast, fast, x, weights),
        gradients(lambda x: reference(dense, x), dense, x.detach().double().requires_grad_(), weights),
        strict=True,
    ):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def saved_bytes(layer, x):
    """Distinct bytes that a forward pass keeps for the backward, without weights and the input."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    return sum(kept.values()), output


@pytest.mark.parametrize("mode", ["low", "weight"])
def test_thrifty_modes_keep_less_by_exactly_the_hidden_product(mode):
    fast, low = (make(32, 48, dtype=torch.float32, block_size=8, map="cayley", memory=m) for m in ("fast", mode))
    x = torch.randn(1000, 32)
    more, _ = saved_bytes(fast, x)
    less, _ = saved_bytes(low, x)
    assert more - less == 1000 * 48 * 4
    assert less < 1000 * 4  # nothing that grows with the rows


def test_a_quantised_weight_that_bytes_can_hold_is_the_unquantised_one():
    plain = make(32, 16, dtype=torch.float32, block_size=8)
    W = dequantize(*quantize(plain.frozen_weight.detach()))
    with torch.no_grad():
        plain.frozen_weight.copy_(W)
    codes, scale, zero = quantize(W)
    stored = make(32, 16, dtype=torch.float32, block_size=8, quantize="uint8")
    stored.frozen_weight.copy_(codes), stored.scale.copy_(scale), stored.zero.copy_(zero)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(stored(x), plain(x), atol=1e-5)
    assert stored.frozen_weight.dtype == torch.uint8


def test_merging_and_quantising_again_errs_by_half_a_step_at_most():
    layer = make(32, 16, dtype=torch.float32, block_size=8, quantize="uint8", map="cayley")
    before = layer.effective_weight().detach().double()
    layer.merge_()
    after = layer.effective_weight().detach().double()
    assert float((after - before).abs().max()) <= 0.5 * float(layer.scale.max()) * (1 + 1e-4)
    assert layer.ledger.requantization_noise > 0


@pytest.mark.parametrize("variant, block_size", [("block", 4), ("full", 0.5)])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("map", ["cayley_neumann", "cayley", "exp_taylor", "exp"])
def test_attach_and_every_merge_keep_the_function_with_a_bias(variant, block_size, dtype, tol, map):
    linear = nn.Linear(13, 11, dtype=dtype)
    x = torch.randn(7, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    layer = POETLinear(linear, POET(block_size, variant, map=map))
    assert torch.allclose(layer(x), linear(x), atol=tol)
    for seed in range(3):
        with torch.no_grad():
            for side in (layer.input, layer.output):
                g = torch.Generator().manual_seed(seed)
                side.generator.normal_(std=0.05, generator=g)
        before, order = layer(x), layer.input.index.clone()
        layer.merge_()
        assert torch.allclose(layer(x), before, atol=tol * 5)
        assert not torch.equal(layer.input.index, order)
        assert not layer.input.generator.any()
    assert torch.allclose(layer.merged()(x), layer(x), atol=tol * 5)


def test_parameter_count_is_half_of_rows_plus_columns_times_b_minus_one():
    layer = make(24, 40, block_size=8)
    assert sum(p.numel() for p in (layer.input.generator, layer.output.generator)) == (24 + 40) * 7 // 2
    # LLaMA-60M at b = 256, its hidden width brought to a multiple of b: the 9.66M of the published table.
    sides = [side for m, n in [(512, 512)] * 4 + [(512, 1280)] * 3 for side in (m, n)]
    counts = [packed_size(size) for side in sides for size in side_sizes(side, 256, "block")]
    assert 8 * sum(counts) == 9_661_440


def test_blocks_cover_every_coordinate_and_a_subset_does_not():
    blocks, subset = make(13, 11, block_size=4), make(13, 11, block_size=4, variant="full")
    assert blocks.input.sizes == [4, 4, 4, 1] and blocks.output.sizes == [4, 4, 3]
    assert subset.input.sizes == [4] and subset.input.blocks == "1 x 4, 9 at rest"
    assert make(13, 11, block_size=0.5, variant="full").output.sizes == [6]


def test_a_subset_of_all_is_a_single_block():
    one, other = make(8, 6, block_size=8, variant="full"), make(8, 6, block_size=8, variant="block")
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(one(x), other(x))


def test_entries_of_a_subset_are_touched_unevenly_and_those_of_blocks_exactly_twice():
    subset = make(64, 64, block_size=8, variant="full")
    touched = torch.zeros(64, 64)
    for _ in range(100):
        rows, columns = subset.output.index[:8], subset.input.index[:8]
        touched[rows] += 1
        touched[:, columns] += 1
        subset.merge_()
    # 100 merges of two sides, each hits an entry with probability 1/8: 25 on average, spread by about 4.7.
    assert 24 < float(touched.mean()) < 26 and float(touched.min()) < 18 and float(touched.max()) > 32
    blocks = make(64, 64, block_size=8)
    assert sorted(blocks.input.index.tolist()) == list(range(64)) and sum(blocks.input.sizes) == 64


def test_exact_rotations_keep_the_spectrum_and_three_terms_shrink_it_within_the_law():
    exact = make(24, 16, block_size=8, map="cayley", dtype=torch.float32)
    before = singular_values(exact._frozen().dense(torch.float64))
    assert torch.allclose(singular_values(exact.effective_weight().double()), before, rtol=1e-6)
    series = make(24, 16, block_size=8, terms=3)
    packed = [v.detach() for side in (series.input, series.output) for v in side.packed()]
    theta = max(float(torch.linalg.matrix_norm(unpack_skew(v), 2).max()) for v in packed)
    ratio = singular_values(series.effective_weight()) / singular_values(series._frozen().dense(torch.float64))
    assert bool((ratio <= 1 + 1e-12).all()) and bool((ratio >= (1 - theta**4) ** 2 - 1e-12).all())


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_merges_of_random_generators_drift_as_the_semicircle_law_predicts(terms):
    layer, std, merges = make(64, 64, block_size=32, terms=terms, bias=False), 0.03, 30
    g = torch.Generator().manual_seed(0)
    for _ in range(merges):
        with torch.no_grad():
            for side in (layer.input, layer.output):
                side.generator.normal_(std=std, generator=g)
        layer.merge_()
    measured = float((singular_values(layer.dense()) / layer.ledger.initial).log().mean())
    predicted = 2 * merges * expected_log_drift("cayley_neumann", std, 32, terms=terms)
    # 60 random generators of 2 x 496 entries; the moments of their angles scatter by a few per cent.
    assert abs(measured / predicted - 1) < 0.1
    assert math.isclose(measured, layer.ledger.law, rel_tol=1e-6)  # a determinant: exact for a square weight
    assert abs(layer.ledger.expected / predicted - 1) < 0.1


def test_the_in_side_keeps_hyperspherical_energy_and_the_out_side_does_not():
    layer = make(32, 24, block_size=8, map="cayley", turn=0.2)
    still = hyperspherical_energy(layer._frozen().dense(torch.float64))
    with torch.no_grad():
        layer.output.generator.zero_()
    inside = hyperspherical_energy(layer.effective_weight().detach())
    assert math.isclose(float(inside), float(still), rel_tol=1e-10)
    moved = make(32, 24, block_size=8, map="cayley", turn=0.2)
    assert not math.isclose(float(hyperspherical_energy(moved.effective_weight().detach())), float(still), rel_tol=1e-6)


@pytest.mark.parametrize("rows, columns", [(128, 344), (344, 128)])
def test_normalised_rows_have_the_spectrum_that_the_aspect_ratio_gives(rows, columns):
    layer = POETLinear(nn.Linear(columns, rows, bias=False), POET(8, init="normalised"))
    values, ratio = singular_values(layer.frozen_weight.detach()), (rows / columns) ** 0.5
    assert torch.allclose(torch.linalg.vector_norm(layer.effective_weight(), dim=1), torch.ones(rows), atol=1e-5)
    assert abs(float(values[0]) / (1 + ratio) - 1) < 0.05
    assert abs(float(values[-1]) / abs(1 - ratio) - 1) < 0.1


@pytest.mark.parametrize(
    "init, deviation", [("xavier", (2 / (96 + 64)) ** 0.5), ("standard", 0.02), ("uniform_spectrum", 96**-0.5)]
)
def test_initialisations_have_their_size_and_the_scale_multiplies_it(init, deviation):
    linear = nn.Linear(96, 64, bias=False)
    one, four = (POETLinear(linear, POET(8, init=init, scale=s)).effective_weight().detach() for s in (1.0, 4.0))
    assert abs(float(one.std()) / deviation - 1) < 0.05
    assert torch.allclose(four, 4 * one, rtol=1e-5)
    if init == "uniform_spectrum":
        assert torch.allclose(singular_values(one), torch.ones(64), atol=1e-5)


def test_layers_draw_different_orders_from_one_seed_and_the_same_again():
    def orders(seed):
        model = attach(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), POET(4, seed=seed))
        return [layer.input.index for layer in model] + [layer.output.index for layer in model]

    first, again, other = orders(0), orders(0), orders(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(o.tolist()) for o in [*first, *other]}) == 8


def test_drawing_orders_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    make(12, 12, init="normalised").merge_()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_takes_the_products_and_leaves_the_maps_in_full_precision():
    layer = make(32, 32, dtype=torch.float32, block_size=8, turn=1e-3)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.input.generator.grad.dtype == torch.float32
    assert torch.allclose(y.float(), layer(x), atol=0.05)
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_half_precision_weights_have_generators_in_single():
    layer = make(16, 16, dtype=torch.bfloat16, block_size=4)
    assert layer.frozen_weight.dtype == torch.bfloat16 and layer.input.generator.dtype == torch.float32
    assert layer(torch.ones(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.merge_()
    assert layer.ledger.rounding_noise > 0


@pytest.mark.parametrize("quantize", [None, "uint8"])
def test_a_cast_model_keeps_what_half_precision_would_lose(quantize):
    layer = make(32, 16, dtype=torch.float32, block_size=8, quantize=quantize, turn=1e-3)
    before = layer.effective_weight().detach()
    generator, scale = layer.input.generator.detach().clone(), layer.scale
    layer.bfloat16()
    assert torch.equal(layer.input.generator, generator) and layer.dtype == torch.bfloat16
    assert layer.ledger.initial.dtype == torch.float64
    assert quantize is None or torch.equal(layer.scale, scale)
    assert layer(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert torch.allclose(layer.effective_weight().float(), before, atol=0.02)
    assert layer.double()(torch.ones(2, 32, dtype=torch.float64)).dtype == torch.float64


def test_one_gradient_step_and_a_merge_is_the_rotation_by_both_lie_gradients():
    # What Pion does without layers: W <- exp(-eta G_out) W exp(-eta G_in). The Cayley transform of Q turns by 2 Q,
    # and the gradient of a packed generator at 0 is 2 G_in, hence the factor 4.
    differences = []
    for eta in (0.02, 0.01):
        layer = make(6, 6, bias=False, block_size=6, map="cayley", turn=0.0)
        W, x = layer.effective_weight().detach(), torch.eye(6, dtype=torch.float64)
        target = torch.randn(6, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        (0.5 * (layer(x) - target).square().sum()).backward()
        with torch.no_grad():
            for side in (layer.input, layer.output):
                side.generator -= eta / 4 * side.generator.grad
        layer.merge_()
        G = (W.T - target).T  # dL/dW of 0.5 |x W^T - target|^2 at x = I
        G_in, G_out = W.T @ G - G.T @ W, G @ W.T - W @ G.T
        pion = torch.linalg.matrix_exp(-eta * G_out) @ W @ torch.linalg.matrix_exp(-eta * G_in)
        differences.append(float((layer.effective_weight().detach() - pion).norm() / (pion - W).norm()))
    # Both maps agree to second order: relative to the step the difference falls with the square of the rate.
    assert differences[0] < 0.02 and 3 < differences[0] / differences[1] < 5


def test_inputs_of_any_leading_shape_and_layout():
    layer = make(12, 10)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    assert torch.allclose(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    assert layer(x[0, 0]).shape == (10,) and layer(x[:0]).shape == (0, 5, 10)
    assert torch.allclose(layer(x[..., ::1][:, ::2]), layer(x)[:, ::2])


@pytest.mark.parametrize("frozen", ["input", "output"])
def test_a_frozen_side_takes_no_gradient(frozen):
    layer = make(12, 10)
    getattr(layer, frozen).generator.requires_grad_(False)
    layer(torch.ones(2, 12, dtype=torch.float64)).sum().backward()
    trained = {"input": layer.input, "output": layer.output}
    assert trained.pop(frozen).generator.grad is None
    assert next(iter(trained.values())).generator.grad.any()


def test_a_merge_between_forward_and_backward_is_an_error_and_not_a_wrong_gradient():
    layer = make(12, 10)
    loss = layer(torch.ones(2, 12, dtype=torch.float64)).sum()
    layer.merge_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_generators_are_vectors_so_that_no_orthogonal_optimizer_takes_them():
    from orthokit.matrices import matrices

    table = matrices(nn.Sequential(nn.Linear(8, 8), make(12, 10)))
    assert {row.name for row in table.left_out} >= {"1.input.generator", "1.output.generator"}
    assert "1.frozen_weight" in {block.name for block in table}


def test_polish_at_the_merge_gives_the_spectrum_back():
    rough, fine = (make(24, 24, block_size=8, terms=3, polish=p) for p in (0, 4))
    drift = []
    for layer in (rough, fine):
        layer.merge_()
        drift.append(float((singular_values(layer.dense()) / layer.ledger.initial - 1).abs().max()))
    assert drift[0] > 1e-3 and drift[1] < 1e-9


def test_state_of_one_layer_continues_another():
    source, target = make(12, 10, map="cayley"), make(12, 10, map="cayley", seed=5)
    source.merge_()
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(source(x), target(x))
    assert torch.equal(source.ledger.as_tensor(), target.ledger.as_tensor())
    source.merge_(), target.merge_()
    assert torch.equal(source.input.index, target.input.index)


def test_wrong_inputs_and_options_are_refused(unchecked):
    with pytest.raises(DtypeError, match="float32"):
        make(12, 10)(torch.ones(2, 12))
    bad = [
        ({"block_size": 1}, OptionError),
        ({"block_size": 0.5}, OptionError),
        ({"block_size": 1.5, "variant": "full"}, OptionError),
        ({"block_size": 4, "variant": "blocks"}, UnknownNameError),
        ({"block_size": 4, "map": "caley"}, UnknownNameError),
        ({"block_size": 4, "terms": 0}, OptionError),
        ({"block_size": 4, "merge_every": 0}, OptionError),
        ({"block_size": 4, "merge_angle": 4.0}, OptionError),
        ({"block_size": 4, "init": "gauss"}, UnknownNameError),
        ({"block_size": 4, "scale": 0.0}, OptionError),
        ({"block_size": 4, "memory": "slow"}, UnknownNameError),
        ({"block_size": 4, "quantize": "int4"}, UnknownNameError),
        ({"block_size": 4, "polish": -1}, OptionError),
        ({"block_size": 4, "group_size": 1}, OptionError),
    ]
    for options, error in bad:
        with pytest.raises(error):
            POET(**options)
    with pytest.raises(DtypeError, match="complex"):
        POETLinear(nn.Linear(4, 4, dtype=torch.complex64), POET(2))


def test_a_whole_model_is_merged_into_plain_layers():
    model = attach(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), POET(3))
    x = torch.randn(4, 6)
    before = model(x)
    assert torch.allclose(merge(model)(x), before, atol=1e-6)
    assert not any(isinstance(layer, POETLinear) for layer in model.modules())
