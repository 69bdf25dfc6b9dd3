"""Tasks in turn, in pictures: what is left of each task after the next ones, and how a penalty's weight matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from orthokit.errors import OptionError, ShapeError
from orthokit.figures._check import array, named, vector
from orthokit.figures.template import SEQUENTIAL, axis, build, line, listing, log_axis, number

__all__ = ["forgetting_matrices", "penalty_weights"]


def forgetting_matrices(
    errors: Mapping[Any, Any],
    *,
    columns: int = 5,
    top: float | int | None = None,
    title: str = "What is left of each task after the next ones?",
) -> dict[str, Any]:
    """Error on every task after every task as colours, one panel a method; bright is wrong.

    Args:
        errors: Method to errors in percent, ``(T, T)`` or ``(seeds, T, T)``: row ``t`` after learning task ``t``,
            column ``k`` on task ``k``. Above the diagonal is not drawn. Several seeds give their mean.
        columns: Panels in a row, ``>= 1``; default 5.
        top: Error at the bright end of the colours, above 0; default the largest that is drawn.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary.

    Raises:
        ShapeError: A matrix is not square, or they differ in size.
        OptionError: ``columns`` below 1 or ``top`` not above 0.

    Example:
        >>> figure = forgetting_matrices({"plain": [[2, 50], [40, 4]], "held": [[2, 50], [6, 8]]})
        >>> figure["layout"]["meta"]["caption"]
        'On the tasks before the last, mean error when learned and at the end: plain: 2 → 40 %; held: 2 → 6 %.'
    """
    if columns < 1 or (top is not None and not top > 0):
        raise OptionError(f"need columns >= 1 and top > 0; got {columns} and {top}.")
    means = {label: _mean(label, values) for label, values in named("errors", errors).items()}
    size = len(next(iter(means.values())))
    if any(len(mean) != size for mean in means.values()):
        raise ShapeError(f"all matrices must have the same size; got {sorted({len(mean) for mean in means.values()})}.")
    columns = min(columns, len(means))
    rows = -(-len(means) // columns)
    high = float(top if top is not None else max(np.nanmax(mean) for mean in means.values()) or 1.0)
    data: list[dict[str, Any]] = []
    layout, headings, said = {}, [], []
    names = [str(k + 1) for k in range(size)]
    for index, (label, mean) in enumerate(means.items()):
        row, column = divmod(index, columns)
        suffix = str(index + 1) if index else ""
        across = [(column + 0.07) / columns, (column + 0.95) / columns]
        down = [1 - (row + 0.9) / rows, 1 - (row + 0.2) / rows]
        text = [["" if not np.isfinite(v) else f"{v:.0f}" for v in line_] for line_ in mean]
        data.append(
            {
                **{"type": "heatmap", "name": label, "showlegend": False, "z": mean, "x": names, "y": names},
                **{"zmin": 0, "zmax": high, "colorscale": SEQUENTIAL, "showscale": index == 0, "hoverongaps": False},
                **{"xgap": 1, "ygap": 1, "text": text, "texttemplate": "%{text}", "textfont": {"size": 11}},
                "colorbar": {"title": {"text": "error, %"}, "thickness": 12},
                "hovertemplate": "after task %{y}, on task %{x}: %{z:.1f} %<extra>" + label + "</extra>",
                **{"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"},
            }
        )
        below = index + columns >= len(means)
        layout[f"xaxis{suffix}"] = axis("on task" if below else "", domain=across, anchor=f"y{suffix}", type="category")
        layout[f"yaxis{suffix}"] = axis("after task" if column == 0 else "", domain=down, anchor=f"x{suffix}") | {
            **{"type": "category", "autorange": "reversed"}
        }
        headings.append(
            {
                **{"text": label, "x": sum(across) / 2, "y": down[1], "xref": "paper", "yref": "paper"},
                **{"showarrow": False, "xanchor": "center", "yanchor": "bottom", "font": {"size": 13}},
            }
        )
        learned, kept = mean.diagonal()[:-1].mean(), mean[-1, :-1].mean()
        said.append(f"{label}: {number(learned)} → {number(kept)} %")
    return build(
        "forgetting_matrices",
        data,
        title=title,
        caption=f"On the tasks before the last, mean error when learned and at the end: {'; '.join(said)}.",
        height=90 + 215 * rows,
        annotations=headings,
        **layout,
    )


def penalty_weights(
    trials: Mapping[Any, tuple[Any, Any, float]],
    *,
    ylabel: str = "mean error at the end, %",
    title: str = "How much does the weight of a penalty matter?",
) -> dict[str, Any]:
    """Result against the weight of a penalty, in multiples of the weight that was taken, one line a method.

    Args:
        trials: Method to ``(weights, values, taken)``: weights ``(n,)``, positive and increasing; values ``(n,)``,
            lower is better; taken, one of the weights.
        ylabel: Name and unit of the values.
        title: The question the chart answers.

    Returns:
        A Plotly figure as a dictionary, with a logarithmic weight.

    Raises:
        ShapeError: Lengths differ.
        OptionError: A weight is not positive, or the one taken is not among them.

    Example:
        >>> figure = penalty_weights({"EWC": ([1, 10, 100], [30.0, 20.0, 25.0], 10)})
        >>> figure["layout"]["meta"]["caption"]
        'At ten times the best weight more by 5 (EWC); at a tenth of it by 10 (EWC).'
    """
    data, more, less, every = [], [], [], []
    for index, (label, (weights, values, taken)) in enumerate(named("trials", trials).items()):
        x = vector(f"weights of {label!r}", weights, increasing=True)
        y = vector(f"values of {label!r}", values, length=len(x))
        if x[0] <= 0 or not np.isclose(x, taken).any():
            raise OptionError(f"weights of {label!r} must be positive and hold {taken:g}; got {x.tolist()}.")
        here = int(np.isclose(x, taken).argmax())
        ratio = x / x[here]
        data.append(line(label, ratio, y, index, markers=True))
        every.append(ratio)
        for factor, told in ((10.0, more), (0.1, less)):
            near = np.isclose(ratio, factor, rtol=1e-3)
            told += [f"{number(y[near][0] - y[here])} ({label})"] if near.any() else []
    words = (
        ("At ten times the best weight more by", more),
        ("at a tenth of it by" if more else "At a tenth of it more by", less),
    )
    said = [f"{start} {listing(told)}" for start, told in words if told]
    return build(
        "penalty_weights",
        data,
        title=title,
        caption=f"{'; '.join(said)}." if said else "No method was tried at ten times its best weight or a tenth of it.",
        xaxis=log_axis("weight of the penalty, over the weight that was taken", *every),
        yaxis=axis(ylabel),
    )


def _mean(label: str, values: Any) -> np.ndarray:
    matrix = array(f"errors of {label!r}", values, dims=(2, 3), finite=False)
    if matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] < 2:
        raise ShapeError(f"errors of {label!r} must be square (T, T) with T >= 2; got shape {matrix.shape}.")
    mean = matrix.mean(axis=0) if matrix.ndim == 3 else matrix
    seen = np.tril(np.ones(mean.shape, dtype=bool))
    if not np.isfinite(mean[seen]).all():
        raise ShapeError(f"errors of {label!r} must be finite on and below the diagonal.")
    return np.where(seen, mean, np.nan)
