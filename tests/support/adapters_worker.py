"""What the processes of the tests of adapters do; started by ``tests/adapters/test_frameworks.py``.

Every check runs on all processes at once and compares with one process, which each of them simulates for itself.
"""

# ruff: noqa: E402 - the annotation checks must be installed before orthokit is imported

import copy
import faulthandler
import json
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("orthokit", "typecheck.checked")

import torch
import torch.distributed as dist
from adapters_models import KINDS, adapted
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from orthokit.adapters import adapter_parameters, adapter_state_dict
from orthokit.adapters.base import PartConfig
from orthokit.adapters.paths import rewind

CHECKS: list[Callable[[], None]] = []
STEPS = 2


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register a check."""
    CHECKS.append(function)
    return function


def serve(rank: int, size: int, folder: str) -> None:
    """One process: run the checks and write what each of them said."""
    faulthandler.enable()  # a process that crashes says where
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    found = {}
    for one in CHECKS:
        try:
            one()
            found[one.__name__] = "passed"
        except BaseException:
            found[one.__name__] = traceback.format_exc()
        # After every check: if a process dies, what was found before it stays known.
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def trained(model: nn.Module, parameters: list, ranks: range, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Steps of gradient descent on the mean of the loss over the batches of some processes."""
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.cat([batch(step, rank, dtype) for rank in ranks])
        (model(x) - x).square().mean().backward()
        optimizer.step()
    return model


def together(config: PartConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same by one process with all batches."""
    model = adapted(config, dtype=dtype)
    return trained(model, list(adapter_parameters(model).values()), range(dist.get_world_size()), dtype)


def sharded(config: PartConfig, *, dtype: torch.dtype = torch.float32, policy: MixedPrecisionPolicy | None = None):
    model = adapted(config, dtype=dtype)
    options = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),)), "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def mine() -> range:
    return range(dist.get_rank(), dist.get_rank() + 1)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def agree(found: Mapping[str, Any], expected: Mapping[str, Tensor], *, atol: float = 1e-5) -> None:
    if found.keys() != expected.keys():
        raise AssertionError(f"{sorted(found)} against {sorted(expected)}")
    for name, tensor in expected.items():
        torch.testing.assert_close(whole(found[name]), tensor.detach(), rtol=0, atol=atol, msg=f"{name} differs")


def moved(model: nn.Module, config: PartConfig) -> None:
    """Training did something, or agreeing would say nothing."""
    start = adapter_parameters(adapted(config))
    for name, p in adapter_parameters(model).items():
        if float((whole(p) - start[name].detach()).abs().max()) < 1e-5:
            raise AssertionError(f"{name} did not move")


@check
def data_parallel_trains_as_one_process_would() -> None:
    for config in KINDS.values():
        model = adapted(config)
        parameters = list(adapter_parameters(model).values())
        trained(DistributedDataParallel(model), parameters, mine())
        moved(model, config)
        agree(adapter_state_dict(model), adapter_state_dict(together(config)))


@check
def fully_sharded_trains_as_one_process_would() -> None:
    for config in KINDS.values():
        model = sharded(config)
        parameters = list(adapter_parameters(model).values())
        if not all(isinstance(p, DTensor) for p in model.parameters()):
            raise AssertionError("parameters are not sharded")
        trained(model, parameters, mine())
        moved(model, config)
        agree(adapter_state_dict(model), adapter_state_dict(together(config)))


@check
def sharded_adapters_in_float32_stand_on_a_base_in_bfloat16() -> None:
    for config in (KINDS["oft"], KINDS["dora"]):
        model = sharded(config, dtype=torch.bfloat16)
        parameters = adapter_parameters(model)
        if {p.dtype for p in parameters.values()} != {torch.float32}:
            raise AssertionError("adapters are not in float32")
        trained(model, list(parameters.values()), mine(), torch.bfloat16)
        # Activations in bfloat16: batches of another size round otherwise.
        expected = adapter_state_dict(together(config, torch.bfloat16))
        agree(adapter_state_dict(model), expected, atol=0.002)


@check
def mixed_precision_of_the_sharding_makes_rotations_in_float32() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, config in KINDS.items():
        model, plain = sharded(config, policy=policy), adapted(config)
        x = batch(0, 0)
        y = model(x)
        if y.dtype != torch.bfloat16:
            raise AssertionError(f"{name}: outputs in {y.dtype}")
        torch.testing.assert_close(y.float(), plain(x), rtol=0, atol=0.06)
        y.float().square().mean().backward()
        if not all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(model).values()):
            raise AssertionError(f"{name}: gradients are not in float32")


@check
def whole_states_of_a_sharded_model_are_those_of_a_plain_one() -> None:
    for config in (KINDS["boft"], KINDS["lora from the spectrum"]):
        model, plain = sharded(config), adapted(config)
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        agree(full, plain.state_dict(), atol=0)
        trainable = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        )
        if any("adapters." not in name for name in trainable):
            raise AssertionError(f"{sorted(trainable)} holds more than the adapters")


@check
def rewinding_and_copies_act_under_sharding() -> None:
    for config in (KINDS["oft"], KINDS["hra"], KINDS["dora"]):
        model, plain = sharded(config), adapted(config)
        x = batch(1, 0)
        for alpha in (0.0, 0.5, 1.0):
            torch.testing.assert_close(rewind(model, alpha)(x), rewind(plain, alpha)(x), rtol=0, atol=1e-5)
        twin = copy.deepcopy(plain)
        ddp = DistributedDataParallel(twin)
        torch.testing.assert_close(ddp(x), plain(x), rtol=0, atol=0)
