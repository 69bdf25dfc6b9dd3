"""The numbers behind the page "Momentum gap", arranged so that a moved slider costs milliseconds.

The buffer is linear in the gradients and the noise is linear in sigma: ``M = (1 - beta^K) S + sigma N_beta``. The unit
buffers ``N_beta`` are computed once per size, law and seed, for every position of the beta slider; all sigmas, ranks
and betas are then one addition and some small singular value decompositions away.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthokit.diagnostics.momentum import alignment, momentum_buffers, signal_persistence
from orthokit.diagnostics.synthetic import SignalPlusPerturbation, published_strengths
from orthokit.linalg import polar
from orthokit_widgets.worker import Job

__all__ = [
    "BETAS",
    "CURVE",
    "PUBLISHED_GAPS",
    "STEPS",
    "Cache",
    "Curves",
    "Stream",
    "draw",
    "factored_alignment",
    "filter_curves",
    "post_curve",
    "signal",
]

#: Gradients in a stream.
STEPS = 1000
#: Every position of the beta slider.
BETAS = np.round(np.arange(200) * 0.005, 3)
#: Positions in ``BETAS`` of the points of the curves, closer together where the effective sample count grows fast.
_SHOWN = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985]
CURVE = np.round(np.array([*_SHOWN, 0.99, 0.995]) / 0.005).astype(int)
#: Published betas and gaps sigma_3 - sigma_4 at r = 3, sigma = 1, 100 x 100 (arXiv 2606.03899, project page).
PUBLISHED_GAPS = ([0.0, 0.5, 0.9, 0.95, 0.99, 0.995], [0.53, 0.43, 1.58, 2.41, 3.73, 4.05])
_CHUNK = 50


@dataclass(frozen=True)
class Stream:
    """A signal and the buffers of the unit noise, for every beta of ``BETAS``."""

    source: SignalPlusPerturbation
    buffers: Tensor

    @property
    def noise(self) -> Tensor:
        """The unit noise of the last gradient: the buffer that forgets at once."""
        return self.buffers[0]

    @property
    def nbytes(self) -> int:
        """Memory of the buffers."""
        return self.buffers.numel() * self.buffers.element_size()

    def momentum(self, at: Any, signal: Tensor, sigma: float) -> Tensor:
        """The momentum buffers at positions ``at`` of ``BETAS``, shape ``(..., n, n)``."""
        share = signal_persistence(torch.as_tensor(BETAS[at]), steps=STEPS).to(self.buffers)[..., None, None]
        return share * signal + sigma * self.buffers[at]


@dataclass(frozen=True)
class Curves:
    """Gap and alignment at the betas of ``CURVE``; ``top`` is the largest singular value among them."""

    gap: np.ndarray
    pre: np.ndarray
    none: float
    top: float


class Cache:
    """A bounded store of results, shared between sessions: the least recently used goes first.

    Args:
        limit: Largest total of what ``size`` says.
        size: Size of one result.
    """

    def __init__(self, limit: float, size: Callable[[Any], float] = lambda result: 1.0) -> None:
        self._limit, self._size = limit, size
        self._lock = threading.Lock()
        self._items: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable) -> Any:
        """The result, or ``None``."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Hashable, result: Any) -> None:
        """Keep a result, dropping old ones; the newest always stays."""
        with self._lock:
            self._items[key] = result
            self._items.move_to_end(key)
            while len(self._items) > 1 and sum(map(self._size, self._items.values())) > self._limit:
                self._items.popitem(last=False)

    def __len__(self) -> int:
        return len(self._items)


def draw(size: int, noise: str, seed: int) -> Stream:
    """The unit noise of one size, law and seed, and its buffers (some tenths of a second)."""
    source = SignalPlusPerturbation((size, size), strengths=[1.0], sigma=1.0, noise=noise, seed=seed)  # type: ignore[arg-type]
    return Stream(source, source.noise_buffers(BETAS.tolist(), steps=STEPS))


def signal(size: int, rank: int) -> SignalPlusPerturbation:
    """The published signal of a rank at a size; its directions depend on nothing else."""
    return SignalPlusPerturbation((size, size), strengths=published_strengths(rank))


def factored_alignment(U: Tensor, V: Tensor, truth: SignalPlusPerturbation) -> Tensor:
    """Alignment of ``U V^T`` with the signal, from its singular vectors: ``sum lambda_k u_k' U V' v_k``."""
    strengths = torch.tensor(truth.strengths).to(U)
    cosines = torch.einsum("mk,...mj,...jn,nk->...k", truth.U, U, V, truth.V)
    return (cosines * strengths).sum(-1) / strengths.sum()


def filter_curves(stream: Stream, truth: SignalPlusPerturbation, sigma: float) -> Curves:
    """Gap and alignment against beta, from one batch of singular value decompositions.

    Args:
        stream: Unit buffers.
        truth: The signal.
        sigma: Noise of a gradient entry.

    Returns:
        The curves; ``pre`` is the alignment of ``polar(M)``, ``none`` that of ``polar(G_K)``.
    """
    rank = len(truth.strengths)
    U, s, V = torch.linalg.svd(stream.momentum(CURVE, truth.signal, sigma), full_matrices=False)
    aligned = factored_alignment(U, V, truth).double().numpy()
    gap = (s[:, rank - 1] - s[:, rank]).double().numpy()
    # At beta = 0 the buffer is the last gradient.
    return Curves(gap=gap, pre=aligned, none=float(aligned[0]), top=float(s.max()))


def post_curve(stream: Stream, truth: SignalPlusPerturbation, sigma: float, job: Job) -> np.ndarray | None:
    """Alignment of the average of orthogonalised gradients at every beta of ``BETAS``; seconds, for another thread.

    Alignment is linear, so the average of the alignments is the alignment of the average.

    Args:
        stream: Gives the law of the noise and its seed.
        truth: The signal.
        sigma: Noise of a gradient entry.
        job: Asked between chunks whether to give up.

    Returns:
        The curve, or ``None`` when the job was cancelled.
    """
    values: list[Tensor] = []
    chunk: list[Tensor] = []
    for step, xi in enumerate(stream.source.noise(STEPS), 1):
        chunk.append(xi)
        if len(chunk) == _CHUNK or step == STEPS:
            values.append(alignment(polar(truth.signal + sigma * torch.stack(chunk)), truth.signal).reshape(-1))
            chunk.clear()
            job.progress = step / STEPS
            if job.cancelled.is_set():
                return None
    return momentum_buffers(torch.cat(values).double(), BETAS.tolist()).numpy()
