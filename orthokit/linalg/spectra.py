"""Singular values: all of them, or the largest alone for a fraction of the cost."""

from __future__ import annotations

import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["singular_values", "top_singular_value"]


def singular_values(W: Num[Tensor, "*batch out in"], *, method: str = "svd") -> Shaped[Tensor, "*batch k"]:
    r"""All singular values of ``W``, largest first.

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.
        method: ``"svd"`` (default) is exact; ``"gram"`` takes roots of the eigenvalues of the smaller Gram matrix.

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

    References:
        G. Golub, C. Van Loan (2013), Matrix Computations, section 8.6.
    """
    check_matrix(W)
    check_finite(W)
    if method not in ("svd", "gram"):
        raise unknown_name("method", method, ("svd", "gram"))
    work = W.to(working_dtype(W))
    if W.numel() == 0:
        return torch.zeros(*W.shape[:-2], min(W.shape[-2:]), dtype=work.abs().dtype, device=W.device)
    if method == "svd":
        return torch.linalg.svdvals(work)
    gram = work @ work.mH if W.shape[-2] <= W.shape[-1] else work.mH @ work
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)


def top_singular_value(
    W: Num[Tensor, "*batch out in"],
    *,
    iterations: int = 200,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Shaped[Tensor, "*batch"]:
    r"""The spectral norm of ``W`` by power iteration: ``v <- W^H W v / ||W^H W v||``.

    The estimate ``||W v||`` never exceeds the true value and rises towards it; its error is the square of the error of
    ``v``, so few iterations are needed even when the first two singular values are close.

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.
        iterations: Most iterations, ``>= 1``; default 200.
        tol: Stop once the estimate rises by less than this share, ``>= 0``; default 1e-6.
        generator: Source of the start vector; default a fixed one, so that equal inputs give equal outputs.

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
        Two matrix-vector products an iteration, ``4 out in`` FLOP. A lower bound in exact arithmetic.

    References:
        R. von Mises, H. Pollaczek-Geiringer (1929). The stopping rule is ours.
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
    v = torch.randn(W.shape[-1], 1, generator=source, device=source.device, dtype=torch.float64)
    v = v.to(device=W.device, dtype=work.dtype).expand(*W.shape[:-2], W.shape[-1], 1)
    tiny = torch.finfo(real).tiny
    sigma = torch.zeros(*W.shape[:-2], 1, 1, dtype=real, device=W.device)
    for _ in range(iterations):
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=tiny)
        u = work @ v
        previous, sigma = sigma, torch.linalg.vector_norm(u, dim=-2, keepdim=True)
        if bool((sigma - previous <= tol * sigma).all()):
            break
        v = work.mH @ u
    return (sigma * scale)[..., 0, 0]
