r"""OrthoMerge: experts split into a rotation of the base and a rest; rotations merge as rotations, rests as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import unknown_name
from orthokit.linalg.merged_rotations import INTENSITIES, merge_generators, normalised
from orthokit.merging._common import Gathered, check_range, gathered, task_vectors, weighted_sum
from orthokit.merging._turns import ROUTES, shared_side, turns
from orthokit.merging.averages import linear, model_stock, task_arithmetic
from orthokit.merging.sparse import dare, ties
from orthokit.merging.spectral import iso_c, tsv

__all__ = ["RESIDUALS", "OrthoMerged", "orthomerge", "orthomerge_parts"]

TARGETS = ("global", "conflict")
RESIDUALS: Mapping[str, Callable[..., Tensor]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "tsv": tsv,
    "iso_c": iso_c,
    "model_stock": model_stock,
}
# These commute with a rotation of the input side, so they can stay in the basis of the rotations.
_OF_MATRICES = ("tsv", "iso_c")
_TURNABLE = ("linear", "task_arithmetic", "tsv", "iso_c", "model_stock")


class OrthoMerged(NamedTuple):
    """A merged tensor and how it came about; of a batch, the numbers of each matrix lead.

    Args:
        merged: The result, shape and dtype of the base.
        rotated: The base under the merged rotation alone, before the residual is added; empty if not asked for.
        rotation_fractions: Per expert ``||W0 R_i - W0||^2 / ||W_i - W0||^2``; 0 for an expert equal to the base.
        generator_norms: Per expert ``||Q_i||_F``.
        correction: As of :class:`~orthokit.merging.MergedGenerator`.
        clipped: Whether the correction was above ``clip``.
        conflicts: Per expert, share of the rows that its rotation was fitted to; 1 for ``target="global"``.
        routes: Per expert ``"iteration"``, ``"svd"``, or ``"none"`` for a tensor that is no matrix.
        contraction: Largest factor by which corrections of the iteration shrank; 0 where there was none.
    """

    merged: Tensor
    rotated: Tensor
    rotation_fractions: Tensor
    generator_norms: Tensor
    correction: Tensor
    clipped: Tensor
    conflicts: Tensor
    routes: tuple[str, ...]
    contraction: float


def orthomerge(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    target: str = "global",
    threshold: float = 0.0,
    residual: str = "linear",
    residual_options: Mapping[str, Any] | None = None,
    prior: float = 1e-3,
    clip: float = 10.0,
    intensity: str = "mean",
    route: str = "auto",
) -> Float[Tensor, "*shape"]:
    r"""Merge experts by the rotations that they made of the base, and what is no rotation by any other method.

    .. math::
        R_i = \arg\min_{R^\top R = I} \|W_0 R - T_i\|_F^2 + \mu \|R - I\|_F^2, \quad \rho_i = W_i - W_0 R_i, \quad
        W = W_0\, R + \lambda\, \mathrm{Merge}(\rho_1, \dots, \rho_N)

    with ``R`` from :func:`~orthokit.merging.merge_rotations` and ``mu = prior ||W_0||_F^2 / in``. The target ``T_i`` is
    ``W_i``, or with ``target="conflict"`` the base with the rows of ``W_i`` that disagree with the mean change of all
    experts. ``W_0 R`` keeps the singular values of the base and the angles between its rows.

    Args:
        base: Shape ``(..., out, in)``; a vector has no rotation and is merged by ``residual`` alone (by ``"linear"``
            where that needs matrices).
        experts: One tensor each, of the shape of ``base``.
        weights: One each, ``>= 0``, not all 0; default: all 1.
        scale: Factor ``lambda`` on the merged residual; default 1.
        target: ``"global"`` (default) or ``"conflict"``.
        threshold: A row of an expert is in conflict where its cosine with the mean change is below this; default 0.
        residual: Method that merges the residuals; default ``"linear"``, their mean, with which equal experts give
            themselves. Of :data:`RESIDUALS`.
        residual_options: Options of that method.
        prior: Pull of each rotation to the identity, ``>= 0``, relative to the mean square of the base's columns;
            default 1e-3. At 0 a matrix with fewer rows than columns, or of low rank, leaves its rotation undetermined.
        clip: Largest correction of the merged angle, ``>= 1``; default 10.
        intensity: Angle of the merged rotation: ``"mean"`` (default), ``"median"`` or ``"max"``.
        route: ``"auto"`` (default), ``"svd"`` or ``"iteration"``, which raises where it does not converge.

    Returns:
        Shape and dtype of ``base``.

    Raises:
        OptionError: An option outside its range, weights that are negative, or a rotation by half a turn (raise
            ``prior``).
        ShapeError: Tensors of different shapes.
        NonFiniteError: A NaN or an infinity, and in which tensor.
        UnknownNameError: Unknown ``target``, ``residual``, ``intensity`` or ``route``.

    Example:
        >>> from orthokit.linalg import singular_values
        >>> g = torch.Generator().manual_seed(0)
        >>> W0 = torch.randn(6, 4, generator=g, dtype=torch.float64)
        >>> experts = [W0 + 0.1 * torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2)]
        >>> torch.allclose(orthomerge(W0, experts[:1]), experts[0])
        True
        >>> rotated = orthomerge_parts(W0, experts).rotated
        >>> torch.allclose(singular_values(rotated), singular_values(W0))
        True

    Numerics:
        In float32, or float64. Large matrices near their base share one decomposition of it, and a few products per
        expert give its generator to a relative 3e-5 (1e-11 in float64); others take one SVD and one solve each. Which
        one it was is in :func:`orthomerge_parts`.

    References:
        Yang, Shi, Liu (2026), Orthogonal Model Merging, arXiv 2602.05943. There is no prior there, and rotations of
        matrices with fewer rows than columns are arbitrary in the null space; the correction has no bound.
    """
    return _merged(
        base,
        experts,
        _Options(
            weights=weights,
            scale=scale,
            target=target,
            threshold=threshold,
            residual=residual,
            residual_options=residual_options,
            prior=prior,
            clip=clip,
            intensity=intensity,
            route=route,
        ),
        rotated=False,
    ).merged


def orthomerge_parts(
    base: Float[Tensor, "*shape"], experts: Sequence[Float[Tensor, "*shape"]], *, rotated: bool = True, **options: Any
) -> OrthoMerged:
    """:func:`orthomerge` with the numbers behind it: how much of each change was rotation, by which angle, and so on.

    Args:
        base: As in :func:`orthomerge`.
        experts: One tensor each.
        rotated: Whether to compute ``rotated``, one product more; default ``True``.
        options: Those of :func:`orthomerge`.

    Returns:
        :class:`OrthoMerged`.

    Raises:
        OptionError: As :func:`orthomerge`, like the rest; also for an option that it does not have.
        ShapeError: Shapes differ.
        NonFiniteError: Something is not finite.
        UnknownNameError: An unknown name.
    """
    known = [field.name for field in fields(_Options)]
    for name in options:
        if name not in known:
            raise unknown_name("option", name, known)
    return _merged(base, experts, _Options(**options), rotated=rotated)


@dataclass(frozen=True)
class _Options:
    """The options of :func:`orthomerge`, checked."""

    weights: Sequence[float] | None = None
    scale: float = 1.0
    target: str = "global"
    threshold: float = 0.0
    residual: str = "linear"
    residual_options: Mapping[str, Any] | None = None
    prior: float = 1e-3
    clip: float = 10.0
    intensity: str = "mean"
    route: str = "auto"

    def __post_init__(self) -> None:
        """Raise for what is out of range."""
        for kind, names in (
            ("target", TARGETS),
            ("residual", tuple(RESIDUALS)),
            ("intensity", INTENSITIES),
            ("route", ROUTES),
        ):
            if getattr(self, kind) not in names:
                raise unknown_name(kind, getattr(self, kind), names)
        check_range("prior", self.prior, least=0.0)
        check_range("clip", self.clip, least=1.0)
        check_range("scale", self.scale)
        check_range("threshold", self.threshold, least=-1.0, most=1.0)

    def rest(self, parts: Sequence[Tensor]) -> Tensor:
        """The merged residual, with its factor."""
        options = {"weights": self.weights, "scale": self.scale}
        base = torch.zeros_like(parts[0])
        if parts[0].ndim < 2 and self.residual in _OF_MATRICES:
            return linear(base, parts, **options)
        return RESIDUALS[self.residual](base, parts, **options, **(self.residual_options or {}))


@torch.no_grad()
def _merged(base: Tensor, experts: Sequence[Tensor], options: _Options, *, rotated: bool) -> OrthoMerged:
    inputs = gathered(base, experts, options.weights, positive=True)
    changes = task_vectors(inputs)
    if inputs.base.ndim < 2 or inputs.base.numel() == 0:
        return _unturned(inputs, options.rest(changes))
    lead, sides = inputs.base.shape[:-2], inputs.base.shape[-2:]
    bases = inputs.base.reshape(-1, *sides)
    parts = [change.reshape(-1, *sides) for change in changes]
    found = [_one(W0, [part[index] for part in parts], options, rotated) for index, W0 in enumerate(bases)]

    def stacked(name: str) -> Tensor:
        whole = torch.stack([getattr(one, name) for one in found])
        return whole.reshape(lead + whole.shape[1:])

    numbers = {name: stacked(name) for name in OrthoMerged._fields[2:7]}
    routes = tuple("svd" if "svd" in each else each[0] for each in zip(*(one.routes for one in found), strict=True))
    return OrthoMerged(
        stacked("merged").to(inputs.dtype),
        stacked("rotated").to(inputs.dtype) if rotated else inputs.base.new_empty(0),
        **numbers,
        routes=routes,
        contraction=max(one.contraction for one in found),
    )


def conflicting_rows(
    changes: Sequence[Tensor], weights: Sequence[float] | None = None, *, threshold: float = 0.0
) -> list[Tensor]:
    """Each change with the rows alone whose cosine with the mean of all changes is below ``threshold``."""
    mean = weighted_sum(changes, normalised(weights, len(changes)))
    kept = []
    for change in changes:
        cosine = torch.nn.functional.cosine_similarity(change, mean, dim=-1)
        kept.append(change * (cosine < threshold)[..., None])
    return kept


def _one(W0: Tensor, changes: Sequence[Tensor], options: _Options, keep: bool) -> OrthoMerged:
    """One matrix."""
    turnable, route = options.residual in _TURNABLE, options.route
    aims = changes
    if options.target == "conflict":
        aims = conflicting_rows(changes, options.weights, threshold=options.threshold)
    side = shared_side(W0, prior=options.prior * float(W0.square().sum()) / W0.shape[-1], route=route)
    generators, residuals, fractions, shares, routes, contraction = [], [], [], [], [], 0.0
    for index, (change, aim) in enumerate(zip(changes, aims, strict=True)):
        seen = side.into(change)
        turn = turns(side, seen if aim is change else side.into(aim), route=route, name=f"expert {index}")
        moved = side.moved(turn.generator)
        size = torch.linalg.vector_norm(seen).square()
        fractions.append(torch.where(size > 0, torch.linalg.vector_norm(moved).square() / size, size))
        residuals.append(torch.sub(seen, moved, out=moved) if turnable else change - side.back(moved))
        generators.append(turn.generator)
        shares.append((aim != 0).any(-1).to(size.dtype).mean() if aim is not change else torch.ones_like(size))
        routes.append(turn.route)
        contraction = max(contraction, turn.contraction)
    merged = merge_generators(generators, weights=options.weights, clip=options.clip, intensity=options.intensity)
    moved, residual = side.moved(merged.generator), options.rest(residuals)
    rotated = W0 + side.back(moved) if keep or not turnable else None
    if rotated is None:
        result = W0 + side.back(moved.add_(residual))
    else:
        result = rotated + (side.back(residual) if turnable else residual)
    return OrthoMerged(
        result,
        W0.new_empty(0) if rotated is None else rotated,
        torch.stack(fractions),
        merged.norms,
        merged.correction,
        merged.clipped,
        torch.stack(shares),
        tuple(routes),
        contraction,
    )


def _unturned(inputs: Gathered, change: Tensor) -> OrthoMerged:
    none = torch.zeros(len(inputs.experts), dtype=inputs.base.dtype, device=inputs.base.device)
    return OrthoMerged(
        (inputs.base + change).to(inputs.dtype),
        inputs.base.to(inputs.dtype),
        none,
        none,
        torch.ones_like(none[0]),
        torch.zeros_like(none[0], dtype=torch.bool),
        none,
        ("none",) * len(inputs.experts),
        0.0,
    )
