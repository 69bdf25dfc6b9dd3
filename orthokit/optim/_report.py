"""The report of a Muon step: how orthogonal each direction is, and the share of the machine's roof it was found at."""

from __future__ import annotations

import time as clock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthokit.device import matmul_rates
from orthokit.errors import ParameterError
from orthokit.linalg.polar import orthogonalize_
from orthokit.optim._pieces import Piece, chunks, iteration_options

if TYPE_CHECKING:
    import pandas as pd

    from orthokit.optim.muon import Muon

__all__ = ["iteration_flop", "update_report"]

_REPEATS = 3


def iteration_flop(rows: int, columns: int, *, steps: int, polish: int = 0) -> float:
    """FLOP of the products for one matrix: ``4 m^2 n + 2 m^3`` a quintic step, ``4 m^2 n`` a cubic one."""
    m, n = sorted((rows, columns))
    return float(steps * (4 * m * m * n + 2 * m**3) + polish * 4 * m * m * n)


@torch.no_grad()
def update_report(optimizer: Muon, *, time: bool) -> pd.DataFrame:
    """See ``Muon.report``."""
    import pandas as pd

    rows = []
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if p.grad is not None and p.numel()]
        for chunk in chunks([Piece(p, block) for p in moved for block in optimizer.blocks(p)]):
            stack = optimizer._stack(chunk, group).clone()
            options = iteration_options(group)
            found = torch.linalg.svdvals(_wide(orthogonalize_(stack.clone(), **options)))
            rate = _rate(stack, options) if time else {}
            parts = found.split([piece.block.count for piece in chunk])
            for piece, s in zip(chunk, parts, strict=True):
                numbers = {
                    "matrix": piece.block.name,
                    "shape": piece.block.shape,
                    "mean_error": float((s - 1).abs().mean()),
                    "smallest": float(s.min()),
                    "largest": float(s.max()),
                }
                rows.append(numbers | rate)
    if not rows:
        raise ParameterError("a report needs the gradients of the last step; call it before zero_grad().")
    return pd.DataFrame(rows)


def _wide(X: Tensor) -> Tensor:
    return X.to(torch.promote_types(X.dtype, torch.float32))


def _rate(stack: Tensor, options: dict) -> dict[str, float]:
    """GFLOP/s of the iteration on this stack, best of a few, and the share of the fastest product measured here."""
    best = float("inf")
    for _ in range(_REPEATS):
        copy = stack.clone()
        _wait(stack.device)
        start = clock.perf_counter()
        orthogonalize_(copy, **options)
        _wait(stack.device)
        best = min(best, clock.perf_counter() - start)
    polish = 0 if isinstance(options["polish"], str) else options["polish"]
    flop = len(stack) * iteration_flop(*stack.shape[-2:], steps=options["steps"], polish=polish)
    roof = max(matmul_rates(stack.device).values())
    return {"gflops": flop / best / 1e9, "share_of_roof": flop / best / roof}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
