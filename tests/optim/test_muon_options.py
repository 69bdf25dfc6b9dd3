"""Muon's options beyond torch's: NorMuon, cautious decay, scale rules, scalings, the report, and stacks of any size."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from orthokit.errors import OptionError, ParameterError, UnknownNameError
from orthokit.linalg import polar
from orthokit.optim import Muon, _alone, _pieces, for_model, lr_ratio
from orthokit.optim import muon as module


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(W: Tensor, gradients: list[Tensor], **options) -> Tensor:
    p = nn.Parameter(W.clone())
    optimizer = Muon([p], **options)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    return p.detach()


def normuon_reference(W, gradients, *, lr, momentum, beta2):
    """Algorithm 1 of the paper on exact factors; the update keeps the norm of the factor."""
    M, v = torch.zeros_like(W), torch.zeros_like(W[..., 0])
    for G in gradients:
        M = momentum * M + (1 - momentum) * G
        Q = polar(M)
        v = beta2 * v + (1 - beta2) * (Q * Q).mean(-1)
        X = Q / (v.sqrt().unsqueeze(-1) + 1e-7)
        norms = [torch.linalg.matrix_norm(Y, "fro", keepdim=True) for Y in (Q, X)]
        W = W - lr * lr_ratio(None, *W.shape[-2:]) * X * norms[0] / norms[1]
    return W


# The row moments are kept in float32, so the reference in float64 is met to its rounding.
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 5, 7)], ids=str)
def test_normuon_follows_the_reference(shape):
    W, gradients = randn(*shape), [randn(*shape, seed=i + 1) for i in range(4)]
    result = run(
        W,
        gradients,
        lr=0.1,
        weight_decay=0.0,
        momentum=0.8,
        nesterov=False,
        normalize="neuron",
        beta2=0.7,
        method="svd",
    )
    expected = normuon_reference(W, gradients, lr=0.1, momentum=0.8, beta2=0.7)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_normuon_evens_out_the_rows_and_keeps_the_norm():
    # A tall factor has rows of very different length: that is what the normalisation is for.
    W, G = torch.zeros(40, 8, dtype=torch.float64), randn(40, 8) * torch.logspace(0, -2, 40).unsqueeze(-1).double()
    plain, even = (run(W, [G], lr=1.0, weight_decay=0.0, method="svd", normalize=n) for n in (None, "neuron"))
    spread = [float(X.norm(dim=-1).std() / X.norm(dim=-1).mean()) for X in (plain, even)]
    assert spread[1] < 1e-3 < 0.1 < spread[0]
    torch.testing.assert_close(plain.norm(), even.norm())


def test_row_moments_of_the_blocks_of_one_parameter_are_apart():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight = nn.Parameter(randn(12, 4, dtype=torch.float32))

    fused = Attention()
    blocks = for_model(
        fused, "muon", lr=0.1, split_fused={"in_proj_weight": [4, 4, 4]}, normalize="neuron", method="svd"
    )
    apart = [nn.Parameter(part.detach().clone()) for part in fused.in_proj_weight.chunk(3)]
    single = Muon(apart, lr=0.1, normalize="neuron", method="svd", adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        fused.in_proj_weight.grad = randn(12, 4, seed=step + 5, dtype=torch.float32)
        for p, G in zip(apart, fused.in_proj_weight.grad.chunk(3), strict=True):
            p.grad = G.clone()
        blocks.step()
        single.step()
    assert blocks.state[fused.in_proj_weight]["row_moments"].shape == (12,)
    torch.testing.assert_close(fused.in_proj_weight.detach(), torch.cat([p.detach() for p in apart]))


@pytest.mark.parametrize("order", ["pre", "post", "none"])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_cautious_decay_shrinks_only_what_the_step_shrinks(order, complex_):
    def draw(seed: int) -> Tensor:
        return torch.complex(randn(5, 6, seed=seed), randn(5, 6, seed=seed + 9)) if complex_ else randn(5, 6, seed=seed)

    W, gradients = draw(0), [draw(i + 1) for i in range(3)]
    kept = {"lr": 0.1, "order": order, "method": "svd", "nesterov": False}
    free = run(W, gradients[:1], weight_decay=0.0, **kept)
    direction = (W - free).conj() * W  # the step and the weight, entry by entry
    expected = free - 0.1 * 0.5 * W * (direction.real > 0)
    torch.testing.assert_close(run(W, gradients[:1], weight_decay=0.5, decay="cautious", **kept), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 5])
def test_decay_of_half_precision_is_rounded_once(dtype, count):
    weights = [nn.Parameter(randn(4, 6, seed=i).to(dtype)) for i in range(count)]
    expected = [(W.detach().double() * 0.99).to(dtype) for W in weights]  # 0.99 itself would be 0.988 in bfloat16
    for W in weights:
        W.grad = torch.zeros_like(W)
    Muon(weights, lr=0.1, weight_decay=0.1).step()
    for W, exact in zip(weights, expected, strict=True):
        torch.testing.assert_close(W.detach(), exact, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (16, 4), (5, 5)])
def test_spectral_rule_gives_the_norm_that_carries_over(rows, columns):
    assert lr_ratio("spectral", rows, columns) == pytest.approx((rows / columns) ** 0.5)
    W = torch.zeros(rows, columns, dtype=torch.float64)
    moved = run(W, [randn(rows, columns)], lr=1.0, weight_decay=0.0, method="svd", adjust_lr_fn="spectral")
    assert float(torch.linalg.matrix_norm(moved, 2)) == pytest.approx((rows / columns) ** 0.5)


@pytest.mark.parametrize("scaling", ["schatten", "spectral"])
def test_scalings_lead_to_the_same_exact_factor(scaling):
    W, G = randn(6, 20), randn(6, 20, seed=1)
    options = {"lr": 0.1, "method": "polar_express", "ns_steps": 8, "polish": 3}
    torch.testing.assert_close(run(W, [G], scaling=scaling, **options), run(W, [G], lr=0.1, method="svd"))


@pytest.mark.parametrize("room", [1, 100, 1 << 22])
@pytest.mark.parametrize("large", [1, 1 << 15])
@pytest.mark.parametrize("alone", [0, 1 << 18])
@pytest.mark.parametrize("order", ["pre", "post", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_stack_changes_no_result(monkeypatch, room, large, alone, order, dtype):
    def train() -> list[Tensor]:
        shapes = [(6, 8)] * 3 + [(8, 6)] * 2 + [(2, 6, 8), (12, 8)]
        params = [nn.Parameter(randn(*s, seed=i).to(dtype)) for i, s in enumerate(shapes)]
        optimizer = Muon(params, lr=0.1, order=order, ns_dtype=torch.float32)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = randn(*p.shape, seed=10 * step + i).to(dtype)
            optimizer.step()
        return [p.detach() for p in params]

    expected = train()
    for name in ("_CHUNK", "_CHUNK_OF_CORE", "_CHUNK_LEAST"):
        monkeypatch.setattr(_pieces, name, room)
    monkeypatch.setattr(module, "_LARGE", large)
    monkeypatch.setattr(_alone, "_ALONE", alone)
    # Products of differently sized batches may round differently; bfloat16 weights then land on a neighbour.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype]
    for a, b in zip(train(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_report_says_how_orthogonal_and_how_fast():
    params = [nn.Parameter(randn(24, 40, seed=i, dtype=torch.float32)) for i in range(2)]
    optimizer = Muon([("a", params[0]), ("b", params[1])], lr=0.1, ns_dtype=torch.float32)
    for i, p in enumerate(params):
        p.grad = randn(24, 40, seed=5 + i, dtype=torch.float32)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    frame = optimizer.report()
    assert list(frame["matrix"]) == ["a", "b"] and all(frame["shape"] == (24, 40))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    # Jordan's table lands in about [0.7, 1.2] and not on 1.
    assert (frame["smallest"] > 0.5).all() and (frame["largest"] < 1.3).all() and (frame["mean_error"] > 0.02).all()
    assert (frame["share_of_roof"] > 0).all() and (frame["gflops"] > 0).all()
    optimizer.zero_grad()
    with pytest.raises(ParameterError, match="zero_grad"):
        optimizer.report()


def test_copies_and_pickles_go_on_like_the_original():
    p = nn.Parameter(randn(6, 8))
    optimizer = Muon([p], lr=0.1, normalize="neuron")
    p.grad = randn(6, 8, seed=1)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (q,) = twin.param_groups[0]["params"]
        q.grad, p_now = randn(6, 8, seed=2), p.detach().clone()
        twin.step()
        assert torch.equal(p, p_now) and not torch.equal(q, p)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"normalize": "row"}, UnknownNameError, "neuron"),
        ({"decay": "careful"}, UnknownNameError, "cautious"),
        ({"scaling": "trace"}, UnknownNameError, "schatten"),
        ({"beta2": 1.0}, OptionError, "beta2"),
        ({"polish": "some"}, OptionError, "auto"),
        ({"adjust_lr_fn": "mup"}, UnknownNameError, "spectral"),
    ],
)
def test_options_out_of_range_are_refused(bad, error, words):
    with pytest.raises(error, match=words):
        Muon([nn.Parameter(randn(2, 3))], **bad)


def test_tiny_matrices_take_float32_and_an_explicit_dtype_wins():
    G = randn(16, 24, dtype=torch.float32)
    options = {"lr": 1.0, "weight_decay": 0.0, "method": "polar_express", "ns_steps": 8, "polish": 4}
    orthogonal = {}
    for dtype in (None, torch.bfloat16, torch.float32):
        moved = run(torch.zeros(16, 24), [G], ns_dtype=dtype, **options)
        orthogonal[dtype] = float((moved.double() @ moved.double().T - torch.eye(16, dtype=torch.float64)).abs().max())
    assert orthogonal[None] == orthogonal[torch.float32] < 1e-5 < orthogonal[torch.bfloat16]


def test_a_kept_plan_follows_which_gradients_are_there_and_their_dtype():
    params = [nn.Parameter(randn(6, 8, seed=i)) for i in range(3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    kept = Muon(params, lr=0.1)
    for step, present in enumerate([(0, 1, 2), (1,), (0, 2), (0, 1, 2), (2,), (0, 1), (0, 1, 2)]):
        fresh = Muon(twins, lr=0.1)
        fresh.load_state_dict(copy.deepcopy(kept.state_dict()))
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            p.grad = randn(6, 8, seed=10 * step + i) if i in present else None
            q.grad = None if p.grad is None else p.grad.clone()
        kept.step()
        fresh.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    kept.load_state_dict(
        copy.deepcopy(fresh.state_dict())
    )  # new buffers: what is kept must not hold on to the old ones
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = (randn(6, 8, seed=99) for _ in range(2))
    kept.step()
    fresh.step()
    assert all(torch.equal(kept.state[p]["momentum_buffer"], fresh.state[q]["momentum_buffer"])
               for p, q in zip(params, twins, strict=True))  # fmt: skip


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("columns", [1024, 70001])
def test_passes_over_strips_are_passes_over_the_whole(monkeypatch, nesterov, columns):
    def train() -> list[Tensor]:
        params = [nn.Parameter(randn(2, columns, seed=i)) for i in range(2)]
        params.append(nn.Parameter(randn(columns, 2, seed=2).T))  # strides that allow no strips
        optimizer = Muon(params, lr=0.1, nesterov=nesterov)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = torch.empty_like(p).copy_(randn(2, columns, seed=10 * step + i))
            optimizer.step()
        return [x for p in params for x in (p.detach(), optimizer.state[p]["momentum_buffer"])]

    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(_pieces, "_STRIP", 1 << 30)
    expected = train()
    monkeypatch.setattr(_pieces, "_STRIP", 1000)
    assert all(torch.equal(a, b) for a, b in zip(train(), expected, strict=True))
