r"""The rotation of each expert against the base, as generators that can be averaged.

For ``M = W0^T T + mu I`` the nearest rotation ``R = (I + Q)(I - Q)^{-1}`` is where ``R^T M`` is symmetric:

.. math:: F(Q) = \mathrm{skew}\,[(I - Q)\, M\, (I - Q)] = 0 .

``M`` is a symmetric matrix that all experts share, ``W0^T W0 + mu I``, and a small change. In the eigenvectors of the
shared part its Sylvester operator ``Q -> Q S + S Q`` is a division, entry by entry, so a few products replace an SVD
and a solve per expert: corrections run in the dtype that is fast here, the residual ``F`` in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from orthokit.device import fast_matmul_dtype
from orthokit.errors import OptionError
from orthokit.linalg import inverse_cayley

__all__ = ["ROUTES", "Side", "Turn", "shared_side", "turns"]

ROUTES = ("auto", "svd", "iteration")

# Below, LAPACK's SVD takes about a millisecond and iterating does not pay.
_SMALL = 128
# Relative error of a generator at which the iteration stops: rounding of the data is of this size.
_TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}
_OUTER, _INNER = 6, 16
# An inner loop in low precision gains two digits; more would be its own rounding.
_GAIN = 4e-3


@dataclass(frozen=True)
class Side:
    """The input side of a base matrix, in an orthonormal basis that (nearly) diagonalises ``W0^T W0``.

    Args:
        base: ``W0``, shape ``(out, in)``.
        prior: ``mu``, the pull of every rotation to the identity.
        vectors: The basis as columns, ``(in, in)``; ``None``: the standard one.
        seen: ``W0`` in the basis, its first ``rank`` columns; the others are 0.
    """

    base: Tensor
    prior: float
    vectors: Tensor | None
    seen: Tensor

    @property
    def rank(self) -> int:
        """Columns of ``seen``: the smaller side of the matrix, or ``in`` in the standard basis."""
        return self.seen.shape[-1]

    @cached_property
    def gram(self) -> Tensor:
        """``W0^T W0`` on the first ``rank`` directions."""
        return self.seen.mT @ self.seen

    @cached_property
    def sums(self) -> Tensor:
        """``S_jj + S_kk``, by which the Sylvester operator of the shared part multiplies entry ``jk``."""
        diagonal = torch.full((self.base.shape[-1],), self.prior, dtype=self.base.dtype, device=self.base.device)
        diagonal[: self.rank] += self.gram.diagonal()
        return diagonal[:, None] + diagonal

    @cached_property
    def scales(self) -> Tensor:
        """One over the square root of that factor."""
        return self.sums.rsqrt()

    def into(self, change: Tensor) -> Tensor:
        """A matrix of the base's shape, in the basis."""
        return change if self.vectors is None else change @ self.vectors

    def back(self, change: Tensor) -> Tensor:
        """And from the basis."""
        return change if self.vectors is None else change @ self.vectors.mT

    def moved(self, generator: Tensor) -> Tensor:
        r"""``W0 R - W0`` in the basis, from ``W0 (R - I) = 2 W0 Q (I - Q)^{-1}``: no cancellation for small angles."""
        step = (2 * self.seen) @ generator[: self.rank]
        total, before = step.clone(), float(torch.linalg.vector_norm(step))
        tolerance, dtype = _TOLERANCE[step.dtype], _inner_dtype(step)
        limit, rough = tolerance * before, generator.to(dtype)
        power = step
        for _ in range(_OUTER):
            following = (power.to(dtype) @ rough).to(step.dtype)
            # A term may be as coarse as it is small beside the sum.
            if float(torch.linalg.vector_norm(following)) * 0.5 * torch.finfo(dtype).eps > limit:
                following = power @ generator
            power = following
            size = float(torch.linalg.vector_norm(power))
            total += power
            if size <= limit:
                return total
            if size > 0.3 * before:
                break  # a solve is cheaper than so many powers
            before = size
        eye = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
        return torch.linalg.solve(eye - generator, step, left=False)


@dataclass(frozen=True)
class Turn:
    """The rotation of one expert.

    Args:
        generator: ``Q``, skew, in the basis of its side.
        route: ``"iteration"`` or ``"svd"``.
        contraction: Factor by which corrections shrank; 0 for an SVD.
    """

    generator: Tensor
    route: str
    contraction: float


def shared_side(base: Tensor, *, prior: float, route: str) -> Side:
    """What all experts of one base share; ``route="svd"`` keeps the standard basis."""
    rows, columns = base.shape
    if route == "svd" or (route == "auto" and columns < _SMALL):
        return Side(base, prior, None, base)
    if rows >= columns:
        vectors = torch.linalg.eigh(base.mT @ base).eigenvectors
        return Side(base, prior, vectors, base @ vectors)
    left = torch.linalg.eigh(base @ base.mT).eigenvectors
    # Orthonormal to rounding however small a singular value is, and completed by a basis of the null space.
    vectors = torch.linalg.qr(base.mT @ left, mode="complete").Q
    return Side(base, prior, vectors, base @ vectors[:, :rows])


def turns(side: Side, change: Tensor, *, route: str, name: str) -> Turn:
    """The rotation nearest to taking ``W0`` to ``W0 + change``.

    Args:
        side: From :func:`shared_side`.
        change: In the basis of ``side``, shape ``(out, in)``.
        route: ``"auto"``: iterate, and decompose where that does not converge; ``"iteration"``; ``"svd"``.
        name: Of the expert, for words.
    """
    cross = side.seen.mT @ change  # the first ``rank`` rows of W0^T (T - W0); the others are 0
    found: Turn | None = None
    if side.vectors is not None:
        found = _iterated(side, cross)
        if found is None and route == "iteration":
            raise OptionError(
                f"{name} is turned too far against the base for route='iteration'; use route='auto', which decomposes "
                "such a matrix."
            )
    return found or _decomposed(side, cross, name)


def _decomposed(side: Side, cross: Tensor, name: str) -> Turn:
    """The generator by an SVD; in float64, since the smallest singular values, near ``prior``, decide about it."""
    rank, size = side.rank, side.base.shape[-1]
    top = cross.double()
    top[:, :rank] += side.gram
    # Directions that neither the base nor the expert has any weight in do not turn, and can be left out.
    within = torch.linalg.qr(top[:, rank:].mT).Q if 2 * rank < size else None
    if within is not None:
        top = torch.cat([top[:, :rank], top[:, rank:] @ within], dim=1)
    M = torch.zeros(top.shape[1], top.shape[1], dtype=top.dtype, device=top.device)
    M[:rank] = top
    M.diagonal().add_(side.prior)
    U, _, Vh = torch.linalg.svd(M)
    try:
        turned = inverse_cayley(U @ Vh)
    except OptionError:
        raise OptionError(
            f"the rotation of {name} against the base has an eigenvalue -1, which no generator has; got "
            f"prior={side.prior:.2g} on a matrix of shape {tuple(side.base.shape)}. Raise prior, or rotate less of it "
            "with target='conflict'."
        ) from None
    generator = turned
    if within is not None:
        generator = torch.zeros(size, size, dtype=top.dtype, device=top.device)
        generator[:rank, :rank] = turned[:rank, :rank]
        generator[:rank, rank:] = turned[:rank, rank:] @ within.mT
        generator[rank:, :rank] = -generator[:rank, rank:].mT
        generator[rank:, rank:] = within @ turned[rank:, rank:] @ within.mT
    return Turn(generator.to(cross.dtype), "svd", 0.0)


def _iterated(side: Side, cross: Tensor) -> Turn | None:
    """The generator by inexact Newton steps; ``None`` where they do not shrink."""
    rank, tolerance, dtype = side.rank, _TOLERANCE[cross.dtype], _inner_dtype(cross)
    # M is diagonal but for the first rows, which hold the change and what the basis left beside the diagonal.
    change = cross.clone()
    change[:, :rank] += side.gram
    change[:, :rank].diagonal().sub_(side.gram.diagonal())
    # Its symmetric part; what follows by symmetry is not stored.
    beside = change.clone()
    beside[:, :rank] += change[:, :rank].mT.contiguous()
    solved = _solver(side, beside.mul_(0.5).to(dtype))
    if solved is None:
        return None
    rough, start = change.to(dtype), torch.zeros_like(side.sums)
    start[:rank] = change
    start = _skew(start, 0.5)
    generator, contraction, before, expected, error = torch.zeros_like(start), 0.0, torch.inf, 1.0, 0.0
    for outer in range(_OUTER):
        F = start
        if outer:
            F, error = _residual(side, start, (change, rough), generator, max(tolerance, 0.3 * expected))
        step, ratio = solved(F)
        if step is None:
            return None
        generator += step
        contraction = max(contraction, ratio)
        first, whole = (float(torch.linalg.vector_norm(one)) for one in (step, generator))
        if first == 0:
            return Turn(generator, "iteration", contraction)
        # What is left after a step: it times what it gained on the one before, or what a slow inner loop leaves.
        shrink = max(_GAIN, contraction**2, first / before)
        expected, before = first / whole * shrink, first
        if max(expected, error) <= tolerance:
            # Vectorised and remaining entries round differently, which leaves it skew to rounding only.
            return Turn(_skew(generator, 0.5), "iteration", contraction)
        if outer and expected * shrink ** (_OUTER - 1 - outer) > tolerance:
            return None  # at this pace it would not get there
    return None


def _residual(
    side: Side, start: Tensor, changes: tuple[Tensor, Tensor], generator: Tensor, enough: float
) -> tuple[Tensor, float]:
    """``F`` at a generator, from ``F`` at 0, and about how wrong its products are.

    They are small beside the rest of ``F``; where a relative error of ``enough`` allows it they are done in the dtype
    of the second of ``changes``.
    """
    rank, (change, rough) = side.rank, changes
    Q = generator.to(rough.dtype)
    first = (rough @ Q).to(change.dtype)
    # Factors and results are rounded, each by a quarter of eps in the root mean square.
    share = float(torch.linalg.vector_norm(first) / torch.linalg.vector_norm(change))
    error = 0.5 * torch.finfo(rough.dtype).eps * share
    if error > enough:
        Q, error = generator, 0.0
        first = change @ Q
    across = change - first
    moved = torch.empty_like(start)
    moved[:, :rank] = Q[:, :rank] @ across[:, :rank].to(Q.dtype)
    moved[:rank, rank:] = Q[:rank, :rank] @ across[:, rank:].to(Q.dtype)
    # Where the base has no weight the prior alone stands against it, and would magnify an error here.
    moved[rank:, rank:] = generator[rank:, :rank] @ across[:, rank:]
    moved[:rank] += first
    # Of the diagonal part of M, Q S + S Q is skew already and Q S Q is symmetric: no product is needed.
    return torch.addcmul(start, generator, side.sums, value=-1).sub_(_skew(moved, 0.5)), error


def _solver(side: Side, beside: Tensor) -> Callable[[Tensor], tuple[Tensor | None, float]] | None:
    """Solves ``X S + S X = F`` for a skew ``X`` to two digits, and says how fast; ``None`` where it cannot be done.

    The solution is ``None`` where it is not found, too.
    """
    if side.rank < beside.shape[-1]:
        return _wide_solver(side, beside)
    scales = side.scales
    fast = scales.to(beside.dtype)

    def image(parts: list[Tensor]) -> list[Tensor]:
        return [_skew((parts[0] * fast) @ beside).mul_(fast).add_(parts[0])]

    def solved(F: Tensor) -> tuple[Tensor | None, float]:
        found, slowest = _conjugate_gradients(image, [(F * scales).to(beside.dtype)], [1.0])
        return (found[0].to(F.dtype).mul_(scales) if found else None), slowest

    return solved


def _wide_solver(side: Side, beside: Tensor) -> Callable[[Tensor], tuple[Tensor | None, float]] | None:
    """The same where the base has directions of no weight: there ``S`` is ``mu I``, and their block is eliminated.

    With ``X = [[A, B], [-B^T, C]]`` and ``H`` beside the diagonal, ``C = (F_22 + B^T H - H^T B) / 2 mu``, so that only
    ``A`` and ``B`` are searched for. That leaves fewer numbers, and the square of the contraction.
    """
    rank, mu, dtype, work = side.rank, side.prior, beside.dtype, side.base.dtype
    H, inner = beside[:, rank:].contiguous(), beside[:, :rank].contiguous()
    wide = H.to(work)
    G = (wide @ wide.mT).div_(2 * mu) if mu else torch.full_like(side.gram, torch.inf)
    diagonal = side.sums[:rank, rank] - G.diagonal()  # S_jj + mu, less what C takes of it
    if not bool((diagonal > 0).all()):
        return None
    scale_a, scale_b = side.sums[:rank, :rank].rsqrt(), diagonal.rsqrt()[:, None]
    fast_a, fast_b = scale_a.to(dtype), scale_b.to(dtype)
    G.diagonal().zero_()
    coupled = (inner.to(work) - G).to(dtype)

    def image(parts: list[Tensor]) -> list[Tensor]:
        A, B = parts[0] * fast_a, parts[1] * fast_b
        U = B @ H.mT
        across = (A + U.mT.contiguous().mul_(1 / (2 * mu))) @ H
        top = torch.addmm(U, A, inner)
        across = torch.addmm(across, coupled, B)
        return [_skew(top).mul_(fast_a).add_(parts[0]), across.mul_(fast_b).add_(parts[1])]

    def solved(F: Tensor) -> tuple[Tensor | None, float]:
        F22 = F[rank:, rank:]
        across = torch.sub(F[:rank, rank:], (H @ F22.to(dtype)).to(work), alpha=1 / (2 * mu)).mul_(scale_b)
        left = [(F[:rank, :rank] * scale_a).to(dtype), across.to(dtype)]
        # B stands in X twice.
        found, slowest = _conjugate_gradients(image, left, [1.0, 2.0])
        if not found:
            return None, slowest
        A, B = found[0].to(work).mul_(scale_a), found[1].to(work).mul_(scale_b)
        X = torch.empty_like(F)
        X[:rank, :rank], X[:rank, rank:], X[rank:, :rank] = A, B, -B.mT.contiguous()
        X[rank:, rank:] = _skew((B.to(dtype).mT @ H).to(work)).add_(F22).div_(2 * mu)
        return X, slowest

    return solved


def _conjugate_gradients(
    image: Callable[[list[Tensor]], list[Tensor]], left: list[Tensor], weights: list[float]
) -> tuple[list[Tensor], float]:
    """The solution to two digits, as parts that count by ``weights`` in inner products; empty where there is none.

    The operator has been scaled so that its diagonal is the identity.
    """

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(w * float(torch.sum(x * y, dtype=torch.float32)) for w, x, y in zip(weights, a, b, strict=True))

    size = start = dot(left, left)
    found = [torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32)) for part in left]
    slowest = 0.0
    direction = [part.clone() for part in left]
    if start == 0:
        return found, 0.0
    for _ in range(_INNER):
        images = image(direction)
        curvature = dot(direction, images)
        if not curvature > 0:
            return [], 1.0  # the symmetric part of M is not positive: no rotation by small angles
        for total, part, rest, one in zip(found, direction, left, images, strict=True):
            total.add_(part, alpha=size / curvature)
            rest.sub_(one, alpha=size / curvature)
        before, size = size, dot(left, left)
        slowest = max(slowest, (size / before) ** 0.5)
        if size <= _GAIN**2 * start:
            return found, slowest
        for part, rest in zip(direction, left, strict=True):
            part.mul_(size / before).add_(rest)
    return [], slowest


def _skew(X: Tensor, factor: float = 1.0) -> Tensor:
    """``factor (X - X^T)``, in the memory of ``X``."""
    # Subtracting a transposed view takes five times as long as copying it first.
    return X.sub_(X.mT.contiguous()) if factor == 1 else X.sub_(X.mT.contiguous()).mul_(factor)


def _inner_dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.dtype == torch.float64 else fast_matmul_dtype(like.device)
