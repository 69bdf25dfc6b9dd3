"""What a monitor takes from the singular values of a weight: themselves, and some of the columns of an inspection."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthokit.diagnostics.inspection.measures import spectrum_columns
from orthokit.linalg import singular_values

__all__ = ["DERIVED", "as_array", "of_spectrum"]

#: By quantity, the entries of a record, which are columns of an inspection.
DERIVED: dict[str, tuple[str, ...]] = {
    "effective_rank": ("effective_rank",),
    "condition": ("condition",),
    "orthogonality_error": ("orthogonality_error",),
    "edge": ("mp_edge", "above_edge"),
    "alpha": ("alpha",),
}
# Largest condition that the Gram matrix resolves, to about 0.1 %: in float64, and on devices that have none.
_RESOLVED, _RESOLVED_SINGLE = 1e6, 1e3
_WHY = {
    "condition": "its smallest singular value is below what the Gram matrix resolves",
    "edge": "it has no bulk: fewer than ten singular values, or half of them are 0",
}


def of_spectrum(W: Tensor, quantities: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Entries of a record from one decomposition of a weight.

    Args:
        W: The weight, ``(out, in)``.
        quantities: Some of ``"spectrum"``, ``"stable_rank"`` and :data:`DERIVED`; others are not looked at.

    Returns:
        Entries by name, and by quantity why it is left out.

    Raises:
        NonFiniteError: A NaN or an infinity.
    """
    wanted = [name for name in DERIVED if name in quantities]
    # A condition, and which values are 0, are lost in a Gram matrix in float32.
    values = singular_values(W, method="gram64" if wanted else "gram")
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    if "spectrum" in quantities:
        found["spectrum"] = as_array(values)
    if "stable_rank" in quantities:
        squares = values.double().square()
        found["stable_rank"] = float(squares.sum() / squares[0]) if squares[0] > 0 else 0.0
    if not wanted:
        return found, left_out
    columns = spectrum_columns(values.cpu().double().numpy(), shape=(W.shape[0], W.shape[1]), floor=0.0)
    condition = columns.get("condition")
    if condition is not None and condition > (_RESOLVED_SINGLE if W.device.type == "mps" else _RESOLVED):
        del columns["condition"]
    for quantity in wanted:
        for name in DERIVED[quantity]:
            if (value := columns.get(name)) is None:
                refused = columns.get(f"{quantity}_refused")
                left_out[quantity] = str(refused or _WHY.get(quantity, "all of its entries are 0"))
            else:
                found[name] = float(value)
    return found, left_out


def as_array(values: Tensor) -> np.ndarray:
    """Singular values as a record keeps them, in float32."""
    return values.to("cpu", torch.float32).numpy()
