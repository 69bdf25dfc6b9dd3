"""One look at one model in a worker's thread: rows as they come, and what was found at its end."""

from __future__ import annotations

import itertools
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orthokit.diagnostics import Inspection, InspectionProgress, inspect
from orthokit.errors import NothingMatchedWarning, OrthokitError
from orthokit.reports import inspection_page
from orthokit_widgets.inspect_data import Asked, Model
from orthokit_widgets.merge_data import Shelf
from orthokit_widgets.merge_run import Exported
from orthokit_widgets.worker import Job, Worker

__all__ = ["Look", "Looks", "exported"]

# Of one visitor.
_MOST_LOOKS = 12
_NUMBERS = itertools.count(1)


class Look:
    """A look at a model, carried out by :meth:`go`.

    Args:
        asked: What is looked at.
        model: The model.
        base: What it is compared with, or ``None``.
        rows: What an earlier look knew, shown until there is more.
    """

    def __init__(self, asked: Asked, model: Model, base: Model | None, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.asked, self.model, self.base = asked, model, base
        #: Its own among all looks.
        self.number = next(_NUMBERS)
        #: ``"waiting"``, ``"opening"``, ``"first look"``, ``"measuring"``, then ``"finished"``, ``"stopped"``,
        #: ``"failed"``.
        self.status = "waiting"
        self.error = ""
        self.done = self.total = 0
        self.found: Inspection | None = None
        self.stop_requested = self.ended = 0.0
        #: Counts what has become known.
        self.version = 0
        self._lock = threading.Lock()
        self._rows: dict[str, dict[str, Any]] = {str(row["name"]): dict(row) for row in rows}

    @classmethod
    def known(cls, asked: Asked, model: Model, base: Model | None, found: Inspection) -> Look:
        """A look that somebody else has had."""
        look = cls(asked, model, base)
        look._take(found)
        return look

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What is known, a row per matrix, in the order of the model once the look has ended."""
        if self.found is not None:
            return self.found.rows
        with self._lock:
            return list(self._rows.values())

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.status in ("finished", "stopped", "failed")

    @property
    def changeable(self) -> bool:
        """Whether it is about a file of a visitor's machine, which may be another one by now."""
        return any(one is not None and one.own and one.cached for one in (self.model, self.base))

    @property
    def stop_ms(self) -> float:
        """Milliseconds from the request to stop to the end; 0 before."""
        return 1e3 * (self.ended - self.stop_requested) if self.ended and self.stop_requested else 0.0

    def go(self, stop: threading.Event) -> None:
        """Measure, until the end or until ``stop`` is set; in a worker's thread."""
        self.status = "opening"
        asked = self.asked
        try:
            found = inspect(
                self.model.load(),
                base=None if self.base is None else self.base.load(),
                detail=asked.detail,
                sample=asked.sample,
                progress=self._progress,
                stop=stop,
                # A file that was uploaded is nobody else's business and gone tomorrow.
                cache=self.model.cached and (self.base is None or self.base.cached),
            )
            self._take(self._in_words(found))
        except NothingMatchedWarning as warned:
            self._fail(f"{self.model.label} has no matrix to measure: {warned}")
        except OrthokitError as error:
            self._fail(str(error))
        except Exception as error:
            # The thread has no caller: the page shows the error.
            self._fail(f"{type(error).__name__}: {error}")
        self.ended = time.perf_counter()
        self.version += 1

    def _progress(self, told: InspectionProgress) -> None:
        with self._lock:
            self._rows |= {str(row["name"]): row for row in told.rows}
        self.done, self.total = told.done, told.total
        self.status = "first look" if told.look == 1 else "measuring"
        self.version += 1

    def _take(self, found: Inspection) -> None:
        if not found.rows:
            self._fail(f"{self.model.label} has no matrix to measure: {len(found.left_out)} parameters are none.")
            return
        self.found = found
        self.status = "stopped" if found.interrupted else "finished"
        self.version += 1

    def _fail(self, error: str) -> None:
        self.error, self.status = error, "failed"

    def _in_words(self, found: Inspection) -> Inspection:
        """The same with the names that the page has for the models."""
        pairs = {found.name: self.model.label}
        if self.base is not None and found.base_name:
            pairs = {found.base_name: self.base.label} | pairs
        # Longest first: one name may begin with the other.
        either = "|".join(re.escape(old) for old in sorted(pairs, key=len, reverse=True))
        pattern = re.compile(rf"(?<![\w.-])({either})(?![\w-]|[.]\w)")

        def said(text: str) -> str:
            return pattern.sub(lambda match: pairs[match.group()], text)

        return replace(
            found,
            name=self.model.label,
            base_name=None if self.base is None else self.base.label,
            notes=[said(note) for note in found.notes],
            unmatched=[{**one, "reason": said(one["reason"])} for one in found.unmatched],
        )


class Looks:
    """Looks at models, one after the other in a thread of their own.

    Args:
        wanted: Tells what is to be looked at, in which order.
        models: Gives the models, by key.
        store: Where looks at models that every visitor sees are kept.
        failed: Told when the work itself fails.
    """

    def __init__(
        self,
        *,
        wanted: Callable[[], list[Asked]],
        models: Callable[[], Mapping[str, Model]],
        store: Shelf[Inspection],
        failed: Callable[[Hashable, Exception], None],
    ) -> None:
        self._wanted, self._models, self._store = wanted, models, store
        self.worker = Worker(lambda key, result: None, failed)
        #: That which is under way or was last.
        self.current: Look | None = None
        self._lock = threading.Lock()
        self._idle = True
        self._kept: OrderedDict[Asked, Look] = OrderedDict()

    @property
    def working(self) -> bool:
        """Whether something is under way or about to be."""
        return not self.worker.join(0)

    def known(self, asked: Asked) -> Look | None:
        """The look at what is asked for, if there is one."""
        look = self._kept.get(asked)
        if look is None and self._common(asked):
            found = self._store.get(asked)
            if found is not None:
                models = self._models()
                look = self._kept[asked] = Look.known(asked, models[asked.model], models.get(asked.base), found)
        return look

    def all_known(self) -> list[Look]:
        """The looks that are wanted, as far as there are any."""
        return [look for look in map(self.known, self._wanted()) if look is not None]

    def go_on(self, *, again: bool = False) -> None:
        """Look at what is wanted and not known; what nobody wants any more ends.

        Args:
            again: What failed too, and anew what lies on this machine and may have changed.
        """
        with self._lock:
            for asked in self._wanted() if again else ():
                look = self._kept.get(asked)
                if look is not None and (look.status == "failed" or (look.over and look.changeable)):
                    self._kept.pop(asked)
            current = self.current
            wanted = current is None or current.over or current.asked in self._wanted()
            if not self._idle and wanted and self.worker.job is not None:
                return
            self._idle = False
        self.worker.want(time.perf_counter(), self._work)

    def stop(self) -> None:
        """End what is under way at the next chance; what is measured stays."""
        if self.current is not None and not self.current.over:
            self.current.stop_requested = time.perf_counter()
        self.worker.forget()

    def _common(self, asked: Asked) -> bool:
        models = self._models()
        return not any(models[key].own for key in (asked.model, asked.base) if key)

    def _work(self, job: Job) -> bool:
        """In the worker's thread."""
        while (look := self._next(job)) is not None:
            look.go(job.cancelled)
            if look.status == "finished" and look.found is not None and self._common(look.asked):
                self._store.put(look.asked, look.found)
        return True

    def _next(self, job: Job) -> Look | None:
        with self._lock:
            for asked in self._wanted() if not job.cancelled.is_set() else ():
                known = self.known(asked)
                if known is None or known.status in ("waiting", "stopped"):
                    models = self._models()
                    before = [] if known is None else known.rows
                    look = Look(asked, models[asked.model], models.get(asked.base), before)
                    self.current = self._kept[asked] = look
                    self._kept.move_to_end(asked)
                    while len(self._kept) > _MOST_LOOKS:
                        self._kept.popitem(last=False)
                    return look
            # Another job may wait already: then this end is not that of the work.
            self._idle = self.worker.job in (None, job)
            return None


def exported(found: Sequence[Inspection], kind: str) -> Exported:
    """What was measured as a file that nobody has written yet.

    Args:
        found: The model, and those beside it.
        kind: ``"html"`` (all of them), ``"json"`` or ``"csv"`` (the model).
    """
    first = found[0]
    stem = re.sub(r"[^a-z0-9]+", "-", first.name.lower()).strip("-") or "model"
    with tempfile.TemporaryDirectory(prefix="orthokit-inspect-") as folder:
        path = Path(folder) / f"{stem}-inspection.{kind}"
        if kind == "html":
            inspection_page(list(found), path)
        elif kind == "json":
            first.to_json(path)
        else:
            first.to_csv(path)
        return Exported(path.name, path.read_bytes())
