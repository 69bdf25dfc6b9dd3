r"""What a model has forgotten after learning one task after another, read from its scores on all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import NonFiniteError, OptionError, ShapeError

__all__ = ["ForgettingMatrix", "forgetting_matrix"]


def forgetting_matrix(
    scores: Float[Tensor, "*runs tasks tasks"],
    *,
    lower_is_better: bool = False,
    before: Float[Tensor, "*runs tasks"] | None = None,
) -> ForgettingMatrix:
    r"""Forgetting and transfer of a sequence of tasks, from the matrix of scores.

    Args:
        scores: ``A[t, k]``: score on task ``k`` after learning tasks ``0 ... t``, shape ``(..., T, T)``, ``T >= 2``.
            Above the diagonal NaN stands for "not measured"; leading axes are runs, such as seeds.
        lower_is_better: The scores are losses or errors. Default ``False``.
        before: Scores before the first task, shape ``(..., T)``; only :attr:`ForgettingMatrix.forward_transfer` needs
            them.

    Returns:
        The :class:`ForgettingMatrix`.

    Raises:
        ShapeError: Not square, fewer than two tasks, or ``before`` that does not fit.
        NonFiniteError: A score on or below the diagonal, or an infinity anywhere.

    Example:
        >>> nan = float("nan")
        >>> found = forgetting_matrix(torch.tensor([[0.9, nan], [0.6, 0.8]]))
        >>> [round(x, 3) for x in (found.forgetting.item(), found.backward_transfer.item(), found.average.item())]
        [0.3, -0.3, 0.7]
    """
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2] or scores.shape[-1] < 2:
        raise ShapeError(f"scores must be square (..., T, T) with T >= 2 tasks; got shape {tuple(scores.shape)}.")
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if not bool(scores[..., seen].isfinite().all()) or bool(scores.isinf().any()):
        raise NonFiniteError("scores on tasks already learned must be finite; leave runs that diverged out.")
    if before is not None and before.shape != scores.shape[:-1]:
        raise ShapeError(f"before must have shape {tuple(scores.shape[:-1])}; got {tuple(before.shape)}.")
    return ForgettingMatrix(scores, lower_is_better, before)


@dataclass(frozen=True, eq=False)
class ForgettingMatrix:
    r"""Scores on every task after every task, and what they say; made by :func:`forgetting_matrix`.

    With ``A`` turned so that larger is better and ``T`` the last task:

    .. math::
        F_k = \max_{l < T} A_{l,k} - A_{T,k}, \qquad
        \mathrm{BWT} = \frac{1}{T-1} \sum_{k<T} (A_{T,k} - A_{k,k}), \qquad
        \mathrm{FWT} = \frac{1}{T-1} \sum_{k>1} (A_{k-1,k} - b_k)

    Forgetting is positive and backward transfer negative when a task got worse, whichever way the scores point.

    Args:
        scores: See :func:`forgetting_matrix`.
        lower_is_better: See :func:`forgetting_matrix`.
        before: See :func:`forgetting_matrix`.

    Numerics:
        In the dtype of the scores. The maximum runs over all earlier rows that were measured, also those before task
        ``k`` was learned.

    References:
        D. Lopez-Paz, M. Ranzato (2017), Gradient episodic memory, arXiv 1706.08840, for transfer; A. Chaudhry et al.
        (2018), Riemannian walk for incremental learning, arXiv 1801.10112, for forgetting. Their index ``T`` counts
        from 1, ours from 0.
    """

    scores: Float[Tensor, "*runs tasks tasks"]
    lower_is_better: bool = False
    before: Float[Tensor, "*runs tasks"] | None = None

    @property
    def _upward(self) -> Tensor:
        return -self.scores if self.lower_is_better else self.scores

    @property
    def forgetting(self) -> Float[Tensor, "*runs earlier"]:
        """By how much each task but the last is worse at the end than at its best, shape ``(..., T - 1)``."""
        A = self._upward
        # What was not measured cannot be the best.
        best = A[..., :-1, :-1].nan_to_num(nan=-torch.inf).amax(-2)
        return best - A[..., -1, :-1]

    @property
    def mean_forgetting(self) -> Float[Tensor, "*runs"]:
        """The mean of :attr:`forgetting` over tasks, one number a run."""
        return self.forgetting.mean(-1)

    @property
    def backward_transfer(self) -> Float[Tensor, "*runs"]:
        """What later tasks did to earlier ones on average, one number a run; negative: they were damaged."""
        A = self._upward
        return (A[..., -1, :-1] - A.diagonal(dim1=-2, dim2=-1)[..., :-1]).mean(-1)

    @property
    def forward_transfer(self) -> Float[Tensor, "*runs"]:
        """What earlier tasks did to later ones before these were learned, one number a run.

        Raises:
            OptionError: The scores before the first task, or those one above the diagonal, were not given.
        """
        A = self._upward
        ahead = A.diagonal(offset=1, dim1=-2, dim2=-1)
        if self.before is None or bool(ahead.isnan().any()) or bool(self.before.isnan().any()):
            raise OptionError("forward transfer needs before= and the scores of every next task; some are missing.")
        start = -self.before if self.lower_is_better else self.before
        return (ahead - start[..., 1:]).mean(-1)

    @property
    def average(self) -> Float[Tensor, "*runs"]:
        """Mean score over all tasks at the end, in the units and sense of the scores."""
        return self.scores[..., -1, :].mean(-1)

    @property
    def learned(self) -> Float[Tensor, "*runs"]:
        """Mean score of every task just after it was learned: the plasticity that is left."""
        return self.scores.diagonal(dim1=-2, dim2=-1).mean(-1)
