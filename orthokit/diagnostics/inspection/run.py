"""A look at a model, matrix by matrix: first what costs a few passes over it, then all singular values."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthokit._threads import clock, run_bounded
from orthokit.diagnostics.change import weight_change
from orthokit.diagnostics.inspection.cache import cache_key, recall, remember
from orthokit.diagnostics.inspection.columns import COLUMNS
from orthokit.diagnostics.inspection.measures import cleaned, exact_spectrum, first_look, full_look, relative_change
from orthokit.diagnostics.inspection.pairing import Pairing, paired
from orthokit.diagnostics.inspection.result import Inspection, InspectionProgress
from orthokit.diagnostics.inspection.sources import Model, Source, opened, place_in_model
from orthokit.errors import OptionError, OrthokitError, unknown_name
from orthokit.matrices import MatrixBlock

__all__ = ["inspect"]

_DETAILS = ("spectrum", "norms")
# Seconds between two times that what is measured is remembered.
_KEEP = 30.0
_ARRAYS = ("spectra", "base_spectra", "changes", "profiles")
Index = tuple[int, ...]


def inspect(
    model: Model,
    *,
    base: Model | None = None,
    detail: str = "spectrum",
    sample: int | None = None,
    include: Any = None,
    exclude: Any = None,
    split_heads: Any = None,
    split_fused: Any = None,
    rank: int = 8,
    threads: int | None = None,
    progress: Callable[[InspectionProgress], None] | None = None,
    stop: threading.Event | None = None,
    cache: bool = True,
) -> Inspection:
    r"""The geometry of every matrix of a model: its spectrum, its rows, how it is stored, and what a base became.

    Two looks: the first takes norms, rows and columns of every matrix in a few passes over it; the second all singular
    values, the laws fitted to them, the energy of the rows and, with a base, the change as rotation and stretch. A file
    is read parameter by parameter and never held as a whole.

    Args:
        model: A module, a mapping of names to tensors, or a path: safetensors, GGUF, ``torch.save`` (weights only), or
            a folder of one model, as :func:`orthokit.checkpoints.open_checkpoint` takes them.
        base: The model that it was trained from, in the same forms; matrices of equal name and shape are compared, and
            the others listed in ``unmatched``. Default: none.
        detail: ``"spectrum"`` (default): both looks; ``"norms"``: the first alone.
        sample: Measure at most so many matrices, evenly spread over the model, ``>= 1``. Default: all.
        include: Shell pattern(s) or function(s) of the name, as of :func:`orthokit.matrices.matrices`.
        exclude: The same; what matches is left out.
        split_heads: As of :func:`orthokit.matrices.matrices`.
        split_fused: As there.
        rank: Of the leading subspaces whose angles to those of the base are taken, ``>= 1``; default 8.
        threads: Matrices at a time, ``>= 1``; default as many as torch has threads, which they share.
        progress: Called in this thread after each parameter and look with an :class:`InspectionProgress`.
        stop: An event that ends the work early once it is set; what is done is kept. So is it after an interrupt from
            the keyboard.
        cache: For files: remember what was measured, under the names, sizes, times and headers of the files, and
            measure only what is not known yet. Default ``True``; modules and mappings are always measured.

    Returns:
        The :class:`Inspection`: ``rows`` with the :data:`COLUMNS`, ``spectra``, and for a base ``changes`` and
        ``profiles``. Entries that are not finite are counted, said and measured as 0.

    Raises:
        CheckpointError: A path holds no model that can be read.
        DtypeError: ``model`` or ``base`` is none of the three forms.
        OptionError: An option is out of range.

    Warns:
        NothingMatchedWarning: No parameter is a matrix.

    Example:
        >>> import torch
        >>> W = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        >>> Q = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1))).Q
        >>> found = inspect({"layers.0.up.weight": W @ Q}, base={"layers.0.up.weight": W})
        >>> row = found["layers.0.up.weight"]
        >>> row["layer"], row["role"], row["spectrum_change"] < 1e-5, row["rotation_fraction"] > 0.999
        (0, 'up', True, True)

    Numerics:
        Singular values of float32 and lower types by the float64 Gram matrix, at least as exact as a float32 SVD; by a
        float64 SVD above a condition of 1e5 and for float64 tensors. ``COLUMNS[name].exactness`` says it for each
        column. Memory: one parameter in its own type and in float32 per thread and its Gram matrix in float64; with a
        base some eight copies of a matrix in float64, of large ones one at a time. Cost: ``out in min(out, in)``
        products and an eigenvalue problem a matrix, some ten times that with a base.

    References:
        Stable rank: Rudelson, Vershynin, arXiv math/0503442. Power laws: Clauset et al., arXiv 0706.1062; Martin,
        Mahoney, arXiv 1810.01075. Noise: Gavish, Donoho, arXiv 1305.5870. Energy: Liu et al., arXiv 1805.09298.
        Retention and adaptation: Huang et al., arXiv 2605.28819. Rotation of the inputs: Yang et al., arXiv
        2602.05943. Differences stand with the functions that measure.
    """
    if detail not in _DETAILS:
        raise unknown_name("detail", detail, _DETAILS)
    for name, value in (("sample", sample), ("threads", threads)):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1; got {value}. Leave it out for the default.")
    if rank < 1:
        raise OptionError(f"rank must be at least 1; got {rank}.")
    chosen = {"include": include, "exclude": exclude, "split_heads": split_heads, "split_fused": split_fused}
    with ExitStack() as stack:
        here = stack.enter_context(opened(model, **chosen))
        there = None if base is None else stack.enter_context(opened(base))
        look = _Look(here, paired(here, there), rank, stop, progress, clock())
        look.plan(sample)
        digest = "" if there is None else there.digest or "none"
        splits = {"rank": rank, "split_heads": split_heads, "split_fused": split_fused}
        key = cache_key(model=here.digest, base=digest, settings=splits) if cache else ""
        before = recall(key)
        look.take_over(before)
        known = {row["name"] for row in look.rows.values() if row["measured"] == "full"}

        def keep() -> None:
            if any(row["measured"] == "full" and row["name"] not in known for row in look.rows.values()):
                remember(key, look.found() if before is None else look.joined(before))

        look.keep = keep
        try:
            look.run(detail, threads or max(1, torch.get_num_threads()))
        except KeyboardInterrupt:
            look.interrupted = True
            if not look.rows:
                raise
        keep()
        return look.found()


@dataclass
class _Look:
    """A look that is under way: the models, what is to be measured, and what is known by now."""

    here: Source
    pairing: Pairing
    rank: int
    stop: threading.Event | None
    progress: Callable[[InspectionProgress], None] | None
    elapsed: Callable[[], float]
    parameters: dict[str, list[tuple[str, MatrixBlock, Index]]] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    result: Inspection = field(default_factory=lambda: Inspection(""))
    interrupted: bool = False
    rest: dict[str, float | None] = field(default_factory=dict)
    keep: Callable[[], None] = field(default=lambda: None)
    kept: float = 0.0

    def plan(self, sample: int | None) -> None:
        """Choose the matrices, by parameter, since a parameter is read as a whole."""
        everything = [
            (block.name + (f"[{','.join(map(str, index))}]" if index else ""), block, index)
            for block in self.here.table
            for index in product(*map(range, block.shape[:-2]))
        ]
        if sample is not None and sample < len(everything):
            places = np.linspace(0, len(everything) - 1, sample).round().astype(int)
            self.result.notes.append(f"{sample} of {len(everything)} matrices, evenly spread over the model")
            everything = [everything[place] for place in places]
        for name, block, index in everything:
            self.parameters.setdefault(block.parameter, []).append((name, block, index))
            self.rows[name] = self._blank(name, block)

    def _blank(self, name: str, block: MatrixBlock) -> dict[str, Any]:
        layer, role = place_in_model(name)
        out, inside = block.shape[-2:]
        facts = {"name": name, "shape": f"{out} x {inside}", "rule": block.rule, "numel": out * inside}
        facts |= {"stored": self.here.stored(block.parameter), "layer": layer, "role": role, "measured": "not yet"}
        return {column: facts.get(column) for column in COLUMNS}

    def take_over(self, before: Inspection | None) -> None:
        """Rows that an earlier look has measured in full."""
        if before is None:
            return
        if any(one["relative_change"] is not None for one in before.left_out):
            self.rest = {one["name"]: one["relative_change"] for one in before.left_out}
        for row in before.rows:
            name = row["name"]
            if name in self.rows and row["measured"] == "full":
                self.rows[name] = row
                for kind in _ARRAYS:
                    if name in (known := getattr(before, kind)):
                        getattr(self.result, kind)[name] = known[name]

    def run(self, detail: str, threads: int) -> None:
        """The first look at everything, then the full one."""
        for look, measure in ((1, self._first), (2, self._full)) if detail == "spectrum" else ((1, self._first),):
            # Matrices in the works at a time: what is read, in float32, and a comparison's copies in float64.
            copies = 2 if look == 1 or self.pairing.there is None else 16
            todo = {
                name: copies * math.prod(self.here.shapes[name])
                for name, parts in self.parameters.items()
                if any(self._wants(self.rows[own], look) for own, _, _ in parts)
            }
            done = 0

            def told(name: str, look: int = look, total: int = len(todo)) -> None:
                nonlocal done
                done += 1
                if self.progress is not None:
                    rows = [self.rows[own] for own, _, _ in self.parameters[name]]
                    self.progress(InspectionProgress(name, look, done, total, self.elapsed(), rows))
                # So that a process that is killed has not worked for nothing.
                if self.elapsed() - self.kept > _KEEP:
                    self.keep()
                    self.kept = self.elapsed()

            whole = run_bounded(measure, todo, threads=threads, done=told, order="given", stop=self.stop)
            self.interrupted |= not whole
            if self.interrupted:
                return
            self._compare_rest()

    @staticmethod
    def _wants(row: dict[str, Any], look: int) -> bool:
        return row["measured"] == ("not yet" if look == 1 else "first look")

    def _compare_rest(self) -> None:
        """What happened to the parameters that are no matrices."""
        for one in self.here.table.left_out:
            if self.pairing.there is not None and one.name not in self.rest:
                self.rest[one.name] = self.pairing.change(one.name)

    def _matrices(self, parameter: str, look: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """The matrices of a parameter with those of the base."""
        whole = self.here.read(parameter)
        other = self.pairing.read(parameter)
        other = None if other is None else other.to(whole.device)
        for name, block, index in self.parameters[parameter]:
            if self._wants(self.rows[name], look):
                yield name, block.read(whole)[index], None if other is None else block.read(other)[index]

    def _first(self, parameter: str) -> None:
        self._guarded(parameter, 1, self._first_row)

    def _full(self, parameter: str) -> None:
        self._guarded(parameter, 2, self._full_row)

    def _guarded(self, parameter: str, look: int, measure: Callable[[str, str, Tensor, Tensor | None], None]) -> None:
        """Measure the matrices of a parameter; what cannot be measured says why and does not end the rest."""
        try:
            with torch.no_grad():
                for name, W, W0 in self._matrices(parameter, look):
                    measure(parameter, name, W, W0)
        except (OrthokitError, torch.linalg.LinAlgError) as error:
            for name, _, _ in self.parameters[parameter]:
                if self._wants(self.rows[name], look):
                    done = "not" if look == 1 else "first look"
                    self.rows[name] = {**self.rows[name], "measured": done, "note": str(error)}

    def _first_row(self, parameter: str, name: str, W: Tensor, W0: Tensor | None) -> None:
        work, bad = cleaned(W)
        found = first_look(work, stored=W.dtype, rounding=self.here.rounding(parameter))
        row: dict[str, Any] = {**found, "nonfinite": bad, "measured": "first look"}
        notes = [f"{_entries(bad)} NaN or infinite and measured as 0"] if bad else []
        if W0 is not None:
            start, there = cleaned(W0)
            notes += [f"in the base {_entries(there)} NaN or infinite and taken as 0"] if there else []
            row["relative_change"] = relative_change(work, start)
        row["note"] = "; ".join(notes) or None
        self.rows[name] = {**self.rows[name], **row}

    def _full_row(self, parameter: str, name: str, W: Tensor, W0: Tensor | None) -> None:
        work, _ = cleaned(W)
        sigma = exact_spectrum(work)
        known = self.rows[name]
        row = full_look(work, sigma, floor=known["rounding_floor"] or 0.0)
        self.result.spectra[name] = sigma.astype(np.float32)
        if W0 is not None:
            row |= self._against(parameter, name, work, cleaned(W0)[0], sigma)
        self.rows[name] = {**known, **row, "measured": "full"}

    def _against(self, parameter: str, name: str, W: Tensor, W0: Tensor, sigma: np.ndarray) -> dict[str, Any]:
        """The columns of a comparison; what lies behind them is kept beside."""
        precision = self.pairing.precision(parameter, W, W0)
        change = weight_change(W0, W, rank=self.rank, sigma=torch.from_numpy(sigma), **precision)
        self.result.base_spectra[name] = change.base_singular_values.cpu().numpy()
        self.result.changes[name] = change.singular_values.cpu().numpy()
        self.result.profiles[name] = {
            "retention_drift": change.retention_drift.cpu().numpy(),
            "adaptation": change.adaptation.cpu().numpy(),
        }
        return change.row()

    def found(self) -> Inspection:
        """What is known by now."""
        left = [
            {"name": one.name, "shape": " x ".join(map(str, one.shape)), "reason": one.reason}
            | {"relative_change": self.rest.get(one.name)}
            for one in self.here.table.left_out
        ]
        kept = {
            kind: {name: known[name] for name in self.rows if name in (known := getattr(self.result, kind))}
            for kind in _ARRAYS
        }
        return replace(
            self.result,
            name=self.here.name,
            base_name=self.pairing.name,
            rows=list(self.rows.values()),
            left_out=left,
            unmatched=self.pairing.unmatched,
            notes=[*self.result.notes, *self.pairing.notes],
            interrupted=self.interrupted,
            seconds=self.elapsed(),
            **kept,
        )

    def joined(self, before: Inspection) -> Inspection:
        """What is known by now, together with what an earlier look knew of other matrices."""
        now = self.found()
        others = [row for row in before.rows if row["name"] not in now.spectra]
        own = [row for row in now.rows if row["name"] in now.spectra]
        return replace(now, rows=own + others, **{kind: getattr(before, kind) | getattr(now, kind) for kind in _ARRAYS})


def _entries(count: int) -> str:
    return "1 entry is" if count == 1 else f"{count:,} entries are"
