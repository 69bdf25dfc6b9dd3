"""Muon: against a readable float64 reference, against torch's own, and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from orthokit.errors import OptionError, UnknownNameError
from orthokit.linalg import orthogonalize, random_orthogonal
from orthokit.optim import Muon, lr_ratio

ORDERS = ("pre", "post", "none")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_polar(X: np.ndarray) -> np.ndarray:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def reference(W, gradients, *, order, lr, decay, momentum, nesterov, adjust, polar=exact_polar):
    """The three orders in double precision, one line each."""
    rows, columns = W.shape[-2:]
    ratio = 0.2 * max(rows, columns) ** 0.5 if adjust == "match_rms_adamw" else max(1, rows / columns) ** 0.5
    M = np.zeros_like(W)
    for G in gradients:
        X = polar(G) if order == "post" else G
        M = momentum * M + (1 - momentum) * X
        B = (1 - momentum) * X + momentum * M if nesterov else M
        D = {"pre": lambda B=B: polar(B), "post": lambda B=B: B, "none": lambda G=G: polar(G)}[order]()
        W = W - lr * decay * W - lr * ratio * D
    return W, M


def run(kind, W: Tensor, gradients: list[Tensor], **options):
    p = nn.Parameter(W.clone())
    optimizer = kind([p], **options)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p].get("momentum_buffer")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_every_order_follows_the_reference(order, nesterov, adjust, shape, complex_):
    def draw(seed: int) -> Tensor:
        X = randn(*shape, seed=seed)
        return torch.complex(X, randn(*shape, seed=seed + 500)) if complex_ else X

    W, gradients = draw(0), [draw(i + 1) for i in range(5)]
    result, buffer = run(
        Muon, W, gradients, lr=0.1, weight_decay=0.3, momentum=0.8, nesterov=nesterov, adjust_lr_fn=adjust,
        order=order, method="svd",
    )  # fmt: skip
    expected, M = reference(
        W.numpy(), [G.numpy() for G in gradients], order=order, lr=0.1, decay=0.3, momentum=0.8, nesterov=nesterov,
        adjust=adjust,
    )  # fmt: skip
    torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=1e-11)
    if order == "none":
        assert buffer is None
    else:
        torch.testing.assert_close(buffer, torch.from_numpy(M), rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "options",
    [{"ns_steps": 3}, {"ns_coefficients": "you"}, {"method": "polar_express"}, {"polish": 2}, {"eps": 10.0}],
    ids=str,
)
def test_options_of_the_iteration_reach_it(order, options):
    W, gradients = randn(5, 8), [randn(5, 8, seed=i + 1) for i in range(3)]
    method, table = options.get("method", "newton_schulz"), options.get("ns_coefficients", (3.4445, -4.7750, 2.0315))

    def polar(X: np.ndarray) -> np.ndarray:
        chosen = {"coefficients": table} if method == "newton_schulz" else {}
        given = {"steps": options.get("ns_steps", 5), "eps": options.get("eps", 1e-7)}
        return orthogonalize(
            torch.from_numpy(X), method=method, polish=options.get("polish", 0), **given, **chosen
        ).numpy()

    result, _ = run(Muon, W, gradients, lr=0.1, weight_decay=0.0, momentum=0.9, order=order, **options)
    common = {"order": order, "lr": 0.1, "decay": 0.0, "momentum": 0.9, "nesterov": True, "adjust": None}
    expected, _ = reference(W.numpy(), [G.numpy() for G in gradients], polar=polar, **common)
    torch.testing.assert_close(result, torch.from_numpy(expected), rtol=0, atol=1e-11)


def test_two_by_two_by_hand():
    # Both gradients are diagonal, so a polar factor is a matrix of signs. momentum 1/2, no Nesterov, lr 1:
    # buffers of the gradients: diag(2, -1), then diag(2, -1)/2 + diag(-3, 1)/2 = diag(-1/2, 0).
    G = [torch.diag(torch.tensor([4.0, -2.0])), torch.diag(torch.tensor([-3.0, 1.0]))]
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.5, "nesterov": False, "method": "svd"}
    start = torch.zeros(2, 2)
    # pre: -(1, -1) - (-1, 0); the zero direction of the second buffer is left out.
    pre, buffer = run(Muon, start, G, order="pre", **options)
    assert pre.tolist() == [[0.0, 0.0], [0.0, 1.0]] and buffer.tolist() == [[-0.5, 0.0], [0.0, 0.0]]
    # post: buffers of the signs are diag(1/2, -1/2), then diag(1/4, -1/4) + diag(-1/2, 1/2) = diag(-1/4, 1/4).
    post, buffer = run(Muon, start, G, order="post", **options)
    assert post.tolist() == [[-0.25, 0.0], [0.0, 0.25]] and buffer.tolist() == [[-0.25, 0.0], [0.0, 0.25]]
    # none: -(1, -1) - (-1, 1).
    none, buffer = run(Muon, start, G, order="none", **options)
    assert none.tolist() == [[0.0, 0.0], [0.0, 0.0]] and buffer is None


def test_nesterov_by_hand_in_the_post_order():
    # diag(2, 3) has the factor I; buffer 0.1 I; blend 0.1 I + 0.9 * 0.1 I = 0.19 I.
    result, _ = run(
        Muon, torch.zeros(2, 2), [torch.diag(torch.tensor([2.0, 3.0]))], lr=1.0, weight_decay=0.0, momentum=0.9,
        order="post", method="svd",
    )  # fmt: skip
    torch.testing.assert_close(result, -0.19 * torch.eye(2))


# bfloat16 without Nesterov is left to the test of the buffer: torch 2.13 overwrites its own there.
@pytest.mark.parametrize(
    ("dtype", "nesterov"),
    [(d, n) for d in (torch.float32, torch.float64, torch.bfloat16) for n in (True, False) if n or d.itemsize > 2],
    ids=str,
)
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("steps", [1, 5, 6])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32), (1, 16), (16, 1)], ids=str)
def test_follows_the_muon_of_torch(nesterov, adjust, steps, shape, dtype):
    W, gradients = randn(*shape).to(dtype), [randn(*shape, seed=i + 1).to(dtype) for i in range(6)]
    options = {"lr": 0.05, "weight_decay": 0.2, "nesterov": nesterov, "ns_steps": steps, "adjust_lr_fn": adjust}
    theirs, their_buffer = run(torch.optim.Muon, W, gradients, **options)
    ours, buffer = run(Muon, W, gradients, ns_dtype=torch.bfloat16, **options)
    torch.testing.assert_close(buffer, their_buffer, rtol=0, atol=0)
    # Same products in the same order: what may differ is how a kernel sums, amplified by five steep steps, and for
    # bfloat16 weights the rounding of each step.
    scale = 0.05 * lr_ratio(adjust, *shape) * len(gradients)
    weight = len(gradients) * torch.finfo(dtype).eps * float(W.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * scale + weight)


def test_stacked_matrices_follow_the_muon_of_torch():
    params = {kind: [nn.Parameter(randn(24, 40, seed=i).float()) for i in range(4)] for kind in ("ours", "torch")}
    ours = Muon(params["ours"], lr=0.05, ns_dtype=torch.bfloat16)
    theirs = torch.optim.Muon(params["torch"], lr=0.05)
    for step in range(5):
        for group in params.values():
            for i, p in enumerate(group):
                p.grad = randn(24, 40, seed=10 * step + i).float()
        ours.step()
        theirs.step()
    for a, b in zip(*params.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2 * 0.05 * 5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_buffer_of_bfloat16_without_nesterov_keeps_its_norm(shape):
    # torch 2.13 divides the buffer by its norm in place for this combination; ours is the average it should be.
    gradients = [randn(*shape, seed=i).bfloat16() for i in range(4)]
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": False}
    _, buffer = run(Muon, torch.zeros(shape, dtype=torch.bfloat16), gradients, **options)
    expected = torch.zeros(shape, dtype=torch.float64)
    for G in gradients:
        expected.lerp_(G.double(), 0.1)
    assert float(buffer.double().norm()) == pytest.approx(float(expected.norm()), rel=1e-2)
    _, theirs = run(torch.optim.Muon, torch.zeros(shape, dtype=torch.bfloat16), gradients, **options)
    norm = float(theirs.double().norm())
    normalised, mended = abs(norm - 1) < 2e-2, abs(norm - float(expected.norm())) < 2e-2 * float(expected.norm())
    assert normalised or mended
    assert abs(float(expected.norm()) - 1) > 0.1  # or the two cases could not be told apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_factor_is_not_rounded_to_the_fast_dtype(dtype):
    G = randn(8, 12, dtype=torch.float32).to(dtype)
    result, _ = run(Muon, torch.zeros(8, 12, dtype=dtype), [G], lr=1.0, weight_decay=0.0, method="svd")
    gram = result.double() @ result.double().T
    assert (gram - torch.eye(8)).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 7), columns=st.integers(2, 7), seed=st.integers(0, 1000))
def test_turning_the_problem_turns_the_steps(order, rows, columns, seed):
    g = torch.Generator().manual_seed(seed)
    Q1, Q2 = (random_orthogonal(n, n, generator=g, dtype=torch.float64) for n in (rows, columns))
    W, *gradients = (torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(4))
    options = {"lr": 0.1, "weight_decay": 0.1, "order": order}
    plain, _ = run(Muon, W, gradients, **options)
    turned, _ = run(Muon, Q1 @ W @ Q2, [Q1 @ G @ Q2 for G in gradients], **options)
    torch.testing.assert_close(turned, Q1 @ plain @ Q2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_scaling_the_loss_changes_nothing(order):
    W, gradients = randn(5, 8), [randn(5, 8, seed=i + 1) for i in range(4)]
    plain, _ = run(Muon, W, gradients, lr=0.1, order=order)
    scaled, _ = run(Muon, W, [1000 * G for G in gradients], lr=0.1, order=order)
    torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-10)


def test_a_change_of_scale_over_time_tells_the_orders_apart():
    # "post" forgets the scale of each gradient, "pre" weighs by it: a burst of noise hits "pre" only.
    signal, burst = torch.eye(4, dtype=torch.float64), 1e3 * randn(4, 4)
    gradients = [signal] * 10 + [burst] + [signal] * 5
    options = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.9, "nesterov": False, "method": "svd"}
    zero = torch.zeros(4, 4, dtype=torch.float64)
    moves = {order: run(Muon, zero, gradients, order=order, **options)[1] for order in ("pre", "post")}
    angle = {k: float(M.trace() / M.norm() / 2) for k, M in moves.items()}
    assert angle["post"] > 0.9 > angle["pre"]


@pytest.mark.parametrize(
    ("rule", "rows", "columns", "expected"),
    [
        (None, 4, 9, 1.0),
        ("original", 9, 4, 1.5),
        ("match_rms_adamw", 4, 9, 0.6),
        ("match_rms_adamw", 9, 4, 0.6),
        (None, 1, 1, 1.0),
    ],
)
def test_learning_rate_ratio(rule, rows, columns, expected):
    assert lr_ratio(rule, rows, columns) == pytest.approx(expected)


def test_match_rms_gives_an_orthogonal_update_the_size_of_adamw():
    for shape in [(6, 10), (10, 6), (8, 8)]:
        Q = random_orthogonal(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rms = lr_ratio("match_rms_adamw", *shape) * Q.norm() / math.sqrt(Q.numel())
        assert float(rms) == pytest.approx(0.2)


def test_flattened_convolution_takes_the_ratio_of_its_matrix():
    conv, _ = run(Muon, torch.zeros(32, 2, 2, 2), [randn(32, 2, 2, 2).float()], lr=1.0, weight_decay=0.0, method="svd")
    # (32, 8): sqrt(32 / 8) = 2, and eight orthonormal columns.
    assert float(conv.norm()) == pytest.approx(2 * math.sqrt(8), rel=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"order": "prior"}, UnknownNameError, "'pre'"),
        ({"method": "svdd"}, UnknownNameError, "did you mean 'svd'"),
        ({"adjust_lr_fn": "match_rms"}, UnknownNameError, "match_rms_adamw"),
        ({"ns_coefficients": "jordann"}, UnknownNameError, "jordan"),
        ({"ns_coefficients": (1.0, 2.0)}, OptionError, "three numbers"),
        ({"ns_steps": -1}, OptionError, "steps"),
        ({"polish": -1}, OptionError, "polish"),
        ({"ns_dtype": torch.int64}, OptionError, "ns_dtype"),
        ({"ns_dtype": torch.complex64}, OptionError, "ns_dtype"),
    ],
)
def test_own_options_out_of_range_are_refused(bad, error, words):
    with pytest.raises(error, match=words):
        Muon([nn.Parameter(torch.zeros(3, 4))], **bad)
