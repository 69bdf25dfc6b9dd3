r"""Drift of a layer on the inputs that a capability uses: a change counts where it is felt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError
from orthokit.linalg._check import check_finite, check_matrix, working_dtype

__all__ = ["CapabilityDrift", "capability_drift"]

# Rows of H multiplied at a time: enough for full speed, and the buffer stays a few megabytes for any number of tokens.
_ROWS = 4096


@dataclass(frozen=True)
class CapabilityDrift:
    """Capability-conditioned spectral drift in its three normalisations, each of shape ``(...)``.

    Args:
        absolute: Mean squared change of the output of the layer.
        relative: Over the mean squared output of the pretrained layer.
        unaligned: Over what a change of this size does to inputs of this size if it is all felt; in [0, 1].
    """

    absolute: Tensor
    relative: Tensor
    unaligned: Tensor


def capability_drift(
    W0: Float[Tensor, "*#batch out in"],
    W: Float[Tensor, "*#batch out in"],
    H: Float[Tensor, "tokens in"],
    *,
    eps: float = 1e-12,
) -> CapabilityDrift:
    r"""How much the change of a layer is felt on given inputs, for example those of general-knowledge prompts.

    .. math::
        D_{abs} = \tfrac1N \textstyle\sum_n \|\Delta W h_n\|^2, \qquad
        D_{rel} = \dfrac{D_{abs}}{\tfrac1N \sum_n \|W_0 h_n\|^2 + \epsilon}, \qquad
        D_{un} = \dfrac{D_{abs}}{(\|\Delta W\|_F^2 + \epsilon)(\tfrac1N \sum_n \|h_n\|^2 + \epsilon)}

    Args:
        W0: Pretrained matrix or batch, shape ``(..., out, in)``.
        W: Finetuned, same matrix shape; leading dimensions broadcast.
        H: Inputs of this layer in the pretrained model, one token a row, shape ``(N, in)``, ``N >= 1``; see
            :func:`~orthokit.diagnostics.collect_activations` with ``what="input"``.
        eps: Guard of the denominators, ``>= 0``; default 1e-12, as published.

    Returns:
        :class:`CapabilityDrift` of tensors of shape ``(...)``, ``>= 0``. A large relative drift alone does not mean
        forgetting: rotations have one and forget little.

    Raises:
        ShapeError: Matrices of different shape, inputs of another width, or no inputs.
        DtypeError: A tensor that is not real floating.
        NonFiniteError: A NaN or an infinity.
        OptionError: ``eps`` below 0.

    Example:
        Stretching a layer by 30 % is felt as 0.09 of its energy, whatever the inputs:

        >>> g = torch.Generator().manual_seed(0)
        >>> W0, H = torch.randn(5, 4, generator=g), torch.randn(7, 4, generator=g)
        >>> abs(capability_drift(W0, 1.3 * W0, H).relative.item() - 0.09) < 1e-6
        True

    Numerics:
        ``4 N in out`` FLOP in blocks of 4096 tokens. The outputs are formed rather than the second moment of ``H``
        (``tr(Delta W C Delta W^T)`` would cost less for many tokens): where the change avoids the inputs, which is what
        this looks for, the trace is lost in cancellation. float16 and bfloat16 are computed in float32.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, capability-conditioned spectral drift.
    """
    for name, X in (("W0", W0), ("W", W), ("H", H)):
        check_matrix(X, name=name)
        if X.is_complex():
            raise DtypeError(f"{name} must be real; got {X.dtype}.")
        check_finite(X, name=name)
    if W0.shape[-2:] != W.shape[-2:]:
        raise ShapeError(f"W0 and W must hold matrices of one shape; got {tuple(W0.shape)} and {tuple(W.shape)}.")
    if H.ndim != 2 or H.shape[-1] != W.shape[-1] or len(H) == 0:
        raise ShapeError(
            f"H must have the shape (tokens, in={W.shape[-1]}) with at least one token; got {tuple(H.shape)}."
        )
    if not eps >= 0:
        raise OptionError(f"eps must be >= 0; got {eps}.")
    dtype = torch.promote_types(torch.promote_types(W0.dtype, W.dtype), H.dtype)
    work = working_dtype(torch.empty(0, dtype=dtype))
    W0, H = W0.to(work), H.to(work)
    delta = W.to(work) - W0
    absolute, output = _mean_square(delta, H), _mean_square(W0, H)
    size = torch.linalg.matrix_norm(delta).square() + eps
    inputs = H.square().sum(-1).mean() + eps
    relative, whole = output + eps, size * inputs
    return CapabilityDrift(absolute, _ratio(absolute, relative), _ratio(absolute, whole))


def _mean_square(W: Tensor, H: Tensor) -> Tensor:
    """Mean over the tokens of ``||W h||^2``."""
    return sum(((rows @ W.mT).square().sum((-2, -1)) for rows in H.split(_ROWS)), W.new_zeros(())) / len(H)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # Only with eps=0 can the denominator vanish, and then the numerator is 0 too or the ratio truly infinite.
    return torch.where(part == 0, torch.zeros_like(part), part / whole)
