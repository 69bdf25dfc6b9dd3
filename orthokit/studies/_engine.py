"""Studies: many small measurements, made once, resumable, in parallel, recorded with how they were made."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import orthokit
from orthokit.device import processor
from orthokit.errors import OptionError, ReportError, unknown_name
from orthokit.lab.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SIZES", "Study", "evidence_root", "evidence_stamp", "load_evidence", "run_study", "source_hash"]

SIZES = ("full", "smoke")
Unit = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A question that needs many seeds.

    Args:
        name: Name of the study and of its folder under ``evidence/``.
        question: What it asks, in one sentence.
        units: ``units(size, seeds)`` lists the independent measurements as JSON-able dictionaries.
        measure: ``measure(unit)`` makes one and returns its rows; a module-level function, so that workers find it.
        summarise: Turns all rows into the table that is kept; default all rows as they are.
        seeds: Default number of seeds.
        depends: ``depends(unit)`` names the files of the library, as patterns, that the rows of a unit depend on. Each
            unit then carries its own hash: it stays valid while other files change, also once it is published, and is
            measured again when its own do. Default: all files, one hash, and every run measures all.
    """

    name: str
    question: str
    units: Callable[[str, int], list[Unit]]
    measure: Callable[[Unit], list[Row]]
    summarise: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    seeds: int = 5
    depends: Callable[[Unit], Sequence[str]] | None = None


def source_hash(patterns: Sequence[str] = ("**/*.py",)) -> str:
    """Twelve hexadecimal digits that change with any line of the library that a measurement can depend on.

    Args:
        patterns: Files of the package, as patterns; default all.

    Returns:
        The digits.

    Raises:
        ReportError: A pattern that fits no file: the hash would miss what it is there for.
    """
    root = Path(orthokit.__file__).parent
    # What draws, reports and talks to people sits above the studies and cannot change what they measure.
    above = ("figures", "reports", "cli", "doctor.py", "__init__.py")
    found = {pattern: list(root.glob(pattern)) for pattern in patterns}
    if missing := [pattern for pattern, paths in found.items() if not paths]:
        raise ReportError(f"no file of the library fits {', '.join(missing)}; the study names what it depends on.")
    everything = {path for paths in found.values() for path in paths}
    digest = hashlib.sha256()
    for path in sorted(p for p in everything if p.relative_to(root).parts[0] not in above):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def evidence_root() -> Path:
    """The folder of recorded evidence: the checkout's ``evidence/``, else the copy inside the installed package."""
    package = Path(orthokit.__file__).parent
    checkout = package.parent / "evidence"
    return checkout if checkout.is_dir() else package / "_evidence"


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, torch, Python."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def run_study(
    study: Study,
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    seeds: int | None = None,
    size: str = "full",
    fresh: bool = False,
    progress: bool = True,
) -> Path:
    """Make a study and record it; an interrupted one goes on where it stopped.

    Args:
        study: The study.
        out: Folder of evidence; default :func:`evidence_root`.
        jobs: Worker processes, ``>= 1``; the cores are shared among them. Default 1.
        seeds: Number of seeds, ``>= 2``; default the study's own.
        size: ``"full"`` (default) or ``"smoke"``, a few seconds, for tests.
        fresh: Throw away what an interrupted run left; default ``False``.
        progress: Show a progress line.

    Returns:
        The folder with ``results.csv`` and ``study.json``.

    Raises:
        UnknownNameError: Unknown size.
        OptionError: ``jobs`` or ``seeds`` out of range.
        ReportError: What an interrupted run left was made by another version of the code or with other options.
    """
    if size not in SIZES:
        raise unknown_name("study size", size, SIZES)
    count = study.seeds if seeds is None else seeds
    if jobs < 1 or count < 2:
        raise OptionError(f"need jobs >= 1 and seeds >= 2 for an interval; got jobs={jobs}, seeds={count}.")
    folder = (evidence_root() if out is None else Path(out)) / study.name
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "partial.jsonl"
    units = study.units(size, count)
    header: dict[str, Any] = {"study": study.name, "size": size}
    sources = {}
    if study.depends is None:
        header |= {"source": source_hash(), "seeds": count, "units": len(units)}
    else:
        sources = {_key(unit): source_hash(study.depends(unit)) for unit in units}
    recorded = {} if fresh else {**(_published(folder, header) if sources else {}), **_recorded(partial, header)}
    done = {key: rows for key, (source, rows) in recorded.items() if source == sources.get(key)}
    started = time.time()
    if fresh or not partial.exists():
        partial.write_text(json.dumps(header) + "\n")
    todo = [unit for unit in units if _key(unit) not in done]
    with partial.open("a") as file, Progress(study.name, steps=len(units), start=len(done), enabled=progress) as bar:
        for unit, rows in _measured(study, todo, jobs):
            done[_key(unit)] = rows
            kept = {"unit": unit, "rows": rows} | ({"source": sources[_key(unit)]} if sources else {})
            file.write(json.dumps(kept) + "\n")
            file.flush()
            bar.update(len(done), {})
    if sources:
        measured = [{"unit": u, "source": sources[_key(u)], "rows": len(done[_key(u)])} for u in units]
        together = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:12]
        header |= {"source": together, "seeds": count, "units": len(units), "measured": measured}
    return _publish(study, folder, header, [done[_key(unit)] for unit in units], jobs, time.time() - started)


def _key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)


def _recorded(partial: Path, header: dict[str, Any]) -> dict[str, tuple[str | None, list[Row]]]:
    """What an earlier, interrupted run of the same study left: unit to its hash, if it has one, and its rows."""
    if not partial.exists():
        return {}
    lines = partial.read_text().splitlines()
    try:
        found = json.loads(lines[0]) if lines else None
    except ValueError:
        found = None
    if found != header:
        raise ReportError(
            f"{partial} was left by another version of the code or with other options; results must not be mixed. "
            "Add --fresh to start anew."
        )
    done = {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            break  # the line that a kill cut short; its unit is measured again
        done[_key(entry["unit"])] = (entry.get("source"), entry["rows"])
    return done


def _published(folder: Path, header: dict[str, Any]) -> dict[str, tuple[str | None, list[Row]]]:
    """The units of the published record of the same study, in the form of :func:`_recorded`."""
    import pandas as pd

    try:
        record = json.loads((folder / "study.json").read_text())
        if any(record[name] != value for name, value in header.items()):
            return {}
        rows = pd.read_csv(folder / "results.csv").to_dict("records")
        counts = [entry["rows"] for entry in record["measured"]]
    except (OSError, ValueError, KeyError):
        return {}  # nothing published, or nothing that can be taken over
    if sum(counts) != len(rows):
        return {}  # summarised, or edited by hand
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return {
        _key(entry["unit"]): (entry["source"], rows[end - count : end])
        for entry, end, count in zip(record["measured"], ends, counts, strict=True)
    }


def _measured(study: Study, units: list[Unit], jobs: int) -> Iterator[tuple[Unit, list[Row]]]:
    if jobs == 1:
        for unit in units:
            yield unit, study.measure(unit)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ExitStack() as stack:
        # spawn: a forked child would inherit torch's thread pool in a state it cannot use.
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting = {pool.submit(study.measure, unit): unit for unit in units}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _publish(
    study: Study, folder: Path, header: dict[str, Any], results: Iterable[list[Row]], jobs: int, seconds: float
) -> Path:
    import pandas as pd

    table = pd.DataFrame([row for rows in results for row in rows])
    table = table if study.summarise is None else study.summarise(table)
    arguments = [study.name, *(["--size", header["size"]] if header["size"] != "full" else [])]
    record = {
        "study": study.name,
        "question": study.question,
        **{name: header[name] for name in ("size", "seeds", "units", "source")},
        "orthokit": orthokit.__version__,
        "command": " ".join(["orthokit study", *arguments, f"--jobs {jobs} --seeds {header['seeds']}"]),
        "machine": machine() | {"jobs": jobs, "threads": torch.get_num_threads() if jobs == 1 else None},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_of_last_session": round(seconds),
        "columns": list(table.columns),
        **{name: header[name] for name in ("measured",) if name in header},
    }
    (folder / "results.csv.tmp").write_text(table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    (folder / "study.json.tmp").write_text(json.dumps(record, indent=1) + "\n")
    for name in ("results.csv", "study.json"):
        (folder / f"{name}.tmp").replace(folder / name)
    (folder / "partial.jsonl").unlink(missing_ok=True)
    return folder


def evidence_stamp(name: str, *, root: str | Path | None = None) -> tuple[str, int]:
    """Where a study would be recorded and when it last was, as a key to keep what was made of it.

    Args:
        name: Of the study.
        root: Folder of evidence; default :func:`evidence_root`.

    Returns:
        The folder of evidence, and the time of the record in nanoseconds; 0: there is none.
    """
    folder = evidence_root() if root is None else Path(root)
    try:
        return str(folder), (folder / name / "results.csv").stat().st_mtime_ns
    except OSError:
        return str(folder), 0


def load_evidence(name: str, *, root: str | Path | None = None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The recorded results of a study and how they were made.

    Args:
        name: Name of the study.
        root: Folder of evidence; default :func:`evidence_root`.

    Returns:
        The table and the record (command, seeds, machine, date, hash of the source).

    Raises:
        ReportError: Nothing is recorded under that name, or the record is damaged.

    Example:
        >>> table, record = load_evidence("synthetic_gap")
        >>> record["seeds"]
        10
    """
    import pandas as pd

    folder = (evidence_root() if root is None else Path(root)) / name
    try:
        return pd.read_csv(folder / "results.csv"), json.loads((folder / "study.json").read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"no readable evidence in {folder} ({error}). Make it with: orthokit study {name}") from error
