r"""Synthetic gradients with a known answer: a fixed low-rank signal plus mean-zero noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.device import generator
from orthokit.diagnostics._stream import Numbers
from orthokit.diagnostics.momentum import momentum_buffers, signal_persistence
from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.linalg import random_orthogonal

__all__ = ["SignalPlusPerturbation", "published_sigmas", "published_strengths"]

_PUBLISHED: dict[int, list[float]] = {
    1: [12.0],
    3: [12.0, 8.0, 5.0],
    5: [12.0, 10.0, 8.0, 6.0, 4.0],
    10: [12.0 - k for k in range(10)],
    15: [12.0 - 0.5 * k for k in range(15)],
}


def published_strengths(rank: int) -> list[float]:
    """The signal strengths of the published experiment.

    Args:
        rank: 1, 3, 5, 10 or 15.

    Returns:
        ``rank`` strengths, descending.

    Raises:
        OptionError: Another rank.

    Example:
        >>> published_strengths(3)
        [12.0, 8.0, 5.0]

    References:
        arXiv 2606.03899, project page, metadata of the synthetic experiment.
    """
    if rank not in _PUBLISHED:
        raise OptionError(f"published ranks are {sorted(_PUBLISHED)}; got {rank}. Give strengths yourself for others.")
    return list(_PUBLISHED[rank])


def published_sigmas() -> list[float]:
    """The noise grid of the published experiment: 21 values from 0.2 to 5, evenly spaced in the logarithm.

    Example:
        >>> len(published_sigmas()), published_sigmas()[10]
        (21, 1.0)
    """
    return [round(0.2 * 25 ** (k / 20), 12) for k in range(21)]


class SignalPlusPerturbation:
    r"""A stream of gradients ``G_t = S + sigma Xi_t`` whose signal ``S`` is known.

    .. math:: S = \sum_{k \le r} \lambda_k u_k v_k^\top, \qquad E\,\Xi_t = 0, \quad E (\Xi_t)_{ij}^2 = 1, \quad
        E \langle \Xi_s, \Xi_t \rangle = 0 \ (s \ne t)

    With ``noise="arch"`` the entries are a martingale difference whose variance remembers the last step:
    ``h_t = (1 - alpha) + alpha Xi_{t-1}^2``, ``Xi_t = sqrt(h_t) z_t``, from the stationary variance ``h_1 = 1``.
    Noise is exactly linear in ``sigma``: one unit stream serves a grid of noise levels (:meth:`final_buffers`).

    Args:
        shape: ``(m, n)``; default (100, 100).
        strengths: Singular values of the signal, positive; default (12, 8, 5).
        sigma: Standard deviation of each entry of the noise, ``>= 0``; default 1.
        noise: ``"iid"`` Gaussian (default) or ``"arch"``.
        arch_alpha: Memory of the variance, ``0 <= alpha < 1``; default 0.3. Ignored by ``"iid"``.
        signal_seed: Seed of the directions; default 123. Trials share it and differ in ``seed``.
        seed: Seed of the noise; default 0. Every stream starts from it anew.
        dtype: Default float32.
        device: Where results go; default the CPU. Noise is drawn on the CPU, so that every device sees the same.

    Raises:
        ShapeError: ``shape`` is not two positive sizes, or fewer than ``len(strengths)``.
        OptionError: A strength, ``sigma`` or ``arch_alpha`` out of range.
        UnknownNameError: Unknown noise.

    Example:
        >>> stream = SignalPlusPerturbation((20, 10), strengths=[3.0], sigma=0.1)
        >>> G = stream.gradients(4)
        >>> G.shape, bool((G.mean(0) - stream.signal).abs().max() < 0.3)
        (torch.Size([4, 20, 10]), True)

    Numerics:
        Directions are drawn in float64, noise in ``dtype``. ``stream(a)`` is a prefix of ``stream(b)`` for ``a < b``.

    References:
        Z. Li et al., arXiv 2606.03899, assumption A1 and the synthetic experiment (100 x 100, 1000 steps, alpha 0.3,
        signal seed 123). The page does not print its recursion; this one reproduces the published grid within 3 %.
    """

    def __init__(
        self,
        shape: tuple[int, int] = (100, 100),
        *,
        strengths: Sequence[float | int] = (12.0, 8.0, 5.0),
        sigma: float | int = 1.0,
        noise: Literal["iid", "arch"] = "iid",
        arch_alpha: float | int = 0.3,
        signal_seed: int = 123,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise ShapeError(f"shape must be (m, n) with sizes >= 1; got {tuple(shape)}.")
        if not 1 <= len(strengths) <= min(shape):
            raise ShapeError(f"a {shape[0]} x {shape[1]} signal has 1 to {min(shape)} strengths; got {len(strengths)}.")
        if not all(0 < x < math.inf for x in strengths):
            raise OptionError(f"strengths must be positive and finite; got {list(strengths)}.")
        if not 0 <= sigma < math.inf:
            raise OptionError(f"sigma must be finite and >= 0; got {sigma}.")
        if noise not in ("iid", "arch"):
            raise unknown_name("noise", noise, ("iid", "arch"))
        if not 0 <= arch_alpha < 1:
            raise OptionError(f"arch_alpha must satisfy 0 <= alpha < 1, or the variance grows; got {arch_alpha}.")
        self.shape = (int(shape[0]), int(shape[1]))
        self.strengths = tuple(float(x) for x in strengths)
        self.sigma, self.noise_law, self.arch_alpha = float(sigma), noise, float(arch_alpha)
        self.signal_seed, self.seed = signal_seed, seed
        self.dtype, self.device = dtype, torch.device(device)
        source = generator(signal_seed)
        r = len(self.strengths)
        #: Left directions, ``(m, r)``, orthonormal columns.
        self.U = random_orthogonal(shape[0], r, generator=source, dtype=torch.float64).to(self.device, dtype)
        #: Right directions, ``(n, r)``, orthonormal columns.
        self.V = random_orthogonal(shape[1], r, generator=source, dtype=torch.float64).to(self.device, dtype)
        #: The signal, ``(m, n)``.
        self.signal = (self.U * torch.tensor(self.strengths).to(self.U)) @ self.V.mT

    def __repr__(self) -> str:
        law = "iid" if self.noise_law == "iid" else f"arch(alpha={self.arch_alpha:g})"
        return f"SignalPlusPerturbation({self.shape}, strengths={self.strengths}, sigma={self.sigma:g}, noise={law})"

    def noise(self, steps: int) -> Iterator[Tensor]:
        """Unit noise ``Xi_1 .. Xi_steps``, each ``(m, n)`` with entries of variance 1.

        Args:
            steps: Number of gradients, ``>= 1``.

        Returns:
            An iterator; each call starts from ``seed`` anew.

        Raises:
            OptionError: ``steps`` below 1.
        """
        if steps < 1:
            raise OptionError(f"steps must be >= 1; got {steps}.")
        return self._draw(steps)

    def stream(self, steps: int) -> Iterator[Tensor]:
        """Gradients ``G_1 .. G_steps`` one by one, each ``(m, n)``.

        Args:
            steps: Number of gradients, ``>= 1``.

        Returns:
            An iterator; each call starts from ``seed`` anew.

        Raises:
            OptionError: ``steps`` below 1.
        """
        return (self.signal + self.sigma * xi for xi in self.noise(steps))

    def gradients(self, steps: int) -> Float[Tensor, "steps m n"]:
        """The stream as one tensor ``(steps, m, n)``; for sizes that fit in memory.

        Args:
            steps: Number of gradients, ``>= 1``.

        Returns:
            The gradients.

        Raises:
            OptionError: ``steps`` below 1.
        """
        return torch.stack(list(self.stream(steps)))

    def noise_buffers(self, betas: Numbers, *, steps: int) -> Float[Tensor, "*betas m n"]:
        """Momentum buffers of the unit noise alone: a buffer for any ``sigma`` is one addition away.

        Args:
            betas: Momentum in [0, 1), one or several.
            steps: Number of gradients, ``>= 1``.

        Returns:
            Shape ``(betas, m, n)``, or ``(m, n)`` for a single beta.

        Raises:
            OptionError: A beta or ``steps`` out of range.
        """
        return momentum_buffers(self.noise(steps), betas)

    def final_buffers(
        self, betas: Sequence[float | int] | Tensor, sigmas: Sequence[float | int] | Tensor, *, steps: int
    ) -> Float[Tensor, "betas sigmas m n"]:
        r"""Momentum buffers at the last step for every beta and noise level, from a single pass over the noise.

        ``M = (1 - beta^K) S + sigma N_beta`` with ``N_beta`` the buffer of the unit noise.

        Args:
            betas: Momenta in [0, 1).
            sigmas: Noise levels, ``>= 0``; they replace ``self.sigma``.
            steps: ``K >= 1``.

        Returns:
            Shape ``(betas, sigmas, m, n)``.

        Raises:
            OptionError: A beta, a sigma or ``steps`` out of range.

        Example:
            >>> stream = SignalPlusPerturbation((8, 8), strengths=[2.0], sigma=0.5)
            >>> M = stream.final_buffers([0.9], [0.5], steps=20)[0, 0]
            >>> torch.allclose(M, momentum_buffers(stream.stream(20), 0.9), atol=1e-6)
            True
        """
        levels = torch.as_tensor(sigmas, dtype=torch.float64).reshape(-1)
        if not bool(((levels >= 0) & levels.isfinite()).all()):
            raise OptionError(f"sigmas must be finite and >= 0; got {levels.tolist()}.")
        b = torch.as_tensor(betas, dtype=torch.float64).reshape(-1)
        N = self.noise_buffers(b, steps=steps)
        share = signal_persistence(b, steps=steps).to(N)
        return share[:, None, None, None] * self.signal + levels.to(N)[:, None, None] * N[:, None]

    def _draw(self, steps: int) -> Iterator[Tensor]:
        source = generator(self.seed)
        variance: Tensor | None = None
        for _ in range(steps):
            xi = torch.randn(self.shape, generator=source, dtype=self.dtype)
            if self.noise_law == "arch":
                xi = xi if variance is None else xi * variance.sqrt_()
                variance = self.arch_alpha * xi.square() + (1 - self.arch_alpha)
            yield xi.to(self.device)
