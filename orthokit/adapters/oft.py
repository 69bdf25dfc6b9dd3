r"""Orthogonal fine-tuning: one block-diagonal rotation of the inputs, applied to activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.adapters._blocks import BlockAdapter, BlockOptions
from orthokit.adapters._turn import plane_angles, turn_rows
from orthokit.adapters.sites import Site

__all__ = ["OFT", "OFTAdapter"]


@dataclass(frozen=True)
class OFT(BlockOptions):
    r"""Options of orthogonal fine-tuning: a frozen weight whose inputs are turned, ``W -> W Diag(R_1, ..., R_k)``.

    ``R_i = f(Q_i)`` with ``Q_i = project(angle_scale (32 / b)^(3/4) unpack(v_i))``: skew, from the trained ``v_i``,
    which begin at 0. Singular values of ``W``, lengths of its rows and all angles between them stay as they are.

    Args:
        block_size: ``b >= 2``, a divisor of the width; default 32.
        map: ``f``, of ``linalg.MAPS``; default ``"cayley"``, which is exact. ``"cayley_neumann"`` is its series.
        terms: ``k`` of ``"cayley_neumann"``: powers up to ``Q^k`` in the sum; default 5.
        order: ``p`` of ``"exp_taylor"``; default 4.
        tolerance: Of ``"cayley_neumann"``, ``> 0``: where ``||Q_i||_2^{k+1}``, its exact distance from the Cayley
            transform, may be beyond it, the layer takes the exact map; default 1e-5. ``None`` never looks.
        share: One block for all places; default ``False``.
        radius: Largest Frobenius norm of each ``Q_i``, ``> 0`` (the constrained form, COFT): what is longer is
            projected, in the forward pass and in merges alike, and the gradient is that of the projection; default
            ``None``. ``atan(radius / sqrt(2))`` twice is the largest angle that the Cayley transform can then reach.
        dropout: Chance in [0, 1) of every block to be at rest (``R_i = I``) in a training pass; default 0. Drawn from
            PyTorch's own source, as ``nn.Dropout`` does.
        angle_scale: Factor on the generators, ``> 0``; default 1. With an optimizer that does not see the size of a
            gradient it is a factor on the learning rate of this adapter.
        block_rate: Scale generators by ``(32 / b)^(3/4)``, so that one learning rate suits all block sizes; default
            ``True``. Steps of Adam are about ``+-lr`` an entry; a skew matrix of such entries turns planes by up to
            ``2 lr sqrt(b)`` if their signs are random, and in proportion to ``b`` if they agree. Best rates lie between
            the two, which the study ``adapters`` measures. Rates for ``b = 32`` stay as they are.
        conv: How a convolution is read: ``"channels"`` (default) turns the channels at every place, ``"patches"`` the
            columns of the weight flattened to ``(out, in / groups * kernel)``.
        init_std: Standard deviation of ``v`` at the beginning, ``>= 0``; default 0, no change.
        seed: Of that; default 0.

    Raises:
        OptionError: An option out of range, or when attached, a block size that does not divide.
        UnknownNameError: Unknown map or view.

    Example:
        >>> from orthokit.linalg import singular_values
        >>> layer = OFT(block_size=4, init_std=0.3).wrap(torch.nn.Linear(8, 6))
        >>> before, after = layer.base.weight, layer.merged().weight
        >>> bool((after - before).abs().max() > 0.01)
        True
        >>> torch.allclose(singular_values(after), singular_values(before), atol=1e-6)
        True

    Numerics:
        ``in (b - 1) / 2`` trainable numbers a layer, ``b (b - 1) / 2`` when shared. ``N in b`` multiplications for
        ``N`` rows forward and twice that backward, and the maps, which do not depend on ``N``. Blocks are made in at
        least float32 and applied in the type of the activations.

    References:
        Z. Qiu et al. (2023), Controlling text-to-image diffusion by orthogonal finetuning, arXiv 2306.07280;
        Z. Qiu et al. (2025), Orthogonal finetuning made scalable, arXiv 2506.19847, for rows instead of weights.
        Ours: the exact map at the cost of the series, the watched remainder, the rate over block sizes, the projection
        as part of the function, and dropout on activations.
    """

    kind: ClassVar[str] = "oft"
    block_size: int = 32

    def part(self, site: Site, weight: Callable[[], Tensor], *, stream: int) -> OFTAdapter:
        """The adapter of one layer; see :class:`~orthokit.adapters.base.PartConfig`."""
        blocks = self.check_site(site) // self.block_size
        return OFTAdapter(self, site, lead=(1 if self.share else blocks,), blocks=blocks, stream=stream)


class OFTAdapter(BlockAdapter):
    """:class:`OFT` on one layer; its parameter is ``generator``, ``(blocks, b (b - 1) / 2)``."""

    def factors(self, dtype: torch.dtype, *, drop: bool = False) -> Tensor:
        """The blocks ``(k, b, b)``, or ``(1, b, b)`` when shared."""
        return self._rotations(dtype, drop=drop)

    def rotations(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The blocks in one stack ``(k, b, b)``; differentiable, without dropout.

        Args:
            dtype: Default that of the parameter.
        """
        R = self._rotations(self.dtype if dtype is None else dtype, drop=False)
        return [R.expand(self.blocks, -1, -1)]

    def through(self, factors: Tensor, x: Float[Tensor, "*rows in"], *, transposed: bool) -> Float[Tensor, "*rows in"]:
        """``x R``, or ``x R^T``."""
        return turn_rows(factors.mT if transposed else factors, x)

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """``max |R^T R - I|``, of the blocks as they are in the type of the parameter."""
        R = self._rotations(self.dtype, drop=False).to(self.precise)
        return float((R.mT @ R - torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)).abs().max())

    def largest_angle(self) -> float:
        """The largest angle by which a plane is turned, in radians, exact."""
        return float(plane_angles(self.packed(), self.map_in_use()).max())
