"""Which modules of the library a module imports: for tests of what the hash of a study covers."""

import ast
from pathlib import Path


def imports(path: Path, root: Path) -> set[Path]:
    """The modules of the library that a module imports when it loads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("orthokit"):
            base = root.joinpath(*node.module.split(".")[1:])
            names = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
            found |= {name for name in names if name.is_file()}
    return found
