r"""Butterfly orthogonal fine-tuning: a few sparse rotations in a row that together reach every coordinate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters._blocks import BlockAdapter, BlockOptions
from orthokit.adapters._turn import turn_rows
from orthokit.adapters.sites import Site
from orthokit.errors import OptionError
from orthokit.linalg import block_diagonal, butterfly_depth, rotate_blocks

__all__ = ["BOFT", "BOFTAdapter"]

# Products of neighbouring factors are formed while their blocks are no larger: on a CPU, passing all rows through
# another factor and its two permutations costs more than blocks of this size do.
_LARGEST_FUSED = 128


@dataclass(frozen=True)
class BOFT(BlockOptions):
    r"""Options of butterfly orthogonal fine-tuning: ``W -> W F_0 F_1 ... F_{m-1}``.

    Each factor is block-diagonal after a permutation, ``F_i = P_i^T Diag(R_{i1}, ..., R_{ik}) P_i``, with blocks of
    ``b`` coordinates as in :class:`~orthokit.adapters.OFT`; ``F_i`` couples half blocks whose numbers differ in binary
    digit ``i``. One factor is OFT; ``1 + log2(n / b)`` make the product dense.

    Args:
        block_size: ``b >= 2``, a divisor of the width ``n``; even for more than one factor; default 8.
        factors: ``m >= 1``, at most ``linalg.butterfly_depth(n, b)``; default 2.
        scale_outputs: Train a factor for every output as well; default ``False``. It changes singular values and
            angles; needed to read adapters of PEFT, which always have it.
        map: As for OFT, like all that follow.
        terms: ``k`` of ``"cayley_neumann"``; default 5.
        order: ``p`` of ``"exp_taylor"``; default 4.
        tolerance: Where the series gives way to the exact map; default 1e-5.
        share: One block for all places of a factor; default ``False``.
        radius: Largest Frobenius norm of each generator; default ``None``.
        dropout: Chance of every block of every factor to be at rest in a training pass; default 0.
        angle_scale: Factor on the generators; default 1.
        block_rate: Scale generators by ``(32 / b)^(3/4)``; default ``True``.
        conv: ``"channels"`` (default) or ``"patches"``.
        init_std: Standard deviation of the parameter at the beginning; default 0.
        seed: Of that; default 0.

    Raises:
        OptionError: An option out of range, or when attached, sizes that do not suit the layer.
        UnknownNameError: Unknown map or view.

    Example:
        >>> layer = BOFT(block_size=4, factors=3, init_std=0.3).wrap(torch.nn.Linear(16, 6))
        >>> R = layer.adapters["default"].dense()
        >>> int((R != 0).sum()), torch.allclose(R @ R.T, torch.eye(16).double(), atol=1e-6)
        (256, True)

    Numerics:
        ``m n (b - 1) / 2`` trainable numbers a layer. ``g`` factors in a row are block-diagonal with blocks of
        ``2^{g-1} b`` coordinates: as long as these stay small they are multiplied first, and rows pass once through
        the product, with ``2^{g-1} b`` multiplications a coordinate instead of ``g b`` and no permutation.

    References:
        W. Liu et al. (2024), Parameter-efficient orthogonal finetuning via butterfly factorization, arXiv 2311.06243.
        Ours: factors applied to activations, products of neighbouring factors, packed generators, and digits in growing
        order for any number of factors.
    """

    kind: ClassVar[str] = "boft"
    block_size: int = 8
    factors: int = 2
    scale_outputs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors < 1:
            raise OptionError(f"factors must be at least 1; got {self.factors}.")

    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int) -> BOFTAdapter:
        """The adapter of one layer; see :class:`~orthokit.adapters.base.PartConfig`."""
        width = self.check_site(site)
        blocks = width // self.block_size
        # Factors couple blocks: with groups they have to stay within one.
        unit = width // site.groups if site.kind == "conv" and self.conv == "channels" else width
        depth = butterfly_depth(unit, self.block_size)
        if self.factors > depth:
            raise OptionError(
                f"{unit} coordinates of {site.name or 'the layer'!r} in blocks of {self.block_size} allow at most "
                f"{depth} butterfly factors; got factors={self.factors}. Each further one needs the number of blocks "
                "to be divisible by 2 once more, and an even block size."
            )
        if self.scale_outputs and site.kind == "embedding":
            raise OptionError(
                f"scale_outputs would scale the words of {site.name!r}; adapt it with scale_outputs=False."
            )
        lead = (self.factors, 1 if self.share else blocks)
        return BOFTAdapter(self, site, lead=lead, blocks=blocks, stream=stream)


class Run(NamedTuple):
    """Neighbouring factors as one block-diagonal rotation after a permutation."""

    first: int
    """Number of the first factor."""
    count: int
    """How many factors."""
    stack: Tensor
    """Blocks ``(K, 2^{count-1} b, 2^{count-1} b)``, or one for all."""


class BOFTAdapter(BlockAdapter):
    """:class:`BOFT` on one layer; parameters ``generator``, ``(m, blocks, b (b - 1) / 2)``, and perhaps ``scale``."""

    config: BOFT

    def __init__(self, config: BOFT, site: Site, *, lead: tuple[int, ...], blocks: int, stream: int) -> None:
        super().__init__(config, site, lead=lead, blocks=blocks, stream=stream)
        if config.scale_outputs:
            self.scale = nn.Parameter(torch.ones(site.out_features, dtype=site.dtype, device=site.device))
            self.scales_outputs, self.turns_inputs = True, False  # type: ignore[misc]

    def factors(self, dtype: torch.dtype, *, drop: bool = False) -> list[Run]:
        """The factors in runs, in the order of ``R``."""
        work = torch.promote_types(dtype, self.dtype)
        blocks = self._rotations(work, drop=drop)
        count = run_length(self.config.block_size)
        starts = range(0, len(blocks), count)
        runs = [(i, min(count, len(blocks) - i)) for i in starts]
        return [Run(i, g, fused(blocks, i, g).to(dtype)) for i, g in runs]

    def through(
        self, factors: list[Run], x: Float[Tensor, "*rows in"], *, transposed: bool
    ) -> Float[Tensor, "*rows in"]:
        """``x R``, or ``x R^T``, which takes the factors in the opposite order."""
        half = self.config.block_size // 2
        for first, count, stack in reversed(factors) if transposed else factors:
            x = gathered(x, first, count, half)
            x = scattered(turn_rows(stack.mT if transposed else stack, x), first, count, half)
        return x

    def around(self, inner: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """The layer with this adapter; see :class:`~orthokit.adapters.base.Adapter`."""
        y = inner(self.turn(x))
        return y * self._scales().to(y.dtype) if self.scales_outputs else y

    def merge(self, W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """``diag(scale) W R``; see :meth:`Rotating.merge`."""
        merged = super().merge(W)
        return merged * self._scales().to(W.dtype)[:, None] if self.scales_outputs else merged

    def _scales(self) -> Tensor:
        return self.scale if self.strength == 1 else 1 + self.strength * (self.scale - 1)

    @torch.no_grad()
    def largest_angle(self) -> float:
        """The largest angle by which a plane is turned, in radians; up to the error of the map where it is not exact.

        Eigenvalues of the symmetric part, of blocks where one run holds all factors, and else of the whole matrix, at
        ``O(n^3)``.
        """
        if self.strength == 0:
            return 0.0
        runs = self.factors(self.precise)
        R = runs[0].stack if len(runs) == 1 else self.dense()
        cosines = torch.linalg.eigvalsh((R + R.mT) / 2)
        return float(cosines.min().clamp(-1, 1).acos())

    def detail(self) -> str:
        """Factors, blocks, map and what bounds it."""
        text = f"{self.config.factors} factors of {super().detail()}"
        return f"{text}, outputs scaled" if self.scales_outputs else text


def run_length(block_size: int) -> int:
    """How many neighbouring factors are multiplied first."""
    count = 2  # never dearer: blocks of 2 b in place of two products with blocks of b and two permutations
    while 2**count * block_size <= _LARGEST_FUSED:
        count += 1
    return count


def fused(blocks: Float[Tensor, "m k b b"], first: int, count: int) -> Float[Tensor, "groups wide wide"]:
    """The product of factors ``first ... first + count - 1`` as blocks of ``2^{count-1} b`` coordinates.

    Half blocks are numbered by digits (high, those the factors act on, low); the product couples numbers that share
    high and low digits. In the order (high, low, the others) it is block-diagonal, and within a block the factors are
    factors 0, 1, ... again.

    Args:
        blocks: All factors, ``k`` blocks each or one for all.
        first: Number of the first factor.
        count: How many.
    """
    b, c = blocks.shape[-1], 2 ** (count - 1)
    product = None
    for t in range(count):
        F = blocks[first + t]
        if len(F) == 1:
            F = F.expand(1, c, b, b)
        else:
            # Blocks of factor first + t by their digits: high, above digit t, below it, low.
            F = F.view(-1, 2 ** (count - 1 - t), 2**t, 2**first, b, b).permute(0, 3, 1, 2, 4, 5).reshape(-1, c, b, b)
        if product is None:
            product = block_diagonal(F) if count > 1 else F[:, 0]
        else:
            turned = rotate_blocks(gathered(product, t, 1, b // 2), right=F)
            product = scattered(turned, t, 1, b // 2)
    return product  # type: ignore[return-value]


def gathered(x: Float[Tensor, "*rows n"], first: int, count: int, half: int) -> Float[Tensor, "*rows n"]:
    """Half blocks (high, ``count`` digits from ``first`` on, low) in the order (high, low, digits)."""
    if first == 0:
        return x
    return x.unflatten(-1, (-1, 2**count, 2**first, half)).transpose(-3, -2).reshape(x.shape)


def scattered(x: Float[Tensor, "*rows n"], first: int, count: int, half: int) -> Float[Tensor, "*rows n"]:
    """The inverse of :func:`gathered`."""
    if first == 0:
        return x
    return x.unflatten(-1, (-1, 2**first, 2**count, half)).transpose(-3, -2).reshape(x.shape)
