"""A POET layer: forward and backward time, and what it holds in memory, beside a plain layer and the dense formulation.

Every case is one linear layer without bias at one width and number of rows, float32. Candidates: the plain layer with
its weight trained (the baseline), POET with the effective weight formed in every pass (what POET-X replaced), POET-X in
its memory modes, and the weight-centric mode, which forms the weight in each pass and keeps only the input; with the
published three Neumann terms and with the exact Cayley transform. The dense formulation works block by block here, as
all do; the published one multiplied by dense orthogonal matrices and cost far more. The update is left out of the
times: it touches (b - 1) / width of what the plain layer's does. Bytes are measured, see
``orthokit.studies.layer_bytes``; the columns are in MiB.

Afterwards the memory of whole models in bfloat16, counted, next to the published peaks on one H100.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import Case, Options, run
from orthokit.studies.poet_memory import (
    LLAMA,
    PUBLISHED_TRAINABLE,
    layer_bytes,
    make_layer,
    memory_on_paper,
    trainable_by_block,
)

# name in the table -> (kind of layer, map)
CANDIDATES = {
    "nn.Linear": ("plain", "cayley_neumann"),
    "POET dense": ("dense", "cayley_neumann"),
    "POET-X fast": ("fast", "cayley_neumann"),
    "POET-X fast, Cayley": ("fast", "cayley"),
    "POET-X low": ("low", "cayley_neumann"),
    "POET weight-centric": ("weight", "cayley_neumann"),
    "POET weight-centric, Cayley": ("weight", "cayley"),
    "POET-X low, uint8": ("low, uint8", "cayley_neumann"),
}
# (width, rows, block): growing with the width, then with the rows.
SHAPES = [(256, 1024, 32), (512, 1024, 64), (1024, 1024, 128), (1024, 256, 128), (1024, 4096, 128)]
QUICK = [(64, 128, 16), (128, 128, 16)]
MIB = 2**20


def step(kind: str, map: str, width: int, rows: int, block: int) -> Callable[[], object]:
    """One forward and backward pass of a layer, the input's gradient included, as inside a network."""
    layer = make_layer(kind, width, width, block_size=block, map=map)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=g, requires_grad=True)
    dy = torch.randn(rows, width, generator=g)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def cases(options: Options) -> Iterator[Case]:
    """One case per shape."""
    for width, rows, block in QUICK if options.quick else SHAPES:
        calls = {name: step(kind, map, width, rows, block) for name, (kind, map) in CANDIDATES.items()}
        bytes_of = {
            name: layer_bytes(kind, width, width, rows=rows, block_size=block)
            for name, (kind, map) in CANDIDATES.items()
        }
        parts = ("weights", "gradients", "moments", "kept")
        columns = {part: {name: f"{found[part] / MIB:.3g}" for name, found in bytes_of.items()} for part in parts}
        title = f"linear {width} x {width}, {rows} rows, block {block}"
        yield Case(title, calls, baseline="nn.Linear", columns=columns)


def paper() -> str:
    """Counted memory of large models as text, next to what is published."""
    lines = ["Whole models in bfloat16, batch 1, 2048 tokens, block 256: counted, next to the published peak (GB)"]
    for model in LLAMA:
        lines += ["", model, memory_on_paper(model).round(1).to_string(na_rep="-")]
        for block, published in PUBLISHED_TRAINABLE.get(model, {}).items():
            counted = trainable_by_block(model, block) / 1e6
            lines.append(f"trained by POET, block {block}: {counted:.2f} M, published {published} M")
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    """Command line of this benchmark."""
    results = run(__name__, __doc__, cases, arguments)
    print(f"\n{paper()}")
    return results


if __name__ == "__main__":
    main()
