"""Merging of a checkpoint of the shapes of a model of 7 billion parameters, sharded, in bounded memory.

The models are random bfloat16 (32 layers, 4096 and 11008 wide, a vocabulary of 32,000), written beside each other as
far as the disk allows: with too little room there are fewer layers, which the result says. One process merges them;
its peak memory and its time are told beside the size of one model.
"""

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.energy import high_water
from benchmarks.harness import machine, parser, record
from orthokit.checkpoints import CheckpointWriter
from orthokit.merging import merge_checkpoints

__all__ = ["main"]

_WIDTH, _INNER, _WORDS, _LAYERS, _EXPERTS = 4096, 11008, 32000, 32, 2
_SHARD = 4 * 10**9


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the model by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_WORDS, _WIDTH)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{one}_proj.weight": (_WIDTH, _WIDTH) for one in "qkvo"}
        found |= {f"{at}.mlp.{one}_proj.weight": (_INNER, _WIDTH) for one in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (_WIDTH, _INNER)}
        found |= {f"{at}.{one}_layernorm.weight": (_WIDTH,) for one in ("input", "post_attention")}
    return found | {"model.norm.weight": (_WIDTH,), "lm_head.weight": (_WORDS, _WIDTH)}


def size(layers: int) -> int:
    """Bytes of one model."""
    return 2 * sum(torch.Size(shape).numel() for shape in shapes(layers).values())


def written(path: Path, layers: int, seed: int) -> Path:
    """A random model as a folder of shards; numbers repeat, since drawing so many would take longer than merging."""
    g = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(_WORDS * _WIDTH, generator=g) * 0.02).to(torch.bfloat16)
    names = shapes(layers)
    with CheckpointWriter(path, {n: (torch.bfloat16, s) for n, s in names.items()}, shard_bytes=_SHARD) as writer:
        for index, (name, shape) in enumerate(names.items()):
            count = torch.Size(shape).numel()
            shift = (7919 * index) % (drawn.numel() - count + 1)
            writer.write(name, drawn[shift : shift + count].reshape(shape))
        writer.finish({})
    return path


def merged(folder: Path, method: str, threads: int) -> tuple[float, float]:
    """Peak MiB above what the process held before, and seconds."""
    torch.set_num_threads(threads)
    before, start = high_water(), time.perf_counter()
    experts = [folder / f"expert{i}" for i in range(_EXPERTS)]
    merge_checkpoints(folder / "base", experts, folder / "out", method=method, threads=threads)
    return high_water() - before, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Run this benchmark and record it."""
    options = parser(__doc__)
    options.add_argument("--folder", help="where the models are written (default: the temporary folder)")
    options.add_argument("--layers", type=int, default=_LAYERS, help="at most so many (default 32; with --quick 1)")
    options.add_argument("--method", default="task_arithmetic")
    asked = options.parse_args(arguments)
    asked.layers = 1 if asked.quick else asked.layers
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder, layers = Path(name), asked.layers
        room = shutil.disk_usage(folder).free - 2 * 10**9
        while layers > 1 and (_EXPERTS + 2) * size(layers) > room:
            layers -= 1
        for seed, one in enumerate(("base", *(f"expert{i}" for i in range(_EXPERTS)))):
            written(folder / one, layers, seed)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds = pool.apply(merged, (folder, asked.method, asked.threads))
    found = {
        "benchmark": "merging_large",
        "machine": machine() | {"threads": asked.threads},
        "method": asked.method,
        "experts": _EXPERTS,
        "layers": layers,
        "layers_of_the_model": _LAYERS,
        "gigabytes_of_one_model": round(size(layers) / 1e9, 2),
        "seconds": round(seconds, 1),
        "extra_mib": round(peak),
    }
    record(found, save=asked.save, label=asked.label)
    return found


if __name__ == "__main__":
    main()
