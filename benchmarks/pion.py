"""One step of Pion: its options against torch.optim.Muon, orthokit's Muon and AdamW, and the bytes of state of each.

Layouts: the matrices of a small GPT (6 layers of width 384, 10.6 million entries; 36 matrices), many small matrices,
where calls are what costs, and four of 1024 x 1024. All optimizers step on the same gradients. No other Pion runs on
CPUs, so the baseline is torch.optim.Muon, the optimizer it would replace. The roof is the rate of products.

Two more candidates do what no Pion can leave out: its products alone, and one pass of fused AdamW over its moments.
Their sum is the least a step could take with these operations, and is printed below the tables. What lies above it is
folding and unfolding generators, rounding them and the weights to the dtype of the products, and the calls themselves:
for the GPT the share of each class of operation is printed as well, as torch's profiler finds it within whole steps,
where the matrices go one by one: without a profiler a step moves them side by side, one core each.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Case, Options, Result, run
from benchmarks.optimizers import Build, Shapes, gpt_shapes, newton_schulz_flop, roof, stepper
from orthokit.device import fast_matmul_dtype
from orthokit.linalg.skew import packed_size
from orthokit.optim import Muon, Pion

__all__ = ["cases", "floor_lines", "main", "moment_numbers", "pion_flop", "published_state", "state_bytes"]

PRODUCTS, MOMENTS = "least: Pion's products", "least: Pion's moments"
# float32: the generator and two moments are read and written once, after a generator in the products' dtype was read.
BYTES_A_NUMBER = 6 * 4 + 4 + 2

# Classes of operations by the beginning of their names; a name belongs to the first that fits.
CLASSES = {
    "products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "moments (fused AdamW)": ("aten::_fused_adamw",),
    "copies: casts, transposes, folding": ("aten::copy", "aten::cat", "aten::stack", "aten::_foreach_copy"),
    "norms": ("aten::linalg_vector_norm", "aten::_foreach_norm"),
    "sums and factors": ("aten::add", "aten::mul", "aten::neg", "aten::bitwise", "aten::sub", "aten::addcmul"),
}

REST = "other operations"

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


def products_alone(shapes: Shapes) -> Callable[[], object]:
    """The products of :func:`pion_flop` and nothing else, in the fastest dtype here."""
    dtype = fast_matmul_dtype("cpu")
    made: dict[tuple[int, int], torch.Tensor] = {}
    calls = []
    for m, n in shapes:
        generators, turns = [((n, m), (m, n)), ((m, n), (n, m))], [((m, n), (n, n)), ((m, m), (m, n))] * 2
        again = turns[1] if n >= m else turns[0]
        for pair in (*generators, *turns, again):
            for shape in pair:
                if shape not in made:
                    made[shape] = torch.randn(shape).to(dtype)
            left, right = (made[shape] for shape in pair)
            calls.append((left, right, torch.empty(len(left), right.shape[1], dtype=dtype)))
    return lambda: [torch.mm(left, right, out=out) for left, right, out in calls]


def moment_numbers(shapes: Shapes) -> int:
    """Entries of all generators, folded."""
    return sum(packed_size(m) + packed_size(n) for m, n in shapes)


def moments_alone(shapes: Shapes) -> Callable[[], object]:
    """One read of the generators and one pass of fused AdamW over them and their moments, matrix by matrix."""
    sides = [packed_size(side) for shape in shapes for side in shape]
    ps = [nn.Parameter(torch.zeros(size)) for size in sides]
    generators = [torch.randn(size).to(fast_matmul_dtype("cpu")) for size in sides]
    optimizers = []
    for p in ps:
        p.grad = p.data
        optimizers.append(torch.optim.AdamW([p], lr=1.0, weight_decay=1.0, fused=True))

    def step() -> None:
        for p, generator, optimizer in zip(ps, generators, optimizers, strict=True):
            p.data.copy_(generator)
            optimizer.step()

    return step


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
    torch.manual_seed(0)
    builders = RIVALS | {name: (lambda p, given=given: Pion(p, lr=1e-3, **given)) for name, given in OURS.items()}
    top, product, flop = roof(side, options.threads)
    work = {top: flop, "torch.optim.Muon": newton_schulz_flop(shapes), "orthokit Muon": newton_schulz_flop(shapes)}
    work |= {
        "Pion": pion_flop(shapes),
        "Pion, no second moment": pion_flop(shapes),
        "Pion, alternate": pion_flop(shapes, sides="alternate"),
        "Pion, cayley_neumann": pion_flop(shapes, products=3),
        "Pion, float32 products": pion_flop(shapes),
        PRODUCTS: pion_flop(shapes),
    }
    entries = sum(m * n for m, n in shapes)
    state = {name: f"{state_bytes(build, shapes) / entries:.1f}" for name, build in builders.items()}
    published = published_state(shapes) / entries
    return Case(
        title,
        {name: stepper(build, shapes) for name, build in builders.items()}
        | {PRODUCTS: products_alone(shapes), MOMENTS: moments_alone(shapes), top: product},
        baseline="torch.optim.Muon",
        work=work,
        roof=top,
        columns={"bytes a weight": state},
        notes=(f"The published state of Pion, full squares, would take {published:.1f} bytes a weight.",),
    )


def layouts(*, quick: bool) -> dict[str, tuple[Shapes, int]]:
    """Title to the shapes of all matrices and the side of the products that are the roof."""
    if quick:
        return {"GPT, 2 layers of width 64": (gpt_shapes(2, 64), 256), "8 matrices of 32 x 32": ([(32, 32)] * 8, 256)}
    return {
        "GPT, 6 layers of width 384": (gpt_shapes(6, 384), 1024),
        "64 matrices of 32 x 32": ([(32, 32)] * 64, 1024),
        "4 matrices of 1024 x 1024": ([(1024, 1024)] * 4, 1024),
    }


def cases(options: Options) -> Iterator[Case]:
    """The layouts."""
    for title, (shapes, side) in layouts(quick=options.quick).items():
        yield case(title, shapes, options, side=side)


def floor_lines(result: Result, shapes: Shapes) -> list[str]:
    """What the step of a layout needs at least, counted and measured in the run, in units of the baseline."""
    base, products, moments = (result.median(name) for name in (result.case.baseline, PRODUCTS, MOMENTS))
    flop, size = pion_flop(shapes), BYTES_A_NUMBER * moment_numbers(shapes)
    lines = [
        f"{result.case.title}: {flop / 1e9:.4g} GFLOP of products at {flop / products / 1e9:.4g} GFLOP/s and "
        f"{size / 1e6:.4g} MB of generators and moments at {size / moments / 1e9:.3g} GB/s"
    ]
    for name, share in (("Pion", 1.0), ("Pion, alternate", pion_flop(shapes, sides="alternate") / flop)):
        least = (share * products + moments) / base
        ratio = result.median(name) / base
        lines.append(f"  {name}: at least {least:.2f} of {result.case.baseline}; measured {ratio:.2f}")
    return lines


def class_shares(step: Callable[[], object], steps: int = 4) -> dict[str, float]:
    """Share of a step's time inside operations, by class; the last entry is all other operations.

    Shares, since the profiler slows every call: its seconds add up to more than a step takes without it.
    """
    step(), step()  # two: one turns the in-sides, one the out-sides
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    times: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        times[next((name for name, starts in CLASSES.items() if event.key.startswith(starts)), REST)] += (
            event.self_cpu_time_total
        )
    whole = sum(times.values())
    return {name: times[name] / whole for name in (*CLASSES, REST)}


def class_lines(shapes: Shapes) -> list[str]:
    """Where a step of Pion spends its time, turning both sides and one."""
    lines = []
    for name in ("Pion", "Pion, alternate"):
        found = class_shares(stepper(partial(Pion, lr=1e-3, **OURS[name]), shapes))
        lines.append(f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in found.items()))
    return lines


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run from the command line."""
    results = run(__name__, __doc__, cases, arguments, by_threads=True)
    print("\nThe least a step could take: its products alone, then one pass over its moments")
    known = layouts(quick=True) | layouts(quick=False)
    for result in results:
        print("\n".join(floor_lines(result, known[result.case.title][0])))
    print(f"\nWhere a step goes: {results[0].case.title}, profiled after the tables")
    print("\n".join(class_lines(known[results[0].case.title][0])))
    return results


if __name__ == "__main__":
    main()
