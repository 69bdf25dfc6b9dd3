"""The record of what happened to one matrix, apart from the code that measures it and the code that words it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["COLUMN_NAMES", "WeightChange"]

COLUMN_NAMES = (
    "relative_change",
    "spectrum_change",
    "energy_change",
    "change_stable_rank",
    "change_rank",
    "rotation_fraction",
    "rotation_angle",
    "rotation_residual",
    "block_size",
    "left_angle",
    "right_angle",
    "kind",
    "verdict",
)


@dataclass(frozen=True, eq=False)
class WeightChange:
    r"""What finetuning did to one matrix; made by :func:`~orthokit.diagnostics.weight_change`.

    A value that is not defined (anything relative to a matrix of zeros, the energy of a single row) is ``None``.

    Args:
        relative_change: ``||W - W0||_F / ||W0||_F``.
        spectrum_change: ``||s(W) - s(W0)||_2 / ||s(W0)||_2`` of the sorted singular values.
        energy_change: Hyperspherical energy of ``W`` minus that of ``W0``.
        change_stable_rank: Stable rank of ``W - W0``.
        change_rank: Numerical rank of ``W - W0`` above rounding noise, 0 if unchanged; ``None`` if two factors of that
            rank would hold as many numbers as the matrix, or if what lies below is more than noise or most of the
            change.
        rotation_fraction: Share of ``||W - W0||_F^2`` that the best right rotation removes, in [0, 1].
        rotation_angle: ``2 asin(||W0 R - W0||_F / (2 ||W0||_F))`` in degrees.
        rotation_residual: ``||W0 R - W||_F / ||W0||_F``.
        block_size: Smallest block size whose block-diagonal right rotation explains the change; ``None`` if none does.
        left_angle: Largest principal angle of the leading left singular subspaces, in degrees.
        right_angle: Same of the right ones.
        kind: ``"unchanged"``, ``"rounded"``, ``"scaled"``, ``"rows"``, ``"columns"``, ``"oft"``, ``"orthogonal_in"``,
            ``"orthogonal_both"``, ``"hra"``, ``"lora"``, ``"pissa"``, ``"dora"`` or ``"general"``.
        verdict: One sentence in plain words; see :func:`~orthokit.diagnostics.verdict`.
        shape: ``(out, in)``.
        random_rotation: The rotation fraction that a small random change would have.
        noise: Relative Frobenius norm of what storing both matrices and computing with them changes.
        stored: How the matrices are stored, ``"bfloat16"``; ``"these files"`` if their rounding was given.
        scale: The number ``c`` that brings ``c W0`` closest to ``W``.
        adapter_rank: Rank of the adapter that the kind speaks of (half of ``change_rank`` for ``"pissa"``); else
            ``None``.
        singular_values: Of ``W - W0``, all, descending, float32.
        base_singular_values: Of ``W0``.
        tuned_singular_values: Of ``W``.
        retention_drift: ``|u_i^T (W - W0) v_i| / sigma_1``, by singular direction of ``W0``, float32.
        adaptation: ``||(W - W0) v_i|| / ||W - W0||_F``.
    """

    relative_change: float | None
    spectrum_change: float | None
    energy_change: float | None
    change_stable_rank: float
    change_rank: int | None
    rotation_fraction: float | None
    rotation_angle: float | None
    rotation_residual: float | None
    block_size: int | None
    left_angle: float | None
    right_angle: float | None
    kind: str
    verdict: str
    shape: tuple[int, int]
    random_rotation: float | None
    noise: float | None
    stored: str
    scale: float | None
    adapter_rank: int | None
    singular_values: Tensor
    base_singular_values: Tensor
    tuned_singular_values: Tensor
    retention_drift: Tensor
    adaptation: Tensor

    def row(self) -> dict[str, Any]:
        """The columns of the table of a checkpoint, by name, in their order."""
        return {name: getattr(self, name) for name in COLUMN_NAMES}
