"""Coefficient lab: what each published table does to singular values, what it costs, and what training notices."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.errors import OptionError, ParameterError, ShapeError
from orthokit.lab.tasks import Task
from orthokit.linalg import orthogonalize, polar, singular_values
from orthokit.linalg.coefficients import coefficient_table
from orthokit.optim import Muon, for_model
from orthokit.optim.rates import ADJUSTMENTS, lr_ratio
from orthokit.studies.pipelines import train_tinygpt
from orthokit.studies.recipes import PLAIN, SPECTRA, Recipe, with_spectrum

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "compare_recipes",
    "head_split",
    "mean_miss",
    "orthogonality",
    "relative_to",
    "reported_step",
    "scalar_maps",
    "scale_rules",
    "start_ranges",
    "step_length",
    "train_recipes",
    "values_after",
]


def values_after(X: Float[Tensor, "out in"], recipes: Sequence[Recipe]) -> dict[str, Float[Tensor, " k"]]:
    """All singular values of what each recipe makes of ``X``, in the order of those of ``X``, largest first.

    The value that belongs to the ``i``-th singular pair ``u, v`` of ``X`` is ``u^T Q v``: it may be negative where a
    table turned a direction round, which a sorted spectrum would hide.

    Args:
        X: The matrix, in the precision the products should have.
        recipes: What to compare.

    Returns:
        Name of the recipe to values, ``(min(out, in),)``, float32.

    Example:
        >>> X = with_spectrum("1/k", (4, 8))
        >>> bool((values_after(X, [Recipe("svd")])["svd"] - 1).abs().max() < 1e-5)
        True
    """
    U, _, Vh = torch.linalg.svd(X.float(), full_matrices=False)
    return {recipe.name: ((U.mT @ recipe(X).float()) * Vh).sum(-1) for recipe in recipes}


def scalar_maps(
    recipes: Sequence[Recipe], s: Float[Tensor, " k"]
) -> dict[str, tuple[Float[Tensor, " k"], Float[Tensor, " k"]]]:
    """Where each recipe's polynomial sends singular values, without rounding.

    Args:
        recipes: With a fixed number of polish steps and no ``"svd"``.
        s: Singular values relative to the bound they were divided by, float64 in [0, 1].

    Returns:
        Name to ``(s, mapped)``, as ``figures.table_maps`` takes it.

    Example:
        >>> s = torch.tensor([0.1, 1.0], dtype=torch.float64)
        >>> scalar_maps([Recipe("cubic", 1)], s)["cubic x1"][1].tolist()[1]
        1.0
    """
    maps = {}
    for recipe in recipes:
        y = s
        polish = [(1.5, -0.5, 0.0)] * int(recipe.polish)
        for a, b, c in [*coefficient_table(recipe.table, recipe.count), *polish]:
            y = y * (a + b * y**2 + c * y**4)
        maps[recipe.name] = (s, y)
    return maps


def compare_recipes(
    recipes: Sequence[Recipe],
    *,
    spectra: Sequence[str] = SPECTRA,
    shape: tuple[int, int] = (384, 1536),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    rounds: int = 5,
) -> pd.DataFrame:
    """How near to 1 each recipe brings the singular values, and what it costs in times of five plain steps.

    Args:
        recipes: What to compare.
        spectra: Names of :data:`SPECTRA`.
        shape: Of the test matrices.
        dtype: Of the test matrices and of the products; default bfloat16.
        seed: Of the test matrices.
        rounds: Timings of each recipe, ``>= 1``, taken in turn; default 5.

    Returns:
        Columns ``recipe, spectrum, mean_error`` (mean of ``|s - 1|``), ``smallest, largest, from_polar`` (distance to
        the exact factor, relative to its norm), ``seconds`` and ``cost`` (median of the ratios to five plain steps
        within a round). A recipe that diverges has infinite errors.

    Raises:
        OptionError: ``rounds`` below 1.

    Example:
        >>> table = compare_recipes([Recipe("svd")], spectra=["1/k"], shape=(4, 8), dtype=torch.float32, rounds=1)
        >>> bool(table["mean_error"].item() < 1e-5)
        True

    Numerics:
        Wall time with the number of threads torch has. Ratios within a round feel other load least.
    """
    import pandas as pd

    if rounds < 1:
        raise OptionError(f"rounds must be at least 1; got {rounds}.")
    rows = []
    for spectrum in spectra:
        X = with_spectrum(spectrum, shape, seed=seed, dtype=dtype)
        exact = polar(X.float())
        times: list[dict[str, float]] = []
        for _ in range(rounds + 1):  # the first round warms up
            times.append({recipe.name: _seconds(recipe, X) for recipe in {PLAIN: None} | dict.fromkeys(recipes)})
        for recipe in recipes:
            found = [now[recipe.name] for now in times[1:]]
            ratios = [now[recipe.name] / now[PLAIN.name] for now in times[1:]]
            numbers = orthogonality(recipe(X), exact) | {"seconds": _median(found), "cost": _median(ratios)}
            rows.append({"recipe": recipe.name, "spectrum": spectrum, **numbers})
    return pd.DataFrame(rows)


def orthogonality(Q: Float[Tensor, "out in"], exact: Float[Tensor, "out in"]) -> dict[str, float]:
    """How orthogonal an orthogonalised matrix is.

    Args:
        Q: What a recipe made.
        exact: The polar factor it approximates, float32 or wider.

    Returns:
        ``mean_error`` (mean of ``|s - 1|`` over the singular values), ``smallest``, ``largest`` and ``from_polar``
        (``||Q - exact||_F / ||exact||_F``); infinite errors when ``Q`` is not finite.

    Example:
        >>> orthogonality(2 * torch.eye(2), torch.eye(2))
        {'mean_error': 1.0, 'smallest': 2.0, 'largest': 2.0, 'from_polar': 1.0}
    """
    Q = Q.to(exact.dtype)
    if not Q.isfinite().all():
        return {"mean_error": torch.inf, "smallest": torch.nan, "largest": torch.nan, "from_polar": torch.inf}
    s = torch.linalg.svdvals(Q)
    # In float64: what has diverged without leaving the range of float32 may leave it when squared.
    distance = (Q - exact).double().norm() / exact.double().norm()
    numbers = {"mean_error": (s - 1).abs().mean(), "smallest": s.min(), "largest": s.max(), "from_polar": distance}
    return {name: float(value) for name, value in numbers.items()}


def _seconds(recipe: Recipe, X: Tensor) -> float:
    start = time.perf_counter()
    recipe(X)
    return time.perf_counter() - start


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def mean_miss(recipe: Recipe, X: Float[Tensor, "out in"]) -> float:
    """Mean ``|s - 1|`` over the singular values of what a recipe makes of ``X``.

    Args:
        recipe: The recipe.
        X: The matrix, in the precision the products should have.

    Returns:
        The mean, 0 for an exact factor of full rank; infinite when the recipe diverges.

    Example:
        >>> mean_miss(Recipe("svd"), with_spectrum("1/k", (4, 8))) < 1e-5
        True
    """
    Q = recipe(X).float()
    return float((torch.linalg.svdvals(Q) - 1).abs().mean()) if Q.isfinite().all() else torch.inf


def start_ranges(
    X: Float[Tensor, "out in"], scalings: Sequence[str] = ("frobenius", "schatten", "spectral", "aol")
) -> dict[str, tuple[float, float]]:
    """The interval of singular values that the steps start from, for each scaling.

    Args:
        X: The matrix.
        scalings: Names of ``linalg.SCALINGS``.

    Returns:
        Scaling to ``(smallest, largest)``.

    Example:
        >>> low, high = start_ranges(torch.eye(4), ["frobenius"])["frobenius"]
        >>> round(low, 3), round(high, 3)
        (0.5, 0.5)
    """
    found = {}
    for scaling in scalings:
        # No steps: what orthogonalize gives is its scaled input.
        s = singular_values(orthogonalize(X.double(), method="newton_schulz", steps=0, scaling=scaling))
        found[scaling] = (float(s[-1]), float(s[0]))
    return found


def step_length(recipe: Recipe, momenta: Sequence[Float[Tensor, "out in"]]) -> float:
    """Root mean square of the singular values a recipe leaves: how long its steps are, next to exact ones.

    Args:
        recipe: The recipe.
        momenta: What it is applied to, such as momentum buffers.

    Returns:
        The root mean square over all matrices; 1 for an exact factor of full rank.

    Example:
        >>> round(step_length(Recipe("svd"), [with_spectrum("1/k", (4, 8))]), 4)
        1.0
    """
    squares = sum(float(recipe(M).float().square().sum()) for M in momenta)
    return (squares / sum(min(M.shape) for M in momenta)) ** 0.5


def train_recipes(
    recipes: Mapping[str, tuple[Recipe, float | int]],
    *,
    seeds: Sequence[int],
    steps: int,
    lr: float,
    root: str | Path | None = None,
    **options: Any,
) -> pd.DataFrame:
    """TinyGPT trained with Muon that orthogonalises in different ways; everything else is the same.

    Args:
        recipes: Label to the recipe and a factor on the learning rate of the matrices.
        seeds: Of the initial weights and the data, shared by all, so that differences are paired.
        steps: Length of each run.
        lr: Learning rate of the matrices; embedding, head and norms have AdamW at 6e-3 throughout.
        root: Folder of runs; default a temporary one.
        **options: Of ``studies.pipelines.train_tinygpt``, such as ``batch``, ``context`` and ``windows``.

    Returns:
        Columns ``recipe, seed, step, value``: validation bits per byte.
    """
    import pandas as pd

    rows = []
    for label, (recipe, factor) in recipes.items():
        for seed in seeds:
            given = {"lr": lr * factor, "fallback_lr": 6e-3, "weight_decay": 0.0, **recipe.muon}
            rows += train_tinygpt(
                {"recipe": label},
                lambda model, given=given: for_model(model, "muon", **given),
                seed=seed,
                steps=steps,
                root=root,
                **options,
            )
    return pd.DataFrame(rows)


def relative_to(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Each run's values minus those of the baseline with the same seed at the same step: what pairing leaves.

    Args:
        table: What :func:`train_recipes` returned.
        baseline: Label of the recipe to subtract, which is left out of the result.

    Returns:
        The same columns; negative values are better than the baseline.

    Raises:
        OptionError: No such recipe in the table.
    """
    if baseline not in set(table["recipe"]):
        raise OptionError(f"{baseline!r} is not in the table; it has {', '.join(table['recipe'].unique())}.")
    keys = ["seed", "step"]
    base = table.loc[table["recipe"] == baseline, [*keys, "value"]].rename(columns={"value": "base"})
    rest = table.loc[table["recipe"] != baseline].merge(base, on=keys)
    return rest.assign(value=rest["value"] - rest["base"]).drop(columns="base")


def reported_step(model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, *, step: int) -> pd.DataFrame:
    """One training step and ``Muon.report()`` of it: the report needs gradients, which ``fit`` clears.

    Args:
        model: Updated in place.
        task: Source of the batch.
        optimizer: A Muon, or what ``for_model`` made with one; its gradients are cleared afterwards.
        step: Number of the batch.

    Returns:
        The report, one row per matrix block.

    Raises:
        ParameterError: There is no Muon in ``optimizer``.
    """
    parts = [part for part in getattr(optimizer, "parts", [optimizer]) if isinstance(part, Muon)]
    if not parts:
        raise ParameterError(f"a report needs a Muon; got {type(optimizer).__name__}.")
    task.loss(model, task.batch(step)).backward()
    optimizer.step()
    report = parts[0].report()
    optimizer.zero_grad()
    return report


def scale_rules(shapes: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """What each rule for the update's scale makes of an exactly orthogonal update of each shape.

    Args:
        shapes: ``(out, in)`` pairs.

    Returns:
        Columns ``rule, shape, factor`` (on the learning rate; also the spectral norm of the update) and ``rms`` (of the
        update's entries).

    Example:
        >>> table = scale_rules([(400, 100)])
        >>> table.loc[table["rule"] == "match_rms_adamw", "rms"].round(6).tolist()
        [0.2]
    """
    import pandas as pd

    rows = []
    for rule in (rule for rule in ADJUSTMENTS if rule is not None):
        for out, into in shapes:
            factor = lr_ratio(rule, out, into)
            # An orthogonal matrix of this shape has min(out, in) singular values 1 in out * in entries.
            rms = factor / max(out, into) ** 0.5
            rows.append({"rule": rule, "shape": f"{out} x {into}", "factor": factor, "rms": rms})
    return pd.DataFrame(rows)


def head_split(G: Float[Tensor, "out in"], *, heads: int) -> pd.DataFrame:
    """A projection orthogonalised as a whole and head by head: what each update gains to first order.

    ``<G, polar(G)>`` is the largest gain of any update of spectral norm 1; head by head, each head has its own norm.

    Args:
        G: Gradient or momentum of a query, key or value projection: rows belong to heads in order.
        heads: Number of heads; divides the rows.

    Returns:
        One row per way, columns ``update``, ``gain`` (``<G, U>``), ``norm`` (``||U||_F``), ``spectral`` (largest
        singular value) and ``gain_per_norm``.

    Raises:
        ShapeError: ``heads`` does not divide the rows.

    Example:
        >>> table = head_split(with_spectrum("1/k", (8, 16)), heads=2)
        >>> bool(table["gain"][1] >= table["gain"][0])
        True
    """
    import pandas as pd

    if heads < 1 or len(G) % heads:
        raise ShapeError(f"{len(G)} rows do not split into {heads} heads.")
    split = polar(G.unflatten(0, (heads, -1))).flatten(0, 1)
    rows = []
    for name, U in (("whole", polar(G)), (f"{heads} heads", split)):
        gain, norm = float((G * U).sum()), float(U.norm())
        spectral = float(singular_values(U)[0])
        rows.append({"update": name, "gain": gain, "norm": norm, "spectral": spectral, "gain_per_norm": gain / norm})
    return pd.DataFrame(rows)
