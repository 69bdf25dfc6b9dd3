"""Merging here and now: contestants judged in the form of the record, scores along scales, identities and traps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics import hyperspherical_energy
from orthokit.errors import OptionError, unknown_name
from orthokit.lab.families import Expert, expert_scores, expert_statistics, family_base
from orthokit.linalg import singular_values
from orthokit.merging import merge, merge_line, methods, orthomerge, orthomerge_parts
from orthokit.studies.merging_results import merging_label
from orthokit.studies.merging_study import _judged, contestants

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["live_scales", "merging_live", "orthomerge_identities", "prior_effects", "random_changes", "rotation_excess"]


def merging_live(
    family: str,
    experts: Mapping[str, Expert],
    *,
    seed: int = 0,
    names: Sequence[str] | None = None,
    small: bool = False,
) -> pd.DataFrame:
    """Some experts merged by every method with its defaults, in the form of the record.

    Args:
        family: A name in :data:`~orthokit.lab.FAMILIES`.
        experts: Task to expert, as :func:`~orthokit.lab.train_expert` gives them.
        seed: Of what methods draw, and that of the rows.
        names: Contestants; default all.
        small: As in training.

    Returns:
        Rows of kind ``"start"``, ``"expert"`` and ``"default"``, as the recorded study has them.

    Raises:
        UnknownNameError: No such family, task or contestant.
    """
    import pandas as pd

    known = contestants(len(experts))
    chosen = list(known) if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise unknown_name("contestant", name, list(known))
    unit = {"family": family, "seed": seed, "budget": 1, "small": small}
    base, trunks = family_base(family, small=small), [expert.trunk for expert in experts.values()]
    needed = {methods()[known[name][0]].statistics for name in chosen} - {None}
    statistics: Mapping[str, Any] = {}
    if needed:
        statistics = expert_statistics(family, experts, samples=8 if small else 128, small=small)
    rows = _judged(unit, "base", base, experts, "start")
    for task, expert in experts.items():
        rows += _judged(unit, f"expert {task}", expert.trunk, experts, "expert")
    for name in chosen:
        method, fixed, _ = known[name]
        options: dict[str, Any] = {"method": method, **fixed, "seed": seed}
        if needs := methods()[method].statistics:
            options["statistics"] = statistics[needs]
        if method == "metrics_weighted":
            options["losses"] = [expert.loss for expert in experts.values()]
        begun = time.process_time()
        merged = merge(base, trunks, **options)
        seconds = time.process_time() - begun
        rows += _judged(unit, name, merged, experts, "default", options="{}", seconds=seconds)
    return pd.DataFrame(rows)


def live_scales(
    family: str,
    experts: Mapping[str, Expert],
    scales: Sequence[float],
    *,
    names: Sequence[str],
    part: str = "validation",
    seed: int = 0,
    small: bool = False,
) -> dict[str, tuple[list[float], list[float]]]:
    """Average score of some methods at every scale, out of two merges each.

    Args:
        family: A name in :data:`~orthokit.lab.FAMILIES`.
        experts: Task to expert.
        scales: Factors on the merged change, increasing.
        names: Contestants that need neither data nor losses.
        part: ``"validation"`` (default) or ``"test"``.
        seed: Of what methods draw.
        small: As in training.

    Returns:
        Label to ``(scales, averages)``.

    Raises:
        UnknownNameError: No such family, task, contestant or part.
        OptionError: A contestant needs data or losses.
    """
    known = contestants(len(experts))
    base, trunks = family_base(family, small=small), [expert.trunk for expert in experts.values()]
    curves = {}
    for name in names:
        if name not in known:
            raise unknown_name("contestant", name, list(known))
        method, fixed, _ = known[name]
        if methods()[method].statistics is not None or method == "metrics_weighted":
            raise OptionError(f"names must be contestants of weights alone; {name!r} needs data or losses besides.")
        line = merge_line(base, trunks, method=method, seed=seed, **fixed)
        found = [expert_scores(family, line.at(scale), experts, part=part, small=small) for scale in scales]
        curves[merging_label(name)] = ([float(s) for s in scales], [float(np.mean(list(of.values()))) for of in found])
    return curves


def random_changes(base: Mapping[str, Tensor], expert: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """A model whose every tensor is as far from the base as an expert's, in a random direction.

    Args:
        base: Tensors by name.
        expert: Others of the same names and shapes.
        seed: Of the directions.

    Returns:
        Tensors by name, in the dtypes of the base; tensors of integers as they are in the expert.

    Example:
        >>> W = {"w": torch.eye(3)}
        >>> other = random_changes(W, {"w": torch.eye(3) + 0.1}, seed=1)
        >>> torch.allclose((other["w"] - W["w"]).norm(), torch.tensor(0.3))
        True
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, start in base.items():
        if not start.is_floating_point():
            found[name] = expert[name].clone()
            continue
        size = torch.linalg.vector_norm(expert[name].double() - start.double())
        drawn = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        change = drawn * (size / torch.linalg.vector_norm(drawn).clamp_min(torch.finfo(torch.float64).tiny))
        found[name] = (start.double() + change.to(start.device)).to(start.dtype)
    return found


def rotation_excess(
    base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], *, seed: int = 0
) -> dict[str, float]:
    """How much more of each expert's change is a rotation than of a random change of its size.

    Args:
        base: Tensors by name.
        experts: Name to tensors.
        seed: Of the random changes.

    Returns:
        Name to the difference of rotation fractions, mean over matrices.
    """
    noise = [random_changes(base, expert, seed=seed + index) for index, expert in enumerate(experts.values())]
    rows = merge(base, [*experts.values(), *noise], method="orthomerge").report.rows
    found = np.array([row["rotation_fraction"] for row in rows if "none" not in row["route"]])
    own, drawn = found.reshape(len(found), 2, -1).mean(axis=0)
    return {name: float(a - b) for name, a, b in zip(experts, own, drawn, strict=True)}


def orthomerge_identities(W: Float[Tensor, "out in"], experts: Sequence[Float[Tensor, "out in"]]) -> dict[str, float]:
    r"""How exactly one merged matrix keeps what OrthoMerge keeps by construction.

    Args:
        W: Base of shape ``(out, in)``.
        experts: Two or more matrices of its shape.

    Returns:
        Sentence to relative error: singular values of $W_0R$, energy of its rows, a single expert, equal experts, and
        the order of the experts.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> W, A, B = torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
        >>> max(orthomerge_identities(W, [W + 0.1 * A, W + 0.1 * B]).values()) < 1e-9
        True

    Numerics:
        In float64, whatever the dtype of the tensors.
    """
    W0, each = W.double(), [expert.double() for expert in experts]
    rotated = orthomerge_parts(W0, each).rotated
    before, after = singular_values(W0), singular_values(rotated)
    energies = [float(hyperspherical_energy(matrix)) for matrix in (W0, rotated)]
    ways = {
        "One expert is merged to itself.": (each[0], orthomerge(W0, each[:1])),
        "Three equal experts are merged to one of them.": (each[0], orthomerge(W0, [each[0]] * 3)),
        "The order of the experts does not matter.": (orthomerge(W0, each), orthomerge(W0, each[::-1])),
    }
    return {
        "The rotated base has the singular values of the base.": float((after - before).abs().max() / before[0]),
        "The rotated base has the hyperspherical energy of the base.": abs(energies[1] / energies[0] - 1),
        **{text: float(torch.linalg.norm(one - other) / torch.linalg.norm(one)) for text, (one, other) in ways.items()},
    }


def prior_effects(
    shape: tuple[int, int],
    priors: Sequence[float],
    *,
    experts: int = 2,
    change: float = 0.01,
    draws: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    r"""What the pull of rotations to the identity prevents: random bases and random small changes.

    Args:
        shape: ``(out, in)`` of the matrices.
        priors: Values of ``prior`` of :func:`~orthokit.merging.orthomerge`, ``>= 0``.
        experts: How many are merged; default 2.
        change: $\lVert W_i-W_0\rVert_F/\lVert W_0\rVert_F$; default 0.01.
        draws: Repetitions, ``>= 1``; default 20.
        seed: Of the first.

    Returns:
        One row a prior: ``refused`` (share of the draws without a merged rotation, as one turned by half a turn), and
        over the others ``generator`` (median of its mean norm), ``moved`` and ``most moved`` (median and largest
        $\lVert W_0R-W_0\rVert_F$ over the change of an expert); NaN if all were refused.

    Raises:
        OptionError: ``draws`` or ``experts`` below 1, or a prior below 0.

    Example:
        >>> found = prior_effects((8, 16), [0.0, 1e-3], draws=5)
        >>> bool(found.loc[1e-3, "moved"] < 2), float(found.loc[1e-3, "refused"])
        (True, 0.0)
    """
    import pandas as pd

    if draws < 1 or experts < 1 or min(priors, default=0) < 0:
        raise OptionError(f"need draws and experts >= 1 and priors >= 0; got {draws}, {experts} and {list(priors)}.")
    rows: dict[float, list[tuple[float, float]]] = {prior: [] for prior in priors}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed + draw)
        W, *noise = torch.randn(experts + 1, *shape, generator=generator, dtype=torch.float64)
        size = change * torch.linalg.norm(W)
        changed = [W + size * one / torch.linalg.norm(one) for one in noise]
        for prior in priors:
            try:
                parts = orthomerge_parts(W, changed, prior=prior, route="svd")
            except OptionError:  # half a turn: no generator; counted
                continue
            moved = float(torch.linalg.norm(parts.rotated - W) / size)
            rows[prior].append((float(parts.generator_norms.mean()), moved))
    found = {}
    for prior, of in rows.items():
        generator_norm, moves = np.array(of or [(np.nan, np.nan)]).T
        found[prior] = [1 - len(of) / draws, np.median(generator_norm), np.median(moves), moves.max()]
    columns = ["refused", "generator", "moved", "most moved"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("prior")
