"""Attaching, merging and detaching: what is adapted, what is not and why, and nothing half done."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from orthokit.adapters import OFT, POET, LoRA, POETLinear, adapted_layers, attach, detach, merge, table
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.targets import trained_beside
from orthokit.errors import OptionError, ParameterError, UnknownNameError
from orthokit.lab import TinyGPT


class Tied(nn.Module):
    """Two hidden layers with one weight, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(32, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 32, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.embed.weight

    def forward(self, ids):
        return self.head(self.c(self.b(self.a(self.embed(ids)))))


def names(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, POETLinear)]


def test_hidden_layers_of_a_model_are_adapted_and_its_function_stays():
    model = TinyGPT("0.2M", layers=1)
    ids = torch.arange(12).view(1, 12)
    before = model(ids)
    assert attach(model, POET(16)) is model
    assert names(model) == [f"blocks.0.{n}" for n in ("attn.q", "attn.k", "attn.v", "attn.o")] + [
        f"blocks.0.mlp.{n}" for n in ("gate", "up", "down")
    ]
    assert torch.allclose(model(ids), before, atol=1e-4)
    frame = table(model).set_index("layer")
    assert frame.loc["head", "adapter"] == "none" and "head" in frame.loc["head", "detail"]
    assert frame.loc["blocks.0.mlp.up", "trainable"] == (64 + 176) * 15 // 2
    assert frame.loc["blocks.0.mlp.up", "detail"] == "in 4 x 16; out 11 x 16; merged 0 times"


def test_detach_gives_back_the_bits_after_merges_and_training():
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 9, bias=False))
    before = copy.deepcopy(model.state_dict())
    attach(model, POET(4, init="normalised", quantize="uint8"))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.input.generator.add_(0.1)
            layer.merge_()
        model[0].bias.add_(1.0)
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad for p in model.parameters())


def test_detach_of_a_weight_that_was_not_kept_is_an_error_and_changes_nothing():
    model = attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), POET(4), keep_base=False)
    with pytest.raises(ParameterError, match="keep_base=True"):
        detach(model)
    assert names(model) == ["0", "1"]


def test_a_bare_layer_is_returned_and_a_merge_of_it_too():
    linear = nn.Linear(8, 8)
    layer = attach(linear, POET(4))
    assert isinstance(layer, POETLinear)
    assert torch.allclose(merge(layer).weight, linear.weight, atol=1e-6)
    assert torch.equal(detach(layer).weight, linear.weight)


def test_merged_layers_train_like_those_they_replaced():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[1].weight.requires_grad_(False)
    bias = model[0].bias
    merge(attach(model, POET(4)))
    assert model[0].weight.requires_grad and not model[1].weight.requires_grad
    assert model[0].bias is bias and not model[0].training
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    attach(model, POET(4))
    assert model[0] is model[2] and isinstance(model[0], POETLinear)


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("blocks.*.attn.[qk]", ["blocks.0.attn.q", "blocks.0.attn.k"]),
        (["*.o", "head"], ["blocks.0.attn.o", "head"]),
        (lambda name: name.endswith("down"), ["blocks.0.mlp.down"]),
    ],
)
def test_targets_by_pattern_and_function(targets, expected):
    assert names(attach(TinyGPT("0.2M", layers=1), POET(16), targets=targets)) == expected


def test_weights_shared_by_hidden_layers_are_refused_and_a_tied_head_is_left_alone():
    model = Tied()
    with pytest.raises(ParameterError, match="shares its weight"):
        attach(model, POET(4))
    assert names(model) == []
    attach(model, POET(4), targets="c")
    frame = table(model).set_index("layer")
    assert frame.loc["c", "adapter"] == "POET" and "tied" in frame.loc["head", "detail"]


def test_layers_that_cannot_be_replaced_say_why():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ParameterError, match="NonDynamicallyQuantizableLinear"):
        attach(attention, POET(4))
    hooked = nn.Sequential(nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ParameterError, match="hooks"):
        attach(hooked, POET(4))


def test_an_error_in_one_layer_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex"):
        attach(model, POET(4))
    assert names(model) == []


def test_bad_requests_are_refused(unchecked):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(OptionError, match="must be an adapter such as OFT"):
        attach(model, {"block_size": 4})
    with pytest.raises(OptionError, match="targets"):
        attach(model, POET(4), targets=[3])
    with pytest.raises(ParameterError, match="matches no"):
        attach(model, POET(4), targets="layers.*")
    with pytest.raises(ParameterError, match="match no"):
        attach(model, POET(4), targets=lambda name: False)
    with pytest.raises(ParameterError, match="no linear layer"):
        attach(nn.Sequential(nn.ReLU()), POET(4))
    for function in (merge, detach, adapted_layers):
        with pytest.raises(ParameterError, match="no adapter"):
            function(model)
    with pytest.raises(ParameterError, match="no linear layer"):
        attach(attach(model, POET(4)), POET(4))  # nothing is adapted twice


# --- what is trained beside, and layers that the options do not suit


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(body=nn.Linear(8, 8), odd=nn.Linear(8, 7), rest=nn.Linear(7, 8), score=head()))


def head():
    return nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))


def test_a_head_is_trained_beside_the_adapters_and_keeps_no_adapter():
    model = attach(classifier(), LoRA(2), train="score")
    assert type(model.score[0]) is nn.Linear
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    beside = {"score.0.weight", "score.0.bias", "score.1.weight", "score.1.bias"}
    assert beside < trained and all(".adapters." in name for name in trained - beside)
    told = table(model).set_index("layer")["detail"]
    assert told["score.0"] == "trained as it is"
    attach(model, LoRA(1), targets="body", name="second")
    assert model.score[0].weight.requires_grad, "a second adapter must not freeze it"
    detach(model)
    assert all(p.requires_grad for p in model.parameters()) and not trained_beside(model)


@pytest.mark.parametrize(("train", "found"), [("no_such", "matches no module"), ("act", "has no weights")])
def test_what_cannot_be_trained_beside_is_said_and_nothing_changes(train, found):
    model = classifier()
    model.act = nn.ReLU()
    with pytest.raises(ParameterError, match=found):
        attach(model, LoRA(2), train=train)
    model.score.requires_grad_(False)
    with pytest.raises(ParameterError, match="is frozen"):
        attach(model, LoRA(2), train="score")
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())


def test_layers_that_the_options_do_not_suit_can_be_left_as_they_are():
    model = classifier()
    with pytest.raises(OptionError, match="block_size must divide"):
        attach(model, OFT(4))
    assert all(p.requires_grad for p in model.parameters()), "an error leaves the model as it was"
    x = torch.randn(3, 8)
    before = model(x)
    attach(model, OFT(4), misfits="leave")
    assert torch.equal(model(x), before)
    told = table(model).set_index("layer")
    assert told["adapter"].tolist() == ["oft", "oft", "none", "oft"]
    assert "block_size must divide the 7 inputs" in told["detail"]["rest"]
    assert not model.rest.weight.requires_grad
    detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_options_that_suit_no_layer_are_an_error_all_the_same():
    model = classifier()
    with pytest.raises(OptionError, match="suit no layer"):
        attach(model, OFT(16), misfits="leave")
    with pytest.raises(UnknownNameError):
        attach(model, OFT(4), misfits="skip")
    assert all(p.requires_grad for p in model.parameters())
