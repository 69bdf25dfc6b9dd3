"""LoRA, DoRA and full fine-tuning: nothing changes at the start, and forward, merge and reference are one function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.lora import LoRA
from orthokit.errors import NonFiniteError, OptionError, ParameterError, UnknownNameError

CONFIGS = {
    "kaiming": LoRA(rank=2),
    "scaled": LoRA(rank=3, alpha=5.0, init="gaussian"),
    "stabilised": LoRA(rank=2, alpha=3.0, rank_stabilised=True),
    "pissa": LoRA(rank=2, alpha=4.0, init="pissa"),
    "milora": LoRA(rank=2, init="milora"),
    "dora": DoRA(rank=2, alpha=4.0),
    "dora-pissa": DoRA(rank=2, init="pissa"),
    "full": FullFineTuning(),
}


class Conv1D(nn.Module):
    """GPT-2's layer: its weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 2, 7)),
    "tall": (lambda: nn.Linear(4, 9, bias=False), (6, 4)),
    "one-vector": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d_transposed": (lambda: Conv1D(6, 4), (2, 3, 4)),
    "conv1": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 8)),
    "conv2": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(9, 5), None),
}


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_layer(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    inputs = torch.randint(9, (4, 3), generator=source()) if shape is None else torch.randn(shape, generator=source())
    return make().to(dtype), inputs.to(dtype) if shape is not None else inputs


def stir(layer, size=0.3, seed=1):
    """Every adapter somewhere else than at its start."""
    generator = source(seed)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def reference(config, part, W):
    """``T(W)`` for a matrix in float64, as the formula stands."""
    W, n = W.double(), {name: p.detach().double() for name, p in part.named_parameters()}
    if config.kind == "full":
        return W + part.strength * n["delta"]
    scale = 1.0 if config.alpha is None else config.alpha / config.rank ** (0.5 if config.rank_stabilised else 1)
    V = W + part.strength * scale * (n["up"] @ n["down"])
    if config.init in ("pissa", "milora"):
        V = V - part.strength * scale * (part.up_start.double() @ part.down_start.double())
    if config.kind == "lora":
        return V
    m = W.norm(dim=1).lerp(n["magnitude"], part.strength)
    return V * (m / V.norm(dim=1))[:, None]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", list(LAYERS))
def test_attaching_changes_not_one_bit(name, dtype, config):
    plain, x = plain_layer(name, dtype)
    before = plain(x)
    layer = config.wrap(plain)
    # An adapter that scales the outputs adds the bias after it, which rounds in another order.
    if config.kind == "dora" and getattr(plain, "bias", None) is not None:
        assert torch.allclose(layer(x), before, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(layer(x), before)
    assert torch.equal(layer.merged().weight, plain.weight) or config.kind == "dora"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("name", list(LAYERS))
def test_forward_merge_and_reference_are_one_function(name, config):
    plain, x = plain_layer(name, torch.float64)
    layer = config.wrap(plain)
    stir(layer)
    part = layer.adapters["default"]
    for strength in (1.0, 0.4, 0.0):
        part.strength = strength
        y, merged = layer(x), layer.merged()
        assert torch.allclose(merged(x), y, rtol=1e-10, atol=1e-10)
        kind = layer._kind
        W = kind.matrix(plain, plain.weight.detach(), "patches")
        expected = kind.unmatrix(plain, reference(config, part, W), "patches")
        assert torch.allclose(merged.weight.double(), expected, rtol=1e-10, atol=1e-10)
        assert strength > 0 or torch.equal(merged.weight, plain.weight)


@given(
    first=st.sampled_from(list(CONFIGS)),
    second=st.sampled_from(list(CONFIGS)),
    name=st.sampled_from(list(LAYERS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 20),
)
def test_merge_is_forward_for_stacks_in_every_type(first, second, name, dtype, seed):
    plain, x = plain_layer(name, dtype)
    layer = AdaptedLayer(plain)
    layer.add("a", CONFIGS[first])
    layer.add("b", CONFIGS[second])
    stir(layer, size=0.1, seed=seed)
    y, merged = layer(x).detach(), layer.merged()(x).detach()
    # The merged weight is rounded to the layer's type once, the outputs of a stack up to four times.
    assert float((y - merged).abs().max()) <= 16 * torch.finfo(dtype).eps * (1 + float(merged.abs().max()))
    W = layer._kind.matrix(plain, plain.weight.detach(), "patches")
    for key in reversed(layer.active):
        W = reference(layer.adapters[key].config, layer.adapters[key], W)
    found = layer._kind.matrix(plain, layer.effective_weight(dtype=torch.float64), "patches")
    # Factors stay in float32; nothing else is rounded.
    assert torch.allclose(found, W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("name", ["linear", "conv2", "embedding"])
def test_gradients_are_right(name, config):
    plain, x = plain_layer(name, torch.float64)
    layer = config.wrap(plain)
    stir(layer)
    parameters = list(layer.adapters.parameters())
    dora = config.kind == "dora"
    if dora:  # Lengths are constants: up to them the layer is linear in B A, which finite differences cannot see.
        parameters = [layer.adapters["default"].magnitude]

    def function(*values):
        return layer(*values[len(parameters) :]) if len(values) > len(parameters) else layer(x)

    inputs = () if name == "embedding" else (x.clone().requires_grad_(),)
    assert torch.autograd.gradcheck(function, (*parameters, *inputs), atol=1e-6)


def test_gradient_of_dora_takes_lengths_for_constants():
    plain, x = plain_layer("linear", torch.float64)
    layer = DoRA(rank=2).wrap(plain)
    stir(layer)
    part = layer.adapters["default"]
    V = plain.weight + part.up @ part.down
    y = nn.functional.linear(x, (part.magnitude / V.norm(dim=1).detach())[:, None] * V, plain.bias)
    parameters = [part.down, part.up, part.magnitude]
    weights = torch.randn(y.shape, generator=source(), dtype=y.dtype)
    expected = torch.autograd.grad((weights * y).sum(), parameters)
    for found in (layer(x), nn.functional.linear(x, layer.effective_weight(), plain.bias)):
        for a, b in zip(torch.autograd.grad((weights * found).sum(), parameters), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("outer", ["kaiming", "full", "dora"])
def test_an_outer_adapter_sees_and_trains_what_is_inside(outer):
    plain, x = plain_layer("linear", torch.float64)
    layer = AdaptedLayer(plain)
    layer.add("outer", CONFIGS[outer])
    layer.add("inner", LoRA(rank=1))
    stir(layer)
    layer(x).square().sum().backward()
    inner = layer.adapters["inner"]
    found = [inner.down.grad.clone(), inner.up.grad.clone()]
    inner.zero_grad()
    nn.functional.linear(x, layer.effective_weight(), plain.bias).square().sum().backward()
    assert all(float(g.abs().max()) > 0 for g in found)
    assert all(torch.allclose(a, b) for a, b in zip(found, [inner.down.grad, inner.up.grad], strict=True))


@pytest.mark.parametrize("init", ["pissa", "milora"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
def test_spectral_starts_hold_their_triplets_and_leave_the_rest(init, shape):
    plain = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    W = plain.weight.detach().clone()
    config = LoRA(rank=2, alpha=6.0, init=init)
    part = config.wrap(plain).adapters["default"]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    taken = slice(2) if init == "pissa" else slice(4, 6)
    start = config.scale * (part.up @ part.down)
    assert torch.allclose(start, U[:, taken] @ S[taken].diag() @ Vh[taken])
    left = torch.linalg.svdvals(W - start)[:4]  # what PEFT keeps as the frozen weight
    assert torch.allclose(left, S[2:] if init == "pissa" else S[:4])
    assert torch.equal(plain.weight, W) and torch.equal(part.merge(W), W)


def test_factors_give_a_plain_lora_on_the_untouched_weight():
    plain, x = plain_layer("linear", torch.float64)
    layer = LoRA(rank=2, alpha=4.0, init="pissa").wrap(plain)
    stir(layer)
    down, up = layer.adapters["default"].factors()
    twin = LoRA(rank=4).wrap(plain_layer("linear", torch.float64)[0])
    with torch.no_grad():
        twin.adapters["default"].down.copy_(down)
        twin.adapters["default"].up.copy_(up)
    assert torch.allclose(twin(x), layer(x))


def test_the_scale_is_alpha_over_rank_or_its_root():
    assert LoRA(rank=4).scale == 1.0 and LoRA(rank=4, alpha=8).scale == 2.0
    assert LoRA(rank=16, alpha=8, rank_stabilised=True).scale == 8 / math.sqrt(16)


def test_starts_are_drawn_from_the_seed_and_the_number_of_the_layer():
    def down(seed=0, stream=0, init="kaiming"):
        layer = LoRA(rank=8, init=init, seed=seed).wrap(nn.Linear(400, 10), stream=stream)
        return layer.adapters["default"].down.detach()

    assert torch.equal(down(), down())
    assert not torch.equal(down(), down(seed=1)) and not torch.equal(down(), down(stream=1))
    assert float(down().abs().max()) <= 400**-0.5
    assert abs(float(down(init="gaussian").std()) * 8 - 1) < 0.1  # 3200 numbers: 4 standard errors are 0.05


def test_dropout_acts_in_training_alone_and_on_the_adapter_alone():
    plain = nn.Linear(50, 6)
    layer = LoRA(rank=2, dropout=0.5).wrap(plain)
    x = torch.randn(4, 50, generator=source())
    layer.train()
    assert torch.equal(layer(x), plain(x))
    stir(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.allclose(layer(x), layer.merged()(x), atol=1e-5)


def test_a_row_of_zeros_stays_zero_under_dora():
    plain = nn.Linear(5, 3, bias=False)
    with torch.no_grad():
        plain.weight[1] = 0
    layer = DoRA(rank=2).wrap(plain)
    x = torch.randn(4, 5, generator=source())
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.adapters.parameters())


def test_dora_in_bfloat16_feels_small_changes_of_the_lengths():
    plain = nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = DoRA(rank=1).wrap(plain)
    x = torch.randn(16, 64, generator=source(), dtype=torch.bfloat16)
    before = layer(x)
    with torch.no_grad():
        layer.adapters["default"].magnitude.mul_(1.003)  # less than half a step of bfloat16 above 1
    assert layer(x).dtype == torch.bfloat16 and not torch.equal(layer(x), before)


def test_casting_the_model_keeps_the_adapters_in_float32():
    layer = LoRA(rank=2, init="pissa").wrap(nn.Linear(6, 4)).to(torch.bfloat16)
    part = layer.adapters["default"]
    assert {t.dtype for t in part.state_dict().values()} == {
        torch.float32
    } and layer.base.weight.dtype == torch.bfloat16


def test_autocast_computes_in_its_type():
    for config in CONFIGS.values():
        plain, x = plain_layer("linear")
        layer = config.wrap(plain)
        stir(layer)
        exact = layer(x).detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), exact, atol=0.03 * float(exact.abs().max()))


def test_strength_multiplies_the_change_of_the_weight():
    plain = nn.Linear(6, 4, dtype=torch.float64)
    for config in (LoRA(rank=2, init="milora"), FullFineTuning()):
        layer = config.wrap(plain)
        stir(layer)
        whole = layer.effective_weight(dtype=torch.float64) - plain.weight
        layer.adapters["default"].strength = 0.25
        assert torch.allclose(layer.effective_weight(dtype=torch.float64) - plain.weight, 0.25 * whole)


def test_bad_options_are_refused_in_words():
    for options, words in [
        ({"rank": 0}, "at least 1"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"alpha": math.inf}, "greater than 0"),
        ({"rank_stabilised": True}, "alpha is None"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
    ]:
        with pytest.raises(OptionError, match=words):
            LoRA(**options)
    with pytest.raises(UnknownNameError, match="did you mean 'pissa'"):
        DoRA(init="pisa")
    for config in (LoRA(rank=5), DoRA(rank=5)):
        with pytest.raises(OptionError, match=r"rank=5 .* \(9 x 4\); take at most 4"):
            config.wrap(nn.Linear(4, 9))
    for plain in (nn.Embedding(6, 6), nn.Conv1d(6, 6, 2)):
        with pytest.raises(OptionError, match="dropout"):
            LoRA(rank=1, dropout=0.1).wrap(plain)
    broken = nn.Linear(3, 3)
    with torch.no_grad():
        broken.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="SVD"):
        LoRA(rank=1, init="pissa").wrap(broken)


@pytest.mark.parametrize("config", [DoRA(rank=1), FullFineTuning()])
def test_a_part_that_reads_the_weight_needs_its_layer(config):
    part = config.wrap(nn.Linear(3, 3)).adapters["default"]
    with pytest.raises(ParameterError, match="AdaptedLayer"):
        part.around(lambda x: x, torch.zeros(2, 3))
