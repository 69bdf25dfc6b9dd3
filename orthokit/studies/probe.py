"""What a stream of gradients of one matrix tells about momentum as a filter, in one pass over the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.diagnostics.momentum import alignment, beta_for_window, momentum_buffers, noise_suppression, pipelines
from orthokit.diagnostics.subspace import subspace_error
from orthokit.errors import OptionError
from orthokit.linalg import singular_values

__all__ = ["Probe", "measure_probe"]


@dataclass(frozen=True)
class Probe:
    """The measurements of :func:`measure_probe`, ready for the figures.

    Args:
        betas: Momenta.
        windows: Windows ``T``.
        spectra: Singular values of the last gradient, of the buffer for each beta, and of the mean gradient.
        suppression: Noise-suppression ratio for each window.
        left: Error of the leading left subspace for each rank and window.
        right: The same on the right.
        full: Alignment with the mean gradient, by pipeline, for each beta.
        truncated: Alignment with the mean gradient cut to ``signal_rank``.
        signal_rank: Where the signal was cut.
    """

    betas: list[float]
    windows: list[float]
    spectra: dict[str, Tensor]
    suppression: Tensor
    left: dict[int, Tensor]
    right: dict[int, Tensor]
    full: dict[str, Tensor]
    truncated: dict[str, Tensor]
    signal_rank: int


def measure_probe(
    gradients: Float[Tensor, "count out in"],
    *,
    betas: Sequence[float],
    windows: Sequence[float],
    ranks: Sequence[int] = (1, 5, 10),
    signal_rank: int = 5,
    signal: Float[Tensor, "out in"] | None = None,
) -> Probe:
    r"""Spectra, noise suppression, subspace error and alignment of the buffers over a stream of gradients.

    Args:
        gradients: ``(K, out, in)``, oldest first, from a stationary or a trajectory probe.
        betas: Momenta in [0, 1).
        windows: Windows ``T >= 1``, well below ``K``.
        ranks: Sizes of the leading subspaces.
        signal_rank: The signal is also cut to this rank.
        signal: What counts as the truth; default the mean of ``gradients``.

    Returns:
        The measurements.

    Raises:
        OptionError: Fewer than two gradients, or a number out of range.

    Example:
        >>> G = 1.0 + torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(0))
        >>> probe = measure_probe(G, betas=[0.0, 0.9], windows=[1, 5], ranks=[1], signal_rank=1)
        >>> bool(probe.full["pre"][1] > probe.full["pre"][0])
        True

    Numerics:
        Subspaces are those of the buffers themselves: on an orthogonalised buffer all singular values are equal and
        its leading subspace means nothing.
    """
    if len(gradients) < 2:
        raise OptionError(f"a probe needs at least 2 gradients; got {len(gradients)}.")
    G = gradients.float()
    truth = G.mean(0) if signal is None else signal.float()
    U, S, Vh = torch.linalg.svd(truth, full_matrices=False)
    cut = (U[:, :signal_rank] * S[:signal_rank]) @ Vh[:signal_rank]
    directions = pipelines(G, list(betas))
    buffers = momentum_buffers(G, list(betas))
    by_window = momentum_buffers(G, beta_for_window(list(windows)))
    spectra = {"gradient": singular_values(G[-1])}
    spectra |= {f"beta {beta:g}": s for beta, s in zip(betas, singular_values(buffers), strict=True)}
    spectra["mean gradient"] = singular_values(truth)
    return Probe(
        betas=[float(b) for b in betas],
        windows=[float(t) for t in windows],
        spectra=spectra,
        suppression=noise_suppression(G, list(windows)),
        left={r: subspace_error(by_window, truth, rank=r, side="left") for r in ranks},
        right={r: subspace_error(by_window, truth, rank=r, side="right") for r in ranks},
        full={name: alignment(X, truth).expand(len(betas)) for name, X in directions.items()},
        truncated={name: alignment(X, cut).expand(len(betas)) for name, X in directions.items()},
        signal_rank=signal_rank,
    )
