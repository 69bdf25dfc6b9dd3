r"""Merging by averages: of weights, of changes, along an arc, and pulled back towards the base."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError
from orthokit.merging._common import check_range, finished, gathered, task_vectors, weighted_sum

__all__ = ["linear", "metrics_weighted", "model_stock", "slerp", "task_arithmetic"]

# Beyond this cosine sin(angle) is too small to divide by in float32, and arc and chord agree to 1e-4.
_PARALLEL = 0.9995


def linear(
    base: Float[Tensor, "*shape"] | None,
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    r"""The weighted mean of the experts (a model soup).

    .. math:: \theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}

    Args:
        base: What the experts were trained from, or ``None``: it only matters where ``scale`` is not 1.
        experts: One tensor per expert, any one shape.
        weights: ``w_i``, one per expert; default all 1. Negative ones are allowed.
        scale: Factor on the change against ``base``; default 1, which leaves the mean.
        normalize: Whether to divide by the sum of the weights; default ``True``.

    Returns:
        The merged tensor, shape of the experts; dtype and device of ``base``, or of the first expert without one.

    Raises:
        OptionError: No expert, a wrong number of weights, weights summing to 0, or ``scale`` without ``base``.
        ShapeError, DtypeError, NonFiniteError: An expert that does not fit; the message names it.

    Example:
        >>> linear(None, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], weights=[3, 1]).tolist()
        [1.5, 3.0]

    Numerics:
        In float32, or float64 for float64; one pass per expert, summed first and divided once.

    References:
        M. Wortsman et al. (2022), Model soups: averaging weights of multiple fine-tuned models improves accuracy
        without increasing inference time, arXiv 2203.05482.
    """
    inputs = gathered(base, experts, weights, mean=normalize)
    _check_scale(scale, base)
    total = weighted_sum(inputs.experts, inputs.weights)
    if normalize:
        total /= inputs.weights.sum()
    return finished(total, inputs, scale=scale)


def task_arithmetic(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 0.3,
) -> Float[Tensor, "*shape"]:
    r"""The base plus a multiple of the sum of what each expert changed.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i \tau_i, \qquad \tau_i = \theta_i - \theta_0

    Args:
        base: :math:`\theta_0`, any shape.
        experts: One tensor per expert, shape of ``base``.
        weights: ``w_i``, one per expert; default all 1. A negative one takes a task away.
        scale: :math:`\lambda`; default 0.3, the field's value for about eight tasks. With ``1 / N`` the result is
            :func:`linear`. Tune it: no other choice of this method matters as much.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: No expert, or a wrong number of weights.
        ShapeError, DtypeError, NonFiniteError: An expert that does not fit; the message names it.

    Example:
        >>> base, experts = torch.ones(2), [torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0])]
        >>> task_arithmetic(base, experts, scale=0.5).tolist()
        [2.0, 3.0]

    Numerics:
        In float32, or float64 for float64. Differences are taken before they are weighted, so that an expert close to
        the base does not cancel; two passes per expert and one buffer.

    References:
        G. Ilharco et al. (2023), Editing models with task arithmetic, arXiv 2212.04089.
    """
    inputs = gathered(base, experts, weights)
    check_range("scale", scale)
    factors = inputs.weights.tolist()
    total = inputs.experts[0] - inputs.base
    total *= factors[0]
    scratch = torch.empty_like(total) if len(factors) > 1 else total
    for expert, factor in zip(inputs.experts[1:], factors[1:], strict=True):
        total.add_(torch.sub(expert, inputs.base, out=scratch), alpha=factor)
    return finished(total, inputs, scale=scale, moved=True)


def slerp(
    base: Float[Tensor, "*shape"] | None,
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    t: float = 0.5,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""The point between two tensors on the arc through both, each taken as one long vector.

    .. math::
        \theta = \frac{\sin((1 - t)\,\omega)}{\sin\omega}\,\theta_1 + \frac{\sin(t\,\omega)}{\sin\omega}\,\theta_2,
        \qquad \omega = \angle(\theta_1, \theta_2)

    Args:
        base: What the experts were trained from, or ``None``: it only matters where ``scale`` is not 1. The arc goes
            between the weights themselves, not between their changes.
        experts: Exactly two tensors of one shape.
        t: Where on the arc, in [0, 1]: 0 is the first, 1 the second; default 0.5.
        scale: Factor on the change against ``base``; default 1.
        weights: Not used, and refused unless both are equal: ``t`` says how much each counts.

    Returns:
        The merged tensor, shape of the experts; dtype and device of ``base``, or of the first expert without one.

    Raises:
        OptionError: Not two experts, ``t`` outside [0, 1], unequal weights, or ``scale`` without ``base``.
        ShapeError, DtypeError, NonFiniteError: An expert that does not fit; the message names it.

    Example:
        Between two unit vectors the result is a unit vector; their mean would be shorter:

        >>> halfway = slerp(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        >>> round(halfway.norm().item(), 6), [round(x, 4) for x in halfway.tolist()]
        (1.0, [0.7071, 0.7071])

    Numerics:
        In float32, or float64 for float64; three passes for norms and angle and two for the sum. Linear interpolation
        where the cosine is beyond 0.9995 in size, so also between opposite tensors, and where one tensor is zero and
        has no direction.

    References:
        K. Shoemake (1985), Animating rotation with quaternion curves; for models as in the mergekit library, whose
        threshold this is. The case of a zero tensor is ours.
    """
    inputs = gathered(base, experts, weights, least=2, most=2)
    check_range("t", t, least=0, most=1)
    _check_scale(scale, base)
    if float(inputs.weights[0]) != float(inputs.weights[1]):
        raise OptionError(f"slerp takes no weights; got {inputs.weights.tolist()}. Say t= instead, 0 to 1.")
    a, b = inputs.experts
    return finished(weighted_sum([a, b], _arc(a, b, float(t))), inputs, scale=scale)


def model_stock(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    filter_wise: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""The mean of the experts, pulled towards the base the more their changes disagree.

    .. math::
        \theta = t\,\bar\theta + (1 - t)\,\theta_0, \qquad t = \frac{N c}{1 + (N - 1)\,c},
        \qquad c = \frac{2}{N (N - 1)} \sum_{i < j} \cos(\tau_i, \tau_j)

    Args:
        base: :math:`\theta_0`, any shape.
        experts: At least two tensors, shape of ``base``.
        weights: One per expert, for the mean :math:`\bar\theta` alone; default all 1.
        scale: Factor on the change; default 1, as ``t`` already says how far to go.
        filter_wise: Whether each row (the last dimension) has its own ``c`` and ``t``; default ``False``, one for the
            tensor.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: Fewer than two experts, a wrong number of weights, or weights summing to 0.
        ShapeError, DtypeError, NonFiniteError: An expert that does not fit; the message names it.

    Example:
        Changes at right angles share nothing, so the base stays; equal changes are taken whole:

        >>> base = torch.zeros(2)
        >>> model_stock(base, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]).tolist()
        [0.0, 0.0]
        >>> model_stock(base, [torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])]).tolist()
        [0.0, 2.0]

    Numerics:
        In float32, or float64 for float64; ``N (N + 1) / 2`` inner products on one buffer per expert. A change of
        zero has no direction and counts as cosine 0.

    References:
        D.-H. Jang, S. Yun, D. Han (2024), Model Stock: all we need is just a few fine-tuned models, arXiv 2403.19522.
        Differences: ``t`` is clipped to [0, 1]. The formula gives ``t < 0`` for a negative mean cosine, a step away
        from every expert (three experts at -0.2: ``t = -1``), and is used unclipped elsewhere.
    """
    inputs = gathered(base, experts, weights, mean=True, least=2)
    check_range("scale", scale)
    taus = task_vectors(inputs)
    cosine = _mean_cosine(taus, rows=filter_wise and inputs.base.ndim > 0)
    share = (len(taus) * cosine / (1 + (len(taus) - 1) * cosine).clamp(min=torch.finfo(cosine.dtype).eps)).clamp(0, 1)
    total = taus[0].mul_(inputs.weights[0])
    for tau, factor in zip(taus[1:], inputs.weights.tolist()[1:], strict=True):
        total.add_(tau, alpha=factor)
    return finished(total.mul_(share / inputs.weights.sum()), inputs, scale=scale, moved=True)


def metrics_weighted(
    base: Float[Tensor, "*shape"] | None,
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    losses: Sequence[float] | None = None,
    steps: Sequence[float] | None = None,
    power: float = 1.0,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""The mean of checkpoints, each counted by how well or how long it was trained.

    .. math:: \theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}, \qquad w_i = \ell_i^{-p} \quad\text{or}\quad w_i = n_i^p

    Args:
        base: What the experts were trained from, or ``None``: it only matters where ``scale`` is not 1.
        experts: One tensor per checkpoint, any one shape.
        losses: :math:`\ell_i > 0`, one per expert, in any unit.
        steps: :math:`n_i > 0`, one per expert. Give either ``losses`` or ``steps``.
        power: ``p``, ``>= 0``; default 1. At 0 all count the same.
        weights: Further factors, ``>= 0``; default all 1.
        scale: Factor on the change against ``base``; default 1.

    Returns:
        The merged tensor, shape of the experts; dtype and device of ``base``, or of the first expert without one.

    Raises:
        OptionError: No expert, neither or both of ``losses`` and ``steps``, a wrong number of them or one that is not
            positive, ``power`` below 0, or ``scale`` without ``base``.
        ShapeError, DtypeError, NonFiniteError: An expert that does not fit; the message names it.

    Example:
        >>> metrics_weighted(None, [torch.tensor([0.0]), torch.tensor([4.0])], losses=[3.0, 1.0]).tolist()
        [3.0]

    Numerics:
        As :func:`linear`. Weights go through logarithms relative to the largest, so no power overflows.

    References:
        After the metrics-weighted averaging of arXiv 2504.18580, whose abstract states weights from loss or step and
        one exponent. The form above is ours: the exact one was not at hand, so do not take results for theirs.
    """
    inputs = gathered(base, experts, weights, positive=True)
    _check_scale(scale, base)
    factors = inputs.weights.new_tensor(_metric_weights(len(inputs.experts), losses, steps, power))
    factors *= inputs.weights
    return finished(weighted_sum(inputs.experts, factors / factors.sum()), inputs, scale=scale)


def _arc(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    """The factors of ``a`` and ``b`` at ``t`` on the arc, or on the chord where there is no arc to speak of."""
    length_a, length_b = (float(torch.linalg.vector_norm(x)) for x in (a, b))
    if length_a == 0 or length_b == 0:
        return 1 - t, t
    # Divided before the product, whose squares would leave the range of float32 for entries beyond 1e19.
    cosine = float(torch.dot((a / length_a).reshape(-1), b.reshape(-1))) / length_b
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _mean_cosine(taus: list[Tensor], *, rows: bool) -> Tensor:
    """The mean cosine over pairs: one number, or one per row with a last dimension of 1."""
    flat = taus if rows else [tau.reshape(-1) for tau in taus]
    lengths = [torch.linalg.vector_norm(tau, dim=-1) for tau in flat]
    tiny = torch.finfo(taus[0].dtype).tiny
    total = torch.zeros_like(lengths[0])
    for i, j in itertools.combinations(range(len(flat)), 2):
        inner = (flat[i] * flat[j]).sum(-1) if rows else torch.dot(flat[i], flat[j])
        total += (inner / (lengths[i] * lengths[j]).clamp(min=tiny)).clamp(-1, 1)
    total /= len(flat) * (len(flat) - 1) / 2
    return total.unsqueeze(-1) if rows else total


def _metric_weights(
    count: int, losses: Sequence[float] | None, steps: Sequence[float] | None, power: float
) -> list[float]:
    if (losses is None) == (steps is None):
        raise OptionError("metrics_weighted needs either losses= or steps=, one number per expert.")
    name, values, sign = ("steps", steps, 1.0) if losses is None else ("losses", losses, -1.0)
    values = [float(value) for value in values or ()]
    if len(values) != count:
        raise OptionError(f"{name} must hold one number per expert; got {len(values)} for {count} experts.")
    for index, value in enumerate(values):
        check_range(f"{name}[{index}]", value, above=0)
    check_range("power", power, least=0)
    logarithms = [sign * power * math.log(value) for value in values]
    return [math.exp(logarithm - max(logarithms)) for logarithm in logarithms]


def _check_scale(scale: float, base: Tensor | None) -> None:
    check_range("scale", scale)
    if scale != 1 and base is None:
        raise OptionError(f"scale={scale:g} stretches the change against the base; pass base, or leave scale at 1.")
