"""The safe radius: the bound, its derivative pass, and the controller around real optimizers."""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from orthokit import adapters
from orthokit.diagnostics.safe_step import StepController, logit_slopes, safe_radius, safe_step_radius
from orthokit.errors import NonFiniteError, OptionError, ParameterError, ShapeError
from orthokit.lab import SmallCNN, TinyGPT, TinyGPTConfig
from orthokit.optim import for_model

SMALL = TinyGPTConfig(dim=16, layers=1, heads=2, hidden=24, context=16)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def partition(z, a, t):
    return sum(cmath.exp(complex(zk) + t * ak) for zk, ak in zip(z, a, strict=True))


def direction(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=g) for n, p in model.named_parameters() if p.requires_grad}


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_the_partition_function_has_no_zero_inside_the_disc(classes, seed):
    z, a = numbers(2, classes, seed=seed).tolist()
    rho = safe_radius(torch.tensor(a, dtype=torch.float64)).item()
    inside = [0.999 * rho * r * cmath.exp(1j * angle / 20 * math.pi) for r in (0.3, 0.7, 1.0) for angle in range(40)]
    # On |t| < rho the arguments span less than pi, so the sum cannot vanish; here it keeps a share of its real value.
    assert min(abs(partition(z, a, t)) / partition(z, a, t.real).real for t in inside) > 1e-5


@given(st.integers(0, 10**6))
def test_with_two_classes_the_radius_is_the_nearest_zero(seed):
    z, a = numbers(2, 2, seed=seed)
    rho = safe_radius(a, logits=z).item()
    slope, gap = float(a[1] - a[0]), float(z[1] - z[0])
    zero = (complex(0, math.pi) - gap) / slope  # exp(gap + t slope) = -1
    assert rho == pytest.approx(abs(zero), rel=1e-12)
    # Rounding of exp at the zero, relative to the terms that cancel.
    terms = abs(cmath.exp(float(z[0]) + zero * float(a[0])))
    assert abs(partition(z.tolist(), a.tolist(), zero)) < 1e-9 * terms
    assert rho >= safe_radius(a).item()


@given(st.integers(2, 5), st.floats(0.01, 100), st.floats(-5, 5), st.integers(0, 10**6))
def test_scaling_and_shifting_of_slopes(classes, factor, shift, seed):
    a = numbers(3, classes, seed=seed)
    torch.testing.assert_close(safe_radius(factor * a), safe_radius(a) / factor)
    torch.testing.assert_close(safe_radius(a + shift), safe_radius(a), rtol=1e-9, atol=0)


def test_equal_slopes_allow_any_step():
    assert safe_radius(torch.ones(2, 3)).tolist() == [math.inf, math.inf]
    model = nn.Linear(2, 3)
    found = safe_step_radius(model, torch.ones(1, 2), {"bias": torch.ones(3)})
    assert found.radius == math.inf and found.ratio == 0


@pytest.mark.parametrize("make", [lambda: SmallCNN(width=4).double(), lambda: TinyGPT(SMALL).double()])
def test_slopes_are_the_limit_of_differences(make):
    model = make()
    inputs = torch.rand(2, 1, 8, 8).double() if isinstance(model, SmallCNN) else torch.arange(20).reshape(2, 10)
    v = direction(model)
    logits, slopes = logit_slopes(model, inputs, v)
    h, at = 1e-5, {}
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(logits, model(inputs))
        for sign in (1, -1):
            for n, p in model.named_parameters():
                p.copy_(original[n] + sign * h * v[n])
            at[sign] = model(inputs)
    # The model ends in .float(): differences of float32 logits know the slope to about 1e-7 |z| / h.
    tolerance = 1e-6 if isinstance(model, SmallCNN) else 2e-2
    torch.testing.assert_close(slopes, (at[1] - at[-1]) / (2 * h), rtol=tolerance, atol=tolerance * float(slopes.std()))


@pytest.mark.parametrize("config", [adapters.LoRA(rank=2), adapters.OFT(block_size=4), adapters.HRA(rank=2)])
def test_adapters_have_slopes_and_only_theirs_are_needed(config):
    model = adapters.attach(TinyGPT(SMALL), config, targets="blocks.*.attn.*")
    found = safe_step_radius(model, torch.arange(10)[None], direction(model))
    assert found.radii.shape == (1, 10) and 0 < found.radius < math.inf


def test_a_measurement_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generator = torch.get_rng_state()
    safe_step_radius(model, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), direction(model))
    assert torch.equal(generator, torch.get_rng_state()) and all(m.training for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def proposed(model, optimizer, inputs, targets, controller=None):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()
    if controller is None:
        optimizer.step()
        return
    with controller.around(model, inputs):
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr),
    "adamw": lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.1),
    "muon": lambda m, lr: for_model(m, "muon", lr=lr),
    "pion": lambda m, lr: for_model(m, "pion", lr=lr),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_any_optimizer_is_held_inside_the_radius_along_its_own_step(name):
    inputs = torch.arange(24).reshape(2, 12)
    free, held = TinyGPT(SMALL), TinyGPT(SMALL)
    start = {n: p.detach().clone() for n, p in held.named_parameters()}
    controller = StepController(safety=0.5)
    proposed(free, OPTIMIZERS[name](free, 0.5), inputs, inputs + 1)
    proposed(held, OPTIMIZERS[name](held, 0.5), inputs, inputs + 1, controller)
    assert controller.ratio > 0.5 and controller.scale < 1
    whole = dict(free.named_parameters())
    made = {n: p.detach() - start[n] for n, p in held.named_parameters()}
    for n, step in made.items():
        torch.testing.assert_close(step, controller.scale * (whole[n] - start[n]).detach(), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        for n, p in held.named_parameters():
            p.copy_(start[n])
    # Steps of float32 parameters are known to about 1e-7 of the parameters, and here are a thousandth of them.
    assert safe_step_radius(held, inputs, made).ratio == pytest.approx(0.5, rel=1e-3)


def test_a_short_step_is_left_alone_to_the_bit():
    inputs = torch.arange(24).reshape(2, 12)
    free, held = TinyGPT(SMALL), TinyGPT(SMALL)
    controller = StepController()
    proposed(free, OPTIMIZERS["adamw"](free, 1e-5), inputs, inputs + 1)
    proposed(held, OPTIMIZERS["adamw"](held, 1e-5), inputs, inputs + 1, controller)
    assert 0 < controller.ratio < 1 and controller.scale == 1
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), held.parameters(), strict=True))


def test_a_spike_of_the_rate_is_survived():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    losses = {}
    for controller in (None, StepController(safety=0.9)):
        model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(80):
            optimizer.param_groups[0]["lr"] = 3000.0 if step == 40 else 0.3
            proposed(model, optimizer, x, y, controller)
        losses[controller is None] = float(F.cross_entropy(model(x), y).detach())
    assert losses[False] < 0.5 < losses[True]


def test_merging_optimizers_and_bad_input_are_named(unchecked):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    adapters.attach(model, adapters.POET(block_size=4, merge_every=1))
    optimizer = adapters.POETOptimizer(model, lr=1e-2)
    model(torch.ones(1, 8)).square().sum().backward()
    with pytest.raises(ParameterError, match="cannot be shortened"), StepController().around(model, torch.ones(1, 8)):
        optimizer.step()
    layer = nn.Linear(2, 3)
    with pytest.raises(ParameterError, match="no parameter"):
        logit_slopes(layer, torch.ones(1, 2), {"w": torch.ones(3)})
    with pytest.raises(ShapeError, match="shape"):
        logit_slopes(layer, torch.ones(1, 2), {"bias": torch.ones(2)})
    with pytest.raises(ShapeError, match="classes >= 2"):
        safe_radius(torch.ones(3, 1))
    with pytest.raises(ShapeError, match="of the slopes"):
        safe_radius(torch.ones(3, 2), logits=torch.ones(2, 2))
    with pytest.raises(NonFiniteError, match="slopes"):
        safe_radius(torch.tensor([1.0, math.nan]))
    with pytest.raises(OptionError, match="safety"):
        StepController(safety=0)
    with pytest.raises(OptionError, match="examples"):
        StepController(examples=0)
    with pytest.raises(OptionError, match="one batch"), StepController().around(layer, (torch.ones(1, 2),)):
        pass


def test_a_step_that_is_not_finite_is_taken_back():
    layer = nn.Linear(2, 3)
    start = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(NonFiniteError), StepController().around(layer, torch.ones(1, 2)), torch.no_grad():
        layer.bias[0] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), start, strict=True))
