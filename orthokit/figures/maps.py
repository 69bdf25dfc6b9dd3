"""What the maps from skew to orthogonal matrices do: error against angle, parity, drift, and which to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, matrix, named, vector
from orthokit.figures.intervals import mean_interval
from orthokit.figures.template import axis, band, build, guide, line, listing, log_axis, number, style

__all__ = ["error_laws", "error_parity", "map_adviser", "merge_drift", "singular_values_by_angle"]

# Below this an error is rounding of float64, not the map's.
_ROUNDING = 1e-14
_ANGLE = "largest angle of the generator ‖Q‖₂, rad"


def error_laws(
    angles: Any,
    laws: Mapping[Any, Any],
    *,
    measured: Mapping[Any, tuple[Any, Any]] | None = None,
    at: float | int = 0.3,
    where: str = "measured",
) -> dict[str, Any]:
    r"""How far from orthogonal each map is, against the angle of its generator: lines are laws, markers are measured.

    Args:
        angles: Grid of $\lVert Q\rVert_2 > 0$ in radians, shape ``(n,)``, increasing.
        laws: Map to $\lVert R^\top R - I\rVert_2$ by its law, ``(n,)``.
        measured: Map to ``(angles, errors)`` of real generators; its names are among those of ``laws``.
        at: The angle at which the caption compares the maps; default 0.3.
        where: What the markers are, for the legend and the caption.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic. Errors below 1e-14 are rounding and not drawn.

    Raises:
        ShapeError: Lengths differ, or ``measured`` names a map without a law.
        OptionError: An angle is not positive.

    Example:
        >>> figure = error_laws([0.1, 0.3], {"k = 2": [1e-6, 7e-4], "k = 3": [2e-4, 1.6e-2]})
        >>> figure["layout"]["meta"]["caption"]
        'At an angle of 0.3: k = 2: 0.0007 and k = 3: 0.016.'
    """
    angles = _positive("angles", angles)
    laws, points = named("laws", laws), named("measured", measured) if measured else {}
    if points.keys() - laws.keys():
        raise ShapeError(f"measured names maps that have no law: {sorted(points.keys() - laws.keys())}.")
    data, said, shown = [], [], []
    nearest = int(np.abs(angles - at).argmin())
    for index, (label, values) in enumerate(laws.items()):
        values = vector(f"law of {label!r}", values, length=len(angles), low=0.0)
        data.append(line(label, angles, _above(values), index, markers=False))
        said.append(f"{label}: {number(values[nearest])}")
        if label in points:
            x, y = (vector(f"measured {label!r}", side) for side in points[label])
            if len(x) != len(y):
                raise ShapeError(f"measured {label!r} needs as many errors as angles; got {len(y)} and {len(x)}.")
            shown.append(_above(y))
            data.append(_markers(f"{label}, {where}", x, _above(y), index, legendgroup=label, showlegend=False))
    dots = f" Markers: {where}." if points else ""
    drawn = [_above(vector("law", values)) for values in laws.values()]
    return build(
        "error_laws",
        data,
        title="How orthogonal is each map at the angles that training reaches?",
        caption=f"At an angle of {number(angles[nearest])}: {listing(said)}.{dots}",
        xaxis=log_axis(_ANGLE, angles),
        yaxis=log_axis("orthogonality error ‖RᵀR − I‖₂", *drawn, *shown),
        height=500,
    )


def error_parity(lengths: Any, errors: Mapping[Any, Any], *, products: Sequence[int] | None = None) -> dict[str, Any]:
    r"""Error against the number of terms, even numbers as filled and odd ones as open markers.

    Args:
        lengths: Numbers of terms $k$, shape ``(n,)``, increasing integers.
        errors: Angle, as a label, to $\lVert R^\top R - I\rVert_2$ for each $k$, ``(n,)``, positive.
        products: Matrix products that each $k$ takes; shown below the axis.

    Returns:
        A Plotly figure as a dictionary; the caption says by how much each even number beats the next odd one.

    Raises:
        ShapeError: Lengths differ.
        OptionError: An error is not positive.

    Example:
        >>> figure = error_parity([2, 3], {"0.3": [7e-4, 1.4e-2]})
        >>> figure["layout"]["meta"]["caption"]
        'At angle 0.3, k = 2 is 20 times more orthogonal than k = 3.'
    """
    lengths = vector("lengths", lengths, increasing=True)
    data, said = [], []
    for index, (label, values) in enumerate(named("errors", errors).items()):
        values = _positive(f"errors of {label!r}", values, len(lengths))
        trace = line(f"angle {label}", lengths, values, index, markers=True)
        shape = trace["marker"]["symbol"]
        trace["marker"]["symbol"] = [shape if k % 2 == 0 else f"{shape}-open" for k in lengths]
        trace["marker"]["size"] = 9
        data.append(trace)
        if not said:
            said = _parity_said(lengths, values, label)
    ticks = [f"{k:g}" for k in lengths]
    if products is not None:
        counts = vector("products", products, length=len(lengths))
        ticks = [f"{k}<br>{int(p)}" for k, p in zip(ticks, counts, strict=True)]
    below = "" if products is None else "; below it the matrix products they take"
    where = {"tickmode": "array", "tickvals": lengths, "ticktext": ticks}
    every = np.concatenate([np.asarray(t["y"]) for t in data])
    return build(
        "error_parity",
        data,
        title="Is one more term always better?",
        caption=f"{listing(said)}." if said else "Filled markers: even numbers of terms; open: odd.",
        xaxis=axis(f"number of terms k{below} (filled: even, open: odd)", **where),
        yaxis=log_axis("orthogonality error ‖RᵀR − I‖₂", every),
    )


def singular_values_by_angle(
    angles: Any, curves: Mapping[Any, Any], *, measured: Mapping[Any, tuple[Any, Any]] | None = None
) -> dict[str, Any]:
    """What a map does to a plane as its angle grows past 1: keep it, blow it up, or flatten it.

    Args:
        angles: Angles in radians, shape ``(n,)``, increasing.
        curves: Map to the singular value of a plane with that angle, ``(n,)``.
        measured: Map to ``(angles, singular values)`` of real matrices; names among those of ``curves``.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Lengths differ, or ``measured`` names a map without a curve.

    Example:
        >>> figure = singular_values_by_angle([0, 1, 1.2], {"k = 3": [1, 0, 1.07], "exact": [1, 1, 1]})
        >>> figure["layout"]["meta"]["caption"]
        'Smallest singular value up to an angle of 1.2: k = 3: 0 and exact: 1; largest: k = 3: 1.07 and exact: 1.'
    """
    angles = vector("angles", angles, increasing=True, low=0.0)
    curves, points = named("curves", curves), named("measured", measured) if measured else {}
    if points.keys() - curves.keys():
        raise ShapeError(f"measured names maps that have no curve: {sorted(points.keys() - curves.keys())}.")
    data, low, high = [], [], []
    for index, (label, values) in enumerate(curves.items()):
        values = vector(f"curve of {label!r}", values, length=len(angles), low=0.0)
        data.append(line(label, angles, values, index, markers=False))
        low.append(f"{label}: {number(values.min())}")
        high.append(f"{label}: {number(values.max())}")
        if label in points:
            x, y = (vector(f"measured {label!r}", side) for side in points[label])
            data.append(_markers(f"{label}, measured", x, y, index, legendgroup=label, showlegend=False))
    if angles[0] < 1 < angles[-1]:
        top = max(float(np.max(trace["y"])) for trace in data)
        data.append(guide("angle 1", np.array([1.0, 1.0]), np.array([0.0, top])))
    caption = f"Smallest singular value up to an angle of {number(angles[-1])}: {listing(low)}"
    return build(
        "singular_values_by_angle",
        data,
        title="What happens to a plane whose angle nears 1?",
        caption=f"{caption}; largest: {listing(high)}.",
        xaxis=axis("angle of the plane θ, rad"),
        yaxis=axis("singular value of the plane", rangemode="tozero"),
    )


def merge_drift(
    merges: Any, measured: Mapping[Any, Any], *, predicted: Mapping[Any, Any] | None = None, setting: str = ""
) -> dict[str, Any]:
    """How the singular values of a weight drift as inexact rotations are merged into it again and again.

    Args:
        merges: Numbers of merges, shape ``(n,)``, increasing.
        measured: Map to the relative change of the geometric mean of the singular values, ``(seeds, n)`` or ``(n,)``.
        predicted: Map to the same by the law, ``(n,)``; drawn as thin lines.
        setting: How the generators were drawn, for the caption.

    Returns:
        A Plotly figure as a dictionary. The axis shows the size of the change, since maps differ by powers of ten; the
        legend says whether it is growth. Bands are 95 % intervals of the mean over seeds.

    Raises:
        ShapeError: Lengths differ, or ``predicted`` names a map that was not measured.

    Example:
        >>> figure = merge_drift([0, 200], {"k = 3": [0, -0.47]}, predicted={"k = 3": [0, -0.46]})
        >>> figure["layout"]["meta"]["caption"]
        'Change of the geometric mean of the singular values after 200 merges: k = 3: −47 % (predicted −46 %).'
    """
    merges = vector("merges", merges, increasing=True)
    measured, laws = named("measured", measured), named("predicted", predicted) if predicted else {}
    if laws.keys() - measured.keys():
        raise ShapeError(f"predicted names maps that were not measured: {sorted(laws.keys() - measured.keys())}.")
    data, guides, said = [], [], []
    for index, (label, values) in enumerate(measured.items()):
        runs = np.atleast_2d(100 * array(f"drift of {label!r}", values, dims=(1, 2)))
        runs = matrix(f"drift of {label!r}", runs, shape=(None, len(merges)))
        mean = runs.mean(0)
        sign = "grows" if mean[-1] > 0 else "shrinks"
        if len(runs) > 1:
            ends = np.array([mean_interval(column)[1:] for column in runs.T]).T
            # An interval that holds 0 has no lower end on a logarithmic axis: it ends where the mean does.
            low = np.where(ends[0] * ends[1] > 0, np.abs(ends).min(0), np.abs(mean))
            seen = np.abs(mean) > 0
            data.append(band(label, merges[seen], low[seen], np.abs(ends).max(0)[seen], index))
        drawn = np.where(mean == 0, np.nan, np.abs(mean))
        data.append(line(f"{label} ({sign})", merges, drawn, index, markers=False, legendgroup=label))
        words = f"{label}: {number(mean[-1])} %"
        if label in laws:
            law = 100 * vector(f"prediction of {label!r}", laws[label], length=len(merges))
            drawn = np.where(law == 0, np.nan, np.abs(law))
            guides.append(guide("predicted", merges, drawn, legendgroup="predicted", showlegend=not guides))
            words += f" (predicted {number(law[-1])} %)"
        said.append(words)
    setting = f" {setting}." if setting else ""
    sizes = [trace["y"] for trace in data + guides]
    start = "Change of the geometric mean of the singular values"
    return build(
        "merge_drift",
        data + guides,
        title="Does a weight keep its singular values over many merges?",
        caption=f"{start} after {number(merges[-1])} merges: {listing(said)}.{setting}",
        xaxis=axis("number of merges"),
        yaxis=log_axis("size of the change, %", *sizes),
    )


def map_adviser(
    angles: Any,
    products: Mapping[Any, Any],
    *,
    names: Mapping[Any, Sequence[str]] | None = None,
    exact: int | None = None,
) -> dict[str, Any]:
    """The fewest matrix products that keep the singular values within a tolerance, against the angle.

    Args:
        angles: Largest angles in radians, shape ``(n,)``, increasing, positive.
        products: Tolerance, as a label, to the number of products, ``(n,)``; NaN where only the exact map will do.
        names: Tolerance to the name of the map at each angle, shown on hover.
        exact: Height at which to draw the exact map; default one above the most products.

    Returns:
        A Plotly figure as a dictionary, with a logarithmic angle axis.

    Raises:
        ShapeError: Lengths differ.
        OptionError: An angle is not positive.

    Example:
        >>> figure = map_adviser([0.1, 0.5, 1.0], {"1e-3": [2, 4, float("nan")]})
        >>> figure["layout"]["meta"]["caption"]
        'The exact map is needed from an angle of 1 for 1e-3.'
    """
    angles = _positive("angles", angles)
    data, said = [], []
    rows = {k: array(f"products for {k!r}", v, dims=(1,), finite=False) for k, v in named("products", products).items()}
    most = max([float(np.nanmax(row)) for row in rows.values() if np.isfinite(row).any()], default=0.0)
    top = most + 1 if exact is None else float(exact)
    for index, (label, row) in enumerate(rows.items()):
        if len(row) != len(angles):
            raise ShapeError(f"products for {label!r} must have {len(angles)} values; got {len(row)}.")
        heights = np.where(np.isfinite(row), row, top)
        trace = line(f"within {label}", angles, heights, index, markers=False)
        trace["line"]["shape"] = "hv"
        if names and label in names:
            trace |= {"text": list(names[label]), "hovertemplate": "angle %{x:.3f}: %{text}<extra></extra>"}
        data.append(trace)
        solved = angles[~np.isfinite(row)]
        said.append(f"from an angle of {number(solved[0])} for {label}" if len(solved) else f"nowhere for {label}")
    levels = list(range(int(most) + 1))
    where = {"tickmode": "array", "tickvals": [*levels, top], "ticktext": [*map(str, levels), "exact<br>(solve)"]}
    return build(
        "map_adviser",
        data,
        title="How many matrix products does an angle need?",
        caption=f"The exact map is needed {listing(said)}.",
        xaxis=log_axis(_ANGLE, angles),
        yaxis=axis("matrix products of the cheapest map", **where),
    )


def _parity_said(lengths: np.ndarray, values: np.ndarray, label: str) -> list[str]:
    """By how much each even length beats the next odd one."""
    words = []
    for here, after, k in zip(values, values[1:], lengths, strict=False):
        if k % 2 == 0:
            start = f"At angle {label}, k" if not words else "k"
            words.append(f"{start} = {k:g} is {_times(after / here)} times more orthogonal than k = {k + 1:g}")
    return words


def _times(factor: float) -> str:
    """A factor to two digits, in plain digits."""
    return f"{float(f'{factor:.2g}'):,.10g}".replace(",", " ")


def _markers(name: str, x: np.ndarray, y: np.ndarray, index: int, **more: Any) -> dict[str, Any]:
    colour, _, symbol = style(index)
    marker = {"symbol": f"{symbol}-open", "size": 6, "color": colour, "opacity": 0.7, "line": {"width": 1}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker} | more


def _above(values: np.ndarray) -> np.ndarray:
    return np.where(values > _ROUNDING, values, np.nan)


def _positive(name: str, values: Any, length: int | None = None) -> np.ndarray:
    values = vector(name, values, length=length, increasing=length is None)
    if values.min() <= 0:
        raise OptionError(f"{name} must be positive, as the axis is logarithmic; the smallest is {values.min():g}.")
    return values
