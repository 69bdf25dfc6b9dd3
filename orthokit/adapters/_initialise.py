"""What the frozen weight is when training begins: its singular values stay for life."""

from __future__ import annotations

import torch
from torch import Tensor

from orthokit.linalg import polar

__all__ = ["INITIALISATIONS", "initial_weight", "stream_generator"]

INITIALISATIONS = ("keep", "normalised", "uniform_spectrum", "xavier", "standard")
# The width-independent standard deviation of the LLaMA family.
_STANDARD = 0.02


def stream_generator(seed: int, *numbers: int) -> torch.Generator:
    """A source of randomness for one purpose: equal numbers, equal draws, whatever was drawn elsewhere."""
    state = seed
    for number in numbers:
        state = state * 1_000_003 + number
    # One multiplication by a large odd number decorrelates neighbouring states.
    return torch.Generator().manual_seed(state * 0x9E3779B97F4A7C15 % 2**63)


@torch.no_grad()
def initial_weight(weight: Tensor, init: str, scale: float, generator: torch.Generator) -> Tensor:
    """The weight to freeze, in float64 on the device of ``weight``."""
    work = torch.float64 if weight.device.type != "mps" else torch.float32
    if init == "keep":
        return weight.detach().to(work) * scale
    rows, columns = weight.shape
    W = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if init == "normalised":
        W = W / torch.linalg.vector_norm(W, dim=1, keepdim=True)
    elif init == "uniform_spectrum":
        W = polar(W)
    else:
        W = W * (_STANDARD if init == "standard" else (2 / (rows + columns)) ** 0.5)
    return W.to(device=weight.device, dtype=work) * scale
