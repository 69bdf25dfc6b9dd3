"""HRA against reflections multiplied one by one, and its path to the identity against the Cayley transform."""

import pytest
import torch
from adapted import assert_merged_is_forward, inputs, linear, moved, part, sites
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from orthokit.adapters._householder import compact_factor, half_turn_gap
from orthokit.adapters.hra import HRA, hra_penalty
from orthokit.adapters.oft import OFT
from orthokit.errors import NonFiniteError, OptionError, UnknownNameError
from orthokit.linalg import cayley, inverse_cayley, singular_values


def reflections(vectors):
    """``H_1 H_2 ... H_r``, one after the other."""
    R = torch.eye(vectors.shape[1], dtype=vectors.dtype)
    for u in vectors:
        R = R - 2 * torch.outer(R @ u, u) / (u @ u)
    return R


def orthogonalised(vectors):
    """Gram-Schmidt, one after the other."""
    done = []
    for u in vectors:
        for other in done:
            u = u - (other @ u) * other
        done.append(u / u.norm())
    return torch.stack(done)


@pytest.mark.parametrize("rank", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("shape", [(3, 12), (2, 3, 12), (12,), (0, 12), (200, 12)])
def test_forward_and_all_gradients_are_those_of_single_reflections(rank, orthogonal, shape):
    layer = moved(HRA(rank, symmetric=False, orthogonal=orthogonal).wrap(linear()))
    x, v, weights = inputs(*shape, grad=True), part(layer).vectors, inputs(*shape[:-1], 7, seed=2)
    R = reflections(orthogonalised(v) if orthogonal else v)
    expected = F.linear(x, layer.base.weight @ R, layer.base.bias)
    assert torch.allclose(layer(x), expected, atol=1e-11)
    pairs = zip(
        torch.autograd.grad((layer(x) * weights).sum(), [x, v]),
        torch.autograd.grad((expected * weights).sum(), [x, v]),
        strict=True,
    )
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in pairs)
    assert torch.allclose(layer.merged().weight, layer.base.weight @ R, atol=1e-12)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_gradients_pass_the_numerical_check(strength):
    layer = moved(HRA(4).wrap(linear(6, 3)))
    part(layer).strength = strength
    x = inputs(2, 6, grad=True)

    def function(v, x):
        with torch.nn.utils.stateless._reparametrize_module(part(layer), {"vectors": v}):
            return layer(x), part(layer).merge(layer.base.weight)

    assert torch.autograd.gradcheck(function, (part(layer).vectors.detach().requires_grad_(), x))


def test_the_gradient_is_finite_at_rest_and_leaves_it():
    layer, x = HRA(4).wrap(linear()), inputs(5, 12)
    layer(x).square().sum().backward()
    gradient = part(layer).vectors.grad
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 1e-3


@settings(max_examples=60)
@given(sites(groups=False), st.sampled_from([HRA(2), HRA(8), HRA(3, symmetric=False)]), st.integers(0, 9))
def test_merged_layer_computes_the_same_for_every_kind_and_type(site, config, seed):
    plain, x = site
    assert_merged_is_forward(moved(config.wrap(plain), seed), x)


@settings(max_examples=15)
@given(sites(kinds=("conv",)), st.integers(0, 9))
def test_merged_convolution_read_as_patches_computes_the_same(site, seed):
    plain, x = site
    assert_merged_is_forward(moved(HRA(4, conv="patches").wrap(plain), seed), x)


@settings(max_examples=40)
@given(sites(groups=False), st.sampled_from([2, 4, 8]))
def test_at_rest_nothing_is_changed_but_for_rounding(site, rank):
    plain, x = site
    layer = HRA(rank).wrap(plain)
    assert_merged_is_forward(layer, x)
    assert torch.allclose(part(layer).dense(), torch.eye(layer.in_features).double(), atol=1e-6)
    unit = torch.finfo(plain.weight.dtype).eps
    assert torch.allclose(layer.merged().weight, plain.weight, rtol=unit, atol=1e-6 * float(plain.weight.abs().max()))


def cosines(W):
    return F.normalize(W, dim=1) @ F.normalize(W, dim=1).mT


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (6, 32)])
@pytest.mark.parametrize("rank", [8, 3])
def test_singular_values_row_lengths_and_angles_between_rows_are_kept(shape, rank):
    layer = moved(HRA(rank, symmetric=False).wrap(linear(shape[1], shape[0], dtype=torch.float32)))
    W, turned = layer.base.weight.detach(), layer.merged().weight.detach()
    assert float((turned - W).abs().max()) > 0.1
    assert torch.allclose(singular_values(turned), singular_values(W), atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), W.norm(dim=1), atol=1e-5)
    assert torch.allclose(cosines(turned), cosines(W), atol=1e-5)
    assert part(layer).orthogonality_error() < 5e-6


@given(st.integers(1, 8), st.integers(0, 99), st.booleans())
def test_the_largest_angle_is_that_of_the_eigenvalues(rank, seed, orthogonal):
    layer = moved(HRA(rank, symmetric=False, orthogonal=orthogonal).wrap(linear()), seed)
    found = torch.linalg.eigvals(part(layer).dense()).angle().abs().max()
    assert part(layer).largest_angle() == pytest.approx(float(found), abs=1e-6)


# --- the path to the identity


@given(st.sampled_from([2, 4, 6, 10]), st.floats(0.05, 2.0), st.integers(0, 99))
def test_strength_scales_the_generator_of_the_whole_product(rank, strength, seed):
    layer = moved(HRA(rank, symmetric=False).wrap(linear()), seed)
    V = F.normalize(part(layer).vectors.detach(), dim=1)
    assume(half_turn_gap(V @ V.mT) > 1e-3)
    R = reflections(part(layer).vectors.detach())
    part(layer).strength = strength
    assert torch.allclose(part(layer).dense(), cayley(strength * inverse_cayley(R)), atol=1e-8)
    assert_merged_is_forward(layer, inputs(3, 12))


def test_the_path_ends_at_the_same_bits_as_no_adapter():
    layer, x = moved(HRA(4).wrap(linear())), inputs(3, 12)
    part(layer).strength = 0.0
    assert torch.equal(layer(x), layer.base(x)) and torch.equal(layer.merged().weight, layer.base.weight)
    assert part(layer).largest_angle() == part(layer).orthogonality_error() == 0.0


def test_the_closed_form_of_the_path_passes_through_the_known_one():
    V = F.normalize(inputs(4, 12), dim=1)
    G = V @ V.mT
    assert torch.allclose(compact_factor(G, 1.0), compact_factor(G, 1.0 + 1e-12), atol=1e-9)


@pytest.mark.parametrize(
    "config, vectors, reason",
    [
        (HRA(3, symmetric=False), None, "odd number"),
        (HRA(2, symmetric=False, orthogonal=True), None, "half turn"),
        (HRA(2), torch.eye(2, 12), "half turn"),
    ],
)
def test_without_a_path_of_rotations_the_dense_one_is_named(config, vectors, reason):
    layer = moved(config.wrap(linear(), name="up"))
    if vectors is not None:
        with torch.no_grad():
            part(layer).vectors.copy_(vectors)
    whole = layer(inputs(2, 12))
    part(layer).strength = 0.5
    with pytest.raises(OptionError, match=f"'up' holds .*{reason}.*path='dense'"):
        layer(inputs(2, 12))
    with pytest.raises(OptionError, match="dense"):
        layer.merged()
    part(layer).strength = 1.0
    assert torch.equal(layer(inputs(2, 12)), whole)


# --- options, penalty


def test_penalty_is_that_of_the_gram_matrix_summed_over_layers():
    model = nn.Sequential(HRA(4).wrap(linear()), nn.Tanh(), OFT(7).wrap(linear(7, 5)), HRA(2).wrap(linear(5, 3)))
    moved(model[0]), moved(model[3])
    expected = sum(
        float((F.normalize(v, dim=1) @ F.normalize(v, dim=1).mT - torch.eye(len(v))).square().sum())
        for v in (part(model[0]).vectors.detach(), part(model[3]).vectors.detach())
    )
    penalty = hra_penalty(model)
    assert float(penalty.detach()) == pytest.approx(expected)
    penalty.backward()
    assert part(model[3]).vectors.grad is not None
    with pytest.raises(OptionError, match="no HRA adapter"):
        hra_penalty(nn.Linear(3, 3))


def test_contradictions_are_refused_with_what_would_do():
    with pytest.raises(OptionError, match="rank must be at least 1"):
        HRA(0)
    with pytest.raises(OptionError, match="rank=6 or 8"):
        HRA(7)
    with pytest.raises(OptionError, match="take rank=2, or"):
        HRA(1)
    with pytest.raises(OptionError, match="symmetric=False"):
        HRA(4, orthogonal=True)
    with pytest.raises(UnknownNameError, match="patches"):
        HRA(4, conv="patch")
    with pytest.raises(OptionError, match="at most the 6 inputs of 'q'"):
        HRA(8).wrap(nn.Linear(6, 3), name="q")
    with pytest.raises(OptionError, match="2 groups"):
        HRA(2).wrap(nn.Conv1d(4, 4, 3, groups=2))


def test_vectors_are_drawn_in_pairs_from_seed_and_layer():
    first, again, other = (part(HRA(4).wrap(linear(), stream=s)).vectors for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[0], first[2])


def test_a_step_of_adam_turns_vectors_by_the_same_angle_for_every_width():
    for width in (64, 1024):
        layer = HRA(2).wrap(nn.Linear(width, 3))
        v = part(layer).vectors
        before = v.detach().clone()
        v.grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            v.sub_(0.01 * v.grad.sign())  # the first step of Adam
        turned = F.cosine_similarity(v.detach().double(), before.double()).acos()
        assert torch.allclose(turned, torch.full_like(turned, 0.01), rtol=0.25)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_stop_a_merge_by_name_but_not_a_training_step(bad):
    layer = HRA(4).wrap(linear(), name="blocks.3.up")
    with torch.no_grad():
        part(layer).vectors[0, 0] = bad
    assert bool(layer(inputs(2, 12)).isnan().any())
    with pytest.raises(NonFiniteError, match=r"vectors of hra on 'blocks\.3\.up'"):
        layer.merged()


def test_a_model_cast_to_half_precision_keeps_its_vectors_in_float32():
    layer = HRA(4).wrap(linear(dtype=torch.float32)).to(torch.bfloat16)
    assert part(layer).vectors.dtype == torch.float32 and layer.base.weight.dtype == torch.bfloat16
    assert_merged_is_forward(moved(layer), inputs(30, 12).bfloat16())
