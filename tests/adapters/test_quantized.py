"""Quantised bases: the dense weight decides what they compute, and nothing dense is kept."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from orthokit.adapters import attach, merge, table
from orthokit.adapters.dora import DoRA
from orthokit.adapters.foreign import _Linear8bitKind
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.lora import LoRA
from orthokit.adapters.quantized import QuantizedLinear, quantize_linears, requantize
from orthokit.adapters.sites import kind_of
from orthokit.errors import CheckpointError, NonFiniteError, OptionError, ParameterError, ShapeError, UnknownNameError
from orthokit.linalg import polar

SCHEMES = ["int8", "uint8", "nf4"]
# Relative Frobenius error on normal entries: a step of 2 a / 255 or so over sqrt(12), with a = 2.4 (64) to 2.9 (256)
# standard deviations; NF4's is published as about 0.09 in groups of 64. One and a half times that.
TOLERANCE = {"int8": 0.011, "uint8": 0.011, "nf4": 0.14}


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=source(seed), dtype=dtype)


def linear(rows_, columns, *, bias=True, dtype=torch.float32, seed=0):
    layer = nn.Linear(columns, rows_, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows_, columns, generator=source(seed)))
    return layer


def stir(layer, size=0.1):
    generator = source(5)
    with torch.no_grad():
        for parameter in layer.adapters.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


@settings(max_examples=40)
@given(
    scheme=st.sampled_from(SCHEMES),
    out=st.integers(1, 6),
    width=st.integers(1, 70),
    group=st.sampled_from([None, 2, 16, 65]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
)
def test_forward_and_backward_are_those_of_the_dense_weight(scheme, out, width, group, double, dtype, bias):
    plain = linear(out, width, bias=bias, dtype=dtype)
    layer = QuantizedLinear.from_linear(
        plain, scheme=scheme, group_size=group, double=None if scheme == "uint8" else double
    )
    x = rows(2, 3, width, dtype=dtype).requires_grad_()
    y = layer(x)
    expected = F.linear(x, layer.dense(dtype), layer.bias)
    assert y.dtype == dtype and torch.equal(y, expected)
    weights = rows(*y.shape, dtype=dtype, seed=1)
    found, wanted = (torch.autograd.grad((weights * one).sum(), x)[0] for one in (y, expected))
    assert torch.allclose(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradcheck(scheme):
    layer = QuantizedLinear.from_linear(linear(2, 5), scheme=scheme).double()
    x = rows(2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: layer(x), (x, layer.bias))
    assert torch.autograd.gradgradcheck(layer, (x,))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_normal_weights_is_as_published(scheme, dtype):
    plain = linear(64, 512, dtype=dtype)
    layer = QuantizedLinear.from_linear(plain, scheme=scheme)
    W = plain.weight.detach().float()
    assert float((layer.dense() - W).norm() / W.norm()) < TOLERANCE[scheme]
    assert layer.dense(torch.bfloat16).dtype == torch.bfloat16 and layer.weight.dtype == dtype


def test_bits_count_everything_that_is_stored():
    plain = linear(64, 512)
    bits = {scheme: QuantizedLinear.from_linear(plain, scheme=scheme).bits_per_weight for scheme in SCHEMES}
    assert bits["int8"] == 8 + 32 / 128 and bits["uint8"] == 8 + 40 / 256
    assert bits["nf4"] == 4 + 8 / 64 + 40 / (64 * 256) + 32 / (64 * 512)
    assert QuantizedLinear.from_linear(plain, double=False).bits_per_weight == 4 + 32 / 64


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_dense_is_kept_for_the_backward_pass(scheme):
    layer = QuantizedLinear.from_linear(linear(64, 64), scheme=scheme)
    attached = AdaptedLayer(layer)
    attached.add("a", LoRA(rank=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attached(rows(5, 64).requires_grad_())
    assert kept and not [t.shape for t in kept if t.is_floating_point() and t.numel() >= 64 * 64]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_goes_round(scheme):
    plain = linear(6, 70)
    layer = QuantizedLinear.from_linear(plain, scheme=scheme)
    twin = QuantizedLinear(70, 6, scheme=scheme)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.dense(), layer.dense()) and torch.equal(twin.bias, layer.bias)
    assert torch.equal(copy.deepcopy(layer).dense(), layer.dense())


def test_a_state_dict_of_other_groups_is_refused():
    layer = QuantizedLinear.from_linear(linear(2, 150), scheme="uint8", group_size=200)
    with pytest.raises(CheckpointError, match=r"groups of 200.*group_size=200"):
        QuantizedLinear(150, 2, scheme="uint8", group_size=256).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_stay_in_float32_when_the_model_is_cast(scheme):
    layer = QuantizedLinear.from_linear(linear(4, 70), scheme=scheme)
    before = layer.dense()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dense(), before) and layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16
    assert not [n for n, t in layer.matrix.named_buffers() if t.is_floating_point() and t.dtype != torch.float32]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("W", [torch.zeros(3, 5), torch.full((2, 7), 1e-30), torch.zeros(1, 1)])
def test_zero_and_tiny_weights(scheme, W):
    plain = nn.Linear(W.shape[1], W.shape[0], bias=False)
    with torch.no_grad():
        plain.weight.copy_(W)
    dense = QuantizedLinear.from_linear(plain, scheme=scheme).dense()
    assert torch.allclose(dense, W, atol=1e-7) and bool(dense.isfinite().all())


def test_a_row_of_zeros_among_others_stays_exact():
    plain = linear(4, 130)
    with torch.no_grad():
        plain.weight[2] = 0
    for scheme in ("int8", "nf4"):
        assert not QuantizedLinear.from_linear(plain, scheme=scheme).dense()[2].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("config", [LoRA(rank=2, init="pissa"), DoRA(rank=2), FullFineTuning()], ids=lambda c: c.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_over_it_start_at_rest_and_merge_to_a_plain_layer(scheme, config, dtype):
    model = nn.Sequential(linear(9, 12, dtype=dtype), nn.Tanh(), linear(12, 9, dtype=dtype))
    quantize_linears(model, scheme=scheme)
    x = rows(5, 12, dtype=dtype)
    before = model(x)
    attach(model, config)
    assert set(table(model)["adapter"]) == {config.kind}
    slack = 16 * torch.finfo(dtype).eps  # a bias added in another order, twice
    assert torch.allclose(model(x), before, rtol=slack, atol=slack)
    for layer in (model[0], model[2]):
        stir(layer)
    y = model(x)
    y.float().square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model[0].adapters.parameters())
    merge(model)
    assert type(model[0]) is nn.Linear and model[0].weight.dtype == dtype
    assert all(p.requires_grad for p in model.parameters())
    size = float(y.detach().abs().max())
    assert float((model(x) - y).detach().abs().max()) <= 8 * torch.finfo(dtype).eps * (1 + size)


def test_inputs_of_every_type_are_taken_and_autocast_is_followed():
    layer = QuantizedLinear.from_linear(linear(4, 8))
    adapted = AdaptedLayer(layer)
    adapted.add("a", LoRA(rank=1))
    for module in (layer, adapted):
        assert module(rows(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(rows(3, 8)).dtype == torch.bfloat16


def test_a_model_is_quantised_in_place_with_its_costs():
    model = nn.Sequential(linear(64, 32), nn.ReLU(), linear(32, 64, bias=False))
    bias = model[0].bias
    frame = quantize_linears(model, scheme="int8", targets="0")
    assert frame["layer"].tolist() == ["0"] and frame["shape"].tolist() == [(64, 32)]
    assert 0 < frame["relative_error"][0] < TOLERANCE["int8"] and 0 < frame["largest_error"][0] <= 0.5 / 127 + 1e-6
    assert type(model[0]) is QuantizedLinear and type(model[2]) is nn.Linear and model[0].bias is bias


def test_gpt2_s_transposed_layers_are_quantised_as_what_they_compute():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight, self.bias = 3, nn.Parameter(rows(8, 3)), nn.Parameter(rows(3))

        def forward(self, x):
            return x @ self.weight + self.bias

    model = nn.Sequential(Conv1D())
    x = rows(2, 8)
    before = model(x)
    quantize_linears(model, scheme="int8", targets="0")
    assert torch.allclose(model(x), before, atol=0.1)


def test_what_cannot_be_quantised_is_refused_and_nothing_changes():
    tied = nn.ModuleDict({"a": linear(6, 6), "b": linear(6, 6)})
    tied["b"].weight = tied["a"].weight
    broken = nn.Sequential(linear(3, 3), linear(3, 3))
    with torch.no_grad():
        broken[1].weight[0, 0] = float("inf")
    hooked = nn.Sequential(linear(3, 3))
    hooked[0].register_forward_hook(lambda *_: None)
    mixed = nn.Sequential(linear(3, 3), nn.Conv1d(3, 3, 1))
    adapted = attach(nn.Sequential(linear(3, 3)), LoRA(rank=1))
    for model, error, words in [
        (tied, ParameterError, "untie them"),
        (broken, NonFiniteError, "not finite"),
        (hooked, ParameterError, "hooks"),
        (mixed, ParameterError, "Conv1d"),
        (adapted, ParameterError, "AdaptedLayer"),
        (linear(3, 3), ParameterError, "from_linear"),
        (nn.Sequential(nn.ReLU()), ParameterError, "matches no layer|match no layer"),
    ]:
        before = [type(one) for one in model.modules()]
        with pytest.raises(error, match=words):
            quantize_linears(model, targets="*")
        assert [type(one) for one in model.modules()] == before
    with pytest.raises(OptionError, match="at least 2"):
        quantize_linears(broken, group_size=1)
    with pytest.raises(OptionError, match="float32"):
        QuantizedLinear(4, 4, scheme="uint8", double=True)
    with pytest.raises(UnknownNameError, match="did you mean 'nf4'"):
        QuantizedLinear(4, 4, scheme="fn4")
    with pytest.raises(ParameterError, match="quantised"):
        AdaptedLayer(QuantizedLinear(4, 4)).fold()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_rotation_keeps_lengths_of_rows_through_requantising_and_a_low_rank_change_does_not(scheme):
    base = QuantizedLinear.from_linear(linear(32, 128), scheme=scheme)
    W = base.dense(torch.float64)
    R = polar(rows(128, 128, dtype=torch.float64))
    change = rows(32, 2, dtype=torch.float64) @ rows(2, 128, dtype=torch.float64, seed=1)
    reports = {}
    for name, merged in [("rotation", W @ R), ("low rank", W + 0.5 * change), ("none", W)]:
        layer = nn.Linear(128, 32, bias=False)
        with torch.no_grad():
            layer.weight.copy_(merged)
        made, reports[name] = requantize(layer, like=base)
        assert made.layout == base.layout
        assert reports[name]["relative_error"] < TOLERANCE[scheme]
    # Quantising moves a row's length by its error along the row alone, far less than the error itself.
    assert reports["rotation"]["row_norm_change"] < 1e-5
    assert reports["rotation"]["row_norm_change_quantized"] < TOLERANCE[scheme] / 2
    assert reports["low rank"]["row_norm_change"] > 0.1
    # The range of entries is not kept by a rotation, although that is said of it.
    assert reports["rotation"]["range_growth"] > 1.1 and reports["none"]["range_growth"] == 1.0
    with pytest.raises(ShapeError, match="the layer is"):
        requantize(linear(4, 4), like=base)


def foreign(kind, bias):
    """A layer of another package, of 64 -> 32, and how far its products are from those of its dense weight."""
    plain = linear(32, 64, bias=bias)
    if kind.startswith("bnb"):
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        if kind == "bnb-4bit":
            layer = bnb.nn.Linear4bit(64, 32, bias=bias, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False)
        layer.load_state_dict(plain.state_dict())
        return layer.to("cpu"), 1e-6
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(plain)
    dynamic = kind == "torchao-dynamic"
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig() if dynamic else ao.Int8WeightOnlyConfig())
    return model[0], 0.02 if dynamic else 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-weight", "torchao-dynamic"])
@pytest.mark.filterwarnings("default")
def test_adapters_sit_on_layers_of_other_packages(kind, bias):
    layer, off = foreign(kind, bias)
    x = rows(5, 64).requires_grad_()
    before = layer(x).detach()
    found = kind_of(layer)
    assert found is not None and found.name.startswith("quantized")
    model = attach(nn.Sequential(layer), LoRA(rank=2))
    assert torch.equal(model(x), before)
    stir(model[0])
    y = model(x)
    merged = model[0].merged()
    size = float(before.abs().max())
    assert type(merged) is nn.Linear and type(merged.weight) is nn.Parameter
    assert float((merged(x) - y).detach().abs().max()) <= (off + 1e-5) * size
    gradient, wanted = (torch.autograd.grad(one.sum(), x)[0] for one in (y, merged(x)))
    assert torch.allclose(gradient, wanted, atol=1e-4)


class Linear8bitLt(nn.Linear):
    """What adapters read of the layer of this name in bitsandbytes, so that it is tested where that is missing."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, device="meta")
        W, self.bias = plain.weight.detach(), plain.bias
        scale = W.abs().amax(1)
        codes = (W / scale[:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.state = type("State", (), {"SCB": scale})

    def forward(self, x):
        return F.linear(x, self.weight.float() * (self.state.SCB / 127)[:, None], self.bias)


def test_a_layer_is_known_by_class_and_package_without_the_package(monkeypatch):
    layer = Linear8bitLt(linear(4, 8))
    assert kind_of(layer) is None
    monkeypatch.setattr(Linear8bitLt, "__module__", "bitsandbytes.nn.modules")
    x = rows(3, 8)
    before = layer(x)
    for config in (LoRA(rank=2), DoRA(rank=2), FullFineTuning()):
        adapted = config.wrap(layer)
        assert isinstance(kind_of(layer), _Linear8bitKind) and torch.allclose(adapted(x), before, atol=1e-5)
        stir(adapted)
        assert torch.allclose(adapted.merged()(x), adapted(x), atol=1e-5)
    layer.state.SCB = None
    with pytest.raises(ParameterError, match="codes without scales"):
        adapted.effective_weight()


def test_a_layer_that_is_not_quantised_yet_is_refused(monkeypatch):
    class Linear4bit(nn.Linear):
        pass

    monkeypatch.setattr(Linear4bit, "__module__", "bitsandbytes.nn.modules")
    with pytest.raises(ParameterError, match="not quantised yet"):
        AdaptedLayer(Linear4bit(4, 4))
