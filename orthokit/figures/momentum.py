"""What momentum does to gradients: noise suppression, subspaces, alignment, and arrows in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import betas_vector, named, vector
from orthokit.figures.template import (
    Number,
    axis,
    band,
    beta_axis,
    build,
    guide,
    line,
    listing,
    log_axis,
    number,
    style,
)

__all__ = [
    "alignment_by_beta",
    "alignment_by_checkpoint",
    "noise_suppression",
    "projection_arrows",
    "subspace_error",
]

Probe = Literal["stationary", "trajectory"]
PROBES = {
    "stationary": "Stationary probe: weights frozen, independent minibatches",
    "trajectory": "Trajectory probe: buffer kept alongside training",
}


def noise_suppression(windows: Any, ratios: Mapping[Any, Any]) -> dict[str, Any]:
    r"""How much an averaging window of $T$ gradients suppresses noise, with two power laws to compare with.

    Args:
        windows: $T = 1/(1-\beta) \ge 1$, shape ``(n,)``, increasing.
        ratios: Label to raw deviation over filtered deviation, ``(n,)``, positive.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic.

    Example:
        >>> T = [1, 2, 4, 8, 16]
        >>> figure = noise_suppression(T, {"white noise": [(2 * t - 1) ** 0.5 for t in T]})
        >>> "grows like (2T−1)^0.5" in figure["layout"]["meta"]["caption"]
        True

    References:
        Li et al., Denoise First, Orthogonalize Later, arXiv 2606.03899: the power 1/4 is the bound of its theorem 1;
        1/2 is what white noise gives.
    """
    windows = vector("windows", windows, low=1.0, increasing=True)
    data, said = [], []
    for index, (label, values) in enumerate(named("ratios", ratios).items()):
        values = _positive(f"ratios of {label!r}", values, len(windows))
        data.append(line(label, windows, values, index))
        said.append(f"{label} grows like (2T−1)^{_slope(windows, values)}")
    span = np.geomspace(windows[0], windows[-1], 60)
    data.append(guide("(2T−1)<sup>1/4</sup>, the bound", span, (2 * span - 1) ** 0.25, dash="dot"))
    data.append(guide("(2T−1)<sup>1/2</sup>, white noise", span, (2 * span - 1) ** 0.5, dash="dash"))
    return build(
        "noise_suppression",
        data,
        title="How much noise does a longer momentum window remove?",
        caption=f"{listing(said)}.",
        xaxis=log_axis("window T = 1/(1−β), steps", windows),
        yaxis=log_axis("noise suppression R(T), ratio", *(t["y"] for t in data)),
    )


def subspace_error(windows: Any, left: Mapping[Any, Any], right: Mapping[Any, Any]) -> dict[str, Any]:
    r"""How far the top singular subspaces of the momentum are from the true ones, against the window.

    Args:
        windows: $T \ge 1$, shape ``(n,)``, increasing.
        left: Rank to $\lVert\sin\Theta_U\rVert_2$, ``(n,)``, in (0, 1].
        right: The same for the right subspaces; same ranks.

    Returns:
        A Plotly figure as a dictionary; solid lines with filled markers are left subspaces, open ones right.

    Example:
        >>> figure = subspace_error([1, 4, 16], {1: [0.9, 0.4, 0.2]}, {1: [0.9, 0.5, 0.2]})
        >>> [trace["name"] for trace in figure["data"]][:2]
        ['rank 1, left', 'rank 1, right']
    """
    windows = vector("windows", windows, low=1.0, increasing=True)
    left, right = named("left", left), named("right", right)
    if left.keys() != right.keys():
        raise ShapeError(f"left and right must hold the same ranks; got {sorted(left)} and {sorted(right)}.")
    data, said = [], []
    for index, rank in enumerate(left):
        for side, values, dash in (("left", left[rank], "solid"), ("right", right[rank], "dot")):
            values = _positive(f"{side} errors of rank {rank}", values, len(windows))
            trace = line(f"rank {rank}, {side}", windows, values, index)
            trace["line"]["dash"] = dash
            if side == "right" and "marker" in trace:
                trace["marker"]["symbol"] += "-open"
            data.append(trace)
        said.append(f"(2T−1)^{_slope(windows, vector('left', left[rank]))} at rank {rank}")
    span = np.geomspace(windows[0], windows[-1], 60)
    start = float(np.max([vector("left", values)[0] for values in left.values()]))
    for power, dash in ((0.25, "dot"), (0.5, "dash")):
        name = f"slope of (2T−1)<sup>−1/{round(1 / power)}</sup>"
        data.append(guide(name, span, start * ((2 * windows[0] - 1) / (2 * span - 1)) ** power, dash=dash))
    return build(
        "subspace_error",
        data,
        title="How fast do the momentum's top directions approach the signal's?",
        caption=f"Left error falls like {listing(said)}; guides start where the largest curve starts.",
        xaxis=log_axis("window T = 1/(1−β), steps", windows),
        yaxis=log_axis("subspace error ‖sin Θ‖₂", *(t["y"] for t in data)),
    )


def alignment_by_beta(
    betas: Any,
    curves: Mapping[Any, Any],
    *,
    bands: Mapping[Any, tuple[Any, Any]] | None = None,
    probe: Probe = "stationary",
    signal: str = "full rank",
) -> dict[str, Any]:
    """How well each pipeline's direction aligns with the signal, against the momentum coefficient.

    Args:
        betas: Momentum coefficients in [0, 1), ``(n,)``, increasing.
        curves: Pipeline to alignment, ``(n,)``, at most 1.
        bands: Pipeline to ``(low, high)``, each ``(n,)``: an interval over seeds.
        probe: Where the gradients come from: frozen weights, or a training trajectory.
        signal: What stands for the true signal, in words.

    Returns:
        A Plotly figure as a dictionary; the axis is logarithmic in the effective sample count, labelled by beta.

    Example:
        >>> figure = alignment_by_beta([0, 0.9, 0.99], {"pre": [0.6, 0.94, 0.99], "none": [0.6, 0.6, 0.6]})
        >>> figure["layout"]["meta"]["caption"].split(". ")[0]
        'At β = 0.99: pre: 0.99; none: 0.6'
    """
    betas = betas_vector(betas)
    x = (1 + betas) / (1 - betas)
    data = _banded(x, curves, bands)
    best = [f"{label}: {number(vector(label, values)[-1])}" for label, values in named("curves", curves).items()]
    return build(
        "alignment_by_beta",
        data,
        title="Which order aligns best with the signal as momentum grows?",
        caption=f"At β = {number(betas[-1])}: {'; '.join(best)}. {_probe(probe)}; signal taken as {signal}.",
        xaxis=beta_axis(betas),
        yaxis=axis(f"alignment with the signal ({signal})", rangemode="tozero"),
    )


def alignment_by_checkpoint(
    steps: Any,
    curves: Mapping[Any, Any],
    *,
    bands: Mapping[Any, tuple[Any, Any]] | None = None,
    probe: Probe = "stationary",
    signal: str = "full rank",
) -> dict[str, Any]:
    """How well each pipeline's direction aligns with the signal, at several points of training.

    Args:
        steps: Training steps of the checkpoints, ``(n,)``, increasing.
        curves: Pipeline to alignment, ``(n,)``.
        bands: Pipeline to ``(low, high)``, each ``(n,)``.
        probe: Where the gradients come from.
        signal: What stands for the true signal, in words.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = alignment_by_checkpoint([0, 100], {"pre": [0.8, 0.7]}, probe="trajectory")
        >>> "Trajectory" in figure["layout"]["meta"]["caption"]
        True
    """
    steps = vector("steps", steps, increasing=True)
    data = _banded(steps, curves, bands)
    said = []
    for label, values in named("curves", curves).items():
        values = vector(label, values)
        said.append(f"{label} from {number(values[0])} to {number(values[-1])}")
    return build(
        "alignment_by_checkpoint",
        data,
        title="Does the ordering hold all through training?",
        caption=f"{listing(said)}. {_probe(probe)}; signal taken as {signal}.",
        xaxis=axis("training step of the checkpoint"),
        yaxis=axis(f"alignment with the signal ({signal})", rangemode="tozero"),
    )


def projection_arrows(
    arrows: Mapping[Any, tuple[Number, Number]], *, xlabel: str = "along the signal", ylabel: str = "across it"
) -> dict[str, Any]:
    """Arrows from the origin: gradient, momentum and signal projected onto one plane.

    Args:
        arrows: Label to ``(x, y)``.
        xlabel: What the horizontal direction is.
        ylabel: What the vertical direction is.

    Returns:
        A Plotly figure as a dictionary with equal scales on both axes.

    Example:
        >>> figure = projection_arrows({"signal": (1, 0), "gradient": (1, 1)})
        >>> figure["layout"]["meta"]["caption"]
        'Away from signal: gradient leans 45°.'
    """
    points = {label: vector(f"arrow {label!r}", pair, length=2) for label, pair in named("arrows", arrows).items()}
    reach = max(float(np.abs(p).max()) for p in points.values()) or 1.0
    data, heads = [], []
    for index, (label, (x, y)) in enumerate(points.items()):
        # The line carries the legend entry; the annotation only draws the arrow's head.
        data.append(line(label, [0, x], [0, y], index, markers=False))
        head = {"x": x, "y": y, "ax": 0.9 * x, "ay": 0.9 * y, "xref": "x", "yref": "y", "axref": "x", "ayref": "y"}
        mark = {"showarrow": True, "arrowhead": 2, "arrowsize": 1.4, "arrowwidth": 2, "arrowcolor": style(index)[0]}
        heads.append(head | mark | {"text": ""})
    labels = list(points)
    angles = [f"{label} leans {number(_angle(points[labels[0]], points[label]))}°" for label in labels[1:]]
    caption = f"Away from {labels[0]}: {listing(angles)}." if angles else f"{labels[0]} alone."
    limits = [-0.15 * reach, 1.15 * reach]
    if min(float(p.min()) for p in points.values()) < 0:
        limits[0] = -1.15 * reach
    return build(
        "projection_arrows",
        data,
        title="Which way do gradient and momentum point?",
        caption=caption,
        xaxis=axis(xlabel, range=limits, zeroline=True, zerolinecolor="#C5C9CF"),
        yaxis=axis(ylabel, range=limits, scaleanchor="x", constrain="domain", zeroline=True, zerolinecolor="#C5C9CF"),
        annotations=heads,
    )


def _banded(x: np.ndarray, curves: Any, bands: Any) -> list[dict[str, Any]]:
    """Lines with their optional bands, in one style per label."""
    curves = named("curves", curves)
    bands = named("bands", bands) if bands else {}
    if bands.keys() - curves.keys():
        raise ShapeError(f"bands name series that have no curve: {sorted(bands.keys() - curves.keys())}.")
    data = []
    for index, (label, values) in enumerate(curves.items()):
        if label in bands:
            low, high = (vector(f"band of {label!r}", side, length=len(x)) for side in bands[label])
            data.append(band(label, x, low, high, index))
        data.append(line(label, x, vector(f"curve {label!r}", values, length=len(x)), index))
    return data


def _probe(probe: str) -> str:
    if probe not in PROBES:
        raise OptionError(f"probe must be 'stationary' or 'trajectory'; got {probe!r}.")
    return PROBES[probe]


def _positive(name: str, values: Any, length: int) -> np.ndarray:
    """Values for a logarithmic axis."""
    values = vector(name, values, length=length)
    if values.min() <= 0:
        raise OptionError(f"{name} must be positive, as the axis is logarithmic; the smallest is {values.min():g}.")
    return values


def _slope(windows: np.ndarray, values: np.ndarray) -> str:
    """The fitted power of 2T-1."""
    x = np.log(2 * windows - 1)
    if len(x) < 2 or np.ptp(x) == 0:
        return "?"
    return number(round(float(np.polyfit(x, np.log(values), 1)[0]), 2))


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """Degrees between two plane vectors; zero vectors have no direction and count as 90."""
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.degrees(np.arccos(np.clip(a @ b / norms, -1, 1)))) if norms else 90.0
