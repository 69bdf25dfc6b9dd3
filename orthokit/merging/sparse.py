r"""Merging by sparse changes: the largest entries with one sign each (TIES), or a random share of them (DARE)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from orthokit.errors import DtypeError, OptionError, ShapeError, unknown_name
from orthokit.merging._common import (
    Gathered,
    check_finite,
    check_range,
    finished,
    gathered,
    task_vectors,
    weighted_sum,
)
from orthokit.merging._select import Cut, bits_of, kth_largest, largest_cut, pieces, shrink_, workspace

__all__ = ["ELECTIONS", "RESCALINGS", "dare", "kept_entries", "magnitude_threshold", "ties", "vote"]

ELECTIONS = ("sum", "count")
RESCALINGS = ("probability", "l1", "none")
SIGNS = ("linear", "ties")

# Weights come from generators with small seeds too, and one generator's normal and Bernoulli draws go together: the
# masks of seed 0 would drop the large entries of a tensor drawn with seed 0. (The CPU's takes 32 bits of a seed.)
_SEEDS = 0x5EED_DA2E


def ties(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    density: float | Sequence[float] = 0.2,
    election: str = "sum",
    normalize: bool = True,
    threshold: float | Sequence[float] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Only the largest changes of each expert, and of those only the ones that agree on a sign.

    .. math::
        s = \operatorname{sgn} \sum_i w_i \hat\tau_i, \qquad
        \theta = \theta_0 + \lambda\,
        \frac{\sum_i w_i \hat\tau_i\,[\operatorname{sgn}(w_i \hat\tau_i) = s]}
        {\sum_i w_i\,[\operatorname{sgn}(w_i \hat\tau_i) = s]}

    entry by entry, where :math:`\hat\tau_i` is :math:`\tau_i = \theta_i - \theta_0` with all but its largest entries
    set to zero; a zero has no sign and is not counted.

    Args:
        base: :math:`\theta_0`, any shape.
        experts: One tensor per expert, shape of ``base``.
        weights: ``w_i``, one per expert; default all 1.
        scale: :math:`\lambda`; default 1.
        density: Share of the entries of each change that is kept, in (0, 1], or one share per expert; default 0.2.
            Of ``n`` entries ``int(density n)`` are kept, at least one: exactly so many, the earlier in row-major
            order among equals.
        election: ``"sum"`` (default): the sign of the sum, so that size counts. ``"count"``: the sign that more
            experts have, whatever their weights. A tie is positive.
        normalize: Whether to divide by the weights that took part (the disjoint mean); default ``True``.
        threshold: Keep what is at least so large in size, in place of ``density``; one number or one per expert. With
            :func:`magnitude_threshold` a whole model is trimmed as one vector.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: ``density`` or ``threshold`` out of range, or a wrong number of them or of weights.
        UnknownNameError: Unknown election.
        ShapeError, DtypeError, NonFiniteError: An expert that does not fit; the message names it.

    Example:
        The second entry is disputed: the larger side wins, and the smaller is left out of the mean.

        >>> experts = [torch.tensor([2.0, 3.0, 0.1]), torch.tensor([4.0, -1.0, 0.1])]
        >>> ties(torch.zeros(3), experts, density=0.7).tolist()
        [3.0, 3.0, 0.0]

    Numerics:
        In float32, or float64 for float64. Per expert two differences, one selection of the threshold (expected
        linear time) and about ten operations in cache; two buffers of the size of the tensor. Equals the readable form
        to rounding, with the same entries kept.

    References:
        P. Yadav, D. Tam, L. Choshen, C. Raffel, M. Bansal (2023), TIES-Merging: resolving interference when merging
        models, arXiv 2306.01708. Differences: trims tensor by tensor unless a threshold is given, and takes weights;
        both as in the mergekit library, whose ``ties`` this equals but for the choice among equals.
    """
    inputs = gathered(base, experts, weights)
    check_range("scale", scale)
    _check_name("election", election, ELECTIONS)
    flat = inputs.base.reshape(-1)
    rows = [expert.reshape(-1) for expert in inputs.experts]
    cuts = _cuts(flat, rows, density, threshold)
    merged = torch.empty_like(flat)
    parts: list[Tensor] = []
    spare: list[Tensor] = []
    for start, stop in pieces(len(flat), flat.device):
        if not parts or len(parts[0]) != stop - start:
            parts = [flat.new_empty(stop - start) for _ in rows]
            spare = [flat.new_empty(stop - start) for _ in range(2)]
        for part, row, cut in zip(parts, rows, cuts, strict=True):
            torch.sub(row[start:stop], flat[start:stop], out=part)
            if cut is not None:
                shrink_(part, cut, start)
        _vote_(parts, inputs.weights.tolist(), spare, merged[start:stop], election, normalize)
    return finished(merged.reshape(inputs.base.shape), inputs, scale=scale, moved=True)


def dare(
    base: Float[Tensor, "*shape"],
    experts: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    p: float = 0.9,
    signs: str = "linear",
    rescale: str = "probability",
    election: str = "sum",
    normalize: bool = True,
    seed: int = 0,
    generator: torch.Generator | None = None,
    masks: Sequence[Bool[Tensor, "*shape"]] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""A random share of the changes of each expert, stretched so that their expectation is unchanged.

    .. math::
        \hat\tau_i = \frac{m_i \odot \tau_i}{1 - p}, \qquad m_i \sim \mathrm{Bernoulli}(1 - p), \qquad
        \theta = \theta_0 + \lambda\,\frac{\sum_i w_i \hat\tau_i}{\sum_i w_i}

    or, with ``signs="ties"``, the vote of :func:`ties` over the :math:`\hat\tau_i`.

    Args:
        base: :math:`\theta_0`, any shape.
        experts: One tensor per expert, shape of ``base``.
        weights: ``w_i``, one per expert; default all 1.
        scale: :math:`\lambda`; default 1.
        p: Probability that an entry is dropped, in [0, 1); default 0.9.
        signs: ``"linear"`` (default) or ``"ties"``.
        rescale: ``"probability"`` (default): by ``1 / (1 - p)``. ``"l1"``: each change to the sum of sizes it had, as
            the mergekit library does. ``"none"``.
        election: For ``signs="ties"``, as in :func:`ties`.
        normalize: Whether to divide by the weights (by those that took part with ``signs="ties"``); default ``True``.
        seed: Of the masks; default 0. Tensors of one shape get the same masks from the same seed, so merge the tensors
            of a model with a seed each, or with one generator.
        generator: Source of the masks in place of ``seed``; it advances. Masks are drawn expert by expert.
        masks: The masks themselves, one boolean tensor per expert, ``True`` where an entry stays; nothing is drawn.

    Returns:
        The merged tensor, shape, dtype and device of ``base``.

    Raises:
        OptionError: ``p`` out of range, weights summing to 0 where they are divided by, or wrong numbers of things.
        UnknownNameError: Unknown ``signs``, ``rescale`` or ``election``.
        ShapeError, DtypeError, NonFiniteError: An expert or mask that does not fit; the message names it.

    Example:
        >>> merged = dare(torch.zeros(10_000), [torch.ones(10_000)], p=0.75)
        >>> sorted(set(merged.tolist())), abs(merged.mean().item() - 1) < 0.1
        ([0.0, 4.0], True)

    Numerics:
        In float32, or float64 for float64. Masks are drawn on the generator's device (a CPU for ``seed``), so a seed
        means the same on every machine. One buffer per expert.

    References:
        L. Yu, B. Yu, H. Yu, F. Huang, Y. Li (2024), Language models are Super Mario: absorbing abilities from
        homologous models as a free lunch, arXiv 2311.03099. Difference: divided by the weights unless told otherwise.
    """
    inputs = gathered(base, experts, weights, mean=normalize and signs == "linear")
    check_range("scale", scale)
    check_range("p", p, least=0)
    if p >= 1:
        raise OptionError(f"p must be less than 1, or nothing is left of any expert; got {p!r}.")
    for kind, name, known in (
        ("signs", signs, SIGNS),
        ("rescale", rescale, RESCALINGS),
        ("election", election, ELECTIONS),
    ):
        _check_name(kind, name, known)
    drawn = _drawn(inputs, p, seed, generator) if masks is None else _given(inputs, masks)
    taus = task_vectors(inputs)
    for tau, mask in zip(taus, drawn, strict=True):
        before = tau.abs().sum() if rescale == "l1" else tau.new_ones(())
        tau *= mask
        if rescale == "probability":
            tau /= 1 - p
        elif rescale == "l1":
            after = tau.abs().sum()
            tau *= before / after if after > 0 else 1.0
    if signs == "ties":
        merged = vote(taus, weights=inputs.weights.tolist(), election=election, normalize=normalize)
    else:
        merged = weighted_sum(taus, inputs.weights)
        merged = merged / inputs.weights.sum() if normalize else merged
    return finished(merged, inputs, scale=scale, moved=True)


def vote(
    taus: Sequence[Float[Tensor, "*shape"]],
    *,
    weights: Sequence[float],
    election: str = "sum",
    normalize: bool = True,
) -> Float[Tensor, "*shape"]:
    """The second half of :func:`ties`: the mean, entry by entry, of the changes that have the elected sign.

    Args:
        taus: One change per expert, float32 or float64, trimmed already; not changed.
        weights: One per expert.
        election: As in :func:`ties`.
        normalize: As in :func:`ties`.

    Returns:
        The merged change, a new tensor.

    Raises:
        UnknownNameError: Unknown election.

    Example:
        >>> vote([torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])], weights=[1, 1]).tolist()
        [2.0, 2.0]
    """
    _check_name("election", election, ELECTIONS)
    rows = [tau.reshape(-1) for tau in taus]
    merged = torch.empty_like(rows[0])
    for start, stop in pieces(len(merged), merged.device):
        parts = [row[start:stop].clone() for row in rows]
        spare = [torch.empty_like(parts[0]) for _ in range(2)]
        _vote_(parts, list(weights), spare, merged[start:stop], election, normalize)
    return merged.reshape(taus[0].shape)


def magnitude_threshold(tensors: Iterable[Float[Tensor, ...]], *, density: float) -> float:
    r"""The size that a share of all entries of many tensors reaches: how to trim a whole model as one vector.

    .. math:: t = |x|_{(k)}, \qquad k = \max(1, \lfloor \text{density} \cdot n \rfloor)

    the ``k``-th largest size among all ``n`` entries, exactly.

    Args:
        tensors: The changes, of any shapes; gone through twice, so a list or an object with ``__iter__`` that reads
            them from files each time, but not a generator.
        density: Share to keep, in (0, 1].

    Returns:
        The threshold; keeping what is at least so large keeps ``k`` entries, and more only among equals.

    Raises:
        OptionError: ``density`` out of range, no entries, or something that can be gone through only once.
        DtypeError, NonFiniteError: A tensor that is not real floating, or a NaN or an infinity.

    Example:
        >>> changes = [torch.tensor([0.1, -5.0]), torch.tensor([[3.0], [-0.2]])]
        >>> magnitude_threshold(changes, density=0.5)
        3.0

    Numerics:
        A histogram over exponents and leading bits of the fraction, then a selection within one of its bins: one tensor
        and a few per cent of all entries in memory. In float32; in float64 where the first tensor is.
    """
    check_range("density", density, above=0, most=1)
    if iter(tensors) is tensors:
        raise OptionError("tensors are gone through twice; pass a list, not a generator.")
    dtype, counts = torch.float32, None
    for index, tensor in enumerate(tensors):
        if not tensor.is_floating_point():
            raise DtypeError(f"tensor {index} must be real floating; got {tensor.dtype}.")
        check_finite(f"tensor {index}", tensor)
        if counts is None:
            dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            counts = torch.zeros(1 << 15, dtype=torch.int64)
        counts += torch.bincount(_leading(tensor, dtype)[1], minlength=1 << 15).cpu()
    size = 0 if counts is None else int(counts.sum())
    if counts is None or size == 0:
        raise OptionError("tensors hold no entries, so no share of them has a size.")
    k = kept_entries(size, density)
    above = counts.flip(0).cumsum(0).flip(0)  # entries in this bin or a higher one
    place = int((above >= k).nonzero()[-1])
    inside = []
    for tensor in tensors:
        bits, leading = _leading(tensor, dtype)
        inside.append(bits[leading == place].cpu())
    pattern = kth_largest(torch.cat(inside), k - int(above[place]) + int(counts[place]))
    return float(torch.tensor(pattern, dtype=inside[0].dtype).view(dtype))


def _leading(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sizes as integers, and their upper 16 bits, of which the first, the sign, is 0."""
    bits = bits_of(tensor.detach().to(dtype).reshape(-1))
    return bits, bits >> (16 if dtype == torch.float32 else 48)


def _vote_(
    parts: list[Tensor], factors: list[float], spare: list[Tensor], out: Tensor, election: str, normalize: bool
) -> None:
    """The merged change into ``out``; ``parts`` and ``spare`` are overwritten.

    Only operations from float to float: those that make or read a mask take five to ten times as long.
    """
    sign, count = spare
    sign.zero_()
    for part, factor in zip(parts, factors, strict=True):
        if factor != 1:
            part *= factor
        sign += part if election == "sum" else part.sign()
    torch.copysign(sign.new_ones(()), sign, out=sign)  # 1 for a draw: what cancels is +0
    out.zero_()
    count.zero_()
    for part, factor in zip(parts, factors, strict=True):
        part.mul_(sign).clamp_(min=0)  # what has the other sign is zero now
        out += part
        if normalize:
            count.add_(part.sign_(), alpha=factor)
    out *= sign
    if normalize and min(factors) < 0:
        # Weights of both signs can cancel; what rounding leaves of them is no divisor.
        out /= count.masked_fill_(count.abs() <= 1e-6 * max(map(abs, factors)), 1)
    elif normalize:
        # Where nobody took part the change is zero, whatever it is divided by.
        out /= count.clamp_(min=0.5 * min((factor for factor in factors if factor > 0), default=1))


def _cuts(
    flat: Tensor,
    rows: list[Tensor],
    density: float | Sequence[float],
    threshold: float | Sequence[float] | None,
) -> list[Cut | None]:
    if threshold is not None:
        given = _each("threshold", threshold, len(rows), least=0)
        return [Cut(float(flat.new_tensor(value)), flat.numel()) for value in given]
    shares = _each("density", density, len(rows), above=0, most=1)
    size, cuts = len(flat), []
    bits = workspace(size, flat) if min(shares) < 1 else None
    for row, share in zip(rows, shares, strict=True):
        whole = share == 1 or size == 0
        change = _change(row, flat)
        cuts.append(None if whole else largest_cut(change, size, kept_entries(size, share), flat, bits=bits))
    return cuts


def _change(row: Tensor, flat: Tensor) -> Callable[[int, int], Tensor]:
    """The task vector piece by piece, each in the memory of the one before."""
    scratch = flat.new_empty(next((stop for _, stop in pieces(len(flat), flat.device)), 0))
    return lambda start, stop: torch.sub(row[start:stop], flat[start:stop], out=scratch[: stop - start])


def kept_entries(size: int, density: float) -> int:
    """How many of ``size`` entries a share of them is: rounded down, and at least one."""
    return max(1, int(density * size))


def _each(name: str, value: float | Sequence[float], count: int, **bounds: float) -> list[float]:
    values = [value] * count if isinstance(value, int | float) else list(value)
    if len(values) != count:
        raise OptionError(f"{name} must be one number or one per expert; got {len(values)} for {count} experts.")
    return [check_range(name, number, **bounds) for number in values]


def _drawn(inputs: Gathered, p: float, seed: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(_SEEDS + seed) if generator is None else generator
    for _ in inputs.experts:
        draw = torch.empty(inputs.base.shape, device=source.device)
        yield draw.bernoulli_(1 - p, generator=source).to(inputs.base)


def _given(inputs: Gathered, masks: Sequence[Tensor]) -> list[Tensor]:
    if len(masks) != len(inputs.experts):
        raise OptionError(f"masks must hold one per expert; got {len(masks)} for {len(inputs.experts)} experts.")
    for index, mask in enumerate(masks):
        if mask.dtype != torch.bool:
            raise DtypeError(f"masks[{index}] must be boolean, True where an entry stays; got {mask.dtype}.")
        if mask.shape != inputs.base.shape:
            raise ShapeError(
                f"masks[{index}] must have the shape of base, {tuple(inputs.base.shape)}; got {tuple(mask.shape)}."
            )
    return [mask.to(inputs.base.device) for mask in masks]


def _check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise unknown_name(kind, name, known)
