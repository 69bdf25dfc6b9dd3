"""Singular values: spectra side by side, ratios, bars with the noise edge, a heat map over training, and their maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, UnknownNameError, unknown_name
from orthokit.figures._check import matrix, named, vector
from orthokit.figures.template import (
    GUIDE,
    SEQUENTIAL,
    Number,
    axis,
    build,
    guide,
    line,
    listing,
    log_axis,
    number,
    style,
    sub,
)

__all__ = ["coefficient_map", "spectra", "spectrum_bars", "spectrum_heatmap", "spectrum_ratio"]

MAX_COLUMNS, MAX_ROWS = 400, 200


def spectra(
    series: Mapping[Any, Any],
    *,
    start: int = 1,
    edge: Number | None = None,
    rank: int | None = None,
    log: bool = True,
    title: str = "How does momentum change the spectrum?",
) -> dict[str, Any]:
    r"""Singular values against their index, one line per matrix.

    Args:
        series: Label to singular values, ``(k,)``, in descending order.
        start: First index shown (counted from 1), to leave out a few giants. Default 1.
        edge: A noise edge to draw as a horizontal line.
        rank: The signal's rank $r$: the gap between $\sigma_r$ and $\sigma_{r+1}$ is read out.
        log: Logarithmic vertical axis. Zeros are left out then.
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        OptionError: ``start`` or ``rank`` outside the spectrum.

    Example:
        >>> figure = spectra({"gradient": [5.0, 4.0, 3.9], "momentum": [5.0, 1.0, 0.9]}, rank=1)
        >>> figure["layout"]["meta"]["caption"]
        'Ratio σ₁/σ₂: gradient: 1.25; momentum: 5.'
    """
    curves = {label: _spectrum(label, values) for label, values in named("series", series).items()}
    shortest = min(len(values) for values in curves.values())
    if not 1 <= start <= shortest:
        raise OptionError(f"start must lie in 1..{shortest}, the length of the shortest spectrum; got {start}.")
    if rank is not None and not 1 <= rank < shortest:
        raise OptionError(f"rank must lie in 1..{shortest - 1} to have a gap below it; got {rank}.")
    data = []
    for index, (label, values) in enumerate(curves.items()):
        shown = values[start - 1 :]
        data.append(line(label, np.arange(start, start + len(shown)), _visible(shown, log), index))
    longest = max(len(values) for values in curves.values())
    if edge is not None:
        data.append(guide("noise edge", [start, longest], [edge, edge], dash="dash"))
    if rank is None:
        said = [f"{label}: {number(v[0] / max(v[-1], 1e-300))}" for label, v in curves.items()]
        caption = f"Largest over smallest singular value: {'; '.join(said)}."
    else:
        said = [f"{label}: {number(v[rank - 1] / max(v[rank], 1e-300))}" for label, v in curves.items()]
        caption = f"Ratio σ{sub(rank)}/σ{sub(rank + 1)}: {'; '.join(said)}."
    shapes = [_rank_line(rank)] if rank is not None and rank + 0.5 >= start else []
    return build(
        "spectra",
        data,
        title=title,
        caption=caption,
        xaxis=axis("index k"),
        yaxis=log_axis("singular value σ<sub>k</sub>", *(t["y"] for t in data))
        if log
        else axis("singular value σ<sub>k</sub>"),
        shapes=shapes,
    )


def spectrum_ratio(series: Mapping[Any, Any], reference: str | Any) -> dict[str, Any]:
    """Each spectrum divided by a reference: what shrinks, and what stays.

    Args:
        series: Label to singular values, ``(k,)``.
        reference: The label in ``series`` to divide by, or singular values ``(k,)``, all positive.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        UnknownNameError: ``reference`` is not a label of ``series``.

    Example:
        >>> figure = spectrum_ratio({"gradient": [4.0, 2.0], "momentum": [4.0, 0.5]}, "gradient")
        >>> figure["data"][0]["y"]
        [1, 0.25]
    """
    curves = named("series", series)
    if isinstance(reference, str):
        if reference not in curves:
            error: UnknownNameError = unknown_name("reference series", reference, curves)
            raise error
        base, name = _spectrum(reference, curves.pop(reference)), reference
    else:
        base, name = _spectrum("reference", reference), "reference"
    if base.min() <= 0:
        raise OptionError("the reference spectrum must be positive; cut it at its rank first.")
    data, said = [], []
    for index, (label, values) in enumerate(curves.items()):
        values = _spectrum(label, values)
        size = min(len(values), len(base))
        ratio = values[:size] / base[:size]
        data.append(line(label, np.arange(1, size + 1), ratio, index))
        said.append(f"{label} keeps {number(ratio[0])} of σ₁ and {number(float(np.median(ratio)))} of the median")
    if data:
        data.append(guide(name, [1, len(base)], [1, 1]))
    return build(
        "spectrum_ratio",
        data,
        title="Which singular values does momentum keep?",
        caption=f"{listing(said) if said else 'Nothing to compare with the reference'}.",
        xaxis=axis("index k"),
        yaxis=axis(f"σ<sub>k</sub> / σ<sub>k</sub>({name})", rangemode="tozero"),
    )


def spectrum_bars(
    singular_values: Any,
    *,
    rank: int,
    edge: Number | None = None,
    spikes: Any = None,
    reference: Any = None,
    limit: int = 24,
    ymax: Number | None = None,
    title: str = "Does the signal stand out of the noise?",
) -> dict[str, Any]:
    r"""The largest singular values as bars: signal in one colour, noise in another, the gap read out.

    Args:
        singular_values: ``(k,)``, descending.
        rank: The signal's rank $r$, ``1 <= r < k``.
        edge: The noise edge predicted by random-matrix theory.
        spikes: Predicted positions of the first singular values, ``(<= k,)``; NaN where none survives.
        reference: The true signal strengths, ``(<= k,)``.
        limit: How many bars to show, at least ``rank + 1``. Default 24.
        ymax: Fixed top of the axis, so that a live chart does not breathe.
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = spectrum_bars([12.0, 8.0, 5.0, 1.4, 1.3], rank=3, edge=1.42)
        >>> figure["layout"]["meta"]["caption"]
        'σ₃ = 5, σ₄ = 1.4: the gap is 3.6; 3 of 5 singular values lie above the noise edge 1.42.'
    """
    values = _spectrum("singular_values", singular_values)
    if not 1 <= rank < len(values):
        raise OptionError(f"rank must lie in 1..{len(values) - 1} to have a gap below it; got {rank}.")
    size = min(len(values), max(limit, rank + 1))
    index = np.arange(1, size + 1)
    signal, noise = style(0)[0], style(4)[0]
    data: list[dict[str, Any]] = []
    for name, part, colour in (("signal", slice(0, rank), signal), ("noise", slice(rank, size), noise)):
        mark = {
            "color": colour,
            "pattern": {"shape": "" if name == "signal" else "/", "fillmode": "overlay", "solidity": 0.2},
        }
        bar = {"type": "bar", "name": name, "x": index[part], "y": values[:size][part], "marker": mark}
        data.append(bar | {"hovertemplate": "σ<sub>%{x}</sub> = %{y:.4g}<extra></extra>"})
    for name, points, symbol in (("predicted", spikes, "line-ew"), ("true strength", reference, "diamond-open")):
        if points is not None:
            points = vector(name, points, finite=False)[:size]
            mark = {"symbol": symbol, "size": 13, "color": "#3B3F46", "line": {"width": 2.5, "color": "#3B3F46"}}
            spot = {"type": "scatter", "mode": "markers", "name": name, "marker": mark}
            data.append(spot | {"x": index[: len(points)], "y": points})
    gap = float(values[rank - 1] - values[rank])
    pair = f"σ{sub(rank)} = {number(values[rank - 1])}, σ{sub(rank + 1)} = {number(values[rank])}"
    caption = f"{pair}: the gap is {number(gap)}"
    if edge is not None:
        data.append(guide("noise edge", [0.5, size + 0.5], [edge, edge], dash="dash"))
        above = int((values > edge).sum())
        caption += f"; {above} of {len(values)} singular values lie above the noise edge {number(edge)}"
    top = {"range": [0, ymax]} if ymax is not None else {"rangemode": "tozero"}
    return build(
        "spectrum_bars",
        data,
        title=title,
        caption=f"{caption}.",
        barmode="overlay",
        bargap=0.25,
        xaxis=axis("index k", range=[0.4, size + 0.6]),
        yaxis=axis("singular value σ<sub>k</sub>", **top),
        shapes=[_rank_line(rank)],
    )


def spectrum_heatmap(
    steps: Any, spectra: Any, *, name: str, zmin: Number | None = None, zmax: Number | None = None
) -> dict[str, Any]:
    """All singular values of one matrix over training, as colours.

    Args:
        steps: ``(n,)``, increasing.
        spectra: ``(n, k)``, each row descending and >= 0.
        name: The matrix shown.
        zmin: Fixed lower end of the colour scale, in log10; so that live colours do not breathe.
        zmax: Fixed upper end, in log10.

    Returns:
        A Plotly figure as a dictionary; at most 400 x 200 cells are kept for display.

    Example:
        >>> figure = spectrum_heatmap([0, 10], [[2.0, 1.0], [10.0, 0.1]], name="wq")
        >>> figure["layout"]["meta"]["caption"]
        'wq: the largest singular value goes from 2 to 10, the smallest from 1 to 0.1.'
    """
    steps = vector("steps", steps, increasing=True)
    values = matrix("spectra", spectra, shape=(len(steps), None))
    if values.min() < 0:
        raise OptionError(f"singular values must be >= 0; the smallest is {values.min():g}.")
    columns = _spread(len(steps), MAX_COLUMNS)
    rows = _spread(values.shape[1], MAX_ROWS)
    # Exact zeros have no logarithm: they are shown a decade below single precision's resolution of the largest.
    floor = max(float(values.max()), 1e-30) * 1e-8
    z = np.log10(np.maximum(values[np.ix_(columns, rows)].T, floor))
    limits = {"zmin": zmin, "zmax": zmax} if zmin is not None and zmax is not None else {}
    trace = {
        "type": "heatmap",
        "x": steps[columns],
        "y": rows + 1,
        "z": z,
        "colorscale": SEQUENTIAL,
        "colorbar": {"title": {"text": "log₁₀ σ", "side": "right"}, "thickness": 14},
        "hovertemplate": "step %{x}, k = %{y}: 10^%{z:.2f}<extra></extra>",
    }
    first, last = values[0], values[-1]
    caption = (
        f"{name}: the largest singular value goes from {number(first[0])} to {number(last[0])}, "
        f"the smallest from {number(first[-1])} to {number(last[-1])}."
    )
    return build(
        "spectrum_heatmap",
        [trace | limits],
        title=f"How does the spectrum of {name} move while training?",
        caption=caption,
        xaxis=axis("step", showgrid=False),
        yaxis=axis("index k", autorange="reversed", showgrid=False),
    )


def coefficient_map(
    maps: Mapping[Any, tuple[Any, Any]],
    *,
    title: str = "Where does each iteration send a singular value?",
    target: Number = 1.0,
    log: bool = True,
) -> dict[str, Any]:
    """What an orthogonalisation does to one singular value: output against input.

    Args:
        maps: Label to ``(x, y)``, both ``(n,)``: input and output singular value.
        title: The question.
        target: The value every input should reach. Default 1.
        log: Logarithmic horizontal axis.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = coefficient_map({"one cubic step": ([0.1, 0.5, 1.0], [0.15, 0.69, 1.0])})
        >>> figure["layout"]["meta"]["caption"]
        'Furthest from 1: one cubic step: 0.85.'
    """
    data, said, ends = [], [], []
    for index, (label, (x, y)) in enumerate(named("maps", maps).items()):
        x = vector(f"inputs of {label!r}", x, increasing=True)
        y = vector(f"outputs of {label!r}", y, length=len(x))
        data.append(line(label, x, y, index, markers=False))
        said.append(f"{label}: {number(float(np.abs(y - target).max()))}")
        ends += [x[0], x[-1]]
    data.append(guide("target", [min(ends), max(ends)], [target, target]))
    return build(
        "coefficient_map",
        data,
        title=title,
        caption=f"Furthest from {number(target)}: {'; '.join(said)}.",
        xaxis=log_axis("singular value in", ends) if log else axis("singular value in"),
        yaxis=axis("singular value out", rangemode="tozero"),
    )


def _spectrum(label: str, values: Any) -> np.ndarray:
    """Singular values: >= 0, descending."""
    values = vector(f"singular values of {label!r}", values, low=0.0)
    if (np.diff(values) > 1e-6 * max(values[0], 1e-30)).any():
        raise OptionError(f"the singular values of {label!r} must be in descending order; sort them first.")
    return values


def _visible(values: np.ndarray, log: bool) -> np.ndarray:
    """Zeros cannot stand on a logarithmic axis: they become gaps."""
    return np.where(values > 0, values, np.nan) if log else values


def _rank_line(rank: int) -> dict[str, Any]:
    """A vertical line between the signal's last index and the noise's first."""
    mark = {"color": GUIDE, "width": 1.5, "dash": "dot"}
    return {"type": "line", "x0": rank + 0.5, "x1": rank + 0.5, "yref": "paper", "y0": 0, "y1": 1, "line": mark}


def _spread(size: int, most: int) -> np.ndarray:
    """At most ``most`` evenly spread indices, ends included."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int))
