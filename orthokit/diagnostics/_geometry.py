"""Arithmetic of activation geometry on float64 matrices ``(tokens, width)``, and the checks that lead to them."""

from __future__ import annotations

import torch
from torch import Tensor

from orthokit.device import generator as seeded_generator
from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, working_dtype

__all__ = [
    "EPS",
    "as_input",
    "centred",
    "check_range",
    "cka",
    "compress",
    "enough_tokens",
    "gram",
    "pair",
    "procrustes",
    "sampled_gram",
    "top_directions",
    "unaligned",
]

EPS = 1e-12  # guard of the denominators, as published
ENOUGH = 4  # tokens a dimension

# Below this share of the energies the closed form of the Procrustes residual has lost four digits of its square.
_NEAR = 1e-4


def compress(X: Tensor) -> Tensor:
    """Fewer columns with the same inner products between rows: ``X`` itself, or ``(tokens, tokens)`` if it is wide."""
    return X if X.shape[0] >= X.shape[1] else torch.linalg.qr(X.mT, mode="r").R.mT


def procrustes(X0: Tensor, X1: Tensor, cross: Tensor | None = None) -> Tensor:
    """``min ||X1 R - X0||_F`` over orthogonal ``R``; ``cross`` is ``X1^T X0`` if it is there already.

    The closed form needs no ``R`` and no singular vectors, but is a difference of energies: near 0 it would stop at
    the root of epsilon. There the rotation is formed and the residual taken of the difference itself, which is right
    to epsilon. A rank-deficient cross product leaves ``R`` undetermined, but neither form of the residual.
    """
    cross = X1.mT @ X0 if cross is None else cross
    energy = X0.square().sum() + X1.square().sum()
    square = energy - 2 * torch.linalg.svdvals(cross).sum()
    if bool(square > _NEAR * energy):
        return square.sqrt()
    U, _, Vh = torch.linalg.svd(cross)
    return torch.linalg.matrix_norm(X1 @ (U @ Vh) - X0)


def gram(Z0: Tensor, Z1: Tensor) -> tuple[Tensor, Tensor]:
    """``||Z1 Z1^T - Z0 Z0^T||_F`` and ``||Z0 Z0^T||_F`` from matrices of at most ``2 width`` rows.

    Expanding the square into products of ``Z^T Z`` cancels for every rotation. An orthonormal basis ``Q`` of all
    columns together does not: ``Z = Q T`` turns both Gram matrices into small ``T T^T``, subtracted entry by entry.
    """
    width = Z0.shape[1]
    if Z0.shape[0] > 2 * width:
        both = torch.linalg.qr(torch.cat([Z0, Z1], dim=1), mode="r").R
        Z0, Z1 = both[:, :width], both[:, width:]
    before = Z0 @ Z0.mT
    return torch.linalg.matrix_norm(Z1 @ Z1.mT - before), torch.linalg.matrix_norm(before)


def cka(cross: Tensor, own0: Tensor, own1: Tensor) -> Tensor:
    """Linear CKA of ``X1^T X0``, ``X0^T X0`` and ``X1^T X1``; NaN where one of them is zero."""
    similarity = cross.square().sum() / (torch.linalg.matrix_norm(own0) * torch.linalg.matrix_norm(own1))
    return similarity.clamp(max=1)


def top_directions(X: Tensor, rank: int, own: Tensor | None = None) -> tuple[Tensor, int]:
    """Orthonormal leading principal directions ``(width, rank)``, and how many directions ``X`` has at all.

    ``own`` is ``X^T X`` (for a wide ``X``: ``X X^T``) if it is there already.
    """
    tall = X.shape[0] >= X.shape[1]
    own = (X.mT @ X if tall else X @ X.mT) if own is None else own
    values, vectors = torch.linalg.eigh(own)
    leading = vectors[:, -rank:].flip(-1)
    noise = max(X.shape) * torch.finfo(X.dtype).eps * values[-1]
    return (leading if tall else torch.linalg.qr(X.mT @ leading).Q), int((values > noise).sum())


def unaligned(V0: Tensor, V1: Tensor) -> Tensor:
    """``||P0 - P1||_F / sqrt(2 rank)`` as the root mean squared sine, from what of ``V1`` lies outside of ``V0``."""
    outside = V1 - V0 @ (V0.mT @ V1)
    return (outside.square().sum() / V0.shape[1]).sqrt().clamp(max=1)


def sampled_gram(A0: Tensor, A1: Tensor, rows: int | None, seed: int) -> Tensor:
    """Gram distortion of at most ``rows`` tokens, drawn alike for every layer of as many tokens."""
    if rows is not None and rows < 2:
        raise OptionError(f"rows must be an integer >= 2, or None for all; got {rows}.")
    if rows is not None and rows < len(A0):
        chosen = torch.randperm(len(A0), generator=seeded_generator(seed))[:rows].to(A0.device)
        A0, A1 = A0[chosen], A1[chosen]
    Z0, Z1 = (torch.nn.functional.normalize(A, dim=1, eps=torch.finfo(A.dtype).tiny) for A in (A0, A1))
    change, base = gram(Z0, Z1)
    return change / (base + EPS)


def pair(X0: Tensor, X1: Tensor, *, centre: bool = False) -> tuple[Tensor, Tensor]:
    """Both, checked, in float64, centred if asked."""
    for name, X in (("X0", X0), ("X1", X1)):
        if X.ndim != 2:
            raise ShapeError(f"{name} must have the shape (tokens, width); got {tuple(X.shape)}. Flatten it first.")
        if not X.is_floating_point():
            raise DtypeError(f"{name} must be real floating; got {X.dtype}. Convert it with .float() first.")
    if len(X0) != len(X1):
        raise ShapeError(
            f"X0 and X1 must hold the same tokens in the same rows; got {len(X0)} and {len(X1)} tokens. "
            "Run both models on the same batches with the same mask."
        )
    if X0.shape != X1.shape:
        raise ShapeError(
            f"X0 and X1 must have one width; got {X0.shape[1]} and {X1.shape[1]}. Compare the same layer of both."
        )
    if len(X0) < 2 or X0.shape[1] < 1:
        raise ShapeError(f"activations need at least two tokens and one dimension; got shape {tuple(X0.shape)}.")
    for name, X in (("X0", X0), ("X1", X1)):
        check_finite(X, name=name)
    # MPS has no float64.
    work = torch.float32 if X0.device.type == "mps" else torch.float64
    A0, A1 = X0.detach().to(work), X1.detach().to(work)
    return (centred(A0), centred(A1)) if centre else (A0, A1)


def centred(X: Tensor) -> Tensor:
    """Column means subtracted."""
    return X - X.mean(dim=0)


def as_input(value: Tensor, X0: Tensor, X1: Tensor) -> Tensor:
    """The result in the precision of the inputs: float64 if one of them is, else float32."""
    return value.to(torch.promote_types(working_dtype(X0), working_dtype(X1)))


def enough_tokens(n: int, d: int, *, reduce: int | None, few: str) -> tuple[int, bool]:
    """Width that is compared, and whether ``n`` tokens are enough for it."""
    if few not in ("refuse", "flag"):
        raise unknown_name("way to treat few tokens", few, ("refuse", "flag"))
    if reduce is not None:
        check_range("reduce", reduce, min(n, d))
    width = d if reduce is None else reduce
    enough = n >= ENOUGH * width
    if not enough and few == "refuse":
        raise ShapeError(
            f"comparing {width} dimensions up to rotation needs at least {ENOUGH} times as many tokens, "
            f"{ENOUGH * width}; got {n}. Collect more, pass reduce={max(1, n // ENOUGH)} or less, or few='flag'."
        )
    return width, enough


def check_range(name: str, value: int, most: int) -> None:
    """Raise unless ``1 <= value <= most``."""
    if not 1 <= value <= most:
        raise OptionError(f"{name} must satisfy 1 <= {name} <= min(tokens, width) = {most}; got {value}.")
