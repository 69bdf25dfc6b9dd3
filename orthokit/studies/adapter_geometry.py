"""What adapters keep of the weights they sit on: spectrum, energy, angles, lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters.attach import adapted_layers
from orthokit.adapters.layer import AdaptedLayer
from orthokit.diagnostics.energy import hyperspherical_energy
from orthokit.linalg.spectra import singular_values

__all__ = ["what_is_kept"]


@torch.no_grad()
def what_is_kept(model: nn.Module) -> dict[str, float]:
    r"""How far adapters moved what describes a weight, as means and extremes over the adapted layers.

    Args:
        model: A model with adapters on linear layers.

    Returns:
        ``spectrum`` and ``spectrum_max``: largest :math:`|\sigma_i - \sigma_i^0| / \sigma_1^0` of a layer, mean and
        largest over layers. ``energy``: largest relative change of the hyperspherical energy of the rows. ``angle`` and
        ``angle_max``: mean and largest change of the angle between two rows, degrees. ``norm``: largest relative change
        of a row's length. ``moved``: mean of :math:`\|W - W_0\|_F / \|W_0\|_F`. ``orthogonality``: largest
        :math:`|R^T R - I|`, NaN for adapters that do not turn.

    Raises:
        ParameterError: The model has no adapter.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 6)), OFT(block_size=4), targets="0")
        >>> _ = nn.init.normal_(model[0].adapters["default"].generator, generator=torch.Generator().manual_seed(0))
        >>> found = what_is_kept(model)
        >>> found["moved"] > 0.1, found["spectrum"] < 1e-6, found["angle_max"] < 1e-3
        (True, True, True)

    Numerics:
        Weights in float64, singular values from Gram matrices, angles and energy in float32.
    """
    found = [_kept_of(layer) for layer in adapted_layers(model).values() if isinstance(layer, AdaptedLayer)]
    over = {key: [one[key] for one in found] for key in found[0]}
    result = {key: sum(over[key]) / len(found) for key in ("spectrum", "angle", "moved")}
    result |= {f"{key}_max": max(over[key]) for key in ("spectrum", "angle_max") if key != "angle_max"}
    return result | {key: max(over[key]) for key in ("energy", "angle_max", "norm", "orthogonality")}


def _kept_of(layer: AdaptedLayer) -> dict[str, float]:
    after = layer.effective_weight(dtype=torch.float64)
    before = layer._matrix("patches", torch.float64)
    values, start = singular_values(after, method="gram"), singular_values(before, method="gram")
    lengths = [torch.linalg.vector_norm(W, dim=1) for W in (before, after)]
    turned = _angles(after.float()) - _angles(before.float())
    energies = [float(hyperspherical_energy(W.float())) for W in (before, after)]
    errors = [error for part in layer.parts() if (error := part.orthogonality_error()) is not None]
    return {
        "spectrum": float((values - start).abs().max() / start[0]),
        "energy": abs(energies[1] / energies[0] - 1),
        "angle": float(turned.abs().mean()),
        "angle_max": float(turned.abs().max()),
        "norm": float((lengths[1] / lengths[0] - 1).abs().max()),
        "moved": float((after - before).norm() / before.norm()),
        "orthogonality": max(errors) if errors else math.nan,
    }


def _angles(W: Tensor) -> Tensor:
    """Angles between all pairs of rows, degrees."""
    X = F.normalize(W, dim=1)
    cosines = (X @ X.mT).clamp_(-1, 1)
    # A row with itself: its cosine is 1 but for rounding, of which arccos would make a fraction of a degree.
    cosines.fill_diagonal_(1.0)
    return torch.rad2deg(cosines.acos())
