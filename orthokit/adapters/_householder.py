r"""Products of Householder reflections in compact form, ``H_1 ... H_r = I - V T V^T``."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthokit.adapters._rotating import plain_autograd

__all__ = ["compact_factor", "half_turn_gap", "plane_reflections", "reflect_rows"]


def compact_factor(G: Float[Tensor, "r r"], strength: float = 1.0) -> Float[Tensor, "r r"]:
    r"""``T`` with ``C(s Q) = I - V T V^T``, where ``C(Q) = H_1 ... H_r``; ``G = V^T V``, unit columns.

    With ``S`` the skew matrix that has the upper triangle of ``G``, ``Q = -V S^{-1} V^T`` and
    ``T = 2 s (S + s G)^{-1}``. For ``s = 1`` the sum is twice the upper triangle with halves on the diagonal: the
    known formula, which needs no ``Q`` and holds for odd ``r`` as well.

    Args:
        G: Gram matrix of the unit vectors.
        strength: ``s``, not 0.
    """
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    upper = G.triu(1)
    if strength == 1:
        return torch.linalg.solve_triangular(upper + eye / 2, eye, upper=True)
    S = upper - upper.mT
    return 2 * strength * torch.linalg.solve_ex(S + strength * G, eye)[0]


@torch.no_grad()
def half_turn_gap(G: Float[Tensor, "r r"]) -> float:
    """The smallest singular value of ``S``: 0 exactly where the product has an eigenvalue -1."""
    upper = G.double().triu(1)
    return float(torch.linalg.svdvals(upper - upper.mT)[-1])


@torch.no_grad()
def plane_reflections(Q: Float[Tensor, "m m"]) -> Float[Tensor, "r m"]:
    r"""Vectors ``u_1, ..., u_r`` with ``H_1 ... H_r = C(Q)``, two for each plane that the skew ``Q`` turns.

    In the plane of orthonormal ``p, q`` with ``Q p = theta q`` the transform turns by ``2 arctan(theta)``, which are
    the reflections at ``p`` and then at ``p + theta q``. A QR decomposition of ``C(Q)`` gives reflections as well, but
    where a column is near that of the identity their vectors are differences that cancel.

    Args:
        Q: Skew, in float64.

    Returns:
        Unit vectors in rows; ``r`` is even and at most ``m``.
    """
    h, U = torch.linalg.eigh(1j * (Q - Q.mT) / 2)
    # A plane with an angle below the rounding of the others is not told apart from those at rest.
    turned = h > len(Q) * torch.finfo(Q.dtype).eps * h.abs().max()
    theta, u = h[turned], U[:, turned].mT * math.sqrt(2)
    p, q = u.real, u.imag
    a = (p + theta[:, None] * q) / (1 + theta.square()).sqrt()[:, None]
    return torch.stack([a, p], dim=1).flatten(0, 1)


def reflect_rows(
    x: Float[Tensor, "*rows n"], A: Float[Tensor, "n r"], B: Float[Tensor, "r n"]
) -> Float[Tensor, "*rows n"]:
    """``x - (x A) B``."""
    if plain_autograd():
        return x - (x @ A) @ B
    return _Reflect.apply(x, A, B)  # type: ignore[no-any-return]


class _Reflect(torch.autograd.Function):
    """Keeps the rows and their few coefficients; the identity is added inside the products, not beside them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ A
        ctx.save_for_backward(rows, inner, A, B)
        return torch.addmm(rows, inner, B, alpha=-1).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, inner, A, B = ctx.saved_tensors
        g = gradient.reshape(rows.shape)
        back = g @ B.mT
        of_x = torch.addmm(g, back, A.mT, alpha=-1).view(gradient.shape) if ctx.needs_input_grad[0] else None
        of_A = -(rows.mT @ back) if ctx.needs_input_grad[1] else None
        of_B = -(inner.mT @ g) if ctx.needs_input_grad[2] else None
        return of_x, of_A, of_B
