"""Spectra of the matrices of a checkpoint: laid over each other, and held against the law of random entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from orthokit.diagnostics.bulk import marchenko_pastur_cdf
from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.figures._check import named
from orthokit.figures._inspection import escaped, short
from orthokit.figures.spectra import _spectrum
from orthokit.figures.template import GUIDE, Number, axis, build, guide, line, listing, log_axis, number, style

__all__ = ["MOST_SPECTRA", "density_with_law", "inspection_spectra", "spread_indices"]

MOST_SPECTRA = 8
"""How many spectra one chart overlays: more cannot be told apart."""
_POINTS = 400
_BINS, _FINE = 60, 400


def inspection_spectra(
    spectra: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None = None,
    edges: Mapping[str, Number | None] | None = None,
    normalise: Literal["first", "frobenius"] | None = None,
    log_x: bool = True,
    log_y: bool = True,
    quantile_axis: bool = False,
    title: str = "How do the singular values fall off?",
) -> dict[str, Any]:
    r"""All singular values of some matrices, :math:`\sigma_k` against :math:`k`, laid over each other.

    Args:
        spectra: Name to singular values, ``(k,)``, falling; at most eight.
        base: Name to the singular values before training, dotted in the same colour; other names are not drawn.
        edges: Name to the noise edge, a dashed line in the same colour; ``None`` where there is none. The caption
            counts what lies above the line; ``above_edge`` of an inspection asks for a fluctuation more.
        normalise: Divide each spectrum (its base and edge too) by its own ``"first"`` value or its ``"frobenius"``
            norm. Default: no.
        log_x: Logarithmic index.
        log_y: Logarithmic values; zeros are left out then.
        quantile_axis: ``(k - 1/2) / K`` in place of the index, so that matrices of different sizes line up.
        title: The question.

    Returns:
        A Plotly figure as a dictionary; long spectra are thinned to 400 points, dense at both ends.

    Raises:
        OptionError: More than eight spectra, or values that are negative or do not fall.
        UnknownNameError: Another ``normalise``.
        ShapeError: No spectrum.

    Example:
        >>> figure = inspection_spectra({"a": [4.0, 2.0, 1.0]}, edges={"a": 2.5})
        >>> figure["layout"]["meta"]["caption"]
        'Largest over median singular value: a 2. Above the noise edge: a 1 of 3.'
    """
    curves = {name: _spectrum(name, values) for name, values in named("spectra", spectra).items()}
    if len(curves) > MOST_SPECTRA:
        raise OptionError(f"at most {MOST_SPECTRA} spectra can be told apart in one chart; got {len(curves)}.")
    if normalise not in (None, "first", "frobenius"):
        raise unknown_name("normalisation", str(normalise), ("first", "frobenius"))
    data: list[dict[str, Any]] = []
    ratios, above = [], []
    for index, (name, values) in enumerate(curves.items()):
        unit = 1.0 if normalise is None else values[0] if normalise == "first" else float(np.linalg.norm(values))
        unit = unit or 1.0  # a matrix of zeros stays one
        colour, label = style(index)[0], escaped(short(name))
        data.append(_curve(label, values / unit, index, log_y, quantile_axis))
        if base is not None and base.get(name) is not None:
            before = _curve(f"{label}, base", _spectrum(name, base[name]) / unit, index, log_y, quantile_axis)
            before["line"] = {"color": colour, "dash": "dot", "width": 1.5}
            data.append(before | {"legendgroup": label, "showlegend": False})
        edge = None if edges is None else edges.get(name)
        if edge is not None:
            ends = [0.5 / len(values), 1] if quantile_axis else [1, len(values)]
            mark = guide(f"{label}, noise edge", ends, [float(edge) / unit] * 2)
            mark["line"] = {"color": colour, "dash": "dash", "width": 1}
            data.append(mark | {"legendgroup": label, "showlegend": False, "hoverinfo": "name"})
            above.append(f"{short(name)} {int((values > float(edge)).sum())} of {len(values)}")
        middle = float(np.median(values))
        ratios.append(f"{short(name)} {number(values[0] / middle) if middle > 0 else 'without end'}")
    caption = f"Largest over median singular value: {listing(ratios)}."
    if above:
        caption += f" Above the noise edge: {listing(above)}."
    across = "share of the singular values (k − ½) / K" if quantile_axis else "index k"
    unit_name = {"first": " / σ<sub>1</sub>", "frobenius": " / ‖W‖<sub>F</sub>"}.get(normalise or "", "")
    up = f"singular value σ<sub>k</sub>{unit_name}"
    heights = [trace["y"] for trace in data]
    return build(
        "inspection_spectra",
        data,
        title=title,
        caption=caption,
        height=480,
        showlegend=True,
        xaxis=log_axis(across, *(trace["x"] for trace in data)) if log_x else axis(across),
        yaxis=log_axis(up, *heights) if log_y else axis(up, rangemode="tozero"),
    )


def density_with_law(
    sigma: Any,
    *,
    shape: Sequence[int],
    noise: Number | None,
    edge: Number | None,
    above: int | None = None,
    name: str = "the matrix",
    title: str | None = None,
) -> dict[str, Any]:
    r"""Where the singular values lie, and where those of random entries of the same size would.

    The line is the Marchenko-Pastur law for independent entries of standard deviation ``noise``: singular values
    between :math:`s\,|\sqrt m - \sqrt n|` and :math:`s\,(\sqrt m + \sqrt n)`.

    Args:
        sigma: All singular values, ``(min(m, n),)``, falling.
        shape: ``(m, n)``.
        noise: Standard deviation of an entry; ``None`` where no law was fitted: there is no line then.
        edge: Upper edge of the law; ``None`` likewise.
        above: How many values count as above the edge; default all that are larger. A fit may ask for more, as the
            largest value of pure noise fluctuates about the edge.
        name: What the matrix is called.
        title: The question; made from ``name`` when not given.

    Returns:
        A Plotly figure as a dictionary. The axis opens at twice the edge; larger values are counted in the caption.

    Raises:
        ShapeError: Not two sizes, or another number of singular values than their smaller one.
        OptionError: A noise that is not positive, or more values above the edge than there are.

    Example:
        >>> values = [9.0, 1.9, 1.5, 1.1, 0.7, 0.2]
        >>> density_with_law(values, shape=(6, 6), noise=0.4, edge=1.96)["layout"]["meta"]["caption"]
        '1 of 6 singular values lies above the noise edge 1.96; the largest is 9, 4.59 times the edge.'
    """
    values = _spectrum(name, sigma)
    if len(shape) != 2 or min(shape) != len(values):
        raise ShapeError(f"a matrix of shape {tuple(shape)} has another number of singular values than {len(values)}.")
    if noise is not None and not noise > 0:
        raise OptionError(f"noise must be positive, or None where no law was fitted; got {noise}.")
    count = int((values > edge).sum()) if above is None and edge is not None else above or 0
    if not 0 <= count <= len(values):
        raise OptionError(f"above must lie in 0..{len(values)}; got {above}.")
    # Bins are as wide as the bulk asks for: a single giant must not press the rest into one bar.
    top = float(values[0]) or 1.0
    seen = min(top, 2 * float(edge)) if edge is not None else top
    ends = np.linspace(0, max(seen, float(values[min(count, len(values) - 1)])), _BINS + 1)
    heights = np.histogram(values, bins=ends)[0] / (len(values) * np.diff(ends))
    middles = (ends[1:] + ends[:-1]) / 2
    bars = {"type": "bar", "name": "singular values", "x": middles, "y": heights, "width": np.diff(ends)}
    bars["marker"] = {"color": style(5)[0], "line": {"width": 0}}
    data: list[dict[str, Any]] = [bars | {"hovertemplate": "about %{x:.3g}: density %{y:.3g}<extra></extra>"}]
    if noise is not None:
        x, density = _law(tuple(shape), float(noise))
        data.append(line("Marchenko-Pastur law", x, density, 1, markers=False))
    if count:
        mark = {"symbol": "line-ns", "size": 14, "color": style(0)[0], "line": {"width": 1.5, "color": style(0)[0]}}
        rug = {"type": "scatter", "mode": "markers", "name": "above the edge", "x": values[:count], "y": [0.0] * count}
        data.append(rug | {"marker": mark, "hovertemplate": "%{x:.4g}<extra>above the edge</extra>"})
    caption = f"No law was fitted to the {len(values)} singular values of {name}; the largest is {number(top)}."
    if edge is not None:
        verb = "lies" if count == 1 else "lie"
        caption = f"{count or 'None'} of {len(values)} singular values {verb} above the noise edge {number(edge)}; "
        caption += f"the largest is {number(top)}, {number(top / float(edge))} times the edge."
    highest = max(float(np.max(t["y"])) for t in data) or 1.0
    return build(
        "density_with_law",
        data,
        title=title or f"Is the spectrum of {escaped(name)} more than noise?",
        caption=caption,
        barmode="overlay",
        xaxis=axis("singular value σ", range=[0, 1.02 * ends[-1]]),
        yaxis=axis("density (share per unit of σ)", range=[-0.04 * highest, 1.05 * highest]),
        shapes=[] if edge is None else [_edge(float(edge))],
    )


def spread_indices(size: int, most: int) -> np.ndarray:
    """At most ``most`` of the indices ``0..size-1``, both ends among them.

    Half are log-spaced from the start, the rest even or log-spaced from the end, where a spectrum bends down.
    """
    if size <= most:
        return np.arange(size)
    head, tail = np.geomspace(1, size, most // 2) - 1, size - np.geomspace(1, size, most // 6)
    even = np.linspace(0, size - 1, most - len(head) - len(tail))
    return np.unique(np.concatenate([head, even, tail]).round().astype(int))


def _curve(name: str, values: np.ndarray, index: int, log_y: bool, quantile_axis: bool) -> dict[str, Any]:
    places = spread_indices(len(values), _POINTS)
    heights = np.where(values > 0, values, np.nan)[places] if log_y else values[places]
    x = (places + 0.5) / len(values) if quantile_axis else places + 1
    said = "<br>k = %{customdata}: %{y:.4g}<extra></extra>"
    return line(name, x, heights, index, markers=False) | {
        "customdata": places + 1,
        "hovertemplate": name + said,
    }


def _law(shape: tuple[int, ...], noise: float) -> tuple[np.ndarray, np.ndarray]:
    """The law's density over singular values, by differences of its distribution."""
    small, large = sorted(shape)
    ends = noise * np.array([large**0.5 - small**0.5, large**0.5 + small**0.5])
    grid = np.linspace(ends[0], ends[1], _FINE + 1)
    mass = marchenko_pastur_cdf(torch.from_numpy(grid**2 / (noise**2 * large)), ratio=small / large).numpy()
    return (grid[1:] + grid[:-1]) / 2, np.diff(mass) / np.diff(grid)


def _edge(edge: float) -> dict[str, Any]:
    mark = {"color": GUIDE, "width": 1.5, "dash": "dash"}
    return {"type": "line", "x0": edge, "x1": edge, "yref": "paper", "y0": 0, "y1": 1, "line": mark}
