r"""Geometry of activations before and after finetuning: what one rotation explains, and what it does not.

``X0`` and ``X1`` hold the activations of one layer in the base and in the finetuned model, the same token in the same
row (:func:`collect_activations`). The *isometric part* of the change is what the best rotation removes; Procrustes
residual, Gram distortion and ``1 - CKA`` are three views of the rest. Everything is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics import _geometry as kernels
from orthokit.diagnostics._collect import collect_activations
from orthokit.diagnostics.similarity import (
    Pointwise,
    gram_distortion,
    linear_cka,
    pointwise,
    procrustes_residual,
    raw_distance,
    subspace_distance,
)

__all__ = [
    "ActivationGeometry",
    "Pointwise",
    "activation_geometry",
    "collect_activations",
    "gram_distortion",
    "linear_cka",
    "pointwise",
    "procrustes_residual",
    "raw_distance",
    "subspace_distance",
]

_PUBLISHED_RANKS = (32, 64)


@dataclass(frozen=True)
class ActivationGeometry:
    """All measures of one layer.

    Args:
        raw: :func:`raw_distance`.
        procrustes: :func:`procrustes_residual`.
        improvement: ``raw - procrustes``: what a rotation removes.
        gram: :func:`gram_distortion`.
        cka: :func:`linear_cka`.
        subspace: Rank to :func:`subspace_distance`; NaN where the activations do not have that many directions.
        pointwise: :class:`Pointwise`.
        samples: Tokens.
        width: Dimensions compared: the width of the layer, or ``reduce``.
        enough: Whether there are at least four tokens a dimension. If not, ``procrustes`` is too small and ``cka`` too
            large.
    """

    raw: float
    procrustes: float
    improvement: float
    gram: float
    cka: float
    subspace: dict[int, float]
    pointwise: Pointwise
    samples: int
    width: int
    enough: bool

    def as_row(self) -> dict[str, float | int | bool]:
        """Everything under flat names, a row of a table."""
        row: dict[str, float | int | bool] = {
            name: getattr(self, name) for name in ("raw", "procrustes", "improvement", "gram", "cka")
        }
        row |= {f"subspace_{rank}": value for rank, value in self.subspace.items()}
        row |= {name: getattr(self.pointwise, name) for name in ("cosine", "angle", "log_norm_ratio")}
        return row | {"samples": self.samples, "width": self.width, "enough": self.enough}


def activation_geometry(
    X0: Float[Tensor, "tokens width"],
    X1: Float[Tensor, "tokens width"],
    *,
    centre: bool = True,
    ranks: Sequence[int] | None = None,
    rows: int | None = 1024,
    seed: int = 0,
    reduce: int | None = None,
    few: Literal["refuse", "flag"] = "refuse",
) -> ActivationGeometry:
    r"""Every measure of this module for one layer, sharing the products between them.

    Args:
        X0: Activations of the base model, shape ``(N, d)``, ``N >= 2``.
        X1: Of the finetuned model, same tokens in the same rows, same shape.
        centre: Subtract column means where the measure is defined on centred activations (default).
        ranks: For :func:`subspace_distance`; default the published 32 and 64 as far as they are below ``N`` and ``d``,
            and ``max(1, min(N, d) // 4)`` if neither is. ``()`` for none.
        rows: Rows compared by :func:`gram_distortion`, drawn with ``seed``; ``None`` for all.
        seed: Of that draw.
        reduce: Compare the best rank-``k`` approximations of both (their own principal components) in ``raw``,
            ``procrustes`` and ``cka``, ``1 <= k <= min(N, d)``; default the activations themselves.
        few: With fewer than ``4 d`` tokens (``4 k`` with ``reduce=k``): ``"refuse"`` (default) raises, ``"flag"``
            computes and says so in ``enough``.

    Returns:
        :class:`ActivationGeometry`.

    Raises:
        ShapeError: Different numbers of tokens or widths, fewer than two tokens, or too few for ``few="refuse"``.
        OptionError: ``ranks``, ``rows`` or ``reduce`` out of range.
        UnknownNameError: Unknown ``few``.
        DtypeError: Not real floating.
        NonFiniteError: A NaN or an infinity.

    Example:
        After a rotation everything moved, and nothing that a next layer could not undo:

        >>> g = torch.Generator().manual_seed(0)
        >>> X = torch.randn(100, 8, generator=g, dtype=torch.float64)
        >>> Q = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64)).Q
        >>> found = activation_geometry(X, X @ Q)
        >>> found.raw > 0.5, max(found.procrustes, found.gram, 1 - found.cka) < 1e-13
        (True, True)

    Numerics:
        Three products of ``2 N d^2`` FLOP, two symmetric eigenproblems and the singular values of one ``d`` by ``d``
        matrix, and one Gram comparison; float64 copies of both inputs. A layer that is constant over the tokens has no
        CKA (NaN).

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, activation geometry. Differences: they allow fewer tokens than
        dimensions, where a rotation can fit noise; we refuse or flag.
    """
    A0, A1 = kernels.pair(X0, X1)
    n, d = A0.shape
    ranks = _default_ranks(n, d) if ranks is None else ranks
    for rank in ranks:
        kernels.check_range("ranks", rank, min(n, d))
    width, enough = kernels.enough_tokens(n, d, reduce=reduce, few=few)
    B0, B1 = (kernels.centred(A) if centre else A for A in (A0, A1))
    C0, C1 = kernels.compress(B0), kernels.compress(B1)
    own0, own1 = C0.mT @ C0, C1.mT @ C1
    raw, distances = B1 - B0, {}
    if ranks or reduce is not None:
        top = max(*ranks, reduce or 1, 1)
        V0, has0 = kernels.top_directions(B0, top, own0 if n >= d else None)
        V1, has1 = kernels.top_directions(B1, top, own1 if n >= d else None)
        distances = {
            rank: kernels.unaligned(V0[:, :rank], V1[:, :rank]).item() if rank <= min(has0, has1) else math.nan
            for rank in ranks
        }
        if reduce is not None:
            V0, V1 = V0[:, :reduce], V1[:, :reduce]
            C0, C1 = B0 @ V0, B1 @ V1
            own0, own1, raw = C0.mT @ C0, C1.mT @ C1, C1 @ V1.mT - C0 @ V0.mT
    cross = C1.mT @ C0
    size = torch.linalg.matrix_norm(C0) + kernels.EPS
    moved = torch.linalg.matrix_norm(raw) / size
    # No rotation at all is one of the choices: rounding must not put the best one above it.
    left = torch.minimum(kernels.procrustes(C0, C1, cross) / size, moved)
    return ActivationGeometry(
        raw=moved.item(),
        procrustes=left.item(),
        improvement=(moved - left).item(),
        gram=kernels.sampled_gram(A0, A1, rows, seed).item(),
        cka=kernels.cka(cross, own0, own1).item(),
        subspace=distances,
        pointwise=pointwise(X0, X1),
        samples=n,
        width=width,
        enough=enough,
    )


def _default_ranks(n: int, d: int) -> list[int]:
    return [rank for rank in _PUBLISHED_RANKS if rank < min(n, d)] or [max(1, min(n, d) // 4)]
