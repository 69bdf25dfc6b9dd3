"""The pages inside JupyterLab, in a real browser: shown by a cell, and by the preview of Panel files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PAGES = Path(__file__).resolve().parents[2] / "widgets" / "orthokit_widgets"
PREPARE = "import orthokit_widgets as widgets\nwidgets.notebook()"
CELLS = {
    "momentum": "widgets.momentum_page(size=40)",
    "training": "widgets.training_page(model='cnn', data='digits', steps=40, budget=0.5)",
}


@pytest.fixture(scope="module")
def lab(started: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a JupyterLab over a folder with two notebooks and the files of the pages."""
    folder = tmp_path_factory.mktemp("lab")
    for name, cell in CELLS.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (PREPARE, cell)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name}.ipynb")
    for name in ("app_momentum.py", "app_training.py"):
        (folder / name).write_text((PAGES / name).read_text())
    own = {f"JUPYTER_{kind}_DIR": str(folder / f".{kind.lower()}") for kind in ("CONFIG", "DATA", "RUNTIME")}
    command = ["-m", "jupyterlab", "--no-browser", "--ServerApp.port=0", "--ServerApp.token=", "--ServerApp.password="]
    command += ["--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={folder}", "--allow-root"]
    command += ["--ServerApp.jpserver_extensions={'panel.io.jupyter_server_extension': True}"]
    own["ORTHOKIT_RUNS"] = str(folder / "runs")
    line = started(command, folder / "log.txt", "http://127.0.0.1:", env=own)
    port = line.split("http://127.0.0.1:")[1].split("/")[0]
    return f"http://127.0.0.1:{port}/"


def data(page: Any, question: str) -> list[dict[str, Any]]:
    plot = page.get_by_role("figure", name=question).locator(".js-plotly-plot")
    return plot.evaluate("e => e.data.map(t => ({name: t.name, y: [...t.y]}))")


def move_and_see(page: Any) -> None:
    """A key on the slider changes the bars."""
    question = "Does the signal stand out"
    page.get_by_role("figure", name=question).locator(".main-svg").first.wait_for()
    before = data(page, question)[0]["y"]
    page.get_by_label("Momentum β").focus()
    page.keyboard.press("ArrowLeft")
    handle = page.get_by_role("figure", name=question).locator(".js-plotly-plot").element_handle()
    page.wait_for_function(f"e => e.data[0].y[0] !== {before[0]}", arg=handle)


def run_all(page: Any, lab: str, name: str) -> None:
    """Open a notebook and run its cells from the menu."""
    page.goto(f"{lab}lab/tree/{name}.ipynb?reset")
    page.locator(".jp-Notebook .jp-Cell").nth(1).wait_for()
    page.get_by_role("button", name="Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def test_a_page_shows_in_a_cell_and_answers(watched: Any, lab: str) -> None:
    run_all(watched, lab, "momentum")
    watched.get_by_role("heading", name="Momentum gap").wait_for()
    watched.get_by_text("Up to date.").wait_for()
    move_and_see(watched)
    # The address belongs to JupyterLab.
    assert "beta" not in watched.url


def test_a_training_runs_and_stops_in_a_cell(watched: Any, lab: str) -> None:
    run_all(watched, lab, "training")
    watched.get_by_role("button", name="Start", exact=True).click()
    watched.get_by_text("Finished all 40 steps.").wait_for()
    loss = watched.get_by_role("figure", name="How fast does the loss fall").locator(".js-plotly-plot")
    watched.wait_for_function("e => e.data && e.data[0].x.length === 40", arg=loss.element_handle())


def test_the_file_of_a_page_shows_in_the_preview(watched: Any, lab: str) -> None:
    watched.goto(f"{lab}panel-preview/render/app_momentum.py?size=40")
    watched.get_by_role("heading", name="Momentum gap").wait_for()
    watched.get_by_text("Up to date.").wait_for()
    move_and_see(watched)
    # The preview's own page has no icon.
    watched.errors[:] = [error for error in watched.errors if "favicon.ico" not in error]
