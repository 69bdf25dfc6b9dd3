"""Lion against its definition in float64, and as a torch optimizer."""

import numpy as np
import pytest
import torch

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import CONTESTANTS, Lion, SmallCNN, contestant, contestants


def _reference(W, gradients, *, lr, betas, decay):
    """Algorithm 2 of the paper, in float64."""
    W, M = W.astype(np.float64), np.zeros_like(W, dtype=np.float64)
    for G in gradients:
        blend = betas[0] * M + (1 - betas[0]) * G
        W = W - lr * (np.sign(blend) + decay * W)
        M = betas[1] * M + (1 - betas[1]) * G
    return W


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.0), (0.95, 0.5)])
def test_lion_follows_its_definition(betas, decay):
    g = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=g, dtype=torch.float64)
    gradients = [torch.randn(5, 3, generator=g, dtype=torch.float64) for _ in range(12)]
    W = torch.nn.Parameter(start.clone())
    optimizer = Lion([W], lr=0.02, betas=betas, weight_decay=decay)
    for G in gradients:
        W.grad = G.clone()
        optimizer.step()
        assert torch.equal(W.grad, G), "a gradient is not the optimizer's to change"
    expected = _reference(start.numpy(), [G.numpy() for G in gradients], lr=0.02, betas=betas, decay=decay)
    # 12 steps of float64 rounding; no sign is near a tie with these draws.
    np.testing.assert_allclose(W.detach().numpy(), expected, atol=1e-14)


def test_lion_resumes_from_its_state_dict():
    def model():
        return torch.nn.Parameter(torch.arange(4.0))

    def train(W, optimizer, steps):
        for k in steps:
            W.grad = torch.cos(W.detach() * (k + 1))
            optimizer.step()

    whole, part = model(), model()
    one = Lion([whole], lr=0.1)
    train(whole, one, range(6))
    first = Lion([part], lr=0.1)
    train(part, first, range(3))
    second = Lion([part], lr=0.5)
    second.load_state_dict(first.state_dict())
    train(part, second, range(3, 6))
    assert torch.equal(whole, part)


def test_lion_takes_a_closure_and_skips_what_has_no_gradient():
    W, idle = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Lion([W, idle], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (W**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert W.tolist() == [0.5, 0.5] and idle.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}])
def test_lion_refuses_options_out_of_range(options):
    with pytest.raises(OptionError):
        Lion([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("name", contestants())
def test_every_contestant_updates_every_parameter(name):
    model = SmallCNN(width=4)
    optimizer = contestant(name, model, lr=1e-2, rest_lr=1e-2)
    scores = model(torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.nn.functional.cross_entropy(scores, torch.arange(8)).backward()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer.step()
    still = [key for key, p in model.named_parameters() if p.grad is not None and torch.equal(p, before[key])]
    assert not still and any(p.grad is not None for p in model.parameters())


def test_the_rest_has_its_own_rate_and_options_can_be_changed():
    optimizer = contestant("muon_pre", SmallCNN(width=4), lr=0.1, rest_lr=0.01, options={"momentum": 0.5})
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.01, 0.1]
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert CONTESTANTS["muon_pre"].options["momentum"] == 0.95


def test_an_unknown_contestant_is_told_the_choices():
    with pytest.raises(UnknownNameError, match="did you mean 'adamw'"):
        contestant("adam", SmallCNN(width=4), lr=0.1)
