"""Layers with several adapters: order, switches, merges, every kind of layer; with two toy adapters."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from orthokit.adapters import (
    adapted_layers,
    adapter_parameters,
    adapter_report,
    adapter_state_dict,
    attach,
    detach,
    disabled,
    load_adapter_state_dict,
    merge,
    set_adapters,
    table,
    unmerge,
)
from orthokit.adapters.base import Adapter, PartConfig
from orthokit.errors import CheckpointError, DtypeError, OptionError, ParameterError
from orthokit.linalg import block_diagonal, cayley, packed_size, unpack_skew
from orthokit.matrices import matrices


@dataclass(frozen=True)
class Turn(PartConfig):
    """A dense rotation of the inputs, within groups where there are any."""

    seed: int = 0
    kind = "turn"

    def part(self, site, weight, *, stream):
        return TurnPart(self, site, stream)


class TurnPart(Adapter):
    def __init__(self, config, site, stream):
        super().__init__(config, site)
        width = site.in_features // site.groups
        g = torch.Generator().manual_seed(100 * config.seed + stream)
        drawn = 0.5 * torch.randn(site.groups, packed_size(width), generator=g)
        self.generator = nn.Parameter(drawn.to(device=site.device, dtype=site.dtype))

    def dense(self, dtype):
        return block_diagonal(cayley(unpack_skew(self.strength * self.generator.to(dtype))))

    def turn(self, x):
        return x @ self.dense(self.generator.dtype).mT.to(x.dtype)

    def look_up(self, rows, index):
        return rows @ self.dense(self.generator.dtype).to(rows.dtype)

    def merge(self, W):
        return W @ self.dense(W.dtype)


@dataclass(frozen=True)
class Add(PartConfig):
    """A dense change of the weight."""

    seed: int = 0
    kind = "add"

    def part(self, site, weight, *, stream):
        return AddPart(self, site, weight())


class AddPart(Adapter):
    turns_inputs = False
    view = "patches"

    def __init__(self, config, site, W):
        super().__init__(config, site)
        g = torch.Generator().manual_seed(config.seed)
        self.delta = nn.Parameter(0.3 * torch.randn(W.shape, generator=g, dtype=W.dtype))

    def merge(self, W):
        return W + self.strength * self.delta.to(W.dtype)

    def around(self, inner, x):
        return inner(x) + x @ (self.strength * self.delta).mT.to(x.dtype)

    def look_up(self, rows, index):
        return rows + (self.strength * self.delta[index]).to(rows.dtype)


class Conv1D(nn.Module):
    """GPT-2's linear layer."""

    def __init__(self, out, width):
        super().__init__()
        self.nf = out
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / 3), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def layers():
    torch.manual_seed(0)
    return {
        "wide": (nn.Linear(8, 3), (5, 8)),
        "tall": (nn.Linear(4, 9, bias=False), (2, 3, 4)),
        "square": (nn.Linear(6, 6), (6,)),
        "transposed": (Conv1D(5, 6), (4, 6)),
        "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
        "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
        "grouped": (nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 5, 5)),
        "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (1, 2, 5, 5, 5)),
        "embedding": (nn.Embedding(11, 6), None),
    }


def inputs(shape, dtype=torch.float32):
    if shape is None:
        return torch.arange(10).view(2, 5)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


# One rounding of the merged weight and one of the products, at most some fifty of them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.08}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("order", [("a",), ("b",), ("a", "b"), ("b", "a"), ("a", "c", "b")], ids="".join)
def test_merged_and_folded_layers_compute_the_same(kind, dtype, order):
    plain, shape = layers()[kind]
    layer, x = plain.to(dtype), inputs(shape, dtype)
    for name, config in (("a", Turn(1)), ("b", Add(2)), ("c", Turn(3))):
        if name in order:
            layer = attach(layer, config, name=name, targets="*")
    set_adapters(layer, order)
    y, before = layer(x), layer.base.weight.clone()
    assert y.dtype == dtype
    scale = y.abs().max().item() + 1
    assert torch.allclose(merge(layer)(x), y, atol=TOLERANCE[dtype] * scale, rtol=0)
    assert torch.equal(layer.base.weight, before)
    merge(nn.Sequential(layer), keep=True)
    assert layer.folded == order and torch.allclose(layer(x), y, atol=TOLERANCE[dtype] * scale, rtol=0)
    unmerge(nn.Sequential(layer))
    assert torch.equal(layer.base.weight, before) and torch.equal(layer(x), y)
    with disabled(layer):
        assert torch.equal(layer(x), plain(x))
    assert detach(layer) is plain and all(p.requires_grad for p in plain.parameters())


def test_inputs_pass_the_first_adapter_first():
    linear = nn.Linear(5, 4, bias=False)
    layer = attach(attach(linear, Turn(1), name="a"), Turn(2), name="b")
    A, B = (layer.adapters[name].dense(torch.float32) for name in "ab")
    x = torch.randn(3, 5)
    assert torch.allclose(layer(x), x @ A.mT @ B.mT @ linear.weight.mT, atol=1e-5)
    assert torch.allclose(layer.effective_weight(), linear.weight @ B @ A, atol=1e-5)
    assert torch.allclose(layer.weight, layer.effective_weight()) and layer.bias is None


def test_gradients_are_those_of_the_effective_weight():
    layer = nn.Conv2d(4, 3, 3).double()
    for name in "ab":
        layer = attach(layer, Turn(ord(name)), name=name, targets="conv")
    x = inputs((2, 4, 6, 6), torch.float64)
    wanted = list(adapter_parameters(layer).values())
    found = torch.autograd.grad(layer(x).square().sum(), wanted)
    weight = layer.effective_weight(dtype=torch.float64)
    expected = torch.autograd.grad(nn.functional.conv2d(x, weight, layer.bias).square().sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_the_rest_of_the_model_is_frozen_until_the_last_adapter_goes():
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    model[2].bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    attach(model, Turn(), targets="0", name="a")
    attach(model, Add(), targets=["0", "2"], name="b")
    taking = [name for name, p in model.named_parameters() if p.requires_grad]
    assert taking == ["0.adapters.a.generator", "0.adapters.b.delta", "2.adapters.b.delta"]
    assert list(adapter_parameters(model)) == taking == list(adapter_state_dict(model))
    detach(model, "b")
    assert type(model[2]) is nn.Linear and model[0].active == ("a",)
    assert not model[1].weight.requires_grad
    model = merge(copy.deepcopy(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_freeze_false_leaves_the_rest_alone():
    model = attach(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), Turn(), freeze=False)
    assert model[1].weight.requires_grad and not model[0].base.weight.requires_grad


def test_switching_trains_what_is_named_alone():
    model = attach(attach(nn.Sequential(nn.Linear(4, 4)), Turn(1), name="a"), Turn(2), name="b")
    set_adapters(model, "b")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.adapters.b.generator"]
    x = torch.ones(1, 4)
    only = model(x)
    set_adapters(model, ("a", "b"), train=())
    with disabled(model, "a"):
        assert torch.equal(model(x), only)
    assert not torch.equal(model(x), only) and not any(p.requires_grad for p in model.parameters())
    set_adapters(model, ())
    assert torch.equal(model(x), model[0].base(x))
    with pytest.raises(ParameterError, match="not active"):
        merge(model)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mid(self.embed(ids)))


def test_tied_weights_are_adapted_apart_and_untied_only_when_asked():
    model = Tied()
    attach(model, Turn(), targets=["embed", "head"])
    ids = torch.arange(4)
    y = model(ids)
    frame = table(model).set_index("layer")
    assert "embed.weight = head.weight" in frame.loc["embed", "detail"]
    with pytest.raises(ParameterError, match="untie=True"):
        merge(model)
    assert set(adapted_layers(model)) == {"embed", "head"}
    merge(model, untie=True)
    assert torch.allclose(model(ids), y, atol=1e-5)
    assert model.head.weight is not model.embed.weight
    assert model.head.weight.requires_grad and model.embed.weight.requires_grad


def test_kinds_of_targets():
    model = nn.ModuleDict(
        {"e": nn.Embedding(9, 4), "c": nn.Conv2d(4, 4, 3), "l": nn.Linear(4, 4), "n": nn.LayerNorm(4)}
    )
    for targets, expected in (("linear", {"l"}), ("conv", {"c"}), ("embedding", {"e"}), ("all", {"e", "c", "l"})):
        assert set(adapted_layers(attach(copy.deepcopy(model), Turn(), targets=targets))) == expected
    frame = table(attach(model, Turn(), targets="conv")).set_index("layer")
    assert frame.loc["c", "weights"] == 4 * 4 * 9 and frame.loc["e", "adapter"] == "none"


def test_orthogonal_optimizers_do_not_take_generators_for_matrices():
    model = attach(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), Turn(), targets="conv")
    assert [block.parameter for block in matrices(model)] == ["0.base.weight"]


def test_a_failing_layer_leaves_the_model_as_it_was():
    class Picky(Turn):
        def part(self, site, weight, *, stream):
            if site.name == "1":
                raise OptionError("no")
            return super().part(site, weight, stream=stream)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    attach(model, Turn(), targets="0", name="a")
    state = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(OptionError, match="no"):
        attach(model, Picky(), name="b")
    assert list(model[0].adapters) == ["a"] and type(model[1]) is nn.Linear
    assert {name: p.requires_grad for name, p in model.named_parameters()} == state


def test_states_load_whole_or_not_at_all():
    make = lambda width, seed: attach(nn.Sequential(nn.Linear(width, 4)), Turn(seed))  # noqa: E731
    model, other = make(4, 1), make(4, 2)
    load_adapter_state_dict(model, adapter_state_dict(other))
    assert torch.equal(model[0].adapters.default.generator, other[0].adapters.default.generator)
    with pytest.raises(CheckpointError, match=r"shape.*\(1, 10\) for \(1, 6\)"):
        load_adapter_state_dict(model, adapter_state_dict(make(5, 1)))
    with pytest.raises(CheckpointError, match="1 missing"):
        load_adapter_state_dict(model, {})


def test_copies_and_pickles_keep_what_is_switched():
    model = attach(attach(nn.Sequential(nn.Linear(4, 4)), Turn(1), name="a"), Turn(2), name="b")
    set_adapters(model, "b")
    x = torch.ones(1, 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x)) and twin[0].active == ("b",)
        assert merge(detach(twin, "a"))[0].weight.requires_grad


def test_a_cast_model_keeps_its_adapters_in_full_precision():
    model = attach(nn.Sequential(nn.Linear(8, 8)), Turn())
    generator = model[0].adapters.default.generator.clone()
    model.bfloat16()
    assert torch.equal(model[0].adapters.default.generator, generator)
    assert model(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(DtypeError, match="bfloat16"):
        model(torch.ones(2, 8))


@pytest.mark.parametrize("kind", ["wide", "transposed", "conv2d"])
def test_autocast_computes_in_its_type(kind):
    plain, shape = layers()[kind]
    layer = attach(plain, Turn(), targets="*")
    x = inputs(shape)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), exact, atol=0.08)
    y.float().sum().backward()
    assert layer.adapters.default.generator.grad.dtype == torch.float32


def test_the_report_names_every_adapter():
    model = attach(attach(nn.Sequential(nn.Linear(4, 4)), Turn(1), name="a"), Turn(2), name="b")
    frame = adapter_report(set_adapters(model, "a"))
    assert frame[["layer", "adapter", "active", "trainable"]].values.tolist() == [
        ["0", "a", True, 6],
        ["0", "b", False, 0],
    ]


def test_bad_requests_are_refused():
    model = attach(nn.Sequential(nn.Linear(4, 4)), Turn(), name="a")
    with pytest.raises(OptionError, match="already"):
        attach(model, Turn(), name="a")
    with pytest.raises(OptionError, match="letters"):
        attach(model, Turn(), name="a.b")
    with pytest.raises(OptionError, match="once"):
        set_adapters(model, ["a", "a"])
    with pytest.raises(ParameterError, match=r"'z'.*\['a'\]"):
        set_adapters(model, "z")
    with pytest.raises(ParameterError, match="an adapter 'z'"):
        detach(model, "z")
    merge(model, keep=True)
    for action in (
        lambda: attach(model, Turn(), name="b"),
        lambda: detach(model),
        lambda: set_adapters(model, "a"),
        lambda: merge(model, keep=True),
    ):
        with pytest.raises(ParameterError, match="merged in"):
            action()
