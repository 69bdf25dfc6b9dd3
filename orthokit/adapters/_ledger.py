"""What happened to the singular values of a reparameterised weight, and through what: kept with the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from orthokit.errors import CheckpointError
from orthokit.linalg import singular_values

__all__ = ["Ledger"]


@dataclass(eq=False)
class Ledger:
    """Sums over all merges. A growth is a change of ``log ||W||_F``; growths add up exactly.

    Args:
        initial: Singular values of the initial weight in float64 on the CPU; empty when they are not tracked.
        merges: Number of merges.
        largest_angle: The largest plane angle that was merged, radians.
        law: Mean logarithm of the singular values of the merged factors, from their determinants.
        expected: The same for random generators of the size the merged ones had.
        truncation: Growth by factors that are not exactly orthogonal.
        rounding: Growth by storing the weight in its type.
        requantization: Growth by storing it in codes.
        rounding_noise: Squared Frobenius norm of all rounding errors.
        requantization_noise: The same of quantisation errors.
    """

    initial: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    merges: int = 0
    largest_angle: float = 0.0
    law: float = 0.0
    expected: float = 0.0
    truncation: float = 0.0
    rounding: float = 0.0
    requantization: float = 0.0
    rounding_noise: float = 0.0
    requantization_noise: float = 0.0

    @classmethod
    def of(cls, W: Tensor, *, track_spectrum: bool) -> Ledger:
        """An empty ledger of an initial weight."""
        return cls(singular_values(W).double().cpu()) if track_spectrum else cls()

    def merged(self, *, angle: float, law: float, expected: float, before: Tensor, after: Tensor) -> None:
        """A merge in exact arithmetic."""
        self.merges += 1
        self.largest_angle = max(self.largest_angle, angle)
        self.law += law
        self.expected += expected
        self.truncation += log_ratio(after, before)

    def rounded(self, exact: Tensor, stored: Tensor) -> None:
        """A weight was rounded to its type."""
        self.rounding += log_ratio(stored, exact)
        self.rounding_noise += float((stored - exact).square().sum())

    def requantized(self, exact: Tensor, stored: Tensor) -> None:
        """A weight was put into codes."""
        self.requantization += log_ratio(stored, exact)
        self.requantization_noise += float((stored - exact).square().sum())

    def as_tensor(self) -> Tensor:
        """All of it as one vector."""
        numbers = [float(getattr(self, one.name)) for one in fields(self) if one.name != "initial"]
        return torch.cat([torch.tensor(numbers, dtype=torch.float64), self.initial])

    def restore(self, state: Tensor) -> None:
        """Take over what :meth:`as_tensor` gave.

        Raises:
            CheckpointError: It belongs to a layer of another size, or one that tracks its spectrum otherwise.
        """
        names = [one.name for one in fields(self) if one.name != "initial"]
        if state.shape != (len(names) + len(self.initial),):
            raise CheckpointError(
                f"the record of a POET layer must hold {len(names) + len(self.initial)} numbers; got "
                f"{tuple(state.shape)}. Attach with the options of the first run."
            )
        state = state.double().cpu()
        for name, value in zip(names, state.tolist(), strict=False):
            setattr(self, name, int(value) if name == "merges" else value)
        self.initial = state[len(names) :].clone()


def log_ratio(after: Tensor, before: Tensor) -> float:
    """``log(||after||_F / ||before||_F)``; 0 for a zero matrix, which nothing changes."""
    norms = [float(torch.linalg.vector_norm(W)) for W in (after, before)]
    return math.log(norms[0] / norms[1]) if min(norms) > 0 else 0.0
