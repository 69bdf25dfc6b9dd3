"""Every adapter under what PyTorch offers: compiled, in mixed precision, checkpointed, copied, shared, transformed."""

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import adapters_compiled
import adapters_worker
import pytest
import torch
from adapters_models import KINDS, adapted, agree, outcome
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from orthokit.adapters import (
    adapted_layers,
    adapter_parameters,
    adapter_state_dict,
    attach,
    load_adapter_state_dict,
    merge,
)
from orthokit.adapters.paths import rewind

# Seconds for the group of processes, which take some fifteen but wait for each other at every collective.
PATIENCE = 300
EACH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def x():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(7))


def compiled(*names):
    """What the checks of compiled models said, in one process without the annotation checks."""
    support = Path(adapters_compiled.__file__)
    environment = {**os.environ, "PYTHONPATH": str(support.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(support), *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


# Those whose code differs.
COMPILED = ("oft", "boft", "hra", "dora", "settings")


@pytest.fixture(scope="module")
def compiled_once():
    return compiled(*COMPILED)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_one_graph_computes_the_same_and_follows_settings(name, compiled_once):
    if compiled_once[name] != "passed":
        pytest.fail(compiled_once[name], pytrace=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile's own backend")
def test_torchs_own_backend_compiles_them():
    names = [f"inductor {kind}" for kind in ("oft", "hra", "lora")]
    assert compiled(*names) == dict.fromkeys(names, "passed")


@pytest.mark.parametrize("kind", ["oft series", "boft", "dora"])
def test_an_exported_program_computes_the_same(kind, x):
    model = adapted(KINDS[kind]).eval()
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@EACH
def test_autocast_keeps_gradients_in_float32(kind, x):
    model = adapted(KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        y, gradients = outcome(model, x)
    expected, full = outcome(model, x)
    assert y.dtype == torch.bfloat16 and {g.dtype for g in gradients.values()} == {torch.float32}
    # Outputs of size 1 after a few products of inputs with 8 bits.
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05)
    for name, g in gradients.items():
        assert float((g - full[name]).norm() / full[name].norm()) < 0.1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), y, rtol=0, atol=0.05)


DROPPING = {kind: KINDS[kind] for kind in ("oft", "oft series", "boft", "lora", "dora")}


@pytest.mark.parametrize("use_reentrant", [True, False])
@EACH
def test_checkpointed_layers_have_the_same_gradients_dropout_included(kind, use_reentrant, x):
    model = adapted(replace(KINDS[kind], dropout=0.5) if kind in DROPPING else KINDS[kind])

    def run(rows):
        torch.manual_seed(3)
        # Reentrant checkpoints need an input that takes gradients.
        return checkpoint(model, rows.clone().requires_grad_(), use_reentrant=use_reentrant)

    def plain(rows):
        torch.manual_seed(3)
        return model(rows)

    expected = outcome(model, x, plain)
    agree(outcome(model, x, run), expected, rtol=1e-5, atol=1e-6)
    if kind in DROPPING:
        assert not torch.allclose(expected[0], model.eval()(x), atol=1e-3)


@EACH
def test_copies_and_pickles_act_alike_and_share_nothing(kind, x):
    model = rewind(adapted(KINDS[kind]), 0.5)
    with torch.no_grad():
        y = model(x)  # so that whatever is kept between calls is there
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(x), y)
            for p in twin.parameters():
                p.add_(0.1)
            assert torch.equal(model(x), y) and not torch.allclose(twin(x), y, atol=1e-3)


@EACH
def test_a_model_cast_to_bfloat16_keeps_its_adapters_in_float32(kind, x):
    model = adapted(KINDS[kind])
    expected = model(x)
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    y, gradients = outcome(model, x.bfloat16())
    assert y.dtype == torch.bfloat16 and {g.dtype for g in gradients.values()} == {torch.float32}
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05)
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(merged(x.bfloat16()).float(), expected, rtol=0, atol=0.05)


@EACH
def test_float64_models_compute_in_float64(kind, x):
    model = adapted(KINDS[kind]).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    y = model(x.double())
    torch.testing.assert_close(merge(model)(x.double()), y, rtol=0, atol=1e-12)


@EACH
def test_state_dicts_come_back_and_that_of_the_adapter_holds_it_alone(kind, x):
    model, other = adapted(KINDS[kind]), adapted(KINDS[kind], seed=5)
    state = adapter_state_dict(model)
    parameters = adapter_parameters(model)
    assert all(".adapters.default." in name for name in state) and state.keys() >= parameters.keys()
    assert sum(t.numel() for t in state.values()) < 3 * sum(p.numel() for p in parameters.values())
    assert not torch.allclose(other(x), model(x), atol=1e-3)
    twin = copy.deepcopy(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    # The adapter alone, on the weights that it was trained with.
    plain = {name: t for name, t in model.state_dict().items() if name not in state}
    twin.load_state_dict(plain, strict=False)
    load_adapter_state_dict(twin, {name: t.clone() for name, t in state.items()})
    assert torch.equal(twin(x), model(x))


# torch scripts its own formulas at the first forward derivative.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@EACH
def test_transforms_of_functions_see_the_same_function(kind, x):
    model = adapted(KINDS[kind])
    parameters = {name: p.detach() for name, p in adapter_parameters(model).items()}

    def loss(values, rows):
        return functional_call(model, values, (rows,)).square().sum()

    _, expected = outcome(model, x)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(grad(loss)(parameters, x), expected, **close)
    each = vmap(grad(lambda values, row: loss(values, row[None])), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close({name: g.sum(0) for name, g in each.items()}, expected, **close)
    ensemble = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    outputs = vmap(lambda values: functional_call(model, values, (x,)))(ensemble)
    torch.testing.assert_close(outputs[0], model(x).detach(), **close)
    if kind != "dora":  # its lengths are constants for the gradient, by definition
        direction = {name: torch.ones_like(p) for name, p in parameters.items()}
        _, slope = jvp(lambda values: loss(values, x), (parameters,), (direction,))
        torch.testing.assert_close(slope, sum(g.sum() for g in expected.values()), rtol=1e-3, atol=1e-3)


@EACH
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_transformer_layers_reads_the_adapted_weight(kind, norm_first, x):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = attach(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), KINDS[kind], targets="*.linear?")
    assert len(adapted_layers(model)) == 4
    rows = x.view(2, 3, 16)
    plain = model.eval()(rows).detach()
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        fast = model(rows)
    slow = model.train()(rows)
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(slow, plain, atol=1e-2)


@EACH
def test_averaged_models_and_gradient_accumulation_work(kind, x):
    model = adapted(KINDS[kind])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))
    _, whole = outcome(model, x)
    model.zero_grad()
    for rows in x.split(2):
        model(rows).square().sum().backward()
    found = {name: p.grad for name, p in adapter_parameters(model).items()}
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two processes said to every check, started once."""
    folder = tmp_path_factory.mktemp("adapters")
    context = multiprocessing.get_context("forkserver")
    # One server has imported everything, and every process is a fork of it.
    context.set_forkserver_preload(["adapters_worker"])
    processes = [
        context.Process(target=adapters_worker.serve, args=(rank, 2, str(folder)), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=PATIENCE)
    for process in processes:
        if process.is_alive():
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("name", [check.__name__ for check in adapters_worker.CHECKS])
def test_two_processes(said, name):
    for rank, found in enumerate(said):
        if (words := found.get(name, "ended before this check was done")) != "passed":
            pytest.fail(f"process {rank}: {words}", pytrace=False)
