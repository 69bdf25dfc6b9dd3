"""Singular values: all of them, or the largest alone for a fraction of the cost."""

from __future__ import annotations

import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["singular_values", "top_singular_value"]

# Vectors that power iteration carries along.
_START = 4
_METHODS = ("svd", "gram", "gram64")
# Rows or columns that are summed into a Gram matrix at a time: the copy in float64 is of these alone.
_SLICE = 1024


def singular_values(W: Num[Tensor, "*batch out in"], *, method: str = "svd") -> Shaped[Tensor, "*batch k"]:
    r"""All singular values of ``W``, largest first.

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.
        method: ``"svd"`` (default) is exact; ``"gram"`` takes roots of the eigenvalues of the smaller Gram matrix;
            ``"gram64"`` does so in float64, for input of lower precision.

    Returns:
        Shape ``(..., min(out, in))``, real, descending; float32 or better.

    Raises:
        UnknownNameError: Unknown method.
        ShapeError: ``W`` has fewer than two dimensions.
        NonFiniteError: ``W`` holds a NaN or an infinity.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [4.0, 5.0]])).square().sum().round().item()
        50.0

    Numerics:
        ``"svd"``: each value to a few epsilon of the largest. ``"gram"``: about a third of the time, but squaring loses
        values below about ``sqrt(eps)`` of the largest (3e-4 in float32); good for live monitors, not for conditions.
        ``"gram64"``: 0.55 of the time of a float32 SVD, and at least as exact: its square root of epsilon is 1.5e-8
        of the largest, where an SVD in float32 has errors of 1e-7. A value ``r`` times the largest has a relative
        error of about ``1e-15 / r^2``. On devices without float64 it is ``"gram"``.

    References:
        G. Golub, C. Van Loan (2013), Matrix Computations, section 8.6.
    """
    check_matrix(W)
    check_finite(W)
    if method not in _METHODS:
        raise unknown_name("method", method, _METHODS)
    work = W.to(working_dtype(W))
    if W.numel() == 0:
        return torch.zeros(*W.shape[:-2], min(W.shape[-2:]), dtype=work.abs().dtype, device=W.device)
    if method == "svd":
        return torch.linalg.svdvals(work)
    # Squares of large finite entries would overflow: the largest is brought to 1 first.
    scale = work.abs().amax(dim=(-2, -1), keepdim=True)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    if method == "gram64" and W.device.type != "mps":
        roots = torch.linalg.eigvalsh(_gram64(work, divisor)).clamp(min=0).sqrt().flip(-1)
        return (roots * scale[..., 0]).to(scale.dtype)
    work = work / divisor
    gram = work @ work.mH if W.shape[-2] <= W.shape[-1] else work.mH @ work
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1) * scale[..., 0]


def _gram64(W: Tensor, divisor: Tensor) -> Tensor:
    """The smaller Gram matrix of ``W / divisor`` in double precision, slice by slice of the longer side."""
    double = torch.promote_types(W.dtype, torch.float64)
    wide = W.shape[-2] <= W.shape[-1]

    def product(part: Tensor) -> Tensor:
        part = part.to(double) / divisor
        return part @ part.mH if wide else part.mH @ part

    first, *others = W.split(_SLICE, dim=-1 if wide else -2)
    gram = product(first)
    for part in others:
        gram += product(part)
    return gram


def top_singular_value(
    W: Num[Tensor, "*batch out in"],
    *,
    iterations: int = 200,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Shaped[Tensor, "*batch"]:
    r"""The spectral norm of ``W`` by power iteration on a few vectors: ``V <- qr(W^H W V)``.

    The estimate ``||W V||_2`` never exceeds the true value and rises towards it; its error is the square of the error
    of ``V``, so few iterations are needed even when the first singular values are close. One vector alone would now and
    then start almost orthogonal to the leading direction and pass for converged; four do not by chance.

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.
        iterations: Most iterations, ``>= 1``; default 200.
        tol: Stop once the estimate rises by less than this share, ``>= 0``; default 1e-6.
        generator: Source of the start; default a fixed one, so that equal inputs give equal outputs.

    Returns:
        The norm per matrix, shape ``(...)``; 0 for a zero or empty matrix.

    Raises:
        OptionError: ``iterations`` or ``tol`` out of range.
        ShapeError: ``W`` has fewer than two dimensions.
        NonFiniteError: ``W`` holds a NaN or an infinity.

    Example:
        >>> W = torch.diag(torch.tensor([2.0, 1.0, 0.5]))
        >>> round(top_singular_value(W).item(), 4)
        2.0

    Numerics:
        Two products with a four-column matrix an iteration, ``16 out in`` FLOP. A lower bound in exact arithmetic; with
        the default ``tol`` within 1e-3 of the truth whatever the gaps, mostly within 1e-5.

    References:
        G. Golub, C. Van Loan (2013), Matrix Computations, section 8.2.4. The stopping rule is ours.
    """
    check_matrix(W)
    check_finite(W)
    if iterations < 1 or not tol >= 0:
        raise OptionError(f"iterations must be >= 1 and tol >= 0; got iterations={iterations}, tol={tol}.")
    work = W.to(working_dtype(W))
    real = work.abs().dtype
    if W.numel() == 0:
        return torch.zeros(W.shape[:-2], dtype=real, device=W.device)
    # Scaling by the largest entry keeps the squares of the product inside the range of the dtype.
    scale = work.abs().amax(dim=(-2, -1), keepdim=True)
    work = work / torch.where(scale > 0, scale, torch.ones_like(scale))
    source = torch.Generator().manual_seed(0) if generator is None else generator
    columns = W.shape[-1]
    V = torch.randn(columns, min(_START, columns), generator=source, device=source.device, dtype=torch.float64)
    V = V.to(device=W.device, dtype=work.dtype).expand(*W.shape[:-2], *V.shape)
    sigma = torch.zeros(W.shape[:-2], dtype=real, device=W.device)
    for _ in range(iterations):
        image = work @ torch.linalg.qr(V).Q
        previous, sigma = sigma, torch.linalg.matrix_norm(image, ord=2)
        if bool((sigma - previous <= tol * sigma).all()):
            break
        V = work.mH @ image
    return sigma * scale[..., 0, 0]
