r"""Merging in the singular vectors of the changes: TSV-M, Iso-C, KnOTS and WUDI.

All of them take matrices, shape ``(..., out, in)``, with leading dimensions for batches; vectors are merged by
:func:`~orthokit.merging.averages.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg import polar
from orthokit.merging._common import check_range, finished, gathered, task_vectors, weighted_sum
from orthokit.merging._quadratic import gram_mean
from orthokit.merging._select import largest_cut, shrink_
from orthokit.merging.sparse import kept_entries, vote

__all__ = ["SOLVERS", "iso_c", "knots", "tsv", "wudi"]

SOLVERS = ("exact", "adam")
INNER = ("linear", "ties")


def tsv(
    base: Float[Tensor, "*batch out in"],
    experts: Sequence[Float[Tensor, "*batch out in"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    rank: int | None = None,
) -> Float[Tensor, "*batch out in"]:
    r"""The strongest singular directions of every change, turned apart so that tasks do not overlap (TSV-M).

    .. math::
        \theta = \theta_0 + \lambda\, P(\hat U)\, \hat S\, P(\hat V)^\top, \qquad
        \hat U = [U_1 \dots U_N],\ \hat S = \mathrm{diag}(w_1 S_1, \dots, w_N S_N),\ \hat V = [V_1 \dots V_N]

    with the first ``k`` singular triplets ``U_i, S_i, V_i`` of each :math:`\tau_i = \theta_i - \theta_0`, side by side,
    and the polar factor :math:`P`, the nearest matrix with orthonormal columns.

    Args:
        base: :math:`\theta_0`, shape ``(..., out, in)``.
        experts: One tensor per expert, shape of ``base``.
        weights: ``w_i`` on the singular values; default all 1.
        scale: :math:`\lambda`; default 1.
        rank: ``k``, ``>= 1``; default ``min(out, in) // N``, at least 1, which fills the space once. More than there
            are means all.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: ``rank`` below 1, no expert, or a wrong number of weights.
        ShapeError: A vector, or an expert whose shape is not that of ``base``.
        DtypeError, NonFiniteError: A tensor that is not real floating, or holds a NaN or an infinity.

    Example:
        Two changes of rank one whose inputs are 45 degrees apart: their sum is stronger in one direction and weaker in
        the other; apart, each keeps its own strength.

        >>> base, a, b = torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0], [2, 2]])
        >>> [round(value, 3) for value in torch.linalg.svdvals(tsv(base, [a, b])).tolist()]
        [3.0, 2.828]

    Numerics:
        In float32, or float64 for float64; one SVD per expert and two of the stacked vectors. Singular values below
        rounding have no direction and are left out.

    References:
        A. Gargiulo et al. (2025), Task singular vectors: reducing task interference in model merging, arXiv 2412.00081.
        Differences: weights; and the polar factor leaves out directions that the experts share to rounding, where the
        published form takes whatever the SVD returns: identical experts give the first ``k`` directions of one of them.
    """
    inputs = gathered(base, experts, weights, matrices=True)
    check_range("scale", scale)
    shortest = min(inputs.base.shape[-2:])
    if rank is not None and rank < 1:
        raise OptionError(f"rank must be at least 1; got {rank}. Leave it out for min(out, in) // experts.")
    k = min(shortest, max(1, shortest // len(inputs.experts)) if rank is None else rank)
    left, values, right = [], [], []
    for expert, factor in zip(inputs.experts, inputs.weights.tolist(), strict=True):
        U, S, Vh = _thin_svd(expert - inputs.base)
        real = (_rounding(S, inputs.base) < S)[..., :k].to(S.dtype)
        left.append(U[..., :k] * real.unsqueeze(-2))
        right.append(Vh[..., :k, :] * real.unsqueeze(-1))
        values.append(S[..., :k] * real * factor)
    S = torch.cat(values, -1)
    U, Vh = polar(torch.cat(left, -1)), polar(torch.cat(right, -2))
    return finished((U * S.unsqueeze(-2)) @ Vh, inputs, scale=scale, moved=True)


def iso_c(
    base: Float[Tensor, "*batch out in"],
    experts: Sequence[Float[Tensor, "*batch out in"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*batch out in"]:
    r"""The sum of all changes with its singular values made equal, so that no task drowns in another (Iso-C).

    .. math::
        \theta = \theta_0 + \lambda\, \bar\sigma\, U V^\top, \qquad
        \sum_i w_i \tau_i = U\,\mathrm{diag}(\sigma)\,V^\top, \quad \bar\sigma = \operatorname{mean}(\sigma)

    Args:
        base: :math:`\theta_0`, shape ``(..., out, in)``.
        experts: One tensor per expert, shape of ``base``.
        weights: ``w_i``, one per expert; default all 1.
        scale: :math:`\lambda`; default 1. Tune it.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: No expert, or a wrong number of weights.
        ShapeError: A vector, or an expert whose shape is not that of ``base``.
        DtypeError, NonFiniteError: A tensor that is not real floating, or holds a NaN or an infinity.

    Example:
        >>> base = torch.zeros(2, 2)
        >>> iso_c(base, [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])]).tolist()
        [[2.0, 0.0], [0.0, 2.0]]

    Numerics:
        In float32, or float64 for float64; one SVD. The nuclear norm of the sum is preserved.

    References:
        D. Marczak et al. (2025), No task left behind: isotropic model merging with common and task-specific subspaces,
        arXiv 2502.04959. Difference: singular values that are zero to rounding stay zero and do not enter the mean;
        the vectors that belong to them are an arbitrary choice of the SVD.
    """
    inputs = gathered(base, experts, weights, matrices=True)
    check_range("scale", scale)
    U, S, Vh = _thin_svd(weighted_sum(task_vectors(inputs), inputs.weights))
    real = (_rounding(S, inputs.base) < S).to(S.dtype)
    level = S.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    return finished((U * (level * real).unsqueeze(-2)) @ Vh, inputs, scale=scale, moved=True)


def knots(
    base: Float[Tensor, "*batch out in"],
    experts: Sequence[Float[Tensor, "*batch out in"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    inner: str = "linear",
    density: float = 0.2,
    election: str = "sum",
    eps: float = 1e-4,
) -> Float[Tensor, "*batch out in"]:
    r"""Any merging rule, but in output directions that all experts share (KnOTS).

    .. math::
        [\tau_1 \dots \tau_N] = U S\, [V_1^\top \dots V_N^\top], \qquad
        \theta = \theta_0 + \lambda\, U S\, \mathrm{Merge}(V_1^\top, \dots, V_N^\top)

    Args:
        base: :math:`\theta_0`, shape ``(..., out, in)``.
        experts: One tensor per expert, shape of ``base``.
        weights: One per expert, for the inner rule; default all 1.
        scale: :math:`\lambda`; default 1.
        inner: The rule: ``"linear"`` (default), the weighted mean, which gives the mean of the experts; ``"ties"``,
            trimming and the disjoint mean of :func:`~orthokit.merging.sparse.ties`.
        density: For ``"ties"``, the share of each :math:`V_i^\top` that is kept, in (0, 1]; default 0.2. A batch is
            trimmed as a whole.
        election: For ``"ties"``, ``"sum"`` (default) or ``"count"``.
        eps: Singular values at most this share of the largest are left out, in [0, 1); default 1e-4.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: ``density`` or ``eps`` out of range, a wrong number of weights, or weights summing to 0.
        UnknownNameError: Unknown ``inner`` or ``election``.
        ShapeError: A vector, or an expert whose shape is not that of ``base``.
        DtypeError, NonFiniteError: A tensor that is not real floating, or holds a NaN or an infinity.

    Example:
        >>> base = torch.zeros(2, 2)
        >>> experts = [torch.tensor([[4.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])]
        >>> knots(base, experts).round(decimals=4).tolist()
        [[2.0, 1.0], [1.0, 1.0]]

    Numerics:
        In float32, or float64 for float64; one SVD of ``out`` by ``N in``. With ``"linear"`` the mean of the experts up
        to what ``eps`` leaves out.

    References:
        G. Stoica, P. Ramesh, B. Ecsedi, L. Choshen, J. Hoffman (2024), Model merging with SVD to tie the KnOTS, arXiv
        2410.19735. Difference: ``eps`` is relative to the largest singular value.
    """
    inputs = gathered(base, experts, weights, mean=inner == "linear", matrices=True)
    check_range("scale", scale)
    check_range("density", density, above=0, most=1)
    if inner not in INNER:
        raise unknown_name("inner rule", inner, INNER)
    if check_range("eps", eps, least=0) >= 1:
        raise OptionError(f"eps must be less than 1, or no direction is left; got {eps}.")
    U, S, Vh = _thin_svd(torch.cat(task_vectors(inputs), -1))
    S = S * (eps * S[..., :1] < S)
    columns = inputs.base.shape[-1]
    own = [Vh[..., index * columns : (index + 1) * columns].contiguous() for index in range(len(inputs.experts))]
    if inner == "linear":
        merged = weighted_sum(own, inputs.weights / inputs.weights.sum())
    else:
        # Rows that do not count must not take places from those that do.
        own = [_trimmed(part * (S > 0).unsqueeze(-1), density) for part in own]
        merged = vote(own, weights=inputs.weights.tolist(), election=election)
    return finished((U * S.unsqueeze(-2)) @ merged, inputs, scale=scale, moved=True)


def wudi(
    base: Float[Tensor, "*batch out in"],
    experts: Sequence[Float[Tensor, "*batch out in"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    solver: str = "exact",
    ridge: float = 1e-8,
    steps: int = 300,
    lr: float = 1e-5,
) -> Float[Tensor, "*batch out in"]:
    r"""The change that interferes least with what each expert does on its own inputs, without any data (WUDI).

    .. math::
        \theta = \theta_0 + \lambda\,\tau, \qquad
        \tau = \arg\min_\tau \sum_i w_i \frac{\|(\tau - \tau_i)\, \tau_i^\top\|_F^2}{\|\tau_i\|_F^2}

    The rows of :math:`\tau_i` stand for the inputs of the layer, whose gradients they were made of. The loss is
    quadratic, so that

    .. math:: \tau \sum_i w_i G_i = \sum_i w_i \tau_i G_i, \qquad G_i = \tau_i^\top \tau_i / \|\tau_i\|_F^2 .

    Args:
        base: :math:`\theta_0`, shape ``(..., out, in)``.
        experts: One tensor per expert, shape of ``base``.
        weights: ``w_i >= 0``; default all 1.
        scale: :math:`\lambda`; default 1.
        solver: ``"exact"`` (default): solves the equation. ``"adam"``: ``steps`` steps of Adam from the sum of the
            changes, as published, where stopping early is part of the method; with enough steps the same answer.
        ridge: For ``"exact"``: added to each ``G_i``, relative to the mean diagonal of their mean, ``> 0``; default
            1e-8. It decides what no expert's rows reach.
        steps: For ``"adam"``, ``>= 1``; default 300.
        lr: For ``"adam"``: length of a step in every entry, ``> 0``; default 1e-5, the published value. It should be
            small against the entries of the changes.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: A negative weight or all zero, ``ridge``, ``steps`` or ``lr`` out of range.
        UnknownNameError: Unknown solver.
        ShapeError: A vector, or an expert whose shape is not that of ``base``.
        DtypeError, NonFiniteError: A tensor that is not real floating, or holds a NaN or an infinity.

    Example:
        Changes with inputs of their own do not interfere, and both are kept whole:

        >>> a, b = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
        >>> wudi(torch.zeros(2, 2), [a, b]).round(decimals=4).tolist()
        [[2.0, 0.0], [0.0, 3.0]]

    Numerics:
        In float64, since the equation squares the condition of the changes: ``N`` products of ``out in^2`` and one
        Cholesky factorisation of ``in`` by ``in``; Adam takes a product of ``out in^2`` per step.

    References:
        R. Cheng et al. (2025), Whoever started the interference should end it: guiding data-free model merging via
        task vectors, arXiv 2503.08099. The exact solution and its ridge are ours.
    """
    inputs = gathered(base, experts, weights, matrices=True, positive=True)
    check_range("scale", scale)
    check_range("ridge", ridge, above=0)
    check_range("lr", lr, above=0)
    if steps < 1:
        raise OptionError(f"steps must be at least 1; got {steps}.")
    if solver not in SOLVERS:
        raise unknown_name("solver", solver, SOLVERS)
    taus = [tau.double() for tau in task_vectors(inputs)]
    # A change of zero constrains nothing: its gram is zero, whatever it is divided by.
    sizes = [torch.linalg.matrix_norm(tau, keepdim=True).square() for tau in taus]
    grams = [tau.mT @ tau / size.masked_fill(size == 0, 1) for tau, size in zip(taus, sizes, strict=True)]
    factors = inputs.weights.tolist()
    tau = gram_mean(taus, grams, factors, ridge) if solver == "exact" else _descend(taus, grams, factors, steps, lr)
    return finished(tau.to(inputs.base.dtype), inputs, scale=scale, moved=True)


def _descend(taus: list[Tensor], grams: list[Tensor], factors: list[float], steps: int, lr: float) -> Tensor:
    """Adam on the loss of :func:`wudi`, from the sum of the changes; its gradient is written out."""
    gram = weighted_sum(grams, factors)
    target = weighted_sum([tau @ own for tau, own in zip(taus, grams, strict=True)], factors)
    tau = weighted_sum(taus, [1.0] * len(taus))
    optimizer = torch.optim.Adam([tau], lr=lr)
    for _ in range(steps):
        tau.grad = 2 * (tau @ gram - target)
        optimizer.step()
    return tau.detach()


def _trimmed(values: Tensor, density: float) -> Tensor:
    """``values`` with all but their largest entries set to zero, in place."""
    flat = values.view(-1)
    if density < 1 and len(flat):
        cut = largest_cut(lambda start, stop: flat[start:stop], len(flat), kept_entries(len(flat), density), flat)
        shrink_(flat, cut, 0)
    return values


def _thin_svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.svd``, thin; of the transpose for wide matrices, which LAPACK takes in about half the time."""
    if X.shape[-2] >= X.shape[-1]:
        return torch.linalg.svd(X, full_matrices=False)
    V, S, Uh = torch.linalg.svd(X.mT, full_matrices=False)
    return Uh.mT, S, V.mT


def _rounding(S: Tensor, like: Tensor) -> Tensor:
    """What a singular value has to exceed to be told from rounding."""
    return S[..., :1] * (max(like.shape[-2:]) * torch.finfo(S.dtype).eps)
