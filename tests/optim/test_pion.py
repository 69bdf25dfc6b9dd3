"""Pion against a readable reference in float64, and the facts its formulas promise."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orthokit.errors import OptionError, ParameterError, UnknownNameError
from orthokit.linalg import cayley, cayley_neumann, exp_taylor, pack_skew, packed_size, unpack_skew
from orthokit.linalg._workspace import Workspace
from orthokit.matrices import matrices
from orthokit.optim import Pion, _pion_step, for_model
from orthokit.optim._pion_report import stationarity_split
from orthokit.optim._pion_skew import unfold
from orthokit.optim._pion_state import fine_weight, new_state
from orthokit.optim._pion_step import Chunk

STD = 0.02


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(*shape: int, steps: int, seed: int = 100) -> list[Tensor]:
    return [randn(*shape, seed=seed + t) for t in range(steps)]


def rotation(A: Tensor, name: str = "exp_taylor", order: int = 2) -> Tensor:
    if name == "cayley":
        return cayley(A / 2)
    return cayley_neumann(A / 2, terms=order) if name == "cayley_neumann" else exp_taylor(A, order=order)


def reference(W, grads, *, lr=1e-3, betas=(0.9, 0.95), rms=0.2, sides="both", momentum="lie", second_moment=True,
              eps=1e-8, map="exp_taylor", exp_order=2):  # fmt: skip
    """What the formulas say, one after the other."""
    (b1, b2), M, m, v = betas, torch.zeros_like(W), {}, {}
    for t, G in enumerate(grads, start=1):
        M, A = b1 * M + (1 - b1) * G, {}
        for side in ("in", "out"):
            X = G if momentum == "lie" else M
            P = W.mT @ X if side == "in" else X @ W.mT
            S = P - P.mT
            m[side] = b1 * m.get(side, 0) + (1 - b1) * S if momentum == "lie" else S
            v[side] = b2 * v.get(side, 0) + (1 - b2) * S * S
            c1, c2 = (1.0, 1.0) if rms else (1 - b1**t, 1 - b2**t)
            generator = -m[side] / c1 / ((v[side] / c2).sqrt() + eps if second_moment else 1.0)
            if sides in ("both", side) or (sides == "alternate" and (side == "in") == (t % 2 == 1)):
                A[side] = generator
        change = torch.stack([W @ X if side == "in" else X @ W for side, X in A.items()]).sum(0)
        scale = lr * rms * math.sqrt(W.numel()) / change.norm() if rms else lr
        for side, X in A.items():
            E = rotation(scale * X, map, exp_order)
            W = W @ E if side == "in" else E @ W
            if momentum == "transported":
                M = M @ E if side == "in" else E @ M
    return W


def train(W: Tensor, grads: list[Tensor], **options) -> tuple[Tensor, Pion]:
    p = nn.Parameter(W.clone())
    optimizer = Pion([p], **options)
    for G in grads:
        p.grad = G.to(p.dtype)
        optimizer.step()
    return p.detach(), optimizer


OPTIONS = [
    {},
    {"exp_order": 1},
    {"exp_order": 3},
    {"exp_order": 4},
    {"map": "cayley_neumann"},
    {"map": "cayley_neumann", "exp_order": 1},
    {"map": "cayley"},
    {"sides": "alternate"},
    {"sides": "in"},
    {"sides": "out", "map": "cayley"},
    {"second_moment": False},
    {"second_moment": False, "sides": "alternate"},
    {"momentum": "ambient"},
    {"momentum": "ambient", "second_moment": False},
    {"momentum": "transported"},
    {"momentum": "transported", "map": "cayley"},
    {"rms": None, "lr": 1e-2},
    {"rms": None, "second_moment": False},
    {"rms": None, "momentum": "ambient", "lr": 1e-2},
    {"betas": (0.5, 0.999), "eps": 1e-3, "rms": 0.5},
]


@pytest.mark.parametrize("halved", [2, 1 << 30], ids=["blocks", "whole"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (5, 5)], ids=str)
def test_every_option_follows_the_reference(monkeypatch, halved, options, shape):
    monkeypatch.setattr(_pion_step, "_HALVED", halved)
    W, grads = STD * randn(*shape), gradients(*shape, steps=5)
    found, _ = train(W, grads, floor=0.0, **{"lr": 0.01, **options})
    # float64 against float64: the order of the sums differs, nothing else.
    torch.testing.assert_close(found, reference(W, grads, **{"lr": 0.01, **options}), rtol=1e-10, atol=1e-14)


LARGE = [{}, {"exp_order": 1}, {"exp_order": 4}, {"map": "cayley_neumann"}, {"sides": "alternate"}, {"sides": "out"},
         {"momentum": "transported", "map": "cayley_neumann"}]  # fmt: skip


@pytest.mark.parametrize("options", LARGE, ids=str)
@pytest.mark.parametrize("shape", [(72, 60), (48, 100)], ids=str)
def test_matrices_taken_one_by_one_follow_the_reference(options, shape):
    W, grads = STD * randn(*shape), gradients(*shape, steps=3)
    batch = torch.stack([W, 2 * W]), [torch.stack([G, G.flip(0)]) for G in grads]
    found, _ = train(W, grads, floor=0.0, lr=0.01, **options)
    both, _ = train(*batch, floor=0.0, lr=0.01, **options)
    expected = reference(W, grads, lr=0.01, **options)
    # float64 against float64: the order of the sums differs, nothing else.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(both[0], expected, rtol=1e-9, atol=1e-14)
    second = reference(2 * W, [G.flip(0) for G in grads], lr=0.01, **options)
    torch.testing.assert_close(both[1], second, rtol=1e-9, atol=1e-14)
    # Parameters of their own stay where they are; one batch is only made of what is multiplied.
    params = [nn.Parameter(W.clone()), nn.Parameter(2 * W)]
    optimizer = Pion(params, floor=0.0, lr=0.01, **options)
    for G in grads:
        params[0].grad, params[1].grad = G, G.flip(0)
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(params[1].detach(), second, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("options", [{"track": True}, {"restore_every": 2}, {"weight_decay": 0.1},
                                     {"variant": "sign", "second_moment": False}], ids=str)  # fmt: skip
def test_blocks_of_a_large_generator_change_nothing(monkeypatch, options):
    W, grads = STD * randn(9, 14), gradients(9, 14, steps=3)
    runs = []
    for halved in (2, 1 << 30):
        monkeypatch.setattr(_pion_step, "_HALVED", halved)
        runs.append(train(W, grads, lr=0.01, dtype=torch.float64, **options))
    (found, optimizer), (expected, other) = runs
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    numbers = [x.report().select_dtypes("number").to_numpy() for x in (optimizer, other)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("sides", ["in", "out", "both"])
def test_exact_cayley_rounds_the_change_not_the_weight(sides):
    W, grads = STD * randn(48, 32, dtype=torch.float32), gradients(48, 32, steps=1)
    options = {"lr": 1e-4, "sides": sides, "map": "cayley"}
    found, _ = train(W, grads, dtype=torch.float32, **options)
    change = reference(W.double(), [G.float().double() for G in grads], **options) - W
    # Each side adds its change to the weight, which rounds it by at most half a unit in the last place; the change
    # itself, 1e-3 of the weight, has the error of a float32 solve.
    roundings = 2 if sides == "both" else 1
    error = (found.double() - W - change).norm()
    assert error < torch.finfo(torch.float32).eps * (roundings / 2 * W.norm() + 200 * change.norm())


def test_float32_products_keep_the_change_to_rounding():
    W, grads = STD * randn(24, 16), gradients(24, 16, steps=5)
    found, _ = train(W.float(), grads, lr=0.01, dtype=torch.float32)
    change = reference(W.float().double(), grads, lr=0.01) - W
    # The weights are rounded to eps of their size at each of ten sums; the division m / sqrt(v) amplifies nothing.
    error = (found.double() - W - change).norm()
    assert error < 10 * torch.finfo(torch.float32).eps * W.norm()
    assert error < 1e-3 * change.norm()


def test_bfloat16_products_round_the_change_not_the_weight():
    W, grads = STD * randn(48, 32), gradients(48, 32, steps=1)
    options = {"lr": 0.01, "second_moment": False}
    found, _ = train(W.float(), grads, dtype=torch.bfloat16, **options)
    change = reference(W, grads, **options) - W
    # Five roundings of relative size 2^-9 each (weight, gradient, generator, two products), far below the change.
    assert (found.double() - W - change).norm() < 5 * 2**-9 * change.norm()
    many, more = STD * randn(96, 64), gradients(96, 64, steps=1)  # large enough for its own products
    found, _ = train(many.float(), more, dtype=torch.bfloat16, **options)
    turned = reference(many, more, **options) - many
    assert (found.double() - many - turned).norm() < 5 * 2**-9 * turned.norm()
    # With sqrt(v) of the first step every entry of the generator is a sign, and small ones may take the wrong one.
    found, _ = train(W.float(), grads, lr=0.01, dtype=torch.bfloat16)
    change = reference(W, grads, lr=0.01) - W
    assert torch.cosine_similarity(found.double().flatten() - W.flatten(), change.flatten(), dim=0) > 0.99


def turns(W: Tensor, G: Tensor, *, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """The scaled generators of a first step on ``W``, which is turned in place."""
    p = nn.Parameter(W)
    optimizer = Pion([p], **options)
    p.grad = G
    group = optimizer.param_groups[0]
    state = new_state(p, optimizer.blocks(p), group)
    state = {key: value[None] if key == "momentum_buffer" else value for key, value in state.items() if key != "step"}
    chunk = Chunk(W[None], [G[None]], [state], group, step=1, dtype=dtype, workspace=Workspace())
    chunk.rotate()
    return {side.name: float(scale) * A[0].double() for side, A, scale in chunk.turns}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_generators_are_skew_to_the_last_bit(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    W, G = (STD * randn(9, 6)).to(wide), randn(9, 6, seed=1).to(wide)
    for A in turns(W, G, dtype=dtype).values():
        assert torch.equal(A, -A.mT) and A.any()


@given(m=st.integers(2, 12), n=st.integers(2, 12), rate=st.sampled_from([1e-4, 1e-3, 5e-3]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_the_change_has_the_promised_size(m, n, rate, seed):
    W = STD * randn(m, n, seed=seed)
    found, _ = train(W, gradients(m, n, steps=1, seed=seed + 1000), lr=rate)
    ratio = (found - W).square().mean().sqrt() / (0.2 * rate)
    # The second term of the series is orthogonal to the first and smaller by half an angle, which is largest where
    # there are few planes to share the change.
    assert abs(ratio - 1) < (2e-3 if min(m, n) > 4 else 2e-2)


@given(m=st.integers(2, 10), n=st.integers(2, 10), rate=st.floats(1e-3, 0.05), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_singular_values_grow_by_at_most_the_law_in_one_step(m, n, rate, seed):
    W = STD * randn(m, n, seed=seed)
    before = torch.linalg.svdvals(W)
    found = turns(W, randn(m, n, seed=seed + 1), dtype=torch.float64, lr=rate)
    after = torch.linalg.svdvals(W)
    bound = math.prod(math.sqrt(1 + float(torch.linalg.matrix_norm(A, 2)) ** 4 / 4) for A in found.values())
    assert (after <= before * bound * (1 + 1e-12)).all()
    # Order 2 only ever grows: E^T E = I + A^4 / 4.
    assert (after >= before * (1 - 1e-12)).all()


def drift(steps: int = 60, shape: tuple[int, int] = (24, 16), **options) -> Tensor:
    """Relative changes of the singular values while a noisy target is approached at a constant, large rate."""
    W, target = STD * randn(*shape), STD * randn(*shape, seed=1)
    p = nn.Parameter(W.clone())
    optimizer = Pion([p], lr=5e-3, **options)
    for t in range(steps):
        p.grad = p.detach() - target + STD * randn(*shape, seed=10 + t)
        optimizer.step()
    return torch.linalg.svdvals(p.detach()) / torch.linalg.svdvals(W) - 1


def test_drift_follows_the_laws_of_the_maps():
    found = {order: drift(exp_order=order) for order in (1, 2, 3, 4)}
    worst = {order: float(change.abs().max()) for order, change in found.items()}
    # Angles here are a few hundredths: each order wins what the law says, theta^2, theta^4 / 8, theta^4 / 24, theta^6.
    assert worst[1] > 100 * worst[2] > 200 * worst[3] > 1e4 * worst[4]
    assert (found[2] > 0).all() and (found[3] < 0).all() and (found[4] < 0).all()
    assert float(drift(map="cayley_neumann").abs().max()) < 1.5 * worst[4]
    assert float(drift(polish=1).abs().max()) < 5e-2 * worst[4]
    assert float(drift(map="cayley").abs().max()) < 1e-12


def test_turning_one_side_a_step_drifts_more():
    # The whole change falls on one side, whose angles grow by sqrt(2) and their fourth powers by 4, half as often.
    both, alternate = drift().mean(), drift(sides="alternate").mean()
    assert 1.5 * both < alternate < 12 * both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_drift_without_their_residual_and_not_with_it(dtype):
    W, grads = (STD * randn(48, 48)).to(dtype), gradients(48, 48, steps=60)
    first = float(W.double().norm())
    rounded, _ = train(W, grads, lr=1e-4, compensated=False, dtype=torch.float32)
    found, optimizer = train(W, grads, lr=1e-4, dtype=torch.float32)
    fine = fine_weight(found, next(iter(optimizer.state.values()))["residual"])
    assert torch.equal(fine.to(dtype), found)
    kept, lost = (abs(float(X.double().norm()) / first - 1) for X in (fine, rounded))
    # Each of 60 roundings to nearest of a weight far larger than its change leaves a trace, but not in float32.
    assert kept < 1e-6 and lost > 50 * kept


def test_dense_poet_merged_at_every_step_is_pion_to_second_order():
    """POET learns skew Q at the identity by autograd, here with Adam on the packed entries; then it merges."""

    def poet(W: Tensor, loss, *, steps: int, rate: float) -> Tensor:
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        for _ in range(steps):
            packed = [torch.zeros(packed_size(b), dtype=W.dtype, requires_grad=True) for b in (W.shape[0], W.shape[1])]
            rotations = [cayley(unpack_skew(q)) for q in packed]
            found = torch.autograd.grad(loss(rotations[0] @ W @ rotations[1]), packed)
            A = []
            for i, g in enumerate(found):
                m, v = moments.get(i, (torch.zeros_like(g), torch.zeros_like(g)))
                moments[i] = m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                A.append(unpack_skew(-m / (v.sqrt() + 1e-12)))
            scale = rate * 0.2 * math.sqrt(W.numel()) / (A[0] @ W + W @ A[1]).norm()
            W = cayley(scale / 2 * A[0]) @ W @ cayley(scale / 2 * A[1])
        return W.detach()

    W, target = STD * randn(7, 5), STD * randn(7, 5, seed=1)
    errors = []
    for rate in (2e-2, 1e-2):
        expected = poet(W, lambda X: (X - target).square().sum(), steps=3, rate=rate)
        p = nn.Parameter(W.clone())
        optimizer = Pion([p], lr=rate, eps=1e-12)
        for _ in range(3):
            p.grad = 2 * (p.detach() - target)
            optimizer.step()
        errors.append(float((p.detach() - expected).norm() / (expected - W).norm()))
    # The maps agree to the second order, so what is left is of third order in the rate: of second, over the change.
    assert errors[0] < 0.01 and errors[1] < 0.35 * errors[0]


@pytest.mark.parametrize("second_moment", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_a_gradient_in_the_frames_of_the_weight_moves_nothing(shape, second_moment):
    U, S, Vh = torch.linalg.svd(randn(*shape), full_matrices=False)
    W, G = (U * S) @ Vh, (U * randn(len(S), seed=1)) @ Vh
    found, optimizer = train(W, [G], lr=0.1, second_moment=second_moment)
    # Without the rule for noise, m / sqrt(v) of pure rounding would make a step of full size.
    assert torch.equal(found, W)
    p = next(iter(optimizer.state))
    assert not any(optimizer.state[p][key].any() for key in ("m_in", "m_out"))
    split = stationarity_split(W[None], G[None])
    assert float(split["tangential_in"]) < 1e-14 and float(split["radial"]) == pytest.approx(1)


def test_generator_is_twice_the_directional_derivative():
    W, A = randn(5, 4), unpack_skew(randn(6, seed=1))
    epsilon = torch.zeros((), dtype=torch.float64, requires_grad=True)
    target = randn(5, 4, seed=2)
    loss = ((W @ torch.linalg.matrix_exp(epsilon * A)) - target).square().sum()
    (slope,) = torch.autograd.grad(loss, epsilon)
    G = 2 * (W - target)
    generator = W.mT @ G - G.mT @ W
    torch.testing.assert_close(slope, 0.5 * (generator * A).sum())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(12, 12, bias=False, dtype=torch.float64) for _ in range(2))
        for i, layer in enumerate((self.q_proj, self.o_proj)):
            layer.weight.data.copy_(randn(12, 12, seed=i))


def test_heads_keep_their_own_spectra_and_not_that_of_the_whole():
    model = Attention()
    W = model.q_proj.weight
    before = [torch.linalg.svdvals(block.detach()) for block in (W, *W.view(3, 4, 12))]
    optimizer = for_model(model, "pion", lr=0.1, split_heads=3, map="cayley")
    for t in range(5):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(12, 12, seed=20 + 2 * t + i)
        optimizer.step()
    after = [torch.linalg.svdvals(block.detach()) for block in (W, *W.view(3, 4, 12))]
    for head in (1, 2, 3):
        torch.testing.assert_close(after[head], before[head], rtol=1e-12, atol=0)
    assert float((after[0] / before[0] - 1).abs().max()) > 1e-3


def test_blocks_of_unequal_shape_are_steps_of_their_own():
    fused = nn.Parameter(randn(12, 6))
    table = matrices({"attn.qkv_proj.weight": fused.detach()}, split_fused={"*": [6, 3, 3]})
    together = Pion([fused], lr=0.1, blocks={fused: table.blocks("attn.qkv_proj.weight")})
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split([6, 3, 3])]
    apart = Pion(parts, lr=0.1)
    for t in range(4):
        fused.grad = randn(12, 6, seed=t)
        for part, g in zip(parts, fused.grad.split([6, 3, 3]), strict=True):
            part.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), rtol=1e-12, atol=1e-14)


def test_one_side_leaves_the_gram_matrix_of_the_other():
    W, grads = randn(5, 8), gradients(5, 8, steps=4)
    inside, _ = train(W, grads, lr=0.1, sides="in", map="cayley")
    outside, _ = train(W, grads, lr=0.1, sides="out", map="cayley")
    torch.testing.assert_close(inside @ inside.mT, W @ W.mT, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(outside.mT @ outside, W.mT @ W, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(inside, W) and not torch.allclose(outside, W)


def test_a_column_cannot_turn_on_its_only_side():
    found, _ = train(randn(7, 1), gradients(7, 1, steps=2), lr=0.1, sides="in")
    assert torch.equal(found, randn(7, 1))
    found, _ = train(randn(7, 1), gradients(7, 1, steps=2), lr=0.1, sides="alternate", map="cayley")
    assert not torch.equal(found, randn(7, 1))
    torch.testing.assert_close(found.norm(), randn(7, 1).norm())


def test_sign_variant_turns_every_plane_by_about_the_rate():
    options = {"variant": "sign", "second_moment": False, "momentum": "ambient", "sides": "alternate", "rms": None}
    W, G = randn(6, 8), randn(6, 8, seed=1)
    (A,) = turns(W.clone(), G, dtype=torch.float64, lr=0.05, **options).values()
    # Five Newton-Schulz steps put singular values between about 0.7 and 1.2.
    angles = torch.linalg.svdvals(A) / 0.05
    assert float(angles.min()) > 0.6 and float(angles.max()) < 1.3
    # Its direction: that of the polar factor of the skew gradient.
    S = W.mT @ G - G.mT @ W
    U, _, Vh = torch.linalg.svd(S)
    assert torch.cosine_similarity(A.flatten(), -(U @ Vh).flatten(), dim=0) > 0.97
    found, _ = train(W, gradients(6, 8, steps=6), lr=0.05, **options)
    assert float((found - W).norm()) > 0.05


def test_steps_fade_when_gradients_vanish():
    p = nn.Parameter(STD * randn(8, 6))
    optimizer = Pion([p], lr=1e-3)
    sizes = []
    for t in range(160):
        p.grad = randn(8, 6, seed=t) if t < 20 else torch.zeros_like(p)
        before = p.detach().clone()
        optimizer.step()
        sizes.append(float((p.detach() - before).square().mean().sqrt()) / 2e-4)
    assert sizes[19] == pytest.approx(1, abs=5e-3)
    assert sizes[100] < 0.1 and sizes[159] < 2e-3
    # Momentum alone, without the rule, would take steps of full size for ever.
    p = nn.Parameter(STD * randn(8, 6))
    optimizer = Pion([p], lr=1e-3, floor=0.0)
    for t in range(160):
        p.grad = randn(8, 6, seed=t) if t < 20 else torch.zeros_like(p)
        before = p.detach().clone()
        optimizer.step()
    assert float((p.detach() - before).square().mean().sqrt()) / 2e-4 > 0.9


@pytest.mark.parametrize("second_moment", [True, False])
def test_the_floor_leaves_ordinary_steps_alone(second_moment):
    W, grads = STD * randn(12, 9), gradients(12, 9, steps=60)
    options = {"lr": 1e-3, "second_moment": second_moment}
    with_floor, _ = train(W, grads, **options)
    without, _ = train(W, grads, floor=0.0, **options)
    assert torch.equal(with_floor, without)


def test_decay_is_what_it_says():
    W, grads = randn(6, 4), gradients(6, 4, steps=3)
    plain, _ = train(W, grads, lr=0.1, map="cayley", floor=0.0)
    decayed, _ = train(W, grads, lr=0.1, map="cayley", floor=0.0, weight_decay=0.5)
    # Generators are linear in W, so shrinking W scales m, and m / sqrt(v) changes only where steps differ in scale.
    ratio = torch.linalg.svdvals(decayed) / torch.linalg.svdvals(plain)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.95**3))


def test_state_is_half_of_the_published_one():
    shapes = [(8, 8), (16, 6)]
    params = [nn.Parameter(randn(*shape)) for shape in shapes]
    for second_moment in (True, False):
        optimizer = Pion(params, second_moment=second_moment)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, (m, n) in zip(params, shapes, strict=True):
            numbers = sum(x.numel() for key, x in optimizer.state[p].items() if key != "step")
            published = (m * m + n * n) * (2 if second_moment else 1)
            assert numbers <= published / 2
            assert torch.equal(unfold(optimizer.state[p]["m_in"], n)[0].mT, -unfold(optimizer.state[p]["m_in"], n)[0])


def test_state_folds_the_moments_of_the_formulas():
    W, (G,) = randn(6, 5), gradients(6, 5, steps=1)
    _, optimizer = train(W, [G], lr=0.0)
    state = next(iter(optimizer.state.values()))
    S = W.mT @ G - G.mT @ W
    torch.testing.assert_close(pack_skew(unfold(state["m_in"], 5)[0]), pack_skew(0.1 * S))
    squares = unfold(state["v_in"], 5, sign=1)[0]
    torch.testing.assert_close(squares, 0.05 * S * S)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": "transported", "track": True},
        {"second_moment": False, "sides": "alternate"},
        {"variant": "sign", "second_moment": False, "rms": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact_with_every_kind_of_state(options, dtype):
    def run(p: nn.Parameter, optimizer: Pion, steps: range) -> None:
        for t in steps:
            p.grad = randn(6, 5, seed=t, dtype=dtype)
            optimizer.step()

    straight = nn.Parameter(randn(6, 5, dtype=dtype))
    first = Pion([straight], lr=0.1, **options)
    run(straight, first, range(3))
    resumed = nn.Parameter(straight.detach().clone())
    second = Pion([resumed], lr=0.1, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(straight, first, range(3, 6))
    run(resumed, second, range(3, 6))
    assert torch.equal(straight, resumed)
    left, right = (o.state_dict()["state"][0] for o in (first, second))
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


def test_report_splits_the_drift_by_cause():
    W, grads = STD * randn(10, 8), gradients(10, 8, steps=40)
    exact, optimizer = train(W, grads, lr=5e-3, track=True)
    row = optimizer.report().iloc[0]
    assert row["truncation"] == pytest.approx(row["norm_drift"], rel=1e-6) and row["truncation"] > 1e-8
    assert abs(row["rounding"]) < 1e-13 and row["decay"] == 0
    before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(exact)
    assert row["drift"] == pytest.approx(float((after - before).abs().max() / before[0]), rel=1e-6)
    _, optimizer = train(W, grads, lr=5e-3, track=True, weight_decay=0.1, map="cayley")
    row = optimizer.report().iloc[0]
    assert row["decay"] == pytest.approx(40 * math.log1p(-5e-4)) and row["truncation"] == 0
    assert abs(row["rounding"]) < 1e-12
    _, optimizer = train(W.bfloat16(), grads, lr=5e-3, track=True, compensated=False)
    row = optimizer.report().iloc[0]
    assert abs(row["rounding"]) > 10 * abs(row["truncation"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_restoring_stops_the_drift(dtype):
    W, grads = (STD * randn(10, 8)).to(dtype), gradients(10, 8, steps=40)
    options = {"lr": 5e-3, "exp_order": 1, "track": True}
    drifts = []
    for every in (0, 10):
        _, optimizer = train(W, grads, restore_every=every, **options)
        drifts.append(float(optimizer.report()["drift"].iloc[0]))
    # The fortieth step ends with a restoration, to rounding of the dtype that sums are made in.
    assert drifts[0] > 1e-2 and drifts[1] < (1e-13 if dtype == torch.float64 else 1e-5)
    found, _ = train(W, grads[:39], restore_every=10, **options)
    kept, _ = train(W, grads[:39], **options)
    # Directions are those of the drifting run, up to what the drift has turned since.
    assert torch.cosine_similarity((found - W).double().flatten(), (kept - W).double().flatten(), dim=0) > 0.9


def test_report_tells_the_next_step_and_the_gradient():
    W, grads = STD * randn(10, 8), gradients(10, 8, steps=3)
    found, optimizer = train(W, grads, lr=1e-3)
    row = optimizer.report().iloc[0]
    assert row["shape"] == (10, 8) and row["rms_ratio"] == pytest.approx(1, abs=5e-3)
    G = grads[-1]
    U, S, Vh = torch.linalg.svd(found, full_matrices=False)
    assert row["radial"] == pytest.approx(float((U.mT @ G @ Vh.mT).diagonal().norm() / G.norm()))
    inner = found.mT @ G - G.mT @ found
    assert row["tangential_in"] == pytest.approx(float(inner.norm() / (S[0] * G.norm())))
    p = next(iter(optimizer.state))
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    assert torch.equal(p, found) and all(torch.equal(value, optimizer.state[p][key]) for key, value in before.items())
    # The angles are those of the generators that the next step uses.
    state = {key: value for key, value in before.items() if key != "step"}
    chunk = Chunk(found.clone()[None], [G[None]], [state], optimizer.param_groups[0], step=4, dtype=torch.float64,
                  workspace=Workspace())  # fmt: skip
    chunk.rotate()
    for side, A, scale in chunk.turns:
        angle = float(scale) * float(torch.linalg.matrix_norm(A[0], 2))
        assert row[f"angle_{side.name}"] == pytest.approx(angle, rel=1e-5)
    assert optimizer.report()["angle_in"].iloc[0] == row["angle_in"]


def test_report_without_a_step_says_what_is_missing():
    with pytest.raises(ParameterError, match="after step"):
        Pion([nn.Parameter(randn(3, 3))]).report()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"betas": (0.9, 1.0)}, OptionError),
        ({"betas": (-0.1, 0.9)}, OptionError),
        ({"betas": (0.9,)}, OptionError),
        ({"rms": 0.0}, OptionError),
        ({"floor": -1.0}, OptionError),
        ({"exp_order": 0}, OptionError),
        ({"polish": 3}, OptionError),
        ({"dtype": torch.int8}, OptionError),
        ({"dtype": torch.float16}, OptionError),
        ({"map": "qr"}, UnknownNameError),
        ({"sides": "left"}, UnknownNameError),
        ({"variant": "msign"}, UnknownNameError),
        ({"variant": "sign"}, OptionError),
        ({"restore_every": -1}, OptionError),
        ({"restore_every": 5, "weight_decay": 0.1}, OptionError),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(bad, error):
    with pytest.raises(error, match=next(iter(bad))):
        Pion([nn.Parameter(randn(3, 4))], **bad)


def test_small_matrices_go_together_and_give_the_same():
    shapes = [(5, 4)] * 4
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    together, apart = Pion(params, lr=0.1), [Pion([p], lr=0.1) for p in alone]
    for t in range(3):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = randn(5, 4, seed=10 * t + i)
            q.grad = p.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)


def test_a_parameter_that_joins_late_counts_its_own_steps():
    early, late = (nn.Parameter(randn(5, 4)) for _ in range(2))
    optimizer = Pion([early, late], lr=0.1, sides="alternate")
    for t in range(4):
        early.grad = randn(5, 4, seed=t)
        late.grad = randn(5, 4, seed=t - 1) if t else None
        optimizer.step()
    expected, _ = train(randn(5, 4), [randn(5, 4, seed=t) for t in range(3)], lr=0.1, sides="alternate")
    torch.testing.assert_close(late.detach(), expected, rtol=1e-12, atol=1e-14)
