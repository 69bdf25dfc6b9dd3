"""Rewinding: the ends are exact, what a rotation keeps is kept on the way, and nothing is lost."""

import copy
import math

import pytest
import torch
from adapters_models import KINDS, adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthokit.adapters import adapter_parameters, adapter_report, attach, detach, disabled, merge, set_adapters, unmerge
from orthokit.adapters.base import PATHS
from orthokit.adapters.dora import DoRA
from orthokit.adapters.files import load, save
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.paths import rewind, rotation_strengths, safe_scales
from orthokit.diagnostics import hyperspherical_energy
from orthokit.errors import OptionError, ParameterError, UnknownNameError
from orthokit.linalg import cayley, exp, orthogonality_error, singular_values, unpack_skew

TURNING = [kind for kind in KINDS if kind in ("oft", "oft projected", "boft", "hra")]
ADDING = ["lora", "lora from the spectrum", "full"]
EACH = pytest.mark.parametrize("kind", KINDS)
PATH = pytest.mark.parametrize("path", PATHS)
CAYLEY = PATHS[:2]


@pytest.fixture
def x():
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def far(config, *, turn=0.4):
    """A model in float64 whose adapters are far from their start."""
    model = adapted(config).double()
    with torch.no_grad():
        for i, p in enumerate(adapter_parameters(model).values()):
            p.add_(turn * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    return model


def weights(model):
    return [layer.effective_weight(dtype=torch.float64).detach() for layer in (model[0], model[2])]


def bases(model):
    return [layer.base.weight.detach() for layer in (model[0], model[2])]


def generator(part):
    """``Q`` of a whole layer, from the rotation."""
    R = part.dense()
    eye = torch.eye(len(R), dtype=R.dtype)
    return torch.linalg.solve(R + eye, R - eye)


@EACH
@PATH
def test_the_ends_are_the_plain_weight_and_all_of_the_adapter_bit_for_bit(kind, path, x):
    model = adapted(KINDS[kind])
    x = x.float()
    full, tuned = model(x).detach(), weights(model)
    with disabled(model):
        plain = model(x).detach()
    assert rewind(model, 0.0, path=path) is model
    assert torch.equal(model(x), plain) and all(map(torch.equal, weights(model), [W.double() for W in bases(model)]))
    assert torch.equal(merge(copy.deepcopy(model))(x), plain)
    rewind(model, 0.3, path=path)
    assert not torch.allclose(model(x), plain, atol=1e-4) and not torch.allclose(model(x), full, atol=1e-4)
    rewind(model, 1.0, path=path)
    assert torch.equal(model(x), full) and all(map(torch.equal, weights(model), tuned))


@EACH
@PATH
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.37, 1.0])
def test_merges_are_the_forward_pass_everywhere_on_the_path(kind, path, alpha, x):
    model = rewind(far(KINDS[kind]), alpha, path=path)
    torch.testing.assert_close(merge(copy.deepcopy(model))(x), model(x), rtol=0, atol=1e-11)
    y = model(x).detach()
    torch.testing.assert_close(merge(model, keep=True)(x), y, rtol=0, atol=1e-11)
    assert torch.equal(unmerge(model)(x), y)


@pytest.mark.parametrize("path", CAYLEY)
@pytest.mark.parametrize("kind", TURNING)
@settings(max_examples=6)
@given(alpha=st.floats(0, 1))
def test_singular_values_and_energy_stay_on_the_rotation_paths(kind, path, alpha):
    model = rewind(far(KINDS[kind]), alpha, path=path)
    for W, plain in zip(weights(model), bases(model), strict=True):
        torch.testing.assert_close(singular_values(W), singular_values(plain), rtol=0, atol=1e-12)
        energy, before = hyperspherical_energy(W), hyperspherical_energy(plain)
        torch.testing.assert_close(energy, before, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(W.norm(dim=1), plain.norm(dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["oft", "boft", "hra"])
def test_the_dense_path_keeps_neither(kind):
    model = rewind(far(KINDS[kind], turn=1.0), 0.5, path="dense")
    for W, plain in zip(weights(model), bases(model), strict=True):
        assert float((singular_values(W) - singular_values(plain)).abs().max()) > 1e-3


@pytest.mark.parametrize("path", CAYLEY)
@pytest.mark.parametrize("kind", ["oft", "hra"])
@pytest.mark.parametrize("alpha", [0.04, 0.5])
def test_rotations_on_the_path_are_the_cayley_transform_of_the_scaled_generator(kind, path, alpha):
    """Against the formula with dense matrices."""
    model = far(KINDS[kind])
    Q = [generator(layer.adapters["default"]) for layer in (model[0], model[2])]
    scale = math.sqrt(alpha) if path == "cayley_sqrt" else alpha
    rewind(model, alpha, path=path)
    for W, plain, q in zip(weights(model), bases(model), Q, strict=True):
        torch.testing.assert_close(W, plain @ cayley(scale * q), rtol=0, atol=1e-12)


@PATH
@pytest.mark.parametrize("kind", ADDING)
@settings(max_examples=6)
@given(alpha=st.floats(0, 1))
def test_adapters_that_add_go_along_one_line_on_every_path(kind, path, alpha):
    model = far(KINDS[kind])
    tuned = weights(model)
    rewind(model, alpha, path=path)
    for W, end, plain in zip(weights(model), tuned, bases(model), strict=True):
        torch.testing.assert_close(W, plain + alpha * (end - plain), rtol=0, atol=1e-12)


@EACH
@settings(max_examples=6)
@given(alpha=st.floats(0, 1))
def test_the_dense_path_is_a_line_for_every_adapter(kind, alpha):
    model = far(KINDS[kind])
    tuned = weights(model)
    rewind(model, alpha, path="dense")
    for W, end, plain in zip(weights(model), tuned, bases(model), strict=True):
        torch.testing.assert_close(W, plain + alpha * (end - plain), rtol=0, atol=1e-12)


def test_dora_turns_rows_and_takes_their_lengths_part_of_the_way():
    model = far(DoRA(2))
    part, W = model[0].adapters["default"], bases(model)[0]
    m, V = part.magnitude.detach(), W + 0.3 * part.up.detach() @ part.down.detach()
    expected = V / V.norm(dim=1, keepdim=True) * torch.lerp(W.norm(dim=1), m, 0.3)[:, None]
    torch.testing.assert_close(weights(rewind(model, 0.3))[0], expected, rtol=0, atol=1e-12)


def test_with_the_exponential_the_linear_path_is_the_geodesic():
    model = far(OFT(4, map="exp"))
    A = unpack_skew(model[0].adapters["default"].packed().detach())
    W = bases(model)[0]
    for alpha in (0.1, 0.5, 0.9):
        found = weights(rewind(model, alpha, path="cayley_linear"))[0]
        torch.testing.assert_close(found, W @ torch.block_diag(*exp(alpha * A)), rtol=0, atol=1e-12)
    steps = [model[0].adapters["default"].dense() for a in (0.0, 0.5, 1.0) if rewind(model, a, path="cayley_linear")]
    torch.testing.assert_close(steps[1] @ steps[1], steps[2], rtol=0, atol=1e-12)


def test_the_root_makes_the_drift_of_retained_directions_linear():
    """``v^T R v = 1 - 2 |Q v|^2 + ...``: half of alpha gives half of the drift to the order that is left out."""
    model = far(OFT(4, angle_scale=0.6), turn=0.03)
    W = bases(model)[0]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)

    def drift(alpha, path):
        return S - (U * (weights(rewind(model, alpha, path=path))[0] @ Vh.mT)).sum(0)

    end = drift(1.0, "cayley_sqrt")
    tops = end > 0.01  # of the others rounding of small numbers would be compared
    assert int(tops.sum()) >= 3
    ratio = {path: (drift(0.25, path) / end)[tops].mean() for path in CAYLEY}
    assert abs(float(ratio["cayley_sqrt"]) - 0.25) < 0.05 < abs(float(ratio["cayley_linear"]) - 0.25)


def test_names_and_layers_are_set_one_by_one():
    model = attach(far(OFT(4)), LoRA(2), targets=["0"], name="other")
    part, other, second = model[0].adapters["default"], model[0].adapters["other"], model[2].adapters["default"]
    rewind(model, 0.25, name="default")
    assert (part.strength, other.strength, second.strength) == (0.5, 1.0, 0.5)
    rewind(model, {"0": 0.16})
    assert (part.strength, other.strength, second.strength) == (0.4, 0.16, 0.5)
    rewind(model, {"2": 0.7}, path="dense")
    assert (part.strength, second.strength, model[0].blend, model[2].blend) == (0.4, 1.0, 1.0, 0.7)
    assert adapter_report(model).set_index(["layer", "adapter"])["strength"].tolist() == [0.4, 0.16, 1.0]
    rewind(model, 1.0)
    assert (part.strength, other.strength, second.strength, model[2].blend) == (1.0, 1.0, 1.0, 1.0)


def test_a_place_holds_for_whichever_adapters_act(x):
    model = attach(far(OFT(4)), HRA(4), targets=["0", "2"], name="other")
    rewind(set_adapters(model, "default"), 0.5, path="dense")
    half = (weights(rewind(model, 1.0))[0] + bases(model)[0]) / 2
    torch.testing.assert_close(weights(rewind(model, 0.5, path="dense"))[0], half, rtol=0, atol=1e-12)
    with disabled(model):
        plain = model(x)
    assert torch.equal(rewind(model, 0)(x), plain)


def test_a_place_does_not_change_what_is_saved_and_survives_copies(x):
    model = far(OFT(4))
    before = copy.deepcopy(model.state_dict())
    y = rewind(model, 0.5)(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(copy.deepcopy(model)(x), y)


@pytest.mark.parametrize("kind", ["oft", "hra", "lora"])
def test_files_keep_the_place(kind, x, tmp_path):
    model = rewind(far(KINDS[kind]), 0.3)
    save(model, tmp_path / "adapter")
    plain = detach(copy.deepcopy(model))
    loaded = load(plain, tmp_path / "adapter")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(rewind(loaded, 1.0)(x), rewind(model, 1.0)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), True, {"0": 2.0}])
def test_places_outside_the_path_are_errors_that_change_nothing(alpha):
    model = rewind(far(OFT(4)), 0.5)
    with pytest.raises(OptionError, match=r"alpha must be a number in \[0, 1\]"):
        rewind(model, alpha, path="dense")
    assert model[0].adapters["default"].strength == math.sqrt(0.5) and model[0].blend == 1.0


def test_other_mistakes_are_said_in_words():
    model = far(OFT(4))
    with pytest.raises(UnknownNameError, match="did you mean 'cayley_sqrt'"):
        rewind(model, 0.5, path="cayley_sqr")
    with pytest.raises(ParameterError, match="'1', which has no such adapter; layers: '0', '2'"):
        rewind(model, {"1": 0.5})
    with pytest.raises(ParameterError, match="has an adapter 'b'; there are"):
        rewind(model, 0.5, name="b")
    merge(model, keep=True)
    with pytest.raises(ParameterError, match="call unmerge first"):
        rewind(model, 0.5)
    unmerge(model)
    attach(model, LoRA(2), targets=["0"], name="b")
    with pytest.raises(OptionError, match="leave name out"):
        rewind(model, 0.5, path="dense", name="default")
    with pytest.raises(OptionError, match="say which with name"):
        rotation_strengths(model)
    with pytest.raises(OptionError, match="lora turns nothing"):
        rotation_strengths(model, name="b")
    with pytest.raises(UnknownNameError, match="rule"):
        safe_scales(model, rule="max", name="default")
    with pytest.raises(OptionError, match="first must be at least 1"):
        safe_scales(model, first=0, name="default")


def test_reflections_without_a_path_are_refused_before_anything_changes(x):
    model = attach(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).double(), OFT(4), targets=["0"])
    attach(model, HRA(3, symmetric=False), targets=["1"])
    y = model(x)
    with pytest.raises(OptionError, match="path='dense'"):
        rewind(model, 0.5)
    assert torch.equal(model(x), y) and model[0].adapters["default"].strength == 1.0
    assert not torch.allclose(rewind(model, 0.5, path="dense")(x), y)
    with pytest.raises(OptionError, match="half turn"):
        rotation_strengths(model)


@pytest.mark.parametrize("kind", ["oft", "hra"])
def test_rotation_strength_is_the_norm_of_the_dense_generator(kind):
    model = far(KINDS[kind])
    expected = {name: float(generator(model[int(name)].adapters["default"]).norm()) for name in ("0", "2")}
    expected = {"0": expected["0"] / math.sqrt(16), "2": expected["2"] / math.sqrt(24)}
    for alpha in (1.0, 0.3, 0.0):  # it is that of the end of the path
        assert rotation_strengths(rewind(model, alpha)) == pytest.approx(expected, rel=1e-9)


def test_rotation_strength_counts_shared_blocks_in_every_place_and_all_factors():
    alone, shared = far(OFT(4)), far(OFT(4, share=True))
    with torch.no_grad():
        alone[0].adapters["default"].generator.copy_(shared[0].adapters["default"].generator)
    assert rotation_strengths(alone)["0"] == pytest.approx(rotation_strengths(shared)["0"])
    model = far(KINDS["boft"])
    part = model[0].adapters["default"]
    squared = unpack_skew(part.packed().detach()).square().sum()
    assert rotation_strengths(model)["0"] == pytest.approx(math.sqrt(float(squared) / 16))


def turned(sizes):
    model = attach(nn.Sequential(*(nn.Linear(8, 8) for _ in sizes)).double(), OFT(4))
    for layer, size in zip(model, sizes, strict=True):
        nn.init.constant_(layer.adapters["default"].generator, size)
    return model


@settings(max_examples=20)
@given(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=8), st.sampled_from(["safe", "min"]), st.integers(1, 6))
def test_scales_bring_strengths_to_the_target_and_only_ever_shrink(sizes, rule, first):
    model = turned(sizes)
    before = rotation_strengths(model)
    scales = safe_scales(model, rule=rule, first=first)
    moving = [rho for rho in before.values() if rho > 0]
    target = 0.0 if not moving else min(moving) if rule == "min" else sum(moving[:first]) / len(moving[:first])
    assert all(0 < scale <= 1 for scale in scales.values())
    for name, layer in rewind(model, scales, path="cayley_linear").named_children():
        Q = unpack_skew(layer.adapters["default"].packed().detach())
        found = float(Q.norm()) / math.sqrt(8)
        assert found == pytest.approx(min(before[name], target) if before[name] > 0 else 0.0, rel=1e-9, abs=1e-12)
    if rule == "min" and moving:
        assert safe_scales(turned([*sizes, 0.0]), rule="min") == {**scales, str(len(sizes)): 1.0}


def test_resting_layers_alone_keep_everything():
    assert safe_scales(turned([0.0, 0.0])) == {"0": 1.0, "1": 1.0}


def test_convolutions_and_embeddings_rewind_as_well():
    table = attach(nn.Sequential(nn.Embedding(10, 8)).double(), OFT(4, init_std=0.5), targets="embedding")
    conv = attach(nn.Sequential(nn.Conv2d(8, 6, 3, padding=1)).double(), OFT(4, init_std=0.5), targets="conv")
    ids = torch.arange(10)
    images = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for model, inputs in ((table, ids), (conv, images)):
        for path in PATHS:
            with disabled(model):
                plain = model(inputs)
            assert torch.equal(rewind(model, 0.0, path=path)(inputs), plain)
            y = rewind(model, 0.5, path=path)(inputs)
            assert not torch.allclose(y, plain, atol=1e-3)
            torch.testing.assert_close(merge(copy.deepcopy(model))(inputs), y, rtol=0, atol=1e-12)
    assert float(orthogonality_error(table[0].adapters["default"].dense())) < 1e-12
