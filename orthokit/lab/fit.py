"""The training loop: recorded, stoppable, and resumable bit for bit."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.device import fast_matmul_dtype
from orthokit.diagnostics.monitor import Monitor
from orthokit.diagnostics.safe_step import StepController
from orthokit.errors import NonFiniteError, OptionError, RunError, unknown_name
from orthokit.lab._snapshot import restore, snapshot
from orthokit.lab.progress import Progress
from orthokit.lab.projection import GradientProjection, constrained
from orthokit.lab.regularisers import Penalties, Penalty
from orthokit.lab.runs import Run
from orthokit.lab.schedules import lr_factor
from orthokit.lab.tasks import Task

__all__ = ["fit"]

# Casting costs more than it saves on narrow layers; measured on CPUs with bfloat16 units, the break-even is near here.
_WIDE = 384
_CHECKPOINT_SECONDS = 30.0


def fit(
    model: nn.Module,
    task: Task,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: str = "constant",
    warmup: int = 0,
    final: float = 0.0,
    clip: float | None = None,
    evaluate_every: int | None = None,
    log_every: int = 1,
    checkpoint_every: int | None = None,
    precision: str = "auto",
    penalty: Penalty | Penalties | None = None,
    project: GradientProjection | None = None,
    step_controller: StepController | None = None,
    monitor: Monitor | None = None,
    run: str | Run | None = None,
    root: str | Path | None = None,
    resume: bool | str = False,
    config: dict[str, Any] | None = None,
    progress: bool = True,
    stop: threading.Event | None = None,
    pause: threading.Event | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Run:
    r"""Train ``model`` on ``task`` and record everything in a :class:`Run`.

    Step ``t`` uses ``task.batch(t)`` and learning rates ``base * lr_factor(t)``. Scalars ``loss`` (nats), ``lr``,
    ``grad_norm`` and the task's evaluation are recorded, and what the monitor sees. A checkpoint holds all that the
    next step depends on, so a run that was interrupted or killed at any instant and resumed gives the same bits on the
    same machine and thread count.

    Args:
        model: Trained in place, on the device it is on.
        task: Data, loss and evaluation.
        optimizer: Over ``model``'s parameters; its learning rates at the call are the base rates.
        steps: Total number of steps, ``>= 1``; a resumed run goes up to this number.
        schedule: ``"constant"`` (default), ``"cosine"`` or ``"wsd"``; see :func:`lr_factor`.
        warmup: Steps of linear warm-up, ``>= 0``; default 0.
        final: Factor on the learning rate at the end, in [0, 1]; default 0.
        clip: Largest global gradient norm, ``> 0``; default no clipping.
        evaluate_every: Steps between evaluations, ``>= 1``; default a twentieth of the run. Also at the start and end.
        log_every: Steps between records of the training loss, ``>= 1``; default 1.
        checkpoint_every: Steps between checkpoints, ``>= 1``; default every 30 seconds. Also at the start and end.
        precision: ``"float32"``, ``"bfloat16"`` (autocast) or ``"auto"`` (default): autocast where it is fast.
        penalty: Added to the loss, such as :class:`EWC`; recorded as ``penalty``, not in ``loss``. Default none.
        project: Keeps gradients and steps out of a space; see :class:`GradientProjection`. Default none.
        step_controller: Shortens steps that are too long; recorded as ``step_ratio`` and ``step_scale``. Default none.
        monitor: Looks at the weights and momentum now and then; see :class:`orthokit.diagnostics.Monitor`.
        run: Name of the run or a :class:`Run` open for writing; default a name from the time.
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        resume: ``True``: go on with the run of that name; ``"auto"``: go on if it exists, else start.
        config: More to keep with the run, as JSON.
        progress: Show a progress line; default ``True``.
        stop: When set, the run ends after the current step, resumable.
        pause: While set, the run waits between steps.
        on_step: Called as ``on_step(step, loss)`` after each step.

    Returns:
        The run, closed for writing: ``status`` is ``"finished"``, or ``"interrupted"`` after ``stop``.

    Raises:
        OptionError: A number out of range, or ``resume`` without a name.
        RunError: The run exists already, cannot be written, or another process writes it.
        CheckpointError: The checkpoint is of another model.
        NonFiniteError: The loss or the gradient became NaN or infinite; the run is kept with status ``"failed"``.

    Example:
        >>> import tempfile
        >>> from orthokit.lab import SmallCNN, image_classification
        >>> from orthokit.optim import for_model
        >>> model = SmallCNN()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     task = image_classification("digits", batch=16)
        ...     run = fit(model, task, for_model(model, lr=1e-2), steps=3, root=folder, progress=False)
        ...     run.status, len(run.series("loss")[0])
        ('finished', 3)

    Numerics:
        ``"auto"`` takes bfloat16 autocast on CUDA, and on a CPU that multiplies it fast when some matrix is at least
        384 wide. Ctrl-C saves a checkpoint at the next step boundary and then raises ``KeyboardInterrupt``; a second
        one raises at once.
    """
    _check_counts(steps=steps, evaluate_every=evaluate_every, log_every=log_every, checkpoint_every=checkpoint_every)
    if clip is not None and not clip > 0:
        raise OptionError(f"clip must be greater than 0; got {clip}. Use None for no clipping.")
    shape = {"steps": steps, "schedule": schedule, "warmup": warmup, "final": final}
    lr_factor(0, **shape)
    dtype = _autocast_dtype(model, precision)
    settings = {
        **shape,
        "clip": clip,
        "precision": "float32" if dtype is None else str(dtype).removeprefix("torch."),
        "optimizer": type(optimizer).__name__,
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **task.describe(),
        **{
            k: v for part in (penalty, project, step_controller) if part is not None for k, v in part.describe().items()
        },
        **(config or {}),
    }
    record, first, base = _open(run, root, resume, settings, model, optimizer)
    loop = _Loop(
        model=model,
        task=task,
        optimizer=optimizer,
        record=record,
        shape=shape,
        base=base,
        clip=clip,
        dtype=dtype,
        evaluate_every=evaluate_every or max(1, steps // 20),
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        penalty=penalty,
        project=project,
        step_controller=step_controller,
        monitor=monitor,
        on_step=on_step,
    )
    try:
        with _interruptible(stop) as stopping, Progress(record.name, steps=steps, start=first, enabled=progress) as bar:
            done = loop.go(first, stopping, pause, bar)
        record.set_status("finished" if done >= steps else "interrupted")
    except KeyboardInterrupt:
        record.set_status("interrupted")
        raise
    except Exception as error:
        record.set_status("failed", error=str(error))
        raise
    finally:
        loop.set_lr(1.0)
        for note in monitor.notes if monitor is not None else ():
            record.note(note)
        record.close()
    return record


@dataclass
class _Loop:
    """The state of one call of :func:`fit`."""

    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    record: Run
    shape: dict[str, Any]
    base: list[float]
    clip: float | None
    dtype: torch.dtype | None
    evaluate_every: int
    log_every: int
    checkpoint_every: int | None
    penalty: Penalty | Penalties | None
    project: GradientProjection | None
    step_controller: StepController | None
    monitor: Monitor | None
    on_step: Callable[[int, float], None] | None
    saved_at: float = 0.0

    def go(self, first: int, stopping: threading.Event, pause: threading.Event | None, bar: Progress) -> int:
        """Train from step ``first``; the number of steps done when the loop ends or is stopped."""
        steps = self.shape["steps"]
        if first == 0:
            self.record.log(0, **self.evaluate())
            self.checkpoint(0)
        self.saved_at = time.perf_counter()
        self.model.zero_grad(set_to_none=True)  # what an earlier backward pass left would be added to the first step
        for step in range(first, steps):
            while pause is not None and pause.is_set() and not stopping.is_set():
                time.sleep(0.02)
            if stopping.is_set():
                self.checkpoint(step)
                return step
            loss = self.step(step)
            bar.update(step + 1, {"loss": loss})
            if self.on_step is not None:
                self.on_step(step + 1, loss)
        return max(first, steps)

    def step(self, step: int) -> float:
        """One update, its records and, when it is due, a checkpoint."""
        done, last = step + 1, step + 1 == self.shape["steps"]
        factor = lr_factor(step, **self.shape)
        self.set_lr(factor)
        self.model.train()
        batch = self.task.batch(step)
        with self.precision():
            loss = self.task.loss(self.model, batch)
        extra = None if self.penalty is None else self.penalty(self.model)
        (loss if extra is None else loss + extra).backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss must stay finite; it is {value} at step {done}. Lower the learning rate.")
        if self.project is not None:
            self.project.gradients(self.model)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip is not None else math.inf)
        if not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"gradients must stay finite; their norm is {float(norm)} at step {done}. Lower the learning rate."
            )
        controller = self.step_controller
        with constrained(self.model, batch[0], self.task, project=self.project, step_controller=controller):
            self.optimizer.step()
        scalars: dict[str, float] = {}
        if done % self.log_every == 0 or last:
            scalars |= {"loss": value, "lr": self.base[0] * factor, "grad_norm": float(norm)}
            scalars |= {} if extra is None else {"penalty": float(extra.detach())}
            scalars |= {} if controller is None else {"step_ratio": controller.ratio, "step_scale": controller.scale}
        if done % self.evaluate_every == 0 or last:
            scalars |= self.evaluate()
        if scalars:
            self.record.log(done, **scalars)
        if self.monitor is not None:
            self.look(done)
        # The model's, not the optimizer's: gradients of parameters nobody updates would pile up in the norm.
        self.model.zero_grad(set_to_none=True)
        if last or self.checkpoint_due(done):
            self.checkpoint(done)
        return value

    def look(self, done: int) -> None:
        """Record what the monitor sees, if it looks at this step."""
        for row in self.monitor.observe(done) or ():  # type: ignore[union-attr]
            matrix = row["matrix"]
            values = {k: v for k, v in row.items() if k not in ("step", "matrix")}
            scalars = {f"{matrix}/{k}": v for k, v in values.items() if isinstance(v, float)}
            self.record.log(done, **scalars)
            for name, spectrum in values.items():
                if not isinstance(spectrum, float):
                    self.record.log_spectrum(done, f"{matrix}/{name}", spectrum)

    def evaluate(self) -> dict[str, float]:
        """The task's held-out figures, in the precision of the run."""
        self.model.eval()
        with self.precision():
            return self.task.evaluate(self.model)

    def precision(self) -> Any:
        """The autocast context of the run."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, dtype=self.dtype)

    def checkpoint_due(self, done: int) -> bool:
        """Whether the state should be saved now: by steps if asked for, else by time."""
        if self.checkpoint_every is not None:
            return done % self.checkpoint_every == 0
        return time.perf_counter() - self.saved_at > _CHECKPOINT_SECONDS

    def checkpoint(self, done: int) -> None:
        """Save the state after ``done`` steps."""
        tensors, meta = snapshot(self.model, self.optimizer, step=done)
        # The groups hold the scheduled rates; a resumed run needs those it began with.
        self.record.save_checkpoint(done, tensors, {**meta, "base_lr": self.base})
        self.saved_at = time.perf_counter()

    def set_lr(self, factor: float) -> None:
        """Scale the base learning rates of all groups."""
        for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor


def _check_counts(*, steps: int, **periods: int | None) -> None:
    for name, value in {"steps": steps, **periods}.items():
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1; got {value}.")


def _described(*parts: Penalty | Penalties | GradientProjection | StepController | None) -> dict[str, Any]:
    return {key: value for part in parts if part is not None for key, value in part.describe().items()}


def _autocast_dtype(model: nn.Module, precision: str) -> torch.dtype | None:
    known = ("auto", "float32", "bfloat16")
    if precision not in known:
        raise unknown_name("precision", precision, known)
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else None
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.bfloat16
    wide = any(p.ndim >= 2 and min(p.shape[:2]) >= _WIDE for p in model.parameters())
    return torch.bfloat16 if wide and fast_matmul_dtype(device) == torch.bfloat16 else None


def _open(
    run: str | Run | None,
    root: str | Path | None,
    resume: bool | str,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[Run, int, list[float]]:
    """The run to write into, the step to go on from and the base learning rates."""
    if resume not in (False, True, "auto"):
        raise unknown_name("resume", resume, ("True", "False", "auto"))
    base = [float(group["lr"]) for group in optimizer.param_groups]
    if resume is True and run is None:
        raise OptionError("resume=True needs run=, the name of the run to go on with.")
    exists = isinstance(run, Run) or (run is not None and Run.exists(run, root=root))
    if resume is True and not exists:
        raise RunError(
            f"resume=True needs the name of a run that exists; {run!r} does not. Use resume='auto' to start."
        )
    if isinstance(run, Run):
        record = run
    elif resume and exists:
        record = Run.open(run, root=root, mode="w")  # type: ignore[arg-type]
    else:
        return Run.create(run, root=root, config=settings), 0, base
    if not resume or not record.checkpoints():
        record.set_status("running")
        return record, 0, base  # killed before its first checkpoint, a run starts again
    try:
        tensors, meta = record.load_checkpoint()
        first = restore(model, optimizer, tensors, meta)
    except BaseException:
        record.close()
        raise
    # What was recorded after the checkpoint is about to be computed again, to the same bits.
    record.truncate_after(first)
    record.set_status("running")
    return record, first, list(meta.get("base_lr", base))


@contextlib.contextmanager
def _interruptible(stop: threading.Event | None) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop at the next step boundary.

    An interrupt in the middle of an update would leave a half-updated model; the boundary is at most one step away.
    There the interrupt is raised after all: whoever called must not go on as if the run were complete.
    """
    stopping = stop if stop is not None else threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        stopping.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt("stopped at a step boundary; fit(..., resume=True) goes on from there")
