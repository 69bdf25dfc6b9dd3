"""Adapters in pictures: learning rates, block sizes and budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, named, vector
from orthokit.figures.race import _pair
from orthokit.figures.template import Number, axis, build, guide, line, log_axis, number

__all__ = ["loss_by_budget", "rates_by_block", "tuned_rates"]


def tuned_rates(
    rates: Mapping[Any, tuple[Any, Any]],
    chosen: Mapping[Any, tuple[Any, Any]] | None = None,
    *,
    ylabel: str,
    title: str = "Which learning rate does each adapter want?",
    most: Number | None = None,
) -> dict[str, Any]:
    """Final loss against the learning rate, and the runs of other seeds at the rate that was chosen.

    Args:
        rates: Method to ``(rates, values)``: rates ``(n,)``, above 0, increasing; values ``(n,)`` or ``(seeds, n)``.
            NaN where a run diverged.
        chosen: Method to ``(rate, values)``, one value a seed; drawn as markers.
        ylabel: Name and unit of the vertical axis.
        title: The question the chart answers.
        most: Highest value the vertical axis shows; default all.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Rates and values do not fit together.
        OptionError: A rate is not above 0.

    Example:
        >>> figure = tuned_rates({"A": ([1e-3, 2e-3, 4e-3], [2.1, 2.0, 2.2])}, {"A": (2e-3, [2.0, 2.1])}, ylabel="nats")
        >>> figure["layout"]["meta"]["caption"]
        'Best rates: A 0.002. Open markers: other seeds at the chosen rate.'
    """
    data, best, every, heights = [], {}, [], []
    picked = named("chosen", chosen) if chosen else {}
    for index, (label, pair) in enumerate(named("rates", rates).items()):
        across, runs = _pair(label, pair)
        if across[0] <= 0:
            raise OptionError(f"learning rates must be above 0; those of {label!r} begin with {across[0]:g}.")
        mean = runs.mean(axis=0)
        if not np.isfinite(mean).any():
            continue
        at = int(np.nanargmin(mean))
        edge = " (at the edge)" if at in (0, len(across) - 1) else ""
        best[label] = f"{label} {number(across[at])}{edge}"
        trace = line(label, across, mean, index, markers=True)
        data.append(trace)
        every.append(across)
        heights.append(float(np.nanmin(mean)))
        if label in picked:
            rate, values = picked[label]
            values = array(f"chosen of {label!r}", values, dims=(1,), finite=False)
            mark = {"symbol": f"{trace['marker']['symbol']}-open", "size": 10, "color": trace["line"]["color"]}
            seeds = {"type": "scatter", "mode": "markers", "name": label, "legendgroup": label, "showlegend": False}
            data.append(seeds | {"x": np.full(len(values), rate), "y": values, "marker": mark})
    if not data:
        raise ShapeError("every run diverged; there is nothing to draw.")
    caption = f"Best rates: {', '.join(best.values())}."
    shown = {"range": [min(heights) - 0.1 * (float(most) - min(heights)), float(most)]} if most is not None else {}
    return build(
        "tuned_rates",
        data,
        title=title,
        caption=caption + (" Open markers: other seeds at the chosen rate." if picked else ""),
        xaxis=log_axis("learning rate", *every),
        yaxis=axis(ylabel, **shown),
    )


def loss_by_budget(
    curves: Mapping[Any, tuple[Any, Any]],
    *,
    ylabel: str,
    start: Number | None = None,
    full: Number | None = None,
    title: str = "What does a larger adapter buy?",
) -> dict[str, Any]:
    """Final loss against the number of trainable parameters, one marker a seed around the mean.

    Args:
        curves: Method to ``(numbers, values)``: numbers ``(n,)``, increasing; values ``(n,)`` or ``(seeds, n)``.
        ylabel: Name and unit of the vertical axis.
        start: The loss before training, for the caption; default not told.
        full: The loss after full fine-tuning, drawn as a thin line; default none.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Example:
        >>> figure = loss_by_budget({"A": ([100, 400], [[2.0, 1.9], [2.2, 1.9]])}, ylabel="nats", start=3.0)
        >>> figure["layout"]["meta"]["caption"]
        'From 3 before training: A 2.1 with 100, 1.9 with 400.'
    """
    data, said, every = [], [], []
    for index, (label, pair) in enumerate(named("curves", curves).items()):
        counts, runs = _pair(label, pair)
        mean = runs.mean(axis=0)
        trace = line(label, counts, mean, index, markers=True)
        trace["marker"]["size"] = 10
        data.append(trace)
        for run in runs if len(runs) > 1 else []:
            dot = {"symbol": trace["marker"]["symbol"], "size": 5, "color": trace["line"]["color"], "opacity": 0.5}
            shared = {"type": "scatter", "mode": "markers", "name": label, "legendgroup": label, "showlegend": False}
            data.append(shared | {"x": counts, "y": run, "marker": dot, "hoverinfo": "skip"})
        told = [f"{number(value)} with {_counted(count)}" for count, value in zip(counts, mean, strict=True)]
        said.append(f"{label} {', '.join(told)}")
        every.append(counts)
    if full is not None:
        ends = np.concatenate(every)
        data.append(guide("full fine-tuning", [ends.min(), ends.max()], [full, full]))
    opening = "" if start is None else f"From {number(start)} before training: "
    return build(
        "loss_by_budget",
        data,
        title=title,
        caption=f"{opening}{'; '.join(said)}.",
        xaxis=log_axis("trainable numbers", *every),
        yaxis=axis(ylabel),
    )


def rates_by_block(
    plain: tuple[Any, Any],
    scaled: tuple[Any, Any],
    *,
    title: str = "Does the best learning rate depend on the block size?",
) -> dict[str, Any]:
    """Best learning rate against the block size, without and with generators scaled by the block.

    Args:
        plain: ``(blocks, rates)`` of generators as they are.
        scaled: ``(blocks, rates)`` of generators scaled by ``1 / sqrt(b)``.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, both axes logarithmic; the slopes are of straight lines fitted to logarithms.

    Example:
        >>> figure = rates_by_block(([8, 32], [4e-3, 2e-3]), ([8, 32], [2e-3, 2e-3]))
        >>> figure["layout"]["meta"]["caption"]
        'The best rate goes like b to the power −0.5 without scaling and 0 with it; from block 8 to 32 it falls 2-fold \
and stays within 1-fold.'
    """
    data, slopes, spans, every, across = [], [], [], [], []
    for index, (label, pair) in enumerate({"generators as they are": plain, "scaled by 1/√b": scaled}.items()):
        blocks, rates = pair
        blocks = vector(f"blocks, {label}", blocks, low=1.0, increasing=True)
        rates = vector(f"rates, {label}", rates, length=len(blocks), low=0.0)
        if len(blocks) < 2 or not rates.all():
            raise ShapeError("need at least two block sizes and rates above 0.")
        slopes.append(float(np.polyfit(np.log(blocks), np.log(rates), 1)[0]))
        spans.append(float(rates.max() / rates.min()))
        data.append(line(label, blocks, rates, index, markers=True))
        every.append(rates)
        across.append(blocks)
    ends = np.array([across[0][0], across[0][-1]])
    expected = every[0].mean() * np.sqrt(np.exp(np.log(across[0]).mean()) / ends)
    data.append(guide("∝ 1/√b", ends, expected))
    told = [number(round(slope, 2) + 0.0) for slope in slopes]
    ticks = sorted({float(block) for blocks in across for block in blocks})
    return build(
        "rates_by_block",
        data,
        title=title,
        caption=f"The best rate goes like b to the power {told[0]} without scaling and {told[1]} with it; from block "
        f"{ends[0]:g} to {ends[1]:g} it falls {number(spans[0])}-fold and stays within {number(spans[1])}-fold.",
        xaxis=axis("block size b", type="log", tickmode="array", tickvals=ticks, ticktext=[f"{b:g}" for b in ticks]),
        yaxis=log_axis("best learning rate", *every, expected),
    )


def _counted(count: float) -> str:
    """``59,520`` or ``100``."""
    return f"{round(float(count)):,}"
