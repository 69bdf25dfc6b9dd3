r"""Polar factors: exact by SVD, fast by matrix products.

For ``X = U S V^H`` the polar factor is ``U V^H``: the nearest matrix with orthonormal rows or columns, and the
direction Muon steps in. The iterations below never see ``U``, ``S`` or ``V``; each step applies one odd polynomial to
all singular values at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype
from orthokit.linalg._iteration import SCALINGS, by_few_calls, iterate, iterate_differentiable, takes_few_calls
from orthokit.linalg._workspace import Workspace
from orthokit.linalg.coefficients import coefficient_table

__all__ = ["METHODS", "SCALINGS", "orthogonalize", "orthogonalize_", "polar", "procrustes", "singular_value_map"]

METHODS = ("polar_express", "newton_schulz", "svd")

# Polar Express was fitted to singular values in [1e-3, 1]; dividing by slightly more than the Frobenius norm keeps a
# rounded norm from leaving the largest of them above 1.
_HEADROOM = {"polar_express": 1.01, "newton_schulz": 1.0}
# Entries up to which one matrix by itself goes through fresh buffers: the allocator has their pages at hand.
_FRESH = 1 << 18
_DEFAULT_TABLE = {"polar_express": "polar_express", "newton_schulz": "jordan"}


def polar(X: Num[Tensor, "*batch out in"], *, rtol: float | None = None) -> Num[Tensor, "*batch out in"]:
    r"""The exact polar factor ``U_r V_r^H`` over the numerical rank ``r`` of ``X``.

    Directions whose singular value is at most ``rtol`` times the largest are left out: in the null space of ``X`` a
    full factor ``U V^H`` would be an arbitrary choice of the SVD routine.

    Args:
        X: Matrix or batch of matrices, shape ``(..., out, in)``; real or complex.
        rtol: Relative threshold of the rank, ``>= 0``; default ``max(out, in)`` times the machine epsilon.

    Returns:
        The factor, shape and dtype of ``X``; zero where ``X`` is zero.

    Raises:
        ShapeError: ``X`` has fewer than two dimensions.
        NonFiniteError: ``X`` holds a NaN or an infinity.

    Example:
        >>> X = torch.diag(torch.tensor([3.0, 0.5, 0.0]))
        >>> polar(X).diagonal().tolist()
        [1.0, 1.0, 0.0]

    Numerics:
        SVD in the dtype of ``X``, at least float32; singular values of the result are 0 or 1 to a few epsilon. Cost
        about ``20 max(out, in) min(out, in)^2`` FLOP.

    References:
        N. Higham (1986), Computing the polar decomposition. The rank rule is ours.
    """
    check_matrix(X, name="X")
    check_finite(X, name="X")
    if X.numel() == 0:
        return X.clone()
    work = working_dtype(X)
    U, S, Vh = torch.linalg.svd(X.to(work), full_matrices=False)
    floor = S[..., :1] * (max(X.shape[-2:]) * torch.finfo(S.dtype).eps if rtol is None else rtol)
    keep = floor < S
    return ((U * keep.unsqueeze(-2).to(U.dtype)) @ Vh).to(X.dtype)


def orthogonalize(
    X: Num[Tensor, "*batch out in"],
    *,
    method: str = "polar_express",
    steps: int = 5,
    polish: int | str = 0,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] | None = None,
    scaling: str = "frobenius",
    dtype: torch.dtype | None = None,
    eps: float = 1e-7,
) -> Num[Tensor, "*batch out in"]:
    r"""A matrix with the singular vectors of ``X`` and all singular values near 1, by matrix products alone.

    Each step is ``X <- a X + (b A + c A^2) X`` with ``A = X X^H`` on the shorter side, after ``X`` was divided by a
    bound on its norm. ``polish`` appends cubic steps ``X <- 1.5 X - 0.5 A X``, which square the distance to 1.

    Args:
        X: Matrix or batch, shape ``(..., out, in)``; real or complex. Not changed.
        method: ``"polar_express"`` (default), ``"newton_schulz"``, or ``"svd"`` (exact, see :func:`polar`).
        steps: Quintic steps, ``>= 0``; default 5. Ignored by ``"svd"``, which is exact.
        polish: Cubic steps after them, ``>= 0``; default 0. ``"auto"``: until the matrix is orthogonal to the rounding
            of the products, at most 4. Ignored by ``"svd"``.
        coefficients: A name in ``linalg.COEFFICIENTS``, one triple or a list of triples; default the method's own
            (``"jordan"`` for ``"newton_schulz"``).
        scaling: The bound that ``X`` is divided by first; a tighter one leaves less for the steps to lift.
            ``"frobenius"`` (default): ``||X||_F``. ``"schatten"``: ``||X X^H||_F^{1/2}``, tighter and as cheap.
            ``"spectral"``: the largest singular value by power steps, times 1.1. ``"aol"``: row ``i`` by
            ``(sum_j |A_ij|)^{1/2}``, nearly the tightest, but rows are scaled apart: the limit is the polar factor of
            the rescaled matrix, close to that of ``X`` and equal to it only for rows that are orthogonal already.
        dtype: Precision of the products; default the dtype of ``X``.
        eps: Smallest norm that is divided by, ``> 0``; default 1e-7. A zero matrix stays zero.

    Returns:
        The orthogonalised matrix, shape and dtype of ``X``.

    Raises:
        UnknownNameError: Unknown method, table or scaling.
        OptionError: ``steps``, ``polish`` or ``eps`` out of range.
        ShapeError: ``X`` has fewer than two dimensions.
        DtypeError: ``X`` is complex and ``dtype`` is not.

    Example:
        >>> X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
        >>> Q = orthogonalize(X, polish=3)
        >>> bool((Q @ Q.mT - torch.eye(8)).abs().max() < 1e-4)
        True

    Numerics:
        ``steps`` times ``4 m^2 n + 2 m^3`` FLOP and ``polish`` times ``4 m^2 n`` with ``m = min(out, in)``. In
        bfloat16 products singular values end within about 2e-3 of 1 once the steps have brought them there; six steps
        of ``"polar_express"`` do for the spectra of random matrices. Singular values below about 1e-3 of the bound
        are still rising after five. Differentiable (then without the buffers of the fast path).

    References:
        K. Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks. N. Amsel, D. Persson,
        C. Musco, R. Gower (2025), The Polar Express, arXiv 2505.16932, algorithm 1. B. Prach, C. Lampert (2022),
        Almost-orthogonal layers, arXiv 2208.03160, for ``"aol"``. The polish steps are ours.
    """
    check_matrix(X, name="X")
    if dtype is not None and X.is_complex() and not dtype.is_complex:
        raise DtypeError(
            f"dtype must be complex for a complex X; got {dtype} for {X.dtype}. Leave it out to keep {X.dtype}."
        )
    check_iteration(method=method, steps=steps, polish=polish, scaling=scaling, eps=eps)
    if method == "svd":
        return polar(X)
    work = X.to(X.dtype if dtype is None else dtype)
    result = _run(work, method, steps, polish, coefficients, scaling, eps, overwrite=work is not X)
    return result.to(X.dtype)


def orthogonalize_(
    stack: Num[Tensor, "batch out in"],
    *,
    method: str,
    steps: int,
    polish: int | str,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] | None,
    scaling: str,
    eps: float,
    workspace: Workspace | None = None,
) -> Num[Tensor, "batch out in"]:
    """:func:`orthogonalize` of a batch that may be overwritten, with options that were checked before.

    Returns:
        The result, in the memory of ``stack``, of ``workspace`` or its own; ``stack`` holds nothing of use afterwards.
    """
    if method == "svd":
        return polar(stack)
    return _run(stack, method, steps, polish, coefficients, scaling, eps, overwrite=True, workspace=workspace)


def iteration_alone(shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Callable[[Tensor], Tensor]:
    """:func:`orthogonalize_` of single matrices ``(1, out, in)`` of one shape and dtype, decided beforehand.

    For a small matrix the decisions would take as long as one of its products.
    """
    method, steps, coefficients = options["method"], options["steps"], options["coefficients"]
    few = method != "svd" and options["polish"] == 0 and dtype != torch.float16 and prod(shape) <= _FRESH
    if not (few and takes_few_calls((1, *shape[-2:]), dtype, options["scaling"])):
        return partial(orthogonalize_, **options)
    table = coefficient_table(_DEFAULT_TABLE[method] if coefficients is None else coefficients, steps)
    return partial(by_few_calls, table=table, headroom=_HEADROOM[method], eps=options["eps"])


def check_iteration(*, method: str, steps: int, polish: int | str, scaling: str, eps: float) -> None:
    """Raise unless the options of :func:`orthogonalize` are in range."""
    for kind, name, known in (("method", method, METHODS), ("scaling", scaling, SCALINGS)):
        if name not in known:
            raise unknown_name(kind, name, known)
    if isinstance(polish, str) and polish != "auto":
        raise OptionError(f'polish must be a number of steps or "auto"; got {polish!r}.')
    if steps < 0 or (not isinstance(polish, str) and polish < 0):
        raise OptionError(f"steps and polish must be at least 0; got steps={steps}, polish={polish}.")
    if not eps > 0:
        raise OptionError(f"eps must be greater than 0; got {eps}. It guards the division by the norm.")


def _run(
    X: Tensor,
    method: str,
    steps: int,
    polish: int | str,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] | None,
    scaling: str,
    eps: float,
    *,
    overwrite: bool,
    workspace: Workspace | None = None,
) -> Tensor:
    table = coefficient_table(_DEFAULT_TABLE[method] if coefficients is None else coefficients, steps)
    if X.numel() == 0:
        return X.clone()
    if X.dtype == torch.float16:
        # Its squares leave the range beyond 255 and vanish below 2e-4, so this dtype is divided before any product.
        X = (X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp(min=eps)).half()
        overwrite, eps = True, 1e-2  # and what is divided by from here on may be squared
    count = None if isinstance(polish, str) else polish
    options = {"polish": count, "headroom": _HEADROOM[method], "eps": eps, "scaling": scaling}
    if X.requires_grad and torch.is_grad_enabled():
        return iterate_differentiable(X, table, **options)
    if X.ndim == 3:
        return iterate(X, table, **options, overwrite=overwrite, workspace=workspace)
    flat = X.reshape(-1, *X.shape[-2:])
    return iterate(flat, table, **options, overwrite=overwrite, workspace=workspace).reshape(X.shape)


def singular_value_map(
    s: Float[Tensor, "*shape"],
    *,
    method: str = "polar_express",
    steps: int = 5,
    polish: int = 0,
    coefficients: str | Sequence[float] | Sequence[Sequence[float]] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Where :func:`orthogonalize` sends a singular value: the scalar polynomial that all of them go through.

    Args:
        s: Singular values relative to the Frobenius norm of their matrix, in [0, 1].
        method: ``"polar_express"`` (default), ``"newton_schulz"`` or ``"svd"``.
        steps: Quintic steps, ``>= 0``; default 5.
        polish: Cubic steps after them, ``>= 0``; default 0.
        coefficients: As in :func:`orthogonalize`.

    Returns:
        Shape and dtype of ``s``.

    Raises:
        UnknownNameError: Unknown method or table.
        OptionError: ``steps`` or ``polish`` is negative.

    Example:
        >>> s = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
        >>> bool(((singular_value_map(s, polish=3) - 1).abs() < 1e-6).all())
        True

    References:
        As :func:`orthogonalize`.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if polish < 0:
        raise OptionError(f"polish must be at least 0; got {polish}.")
    if method == "svd":
        return (s > 0).to(s.dtype)
    s = s / _HEADROOM[method]
    table = coefficient_table(_DEFAULT_TABLE[method] if coefficients is None else coefficients, steps)
    for a, b, c in [*table, *[(1.5, -0.5, 0.0)] * polish]:
        s = s * (a + b * s**2 + c * s**4)
    return s


def procrustes(
    A: Num[Tensor, "*batch rows dim"], B: Num[Tensor, "*batch rows dim"], *, prior: float = 0.0
) -> Num[Tensor, "*batch dim dim"]:
    r"""The orthogonal ``R`` that best turns ``A`` into ``B``: ``argmin ||A R - B||_F^2 + prior ||R - I||_F^2``.

    The minimum is the polar factor of ``A^H B + prior I``.

    Args:
        A: Points as rows, shape ``(..., rows, dim)``.
        B: Their targets, same shape.
        prior: Pull towards the identity, ``>= 0``; default 0. A positive value makes the answer unique where ``A`` and
            ``B`` leave a direction undetermined.

    Returns:
        ``R``, shape ``(..., dim, dim)``, orthogonal; its determinant may be -1.

    Raises:
        OptionError: ``prior`` is negative.
        ShapeError: ``A`` and ``B`` differ in shape.
        NonFiniteError: A NaN or an infinity in ``A`` or ``B``.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> A, R = torch.randn(20, 4, generator=g), polar(torch.randn(4, 4, generator=g))
        >>> bool(torch.allclose(procrustes(A, A @ R), R, atol=1e-5))
        True

    Numerics:
        One product and one SVD of a ``dim x dim`` matrix, at least in float32.

    References:
        P. Schonemann (1966), A generalized solution of the orthogonal Procrustes problem.
    """
    check_matrix(A, name="A")
    if A.shape != B.shape:
        raise ShapeError(f"A and B must have one shape; got {tuple(A.shape)} and {tuple(B.shape)}.")
    if not prior >= 0:
        raise OptionError(f"prior must be at least 0; got {prior}.")
    check_finite(A, name="A")
    check_finite(B, name="B")
    work = working_dtype(A)
    cross = A.to(work).mH @ B.to(work)
    if prior:
        cross = cross + prior * torch.eye(cross.shape[-1], dtype=work, device=A.device)
    U, _, Vh = torch.linalg.svd(cross)
    return (U @ Vh).to(A.dtype)
