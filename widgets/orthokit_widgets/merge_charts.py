"""Charts of the page "Merge": what the merged model does and retains, scale by scale, by layer, beside the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.figures.merging import merge_map
from orthokit.figures.template import COLOURS, axis, build, guide, line, listing
from orthokit.lab import FAMILIES
from orthokit_widgets.merge_data import BASE, RETAINED, SCALES, Asked, Grid, Recorded, average
from orthokit_widgets.merge_words import in_bits, told

__all__ = ["MAPS", "layers", "recorded_ranking", "retained", "scales", "tasks"]

Marks = Mapping[str, Mapping[str, float]]

#: What the map of rotations can show.
MAPS = {"rotation_fraction": "rotation share", "generator_norm": "generator norm", "changes": "length of change"}
_INK = "#1F2328"
_UNITS = {"rotation_fraction": "share", "generator_norm": "norm", "changes": "relative"}
_BAR = 0.5
_OWN, _OTHER = 1, 3  # places in the palette of an expert on its own task, and on others


def tasks(scores: Mapping[str, float], marks: Marks, asked: Asked) -> dict[str, Any] | None:
    """Each task's score: a bar from the pretrained model to the merged one, and where the experts lie.

    Args:
        scores: Of the merged model.
        marks: ``"base"`` and each expert to the scores known of it.
        asked: What is merged.

    Returns:
        A Plotly figure as a dictionary, or ``None`` while there is nothing to show.
    """
    names, base = list(asked.tasks), marks.get(BASE, {})
    if not scores:
        return None
    known = [name for name in names if name in base]
    bar = {
        **{"type": "bar", "orientation": "h", "name": "gain or loss", "y": known, "width": _BAR, "showlegend": False},
        "base": [base[name] for name in known],
        "x": [scores[name] - base[name] for name in known],
        **{"marker": {"color": COLOURS[0], "opacity": 0.35}, "hoverinfo": "skip"},
    }
    own = [(name, marks[name][name]) for name in names if name in marks.get(name, {})]
    other = [(task, marks[one][task], one) for one in names for task in names if one != task and task in marks[one]]
    data = [
        bar,
        _dots("merged", [scores[name] for name in names], names, COLOURS[0], "square", 13),
        _dots("pretrained", [base[name] for name in known], known, _INK, "line-ns-open", 15),
        _dots("own expert", [at for _, at in own], [name for name, _ in own], COLOURS[_OWN], "diamond", 12),
        _dots(
            "other experts",
            [at for _, at, _ in other],
            [task for task, _, _ in other],
            COLOURS[_OTHER],
            "circle-open",
            9,
            [f"expert {one}" for _, _, one in other],
        ),
    ]
    return build(
        "merge_tasks",
        [trace for trace in data if trace["y"]],
        title="How well does the merged model do each task?",
        caption=_tasks_said(scores, marks, asked),
        xaxis=axis(FAMILIES[asked.family].score, tickformat=_ticks(asked.family)),
        yaxis=axis("", type="category", autorange="reversed"),
        barmode="overlay",
        showlegend=False,
    )


def _tasks_said(scores: Mapping[str, float], marks: Marks, asked: Asked) -> str:
    mean = f"Mean over tasks: merged {told(average(scores, asked.tasks), asked.family)}"
    parts = []
    if all(task in marks.get(BASE, {}) for task in asked.tasks):
        parts.append(f"pretrained {told(average(marks[BASE], asked.tasks), asked.family)}")
    own = {task: marks[task][task] for task in asked.tasks if task in marks.get(task, {})}
    if len(own) == len(asked.tasks):
        parts.append(f"each expert on its own {told(average(own, asked.tasks), asked.family)}")
    signs = "Square: merged; upright line: pretrained; diamond: the task's own expert; circles: the others."
    return f"{listing([mean, *parts])}; further right is better. {signs}"


def retained(scores: Mapping[str, float], marks: Marks, asked: Asked) -> dict[str, Any] | None:
    """What was lost, or won, of what the pretrained model could do.

    Args:
        scores: Of the merged model.
        marks: ``"base"`` and each expert to the scores known of it.
        asked: What is merged.

    Returns:
        A Plotly figure as a dictionary, or ``None`` while there is nothing to show.
    """
    before = marks.get(BASE, {}).get(RETAINED)
    if not scores or before is None:
        return None
    found = {"merged": scores[RETAINED]}
    found |= {f"expert {task}": marks[task][RETAINED] for task in asked.tasks if RETAINED in marks.get(task, {})}
    bars = {
        **{"type": "bar", "orientation": "h", "name": "change", "width": _BAR},
        "y": [f"{name}: {told(value, asked.family)}" for name, value in found.items()],
        **{"x": [value - before for value in found.values()], "hovertemplate": "%{y}, change %{x:.3f}<extra></extra>"},
        "marker": {"color": [COLOURS[0], *[COLOURS[_OWN]] * (len(found) - 1)], "opacity": 0.75},
    }
    return build(
        "merge_retained",
        [bars],
        title="What is left of what the model could before?",
        caption=f"Before {told(before, asked.family)} ({FAMILIES[asked.family].retained}).",
        xaxis=axis("change of the score", nticks=4, tickangle=0, zeroline=True, zerolinecolor=_INK, zerolinewidth=1.5),
        yaxis=axis("", type="category", autorange="reversed"),
        showlegend=False,
    )


def scales(grid: Grid, asked: Asked, *, part: str, scale: float) -> dict[str, Any] | None:
    """Scores against the scale of the merge: where they were measured, straight between.

    Args:
        grid: What was measured.
        asked: What is merged.
        part: Which half of the held-out examples.
        scale: Where the slider is.

    Returns:
        A Plotly figure as a dictionary, or ``None`` while there is nothing to show.
    """
    points = dict(sorted(grid.measured(part).items()))
    if not points:
        return None
    at = [SCALES[index] for index in points]
    data = [
        line(task, at, [scores[task] for scores in points.values()], index, markers=True)
        for index, task in enumerate((*asked.tasks, RETAINED))
    ]
    values = [value for scores in points.values() for value in scores.values()]
    data.append(guide("scale", [scale, scale], [min(values), max(values)], showlegend=False, hoverinfo="skip"))
    best = max(points, key=lambda index: average(points[index], asked.tasks))
    mean = told(average(points[best], asked.tasks), asked.family)
    return build(
        "merge_scales",
        data,
        title="Which scale of the change is best?",
        caption=f"Best mean over tasks of the {len(points)} scales measured: {mean} at {SCALES[best]:g}.",
        xaxis=axis("scale of the merged change", range=[-0.04, SCALES[-1] + 0.04]),
        yaxis=axis("score, higher is better", tickformat=_ticks(asked.family)),
    )


def layers(
    rows: Sequence[Mapping[str, Any]], asked: Asked, *, value: str, below: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layer by layer: how much of each expert's change is a rotation, and how many of its rows oppose the others.

    Args:
        rows: One a matrix, as the page's run makes them.
        asked: What is merged.
        value: One of :data:`MAPS`.
        below: Cosine with the mean change below which a row is in conflict.

    Returns:
        Two Plotly figures as dictionaries.
    """
    shares = [[float(np.searchsorted(one, below) / len(one)) for one in row["cosines"]] for row in rows]
    rows = [{**row, "name": _short(str(row["name"]))} for row in rows]
    opposed = [{**row, "conflict_share": share} for row, share in zip(rows, shares, strict=True)]
    questions = {
        "rotation_fraction": "In which layers is the change a rotation?",
        "generator_norm": "In which layers do the experts turn the base most?",
        "changes": "In which layers did the experts change most?",
    }
    first = merge_map(rows, value=value, experts=asked.tasks, title=questions[value])
    title = "In which layers do rows oppose the mean change?"
    second = merge_map(opposed, value="conflict_share", experts=asked.tasks, title=title)
    for figure, unit in ((first, _UNITS[value]), (second, "share of rows")):
        # Low charts have no room for more than a word beside the colours.
        figure["data"][0]["colorbar"]["title"] = {"text": unit, "side": "right", "font": {"size": 11}}
        figure["layout"]["xaxis"]["title"]["text"] = ""
    if not any(share for each in shares for share in each):
        words = f"No row of any expert has a cosine below {below:g} with the mean change of all."
        second["layout"]["meta"]["caption"] = words.replace("-", "−")
    return first, second


def _short(name: str) -> str:
    """The name of a layer without the parts that all have."""
    return name.replace("blocks.", "").replace("encoder.encoder.layer.", "").replace("encoder.", "")


def recorded_ranking(found: Recorded, family: str, *, yours: float | None, label: str) -> dict[str, Any]:
    """Every method of the recorded study, tuned: its mean over tasks with the interval over seeds.

    Args:
        found: The record of a family.
        family: Its name.
        yours: The mean of the merge on this page, drawn as a line.
        label: What that line is called.

    Returns:
        A Plotly figure as a dictionary; each marker carries its label.
    """
    entries = list(found.entries.values())
    means = [entry.scores["average"] for entry in entries]
    dots = {
        **{"type": "scatter", "mode": "markers", "name": "recorded", "showlegend": False},
        **{"x": [mean for mean, _, _ in means], "y": [entry.label for entry in entries]},
        "error_x": {
            **{"type": "data", "symmetric": False, "thickness": 1.5, "width": 3, "color": COLOURS[0]},
            "array": [high - mean for mean, _, high in means],
            "arrayminus": [mean - low for mean, low, _ in means],
        },
        "marker": {"color": COLOURS[0], "size": 8},
        "customdata": [[entry.label] for entry in entries],
        "text": [
            f"{told(entry.scores['average'][0], family)}, retained {told(entry.scores[RETAINED][0], family)}"
            for entry in entries
        ],
        "hovertemplate": "%{y}: mean %{text}<extra></extra>",
    }
    ends = [entries[0].label, entries[-1].label]
    data, signs = [dots], "Dotted: pretrained; dashed: each expert on its own task"
    for index, (name, scores) in enumerate(found.references.items()):
        at = scores["average"][0]
        shape = {"line": {"color": (_INK, COLOURS[_OWN])[index % 2], "width": 1.5, "dash": ("dot", "dash")[index % 2]}}
        data.append(guide(name, [at, at], ends, hoverinfo="skip") | shape)
    if yours is not None:
        data.append(guide("here", [yours, yours], ends, hoverinfo="skip") | {"line": {"color": COLOURS[2], "width": 3}})
        signs += f"; thick: {label}"
    best, last = entries[0], entries[-1]
    first, worst = (told(entry.scores["average"][0], family) for entry in (best, last))
    fewest, most = (pick(entry.seeds for entry in entries) for pick in (min, max))
    seeds = str(most) if fewest == most else f"{fewest} to {most}"
    spread = f"{seeds} seeds, bars: 95 % interval" if most > 1 else "one seed"
    said = f"{best.label} {first} is highest, {last.label} {worst} lowest ({spread})."
    every = [at for trace in data for at in trace["x"]]
    every += [end for mean in means for end in mean if math.isfinite(end)]
    # A line at the very edge would be half a line.
    room = 0.04 * (max(every) - min(every)) or 0.01
    return build(
        "merge_recorded",
        data,
        title="What did each method reach in the recorded study?",
        caption=f"{said} {signs}. Press a point to merge with its method and options.",
        xaxis=axis("mean over tasks, test", tickformat=_ticks(family), range=[min(every) - room, max(every) + room]),
        showlegend=False,
        yaxis=axis("", type="category", autorange="reversed", tickfont={"size": 11}, dtick=1),
    )


def _ticks(family: str) -> str:
    return ".2f" if in_bits(family) else ".0%"


def _dots(
    name: str, x: list[float], y: list[str], colour: str, symbol: str, size: int, text: list[str] | None = None
) -> dict[str, Any]:
    mark = {"color": colour, "symbol": symbol, "size": size, "line": {"width": 2, "color": colour}}
    said = "%{text}, %{y}" if text else f"{name}, %{{y}}"
    trace = {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": mark, "text": text or []}
    return trace | {"hovertemplate": f"{said}: %{{x:.3f}}<extra></extra>"}
