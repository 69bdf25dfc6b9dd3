"""Ways to orthogonalise, by name, and test matrices with a given spectrum to try them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.linalg import COEFFICIENTS, orthogonalize, random_orthogonal

__all__ = ["PLAIN", "SPECTRA", "Recipe", "lab_recipes", "published_recipes", "with_spectrum"]

SPECTRA = ("gaussian", "1/k", "log-uniform")

# The last rows of these tables repeat, so their number of steps is a choice: the one their users make.
_STEPS = {
    "jordan": 5,
    "baseline": 5,
    "quintic": 5,
    "cubic": 5,
    "polar_express": 6,
    "polar_express_safe": 6,
    "polar_express_safer": 6,
}


@dataclass(frozen=True)
class Recipe:
    """One way to orthogonalise, named as figures and tables show it.

    Args:
        table: A name in ``linalg.COEFFICIENTS``, or ``"svd"``.
        steps: Quintic steps; default as published, the whole table where it does not repeat.
        polish: Cubic steps after them, or ``"auto"``; default 0.
        scaling: One of ``linalg.SCALINGS``; default ``"frobenius"``.

    Example:
        >>> recipe = Recipe("polar_express", steps=5, polish=1)
        >>> recipe.name
        'polar_express x5 + 1'
        >>> recipe(torch.eye(3)).diagonal().round().tolist()
        [1.0, 1.0, 1.0]
    """

    table: str = "jordan"
    steps: int | None = None
    polish: int | str = 0
    scaling: str = "frobenius"

    def __post_init__(self) -> None:
        if self.table != "svd" and self.table not in COEFFICIENTS:
            raise unknown_name("coefficient table", self.table, [*COEFFICIENTS, "svd"])

    @property
    def count(self) -> int:
        """Quintic steps."""
        if self.table == "svd":
            return 0
        return _STEPS.get(self.table, len(COEFFICIENTS[self.table])) if self.steps is None else self.steps

    @property
    def name(self) -> str:
        """What a figure calls it."""
        if self.table == "svd":
            return "svd"
        polish = f" + {self.polish}" if self.polish else ""
        scaling = f", {self.scaling}" if self.scaling != "frobenius" else ""
        return f"{self.table} x{self.count}{polish}{scaling}"

    @property
    def method(self) -> str:
        """``"svd"``, ``"polar_express"`` (with the headroom it was published with) or ``"newton_schulz"``."""
        return self.table if self.table in ("svd", "polar_express") else "newton_schulz"

    @property
    def muon(self) -> dict[str, Any]:
        """Options for :class:`orthokit.optim.Muon`."""
        given = {"method": self.method, "ns_steps": self.count, "polish": self.polish, "scaling": self.scaling}
        return given | ({"ns_coefficients": self.table} if self.method == "newton_schulz" else {})

    def __call__(self, X: Tensor) -> Tensor:
        """The orthogonalised ``X``, in its dtype."""
        options: dict[str, Any] = {"method": self.method, "steps": self.count, "polish": self.polish}
        table = self.table if self.method == "newton_schulz" else None
        return orthogonalize(X, **options, coefficients=table, scaling=self.scaling)


PLAIN = Recipe("jordan")
"""Five plain steps, as in ``torch.optim.Muon``: what costs are measured in."""


def published_recipes() -> list[Recipe]:
    """Every table at its published length."""
    return [Recipe(name) for name in COEFFICIENTS]


def lab_recipes() -> list[Recipe]:
    """The comparison of accuracy and cost: tables in use, more steps, polish, scalings, and the exact factor."""
    express = [Recipe("polar_express", steps, polish) for steps, polish in ((5, 0), (6, 0), (7, 0), (5, 1), (5, 2))]
    scaled = [Recipe("polar_express", 5, 0, scaling) for scaling in ("schatten", "spectral", "aol")]
    return [
        *(Recipe("jordan", steps, polish) for steps, polish in ((5, 0), (6, 0), (5, 1), (5, 2), (5, "auto"))),
        Recipe("you"),
        *express,
        Recipe("polar_express", 5, "auto"),
        *scaled,
        Recipe("polar_express", 6, 0, "schatten"),
        Recipe("turbo_muon", 4, 0, "aol"),
        Recipe("relaxed_cubic"),
        Recipe("deepseek_v4"),
        Recipe("svd"),
    ]


def with_spectrum(
    name: str,
    shape: tuple[int, int] = (384, 1536),
    *,
    seed: int = 0,
    smallest: float = 1e-3,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A test matrix: random singular vectors and a given kind of singular values.

    Args:
        name: ``"gaussian"`` (independent entries), ``"1/k"``, or ``"log-uniform"`` between 1 and ``smallest``.
        shape: ``(out, in)``, at least two values on the shorter side.
        seed: Of the vectors, and of the entries for ``"gaussian"``.
        smallest: Smallest singular value of ``"log-uniform"``, in (0, 1); default 1e-3.
        dtype: Of the result; made in float32.

    Returns:
        The matrix, shape ``shape``.

    Raises:
        UnknownNameError: No such spectrum.
        ShapeError: A side shorter than 2.
        OptionError: ``smallest`` outside (0, 1).

    Example:
        >>> X = with_spectrum("1/k", (4, 8))
        >>> [round(float(s), 3) for s in torch.linalg.svdvals(X)]
        [1.0, 0.5, 0.333, 0.25]
    """
    if name not in SPECTRA:
        raise unknown_name("spectrum", name, SPECTRA)
    if min(shape) < 2:
        raise ShapeError(f"a spectrum needs at least 2 values; got a matrix of shape {shape}.")
    if not 0 < smallest < 1:
        raise OptionError(f"smallest must be in (0, 1); got {smallest}.")
    g = torch.Generator().manual_seed(seed)
    if name == "gaussian":
        return torch.randn(shape, generator=g).to(dtype)
    count = min(shape)
    k = torch.arange(count, dtype=torch.float64)
    s = (1 / (k + 1) if name == "1/k" else smallest ** (k / (count - 1))).float()
    U, V = (random_orthogonal(side, count, generator=g) for side in shape)
    return ((U * s) @ V.mT).to(dtype)
