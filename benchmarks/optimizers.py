"""One step of Muon: orthokit against torch.optim.Muon, AdamW and the rate at which the machine multiplies.

Two sets of matrices: those of a small GPT (6 layers of width 384, q, k, v and o apart, 10.6 million entries), where
the products are large, and 64 matrices of 32 x 32, where the calls are what costs. Gradients are fixed; the work of a
step does not depend on them. The roof is a plain bfloat16 product of 1024 x 1024 matrices, measured in the same rounds.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.harness import Case, Options, Result, run
from orthokit.optim import Muon

__all__ = ["cases", "main"]


def gpt_shapes(layers: int, width: int) -> list[tuple[int, int]]:
    """Attention and MLP matrices of a GPT whose MLP is four times as wide."""
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return layer * layers


def newton_schulz_flop(shapes: list[tuple[int, int]], steps: int = 5) -> float:
    """FLOP of the products of one step: per iteration ``4 m^2 n + 2 m^3`` with ``m`` the shorter side."""
    return float(sum(steps * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes))


def stepper(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], shapes: list[tuple[int, int]]):
    """The ``step`` of an optimizer over its own copy of the matrices."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    return build(params).step


def step_case(title: str, shapes: list[tuple[int, int]], roof: int) -> Case:
    """All rivals on one set of matrices."""
    a = torch.randn(roof, roof, generator=torch.Generator().manual_seed(0)).bfloat16()
    flop = newton_schulz_flop(shapes)
    roofs = f"bfloat16 product {roof}"
    candidates = {
        "orthokit Muon": stepper(Muon, shapes),
        "torch.optim.Muon": stepper(torch.optim.Muon, shapes),
        "AdamW fused": stepper(lambda p: torch.optim.AdamW(p, fused=True), shapes),
        roofs: lambda: a @ a,
    }
    work = {"orthokit Muon": flop, "torch.optim.Muon": flop, roofs: 2.0 * roof**3}
    entries = sum(rows * columns for rows, columns in shapes)
    label = f"{title}: {len(shapes)} matrices, {entries / 1e6:.3g} M entries, {flop / 1e9:.3g} GFLOP a step"
    return Case(label, candidates, baseline="torch.optim.Muon", work=work, roof=roofs)


def cases(options: Options) -> Iterator[Case]:
    """The two sets; ``--quick`` takes one narrow layer instead of six."""
    roof = 256 if options.quick else 1024
    yield step_case("GPT", gpt_shapes(1, 64) if options.quick else gpt_shapes(6, 384), roof)
    yield step_case("small", [(32, 32)] * (8 if options.quick else 64), roof)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    return run("optimizers", __doc__, cases, arguments)


if __name__ == "__main__":
    main()
