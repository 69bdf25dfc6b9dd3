"""The page "Inspect" without its looks: settings, files and buttons in; a table, figures, sentences and a file out."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from orthokit.diagnostics import COLUMNS, Inspection
from orthokit.errors import OptionError, OrthokitError
from orthokit.figures.checkpoint_spectra import MOST_SPECTRA
from orthokit_widgets import inspect_charts as charts
from orthokit_widgets.inspect_data import STORE, Model, catalogue
from orthokit_widgets.inspect_files import Incoming, Own, path_model
from orthokit_widgets.inspect_options import BESIDE, LOOKED, MODELS, MOST_ROWS, NONE, InspectSettings
from orthokit_widgets.inspect_run import Look, Looks, exported
from orthokit_widgets.inspect_words import apart, facts, not_finite, reading, sentence, table
from orthokit_widgets.merge_data import Shelf
from orthokit_widgets.merge_run import Exported
from orthokit_widgets.worker import Worker

__all__ = ["InspectState"]

# While a look is under way, what is shown is made anew so seldom that it takes a fifth of the time.
_PATIENCE, _SHARE = 0.15, 5.0
_USES = ("model", "base", "beside")


class InspectState(InspectSettings):
    """What the page knows: the models that can be chosen, what was measured, and how far that is.

    Args:
        local: Whether the visitor sits at this machine, and may name files on it by their path.
        store: Where measurements are kept that every visitor may see.
        **settings: Settings to start from.
    """

    def __init__(self, *, local: bool = False, store: Shelf[Inspection] = STORE, **settings: Any) -> None:
        super().__init__()
        self.local = local
        self.own = Own()
        self.common = catalogue()
        self.looks = Looks(wanted=lambda: self.wanted, models=lambda: self.models, store=store, failed=self._fail)
        self.opener = Worker(self._opened, self._refused)
        self.exporter = Worker(self._made, self._fail)
        self.incoming: Incoming | None = None
        #: Whether what is chosen is measured at once: until Stop.
        self.following = False
        #: The file that was asked for last, until it is fetched.
        self.ready: Exported | None = None
        #: What went wrong beside the looks.
        self.errors: dict[str, str] = {}
        #: Milliseconds of the last :meth:`snapshot`.
        self.last_ms = 0.0
        self._news: list[tuple[Model, str, Incoming | None]] = []
        self._parts: dict[str, tuple[Hashable, Any]] = {}
        self._suggested = False
        self._shown: Look | None = None
        self._rows: list[dict[str, Any]] = []
        self._stamp, self._drawn_at, self._took = 0, 0.0, 0.0
        self.offer(self.models)
        self.set(settings)
        self.param.watch(self._moved, list(LOOKED))

    # --- what can be chosen

    @property
    def models(self) -> dict[str, Model]:
        """All models that can be chosen, by key."""
        return {**self.common, **self.own.models}

    def suggest(self, name: str) -> None:
        """After a visitor chose a model or a base: what goes with it, measured at once."""
        if name == "model":
            model = self.models[self.model]
            base = self.base if model.own and not self._suggested else model.base or NONE
            self._suggested = base != NONE and not model.own
            if base != self.base:
                self.base, name = base, "base"
        elif name == "base":
            self._suggested = False
        if name == "base":
            compared = self.compared
            self.column = "relative_change" if compared else "stable_rank"
            self.groups = ["change"] if compared else ["norms", "spectrum"]
        self.following = True
        self.looks.go_on()

    # --- files

    def open_path(self, text: str, use: str) -> None:
        """Open a model on this machine; it is chosen as soon as its headers are read.

        Args:
            text: The path that was typed.
            use: ``"model"``, ``"base"`` or ``"beside"``.
        """
        self.errors.clear()
        if not self.local or use not in _USES:
            self.errors["file"] = "Files of this server cannot be opened from here: upload one instead."
            return
        self.opener.want((text, time.perf_counter()), lambda job: (path_model(text, ""), use, None))

    def upload(self, name: str, size: int, use: str) -> None:
        """Begin to receive a file; :attr:`incoming` tells the piece that is wanted."""
        self.errors.clear()
        self.cancel_upload()
        try:
            if use not in _USES:
                raise OptionError(f"a file is opened as one of {', '.join(_USES)}.")
            needed = [str(getattr(self, one)) for one in MODELS]
            self.incoming = self.own.receive(name, size, use, needed=needed)
        except (OrthokitError, OSError) as error:
            self.errors["file"] = f"Not uploaded: {error}"
        self.offer(self.models)

    def unreadable(self, token: Any) -> None:
        """The browser cannot read the file, which may be a folder."""
        incoming = self.incoming
        if incoming is not None and token == incoming.token:
            self.errors["file"] = f"Not uploaded: the browser cannot read {incoming.name}. A folder is no file."
            self.cancel_upload()

    def take(self, token: Any, start: Any, data: str) -> None:
        """A piece of the file, base64; with the last one it is opened and chosen."""
        incoming = self.incoming
        if incoming is None or token != incoming.token:
            return
        try:
            incoming.take(start, data)
        except (OrthokitError, OSError) as error:
            self.errors["file"] = f"Not opened: {error}"
            self.cancel_upload()
            return
        if not incoming.wanted:
            self.incoming = None
            self.opener.want(("upload", token), lambda job: (incoming.finish(""), incoming.use, incoming))

    def cancel_upload(self) -> None:
        """The browser does not go on."""
        if self.incoming is not None:
            self.incoming.forget()
            self.incoming = None

    def settle(self) -> None:
        """Take over what was opened meanwhile; on the thread of the settings."""
        while self._news:
            found, use, incoming = self._news.pop(0)
            model = self.own.add(found, incoming)
            self.offer(self.models)
            free = [name for name in BESIDE if getattr(self, name) == NONE]
            name = (free or BESIDE[-1:])[0] if use == "beside" else use
            setattr(self, name, model.key)
            self.suggest(name)

    # --- buttons

    def start(self) -> None:
        """Measure what is not known, files on this machine anew, and follow changes of the settings from now on."""
        self.following = True
        self.looks.go_on(again=True)

    def stop(self) -> None:
        """End what is going on at the next chance, an upload too; what is measured stays."""
        self.following = False
        self.looks.stop()
        self.cancel_upload()

    def tick(self, place: int, on: bool) -> None:
        """Draw the spectrum of a matrix, or draw it no more."""
        drawn = self.drawn
        look = self.look
        count = 0 if look is None or look.found is None else len(look.found.rows)
        if on and place not in drawn and len(drawn) >= MOST_SPECTRA:
            self.errors["ticks"] = f"More than {MOST_SPECTRA} spectra cannot be told apart: untick another one first."
            return
        self.errors.pop("ticks", None)
        if 0 <= place < min(count, MOST_ROWS):
            self.chosen = sorted({*drawn, place} if on else {*drawn} - {place})

    def order_by(self, name: str) -> None:
        """Sort the table by a column, the other way round if it is sorted by it already."""
        if name not in COLUMNS:
            return
        if self.sort == name:
            self.falling = "no" if self.falling == "yes" else "yes"
        else:
            self.sort, self.falling = name, "no" if COLUMNS[name].kind == "text" else "yes"

    def export(self) -> None:
        """Make the file that is chosen; it comes as :attr:`ready`."""
        if not self.can_export:
            return
        self.ready = None
        self.errors.pop("export", None)
        found = [look.found for look in self.looks.all_known() if look.found is not None]
        kind = self.file
        self.exporter.want((kind, time.perf_counter()), lambda job: exported(found, kind))

    @property
    def can_export(self) -> bool:
        """Whether there is something to save."""
        look = self.look
        return look is not None and look.found is not None

    def close(self) -> None:
        """Nobody looks any more."""
        self.stop()
        for worker in (self.opener, self.exporter):
            worker.forget()

    def end(self) -> None:
        """The visit is over: files that were uploaded are deleted."""
        self.close()
        self.own.close()

    # --- asking

    @property
    def look(self) -> Look | None:
        """That at the model."""
        return self.looks.known(self.wanted[0])

    @property
    def active(self) -> bool:
        """Whether something is going on that will change what is shown."""
        waiting = self.opener.job is not None or self.exporter.job is not None or bool(self._news)
        return waiting or self.looks.working or self.incoming is not None

    @property
    def status(self) -> str:
        """``"receiving"``, ``"reading"`` (a file), ``"ready"``, ``"stopping"``, or that of the look under way."""
        if self.incoming is not None:
            return "receiving"
        if self.opener.job is not None:
            return "reading"
        current, look = self.looks.current, self.look
        if current is not None and not current.over:
            return "stopping" if current.stop_requested else current.status
        looks = [self.looks.known(asked) for asked in self.wanted]
        if any(one is None or one.status == "waiting" for one in looks):
            return "waiting" if self.following and self.looks.working else "ready"
        return "ready" if look is None else look.status

    @property
    def sentence(self) -> str:
        """The status as a page says it."""
        status, incoming = self.status, self.incoming
        if incoming is not None:
            return f"Receiving {incoming.name}: {100 * incoming.received / incoming.size:.0f} %."
        if status == "reading":
            return "Reading the header of the file."
        current = self.looks.current
        look = current if current is not None and not current.over else self.look
        name = self.models[self.model].label if look is None else look.model.label
        done, total = (0, 0) if look is None else (look.done, look.total)
        seconds = 0.0 if look is None or look.found is None else look.found.seconds
        rows = [] if look is None else look.rows
        others = len(self.wanted) - 1
        return sentence(status, name, done=done, total=total, rows=rows, seconds=seconds, others=others)

    def snapshot(self) -> dict[str, Any]:
        """Everything the page shows now; looked up and drawn only, nothing is measured here.

        Returns:
            ``status``, ``sentence``, ``about``, ``reading`` (sentences on the model), ``facts`` (named numbers),
            ``problems`` (sentences), ``table`` (``columns``, ``rows``, ``lists``; the same object as before if it has
            not changed), ``ticked`` (places), ``tickable`` and ``figures`` (map, depth, spectra, density, profiles,
            compare: a figure dictionary or ``None``, likewise the same object).
        """
        started = time.perf_counter()
        self.settle()
        look = self.look
        renewed = self._renew(look, started)
        rows, found = self._rows, None if look is None else look.found
        seen = (0 if look is None else look.number, self._stamp)
        name, base = self.models[self.model].label, self.models[str(self.base)].label if self.compared else ""
        groups = tuple(self.groups)
        result = {
            "status": self.status,
            "sentence": self.sentence,
            "reading": self._part("reading", seen, lambda: reading(rows, found, name=name, base=base)),
            "facts": self._part("facts", seen, lambda: facts(rows, compared=self.compared)),
            "problems": self._problems(),
            "table": self._part("table", (seen, groups), lambda: table(rows, found, groups, compared=self.compared)),
            "ticked": self.drawn if found is not None else [],
            "tickable": found is not None and bool(found.spectra),
            "figures": self._figures(rows, found, seen),
        }
        self.last_ms = 1e3 * (time.perf_counter() - started)
        if renewed:
            self._took = self.last_ms / 1e3
        return result

    @property
    def drawn(self) -> list[int]:
        """Places of the matrices whose spectra are drawn: those chosen, or some that say much."""
        look = self.look
        if look is None or look.found is None:
            return []
        found = look.found
        chosen = [place for place in self.chosen if place < len(found.rows)][:MOST_SPECTRA]
        return chosen or self._part("first", (look.number, look.version), lambda: charts.first_choice(found))

    def _renew(self, look: Look | None, now: float) -> bool:
        """Take the rows of a look; while it is under way not with every matrix, as there may be many."""
        if look is self._shown and (look is None or look.version == self._stamp):
            return False
        if (
            look is self._shown
            and not (look and look.over)
            and now - self._drawn_at < max(_PATIENCE, _SHARE * self._took)
        ):
            return False
        self._shown, self._drawn_at = look, now
        self._stamp, self._rows = (0, []) if look is None else (look.version, look.rows)
        return True

    def _problems(self) -> list[str]:
        told = []
        for look in self.looks.all_known():
            if look.error:
                told.append(f"{look.model.label} could not be inspected: {look.error}")
            elif look.found is not None:
                told.append(apart(look.found))
        told.append(not_finite(self._rows))
        return [one for one in [*told, *self.errors.values()] if one]

    # --- drawing

    def _figures(self, rows: Sequence[Mapping[str, Any]], found: Inspection | None, seen: Hashable) -> dict[str, Any]:
        column = self.column
        models, others = {self.models[self.model].label: rows}, []
        for look in self.looks.all_known():
            if look.found is not None and look.model.key != self.model:
                models[look.model.label] = look.found.rows
                others.append((look.number, look.version))
        several = (seen, tuple(others), column)
        places = tuple(self.drawn) if found is not None else ()
        names = [str(found.rows[place]["name"]) for place in places] if found is not None else []
        names = [name for name in names if found is not None and name in found.spectra]
        drawing = {
            "of": self.of if self.compared else "weights",
            "across": self.across,
            "height": self.height,
            "unit": self.unit,
        }
        made: dict[str, tuple[Hashable, Callable[[], Any]]] = {
            "map": ((seen, column), lambda: charts.heat(rows, column)),
            "depth": (several, lambda: charts.depth(models, column)),
            "compare": (several, lambda: charts.compare(models, column)),
        }
        if found is not None:
            made["spectra"] = (
                (seen, places, *drawing.values()),
                lambda: charts.spectra(found, names, **drawing),
            )
            made["density"] = ((seen, places[:1]), lambda: charts.density(found, names[0]) if names else None)
            made["profiles"] = ((seen, places), lambda: charts.profiles(found, names))
        empty = dict.fromkeys(("map", "depth", "spectra", "density", "profiles", "compare"))
        return empty | {name: self._part(name, key, make) for name, (key, make) in made.items()}

    def _part(self, name: str, key: Hashable, make: Callable[[], Any]) -> Any:
        if name not in self._parts or self._parts[name][0] != key:
            self._parts[name] = (key, make())
        return self._parts[name][1]

    # --- measuring

    def _moved(self, *events: Any) -> None:
        if self.following:
            self.looks.go_on()

    # --- called in the workers' threads

    def _opened(self, key: Hashable, result: tuple[Model, str, Incoming | None]) -> None:
        found, use, incoming = result
        keyed = Model(self.own.next_key(), found.label, found.load, own=True, cached=found.cached)
        self._news.append((keyed, use, incoming))

    def _refused(self, key: Hashable, error: Exception) -> None:
        said = str(error) if isinstance(error, OrthokitError) else f"{type(error).__name__}: {error}"
        self.errors["file"] = f"Not opened: {said}"

    def _made(self, key: Hashable, result: Exported) -> None:
        self.ready = result

    def _fail(self, key: Hashable, error: Exception) -> None:
        self.errors["export"] = f"It failed: {type(error).__name__}: {error}"
