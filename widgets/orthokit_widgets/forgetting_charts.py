"""Charts of the page "Forgetting": the front with the run that is looked at, its ways back, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.figures import spectrum_before_after
from orthokit.figures.arena import direction_profiles
from orthokit.figures.front import stability_plasticity
from orthokit.figures.template import (
    COLOURS,
    GUIDE,
    axis,
    build,
    guide,
    line,
    listing,
    log_axis,
    number,
    plain,
)
from orthokit.lab.arena import METHODS, Ground
from orthokit_widgets.forgetting_data import Portrait, Profile, Record
from orthokit_widgets.forgetting_words import PATH_WORDS

__all__ = ["front", "front_base", "layers", "profile", "spectrum", "ways"]

_INK = "#1F2328"
_ZERO = {"zeroline": True, "zerolinecolor": "#D8DEE4"}
_GEOMETRY = {"raw": "moved", "procrustes": "left, turned back", "gram": "angles (Gram)", "cka": "1 − CKA"}
_STOPS = {"safe": "safe scales", "min": "least scales", "uniform": "one scale"}
_WEIGHTS = {
    "moved": "moved",
    "retention": "|ΔP| / σ₁, mean",
    "spectrum": "spectrum",
    "csd_general": "drift on old inputs",
}
_SPECTRUM = "Do the singular values stay, and their directions?"
_ROUNDING = 1e-5  # of float32, in which weights are kept
_SMALLEST = 1e-8  # below this a measure is rounding: it would only stretch a logarithmic axis


def front_base(record: Record | None, place: Ground) -> dict[str, Any]:
    """All recorded runs of a ground; each marker carries what to show when it is pressed.

    Args:
        record: The recorded runs, if there are any.
        place: The ground, which names the units.

    Returns:
        A Plotly figure as a dictionary.
    """
    axes: dict[str, Any] = {"xlabel": f"learnt ({place.unit})", "ylabel": f"forgotten ({place.unit}), less is up"}
    if record is None:
        return _nothing_yet(**axes)
    points = record.points()
    names = {METHODS[method].label: method for method in METHODS if method in points}
    pairs = {label: list(points[name].values()) for label, name in names.items()}
    # Any of them may be looked at next, so none is left outside.
    figure = stability_plasticity(pairs, **axes, clip=False)
    for trace in figure["data"]:
        if trace["name"] not in names:
            continue
        method = names[trace["name"]]
        if trace["mode"] == "markers":
            trace.pop("hoverinfo")
            trace["customdata"] = [[method, str(seed)] for seed in points[method]]
            words = f"{trace['name']}, seed %{{customdata[1]}}: learnt %{{x:.3f}}, forgot %{{y:.3f}}<extra></extra>"
            trace["hovertemplate"] = words
            trace["marker"] |= {"size": 7}
        else:
            trace["customdata"] = [[method, "mean"]]
    return figure


def _nothing_yet(*, xlabel: str, ylabel: str) -> dict[str, Any]:
    """The plane with the pretrained model alone."""
    before = {
        **{"type": "scatter", "mode": "markers+text", "name": "before", "x": [0], "y": [0], "text": ["before"]},
        **{"textposition": "top center", "marker": {"symbol": "star", "size": 12, "color": GUIDE}},
    }
    return build(
        "stability_plasticity",
        [before],
        title="Who learns more, and who forgets less?",
        caption="Nothing is recorded here: start a run and watch its point travel from the star.",
        showlegend=False,
        xaxis=axis(xlabel, **_ZERO),
        yaxis=axis(ylabel, autorange="reversed", **_ZERO),
    )


def front(
    base: Mapping[str, Any],
    portrait: Portrait | None,
    *,
    way: str,
    alpha: float,
    others: Mapping[str, Portrait] | None = None,
) -> dict[str, Any]:
    """The recorded runs, with the run that is looked at on top: its ways back, its travel, and where the slider is.

    Args:
        base: What :func:`front_base` made; not changed.
        portrait: The run.
        way: The path that is walked.
        alpha: How far along it.
        others: Runs of the store by name, for markers of their own.

    Returns:
        A Plotly figure as a dictionary.
    """
    data = list(base["data"])
    for name, other in (others or {}).items():
        data.append(_own(name, other, _colour(base, other.method)))
    if portrait is None:
        return {**base, "data": data}
    colour = _colour(base, portrait.method)
    for path, walk in portrait.walks.items():
        shape = {"color": colour, "width": 2.5 if path == way else 1.2, "dash": "solid" if path == way else "dot"}
        data.append(_path(PATH_WORDS[path], walk.gain, walk.forgetting, shape))
    for stop, (x, y) in portrait.marks.items():
        hover = f"{_STOPS.get(stop, stop)}: learnt %{{x:.3f}}, forgot %{{y:.3f}}<extra></extra>"
        mark = {"color": colour, "symbol": "diamond-open", "size": 8}
        shared = {"type": "scatter", "mode": "markers", "name": stop, "showlegend": False}
        data.append({**shared, "x": [x], "y": [y], "marker": mark, "hovertemplate": hover})
    if not portrait.walks and len(portrait.travel) > 1:
        shape = {"color": colour, "width": 1.5, "dash": "solid"}
        data.append(_path("its way", portrait.travel[:, 0], portrait.travel[:, 1], shape, mode="lines+markers"))
    walk = portrait.walks.get(way)
    x, y = portrait.point if walk is None else walk.at(alpha)
    ring = {"color": "#FFFFFF", "size": 17, "line": {"color": _INK, "width": 3}, "symbol": "circle"}
    dot = {"color": colour, "size": 9, "symbol": "circle"}
    shared = {"type": "scatter", "mode": "markers", "x": [x], "y": [y], "hoverinfo": "skip"}
    data += [
        {**shared, "name": "ring", "showlegend": False, "marker": ring},
        {**shared, "name": "shown", "marker": dot, "showlegend": False},
    ]
    return {**base, "data": [*base["data"], *plain(data[len(base["data"]) :])]}


def ways(portrait: Portrait, place: Ground, *, way: str, alpha: float) -> dict[str, Any] | None:
    """What is kept of the gain and what is left of the forgetting, against how far along the path."""
    if not portrait.walks:
        return None
    data = []
    for path in [way, *(path for path in portrait.walks if path != way)]:
        walk = portrait.walks[path]
        for index, (name, values) in enumerate((("learnt", walk.gain), ("forgotten", walk.forgetting))):
            trace = line(name, walk.alphas, values, index, markers=path == way)
            if path != way:
                trace["line"] = {"color": COLOURS[index], "dash": "dot", "width": 1.2}
                trace["showlegend"] = False
            data.append(trace)
    gain, forgetting = portrait.walks[way].at(alpha)
    data.append(guide("α", [alpha, alpha], _ends(portrait), showlegend=False, hoverinfo="skip"))
    others = " Dotted: the other ways." if len(portrait.walks) > 1 else ""
    return build(
        "forgetting_ways",
        data,
        title="What would going back keep, and what save?",
        caption=f"At α = {alpha:.2f}: learnt {number(gain)}, forgotten {number(forgetting)} {place.unit}.{others}",
        xaxis=axis("α (0: as before, 1: as trained)", range=[-0.02, 1.02]),
        yaxis=axis(f"change of the loss ({place.unit})", zeroline=True, zerolinecolor=GUIDE),
    )


def profile(shown: Portrait, layer: str, beside: Portrait | None = None) -> dict[str, Any] | None:
    """Direction by direction: what is no longer done as before, and where the change was written.

    Args:
        shown: The run.
        layer: One of its layers with profiles.
        beside: Another run to compare with.

    Returns:
        A Plotly figure as a dictionary, or ``None`` if nothing was recorded of that layer.
    """
    found = {}
    for portrait in (shown, beside):
        if portrait is None or layer not in portrait.profiles:
            continue
        of = portrait.profiles[layer]
        # Where the layer's whole change is known its length is too; else the directions at hand stand for it.
        moved = portrait.layers.get(layer, {}).get("moved")
        length = moved * float(np.linalg.norm(of.sigma)) if moved else float(np.linalg.norm(of.adaptation))
        drift = np.abs(of.retention - of.sigma) / (float(of.sigma[0]) or 1.0)
        label = METHODS[portrait.method].label
        parts = {"retention": drift, "adaptation": of.adaptation / (length or 1.0)}
        found[label if label not in found else f"{label}, recorded"] = parts
    return direction_profiles(found, layer=layer) if found else None


def spectrum(found: Profile) -> dict[str, Any]:
    """Singular values before, those after where they are known, and what is left of them along the old directions."""
    # What turns round is below zero; a logarithmic axis shows none of it.
    old_frame = {"along the old directions": np.clip(found.retention, 0.0, None)}
    after = {} if found.after is None else {"after": found.after}
    figure = spectrum_before_after(found.sigma, after | old_frame, title=_SPECTRUM)
    first = float(found.sigma[0])
    lost = f"along the old directions up to {_of_first(found.retention - found.sigma, first)} is no longer done"
    if found.after is not None:
        lost += f"; the singular values moved by up to {_of_first(found.after - found.sigma, first)}"
    figure["layout"]["meta"]["caption"] = f"As shares of σ₁: {lost}."
    return figure


def _of_first(change: np.ndarray, first: float) -> str:
    share = float(np.abs(change).max()) / first
    return f"{100 * share:.2g} %" if share > _ROUNDING else "rounding"


def layers(portrait: Portrait, *, of: str) -> dict[str, Any] | None:
    """Measures layer by layer.

    Args:
        portrait: The run.
        of: ``"geometry"`` (of the outputs) or ``"weights"``.

    Returns:
        A Plotly figure as a dictionary, or ``None`` if nothing was measured.
    """
    wanted = _GEOMETRY if of == "geometry" else _WEIGHTS
    present = [name for name, values in portrait.layers.items() if wanted.keys() & values.keys()]
    data, peaks, every = [], [], []
    for index, (measure, words) in enumerate(wanted.items()):
        values = np.array([_told(portrait.layers[name], measure) for name in present])
        if not np.isfinite(values).any():
            continue
        data.append(line(words, short(present), values if of == "geometry" else _visible(values), index, markers=True))
        every.append(values)
        at = int(np.nanargmax(values))
        peaks.append(f"{words} most in {short(present)[at]} ({number(values[at])})")
    if not data:
        return None
    geometry = of == "geometry"
    vertical = (
        axis("relative change", rangemode="tozero") if geometry else log_axis("relative change", *map(_visible, every))
    )
    return build(
        f"forgetting_{of}",
        data,
        title="Which layers answer otherwise than before?" if geometry else "In which layers did the weights change?",
        caption=f"{peaks[0][:1].upper()}{listing(peaks[:2])[1:]}.",
        xaxis=axis("layer", type="category", tickangle=-50, tickfont={"size": 10}),
        yaxis=vertical,
    )


def short(names: Sequence[str]) -> list[str]:
    """Names of layers without the parts, between dots, that all begin with.

    Example:
        >>> short(["blocks.0.attn.q", "blocks.1.attn.q"])
        ['0.attn.q', '1.attn.q']
    """
    parts = [name.split(".") for name in names]
    while len(names) > 1 and min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def _told(values: Mapping[str, float], measure: str) -> float:
    value = values.get(measure, math.nan)
    return 1 - value if measure == "cka" else value


def _visible(values: np.ndarray) -> np.ndarray:
    """What a logarithmic axis can show."""
    return np.where(values > _SMALLEST, values, np.nan)


def _colour(base: Mapping[str, Any], method: str) -> str:
    """The colour of a method in a chart; ink for one that is not in it."""
    label = METHODS[method].label
    return next((trace["marker"]["color"] for trace in base["data"] if trace["name"] == label), _INK)


def _own(name: str, portrait: Portrait, colour: str) -> dict[str, Any]:
    hover = f"your run {name}: learnt %{{x:.3f}}, forgot %{{y:.3f}}<extra></extra>"
    mark = {"color": colour, "symbol": "star-diamond-open", "size": 12}
    x, y = portrait.point
    return {
        **{"type": "scatter", "mode": "markers", "name": "your runs", "showlegend": False, "x": [x], "y": [y]},
        **{"customdata": [[name, "mean"]], "hovertemplate": hover, "marker": mark},
    }


def _path(name: str, x: Any, y: Any, shape: dict[str, Any], **more: Any) -> dict[str, Any]:
    trace = {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": shape}
    return trace | {"hoverinfo": "skip", "showlegend": False} | more


def _ends(portrait: Portrait) -> list[float]:
    values = np.concatenate([part for walk in portrait.walks.values() for part in (walk.gain, walk.forgetting)])
    return [float(min(0.0, values.min())), float(max(0.0, values.max()))]
