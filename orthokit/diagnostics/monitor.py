"""Watching a training run: spectra, energy, momentum gap and alignment, within a share of the time it takes."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from orthokit.diagnostics._budget import Budget
from orthokit.diagnostics._live import DERIVED, as_array, of_spectrum
from orthokit.diagnostics.energy import expected_energy, hyperspherical_energy
from orthokit.diagnostics.momentum import alignment
from orthokit.errors import DtypeError, OptionError, OrthokitError, unknown_name
from orthokit.linalg import polar, singular_values
from orthokit.matrices import MatrixBlock, MatrixTable
from orthokit.matrices import matrices as find_matrices

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["QUANTITIES", "USUAL", "Monitor"]

#: What a monitor can measure, in the order of its records.
QUANTITIES = ("spectrum", "stable_rank", "energy", "gap", "alignment", *DERIVED)
#: What it measures unless it is told.
USUAL = QUANTITIES[:5]

# Fewer gradients than this and the slow signal is the momentum itself: alignment would be 1 by construction.
_FEWEST_GRADIENTS = 10
# A change of the period below this share is not worth a sentence.
_NOTABLE = 0.25


class Monitor:
    r"""Records how the matrices of a model change while it trains, and never takes more than its share of the time.

    Call :meth:`observe` once a step, after ``optimizer.step()`` and before ``zero_grad()``. A look measures per matrix:

    - ``spectrum``: all singular values of the weight, largest first (float32 array);
    - ``stable_rank``: :math:`\|W\|_F^2 / \|W\|_2^2`;
    - ``energy``: hyperspherical energy minus its mean over random directions, so 0 is isotropic;
    - ``gap``: of the momentum buffer :math:`M`, ``momentum_spectrum``, ``gap`` :math:`= \sigma_r - \sigma_{r+1}` and
      ``gap_ratio`` :math:`= \sigma_r / \sigma_{r+1}` at ``rank``;
    - ``alignment``: :math:`\langle \mathrm{polar}(M), S\rangle / \|S\|_*` with a slow signal :math:`S`, the running
      mean of the gradients with weight ``signal_beta``. 1 means that the update follows the signal in every direction.

    and, if they are asked for, what follows from the spectrum of the weight, as in
    :func:`~orthokit.diagnostics.inspect`:

    - ``effective_rank``: exponential of the entropy of the singular values;
    - ``condition``: largest over smallest singular value;
    - ``orthogonality_error``: relative distance to the nearest scaled (semi-)orthogonal matrix, in [0, 1);
    - ``edge``: ``mp_edge``, where the Marchenko-Pastur bulk ends, and ``above_edge``, how many values stand above it;
    - ``alpha``: exponent of the power-law tail; left out, with one note, where :func:`~orthokit.diagnostics.tail_fit`
      refuses it.

    The budget: a look happens at the first step, then every ``every`` steps as long as the time spent here and the
    predicted cost of the look fit into ``budget`` times the time since the first step; otherwise at the first step
    where they do, so the period stretches by itself and :attr:`notes` says so. The slow signal is fed by every step
    whose upkeep fits into half of the budget, and at every look; :attr:`signal_steps` records which steps fed it.
    ``S`` is a mean over those steps only.

    Args:
        model: The model that trains; read, never changed.
        optimizer: Its optimizer, for momentum buffers (``"momentum_buffer"``, or ``"exp_avg"`` of the Adam family).
            Default ``None``: no gap, no alignment.
        every: Fewest steps between two looks, ``>= 1``; default 10.
        budget: Largest share of the elapsed time, in (0, 1]; default 0.05.
        matrices: Parameter name pattern(s), or a :class:`MatrixTable` (for splits). Default: all matrices.
        rank: ``r`` of the gap, ``>= 1``; default 5.
        quantities: Some of the ten above, :data:`QUANTITIES`; default the first five.
        max_matrices: At most this many, evenly spread through the model, when ``matrices`` is not given; default 16.
        signal_beta: Weight of the past in the slow signal, in [0, 1); default 0.99, about 100 gradients.
        clock: Seconds; default ``time.perf_counter``.

    Raises:
        DtypeError: ``model`` is no module.
        OptionError: An option is out of range, or a quantity is unknown.

    Warns:
        NothingMatchedWarning: A pattern matches no parameter, or there is no matrix to watch.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> monitor = Monitor(model, optimizer, every=1, budget=1.0, rank=2)
        >>> for step in range(3):
        ...     model(torch.ones(5, 8)).square().mean().backward()
        ...     optimizer.step()
        ...     rows = monitor.observe(step)
        ...     optimizer.zero_grad()
        >>> [row["matrix"] for row in monitor.records if row["step"] == 0]
        ['0.weight', '2.weight']
        >>> monitor.records[0]["spectrum"].shape
        (8,)

    Numerics:
        Weight spectra come from the eigenvalues of the smaller Gram matrix: a third of the time of an SVD, and values
        below 3e-4 of the largest are lost in float32. With one of the last five quantities that matrix is in float64,
        half of the time of an SVD, and conditions up to 1e6 are right to 0.1 %; larger ones are left out. There is one
        decomposition in either case, and 3 ms for all five at 384 x 384. The momentum is decomposed exactly. On a GPU
        the device is waited for at looks only; between them the upkeep is booked at the cost measured at the last look.
        Alignment is left out until ten gradients have fed the signal; early values are high, because signal and
        momentum then share most of their gradients.

    References:
        Li, Zhang, Liu, Bao, Denoise First, Orthogonalize Later, arXiv 2606.03899: gap and alignment. There the signal
        is known or a full-batch gradient; a running mean of minibatch gradients is ours, and it is a proxy.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 10,
        budget: float | int = 0.05,
        matrices: str | Callable[[str], bool] | Sequence[str | Callable[[str], bool]] | MatrixTable | None = None,
        rank: int = 5,
        quantities: Sequence[str] = USUAL,
        max_matrices: int = 16,
        signal_beta: float | int = 0.99,
        clock: Callable[[], float | int] = time.perf_counter,
    ) -> None:
        _check(model, every=every, rank=rank, max_matrices=max_matrices, budget=budget, signal_beta=signal_beta)
        for name in quantities:
            if name not in QUANTITIES:
                raise unknown_name("quantity", name, QUANTITIES)
        self.model, self.optimizer, self.rank = model, optimizer, rank
        self.quantities = tuple(name for name in QUANTITIES if name in quantities)
        #: One dict per matrix and look: ``step``, ``matrix``, and quantity -> float or float32 array.
        self.records: list[dict[str, Any]] = []
        #: What the reader of the records should know, one sentence each.
        self.notes: list[str] = []
        self._said: set[tuple[str, str]] = set()
        self._clock = clock
        self._budget = Budget(share=budget, every=every)
        self._noted_period = every
        self._beta = signal_beta
        self._signals: dict[str, Tensor] = {}
        self._fed: dict[str, int] = {}
        self._signal_steps = array("q")
        self._watched = self._choose(matrices, max_matrices)
        self._parameters = self._resolve()
        if optimizer is None and {"gap", "alignment"} & set(self.quantities):
            self.notes.append("gap and alignment are not measured: they need the optimizer")
            self.quantities = tuple(name for name in self.quantities if name not in ("gap", "alignment"))

    def observe(self, step: int) -> list[dict[str, Any]] | None:
        """Look if it is time to and the budget allows it; otherwise feed the slow signal if that fits.

        Args:
            step: Number of the step that has just been made. Looks are ``every`` step numbers apart or more.

        Returns:
            The new records, one per matrix, or ``None`` when this step is not looked at.

        A quantity that cannot be measured (no momentum yet, a NaN in the weight) is left out, and a note says why:
        watching never ends a run.
        """
        budget, entered = self._budget, self._clock()
        budget.arrive(entered)
        if not self._watched:
            return None
        if budget.due(step):
            if budget.affords_look():
                return self._look(step, entered)
            self._tell_period()
        if "alignment" in self.quantities and budget.affords_upkeep():
            expected = budget.upkeep_cost if self._on_gpu() else 0.0
            self._feed(step)
            left = self._clock()
            # Launching on a GPU returns at once; the synchronised cost of the last look is the honest one.
            budget.pay_upkeep(max(left - entered, expected), now=left)
            return None
        left = self._clock()
        budget.pay_skip(left - entered, now=left)
        return None

    @property
    def share(self) -> float | int:
        """Time spent here over time elapsed, from the first :meth:`observe` to the end of the last; 0 before."""
        return self._budget.spent / self._budget.elapsed if self._budget.elapsed > 0 else 0.0

    @property
    def period(self) -> int:
        """Steps between looks: ``every``, or what the budget can bear in the long run."""
        return self._budget.period

    @property
    def matrices(self) -> list[str]:
        """Names of the watched matrices."""
        return [name for name, _, _ in self._watched]

    @property
    def signal_steps(self) -> np.ndarray:
        """Numbers of the steps whose gradients fed the slow signal."""
        return np.array(self._signal_steps, dtype=np.int64)

    def frame(self, *, spectra: bool = False) -> pd.DataFrame:
        """The records in long form.

        Args:
            spectra: Also one row per singular value; default False.

        Returns:
            Frame with the columns ``step``, ``matrix``, ``quantity``, ``k`` (0 for a scalar, else the index of the
            singular value from 1) and ``value``.
        """
        import pandas as pd

        rows = []
        for record in self.records:
            for quantity, value in record.items():
                if quantity in ("step", "matrix") or (isinstance(value, np.ndarray) and not spectra):
                    continue
                values = enumerate(value, 1) if isinstance(value, np.ndarray) else [(0, value)]
                rows += [(record["step"], record["matrix"], quantity, k, float(v)) for k, v in values]
        return pd.DataFrame.from_records(rows, columns=["step", "matrix", "quantity", "k", "value"])

    def _choose(self, chosen: Any, most: int) -> list[tuple[str, MatrixBlock, tuple[int, ...]]]:
        """The matrices to watch: name, block, and index into the batch of the block."""
        table = chosen if isinstance(chosen, MatrixTable) else find_matrices(self.model, include=chosen)
        watched = []
        for block in table:
            for index in product(*map(range, block.shape[:-2])):
                suffix = f"[{','.join(map(str, index))}]" if index else ""
                watched.append((block.name + suffix, block, index))
        if chosen is not None or len(watched) <= most:
            return watched
        self.notes.append(f"watching {most} of {len(watched)} matrices, evenly spread; choose others with matrices=")
        places = np.linspace(0, len(watched) - 1, most).round().astype(int)
        return [watched[place] for place in dict.fromkeys(places.tolist())]

    def _resolve(self) -> dict[str, nn.Parameter]:
        """The watched parameters as they are now: moving a model may replace them."""
        found = dict(self.model.named_parameters(remove_duplicate=False))
        for name in {block.parameter for _, block, _ in self._watched}:
            if name not in found:
                raise unknown_name("parameter", name, found)
        return found

    def _on_gpu(self) -> bool:
        return any(self._parameters[block.parameter].is_cuda for _, block, _ in self._watched)

    def _synchronise(self) -> None:
        if self._on_gpu():
            torch.cuda.synchronize()

    def _look(self, step: int, entered: float) -> list[dict[str, Any]]:
        self._parameters = self._resolve()
        started = entered
        if self._on_gpu():
            self._synchronise()
            started = self._clock()  # what the queue still held was training
        if "alignment" in self.quantities:
            self._feed(step)
            self._synchronise()
        fed = self._clock()
        rows = self._measure(step)
        self._synchronise()
        left = self._clock()
        self._budget.pay_look(step, left - started, upkeep=fed - started, now=left)
        self.records += rows
        self._tell_period()
        return rows

    def _tell_period(self) -> None:
        every, period = self._budget.every, self._budget.plan()
        moved = abs(period - self._noted_period) > _NOTABLE * self._noted_period
        if not moved and not (period == every != self._noted_period):
            return
        share = f"{100 * self._budget.share:g} % of the step time"
        self._noted_period = period
        self.notes.append(
            f"looking every {every} steps again"
            if period == every
            else f"looking every {period} steps instead of {every} to stay within {share}"
        )

    @torch.no_grad()
    def _feed(self, step: int) -> None:
        """Move the slow signal towards the gradients of this step."""
        fed = False
        for name, block, index in self._watched:
            grad = self._parameters[block.parameter].grad
            if grad is None or grad.is_sparse:
                continue
            G = block.read(grad)[index]
            dtype = torch.promote_types(G.dtype, torch.float32)
            signal = self._signals.get(name)
            if signal is None or signal.device != G.device or signal.shape != G.shape:
                signal = self._signals[name] = torch.zeros(G.shape, dtype=dtype, device=G.device)
                self._fed[name] = 0
            signal.lerp_(G.to(dtype), 1 - self._beta)
            self._fed[name] += 1
            fed = True
        if fed:
            self._signal_steps.append(step)

    @torch.no_grad()
    def _measure(self, step: int) -> list[dict[str, Any]]:
        rows = []
        device = self._parameters[self._watched[0][1].parameter].device.type
        # Inside somebody's autocast the products below would run in half precision.
        with torch.autocast(device, enabled=False):
            for name, block, index in self._watched:
                row: dict[str, Any] = {"step": step, "matrix": name}
                self._of_weight(row, name, block.read(self._parameters[block.parameter])[index])
                M = self._momentum(block)
                if M is not None:
                    self._of_momentum(row, name, M[index])
                rows.append(row)
        return rows

    def _momentum(self, block: MatrixBlock) -> Tensor | None:
        if self.optimizer is None or not {"gap", "alignment"} & set(self.quantities):
            return None
        # .get: the state is a defaultdict, and asking it for a missing key would make one.
        state = self.optimizer.state.get(self._parameters[block.parameter], {})
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), Tensor) and tuple(state[key].shape) == block.parameter_shape:
                return block.read(state[key])
        self._skip("gap and alignment", block.name, "the optimizer keeps no momentum for it")
        return None

    def _of_weight(self, row: dict[str, Any], name: str, W: Tensor) -> None:
        if {"spectrum", "stable_rank", *DERIVED} & set(self.quantities):
            try:
                found, left_out = of_spectrum(W, self.quantities)
            except OrthokitError as error:
                self._skip("spectrum", name, str(error))
            else:
                row |= found
                for quantity, reason in left_out.items():
                    # Reasons hold numbers that differ from look to look.
                    self._skip(quantity, name, reason, kind="left out")
        if "energy" in self.quantities:
            try:
                if W.is_complex():
                    raise DtypeError("it is defined for real weights")
                row["energy"] = float(hyperspherical_energy(W)) - expected_energy(W.shape[-1])
            except OrthokitError as error:
                self._skip("energy", name, str(error))

    def _of_momentum(self, row: dict[str, Any], name: str, M: Tensor) -> None:
        if "gap" in self.quantities:
            try:
                values = singular_values(M)
                row["momentum_spectrum"] = as_array(values)
                if self.rank > len(values):
                    raise OptionError(f"rank {self.rank} is more than the {len(values)} singular values it has")
                upper, lower = [*values[self.rank - 1 : self.rank + 1].tolist(), 0.0][:2]
                row["gap"] = upper - lower
                if lower > 0:
                    row["gap_ratio"] = upper / lower
            except OrthokitError as error:
                self._skip("gap", name, str(error))
        if "alignment" in self.quantities:
            signal = self._signals.get(name)
            if signal is None:
                self._skip("alignment", name, "it has had no gradient")
            elif signal.is_complex():
                self._skip("alignment", name, "it is defined for real weights")
            elif self._fed[name] >= _FEWEST_GRADIENTS:
                try:
                    row["alignment"] = float(alignment(polar(M.to(signal.dtype)), signal))
                except OrthokitError as error:
                    if not bool(torch.isfinite(signal).all()):
                        del self._signals[name]  # one bad gradient would poison the mean for good
                    self._skip("alignment", name, str(error))

    def _skip(self, quantity: str, name: str, reason: str, *, kind: str | None = None) -> None:
        """Say once per quantity and kind of reason what is not measured, with the first matrix concerned."""
        if (quantity, kind or reason) not in self._said:
            self._said.add((quantity, kind or reason))
            self.notes.append(f"{quantity} of {name!r} (and of others alike) is not measured: {reason.rstrip('.')}")


def _check(model: object, **options: float | int) -> None:
    if not isinstance(model, nn.Module):
        raise DtypeError(f"Monitor watches a torch.nn.Module; found {type(model).__name__}.")
    for name in ("every", "rank", "max_matrices"):
        if options[name] < 1:
            raise OptionError(f"{name} must be at least 1; found {options[name]}.")
    if not 0 < options["budget"] <= 1:
        raise OptionError(f"budget is a share of the time in (0, 1]; found {options['budget']}.")
    if not 0 <= options["signal_beta"] < 1:
        raise OptionError(f"signal_beta must be in [0, 1); found {options['signal_beta']}.")
