"""An executed notebook as one HTML page that needs nothing else: charts, formulas and styles are inside."""

from __future__ import annotations

import base64
import html
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from orthokit.errors import MissingExtraError, OrthokitError, ReportError
from orthokit.figures import browser_path, png
from orthokit.figures.display import PLOTLY
from orthokit.reports.markdown import to_html
from orthokit.reports.notebook import duration, version
from orthokit.reports.outputs import Charts, highlight, output_html, style_sheets
from orthokit.reports.status import Folder, Status

__all__ = ["add_pictures", "device_line", "first_picture", "render", "save_notebook", "write_page", "write_text"]

_LABELS = {"injected-parameters": "parameters of this run", "parameters": "parameters and their defaults"}


def render(notebook: Any, status: Status) -> str:
    """The page of an executed notebook.

    Args:
        notebook: The executed notebook.
        status: Its record, for the header and the banner.

    Returns:
        A complete HTML document.
    """
    charts = Charts()
    states = {cell["index"]: cell for cell in status.cells}
    body = []
    heading = None
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            source = cell.source
            if heading is None and source.lstrip().startswith("# "):
                heading = True
            body.append(f'<section class="text">{to_html(source)}</section>')
        elif cell.cell_type == "code" and (cell.source.strip() or cell.get("outputs")):
            body.append(_code_cell(cell, states.get(position), charts))
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=status.title or status.name,
            titled=heading is not None,
            stopped=any(cell["state"] in _ENDED for cell in status.cells),
            status=status,
            took=duration(status.seconds) if status.seconds is not None else "",
            body="\n".join(body),
            plotly=_plotly_js() if charts.count else "",
            styles=style_sheets(),
            version=version(),
        )
    )


def write_page(folder: Folder, status: Status, notebook: Any) -> None:
    """Renders and stores the page; a notebook that cannot be rendered still gets one that says so."""
    try:
        text = render(notebook, status)
    except Exception as error:  # a page that fails to render must not take the report with it
        reason = html.escape(f"{type(error).__name__}: {error}")
        text = f"<!doctype html><meta charset=utf-8><title>{status.name}</title><p>This page was not rendered: {reason}"
        if status.state == "ok":
            status.state, status.reason = "failed", f"its page could not be rendered: {error}"
    write_text(folder.page(status.name), text)


def save_notebook(path: Path, notebook: Any) -> None:
    """Stores a notebook so that a reader never sees half of it."""
    import nbformat

    write_text(path, nbformat.writes(notebook))


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as cause:
        beside.unlink(missing_ok=True)
        raise ReportError(f"cannot write {path}: {cause.strerror or cause}.") from cause


def add_pictures(notebook: Any) -> int:
    """Gives every chart a PNG for viewers that run no scripts, if a browser is here to draw it.

    Returns:
        How many pictures were added; 0 without a browser.
    """
    if browser_path() is None:
        return 0
    added = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY in data and "image/png" not in data:
                try:
                    data["image/png"] = base64.b64encode(png(json.loads(json.dumps(data[PLOTLY])))).decode("ascii")
                except (ReportError, MissingExtraError, OrthokitError):
                    return added  # the first failure speaks for all: no browser that works
                added += 1
    return added


def first_picture(path: Path) -> str:
    """The first PNG among a notebook's outputs, in base64; empty when there is none."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return ""
    for cell in cells:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                return "".join(picture).strip()
    return ""


def device_line(notebook: Any) -> str:
    """What the notebook's set-up line says about the device; empty when there is no such line."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("output_type") == "stream":
                for line in "".join(output.get("text", "")).splitlines():
                    if line.startswith("device: "):
                        return line.removeprefix("device: ").split(" · ")[0]
    return ""


@cache
def environment() -> Any:
    """The templates of this package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Everything is escaped unless a template says |safe, which it does for HTML that was made here.
    loader = PackageLoader("orthokit.reports", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["duration"] = lambda seconds: duration(seconds) if seconds is not None else ""
    return made


def _code_cell(cell: Any, state: dict[str, Any] | None, charts: Charts) -> str:
    """Code behind a "show code" switch, then what it put out."""
    outputs = "".join(output_html(output, charts) for output in cell.get("outputs", []))
    tags = set(cell.metadata.get("tags", []))
    ended = (state or {}).get("state", "")
    broken = ended in ("failed", "timeout", "interrupted")
    label = next((label for tag, label in _LABELS.items() if tag in tags), "code")
    seconds = (state or {}).get("seconds")
    timing = f' <span class="seconds">{duration(seconds)}</span>' if seconds and seconds >= 1 else ""
    opened = " open" if broken else ""
    code = f'<details class="source"{opened}><summary>{label}{timing}</summary>{highlight(cell.source)}</details>'
    banner = f'<p class="cell-banner">This cell {_ENDED[ended]}.</p>' if broken else ""
    anchor = ' id="stopped-here"' if broken else ""
    hidden = ended == "not run"
    if hidden:
        banner = '<p class="not-run">This cell did not run.</p>'
    return f'<section class="cell"{anchor}>{code}{banner}{outputs}</section>'


_ENDED = {"failed": "failed", "timeout": "took longer than allowed", "interrupted": "was interrupted"}


@cache
def _plotly_js() -> str:
    """plotly.js itself, made safe to stand inside a script element."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")
