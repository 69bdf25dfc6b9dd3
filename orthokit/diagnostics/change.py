r"""What finetuning did to one matrix: how much it changed, how much of that is a rotation, of which rank it is.

Every number is taken against two things that a bare norm hides: the rounding of the files, below which nothing can be
said, and a random change of the same size, which also is half a rotation.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics._change_kinds import Evidence, find_kind, numerical_rank
from orthokit.diagnostics._change_parts import change_values, factor, free_rotation_share, rounding_errors, turn
from orthokit.diagnostics._change_record import WeightChange
from orthokit.diagnostics.energy import hyperspherical_energy
from orthokit.diagnostics.profiles import ThinSVD, weight_profiles
from orthokit.diagnostics.subspace import principal_angles
from orthokit.diagnostics.verdict import verdict
from orthokit.errors import DtypeError, OptionError, ShapeError
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["WeightChange", "random_rotation_fraction", "weight_change"]

# Matrices made by float32 arithmetic differ from exact ones by a few epsilon an entry, those made in float64 and
# decomposed here by more of their epsilon.
_ARITHMETIC = {torch.float32: 4.0, torch.float64: 32.0}
# The floor of rounding noise is where its largest singular value lies on average; one matrix scatters around it.
_ABOVE = 1.2
# Rows of an energy: all pairs of more would take longer than everything else together.
_ROWS = 4096


def random_rotation_fraction(out: int, width: int, *, rank: int | None = None) -> float:
    r"""The rotation fraction that a small random change of an ``out`` x ``in`` matrix has: what to compare with.

    .. math:: \frac{r (r-1)/2 + r (in - r)}{out \cdot in}, \qquad r = \mathrm{rank}(W_0)

    Args:
        out: Rows, ``>= 1``.
        width: Columns, ``>= 1``.
        rank: Of the base, ``0 <= rank <= min(out, in)``; default full.

    Returns:
        In [0, 1): near 1/2 for a square matrix, ``(in - 1) / (2 out)`` for a tall one, near 1 for a wide one.

    Raises:
        OptionError: A size below 1 or a rank out of range.

    Example:
        >>> round(random_rotation_fraction(384, 384), 3)
        0.499
        >>> round(random_rotation_fraction(32, 64), 3)  # nearly everything is "a rotation" of a wide matrix
        0.742

    Numerics:
        Expectation over changes with independent entries of one variance, to first order: exact as long as the change
        is small against the singular values of the base. Directions of the base below the size of the change cannot be
        turned that far, so the measured fraction is a little smaller.

    References:
        Orthogonal Model Merging, arXiv 2602.05943, for the decomposition; the formula is ours.
    """
    full = min(out, width)
    used = full if rank is None else rank
    if full < 1 or not 0 <= used <= full:
        raise OptionError(f"need out >= 1, in >= 1 and 0 <= rank <= min(out, in); got {out}, {width} and {rank}.")
    return free_rotation_share(out, width, used)


def weight_change(
    W0: Float[Tensor, "out in"],
    W: Float[Tensor, "out in"],
    *,
    rank: int = 8,
    dtype: torch.dtype | None = None,
    rounding: float | None = None,
    sigma0: Float[Tensor, " k"] | None = None,
    sigma: Float[Tensor, " k"] | None = None,
    energies: tuple[float, float] | None = None,
) -> WeightChange:
    r"""What finetuning did to one matrix, from how much it changed to the method it is consistent with.

    .. math::
        R = \arg\min_{R^\top R = I} \|W_0 R - W\|_F, \qquad
        \text{rotation fraction} = 1 - \frac{\|W_0 R - W\|_F^2}{\|W - W_0\|_F^2}, \qquad
        \min_R \|W_0 R - W\|_F^2 = \|W_0\|_F^2 + \|W\|_F^2 - 2 \|W_0^\top W\|_*

    Args:
        W0: Base, shape ``(out, in)``.
        W: Finetuned, same shape.
        rank: Dimension of the leading singular subspaces that are compared, ``>= 1``; default 8; at most the
            numerical rank of both is used.
        dtype: Format in which both are stored in their files, which sets the rounding noise; default that of the
            tensors. Pass it where tensors were widened on reading.
        rounding: Rms rounding error of one entry of ``W - W0``, ``>= 0``, in place of what ``dtype`` implies: for
            quantised files, the root of the sum of squares of both.
        sigma0: Singular values of ``W0``, shape ``(min(out, in),)``, if they are there already, so that this and other
            tables agree; default computed here.
        sigma: Singular values of ``W``.
        energies: Hyperspherical energies of ``W0`` and ``W``, if they are there already.

    Returns:
        :class:`WeightChange`; ``change.row()`` holds the columns of a table.

    Raises:
        ShapeError: Not two matrices of one shape, or without entries; singular values of another length.
        OptionError: ``rank`` below 1, a negative ``rounding``.
        DtypeError: Not real floating.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> W0, B, A = (torch.randn(*s, generator=g) for s in ((48, 64), (48, 2), (2, 64)))
        >>> change = weight_change(W0, W0 + 0.05 * B @ A)
        >>> change.kind, change.change_rank, change.adapter_rank
        ('lora', 2, 2)

    Numerics:
        All in float64. For float32 data and below, both matrices are decomposed through the smaller Gram matrix, which
        is at least as exact as a float32 SVD; through an SVD where the condition exceeds 1e5, or for float64 data. In
        all two eigen-decompositions with vectors, one without, and one SVD, each of a square matrix of the smaller
        side: about five times a float32 SVD of that matrix. A residual near 0 is taken of the matrices themselves,
        since the closed form cancels; it is right to about 1e-8 of the largest singular value where the condition
        exceeds 1e7, else to 1e-14. Memory: some eight times the matrix in float64.

        Noise: storing an entry errs by its spacing over the root of 12, of which both files have their share, and
        computing in float32 by a few epsilon. A singular value of ``W - W0`` counts if it is above 1.2 times the edge
        of such noise, ``max_i (row_i) + max_j (column_j)`` in norms of its standard deviations, which is
        ``rounding (sqrt(out) + sqrt(in))`` for entries of one size. An invariant (rows, spectrum, blocks) counts as
        kept if what breaks it is at most three times the noise and a tenth of the energy that a random change of the
        same size would put there, or a thousandth of that energy where it has at least 30 free numbers. Angles of
        subspaces mean little where ``sigma_rank`` and the next value are closer than ``||W - W0||``. Above 4096 rows
        the energy is that of 4096 evenly spaced ones, the same in both.

    References:
        Orthogonal Model Merging, arXiv 2602.05943 (Procrustes split; the rotation fraction of
        ``orthokit.merging`` compares the norm of the rotated part, this one the energy that the rotation removes);
        PEFT-Arena, arXiv 2605.28819 (profiles); Orthogonal Finetuning, arXiv 2306.07280; LoRA, arXiv 2106.09685. Tests
        and thresholds are ours.
    """
    _check(W0, W, rank, rounding, dtype, (sigma0, sigma))
    # MPS has no float64, and float32 Gram matrices are too rough.
    work = torch.float32 if W0.device.type == "mps" else torch.float64
    exact = torch.float64 in (W0.dtype, W.dtype) or work == torch.float32
    shape = (W0.shape[0], W0.shape[1])
    stored = str(dtype or W.dtype).removeprefix("torch.") if rounding is None else "these files"
    A0, A = W0.detach().to(work), W.detach().to(work)
    if torch.equal(A0, A):
        given = next((one for one in (sigma0, sigma) if one is not None), None)
        return _unchanged(A0, change_values(A0, exact=exact) if given is None else given.to(work), stored)
    base, tuned = factor(A0, exact=exact), factor(A, exact=exact, top=rank)
    before, after = (
        own.S if given is None else given.to(own.S).sort(descending=True).values
        for own, given in ((base, sigma0), (tuned, sigma))
    )
    size0 = float(torch.linalg.vector_norm(base.S))
    D = A - A0
    values = change_values(D, exact=exact)
    change = float(torch.linalg.vector_norm(values))
    noise, computed, floor = _noise(W0, W, dtype, rounding, float(torch.linalg.vector_norm(tuned.S)))
    found = turn(A0, A, base, tuned)
    used = int((floor + max(shape) * torch.finfo(work).eps * base.S[0] < base.S).sum())
    random = free_rotation_share(*shape, used)
    spectrum = float(torch.linalg.vector_norm(after - before))
    change_rank = numerical_rank(values, floor, noise, shape)
    kind = find_kind(
        Evidence(A0, A, D, base, values, change, noise, computed, floor, found.residual, random, spectrum, change_rank)
    )
    angles = _angles(base, tuned, rank)
    profiles = weight_profiles(W0.to(working_dtype(W0)), W, svd=ThinSVD(*(part.to(working_dtype(W0)) for part in base)))
    result = WeightChange(
        relative_change=_ratio(change, size0),
        spectrum_change=_ratio(spectrum, size0),
        energy_change=_energy_change(W0, W, energies),
        change_stable_rank=float(values.square().sum() / values[0].square()) if change > 0 else 0.0,
        change_rank=change_rank,
        rotation_fraction=_fraction(found.residual, change, size0),
        rotation_angle=_angle(found.chord, size0),
        rotation_residual=_ratio(found.residual, size0),
        block_size=kind.block_size,
        left_angle=angles[0],
        right_angle=angles[1],
        kind=kind.kind,
        verdict="",
        shape=shape,
        random_rotation=random if size0 > 0 else None,
        noise=_ratio(noise * math.sqrt(shape[0] * shape[1]), size0),
        stored=stored,
        scale=_ratio(float((A0 * A).sum()), size0**2),
        adapter_rank=kind.rank,
        singular_values=values.float(),
        base_singular_values=before.float(),
        tuned_singular_values=after.float(),
        retention_drift=(profiles.drift / base.S[0]).float() if size0 > 0 else profiles.drift.float(),
        adaptation=(profiles.adaptation / profiles.change).float() if change > 0 else profiles.adaptation.float(),
    )
    return replace(result, verdict=verdict(result)[1])


def _unchanged(A: Tensor, sigma: Tensor, stored: str) -> WeightChange:
    """The record of a matrix that is the same bit for bit, without a decomposition."""
    there = bool(sigma.numel() and sigma.max() > 0)
    nothing = torch.zeros(len(sigma))
    values = sigma.sort(descending=True).values.float()
    zero = 0.0 if there else None
    used = int((sigma > max(A.shape) * torch.finfo(A.dtype).eps * sigma.max()).sum()) if there else 0
    result = WeightChange(
        relative_change=zero,
        spectrum_change=zero,
        energy_change=0.0 if A.shape[0] > 1 else None,
        change_stable_rank=0.0,
        change_rank=0,
        rotation_fraction=None,
        rotation_angle=zero,
        rotation_residual=zero,
        block_size=None,
        left_angle=zero,
        right_angle=zero,
        kind="unchanged",
        verdict="",
        shape=(A.shape[0], A.shape[1]),
        random_rotation=free_rotation_share(A.shape[0], A.shape[1], used) if there else None,
        noise=zero,
        stored=stored,
        scale=1.0 if there else None,
        adapter_rank=None,
        singular_values=nothing,
        base_singular_values=values,
        tuned_singular_values=values,
        retention_drift=nothing,
        adaptation=nothing,
    )
    return replace(result, verdict=verdict(result)[1])


def _noise(
    W0: Tensor, W: Tensor, dtype: torch.dtype | None, rounding: float | None, size: float
) -> tuple[float, float, float]:
    """Rms noise of an entry of ``W - W0``, its arithmetic part, and the largest singular value of such noise.

    ``size`` is the Frobenius norm of ``W``.
    """
    out, width = W.shape
    if rounding is None:
        both = [rounding_errors(part.to(working_dtype(part)), dtype or part.dtype) for part in (W0, W)]
        # Norms and not sums of squares, which leave the range of float32 where the weights are still far inside.
        rows, columns = (
            torch.hypot(*(torch.linalg.vector_norm(part, dim=dim, dtype=torch.float64) for part in both))
            for dim in (1, 0)
        )
        stored = float(torch.linalg.vector_norm(rows)) / math.sqrt(out * width)
        # Entries of very different size have noise of very different size: a heavy row carries its own.
        edge = float(rows.max() + columns.max())
    else:
        stored, edge = rounding, rounding * (math.sqrt(out) + math.sqrt(width))
    # Computed no better than the least exact of the two formats it was kept in, and never below float32.
    made = torch.float64 if {W0.dtype, W.dtype, dtype or W.dtype} == {torch.float64} else torch.float32
    computed = _ARITHMETIC[made] * torch.finfo(made).eps * size / math.sqrt(out * width)
    return math.hypot(stored, computed), computed, _ABOVE * (edge + computed * (math.sqrt(out) + math.sqrt(width)))


def _angles(base: ThinSVD, tuned: ThinSVD, rank: int) -> tuple[float | None, float | None]:
    """Largest principal angles of the leading left and right subspaces, in degrees."""
    tiny = torch.finfo(base.S.dtype).eps * max(base.U.shape[0], base.Vh.shape[1])
    usable = [int((tiny * part.S[0] < part.S).sum()) for part in (base, tuned)]
    r = min(rank, *usable)
    if r < 1:
        return None, None
    left = principal_angles(base.U[:, :r], tuned.U[:, :r])[-1]
    right = principal_angles(base.Vh[:r].mT, tuned.Vh[:r].mT)[-1]
    return math.degrees(float(left)), math.degrees(float(right))


def _energy_change(W0: Tensor, W: Tensor, energies: tuple[float, float] | None) -> float | None:
    if energies is not None:
        return energies[1] - energies[0]
    rows = W.shape[0]
    if rows < 2:
        return None
    if rows > _ROWS:
        chosen = torch.linspace(0, rows - 1, _ROWS, device=W.device).round().long()
        W0, W = W0[chosen], W[chosen]
    before, after = (hyperspherical_energy(part.detach()).double() for part in (W0, W))
    return float(after - before)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _fraction(residual: float, change: float, size0: float) -> float | None:
    if size0 == 0 or change == 0:
        return None
    return min(1.0, max(0.0, 1 - (residual / change) ** 2))


def _angle(chord: float, size0: float) -> float | None:
    return math.degrees(2 * math.asin(min(1.0, chord / (2 * size0)))) if size0 > 0 else None


def _check(
    W0: Tensor,
    W: Tensor,
    rank: int,
    rounding: float | None,
    dtype: torch.dtype | None,
    given: tuple[Tensor | None, Tensor | None],
) -> None:
    for name, part in (("W0", W0), ("W", W)):
        check_matrix(part, name=name)
        if part.is_complex():
            raise DtypeError(f"{name} must be real; got {part.dtype}.")
        check_finite(part, name=name)
    if W0.shape != W.shape or W.ndim != 2 or 0 in W.shape:
        raise ShapeError(
            f"W0 and W must be matrices of one shape with at least one entry; got {tuple(W0.shape)} and "
            f"{tuple(W.shape)}. Pass one matrix of a batch at a time."
        )
    for name, values in zip(("sigma0", "sigma"), given, strict=True):
        if values is not None and values.shape != (min(W.shape),):
            raise ShapeError(f"{name} must hold all {min(W.shape)} singular values; got shape {tuple(values.shape)}.")
    if rank < 1:
        raise OptionError(f"rank must be an integer >= 1; got {rank}.")
    if rounding is not None and not rounding >= 0:
        raise OptionError(f"rounding must be a number >= 0, or None to follow dtype; got {rounding}.")
    if dtype is not None and not dtype.is_floating_point:
        raise DtypeError(f"dtype must be a floating format; got {dtype}. For integer codes pass rounding=.")
