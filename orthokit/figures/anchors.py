"""Functional dual anchors: their alignment, their spectrum, where they lie, and the way a merge takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError, unknown_name
from orthokit.figures._check import array, matrix, named, seeded, vector
from orthokit.figures.template import SEQUENTIAL, Number, axis, build, guide, line, listing, log_axis, number, style

__all__ = ["anchor_alignment", "anchor_overlap", "anchor_spectra", "loss_landscape"]

# Singular values below this share of the largest are not drawn.
_FLOOR = 1e-8
# A share of the plane's extent that counts as no distance from it.
_ON_PLANE = 1e-5
# Alignment this close to the best is called reached.
_NEAR = 0.01


def anchor_alignment(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    bounds: Mapping[Any, Number] | None = None,
    title: str = "How fast do anchors learn to point along the task vector?",
) -> dict[str, Any]:
    r"""The cosine between the update that anchors induce and the task vector, along their construction.

    Args:
        curves: Label to ``(steps, cosines)``: steps ``(n,)``, ``>= 0``, increasing; cosines ``(n,)`` or ``(seeds, n)``.
        bounds: Label to what its cosine cannot exceed, for single linear layers; its names are among the curves.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary: means over seeds, bounds as thin lines.

    Raises:
        ShapeError: Steps and cosines do not fit together.
        OptionError: A value outside [-1, 1].
        UnknownNameError: A bound of a curve that is not there.

    Example:
        >>> figure = anchor_alignment({"block 0": ([0, 10, 20], [0.4, 0.79, 0.8])}, bounds={"block 0": 0.9})
        >>> figure["layout"]["meta"]["caption"]
        'block 0: from 0.4 to 0.8, within 0.01 of it from step 10 on; no inputs can exceed 0.9.'
    """
    series, limits = named("curves", curves), {str(k): float(v) for k, v in (bounds or {}).items()}
    for label in limits:
        if label not in series:
            raise unknown_name("curve", label, series)
    data, said = [], []
    for index, (label, pair) in enumerate(series.items()):
        try:
            across, values = pair
        except (TypeError, ValueError) as cause:
            raise ShapeError(f"{label!r} must map to (steps, cosines); got {type(pair).__name__}.") from cause
        steps = vector(f"steps of {label!r}", across, low=0.0, increasing=True)
        mean = seeded(f"cosines of {label!r}", values, len(steps), per="step").mean(axis=0)
        if np.abs(mean).max() > 1 + 1e-6:
            raise OptionError(f"cosines of {label!r} must be in [-1, 1]; the largest is {np.abs(mean).max():g}.")
        data.append(line(label, steps, mean, index))
        reached = steps[int(np.argmax(mean >= mean.max() - _NEAR))]
        told = f"{label}: from {number(mean[0])} to {number(mean[-1])}, within {_NEAR:g} of "
        told += f"{'it' if mean[-1] == mean.max() else 'the best'} from step {number(reached)} on"
        if label in limits:
            edge = guide(f"bound, {label}", steps[[0, -1]], [limits[label]] * 2, legendgroup=label, showlegend=False)
            edge["line"] |= {"color": style(index)[0]}
            data.append(edge)
            told += f"; no inputs can exceed {number(limits[label])}"
        said.append(told)
    return build(
        "anchor_alignment",
        data,
        title=title,
        caption=". ".join(said) + ".",
        xaxis=axis("construction step"),
        yaxis=axis("cos(−g, τ)"),
    )


def anchor_spectra(
    spectra: Mapping[Any, Any], *, energy: Number = 0.99, title: str = "Do anchors keep to few directions?"
) -> dict[str, Any]:
    """Normalised singular values of all anchor tokens, one line a step of their construction.

    Args:
        spectra: Step (or label) to singular values, descending, the largest 1, shape ``(k,)``.
        energy: Share of the squares that the caption counts directions for, in (0, 1); default 0.99.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, the values on a logarithmic axis.

    Raises:
        OptionError: Values that rise or are negative, or ``energy`` out of range.

    Example:
        >>> figure = anchor_spectra({"step 0": [1.0, 0.01], "step 9": [1.0, 0.8]})
        >>> figure["layout"]["meta"]["caption"]
        'Directions that hold 99 % of the energy: step 0: 1 of 2 and step 9: 2 of 2.'
    """
    if not 0 < energy < 1:
        raise OptionError(f"energy must be in (0, 1); got {energy}.")
    data, said, drawn = [], [], []
    for index, (label, values) in enumerate(named("spectra", spectra).items()):
        s = vector(f"singular values of {label!r}", values, low=0.0)
        if (np.diff(s) > 1e-6 * s[0]).any() or not s[0]:
            raise OptionError(f"singular values of {label!r} must descend from above 0; sort them.")
        squares = np.cumsum((s / s[0]) ** 2)
        said.append(f"{label}: {int(np.argmax(squares >= energy * squares[-1])) + 1} of {len(s)}")
        shown = np.where(s / s[0] > _FLOOR, s / s[0], np.nan)
        drawn.append(shown)
        data.append(line(label, np.arange(1, len(s) + 1), shown, index, markers=False))
    return build(
        "anchor_spectra",
        data,
        title=title,
        caption=f"Directions that hold {number(100 * energy)} % of the energy: {listing(said)}.",
        xaxis=axis("direction, by size"),
        yaxis=log_axis("singular value, the largest = 1", *drawn),
    )


def anchor_overlap(
    overlaps: Mapping[Any, Any],
    *,
    layers: Sequence[Any],
    chance: Number | None = None,
    ylabel: str = "shared energy of leading directions",
    title: str = "Do anchors lie where real hidden states do?",
) -> dict[str, Any]:
    """Overlap of the leading directions of anchors and real hidden states, layer by layer.

    Args:
        overlaps: Label (such as the step) to one overlap a layer, in [0, 1], ``(n,)`` or ``(seeds, n)``.
        layers: Names of the layers.
        chance: What random subspaces would have, ``k/d``, drawn as a thin line; default not drawn.
        ylabel: Name of the measure.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Another number of layers.
        OptionError: An overlap outside [0, 1].

    Example:
        >>> figure = anchor_overlap({"initial": [0.2, 0.3], "final": [0.6, 0.5]}, layers=["0", "1"], chance=0.2)
        >>> figure["layout"]["meta"]["caption"]
        'Mean over layers: initial 0.25 and final 0.55; random subspaces 0.2.'
    """
    places = [str(layer) for layer in layers]
    data, said = [], []
    for index, (label, values) in enumerate(named("overlaps", overlaps).items()):
        mean = seeded(f"overlaps of {label!r}", values, len(places), per="layer", signed=False).mean(axis=0)
        if mean.max() > 1 + 1e-6:
            raise OptionError(f"overlaps of {label!r} must be in [0, 1]; the largest is {mean.max():g}.")
        data.append(line(label, places, mean, index, markers=True))
        said.append(f"{label} {number(mean.mean())}")
    caption = f"Mean over layers: {listing(said)}"
    if chance is not None:
        data.append(guide("random subspaces", [places[0], places[-1]], [float(chance)] * 2))
        caption += f"; random subspaces {number(chance)}"
    return build(
        "anchor_overlap",
        data,
        title=title,
        caption=caption + ".",
        xaxis=axis("layer", type="category"),
        yaxis=axis(ylabel, rangemode="tozero"),
    )


def loss_landscape(
    x: Any,
    y: Any,
    losses: Any,
    *,
    points: Mapping[Any, tuple[Number, Number]] | None = None,
    paths: Mapping[Any, tuple[Any, Any]] | None = None,
    off: Mapping[Any, Any] | None = None,
    zlabel: str = "loss",
    title: str = "Which way does a merge take through the loss?",
) -> dict[str, Any]:
    """A loss on a plane in weight space as contours, with models as labelled points and ways as lines.

    Args:
        x: Grid, shape ``(m,)``, increasing: distance in weight space.
        y: Grid, shape ``(n,)``, increasing.
        losses: Shape ``(n, m)``, one row a ``y``.
        points: Name to its place ``(x, y)``.
        paths: Name to ``(places, losses)``: places ``(k, 2)`` in order, and the loss at each, ``(k,)`` (of the model
            itself, which may lie off the plane).
        off: Path to the distance of its places from the plane, ``(k,)``, for the caption.
        zlabel: Name and unit of the loss.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary; the caption says where each path begins and ends.

    Raises:
        ShapeError: Grids, losses or paths that do not fit together.
        OptionError: A grid that does not increase.
        UnknownNameError: Distances of a path that is not there.

    Example:
        >>> figure = loss_landscape([0, 1], [0, 1], [[1, 2], [2, 3]], paths={"TA": ([[0, 0], [1, 0]], [1.0, 0.5])})
        >>> figure["layout"]["meta"]["caption"]
        'Lowest on the plane: 1. TA: from 1 to 0.5, lowest 0.5.'
    """
    across, along = vector("x", x, increasing=True), vector("y", y, increasing=True)
    z = matrix("losses", losses, shape=(len(along), len(across)))
    ground = {
        **{"type": "contour", "x": across, "y": along, "z": z, "colorscale": SEQUENTIAL, "ncontours": 16},
        "colorbar": {"title": {"text": zlabel, "side": "right"}, "thickness": 14},
        "hovertemplate": f"(%{{x:.3g}}, %{{y:.3g}}): {zlabel} %{{z:.4g}}<extra></extra>",
        "contours": {"coloring": "heatmap"},
        "line": {"width": 0.6, "color": "rgba(255,255,255,0.6)"},
        "showlegend": False,
    }
    data: list[dict[str, Any]] = [ground]
    said = [f"Lowest on the plane: {number(z.min())}."]
    ways, away = (named("paths", paths) if paths else {}), {str(k): v for k, v in (off or {}).items()}
    for label in away:
        if label not in ways:
            raise unknown_name("path", label, ways)
    for index, (label, pair) in enumerate(ways.items()):
        try:
            places, values = pair
        except (TypeError, ValueError) as cause:
            raise ShapeError(f"path {label!r} must map to (places, losses); got {type(pair).__name__}.") from cause
        at = matrix(f"places of {label!r}", places, shape=(None, 2))
        values = vector(f"losses of {label!r}", values, length=len(at))
        # The ground runs from dark blue to yellow: the first colour, a blue, would vanish.
        trace = line(label, at[:, 0], at[:, 1], index + 1, markers=True, customdata=values)
        trace["line"]["width"] = 3
        trace["marker"] |= {"size": 10, "color": "#FFFFFF", "line": {"color": style(index + 1)[0], "width": 2.5}}
        trace["hovertemplate"] = f"{zlabel} %{{customdata:.4g}}<extra>{label}</extra>"
        data.append(trace)
        told = f"{label}: from {number(values[0])} to {number(values[-1])}, lowest {number(values.min())}"
        if label in away:
            distance = vector(f"distances of {label!r}", away[label], length=len(at), low=0.0)
            # A path within the plane is off it by rounding.
            away_from_it = distance.max() > _ON_PLANE * max(np.ptp(across), np.ptp(along))
            told += f", up to {number(distance.max())} off the plane" if away_from_it else ", all of it on the plane"
        said.append(f"{told}.")
    if points:
        spots = {label: array(f"place of {label!r}", at, dims=(1,)) for label, at in named("points", points).items()}
        if any(len(at) != 2 for at in spots.values()):
            raise ShapeError("points must map to (x, y).")
        places = np.stack(list(spots.values()))
        data.append(
            {
                **{"type": "scatter", "mode": "markers+text", "name": "models", "showlegend": False},
                **{"x": places[:, 0], "y": places[:, 1], "text": list(spots), "textposition": "top center"},
                "textfont": {"size": 13, "color": "#FFFFFF", "shadow": "1px 1px 2px #000000"},
                "marker": {"symbol": "star", "size": 13, "color": "#FFFFFF", "line": {"color": "#1F2328", "width": 1}},
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    return build(
        "loss_landscape",
        data,
        title=title,
        caption=" ".join(said),
        height=520,
        showlegend=bool(paths),
        xaxis=axis("distance in weight space, first direction"),
        yaxis=axis("distance, across"),
    )
