"""Rules that hold for the whole tree. Each is a function from text to violations, itself tested on a bad sample."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("orthokit", "widgets/orthokit_widgets")
MAX_MODULE_LINES, MAX_CELL_LINES, MEDIAN_CELL_LINES, MAX_DEF_LINES = 400, 20, 5, 8
SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:", "Example:", "Numerics:", "References:")
# What `import orthokit` may load besides torch and einops themselves.
LIGHT = {"jaxtyping", "wadler_lindig", "typing_extensions", "numpy", "safetensors", "einops", "torch", "orthokit"}
# Written with a bracket so that no pattern finds itself here.
UNFINISHED = re.compile(r"\b(TO[D]O|FIX[M]E|X[X]X|HAC[K])\b")
MACHINE_PATHS = re.compile(
    r"(?<![\w.$}/:-])(/[w]ork|/[t]mp|/[r]oot|/[h]ome/\w+|/[U]sers/\w+)(?=[/\s\"'`),:;]|$)|\.\./[s]hared\b"
)
REGISTRIES = re.compile(
    r"pyp[i]\.org|pythonhoste[d]\.org|npmj[s]\.(?:org|com)|deb[.]debian\.org|download[.]pytorch\.org"
)
# Binder reads no pip settings of ours: its file names the index of torch's CPU build, and so may the README.
MAY_NAME_AN_INDEX = {"binder/environment.yml", "README.md"}


def project_files() -> list[Path]:
    """Every file that is, or is about to be, part of the project."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    # no repository, as in an unpacked archive: everything but what tools and runs leave behind
    made = {".git", ".venv", "reports", "runs", "dist", "build", ".hypothesis", ".pytest_cache", ".ruff_cache"}
    inside = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [ROOT / path for path in inside if path.parts[0] not in made and "__pycache__" not in path.parts]


FILES = project_files()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules() -> list[Path]:
    return [path for path in FILES if path.suffix == ".py" and name_of(path).startswith(LIBRARY)]


def texts() -> list[tuple[str, str]]:
    """``(name, content)`` of every text file that people wrote; the data files are other people's words."""
    found = []
    for path in FILES:
        name = name_of(path)
        if not name.startswith("orthokit/assets/") and name != "LICENSE":
            try:
                found.append((name, path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue  # an image or an archive
    return found


def notebooks() -> list[tuple[str, dict]]:
    return [(name_of(path), json.loads(path.read_text())) for path in FILES if path.suffix == ".ipynb"]


def report(violations: list[str]) -> None:
    assert not violations, f"{len(violations)} found:\n" + "\n".join(violations)


def lines_matching(pattern: re.Pattern, name: str, text: str) -> list[str]:
    return [
        f"{name}:{number}: {found.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for found in pattern.finditer(line)
    ]


def asserts(name: str, source: str) -> list[str]:
    return [f"{name}:{node.lineno}: assert" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def public_definitions(tree: ast.Module, *, methods: bool):
    """Public functions and classes of a module, and with ``methods`` the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef) and methods:
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


def described_elsewhere(node: ast.AST) -> bool:
    """Setters and overloads are described at the getter and the implementation, the last three by torch."""
    marks = {getattr(mark, "attr", getattr(mark, "id", "")) for mark in getattr(node, "decorator_list", [])}
    return bool(marks & {"setter", "overload"}) or getattr(node, "name", "") in {"forward", "backward", "setup_context"}


def docstrings(name: str, source: str) -> list[str]:
    """Missing docstrings, and sections that stand in another order than the house's."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [f"{name}:1: the module has no docstring"]
    private = name.rsplit("/", 1)[-1].startswith("_") and not name.endswith("__init__.py")
    for label, node in public_definitions(tree, methods=not private):
        text = ast.get_docstring(node)
        if not text and described_elsewhere(node):
            continue
        if not text:
            found.append(f"{name}:{node.lineno}: {label} has no docstring")
            continue
        sections = [line.strip() for line in text.splitlines() if line.strip() in SECTIONS]
        if sections != sorted(sections, key=SECTIONS.index):
            found.append(f"{name}:{node.lineno}: {label} has its sections as {' '.join(sections)}")
        elif "Args:" in sections and not text.splitlines()[0].strip():
            found.append(f"{name}:{node.lineno}: {label} does not open with one line")
    return found


def notebook_form(name: str, content: dict) -> list[str]:
    """Outputs, missing parameters cell, traces of a run."""
    found = []
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    if any(cell.get("outputs") or cell.get("execution_count") for cell in code):
        found.append(f"{name}: carries outputs or execution counts")
    tagged = [cell for cell in code if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        found.append(f"{name}: {len(tagged)} cells tagged parameters instead of one")
    if any("papermill" in part.get("metadata", {}) for part in (content, *content["cells"])):
        found.append(f"{name}: carries papermill's record of a run")
    return found


def notebook_style(name: str, content: dict) -> list[str]:
    """Long cells, long functions, and code that belongs in the library."""
    found = []
    sources = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    lengths = [len(source.strip().splitlines()) for source in sources]
    if max(lengths) > MAX_CELL_LINES:
        found.append(f"{name}: a code cell of {max(lengths)} lines; at most {MAX_CELL_LINES}")
    if statistics.median(lengths) > MEDIAN_CELL_LINES:
        found.append(
            f"{name}: the median code cell has {statistics.median(lengths)} lines; at most {MEDIAN_CELL_LINES}"
        )
    for source in sources:
        plain = "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_DEF_LINES:
                found.append(f"{name}: def {node.name} has more than {MAX_DEF_LINES} lines")
            if isinstance(node, ast.Attribute) and node.attr == "backward":
                found.append(f"{name}: a training loop in a cell (backward)")
    return found


def test_modules_are_short():
    limit = MAX_MODULE_LINES
    report(
        [
            f"{name_of(path)}: {lines} lines; at most {limit}"
            for path in FILES
            if path.suffix == ".py"
            and not name_of(path).startswith("tests/")
            and (lines := len(path.read_text().splitlines())) > limit
        ]
    )


def test_the_library_raises_errors_instead_of_asserting():
    report([found for path in modules() for found in asserts(name_of(path), path.read_text())])


def test_nothing_is_left_unfinished():
    report([found for name, text in texts() for found in lines_matching(UNFINISHED, name, text)])


def test_no_file_names_a_path_of_somebodys_machine():
    report([found for name, text in texts() for found in lines_matching(MACHINE_PATHS, name, text)])


def test_no_file_names_a_package_registry():
    allowed = {name for name, _ in texts()} - MAY_NAME_AN_INDEX
    report([found for name, text in texts() if name in allowed for found in lines_matching(REGISTRIES, name, text)])


def test_everything_public_has_a_docstring_with_its_sections_in_order():
    report([found for path in modules() for found in docstrings(name_of(path), path.read_text())])


def test_notebooks_carry_no_outputs_and_take_parameters():
    report([found for name, content in notebooks() for found in notebook_form(name, content)])


def test_notebooks_keep_to_short_cells():
    report([found for name, content in notebooks() for found in notebook_style(name, content)])


def test_there_is_a_library_and_a_page_package_to_check():
    """The rules above must not pass because they looked at nothing."""
    names = {name_of(path) for path in modules()}
    assert {"orthokit/errors.py", "orthokit/device.py", "widgets/orthokit_widgets/__init__.py"} <= names
    assert "Makefile" in dict(texts())


@pytest.mark.parametrize(
    ("rule", "sample"),
    [
        (asserts, "def f(x):\n    assert x\n"),
        (docstrings, "def f(x):\n    return x\n"),
        (docstrings, '"""M."""\nclass A:\n    """A."""\n    def f(self):\n        return 1\n'),
        (
            docstrings,
            '"""M."""\ndef f(x):\n    """One.\n\n    Returns:\n        x\n\n    Args:\n        x: y\n    """\n',
        ),
        (lambda n, t: lines_matching(UNFINISHED, n, t), "x = 1  # TO" + "DO later"),
        (lambda n, t: lines_matching(MACHINE_PATHS, n, t), "open('/ho" + "me/ann/data.csv')"),
        (lambda n, t: lines_matching(MACHINE_PATHS, n, t), '"/wo' + 'rk/main/x"'),
        (lambda n, t: lines_matching(MACHINE_PATHS, n, t), "see ../sha" + "red/notes"),
        (lambda n, t: lines_matching(REGISTRIES, n, t), "https://pyp" + "i.org/simple"),
    ],
)
def test_each_rule_finds_its_violation(rule, sample):
    assert rule("sample", sample)


def cell(source: str, *, tags=(), outputs=()) -> dict:
    return {
        "cell_type": "code",
        "source": source,
        "metadata": {"tags": list(tags)},
        "outputs": list(outputs),
        "execution_count": None,
    }


def test_a_clean_notebook_passes_and_each_fault_is_found():
    clean = {"metadata": {}, "cells": [cell("steps: int = 10", tags=["parameters"]), cell("print(steps)")]}
    assert notebook_form("n", clean) == notebook_style("n", clean) == []
    faults = {
        "carries outputs": [cell("1", tags=["parameters"], outputs=[{"output_type": "stream"}])],
        "0 cells tagged": [cell("print(1)")],
    }
    for words, cells in faults.items():
        assert words in " ".join(notebook_form("n", {"metadata": {}, "cells": cells}))
    assert "record of a run" in " ".join(notebook_form("n", {**clean, "metadata": {"papermill": {}}}))
    assert "lines; at most" in " ".join(notebook_style("n", {"cells": [cell("x = 1\n" * 21)]}))
    assert "def f" in " ".join(notebook_style("n", {"cells": [cell("def f():\n" + "    x = 1\n" * 9)]}))
    assert "training loop" in " ".join(notebook_style("n", {"cells": [cell("loss.backward()")]}))


def test_imports_point_only_downwards():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_importing_orthokit_loads_torch_and_einops_and_nothing_heavier():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import orthokit;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = {name for name in done.stdout.split() if not name.startswith("_")}
    assert "orthokit" in loaded
    assert loaded - sys.stdlib_module_names <= LIGHT
