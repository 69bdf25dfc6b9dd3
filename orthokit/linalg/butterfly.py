r"""Butterfly factors: block-diagonal products with permutations between, dense after few factors.

Factor ``i`` pairs the half blocks of ``b / 2`` coordinates whose numbers differ in binary digit ``i`` and rotates each
pair by a ``b x b`` block; factor 0 is the ordinary block diagonal. After ``1 + log2(n / b)`` factors every output
depends on every input.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from orthokit.errors import OptionError, ShapeError
from orthokit.linalg.block_diagonal import apply_blocks

__all__ = ["apply_butterfly", "butterfly_depth", "butterfly_matrix", "butterfly_permutation"]


def butterfly_depth(dim: int, block_size: int) -> int:
    r"""The largest number of different factors, ``1 + v`` with ``2^v`` the largest power of 2 that divides ``n / b``.

    If ``n / b`` is itself a power of 2, the product of this many factors, ``1 + log2(n / b)``, is dense.

    Args:
        dim: Number of coordinates ``n``, a multiple of ``block_size``.
        block_size: ``b >= 1``. An odd ``b`` has no half blocks, so only factor 0.

    Returns:
        The depth, ``>= 1``.

    Raises:
        OptionError: ``block_size`` does not divide ``dim``.

    Example:
        >>> butterfly_depth(64, 8), butterfly_depth(24, 4), butterfly_depth(8, 8)
        (4, 2, 1)
    """
    if block_size < 1 or dim < 1 or dim % block_size:
        raise OptionError(f"block_size must divide dim; got dim={dim}, block_size={block_size}.")
    blocks = dim // block_size
    return 1 + ((blocks & -blocks).bit_length() - 1 if block_size % 2 == 0 else 0)


def butterfly_permutation(dim: int, factor: int, *, block_size: int) -> Int[Tensor, " dim"]:
    """The index that brings the coordinates that factor ``i`` couples next to each other, block after block.

    Args:
        dim: Number of coordinates.
        factor: ``i`` in ``0 ... butterfly_depth(dim, block_size) - 1``; 0 gives the identity.
        block_size: ``b``.

    Returns:
        Index of shape ``(dim,)``: coordinates ``index[j b : (j + 1) b]`` form block ``j``.

    Raises:
        OptionError: The sizes do not allow this factor.

    Example:
        >>> butterfly_permutation(8, 1, block_size=4).tolist()  # half blocks 0 and 2, then 1 and 3
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    return _gather(torch.arange(dim), _check_factor(dim, factor, block_size), block_size)


def apply_butterfly(blocks: Float[Tensor, "m k b b"], X: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    r"""Rows through all factors, ``x -> x F_0 F_1 ... F_{m-1}`` with ``F_i = P_i^T Diag(blocks_i) P_i``.

    Args:
        blocks: ``m`` factors of ``k`` blocks, shape ``(m, k, b, b)``; ``m`` at most ``butterfly_depth(k b, b)``.
        X: Rows, shape ``(..., k b)``.

    Returns:
        Shape and dtype of ``X``.

    Raises:
        ShapeError: The blocks do not cover ``n`` coordinates.
        OptionError: More factors than the sizes allow.

    Example:
        >>> from orthokit.linalg import cayley, skew_part
        >>> R = cayley(skew_part(torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))))
        >>> y = apply_butterfly(R, torch.eye(16)[:1])
        >>> round(float(y.norm()), 5), int((y != 0).sum())
        (1.0, 16)

    Numerics:
        ``m N n b`` multiplications for ``N`` rows, in the dtype of ``X``. The permutations between are transposed
        views, not gathers: they need no index and their backward pass is a view again.

    References:
        W. Liu et al. (2024), Parameter-efficient orthogonal finetuning via butterfly factorization, arXiv 2311.06243,
        section 4. Each factor here couples pairs of half blocks, in order of growing distance.
    """
    m, k, b = blocks.shape[:3]
    if X.ndim < 1 or X.shape[-1] != k * b:
        raise ShapeError(f"the blocks cover {k * b} coordinates; X has shape {tuple(X.shape)}.")
    for i in range(m):
        _check_factor(k * b, i, b)
        X = _scatter(apply_blocks(blocks[i], _gather(X, i, b)), i, b)
    return X


def butterfly_matrix(blocks: Float[Tensor, "m k b b"]) -> Float[Tensor, "n n"]:
    """The dense product ``F_0 F_1 ... F_{m-1}`` of the factors of :func:`apply_butterfly`.

    Args:
        blocks: Shape ``(m, k, b, b)``.

    Returns:
        Shape ``(k b, k b)``; orthogonal if every block is.

    Raises:
        OptionError: More factors than the sizes allow.

    Example:
        >>> butterfly_matrix(torch.eye(2).expand(3, 4, 2, 2)).equal(torch.eye(8))
        True
    """
    n = blocks.shape[1] * blocks.shape[2]
    return apply_butterfly(blocks, torch.eye(n, dtype=blocks.dtype, device=blocks.device))


def _gather(X: Tensor, factor: int, block_size: int) -> Tensor:
    """Half blocks (high digits, digit ``i``, low digits) in the order (high, low, digit ``i``)."""
    if factor == 0:
        return X
    half = block_size // 2
    return X.unflatten(-1, (-1, 2, 2**factor, half)).transpose(-3, -2).reshape(X.shape)


def _scatter(X: Tensor, factor: int, block_size: int) -> Tensor:
    if factor == 0:
        return X
    half = block_size // 2
    return X.unflatten(-1, (-1, 2**factor, 2, half)).transpose(-3, -2).reshape(X.shape)


def _check_factor(dim: int, factor: int, block_size: int) -> int:
    depth = butterfly_depth(dim, block_size)
    if not 0 <= factor < depth:
        found = f"dim={dim}, block_size={block_size} allow factors 0 to {depth - 1}; got {factor}"
        raise OptionError(f"{found}. Each further factor needs dim / block_size to be divisible by 2 once more.")
    return factor
