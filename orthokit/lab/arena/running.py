"""The arena as runs in the run store: one each, resumable, in parallel."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orthokit.errors import OptionError, RunBusyError, RunError, unknown_name
from orthokit.lab._run_reader import RunReader
from orthokit.lab.arena.contest import compete
from orthokit.lab.arena.ground import Ground
from orthokit.lab.arena.grounds import GROUNDS, ground_named, handed_on
from orthokit.lab.arena.methods import METHODS
from orthokit.lab.arena.portraits import DIAGNOSTICS
from orthokit.lab.arena.rates import first_rate
from orthokit.lab.progress import Progress
from orthokit.lab.runs import Run, runs_root

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["arena_rows", "run_arena"]

Row = dict[str, Any]
_FIGURES = ("target", "error", "general", "geometry", "seconds")
_LABELS = ("ground", "method", "size", "trainable", "lr", "seed")
_PER_LAYER = (*DIAGNOSTICS, "strength")


def run_arena(
    grounds: str | Sequence[str],
    methods: str | Sequence[str],
    *,
    seeds: Sequence[int],
    rates: float | Mapping[str, float | Sequence[float]] | None = None,
    root: str | os.PathLike[str] | None = None,
    jobs: int = 1,
    progress: bool = True,
    evaluations: int = 4,
    portrait: bool = True,
    paths: bool = False,
    steps: int | None = None,
    small: bool = False,
) -> pd.DataFrame:
    """Every method on every ground, at every rate and with every seed: one run each in the run store.

    Called again it goes on: finished runs are read, all others start over.

    Args:
        grounds: One or several.
        methods: One or several.
        seeds: At least one.
        rates: Learning rate of all, or method to its rate or rates; default the one to begin with
            (:func:`~orthokit.lab.arena.rates.first_rate`). The recorded study shows which are best.
        root: Folder of runs; default ``$ORTHOKIT_RUNS``, else ``./runs``.
        jobs: Processes, ``>= 1``; the cores are shared among them. Default 1: in this one.
        progress: Show a progress line.
        evaluations: Evaluations after the start.
        portrait: Add the diagnostics of the finished models.
        paths: Add the ways back.
        steps: Length of the runs; default the grounds'.
        small: See :func:`orthokit.lab.arena.enter`.

    Returns:
        The rows of :func:`orthokit.lab.arena.compete` for all of them with ``run``, the name, and ``status``. A
        combination that failed has one row, ``kind="failed"``, with the ``message``; the others go on.

    Raises:
        UnknownNameError: No such ground or method.
        OptionError: A number out of range, nothing to do, or a ground of :func:`~orthokit.lab.arena.add_ground` that
            other processes cannot have.
        RunError: A finished run of that name was made with other options; nothing was started.

    Example:
        >>> import tempfile
        >>> root = tempfile.mkdtemp()
        >>> options = {"seeds": [0], "root": root, "steps": 1, "small": True, "progress": False, "portrait": False}
        >>> frame = run_arena("tinygpt", ["lora", "oft"], **options)
        >>> sorted(frame["run"].unique())
        ['tinygpt-lora-lr0.016-seed0', 'tinygpt-oft-lr0.002-seed0']

    Numerics:
        The run store keeps layers, profiles and paths as float32.
    """
    import pandas as pd

    if jobs < 1 or evaluations < 1:
        raise OptionError(f"need jobs >= 1 and evaluations >= 1; got jobs={jobs}, evaluations={evaluations}.")
    shared = {"evaluations": evaluations, "portrait": portrait, "paths": paths, "steps": steps, "small": small}
    planned = [{**one, **shared} for one in _combinations(_many(grounds), _many(methods), seeds, rates)]
    folder = runs_root(root)
    waiting = [one for one in planned if not _finished(folder, one)]
    added = handed_on({one["ground"] for one in waiting}) if jobs > 1 else {}
    failed: dict[str, str] = {}
    with Progress("arena", steps=len(planned), start=len(planned) - len(waiting), enabled=progress) as bar:
        for done, (name, message) in enumerate(_made(folder, waiting, jobs, added), len(planned) - len(waiting) + 1):
            if message:
                failed[name] = message
            bar.update(done, {"failed": len(failed)} if failed else {})
    rows: list[Row] = []
    for one in planned:
        name = _name(one)
        labels = {"run": name, "status": "failed" if name in failed else "finished"}
        if name in failed:
            kept = {key: one[key] for key in ("ground", "method", "lr", "seed")}
            rows.append({**labels, "kind": "failed", **kept, "message": failed[name]})
        else:
            rows += [{**labels, **row} for row in arena_rows(Run.open(folder / name))]
    frame = pd.DataFrame(rows)
    whole = [column for column in ("size", "trainable", "seed", "step", "index") if column in frame]
    return frame.astype(dict.fromkeys(whole, "Int64"))


def _many(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _combinations(
    grounds: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: float | Mapping[str, float | Sequence[float]] | None,
) -> Iterator[Row]:
    if not grounds or not methods or not seeds:
        raise OptionError("nothing to do: give at least one ground, one method and one seed.")
    for method in methods:
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
    for ground in grounds:
        ground_named(ground)
    for method in rates if isinstance(rates, Mapping) else ():
        if method not in methods:
            raise unknown_name("method in rates:", method, methods)
    found = []
    for ground in grounds:
        for method in methods:
            given = rates.get(method) if isinstance(rates, Mapping) else rates
            given = first_rate(ground, method) if given is None else given
            for lr in [given] if isinstance(given, int | float) else given:
                if not (lr > 0 and math.isfinite(lr)):
                    raise OptionError(f"learning rates must be above 0; got {lr} for {method!r}.")
                found += [{"ground": ground, "method": method, "lr": float(lr), "seed": int(seed)} for seed in seeds]
    return iter(found)


def _name(one: Row) -> str:
    return f"{one['ground']}-{one['method']}-lr{one['lr']:g}-seed{one['seed']}"


def _finished(folder: Path, one: Row) -> bool:
    """Whether the run is there and done; a run of that name with other options is refused."""
    name = _name(one)
    if not Run.exists(name, root=folder):
        return False
    run = Run.open(folder / name)
    if run.status != "finished":
        return False
    # Through JSON, as the store keeps it.
    found, wanted = run.config.get("arena"), json.loads(json.dumps(one))
    if found != wanted:
        other = [key for key in wanted if (found or {}).get(key) != wanted[key]]
        raise RunError(
            f"the finished run {run.path} was made with another {', '.join(other)}. Choose another root, or delete it."
        )
    return True


def _made(folder: Path, waiting: list[Row], jobs: int, added: dict[str, Ground]) -> Iterator[tuple[str, str]]:
    """Names of runs as they end, with why they failed or an empty text."""
    if jobs == 1 or len(waiting) < 2:
        for one in waiting:
            yield _name(one), _make(folder, one)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ExitStack() as stack:
        # spawn: a forked child would inherit torch's thread pool in a state it cannot use.
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), _ready, (threads, added))
        stack.callback(pool.shutdown, cancel_futures=True)
        futures = {pool.submit(_make, folder, one): _name(one) for one in waiting}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"


def _ready(threads: int, added: dict[str, Ground]) -> None:
    """What a process needs before it makes runs."""
    torch.set_num_threads(threads)
    GROUNDS.update(added)


def _make(folder: Path, one: Row) -> str:
    """One combination; why it failed, or an empty text."""
    try:
        with Run.create(_name(one), root=folder, config={"arena": one}, exist_ok=True) as run:
            run.truncate_after(0)  # one that was interrupted starts over

            def seen(row: Row) -> None:
                run.log(row["step"], **{key: row[key] for key in _FIGURES if key in row})

            _store(run, compete(**one, on_row=seen))
    except RunBusyError as error:
        return f"another process is making it: {error}"
    except Exception as error:  # whatever it is, the others go on; leaving its block by an error set the run's status
        return f"{type(error).__name__}: {error}"
    return ""


def _store(run: Run, rows: list[Row]) -> None:
    last = max((row for row in rows if row["kind"] == "run"), key=lambda row: row["step"])
    step = last["step"]
    run.log(
        step, size=last["size"], trainable=last["trainable"], **{key: last[key] for key in DIAGNOSTICS if key in last}
    )
    layers = [row for row in rows if row["kind"] == "layer"]
    for key in _PER_LAYER if layers else ():
        run.log_spectrum(step, f"layers/{key}", [row[key] for row in layers])
    if layers:
        run.note("layers: " + json.dumps([row["layer"] for row in layers]))
    for kind, group, columns in (
        ("profile", "layer", ("index", "sigma", "retention", "adaptation", "after")),
        ("path", "path", ("alpha", "target", "general")),
    ):
        some = [row for row in rows if row["kind"] == kind]
        for name in dict.fromkeys(row[group] for row in some):
            for key in columns:
                run.log_spectrum(step, f"{kind}/{name}/{key}", [row[key] for row in some if row[group] == name])


def arena_rows(run: RunReader) -> list[dict[str, Any]]:
    """The rows of :func:`orthokit.lab.arena.compete` out of a run of the arena, also while it goes on.

    Args:
        run: A run that :func:`run_arena` made.

    Returns:
        The rows so far.

    Raises:
        RunError: The run is not one of the arena.
    """
    if "arena" not in run.config:
        raise RunError(f"{run.path} is no run of the arena; make one with run_arena.")
    table = run.scalars()
    values: dict[int, dict[str, float]] = {}
    for row in table.itertuples():
        values.setdefault(int(row.step), {})[str(row.name)] = float(row.value)  # type: ignore[arg-type]
    if not values:
        return []
    step = max(values)
    counts = {key: int(values[step].pop(key)) for key in ("size", "trainable") if key in values[step]}
    common = {key: {**run.config["arena"], **counts}.get(key) for key in _LABELS}
    rows: list[Row] = [{"kind": "run", **common, "step": at, **found} for at, found in sorted(values.items())]
    extra: dict[tuple[str, str], dict[str, Any]] = {}
    for name in run.spectra():
        kind, *group, key = name.split("/")
        extra.setdefault((kind, "/".join(group)), {})[key] = run.spectra(name)[1][-1].tolist()
    for (kind, group), columns in extra.items():
        labels: Row = {"kind": kind.removesuffix("s"), **common, "step": step}
        if kind == "layers":
            columns["layer"] = _layer_names(run)
        else:
            labels["layer" if kind == "profile" else "path"] = group
        for values_of in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values_of, strict=True))
            rows.append({**labels, **row, **({"index": int(row["index"])} if "index" in row else {})})
    return rows


def _layer_names(run: RunReader) -> list[str]:
    """The last ones noted: a run that started over may have older ones."""
    return json.loads([text for text in run.notes() if text.startswith("layers: ")][-1].removeprefix("layers: "))
