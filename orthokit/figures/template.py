"""One look for every chart: colours that survive colour blindness and grey printing, axes with units, room for labels.

A chart is a plain dictionary ``{"data": [...], "layout": {...}}`` that Plotly understands and JSON can hold. The
title asks a question; the caption, one sentence computed from the data, answers it and lies in
``layout["meta"]["caption"]``, so that a notebook, a page and a report can each put it where it reads best.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any, TypeAlias

import numpy as np

__all__ = ["COLOURS", "DASHES", "DIVERGING", "FONT", "SEQUENTIAL", "SYMBOLS", "TEMPLATE", "Number"]

Number: TypeAlias = float | int | np.number

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", Arial, sans-serif'

# Okabe and Ito's palette without its yellow, which vanishes on white; grey replaces black so dark pages can show it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A")
# Colour is never the only carrier: line n differs from its neighbours in dash and marker too.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
GUIDE = "#8A8F98"

_CIVIDIS = [
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
]
SEQUENTIAL = [[round(i / (len(_CIVIDIS) - 1), 4), colour] for i, colour in enumerate(_CIVIDIS)]
DIVERGING = [
    [0.0, "#2166ac"],
    [0.2, "#67a9cf"],
    [0.4, "#d1e5f0"],
    [0.5, "#f7f7f7"],
    [0.6, "#fddbc7"],
    [0.8, "#ef8a62"],
    [1.0, "#b2182b"],
]

_AXIS = {
    "automargin": True,
    "gridcolor": "#E6E8EB",
    "linecolor": "#9AA0A6",
    "showline": True,
    "ticks": "outside",
    "tickcolor": "#9AA0A6",
    "ticklen": 4,
    "zeroline": False,
    "title": {"standoff": 10, "font": {"size": 13}},
    "tickfont": {"size": 12},
}

TEMPLATE: dict[str, Any] = {
    "layout": {
        "font": {"family": FONT, "size": 13, "color": "#1F2328"},
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 17}},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "colorway": list(COLOURS),
        "colorscale": {"sequential": SEQUENTIAL, "diverging": DIVERGING},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 12},
        },
        "hovermode": "closest",
        "hoverlabel": {"font": {"family": FONT}},
    },
}

# The effective number of averaged gradients is (1 + beta) / (1 - beta); on its log scale all betas have room.
_BETA_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_TITLE_WIDTH = 74
_LEGEND_ROW = 96


def style(index: int) -> tuple[str, str, str]:
    """Colour, dash and marker of the ``index``-th series; the second round of colours has other dashes and markers."""
    place = index + 3 * (index // len(COLOURS))
    return COLOURS[index % len(COLOURS)], DASHES[place % len(DASHES)], SYMBOLS[place % len(SYMBOLS)]


def fade(colour: str, opacity: float) -> str:
    """``#RRGGBB`` as an ``rgba(...)`` string, for bands behind lines."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def number(value: Number) -> str:
    """A number as a caption says it: three significant digits, a true minus sign."""
    return f"{float(value):.3g}".replace("-", "−")


def sub(index: int) -> str:
    """An index in subscript digits, for captions (which are plain text)."""
    return str(index).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def listing(words: list[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """One linear axis."""
    return {"title": {"text": title}, **more}


def log_axis(title: str, *values: Any, **more: Any) -> dict[str, Any]:
    """A logarithmic axis with few, plain tick labels: 1-2-5 over short ranges, powers of ten over long ones."""
    flat = np.concatenate([np.ravel(np.asarray(v, dtype=float)) for v in values])
    flat = flat[np.isfinite(flat) & (flat > 0)]
    if not flat.size:
        return axis(title, type="log", **more)
    low, high = np.log10(flat.min()), np.log10(flat.max())
    decades = range(int(np.floor(low)) - 1, int(np.ceil(high)) + 2)
    if high - low > 2.4:
        stride = int(np.ceil((high - low) / 8))
        ticks = [(1, power) for power in decades if power % stride == 0]
    else:
        ticks = [(m, power) for power in decades for m in ((1, 2, 5) if high - low > 0.4 else range(1, 10))]
    where = {"tickmode": "array", "tickvals": [m * 10.0**p for m, p in ticks], "ticktext": [_power(*t) for t in ticks]}
    return axis(title, type="log", **where, **more)


def beta_axis(betas: np.ndarray) -> dict[str, Any]:
    """A log axis over (1+beta)/(1-beta) whose ticks say beta."""
    ticks = np.array([b for b in _BETA_TICKS if betas[0] <= b <= betas[-1]] or [betas[0]])
    where = {"tickmode": "array", "tickvals": (1 + ticks) / (1 - ticks), "ticktext": [f"{b:g}" for b in ticks]}
    return axis("momentum β (spaced by gradients averaged)", type="log") | where


def _power(mantissa: int, power: int) -> str:
    """``0.05``, ``200`` or ``10`` with an exponent."""
    if -3 <= power <= 4:
        return f"{mantissa * 10.0**power:g}"
    head = "" if mantissa == 1 else f"{mantissa}·"
    return f"{head}10<sup>{str(power).replace('-', '−')}</sup>"


def line(name: str, x: Any, y: Any, index: int, *, markers: bool | None = None, **more: Any) -> dict[str, Any]:
    """A line in the style of series ``index``; few points get markers."""
    colour, dash, symbol = style(index)
    if markers is None:
        markers = len(x) <= 40
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": name,
        "legendgroup": name,
        "x": x,
        "y": y,
        "line": {"color": colour, "dash": dash, "width": 2},
    }
    if markers:
        trace["marker"] = {"symbol": symbol, "size": 7, "color": colour}
    return trace | more


def band(name: str, x: Any, low: Any, high: Any, index: int, **more: Any) -> dict[str, Any]:
    """A shaded interval around series ``index``; it hides and shows with its line."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": np.concatenate([x, x[::-1]]),
        "y": np.concatenate([high, low[::-1]]),
        "fill": "toself",
        "fillcolor": fade(style(index)[0], 0.18),
        "line": {"width": 0, "color": "rgba(0,0,0,0)"},
        "name": name,
        "legendgroup": name,
        "showlegend": False,
        "hoverinfo": "skip",
    } | more


def guide(name: str, x: Any, y: Any, *, dash: str = "dot", **more: Any) -> dict[str, Any]:
    """A thin grey line of theory or reference."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": GUIDE, "dash": dash, "width": 1.5},
    } | more


def build(
    name: str,
    data: list[dict[str, Any]],
    *,
    title: str,
    caption: str,
    height: int = 440,
    **layout: Any,
) -> dict[str, Any]:
    """Puts a chart together and turns every number into a plain Python one.

    The top margin is computed from the lines of the title and the rows the legend will need, so neither is clipped.
    """
    lines = textwrap.wrap(title, _TITLE_WIDTH) or [""]
    shown = [t for t in data if t.get("showlegend", True) and t.get("name")]
    legend = layout.get("showlegend", len(shown) > 1)
    # A legend entry takes about six characters' width for its symbol besides its text.
    rows = -(-sum(len(t["name"]) + 8 for t in shown) // _LEGEND_ROW) if legend else 0
    top = 28 + 24 * len(lines) + 22 * rows
    base: dict[str, Any] = {
        "template": TEMPLATE,
        "title": {"text": "<br>".join(lines), "yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 14}},
        "meta": {"caption": caption, "chart": name},
        # The same value on every redraw: zoom and hidden lines survive a live update.
        "uirevision": name,
        "height": height + 22 * max(rows - 1, 0),
        "margin": {"l": 70, "r": 24, "t": top, "b": 60},
        "showlegend": legend,
    }
    return plain({"data": data, "layout": base | layout})


def plain(value: Any) -> Any:
    """The same structure without NumPy or torch types; NaN and infinities become null, as JSON wants it.

    Floats keep seven significant digits: more than a screen can show, a third of the bytes.
    """
    if isinstance(value, float):  # by far the most; NumPy's are among them
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.7g}")
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    return value
