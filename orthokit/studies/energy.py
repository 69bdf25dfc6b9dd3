"""How changes of a matrix change the energy of its neurons: rotations of either side, noise, and low-rank updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.diagnostics.energy import hyperspherical_energy
from orthokit.errors import OptionError
from orthokit.matrices import matrices

__all__ = ["CHANGES", "energies", "energy_changes", "spread_on_sphere"]


def spread_on_sphere(
    points: Float[Tensor, "n d"], *, steps: int = 300, lr: float = 0.1, s: float = 1.0
) -> tuple[Float[Tensor, "n d"], list[float]]:
    """Unit vectors moved apart by gradient descent on their energy.

    Args:
        points: Start, shape ``(n, d)``; rows are normalised first. Not changed.
        steps: Descent steps, ``>= 1``; default 300.
        lr: First step length on the sphere, ``> 0``; it falls linearly to 0. Default 0.1.
        s: Exponent of the energy.

    Returns:
        The final points, on the sphere, and the energy before each step and at the end.

    Raises:
        OptionError: ``steps`` or ``lr`` out of range.

    Example:
        >>> start = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        >>> ends, energies = spread_on_sphere(start)
        >>> from orthokit.diagnostics import simplex_energy
        >>> abs(energies[-1] - simplex_energy(4)) < 1e-3
        True
    """
    if steps < 1 or not lr > 0:
        raise OptionError(f"need steps >= 1 and lr > 0; got steps={steps}, lr={lr}.")
    X = torch.nn.functional.normalize(points.detach().clone(), dim=-1)
    energies = []
    for step in range(steps):
        X.requires_grad_(True)
        energy = hyperspherical_energy(X, s=s)
        (grad,) = torch.autograd.grad(energy, X)
        energies.append(float(energy.detach()))
        # The gradient is tangent already; its length says how crowded a point is, so steps are scaled by the largest.
        length = torch.linalg.vector_norm(grad, dim=-1).max().clamp(min=1e-12)
        X = torch.nn.functional.normalize(X.detach() - lr * (1 - step / steps) * grad / length, dim=-1)
    energies.append(float(hyperspherical_energy(X, s=s)))
    return X, energies


def energies(model_or_state_dict: nn.Module | Mapping[str, Tensor], *, s: float = 1.0) -> list[float]:
    """The energy of every matrix block, in the order of ``matrices``; a batch of matrices counts by its mean.

    Args:
        model_or_state_dict: Any module or state dict.
        s: Exponent of the energy.

    Returns:
        One number a block.

    Example:
        >>> len(energies(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))))
        2
    """
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    found = []
    for block in matrices(model_or_state_dict):
        W = block.read(state[block.parameter]).detach()
        found.append(float(hyperspherical_energy(W, s=s).mean()))
    return found


def _skew(d: int, generator: torch.Generator) -> Tensor:
    A = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (A - A.T) / (2 * d) ** 0.5


def _rotate_inputs(W: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    A = _skew(W.shape[1], generator)
    return lambda t: W @ torch.linalg.matrix_exp(t * A)


def _rotate_outputs(W: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    A = _skew(W.shape[0], generator)
    return lambda t: torch.linalg.matrix_exp(t * A) @ W


def _add_noise(W: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    E = torch.randn(W.shape, generator=generator, dtype=torch.float64)
    return lambda t: W + t * E * (W.norm() / E.norm())


def _add_low_rank(W: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    rank = max(1, min(W.shape) // 16)
    B = torch.randn(W.shape[0], rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, W.shape[1], generator=generator, dtype=torch.float64)
    E = B @ A
    return lambda t: W + t * E * (W.norm() / E.norm())


CHANGES: dict[str, Callable[[Tensor, torch.Generator], Callable[[float], Tensor]]] = {
    "rotate the inputs (W R)": _rotate_inputs,
    "rotate the outputs (R W)": _rotate_outputs,
    "add Gaussian noise": _add_noise,
    "add a low-rank update": _add_low_rank,
}


def _at_distance(path: Callable[[float], Tensor], W: Tensor, amount: float) -> Tensor:
    """The point of a path from ``W`` whose relative distance from ``W`` is ``amount``, by bisection."""
    low, high = 0.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        if float((path(middle) - W).norm() / W.norm()) < amount:
            low = middle
        else:
            high = middle
    return path(high)


def energy_changes(
    W: Float[Tensor, "out in"], amounts: Sequence[float], *, generator: torch.Generator, s: float = 1.0
) -> dict[str, list[float]]:
    r"""The change of energy ``E(W + \Delta W) - E(W)`` for changes of equal size and different kind.

    Args:
        W: The matrix; converted to float64.
        amounts: Relative sizes ``||\Delta W||_F / ||W||_F``, in (0, 1].
        generator: Source of the random directions.
        s: Exponent of the energy.

    Returns:
        For each kind of change in :data:`CHANGES` the differences, one for each amount.

    Raises:
        OptionError: An amount outside (0, 1].

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> found = energy_changes(torch.randn(24, 16, generator=g), [0.1], generator=g)
        >>> abs(found["rotate the inputs (W R)"][0]) < 1e-12 < abs(found["add Gaussian noise"][0])
        True

    Numerics:
        float64. A rotation of the inputs keeps every angle between rows, so its difference is rounding alone.
    """
    if not all(0 < amount <= 1 for amount in amounts):
        raise OptionError(f"amounts must be in (0, 1]; got {list(amounts)}.")
    start = W.detach().double().cpu()
    base = float(hyperspherical_energy(start, s=s))
    found = {}
    for name, change in CHANGES.items():
        path = change(start, generator)
        found[name] = [float(hyperspherical_energy(_at_distance(path, start, a), s=s)) - base for a in amounts]
    return found
