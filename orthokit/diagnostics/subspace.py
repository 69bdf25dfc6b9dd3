r"""Angles between subspaces: how far the leading directions of one matrix are from those of another.

Measure momentum or gradients, never an orthogonalised matrix: all its singular values are 1, so "its top-r subspace" is
an arbitrary choice of the SVD routine.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics.spectrum import check_rank
from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["principal_angles", "subspace_error", "top_subspace"]

_SIDES = ("left", "right")


def principal_angles(U: Float[Tensor, "*#batch n k"], V: Float[Tensor, "*#batch n l"]) -> Float[Tensor, "*result"]:
    r"""The principal angles between the spans of the columns of ``U`` and ``V``, smallest first.

    .. math:: \cos\theta_k = \sigma_k(U^\top V) \text{ for orthonormal bases}

    Args:
        U: Basis or batch of bases, shape ``(..., n, k)``, linearly independent columns; orthonormalised here.
        V: Same, shape ``(..., n, l)``; leading dimensions broadcast.

    Returns:
        Angles in radians, in ``[0, pi/2]``, ascending, shape ``(..., min(k, l))``.

    Raises:
        ShapeError: Different ``n``, or more columns than rows.
        OptionError: Linearly dependent columns.
        NonFiniteError: A NaN or an infinity.

    Example:
        A tilt of 1e-6 is resolved, although its cosine rounds to 1 in float32:

        >>> U = torch.tensor([[1.0], [0.0], [0.0]])
        >>> V = torch.tensor([[1.0], [1e-6], [0.0]])
        >>> abs(principal_angles(U, V).item() / 1e-6 - 1) < 1e-3
        True

    Numerics:
        Angles below pi/4 come from their sines, the singular values of ``(I - U U^T) V``, larger ones from cosines, so
        each has an absolute error of a few epsilon. float16 and bfloat16 are computed in float32.

    References:
        A. Bjorck, G. Golub (1973), Numerical methods for computing angles between linear subspaces; A. Knyazev,
        M. Argentati (2002), Principal angles between subspaces in an A-based scalar product, algorithm 3.1.
    """
    U, V = (_orthonormal(B, name) for B, name in ((U, "U"), (V, "V")))
    if U.shape[-2] != V.shape[-2]:
        raise ShapeError(f"U and V must have as many rows; got {tuple(U.shape)} and {tuple(V.shape)}.")
    if U.shape[-1] < V.shape[-1]:
        U, V = V, U
    cross = U.mT @ V
    cosines = torch.linalg.svdvals(cross).clamp(max=1)
    sines = torch.linalg.svdvals(V - U @ cross).clamp(max=1).flip(-1)
    return torch.where(cosines > math.sqrt(0.5), torch.asin(sines), torch.acos(cosines))


def top_subspace(
    X: Float[Tensor, "*batch m n"], *, rank: int, side: Literal["left", "right"] = "left"
) -> Float[Tensor, "*batch d rank"]:
    r"""An orthonormal basis of the span of the leading singular vectors of ``X``.

    Args:
        X: Matrix or batch, shape ``(..., m, n)``.
        rank: Number of leading directions, ``1 <= rank <= min(m, n)``.
        side: ``"left"`` (default): output directions, ``d = m``; ``"right"``: input directions, ``d = n``.

    Returns:
        Shape ``(..., d, rank)``, float32 or better. Unique as a subspace only if ``sigma_rank > sigma_{rank+1}``.

    Raises:
        OptionError: ``rank`` out of range.
        UnknownNameError: Unknown side.
        ShapeError: Fewer than two dimensions.
        NonFiniteError: ``X`` holds a NaN or an infinity.

    Example:
        >>> top_subspace(torch.diag(torch.tensor([1.0, 5.0])), rank=1).abs().T.tolist()
        [[0.0, 1.0]]
    """
    check_matrix(X, name="X")
    check_finite(X, name="X")
    check_rank(rank, X)
    if side not in _SIDES:
        raise unknown_name("side", side, _SIDES)
    U, _, Vh = torch.linalg.svd(X.to(working_dtype(X)), full_matrices=False)
    return U[..., :rank] if side == "left" else Vh[..., :rank, :].mT


def subspace_error(
    X: Float[Tensor, "*#batch m n"],
    Y: Float[Tensor, "*#batch m n"],
    *,
    rank: int,
    side: Literal["left", "right"] = "left",
) -> Float[Tensor, "*result"]:
    r"""The sine of the largest angle between the top-``rank`` singular subspaces of ``X`` and ``Y``.

    .. math:: \|\sin\Theta\|_2 = \|(I - U_X U_X^\top) U_Y\|_2

    Args:
        X: Matrix or batch, shape ``(..., m, n)``: a gradient or momentum buffer (not its orthogonalised direction).
        Y: Same; leading dimensions broadcast. Usually the signal.
        rank: Dimension of the subspaces, ``1 <= rank <= min(m, n)``.
        side: ``"left"`` (default) or ``"right"`` singular vectors.

    Returns:
        Shape ``(...)``, in [0, 1]: 0 for equal subspaces, 1 if a direction of one is orthogonal to the other.

    Raises:
        ShapeError: Matrices of different shape.
        OptionError: ``rank`` out of range.
        UnknownNameError: Unknown side.
        NonFiniteError: A NaN or an infinity.

    Example:
        >>> X = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> subspace_error(X, X + 0.5 * torch.eye(3), rank=2).item() < 1e-6
        True

    Numerics:
        Two SVDs in float32 or better; absolute error a few epsilon times ``sigma_1 / (sigma_rank - sigma_{rank+1})``.

    References:
        P.-A. Wedin (1972), Perturbation bounds in connection with singular value decomposition.
    """
    if X.shape[-2:] != Y.shape[-2:]:
        raise ShapeError(f"X and Y must hold matrices of one shape; got {tuple(X.shape)} and {tuple(Y.shape)}.")
    work = torch.promote_types(X.dtype, Y.dtype)
    return principal_angles(
        top_subspace(X.to(work), rank=rank, side=side), top_subspace(Y.to(work), rank=rank, side=side)
    )[..., -1].sin()


def _orthonormal(B: Tensor, name: str) -> Tensor:
    check_matrix(B, name=name)
    check_finite(B, name=name)
    n, k = B.shape[-2:]
    if B.is_complex():
        raise DtypeError(f"{name} must be real; got {B.dtype}.")
    if not 1 <= k <= n:
        raise ShapeError(f"{name} must have between 1 and {n} columns of length {n}; got shape {tuple(B.shape)}.")
    work = B.to(working_dtype(B))
    Q, R = torch.linalg.qr(work)
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    if bool((diagonal.amin(-1) <= n * torch.finfo(R.dtype).eps * torch.linalg.matrix_norm(work)).any()):
        raise OptionError(f"the columns of {name} must be linearly independent; remove those that depend on others.")
    return Q
