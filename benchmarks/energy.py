"""Hyperspherical energy of 4096 neurons in 1024 dimensions: orthokit against the usual ways to get all distances.

Every method is run in turn, several rounds in one process, so that a busy machine slows all of them alike; the
fastest round counts. Peak memory is measured in a fresh process each, above that of the input.

    python benchmarks/energy.py [--neurons N] [--dims D] [--rounds R] [--threads T] [--json PATH]
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from orthokit.diagnostics import hyperspherical_energy


def unit(W: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W, dim=1)


def from_square(D: Tensor) -> Tensor:
    """Mean over pairs of a full matrix of distances."""
    D.fill_diagonal_(math.inf)
    return D.reciprocal_().sum(dtype=torch.float64) / (len(D) * (len(D) - 1))


def gram(W: Tensor) -> Tensor:
    X = unit(W)
    return from_square((2 - 2 * (X @ X.T)).clamp_(min=1e-12).sqrt_())


def pdist(W: Tensor) -> Tensor:
    return torch.nn.functional.pdist(unit(W)).reciprocal_().mean(dtype=torch.float64)


def cdist(mode: str) -> Callable[[Tensor], Tensor]:
    def run(W: Tensor) -> Tensor:
        X = unit(W)
        return from_square(torch.cdist(X, X, compute_mode=mode))

    return run


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthokit": hyperspherical_energy,
    "full Gram matrix": gram,
    "torch.cdist, matmul": cdist("use_mm_for_euclid_dist"),
    "F.pdist": pdist,
    "torch.cdist, differences": cdist("donot_use_mm_for_euclid_dist"),
}


def neurons(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def high_water() -> float:
    """The most memory this process has held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss is inherited from the parent process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def peak_memory(name: str, n: int, d: int, threads: int) -> float:
    """MiB above the process as it is with the input in memory and the library warm."""
    torch.set_num_threads(threads)
    W = neurons(n, d)
    METHODS[name](W[: min(n, 64)])
    before = high_water()
    METHODS[name](W)
    return high_water() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=int, default=4096)
    parser.add_argument("--dims", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    W = neurons(options.neurons, options.dims)
    exact = hyperspherical_energy(W.double()).item()
    seconds: dict[str, float] = dict.fromkeys(METHODS, math.inf)
    values: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, method in METHODS.items():
            start = time.perf_counter()
            values[name] = method(W).item()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in METHODS:
        with context.Pool(1) as pool:
            memory = pool.apply(peak_memory, (name, options.neurons, options.dims, options.threads))
        rows.append(
            {
                "method": name,
                "seconds": round(seconds[name], 4),
                "ratio": round(seconds[name] / seconds["orthokit"], 2),
                "extra_peak_mib": round(memory, 1),
                "relative_error": abs(values[name] / exact - 1),
            }
        )
    print(f"{options.neurons} neurons x {options.dims} dimensions, float32, {options.threads} thread(s)")
    print(f"{'method':26s}{'seconds':>9s}{'ratio':>8s}{'extra MiB':>11s}{'rel. error':>12s}")
    for row in rows:
        print(
            f"{row['method']:26s}{row['seconds']:9.3f}{row['ratio']:8.2f}{row['extra_peak_mib']:11.1f}"
            f"{row['relative_error']:12.1e}"
        )
    if options.json:
        report = {
            "neurons": options.neurons,
            "dims": options.dims,
            "threads": options.threads,
            "rounds": options.rounds,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        part = options.json.with_suffix(".tmp")
        part.write_text(json.dumps(report, indent=1) + "\n")
        part.replace(options.json)


if __name__ == "__main__":
    main()
