"""What anchors are like: their spectrum, whether they live where real hidden states do, and where their updates go."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.diagnostics.subspace import top_subspace
from orthokit.errors import NonFiniteError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, working_dtype
from orthokit.merging._called import Call
from orthokit.merging._common import check_range
from orthokit.merging.anchors import induced_update

__all__ = ["anchor_spectra", "projection_energy", "subspace_overlap", "update_projection"]

_ONTO = ("cone", "span")


def anchor_spectra(X: Float[Tensor, "*tokens d"]) -> Float[Tensor, " rank"]:
    r"""Singular values of all anchor tokens under each other, the largest set to 1.

    .. math:: \sigma_k(X) / \sigma_1(X),\quad X \in \mathbb R^{n \cdot tokens \times d}

    Args:
        X: Hidden states, shape ``(n, tokens, d)`` (or ``(rows, d)``), not all zero.

    Returns:
        Descending from 1, shape ``(min(n * tokens, d),)``, float32 or better.

    Raises:
        ShapeError, NonFiniteError: Not finite hidden states.
        OptionError: All zero.

    Example:
        >>> anchor_spectra(torch.diag(torch.tensor([4.0, 2.0])))
        tensor([1.0000, 0.5000])

    Numerics:
        One SVD, values only.

    References:
        K. Shi, Y. Wen, W. Liu, arXiv 2510.21223, section 4: construction grows a long tail.
    """
    values = torch.linalg.svdvals(_rows(X, "X"))
    if not float(values[0]):
        raise OptionError("X is zero and has no spectrum; construct the anchors first.")
    return values / values[0]


def subspace_overlap(
    X: Float[Tensor, "*tokens d"], H: Float[Tensor, "*real d"], *, rank: int | None = None, share: float = 0.2
) -> float:
    r"""How much of the leading directions of anchors lies in those of real hidden states.

    .. math:: \tfrac1k \lVert V_X^\top V_H \rVert_F^2

    with the top ``k`` right singular vectors of each: the mean squared cosine of their principal angles. Random
    subspaces have ``k/d``.

    Args:
        X: Anchors, shape ``(n, tokens, d)`` or ``(rows, d)``.
        H: Real hidden states at the same place, any number, last dimension ``d``.
        rank: ``k``, at most ``d`` and the rows of each; default ``share * d``, rounded, at least 1.
        share: Published 0.2.

    Returns:
        In [0, 1].

    Raises:
        ShapeError, NonFiniteError: Not finite, or of different width.
        OptionError: ``rank`` or ``share`` out of range.

    Example:
        >>> X = torch.diag(torch.tensor([3.0, 2.0, 0.1]))
        >>> round(subspace_overlap(X, X.flip(1), rank=2), 6)
        0.5

    Numerics:
        Two SVDs in float32 or better. Arbitrary where ``k`` cuts through equal singular values.

    References:
        K. Shi, Y. Wen, W. Liu, arXiv 2510.21223, section 4.
    """
    X, H = _rows(X, "X"), _rows(H, "H")
    if X.shape[1] != H.shape[1]:
        raise ShapeError(f"X and H must have one width; got {X.shape[1]} and {H.shape[1]}.")
    check_range("share", share, above=0, most=1)
    k = max(1, round(share * X.shape[1])) if rank is None else rank
    check_range("rank", k, least=1, most=min(*X.shape, *H.shape))
    work = torch.promote_types(X.dtype, H.dtype)
    A, B = (top_subspace(side.to(work), rank=k, side="right") for side in (X, H))
    return float(((A.mT @ B.to(A.device)).square().sum() / k).clamp(max=1))


def projection_energy(
    update: Float[Tensor, " parameters"],
    directions: Float[Tensor, "m parameters"],
    *,
    onto: Literal["cone", "span"] = "cone",
) -> float:
    r"""The share of an update's energy that lies in the cone, or the span, of some directions.

    .. math:: 1 - \min_{a} \lVert u - \textstyle\sum_j a_j d_j \rVert^2 / \lVert u \rVert^2,
              \quad a \ge 0 \text{ for the cone}

    Args:
        update: Flattened, not zero.
        directions: One a row; rows of zeros count for nothing.
        onto: ``"cone"`` (default), what steps on those examples can reach, or ``"span"``.

    Returns:
        In [0, 1].

    Raises:
        ShapeError: Lengths that differ.
        OptionError: An update that is zero.
        NonFiniteError: A NaN or an infinity.
        UnknownNameError: Unknown ``onto``.

    Example:
        >>> u, D = torch.tensor([1.0, -1.0]), torch.eye(2)
        >>> round(projection_energy(u, D), 6), round(projection_energy(u, D, onto="span"), 6)
        (0.5, 1.0)

    Numerics:
        float64 from products of directions scaled to length 1; directions that depend on others to 1e-6 of their length
        count as dependent. The cone by the active set method.

    References:
        C. Lawson, R. Hanson (1974), Solving least squares problems, chapter 23.
    """
    if onto not in _ONTO:
        raise unknown_name("set to project onto", onto, _ONTO)
    if update.ndim != 1 or directions.ndim != 2 or directions.shape[1] != len(update):
        raise ShapeError(
            f"need (parameters,) and (m, parameters); got {tuple(update.shape)}, {tuple(directions.shape)}."
        )
    for name, value in (("update", update), ("directions", directions)):
        check_finite(value, name=name)
    u, D = update.double(), directions.double()
    size = u.norm()
    if not float(size):
        raise OptionError("the update is zero and has no direction.")
    lengths = D.norm(dim=1)
    D = D[lengths > 0] / lengths[lengths > 0, None]
    if not len(D):
        return 0.0
    G, b = D @ D.mT, D @ (u / size)
    a = _solved(G, b) if onto == "span" else _not_negative(G, b)
    return float((b @ a).clamp(0, 1))  # |u|^2 - |u - D'a|^2 where a is optimal


def update_projection(
    block0: nn.Module,
    block1: nn.Module,
    X: Float[Tensor, "n tokens d"],
    H: Float[Tensor, "m real_tokens d"],
    *,
    onto: Literal["cone", "span"] = "cone",
    distance: Literal["cosine", "l2", "l1"] = "cosine",
    call: Call | None = None,
) -> float:
    """The share of the update induced by anchors that real hidden states could induce, too.

    :func:`projection_energy` of ``-g(X)`` against ``-g(h)`` for each real example ``h``, all parameters together.

    Args:
        block0: The base's block.
        block1: The expert's.
        X: Anchors.
        H: Hidden states of ``m`` real examples at the same place.
        onto: ``"cone"`` (default) or ``"span"``.
        distance: As for :func:`induced_update`.
        call: How a block is run on hidden states; default ``block(x)``.

    Returns:
        In [0, 1].

    Raises:
        OptionError: Anchors that induce no update.
        ShapeError, NonFiniteError, UnknownNameError: As :func:`induced_update` and :func:`projection_energy`.

    Example:
        >>> old, new = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> X = torch.eye(3)[:, None]
        >>> round(update_projection(old, new, X, X, distance="l2"), 4)
        1.0

    Numerics:
        ``m`` backward passes, and ``m`` copies of the block's gradient in memory (float64).

    References:
        K. Shi, Y. Wen, W. Liu, arXiv 2510.21223, section 4.
    """

    def flat(inputs: Tensor) -> Tensor:
        found = induced_update(block0, block1, inputs, distance=distance, call=call)
        return torch.cat([value.flatten() for value in found.values()])

    if not len(H):
        raise ShapeError(f"H must hold at least one example; got shape {tuple(H.shape)}.")
    return projection_energy(flat(X), torch.stack([flat(h[None]) for h in H]), onto=onto)


def _rows(X: Tensor, name: str) -> Tensor:
    if X.ndim < 2 or not X.numel():
        raise ShapeError(f"{name} must be hidden states (..., d), at least one; got shape {tuple(X.shape)}.")
    check_finite(X, name=name)
    return X.detach().reshape(-1, X.shape[-1]).to(working_dtype(X))


def _solved(G: Tensor, b: Tensor) -> Tensor:
    """The least squares coefficients; 1e-12 of squares is 1e-6 of lengths."""
    return torch.linalg.pinv(G, rtol=1e-12, hermitian=True) @ b


def _not_negative(G: Tensor, b: Tensor) -> Tensor:
    """The best coefficients ``>= 0``: add the direction that helps most, drop those that turn negative."""
    a, chosen = torch.zeros_like(b), torch.zeros_like(b, dtype=torch.bool)
    for _ in range(10 * len(b)):
        slope = (b - G @ a).masked_fill(chosen, -torch.inf)
        best = int(slope.argmax())
        if float(slope[best]) <= 1e-12:
            return a
        chosen[best] = True
        while bool(chosen.any()):
            s = torch.zeros_like(b)
            s[chosen] = _solved(G[chosen][:, chosen], b[chosen])
            if bool((s[chosen] > 0).all()):
                a = s
                break
            low = chosen & (s <= 0)
            back = (a[low] / (a[low] - s[low]).clamp(min=torch.finfo(a.dtype).tiny)).min()
            a = a + back * (s - a)
            chosen = chosen & (a > 1e-14)
            a = a * chosen
    raise NonFiniteError("the projection onto the cone did not settle; use onto='span', or fewer directions.")
