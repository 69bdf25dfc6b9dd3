"""Merging of three models of 91 million parameters: files against mergekit, OrthoMerge against the plain SVD route.

The models are Llama-shaped (12 layers, 768 and 2048 wide) and random, the experts a random hundredth away from the
base. Files are written and read in float32; each candidate reads all models and writes the result. mergekit runs as its
own command in a process of its own, as its users run it, if ``mergekit-yaml`` is on the path. Peak memory is that of a
fresh process, above what it holds after the imports.
"""

import multiprocessing
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.energy import high_water
from benchmarks.harness import Case, Options, Result, run
from orthokit.device import fast_matmul_dtype
from orthokit.merging import merge_checkpoints, orthomerge, orthomerge_parts

__all__ = ["cases", "main"]

_EXPERTS, _AWAY, _PRIOR = 3, 0.01, 1e-3
_CONFIG = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": %d,
"tie_word_embeddings": true}"""


def layer_shapes(quick: bool) -> dict[str, tuple[int, int]]:
    """The matrices of one layer."""
    narrow, wide = (96, 256) if quick else (768, 2048)
    attention = {f"self_attn.{one}_proj.weight": (narrow, narrow) for one in "qkvo"}
    up = {f"mlp.{one}_proj.weight": (wide, narrow) for one in ("gate", "up")}
    return {**attention, **up, "mlp.down_proj.weight": (narrow, wide)}


def tensors(quick: bool, layers: int, seed: int, *, around: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A random model, or a random expert around one."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (1000, 96) if quick else (8000, 768)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer_shapes(quick).items()}
    made = {name: torch.randn(shape, generator=g) / shape[1] ** 0.5 for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{one}_layernorm" for i in range(layers) for one in ("input", "post_attention")]
    for name in (*norms, "model.norm"):
        made[f"{name}.weight"] = 1 + 0.1 * torch.randn(shapes["model.embed_tokens.weight"][1], generator=g)
    return made if around is None else {name: around[name] + _AWAY * W for name, W in made.items()}


def written(folder: Path, quick: bool) -> list[Path]:
    """The base and its experts as folders of files."""
    layers = 2 if quick else 12
    base = tensors(quick, layers, 0)
    paths = [folder / name for name in ("base", *(f"expert{i}" for i in range(_EXPERTS)))]
    for seed, path in enumerate(paths):
        path.mkdir()
        save_file(base if seed == 0 else tensors(quick, layers, seed, around=base), path / "model.safetensors")
        (path / "config.json").write_text(_CONFIG % layers)
    return paths


def with_orthokit(paths: Sequence[Path], out: Path, threads: int, **options: object) -> None:
    shutil.rmtree(out, ignore_errors=True)
    merge_checkpoints(paths[0], paths[1:], out, threads=threads, **options)  # type: ignore[arg-type]


def with_torch(paths: Sequence[Path], out: Path) -> None:
    """All models in memory, the mean of each tensor, one file: what a few lines do."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    experts = [load_file(path / "model.safetensors") for path in paths[1:]]
    save_file({name: sum(one[name] for one in experts) / _EXPERTS for name in experts[0]}, out / "model.safetensors")


def with_mergekit(paths: Sequence[Path], out: Path, method: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    density = "\n    parameters: {weight: 1.0, density: 0.2}" if method == "ties" else "\n    parameters: {weight: 1.0}"
    models = "\n".join(f"  - model: {path}{density}" for path in paths[1:])
    config = out.with_suffix(".yml")
    # Its mean would count the base as one of the models.
    base = "" if method == "linear" else f"base_model: {paths[0]}\n"
    config.write_text(f"merge_method: {method}\n{base}models:\n{models}\ndtype: float32\n")
    command = ["mergekit-yaml", str(config), str(out), "--no-copy-tokenizer"]
    subprocess.run(command, check=True, capture_output=True)


def peak(call: Callable[[], object], threads: int) -> float:
    """MiB of a call above what its process held before."""
    torch.set_num_threads(threads)
    before = high_water()
    call()
    return high_water() - before


def svd_route(W0: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """OrthoMerge as it is written down: an SVD, two solves and three products per expert."""
    n = W0.shape[1]
    eye = torch.eye(n, dtype=W0.dtype)
    prior = _PRIOR * W0.square().sum() / n
    generators, rest = [], torch.zeros_like(W0)
    for W in experts:
        U, _, Vh = torch.linalg.svd(W0.mT @ W + prior * eye)
        R = U @ Vh
        generators.append(torch.linalg.solve(R + eye, R - eye))
        rest += (W - W0 @ R) / len(experts)
    mean = sum(generators) / len(experts)
    norms = sum(Q.norm() for Q in generators) / len(experts)
    Q = mean * (norms / mean.norm()).clamp(max=10.0)
    return W0 @ torch.linalg.solve(eye - Q, eye + Q) + rest


def least_products(W0: Tensor, experts: Sequence[Tensor]) -> None:
    """The products that no shorter way is known around, and the eigenvectors that all experts share; nothing else.

    Per expert in float32: its change in the basis, its product with the base, and the rotated base. In the dtype that
    is fast: two solves of two products each and one residual of two, of the size that the change has. Of a wide base
    the eigenvectors of its smaller side.
    """
    rows, columns = W0.shape
    rank, dtype = min(rows, columns), fast_matmul_dtype("cpu")
    torch.linalg.eigh(W0 @ W0.mT if rows < columns else W0.mT @ W0)
    V = torch.empty(columns, columns).fill_(0.01)
    seen, square = W0[:, :rank], V.to(dtype)
    for W in experts:
        cross = seen.mT @ (W @ V)
        fast = cross.to(dtype)
        for _ in range(6):
            fast @ square
        seen @ V[:rank]
    (seen @ V[:rank]) @ V


def orthomerge_cases(options: Options) -> Iterator[Case]:
    """Each shape of a layer; a layer has four square matrices, two up and one down."""
    names = {"square": "self_attn.q_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight"}
    shapes = layer_shapes(options.quick)
    base = tensors(options.quick, 1, 0)
    others = [tensors(options.quick, 1, seed, around=base) for seed in range(1, 1 + _EXPERTS)]
    layer = {
        name: (base[f"model.layers.0.{name}"], [one[f"model.layers.0.{name}"] for one in others]) for name in shapes
    }
    for label, name in names.items():
        W0, experts = layer[name]
        exact = svd_route(W0.double(), [W.double() for W in experts])
        size = (exact - W0).norm()
        errors = {
            "orthokit": f"{float((orthomerge(W0, experts) - exact).norm() / size):.1e}",
            "SVD route": f"{float((svd_route(W0, experts) - exact).norm() / size):.1e}",
        }
        routes = " and ".join(sorted(set(orthomerge_parts(W0, experts).routes)))
        yield Case(
            f"OrthoMerge, {label} matrix {tuple(W0.shape)}, {_EXPERTS} experts (route: {routes})",
            {
                "orthokit": partial(orthomerge, W0, experts),
                "least products": partial(least_products, W0, experts),
                "SVD route": partial(svd_route, W0, experts),
            },
            baseline="SVD route",
            columns={"error of the change": errors},
        )


def cases(options: Options) -> Iterator[Case]:
    """Files first, then OrthoMerge."""
    mergekit = shutil.which("mergekit-yaml") is not None
    notes = () if mergekit else ("mergekit is not installed.",)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, out = written(folder, options.quick), folder / "out"
        for method, more in (("linear", {}), ("ties", {"density": 0.2})):
            ours = partial(with_orthokit, paths, out, options.threads, method=method, **more)
            candidates: dict[str, Callable[[], object]] = {"orthokit": ours}
            if method == "linear":
                candidates["plain torch"] = partial(with_torch, paths, out)
            if mergekit:
                candidates["mergekit"] = partial(with_mergekit, paths, out, method)
            measured = {one: call for one, call in candidates.items() if one != "mergekit"}
            memory = {}
            for one, call in measured.items():
                with context.Pool(1) as pool:
                    memory[one] = f"{pool.apply(peak, (call, options.threads)):.0f}"
            yield Case(
                f"{method}, {_EXPERTS} experts in files",
                candidates,
                baseline="mergekit" if mergekit else "orthokit",
                columns={"extra MiB": memory},
                notes=notes,
            )
        yield Case(
            f"OrthoMerge, {_EXPERTS} experts in files, down-projections included",
            {"orthokit": partial(with_orthokit, paths, out, options.threads, method="orthomerge")},
            baseline="orthokit",
        )
    yield from orthomerge_cases(options)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    return run("merging", __doc__, cases, arguments, by_threads=True)


if __name__ == "__main__":
    main()
