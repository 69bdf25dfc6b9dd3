"""The iteration behind ``orthogonalize``: odd polynomials of a matrix by products alone, twice.

``iterate`` is written for speed: two buffers in turn, scalar factors folded into the small Gram-sized matrix, and pure
products (on CPUs one that also adds a third matrix takes a quarter longer). ``iterate_differentiable`` is the same
arithmetic without a write in place, for autograd and for reading; a test ties the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthokit.linalg._workspace import Workspace
from orthokit.linalg.coefficients import Triple

__all__ = ["SCALINGS", "iterate", "iterate_differentiable"]

SCALINGS = ("frobenius", "schatten", "spectral", "aol")

# Adaptive polish ends when the root mean square of s^2 - 1 is within this many units of rounding of the products.
_SETTLED = 2.0
_MOST_POLISH = 4
# Power steps of the spectral scaling. They approach the norm from below, hence the headroom.
_POWER_STEPS, _POWER_HEADROOM = 8, 1.1
# From which side on, and with which share of the constant left, a quadratic is evaluated as a square.
_LARGE, _KEPT = 128, 0.15


def iterate_differentiable(
    X: Tensor, table: list[Triple], *, polish: int | None, headroom: float, eps: float, scaling: str
) -> Tensor:
    """What :func:`iterate` computes, step by step as the formulas say it."""
    tall = X.shape[-2] > X.shape[-1]
    X = X.mH if tall else X
    factor = _factor(X @ X.mH, scaling, headroom=headroom, eps=eps)
    X = factor.to(X.dtype) * X
    for a, b, c in table:
        A = X @ X.mH
        X = a * X + (b * A + c * A @ A) @ X
    for _ in range(_MOST_POLISH if polish is None else polish):
        residual = X @ X.mH - torch.eye(X.shape[-2], dtype=X.dtype, device=X.device)
        if polish is None and _settled(residual):
            break
        X = X - 0.5 * residual @ X
    return X.mH if tall else X


@torch.no_grad()
def iterate(
    X: Tensor,
    table: list[Triple],
    *,
    polish: int | None,
    headroom: float,
    eps: float,
    scaling: str,
    overwrite: bool,
    workspace: Workspace | None = None,
) -> Tensor:
    """Run the rows of ``table``, then ``polish`` cubic steps (``None``: until the residual has settled, at most 4).

    Args:
        X: ``(batch, m, n)``, not float16 (whose squares leave its range); the caller has validated everything.
        table: Coefficients of the quintic steps.
        polish: Cubic steps after them.
        headroom: Factor by which the starting norm is taken too large.
        eps: Smallest norm that is divided by.
        scaling: One of :data:`SCALINGS`.
        overwrite: Whether ``X`` may serve as a buffer.
        workspace: Where the other buffers come from; with one, the result may lie in it.
    """
    # A tall batch keeps its layout, with the small matrix on the right: turning it would cost a strided copy.
    tall = X.shape[-2] > X.shape[-1]
    small = (X.shape[0], *(min(X.shape[-2:]),) * 2)
    memory = Workspace() if workspace is None else workspace
    A, B = (memory.get(name, small, X.dtype, X.device) for name in ("gram", "factor"))
    spare = None

    def gram() -> Tensor:
        return torch.bmm(X.mH, X, out=A) if tall else torch.bmm(X, X.mH, out=A)

    def replace(factor: Tensor, *, keep: bool) -> Tensor:
        nonlocal spare
        target = memory.get("kept" if keep else "turn", tuple(X.shape), X.dtype, X.device) if spare is None else spare
        spare = None if keep else X
        return torch.bmm(X, factor, out=target) if tall else torch.bmm(factor, X, out=target)

    scale = _factor(gram(), scaling, headroom=headroom, eps=eps)
    A.mul_((scale * scale.mT).to(A.dtype))
    keep = not overwrite
    for i, (a, b, c) in enumerate(table):
        if i:
            gram()
        _quadratic(a, b, c, A, out=B)
        if i == 0:
            B.mul_((scale if tall else scale.mT).to(B.dtype))  # f(D A D) D X: the scale D goes to the side of X
        X, keep = replace(B, keep=keep), False
    if not table:
        X, keep = X * (scale.mT if tall else scale).to(X.dtype), False
    for _ in range(_MOST_POLISH if polish is None else polish):
        gram().diagonal(dim1=-2, dim2=-1).sub_(1)
        if polish is None and _settled(A):
            break
        A.mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1)
        X, keep = replace(A, keep=keep), False
    return X


def _quadratic(a: float, b: float, c: float, A: Tensor, *, out: Tensor) -> None:
    """``a I + b A + c A^2`` into ``out``; ``A`` is lost."""
    half = b / (2 * c) if c else 0.0
    rest = a - c * half * half
    if c and A.shape[-1] >= _LARGE and rest > _KEPT * a:
        # c (A + h I)^2 + (a - c h^2) I is a pure product, a quarter cheaper. Where its two parts nearly cancel (all
        # published tables but Jordan's), what rounding does to the square would be all that is left.
        A.diagonal(dim1=-2, dim2=-1).add_(half)
        torch.baddbmm(A, A, A, beta=0, alpha=c, out=out)
        out.diagonal(dim1=-2, dim2=-1).add_(rest)
        return
    if c:
        torch.baddbmm(A, A, A, beta=b, alpha=c, out=out)
    else:  # a cubic row: cheaper without the product, which besides drops beta on CPUs in half precision
        torch.mul(A, b, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(a)


def _factor(A: Tensor, scaling: str, *, headroom: float, eps: float) -> Tensor:
    """What the rows are multiplied by so that no singular value exceeds 1, ``(..., 1 or m, 1)``, from ``A = X X^H``."""
    real = torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32
    if scaling == "aol":
        # Almost-orthogonal rows: by Gershgorin, dividing row i by the root of sum_j |A_ij| bounds the norm by 1.
        norm = A.abs().sum(-1, dtype=real).sqrt().unsqueeze(-1)
    elif scaling == "schatten":
        norm = torch.linalg.vector_norm(A.abs(), dim=(-2, -1), dtype=real).sqrt()[..., None, None]
    elif scaling == "spectral":
        norm = _top_eigenvalue(A, real).sqrt()[..., None, None] * _POWER_HEADROOM
    else:
        norm = A.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=real).sqrt()[..., None, None]
    return 1 / (norm * headroom).clamp(min=eps)


def _top_eigenvalue(A: Tensor, real: torch.dtype) -> Tensor:
    # From the row of largest norm: it cannot be orthogonal to the leading eigenvector, unlike a fixed or random vector.
    A = A.to(torch.promote_types(A.dtype, real))
    rows = torch.linalg.vector_norm(A, dim=-1)
    v = A.mH.gather(-1, rows.argmax(-1)[..., None, None].expand(*A.shape[:-1], 1))
    value = rows.amax(-1)
    for _ in range(_POWER_STEPS):
        v = v / torch.linalg.vector_norm(v, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(real).tiny)
        v = A @ v
        value = torch.linalg.vector_norm(v, dim=(-2, -1))
    return value


def _settled(residual: Tensor) -> bool:
    """Whether ``X X^H - I`` of every matrix of the batch is down to the rounding of its own dtype."""
    # Taken of the difference: the norms of X X^H and I agree to half the digits long before the matrices do.
    norms = torch.linalg.vector_norm(residual, dim=(-2, -1), dtype=torch.promote_types(residual.dtype, torch.float32))
    return bool((norms <= _SETTLED * torch.finfo(residual.dtype).eps * residual.shape[-1] ** 0.5).all())
