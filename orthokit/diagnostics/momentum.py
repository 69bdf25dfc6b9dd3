r"""Momentum as a spectral filter: buffers, the three orders of momentum and polar factor, and what each recovers.

Conventions: gradients ``G_1 .. G_K``; the buffer is the moving average ``M_t = beta M_{t-1} + (1-beta) G_t`` from
``M_0 = 0``, without bias correction and without Nesterov. Its window is ``T = 1/(1-beta)``; for white noise it
averages ``2T - 1`` samples. After ``t`` steps a constant signal has reached the share ``1 - beta^t``: use ``K`` well
above ``T``, or correct by :func:`signal_persistence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics._stream import Numbers, as_betas, blocks, empty_buffers, fold
from orthokit.diagnostics.spectrum import check_rank
from orthokit.errors import OptionError, ShapeError
from orthokit.linalg import polar as exact_polar
from orthokit.linalg import singular_values

__all__ = [
    "alignment",
    "beta_for_window",
    "effective_samples",
    "momentum_buffers",
    "noise_suppression",
    "pipelines",
    "signal_persistence",
    "spectral_gap",
    "white_noise_suppression",
]


def effective_samples(beta: Numbers) -> Float[Tensor, "*betas"]:
    r"""How many independent samples a buffer averages: ``2T - 1 = (1+beta)/(1-beta)``.

    Args:
        beta: Momentum in [0, 1), one or several.

    Returns:
        float64, one value a beta (no dimension for a single one).

    Raises:
        OptionError: A beta outside [0, 1).

    Example:
        >>> round(effective_samples(0.9).item(), 9)
        19.0
    """
    b = as_betas(beta)
    return (1 + b) / (1 - b)


def beta_for_window(window: Numbers) -> Float[Tensor, "*windows"]:
    r"""The momentum with window ``T``: ``beta = 1 - 1/T``.

    Args:
        window: ``T >= 1`` in steps, one or several.

    Returns:
        float64, one value a window.

    Raises:
        OptionError: A window below 1.

    Example:
        >>> beta_for_window([1, 10]).tolist()
        [0.0, 0.9]
    """
    T = torch.as_tensor(window, dtype=torch.float64)
    if not bool((T >= 1).all()):
        raise OptionError(f"windows must be >= 1 step; got {T.tolist()}.")
    return 1 - 1 / T


def signal_persistence(beta: Numbers, *, steps: int) -> Float[Tensor, "*betas"]:
    r"""The share of a constant signal that has reached the buffer: ``c_sig = 1 - beta^t``.

    Args:
        beta: Momentum in [0, 1), one or several.
        steps: ``t >= 1``.

    Returns:
        float64, one value a beta.

    Raises:
        OptionError: A beta outside [0, 1) or ``steps`` below 1.

    Example:
        >>> signal_persistence(0.5, steps=2).item()
        0.75
    """
    if steps < 1:
        raise OptionError(f"steps must be >= 1; got {steps}.")
    return 1 - as_betas(beta) ** steps


def momentum_buffers(
    gradients: Float[Tensor, "steps ..."] | Iterable[Tensor], beta: Numbers, *, return_all: bool = False
) -> Float[Tensor, "*result"]:
    r"""The momentum buffer after a stream of gradients, for one or many betas in a single pass.

    .. math:: M_t = \beta M_{t-1} + (1-\beta) G_t, \qquad M_0 = 0

    Args:
        gradients: Tensor ``(K, m, n)`` (any trailing shape), or an iterable of tensors of one shape, read once.
        beta: Momentum in [0, 1), or a one-dimensional sequence of them.
        return_all: Also keep every step (memory ``K`` times larger); default False: the last one.

    Returns:
        ``(m, n)`` for a number, ``(betas, m, n)`` for a sequence; with ``return_all`` a step dimension ``K`` comes
        before ``m``. float64 for float64 gradients, else float32.

    Raises:
        OptionError: A beta outside [0, 1), or no gradient.
        ShapeError: Gradients of different shapes.
        DtypeError: Integer gradients.

    Example:
        >>> import torch
        >>> G = torch.ones(10, 2, 2)
        >>> momentum_buffers(G, [0.0, 0.5])[:, 0, 0].tolist()  # 1 - beta^10
        [1.0, 0.9990234375]

    Numerics:
        Exact recurrence up to rounding; weights in float64. Memory: the buffers and one block of about 2 million
        elements (at least one gradient), whatever ``K``. Cost ``2 betas K m n`` FLOP as matrix products.

    References:
        Z. Li et al., Denoise First, Orthogonalize Later, arXiv 2606.03899, section 2.
    """
    b = as_betas(beta)
    flat = b.reshape(-1)
    if b.ndim > 1:
        raise OptionError(f"beta must be a number or a one-dimensional sequence; got shape {tuple(b.shape)}.")
    M: Tensor | None = None
    history: list[Tensor] = []
    for block in blocks(gradients):
        if M is None:
            M = empty_buffers(flat, block)
        if return_all:
            weight = (1 - flat).to(M).reshape(-1, *[1] * (M.ndim - 1))
            for G in block:
                M = torch.lerp(M, G.expand_as(M), weight)
                history.append(M)
        else:
            M = fold(M, block, flat)
    if M is None:
        raise OptionError("gradients must hold at least one gradient; the stream was empty.")
    out = torch.stack(history, dim=1) if return_all else M
    return out.reshape(*b.shape, *out.shape[1:])


def pipelines(
    gradients: Float[Tensor, "steps *batch m n"] | Iterable[Tensor],
    beta: Numbers,
    *,
    polar: Callable[[Tensor], Tensor] = exact_polar,
) -> dict[str, Tensor]:
    r"""The directions at the last step of the three orders of momentum and orthogonalisation, from one stream.

    ``pre`` (Muon) is ``polar(M_K)``; ``post`` (Orthogonal-SGDM) is the moving average of ``polar(G_t)``, used as it is;
    ``none`` is ``polar(G_K)``. The average being linear, ``post`` recovers on average exactly ``1 - beta^K`` times what
    ``none`` does: orthogonalising first leaves nothing for the average to gain.

    Args:
        gradients: Tensor ``(K, ..., m, n)`` or iterable of ``(..., m, n)``, read once.
        beta: Momentum in [0, 1), or a sequence.
        polar: Orthogonalisation; default the exact :func:`orthokit.linalg.polar`. Pass
            ``orthokit.linalg.orthogonalize`` to see an iterative one, whose singular values are only near 1.

    Returns:
        ``{"pre": ..., "post": ..., "none": ...}``; a leading beta dimension on the first two if ``beta`` is a sequence.

    Raises:
        OptionError: A beta outside [0, 1), or no gradient.
        ShapeError: Gradients of different shapes, or with fewer than two dimensions.

    Example:
        >>> import torch
        >>> G = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
        >>> directions = pipelines(G, 0.0)
        >>> all(torch.allclose(directions["none"], D, atol=1e-6) for D in directions.values())
        True

    Numerics:
        One polar factor a gradient and one a beta; memory as :func:`momentum_buffers`.

    References:
        arXiv 2606.03899; M. Tuddenham et al., Orthogonalising gradients to speed up neural network optimisation,
        arXiv 2202.07052.
    """
    b = as_betas(beta)
    flat = b.reshape(-1)
    M = P = last = None
    for block in blocks(gradients):
        if block.ndim < 3:
            raise ShapeError(f"gradients must be matrices; got shape {tuple(block.shape[1:])}.")
        factors = polar(block)
        if M is None or P is None:
            M, P = empty_buffers(flat, block), empty_buffers(flat, block)
        M, P, last = fold(M, block, flat), fold(P, factors, flat), factors[-1]
    if M is None or P is None or last is None:
        raise OptionError("gradients must hold at least one gradient; the stream was empty.")
    shape = (*b.shape, *M.shape[1:])
    return {"pre": polar(M.reshape(shape)), "post": P.reshape(shape), "none": last.clone()}


def spectral_gap(M: Float[Tensor, "*batch m n"], *, rank: int) -> Float[Tensor, "*batch"]:
    r"""How far the ``rank`` leading singular values stand out: ``sigma_rank - sigma_{rank+1}``.

    Args:
        M: Gradient or buffer, or a batch, shape ``(..., m, n)``.
        rank: ``1 <= rank <= min(m, n)``; at the upper end ``sigma_{rank+1}`` is 0.

    Returns:
        Shape ``(...)``, ``>= 0``.

    Raises:
        OptionError: ``rank`` out of range.
        NonFiniteError: ``M`` holds a NaN or an infinity.

    Example:
        >>> import torch
        >>> spectral_gap(torch.diag(torch.tensor([5.0, 3.0, 1.0])), rank=2).item()
        2.0
    """
    s = singular_values(M)
    check_rank(rank, M)
    return s[..., rank - 1] - s[..., rank] if rank < s.shape[-1] else s[..., rank - 1]


def alignment(X: Float[Tensor, "*#batch m n"], signal: Float[Tensor, "*#batch m n"]) -> Float[Tensor, "*result"]:
    r"""How much of the best possible descent along the signal a direction achieves.

    .. math:: a(X) = \langle X, S \rangle / \|S\|_*, \qquad \|S\|_* = \textstyle\sum_k \sigma_k(S)

    Args:
        X: Direction or batch of directions, shape ``(..., m, n)``.
        signal: ``S``, the true gradient; leading dimensions broadcast.

    Returns:
        Shape ``(...)``; in [-1, 1] when ``||X||_2 <= 1``, and 1 exactly for directions that contain the polar factor
        of ``S``. It scales with ``X``.

    Raises:
        ShapeError: Matrices of different shape.
        OptionError: A zero signal.
        NonFiniteError: The signal holds a NaN or an infinity.

    Example:
        >>> import torch
        >>> S = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
        >>> alignment(torch.eye(3), S).item(), alignment(S, S).item()
        (1.0, 2.5)

    Numerics:
        The normaliser is the nuclear norm, which is safe for a signal of low rank, where a full polar factor would not
        be unique.

    References:
        arXiv 2606.03899, theorem 2.
    """
    if X.shape[-2:] != signal.shape[-2:]:
        raise ShapeError(f"X and signal must hold matrices of one shape; got {tuple(X.shape)}, {tuple(signal.shape)}.")
    work = torch.promote_types(torch.promote_types(X.dtype, signal.dtype), torch.float32)
    nuclear = singular_values(signal.to(work)).sum(-1)
    if not bool((nuclear > 0).all()):
        raise OptionError("alignment needs a signal other than zero; got one of norm 0.")
    return (X.to(work) * signal.to(work)).sum(dim=(-2, -1)) / nuclear


def noise_suppression(
    gradients: Float[Tensor, "steps ..."] | Iterable[Tensor], windows: Numbers
) -> Float[Tensor, "*windows"]:
    r"""How many times closer to the mean gradient the buffer is than a raw gradient, for each window ``T``.

    .. math::
        R(T) = \frac{\big(\tfrac1K \sum_t \|G_t - \bar G\|_F^2\big)^{1/2}}{\|M_K - (1-\beta^K)\,\bar G\|_F},
        \qquad \beta = 1 - 1/T, \quad \bar G = \tfrac1K \textstyle\sum_t G_t

    Args:
        gradients: Tensor ``(K, m, n)`` or iterable of ``(m, n)``, read once; a *stationary* probe: weights frozen,
            independent minibatches.
        windows: ``T >= 1`` in steps, one or several, well below ``K``.

    Returns:
        float64, one ratio a window; infinite for a stream without noise.

    Raises:
        OptionError: A window below 1, or fewer than two gradients.
        ShapeError: Gradients of different shapes.

    Example:
        >>> import torch
        >>> noise = torch.randn(400, 50, 50, generator=torch.Generator().manual_seed(0))
        >>> ratio = noise_suppression(1 + noise, [1, 20]) / white_noise_suppression([1, 20], steps=400)
        >>> bool((ratio - 1).abs().max() < 0.05)
        True

    Numerics:
        One pass, memory independent of ``K``; sums of squares in float64. White noise gives about ``sqrt(2T - 1)``, and
        a little more because the mean is taken from the same ``K`` gradients: :func:`white_noise_suppression` has the
        exact guide.

    References:
        Figure of arXiv 2606.03899. The paper's page does not define its ratio; this definition is ours and starts, as
        the plotted one does, near ``sqrt(2T - 1)`` at small ``T``.
    """
    beta = beta_for_window(windows)
    flat = beta.reshape(-1)
    M = total = pivot = None
    squares, count = torch.zeros((), dtype=torch.float64), 0
    for block in blocks(gradients):
        # Squares are summed about the first gradient: about zero, a mean much larger than the noise would cancel.
        pivot = block[0].clone() if pivot is None else pivot
        M = empty_buffers(flat, block) if M is None else M
        centred = block - pivot
        M = fold(M, centred, flat)
        part = centred.sum(0, dtype=torch.float64)
        total = part if total is None else total + part
        squares = squares + centred.double().square().sum().to(squares.device)
        count += len(block)
    if M is None or total is None or count < 2:
        raise OptionError(f"noise suppression needs at least 2 gradients; got {count}.")
    mean = total / count
    raw = (squares.to(mean.device) / count - mean.square().sum()).clamp(min=0).sqrt()
    share = signal_persistence(flat, steps=count).to(mean.device).reshape(-1, *[1] * mean.ndim)
    filtered = (M.double() - share * mean).flatten(1).norm(dim=1)
    return torch.where(filtered > 0, raw / filtered, torch.inf).reshape(beta.shape)


def white_noise_suppression(windows: Numbers, *, steps: int) -> Float[Tensor, "*windows"]:
    r"""The value of :func:`noise_suppression` for white noise, with the mean taken from the same ``K`` gradients.

    .. math:: R(T)^2 = \frac{1 - 1/K}{q - c^2/K}, \qquad q = (1-\beta)^2 \sum_{s<K} \beta^{2s}, \quad c = 1 - \beta^K

    Args:
        windows: ``T >= 1``, one or several.
        steps: ``K >= 2`` gradients.

    Returns:
        float64, one value a window; tends to ``sqrt(2T - 1)`` for ``K`` much larger than ``T``.

    Raises:
        OptionError: A window below 1 or ``steps`` below 2.

    Example:
        >>> bool((white_noise_suppression(10, steps=10**6) - 19**0.5).abs() < 1e-3)
        True
    """
    if steps < 2:
        raise OptionError(f"steps must be >= 2; got {steps}.")
    beta = beta_for_window(windows)
    q = (1 - beta) * (1 - beta ** (2 * steps)) / (1 + beta)
    return ((1 - 1 / steps) / (q - signal_persistence(beta, steps=steps) ** 2 / steps)).sqrt()
