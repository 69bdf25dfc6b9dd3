r"""Merging by what each expert knows of its own data: input Grams, Fisher information, second moments of Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, ShapeError
from orthokit.merging._common import Gathered, check_range, finished, gathered, per_expert, task_vectors
from orthokit.merging._quadratic import gram_mean
from orthokit.merging._select import Cut, largest_cut, shrink_
from orthokit.merging.sparse import kept_entries

__all__ = ["RankOneMoment", "compress_second_moment", "curvature", "fisher", "regmean"]


class RankOneMoment(NamedTuple):
    """A second moment of a matrix as ``rows columns^T / total``: ``out + in`` numbers for ``out in``.

    Args:
        rows: Sums over each row, shape ``(..., out)``.
        columns: Sums over each column, shape ``(..., in)``.
    """

    rows: Tensor
    columns: Tensor

    def expand(self) -> Tensor:
        """The moment as a tensor of shape ``(..., out, in)``; zero where its total is."""
        total = self.rows.sum(-1)[..., None, None]
        # Divided before the product, whose factors may be 1e-20 each and leave the range of float32.
        return self.rows.unsqueeze(-1) / total.masked_fill(total == 0, 1) * self.columns.unsqueeze(-2)


def compress_second_moment(v: Float[Tensor, "*batch out in"]) -> RankOneMoment:
    r"""The second moment of a matrix from its row and column sums alone, for storing it next to a checkpoint.

    .. math:: v_{ab} \approx \frac{\sum_{b'} v_{ab'} \sum_{a'} v_{a'b}}{\sum_{a'b'} v_{a'b'}}

    Args:
        v: Second moment (Adam's ``exp_avg_sq``), ``>= 0``, shape ``(..., out, in)``.

    Returns:
        :class:`RankOneMoment`, in float64 for float64, else float32; ``.expand()`` gives the matrix back.

    Raises:
        ShapeError: Fewer than two dimensions.
        OptionError: A negative entry.
        DtypeError, NonFiniteError: Not real floating, or a NaN or an infinity.

    Example:
        Row and column sums are kept, and a moment of rank one is kept whole:

        >>> v = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
        >>> moment = compress_second_moment(v)
        >>> moment.rows.tolist(), torch.allclose(moment.expand(), v)
        ([4.0, 8.0], True)

    Numerics:
        Among all matrices of rank one it has the least generalised Kullback-Leibler divergence from ``v``.

    References:
        N. Shazeer, M. Stern (2018), Adafactor: adaptive learning rates with sublinear memory cost, arXiv 1804.04235,
        section 3.
    """
    work = gathered(None, [v], matrices=True).base
    _check_nonnegative("v", work)
    return RankOneMoment(work.sum(-1), work.sum(-2))


def regmean(
    base: Float[Tensor, "*batch out in"],
    experts: Sequence[Float[Tensor, "*batch out in"]],
    *,
    grams: Sequence[Float[Tensor, "*batch in in"]],
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    offdiagonal: float = 0.9,
    ridge: float = 1e-8,
) -> Float[Tensor, "*batch out in"]:
    r"""The matrix whose outputs are closest to those of each expert on that expert's own inputs (RegMean).

    .. math::
        W = \arg\min_W \sum_i w_i \|X_i (W - W_i)^\top\|_F^2
        = \Big(\sum_i w_i W_i G_i\Big) \Big(\sum_i w_i G_i\Big)^{-1}, \qquad G_i = X_i^\top X_i

    Args:
        base: Matrix or batch, shape ``(..., out, in)``.
        experts: :math:`W_i`, one tensor per expert, shape of ``base``.
        grams: :math:`G_i`, shape ``(..., in, in)``, symmetric and positive semidefinite: sums over the inputs of the
            layer, or means where experts saw different numbers of them.
        weights: ``w_i >= 0``, one per expert; default all 1.
        scale: Factor on the change against ``base``; default 1.
        offdiagonal: What the entries off the diagonal of every ``G_i`` are multiplied by, in [0, 1]; default 0.9. At 0
            each input feature is averaged by itself.
        ridge: Added to the diagonal of each ``G_i``, relative to the mean diagonal of their mean, ``> 0``; default
            1e-8. It decides directions that no input reached: there the result is the mean of the experts.

    Returns:
        The merged matrix, shape, dtype and device of ``base``.

    Raises:
        OptionError: ``offdiagonal`` or ``ridge`` out of range, a negative weight, or grams that are missing, too few,
            not symmetric, or have a negative diagonal.
        ShapeError: A vector, or an expert or Gram that does not fit; the message names it.
        DtypeError, NonFiniteError: A tensor that is not real floating, or holds a NaN or an infinity.

    Example:
        Each expert decides on the input that only it has seen:

        >>> experts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]
        >>> grams = [torch.diag(torch.tensor([5.0, 0.0])), torch.diag(torch.tensor([0.0, 7.0]))]
        >>> regmean(torch.zeros(1, 2), experts, grams=grams).round(decimals=4).tolist()
        [[1.0, 4.0]]

    Numerics:
        Solved for the changes against ``base``, in float64, by Cholesky: ``in^3 / 3`` FLOP and ``N`` products of
        ``out in^2``. Grams of rank below ``in`` are fine, see ``ridge``.

    References:
        X. Jin, X. Ren, D. Preotiuc-Pietro, P. Cheng (2023), Dataless knowledge fusion by merging weights of language
        models, arXiv 2212.09849. Difference: the ridge, which in theirs is left to ``offdiagonal``.
    """
    inputs = gathered(base, experts, weights, matrices=True, positive=True)
    check_range("scale", scale)
    check_range("offdiagonal", offdiagonal, least=0, most=1)
    check_range("ridge", ridge, above=0)
    shape = (*inputs.base.shape[:-2], inputs.base.shape[-1], inputs.base.shape[-1])
    own = [_damped(index, gram, shape, offdiagonal) for index, gram in enumerate(per_expert("grams", grams, inputs))]
    change = gram_mean(task_vectors(inputs), own, inputs.weights.tolist(), ridge)
    return finished(change.to(inputs.base.dtype), inputs, scale=scale, moved=True)


def fisher(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    fishers: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    floor: float = 1e-6,
) -> Float[Tensor, "*shape"]:
    r"""The mean of the experts, entry by entry, counted by how much each expert's loss depends on the entry.

    .. math:: \theta = \frac{\sum_i w_i F_i \odot \theta_i}{\sum_i w_i F_i}, \qquad F_i = E\,(\nabla \log p)^2

    Args:
        base: Any shape.
        experts: One tensor per expert, shape of ``base``.
        fishers: :math:`F_i >= 0`, diagonals of the Fisher information, shape of ``base``.
        weights: ``w_i >= 0``, one per expert; default all 1.
        scale: Factor on the change against ``base``; default 1.
        floor: Smaller entries of ``F_i`` are raised to it, ``> 0``; default 1e-6, absolute: Fishers far below it give
            the plain mean. Bring them to a common scale first, or lower it.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: A negative weight, ``floor`` out of range, or Fishers that are missing, too few or negative.
        ShapeError, DtypeError, NonFiniteError: An expert or Fisher that does not fit; the message names it.

    Example:
        >>> experts = [torch.tensor([0.0, 0.0]), torch.tensor([4.0, 4.0])]
        >>> fishers = [torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])]
        >>> fisher(torch.zeros(2), experts, fishers=fishers).tolist()
        [2.0, 1.0]

    Numerics:
        In float32, or float64 for float64, on the changes against ``base``.

    References:
        M. Matena, C. Raffel (2022), Merging models with Fisher-weighted averaging, arXiv 2111.09832.
    """
    inputs = gathered(base, experts, weights, positive=True)
    check_range("scale", scale)
    check_range("floor", floor, above=0)
    own = per_expert("fishers", fishers, inputs)
    _check_shapes("fishers", own, tuple(inputs.base.shape))
    numerator, denominator = torch.zeros_like(inputs.base), torch.zeros_like(inputs.base)
    for expert, diagonal, factor in zip(inputs.experts, own, inputs.weights.tolist(), strict=True):
        share = diagonal.clamp(min=floor).mul_(factor)
        denominator += share
        numerator.addcmul_(expert - inputs.base, share)
    return finished(numerator.div_(denominator), inputs, scale=scale, moved=True)


def curvature(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    second_moments: Sequence[Float[Tensor, "*shape"] | RankOneMoment],
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    power: float = 0.5,
    keep: float | None = None,
    threshold: float | Sequence[float] | None = None,
    eps: float = 1e-26,
) -> Float[Tensor, "*shape"]:
    r"""The mean of the changes counted by the curvature that Adam saw, of the entries that mattered (OTA with FFG).

    .. math::
        \theta = \theta_0 + \lambda\, \frac{\sum_i w_i\, v_i^{p}\, m_i\, \tau_i}{\sum_i w_i\, v_i^{p}\, m_i}, \qquad
        m_i = [\,v_i \tau_i^2 \ge t_i\,]

    entry by entry; the base where every mask is 0.

    Args:
        base: :math:`\theta_0`, any shape.
        experts: One tensor per expert, shape of ``base``.
        second_moments: :math:`v_i >= 0`, Adam's ``exp_avg_sq`` of each expert, shape of ``base``, or what
            :func:`compress_second_moment` made of it.
        weights: ``w_i >= 0``, one per expert; default all 1.
        scale: :math:`\lambda`; default 1.
        power: ``p``, ``>= 0``; default 0.5. At 0 all entries count the same.
        keep: Share of each expert's entries with the largest saliency :math:`v_i \tau_i^2`, in (0, 1]; the earlier in
            row-major order among equals. Default: no mask.
        threshold: :math:`t_i \ge 0` in place of ``keep``, one number or one per expert.
        eps: Added to every ``v_i``, ``> 0``; default 1e-26. Entries of zero moments thus count alike.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: An option out of range, ``keep`` with ``threshold``, a negative weight, or moments that are
            missing, too few or negative.
        ShapeError, DtypeError, NonFiniteError: An expert or moment that does not fit; the message names it.

    Example:
        The mask keeps one entry of each; where nobody kept anything the base stays.

        >>> experts = [torch.tensor([3.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 0.1])]
        >>> moments = [torch.ones(3), torch.ones(3)]
        >>> curvature(torch.zeros(3), experts, second_moments=moments, keep=0.4).tolist()
        [3.0, 2.0, 0.0]

    Numerics:
        In float32, or float64 for float64. Saliencies are compared by their roots, which stay in range.

    References:
        P. Mahdavinia, H. Mahdavi, N. Tang, R. Xia, X. Tang (2025), Harnessing optimization dynamics for
        curvature-informed model merging, arXiv 2509.11167. Difference: the mask also applies to the changes.
    """
    inputs = gathered(base, experts, weights, positive=True)
    check_range("scale", scale)
    check_range("power", power, least=0)
    check_range("eps", eps, above=0)
    moments = _moments(second_moments, inputs)
    limits = _limits(keep, threshold, len(moments))
    numerator, denominator = torch.zeros_like(inputs.base), torch.zeros_like(inputs.base)
    for expert, moment, factor, limit in zip(inputs.experts, moments, inputs.weights.tolist(), limits, strict=True):
        tau = expert - inputs.base
        share = (moment + eps).pow_(power).mul_(factor)
        if keep is not None or limit is not None:
            share *= _mask(tau, moment, keep, limit)
        denominator += share
        numerator.addcmul_(tau, share)
    return finished(numerator.div_(denominator.masked_fill_(denominator == 0, 1)), inputs, scale=scale, moved=True)


def _mask(tau: Tensor, moment: Tensor, keep: float | None, limit: float | None) -> Tensor:
    """1 where the saliency is large enough, else 0, in the dtype of ``tau``."""
    roots = moment.sqrt().mul_(tau.abs()).reshape(-1)
    if keep is None:
        return (roots >= (limit or 0.0) ** 0.5).to(tau.dtype).reshape(tau.shape)
    cut = Cut(0.0, len(roots))
    if keep < 1 and len(roots):
        cut = largest_cut(lambda start, stop: roots[start:stop], len(roots), kept_entries(len(roots), keep), roots)
    shrink_(roots, cut, 0)
    # With fewer salient entries than places, the zeros left over are no part of anything.
    return (roots > 0).to(tau.dtype).reshape(tau.shape) if keep < 1 else torch.ones_like(tau)


def _limits(keep: float | None, threshold: float | Sequence[float] | None, count: int) -> list[float | None]:
    if keep is not None and threshold is not None:
        raise OptionError("keep and threshold exclude each other; give a share or a limit, not both.")
    if keep is not None:
        check_range("keep", keep, above=0, most=1)
    if threshold is None:
        return [None] * count
    limits = [threshold] * count if isinstance(threshold, int | float) else list(threshold)
    if len(limits) != count:
        raise OptionError(f"threshold must be one number or one per expert; got {len(limits)} for {count} experts.")
    return [check_range("threshold", limit, least=0) for limit in limits]


def _moments(given: Sequence[Tensor | RankOneMoment] | None, inputs: Gathered) -> list[Tensor]:
    if isinstance(given, RankOneMoment):
        raise OptionError("second_moments= must be a list with one moment per expert; got one moment. Pass [moment].")
    dense: list[Tensor] | Tensor | None = None
    if isinstance(given, Tensor):
        dense = given
    elif given is not None:
        dense = [moment.expand() if isinstance(moment, RankOneMoment) else moment for moment in given]
    moments = per_expert("second_moments", dense, inputs)
    _check_shapes("second_moments", moments, tuple(inputs.base.shape))
    return moments


def _damped(index: int, gram: Tensor, shape: tuple[int, ...], offdiagonal: float) -> Tensor:
    name = f"grams[{index}]"
    if tuple(gram.shape) != shape:
        raise ShapeError(f"{name} must have shape {shape}, inputs by inputs; got {tuple(gram.shape)}.")
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    _check_nonnegative(f"the diagonal of {name}", diagonal)
    largest = float(diagonal.max())
    # Sums of products in float32 or bfloat16 are symmetric to their rounding, not to the bit.
    skew = float((gram - gram.mT).abs().max())
    if skew > 1e-2 * largest:
        raise OptionError(f"{name} must be symmetric, X^T X; two entries across the diagonal differ by {skew:.3g}.")
    damped = (gram + gram.mT).mul_(0.5 * offdiagonal)
    damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return damped


def _check_shapes(name: str, tensors: Sequence[Tensor], shape: tuple[int, ...]) -> None:
    for index, tensor in enumerate(tensors):
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name}[{index}] must have the shape of base, {shape}; got {tuple(tensor.shape)}.")
        _check_nonnegative(f"{name}[{index}]", tensor)


def _check_nonnegative(name: str, tensor: Tensor) -> None:
    if tensor.numel() and float(tensor.min()) < 0:
        raise OptionError(f"{name} must be at least 0; its smallest entry is {float(tensor.min()):.3g}.")
