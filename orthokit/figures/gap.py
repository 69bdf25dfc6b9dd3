"""The spectral gap that momentum opens: against beta, and over the grid of noise and beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError
from orthokit.figures._check import betas_vector, matrix, named, vector
from orthokit.figures.template import DIVERGING, GUIDE, SEQUENTIAL, Number, axis, beta_axis, build, line, number

__all__ = ["gap_by_beta", "gap_heatmap"]


def gap_by_beta(
    betas: Any,
    gap: Any,
    alignment: Any,
    *,
    current: Number | None = None,
    published: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    r"""The spectral gap and the alignment of the momentum against beta, one above the other.

    Args:
        betas: In [0, 1), ``(n,)``, increasing.
        gap: $\sigma_r - \sigma_{r+1}$ of the momentum, ``(n,)``.
        alignment: Alignment of the polar factor, ``(n,)``; or a mapping from pipeline to such.
        current: A beta to mark with a vertical line.
        published: ``(betas, gaps)`` of a published table, drawn as crosses.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = gap_by_beta([0, 0.5, 0.9], [0.5, 0.4, 1.6], [0.6, 0.8, 0.9], current=0.9)
        >>> figure["layout"]["meta"]["caption"].startswith("At β = 0.9 the gap is 1.6")
        True
    """
    betas = betas_vector(betas)
    gap = vector("gap", gap, length=len(betas))
    curves = named("alignment", alignment) if isinstance(alignment, Mapping) else {"alignment": alignment}
    x = (1 + betas) / (1 - betas)
    data = [line("gap", x, gap, 0, yaxis="y", text=_hover(betas), hovertemplate="%{text}: %{y:.3g}")]
    for index, (label, values) in enumerate(curves.items()):
        values = vector(f"alignment of {label!r}", values, length=len(betas))
        data.append(
            line(label, x, values, index + 1, yaxis="y2", text=_hover(betas), hovertemplate="%{text}: %{y:.3g}")
        )
    if published is not None:
        where = betas_vector(published[0])
        values = vector("published gaps", published[1], length=len(where))
        mark = {"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": GUIDE}}
        spot = {"type": "scatter", "mode": "markers", "name": "gap, published", "marker": mark}
        data.append(spot | {"x": (1 + where) / (1 - where), "y": values, "yaxis": "y"})
    shapes = []
    at = len(betas) - 1
    if current is not None:
        if not 0 <= current < 1:
            raise OptionError(f"current must be a beta in [0, 1); got {current:g}.")
        at = int(np.abs(betas - current).argmin())
        spot = (1 + current) / (1 - current)
        mark = {"color": GUIDE, "width": 1.5, "dash": "dot"}
        shapes = [
            {"type": "line", "xref": "x", "yref": "paper", "x0": spot, "x1": spot, "y0": 0, "y1": 1, "line": mark}
        ]
    said = [f"{label}: {number(vector(label, values)[at])}" for label, values in curves.items()]
    return build(
        "gap_by_beta",
        data,
        title="When does momentum open the gap between signal and noise?",
        caption=f"At β = {number(betas[at])} the gap is {number(gap[at])}; {'; '.join(said)}.",
        height=520,
        xaxis=beta_axis(betas) | {"anchor": "y2"},
        yaxis=axis("gap σ<sub>r</sub> − σ<sub>r+1</sub>", domain=[0.54, 1], rangemode="tozero"),
        yaxis2=axis("alignment", domain=[0, 0.46], rangemode="tozero") | _second_axis(),
        shapes=shapes,
    )


def gap_heatmap(
    sigmas: Any, betas: Any, values: Any, *, title: str, zero_centred: bool = False, name: str = "gap"
) -> dict[str, Any]:
    """A quantity over the grid of noise level and momentum.

    Args:
        sigmas: Noise levels, ``(n,)``, positive, increasing.
        betas: In [0, 1), ``(k,)``, increasing.
        values: ``(n, k)``.
        title: The question.
        zero_centred: Use the diverging scale with its middle at zero (for differences).
        name: What is shown, for the colour bar.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = gap_heatmap([0.5, 1], [0, 0.9], [[4, 5], [0.5, 2]], title="Where is the gap open?")
        >>> figure["layout"]["meta"]["caption"]
        'Largest gap 5 at σ = 0.5, β = 0.9; smallest 0.5 at σ = 1, β = 0.'
    """
    sigmas = vector("sigmas", sigmas, low=0.0, increasing=True)
    betas = betas_vector(betas)
    values = matrix("values", values, shape=(len(sigmas), len(betas)))
    top, bottom = (np.unravel_index(f(values), values.shape) for f in (np.argmax, np.argmin))
    where = [f"at σ = {number(sigmas[i])}, β = {number(betas[j])}" for i, j in (top, bottom)]
    colour: dict[str, Any] = {"colorscale": SEQUENTIAL}
    if zero_centred:
        reach = float(np.abs(values).max()) or 1.0
        colour = {"colorscale": DIVERGING, "zmid": 0, "zmin": -reach, "zmax": reach}
    trace = {"type": "heatmap", "x": [number(b) for b in betas], "y": [number(s) for s in sigmas], "z": values}
    bar = {"colorbar": {"title": {"text": name, "side": "right"}, "thickness": 14}}
    hover = {"hovertemplate": "β %{x}, σ %{y}: %{z:.3g}<extra></extra>"}
    return build(
        "gap_heatmap",
        [trace | bar | colour | hover],
        title=title,
        caption=f"Largest {name} {number(values[top])} {where[0]}; smallest {number(values[bottom])} {where[1]}.",
        xaxis=axis("momentum β", type="category", showgrid=False, **_some_ticks(betas)),
        yaxis=axis("noise level σ", type="category", showgrid=False, **_some_ticks(sigmas)),
    )


def _some_ticks(values: np.ndarray, *, most: int = 11) -> dict[str, Any]:
    """Labels for evenly chosen cells, first and last among them: one for every cell would not be readable."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))
    return {"tickmode": "array", "tickvals": [number(float(values[i])) for i in chosen], "tickangle": 0}


def _second_axis() -> dict[str, Any]:
    """The template styles y, not y2: repeat what matters."""
    return {"anchor": "x", "gridcolor": "#E6E8EB", "zeroline": False, "automargin": True}


def _hover(betas: Sequence[float] | np.ndarray) -> list[str]:
    return [f"β = {beta:g}" for beta in betas]
