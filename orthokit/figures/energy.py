"""Neurons on the sphere and their energy: what a rotation keeps and additive noise breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, matrix, named, vector
from orthokit.figures.intervals import mean_interval
from orthokit.figures.template import GUIDE, Number, axis, band, build, fade, guide, line, log_axis, number, style

__all__ = ["energy_by_dimension", "energy_by_matrix", "energy_change", "energy_pairs", "sphere"]

_CAMERA = {"camera": {"eye": {"x": 1.08, "y": 1.08, "z": 0.68}}}


def sphere(
    points: Any,
    *,
    labels: Sequence[str] | None = None,
    before: Any = None,
    title: str = "Where do the neurons point?",
) -> dict[str, Any]:
    """Neurons as points on a unit sphere that can be turned with the mouse.

    Args:
        points: ``(N, 3)``; each row is scaled to unit length.
        labels: ``N`` names for the hover text.
        before: ``(N, 3)``; where the neurons were: drawn open, joined to where they are.
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        OptionError: A row is zero and so has no direction.

    Example:
        >>> figure = sphere([[1, 0, 0], [0, 2, 0], [0, 0, -1]])
        >>> figure["layout"]["meta"]["caption"]
        '3 neurons; the closest two are 90° apart.'
    """
    now = _unit("points", points)
    names = [str(label) for label in labels] if labels is not None else [f"neuron {i + 1}" for i in range(len(now))]
    if len(names) != len(now):
        raise ShapeError(f"labels must name all {len(now)} neurons; got {len(names)}.")
    data = [_ball(), _graticule()]
    caption = f"{len(now)} neurons"
    if len(now) > 1:
        cosines = np.clip(now @ now.T, -1, 1)
        np.fill_diagonal(cosines, -1)
        caption += f"; the closest two are {number(float(np.degrees(np.arccos(cosines.max()))))}° apart"
    if before is not None:
        old = _unit("before", before)
        if len(old) != len(now):
            raise ShapeError(f"before must have one row per neuron, {len(now)}; got {len(old)}.")
        path = _arcs(old, now)
        ways = {"mode": "lines", "line": {"color": GUIDE, "width": 2}, "name": "way", "hoverinfo": "skip"}
        data.append(_scatter3d(path, **ways))
        data.append(_scatter3d(old, **_dots(4, "circle-open"), name="before", text=names, hovertemplate="%{text}"))
        turned = np.degrees(np.arccos(np.clip((old * now).sum(axis=1), -1, 1)))
        caption += f"; they moved by {number(float(np.median(turned)))}° in the median"
    data.append(_scatter3d(now, **_dots(0, "circle"), name="neurons", text=names, hovertemplate="%{text}"))
    hidden = {"visible": False, "range": [-1.05, 1.05]}
    return build(
        "sphere",
        data,
        title=title,
        caption=f"{caption}.",
        height=520,
        showlegend=before is not None,
        scene={"xaxis": hidden, "yaxis": hidden, "zaxis": hidden, "aspectmode": "cube", "dragmode": "orbit"} | _CAMERA,
    )


def energy_by_dimension(
    dims: Any, measured: Mapping[Any, Any], *, expected: Any = None, s: Number = 1.0
) -> dict[str, Any]:
    """Mean energy of neurons against the dimension they live in, with the closed form beside it.

    Args:
        dims: Dimensions, ``(n,)``, increasing.
        measured: Label to mean energy, ``(n,)``; or ``(n, draws)``, which gives the mean and its 95 % band.
        expected: The closed form for uniform neurons, ``(n,)``.
        s: The energy's exponent, for the axis.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = energy_by_dimension([4, 16], {"random": [0.8, 0.72]}, expected=[0.85, 0.72])
        >>> figure["layout"]["meta"]["caption"]
        'Largest distance from the closed form: random: 5.9 %.'
    """
    dims = vector("dims", dims, low=1.0, increasing=True)
    data, said = [], []
    closed = None if expected is None else vector("expected", expected, length=len(dims))
    for index, (label, values) in enumerate(named("measured", measured).items()):
        values = array(f"energy of {label!r}", values, dims=(1, 2))
        if len(values) != len(dims):
            raise ShapeError(f"{label!r} must have one row per dimension, {len(dims)}; got shape {values.shape}.")
        if values.ndim == 2:
            if values.shape[1] > 1:
                low, high = np.array([mean_interval(row)[1:] for row in values]).T
                data.append(band(label, dims, low, high, index))
            values = values.mean(axis=1)
        data.append(line(label, dims, values, index))
        if closed is None:
            said.append(f"{label}: from {number(values[0])} to {number(values[-1])}")
        else:
            said.append(f"{label}: {100 * float(np.abs(values / closed - 1).max()):.2g} %")
    if closed is not None:
        data.append(guide("closed form", dims, closed, dash="dash"))
    lead = "Energy: " if closed is None else "Largest distance from the closed form: "
    return build(
        "energy_by_dimension",
        data,
        title="How does the energy depend on the dimension?",
        caption=f"{lead}{'; '.join(said)}.",
        xaxis=log_axis("dimension d of a neuron", dims),
        yaxis=axis(f"mean pairwise energy E (s = {s:g})"),
    )


def energy_change(
    amounts: Any,
    changes: Mapping[Any, Any],
    *,
    xlabel: str = "size of the change ‖ΔW‖ / ‖W‖",
    title: str = "What changes the energy, and what keeps it?",
) -> dict[str, Any]:
    """How much different ways of changing a matrix change its energy, on logarithmic axes.

    Args:
        amounts: Size of the change, ``(n,)``, positive, increasing.
        changes: Kind of change to ``|E(after) - E(before)|``, ``(n,)``, >= 0.
        xlabel: Name and unit of the horizontal axis.
        title: The question.

    Returns:
        A Plotly figure as a dictionary; exact zeros are drawn at 1e-17.

    Example:
        >>> figure = energy_change([0.1, 1.0], {"rotation": [0.0, 1e-16], "noise": [1e-3, 1e-2]})
        >>> figure["layout"]["meta"]["caption"]
        'Largest |ΔE|: rotation: 1e−16; noise: 0.01.'
    """
    amounts = vector("amounts", amounts, low=0.0, increasing=True)
    if amounts[0] <= 0:
        raise OptionError("amounts must be positive, as the axis is logarithmic; leave out 0.")
    data, said = [], []
    for index, (label, values) in enumerate(named("changes", changes).items()):
        values = vector(f"change of {label!r}", values, length=len(amounts), low=0.0)
        data.append(line(label, amounts, np.maximum(values, 1e-17), index))
        said.append(f"{label}: {number(float(values.max()))}")
    return build(
        "energy_change",
        data,
        title=title,
        caption=f"Largest |ΔE|: {'; '.join(said)}.",
        xaxis=log_axis(xlabel, amounts),
        yaxis=log_axis("change of energy |ΔE|", *(t["y"] for t in data)),
    )


def energy_pairs(
    cosines: Mapping[Any, Any],
    *,
    dimension: int | None = None,
    bins: int = 61,
    title: str = "How are the angles between neurons spread?",
) -> dict[str, Any]:
    r"""The distribution of cosines between pairs of neurons, with the one of uniform neurons.

    For uniform directions in $R^d$ the density of a cosine is proportional to $(1-t^2)^{(d-3)/2}$.

    Args:
        cosines: Label to cosines of distinct pairs, ``(p,)``, in [-1, 1].
        dimension: Draw the density for uniform neurons of this dimension, at least 2.
        bins: Number of bins over [-1, 1].
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = energy_pairs({"random": [-0.1, 0.0, 0.1]}, dimension=8)
        >>> figure["layout"]["meta"]["caption"]
        'Standard deviation of the cosine: random: 0.0816; uniform neurons in 8 dimensions would have 0.354.'
    """
    if bins < 3:
        raise OptionError(f"bins must be at least 3; got {bins}.")
    edges = np.linspace(-1, 1, bins + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    data, said = [], []
    for index, (label, values) in enumerate(named("cosines", cosines).items()):
        values = vector(f"cosines of {label!r}", values)
        if np.abs(values).max() > 1 + 1e-5:
            raise OptionError(f"cosines of {label!r} must lie in [-1, 1]; found {np.abs(values).max():g} in size.")
        density, _ = np.histogram(np.clip(values, -1, 1), bins=edges, density=True)
        trace = line(label, middle, density, index, markers=False)
        trace["line"] |= {"shape": "hvh"}
        data.append(trace | {"fill": "tozeroy", "fillcolor": fade(style(index)[0], 0.12)})
        said.append(f"{label}: {number(float(values.std()))}")
    caption = f"Standard deviation of the cosine: {'; '.join(said)}"
    if dimension is not None:
        if dimension < 2:
            raise OptionError(f"dimension must be at least 2; got {dimension}.")
        # Normalised on the grid in logarithms: the power overflows for wide layers otherwise.
        log = (dimension - 3) / 2 * np.log1p(-(middle**2))
        uniform = np.exp(log - log.max())
        uniform /= uniform.sum() * (2 / bins)
        data.append(guide(f"uniform, d = {dimension}", middle, uniform, dash="dash"))
        caption += f"; uniform neurons in {dimension} dimensions would have {number(dimension**-0.5)}"
    return build(
        "energy_pairs",
        data,
        title=title,
        caption=f"{caption}.",
        xaxis=axis("cosine between two neurons"),
        yaxis=axis("density", rangemode="tozero"),
    )


def energy_by_matrix(
    names: Sequence[str], energies: Mapping[Any, Any], *, title: str = "How evenly are real neurons spread?"
) -> dict[str, Any]:
    """The energy of each matrix of a model, one row per matrix.

    Args:
        names: The ``n`` matrices, from top to bottom.
        energies: Label (``"trained"``, ``"uniform neurons"``) to energies, ``(n,)``.
        title: The question.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = energy_by_matrix(["a", "b"], {"trained": [0.75, 0.72], "uniform": [0.71, 0.71]})
        >>> figure["layout"]["meta"]["caption"]
        'trained lies above uniform in 2 of 2 matrices; furthest in a, by 0.04.'
    """
    rows = [str(name) for name in names]
    if not rows:
        raise ShapeError("names must hold at least one matrix; got none.")
    curves = {
        label: vector(f"energies of {label!r}", values, length=len(rows))
        for label, values in named("energies", energies).items()
    }
    data = []
    for index, (label, values) in enumerate(curves.items()):
        colour, _, symbol = style(index)
        mark = {
            "symbol": symbol if index == 0 else f"{symbol}-open",
            "size": 9,
            "color": colour,
            "line": {"width": 2, "color": colour},
        }
        hover = {"hovertemplate": "%{y}: %{x:.5g}"}
        data.append(
            {"type": "scatter", "mode": "markers", "name": label, "x": values, "y": rows, "marker": mark} | hover
        )
    labels = list(curves)
    if len(labels) > 1:
        apart = curves[labels[0]] - curves[labels[1]]
        most = int(np.abs(apart).argmax())
        above = f"{labels[0]} lies above {labels[1]} in {int((apart > 0).sum())} of {len(rows)} matrices"
        caption = f"{above}; furthest in {rows[most]}, by {number(abs(float(apart[most])))}."
    else:
        values = curves[labels[0]]
        caption = f"{labels[0]}: lowest in {rows[int(values.argmin())]}, highest in {rows[int(values.argmax())]}."
    return build(
        "energy_by_matrix",
        data,
        title=title,
        caption=caption,
        height=180 + 24 * len(rows),
        xaxis=axis("mean pairwise energy E"),
        yaxis=axis("", autorange="reversed", type="category"),
    )


def _unit(name: str, points: Any) -> np.ndarray:
    """Rows scaled to unit length."""
    values = matrix(name, points, shape=(None, 3))
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    if (norms == 0).any():
        row = int(np.flatnonzero(norms[:, 0] == 0)[0])
        raise OptionError(f"{name}: row {row} is zero and has no direction; leave it out.")
    return values / norms


def _arcs(old: np.ndarray, now: np.ndarray, *, points: int = 13) -> np.ndarray:
    """The shortest ways on the sphere, one after the other, with a gap (NaN) after each."""
    angle = np.arccos(np.clip((old * now).sum(axis=1), -1, 1))[:, None, None]
    t = np.linspace(0, 1, points)[None, :, None]
    # Where the angle is 0 or pi the great circle is not unique and the sine vanishes: a straight line stands in.
    safe = np.where(np.sin(angle) > 1e-6, np.sin(angle), 1.0)
    first = np.where(np.sin(angle) > 1e-6, np.sin((1 - t) * angle) / safe, 1 - t)
    second = np.where(np.sin(angle) > 1e-6, np.sin(t * angle) / safe, t)
    ways = first * old[:, None] + second * now[:, None]
    return np.concatenate([ways, np.full((len(old), 1, 3), np.nan)], axis=1).reshape(-1, 3)


def _ball() -> dict[str, Any]:
    """A faint unit sphere, a little smaller than the points so that it never hides one in front."""
    around, up = np.linspace(0, 2 * np.pi, 33), np.linspace(0, np.pi, 17)
    grey = [[0, "#D9DEE5"], [1, "#D9DEE5"]]
    return {
        "type": "surface",
        "x": 0.97 * np.outer(np.cos(around), np.sin(up)),
        "y": 0.97 * np.outer(np.sin(around), np.sin(up)),
        "z": 0.97 * np.outer(np.ones_like(around), np.cos(up)),
        "opacity": 0.35,
        "showscale": False,
        "colorscale": grey,
        "hoverinfo": "skip",
        "name": "",
        "showlegend": False,
    }


def _graticule() -> dict[str, Any]:
    """Meridians and parallels as one line with gaps: the eye needs them to see the turn."""
    angle = np.linspace(0, 2 * np.pi, 61)
    pieces = []
    for turn in np.arange(0, np.pi, np.pi / 6):
        ring = np.stack([np.cos(turn) * np.sin(angle), np.sin(turn) * np.sin(angle), np.cos(angle)], axis=1)
        pieces += [ring, np.full((1, 3), np.nan)]
    for height in (-0.75, -0.4, 0.0, 0.4, 0.75):
        radius = np.sqrt(1 - height**2)
        ring = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full_like(angle, height)], axis=1)
        pieces += [ring, np.full((1, 3), np.nan)]
    path = 0.975 * np.concatenate(pieces)
    mark = {"color": "#B9C0CA", "width": 1}
    return _scatter3d(path, mode="lines", line=mark, name="", hoverinfo="skip", showlegend=False)


def _scatter3d(points: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"type": "scatter3d", "x": points[:, 0], "y": points[:, 1], "z": points[:, 2]} | more


def _dots(index: int, symbol: str) -> dict[str, Any]:
    return {"mode": "markers", "marker": {"size": 5, "symbol": symbol, "color": style(index)[0]}}
