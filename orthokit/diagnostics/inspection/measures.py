"""What is measured of one matrix: a first look that costs a few passes over it, and all of its singular values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthokit.diagnostics.bulk import bulk_fit
from orthokit.diagnostics.energy import expected_energy, hyperspherical_energy
from orthokit.diagnostics.entries import entry_stats, noise_floor, rounding_noise
from orthokit.diagnostics.spectrum import entropy_rank
from orthokit.diagnostics.tail import PowerLaw, tail_fit
from orthokit.errors import DtypeError
from orthokit.linalg import singular_values, top_singular_value

__all__ = ["cleaned", "exact_spectrum", "first_look", "full_look", "relative_change", "spectrum_columns"]

# Above this condition the float64 Gram matrix has lost digits of the smallest value that the input still has.
_SVD_ABOVE = 1e5
# Fewer eigenvalues than this have no tail to fit.
_FEWEST = 10
# The energy of more rows is taken of so many, evenly spaced, since its cost grows with their square.
_ROWS = 4096
# Rows are taken in pieces of about so many numbers where a copy in a wider type is needed.
_PIECE = 1 << 22
# Iterations of the first look, which on any spectrum ends before, within a thousandth.
_ITERATIONS = 30


def cleaned(W: Tensor) -> tuple[Tensor, int]:
    """The matrix in float32 or better with 0 in the place of what is not finite, and how many entries that are."""
    if W.is_complex():
        raise DtypeError(f"it is {W.dtype}; only real matrices are measured. Look at its real and imaginary parts.")
    work = W if W.dtype in (torch.float32, torch.float64) else W.to(torch.float32)
    # One sum tells whether there is anything to look for: it is not finite if an entry is not.
    if bool(torch.isfinite(work.sum())):
        return work, 0
    bad = ~torch.isfinite(work)
    count = int(bad.sum())
    return (work.masked_fill(bad, 0.0), count) if count else (work, 0)


def first_look(W: Tensor, *, stored: torch.dtype, rounding: float | None) -> dict[str, Any]:
    """Norms, rows and columns, and how the numbers are kept.

    Args:
        W: Finite, ``(out, in)``, float32 or float64.
        stored: Type of the numbers in the file.
        rounding: Error of an entry as it is kept, where that is not as of ``stored``.
    """
    entries = entry_stats(W)
    frobenius = entries.frobenius
    top = float(top_singular_value(W, iterations=_ITERATIONS, tol=1e-3)) if frobenius > 0 else 0.0
    error = rounding_noise(W, dtype=stored) if rounding is None else rounding
    return {
        "frobenius": frobenius,
        "spectral_norm": top,
        "stable_rank": (frobenius / top) ** 2 if top > 0 else 0.0,
        "row_spread": entries.rows.spread,
        "column_spread": entries.columns.spread,
        "outlier_rows": entries.rows.outliers,
        "outlier_columns": entries.columns.outliers,
        "largest_row": entries.rows.largest,
        "largest_column": entries.columns.largest,
        "rounding": error,
        "rounding_floor": noise_floor(error, (W.shape[0], W.shape[1])),
    }


def exact_spectrum(W: Tensor) -> np.ndarray:
    """All singular values, descending, in float64: by the Gram matrix in float64, and by an SVD where it is not enough.

    Args:
        W: Finite, ``(out, in)``, float32 or float64.
    """
    if W.dtype == torch.float64:
        return torch.linalg.svdvals(W).cpu().numpy()
    sigma = singular_values(W, method="gram64").double()
    small = float(sigma[-1]) * _SVD_ABOVE < float(sigma[0])
    return (torch.linalg.svdvals(W.double()) if small and W.device.type != "mps" else sigma).cpu().numpy()


def full_look(W: Tensor, sigma: np.ndarray, *, floor: float) -> dict[str, Any]:
    """What needs all singular values, and the energy of the rows."""
    return spectrum_columns(sigma, shape=(W.shape[0], W.shape[1]), floor=floor) | {"energy_excess": _excess(W)}


def spectrum_columns(sigma: np.ndarray, *, shape: tuple[int, int], floor: float) -> dict[str, Any]:
    """The columns that follow from the singular values.

    Args:
        sigma: All of them, descending.
        shape: ``(out, in)``.
        floor: What counts as rounding of the file.
    """
    top = float(sigma[0])
    if top == 0:
        zero = {"frobenius": 0.0, "spectral_norm": 0.0, "stable_rank": 0.0, "effective_rank": 0.0, "above_floor": 0}
        return {**zero, "condition": None, "alpha_refused": "all entries are 0"}
    # Of the scaled values, whose squares stay within range whatever the scale of the matrix.
    s = np.asarray(sigma, dtype=np.float64) / top
    total, energy = s.sum(), np.square(s).sum()
    bulk = bulk_fit(s, shape=shape)
    # The values are known to this; a smaller one is 0 as far as anybody can tell.
    nothing = max(shape) * np.finfo(np.float64).eps
    seen = int((s > nothing).sum())
    tail = tail_fit(np.square(s), floor=nothing**2, bulk=bulk) if seen >= _FEWEST else None
    return {
        "frobenius": top * math.sqrt(energy),
        "spectral_norm": top,
        "stable_rank": float(energy),
        "effective_rank": float(entropy_rank(torch.from_numpy(s))),
        "condition": float(1 / s[-1]) if s[-1] > nothing else math.inf,
        # In exact arithmetic never below 0.
        "orthogonality_error": math.sqrt(max(0.0, 1 - total**2 / (len(s) * energy))),
        "noise": None if bulk.noise is None else top * bulk.noise,
        "mp_edge": None if bulk.edge is None else top * bulk.edge,
        "above_edge": bulk.above,
        "mp_distance": bulk.distance,
        **_tail_columns(tail, seen),
        "above_floor": int((top * s > floor).sum()),
    }


def _tail_columns(tail: PowerLaw | None, seen: int) -> dict[str, Any]:
    """The exponent with what belongs to it, or why there is none."""
    if tail is None:
        return {"alpha_refused": f"it has {seen} eigenvalues that are not 0; a tail needs {_FEWEST} or more"}
    if tail.refused is not None:
        return {"alpha_refused": tail.refused}
    return {
        "alpha": tail.alpha,
        "alpha_low": tail.low,
        "alpha_high": tail.high,
        "alpha_distance": tail.distance,
        "alpha_tail": tail.tail,
    }


def relative_change(W: Tensor, W0: Tensor) -> float | None:
    """``||W - W0||_F / ||W0||_F``, piece by piece; ``None`` where an entry is not finite, or ``W0`` alone is zero.

    Args:
        W: Any shape and floating type.
        W0: The same shape.
    """
    flat, start = W.reshape(-1), W0.reshape(-1)
    away = before = 0.0
    for part, own in zip(flat.split(_PIECE), start.split(_PIECE), strict=True):
        own = own.to(_wide(own))
        away += float((part.to(_wide(part)) - own).square().sum())
        before += float(own.square().sum())
    if not math.isfinite(away) or not math.isfinite(before) or (before == 0 < away):
        return None
    return math.sqrt(away / before) if before > 0 else 0.0


def _excess(W: Tensor) -> float | None:
    """Energy of the directions of the rows above that of random ones; ``None`` where that has no expectation."""
    if W.shape[0] < 2 or W.shape[1] < 3:
        return None
    rows = W.shape[0]
    if rows > _ROWS:
        W = W[torch.linspace(0, rows - 1, _ROWS, device=W.device).round().long()]
    return float(hyperspherical_energy(W)) - expected_energy(W.shape[1])


def _wide(W: Tensor) -> torch.dtype:
    return torch.float32 if W.device.type == "mps" else torch.float64
