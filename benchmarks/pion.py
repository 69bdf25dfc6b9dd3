"""One step of Pion: its options against torch.optim.Muon, orthokit's Muon and AdamW, and the bytes of state of each.

Layouts: the matrices of a small GPT (6 layers of width 384, 10.6 million entries; 36 matrices), many small matrices,
where calls are what costs, and four of 1024 x 1024. All optimizers step on the same gradients. No other Pion runs on
CPUs, so the baseline is torch.optim.Muon, the optimizer it would replace. The roof is the rate of products.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Case, Options, Result, run
from benchmarks.optimizers import Build, Shapes, gpt_shapes, newton_schulz_flop, roof, stepper
from orthokit.optim import Muon, Pion

__all__ = ["cases", "main", "pion_flop", "published_state", "state_bytes"]

RIVALS: dict[str, Build] = {
    "torch.optim.Muon": lambda p: torch.optim.Muon(p, lr=1e-3),
    "orthokit Muon": lambda p: Muon(p, lr=1e-3),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}
OURS: dict[str, dict[str, Any]] = {
    "Pion": {},
    "Pion, alternate": {"sides": "alternate"},
    "Pion, no second moment": {"second_moment": False},
    "Pion, cayley_neumann": {"map": "cayley_neumann"},
    "Pion, float32 products": {"dtype": torch.float32},
}


def pion_flop(shapes: Shapes, *, sides: str = "both", products: int = 2) -> float:
    """FLOP that one step needs at least: a product a side for the generators, ``products`` for the turns, one to scale.

    Args:
        shapes: ``(out, in)`` of every matrix.
        sides: ``"both"`` or ``"alternate"``, which turns one side a step: the average of two steps.
        products: Terms of the map. What scales the step is the first product of the longer side; the other side starts
            once more from the weight that has been turned.
    """
    total = 0.0
    for shape in shapes:
        c, b = sorted(shape)
        long, short = 2.0 * b * b * c, 2.0 * b * c * c
        turns = products * (long + short) / 2 if sides == "alternate" else products * (long + short) + short
        total += long + short + turns
    return total


def state_bytes(build: Build, shapes: Shapes) -> int:
    """Bytes that an optimizer keeps for matrices of these shapes."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = build(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def published_state(shapes: Shapes, *, second_moment: bool = True) -> int:
    """Bytes of the published state in float32: full squares of both sides."""
    return sum((m * m + n * n) * 4 * (2 if second_moment else 1) for m, n in shapes)


def case(title: str, shapes: Shapes, options: Options, *, side: int) -> Case:
    """All optimizers on matrices of these shapes."""
    builders = RIVALS | {name: (lambda p, given=given: Pion(p, lr=1e-3, **given)) for name, given in OURS.items()}
    top, product, flop = roof(side, options.threads)
    work = {top: flop, "torch.optim.Muon": newton_schulz_flop(shapes), "orthokit Muon": newton_schulz_flop(shapes)}
    work |= {
        "Pion": pion_flop(shapes),
        "Pion, no second moment": pion_flop(shapes),
        "Pion, alternate": pion_flop(shapes, sides="alternate"),
        "Pion, cayley_neumann": pion_flop(shapes, products=3),
        "Pion, float32 products": pion_flop(shapes),
    }
    entries = sum(m * n for m, n in shapes)
    state = {name: f"{state_bytes(build, shapes) / entries:.1f}" for name, build in builders.items()}
    published = published_state(shapes) / entries
    return Case(
        title,
        {name: stepper(build, shapes) for name, build in builders.items()} | {top: product},
        baseline="torch.optim.Muon",
        work=work,
        roof=top,
        columns={"bytes a weight": state},
        notes=(f"The published state of Pion, full squares, would take {published:.1f} bytes a weight.",),
    )


def cases(options: Options) -> Iterator[Case]:
    """The layouts."""
    side = 256 if options.quick else 1024
    layers, width = (2, 64) if options.quick else (6, 384)
    yield case(f"GPT, {layers} layers of width {width}", gpt_shapes(layers, width), options, side=side)
    yield case("64 matrices of 32 x 32", [(32, 32)] * (8 if options.quick else 64), options, side=side)
    if not options.quick:
        yield case("4 matrices of 1024 x 1024", [(1024, 1024)] * 4, options, side=side)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run from the command line."""
    return run(__name__, __doc__, cases, arguments)


if __name__ == "__main__":
    main()
