"""One step of Muon: orthokit against every installed rival, AdamW and the rate at which the machine multiplies.

Layouts: the matrices of a small GPT (6 layers of width 384, 10.6 million entries) with q, k, v and o apart (36
matrices) or q, k and v fused (24), many small matrices and a single one, where calls are what costs, and four of 1024 x
1024. All optimizers of the kind run five Newton-Schulz steps on the same gradients. The roof is a stack of products,
two of 1024 x 1024 for each thread, in the fastest dtype here: a single one would keep one core busy only. Below each
table stands what a step could cost at best: products at the rates that their own shapes reach, and passes over memory.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Case, Options, Result, run
from orthokit.device import fast_matmul_dtype
from orthokit.optim import Muon

__all__ = ["absences", "cases", "main", "rivals"]

Shapes = list[tuple[int, int]]
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

COMMON: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
OURS: dict[str, tuple[dict[str, Any], int | None]] = {
    # Options, and the quintic steps that the work of a call is counted for; None: it depends on the matrices.
    "orthokit Muon": ({}, 5),
    "orthokit Muon, Polar Express x6": ({"method": "polar_express", "ns_steps": 6}, 6),
    "orthokit Muon, polish until orthogonal": ({"method": "polar_express", "polish": "auto"}, None),
    "orthokit NorMuon": ({"normalize": "neuron"}, 5),
}


def pytorch_optimizer() -> dict[str, Build]:
    """Its shape-batched path."""
    kind = importlib.import_module("pytorch_optimizer").Muon
    return {
        "pytorch_optimizer Muon, stacked": lambda p: kind([{"params": p, "use_muon": True}], foreach=True, **COMMON)
    }


def optimuon() -> dict[str, Build]:
    """The plain iteration in stacks, and what one gets without an option."""
    package = importlib.import_module("optimuon")
    plain = {"gram_ns": False, "normuon": False, "cautious_wd": False}
    table = {
        "ns_coefficients": package.NS_COEFFICIENTS_DEFAULT,
        "ns_norm_scale": package.NS_NORM_SCALE_DEFAULT,
    }
    return {
        "optimuon Muon, plain, stacked": lambda p: package.Muon(p, **plain, **table, **COMMON),
        "optimuon Muon, its defaults": lambda p: package.Muon(p, **COMMON),
    }


def timm() -> dict[str, Build]:
    """Its Muon alone: the package around it needs torchvision, which an optimizer does not."""
    for name in ("timm", "timm.optim"):
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(name)
            bare = types.ModuleType(name)
            bare.__path__ = list(spec.submodule_search_locations or [])
            sys.modules[name] = bare
    kind = importlib.import_module("timm.optim.muon").Muon
    return {"timm Muon": lambda p: kind(p, nesterov=True, ns_coefficients="original", **COMMON)}


def heavyball() -> dict[str, Build]:
    """Without compilation, which would take longer than the whole benchmark."""
    package = importlib.import_module("heavyball")
    package.utils.compile_mode = None
    return {"heavyball Muon, not compiled": lambda p: package.Muon(p, betas=(0.95, 0.99), **COMMON)}


RIVALS: dict[str, Callable[[], dict[str, Build]]] = {
    "pytorch_optimizer": pytorch_optimizer,
    "optimuon": optimuon,
    "timm": timm,
    "heavyball": heavyball,
}


def rivals() -> tuple[dict[str, Build], dict[str, str]]:
    """Builders of all rivals that can be had here, and for each package its version or why it is absent."""
    builders: dict[str, Build] = {
        "torch.optim.Muon": lambda p: torch.optim.Muon(p, **COMMON),
        "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True, **COMMON),
    }
    found: dict[str, str] = {"torch": torch.__version__}
    for name, load in RIVALS.items():
        try:
            builders |= load()
            found[name] = importlib.metadata.version(name)
        except (ImportError, RuntimeError) as error:
            found[name] = f"absent ({type(error).__name__}: {error})"
    return builders, found


def absences(found: dict[str, str]) -> str:
    """The note under a table: versions of the rivals, and which could not be asked."""
    return "Rivals: " + ", ".join(f"{name} {version}" for name, version in found.items()) + "."


def gpt_shapes(layers: int, width: int, *, fused: bool = False) -> Shapes:
    """Attention and MLP matrices of a GPT whose MLP is four times as wide."""
    attention = [(3 * width, width), (width, width)] if fused else [(width, width)] * 4
    return [*attention, (4 * width, width), (width, 4 * width)] * layers


def newton_schulz_flop(shapes: Shapes, steps: int = 5) -> float:
    """FLOP of the products of one step: per iteration ``4 m^2 n + 2 m^3`` with ``m`` the shorter side."""
    return float(sum(steps * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes))


def fastest(call: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the best of a few calls: other load only ever slows one down."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def floor(shapes: Shapes, steps: int = 5) -> str:
    """What a step could cost at best here: its products at the rate of each shape, its passes at that of memory.

    Seven float32 passes are counted: the gradients for the check, buffers and gradients in, buffers out, weights in and
    out, and half a pass each for the stack and the directions in half precision.
    """
    dtype, products, alone = fast_matmul_dtype("cpu"), 0.0, 0.0
    for (rows, columns), count in Counter(shapes).items():
        m = min(rows, columns)
        batch = max(1, min(count, (1 << 22) // (rows * columns)))
        X, A = torch.randn(batch, rows, columns).to(dtype), torch.randn(batch, m, m).to(dtype)
        tall, out, turned = rows > columns, torch.empty_like(A), torch.empty_like(X)
        sides = (X.mT, X) if tall else (X, X.mT)
        gram = count / batch * fastest(partial(torch.bmm, *sides, out=out))
        square = count / batch * fastest(partial(torch.bmm, A, A, out=out))
        moved = count / batch * fastest(partial(torch.bmm, *((X, A) if tall else (A, X)), out=turned))
        alone += steps * (gram + square + moved)
        # For wide matrices two steps share a Gram matrix, for three more small products.
        shared = steps // 2 * (3 * square - gram - moved)
        products += steps * (gram + square + moved) + min(0.0, shared)
    entries = sum(rows * columns for rows, columns in shapes)
    source = torch.zeros(1 << 24)
    bandwidth = 2 * source.nbytes / fastest(partial(torch.empty_like(source).copy_, source))
    passes = 7 * 4 * entries / bandwidth
    return (
        f"At best: products {products * 1e3:.3g} ms ({alone * 1e3:.3g} ms one step at a time), passes "
        f"{passes * 1e3:.3g} ms at {bandwidth / 1e9:.3g} GB/s, together {(products + passes) * 1e3:.3g} ms."
    )


def stepper(build: Build, shapes: Shapes) -> Callable[[], object]:
    """One step of an optimizer over its own copy of the matrices."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    grads = [torch.randn(p.shape, generator=g) for p in params]
    optimizer = build(params)

    def step() -> None:
        # Some rivals drop or overwrite the gradients they were given; without one, a step would do nothing.
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()

    return step


def roof(side: int, threads: int) -> tuple[str, Callable[[], object], float]:
    """Name, call and FLOP of the product that is held to be the most the machine gives."""
    dtype = fast_matmul_dtype("cpu")
    a, b = torch.randn(2, 2 * threads, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty_like(a)
    name = f"{str(dtype).removeprefix('torch.')} product, {2 * threads} of {side}"
    return name, partial(torch.bmm, a, b, out=out), 2.0 * len(a) * side**3


def step_case(title: str, shapes: Shapes, options: Options, builders: dict[str, Build], note: str) -> Case:
    """All rivals on one set of matrices."""
    name, product, product_flop = roof(256 if options.quick else 1024, options.threads)
    candidates = {label: stepper(partial(Muon, **given, **COMMON), shapes) for label, (given, _) in OURS.items()}
    candidates |= {label: stepper(build, shapes) for label, build in builders.items()}
    work = {label: newton_schulz_flop(shapes, steps) for label, (_, steps) in OURS.items() if steps}
    # optimuon's defaults take another form of the iteration, with fewer products.
    plain = [label for label in builders if "Muon" in label and "defaults" not in label]
    work |= dict.fromkeys(plain, newton_schulz_flop(shapes)) | {name: product_flop}
    entries = sum(rows * columns for rows, columns in shapes)
    flop = f"{work['torch.optim.Muon'] / 1e9:.3g} GFLOP in five steps"
    label = f"{title}: {len(shapes)} matri{'x' if len(shapes) == 1 else 'ces'}, {entries / 1e6:.3g} M entries, {flop}"
    return Case(
        label, candidates | {name: product}, "torch.optim.Muon", work=work, roof=name, notes=(floor(shapes), note)
    )


def cases(options: Options) -> Iterator[Case]:
    """The layouts; ``--quick`` takes one narrow layer instead of six, and a few small matrices."""
    layers, width = (1, 64) if options.quick else (6, 384)
    layouts = {
        "GPT, q k v o apart": gpt_shapes(layers, width),
        "GPT, q k v fused": gpt_shapes(layers, width, fused=True),
        "many of 32 x 32": [(32, 32)] * (8 if options.quick else 64),
        "one of 16 x 16": [(16, 16)],
        "one of 64 x 64": [(64, 64)],
    }
    if not options.quick:
        layouts |= {
            "many of 64 x 64": [(64, 64)] * 64,
            "many of 128 x 128": [(128, 128)] * 32,
            "one of 128 x 128": [(128, 128)],
            "one of 256 x 256": [(256, 256)],
            "few of 1024 x 1024": [(1024, 1024)] * 4,
        }
    builders, found = rivals()
    for title, shapes in layouts.items():
        yield step_case(title, shapes, options, builders, absences(found))


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    return run("optimizers", __doc__, cases, arguments, by_threads=True)


if __name__ == "__main__":
    main()
