"""Anchors: closed forms for one layer, the gradient of the search, what it leaves out, and going on after a stop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from orthokit.errors import CheckpointError, DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.lab import SmallViT, TinyGPT
from orthokit.lab.encoder import EncoderConfig, SentenceEncoder
from orthokit.merging import _anchor_search
from orthokit.merging._anchor_search import Objective, initial_anchors
from orthokit.merging._called import Called, find_blocks
from orthokit.merging.anchors import anchor_cosine, construct_anchors, induced_update, linear_bound


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(out, width, *, seed=0, bias=False, dtype=torch.float64):
    layer = nn.Linear(width, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=gen(seed), dtype=dtype))
    return layer


def drifted(module, *, seed=1, by=0.05):
    """A copy whose parameters have moved a little."""
    import copy

    twin, g = copy.deepcopy(module), gen(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(by * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return twin


def vit_block(seed=0):
    return SmallViT(dim=8, layers=1, heads=2, hidden=12, seed=seed).blocks[0].eval()


def reference_cosine(dW, X):
    """The definition: gradient of half squares by autograd, then a cosine."""
    W = torch.zeros_like(dW).requires_grad_()
    (0.5 * (X @ W.T - X @ dW.T).square().sum()).backward()
    return float(nn.functional.cosine_similarity(-W.grad.flatten(), dW.flatten(), dim=0))


# --- one linear layer, exactly -------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
def test_the_cosine_is_that_of_autograd_and_never_exceeds_the_bound(out, width, n, seed):
    g = gen(seed)
    dW, X = (torch.randn(rows, width, generator=g, dtype=torch.float64) for rows in (out, n))
    found = float(anchor_cosine(dW, X))
    assert found == pytest.approx(reference_cosine(dW, X), abs=1e-10)
    kept = dW @ torch.linalg.pinv(X) @ X
    assert found <= float(kept.norm() / dW.norm()) + 1e-9 <= float(linear_bound(dW, n)) + 2e-9


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_the_top_right_singular_vectors_attain_the_bound(seed, n):
    dW = torch.randn(7, 9, generator=gen(seed), dtype=torch.float64)
    V = torch.linalg.svd(dW, full_matrices=False).Vh[:n]
    assert float(anchor_cosine(dW, V)) == pytest.approx(float(linear_bound(dW, n)), abs=1e-12)


def test_the_power_law_of_the_specification_has_its_bound_and_all_inputs_give_one():
    g = gen()
    Q, R = (torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64)).Q for _ in range(2))
    s = torch.arange(1, 65, dtype=torch.float64) ** -1.0
    dW = Q * s @ R.T
    bound = math.sqrt(float(s[:16].square().sum() / s.square().sum()))
    assert float(linear_bound(dW, 16)) == pytest.approx(bound, abs=1e-12)
    assert float(anchor_cosine(dW, torch.eye(64, dtype=torch.float64))) == pytest.approx(1, abs=1e-12)


def test_bounds_are_batched_and_hold_in_half_precision():
    dW = torch.randn(3, 2, 5, 4, generator=gen())
    found = linear_bound(dW, 2)
    assert found.shape == (3, 2)
    assert float(found[1, 1]) == pytest.approx(float(linear_bound(dW[1, 1].double(), 2)), abs=1e-6)
    assert linear_bound(dW.bfloat16(), 9).dtype == torch.float32
    assert torch.equal(linear_bound(dW, 4), torch.ones(3, 2))
    X = torch.randn(3, 2, 6, 4, generator=gen(1)).transpose(0, 1).transpose(0, 1)
    assert anchor_cosine(dW, X).shape == (3, 2)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
@pytest.mark.parametrize("init", ["weights", "gaussian"])
def test_a_search_improves_and_stays_below_the_bound_of_a_linear_layer(distance, init):
    old, new = linear(6, 8), linear(6, 8, seed=1)
    found = construct_anchors(old, new, tokens=1, count=3, distance=distance, init=init, steps=40)
    # The tolerance is rounding of float64 cosines; the inequality itself is exact for every distance.
    assert float(found.cosines[0]) < found.cosine <= found.bound + 1e-12
    assert found.bound == pytest.approx(float(linear_bound((new.weight - old.weight).detach(), 3)))


@pytest.mark.parametrize("per_tensor", [True, False])
def test_the_bound_counts_a_bias_as_attainable(per_tensor):
    old, new = linear(6, 8, bias=True), linear(6, 8, seed=1, bias=True)
    found = construct_anchors(old, new, tokens=2, count=1, distance="l2", steps=60, lr=0.05, per_tensor=per_tensor)
    weight = linear_bound((new.weight - old.weight).detach(), 2)
    a, b = ((getattr(new, k) - getattr(old, k)).detach().square().sum() for k in ("weight", "bias"))
    want = (weight + 1) / 2 if per_tensor else ((weight**2 * a + b) / (a + b)).sqrt()
    assert found.bound == pytest.approx(float(want))
    assert float(found.cosines[0]) < found.cosine <= found.bound + 1e-12
    assert set(found.by_tensor) == {"weight", "bias"}


def test_a_long_search_on_a_linear_layer_comes_close_to_its_bound():
    old, new = linear(5, 6), linear(5, 6, seed=1)
    found = construct_anchors(old, new, tokens=1, count=2, distance="l2", steps=150, lr=0.1)
    assert found.cosine > 0.99 * found.bound


# --- the objective -------------------------------------------------------------------------------------------------


def test_the_objective_is_the_cosine_of_the_step_that_training_on_the_anchors_would_take():
    old = vit_block().double()
    new = drifted(old)
    X = torch.randn(4, 3, 8, generator=gen(), dtype=torch.float64)
    twin = drifted(old, by=0.0)
    away = 1 - nn.functional.cosine_similarity(twin(X).flatten(1), new(X).flatten(1), dim=-1)
    away.mean().backward()
    own = dict(old.named_parameters())
    tau = {name: (p - own[name]).detach() for name, p in new.named_parameters() if name != "attn.k.bias"}
    stepped = {name: -p.grad for name, p in twin.named_parameters()}
    want = [float(nn.functional.cosine_similarity(stepped[n].flatten(), t.flatten(), dim=0)) for n, t in tau.items()]
    base, expert = Called(old, None), Called(new, None)
    assert Objective(base, expert, tau, "cosine", True)(X).tolist() == pytest.approx(want, abs=1e-9)
    joined = [torch.cat([side[n].flatten() for n in tau]) for side in (stepped, tau)]
    together = float(nn.functional.cosine_similarity(*joined, dim=0))
    assert Objective(base, expert, tau, "cosine", False)(X).item() == pytest.approx(together, abs=1e-9)
    found = induced_update(old, new, X)
    for name, step in stepped.items():
        assert torch.allclose(found[name], step, atol=1e-12)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("block", ["vit", "gpt", "bert"])
def test_the_second_derivative_is_that_of_finite_differences(block, distance):
    old, call = blocks_of(block)
    old = old.double()
    new = drifted(old)
    own = dict(old.named_parameters())
    tau = {n: (p - own[n]).detach() for n, p in new.named_parameters() if not n.endswith(("k.bias", "key.bias"))}
    objective = Objective(Called(old, call), Called(new, call), tau, distance, True)
    X = torch.randn(2, 3, 8, generator=gen(3), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(objective(X).sum(), X)
    V = torch.randn(X.shape, generator=gen(4), dtype=torch.float64)
    h = 1e-5  # central differences: an error of h^2 against rounding of 1e-16 / h
    rise = float((objective((X + h * V).detach()).sum() - objective((X - h * V).detach()).sum()).detach()) / (2 * h)
    assert float((slope * V).sum()) == pytest.approx(rise, rel=1e-5, abs=1e-7)


def blocks_of(which):
    """A block and how it is run."""
    if which == "vit":
        return vit_block(), None
    if which == "gpt":
        model = TinyGPT("0.2M", dim=8, heads=2, hidden=12, layers=1)
        return model.blocks[0], lambda block, x: block(x, model.cos[: x.shape[1]], model.sin[: x.shape[1]])
    shape = EncoderConfig(vocabulary=20, dim=8, layers=1, heads=2, hidden=12, positions=6)
    encoder = drifted(SentenceEncoder(shape), by=0.2)  # the published initialisation has biases of zero
    return encoder.encoder.layer[0], lambda block, x: block(x, None)


@pytest.mark.parametrize("init", ["weights", "gaussian"])
@pytest.mark.parametrize("block", ["vit", "gpt", "bert"])
def test_blocks_of_our_three_models_take_anchors_from_both_beginnings(block, init):
    old, call = blocks_of(block)
    found = construct_anchors(old, drifted(old), tokens=4, count=3, init=init, steps=12, call=call, keep=[0, 12])
    assert found.X.shape == (3, 4, 8) and found.norms.shape == (3, 4)
    assert float(found.cosines[0]) + 0.05 < found.cosine == pytest.approx(float(found.cosines.max()))
    assert len(found.cosines) == 13 and found.bound is None
    assert found.kept.keys() == {0, 12} and not torch.equal(found.kept[0], found.kept[12])
    assert sum(found.by_tensor.values()) / len(found.by_tensor) == pytest.approx(found.cosine, abs=1e-5)
    assert not any(p.requires_grad and p.grad is not None for p in old.parameters())


def test_a_tensor_that_did_not_change_and_one_without_a_gradient_are_left_out_and_named():
    old = vit_block()
    new = drifted(old)
    new.norm1.weight.data.copy_(old.norm1.weight)
    found = construct_anchors(old, new, tokens=4, count=2, steps=2)
    assert found.left_out == {"norm1.weight": "did not change", "attn.k.bias": "has no gradient at any input"}
    assert found.by_tensor.keys() == {n for n, _ in old.named_parameters()} - found.left_out.keys()
    alone = construct_anchors(old, new, tokens=1, count=2, steps=2)
    assert {"attn.q.weight", "attn.k.weight"} <= alone.left_out.keys()  # one token attends to itself whatever they are
    assert "left out" in repr(found)


def test_tiny_inputs_keep_their_cosine():
    old, new = linear(4, 5, dtype=torch.float32), linear(4, 5, seed=1, dtype=torch.float32)
    base, expert = Called(old, None), Called(new, None)
    objective = Objective(base, expert, {"weight": (new.weight - old.weight).detach()}, "l2", True)
    X = torch.randn(2, 1, 5, generator=gen())
    small, plain = (objective(scale * X).item() for scale in (1e-6, 1.0))
    assert small == pytest.approx(plain, abs=1e-5)


# --- beginnings ----------------------------------------------------------------------------------------------------


def test_weight_anchors_are_rows_of_the_expert_then_means_of_two():
    layer = linear(3, 4, dtype=torch.float32)
    X = initial_anchors(layer, (5, 7, 4), "weights", 0.01, 0)
    rows = {tuple(row.tolist()) for row in layer.weight.detach()}
    for anchor in X:
        assert {tuple(row.tolist()) for row in anchor[:3]} == rows
    means = {tuple(((a + b) / 2).tolist()) for a in layer.weight.detach() for b in layer.weight.detach()}
    assert all(min((torch.tensor(m) - row).abs().max() for m in means) < 1e-6 for row in X[:, 3:].reshape(-1, 4))
    assert torch.equal(X, initial_anchors(layer, (5, 7, 4), "weights", 0.01, 0))
    assert not torch.equal(X, initial_anchors(layer, (5, 7, 4), "weights", 0.01, 1))


def test_gaussian_anchors_have_their_scale_and_the_global_generator_is_not_touched():
    old, new = linear(3, 4), linear(3, 4, seed=1)
    before = torch.get_rng_state()
    X = initial_anchors(old, (50, 10, 40), "gaussian", 0.01, 0)
    construct_anchors(old, new, tokens=2, count=2, steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(X.std()) == pytest.approx(0.01, rel=0.02)  # 20,000 draws


# --- going on ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_a_search_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(_anchor_search, "_EVERY", 5)
    old = vit_block()
    options = {"tokens": 3, "count": 4, "steps": 17, "keep": (3, 16)}
    whole = construct_anchors(old, drifted(old), **options)

    def stop(step, values):
        if step == 12:
            raise Stop

    path = tmp_path / "deep" / "anchors.safetensors"
    with pytest.raises(Stop):
        construct_anchors(old, drifted(old), **options, progress=stop, resume=path)
    steps = []
    again = construct_anchors(old, drifted(old), **options, progress=lambda s, v: steps.append(s), resume=path)
    assert steps[0] == 10 and steps[-1] == 17
    assert torch.equal(again.X, whole.X) and torch.equal(again.cosines, whole.cosines)
    assert again.cosine == whole.cosine and again.by_tensor == whole.by_tensor
    assert all(torch.equal(again.kept[k], whole.kept[k]) for k in (3, 16))
    steps.clear()
    done = construct_anchors(old, drifted(old), **options, progress=lambda s, v: steps.append(s), resume=path)
    assert steps == [] and torch.equal(done.X, whole.X)
    assert [p.name for p in path.parent.iterdir()] == ["anchors.safetensors"]


def test_a_file_of_another_search_or_a_damaged_one_is_refused(tmp_path):
    old, path = linear(3, 4), tmp_path / "a.safetensors"
    construct_anchors(old, linear(3, 4, seed=1), tokens=1, count=2, steps=2, resume=path)
    with pytest.raises(CheckpointError, match="other weights"):
        construct_anchors(old, linear(3, 4, seed=2), tokens=1, count=2, steps=2, resume=path)
    with pytest.raises(CheckpointError, match="other weights"):
        construct_anchors(old, linear(3, 4, seed=1), tokens=1, count=2, steps=2, lr=0.5, resume=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        construct_anchors(old, linear(3, 4, seed=1), tokens=1, count=2, steps=2, resume=path)
    save_file({"X": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="recipe"):
        construct_anchors(old, linear(3, 4, seed=1), tokens=1, count=2, steps=2, resume=path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        construct_anchors(old, linear(3, 4, seed=1), tokens=1, count=2, steps=2, resume=path / "below")


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (OptionError, "tokens", {"tokens": 0}),
        (OptionError, "count", {"count": 0}),
        (OptionError, "steps", {"steps": -1}),
        (OptionError, "lr", {"lr": 0.0}),
        (OptionError, "sigma", {"sigma": -1.0}),
        (OptionError, "keep", {"keep": [3]}),
        (UnknownNameError, "initialisation", {"init": "zeros"}),
        (UnknownNameError, "distance", {"distance": "kl"}),
        (ShapeError, "width", {"width": 5}),
    ],
)
def test_bad_options_are_refused(unchecked, error, match, options):
    with pytest.raises(error, match=match):
        construct_anchors(linear(3, 4), linear(3, 4, seed=1), **{"tokens": 2, "count": 2, "steps": 2} | options)


def test_blocks_that_do_not_fit_are_refused_by_name():
    options = {"tokens": 2, "count": 2, "steps": 1}
    old = linear(3, 4)
    with pytest.raises(OptionError, match="equals block0"):
        construct_anchors(old, linear(3, 4), **options)
    with pytest.raises(ShapeError, match="weight has shape"):
        construct_anchors(old, linear(3, 5), **options)
    with pytest.raises(ShapeError, match="bias"):
        construct_anchors(old, linear(3, 4, seed=1, bias=True), **options)
    with pytest.raises(OptionError, match="no parameters"):
        construct_anchors(nn.ReLU(), nn.ReLU(), **options)
    bad = linear(3, 4, seed=1)
    bad.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="block1"):
        construct_anchors(old, bad, **options)
    with pytest.raises(OptionError, match="width="):
        construct_anchors(nn.LayerNorm(4), drifted(nn.LayerNorm(4)), **options)
    pair = nn.LSTM(4, 3, batch_first=True)
    with pytest.raises(DtypeError, match="call="):
        construct_anchors(pair, drifted(pair), **options)
    norm = nn.LayerNorm(4)
    with pytest.raises(OptionError, match="gaussian"):
        construct_anchors(norm, drifted(norm), width=4, **options)
    assert construct_anchors(norm, drifted(norm), width=4, init="gaussian", **options).X.shape == (2, 2, 4)


def test_closed_forms_refuse_what_has_no_answer(unchecked):
    with pytest.raises(OptionError, match="zero"):
        linear_bound(torch.zeros(2, 3), 1)
    with pytest.raises(OptionError, match="n must"):
        linear_bound(torch.ones(2, 3), 0)
    with pytest.raises(ShapeError, match="rows of X"):
        anchor_cosine(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(NonFiniteError):
        anchor_cosine(torch.full((2, 3), float("inf")), torch.ones(2, 3))


def test_blocks_are_found_by_pattern_name_and_rule_and_outer_ones_win():
    model = SmallViT(dim=8, layers=2, heads=2, hidden=12)
    two = ["blocks.0", "blocks.1"]
    assert find_blocks(model, "blocks.*") == two == find_blocks(model, ["blocks.1", "blocks.0"])
    assert find_blocks(model, lambda name, module: name.startswith("blocks.")) == two
    assert find_blocks(model, "blocks.*.mlp") == ["blocks.0.mlp", "blocks.1.mlp"]
    assert find_blocks(model, "") == [""]
    with pytest.raises(UnknownNameError, match=r"layers\.\*"):
        find_blocks(model, "layers.*")
    with pytest.raises(OptionError, match="empty"):
        find_blocks(model, [])
    with pytest.raises(OptionError, match="none"):
        find_blocks(model, lambda name, module: False)
    model.blocks[1].mlp.up.weight = model.blocks[0].mlp.up.weight
    with pytest.raises(OptionError, match="shared"):
        find_blocks(model, "blocks.*")
