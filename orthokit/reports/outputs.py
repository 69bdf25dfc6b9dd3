"""What cells put out, as HTML: charts, tables, pictures, text, errors."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

from orthokit.figures import without_caption
from orthokit.figures.display import PLOTLY
from orthokit.reports.markdown import math_html, to_html

__all__ = ["Charts", "highlight", "output_html", "plain_text", "style_sheets"]

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
# Noise of the machinery, not of the notebook.
_NOISE = re.compile(r"[^\n]*(?:running over TCP without encryption|frozen modules are being used)[^\n]*\n?")
_STYLES = {"light": "friendly", "dark": "github-dark"}


class Charts:
    """Gives the charts of a page their ids and remembers whether the page needs plotly.js."""

    def __init__(self) -> None:
        """No chart yet."""
        self.count = 0

    def figure(self, figure: dict[str, Any], picture: str | None = None) -> str:
        """A chart with its title as a heading and its caption beneath; both are HTML, so they wrap on any screen."""
        self.count += 1
        name = f"chart-{self.count}"
        bare = without_caption(figure)
        layout = dict(bare["layout"])
        meta = layout.get("meta") or {}
        caption = meta.get("caption", "") if isinstance(meta, dict) else ""
        title = layout.get("title") or ""
        title = title.get("text", "") if isinstance(title, dict) else str(title)
        if title:
            layout.pop("title", None)
            margin = dict(layout.get("margin") or {})
            # The room the title took: the chart keeps its own height below the heading.
            room = 24 * (title.count("<br>") + 1)
            if margin.get("t", 0) > room:
                margin["t"] -= room
                layout["margin"] = margin
                if "height" in layout:
                    layout["height"] -= room
        words = re.sub(r"\s*<br\s*/?>\s*", " ", title)
        # "</" would end the script element early; "<\\/" is the same string to JSON.
        data = json.dumps({"data": bare["data"], "layout": layout}, separators=(",", ":")).replace("</", "<\\/")
        height = layout.get("height", 440)
        parts = [f'<figure class="chart" aria-labelledby="{name}-title" aria-describedby="{name}-caption">']
        parts.append(f'<p class="chart-title" id="{name}-title">{html.escape(words) or "Chart"}</p>')
        parts.append(f'<div class="plot" id="{name}" style="height:{height}px"></div>')
        parts.append(f'<script type="application/json" data-for="{name}">{data}</script>')
        if picture:
            alt = html.escape(f"{words} {caption}".strip())
            parts.append(f'<noscript><img alt="{alt}" src="data:image/png;base64,{picture}"></noscript>')
        parts.append(f'<figcaption id="{name}-caption">{html.escape(caption)}</figcaption></figure>')
        return "".join(parts)


def output_html(output: Any, charts: Charts) -> str:
    """One output of a cell as HTML; the richest form that needs no network wins."""
    kind = output.output_type
    if kind == "stream":
        text = _NOISE.sub("", plain_text(output.text))
        if not text.strip():
            return ""
        block = f'<pre class="stream">{html.escape(text.rstrip())}</pre>'
        if output.name == "stderr":
            return f'<details class="messages"><summary>messages</summary>{block}</details>'
        return block
    if kind == "error":
        trace = plain_text("\n".join(output.traceback))
        name = html.escape(f"{output.ename}: {plain_text(output.evalue)}")
        body = f"<details><summary>traceback</summary><pre>{html.escape(trace)}</pre></details>"
        return f'<div class="error"><p><strong>{name}</strong></p>{body}</div>'
    return next(_rich(output.data, charts), "")


def plain_text(text: str | list[str]) -> str:
    """Text without terminal colours and cursor movements."""
    return _ANSI.sub("", "".join(text) if isinstance(text, list) else text)


def highlight(code: str, language: str = "python") -> str:
    """Code with its syntax coloured by classes, which the style sheets of both themes define."""
    from pygments import highlight as colour
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name("ipython3" if language == "python" else language)
    except ClassNotFound:
        lexer = get_lexer_by_name("text")
    return colour(code, lexer, HtmlFormatter(cssclass="code"))


def style_sheets() -> dict[str, str]:
    """Syntax colours for the light and the dark theme."""
    from pygments.formatters import HtmlFormatter

    return {theme: str(HtmlFormatter(style=style).get_style_defs(".code")) for theme, style in _STYLES.items()}


def _rich(data: dict[str, Any], charts: Charts) -> Iterator[str]:
    """The HTML forms of a display bundle, best first."""
    if PLOTLY in data:
        yield charts.figure(data[PLOTLY], data.get("image/png"))
    if "text/html" in data and "application/vnd.jupyter.widget-view+json" not in data:
        yield f'<div class="wide">{_join(data["text/html"])}</div>'
    if "image/svg+xml" in data:
        yield f'<div class="wide">{_join(data["image/svg+xml"])}</div>'
    alt = html.escape(plain_text(data.get("text/plain", "picture")))
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            yield f'<img class="picture" alt="{alt}" src="data:{kind};base64,{_join(data[kind]).strip()}">'
    if "text/markdown" in data:
        yield to_html(_join(data["text/markdown"]))
    if "text/latex" in data:
        yield math_html(_join(data["text/latex"]).strip().strip("$"), block=True)
    if "text/plain" in data:
        yield f'<pre class="result">{html.escape(plain_text(data["text/plain"]))}</pre>'


def _join(value: str | list[str]) -> str:
    return "".join(value) if isinstance(value, list) else value
