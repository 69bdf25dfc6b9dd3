"""The iteration behind ``orthogonalize``: odd polynomials of a matrix by products alone, twice.

``iterate`` is written for speed. Large matrices: two buffers in turn, scalar factors folded into the small Gram-sized
matrix, pure products (on CPUs one that also adds a third matrix takes a quarter longer), and for wide ones two steps to
a Gram matrix. Small ones: as few calls as possible. ``iterate_differentiable`` is the same arithmetic without a write
in place, for autograd and for reading; a test ties the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthokit.linalg._workspace import Workspace
from orthokit.linalg.coefficients import Triple

__all__ = ["SCALINGS", "by_few_calls", "iterate", "iterate_differentiable", "takes_few_calls"]

SCALINGS = ("frobenius", "schatten", "spectral", "aol")

# Adaptive polish ends when the root mean square of s^2 - 1 is within this many units of rounding of the products.
_SETTLED = 2.0
_MOST_POLISH = 4
# Power steps of the spectral scaling. They approach the norm from below, hence the headroom.
_POWER_STEPS, _POWER_HEADROOM = 8, 1.1
# From which side on (below, calls are what costs), and with which share of the constant left, a quadratic is a square.
_LARGE, _KEPT = 128, 0.15
# And for one matrix by itself that is not much wider than tall: a batch has more work for each call.
_LARGE_ALONE = 320
# Up to which side the few calls of small matrices go on in float32, which rounds their division by the norm far less.
_FEW_CALLS_FLOAT32 = 160
# From which longer over shorter side on two steps are made of one Gram matrix: six products of the short side take the
# place of two with the long one. More than two would let the rounding of bfloat16 grow into negative "squares".
_PAIRED = 2
# Entries from which buffers are lent; below, a fresh one is cheaper than the look-up of an old one.
_LENT = 1 << 14


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
    tall, side = X.shape[-2] > X.shape[-1], min(X.shape[-2:])
    small = (X.shape[0], side, side)
    memory = Workspace() if workspace is None else workspace
    keep, spare = not overwrite, None
    lend = X.numel() >= _LENT

    def borrow(name: str, shape: tuple[int, ...]) -> Tensor | None:
        return memory.get(name, shape, X.dtype, X.device) if lend else None

    def gram() -> Tensor:
        return torch.bmm(X.mH, X, out=A) if tall else torch.bmm(X, X.mH, out=A)

    def target() -> Tensor | None:
        nonlocal spare
        found = borrow("kept" if keep else "turn", tuple(X.shape)) if spare is None else spare
        spare = None if keep or not lend else X
        return found

    def replace(factor: Tensor) -> Tensor:
        return torch.bmm(X, factor, out=target()) if tall else torch.bmm(factor, X, out=target())

    A, B = borrow("gram", small), borrow("factor", small)
    if takes_few_calls(X.shape, X.dtype, scaling):
        other = borrow("kept", tuple(X.shape)) if keep else X
        turns = (borrow("turn", tuple(X.shape)), other if lend else None)
        X = by_few_calls(X, table, headroom=headroom, eps=eps, gram=A, factor=B, turns=turns)
        keep, spare = False, turns[(len(table) + 1) % 2]
    else:
        forms = _forms(table, small[-1])
        G = gram()
        scale = _factor(G, scaling, headroom=headroom, eps=eps) * (forms[0].lift if forms else 1.0)
        G.mul_((scale * scale.mT).to(G.dtype))
        pairs = small[-1] >= _LARGE and max(X.shape[-2:]) >= _PAIRED * small[-1]
        for i in range(0, len(forms), 2 if pairs else 1):
            if i:
                G = gram()
            paired = pairs and i + 1 < len(forms)
            F = _evaluate(forms[i], G, out=B, restore=paired)
            if paired:
                # The next A is F A F, because all of these commute, and both factors then go to X at once.
                T = torch.bmm(F, G, out=borrow("second", small))
                G = torch.bmm(T, F, out=G)
                F = torch.bmm(_evaluate(forms[i + 1], G, out=T, restore=False), F, out=G)
            if i == 0:
                F.mul_((scale if tall else scale.mT).to(F.dtype))  # f(D A D) D X: the scale D goes to the side of X
            X, keep = replace(F), False
        if not table:
            X, keep = X * (scale.mT if tall else scale).to(X.dtype), False
    for _ in range(_MOST_POLISH if polish is None else polish):
        G = gram()
        G.diagonal(dim1=-2, dim2=-1).sub_(1)
        if polish is None and _settled(G):
            break
        G.mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1)
        X, keep = replace(G), False
    return X


def takes_few_calls(shape: Sequence[int], dtype: torch.dtype, scaling: str) -> bool:
    """Whether matrices of a shape ``(batch, m, n)`` are so small that the calls are what costs."""
    side, longer = sorted(shape[-2:])
    alone = shape[0] == 1 and longer < _PAIRED * side
    large = _FEW_CALLS_FLOAT32 if dtype == torch.float32 else _LARGE_ALONE if alone else _LARGE
    return side < large and scaling == "frobenius"


def by_few_calls(
    X: Tensor,
    table: list[Triple],
    *,
    headroom: float,
    eps: float,
    gram: Tensor | None = None,
    factor: Tensor | None = None,
    turns: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The rows of a table in three calls each, for small matrices, whose calls are what costs; into what is given."""
    tall = X.shape[-2] > X.shape[-1]
    # In the dtype of X, whose sums are float32 inside: a norm and a division of two dtypes take ten times as long.
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    if headroom != 1:
        norm.mul_(headroom)
    X = torch.div(X, norm.clamp_(min=eps), out=turns[0])
    for i, (a, b, c) in enumerate(table, start=1):
        A = torch.bmm(X.mH, X, out=gram) if tall else torch.bmm(X, X.mH, out=gram)
        # A cubic row has no product; a factor of 0 for it would besides drop beta on CPUs in half precision.
        F = torch.baddbmm(A, A, A, beta=b, alpha=c, out=factor) if c else A.mul_(b)
        into = turns[i % 2]
        X = torch.baddbmm(X, X, F, beta=a, out=into) if tall else torch.baddbmm(X, F, X, beta=a, out=into)
    return X


class _Form(NamedTuple):
    """How a row ``a I + b A + c A^2`` is evaluated on ``lift^2 A``: as ``gain (A + shift I)^2 + rest I``, or not."""

    row: Triple
    square: bool
    lift: float
    gain: float
    shift: float
    rest: float


def _forms(table: list[Triple], side: int) -> list[_Form]:
    """The rows of a table as they are evaluated; ``side`` is that of the small matrix.

    A square is a pure product, a quarter cheaper than one that also adds a matrix or scales. So that it needs no factor
    either, ``X`` carries ``lift = c^{1/4}`` along: then ``c (A + h I)^2`` is the square of what is there.
    """
    squares = [side >= _LARGE and c > 0 and a - b * b / (4 * c) > _KEPT * a for a, b, c in table]
    lifts = [c**0.25 if square else 1.0 for (_, _, c), square in zip(table, squares, strict=True)]
    forms = []
    for (a, b, c), square, lift, after in zip(table, squares, lifts, [*lifts, 1.0][1:], strict=True):
        gain = after / lift
        shift = b / (2 * c) * lift * lift if square else 0.0
        rest = gain * (a - b * b / (4 * c)) if square else 0.0
        forms.append(_Form((gain * a, gain * b, gain * c), square, lift, gain, shift, rest))
    return forms


def _evaluate(form: _Form, A: Tensor, *, out: Tensor | None, restore: bool) -> Tensor:
    """The polynomial of a row, into ``out`` if given; with ``restore``, ``A`` is as it was."""
    if form.square:
        # Where its two parts nearly cancel (all published tables but Jordan's), what rounding does to the square would
        # be all that is left: those rows are no squares.
        diagonal = A.diagonal(dim1=-2, dim2=-1)
        kept = diagonal.clone() if restore else None  # subtracting the shift again would leave its rounding
        diagonal.add_(form.shift)
        gain = form.gain
        out = torch.bmm(A, A, out=out) if gain == 1 else torch.baddbmm(A, A, A, beta=0, alpha=gain, out=out)
        out.diagonal(dim1=-2, dim2=-1).add_(form.rest)
        if kept is not None:
            diagonal.copy_(kept)
        return out
    a, b, c = form.row
    # A cubic row is cheaper without the product, which besides drops beta on CPUs in half precision.
    out = torch.baddbmm(A, A, A, beta=b, alpha=c, out=out) if c else torch.mul(A, b, out=out)
    out.diagonal(dim1=-2, dim2=-1).add_(a)
    return out


def _factor(A: Tensor, scaling: str, *, headroom: float, eps: float) -> Tensor:
    """What the rows are multiplied by so that no singular value exceeds 1, ``(..., 1 or m, 1)``, from ``A = X X^H``."""
    real = torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32
    if scaling == "aol":
        # Almost-orthogonal rows: by Gershgorin, dividing row i by the root of sum_j |A_ij| bounds the norm by 1.
        squares = A.abs().sum(-1, dtype=real).unsqueeze(-1)
    elif scaling == "schatten":
        squares = torch.linalg.vector_norm(A.abs(), dim=(-2, -1), dtype=real)[..., None, None]
    elif scaling == "spectral":
        squares = _top_eigenvalue(A, real)[..., None, None] * _POWER_HEADROOM**2
    else:
        squares = A.diagonal(dim1=-2, dim2=-1).real.sum(-1, dtype=real)[..., None, None]
    return 1 / (squares.sqrt() * headroom).clamp(min=eps)


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
