"""Hyperspherical energy of 4096 neurons in 1024 dimensions: orthokit against the usual ways to get all distances.

Peak memory is measured in a fresh process each, above that of the input. The relative error is that of the float32
result against float64.
"""

import math
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Case, Options, Result, run
from orthokit.diagnostics import hyperspherical_energy

__all__ = ["cases", "main"]


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


def cases(options: Options) -> Iterator[Case]:
    """One case; ``--quick`` takes a sixteenth of the work."""
    n, d = (1024, 256) if options.quick else (4096, 1024)
    W = neurons(n, d)
    exact = hyperspherical_energy(W.double()).item()
    memory: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    for name in METHODS:
        with context.Pool(1) as pool:
            memory[name] = f"{pool.apply(peak_memory, (name, n, d, options.threads)):.1f}"
    errors = {name: f"{abs(method(W).item() / exact - 1):.1e}" for name, method in METHODS.items()}
    candidates: dict[str, Callable[[], object]] = {name: partial(method, W) for name, method in METHODS.items()}
    columns = {"extra MiB": memory, "rel. error": errors}
    yield Case(f"{n} neurons x {d} dimensions, float32", candidates, baseline="orthokit", columns=columns)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    return run("energy", __doc__, cases, arguments)


if __name__ == "__main__":
    main()
