"""Gathering activations: rows in order, padding left out, the model as it was, and every error."""

import pytest
import torch
from torch import nn

from orthokit.diagnostics.activations import collect_activations
from orthokit.errors import DtypeError, OptionError, ShapeError, UnknownNameError
from orthokit.lab.models import TinyGPT


class Two(nn.Module):
    """Two arguments, a layer that gives a tuple, one that runs twice and one that never does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)
        self.memory = nn.GRU(3, 2, batch_first=True)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(3, 3)

    def forward(self, x, y):
        x = self.drop(self.first(x + y))
        out, _ = self.memory(self.act(x))
        return self.act(out), {"not": "a tensor"}


def batches(count=3):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 4, 3, generator=g), torch.randn(2, 4, 3, generator=g)) for _ in range(count)]


def test_outputs_and_inputs_are_rows_in_the_order_of_the_tokens():
    model, given = Two(), batches()
    found = collect_activations(model, given, ["first", "memory"])
    expected = torch.cat([model.first(x + y).reshape(-1, 3) for x, y in given])
    # The in-place ReLU that follows must not have changed what was seen.
    torch.testing.assert_close(found["first"], expected.detach())
    assert found["memory"].shape == (24, 2) and not found["first"].requires_grad
    inputs = collect_activations(model, given, ["first"], what="input")["first"]
    torch.testing.assert_close(inputs, torch.cat([(x + y).reshape(-1, 3) for x, y in given]))


def test_a_layer_that_works_in_place_shows_its_input_as_it_came():
    model = nn.Sequential(nn.ReLU(inplace=True))
    x = torch.tensor([[-1.0, 2.0]])
    assert collect_activations(model, [x.clone()], ["0"], what="input")["0"].tolist() == [[-1, 2]]
    assert collect_activations(model, [x.clone()], ["0"])["0"].tolist() == [[0, 2]]


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = Two()
    model.first.eval()
    for layers in (["first", "drop"], ["act"]):
        try:
            one = collect_activations(model, batches(), layers)
        except OptionError:
            continue
        assert torch.equal(one["first"], one["drop"])  # no dropout while collecting
    assert model.training and model.drop.training and not model.first.training
    assert not any(module._forward_hooks for module in model.modules())


def test_mappings_calls_masks_and_limits():
    model, given = Two(), batches()
    named = [{"x": x, "y": y} for x, y in given]
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    whole = collect_activations(model, given, ["first"])["first"]
    kept = collect_activations(model, named, ["first"], keep=lambda batch: mask)["first"]
    assert torch.equal(kept, whole[mask.flatten().repeat(3)])
    swapped = collect_activations(model, given, ["first"], call=lambda model, batch: model(batch[1], batch[0]))
    torch.testing.assert_close(swapped["first"], whole)
    assert torch.equal(collect_activations(model, given, ["first"], tokens=11)["first"], whole[:11])

    def endless():
        while True:
            yield given[0]

    assert len(collect_activations(model, endless(), ["first"], tokens=9)["first"]) == 9


def test_a_convolution_gives_one_row_a_position():
    model = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.Flatten())
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = collect_activations(model, [x], ["0"])["0"]
    expected = x.movedim(1, -1).reshape(-1, 3) @ model[0].weight[:, :, 0, 0].mT
    torch.testing.assert_close(found, expected.detach())
    taken = collect_activations(model, [x], ["0"], what="input")["0"]
    assert torch.equal(taken, x.movedim(1, -1).reshape(-1, 3))


def test_a_language_model_gives_every_layer_by_name():
    model = TinyGPT("0.2M")
    tokens = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(0))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = collect_activations(model, [tokens], layers)
    assert list(found) == layers and len(layers) > 20
    logits = model(tokens).detach()
    torch.testing.assert_close(collect_activations(model, [tokens], [""])[""], logits.reshape(14, 256))


def test_bad_input_is_named(unchecked):
    model, given = Two(), batches()
    with pytest.raises(UnknownNameError, match="did you mean 'first'"):
        collect_activations(model, given, ["firts"])
    with pytest.raises(UnknownNameError, match="did you mean 'output'"):
        collect_activations(model, given, ["first"], what="outputs")
    with pytest.raises(OptionError, match="layers is empty"):
        collect_activations(model, given, [])
    with pytest.raises(OptionError, match="batches is empty"):
        collect_activations(model, [], ["first"])
    with pytest.raises(OptionError, match="'act' must run exactly once a batch; it ran 2 times"):
        collect_activations(model, given, ["act"])
    with pytest.raises(OptionError, match=r"'unused' .* it ran 0 times"):
        collect_activations(model, given, ["unused"])
    with pytest.raises(OptionError, match="tokens must be an integer >= 1"):
        collect_activations(model, given, ["first"], tokens=0)
    with pytest.raises(ShapeError, match=r"shape \(2, 4\) for layer 'first'; got \(8,\)"):
        collect_activations(model, given, ["first"], keep=lambda batch: torch.ones(8, dtype=torch.bool))
    with pytest.raises(DtypeError, match="boolean mask; got"):
        collect_activations(model, given, ["first"], keep=lambda batch: torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(DtypeError, match="must be a tensor; got dict"):
        collect_activations(nn.ModuleDict({"a": Wordy()})["a"], [torch.ones(2, 2)], [""])


class Wordy(nn.Module):
    """A model that answers in a dictionary."""

    def forward(self, x):
        return {"logits": x}
