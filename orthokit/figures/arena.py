"""What explains forgetting, in pictures: correlations with intervals, profiles along singular directions, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, named, nested, vector
from orthokit.figures.template import (
    COLOURS,
    GUIDE,
    SEQUENTIAL,
    SYMBOLS,
    axis,
    build,
    line,
    listing,
    number,
)

__all__ = ["correlation_forest", "direction_profiles", "distortion_scatter", "layer_map"]


def correlation_forest(
    found: Mapping[Any, Mapping[Any, Any]],
    *,
    runs: int,
    methods: int,
    published: Mapping[Any, Any] | None = None,
    xlabel: str = "correlation with forgetting",
    title: str = "Which diagnostic goes along with forgetting?",
) -> dict[str, Any]:
    """Correlation of every diagnostic with its interval, strongest on top.

    Args:
        found: Kind of correlation to diagnostic to ``(value, low, high)``, in [-1, 1]; the first kind sets the order.
        runs: How many runs they are over.
        methods: How many methods these runs are of, which is how many independent things there are.
        published: Diagnostic to a published value, drawn as a bar across; diagnostics not shown are left out.
        xlabel: Name of the horizontal axis.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary. An open marker has an interval that holds zero.

    Raises:
        ShapeError: The kinds hold different diagnostics, or an entry is no interval.

    Example:
        >>> found = {"Spearman": {"CKA": (0.8, 0.5, 0.9), "size": (0.1, -0.5, 0.6)}}
        >>> correlation_forest(found, runs=20, methods=5)["layout"]["meta"]["caption"]
        'Spearman, 20 runs of 5 methods: strongest with CKA (0.8, from 0.5 to 0.9); not told from zero: size.'
    """
    kinds = nested("found", found, row="kind", column="diagnostic")
    every = {kind: {name: _bounds(name, entry) for name, entry in of.items()} for kind, of in kinds.items()}
    lead, first = next(iter(every.items()))
    order = sorted(first, key=lambda name: -abs(first[name][0]))
    data = []
    for index, (kind, of) in enumerate(every.items()):
        rows = np.array([of[name] for name in order])
        clear = (rows[:, 1] > 0) | (rows[:, 2] < 0)
        colour = COLOURS[index]
        data.append(
            {
                **{"type": "scatter", "mode": "markers", "name": kind, "x": rows[:, 0]},
                "y": np.arange(len(order)) + 0.24 * (index - (len(every) - 1) / 2),
                "error_x": {
                    **{"type": "data", "symmetric": False, "thickness": 1.6, "width": 4, "color": colour},
                    "array": rows[:, 2] - rows[:, 0],
                    "arrayminus": rows[:, 0] - rows[:, 1],
                },
                "marker": {
                    "symbol": [SYMBOLS[index] + ("" if sure else "-open") for sure in clear],
                    **{"size": 9, "color": colour, "line": {"width": 1.6, "color": colour}},
                },
                "text": order,
                "hovertemplate": "%{text}: %{x:.2f}<extra>" + kind + "</extra>",
            }
        )
    known = {name: float(value) for name, value in (published or {}).items() if name in first}
    if known:
        mark = {"symbol": "line-ns", "size": 16, "color": GUIDE, "line": {"width": 3, "color": GUIDE}}
        places = [order.index(name) for name in known]
        bars = {"type": "scatter", "mode": "markers", "name": "published", "marker": mark}
        data.append(
            {**bars, "x": list(known.values()), "y": places, "hovertemplate": "published: %{x:.2f}<extra></extra>"}
        )
    value, low, high = first[order[0]]
    open_ = [name for name in order if first[name][1] <= 0 <= first[name][2]]
    caption = (
        f"{lead}, {runs} runs of {methods} methods: strongest with {order[0]} ({number(value)}, from {number(low)} to "
        f"{number(high)}); not told from zero: {listing(open_) if open_ else 'none'}."
    )
    return build(
        "correlation_forest",
        data,
        title=title,
        caption=caption,
        height=170 + 38 * len(order),
        xaxis=axis(xlabel, range=[-1.05, 1.05], zeroline=True, zerolinecolor=GUIDE),
        yaxis=axis("", tickmode="array", tickvals=list(range(len(order))), ticktext=order, autorange="reversed"),
    )


def distortion_scatter(
    groups: Mapping[Any, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "Does the distortion tell how much is forgotten?",
    counted: tuple[str, str] = ("runs", "methods"),
) -> dict[str, Any]:
    """One diagnostic against forgetting, one marker a run.

    Args:
        groups: Method to ``(diagnostic, forgetting)``, ``(runs,)`` each; NaN is left out.
        xlabel: Name of the diagnostic.
        ylabel: Name and unit of the forgetting.
        title: The question the chart answers.
        counted: What a marker and a group stand for, in the plural; default ``("runs", "methods")``.

    Returns:
        A Plotly figure as a dictionary; the caption has the rank correlation over all runs and inside each method.

    Raises:
        ShapeError: The two differ in length, or fewer than three runs are left.

    Example:
        >>> groups = {"A": ([1.0, 2.0, 3.0], [0.1, 0.2, 0.4]), "B": ([1.5, 2.5], [0.3, 0.5])}
        >>> distortion_scatter(groups, xlabel="residual", ylabel="nats")["layout"]["meta"]["caption"]
        'Rank correlation over 5 runs: 0.8; inside methods with three runs or more it is positive in 1 of 1.'
    """
    data, left, inside = [], [], []
    for index, (label, pair) in enumerate(named("groups", groups).items()):
        x, y = (array(f"values of {label!r}", values, dims=(1,), finite=False) for values in pair)
        if len(x) != len(y):
            raise ShapeError(f"{label!r} has {len(x)} values of the diagnostic and {len(y)} of forgetting.")
        good = np.isfinite(x) & np.isfinite(y)
        x, y = x[good], y[good]
        trace: dict[str, Any] = line(label, x, y, index, markers=True)
        trace["marker"]["size"] = 9
        data.append(trace | {"mode": "markers"})
        left.append((x, y))
        if len(x) >= 3:
            inside.append(_ranked(x, y))
    x, y = (np.concatenate([pair[k] for pair in left]) for k in range(2))
    if len(x) < 3:
        raise ShapeError(f"a correlation needs three runs at least; got {len(x)}.")
    marks, sets = counted
    caption = f"Rank correlation over {len(x)} {marks}: {number(round(_ranked(x, y), 2))}"
    if inside:
        positive = sum(value > 0 for value in inside)
        caption += f"; inside {sets} with three {marks} or more it is positive in {positive} of {len(inside)}"
    return build(
        "distortion_scatter",
        data,
        title=title,
        caption=caption + ".",
        xaxis=axis(xlabel),
        yaxis=axis(ylabel, zeroline=True, zerolinecolor=GUIDE),
    )


def direction_profiles(
    profiles: Mapping[Any, Mapping[Any, Any]], *, layer: str, title: str | None = None
) -> dict[str, Any]:
    r"""What happened along each singular direction: $|\Delta P(i)|/\sigma_1$ and $E(i)/\lVert\Delta W\rVert_F$.

    Args:
        profiles: Method to ``{"retention": values, "adaptation": values}``, ``(k,)`` each, not negative.
        layer: What the weight is called.
        title: The question; made from ``layer`` when not given.

    Returns:
        A Plotly figure as a dictionary, two panels beside each other.

    Raises:
        ShapeError: A method lacks a part, or parts differ in length.

    Example:
        >>> profiles = {"A": {"retention": [0.1, 0.0], "adaptation": [0.6, 0.8]}}
        >>> direction_profiles(profiles, layer="q")["layout"]["meta"]["caption"].split(". ")[0]
        'Largest retention drift: A 0.1 at direction 1'
    """
    data, drifts, shares, longest = [], [], [], 0
    for index, (label, parts) in enumerate(nested("profiles", profiles, row="method", column="part").items()):
        if set(parts) != {"retention", "adaptation"}:
            raise ShapeError(f"{label!r} must have the parts retention and adaptation; it has {', '.join(parts)}.")
        drift = vector(f"retention of {label!r}", parts["retention"], low=0.0)
        moved = vector(f"adaptation of {label!r}", parts["adaptation"], length=len(drift), low=0.0)
        across = np.arange(1, len(drift) + 1)
        data.append(line(label, across, drift, index, markers=False))
        right = line(label, across, moved, index, markers=False, showlegend=False)
        data.append(right | {"xaxis": "x2", "yaxis": "y2"})
        first = max(1, len(moved) // 4)
        drifts.append(f"{label} {number(drift.max())} at direction {int(drift.argmax()) + 1}")
        shares.append(f"{label} {(moved[:first] ** 2).sum() / max((moved**2).sum(), 1e-300):.0%}")
        longest = max(longest, len(drift))
    return build(
        "direction_profiles",
        data,
        title=title or f"Which directions of {layer} moved?",
        caption=f"Largest retention drift: {', '.join(drifts)}. Share of the change in the first quarter of the "
        f"directions: {', '.join(shares)}.",
        height=440,
        xaxis=axis("singular direction i", domain=[0, 0.44], range=[1, longest]),
        yaxis=axis("retention drift |ΔP(i)| / σ<sub>1</sub>", rangemode="tozero"),
        xaxis2=axis("singular direction i", domain=[0.56, 1], anchor="y2", range=[1, longest]),
        yaxis2=axis("adaptation E(i) / ‖ΔW‖<sub>F</sub>", anchor="x2", rangemode="tozero"),
    )


def layer_map(
    layers: Sequence[Any],
    values: Mapping[Any, Any],
    *,
    name: str,
    title: str | None = None,
) -> dict[str, Any]:
    """One diagnostic layer by layer: a row for each method, a column for each layer.

    Args:
        layers: Names of the layers, ``(n,)``, in the order of the model.
        values: Method to one number a layer, not negative; NaN where it was not measured.
        name: What the diagnostic is called.
        title: The question; made from ``name`` when not given.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: A method has another number of values, or nothing was measured.
        OptionError: A value is negative.

    Example:
        >>> layer_map(["a", "b"], {"LoRA": [0.1, 0.3], "OFT": [0.1, 0.2]}, name="residual")["layout"]["meta"]["caption"]
        'Largest: LoRA 0.3 in b, OFT 0.2 in b. Mean over layers: LoRA 0.2, OFT 0.15.'
    """
    columns, rows = [str(layer) for layer in layers], {}
    for label, numbers in named("values", values).items():
        rows[label] = vector(f"values of {label!r}", numbers, length=len(columns), finite=False)
    measured = {label: row for label, row in rows.items() if np.isfinite(row).any()}
    if any((row < 0).any() for row in measured.values()):
        raise OptionError(f"the {name} of a layer must be at least 0, where the colours begin.")
    if not measured:
        raise ShapeError(f"no layer has a {name}.")
    tops = [f"{label} {number(np.nanmax(row))} in {columns[int(np.nanargmax(row))]}" for label, row in measured.items()]
    means = [f"{label} {number(np.nanmean(row))}" for label, row in measured.items()]
    heat = {
        **{"type": "heatmap", "x": columns, "y": list(measured), "z": np.array(list(measured.values()))},
        **{"colorscale": SEQUENTIAL, "zmin": 0, "xgap": 1, "ygap": 2, "hoverongaps": False},
        "colorbar": {"title": {"text": name, "side": "right"}, "thickness": 14},
        "hovertemplate": "%{y}, %{x}: %{z:.3g}<extra></extra>",
    }
    return build(
        "layer_map",
        [heat],
        title=title or f"In which layers does the {name} arise?",
        caption=f"Largest: {', '.join(tops)}. Mean over layers: {', '.join(means)}.",
        height=190 + 30 * len(measured),
        xaxis=axis("layer, in the order of the model", type="category", tickangle=-50, tickfont={"size": 10}),
        yaxis=axis("", type="category", autorange="reversed"),
    )


def _bounds(name: str, entry: Any) -> tuple[float, float, float]:
    found = array(f"correlation of {name!r}", entry, dims=(1,))
    if len(found) != 3 or not found[1] <= found[2]:
        raise ShapeError(f"{name!r} must map to (value, low, high); got {found.tolist()}.")
    return float(found[0]), float(found[1]), float(found[2])


def _ranked(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties; 0 where one of the two is constant."""
    ranks = [(v[:, None] > v[None]).sum(1) + 0.5 * (v[:, None] == v[None]).sum(1) for v in (x, y)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])
