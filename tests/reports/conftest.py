"""Tiny notebooks, made on the spot; they import nothing heavy, so that a kernel is all they cost."""

import io
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FINISH = """
import json, os
record = {"format": 1, "claims": [], "numbers": {}}
open(os.environ["ORTHOKIT_METRICS"], "w").write(json.dumps(record))
"""


@pytest.fixture
def sources(tmp_path) -> Path:
    """An empty folder for notebooks; reports go beside it."""
    folder = tmp_path / "sources"
    folder.mkdir()
    return folder


@pytest.fixture
def make(sources):
    """Writes a notebook: ``make("name", "code", ..., parameters="steps: int = 3", finish=True)``."""

    def write(name, *cells, parameters="", finish=True, title=None, markdown=()):
        notebook = new_notebook()
        notebook.cells = [new_markdown_cell(f"# {title or name}"), *(new_markdown_cell(text) for text in markdown)]
        if parameters:
            notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        notebook.cells += [new_code_cell(source) for source in cells]
        if finish:
            notebook.cells.append(new_code_cell(FINISH))
        path = sources / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


@pytest.fixture
def run(sources, tmp_path, monkeypatch):
    """Runs a report of the made notebooks; the version is pinned, as another may be edited while the tests run."""
    from orthokit.reports import runner
    from orthokit.reports import sources as source_module

    monkeypatch.delenv("ORTHOKIT_RUNS", raising=False)
    monkeypatch.setattr(source_module, "code_version", lambda: "test")
    monkeypatch.setattr(runner, "code_version", lambda: "test")

    def go(*names, **options):
        options.setdefault("out", tmp_path / "report")
        log = io.StringIO()
        made = runner.report(names, notebooks=sources, stream=log, **options)
        made.log = log.getvalue()
        return made

    return go
