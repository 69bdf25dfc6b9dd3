"""One adapter on one matrix in pictures: its error at its angle, what it moves, and what of the matrix stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, matrix, named, vector
from orthokit.figures.template import (
    DIVERGING,
    GUIDE,
    Number,
    axis,
    build,
    fade,
    guide,
    line,
    listing,
    log_axis,
    number,
    style,
)

__all__ = ["error_at_angle", "matrix_picture", "pair_angles", "spectrum_before_after"]

_POINTS = 128
_TINY = 1e-9  # changes of what is measured in float64 that are its rounding
_ROUNDING = 1e-14  # of float64: below it there is no law to draw


def error_at_angle(
    angles: Any,
    laws: Mapping[Any, Any],
    *,
    current: str | None = None,
    at: Number | None = None,
    measured: Mapping[Any, Number] | None = None,
    floor: Number | None = None,
    span: tuple[Number, Number] | None = None,
    title: str = "How far from orthogonal is the rotation at this angle?",
) -> dict[str, Any]:
    r"""The law of the orthogonality error over the angle, and what one rotation has at its angle.

    Args:
        angles: Grid of the largest angle of the generator, radians, ``(n,)``, increasing, above 0.
        laws: Map to $\lVert R^\top R - I\rVert_2$ by its law, ``(n,)``, not negative; 0 is not drawn.
        current: The label in ``laws`` of the map in use, drawn stronger; ``None`` when it has no error to draw.
        at: The angle in use, above 0; ``None``: there is no rotation.
        measured: Name to the error measured at ``at``, one marker each.
        floor: Smallest relative step of the number format, above 0, drawn as a thin line; about there is rounding.
        span: Ends of the vertical axis, above 0, so that a live chart holds still.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic.

    Raises:
        ShapeError: Lengths differ, or ``current`` is not in ``laws``.
        OptionError: An angle is not positive, or something is measured without an angle.

    Example:
        >>> laws = {"k = 3": [2e-4, 1.6e-2]}
        >>> figure = error_at_angle([0.1, 0.3], laws, current="k = 3", at=0.3, measured={"measured": 0.0161})
        >>> figure["layout"]["meta"]["caption"]
        'At an angle of 0.3 the law of k = 3 gives 0.016; measured: 0.0161.'
    """
    angles = vector("angles", angles, increasing=True)
    if angles[0] <= 0 or (at is not None and not at > 0):
        raise OptionError(f"angles must be above 0, as the axis is logarithmic; got {min(angles[0], at or angles[0])}.")
    if measured and at is None:
        raise OptionError("what was measured needs the angle it was measured at; give at=.")
    curves = {label: vector(f"law of {label!r}", v, length=len(angles), low=0.0) for label, v in laws.items()}
    if current is not None and current not in curves:
        raise ShapeError(f"current must be one of the laws {list(curves)}; got {current!r}.")
    data, every = [], [np.asarray(floor if floor else [])]
    for index, (label, values) in enumerate(curves.items()):
        shown = np.where(values > _ROUNDING, values, np.nan)
        trace = line(label, angles, shown, index, markers=False)
        strong = label == current
        trace["line"] |= {"width": 3.5 if strong else 1.5}
        data.append(trace | {"opacity": 1.0 if strong or current is None else 0.6})
        every.append(shown)
    if floor is not None:
        data.append(guide("rounding", [angles[0], angles[-1]], [floor, floor], dash="dot"))
    for index, (label, value) in enumerate((measured or {}).items()):
        mark = {"symbol": ("star", "diamond-open")[index % 2], "size": (16, 11)[index % 2], "color": "#1F2328"}
        point = {"type": "scatter", "mode": "markers", "name": label, "x": [at], "marker": mark}
        data.append(point | {"y": [value if value > 0 else np.nan]})
        every.append(np.asarray([value]))
    vertical = log_axis("orthogonality error ‖RᵀR − I‖₂", *every, *([span] if span else []))
    if span is not None:
        vertical["range"] = [float(np.log10(end)) for end in span]
    across = [float(np.log10(angles[0])), float(np.log10(angles[-1]))]
    return build(
        "error_at_angle",
        data,
        title=title,
        caption=_error_said(angles, curves, current, at, measured or {}),
        xaxis=log_axis("largest angle of the generator ‖Q‖₂, rad", angles, range=across),
        yaxis=vertical,
        shapes=[] if at is None else [_upright(float(at))],
    )


def spectrum_before_after(
    before: Any,
    after: Mapping[Any, Any],
    *,
    span: tuple[Number, Number] | None = None,
    title: str = "Do the singular values stay?",
) -> dict[str, Any]:
    """Singular values of a weight before and after it was changed, in one or several ways.

    Args:
        before: Singular values, descending, the first above 0, ``(n,)``.
        after: Way of changing to singular values, descending, ``(n,)``.
        span: Ends of the vertical axis, above 0, so that a live chart holds still.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, the vertical axis logarithmic; the weight before is a broad pale line. Of a
        long spectrum 128 values are drawn, evenly spaced, the ends among them.

    Raises:
        ShapeError: Lengths differ.
        OptionError: The first singular value is 0.

    Example:
        >>> figure = spectrum_before_after([2.0, 1.0], {"turned": [2.0, 1.0], "added": [2.2, 1.1]})
        >>> figure["layout"]["meta"]["caption"]
        'Largest change of a singular value, as a share of the first: turned 0 and added 0.1.'
    """
    before = vector("before", before, low=0.0)
    if before[0] <= 0:
        raise OptionError("the first singular value must be above 0: changes are told as shares of it.")
    at = np.unique(np.linspace(0, len(before) - 1, min(len(before), _POINTS)).round().astype(int))
    rank = at + 1
    wide = line("before", rank, np.where(before > 0, before, np.nan)[at], 0, markers=False)
    wide["line"] = {"color": fade(style(0)[0], 0.35), "dash": "solid", "width": 8}
    data, said, every = [wide], [], [before]
    for index, (label, values) in enumerate(named("after", after).items()):
        values = vector(f"after {label!r}", values, length=len(before), low=0.0)
        drawn = np.where(values > 0, values, np.nan)
        data.append(line(label, rank, drawn[at], index, markers=False))
        every.append(drawn)
        said.append(f"{label} {_size(np.abs(values - before).max() / before[0])}")
    vertical = log_axis("singular value σᵢ", *every, *([span] if span else []))
    if span is not None:
        vertical["range"] = [float(np.log10(end)) for end in span]
    return build(
        "spectrum_before_after",
        data,
        title=title,
        caption=f"Largest change of a singular value, as a share of the first: {listing(said)}.",
        xaxis=axis("index i, largest first"),
        yaxis=vertical,
    )


def pair_angles(
    before: Any,
    after: Mapping[Any, Any],
    *,
    title: str = "Do the angles between neurons stay?",
) -> dict[str, Any]:
    """Angles between pairs of rows of a weight, after against before: on the diagonal they stay.

    Args:
        before: Angles in degrees, 0 to 180, ``(pairs,)``.
        after: Way of changing the weight to the angles of the same pairs, ``(pairs,)``.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Lengths differ.

    Example:
        >>> figure = pair_angles([80.0, 95.0], {"turned": [80.0, 95.0], "added": [82.0, 95.0]})
        >>> figure["layout"]["meta"]["caption"]
        'Largest change of an angle among 2 pairs: turned 0° and added 2°.'
    """
    before = vector("before", before, low=0.0)
    ends = np.array([before.min(), before.max()])
    data: list[dict[str, Any]] = [guide("unchanged", ends, ends, dash="solid")]
    said = []
    # The first is drawn last: it must not vanish behind the clouds of the others.
    for index, (label, values) in reversed(list(enumerate(named("after", after).items()))):
        values = vector(f"after {label!r}", values, length=len(before), low=0.0)
        colour, _, symbol = style(index)
        mark = {"symbol": symbol if index == 0 else f"{symbol}-open", "size": 5, "color": colour, "opacity": 0.75}
        cloud = {"type": "scatter", "mode": "markers", "name": label, "x": before, "y": values, "marker": mark}
        data.append(cloud | {"hovertemplate": "%{x:.2f}° → %{y:.2f}°"})
        said.insert(0, f"{label} {_size(np.abs(values - before).max(), unit='°')}")
    return build(
        "pair_angles",
        data,
        title=title,
        caption=f"Largest change of an angle among {len(before)} pairs: {listing(said)}.",
        xaxis=axis("angle before, degrees"),
        yaxis=axis("angle after, degrees"),
    )


def matrix_picture(
    M: Any,
    *,
    name: str,
    cells: int = 64,
    zmax: Number | None = None,
    xlabel: str = "input",
    ylabel: str = "input",
    title: str | None = None,
) -> dict[str, Any]:
    """The entries of a matrix as colours around 0; a large one is shown in patches, each by its largest entry.

    Args:
        M: ``(rows, columns)``.
        name: What it is, for the caption and the question.
        cells: Most cells to a side, ``>= 1``; default 64.
        zmax: Fixed end of the colour scale on both sides, above 0; default the largest entry in size.
        xlabel: Name of the columns.
        ylabel: Name of the rows.
        title: The question; default asks where ``name`` differs from 0.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        OptionError: ``cells`` or ``zmax`` out of range.

    Example:
        >>> figure = matrix_picture([[0.0, -0.5], [0.25, 0.0]], name="R − I")
        >>> figure["layout"]["meta"]["caption"]
        'R − I: 50 % of the entries are exactly 0; the largest in size is −0.5.'
    """
    values = matrix(f"entries of {name}", M)
    if cells < 1 or (zmax is not None and not zmax > 0):
        raise OptionError(f"cells must be at least 1 and zmax above 0; got cells={cells} and zmax={zmax}.")
    rows, columns = (max(1, -(-side // cells)) for side in values.shape)
    shown = _patches(values, rows, columns)
    extreme = float(values.flat[np.abs(values).argmax()])
    zero = 100 * float((values == 0).mean())
    limit = float(zmax) if zmax is not None else abs(extreme) or 1.0
    patches = "" if rows == columns == 1 else f" A cell is the largest of {rows} × {columns} entries."
    trace = {
        "type": "heatmap",
        "z": shown,
        "x": np.arange(shown.shape[1]) * columns + (columns + 1) / 2,
        "y": np.arange(shown.shape[0]) * rows + (rows + 1) / 2,
        **{"zmin": -limit, "zmid": 0, "zmax": limit, "colorscale": DIVERGING},
        "colorbar": {"thickness": 12, "title": {"text": ""}, "outlinewidth": 0},
        "hovertemplate": f"{ylabel} %{{y:.0f}}, {xlabel} %{{x:.0f}}: %{{z:.3g}}<extra></extra>",
    }
    return build(
        "matrix_picture",
        [trace],
        title=title or f"Where does {name} differ from 0?",
        caption=f"{name}: {number(zero)} % of the entries are exactly 0; the largest in size is {number(extreme)}."
        + patches,
        showlegend=False,
        xaxis=axis(xlabel),
        yaxis=axis(ylabel, autorange="reversed"),
    )


def _error_said(
    angles: np.ndarray,
    curves: Mapping[str, np.ndarray],
    current: str | None,
    at: Number | None,
    measured: Mapping[Any, Number],
) -> str:
    if at is None:
        return "There is no rotation here; the lines are the laws of those that the maps make."
    said = [f"{label}: {number(value)}" for label, value in measured.items()]
    if current is None:
        law = f"At an angle of {number(at)} the map is exact"
    else:
        # Laws are powers of the angle where they matter: lines between the points of the grid in both logarithms.
        value = float(np.exp(np.interp(np.log(at), np.log(angles), np.log(np.maximum(curves[current], 1e-300)))))
        law = f"At an angle of {number(at)} the law of {current} gives {number(value)}"
    return f"{law}; {listing(said)}." if said else f"{law}."


def _upright(at: float) -> dict[str, Any]:
    """A vertical line through the whole plot."""
    ends = {"x0": at, "x1": at, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return {"type": "line", **ends, "line": {"color": GUIDE, "width": 1, "dash": "dot"}, "layer": "below"}


def _patches(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The entry of largest size, with its sign, of every patch; smaller patches at the far ends."""
    below, right = -values.shape[0] % rows, -values.shape[1] % columns
    padded = np.pad(values, ((0, below), (0, right)))
    tiled = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    # Rows of a patch first: whole rows of the matrix are compared at once.
    high, low = tiled.max(axis=1).max(axis=2), tiled.min(axis=1).min(axis=2)
    return array("patches", np.where(high >= -low, high, low), dims=(2,))


def _size(change: float, *, unit: str = "") -> str:
    """A change as a caption says it."""
    return "rounding" if 0 < change < _TINY else f"{number(change)}{unit}"
