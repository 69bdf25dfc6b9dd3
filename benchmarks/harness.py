"""The pattern of every benchmark here: rivals side by side in one process, judged by ratios within each round.

A machine is never quiet and never the same twice, so an absolute time says little and two times taken minutes apart
say less. Here all candidates run in turn, round after round; each round gives one ratio to a named baseline, and the
median of those ratios is the result. Load that slows a whole round leaves its ratios alone.

A benchmark is a module of this folder with a docstring and::

    def cases(options):                      # options.quick, options.threads, options.rounds
        yield Case("what is measured", {"ours": ours, "theirs": theirs}, baseline="theirs")

    def main(arguments=None):
        return run(__name__, __doc__, cases, arguments)
"""

import argparse
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import orthokit
from orthokit.device import processor

__all__ = ["Case", "Options", "Result", "compare", "machine", "record", "run", "save", "table"]

RESULTS = Path(__file__).parent / "results"
# Shorter samples are repeated to this length: the clock and the interpreter would be a visible share of them.
SHORTEST = 0.005
# A sample that got less than this share of the processor time it could use was disturbed by something else.
UNDISTURBED = 0.9


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        title: What is measured, in a few words.
        candidates: Name to a function without arguments; what it returns is dropped.
        baseline: The candidate that all ratios refer to.
        work: FLOP of one call, for candidates where that says something.
        roof: The candidate whose FLOP/s are the most the machine gives; shares of it are shown.
        columns: More columns, each candidate name to text.
        notes: Sentences that belong under the table, such as which rivals are not installed.
    """

    title: str
    candidates: dict[str, Callable[[], object]]
    baseline: str
    work: dict[str, float] = field(default_factory=dict)
    roof: str | None = None
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = {self.baseline, *self.work, *([self.roof] if self.roof else [])}
        for column in self.columns.values():
            names |= column.keys()
        if names - self.candidates.keys():
            raise ValueError(f"{self.title}: no candidates of the names {sorted(names - self.candidates.keys())}.")
        if self.roof and self.roof not in self.work:
            raise ValueError(f"{self.title}: the roof {self.roof!r} needs its work in FLOP.")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    threads: int
    rounds: int
    quick: bool


@dataclass(frozen=True)
class Result:
    """All samples of a case: per candidate the wall and processor seconds of one call, one value per round."""

    case: Case
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median wall seconds of one call."""
        return statistics.median(self.wall[name])

    def ratios(self, name: str, *, of: str = "wall") -> list[float]:
        """Time over that of the baseline, round by round: ``"wall"`` or ``"cpu"``."""
        times = self.wall if of == "wall" else self.cpu
        return [t / max(base, 1e-12) for t, base in zip(times[name], times[self.case.baseline], strict=True)]

    def roof_share(self, name: str) -> float | None:
        """Median share of the roof's FLOP/s, each taken within its round."""
        work, roof = self.case.work, self.case.roof
        if roof is None or name not in work:
            return None
        pairs = zip(self.wall[name], self.wall[roof], strict=True)
        return statistics.median(work[name] / t / (work[roof] / best) for t, best in pairs)

    def disturbed(self, name: str) -> list[bool]:
        """Per round: whether the sample got clearly less processor time than it could use.

        A call on one thread uses a second of processor time per second. With several threads it uses what its own best
        round used.
        """
        shares = [cpu / wall for cpu, wall in zip(self.cpu[name], self.wall[name], strict=True)]
        usable = max(1.0, *shares)
        return [share < UNDISTURBED * usable for share in shares]

    def as_json(self) -> dict[str, Any]:
        """Everything, samples included."""
        rows = {}
        for name in self.case.candidates:
            ratios = self.ratios(name)
            rows[name] = {
                "median_seconds": self.median(name),
                "median_ratio": statistics.median(ratios),
                "median_cpu_ratio": statistics.median(self.ratios(name, of="cpu")),
                "share_of_roof": self.roof_share(name),
                "disturbed_rounds": sum(self.disturbed(name)),
                "flop": self.case.work.get(name),
                "wall_seconds": self.wall[name],
                "cpu_seconds": self.cpu[name],
                **{title: column[name] for title, column in self.case.columns.items() if name in column},
            }
        case = self.case
        told = {"title": case.title, "baseline": case.baseline, "roof": case.roof, "notes": list(case.notes)}
        return told | {"candidates": rows}


def _sample(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        call()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return wall / repeats, cpu / repeats


def compare(case: Case, *, rounds: int, warmup: int = 2) -> Result:
    """Run all candidates in turn, ``rounds`` times, after ``warmup`` calls of each."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}.")
    repeats = {}
    for name, call in case.candidates.items():
        for _ in range(warmup):
            call()
        repeats[name] = max(1, math.ceil(SHORTEST / max(_sample(call, 1)[0], 1e-9)))
    names = list(case.candidates)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever runs when it is due
    try:
        for i in range(rounds):
            # Whoever follows the largest candidate finds the caches cold, so that should be another one every time.
            for name in random.Random(i).sample(names, len(names)):
                seconds, busy = _sample(case.candidates[name], repeats[name])
                wall[name].append(seconds)
                cpu[name].append(busy)
    finally:
        if collecting:
            gc.enable()
    return Result(case, wall, cpu)


def machine() -> dict[str, Any]:
    """What a number measured here should be read with."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": processor(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "orthokit": orthokit.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def table(result: Result) -> str:
    """The result as text, fastest first."""
    case, rounds = result.case, len(result.wall[result.case.baseline])
    header = ["", "median", "x baseline", "middle half", "x by CPU time", "disturbed"]
    header += ["GFLOP/s", "of roof"] if case.work else []
    header += list(case.columns)
    rows = []
    for name in sorted(case.candidates, key=lambda name: statistics.median(result.ratios(name))):
        ratios = result.ratios(name)
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else (ratios[0],) * 3
        marked = f"{name} *" if name == case.baseline else name
        row = [marked, _duration(result.median(name)), f"{statistics.median(ratios):.2f}", f"{low:.2f}-{high:.2f}"]
        row.append(f"{statistics.median(result.ratios(name, of='cpu')):.2f}")
        row.append(f"{sum(result.disturbed(name))} of {rounds}")
        if case.work:
            share = result.roof_share(name)
            row.append(f"{case.work[name] / result.median(name) / 1e9:.0f}" if name in case.work else "")
            row.append("" if share is None else f"{share:.0%}")
        rows.append(row + [column.get(name, "") for column in case.columns.values()])
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    title = f"{case.title} ({rounds} rounds, * is the baseline)"
    return "\n".join([title, *(line.rstrip() for line in lines), *case.notes])


def save(name: str, options: Options, found: dict[str, Any], results: list[Result]) -> Path:
    """Write ``benchmarks/results/<name>.json``, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    asked = {"threads": options.threads, "rounds": options.rounds, "quick": options.quick}
    content = {"benchmark": name, "machine": found, "options": asked, "cases": [r.as_json() for r in results]}
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    return path


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=1, help="threads of torch; default 1")
    made.add_argument("--rounds", type=int, help="rounds; default 15, with --quick 3")
    made.add_argument("--quick", action="store_true", help="smaller inputs and fewer rounds: a check that it runs")
    made.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.json")
    made.add_argument("--label", default="", help="added to the name of the file: another machine beside the first")
    return made


def _labelled(name: str, label: str) -> str:
    return f"{name}_{label}" if label else name


def record(found: dict[str, Any], *, save: bool, label: str = "") -> None:
    """Print the result of a benchmark that has no cases, and write it when asked."""
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if save:
        (RESULTS / f"{_labelled(found['benchmark'], label)}.json").write_text(text)


def run(
    name: str,
    description: str | None,
    cases: Callable[[Options], Iterable[Case]],
    arguments: list[str] | None = None,
    *,
    by_threads: bool = False,
) -> list[Result]:
    """Run one benchmark from the command line: measure, print, save when asked.

    With ``by_threads`` each number of threads has its own file, ``<name>_2threads.json``.
    """
    name = name.rpartition(".")[2]
    given = parser(description).parse_args(arguments)
    if given.threads < 1 or (given.rounds is not None and given.rounds < 1):
        raise SystemExit("--threads and --rounds must be at least 1.")
    options = Options(given.threads, given.rounds or (3 if given.quick else 15), given.quick)
    torch.set_num_threads(options.threads)
    found = machine()
    print(f"# {name}: {(description or '').strip().splitlines()[0] if description else ''}")
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    results = list(_measure(cases(options), options))
    if given.save:
        threads = f"_{options.threads}thread{'s' if options.threads > 1 else ''}" if by_threads else ""
        print(f"\nwritten: {save(_labelled(name + threads, given.label), options, found, results)}")
    return results


def _measure(cases: Iterable[Case], options: Options) -> Iterator[Result]:
    for case in cases:
        result = compare(case, rounds=options.rounds)
        print(f"\n{table(result)}", flush=True)
        spoilt = sum(sum(result.disturbed(name)) for name in case.candidates)
        if spoilt > len(case.candidates) * options.rounds / 3:
            print("Many samples were disturbed by other load: trust the ratios by CPU time, or measure again.")
        yield result
