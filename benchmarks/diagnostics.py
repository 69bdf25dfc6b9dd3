"""Weight profiles and activation geometry of a 10.6 M and a 135 M model: orthokit against the formulas as they stand.

Profiles: retention, drift and adaptation of every matrix. "plain formula" forms the product U^T W V and takes its
diagonal, subtracts singular values from it, and multiplies again for the adaptation. "frozen SVD" is what a second run
against the same base model costs. "SVD of W0 alone" is the part that no formula can avoid once.

Activations: all measures of a layer on 4096 tokens, residual streams for the small model. "plain formula" forms the
rotation R, Gram matrices between tokens and projectors, each with its own products, in float64 and in float32. Gram
matrices see 1024 of the tokens, as published, or all of them.

``extra MiB``: peak memory of one call in a fresh process above the inputs. ``drift error``: relative error of the
drift after a change of 1e-5 of the weights, against the same float32 frame in float64. ``rotation leaves``: the larger
of Procrustes residual and Gram distortion of float64 activations that were only rotated; 0 is right.

The matrices of the 135 M model are random ones of its shapes: 30 equal layers, of which one is timed.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.energy import high_water
from benchmarks.harness import Case, Options, Result, run
from orthokit.diagnostics.activations import activation_geometry, collect_activations
from orthokit.diagnostics.profiles import thin_svd, weight_profiles
from orthokit.lab.models import TinyGPT
from orthokit.linalg import random_orthogonal

__all__ = ["cases", "main"]

SVD = tuple[Tensor, Tensor, Tensor]
Matrices = list[tuple[Tensor, Tensor, SVD]]  # W0, W, thin SVD of W0
Pairs = list[tuple[Tensor, Tensor]]  # activations of both models
# One layer of SmolLM2-135M: q and o, k and v, gate and up, down.
LAYER_135M = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_profiles(W0: Tensor, W: Tensor, svd: SVD | None = None) -> SVD:
    """Retention, drift and adaptation, each as written."""
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False) if svd is None else svd
    P = torch.diagonal(U.mT @ W @ Vh.mT)
    return P, (P - S).abs(), torch.linalg.vector_norm((W - W0) @ Vh.mT, dim=0)


def our_profiles(W0: Tensor, W: Tensor, svd: SVD | None = None) -> SVD:
    found = weight_profiles(W0, W, svd=svd)
    return found.retention, found.drift, found.adaptation


PROFILES: dict[str, Callable[[Tensor, Tensor, SVD], object]] = {
    "orthokit": lambda W0, W, svd: our_profiles(W0, W),
    "orthokit, frozen SVD": our_profiles,
    "plain formula": lambda W0, W, svd: plain_profiles(W0, W),
    "plain formula, frozen SVD": plain_profiles,
    "SVD of W0 alone": lambda W0, W, svd: thin_svd(W0),
}


def plain_geometry(X0: Tensor, X1: Tensor, *, rows: int | None, dtype: torch.dtype, ranks: tuple[int, ...]) -> list:
    """Raw, Procrustes, Gram, CKA, subspaces and pointwise measures, each as written."""
    X0, X1 = X0.to(dtype), X1.to(dtype)
    norm = torch.linalg.matrix_norm
    Z0, Z1 = (torch.nn.functional.normalize(X[: rows or len(X)], dim=1) for X in (X0, X1))
    K0, K1 = Z0 @ Z0.mT, Z1 @ Z1.mT
    cosine = torch.nn.functional.cosine_similarity(X0, X1, dim=1).clamp(-1, 1)
    pointwise = [cosine.mean(), cosine.acos().mean(), (X1.norm(dim=1) / X0.norm(dim=1)).log().abs().mean()]
    X0, X1 = X0 - X0.mean(0), X1 - X1.mean(0)
    U, _, Vh = torch.linalg.svd(X1.mT @ X0)
    cka = norm(X0.mT @ X1) ** 2 / (norm(X0.mT @ X0) * norm(X1.mT @ X1))
    V0, V1 = (torch.linalg.svd(X, full_matrices=False).Vh for X in (X0, X1))
    subspaces = [norm(V0[:k].mT @ V0[:k] - V1[:k].mT @ V1[:k]) / (2 * k) ** 0.5 for k in ranks]
    distances = [norm(X1 - X0) / norm(X0), norm(X1 @ (U @ Vh) - X0) / norm(X0), norm(K1 - K0) / norm(K0)]
    return [float(value) for value in (*distances, cka, *subspaces, *pointwise)]


def our_geometry(X0: Tensor, X1: Tensor, *, rows: int | None, ranks: tuple[int, ...]) -> list:
    found = activation_geometry(X0, X1, rows=rows, ranks=ranks)
    point = found.pointwise
    distances = [found.raw, found.procrustes, found.gram, found.cka, *found.subspace.values()]
    return [*distances, point.cosine, point.angle, point.log_norm_ratio]


GEOMETRY: dict[str, Callable[..., list]] = {
    "orthokit": partial(our_geometry, rows=1024),
    "orthokit, all tokens": partial(our_geometry, rows=None),
    "plain formula, float32": partial(plain_geometry, rows=1024, dtype=torch.float32),
    "plain formula": partial(plain_geometry, rows=1024, dtype=torch.float64),
    "plain formula, all tokens": partial(plain_geometry, rows=None, dtype=torch.float64),
}


def matrices(model: str, quick: bool) -> Matrices:
    """The weights before and after a change, with the SVD of the former."""
    if model == "10.6 M":
        weights = [p.detach() for p in TinyGPT("0.2M" if quick else "10M").parameters() if p.ndim == 2]
    else:
        part = 8 if quick else 1
        weights = [gaussian(m // part, n // part, seed=i) for i, (m, n) in enumerate(LAYER_135M)]
    moved = [W + 0.05 * W.std() * gaussian(*W.shape, seed=100 + i) for i, W in enumerate(weights)]
    return [(W0, W, thin_svd(W0)) for W0, W in zip(weights, moved, strict=True)]


def activations(model: str, quick: bool) -> Pairs:
    """Activations of the same tokens in two models."""
    tokens = 512 if quick else 4096
    if model == "135 M":
        d = 72 if quick else 576
        # The spread of real activations: a few strong directions and a long tail.
        X0 = gaussian(tokens, d) * torch.arange(1, d + 1) ** -0.5
        return [(X0, X0 + 0.1 * gaussian(tokens, d, seed=1) * torch.arange(1, d + 1) ** -0.5)]
    size = "0.2M" if quick else "10M"
    base, changed = TinyGPT(size), TinyGPT(size)
    with torch.no_grad():
        for i, p in enumerate(changed.parameters()):
            p.add_(0.05 * p.std() * gaussian(*p.shape, seed=i))
    text = torch.randint(0, 256, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    layers = [f"blocks.{i}" for i in range(len(base.blocks))]
    before, after = (collect_activations(m, [text], layers) for m in (base, changed))
    return [(before[name], after[name]) for name in layers]


def ranks_for(pairs: Pairs) -> tuple[int, ...]:
    return (32, 64) if pairs[0][0].shape[1] > 64 else (8,)


def each(method: Callable[..., object], items: list, **options: object) -> Callable[[], list]:
    """A call that takes all matrices or layers of a model, one at a time."""
    return lambda: [method(*item, **options) for item in items]


def candidates(kind: str, model: str, quick: bool) -> dict[str, Callable[[], list]]:
    """All candidates of a case, each a call without arguments on the same inputs."""
    if kind == "profiles":
        given = matrices(model, quick)
        return {name: each(method, given) for name, method in PROFILES.items()}
    pairs = activations(model, quick)
    return {name: each(method, pairs, ranks=ranks_for(pairs)) for name, method in GEOMETRY.items()}


def peak_memory(kind: str, name: str, model: str, quick: bool, threads: int) -> float:
    """MiB above the process as it is with the inputs in memory and the library warm."""
    torch.set_num_threads(threads)
    call = candidates(kind, model, quick)[name]
    candidates(kind, model, True)[name]()
    with suppress(OSError):  # where Linux allows it, the high-water mark starts again from here
        Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    call()
    return high_water() - before


def drift_error(method: Callable[..., SVD], *, frozen: bool, size: int) -> float:
    """Relative error of the drift in float32, in the frame that the method uses."""
    W0 = gaussian(size, size)
    W = W0 + 1e-5 * gaussian(size, size, seed=1)
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    exact = (U.double() * ((W.double() - W0.double()) @ Vh.double().mT)).sum(0).abs()
    drift = method(W0, W, (U, S, Vh) if frozen else None)[1]
    return ((drift - exact).abs().max() / exact.max()).item()


def rotation_leaves(method: Callable[..., list], quick: bool) -> float:
    """Procrustes residual or Gram distortion of activations that were only rotated."""
    n, d = (256, 16) if quick else (4096, 384)
    g = torch.Generator().manual_seed(2)
    X = gaussian(n, d, dtype=torch.float64)
    rotated = X @ random_orthogonal(d, d, generator=g, dtype=torch.float64)
    _, procrustes, gram, *_ = method(X, rotated, ranks=(8,))
    return max(procrustes, gram)


def errors(kind: str, quick: bool) -> dict[str, str]:
    """The accuracy of each candidate of a kind, for the table."""
    if kind == "activations":
        return {name: f"{rotation_leaves(method, quick):.1e}" for name, method in GEOMETRY.items()}
    methods = {"orthokit": our_profiles, "plain formula": plain_profiles}
    size, found = 64 if quick else 384, {}
    for name, method in methods.items():
        found[name] = f"{drift_error(method, frozen=False, size=size):.1e}"
        found[f"{name}, frozen SVD"] = f"{drift_error(method, frozen=True, size=size):.1e}"
    return found


def case(kind: str, model: str, options: Options, accuracy: dict[str, str]) -> Case:
    """One comparison with memory and accuracy beside the times."""
    calls = candidates(kind, model, options.quick)
    memory: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    for name in calls:
        with context.Pool(1) as pool:
            extra = pool.apply(peak_memory, (kind, name, model, options.quick, options.threads))
            memory[name] = f"{extra:.1f}"
    column = "drift error" if kind == "profiles" else "rotation leaves"
    part = {
        ("profiles", "10.6 M"): "all matrices of TinyGPT 10M",
        ("profiles", "135 M"): "the 7 matrices of one of 30 layers",
        ("activations", "10.6 M"): "all 6 residual streams",
        ("activations", "135 M"): "one layer, width 576",
    }[kind, model]
    title = f"{kind}, {model}: {'small stand-ins' if options.quick else part}"
    return Case(title, {**calls}, baseline="plain formula", columns={"extra MiB": memory, column: accuracy})


def cases(options: Options) -> Iterator[Case]:
    """Profiles and activations of both models; ``--quick`` takes small stand-ins."""
    for kind in ("profiles", "activations"):
        accuracy = errors(kind, options.quick)
        for model in ("10.6 M", "135 M"):
            yield case(kind, model, options, accuracy)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Run this benchmark."""
    return run("diagnostics", __doc__, cases, arguments)


if __name__ == "__main__":
    main()
