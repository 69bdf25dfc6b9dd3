"""POET in pictures: how far singular values drift, through what, and what a layer keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError
from orthokit.figures._check import named, nested, seeded, vector
from orthokit.figures.template import (
    COLOURS,
    axis,
    band,
    build,
    guide,
    line,
    listing,
    log_axis,
    number,
    style,
)

__all__ = ["drift_causes", "memory_modes", "spectrum_drift"]

# Bytes in the units of a caption.
_MIB = 2**20
_PATTERNS = ("", "/", "x", ".", "-", "+")


def spectrum_drift(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    target: float | int | None = None,
    title: str = "How far do singular values drift while POET trains?",
) -> dict[str, Any]:
    r"""Largest change of a singular value against the training step, one line per way of making rotations.

    Args:
        curves: Label to ``(steps, drifts)``: steps ``(n,)``, positive and increasing; drifts
            $\max_i |\sigma_i - \sigma_i(0)| / \sigma_1(0)$, ``(n,)`` or ``(seeds, n)``, not negative. Several seeds
            give their geometric mean and a band from the smallest to the largest.
        target: A limit to draw as a thin line, positive; default none.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic; a drift of exactly 0 is not drawn.

    Raises:
        ShapeError: Steps and drifts do not fit together.
        OptionError: A drift is negative, or the target is not positive.

    Example:
        >>> figure = spectrum_drift({"k = 3": ([200, 400], [1e-3, 2e-3]), "Cayley": ([200, 400], [1e-7, 1e-7])})
        >>> figure["layout"]["meta"]["caption"]
        'Largest drift at the last step: k = 3: 0.002 and Cayley: 1e−07.'
    """
    if target is not None and not target > 0:
        raise OptionError(f"target must be above 0, as the axis is logarithmic; got {target}.")
    data, said, every, reach = [], [], [], []
    for index, (label, pair) in enumerate(named("curves", curves).items()):
        steps, values = pair
        steps = vector(f"steps of {label!r}", steps, low=1.0, increasing=True)
        drifts = seeded(f"drifts of {label!r}", values, len(steps), per="step", finite=False, signed=False)
        with np.errstate(divide="ignore"):
            mean = np.exp(np.log(drifts).mean(axis=0))
        drawn = np.where(mean > 0, mean, np.nan)
        if len(drifts) > 1:
            data.append(band(label, steps, drifts.min(axis=0), drifts.max(axis=0), index))
        data.append(line(label, steps, drawn, index))
        said.append(f"{label}: {number(mean[-1])}")
        every.append(drifts)
        reach.append(steps)
    x = np.concatenate(reach)
    if target is not None:
        data.append(guide(f"target {number(target)}", [x.min(), x.max()], [target, target]))
        every.append(np.array([[target]]))
    return build(
        "spectrum_drift",
        data,
        title=title,
        caption=f"Largest drift at the last step: {listing(said)}.",
        xaxis=log_axis("training step", x),
        yaxis=log_axis("largest |σᵢ − σᵢ(0)| / σ₁(0)", *every),
    )


def drift_causes(
    causes: Mapping[Any, Mapping[Any, Any]], *, title: str = "Through what do singular values drift?"
) -> dict[str, Any]:
    """Size of each cause of drift as points on a logarithmic axis, one row for each way of training.

    Args:
        causes: Way of training to ``{cause: size}``: sizes are not negative; a 0 has no point.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        OptionError: A size is negative.
        ShapeError: The causes differ between the ways.

    Example:
        >>> figure = drift_causes({"k = 3": {"truncation": 1e-2, "rounding": 1e-7}})
        >>> figure["layout"]["meta"]["caption"]
        'Largest cause: k = 3: truncation (0.01).'
    """
    ways = nested("causes", causes, row="way", column="cause")
    kinds = list(next(iter(ways.values())))
    said, every = [], []
    for label, of in ways.items():
        sizes = vector(f"causes of {label!r}", list(of.values()), low=0.0)
        largest = int(sizes.argmax())
        said.append(f"{label}: {kinds[largest]} ({number(sizes[largest])})" if sizes.any() else f"{label}: none")
        every.append(sizes[sizes > 0])
    data = []
    for index, kind in enumerate(kinds):
        colour, _, symbol = style(index)
        mark = {"mode": "markers", "marker": {"color": colour, "symbol": symbol, "size": 11}}
        sizes = [float(of[kind]) or None for of in ways.values()]
        data.append({"type": "scatter", "name": kind, "x": sizes, "y": list(ways)} | mark)
    return build(
        "drift_causes",
        data,
        title=title,
        caption=f"Largest cause: {'; '.join(said)}.",
        xaxis=log_axis("typical relative change of a singular value", *every),
        yaxis=axis("", autorange="reversed", automargin=True),
    )


def memory_modes(
    modes: Mapping[Any, Mapping[Any, Any]], *, title: str = "What does a layer hold in memory while it trains?"
) -> dict[str, Any]:
    """Bytes of a layer by what they are for, stacked, one bar per mode.

    Args:
        modes: Mode to ``{part: bytes}``, the same parts in every mode, not negative.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, in MiB.

    Raises:
        OptionError: A number of bytes is negative.
        ShapeError: The parts differ between the modes.

    Example:
        >>> parts = {"plain": {"weights": 2**20, "moments": 2**21}, "low": {"weights": 2**20, "moments": 0}}
        >>> memory_modes(parts)["layout"]["meta"]["caption"]
        'Least: low, 1 MiB; most: plain, 3 MiB.'
    """
    held = nested("modes", modes, row="mode", column="part")
    parts = list(next(iter(held.values())))
    totals = {}
    for label, of in held.items():
        totals[label] = float(vector(f"bytes of {label!r}", list(of.values()), low=0.0).sum()) / _MIB
    order = sorted(totals, key=lambda label: totals[label])
    data = [
        _bars(part, list(held), [float(of[part]) / _MIB for of in held.values()], index)
        for index, part in enumerate(parts)
    ]
    ends = f"Least: {order[0]}, {number(totals[order[0]])} MiB; most: {order[-1]}, {number(totals[order[-1]])} MiB."
    return build(
        "memory_modes",
        data,
        title=title,
        caption=ends,
        barmode="stack",
        xaxis=axis(""),
        yaxis=axis("MiB", rangemode="tozero"),
    )


def _bars(name: str, x: list[str], y: list[float | None], index: int) -> dict[str, Any]:
    """Bars in the colour of a series, with a pattern for those who cannot tell colours apart."""
    return {
        "type": "bar",
        "name": name,
        "x": x,
        "y": y,
        "marker": {
            "color": COLOURS[index % len(COLOURS)],
            "pattern": {
                "shape": _PATTERNS[index % len(_PATTERNS)],
                "fillmode": "overlay",
                "fgcolor": "#FFFFFF",
                "size": 6,
            },
        },
    }
