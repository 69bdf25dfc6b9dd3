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

from orthokit.device import generator as seeded_generator
from orthokit.diagnostics import _geometry as kernels
from orthokit.diagnostics._collect import collect_activations
from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, working_dtype

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

_EPS = 1e-12  # guard of the denominators, as published
_ENOUGH = 4  # tokens a dimension
_PUBLISHED_RANKS = (32, 64)


@dataclass(frozen=True)
class Pointwise:
    """Token by token, without any alignment: means over the tokens whose activations are nonzero in both models.

    Args:
        cosine: Mean cosine between the two activations of a token.
        angle: Mean angle between them, radians.
        log_norm_ratio: Mean absolute logarithm of the ratio of their norms.
        tokens: How many tokens that is; with none the means are NaN.
    """

    cosine: float
    angle: float
    log_norm_ratio: float
    tokens: int


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
            and ``max(1, min(N, d) // 4)`` if neither is.
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
    A0, A1 = _pair(X0, X1)
    n, d = A0.shape
    ranks = _default_ranks(n, d) if ranks is None else ranks
    for rank in ranks:
        _check_range(rank, "ranks", min(n, d))
    width, enough = _enough(n, d, reduce=reduce, few=few)
    B0, B1 = (_centred(A) for A in (A0, A1)) if centre else (A0, A1)
    own = [B.mT @ B for B in (B0, B1)] if n >= d else [None, None]
    top = max([*ranks, reduce or 0], default=0)
    bases = [kernels.top_directions(B, top, C)[0] for B, C in zip((B0, B1), own, strict=True)] if top else []
    has = _directions(B0, B1, own)
    distances = {
        rank: kernels.unaligned(*(V[:, :rank] for V in bases)).item() if rank <= has else math.nan for rank in ranks
    }
    if reduce is None:
        raw, (C0, C1) = B1 - B0, (kernels.compress(B) for B in (B0, B1))
    else:
        C0, C1 = (B @ V[:, :reduce] for B, V in zip((B0, B1), bases, strict=True))
        raw = C1 @ bases[1][:, :reduce].mT - C0 @ bases[0][:, :reduce].mT
    cross = C1.mT @ C0
    owns = own if reduce is None and n >= d else [C.mT @ C for C in (C0, C1)]
    base = torch.linalg.matrix_norm(C0) + _EPS
    moved, left = (torch.linalg.matrix_norm(raw) / base).item(), (kernels.procrustes(C0, C1, cross) / base).item()
    return ActivationGeometry(
        raw=moved,
        procrustes=left,
        improvement=moved - left,
        gram=_gram(A0, A1, rows, seed).item(),
        cka=kernels.cka(cross, *(C for C in owns if C is not None)).item(),
        subspace=distances,
        pointwise=_pointwise(A0, A1),
        samples=n,
        width=width,
        enough=enough,
    )
