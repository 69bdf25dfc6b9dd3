"""Rotations that are really trained: a frozen language model moved to another text by rotating its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError
from orthokit.lab import language_modelling, load_pretrained
from orthokit.linalg import block_sizes, packed_size, rotate_blocks, singular_values, unpack_skew
from orthokit.studies.maps import apply_map, parse_map

__all__ = ["RotationRun", "adapt_by_rotation"]


def adapt_by_rotation(
    corpus: str = "moby_dick",
    *,
    map: str = "exact",
    block_size: int = 32,
    lr: float = 3e-3,
    steps: int = 60,
    batch: int = 8,
    context: int = 64,
    windows: int = 128,
    look: Sequence[int] | None = None,
    seed: int = 0,
) -> RotationRun:
    """A pretrained language model moved to another text by rotating the inputs of its frozen matrices, as OFT does.

    Args:
        corpus: The text to move to; default ``"moby_dick"`` (the model knows presidential addresses).
        map: From generator to rotation; see :func:`parse_map`. Default the exact Cayley transform.
        block_size: Size of the blocks, ``>= 2``; default 32. A smaller last block takes what it does not divide.
        lr: Adam's learning rate for the packed generators, ``> 0``; default 3e-3.
        steps: Steps, ``>= 1``; default 60.
        batch: Windows a step; default 8.
        context: Bytes a window; default 64.
        windows: Validation windows that are judged before and after; default 128.
        look: Steps after which to keep the generators; default 1, 2, 4, 8 ... and the last.
        seed: Seed of the batches.

    Returns:
        The generators along the way and the loss before and after.

    Raises:
        OptionError: A number out of range.

    Example:
        >>> run = adapt_by_rotation(steps=1, batch=1, context=16, windows=2)
        >>> run.generators[-1].shape[1:], bool((run.norms[-1] > 0).all())
        (torch.Size([32, 32]), True)

    References:
        Z. Qiu et al. (2023), Controlling text-to-image diffusion by orthogonal finetuning, arXiv 2306.07280.
    """
    if steps < 1 or block_size < 2 or not lr > 0:
        raise OptionError(f"need steps >= 1, block_size >= 2 and lr > 0; got {steps=}, {block_size=}, {lr=}.")
    parse_map(map)
    look = sorted({*(2**i for i in range(steps.bit_length())), steps} if look is None else set(look))
    model = load_pretrained().requires_grad_(False)
    rotations = []
    for layer in [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]:
        rotation = _Rotation(layer.weight, block_size=block_size, map=lambda Q: apply_map(map, Q))
        nn.utils.parametrize.register_parametrization(layer, "weight", rotation)
        rotations.append(rotation)
    packed = [v for rotation in rotations for v in rotation.packed]
    task = language_modelling(corpus, context=context, batch=batch, seed=seed, validation_windows=windows)
    optimizer = torch.optim.Adam(packed, lr=lr)
    before = task.evaluate(model)["validation_bits_per_byte"]
    losses, kept = [], []
    for step in range(steps):
        # Each weight is rotated once a step, not once a use.
        with nn.utils.parametrize.cached():
            loss = task.loss(model, task.batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step + 1 in look:
            full = [v.detach().double() for v in packed if v.shape[1] == packed_size(block_size)]
            kept.append(unpack_skew(torch.cat(full)))
    after = task.evaluate(model)["validation_bits_per_byte"]
    return RotationRun([s for s in look if s <= steps], kept, losses, before, after)


@dataclass(frozen=True)
class RotationRun:
    """Trained generators along an adaptation.

    Attributes:
        steps: Steps at which the generators were looked at.
        generators: At each of these steps all full blocks ``Q``, shape ``(blocks, b, b)``, float64.
        losses: Training loss at every step, nats.
        before: Validation loss before, bits per byte.
        after: Validation loss after, bits per byte.
    """

    steps: list[int]
    generators: list[Tensor]
    losses: list[float]
    before: float
    after: float

    @property
    def norms(self) -> list[Tensor]:
        """``||Q||_2`` of every block at every step looked at."""
        return [singular_values(Q)[:, 0] for Q in self.generators]

    @property
    def largest(self) -> list[float]:
        """The largest norm of any block at every step looked at, in radians."""
        return [float(norm.max()) for norm in self.norms]

    @property
    def norm_ratios(self) -> list[Tensor]:
        """``||Q||_2`` over ``2 s sqrt(b)``, with ``s`` the root mean square of the block's own entries."""
        b = self.generators[0].shape[-1]
        stds = [(Q.square().sum((-2, -1)) / (b * (b - 1))).sqrt() for Q in self.generators]
        return [norm / (2 * s * math.sqrt(b)) for norm, s in zip(self.norms, stds, strict=True)]


class _Rotation(nn.Module):
    """``W -> W Diag(R_1, ...)`` with ``R = map(Q)``: the inputs of a frozen layer rotated, as OFT does."""

    def __init__(self, W: Tensor, *, block_size: int, map: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        sizes = block_sizes(W.shape[1], block_size)
        shapes = [(sizes.count(b), packed_size(b)) for b in dict.fromkeys(sizes)]
        self.packed = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        self.map = map

    def forward(self, W: Tensor) -> Tensor:
        return rotate_blocks(W, right=[self.map(unpack_skew(v)) for v in self.packed])
