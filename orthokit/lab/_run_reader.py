"""The reading half of the run store: everything that needs no lock and changes nothing."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from torch import Tensor

from orthokit.errors import RunDamagedError, RunError, unknown_name
from orthokit.lab import _store

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DATABASE", "RunReader", "is_run", "runs", "runs_root"]

#: Name of the database in a run's folder.
DATABASE = "run.sqlite"


def runs_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the runs: ``root``, else the variable ``ORTHOKIT_RUNS``, else ``./runs``."""
    return Path(root or os.environ.get("ORTHOKIT_RUNS") or "runs")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, whole or damaged."""
    files = (DATABASE, "config.json", "writer.lock")
    return folder.is_dir() and not folder.name.startswith(".") and any((folder / file).exists() for file in files)


class RunReader:
    """What can be asked of a run folder, while it is written or after.

    Args:
        path: The run's folder.

    Raises:
        RunDamagedError: A file of the run is damaged; the message names it.
        RunError: The folder was written by a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """Folder of the run."""
        self._database = path / DATABASE
        self.config: dict[str, Any] = _store.read_json(path / "config.json")
        """Configuration given at creation."""
        found = self._meta("format")
        if found != _store.FORMAT:
            raise RunError(f"{self._database} has layout {found}, this orthokit reads {_store.FORMAT}. Update it.")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, status={self.status!r}, last_step={self.last_step})"

    # --- what it is

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.path.name

    @property
    def writable(self) -> bool:
        """Whether this object is the writer."""
        return False

    def note(self, text: str) -> None:
        """Record a sentence about the run; only its writer can."""
        raise RunError(f"the run {self.path} is open for reading here. Open it with mode='w' to write to it.")

    @property
    def status(self) -> str:
        """``"running"``, ``"finished"``, ``"interrupted"``, ``"failed"``, or ``"killed"``: running, and no writer."""
        # Asked first: a writer that ends in between has then already written its last status.
        alive = self.writable or _store.WriterLock.is_held(self.path)
        stored = self._meta("status")
        return "killed" if stored == "running" and not alive else stored

    @property
    def error(self) -> str | None:
        """Why the run failed, in one line; ``None`` if it did not."""
        return self._meta("error")

    @property
    def created(self) -> datetime:
        """When the run was made, in local time."""
        return datetime.fromtimestamp(self._meta("created")).astimezone()

    @property
    def last_step(self) -> int | None:
        """The highest step with a scalar or spectrum; ``None`` before the first."""
        rows = self._rows("SELECT MAX(step) FROM scalars UNION ALL SELECT MAX(step) FROM spectra")
        return max((step for (step,) in rows if step is not None), default=None)

    def _meta(self, key: str) -> Any:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", (key,))
        if not rows:
            raise RunDamagedError(
                f"{self._database} is damaged: it has no {key!r}. Restore the file, or delete the run."
            )
        return json.loads(rows[0][0])

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with _store.connect_reader(self._database) as db:
            return db.execute(query, values).fetchall()

    # --- reading

    def scalars(self, names: str | Iterable[str] | None = None) -> pd.DataFrame:
        """All scalars as a long frame.

        Args:
            names: Only these; default all.

        Returns:
            Columns ``step``, ``name``, ``value`` and ``wall`` (seconds since 1970), by name, then step.
        """
        import pandas as pd

        columns = ["step", "name", "value", "wall"]
        query = f"SELECT {', '.join(columns)} FROM scalars"
        wanted = None if names is None else (names,) if isinstance(names, str) else tuple(names)
        if wanted is not None:
            query += f" WHERE name IN ({', '.join('?' * len(wanted))})"
        rows = self._rows(query + " ORDER BY name, step", wanted or ())
        frame = pd.DataFrame(rows, columns=pd.Index(columns))
        return frame.astype({"step": "int64", "value": "float64", "wall": "float64"})

    def names(self) -> list[str]:
        """Names of the scalars recorded so far, sorted."""
        return [name for (name,) in self._rows("SELECT DISTINCT name FROM scalars ORDER BY name")]

    def series(self, name: str, *, since: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """One scalar over the steps.

        Args:
            name: Name it was logged under.
            since: Only later steps: what a live page has already drawn is not read again.

        Returns:
            Steps (int64) and values (float64), both of shape ``(n,)``; empty while a running run has not logged it yet.

        Raises:
            UnknownNameError: The run is not running and never logged that name.
        """
        query = "SELECT step, value FROM scalars WHERE name = ? AND step > ? ORDER BY step"
        rows = self._rows(query, (name, since))
        if not rows and self.status != "running" and name not in (known := self.names()):
            raise unknown_name(f"scalar of the run {self.name}:", name, known)
        steps = np.array([step for step, _ in rows], dtype=np.int64)
        return steps, np.array([value for _, value in rows], dtype=np.float64)  # None becomes NaN

    @overload
    def spectra(self, name: None = None) -> list[str]: ...
    @overload
    def spectra(self, name: str, *, since: int = -1) -> tuple[np.ndarray, np.ndarray]: ...
    def spectra(self, name: str | None = None, *, since: int = -1) -> list[str] | tuple[np.ndarray, np.ndarray]:
        """The names of the recorded spectra, or one spectrum over the steps.

        Args:
            name: Name it was logged under; default: list the names.
            since: Only later steps.

        Returns:
            Without a name the sorted names; else steps ``(n,)`` and values ``(n, k)`` in float32, shorter spectra
            filled up with NaN; empty while a running run has not logged it yet.

        Raises:
            UnknownNameError: The run is not running and never logged that name.
        """
        if name is None:
            return [found for (found,) in self._rows("SELECT DISTINCT name FROM spectra ORDER BY name")]
        query = "SELECT step, data FROM spectra WHERE name = ? AND step > ? ORDER BY step"
        rows = self._rows(query, (name, since))
        if not rows and self.status != "running" and name not in (known := self.spectra()):
            raise unknown_name(f"spectrum of the run {self.name}:", name, known)
        vectors = [np.frombuffer(data, dtype="<f4") for _, data in rows]
        values = np.full((len(rows), max((len(v) for v in vectors), default=0)), np.nan, dtype=np.float32)
        for row, vector in zip(values, vectors, strict=True):
            row[: len(vector)] = vector
        return np.array([step for step, _ in rows], dtype=np.int64), values

    def notes(self) -> list[str]:
        """The notes, oldest first."""
        return [text for (text,) in self._rows("SELECT text FROM notes ORDER BY id")]

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and files of the checkpoints, oldest first; ``best.safetensors`` is not among them."""
        found = ((_store.checkpoint_step(path), path) for path in (self.path / "checkpoints").glob("step-*"))
        return sorted((step, path) for step, path in found if step is not None)

    def load_checkpoint(self, step: int | Literal["best"] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors (on the CPU) and the meta of a checkpoint.

        Args:
            step: Its step, or ``"best"``; default the latest that is whole. A damaged one is passed over with a note
                in the run when it is open for writing, else with a warning.

        Returns:
            Tensors by name, and the meta with ``"step"``.

        Raises:
            UnknownNameError: There is no checkpoint of that step.
            RunError: There is no checkpoint at all.
            RunDamagedError: The one asked for is damaged, or all are; the message names the file.
        """
        if step is not None:
            path = (
                self.path / "checkpoints" / ("best.safetensors" if step == "best" else f"step-{step:08d}.safetensors")
            )
            try:
                return _store.read_checkpoint(path)
            except FileNotFoundError as error:
                known = [number for number, _ in self.checkpoints()]
                raise unknown_name(f"checkpoint of the run {self.name}:", step, known) from error
        damage: RunDamagedError | None = None
        for _attempt in range(3):  # the writer may drop old files between listing and reading
            for _, path in reversed(self.checkpoints()):
                try:
                    loaded = _store.read_checkpoint(path)
                except FileNotFoundError:
                    continue
                except RunDamagedError as error:
                    damage = error
                    continue
                if damage is not None:
                    text = f"{damage} Step {loaded[1]['step']} is used instead."
                    self.note(text) if self.writable else warnings.warn(text, RuntimeWarning, stacklevel=2)
                return loaded
        if damage is not None:
            raise damage
        raise RunError(f"the run {self.path} has no checkpoint; it ended before the first was saved.")


def _flattened(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flattened(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _summary(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": path.name, "status": "damaged", "created": None, "steps": None, "error": None}
    try:
        run = RunReader(path)
        last = run._rows("SELECT name, value, MAX(step) FROM scalars WHERE instr(name, '/') = 0 GROUP BY name")
        row |= {"status": run.status, "created": run.created, "steps": run.last_step, "error": run.error}
        row |= {f"last.{name}": math.nan if value is None else value for name, value, _ in last}
        row |= _flattened(run.config, "config.")
    except RunError as error:
        row["error"] = str(error)
    return row | {"path": str(path)}


def runs(root: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """Every run of a folder, one row each, newest first.

    Args:
        root: Folder that holds runs; default ``$ORTHOKIT_RUNS``, else ``./runs``. A missing folder holds none.

    Returns:
        Columns ``name``, ``status``, ``created``, ``steps`` (the last step), ``error``, ``path``, then ``last.<name>``
        with the latest value of every scalar whose name has no slash, and ``config.<key>``, nested keys joined by
        dots. A run with a damaged file has the status ``"damaged"`` and says in ``error`` which file and why.

    Raises:
        RunError: The folder cannot be read.

    Example:
        >>> import tempfile
        >>> from orthokit.lab.runs import Run
        >>> root = tempfile.mkdtemp()
        >>> with Run.create("a", root=root, config={"optimizer": {"lr": 0.02}}) as run:
        ...     run.log(7, loss=2.5)
        >>> frame = runs(root)
        >>> print(*frame.loc[0, ["name", "status", "steps", "last.loss", "config.optimizer.lr"]])
        a finished 7 2.5 0.02
    """
    import pandas as pd

    folder = runs_root(root)
    first = ["name", "status", "created", "steps", "error", "path"]
    if folder.exists():
        with _store.folder_errors(folder, "list runs"):
            rows = [_summary(path) for path in folder.iterdir() if is_run(path)]
    else:
        rows = []
    rows.sort(key=lambda row: row["created"].timestamp() if row["created"] else 0.0, reverse=True)
    later = sorted({column for row in rows for column in row} - set(first), key=lambda c: (c.startswith("config."), c))
    frame = pd.DataFrame(rows, columns=pd.Index(first + later))
    frame["steps"] = frame["steps"].astype("Int64")
    return frame
