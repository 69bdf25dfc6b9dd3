"""The report of Pion: how far the spectra have drifted and why, and the gradient's part that rotations cannot use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthokit.errors import ParameterError
from orthokit.linalg._workspace import Workspace
from orthokit.linalg.spectra import top_singular_value
from orthokit.optim._pieces import Piece
from orthokit.optim._pion_state import fine_weight, product_dtype
from orthokit.optim._pion_step import Chunk

if TYPE_CHECKING:
    import pandas as pd

    from orthokit.optim.pion import Pion

__all__ = ["pion_report", "stationarity_split"]


@torch.no_grad()
def stationarity_split(W: Tensor, G: Tensor) -> dict[str, Tensor]:
    r"""A gradient in the singular frames of its weight: what rotations can use of it, and what they cannot.

    ``G_in = W^T G - G^T W`` and ``G_out = G W^T - W G^T`` vanish together exactly where ``G`` is diagonal in the frames
    of ``W = U S V^T``: at the stationary points of a method that only rotates. There ``diag(U^T G V)`` may be anything.

    Args:
        W: ``(N, m, n)``.
        G: Its gradient.

    Returns:
        Three numbers a matrix, shape ``(N,)``: ``tangential_in`` and ``tangential_out``, ``||G_s||_F`` over
        ``||W||_2 ||G||_F``, and ``radial``, ``||diag(U^T G V)|| / ||G||_F``, in ``[0, 1]``. All 0 for ``G = 0``.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    norm = torch.linalg.vector_norm(G, dim=(-2, -1))
    tiny = torch.finfo(G.dtype).tiny
    unit = (norm * S[..., 0]).clamp(min=tiny)
    inner, outer = W.mT @ G, G @ W.mT
    radial = (U.mT @ G @ Vh.mT).diagonal(dim1=-2, dim2=-1)
    return {
        "tangential_in": torch.linalg.vector_norm(inner - inner.mT, dim=(-2, -1)) / unit,
        "tangential_out": torch.linalg.vector_norm(outer - outer.mT, dim=(-2, -1)) / unit,
        "radial": torch.linalg.vector_norm(radial, dim=-1) / norm.clamp(min=tiny),
    }


@torch.no_grad()
def pion_report(optimizer: Pion) -> pd.DataFrame:
    """See ``Pion.report``."""
    import pandas as pd

    rows = [
        _row(optimizer, piece, group)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and p.numel() and optimizer.state[p]
        for piece in (Piece(p, block) for block in optimizer.blocks(p))
    ]
    if not rows:
        raise ParameterError("a report needs gradients and a state; call it after step() and before zero_grad().")
    return pd.DataFrame(rows)


def _row(optimizer: Pion, piece: Piece, group: dict[str, Any]) -> dict[str, Any]:
    state = optimizer.state_of(piece, group)
    W = fine_weight(piece.of(piece.parameter), state.get("residual")).contiguous()
    G = piece.of(piece.gradient).to(W.dtype)
    row: dict[str, Any] = {"matrix": piece.block.name, "shape": piece.block.shape}
    row |= _next_step(optimizer, piece, group, W, G, state)
    row |= {name: float(value.max()) for name, value in stationarity_split(W, G).items()}
    if group["track"]:
        row |= _drift(W, state)
    return row


def _next_step(
    optimizer: Pion, piece: Piece, group: dict[str, Any], W: Tensor, G: Tensor, state: dict[str, Tensor]
) -> dict[str, float]:
    """The angles and the size of the step that this gradient would give next, taken on copies."""
    turned, copies = W.clone(), {key: value.clone() for key, value in state.items()}
    step = int(optimizer.state[piece.parameter]["step"]) + 1
    chunk = Chunk(
        turned,
        [G],
        [copies],
        group | {"weight_decay": 0.0, "track": False, "restore_every": 0},
        step=step,
        dtype=product_dtype(piece.parameter, group),
        workspace=Workspace(),
    )
    chunk.rotate()
    angles = {"angle_in": 0.0, "angle_out": 0.0}
    for side, A, scale in chunk.turns:
        angles[f"angle_{side.name}"] = float((scale * top_singular_value(A.to(W.dtype))).max())
    unit = chunk.lr * (group["rms"] or 1.0)
    size = (turned - W).square().mean(dim=(-2, -1)).sqrt().max()
    return angles | {"rms_ratio": float(size) / unit if unit else math.nan}


def _drift(W: Tensor, state: dict[str, Tensor]) -> dict[str, float]:
    """The change of the spectrum since the first step, of the matrix of a batch where it is largest."""
    first = state["spectrum"]
    now = torch.linalg.svdvals(W)
    # Over the largest one: the smallest of a square matrix may be as small as rounding, and has no relative change.
    drift = (now - first).abs().amax(-1) / first[:, 0].clamp(min=torch.finfo(W.dtype).tiny)
    worst = int(drift.argmax())
    norms = (torch.linalg.vector_norm(s[worst].double()) for s in (now, first))
    total = float(torch.log(next(norms) / next(norms))) if bool(first[worst].any()) else 0.0
    truncation, decay = (float(x) for x in state["causes"][worst])
    return {
        "drift": float(drift[worst]),
        "norm_drift": total,
        "truncation": truncation,
        "decay": decay,
        "rounding": total - truncation - decay,
    }
