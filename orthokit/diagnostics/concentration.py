r"""How concentrated a model's predictions are: probability of the likeliest tokens, and entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError

__all__ = ["Concentration", "concentration", "token_entropy", "top_k_mass"]


def top_k_mass(logits: Float[Tensor, "*tokens classes"], *, k: int = 1) -> Shaped[Tensor, "*tokens"]:
    r"""How much probability the ``k`` likeliest tokens hold.

    .. math:: \sum_{j \in \text{top-}k} p_j, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: Shape ``(..., classes)``; ``-inf`` is a class that cannot be.
        k: ``1 <= k <= classes``; default 1, the probability of the likeliest.

    Returns:
        Shape ``(...)``, in (0, 1]; float64 for float64 input, else float32.

    Raises:
        OptionError: ``k`` out of range.
        DtypeError: ``logits`` is not floating.
        NonFiniteError: A NaN, ``+inf``, or a token whose logits are all ``-inf``.

    Example:
        >>> top_k_mass(torch.zeros(4), k=2).item()
        0.5

    Numerics:
        Softmax in float32 or better; rounding may leave a full mass a few epsilon from 1, so it is clipped there.
    """
    z = _checked(logits)
    if not 1 <= k <= z.shape[-1]:
        raise OptionError(f"k must satisfy 1 <= k <= classes = {z.shape[-1]}; got {k}.")
    return z.softmax(-1).topk(k, dim=-1).values.sum(-1).clamp(max=1)


def token_entropy(logits: Float[Tensor, "*tokens classes"]) -> Shaped[Tensor, "*tokens"]:
    r"""Entropy of the predicted distribution of every token, in nats.

    .. math:: H = -\sum_j p_j \log p_j, \qquad p = \mathrm{softmax}(z)

    Args:
        logits: Shape ``(..., classes)``; ``-inf`` is a class that cannot be.

    Returns:
        Shape ``(...)``, between 0 and ``log(classes)``; float64 for float64 input, else float32.

    Raises:
        DtypeError: ``logits`` is not floating.
        NonFiniteError: A NaN, ``+inf``, or a token whose logits are all ``-inf``.

    Example:
        >>> round(token_entropy(torch.zeros(3, 8))[0].item() / torch.tensor(2.0).log().item(), 4)
        3.0

    Numerics:
        From log-probabilities, so that a class with probability 0 adds 0 and a sure prediction gives 0.
    """
    logp = _checked(logits).log_softmax(-1)
    return (logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1).clamp(max=0).abs()


def concentration(
    logits: Float[Tensor, "*tokens classes"], *, k: int = 10, keep: Bool[Tensor, "*tokens"] | None = None
) -> Concentration:
    """Top-k mass and entropy of every token, and their means.

    Args:
        logits: Shape ``(..., classes)``.
        k: See :func:`top_k_mass`; default 10.
        keep: Which tokens count, shape ``(...)``; default all. Padding must be left out.

    Returns:
        The :class:`Concentration`.

    Raises:
        OptionError: ``k`` out of range, or no token left.
        ShapeError: ``keep`` does not fit.

    Example:
        >>> found = concentration(torch.zeros(2, 5, 4), k=1)
        >>> found.tokens, found.mean_mass
        (10, 0.25)
    """
    if keep is None:
        keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if keep.shape != logits.shape[:-1]:
        raise ShapeError(f"keep must have shape {tuple(logits.shape[:-1])}; got {tuple(keep.shape)}.")
    chosen = logits[keep]
    if not len(chosen):
        raise OptionError("keep must leave at least one token; it leaves none.")
    return Concentration(k, top_k_mass(chosen, k=k), token_entropy(chosen))


@dataclass(frozen=True, eq=False)
class Concentration:
    """Concentration of predictions; made by :func:`concentration`.

    Args:
        k: How many of the likeliest tokens :attr:`mass` counts.
        mass: Their probability, one number a kept token.
        entropy: Entropy in nats, one number a kept token.
    """

    k: int
    mass: Float[Tensor, " kept"]
    entropy: Float[Tensor, " kept"]

    @property
    def tokens(self) -> int:
        """How many tokens were kept."""
        return len(self.mass)

    @property
    def mean_mass(self) -> float:
        """Mean top-k mass."""
        return float(self.mass.double().mean())

    @property
    def mean_entropy(self) -> float:
        """Mean entropy in nats."""
        return float(self.entropy.double().mean())


def _checked(logits: Tensor) -> Tensor:
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ShapeError(f"logits must have shape (..., classes) with classes >= 1; got {tuple(logits.shape)}.")
    if not logits.is_floating_point():
        raise DtypeError(f"logits must be floating; got {logits.dtype}.")
    bad = logits.isnan().any(-1) | (logits == torch.inf).any(-1) | (logits == -torch.inf).all(-1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"logits must not be NaN or +inf, nor -inf in all classes; {int(bad.sum())} of {bad.numel()} tokens are."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
