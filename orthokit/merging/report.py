"""What a merge did to each tensor: as rows, a frame and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthokit.checkpoints._files import write_whole
from orthokit.diagnostics import hyperspherical_energy
from orthokit.linalg import singular_values
from orthokit.merging._common import weighted_sum

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MergeReport", "as_json", "measured"]


@dataclass(frozen=True)
class MergeReport:
    """One row per tensor of a merged model.

    Args:
        method: The method asked for.
        rows: ``name``, ``shape``, ``method`` (what the tensor was merged by), ``note`` and what the method has to tell;
            with ``report="full"`` also what :func:`measured` says.
        options: What was asked for besides.
        seconds: How long the merge took.
    """

    method: str
    rows: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_frame(self) -> pd.DataFrame:
        """The rows as a frame; lists (one number per expert, singular values) stay lists in their cells."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.rows])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON, also written to ``path``, beside its place and renamed."""
        return as_json(self.told(), path)

    def told(self) -> dict[str, Any]:
        """The report as plain mappings and lists."""
        return {"method": self.method, "options": self.options, "seconds": self.seconds, "rows": list(self.rows)}

    def __str__(self) -> str:
        """A line: how many tensors, by what, how far they moved."""
        by: dict[str, int] = {}
        for row in self.rows:
            by[row["method"]] = by.get(row["method"], 0) + 1
        counts = ", ".join(f"{count} by {name}" for name, count in by.items())
        return f"{len(self.rows)} tensors merged in {self.seconds:.1f} s: {counts}"


def as_json(told: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> str:
    """A report as JSON text, also written to ``path``, beside its place and renamed."""
    text = json.dumps(told, indent=1, default=str, allow_nan=False)
    if path is not None:
        write_whole(Path(path), text.encode())
    return text


def measured(
    base: Tensor, experts: Sequence[Tensor], merged: Tensor, *, rotated: Tensor | None = None
) -> dict[str, Any]:
    """How experts agree on one tensor, and what the merge did to its geometry.

    Args:
        base: Shape ``(..., out, in)`` or any other.
        experts: One tensor each.
        merged: What became of them.
        rotated: The base under the merged rotation alone, where the method has one.

    Returns:
        ``change`` (of the merged tensor, relative to the base), ``changes`` (of each expert), ``cosine`` (mean over
        pairs of changes), ``cosine_least``, ``sign_agreement`` (share of the entries that any expert changed where all
        changes have one sign); for matrices ``energy_base``, ``energy_rotated``, ``energy_merged`` (hyperspherical, of
        rows), ``singular_values_base``, ``..._rotated``, ``..._merged``. Numbers or lists, all finite or ``None``.
    """
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    start = base.to(work)
    taus = [expert.to(work) - start for expert in experts]
    size = float(torch.linalg.vector_norm(start))
    found: dict[str, Any] = {
        "change": _ratio(float(torch.linalg.vector_norm(merged.to(work) - start)), size),
        "changes": [_ratio(float(torch.linalg.vector_norm(tau)), size) for tau in taus],
    }
    found |= _agreement(taus)
    if base.ndim < 2 or min(base.shape[-2:]) < 2:
        return found
    for label, tensor in (("base", start), ("rotated", rotated), ("merged", merged)):
        if tensor is not None:
            wide = tensor.to(work)
            rows_stand = bool((wide != 0).any(-1).all())  # a row of zeros has no direction
            found[f"energy_{label}"] = float(hyperspherical_energy(wide).mean()) if rows_stand else None
            found[f"singular_values_{label}"] = singular_values(wide).tolist()
    return found


def _agreement(taus: Sequence[Tensor]) -> dict[str, Any]:
    norms = [float(torch.linalg.vector_norm(tau)) for tau in taus]
    cosines = [
        float(torch.sum(taus[i] * taus[j])) / (norms[i] * norms[j])
        for i in range(len(taus))
        for j in range(i)
        if norms[i] > 0 and norms[j] > 0
    ]
    signs = weighted_sum([tau.sign() for tau in taus], [1.0] * len(taus))
    changed = torch.stack([tau != 0 for tau in taus]).any(0)
    moved = int(changed.sum())
    return {
        "cosine": sum(cosines) / len(cosines) if cosines else None,
        "cosine_least": min(cosines) if cosines else None,
        "sign_agreement": float((signs.abs() == len(taus)).sum()) / moved if moved else None,
    }


def _ratio(change: float, size: float) -> float | None:
    return change / size if size > 0 else None
