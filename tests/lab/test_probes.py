"""Probes look at gradients and leave no trace: not in weights, gradients, or the random numbers."""

import pytest
import torch
from torch import nn

from orthokit.errors import OptionError, UnknownNameError
from orthokit.lab import (
    GradientRecorder,
    SmallCNN,
    TinyGPT,
    fit,
    image_classification,
    language_modelling,
    stationary_gradients,
)
from orthokit.lab.probes import chosen_blocks
from orthokit.optim import for_model

NAME = "blocks.0.attn.o.weight"


@pytest.fixture
def task():
    return language_modelling("moby_dick", context=16, batch=2, validation_windows=2)


def test_stationary_gradients_are_those_of_backward(task):
    model = TinyGPT("0.2M", layers=1)
    found = stationary_gradients(model, task, [NAME, "blocks.0.mlp.up.weight"], count=3, first=7)
    task.loss(model, task.batch(8)).backward()
    assert torch.allclose(found[NAME][1], model.get_parameter(NAME).grad, atol=1e-7)
    assert found["blocks.0.mlp.up.weight"].shape == (3, 176, 64)


def test_a_stationary_probe_leaves_no_trace(task):
    model = TinyGPT("0.2M", layers=1)
    weights, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    stationary_gradients(model, task, [NAME], count=2)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert torch.equal(state, torch.get_rng_state())


def test_convolutions_are_seen_as_matrices():
    found = stationary_gradients(SmallCNN(), image_classification("digits", batch=4), ["conv2.weight"], count=2)
    assert found["conv2.weight"].shape == (2, 32, 144)


def test_the_recorder_keeps_the_last_gradients_of_fit(task, tmp_path):
    model = TinyGPT("0.2M", layers=1)
    optimizer = for_model(model, lr=1e-2)
    with GradientRecorder(model, optimizer, [NAME], keep=2) as recorder:
        fit(model, task, optimizer, steps=3, root=tmp_path, progress=False)
    kept = recorder.gradients(NAME)
    assert kept.shape == (2, 64, 64) and not torch.equal(kept[0], kept[1])
    # Outside the block nothing is recorded any more.
    fit(model, task, optimizer, steps=1, root=tmp_path, progress=False)
    assert torch.equal(recorder.gradients(NAME), kept)


def test_recording_does_not_change_the_run(task, tmp_path):
    weights = []
    for record in (False, True):
        model = TinyGPT("0.2M", layers=1)
        optimizer = for_model(model, lr=1e-2)
        if record:
            with GradientRecorder(model, optimizer, [NAME], keep=5):
                fit(model, task, optimizer, steps=3, root=tmp_path, progress=False)
        else:
            fit(model, task, optimizer, steps=3, root=tmp_path, progress=False)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_bad_input_is_refused_in_words(task):
    model = TinyGPT("0.2M", layers=1)
    with pytest.raises(UnknownNameError, match=r"did you mean 'blocks\.0\.attn\.o\.weight'"):
        stationary_gradients(model, task, ["blocks.0.attn.o"], count=1)
    with pytest.raises(OptionError, match="count must be at least 1"):
        stationary_gradients(model, task, [NAME], count=0)
    with pytest.raises(OptionError, match="at least one matrix"):
        chosen_blocks(model, [])
    with pytest.raises(OptionError, match="keep must be at least 1"):
        GradientRecorder(model, for_model(model, lr=0.1), [NAME], keep=0)
    recorder = GradientRecorder(model, for_model(model, lr=0.1), [NAME], keep=1)
    with pytest.raises(OptionError, match="no gradient"):
        recorder.gradients(NAME)
    with pytest.raises(UnknownNameError):
        recorder.gradients("head.weight")


def test_batches_of_matrices_are_not_single_matrices():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(3, 4, 5))

    with pytest.raises(OptionError, match="are batches"):
        chosen_blocks(Experts(), ["up"])
