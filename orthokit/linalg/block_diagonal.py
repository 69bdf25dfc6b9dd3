r"""Block-diagonal factors applied as a batch of small products; the large matrix is never formed.

Everything is in row form, as activations are stored: a row vector ``x`` becomes ``x D`` with
``D = Diag(R_1, ..., R_k)``. Blocks are one stack ``(k, b, b)``, or several stacks of different sizes in order, such as
``[(2, 4, 4), (1, 3, 3)]`` for 11 coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, ShapeError

__all__ = ["apply_blocks", "block_diagonal", "block_sizes", "rotate_blocks"]


def block_sizes(dim: int, block_size: int) -> list[int]:
    """The sizes of the blocks that cover ``dim`` coordinates: as many full blocks as fit, then one smaller block.

    No coordinate is left out and no size is refused: what ``block_size`` does not divide gets a block of its own, as
    large as the remainder. A remainder of 1 is a block that cannot rotate (a 1 x 1 skew matrix is 0): that coordinate
    stays where it is until another permutation sends it elsewhere.

    Args:
        dim: Number of coordinates, ``>= 1``.
        block_size: Size of the full blocks, ``>= 1``; larger than ``dim`` gives one block of size ``dim``.

    Returns:
        Sizes that sum to ``dim``, all ``block_size`` but perhaps the last.

    Raises:
        OptionError: A size below 1.

    Example:
        >>> block_sizes(12, 4), block_sizes(11, 4), block_sizes(3, 4)
        ([4, 4, 4], [4, 4, 3], [3])
    """
    if dim < 1 or block_size < 1:
        raise OptionError(f"need dim >= 1 and block_size >= 1; got dim={dim}, block_size={block_size}.")
    full, rest = divmod(dim, block_size)
    return [block_size] * full + [rest] * (rest > 0)


def block_diagonal(
    blocks: Float[Tensor, "*batch k b b"] | Sequence[Float[Tensor, "_ _ _"]],
) -> Float[Tensor, "*batch n n"]:
    """The dense matrix ``Diag(R_1, ..., R_k)``, for tests and small sizes.

    Args:
        blocks: One stack ``(..., k, b, b)`` or several, in order.

    Returns:
        Shape ``(..., n, n)`` with ``n`` the sum of the block sizes.

    Raises:
        ShapeError: A stack is not ``(..., k, b, b)``, or there is none.

    Example:
        >>> block_diagonal([torch.ones(1, 2, 2), 3 * torch.ones(1, 1, 1)]).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 3.0]]

    Numerics:
        A copy; exact and differentiable in every dtype. ``n^2`` entries where :func:`apply_blocks` needs ``n b``.
    """
    stacks = _stacks(blocks, None)
    n = sum(stack.shape[-3] * stack.shape[-1] for stack in stacks)
    dense = stacks[0].new_zeros(*stacks[0].shape[:-3], n, n)
    start = 0
    for stack in stacks:
        k, b = stack.shape[-3], stack.shape[-1]
        at = start + torch.arange(k * b, device=stack.device).view(k, b)
        dense[..., at[:, :, None], at[:, None, :]] = stack
        start += k * b
    return dense


def apply_blocks(
    blocks: Float[Tensor, "k b b"] | Sequence[Float[Tensor, "_ _ _"]], X: Float[Tensor, "*rows n"]
) -> Float[Tensor, "*rows n"]:
    r"""Every block applied to its own coordinates: ``x -> x Diag(R_1, ..., R_k)`` for each row ``x``.

    Args:
        blocks: One stack ``(k, b, b)``, or several stacks in order (see :func:`block_sizes`).
        X: Rows, shape ``(..., n)`` with ``n`` the sum of the block sizes.

    Returns:
        Shape and dtype of ``X``.

    Raises:
        ShapeError: The blocks are not square, or their sizes do not sum to ``n``.

    Example:
        >>> quarter = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])
        >>> apply_blocks(quarter.expand(2, 2, 2), torch.tensor([[1.0, 0.0, 0.0, 1.0]])).tolist()
        [[0.0, 1.0, -1.0, 0.0]]

    Numerics:
        One batched product of ``N n b`` multiplications for ``N`` rows, against ``N n^2`` with the dense matrix; in
        the dtype of ``X``. The backward pass keeps ``X`` and the blocks, nothing else.

    References:
        Z. Qiu et al. (2025), Orthogonal finetuning made scalable, arXiv 2506.19847: input-centric form. Z. Qiu et al.
        (2026), POET-X, arXiv 2603.05500: blocks as a batch. The rule for sizes that do not divide is ours.
    """
    stacks = _stacks(blocks, X.shape[-1] if X.ndim else 0)
    if len(stacks) == 1:
        return _apply_stack(stacks[0], X)
    parts = X.split([stack.shape[0] * stack.shape[-1] for stack in stacks], dim=-1)
    return torch.cat([_apply_stack(stack, part) for stack, part in zip(stacks, parts, strict=True)], dim=-1)


def rotate_blocks(
    W: Float[Tensor, "*batch out in"],
    *,
    left: Float[Tensor, "*any k b b"] | Sequence[Float[Tensor, "_ _ _"]] | None = None,
    right: Float[Tensor, "*some j c c"] | Sequence[Float[Tensor, "_ _ _"]] | None = None,
) -> Float[Tensor, "*batch out in"]:
    r"""A weight with block-diagonal factors merged in: ``Diag(left) W Diag(right)``.

    ``right`` mixes input coordinates and keeps the angles between neurons (the rows); ``left`` mixes neurons.
    A layer ``y = x W^T`` whose inputs are rotated first, ``apply_blocks(R, x) W^T``, has the merged weight
    ``rotate_blocks(W, right=R.mT)``.

    Args:
        W: Weight or batch, shape ``(..., out, in)``.
        left: Blocks whose sizes sum to ``out``: one stack, with the leading dimensions of ``W`` or without, or several
            stacks without leading dimensions. None leaves that side alone.
        right: The same for ``in``.

    Returns:
        Shape and dtype of ``W``; ``W`` itself if both sides are None.

    Raises:
        ShapeError: The blocks are not square, or their sizes do not sum to the side they act on.

    Example:
        >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> rotate_blocks(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), left=swap).tolist()
        [[3.0, 4.0], [1.0, 2.0]]

    Numerics:
        ``out in b`` multiplications a side, in the dtype of ``W``.

    References:
        Z. Qiu et al. (2026), POET-X, arXiv 2603.05500: the merge as tiles.
    """
    if right is not None:
        stacks = _stacks(right, W.shape[-1])
        W = _rotate_right(stacks[0], W) if stacks[0].ndim > 3 else apply_blocks(stacks, W)
    if left is not None:
        stacks = _stacks(left, W.shape[-2])
        parts = W.split([stack.shape[-3] * stack.shape[-1] for stack in stacks], dim=-2)
        done = [_rotate_left(stack, part) for stack, part in zip(stacks, parts, strict=True)]
        W = done[0] if len(done) == 1 else torch.cat(done, dim=-2)
    return W


def _apply_stack(stack: Tensor, X: Tensor) -> Tensor:
    k, b = stack.shape[0], stack.shape[-1]
    # (k, N, b) is a view of the rows: strided, but each block's slice is what a matrix product takes without a copy.
    Y = X.reshape(-1, k, b).transpose(0, 1) @ stack
    return Y.transpose(0, 1).reshape(X.shape)


def _rotate_right(stack: Tensor, W: Tensor) -> Tensor:
    k, b = stack.shape[-3], stack.shape[-1]
    return (W.unflatten(-1, (k, b)).transpose(-3, -2) @ stack).transpose(-3, -2).reshape(W.shape)


def _rotate_left(stack: Tensor, W: Tensor) -> Tensor:
    k, b = stack.shape[-3], stack.shape[-1]
    return (stack @ W.unflatten(-2, (k, b))).reshape(W.shape)


def _stacks(blocks: Tensor | Sequence[Tensor], dim: int | None) -> list[Tensor]:
    """The stacks of ``blocks``, checked to be square and to cover ``dim`` coordinates exactly."""
    stacks = [blocks] if isinstance(blocks, Tensor) else list(blocks)
    if not stacks:
        raise ShapeError("blocks must hold at least one stack of shape (k, b, b); got none.")
    for stack in stacks:
        if stack.ndim < 3 or stack.shape[-1] != stack.shape[-2]:
            raise ShapeError(f"blocks must be square, shape (k, b, b); got {tuple(stack.shape)}.")
        if len(stacks) > 1 and stack.shape[:-3] != stacks[0].shape[:-3]:
            shapes = [tuple(s.shape) for s in stacks]
            raise ShapeError(f"several stacks of blocks must share their leading dimensions; got {shapes}.")
    if len(stacks) > 1 and stacks[0].ndim > 3 and dim is not None:
        raise ShapeError("several stacks of blocks cannot have leading dimensions; apply them matrix by matrix.")
    covered = sum(stack.shape[-3] * stack.shape[-1] for stack in stacks)
    if dim is not None and covered != dim:
        raise ShapeError(f"the blocks must cover {dim} coordinates; they cover {covered}. See block_sizes.")
    return stacks
