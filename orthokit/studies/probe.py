"""What a stream of gradients of one matrix tells about momentum as a filter, in one pass over the options."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.diagnostics.momentum import alignment, beta_for_window, momentum_buffers, noise_suppression, pipelines
from orthokit.diagnostics.subspace import subspace_error
from orthokit.diagnostics.synthetic import SignalPlusPerturbation
from orthokit.errors import OptionError
from orthokit.lab.fit import fit
from orthokit.lab.probes import stationary_gradients
from orthokit.lab.tasks import Task
from orthokit.linalg import polar, singular_values
from orthokit.optim.muon import ORDERS

__all__ = [
    "Probe",
    "alignments",
    "measure_probe",
    "pipeline_lead",
    "polar_alignment",
    "probe_along_training",
]


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
    betas: Sequence[float | int],
    windows: Sequence[float | int],
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


def alignments(
    directions: Sequence[Mapping[str, Tensor]], signal: Float[Tensor, "out in"], count: int
) -> dict[str, Float[Tensor, "trials betas"]]:
    """Alignment with a signal for each pipeline, trial and momentum.

    Args:
        directions: For each trial what ``diagnostics.pipelines`` gave.
        signal: What counts as the truth.
        count: Number of momenta; ``none``, which has a single value, is repeated.

    Returns:
        Pipeline to alignments, shape ``(trials, count)``.
    """
    trials = {order: [alignment(found[order], signal).expand(count) for found in directions] for order in ORDERS}
    return {order: torch.stack(rows) for order, rows in trials.items()}


def polar_alignment(stream: SignalPlusPerturbation, *, count: int) -> float:
    """The mean alignment of orthogonalised single gradients: what averaging after the polar factor converges to.

    Args:
        stream: A synthetic stream; take another seed than that of the averages it is compared with.
        count: Gradients, ``>= 1``.

    Returns:
        The mean over the gradients.

    Example:
        >>> 0 < polar_alignment(SignalPlusPerturbation((10, 10), strengths=[3.0]), count=5) < 1
        True
    """
    return float(alignment(polar(stream.gradients(count)), stream.signal).mean())


def pipeline_lead(gradients: Float[Tensor, "count out in"], *, beta: float, signal: Float[Tensor, "out in"]) -> float:
    """How much better ``pre`` aligns with a signal than the better of ``post`` and ``none``.

    Args:
        gradients: ``(K, out, in)``, ``K`` well above ``1 / (1 - beta)``.
        beta: Momentum in [0, 1).
        signal: What counts as the truth.

    Returns:
        The difference; positive when momentum is best placed before the polar factor.

    Example:
        >>> G = 1.0 + torch.randn(60, 6, 5, generator=torch.Generator().manual_seed(0))
        >>> pipeline_lead(G, beta=0.9, signal=torch.ones(6, 5)) > 0
        True
    """
    directions = pipelines(gradients.float(), beta)
    aligned = {order: float(alignment(X, signal.float())) for order, X in directions.items()}
    return aligned["pre"] - max(aligned["post"], aligned["none"])


def probe_along_training(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    name: str,
    *,
    checkpoints: Sequence[int],
    count: int,
    beta: float = 0.95,
    signal_rank: int = 5,
    root: str | Path | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Stationary alignment of the three pipelines at several moments of a training run.

    Args:
        model: Trained in place at a constant learning rate.
        task: Source of training and probing minibatches.
        optimizer: Its optimizer.
        name: The matrix to probe.
        checkpoints: Increasing step numbers, from 0.
        count: Minibatches of each probe, well above ``1 / (1 - beta)``.
        beta: Momentum of the probe; default 0.95.
        signal_rank: Where the signal is cut for the second result.
        root: Folder of runs; default a temporary one.

    Returns:
        Alignment by pipeline at each checkpoint, with the whole mean gradient and with its leading part.

    Raises:
        OptionError: ``checkpoints`` do not increase.
    """
    at = list(checkpoints)
    if at != sorted(set(at)) or not at or at[0] < 0:
        raise OptionError(f"checkpoints must increase from 0 or more; got {at}.")
    full: dict[str, list[float]] = {order: [] for order in ORDERS}
    truncated: dict[str, list[float]] = {order: [] for order in full}
    before = 0
    with tempfile.TemporaryDirectory() as scratch:
        for step in at:
            if step > before:
                run = f"along-{before}-{step}"
                fit(model, task, optimizer, steps=step - before, run=run, root=root or scratch, progress=False)
                before = step
            gradients = stationary_gradients(model, task, [name], count=count)[name]
            probe = measure_probe(gradients, betas=[beta], windows=[1], ranks=[1], signal_rank=signal_rank)
            for order in full:
                full[order].append(float(probe.full[order][0]))
                truncated[order].append(float(probe.truncated[order][0]))
    return full, truncated
