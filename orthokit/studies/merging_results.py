"""What the recorded study of merging says: scores with intervals, paired margins, the front."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from orthokit.errors import ReportError, unknown_name
from orthokit.lab.families import FAMILIES
from orthokit.merging import methods
from orthokit.studies.adapter_results import _told
from orthokit.studies.arena_results import _interval

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "merging_families",
    "merging_front",
    "merging_groups",
    "merging_label",
    "merging_margins",
    "merging_marks",
    "merging_references",
    "merging_scores",
    "merging_summary",
    "merging_tasks",
    "merging_unit",
]

KINDS = ("tuned", "default")
RETAINED, AVERAGE = "retained", "average"
BASE, EXPERTS = "base", "experts"
_OWN, _FROM = "expert ", "anchors from "

_LABELS = {
    "linear": "averaging",
    "task_arithmetic": "TA",
    "slerp": "SLERP",
    "ties": "TIES",
    "dare": "DARE",
    "model_stock": "Model Stock",
    "tsv": "TSV-M",
    "iso_c": "Iso-C",
    "knots": "KnOTS",
    "wudi": "WUDI",
    "regmean": "RegMean",
    "fisher": "Fisher",
    "curvature": "OTA",
    "metrics_weighted": "loss-weighted",
    "fda": "FDA",
}
_TARGETS = {"global": "G", "conflict": "C"}


def merging_label(name: str) -> str:
    """What charts and tables call a contestant of the study.

    Args:
        name: As in the record.

    Example:
        >>> merging_label("orthomerge conflict ties"), merging_label("anchors from tsv"), merging_label("base")
        ('OrthoMerge-C + TIES', 'anchors from TSV-M', 'base')
    """
    words = name.split()
    if words[0] == "orthomerge" and len(words) == 3:
        return f"OrthoMerge-{_TARGETS.get(words[1], words[1])} + {_LABELS.get(words[2], words[2])}"
    start = name.removeprefix(_FROM)
    return _FROM + _LABELS.get(start, start) if start != name else _LABELS.get(name, name)


def merging_families(table: pd.DataFrame) -> list[str]:
    """The families of experts that a record holds merges of.

    Args:
        table: The recorded study.

    Returns:
        Names in the order of :data:`~orthokit.lab.FAMILIES`.
    """
    present = set(table.loc[table["kind"].isin(KINDS), "family"])
    return [name for name in FAMILIES if name in present]


def merging_tasks(table: pd.DataFrame, family: str) -> list[str]:
    """The tasks that experts of a family were trained on, in the order of the family.

    Args:
        table: The recorded study.
        family: One of its families.
    """
    present = set(_of(table, family, *KINDS)["task"])
    return [name for name in FAMILIES[family].tasks if name in present]


def merging_unit(family: str) -> tuple[float, str]:
    """In what the scores of a family are told: a factor and the unit.

    Args:
        family: A name in :data:`~orthokit.lab.FAMILIES`.

    Example:
        >>> merging_unit("pictures"), merging_unit("language")
        ((100.0, 'points'), (1.0, 'bits per byte'))
    """
    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    return (1.0, "bits per byte") if "bits" in FAMILIES[family].score else (100.0, "points")


def merging_scores(table: pd.DataFrame, family: str, *, kind: str = "tuned") -> pd.DataFrame:
    r"""Every contestant with its scores, their intervals over seeds, its cost and its options; best average first.

    With scores $s_t$ of a merged model, $b_t$ of the base and $e_t$ of each task's own expert:

    .. math:: \text{average} = \tfrac1T \sum_t s_t, \quad \text{margin} = \tfrac1T \sum_t (s_t - e_t), \quad
        \text{share} = \sum_t (s_t - b_t) \Big/ \sum_t (e_t - b_t)

    Args:
        table: The recorded study.
        family: One of its families.
        kind: ``"tuned"`` (default) or ``"default"``.

    Returns:
        One row a label: ``method`` (its name in the record); each task, ``average``, ``retained``, ``margin`` and
        ``share``, all followed by ``..._low`` and ``..._high`` (means with Student's 95 % intervals; NaN with one
        seed); ``seeds``; ``seconds`` of processor time for one merge (median, with defaults); ``options`` in words.
        ``share`` is that of the experts' gain over all tasks together, since an expert that gains little has no share
        of its own.

    Raises:
        UnknownNameError: No such family or kind.
        ReportError: The record lacks its merges, its base or an expert.
    """
    import pandas as pd

    found = _by_seed(table, family, kind)
    merged, rows = _of(table, family, kind), {}
    # A tuned merge is taken from a line of merges that was there already; the default one was made.
    plain: Any = table[(table["family"] == family) & (table["kind"] == "default")]
    made: Any = plain.groupby("method")["seconds"].median()
    for name, part in merged.groupby("method", sort=False):
        mine, row = found.loc[name], {"method": name}
        for value in mine:
            row |= dict(zip((value, f"{value}_low", f"{value}_high"), _interval(mine[value]), strict=True))
        once = part.drop_duplicates("seed")
        rows[merging_label(str(name))] = row | {
            "seeds": len(mine),
            "seconds": float(made.get(name, np.nan)),
            "options": _settings(once["options"]),
        }
    scores: Any = pd.DataFrame.from_dict(rows, orient="index")
    return scores.sort_values(AVERAGE, ascending=False, kind="stable")


def merging_references(table: pd.DataFrame, family: str) -> pd.DataFrame:
    """What merges lie between: the base with fitted heads, and the experts, each on its own task.

    Args:
        table: The recorded study.
        family: One of its families.

    Returns:
        The rows ``base`` and ``experts``, with the columns of scores of :func:`merging_scores`; what the experts
        retained is the mean over them.

    Raises:
        UnknownNameError: No such family.
        ReportError: The record lacks one of them.
    """
    import pandas as pd

    found, rows = _by_seed(table, family, None), {}
    for name in (BASE, EXPERTS):
        mine, row = found.loc[name], {}
        for value in mine:
            row |= dict(zip((value, f"{value}_low", f"{value}_high"), _interval(mine[value]), strict=True))
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def merging_margins(
    table: pd.DataFrame, family: str, method: str, rival: str, *, task: str = AVERAGE, kind: str = "tuned"
) -> list[float]:
    """How much higher one contestant scores than another, seed by seed: they merged the same experts.

    Args:
        table: The recorded study.
        family: One of its families.
        method: A contestant by its name in the record, ``"base"``, or ``"experts"``, each on its own task.
        rival: Likewise.
        task: ``"average"`` (default), ``"retained"`` or a task.
        kind: ``"tuned"`` (default) or ``"default"``, of both.

    Returns:
        One difference per seed that both have, above 0 where ``method`` is better; accuracy in [0, 1] or bits per byte.

    Raises:
        UnknownNameError: No such family, kind, contestant or task.
        ReportError: The record lacks merges, its base or an expert.
    """
    found = _by_seed(table, family, kind)
    known = list(dict.fromkeys(found.index.get_level_values("method")))
    for name in (method, rival):
        if name not in known:
            raise unknown_name("contestant", name, known)
    tasks = [*merging_tasks(table, family), AVERAGE, RETAINED]
    if task not in tasks:
        raise unknown_name("task", task, tasks)
    return (found.loc[method, task] - found.loc[rival, task]).dropna().tolist()


def merging_front(table: pd.DataFrame, family: str, *, kind: str = "tuned") -> dict[str, list[tuple[float, float]]]:
    """Average and retained score of every contestant, one pair a seed: both better when higher.

    Args:
        table: The recorded study.
        family: One of its families.
        kind: ``"tuned"`` (default) or ``"default"``.

    Returns:
        Label to pairs ``(average, retained)``, in the order of the record; ``"base"`` and ``"experts"`` come last.

    Raises:
        UnknownNameError: No such family or kind.
        ReportError: The record lacks merges, its base or an expert.
    """
    found, points = _by_seed(table, family, kind), {}
    names = dict.fromkeys(found.index.get_level_values("method"))
    for name in [*(name for name in names if name not in (BASE, EXPERTS)), BASE, EXPERTS]:
        mine = found.loc[name]
        points[merging_label(name)] = list(zip(mine[AVERAGE].tolist(), mine[RETAINED].tolist(), strict=True))
    return points


def merging_groups(table: pd.DataFrame, family: str) -> dict[str, str]:
    """What every contestant is a case of: OrthoMerge, a method that needs data, or one of weights alone.

    Args:
        table: The recorded study.
        family: One of its families.

    Returns:
        Label to ``"weights alone"``, ``"with data or losses"`` or ``"OrthoMerge"``.
    """
    found = {}
    for name in dict.fromkeys(_of(table, family, *KINDS)["method"]):
        spec = methods().get(name)
        looks = spec is not None and (spec.statistics is not None or name == "metrics_weighted")
        kind = "OrthoMerge" if name.startswith("orthomerge") else "with data or losses" if looks else "weights alone"
        found[merging_label(name)] = kind
    return found


def merging_marks(
    table: pd.DataFrame, family: str, *, kind: str = "tuned"
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Score of every contestant in every column with its interval, as charts take them, in points or bits per byte.

    Args:
        table: The recorded study.
        family: One of its families.
        kind: ``"tuned"`` (default) or ``"default"``.

    Returns:
        Column (each task, ``average``, ``retained``) to label to ``(mean, low, high)``, best average first; ``"base"``
        and ``"experts"`` are the last labels.
    """
    import pandas as pd

    factor, _ = merging_unit(family)
    scores: Any = pd.concat([merging_scores(table, family, kind=kind), merging_references(table, family)])
    marks: dict[str, dict[str, tuple[float, float, float]]] = {}
    for value in (*merging_tasks(table, family), AVERAGE, RETAINED):
        ends = factor * scores[[value, f"{value}_low", f"{value}_high"]]
        marks[value] = {str(label): (mean, low, high) for label, mean, low, high in ends.itertuples()}
    return marks


def merging_summary(table: pd.DataFrame, family: str, *, kind: str = "tuned") -> pd.DataFrame:
    """A family as a table to be read: means with half widths of their 95 % intervals, best average first.

    Args:
        table: The recorded study.
        family: One of its families.
        kind: ``"tuned"`` (default) or ``"default"``.

    Returns:
        One row a contestant, then ``experts`` and ``base``: each task, ``average``, ``retained``, ``margin to experts``
        and ``share``; accuracies in per cent, language in minus bits per byte.
    """
    import pandas as pd

    factor, unit = merging_unit(family)
    found, scores = _by_seed(table, family, kind), merging_scores(table, family, kind=kind)
    columns = [*merging_tasks(table, family), AVERAGE, RETAINED, "margin", "share"]
    names = {str(label): str(row["method"]) for label, row in scores.iterrows()} | {EXPERTS: EXPERTS, BASE: BASE}
    told: dict[str, Any] = {}
    for value in columns:
        heading = value if value != "margin" else f"margin to experts ({unit})"
        # What differs between seeds by rounding alone has no spread.
        values = (found[value] * (factor if value != "share" else 1.0)).round(9)
        told[heading] = {label: _told(values.loc[name].tolist()) for label, name in names.items()}
    return pd.DataFrame(told).loc[list(names)]


def _of(table: pd.DataFrame, family: str, *kinds: str) -> Any:
    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    rows = table.loc[(table["family"] == family) & table["kind"].isin(kinds)]
    if rows.empty:
        raise ReportError(
            f"the record has no rows of kind {' or '.join(kinds)} for {family!r}. Run: orthokit study merging"
        )
    return rows.reset_index(drop=True)


def _by_seed(table: pd.DataFrame, family: str, kind: str | None) -> Any:
    """One row per contestant and seed, the base and the experts among them; one column per score."""
    import pandas as pd

    if kind is not None and kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    tasks = merging_tasks(table, family)
    own = {_OWN + task: task for task in tasks}
    rows = pd.concat([_of(table, family, "start", "expert"), *([_of(table, family, kind)] if kind else [])])
    # Units that share a seed judge its base and its experts again, with the same scores.
    rows = rows.drop_duplicates(["method", "seed", "task"])
    if lacking := [name for name in (BASE, *own) if name not in set(rows["method"])]:
        raise ReportError(f"the record lacks {', '.join(lacking)} for {family!r}. Run: orthokit study merging")
    wide = rows.pivot(index=["method", "seed"], columns="task", values="score")[[*tasks, RETAINED]]
    experts = pd.DataFrame({task: wide.loc[name, task] for name, task in own.items()})
    experts[RETAINED] = wide.loc[list(own), RETAINED].groupby("seed").mean()
    every: Any = pd.concat(
        [wide.drop(index=list(own), level="method"), pd.concat({EXPERTS: experts}, names=["method"])]
    )
    order = [*(name for name in dict.fromkeys(rows["method"]) if name not in own), EXPERTS]
    every = every.loc[order].rename_axis(columns=None)
    every.insert(len(tasks), AVERAGE, every[tasks].mean(axis=1, skipna=False))
    begun, best = every.loc[BASE, AVERAGE], every.loc[EXPERTS, AVERAGE]
    every["margin"] = every[AVERAGE].sub(best, level="seed")
    gain = best - begun
    every["share"] = every[AVERAGE].sub(begun, level="seed").div(gain.where(gain > 0), level="seed")
    return every


def _settings(options: Iterable[Any]) -> str:
    """The options of all seeds in words: the middle one and the range, or names with their counts."""
    each = [json.loads(one) if isinstance(one, str) else {} for one in options]
    chosen = [one for one in each if one]
    if not chosen:
        return "defaults"
    told = []
    for name in dict.fromkeys(name for one in chosen for name in one):
        values = [one[name] for one in chosen if name in one]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            low, high = min(values), max(values)
            spread = f" ({low:.2g} to {high:.2g})" if high > low else ""
            told.append(f"{name} {float(np.median(values)):.2g}{spread}")
        else:
            counts = {str(value): values.count(value) for value in dict.fromkeys(values)}
            told.append(f"{name} " + " or ".join(sorted(counts, key=lambda value: -counts[value])))
    if len(chosen) < len(each):
        told.append(f"defaults for {len(each) - len(chosen)} of {len(each)} seeds")
    return ", ".join(told)
