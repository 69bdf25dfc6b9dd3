r"""One rotation out of several: the mean direction of their generators at the mean angle, and the geodesic mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.linalg.maps import cayley, exp, inverse_cayley

__all__ = [
    "INTENSITIES",
    "MergedGenerator",
    "merge_generators",
    "merge_rotations",
    "normalised",
    "rotation_log",
    "rotation_mean",
]

INTENSITIES = ("mean", "median", "max")
# A step of the mean below this is rounding of the logarithms; it is reached in some ten steps.
_SETTLED, _MOST_STEPS = 1e-12, 200


class MergedGenerator(NamedTuple):
    """What :func:`merge_generators` returns.

    Args:
        generator: The merged generator, shape ``(..., b, b)``.
        norms: Frobenius norm of each one that went in, shape ``(n,)`` or ``(n, ...)``.
        correction: By how much their mean was made longer, as asked for: ``>= 1`` for ``intensity="mean"``, and without
            bound where they oppose each other. Shape ``()`` or ``(...)``.
        clipped: Whether ``correction`` was above ``clip``, so that ``generator`` is shorter than asked for.
    """

    generator: Tensor
    norms: Tensor
    correction: Tensor
    clipped: Tensor


def merge_generators(
    generators: Sequence[Float[Tensor, "*batch b b"]] | Float[Tensor, "n *batch b b"],
    *,
    weights: Sequence[float] | None = None,
    intensity: str = "mean",
    clip: float = 10.0,
    joint: bool = True,
) -> MergedGenerator:
    r"""One skew generator out of several: the direction of their mean, at their mean length.

    .. math:: Q = c\,\bar Q, \qquad \bar Q = \frac{\sum_i w_i Q_i}{\sum_i w_i}, \qquad
        c = \min\Bigl(c_{max},\ \frac{\mathrm{mean}_i \|Q_i\|_F}{\|\bar Q\|_F}\Bigr)

    A plain mean of generators that point apart is shorter than each of them; ``c`` makes up for it.

    Args:
        generators: One or more of one shape ``(..., b, b)``, in a list or stacked.
        weights: One each, ``>= 0`` and not all 0; default: all 1.
        intensity: Length of the result: ``"mean"`` (default, weighted), ``"median"`` or ``"max"`` of theirs.
        clip: Largest ``c``, ``>= 1``; default 10. Opposed generators have a mean near 0 and a ``c`` near infinity.
        joint: Whether a batch is the blocks of one rotation, with one length and one ``c`` (default), or many rotations
            with one each.

    Returns:
        :class:`MergedGenerator`.

    Raises:
        OptionError: No generator, another number of weights, weights that are negative or all 0, ``clip`` below 1.
        ShapeError: Shapes that differ.
        UnknownNameError: Unknown ``intensity``.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Q = [A - A.mT for A in torch.randn(3, 5, 5, generator=g)]
        >>> merged = merge_generators(Q)
        >>> mean = sum(q.norm() for q in Q) / 3
        >>> bool(torch.allclose(merged.generator.norm(), mean)), bool(merged.correction >= 1)
        (True, True)

    Numerics:
        Norms in at least float32. Exactly opposed generators give 0 at any ``clip``.

    References:
        Yang, Shi, Liu (2026), Orthogonal Model Merging, arXiv 2602.05943. There ``c`` has no bound, and a sum shorter
        than 1e-8 gives 0; here ``c`` is clipped and reported.
    """
    given = list(generators)
    if not given:
        raise OptionError("there must be at least one generator; got none.")
    shapes = {tuple(Q.shape) for Q in given}
    if len(shapes) > 1:
        raise ShapeError(f"generators must have one shape; got {sorted(shapes)}. Merge blocks of one size.")
    if intensity not in INTENSITIES:
        raise unknown_name("intensity", intensity, INTENSITIES)
    if not 1 <= clip < float("inf"):
        raise OptionError(f"clip must be a finite number at least 1; got {clip!r}.")
    shares = normalised(weights, len(given))
    dims = tuple(range(given[0].ndim)) if joint else (-2, -1)
    norms = torch.stack([torch.linalg.vector_norm(_wide(Q), dim=dims) for Q in given])
    mean = _wide(given[0]) * shares[0]
    for Q, share in zip(given[1:], shares[1:], strict=True):
        mean.add_(_wide(Q), alpha=share)
    wanted = _intensity(norms, shares, intensity)
    length = torch.linalg.vector_norm(mean, dim=dims)
    # Rotations by no angle at all need no correction.
    correction = torch.where(wanted == 0, torch.ones_like(wanted), wanted / length)
    factor = correction.clamp(max=clip)
    factor = factor if joint else factor[..., None, None]
    return MergedGenerator(mean.mul_(factor).to(given[0].dtype), norms, correction, correction > clip)


def merge_rotations(
    rotations: Sequence[Float[Tensor, "*batch b b"]] | Float[Tensor, "n *batch b b"],
    *,
    weights: Sequence[float] | None = None,
    intensity: str = "mean",
    clip: float = 10.0,
    joint: bool = True,
) -> Float[Tensor, "*batch b b"]:
    r"""One rotation out of several, ``R = cayley(Q)`` with ``Q`` merged from ``Q_i = cayley^{-1}(R_i)``.

    Args:
        rotations: One or more of one shape ``(..., b, b)``, orthogonal without eigenvalue -1.
        weights: As in :func:`merge_generators`, like the rest.
        intensity: ``"mean"`` (default), ``"median"`` or ``"max"``.
        clip: Largest correction; default 10.
        joint: Whether a batch is the blocks of one rotation; default ``True``.

    Returns:
        An orthogonal matrix or batch, shape ``(..., b, b)``.

    Raises:
        OptionError: A rotation by half a turn or a reflection, and as :func:`merge_generators`.
        ShapeError: As :func:`merge_generators`.

    Example:
        >>> from orthokit.linalg import cayley
        >>> turn = lambda t: cayley(torch.tensor([[0.0, t], [-t, 0.0]]))
        >>> bool(torch.allclose(merge_rotations([turn(0.1), turn(0.3)]), turn(0.2), atol=1e-6))
        True

    Numerics:
        Orthogonal to rounding, since a Cayley transform is. One solve per rotation, one for the result.

    References:
        As :func:`merge_generators`.
    """
    generators = [inverse_cayley(R) for R in rotations]
    return cayley(merge_generators(generators, weights=weights, intensity=intensity, clip=clip, joint=joint).generator)


def rotation_log(R: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    r"""The skew logarithm of a rotation, with angles below half a turn: ``exp(rotation_log(R)) = R``.

    Args:
        R: Orthogonal with determinant 1 and without eigenvalue -1, shape ``(..., b, b)``.

    Returns:
        Skew, in at least float32.

    Raises:
        OptionError: A plane is turned by half a turn to rounding, where the shortest way is not unique.
        ShapeError: ``R`` is not square.
        NonFiniteError: ``R`` holds a NaN or an infinity.

    Example:
        >>> A = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)
        >>> torch.allclose(rotation_log(exp(A)), A)
        True

    Numerics:
        ``2 arctan`` of the inverse Cayley transform, on the eigenvalues of the Hermitian ``i Q``.
    """
    Q = inverse_cayley(R)
    h, U = torch.linalg.eigh(1j * (Q - Q.mT) / 2)
    # Q = U diag(-i h) U^H, and the logarithm of a Cayley transform is 2 arctan of the generator.
    A = ((U * (-2j * h.atan()).unsqueeze(-2)) @ U.mH).real
    return (A - A.mT) / 2


def rotation_mean(R: Float[Tensor, "n *batch b b"], weights: Sequence[float]) -> Float[Tensor, "*batch b b"]:
    r"""The geodesic mean of rotations: the ``M`` that minimises ``sum_i w_i d(M, R_i)^2`` near them.

    Args:
        R: Two or more rotations or batches of them, shape ``(n, ..., b, b)``.
        weights: One each, ``>= 0``, with sum 1.

    Returns:
        Shape ``(..., b, b)``.

    Raises:
        OptionError: Two of them are half a turn apart, or so far that the iteration does not settle.

    Example:
        >>> Q = torch.tensor([[0.0, 0.5], [-0.5, 0.0]], dtype=torch.float64)
        >>> torch.allclose(rotation_mean(torch.stack([cayley(Q), cayley(-Q)]), [0.5, 0.5]), torch.eye(2).double())
        True

    Numerics:
        In closed form for two. For more a fixed-point iteration with step 1 from the mean of the logarithms, which
        contracts by a factor of the order of the squared angle between the rotations; unique if they are within a
        quarter turn of the mean.
    """
    if len(R) == 1:
        return R[0]
    if len(R) == 2:
        return R[0] @ exp(weights[1] * rotation_log(R[0].mT @ R[1]))
    w = R.new_tensor(weights).view(-1, *[1] * (R.ndim - 1))
    mean = exp((w * rotation_log(R)).sum(0))
    for _ in range(_MOST_STEPS):
        step = (w * rotation_log(mean.mT @ R)).sum(0)
        mean = mean @ exp(step)
        if float(step.abs().max()) <= _SETTLED:
            return mean
    raise OptionError("the rotations are too far apart for a geodesic mean; average their generators instead.")


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1."""
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise OptionError(f"weights must hold one number each; got {len(values)} for {count} generators.")
    if not (min(values) >= 0 and 0 < sum(values) < float("inf")):
        raise OptionError(f"weights must be at least 0, finite, and not all 0; got {values}.")
    return [value / sum(values) for value in values]


def _intensity(norms: Tensor, shares: Sequence[float], intensity: str) -> Tensor:
    # Those that do not count are no part of it.
    counted = norms[[share > 0 for share in shares]]
    if intensity == "max":
        return counted.amax(0)
    if intensity == "median":
        return counted.quantile(0.5, dim=0)
    return sum(share * norm for share, norm in zip(shares, norms, strict=True))  # type: ignore[return-value]


def _wide(Q: Tensor) -> Tensor:
    return Q if Q.dtype == torch.float64 else Q.float()
