"""orthokit: orthogonal methods in deep learning, as one instrument.

``import orthokit as ok`` brings in torch and einops and nothing heavier; ``ok.lab``, ``ok.figures`` and ``ok.reports``
are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from orthokit import adapters, device, errors, linalg, optim
from orthokit.matrices import matrices

if TYPE_CHECKING:
    from orthokit import diagnostics, figures, lab, merging, reports, studies

__version__ = "0.1.0"

__all__ = [
    "adapters",
    "device",
    "diagnostics",
    "errors",
    "figures",
    "lab",
    "linalg",
    "matrices",
    "merging",
    "optim",
    "reports",
    "studies",
]

_LAZY = ("diagnostics", "figures", "lab", "merging", "reports", "studies")


def __getattr__(name: str):
    # Subpackages that pull in pandas, plotly or papermill load on first use: importing orthokit costs what torch costs.
    if name in _LAZY:
        return importlib.import_module(f"orthokit.{name}")
    raise AttributeError(f"module 'orthokit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
