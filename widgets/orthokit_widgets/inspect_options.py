"""Settings of the page "Inspect": which models, what is measured of them, and how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import parse_qsl, urlencode

import param

from orthokit.diagnostics import COLUMNS
from orthokit.diagnostics.inspection import GROUPS
from orthokit.figures._inspection import PLOTTED, words
from orthokit_widgets.fields import Settings, write_query
from orthokit_widgets.inspect_data import Asked, Model

__all__ = ["BESIDE", "LOOKED", "MODELS", "MOST_ROWS", "NONE", "InspectSettings"]

NONE = "none"
#: Settings of the models that are compared with the first, of all models, and of what is measured.
BESIDE = ("second", "third", "fourth")
MODELS = ("model", "base", *BESIDE)
LOOKED = (*MODELS, "detail", "sample")
#: Matrices that can be ticked: as many as can be measured.
MOST_ROWS = 2000
_ALONE = [name for name in PLOTTED if not COLUMNS[name].compared]
_FORMATS = {"html": "report", "json": "JSON", "csv": "table"}


class InspectSettings(Settings):
    """What can be set.

    Args:
        **settings: Settings to start from.
    """

    model = param.Selector(default="tinygpt", objects=["tinygpt"], label="Model")
    base = param.Selector(default=NONE, objects=[NONE], label="Base it was trained from")
    detail = param.Selector(default="spectrum", objects=["spectrum", "norms"], label="Measure")
    sample = param.Integer(1000, bounds=(1, MOST_ROWS), label="Matrices at most")
    groups = param.ListSelector(default=["norms", "spectrum"], objects=list(GROUPS), label="Columns")
    sort = param.Selector(default="order", objects=["order", *COLUMNS], label="Sorted by")
    falling = param.Selector(default="yes", objects=["yes", "no"], label="Largest first")
    column = param.Selector(default="stable_rank", objects=_ALONE, label="Measurement in the charts")
    chosen = param.ListSelector(default=[], objects=list(range(MOST_ROWS)), label="Spectra drawn")
    of = param.Selector(default="weights", objects=["weights", "changes"], label="Singular values of")
    across = param.Selector(default="log", objects=["log", "linear", "share"], label="Index")
    height = param.Selector(default="log", objects=["log", "linear"], label="Values")
    unit = param.Selector(default="none", objects=["none", "first", "frobenius"], label="Divided by")
    second = param.Selector(default=NONE, objects=[NONE], label="Compare with")
    third = param.Selector(default=NONE, objects=[NONE], label="and with")
    fourth = param.Selector(default=NONE, objects=[NONE], label="and also with")
    file = param.Selector(default="html", objects=list(_FORMATS), label="Save as")

    SETTINGS: ClassVar[tuple[str, ...]] = (
        *("model", "base", "detail", "sample", "groups", "sort", "falling", "column", "chosen", "of"),
        *("across", "height", "unit", *BESIDE, "file"),
    )
    TYPED = frozenset({"sample"})
    SEGMENTS: ClassVar = {
        "detail": {"spectrum": "singular values", "norms": "norms only"},
        "of": {"weights": "the weight", "changes": "its change"},
        "across": {"log": "log", "linear": "linear", "share": "share"},
        "height": {"log": "log", "linear": "linear"},
        "unit": {"none": "nothing", "first": "largest", "frobenius": "‖W‖F"},
        "file": _FORMATS,
    }
    WORDS: ClassVar = {
        "groups": GROUPS,
        "column": {name: f"{GROUPS[COLUMNS[name].group]}: {words(COLUMNS[name])}" for name in PLOTTED},
    }

    def offer(self, models: Mapping[str, Model]) -> None:
        """Let these models be chosen."""
        labels = {NONE: "none"} | {key: model.label for key, model in models.items()}
        self.WORDS = {**type(self).WORDS, **dict.fromkeys(MODELS, labels)}  # type: ignore[misc]
        for name in MODELS:
            self.param[name].objects = [*models] if name == "model" else [NONE, *models]

    def query(self, without: Mapping[str, Model]) -> str:
        """The settings for the address, but for a visitor's own files, which have none there.

        Args:
            without: Models that are left out.
        """
        own = {name for name in MODELS if getattr(self, name) in without}
        own |= {"chosen"} if "model" in own else set()
        return urlencode([(name, text) for name, text in parse_qsl(write_query(self)) if name not in own], safe=",")

    @param.depends("base", watch=True, on_init=True)
    def _fit_columns(self) -> None:
        """Columns of a comparison, where there is one."""
        columns = list(PLOTTED) if self.compared else _ALONE
        groups = [name for name in GROUPS if self.compared or name != "change"]
        self.param["column"].objects, self.param["groups"].objects = list(PLOTTED), list(GROUPS)
        if self.column not in columns:
            self.column = "stable_rank"
        if not set(self.groups) <= set(groups):
            self.groups = [name for name in self.groups if name in groups] or ["norms", "spectrum"]
        if not self.compared:
            self.of = "weights"
        self.param["column"].objects, self.param["groups"].objects = columns, groups

    @param.depends("model", watch=True)
    def _forget_chosen(self) -> None:
        self.chosen = []

    @property
    def compared(self) -> bool:
        """Whether there is a base."""
        return self.base != NONE

    @property
    def wanted(self) -> list[Asked]:
        """The looks that the settings describe; the model first, then those beside it."""
        keys = [self.model, *(getattr(self, name) for name in BESIDE)]
        keys = [key for key in dict.fromkeys(keys) if key != NONE]
        bases = ["" if self.base == NONE or (key == self.base and at) else self.base for at, key in enumerate(keys)]
        return [Asked(key, base, self.detail, self.sample) for key, base in zip(keys, bases, strict=True)]
