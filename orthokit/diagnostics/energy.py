r"""Hyperspherical energy: how evenly the neurons (rows) of a weight matrix are spread over directions.

The energy sees directions only, ``x_i = w_i / ||w_i||``, and is small when they repel each other far apart. It is kept
exactly by ``W Q`` with orthogonal ``Q`` and by rescaling neurons; additive updates change it. In ``d`` dimensions a
Gaussian matrix already sits within about ``1/d`` of the orthonormal value, so compare with :func:`expected_energy`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.device import generator as seeded_generator
from orthokit.diagnostics._tiles import PairEnergy
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, unknown_name

__all__ = ["expected_energy", "hyperspherical_energy", "projected_energy", "simplex_energy"]

_REDUCTIONS = ("mean", "sum", "none")


def hyperspherical_energy(
    W: Float[Tensor, "*batch out in"],
    *,
    s: float | int = 1.0,
    half_space: bool = False,
    angular: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*result"]:
    r"""How crowded the directions of the rows of ``W`` are; lower is more evenly spread.

    .. math:: E_s = \frac{2}{N(N-1)} \sum_{i<j} f_s(z_{ij}), \qquad f_s(z) = z^{-s} \ (s>0), \quad f_0(z) = \log(1/z),

    with ``z_ij = ||x_i - x_j||`` for unit rows ``x_i``, or the angle ``arccos(x_i . x_j)`` with ``angular``.

    Args:
        W: Matrix or batch of matrices, shape ``(..., out, in)``, ``out >= 2``; one neuron per row. Flatten convolution
            kernels to ``(out, in * height * width)`` first.
        s: Exponent, finite, ``>= 0``; default 1. 0 is the logarithmic energy.
        half_space: Measure the ``2 out`` points ``{x_i, -x_i}``, so that a neuron and its negative count as one
            direction. Each antipodal pair adds the constant ``f_s`` of its distance (2, or pi with ``angular``).
        angular: Use angles in radians in place of chord lengths.
        reduction: ``"mean"`` over pairs (default); ``"sum"`` over ordered pairs ``i != j``, the form used by Orthogonal
            Finetuning; ``"none"``: one value a neuron, its mean over all other points (their mean is ``"mean"``).
        chunk: Rows of a tile of the pair loop; default 256 on the CPU, 2048 elsewhere. A tile is ``chunk`` by
            ``8 chunk``; smaller needs less memory.

    Returns:
        Shape ``(...)``, or ``(..., out)`` with ``reduction="none"``; float64 for float64 input, else float32.

    Raises:
        ShapeError: Fewer than two dimensions, fewer than two rows, or rows of length zero.
        DtypeError: ``W`` is not real floating.
        NonFiniteError: A row of ``W`` holds a NaN or an infinity.
        OptionError: ``s`` or ``chunk`` out of range, or an unknown reduction.

    Example:
        Rotating the inputs keeps the energy, whatever the scale of each neuron:

        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> W = torch.randn(32, 16, generator=g, dtype=torch.float64)
        >>> Q = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
        >>> scale = torch.rand(32, 1, generator=g, dtype=torch.float64) + 0.1
        >>> bool((hyperspherical_energy(scale * W @ Q) - hyperspherical_energy(W)).abs() < 1e-12)
        True

    Numerics:
        ``out^2 in`` FLOP (three times that with the gradient) and the memory of one tile, forward and backward: no
        pairwise matrix is ever built. float16 and bfloat16 are computed in float32, and sums are kept in float64.
        Tiles holding a pair closer than 0.125 (or, where it matters, that close to antipodal) are redone in float64
        from the original rows, because ``2 - 2 x_i . x_j`` cancels. Distances are floored at 1e-6, so duplicates give a
        finite energy; a pair at the floor has no gradient. In float64 a distance ``z`` has relative error about
        ``1e-16 / z^2``. A row with norm below 1e-12 has no direction: it counts as (nearly) orthogonal to every other
        row and gets gradient 0. Differentiable once; the gradient of each row is tangent to the sphere. On devices
        without float64 everything is computed in float32.

    References:
        W. Liu et al., Learning towards Minimum Hyperspherical Energy, arXiv 1805.09298, section 3. Differences: the
        authors' code uses ``-log(z^2)`` for ``s = 0`` (twice ours), angles divided by pi, and a norm guard of 1e-4.
    """
    _check_options(s, reduction, chunk)
    rows, norms, grouped = _rows(W)
    n, batch = W.shape[-2], W.shape[:-2]
    energy = PairEnergy.apply(grouped, norms, float(s), half_space, angular, rows if chunk is None else chunk)
    if half_space:
        energy = energy + _pair_value(math.pi if angular else 2.0, s)
    others = 2 * n - 1 if half_space else n - 1
    dtype = torch.promote_types(W.dtype, torch.float32)
    if reduction == "none":
        return (energy / others).reshape(*batch, n).to(dtype)
    total = energy.sum(-1) / (n * others) if reduction == "mean" else energy.sum(-1) * (2 if half_space else 1)
    return total.reshape(batch).to(dtype)


def projected_energy(
    W: Float[Tensor, "*batch out in"],
    *,
    dims: int = 40,
    projections: int = 20,
    generator: torch.Generator | None = None,
    s: float | int = 1.0,
    half_space: bool = False,
    angular: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, "*result"]:
    r"""Hyperspherical energy seen through random projections to a few dimensions, where it is more sensitive.

    .. math:: \frac{1}{K} \sum_{k=1}^{K} E_s(W P_k^\top), \qquad P_k \in \mathbb{R}^{p \times in} \text{ Gaussian}

    Args:
        W: Matrix or batch, shape ``(..., out, in)``, ``out >= 2``.
        dims: ``p``, dimensions after projection, ``>= 1``; default 40, as in the authors' code.
        projections: ``K``, number of projections averaged, ``>= 1``; default 20, as in the authors' code.
        generator: Source of the projections; default a fresh one with seed 0, so that equal calls agree.
        s: Exponent as in :func:`hyperspherical_energy`.
        half_space: As in :func:`hyperspherical_energy`.
        angular: As in :func:`hyperspherical_energy`.
        reduction: As in :func:`hyperspherical_energy`.

    Returns:
        Shape ``(...)``, or ``(..., out)`` with ``reduction="none"``.

    Raises:
        OptionError: ``dims`` or ``projections`` below 1, or as :func:`hyperspherical_energy`.

    Example:
        >>> import torch
        >>> W = torch.eye(64)
        >>> bool(projected_energy(W, dims=8) > hyperspherical_energy(W))  # 64 directions are crowded in 8 dimensions
        True

    Numerics:
        Unbiased over projections; the variance falls as ``1 / projections``. Cost ``projections`` energies in ``dims``
        dimensions. Differentiable once.

    References:
        R. Lin et al., Regularizing Neural Networks via Minimizing Hyperspherical Energy, arXiv 1906.04892, section 4
        (random projections; the learnt variants are not offered). Projected neurons are normalised anew, as there.
    """
    for name, value in (("dims", dims), ("projections", projections)):
        if value < 1:
            raise OptionError(f"{name} must be an integer >= 1; got {value}.")
    source = seeded_generator(0) if generator is None else generator
    work = torch.promote_types(W.dtype, torch.float32)
    energies = []
    for _ in range(projections):
        P = torch.randn(W.shape[-1], dims, generator=source, device=source.device, dtype=torch.float32)
        projected = W.to(work) @ P.to(W.device, work)
        energies.append(
            hyperspherical_energy(projected, s=s, half_space=half_space, angular=angular, reduction=reduction)
        )
    return torch.stack(energies).mean(0)


def expected_energy(d: int, *, s: float | int = 1.0, half_space: bool = False, neurons: int | None = None) -> float:
    r"""The mean energy of independent, uniformly distributed directions in ``d`` dimensions.

    .. math::
        \mathbb{E}\,\|u-v\|^{-s} = \frac{\Gamma(d/2)\,\Gamma(d-1-s)}{\Gamma((d-s)/2)\,\Gamma(d-1-s/2)}, \qquad
        \mathbb{E}\log\frac{1}{\|u-v\|} = -\log 2 - \tfrac12\psi\big(\tfrac{d-1}{2}\big) + \tfrac12\psi(d-1)

    With ``half_space`` and ``N`` neurons it is ``(2 (N-1) E + f_s(2)) / (2N - 1)``: a mirrored uniform direction is
    uniform, and ``N`` of the ``N (2N-1)`` pairs are antipodal.

    Args:
        d: Dimension, ``>= 2``.
        s: Exponent, ``0 <= s < d - 1``; the expectation is infinite beyond.
        half_space: Expectation of the half-space energy; needs ``neurons``.
        neurons: Number of neurons, ``>= 2``; only used with ``half_space``.

    Returns:
        The expectation of ``reduction="mean"``; for ``d`` to infinity it tends to the orthonormal value ``2^{-s/2}``.

    Raises:
        OptionError: ``d`` or ``s`` out of range, or ``neurons`` missing.

    Example:
        >>> expected_energy(3, s=1)
        1.0
        >>> abs(expected_energy(100, s=2) - 98 / (2 * 97)) < 1e-12
        True

    Numerics:
        Log-gamma in float64: relative error below 1e-12 for ``d`` up to a million (``s = 0``: absolute).

    References:
        Classical integral over the sphere; the half-space form is ours.
    """
    if d < 2:
        raise OptionError(f"d must be an integer >= 2; got {d}.")
    if not 0 <= s < d - 1:
        raise OptionError(f"the expectation is finite for 0 <= s < d - 1 = {d - 1} only; got s={s}.")
    if s == 0:
        psi = torch.special.digamma(torch.tensor([(d - 1) / 2, d - 1], dtype=torch.float64))
        value = -math.log(2) + float(psi[1] - psi[0]) / 2
    else:
        log = math.lgamma(d / 2) - math.lgamma((d - s) / 2) + math.lgamma(d - 1 - s) - math.lgamma(d - 1 - s / 2)
        value = math.exp(log)
    if not half_space:
        return value
    if neurons is None or neurons < 2:
        raise OptionError(f"half_space needs neurons >= 2, for the share of antipodal pairs; got neurons={neurons}.")
    return (2 * (neurons - 1) * value + _pair_value(2.0, s)) / (2 * neurons - 1)


def simplex_energy(n: int, *, s: float | int = 1.0) -> float:
    r"""The least energy ``n`` directions can have: that of a regular simplex, reached in ``n - 1`` dimensions or more.

    .. math:: E_s = \left(\frac{2n}{n-1}\right)^{-s/2}, \qquad E_0 = -\tfrac12 \log\frac{2n}{n-1}

    Args:
        n: Number of neurons, ``>= 2``; a minimum only where ``n <= d + 1``.
        s: Exponent, finite, ``>= 0``.

    Returns:
        The energy with ``reduction="mean"``.

    Raises:
        OptionError: ``n`` or ``s`` out of range.

    Example:
        >>> simplex_energy(2, s=1)  # two antipodal points
        0.5
    """
    if n < 2:
        raise OptionError(f"n must be an integer >= 2; got {n}.")
    _check_options(s, "mean", None)
    return _pair_value(math.sqrt(2 * n / (n - 1)), s)


def _pair_value(z: float, s: float | int) -> float:
    return -math.log(z) if s == 0 else z**-s


def _check_options(s: float | int, reduction: str, chunk: int | None) -> None:
    if not (math.isfinite(s) and s >= 0):
        raise OptionError(f"s must be finite and >= 0 (0 is the logarithmic energy); got {s}.")
    if reduction not in _REDUCTIONS:
        raise unknown_name("reduction", reduction, _REDUCTIONS)
    if chunk is not None and chunk < 1:
        raise OptionError(f"chunk must be an integer >= 1; got {chunk}. Pass chunk=None for the default.")


def _rows(W: Tensor) -> tuple[int, Tensor, Tensor]:
    """Default tile height, row norms ``(B, N, 1)`` and ``W`` as ``(B, N, d)``, checked."""
    if W.ndim < 2:
        raise ShapeError(f"W must have at least 2 dimensions (..., out, in); got shape {tuple(W.shape)}.")
    if not W.is_floating_point():
        raise DtypeError(f"W must be real floating; got {W.dtype}. Convert it with .float() first.")
    n, d = W.shape[-2:]
    if n < 2 or d < 1:
        raise ShapeError(f"the energy needs at least 2 neurons (rows) of length >= 1; got shape {tuple(W.shape)}.")
    grouped = W.reshape(-1, n, d)
    with torch.no_grad():
        norms = torch.linalg.vector_norm(
            grouped, dim=-1, keepdim=True, dtype=torch.promote_types(W.dtype, torch.float32)
        )
        # Squares of tiny or huge entries leave float32's range; only then is the slower float64 norm worth its time.
        if W.device.type != "mps" and not bool(((norms > 1e-15) & (norms < 1e18)).all()):
            norms = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True, dtype=torch.float64)
        if not bool(torch.isfinite(norms).all()):
            bad = int((~torch.isfinite(norms)).sum())
            raise NonFiniteError(f"W must be finite; {bad} of its {norms.numel()} rows hold a NaN or an infinity.")
    return (256 if W.device.type == "cpu" else 2048), norms, grouped
