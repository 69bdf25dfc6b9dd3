"""Notebook sources: where they are, which parameters they take, and a fingerprint of what a result depends on."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from orthokit.errors import ReportError, unknown_name
from orthokit.reports.notebook import version

__all__ = ["Parameter", "Source", "code_version", "find_notebooks", "notebooks_folder", "read_source", "select"]

PACKAGE = Path(__file__).resolve().parents[1]


def notebooks_folder() -> Path:
    """The checkout's ``notebooks/`` when orthokit runs from one, else the copies inside the installed package."""
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "notebooks").is_dir():
        return checkout / "notebooks"
    return PACKAGE / "_notebooks"


def find_notebooks(folder: Path | None = None) -> dict[str, Path]:
    """All notebooks of a folder, by name, in order.

    Args:
        folder: Where to look; default :func:`notebooks_folder`.

    Returns:
        Name (file name without ``.ipynb``) to path, sorted.

    Raises:
        ReportError: The folder does not exist or holds no notebook.
    """
    folder = folder or notebooks_folder()
    if not folder.is_dir():
        raise ReportError(f"there is no notebook folder {folder}; name one with --notebooks.")
    found = {path.stem: path for path in sorted(folder.glob("*.ipynb")) if not path.name.startswith((".", "_"))}
    if not found:
        raise ReportError(f"{folder} holds no notebook (*.ipynb); name another folder with --notebooks.")
    return found


def select(names: Sequence[str], folder: Path | None = None) -> dict[str, Path]:
    """The notebooks meant by ``names``: full names, unique beginnings such as ``02``, or paths of ``.ipynb`` files.

    Args:
        names: What was asked for; empty means all.
        folder: Where to look.

    Returns:
        Name to path, each notebook once.

    Raises:
        UnknownNameError: A name fits no notebook, or several.
    """
    if names and all(name.endswith(".ipynb") for name in names):
        paths = [Path(name).resolve() for name in names]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise ReportError(f"there is no notebook {missing[0]}.")
        return {path.stem: path for path in paths}
    known = find_notebooks(folder)
    chosen: dict[str, Path] = {}
    for name in names or known:
        if name in known:
            fits = [name]
        else:
            fits = [candidate for candidate in known if candidate.startswith(name.removesuffix(".ipynb"))]
        if len(fits) != 1:
            raise unknown_name("notebook", name, fits or known)
        chosen[fits[0]] = known[fits[0]]
    return chosen


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: ``steps: int = 200  # how long to train``."""

    name: str
    kind: str
    default: Any
    help: str = ""
    choices: tuple[Any, ...] = ()
    optional: bool = False

    def parse(self, text: str) -> Any:
        """The value that ``text`` from a command line stands for.

        Raises:
            ReportError: It does not fit the parameter's type.
        """
        if self.optional and text in ("None", "none", ""):
            return None
        try:
            value = _PARSERS[self.kind](text, self)
        except (ValueError, SyntaxError) as cause:
            wanted = {"bool": "true or false", "int": "a whole number", "float": "a number"}.get(self.kind, self.kind)
            raise ReportError(f"parameter {self.name} takes {wanted}; got {text!r}.") from cause
        return self.check(value)

    def check(self, value: Any) -> Any:
        """``value`` itself when its type and choice fit; a whole number also fits ``float``.

        Raises:
            ReportError: It does not fit.
        """
        if value is None and self.optional:
            return None
        kinds: dict[str, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float), "str": str}
        wanted = kinds.get(self.kind, list if self.kind.startswith("list") else object)
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.kind in ("int", "float")):
            raise ReportError(f"parameter {self.name} takes {self.kind}; got {value!r}.")
        if self.choices and value not in self.choices:
            raise unknown_name(f"value of parameter {self.name}", value, self.choices)
        return float(value) if self.kind == "float" and value is not None else value


@dataclass(frozen=True)
class Source:
    """A notebook before it runs."""

    name: str
    path: Path
    title: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    fingerprint: str = ""

    def resolve(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Checks values (text from a command line, or Python values) against the parameters cell.

        Args:
            values: Parameter name to value.

        Returns:
            The overrides with their right types.

        Raises:
            UnknownNameError: The notebook has no such parameter; the closest name is given.
            ReportError: A value has the wrong type.
        """
        resolved = {}
        for name, value in values.items():
            if name not in self.parameters:
                raise unknown_name(f"parameter of notebook {self.name}", name, self.parameters)
            parameter = self.parameters[name]
            resolved[name] = parameter.parse(value) if isinstance(value, str) else parameter.check(value)
        return resolved

    def key(self, values: Mapping[str, Any]) -> str:
        """What a result depends on: source, parameters, and the code of orthokit."""
        text = json.dumps([self.fingerprint, sorted(values.items()), code_version()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_source(path: Path) -> Source:
    """Reads a notebook's title, parameters and fingerprint.

    Args:
        path: The ``.ipynb`` file.

    Returns:
        The source.

    Raises:
        ReportError: The file is no notebook, or its parameters cell is not made of simple assignments.
    """
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as cause:  # nbformat raises its own, json's and the file system's errors
        raise ReportError(f"{path} cannot be read as a notebook: {cause}.") from cause
    parameters: dict[str, Parameter] = {}
    title = path.stem
    titled = False
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and not titled:
            heading = next((line for line in cell.source.splitlines() if line.startswith("# ")), None)
            if heading:
                title, titled = heading.removeprefix("# ").strip(), True
        if "parameters" in cell.metadata.get("tags", []):
            parameters = _read_parameters(cell.source, path)
    # Outputs and metadata such as timings are no part of a version; sources and tags are.
    cells = [[cell.cell_type, cell.source, sorted(cell.metadata.get("tags", []))] for cell in notebook.cells]
    fingerprint = hashlib.sha256(json.dumps(cells).encode()).hexdigest()
    return Source(path.stem, path, title, parameters, fingerprint)


@cache
def code_version() -> str:
    """The version number and a hash of the package's Python files: an edited checkout is another version."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode())
        digest.update(path.read_bytes())
    return f"{version()}+{digest.hexdigest()[:12]}"


def _read_parameters(source: str, path: Path) -> dict[str, Parameter]:
    """The assignments of a parameters cell with annotation, default and trailing comment."""
    try:
        tree = ast.parse(source)
    except SyntaxError as cause:
        raise ReportError(f"the parameters cell of {path} is not valid Python: {cause}.") from cause
    lines = source.splitlines()
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            name, annotation, value = node.target.id, node.annotation, node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, annotation, value = node.targets[0].id, None, node.value
        else:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # a docstring
            raise ReportError(
                f"the parameters cell of {path} may hold only assignments; line {node.lineno} is not one."
            )
        try:
            default = ast.literal_eval(value)
        except ValueError as cause:
            raise ReportError(f"the default of parameter {name} in {path} must be a plain value.") from cause
        comment = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :].partition("#")[2].strip()
        kind, choices, optional = _kind(annotation, default)
        found[name] = Parameter(name, kind, default, comment, choices, optional)
    return found


def _kind(annotation: ast.expr | None, default: Any) -> tuple[str, tuple[Any, ...], bool]:
    """``(kind, choices, optional)`` of an annotation such as ``int | None`` or ``Literal["a", "b"]``."""
    if annotation is None:
        kind = type(default).__name__
        return (kind if kind in _PARSERS else "value"), (), default is None
    parts = [part.strip().strip("\"'") for part in ast.unparse(annotation).split("|")]
    optional = "None" in parts or default is None
    parts = [part for part in parts if part != "None"]
    text = parts[0] if len(parts) == 1 else "value"
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        choices = ast.literal_eval(annotation.slice)
        choices = choices if isinstance(choices, tuple) else (choices,)
        return type(choices[0]).__name__, choices, optional
    if text.startswith(("list[", "tuple[")):
        return f"list[{text[text.index('[') + 1 : -1].split(',')[0]}]", (), optional
    return (text if text in _PARSERS else "value"), (), optional


def _boolean(text: str, _: Parameter) -> bool:
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _list(text: str, parameter: Parameter) -> list[Any]:
    """``[1, 2]`` or ``1,2``; the elements' type comes from the annotation or the default's first element."""
    inner = parameter.kind[5:-1] if parameter.kind.startswith("list[") else ""
    if not inner and parameter.default:
        inner = type(parameter.default[0]).__name__
    if text.lstrip().startswith(("[", "(")):
        items = list(ast.literal_eval(text))
    else:
        items = [item.strip() for item in text.split(",") if item.strip()]
    if inner not in ("bool", "int", "float", "str"):
        return [_anything(item, parameter) if isinstance(item, str) else item for item in items]
    return [_PARSERS[inner](str(item), parameter) for item in items]


def _anything(text: str, _: Parameter) -> Any:
    """A literal where it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class _Parsers(dict):
    """Parsers by kind; every ``list[...]`` goes to one."""

    def __missing__(self, kind: str) -> Any:
        return self["list"] if kind.startswith("list[") else self["value"]

    def __contains__(self, kind: object) -> bool:
        return super().__contains__(kind) or str(kind).startswith("list[")


_PARSERS = _Parsers(
    bool=_boolean,
    int=lambda text, _: int(text),
    float=lambda text, _: float(text),
    str=lambda text, _: text,
    list=_list,
    value=_anything,
)
