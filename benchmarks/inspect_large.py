"""A look at checkpoints up to the size of a model of 7 billion parameters: time and memory as the file grows.

The models are random bfloat16 (4096 and 11008 wide, a vocabulary of 32,000) of 1, 4 and 32 layers, one file each. Each
is looked at in a process of its own: the first look at all of it, and all singular values of some matrices spread over
it, from which the time of all follows. Peak memory is that above the process with its imports.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.energy import high_water
from benchmarks.harness import machine, parser, record
from orthokit.checkpoints import CheckpointWriter
from orthokit.diagnostics import inspect

__all__ = ["inspected", "main"]

_WIDTH, _WORDS, _LAYERS, _SAMPLE = 4096, 32000, (1, 4, 32), 7


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the model by name."""
    inner = width * 43 // 16
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_WORDS * width // _WIDTH, width)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{one}_proj.weight": (width, width) for one in "qkvo"}
        found |= {f"{at}.mlp.{one}_proj.weight": (inner, width) for one in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (width, inner)}
        found |= {f"{at}.{one}_layernorm.weight": (width,) for one in ("input", "post_attention")}
    return found


def written(path: Path, layers: int, width: int) -> Path:
    """A random model as one file; numbers repeat, since drawing so many would take longer than looking at them."""
    names = shapes(layers, width)
    most = max(torch.Size(shape).numel() for shape in names.values())
    drawn = (torch.randn(most + 7919 * 97, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    with CheckpointWriter(path, {name: (torch.bfloat16, shape) for name, shape in names.items()}) as writer:
        for index, (name, shape) in enumerate(names.items()):
            shift = 7919 * (index % 97)
            writer.write(name, drawn[shift : shift + torch.Size(shape).numel()].reshape(shape))
        writer.finish({})
    return path


def inspected(path: Path, options: dict[str, Any], threads: int) -> tuple[float, float, int]:
    """Seconds, peak MiB above what the process held before, and how many matrices there are."""
    torch.set_num_threads(threads)
    before, start = high_water(), time.perf_counter()
    found = inspect(path, threads=threads, cache=False, **options)
    # The system counts pages in batches, so that a look that takes none can seem to give some back.
    return time.perf_counter() - start, max(0.0, high_water() - before), len(found)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run this benchmark and record it."""
    options = parser(__doc__)
    options.add_argument("--folder", help="where the models are written (default: the temporary folder)")
    options.add_argument("--layers", type=int, nargs="*", default=list(_LAYERS), help="of each model")
    options.add_argument("--width", type=int, default=_WIDTH, help="of the models (default 4096; with --quick 256)")
    asked = options.parse_args(arguments)
    if asked.quick:
        asked.width, asked.layers = 256, [1]
    rows = []
    for layers in asked.layers:
        with tempfile.TemporaryDirectory(dir=asked.folder) as name:
            path = written(Path(name) / "model", layers, asked.width)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                first, peak, matrices = pool.apply(inspected, (path, {"detail": "norms"}, asked.threads))
            row = {
                "layers": layers,
                "gigabytes": round(sum(file.stat().st_size for file in path.iterdir()) / 1e9, 2),
                "matrices": matrices,
                "first_look_seconds": round(first, 3),
                "first_look_extra_mib": round(peak),
            }
            if layers == min(asked.layers):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    sample = {"sample": _SAMPLE}
                    full, high, taken = pool.apply(inspected, (path, sample, asked.threads))
                row |= {"full_look_matrices": taken, "full_look_seconds": round(full, 2)}
                row |= {"full_look_extra_mib": round(high)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    found = {
        "benchmark": "inspect_large",
        "machine": machine() | {"threads": asked.threads},
        "models": rows,
    }
    record(found, save=asked.save, label=asked.label)
    return found


if __name__ == "__main__":
    main()
