r"""One side of a reparameterised layer: a trainable block-diagonal rotation of its coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from orthokit.adapters._rotation import SkewMap, packed_rotation
from orthokit.adapters._turn import turn_into
from orthokit.linalg import (
    apply_blocks,
    block_sizes,
    expected_log_drift,
    inverse_permutation,
    packed_size,
    polish_orthogonal,
    rotate_blocks,
    top_singular_value,
    unpack_skew,
)

__all__ = ["BlockRotation", "rotate_sides", "rotations_of", "side_sizes", "turn"]

# The exact density costs a recurrence of length b; from here on the semicircle is within a percent of it.
_FINITE_BELOW = 65
# With fewer rows the calls of single products cost more than what they save.
_MANY_ROWS = 128


def turn(stacks: list[Tensor], X: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """``x -> x Diag(R_1, ..., R_k, I)``: coordinates beyond the last block stay as they are.

    Args:
        stacks: Blocks as ``linalg.apply_blocks`` takes them; they may cover fewer than ``n`` coordinates.
        X: Rows.

    Returns:
        Shape and dtype of ``X``.
    """
    covered = sum(stack.shape[0] * stack.shape[-1] for stack in stacks)
    if X.device.type == "cpu" and X.ndim == 2 and len(X) >= _MANY_ROWS and not torch.is_grad_enabled():
        return _turn_in_place(stacks, X, covered)
    if covered == X.shape[-1]:
        return apply_blocks(stacks, X)
    return torch.cat([apply_blocks(stacks, X[..., :covered]), X[..., covered:]], dim=-1)


def _turn_in_place(stacks: list[Tensor], X: Tensor, covered: int) -> Tensor:
    Y, start = torch.empty_like(X, memory_format=torch.contiguous_format), 0
    for stack in stacks:
        stop = start + stack.shape[0] * stack.shape[-1]
        turn_into(Y[:, start:stop], stack, X[:, start:stop])
        start = stop
    Y[:, covered:] = X[:, covered:]
    return Y


def rotate_sides(W: Float[Tensor, "out in"], left: list[Tensor], right: list[Tensor]) -> Float[Tensor, "out in"]:
    """``D_out W D_in``, with rows and columns that no block covers left alone.

    Args:
        W: Rows and columns in the order of the blocks.
        left: Blocks of the out-side; none leaves it alone.
        right: Blocks of the in-side; none leaves it alone.

    Returns:
        Shape and dtype of ``W``.
    """
    W = turn(right, W) if right else W
    rows = sum(stack.shape[0] * stack.shape[-1] for stack in left)
    if rows == 0:
        return W
    turned = rotate_blocks(W[:rows], left=left)
    return turned if rows == W.shape[0] else torch.cat([turned, W[rows:]], dim=0)


def rotations_of(*sides: BlockRotation) -> list[list[Tensor]]:
    """The blocks of several sides with one map, those of equal size made together: small matrices cost their calls.

    Args:
        sides: With the same map.

    Returns:
        For each side its stacks ``(k, b, b)`` in order, differentiable.
    """
    parts = [(b, i, v) for i, side in enumerate(sides) for v, (_, b) in zip(side.packed(), side.stacks, strict=True)]
    made: dict[int, list[Tensor]] = {}
    for b in dict.fromkeys(b for b, _, _ in parts):
        packed = [v for size, _, v in parts if size == b]
        together = packed[0] if len(packed) == 1 else torch.cat(packed)
        R = packed_rotation(together, b, sides[0].spec, recompute=sides[0].recompute)
        made[b] = list(R.split([len(v) for v in packed]))
    stacks: list[list[Tensor]] = [[] for _ in sides]
    for b, i, _ in parts:
        stacks[i].append(made[b].pop(0))
    return stacks


class BlockRotation(nn.Module):
    r"""``Diag(f(Q_1), ..., f(Q_k))`` with packed skew generators ``Q_j`` as its one parameter, in a given order.

    The parameter has one dimension, so that nothing takes it for a matrix: an orthogonal optimizer must not.

    Args:
        dim: Coordinates, ``>= 1``.
        sizes: Block sizes in order, full blocks first; they cover ``sum(sizes) <= dim`` coordinates.
        spec: The map ``f``.
        recompute: Keep less for the backward pass; see :func:`packed_rotation`.
        dtype: Of the generators.
        device: Of the generators.

    Example:
        >>> side = BlockRotation(5, [2, 2, 1], SkewMap("cayley", 1, 1))
        >>> side.generator.shape, [tuple(R.shape) for R in side.rotations()]
        (torch.Size([2]), [(2, 2, 2), (1, 1, 1)])
    """

    index: Tensor
    inverse: Tensor

    def __init__(
        self,
        dim: int,
        sizes: list[int],
        spec: SkewMap,
        *,
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.sizes, self.spec, self.recompute = dim, sizes, spec, recompute
        # One stack per size: at most the full blocks and a smaller last one.
        self.stacks = [(sizes.count(b), b) for b in dict.fromkeys(sizes)]
        entries = sum(k * packed_size(b) for k, b in self.stacks)
        self.generator = nn.Parameter(torch.zeros(entries, dtype=dtype, device=device))
        self.register_buffer("index", torch.arange(dim, device=device))
        self.register_buffer("inverse", torch.arange(dim, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockRotation:
        # Generators of a few thousandths next to the ones of I would vanish in half precision: a model that is cast to
        # it keeps them in float32.
        def careful(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = tensor.is_floating_point() and torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device, torch.float32) if low else moved

        return super()._apply(careful, recurse)

    def extra_repr(self) -> str:
        """Blocks in words."""
        return f"{self.dim} coordinates, blocks {self.blocks}, map={self.spec.map!r}"

    @property
    def blocks(self) -> str:
        """The blocks in words, such as ``"4 x 32 + 1 x 8"``."""
        text = " + ".join(f"{k} x {b}" for k, b in self.stacks)
        rest = self.dim - sum(self.sizes)
        return f"{text}, {rest} at rest" if rest else text

    def packed(self) -> list[Tensor]:
        """The generators, one tensor ``(k, b (b - 1) / 2)`` per stack."""
        parts = self.generator.split([k * packed_size(b) for k, b in self.stacks])
        return [part.view(k, packed_size(b)) for part, (k, b) in zip(parts, self.stacks, strict=True)]

    def rotations(self) -> list[Tensor]:
        """The blocks, one tensor ``(k, b, b)`` per stack, differentiable."""
        return rotations_of(self)[0]

    @torch.no_grad()
    def exact_rotations(self, dtype: torch.dtype, *, polish: int = 0) -> list[Tensor]:
        """The blocks in another precision, polished: what a merge multiplies with."""
        pairs = zip(self.packed(), self.stacks, strict=True)
        return [polish_orthogonal(packed_rotation(v.to(dtype), b, self.spec), steps=polish) for v, (_, b) in pairs]

    @torch.no_grad()
    def reset(self, index: Int[Tensor, " dim"]) -> None:
        """Back to the identity, with the coordinates in a new order."""
        self.generator.zero_()
        self.index.copy_(index)
        self.inverse.copy_(inverse_permutation(index))

    @torch.no_grad()
    def largest_angle(self, *, tol: float = 1e-3) -> float:
        """The largest angle by which a plane is turned, in radians; ``tol`` as in ``linalg.top_singular_value``.

        Returns:
            A lower bound within about ``tol``; see ``linalg.top_singular_value``.
        """
        thetas = [
            float(top_singular_value(unpack_skew(v.float()), tol=tol).max())
            for v, (_, b) in zip(self.packed(), self.stacks, strict=True)
            if b > 1
        ]
        return self.spec.angle(max(thetas, default=0.0))

    @torch.no_grad()
    def exceeds(self, angle: float) -> bool:
        """Whether the largest plane angle is beyond ``angle``, as cheaply as that can be known.

        The angles of a skew matrix come in pairs, so ``||Q||_2 <= ||Q||_F / sqrt(2) = ||v||_2``: mostly that settles
        it. Only otherwise the norm is estimated from a few products, from below and within a percent.
        """
        bounds = [float(torch.linalg.vector_norm(v, dim=-1).max()) for v in self.packed() if v.numel()]
        if self.spec.angle(max(bounds, default=0.0)) <= angle:
            return False
        return self.largest_angle(tol=1e-2) > angle

    @torch.no_grad()
    def angles(self) -> Float[Tensor, " planes"]:
        """The angles of all planes in radians, largest first; every plane counts once."""
        found = []
        for v, (_, b) in zip(self.packed(), self.stacks, strict=True):
            # The singular values of a skew matrix come in pairs, one pair a plane.
            theta = torch.linalg.svdvals(unpack_skew(v.double()))[..., 0 : 2 * (b // 2) : 2].flatten()
            found.append(2 * theta.atan() if self.spec.turns == 2 else theta)
        return torch.cat(found).sort(descending=True).values

    @torch.no_grad()
    def log_growth(self, stacks: list[Tensor]) -> float:
        """The mean logarithm of the singular values of the whole factor, from the determinants of its blocks."""
        return sum(float(torch.linalg.slogdet(R)[1].sum()) for R in stacks) / self.dim

    @torch.no_grad()
    def expected_log_growth(self, *, polish: int = 0) -> float:
        """What :meth:`log_growth` would be on average if the generators were random numbers of their size."""
        total = 0.0
        for v, (k, b) in zip(self.packed(), self.stacks, strict=True):
            if b < 2:
                continue
            std = float(v.double().square().mean().sqrt())
            method = "finite" if b < _FINITE_BELOW else "semicircle"
            options = {"terms": self.spec.terms, "order": self.spec.order, "polish": polish}
            total += k * b * expected_log_drift(self.spec.map, std, b, method=method, **options)
        return total / self.dim


def side_sizes(dim: int, block_size: int | float, variant: str) -> list[int]:
    """Block sizes of one side of a layer.

    Args:
        dim: Coordinates of the side.
        block_size: Entries of a block, or for ``"full"`` a share of ``dim`` in (0, 1].
        variant: ``"block"``: blocks cover every coordinate, the last one smaller where ``block_size`` does not divide;
            ``"full"``: one block over a random subset.

    Returns:
        Sizes in order.
    """
    if variant == "block":
        return block_sizes(dim, min(int(block_size), dim))
    chosen = max(2, math.floor(block_size * dim + 0.5)) if isinstance(block_size, float) else block_size
    return [min(chosen, dim)]
