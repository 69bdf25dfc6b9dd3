r"""Fisher information of a trained model on a task: its diagonal, its best rank-one form, and how collinear it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.diagnostics._modes import evaluating
from orthokit.errors import NonFiniteError, OptionError, ShapeError
from orthokit.lab.example_gradients import (
    Rows,
    example_rows,
    gradients_of_rows,
    per_example_gradients,
    trainable_parameters,
)
from orthokit.lab.tasks import Task

__all__ = ["Collinearity", "RankOneFisher", "collinearity", "fisher_diagonal", "rank_one_fisher"]

# Per-example gradients that the readout keeps: the top eigenvalue needs them side by side.
_READOUT, _READOUT_NUMBERS = 64, 2**27


def fisher_diagonal(
    model: nn.Module,
    task: Task,
    *,
    samples: int = 256,
    kind: str = "true",
    seed: int = 0,
    first: int = 10**6,
    chunk: int = 32,
) -> dict[str, Tensor]:
    r"""The diagonal of the Fisher information: how much each parameter matters for what the model predicts.

    .. math:: F_p = \frac{1}{N} \sum_i \Big(\frac{\partial \ell_i}{\partial \theta_p}\Big)^2

    Args:
        model: Trained on the task; not changed.
        task: See :func:`per_example_gradients`.
        samples: ``N >= 1``; default 256.
        kind: ``"true"`` (default) or ``"empirical"``; see :func:`per_example_gradients`.
        seed: See :func:`per_example_gradients`.
        first: See :func:`per_example_gradients`.
        chunk: See :func:`per_example_gradients`.

    Returns:
        Name of a trainable parameter to its part of the diagonal, not negative, float32 or better.

    Raises:
        UnknownNameError: Unknown kind.
        OptionError: A number out of range.
        NonFiniteError: A gradient is not finite.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> found = fisher_diagonal(SmallCNN(width=2), image_classification("digits", batch=8), samples=4)
        >>> found["head.weight"].shape, bool((found["head.weight"] >= 0).all())
        (torch.Size([10, 64]), True)

    Numerics:
        The relative error of an entry falls like ``1/sqrt(N)``. For windows of text this is the Fisher information of
        the mean loss of a window with the text before each byte as it is.

    References:
        J. Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, arXiv 1612.00796; F.
        Kunstner et al. (2019), Limitations of the empirical Fisher approximation, arXiv 1905.12558.
    """
    options: dict[str, Any] = {"samples": samples, "kind": kind, "seed": seed, "first": first, "chunk": chunk}
    total: dict[str, Tensor] = {}
    for found in per_example_gradients(model, task, **options):
        for name, g in found.items():
            squares = g.to(torch.promote_types(g.dtype, torch.float32)).square().sum(0)
            total[name] = total[name] + squares if name in total else squares
    _check_finite(total)
    return {name: squares / samples for name, squares in total.items()}


def rank_one_fisher(
    model: nn.Module,
    task: Task,
    *,
    samples: int = 256,
    kind: str = "empirical",
    seed: int = 0,
    first: int = 10**6,
    chunk: int = 32,
) -> RankOneFisher:
    r"""The Fisher information as one direction, and how much of it that direction holds.

    With the mean gradient :math:`\mu` the nearest multiple of :math:`\mu\mu^\top` in the Frobenius norm is

    .. math:: F \approx c^* \mu\mu^\top, \qquad c^* = \frac{\mu^\top F \mu}{\lVert\mu\rVert^4}, \qquad
        \mu^\top F \mu = \frac{1}{N} \sum_i (g_i \cdot \mu)^2

    Args:
        model: Trained on the task; not changed.
        task: See :func:`per_example_gradients`; the loss of a batch must be the mean over its examples.
        samples: ``N >= 2``; default 256.
        kind: ``"empirical"`` (default) or ``"true"``. With labels drawn from the model the mean gradient is 0 in
            expectation, and its direction noise.
        seed: See :func:`per_example_gradients`.
        first: See :func:`per_example_gradients`.
        chunk: See :func:`per_example_gradients`.

    Returns:
        The :class:`RankOneFisher`.

    Raises:
        UnknownNameError: Unknown kind.
        OptionError: A number out of range.
        NonFiniteError: A gradient is not finite.

    Example:
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> found = rank_one_fisher(SmallCNN(width=2), image_classification("digits", batch=8), samples=6)
        >>> found.scale >= 1, 0 < found.collinearity.top_share <= 1
        (True, True)

    Numerics:
        The mean from ordinary backward passes, the rest from one pass over single examples; sums in float64. No matrix
        is formed but one of at most 64 x 64 inner products, for the readout.

    References:
        Rank-1 Fisher for continual learning of diffusion models (ICLR 2026), arXiv 2509.23593, where gradients at low
        signal-to-noise ratio are nearly collinear. Whether they are is a question to the model at hand.
    """
    if samples < 2:
        raise OptionError(f"samples must be at least 2, as gradients are compared; got {samples}.")
    rows = example_rows(model, task, samples=samples, kind=kind, seed=seed, first=first)
    mean = _mean_gradient(model, task, rows)
    flat = _flat(mean, mean, double=True)
    kept = max(2, min(samples, _READOUT, _READOUT_NUMBERS // max(1, flat.numel())))
    # unit keeps the sum of unit gradients; the others are sums over examples.
    unit, along, trace, nonzero, held = torch.zeros_like(flat), 0.0, 0.0, 0, []
    for found in gradients_of_rows(model, task, rows, chunk=chunk):
        g = _flat(found, mean, lead=1, double=True)
        squares = g.square().sum(1)
        along += float((g @ flat).square().sum())
        trace += float(squares.sum())
        alive = squares > 0
        unit += (g[alive] / squares[alive, None].sqrt()).sum(0)
        nonzero += int(alive.sum())
        if sum(map(len, held)) < kept:
            held.append(g[: kept - sum(map(len, held))])
    length = float(flat @ flat)
    readout = collinearity(torch.cat(held))
    pairs = nonzero * (nonzero - 1)
    said = Collinearity(
        cosine=(float(unit @ unit) - nonzero) / pairs if pairs else 0.0,
        top_share=readout.top_share,
        mean_share=along / (length * trace) if length * trace > 0 else 0.0,
        samples=samples,
        readout=len(torch.cat(held)),
    )
    scale = along / samples / length**2 if length > 0 else 0.0
    return RankOneFisher(mean, scale, said)


def collinearity(gradients: Float[Tensor, "examples parameters"]) -> Collinearity:
    r"""How far gradients of single examples point the same way.

    Args:
        gradients: One row an example, shape ``(N, parameters)``, ``N >= 2``.

    Returns:
        The :class:`Collinearity`.

    Raises:
        ShapeError: Fewer than two gradients.
        NonFiniteError: A gradient is not finite.

    Example:
        >>> found = collinearity(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        >>> found.cosine, found.top_share, found.mean_share
        (1.0, 1.0, 1.0)

    Numerics:
        From the ``N x N`` inner products in float64; gradients of zero length have no direction and are left out of
        the cosine.
    """
    if gradients.ndim != 2 or len(gradients) < 2:
        raise ShapeError(f"gradients need shape (N, parameters) with N >= 2; got {tuple(gradients.shape)}.")
    if not bool(gradients.isfinite().all()):
        raise NonFiniteError("gradients must be finite; the model or the loss gives NaN or infinity.")
    g = gradients.double()
    gram = g @ g.mT
    trace, count = float(gram.trace()), len(g)
    if trace == 0:
        return Collinearity(0.0, 0.0, 0.0, count, count)
    lengths = gram.diagonal().sqrt()
    alive = lengths > 0
    cosines = (gram / (lengths[:, None] * lengths).clamp(min=torch.finfo(gram.dtype).tiny))[alive][:, alive]
    pairs = len(cosines) * (len(cosines) - 1)
    mean = gram.mean(0)  # inner products of every gradient with the mean
    length = float(mean.mean())
    return Collinearity(
        cosine=float(cosines.sum() - cosines.trace()) / pairs if pairs else 0.0,
        top_share=float(torch.linalg.eigvalsh(gram)[-1]) / trace,
        mean_share=float(mean.square().sum()) / (length * trace) if length > 0 else 0.0,
        samples=count,
        readout=count,
    )


@dataclass(frozen=True)
class Collinearity:
    r"""How collinear gradients are: all three are 1 when they lie on one line (and, for the cosine, point one way).

    Args:
        cosine: Mean cosine between two of them.
        top_share: Largest eigenvalue of the Fisher information over its trace; at least ``1 / readout``.
        mean_share: The part of the trace along the mean gradient: what a rank-one form in that direction can hold; at
            most the true top share.
        samples: How many examples :attr:`cosine` and :attr:`mean_share` rest on.
        readout: How many :attr:`top_share` rests on.
    """

    cosine: float
    top_share: float
    mean_share: float
    samples: int
    readout: int


@dataclass(frozen=True, eq=False)
class RankOneFisher:
    r"""The Fisher information as :math:`c^* \mu\mu^\top`; made by :func:`rank_one_fisher`.

    Args:
        mean: The mean gradient, by name of the parameter.
        scale: :math:`c^*`; 0 if the mean gradient is 0.
        collinearity: Whether one direction is a fair picture.
    """

    mean: Mapping[str, Tensor]
    scale: float
    collinearity: Collinearity


def _mean_gradient(model: nn.Module, task: Task, rows: list[Rows]) -> dict[str, Tensor]:
    parameters = trainable_parameters(model)
    count = sum(len(inputs) for inputs, _ in rows)
    mean = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in parameters.items()
    }
    with evaluating(model):
        for inputs, targets in rows:
            found = torch.autograd.grad(
                task.loss(model, (inputs, targets)), list(parameters.values()), allow_unused=True
            )
            for total, part in zip(mean.values(), found, strict=True):
                if part is not None:
                    total += part * (len(inputs) / count)
    mean = {name: total.detach() for name, total in mean.items()}
    _check_finite(mean)
    return mean


def _flat(parts: Mapping[str, Tensor], order: Mapping[str, Tensor], *, lead: int = 0, double: bool = False) -> Tensor:
    """All parts as one vector, or as one row an example with ``lead=1``."""
    shape = (-1,) if lead == 0 else (len(next(iter(parts.values()))), -1)
    flat = torch.cat([parts[name].reshape(shape) for name in order], dim=lead)
    return flat.double() if double else flat


def _check_finite(parts: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        if not bool(part.isfinite().all()):
            raise NonFiniteError(f"gradients must be finite; those of {name!r} are not. Has the model diverged?")
