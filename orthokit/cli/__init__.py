"""The command line: ``orthokit report | run | study | inspect | merge | dash | runs | ledger | audit | doctor``.

Every command imports what it needs when it runs, so that ``orthokit --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from orthokit.cli import inspection, merging
from orthokit.cli.common import FAILED, INTERRUPTED, OK, USAGE, parameters
from orthokit.errors import MissingExtraError, OptionError, OrthokitError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments; default those of the process.

    Returns:
        0; 1 when a notebook or check failed; 2 for a bad request; 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # These two read their own arguments, which their own --help describes.
        if arguments[:1] == ["dash"]:
            return _dash(arguments[1:])
        if arguments[:1] == ["doctor"]:
            from orthokit import doctor

            return int(doctor.main(arguments[1:]))
        options = _parser().parse_args(arguments)
        return int(options.command(options))
    except OrthokitError as error:
        print(f"orthokit: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("orthokit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) left; there is nobody to tell.
        sys.stderr.close()
        return OK


def _parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="orthokit",
        description="Orthogonal methods in deep learning: executed notebooks, reports, recorded studies, live pages.",
        epilog="Each command has its own --help. Exit code: 0 done, 1 a failure, 2 a bad request, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"orthokit {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report",
        help="execute notebooks into an offline HTML report",
        description="Executes notebooks; writes executed copies, an HTML page each, an index and the ledger of claims.",
    )
    report.add_argument("names", nargs="*", metavar="NAME", help="notebooks by name or beginning (02); default all")
    _add_running(report)
    report.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default 1)")
    report.add_argument("--resume", action="store_true", help="continue the newest report, or the one in --out")
    report.set_defaults(command=_report)

    run = commands.add_parser(
        "run",
        help="execute one notebook with parameters",
        description="Executes one notebook like a report of one and prints the path of its page.",
    )
    run.add_argument("name", metavar="NAME", help="the notebook, by name, beginning, or path")
    _add_running(run)
    run.set_defaults(command=_run)

    study = commands.add_parser(
        "study",
        help="run or resume a recorded study",
        description="Runs what needs many seeds or hours, and leaves its results as evidence; run again to resume.",
    )
    study.add_argument("name", nargs="?", metavar="NAME", help="the study; see --list")
    study.add_argument("--list", action="store_true", help="list the studies")
    study.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default 1)")
    study.add_argument("--seeds", type=int, default=None, metavar="N", help="how many seeds (default: the study's own)")
    study.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="where to leave the results (default evidence/)"
    )
    study.add_argument("--size", default="full", metavar="SIZE", help="full (default) or smoke (seconds, for tests)")
    study.add_argument("--fresh", action="store_true", help="start anew instead of resuming")
    study.set_defaults(command=_study)

    inspection.add(commands)
    merging.add(commands)
    _described(commands, "dash", "open the live pages in a browser (see orthokit dash --help)")
    runs = _described(commands, "runs", "list recorded training runs")
    runs.add_argument(
        "--root", type=Path, default=None, metavar="DIR", help="the run store (default $ORTHOKIT_RUNS or runs/)"
    )
    runs.set_defaults(command=_runs)

    ledger = _described(commands, "ledger", "print the claims of a report with their verdicts")
    ledger.add_argument("folder", nargs="?", type=Path, metavar="REPORT", help="a report folder (default: the newest)")
    ledger.set_defaults(command=_ledger)
    audit = _described(commands, "audit", "measure a saved adapter, of orthokit or PEFT, and name its known defects")
    audit.add_argument("folder", type=Path, metavar="DIR", help="with adapter.json, or PEFT's adapter_config.json")
    audit.add_argument("--json", action="store_true", help="print the report as JSON")
    audit.set_defaults(command=_audit)
    _described(commands, "doctor", "what is here, what is missing, and how to mend it")
    return parser


def _described(commands: argparse._SubParsersAction, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def _add_running(parser: argparse.ArgumentParser) -> None:
    """The options that report and run share."""
    parser.add_argument(
        "--size",
        default="laptop",
        metavar="SIZE",
        help="smoke (seconds), laptop (default) or gpu; given to every notebook",
    )
    parser.add_argument(
        "-p",
        "--parameter",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="set a notebook parameter; NOTEBOOK:NAME=VALUE for one notebook only; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="the report's folder (default reports/<date>)"
    )
    parser.add_argument(
        "--timeout", type=float, default=None, metavar="S", help="seconds each cell may take (default: any)"
    )
    parser.add_argument("--notebooks", type=Path, default=None, metavar="DIR", help="where the notebooks are")


def _report(options: argparse.Namespace) -> int:
    """Runs notebooks and prints where the index is."""
    from orthokit.reports.runner import report

    made = report(
        options.names,
        size=options.size,
        parameters=parameters(options.parameter),
        jobs=options.jobs,
        resume=options.resume,
        out=options.out,
        timeout=options.timeout,
        notebooks=options.notebooks,
    )
    print(made.index)
    return INTERRUPTED if made.interrupted else OK if made.ok else FAILED


def _run(options: argparse.Namespace) -> int:
    """Runs one notebook and prints where its page is."""
    from orthokit.reports.runner import report

    made = report(
        [options.name],
        size=options.size,
        parameters=parameters(options.parameter),
        out=options.out,
        timeout=options.timeout,
        notebooks=options.notebooks,
    )
    page = made.folder / f"{made.statuses[0].name}.html"
    print(page if page.is_file() else made.index)
    return INTERRUPTED if made.interrupted else OK if made.ok else FAILED


def _study(options: argparse.Namespace) -> int:
    """Runs a recorded study, or lists them."""
    from orthokit import studies

    if options.list:
        print("\n".join(studies.names()))
        return OK
    if options.name is None:
        raise OptionError(f"name a study: {', '.join(studies.names())}.")
    chosen = {name: getattr(options, name) for name in ("out", "seeds", "jobs", "size", "fresh")}
    print(studies.run(options.name, **chosen))
    return OK


def _dash(arguments: Sequence[str]) -> int:
    """Serves the live pages; they live in a package of their own."""
    try:
        from orthokit_widgets import serve
    except ImportError as cause:
        message = f"the live pages need {cause.name or 'panel'}: pip install 'orthokit[widgets]'."
        raise MissingExtraError(message) from cause
    return int(serve.main(list(arguments)) or OK)


def _runs(options: argparse.Namespace) -> int:
    """Prints the recorded runs as a table."""
    from orthokit import lab

    frame = lab.runs(options.root) if options.root is not None else lab.runs()
    print(frame.to_string(index=False) if len(frame) else "no runs recorded")
    return OK


def _ledger(options: argparse.Namespace) -> int:
    """Prints the claims of a report."""
    from orthokit.reports import ledger

    folder, found = ledger.load(options.folder, Path("reports"))
    print(f"{folder}\n")
    print(ledger.as_text(found))
    return OK


def _audit(options: argparse.Namespace) -> int:
    """Prints what is in a folder with an adapter; 1 when something in it is broken."""
    from orthokit.adapters.audit import audit

    found = audit(options.folder)
    print(found.to_json() if options.json else found)
    return OK if found.ok else FAILED


def _version() -> str:
    import orthokit

    return orthokit.__version__
