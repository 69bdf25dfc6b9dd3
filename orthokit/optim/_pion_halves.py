"""A large skew matrix as the blocks it is folded from, which products can read as they are.

With ``S_11``, ``S_12`` and ``S_22`` the product ``X S`` needs no ``S_21``: it is ``-S_12^T``, and a product reads its
right factor as fast across its rows as along them. So half of the matrix is neither transposed nor copied, and a
generator is multiplied out in three blocks of four.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from orthokit.linalg._workspace import Workspace
from orthokit.optim._pion_skew import fold_blocks, folded_parts, less_transposed, unfold_triangles

__all__ = ["Halves", "halved_product", "unfold_halves"]


class Halves(NamedTuple):
    """One skew matrix ``(1, b, b)``, cut at ``ceil(b / 2)``."""

    first: Tensor
    corner: Tensor
    second: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix ``(1, b, b)``."""
        upper = torch.cat([self.first, self.corner], dim=-1)
        lower = torch.cat([-self.corner.mT, self.second], dim=-1)
        return torch.cat([upper, lower], dim=-2).to(dtype)

    def times(self, X: Tensor, out: Tensor, *, left: bool, add: bool = False) -> Tensor:
        """``S X`` if ``left``, else ``X S``, for one matrix ``X`` ``(1, m, n)``; added to ``out`` if ``add``."""
        dim, sizes = (0 if left else 1), [self.first.shape[-1], self.second.shape[-1]]
        (X_1, X_2), (out_1, out_2) = X[0].split(sizes, dim), out[0].split(sizes, dim)
        first, corner, second = self.first[0], self.corner[0], self.second[0]
        # out_1 = X_1 S_11 - X_2 S_12^T and out_2 = X_2 S_22 + X_1 S_12, or the like from the left.
        across, straight, signs = (corner, corner.mT, (1, -1)) if left else (corner.mT, corner, (-1, 1))
        terms = ((out_1, first, X_1, across, X_2, signs[0]), (out_2, second, X_2, straight, X_1, signs[1]))
        for target, S, own, crossing, other, sign in terms:
            pair, cross = ((S, own), (crossing, other)) if left else ((own, S), (other, crossing))
            if add:
                target.addmm_(*pair)
            else:
                torch.mm(*pair, out=target)
            target.addmm_(*cross, alpha=sign)
        return out


def halved_product(
    P: Tensor, Q: Tensor, out: Tensor, workspace: Workspace, *, turn: bool, right: tuple[Tensor, Tensor]
) -> Tensor:
    """``P Q^T - Q P^T`` of one pair ``(1, b, k)``, folded into ``out`` ``(1, b (b - 1) / 2)``, by three blocks of four.

    Args:
        P: In the dtype of the products.
        Q: As ``P``.
        out: Where the result goes, usually wider.
        workspace: Scratch memory.
        turn: Whether to transpose the first product of a block on the diagonal instead of making a second one.
        right: ``P^T`` and ``Q^T``.
    """
    b = P.shape[1]
    sizes = (b - b // 2, b // 2)
    rows = list(zip(P[0].split(sizes), Q[0].split(sizes), strict=True))
    columns = list(zip(right[0][0].split(sizes, 1), right[1][0].split(sizes, 1), strict=True))
    blocks = []
    for name, i, j in (("first", 0, 0), ("corner", 0, 1), ("second", 1, 1)):
        block = workspace.get(name, (1, sizes[i], sizes[j]), P.dtype, P.device)
        (P_i, Q_i), (P_j, Q_j) = rows[i], columns[j]
        torch.mm(P_i, Q_j, out=block[0])
        if turn and i == j:
            less_transposed(block, workspace)
        else:
            block[0].addmm_(Q_i, P_j, alpha=-1)
        blocks.append(block)
    first, corner, second = blocks
    return fold_blocks(first[:, : sizes[1], 1:], corner, second, out)


def unfold_halves(packed: Tensor, b: int, dtype: torch.dtype, workspace: Workspace, name: str) -> Halves:
    """One folded matrix in a dtype, in memory of that name."""
    big, small = b - b // 2, b // 2
    rectangle, corner = folded_parts(packed, b)
    shapes = {"first": (1, big, big), "corner": (1, big, small), "second": (1, small, small)}
    parts = Halves(*(workspace.get(f"{name} {key}", shape, dtype, packed.device) for key, shape in shapes.items()))
    parts.corner.copy_(corner)
    unfold_triangles(rectangle, parts.first, parts.second, workspace)
    return parts
