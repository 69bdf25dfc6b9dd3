"""Showing a chart: interactive where the front end can, a picture where it cannot, and never an error at display.

A PNG needs a Chrome or Chromium browser, which is looked for and not assumed.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import os
import shutil
import textwrap
import threading
from typing import Any

from orthokit.errors import MissingExtraError, OptionError, ReportError, unknown_name

__all__ = ["RENDERERS", "Shown", "browser_path", "figure_json", "png", "set_renderer", "show", "without_caption"]

PLOTLY = "application/vnd.plotly.v1+json"
RENDERERS = ("plotly", "plotly+png", "png")
CAPTION = "caption"
_BROWSERS = (
    "google-chrome",
    "google-chrome-stable",
    "chromium",
    "chromium-browser",
    "chrome",
    "msedge",
    "microsoft-edge",
    "brave-browser",
)
_APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
)
_CONFIG = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"scale": 2}}
_chosen: str | None = None
# One browser serves all pictures of this process; starting one takes seconds, a picture a fifth of one.
_server = threading.Lock()
_server_started = False


def browser_path() -> str | None:
    """The Chrome or Chromium that will draw PNGs: ``$BROWSER_PATH`` if set, else the first one found; or None."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if shutil.which(named) else None
    found = (shutil.which(name) for name in (*_BROWSERS, *_APPLICATIONS))
    return next((path for path in found if path), None)


def set_renderer(name: str | None) -> None:
    """Chooses how :func:`show` displays from now on.

    Args:
        name: ``"plotly"`` (interactive), ``"plotly+png"`` (interactive with a picture for viewers that run no scripts)
            or ``"png"``. None returns to ``$ORTHOKIT_RENDERER`` or, without it, ``"plotly"``.

    Raises:
        UnknownNameError: Another name.
    """
    global _chosen
    if name is not None and name not in RENDERERS:
        raise unknown_name("renderer", name, RENDERERS)
    _chosen = name


def show(fig: dict[str, Any], *, renderer: str | None = None) -> Shown:
    """A chart as a notebook shows it, with its caption beneath; make it the last line of a cell.

    Args:
        fig: What a function of :mod:`orthokit.figures` returned.
        renderer: One of :data:`RENDERERS` for this chart only.

    Returns:
        An object the notebook displays.

    Raises:
        OptionError: ``fig`` is not a figure dictionary.

    Example:
        >>> from orthokit.figures import scalar_history
        >>> print(show(scalar_history({"a": ([0, 1], [2.0, 1.0])}, ylabel="loss")))
        How does the loss change while training?
        a: from 2 to 1 over 1 steps.
    """
    if renderer is not None and renderer not in RENDERERS:
        raise unknown_name("renderer", renderer, RENDERERS)
    if not isinstance(fig, dict) or not {"data", "layout"} <= fig.keys():
        raise OptionError("fig must be a figure dictionary with 'data' and 'layout', as orthokit.figures makes them.")
    return Shown(fig, renderer=renderer)


def png(fig: dict[str, Any], *, width: int = 900, height: int | None = None, scale: float | int = 1.5) -> bytes:
    """The chart as a PNG picture.

    Args:
        fig: A figure dictionary.
        width: Width in CSS pixels. Default 900.
        height: Height in CSS pixels; the figure's own by default.
        scale: Device pixels per CSS pixel.

    Returns:
        The bytes of the file.

    Raises:
        MissingExtraError: kaleido is not installed.
        ReportError: No Chrome or Chromium was found, or it did not draw.

    Numerics:
        The first picture starts a browser (some seconds), each further one takes about 0.2 s.
    """
    global _server_started
    try:
        import kaleido
    except ImportError as cause:
        raise MissingExtraError("a PNG needs kaleido: pip install 'orthokit[notebooks]'.") from cause
    path = browser_path()
    if path is None:
        raise ReportError(
            "a PNG needs Chrome or Chromium and none was found; install one, or set BROWSER_PATH to its program."
        )
    size = {"width": width, "height": height or fig["layout"].get("height", 440), "scale": scale}
    options = {"format": "png", **size}
    with _server:
        try:
            if not _server_started:
                # mathjax=False: it would be fetched from the network, and no chart here uses it.
                page = kaleido.PageGenerator(mathjax=False)
                kaleido.start_sync_server(path=path, page_generator=page, silence_warnings=True)
                _server_started = True
            drawn = kaleido.calc_fig_sync({"data": fig["data"], "layout": fig["layout"]}, opts=options)
        except Exception as cause:
            raise ReportError(f"the browser {path} did not draw the picture: {cause}") from cause
    return bytes(drawn)


def figure_json(fig: dict[str, Any], *, caption: bool = True) -> dict[str, Any]:
    """The figure as front ends take it, with the caption written under the plot unless ``caption=False``.

    JupyterLab shows one kind of output per cell result, so a caption that is to be read has to be part of the plot.
    """
    layout = dict(fig["layout"])
    text = (layout.get("meta") or {}).get("caption")
    if caption and text:
        lines = textwrap.wrap(text, 100)
        margin = dict(layout.get("margin", {}))
        bottom = margin.get("b", 60)
        extra = 18 * len(lines) + 12
        margin["b"] = bottom + extra
        layout["margin"] = margin
        layout["height"] = layout.get("height", 440) + extra
        note = {
            "name": CAPTION,
            "text": "<br>".join(lines),
            "xref": "paper",
            "yref": "paper",
            "x": 0,
            "xanchor": "left",
            "y": 0,
            "yanchor": "top",
            "yshift": -bottom,
            "align": "left",
            "showarrow": False,
            "font": {"size": 12.5, "color": "#57606A"},
        }
        layout["annotations"] = [*layout.get("annotations", []), note]
    return {"data": fig["data"], "layout": layout, "config": _CONFIG}


def without_caption(fig: dict[str, Any]) -> dict[str, Any]:
    """The figure that :func:`figure_json` was given: caption, its margin and its height taken away again."""
    layout = copy.copy(fig["layout"])
    notes = layout.get("annotations", [])
    captions = [note for note in notes if note.get("name") == CAPTION]
    if captions:
        extra = 18 * (captions[0]["text"].count("<br>") + 1) + 12
        layout["annotations"] = [note for note in notes if note.get("name") != CAPTION]
        layout["margin"] = {**layout["margin"], "b": layout["margin"]["b"] - extra}
        layout["height"] = layout["height"] - extra
    return {"data": fig["data"], "layout": layout}


class Shown:
    """A chart that displays itself in a notebook."""

    def __init__(self, fig: dict[str, Any], *, renderer: str | None = None) -> None:
        """Holds the figure; nothing is drawn before a front end asks."""
        self.figure = fig
        self.renderer = renderer

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The representations a front end chooses from. A missing browser leaves the picture out, silently."""
        chosen = self.renderer or _chosen or os.environ.get("ORTHOKIT_RENDERER") or "plotly"
        if chosen not in RENDERERS:
            chosen = "plotly"
        full = figure_json(self.figure)
        bundle: dict[str, Any] = {"text/plain": str(self)}
        if "png" in chosen and browser_path():
            # A picture is an extra: a browser that fails must not take the chart away with it.
            with contextlib.suppress(ReportError, MissingExtraError):
                bundle["image/png"] = base64.b64encode(png(full)).decode("ascii")
        if "plotly" in chosen or "image/png" not in bundle:
            bundle[PLOTLY] = full
        return bundle

    def __str__(self) -> str:
        """Title and caption."""
        layout = self.figure["layout"]
        title = layout.get("title", "")
        title = title.get("text", "") if isinstance(title, dict) else title
        caption = (layout.get("meta") or {}).get("caption", "")
        return f"{title.replace('<br>', ' ')}\n{caption}".strip()

    __repr__ = __str__
