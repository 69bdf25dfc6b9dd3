"""List the benchmarks, or run some or all of them: ``python -m benchmarks [NAMES] [OPTIONS]``."""

import difflib
import importlib
import pkgutil
import sys
from pathlib import Path

from benchmarks.harness import parser

NOT_BENCHMARKS = {"harness", "__main__"}


def names() -> list[str]:
    """The modules of this folder that are benchmarks."""
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(set(found) - NOT_BENCHMARKS)


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 0 when all of it ran, 2 when a name is unknown."""
    known = names()
    options = parser(__doc__)
    options.add_argument("names", nargs="*", help=f"some of {', '.join(known)}; default all")
    options.add_argument("--list", action="store_true", help="only list them")
    given = options.parse_args(arguments)
    for name in given.names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            print(f"unknown benchmark {name!r}{hint} Known: {', '.join(known)}.", file=sys.stderr)
            return 2
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in given.names or known}
    if given.list:
        for name, module in modules.items():
            print(f"{name:16s}{(module.__doc__ or '').strip().splitlines()[0]}")
        return 0
    passed = [f"--threads={given.threads}"]
    passed += [f"--rounds={given.rounds}"] if given.rounds is not None else []
    passed += [f"--label={given.label}"] if given.label else []
    passed += [flag for flag, on in (("--quick", given.quick), ("--save", given.save)) if on]
    for i, module in enumerate(modules.values()):
        if i:
            print()
        module.main(passed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
