r"""Weight-space profiles: what finetuning did to each singular direction of a pretrained matrix.

All of them look at ``W`` (finetuned) through the singular vectors ``u_i, v_i`` of ``W0`` (pretrained), strongest first,
so index ``i`` means the same direction of the pretrained layer throughout. One number for the change as a whole, the
stable rank of ``W - W0``, is :func:`~orthokit.diagnostics.stable_rank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = [
    "ThinSVD",
    "WeightProfiles",
    "adaptation_profile",
    "fluctuation",
    "retention_drift",
    "retention_profile",
    "singular_vector_alignment",
    "thin_svd",
    "weight_profiles",
]

# A precomputed SVD has to reproduce W0 on one vector to this accuracy: loose enough for one made in float32 of weights
# stored in bfloat16 (whose spacing is 2^-8), tight enough to catch the SVD of another layer or another checkpoint.
_OWN = 1e-2


class ThinSVD(NamedTuple):
    """The thin SVD ``W = U diag(S) Vh``; unpacks like the result of ``torch.linalg.svd``.

    Args:
        U: Left singular vectors, shape ``(..., out, k)``, ``k = min(out, in)``.
        S: Singular values, descending, shape ``(..., k)``.
        Vh: Right singular vectors, transposed, shape ``(..., k, in)``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass(frozen=True)
class WeightProfiles:
    """All profiles of one matrix, from one product.

    Args:
        singular_values: Those of ``W0``, shape ``(..., k)``.
        retention: :func:`retention_profile`.
        drift: :func:`retention_drift`.
        adaptation: :func:`adaptation_profile`.
        change: Frobenius norm of ``W - W0``, shape ``(...)``: the natural unit of ``adaptation``, as
            ``singular_values[..., 0]`` is of ``drift``.
    """

    singular_values: Tensor
    retention: Tensor
    drift: Tensor
    adaptation: Tensor
    change: Tensor


def thin_svd(W: Float[Tensor, "*batch out in"]) -> ThinSVD:
    r"""The singular vectors that all profiles of one pretrained matrix refer to; compute once, pass as ``svd=``.

    .. math:: W = U \,\mathrm{diag}(\sigma)\, V^\top, \qquad \sigma_1 \ge \dots \ge \sigma_k, \quad k = \min(out, in)

    Args:
        W: Matrix or batch, shape ``(..., out, in)``.

    Returns:
        ``(U, S, Vh)`` in float64 for float64 input, else float32.

    Raises:
        ShapeError: Fewer than two dimensions.
        DtypeError: ``W`` is not real floating.
        NonFiniteError: ``W`` holds a NaN or an infinity.

    Example:
        >>> U, S, Vh = thin_svd(torch.diag(torch.tensor([1.0, 3.0])))
        >>> S.tolist()
        [3.0, 1.0]

    Numerics:
        A wide matrix is decomposed as its transpose, which takes LAPACK about half the time. Vectors of equal singular
        values are an arbitrary basis of their span, and those of zero singular values of the null space.

    References:
        G. Golub, C. Van Loan (2013), Matrix Computations, section 8.6.
    """
    _check(W, "W")
    work = W.to(working_dtype(W))
    if W.shape[-2] >= W.shape[-1]:
        return ThinSVD(*torch.linalg.svd(work, full_matrices=False))
    V, S, Uh = torch.linalg.svd(work.mT, full_matrices=False)
    return ThinSVD(Uh.mT, S, V.mT)


def weight_profiles(
    W0: Float[Tensor, "*#batch out in"],
    W: Float[Tensor, "*#batch out in"],
    *,
    svd: tuple[Tensor, Tensor, Tensor] | None = None,
) -> WeightProfiles:
    r"""Retention, its drift and adaptation of every singular direction of ``W0``, for the price of one product.

    .. math::
        P(i) = u_i^\top W v_i, \qquad |\Delta P(i)| = |P(i) - \sigma_i|, \qquad E(i) = \|(W - W_0)\, v_i\|_2

    Args:
        W0: Pretrained matrix or batch, shape ``(..., out, in)``.
        W: Finetuned, same matrix shape; leading dimensions broadcast, so many runs ``(runs, out, in)`` go against one
            ``W0``.
        svd: :func:`thin_svd` of ``W0``, so that calls share it; default computed here.

    Returns:
        :class:`WeightProfiles`, each profile of shape ``(..., k)``, ``k = min(out, in)``.

    Raises:
        ShapeError: Fewer than two dimensions, matrices of different shape, or an SVD that does not fit.
        OptionError: ``svd`` is that of another matrix.
        DtypeError: A matrix that is not real floating.
        NonFiniteError: A NaN or an infinity.

    Example:
        Stretching everything by 10 % is a drift of 10 % in every direction:

        >>> W0 = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
        >>> found = weight_profiles(W0, 1.1 * W0)
        >>> torch.allclose(found.drift, 0.1 * found.singular_values)
        True

    Numerics:
        One SVD of ``W0`` (none with ``svd=``) and the product ``(W - W0) V``: ``2 out in k`` FLOP, with a buffer of
        ``out k`` numbers and no ``k`` by ``k`` matrix. ``P`` is taken as ``sigma_i`` plus its drift, and the drift from
        the difference of the weights, so that a drift far below the rounding of ``sigma_i`` is still resolved:
        relative error a few epsilon of ``||W - W0||``. Directions of equal singular values are an arbitrary basis.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819. Differences: theirs is unnormalised and takes differences of
        ``P``; plots here use ``|Delta P| / sigma_1`` and ``E / ||W - W0||_F``, as labelled.
    """
    U, S, Vh, delta = _against(W0, W, svd)
    moved = delta @ Vh.mT
    shift = (U * moved).sum(-2)
    S = S.expand(shift.shape)
    change = torch.linalg.matrix_norm(delta)
    return WeightProfiles(S, S + shift, shift.abs(), torch.linalg.vector_norm(moved, dim=-2), change)


def retention_profile(
    W0: Float[Tensor, "*#batch out in"],
    W: Float[Tensor, "*#batch out in"],
    *,
    svd: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "*result k"]:
    r"""How much of each pretrained direction is still there: the finetuned matrix in the pretrained singular frame.

    .. math:: P(i) = u_i^\top W v_i, \qquad W_0 = \textstyle\sum_i \sigma_i u_i v_i^\top

    Args:
        W0: Pretrained, as in :func:`weight_profiles`.
        W: Finetuned, as in :func:`weight_profiles`.
        svd: :func:`thin_svd` of ``W0``; default computed here.

    Returns:
        Shape ``(..., k)``; equal to the singular values of ``W0`` where nothing changed, negative where a direction
        was turned over.

    Raises:
        ShapeError, OptionError, DtypeError, NonFiniteError: As :func:`weight_profiles`.

    Example:
        >>> W0 = torch.diag(torch.tensor([3.0, 2.0]))
        >>> retention_profile(W0, W0 + torch.tensor([[0.0, 5.0], [0.0, -0.5]])).tolist()
        [3.0, 1.5]

    Numerics:
        As :func:`weight_profiles`, which gives all profiles at once.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, retention profile.
    """
    return weight_profiles(W0, W, svd=svd).retention


def retention_drift(
    W0: Float[Tensor, "*#batch out in"],
    W: Float[Tensor, "*#batch out in"],
    *,
    svd: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "*result k"]:
    r"""How far each pretrained direction has moved from its singular value.

    .. math:: |\Delta P(i)| = |u_i^\top W v_i - \sigma_i| = |u_i^\top (W - W_0)\, v_i|

    Args:
        W0: Pretrained, as in :func:`weight_profiles`.
        W: Finetuned, as in :func:`weight_profiles`.
        svd: :func:`thin_svd` of ``W0``; default computed here.

    Returns:
        Shape ``(..., k)``, ``>= 0``. A rotation gives a large, smooth drift without forgetting much: compare shapes, do
        not rank methods by it.

    Raises:
        ShapeError, OptionError, DtypeError, NonFiniteError: As :func:`weight_profiles`.

    Example:
        >>> W0 = torch.diag(torch.tensor([3.0, 2.0]))
        >>> retention_drift(W0, W0 + torch.tensor([[0.0, 5.0], [0.0, -0.5]])).tolist()
        [0.0, 0.5]

    Numerics:
        As :func:`weight_profiles`: from the second form above, since the first cancels.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819.
    """
    return weight_profiles(W0, W, svd=svd).drift


def adaptation_profile(
    W0: Float[Tensor, "*#batch out in"],
    W: Float[Tensor, "*#batch out in"],
    *,
    svd: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "*result k"]:
    r"""Where finetuning wrote: the size of the change along each right singular direction of the pretrained matrix.

    .. math:: E(i) = \|(W - W_0)\, v_i\|_2, \qquad \textstyle\sum_i E(i)^2 \le \|W - W_0\|_F^2

    with equality where ``in <= out`` (the ``v_i`` then span the whole input space).

    Args:
        W0: Pretrained, as in :func:`weight_profiles`.
        W: Finetuned, as in :func:`weight_profiles`.
        svd: :func:`thin_svd` of ``W0``; default computed here.

    Returns:
        Shape ``(..., k)``, ``>= 0``.

    Raises:
        ShapeError, OptionError, DtypeError, NonFiniteError: As :func:`weight_profiles`.

    Example:
        >>> W0 = torch.diag(torch.tensor([3.0, 2.0]))
        >>> adaptation_profile(W0, W0 + torch.tensor([[0.0, 4.0], [0.0, 3.0]])).tolist()
        [0.0, 5.0]

    Numerics:
        As :func:`weight_profiles`, which gives all profiles at once.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, adaptation profile.
    """
    return weight_profiles(W0, W, svd=svd).adaptation


def singular_vector_alignment(
    W0: Float[Tensor, "*#batch out in"],
    W: Float[Tensor, "*#batch out in"],
    *,
    side: Literal["left", "right"] = "right",
    svd: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Float[Tensor, "*result k"]:
    r"""Whether the ``i``-th singular vector of the finetuned matrix is still that of the pretrained one.

    .. math:: \mathrm{SVA}(i) = |\cos(v_i^{(0)}, v_i)|

    Args:
        W0: Pretrained matrix or batch, shape ``(..., out, in)``.
        W: Finetuned, same matrix shape; leading dimensions broadcast.
        side: ``"right"`` (default), input directions; ``"left"``, output directions.
        svd: :func:`thin_svd` of ``W0``; default computed here.

    Returns:
        Shape ``(..., k)``, in [0, 1].

    Raises:
        UnknownNameError: Unknown side.
        ShapeError, OptionError, DtypeError, NonFiniteError: As :func:`weight_profiles`.

    Example:
        Turning the inputs by 60 degrees turns every right singular vector with them:

        >>> c, s = torch.tensor(torch.pi / 3).cos(), torch.tensor(torch.pi / 3).sin()
        >>> R = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        >>> W0 = torch.diag(torch.tensor([2.0, 1.0]))
        >>> [round(a, 4) for a in singular_vector_alignment(W0, W0 @ R).tolist()]
        [0.5, 0.5]

    Numerics:
        An SVD of each matrix. A low value says "turned" only where singular values are apart: neighbours closer than
        ``||W - W0||`` exchange places or mix freely. Meant for updates that keep the singular values, such as OFT.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, there for orthogonal finetuning only.
    """
    if side not in ("left", "right"):
        raise unknown_name("side", side, ("left", "right"))
    U0, _, Vh0, _ = _against(W0, W, svd)
    U, _, Vh = thin_svd(W.to(U0.dtype))
    cosines = (Vh0 * Vh).sum(-1) if side == "right" else (U0 * U).sum(-2)
    return cosines.abs().clamp(max=1)


def fluctuation(x: Float[Tensor, "*batch n"], *, width: int = 5) -> Float[Tensor, "*batch"]:
    r"""How rough a profile is: its mean distance from its own moving average.

    .. math:: \frac1n \sum_i \Big|x_i - \frac1w \sum_{|j| \le w/2} x_{i+j}\Big|

    Args:
        x: Profile or batch of profiles, shape ``(..., n)``.
        width: ``w``, odd, ``>= 1``, in entries; default 5. Ends are padded by reflection, so ``n > width // 2``.

    Returns:
        Shape ``(...)``, in the unit of ``x``; 0 for a constant.

    Raises:
        OptionError: ``width`` even or below 1.
        ShapeError: A profile too short for the reflection.
        NonFiniteError: ``x`` holds a NaN or an infinity.

    Example:
        >>> fluctuation(torch.full((9,), 0.3)).item()
        0.0

    Numerics:
        Averages of differences ``x_i - x_{i+j}``, hence exactly 0 for a constant; float32 or better.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819; width and padding as in their code.
    """
    if width < 1 or width % 2 == 0:
        raise OptionError(f"width must be an odd integer >= 1, so that the average is centred; got {width}.")
    reach = width // 2
    if x.ndim < 1 or x.shape[-1] <= reach:
        raise ShapeError(
            f"x needs more than width // 2 = {reach} entries, to be reflected at its ends; got shape {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise DtypeError(f"x must be real floating; got {x.dtype}. Convert it with .float() first.")
    check_finite(x, name="x")
    work = x.to(working_dtype(x))
    around = torch.arange(-reach, work.shape[-1] + reach, device=x.device).abs()
    last = work.shape[-1] - 1
    around = last - (last - around).abs()  # reflected at the end as at the beginning
    windows = work[..., around].unfold(-1, width, 1)
    return (work[..., None] - windows).mean(-1).abs().mean(-1)


def _against(W0: Tensor, W: Tensor, svd: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``U``, ``S``, ``Vh`` of ``W0``, and ``W - W0``; checked, in the working dtype of both."""
    _check(W0, "W0")
    _check(W, "W")
    if W0.shape[-2:] != W.shape[-2:]:
        raise ShapeError(
            f"W0 and W must hold matrices of one shape; got {tuple(W0.shape)} and {tuple(W.shape)}. "
            "Compare the same layer of two versions of one model."
        )
    work = working_dtype(torch.empty(0, dtype=torch.promote_types(W0.dtype, W.dtype)))
    W0 = W0.to(work)
    if svd is None:
        U, S, Vh = thin_svd(W0)
    else:
        U, S, Vh = (part.to(W0) for part in svd)
        _check_svd(U, S, Vh, W0)
    return U, S, Vh, W.to(work) - W0


def _check_svd(U: Tensor, S: Tensor, Vh: Tensor, W0: Tensor) -> None:
    out, width = W0.shape[-2:]
    k, batch = min(out, width), W0.shape[:-2]
    wanted = ((*batch, out, k), (*batch, k), (*batch, k, width))
    found = tuple(tuple(part.shape) for part in (U, S, Vh))
    if found != wanted:
        raise ShapeError(f"svd must be thin_svd(W0), of shapes {wanted}; got {found}.")
    # One product with a vector costs next to nothing and tells one layer's SVD from another's.
    probe = torch.cos(torch.arange(1, width + 1, device=W0.device, dtype=W0.dtype).square())[:, None]
    difference = torch.linalg.matrix_norm(W0 @ probe - U @ (S[..., None] * (Vh @ probe)))
    if not bool((difference <= _OWN * torch.linalg.matrix_norm(W0 @ probe)).all()):
        raise OptionError("svd is not the SVD of this W0; pass svd=thin_svd(W0), or leave svd out.")


def _check(W: Tensor, name: str) -> None:
    check_matrix(W, name=name)
    if W.is_complex():
        raise DtypeError(f"{name} must be real; got {W.dtype}.")
    if 0 in W.shape[-2:]:
        raise ShapeError(f"{name} must have at least one row and one column; got shape {tuple(W.shape)}.")
    check_finite(W, name=name)
