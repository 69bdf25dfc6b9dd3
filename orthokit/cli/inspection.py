"""``orthokit inspect``: the geometry of the matrices of a model file, alone or against its base."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthokit.cli.common import FAILED, INTERRUPTED, OK
from orthokit.errors import NothingMatchedWarning, OptionError, OrthokitError

if TYPE_CHECKING:
    from orthokit.diagnostics import Inspection, InspectionProgress

__all__ = ["add"]

# Of one page: more curves than this cannot be told apart.
_MOST = 4


def add(commands: argparse._SubParsersAction) -> None:
    """The command, with its options."""
    inspect = commands.add_parser(
        "inspect",
        help="measure the matrices of a model file, alone or against its base",
        description="Measures every matrix of a model: safetensors, GGUF, files of torch.save (weights only) or a "
        "folder. One parameter is in memory at a time; what was measured is remembered for files that stay the same.",
    )
    inspect.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a file or folder; up to four with --html"
    )
    inspect.add_argument("--base", type=Path, metavar="BASE", help="the model that it was trained from")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write a page with table and charts; up to 4 models")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured (one model)")
    inspect.add_argument("--csv", type=Path, metavar="FILE", help="write the table (one model)")
    inspect.add_argument("--sample", type=int, metavar="N", help="measure N matrices, evenly spread (default all)")
    inspect.add_argument(
        "--detail",
        choices=["spectrum", "norms"],
        default="spectrum",
        help="norms: only what a few passes tell, in seconds for files of any size (default spectrum)",
    )
    inspect.add_argument("--include", action="append", metavar="PATTERN", help="only names like this; may be repeated")
    inspect.add_argument("--exclude", action="append", metavar="PATTERN", help="not names like this; may be repeated")
    inspect.add_argument("--split-heads", type=int, metavar="N", help="take attention apart into N query heads")
    inspect.add_argument("--split-fused", action="store_true", help="take fused projections apart")
    inspect.add_argument("--rank", type=int, default=8, metavar="R", help="of the subspaces whose angles are taken")
    inspect.add_argument("--threads", type=int, metavar="N", help="matrices at a time (default: the cores)")
    inspect.add_argument("--quiet", action="store_true", help="print the summary and no table")
    inspect.add_argument(
        "--cache", action=argparse.BooleanOptionalAction, default=True, help="use and keep what was measured (default)"
    )
    inspect.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    """Measures the models and prints or writes what was found; 1 when a file cannot be read."""
    if len(options.models) > 1 and (options.json is not None or options.csv is not None):
        raise OptionError(f"--json and --csv take one model; got {len(options.models)}. Call it once for each.")
    if len(options.models) > _MOST:
        raise OptionError(f"a page compares at most {_MOST} models; got {len(options.models)}.")
    found: list[Inspection] = []
    try:
        for model in options.models:
            found.append(_measured(model, options))
            print(found[-1].summary() if options.quiet else found[-1])
            _print_rest(found[-1])
            if found[-1].interrupted:
                break
        _write(found, options)
    except OrthokitError as error:
        print(f"orthokit: {error}", file=sys.stderr)
        return FAILED
    return INTERRUPTED if found[-1].interrupted else OK


def _measured(model: Path, options: argparse.Namespace) -> Inspection:
    from orthokit.diagnostics import inspect

    terminal = sys.stderr.isatty()

    def show(at: InspectionProgress) -> None:
        print(f"\r\x1b[2K{at.line()}", end="", file=sys.stderr, flush=True)

    try:
        return _told(
            inspect,
            model,
            base=options.base,
            detail=options.detail,
            sample=options.sample,
            include=options.include,
            exclude=options.exclude,
            split_heads=options.split_heads,
            split_fused=options.split_fused or None,
            rank=options.rank,
            threads=options.threads,
            progress=show if terminal else None,
            cache=options.cache,
        )
    finally:
        if terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _told(inspect: Callable[..., Inspection], *arguments: Any, **options: Any) -> Inspection:
    """The call, with its warnings as sentences."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", NothingMatchedWarning)
        found = inspect(*arguments, **options)
    for warning in seen:
        print(f"orthokit: {warning.message}", file=sys.stderr)
    return found


def _print_rest(found: Inspection) -> None:
    """What the table does not say: the change as a whole, and what was not compared."""
    from orthokit.diagnostics import describe_changes

    if found.compared:
        for sentence in describe_changes(found.rows):
            print(sentence)
    for note in found.notes:
        print(f"Note: {note}.")
    for row in found.rows:
        if row["note"]:
            print(f"Note: {row['name']}: {row['note']}.")


def _write(found: list[Inspection], options: argparse.Namespace) -> None:
    if options.json is not None:
        print(found[0].to_json(options.json))
    if options.csv is not None:
        print(found[0].to_csv(options.csv))
    if options.html is not None:
        from orthokit.reports.inspection import inspection_page

        print(inspection_page(found, options.html))
