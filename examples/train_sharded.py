"""Train TinyGPT with Muon or Pion on several processes, and go on with another number of them.

    torchrun --standalone --nproc-per-node 2 examples/train_sharded.py --optimizer muon --steps 60
    torchrun --standalone --nproc-per-node 4 examples/train_sharded.py --optimizer muon --steps 120 --resume

``--parallel fsdp`` shards parameters, gradients and optimizer state with FSDP2; ``--parallel ddp`` keeps them whole on
every process and divides the optimizer's work. A checkpoint of one is a checkpoint of the other. Every process draws
the same batch and takes its rows, so the losses are the same, up to rounding, for any number of processes.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import orthokit as ok


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train TinyGPT with a shared orthogonal optimizer.")
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--optimizer", choices=sorted(ok.optim.OPTIMIZERS), default="muon")
    parser.add_argument("--size", choices=list(ok.lab.SIZES), default="1M")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=60, help="total, those of a resumed run included")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, over all processes")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    return parser.parse_args(arguments)


def parallel_model(model: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """The model, sharded block by block or replicated."""
    model = model.to(device)
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def own_rows(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """This process's rows of a batch that all processes have drawn."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if len(batch[0]) % size:
        raise SystemExit(f"--batch must be a multiple of the number of processes, {size}; got {len(batch[0])}.")
    return batch[0][rank::size], batch[1][rank::size]


def mean(value: Tensor) -> float:
    """The mean of a number over the processes."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def newest(folder: Path) -> Path | None:
    """The last checkpoint that was finished."""
    found = sorted(path for path in folder.glob("step*") if path.suffix != ".tmp")
    return found[-1] if found else None


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of ``step`` steps; it gets its name when all processes have written their parts."""
    final = folder / f"step{step:06d}"
    unfinished = final.with_suffix(".tmp")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": step}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    dist.barrier()


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore a checkpoint of any number of processes, and return its step. Only load files that you trust."""
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(content, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return content["step"]


def train(args: argparse.Namespace, device: torch.device) -> dict[int, float]:
    """The losses of the steps that were made, by step; the same on every process."""
    task = ok.lab.language_modelling("addresses", context=args.context, batch=args.batch, seed=args.seed)
    network = ok.lab.TinyGPT(args.size, seed=args.seed, context=args.context)
    model = parallel_model(network, args.parallel, device)
    shared: dict[str, Any] = {"process_group": "world"} if args.parallel == "ddp" else {}
    optimizer = ok.optim.for_model(model, args.optimizer, lr=args.lr, **shared)
    path = newest(args.checkpoints) if args.resume else None
    start = 0 if path is None else load(path, model, optimizer)
    if dist.get_rank() == 0:
        print(f"{args.optimizer}, {args.parallel}, {dist.get_world_size()} processes on {device.type}, step {start}")
    losses = {}
    for step in range(start, args.steps):
        loss = task.loss(model, own_rows(task.batch(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = mean(loss)
        if dist.get_rank() == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step:5d}   loss {losses[step]:.4f} nats a byte", flush=True)
        if (step + 1) % args.save_every == 0 or step == args.steps - 1:
            save(args.checkpoints, step + 1, model, optimizer)
    exchange = optimizer.matrix.exchange
    if dist.get_rank() == 0 and exchange is not None and losses:
        busiest = max(exchange.loads) * len(exchange.loads) / sum(exchange.loads)
        sent = exchange.router.bytes_sent / len(losses) / 2**20
        print(f"busiest process: {busiest:.2f} of the mean work; sent by process 0: {sent:.2f} MiB a step")
    return losses


def main() -> None:
    """Join the processes that torchrun has started, and train."""
    args = options()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
