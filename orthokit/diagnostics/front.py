r"""The front of a trade-off: which points no other point beats, and how much of the plane they cover."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor

from orthokit.errors import DtypeError, NonFiniteError, ShapeError

__all__ = ["hypervolume", "pareto_front"]


def pareto_front(points: Num[Tensor, "points axes"]) -> Bool[Tensor, " points"]:
    r"""Which points are on the Pareto front, larger being better on every axis.

    A point is on the front unless another one is at least as good on all axes and better on one:

    .. math:: i \in \text{front} \iff \nexists\, j:\ x_j \ge x_i \text{ on all axes and } x_j > x_i \text{ on one}

    Args:
        points: Shape ``(N, axes)``, ``axes >= 1``; for what should be small, pass its negative.

    Returns:
        Boolean mask, shape ``(N,)``. Points that are equal on all axes are all on the front or all off it.

    Raises:
        ShapeError: Not a table of points.
        DtypeError: ``points`` is complex.
        NonFiniteError: A NaN or an infinity: a run that diverged is no point.

    Example:
        >>> pareto_front(torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 1.0], [3.0, 0.0]])).tolist()
        [True, True, False, True]

    Numerics:
        Comparisons only, in the dtype of ``points``. ``O(N log N)`` on two axes, ``O(N^2 axes)`` on more.

    References:
        S. Huang et al. (2026), PEFT-Arena, arXiv 2605.28819, for (target, general) scores of fine-tuned models.
    """
    x = _checked(points)
    if x.shape[1] != 2:
        better = (x[None] >= x[:, None]).all(-1) & (x[None] > x[:, None]).any(-1)
        return ~better.any(1)
    # On two axes only two rivals matter: the highest point level with it, and the highest one further right.
    levels, place = x[:, 0].unique(return_inverse=True)
    highest = x.new_full(levels.shape, -torch.inf).scatter_reduce(0, place, x[:, 1], "amax")
    right = torch.cat([highest[1:], highest.new_full((1,), -torch.inf)]).flip(0).cummax(0).values.flip(0)
    right = right[: len(levels)]
    return (x[:, 1] >= highest[place]) & (x[:, 1] > right[place])


def hypervolume(
    points: Num[Tensor, "points 2"], *, reference: Num[Tensor, 2] | tuple[float | int, float | int]
) -> Shaped[Tensor, ""]:
    r"""The area that the points dominate above a reference point: one number for a whole front.

    .. math:: \mathrm{area}\Big(\bigcup_i\, [r_1, x_{i1}] \times [r_2, x_{i2}]\Big)

    Args:
        points: Shape ``(N, 2)``, larger is better on both axes; points not above the reference add nothing.
        reference: ``(r_1, r_2)``, the worst that counts, such as (target score of the base model, 0).

    Returns:
        A number ``>= 0``, 0 without points; float64 for float64 input, else float32.

    Raises:
        ShapeError: Not two axes: the area is exact, and only in the plane.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> hypervolume(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), reference=(0.0, 1.0)).item()
        3.0

    Numerics:
        A sum over steps of the staircase; ``O(N log N)``.

    References:
        E. Zitzler, L. Thiele (1998), Multiobjective optimization using evolutionary algorithms.
    """
    x = _checked(points)
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    r = torch.as_tensor(reference, dtype=x.dtype, device=x.device)
    if x.shape[-1] != 2 or r.shape != (2,):
        raise ShapeError(f"the area needs two axes and a reference of 2 numbers; got {x.shape[-1]} and {len(r)}.")
    if not bool(r.isfinite().all()):
        raise NonFiniteError(f"the reference must be finite; got {r.tolist()}.")
    above = (x - r).clamp(min=0)
    above = above[above[:, 0].argsort(descending=True)]
    tops = above[:, 1].cummax(0).values if len(above) else above[:, 1]
    # Between one abscissa and the next smaller one the staircase is as high as the best point to the right.
    widths = above[:, 0] - torch.cat([above[1:, 0], above.new_zeros(1)])[: len(above)]
    return (widths * tops).sum()


def _checked(points: Tensor) -> Float[Tensor, "points axes"]:
    if points.ndim != 2 or points.shape[1] < 1:
        raise ShapeError(f"points must be a table (N, axes) with axes >= 1; got shape {tuple(points.shape)}.")
    if points.is_complex():
        raise DtypeError(f"points must be real to be compared; got {points.dtype}.")
    x = points if points.is_floating_point() else points.double()
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(1).sum())
        raise NonFiniteError(f"points must be finite; {bad} of {len(x)} are not. Leave runs that diverged out.")
    return x
