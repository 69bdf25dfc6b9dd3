"""Singular values: all of them, or the largest alone for a fraction of the cost."""

from __future__ import annotations

import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["singular_values", "top_singular_value"]

# Steps of a search between two looks at how far it is, each of which costs as much as one.
_LOOKS = 3
# Vectors that a search for the largest value starts from.
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
    r"""The spectral norm of ``W``, from the subspace that a few vectors span as the matrix works on them.

    .. math:: \sigma \leftarrow \max_{x \in K_j} \|W x\| / \|x\|, \qquad
        K_j = \mathrm{span}\{V, W^H W V, \dots, (W^H W)^{j-1} V\}

    The estimate never exceeds the true value and rises towards it, twice as many digits for each doubling of ``j`` and
    faster; power iteration, which forgets all but the last vectors, needs some four times as many products. One vector
    alone would now and then start almost orthogonal to the leading direction and pass for converged; four do not by
    chance.

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
        Two products with a four-column matrix an iteration, ``16 out in`` FLOP, and as much again as ``64 in`` FLOP for
        each iteration before it, to keep the basis orthogonal. A lower bound in exact arithmetic; with the default
        ``tol`` within 1e-3 of the truth whatever the gaps, mostly within 1e-6. A random matrix, which has no gap, takes
        some 12 iterations to 1e-3 and 16 to 1e-4.

    References:
        G. Golub, C. Van Loan (2013), Matrix Computations, section 10.3.6 (block Lanczos); the basis is kept orthogonal
        in full. The stopping rule is ours.
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
    # Rows, since a product with a few columns takes four times as long as one with a few rows.
    block = torch.linalg.qr(V).Q.mH.contiguous()
    image = block @ work.mH
    basis, images, sigma = block, image, torch.zeros_like(scale[..., 0, 0])
    for step in range(1, iterations):
        room = columns - basis.shape[-2]
        if room == 0:
            break
        # Projected twice, and normalised between: what is left of a converged block is rounding, and no direction.
        block = image @ work
        for _ in range(2):
            block = torch.linalg.qr((block - (block @ basis.mH) @ basis).mH).Q.mH
        block = block[..., :room, :].contiguous()
        image = block @ work.mH
        basis, images = torch.cat([basis, block], -2), torch.cat([images, image], -2)
        if step % _LOOKS == 0:
            previous, sigma = sigma, torch.maximum(sigma, _largest_in(basis, images))
            if bool((sigma - previous <= tol * sigma).all()):
                break
    return torch.maximum(sigma, _largest_in(basis, images)) * scale[..., 0, 0]


def _largest_in(basis: Tensor, images: Tensor) -> Tensor:
    """The largest ``||W x|| / ||x||`` of a subspace, taken of the vector: a basis that lost its angles adds nothing.

    Args:
        basis: The subspace by rows, ``(..., k, in)``.
        images: ``W`` times each of them, ``(..., k, out)``.
    """
    best = torch.linalg.eigh(images @ images.mH).eigenvectors[..., -1:].mH
    over, under = (torch.linalg.vector_norm(best @ part, dim=(-2, -1)) for part in (images, basis))
    return over / under
