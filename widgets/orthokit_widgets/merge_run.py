"""One merge in a worker's thread: experts trained where they are missing, merged, and judged at a grid of scales."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

import orthokit
from orthokit.errors import OrthokitError
from orthokit.lab import FAMILIES, expert_scores, expert_statistics, family_base, family_retention, train_expert
from orthokit.lab.families import Expert
from orthokit.merging import MergeLine, merge, merge_line, methods
from orthokit.merging.recipe import plan
from orthokit_widgets.merge_data import BASE, RETAINED, SCALES, Asked, Store
from orthokit_widgets.worker import Job

__all__ = ["Exported", "MergeRun", "file_name"]

_LEVELS = (4, 2, 1)  # every fourth scale first, then those between
_SAMPLES, _FEW_SAMPLES = 128, 8  # examples for methods that look at data, as in the recorded study


class _Given(Exception):
    """Raised inside any operation of torch when nobody wants its result any more."""


class _Look(TorchDispatchMode):
    """Every operation that this thread asks of torch, backward passes included, first looks whether it is wanted."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Exported:
    """A merged model as a file that nobody has written yet.

    Args:
        name: Of the file.
        content: In the format of safetensors.
    """

    name: str
    content: bytes


class MergeRun:
    """One merge, carried out by :meth:`go` in a worker's thread.

    Args:
        asked: What is merged, and how.
        part: Which half of the held-out examples it is judged on.
        store: Where everything is kept.
        where: Tells the scale that is looked at: those near it are measured first.
    """

    def __init__(self, asked: Asked, part: str, *, store: Store, where: Callable[[], float]) -> None:
        self.asked, self.part, self._store, self._where = asked, part, store, where
        self.grid = store.grid(asked)
        #: ``"waiting"``, ``"preparing"``, ``"training"``, ``"reading"``, ``"merging"``, ``"measuring"``, then
        #: ``"finished"``, ``"stopped"`` or ``"failed"``.
        self.status = "waiting"
        self.error = ""
        #: The task that is trained, its steps so far and in all.
        self.task, self.step, self.steps = "", 0, 0
        self.stop_requested = self.ended = 0.0
        self._look: Callable[[], None] = lambda: None

    @property
    def stop_ms(self) -> float:
        """Milliseconds from the request to stop to the end; 0 before."""
        return 1e3 * (self.ended - self.stop_requested) if self.ended and self.stop_requested else 0.0

    def go(self, job: Job) -> bool:
        """Train, merge and measure, or end when told to; called in the worker's thread.

        Returns:
            ``True``: this run has ended.
        """
        status = "failed"
        try:
            with self._watched(job):
                self._everything()
            status = "finished"
        except _Given:
            status = "stopped"
        except Exception as error:
            # The thread has no caller: the page shows the error.
            self.error = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"
        self.ended = time.perf_counter()
        self.status = status
        return True

    def export(self, job: Job, scale: float) -> Exported | None:
        """The merged model as a file, merged anew if it is not kept any more; in a worker's thread.

        Args:
            job: Tells when to give up.
            scale: That of the model.

        Returns:
            The file, or ``None`` when given up.
        """
        from safetensors.torch import save

        asked = self.asked
        try:
            with self._watched(job):
                found = self._line(self._experts()).at(scale)
                # Tensors of their own: the format holds none that share memory.
                tensors = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
        except _Given:
            return None
        told = {"family": asked.family, "experts": asked.tasks, "seed": asked.seed, "method": asked.method}
        told |= {"options": dict(asked.options), "weights": asked.weights, "scale": scale}
        notes = {"format": "pt", "orthokit": orthokit.__version__, "merge": json.dumps(told)}
        return Exported(file_name(asked, scale), save(tensors, notes))

    # --- in the worker's thread

    def _everything(self) -> None:
        self._look()
        experts = self._experts()
        line = self._line(experts)
        self.grid.rows, self.grid.seconds = list(line.report.rows), line.report.seconds
        self.grid.size = sum(tensor.numel() for tensor in line.end.values())
        self.status = "measuring"
        # What answers the slider soonest, then what it is compared with, then the rest.
        for _ in range(2):
            self._measure_next(_LEVELS[0], line, experts)
        self._mark(experts)
        for level in _LEVELS[:2]:
            self._measure_level(level, line, experts)
        self._store.layers.made(self.asked.crew, lambda: self._diagnose(line, experts), look=self._look)
        self._measure_level(_LEVELS[2], line, experts)

    @contextmanager
    def _watched(self, job: Job) -> Iterator[None]:
        """Whatever this thread does inside ends when it is not wanted any more."""

        def look() -> None:
            if job.cancelled.is_set():
                raise _Given

        self._look = look
        with _Look(look):
            yield

    def _experts(self) -> dict[str, Expert]:
        return {task: self._expert(task) for task in self.asked.tasks}

    def _line(self, experts: Mapping[str, Expert]) -> MergeLine:
        return self._store.lines.made(self.asked, lambda: self._merge(experts), look=self._look)

    def _expert(self, task: str) -> Expert:
        asked = self.asked

        def train() -> Expert:
            self.task, self.step, self.steps = task, 0, asked.steps or FAMILIES[asked.family].tasks[task].steps
            self.status = "preparing"
            with _counted(self._stepped):
                return train_expert(asked.family, task, seed=asked.seed, steps=asked.steps, small=asked.small)

        return self._store.experts.made(asked.expert(task), train, look=self._look)

    def _stepped(self) -> None:
        self.status = "training"
        self.step += 1

    def _merge(self, experts: Mapping[str, Expert]) -> MergeLine:
        asked, spec = self.asked, methods()[self.asked.method]
        options: dict[str, Any] = dict(asked.options)
        if spec.statistics:
            options["statistics"] = [self._known(task, expert, spec.statistics) for task, expert in experts.items()]
        if asked.method == "metrics_weighted":
            options["losses"] = [expert.loss for expert in experts.values()]
        self.status = "merging"
        weights = None if asked.weights is None else list(asked.weights)
        trunks = [expert.trunk for expert in experts.values()]
        return merge_line(self._base(), trunks, method=asked.method, weights=weights, seed=asked.seed, **options)

    def _base(self) -> dict[str, Tensor]:
        return family_base(self.asked.family, small=self.asked.small)

    def _known(self, task: str, expert: Expert, statistics: str) -> Mapping[str, Tensor]:
        """What a method needs to know of one expert."""
        if statistics == "second_moments":
            return expert.second_moments
        asked = self.asked

        def read() -> Mapping[str, list[dict[str, Tensor]]]:
            self.status, self.task = "reading", task
            samples = _FEW_SAMPLES if asked.small else _SAMPLES
            return expert_statistics(asked.family, {task: expert}, samples=samples, small=asked.small)

        return self._store.statistics.made(asked.expert(task), read, look=self._look)[statistics][0]

    # --- judging

    def _measure_level(self, level: int, line: MergeLine, experts: Mapping[str, Expert]) -> None:
        while self._measure_next(level, line, experts):
            pass

    def _measure_next(self, level: int, line: MergeLine, experts: Mapping[str, Expert]) -> bool:
        """Measure the scale of a level that lies nearest to the one looked at; whether there was any left."""
        left = [index for index in range(0, len(SCALES), level) if self.grid.lacks(self.part, index)]
        if not left:
            return False
        at = self._where()
        index = min(left, key=lambda one: abs(SCALES[one] - at))
        trunk = line.at(SCALES[index])
        for kind in self.grid.lacks(self.part, index):
            self.grid.found[kind, index] = self._scores(trunk, experts, kind)
        return True

    def _scores(self, trunk: Mapping[str, Tensor], experts: Mapping[str, Expert], kind: str) -> dict[str, float]:
        asked = self.asked
        if kind == RETAINED:
            return {RETAINED: family_retention(asked.family, trunk, small=asked.small)}
        return expert_scores(asked.family, trunk, experts, part=kind, small=asked.small)

    def _mark(self, experts: Mapping[str, Expert]) -> None:
        """What the base and every expert do and retain, as far as that is not known."""
        marks = self._store.marks
        trunks = {BASE: self._base(), **{task: expert.trunk for task, expert in experts.items()}}
        for name, trunk in trunks.items():
            key = self.asked.expert(name)
            if marks.get((*key, RETAINED)) is None:
                marks.put((*key, RETAINED), self._scores(trunk, {}, RETAINED)[RETAINED])
            lacking = {task: one for task, one in experts.items() if marks.get((*key, task, self.part)) is None}
            if lacking:
                for task, score in self._scores(trunk, lacking, self.part).items():
                    marks.put((*key, task, self.part), score)

    def _diagnose(self, line: MergeLine, experts: Mapping[str, Expert]) -> list[dict[str, Any]]:
        """Of each matrix, how much of every expert's change is a rotation, and how its rows agree with the mean change.

        The rotations are those of OrthoMerge, whatever method merges.
        """
        asked, base = self.asked, self._base()
        trunks = [expert.trunk for expert in experts.values()]
        told = dict(asked.options)
        same = asked.method == "orthomerge" and told["target"] == "global"
        options = methods()["orthomerge"].options
        same = same and told["prior"] == options["prior"]
        rows = line.report.rows if same else merge(base, trunks, method="orthomerge").report.rows
        blocks, found = plan(base), []
        for row in rows:
            if "none" in row.get("route", ("none",)):
                continue
            W = blocks[row["name"]].read(base[row["name"]])
            changes = [blocks[row["name"]].read(trunk[row["name"]]) - W for trunk in trunks]
            mean = torch.stack(changes).mean(0)
            cosines = [torch.nn.functional.cosine_similarity(change, mean, dim=-1) for change in changes]
            lengths = [float(torch.linalg.vector_norm(change) / torch.linalg.vector_norm(W)) for change in changes]
            kept = {key: row[key] for key in ("name", "rotation_fraction", "generator_norm", "route")}
            sorted_cosines = [np.sort(one.flatten().numpy()) for one in cosines]
            found.append({**kept, "changes": lengths, "cosines": sorted_cosines})
        return found


@contextmanager
def _counted(stepped: Callable[[], None]) -> Iterator[None]:
    """Tell of every step that AdamW takes in this thread; heads are fitted by other optimizers before."""
    mine = threading.get_ident()

    def tell(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if threading.get_ident() == mine and isinstance(optimizer, torch.optim.AdamW):
            stepped()

    handle = register_optimizer_step_post_hook(tell)
    try:
        yield
    finally:
        handle.remove()


# --- the merged model as a file


def file_name(asked: Asked, scale: float) -> str:
    """What a merged model is called: family, method, experts and scale."""
    experts = "+".join(re.sub(r"[^a-z0-9]+", "-", task.lower()) for task in asked.tasks)
    return f"{asked.family}-{asked.method}-{experts}-scale-{scale:g}.safetensors"
