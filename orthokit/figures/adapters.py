"""Adapters in pictures: what each keeps and breaks, what it gains and forgets, what it costs, and requantising."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError
from orthokit.figures._check import array, nested, vector
from orthokit.figures.template import (
    COLOURS,
    SYMBOLS,
    Number,
    axis,
    build,
    guide,
    line,
    listing,
    log_axis,
    number,
    style,
)

__all__ = ["kept_and_broken", "requantised", "step_costs"]

# Angles come from cosines in single precision, which know them to a few millionths of a radian.
_ROUNDING = 1e-5


def kept_and_broken(
    changes: Mapping[Any, Mapping[Any, Any]],
    *,
    threshold: Number = _ROUNDING,
    title: str = "What does each adapter keep of the weights, and what does it break?",
) -> dict[str, Any]:
    """Largest change of what describes a weight, one row a method, one marker a measure.

    Args:
        changes: Method to measure to changes, ``(seeds,)``, not negative; the same measures for every method.
        threshold: Below it something counts as kept, ``> 0``; default 1e-5; drawn as a thin line.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary. Markers are geometric means, bars reach from the smallest to the largest seed.

    Raises:
        ShapeError: The measures differ between the methods.
        OptionError: A change is negative, or the threshold is not positive.

    Example:
        >>> changes = {"OFT": {"spectrum": [1e-7, 2e-7]}, "LoRA": {"spectrum": [0.01, 0.02]}}
        >>> kept_and_broken(changes)["layout"]["meta"]["caption"]
        'Everything is kept to 1e−05 by OFT. LoRA changes spectrum (0.0141).'
    """
    if not threshold > 0:
        raise OptionError(f"threshold must be above 0, as the axis is logarithmic; got {threshold}.")
    methods = nested("changes", changes, row="method", column="measure")
    found = {
        label: {measure: _spread(f"{measure} of {label!r}", values) for measure, values in of.items()}
        for label, of in methods.items()
    }
    measures = list(next(iter(found.values())))
    rows, data = list(found), []
    for index, measure in enumerate(measures):
        colour, _, symbol = style(index)
        middle, low, high = (np.array([found[label][measure][k] for label in rows]) for k in range(3))
        shift = 0.5 * ((index + 0.5) / len(measures) - 0.5)
        data.append(
            {
                **{"type": "scatter", "mode": "markers", "name": measure},
                "x": np.where(middle > 0, middle, np.nan),
                "y": np.arange(len(rows)) + shift,
                "error_x": {
                    **{"type": "data", "symmetric": False, "thickness": 1.5, "width": 3, "color": colour},
                    "array": high - middle,
                    "arrayminus": middle - low,
                },
                "marker": {"symbol": symbol, "size": 10, "color": colour},
                "text": rows,
                "hovertemplate": "%{text}: %{x:.3g}<extra>" + measure + "</extra>",
            }
        )
    limit = guide(f"{threshold:g}", [threshold, threshold], [-0.6, len(rows) - 0.4], showlegend=False)
    every = np.array([value for of in found.values() for spread in of.values() for value in spread])
    return build(
        "kept_and_broken",
        [*data, limit],
        title=title,
        caption=_kept_said(found, float(threshold)),
        height=170 + 46 * len(rows),
        xaxis=log_axis("largest relative change (angles: radians)", every, [threshold]),
        yaxis=_names(rows),
    )


def step_costs(
    costs: Mapping[Any, Mapping[Any, Any]],
    *,
    limit: Number | None = 1.3,
    title: str = "What does a step cost, in steps of LoRA?",
) -> dict[str, Any]:
    """Cost of a step over that of LoRA, one row a method, one marker a setting.

    Args:
        costs: Setting (such as a model) to method to the ratio, above 0; the first setting names the methods.
        limit: A ratio to hold them against, drawn as a thin line; default 1.3. ``None``: none.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: The settings hold different methods.
        OptionError: A ratio is not above 0.

    Example:
        >>> figure = step_costs({"a model": {"OFT": 1.1, "BOFT": 1.6}})
        >>> figure["layout"]["meta"]["caption"]
        'A model: OFT 1.1 and BOFT 1.6. Above 1.3: BOFT (a model).'
    """
    settings = nested("costs", costs, row="setting", column="method")
    methods = list(next(iter(settings.values())))
    data, said, over, every = [], [], [], []
    for index, (label, of) in enumerate(settings.items()):
        ratios = vector(f"costs of {label!r}", list(of.values()), low=0.0)
        if not ratios.all():
            raise OptionError(f"costs of {label!r} must be above 0.")
        mark = {"symbol": SYMBOLS[index], "size": 11, "color": COLOURS[index]}
        rows = [position + 0.2 * (index - (len(settings) - 1) / 2) for position in range(len(methods))]
        data.append({"type": "scatter", "mode": "markers", "name": label, "x": ratios, "y": rows, "marker": mark})
        told = [f"{method} {number(ratio)}" for method, ratio in zip(methods, ratios, strict=True)]
        said.append(f"{label[:1].upper()}{label[1:]}: {listing(told)}")
        if limit is not None:
            over += [f"{name} ({label})" for name, ratio in zip(methods, ratios, strict=True) if ratio > float(limit)]
        every.append(ratios)
    caption = ". ".join(said) + "."
    if limit is not None:
        data.append(guide(f"{limit:g}", [limit, limit], [-0.6, len(methods) - 0.4], showlegend=False))
        caption += f" Above {limit:g}: {listing(over) if over else 'none'}."
        every.append(np.array([float(limit)]))
    return build(
        "step_costs",
        data,
        title=title,
        caption=caption,
        height=150 + 44 * len(methods),
        xaxis=axis("time of a step / that of LoRA", range=[0, 1.08 * float(np.concatenate(every).max())]),
        yaxis=_names(methods),
    )


def requantised(
    across: Any,
    changes: Mapping[Any, Mapping[Any, Any]],
    *,
    xlabel: str = "size of the change ‖W′ − W‖ / ‖W‖",
    title: str = "What does requantising a merged weight do to its rows?",
) -> dict[str, Any]:
    """Largest change of a row's length by merging, and by merging and quantising again.

    Args:
        across: Sizes of the change, ``(n,)``, above 0, increasing.
        changes: Method to ``{"merged": values, "requantised": values}``, ``(n,)`` each, not negative.
        xlabel: Name of the horizontal axis.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic.

    Raises:
        ShapeError: A method has other parts than the first.

    Example:
        >>> changes = {"OFT": {"merged": [1e-7, 1e-7], "requantised": [0.01, 0.01]}}
        >>> requantised([0.1, 0.3], changes)["layout"]["meta"]["caption"]
        'At a change of 0.3: OFT merged 1e−07, requantised 0.01.'
    """
    x = vector("across", across, increasing=True)
    data, said, every = [], [], []
    for index, (label, of) in enumerate(nested("changes", changes, row="method", column="part").items()):
        first, told = next(iter(of)), []
        for part, values in of.items():
            values = vector(f"{part} of {label!r}", values, length=len(x), low=0.0)
            trace = line(f"{label}, {part}", x, np.where(values > 0, values, np.nan), index, markers=True)
            trace["line"]["dash"] = "solid" if part == first else "dot"
            data.append(trace)
            told.append(f"{part} {number(values[-1])}")
            every.append(values)
        said.append(f"{label} {', '.join(told)}")
    return build(
        "requantised",
        data,
        title=title,
        caption=f"At a change of {number(x[-1])}: {'; '.join(said)}.",
        xaxis=log_axis(xlabel, x),
        yaxis=log_axis("largest relative change of a row's length", *every),
    )


def _spread(name: str, values: Any) -> tuple[float, float, float]:
    """Geometric mean, smallest, largest."""
    found = vector(name, np.atleast_1d(array(name, values, dims=(0, 1))), low=0.0)
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(found).mean())), float(found.min()), float(found.max())


def _kept_said(found: dict[str, dict[str, tuple[float, float, float]]], threshold: float) -> str:
    broken = {label: [m for m, spread in of.items() if spread[0] > threshold] for label, of in found.items()}
    keepers = [label for label, measures in broken.items() if not measures]
    said = [f"Everything is kept to {number(threshold)} by {listing(keepers)}."] if keepers else []
    said += [
        f"{label[:1].upper()}{label[1:]} changes {listing([f'{m} ({number(found[label][m][0])})' for m in measures])}."
        for label, measures in broken.items()
        if measures
    ]
    return " ".join(said)


def _names(rows: list[str]) -> dict[str, Any]:
    """A vertical axis of names, the first on top."""
    return axis("", tickmode="array", tickvals=list(range(len(rows))), ticktext=rows, autorange="reversed")
