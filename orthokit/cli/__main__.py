"""The command line as a module: ``python -m orthokit.cli``."""

import sys

from orthokit.cli import main

if __name__ == "__main__":
    sys.exit(main())
