r"""Permutations as gathers, forward and backward.

An index ``p`` stands for the map ``x -> x[p]``: place ``i`` of the result takes what stood at ``p[i]``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError

__all__ = ["inverse_permutation", "permute", "random_permutation"]


def random_permutation(
    n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Int[Tensor, " n"]:
    """A permutation of ``0 ... n - 1``, all equally likely.

    Args:
        n: Number of places, ``>= 0``.
        generator: Source of randomness; default a fresh generator seeded from the operating system.
        device: Default the generator's device.

    Returns:
        Index of shape ``(n,)``, int64.

    Raises:
        OptionError: ``n`` is negative.

    Example:
        >>> p = random_permutation(5, generator=torch.Generator().manual_seed(0))
        >>> sorted(p.tolist())
        [0, 1, 2, 3, 4]
    """
    if n < 0:
        raise OptionError(f"n must be at least 0; got {n}.")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return torch.randperm(n, generator=generator, device=generator.device).to(device or generator.device)


def inverse_permutation(index: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The index that undoes a permutation: ``x[index][inverse_permutation(index)]`` is ``x``.

    Args:
        index: A permutation of ``0 ... n - 1``, shape ``(n,)``, int64 or int32.

    Returns:
        Shape, dtype and device of ``index``.

    Raises:
        OptionError: ``index`` is no permutation: a place is named twice, or lies outside ``0 ... n - 1``.

    Example:
        >>> inverse_permutation(torch.tensor([2, 0, 1])).tolist()
        [1, 2, 0]

    Numerics:
        A scatter, ``O(n)``; checking reads one number back from the device.
    """
    _check_index(index)
    n = len(index)
    places = torch.arange(n, dtype=index.dtype, device=index.device)
    inverse = torch.full_like(index, -1)
    if n and not bool(((index >= 0) & (index < n)).all()):
        raise OptionError(f"a permutation of {n} places holds 0 to {n - 1}; got {int(index.min())}-{int(index.max())}.")
    inverse[index] = places
    if bool((inverse < 0).any()):
        raise OptionError(f"a permutation names every place once; {int((inverse < 0).sum())} of {n} are missing.")
    return inverse


def permute(
    X: Shaped[Tensor, "*shape"],
    index: Int[Tensor, " n"],
    inverse: Int[Tensor, " n"] | None = None,
    *,
    dim: int = -1,
) -> Shaped[Tensor, "*shape"]:
    r"""Coordinates in another order, ``X[..., index]``, with a backward pass that is a gather too.

    The gradient of ``x -> x[p]`` is ``g -> g[p^{-1}]``. Automatic differentiation of indexing does not know that ``p``
    is a permutation and adds gradients up place by place; this does not.

    Args:
        X: Any shape and dtype.
        index: A permutation of the places along ``dim``, shape ``(n,)``.
        inverse: Its inverse; default computed by :func:`inverse_permutation` when a gradient is wanted. It is trusted.
        dim: The dimension to permute; default the last.

    Returns:
        Shape and dtype of ``X``.

    Raises:
        ShapeError: ``index`` does not have the length of ``dim``, or ``dim`` does not exist.
        OptionError: ``index`` is no permutation (checked only where the inverse is computed).

    Example:
        >>> X = torch.tensor([[10.0, 20.0, 30.0]])
        >>> permute(X, torch.tensor([2, 0, 1])).tolist()
        [[30.0, 10.0, 20.0]]

    Numerics:
        Exact. Saves the two indices for the backward pass and no copy of ``X``; differentiable any number of times.

    References:
        Z. Qiu et al. (2026), POET-X, arXiv 2603.05500, permutations as index maps.
    """
    _check_index(index)
    if not -X.ndim <= dim < X.ndim or X.shape[dim] != len(index):
        raise ShapeError(f"index must have the length of dimension {dim} of {tuple(X.shape)}; got {len(index)}.")
    if inverse is None:
        if not (X.requires_grad and torch.is_grad_enabled()):
            return X.index_select(dim, index)
        inverse = inverse_permutation(index)
    elif inverse.shape != index.shape:
        raise ShapeError(f"inverse must have the length of index, {len(index)}; got {tuple(inverse.shape)}.")
    return _Permute.apply(X, index, inverse, dim)  # type: ignore[no-any-return]


def _check_index(index: Tensor) -> None:
    if index.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"index must be int64 or int32; got {index.dtype}. Convert it with .long().")
    if index.ndim != 1:
        raise ShapeError(f"index must have one dimension; got shape {tuple(index.shape)}.")


class _Permute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(X: Tensor, index: Tensor, inverse: Tensor, dim: int) -> Tensor:
        return X.index_select(dim, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, inverse, ctx.dim = inputs
        ctx.save_for_backward(index, inverse)
        ctx.save_for_forward(index, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, index, ctx.dim), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        return _Permute.apply(tangent, index, inverse, ctx.dim)
