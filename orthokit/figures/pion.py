"""What rotations keep and what they cannot use: spectra before and after, drift by cause, the split of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import named, nested, seeded, vector
from orthokit.figures.intervals import t_quantile
from orthokit.figures.template import axis, band, build, guide, line, listing, log_axis, number, style

__all__ = ["drift_budget", "rate_range", "spectrum_kept", "stationarity_split"]


def spectrum_kept(
    start: Any, after: Mapping[Any, Any], *, title: str = "Which optimizer keeps the singular values of a matrix?"
) -> dict[str, Any]:
    r"""Singular values after training over those before, one line per optimizer; 1 means kept.

    Args:
        start: Singular values at the start, descending and positive, shape ``(n,)``.
        after: Label to those after training, descending, ``(n,)``.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, the vertical axis logarithmic.

    Raises:
        ShapeError: Lengths differ.
        OptionError: A value is not positive.

    Example:
        >>> figure = spectrum_kept([2.0, 1.0], {"AdamW": [3.0, 1.0], "Pion": [2.0, 1.0]})
        >>> figure["layout"]["meta"]["caption"]
        'Largest change of a singular value: AdamW ×1.5 and Pion ×1.'
    """
    start = _positive("start", start)
    data, said, every = [], [], [np.ones(1)]
    rank = np.arange(1, len(start) + 1)
    for index, (label, values) in enumerate(named("after", after).items()):
        values = _positive(f"values of {label!r}", values)
        if len(values) != len(start):
            raise ShapeError(f"{label!r} must have {len(start)} singular values, as the start has; got {len(values)}.")
        ratio = values / start
        data.append(line(label, rank, ratio, index, markers=False))
        said.append(f"{label} ×{number(ratio[np.abs(np.log(ratio)).argmax()])}")
        every.append(ratio)
    data.append(guide("unchanged", [1, len(start)], [1, 1]))
    return build(
        "spectrum_kept",
        data,
        title=title,
        caption=f"Largest change of a singular value: {listing(said)}.",
        xaxis=axis("index of the singular value, largest first"),
        yaxis=log_axis("σᵢ after training / before", *every),
    )


def drift_budget(
    steps: Any,
    drifts: Mapping[Any, Mapping[Any, Any]],
    *,
    title: str = "Is it truncation or rounding that moves the spectrum?",
) -> dict[str, Any]:
    r"""The logarithmic change of the Frobenius norm over steps, split by cause, one panel per way of stepping.

    Args:
        steps: Steps at which it was read, positive and increasing, shape ``(n,)``.
        drifts: Way of stepping to ``{cause: change}``, ``(n,)`` each, of either sign; all ways have the same causes.
            Sizes are drawn.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary; panels share a logarithmic vertical axis. A change of exactly 0 has no point.

    Raises:
        ShapeError: Lengths or causes differ.

    Example:
        >>> ways = {"order 2": {"truncation": [1e-6, 2e-6], "rounding": [1e-8, -1e-8]}}
        >>> drift_budget([10, 20], ways)["layout"]["meta"]["caption"]
        'At the end: order 2: truncation 2e−06, rounding −1e−08.'
    """
    steps = vector("steps", steps, low=1.0, increasing=True)
    ways = nested("drifts", drifts, row="way", column="cause")
    width = 1 / len(ways)
    data, said, every, layout = [], [], [], {}
    for panel, (label, of) in enumerate(ways.items(), start=1):
        suffix, ends = "" if panel == 1 else str(panel), []
        for index, (cause, values) in enumerate(of.items()):
            values = vector(f"{cause} of {label!r}", values, length=len(steps))
            sizes = np.where(values == 0, np.nan, np.abs(values))
            data.append(line(cause, steps, sizes, index, xaxis=f"x{suffix}", yaxis="y", showlegend=panel == 1))
            every.append(sizes)
            ends.append(f"{cause} {number(values[-1])}")
        said.append(f"{label}: {', '.join(ends)}")
        domain = [(panel - 1) * width + (0.02 if panel > 1 else 0), panel * width]
        # The way is the title of its axis: a panel heading beside a legend would be read as part of it.
        layout[f"xaxis{suffix}"] = {"title": {"text": f"step, {label}"}, "domain": domain, "anchor": "y"}
    return build(
        "drift_budget",
        data,
        title=title,
        caption=f"At the end: {'; '.join(said)}.",
        yaxis=log_axis("size of the change of log ‖W‖", *every),
        showlegend=True,
        **layout,
    )


def stationarity_split(
    steps: Any,
    parts: Mapping[Any, Any],
    *,
    title: str = "How much of the gradient can a rotation use?",
) -> dict[str, Any]:
    r"""Parts of the gradient in the singular frames of its weight, over training.

    Args:
        steps: Steps, increasing, shape ``(n,)``.
        parts: Label to the part's relative size, ``(n,)`` or ``(seeds, n)``, not negative; several seeds give their
            mean and its 95 % band.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Lengths differ.
        OptionError: A size is negative.

    Example:
        >>> figure = stationarity_split([0, 9], {"in": [1.0, 0.8], "radial": [0.1, 0.1]})
        >>> figure["layout"]["meta"]["caption"]
        'From the first to the last reading: in from 1 to 0.8; radial from 0.1 to 0.1.'
    """
    steps = vector("steps", steps, increasing=True)
    data, said = [], []
    for index, (label, values) in enumerate(named("parts", parts).items()):
        sizes = seeded(f"sizes of {label!r}", values, len(steps), per="step", signed=False)
        mean = sizes.mean(axis=0)
        if len(sizes) > 1:
            half = t_quantile(len(sizes) - 1) * sizes.std(axis=0, ddof=1) / np.sqrt(len(sizes))
            data.append(band(label, steps, mean - half, mean + half, index))
        data.append(line(label, steps, mean, index))
        said.append(f"{label} from {number(mean[0])} to {number(mean[-1])}")
    return build(
        "stationarity_split",
        data,
        title=title,
        caption=f"From the first to the last reading: {'; '.join(said)}.",
        xaxis=axis("step"),
        yaxis=axis("relative size", rangemode="tozero"),
    )


def rate_range(
    rates: Any,
    losses: Mapping[Any, Any],
    *,
    title: str = "At which learning rates does training survive?",
    ylabel: str = "final training loss (nats per byte)",
) -> dict[str, Any]:
    """Final loss against the learning rate, runs that diverged as crosses at the top.

    Args:
        rates: Learning rates, positive and increasing, shape ``(n,)``.
        losses: Label to final losses ``(seeds, n)`` or ``(n,)``; NaN for a run that diverged. The mean over the seeds
            that lived is drawn.
        title: The question the chart answers.
        ylabel: Name and unit of the vertical axis.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: Lengths differ.

    Example:
        >>> nan = float("nan")
        >>> figure = rate_range([0.1, 1.0], {"A": [[2.0, nan], [2.2, nan]], "B": [[2.5, 2.0], [2.5, 2.1]]})
        >>> figure["layout"]["meta"]["caption"]
        'Best: A 2.1 at 0.1, 2 of 4 runs diverged; B 2.05 at 1, none diverged.'
    """
    rates = vector("rates", rates, low=0.0, increasing=True)
    found = {
        label: seeded(f"losses of {label!r}", of, len(rates), per="rate", finite=False)
        for label, of in named("losses", losses).items()
    }
    lived = np.concatenate([ends[np.isfinite(ends)] for ends in found.values()])
    top = float(lived.max()) if lived.size else 1.0
    bottom = float(lived.min()) if lived.size else 0.0
    data, said = [], []
    for index, (label, ends) in enumerate(found.items()):
        fine = np.isfinite(ends)
        sums, counts = np.where(fine, ends, 0).sum(axis=0), fine.sum(axis=0)
        mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        data.append(line(label, rates, mean, index))
        lost = int((~fine).sum())
        if lost:
            # Apart from each other, so that rivals which diverge at the same rate are all seen.
            height = top + (0.08 + 0.06 * index) * (top - bottom or 1.0)
            at = rates[(~fine).any(axis=0)]
            colour = style(index)[0]
            mark = {"symbol": "x", "size": 10, "color": colour}
            more = {"type": "scatter", "mode": "markers", "marker": mark, "legendgroup": label}
            data.append(
                more | {"name": f"{label}, diverged", "x": at, "y": np.full(len(at), height), "showlegend": False}
            )
        best = f"{number(np.nanmin(mean))} at {number(rates[np.nanargmin(mean)])}" if fine.any() else "none lived"
        said.append(f"{label} {best}, {f'{lost} of {ends.size} runs' if lost else 'none'} diverged")
    return build(
        "rate_range",
        data,
        title=title,
        caption=f"Best: {'; '.join(said)}.",
        xaxis=log_axis("learning rate", rates),
        yaxis=axis(ylabel),
    )


def _positive(name: str, values: Any) -> np.ndarray:
    values = vector(name, values)
    if not (values > 0).all():
        raise OptionError(f"{name} must be above 0, as the axis is logarithmic; the smallest is {values.min():g}.")
    return values
