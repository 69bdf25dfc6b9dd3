"""The outcome of a look at a model: a table with a row per matrix, and the spectra behind it."""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orthokit.checkpoints._files import write_whole
from orthokit.diagnostics.inspection.columns import COLUMNS
from orthokit.errors import CheckpointError, unknown_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Inspection", "InspectionProgress", "plain_row", "read_row"]

Arrays = dict[str, np.ndarray]
_FORMAT = "inspection 1"
_ROWS_IN_TEXT = 60
_SHOWN = ["name", "shape", "frobenius", "spectral_norm", "stable_rank", "effective_rank", "condition"]
_ALONE = [*_SHOWN, "above_edge", "mp_distance", "alpha", "energy_excess", "outlier_rows", "outlier_columns"]
_COMPARED = [*_SHOWN[:2], "relative_change", "spectrum_change", "rotation_fraction", "change_rank", "verdict"]


@dataclass(frozen=True)
class InspectionProgress:
    """How far a look at a model is.

    Args:
        name: The parameter that was measured last.
        look: 1 in the first look, 2 where all singular values are taken.
        done: Parameters that are measured, in this look.
        total: Parameters with matrices.
        seconds: Since the start.
        rows: What is known of the matrices of this parameter.
    """

    name: str
    look: int
    done: int
    total: int
    seconds: float
    rows: list[dict[str, Any]]

    def line(self) -> str:
        """One line of text.

        Example:
            >>> InspectionProgress("W", 2, 3, 12, 0.53, []).line()
            'inspect: singular values 3/12, 0.5 s, W'
        """
        what = "first look" if self.look == 1 else "singular values"
        return f"inspect: {what} {self.done}/{self.total}, {self.seconds:.1f} s, {self.name}"


@dataclass
class Inspection:
    """What :func:`~orthokit.diagnostics.inspect` found, row by row.

    Args:
        name: The model.
        base_name: The model that it was compared with; ``None``: none.
        rows: One per matrix, in the order of the model; the keys are those of
            :data:`~orthokit.diagnostics.COLUMNS`, ``None`` where there is no value.
        spectra: By name, all singular values, descending, float32; of what was measured in full.
        base_spectra: The same of the base, where the two fit.
        changes: By name, the singular values of the difference.
        profiles: By name, ``"retention_drift"`` and ``"adaptation"`` along the singular directions of the base.
        left_out: Parameters that are no matrices: ``name``, ``shape``, ``reason``, and their ``relative_change``.
        unmatched: Tensors that are in one of the two models only, or have another shape: ``name``, ``reason``.
        notes: What to know of the whole, one sentence each.
        interrupted: Whether it was stopped before its end.
        seconds: How long it took.
    """

    name: str
    base_name: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    spectra: Arrays = field(default_factory=dict)
    base_spectra: Arrays = field(default_factory=dict)
    changes: Arrays = field(default_factory=dict)
    profiles: dict[str, Arrays] = field(default_factory=dict)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    unmatched: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def compared(self) -> bool:
        """Whether there was a base."""
        return self.base_name is not None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> dict[str, Any]:
        for row in self.rows:
            if row["name"] == name:
                return row
        raise unknown_name("matrix", name, [row["name"] for row in self.rows])

    def summary(self) -> str:
        """The whole in one or two sentences."""
        numbers = sum(row["numel"] for row in self.rows)
        full = sum(row["measured"] == "full" for row in self.rows)
        kinds = Counter(row["stored"] for row in self.rows)
        kept = ", ".join(f"{kind}" if len(kinds) == 1 else f"{count} {kind}" for kind, count in kinds.most_common(3))
        many = "1 matrix holds" if len(self.rows) == 1 else f"{len(self.rows)} matrices hold"
        said = f"{self.name}: {many} {numbers:,} numbers" + (f" ({kept})" if kept else "")
        said += "" if full == len(self.rows) else f", {full} of them measured in full"
        if bad := sum(row["nonfinite"] or 0 for row in self.rows):
            said += f"; {bad:,} {'entry is' if bad == 1 else 'entries are'} NaN or infinite"
        if self.compared:
            both = sum(row["relative_change"] is not None for row in self.rows)
            said += f"; {both} compared with {self.base_name}"
        return said + (", interrupted." if self.interrupted else ".")

    def to_frame(self, *, columns: list[str] | None = None) -> pd.DataFrame:
        """One row per matrix.

        Args:
            columns: Which; default all, without those of a comparison where there was none.

        Raises:
            UnknownNameError: There is no such column.
        """
        import pandas as pd

        names = self._columns(columns)
        return pd.DataFrame([[row[name] for name in names] for row in self.rows], columns=names)

    def _columns(self, wanted: list[str] | None) -> list[str]:
        for name in wanted or []:
            if name not in COLUMNS:
                raise unknown_name("column", name, COLUMNS)
        return wanted or [name for name, column in COLUMNS.items() if self.compared or not column.compared]

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to a file, beside it first and then in its place.

        Args:
            path: The file; overwritten.
        """
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        held["rows"] = [plain_row(row) for row in self.rows]
        for kind in ("spectra", "base_spectra", "changes"):
            held[kind] = {name: _numbers(values) for name, values in held[kind].items()}
        held["profiles"] = {
            name: {what: _numbers(values) for what, values in parts.items()} for name, parts in self.profiles.items()
        }
        text = json.dumps({"orthokit": _FORMAT, **held}, ensure_ascii=False, allow_nan=False)
        return _written(Path(path), text)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the table to a file, beside it first and then in its place.

        Args:
            path: The file; overwritten.
        """
        return _written(Path(path), self.to_frame().to_csv(index=False, lineterminator="\n"))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Inspection:
        """Read what :meth:`to_json` wrote.

        Args:
            path: The file.

        Raises:
            CheckpointError: It is no such file.
        """
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
            if held.pop("orthokit") != _FORMAT:
                raise ValueError("it is of another version")
            held["rows"] = [read_row(row) for row in held["rows"]]
            for kind in ("spectra", "base_spectra", "changes"):
                held[kind] = {name: np.array(values, dtype=np.float32) for name, values in held[kind].items()}
            held["profiles"] = {
                name: {what: np.array(values, dtype=np.float32) for what, values in parts.items()}
                for name, parts in held["profiles"].items()
            }
            return cls(**held)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            raise CheckpointError(f"{path} is no inspection written by to_json ({cause}); make it again.") from cause

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        # A base that fits nowhere leaves what there is without one.
        names = _COMPARED if any(row["relative_change"] is not None for row in self.rows) else _ALONE
        return names, [[COLUMNS[name].text(row[name]) for name in names] for row in self.rows]

    def __repr__(self) -> str:
        names, cells = self._cells()
        header = [COLUMNS[name].label for name in names]
        hidden = len(cells) - _ROWS_IN_TEXT
        if hidden > 0:
            keep = _ROWS_IN_TEXT // 2
            between = [f"... {hidden} more, see .to_frame()", *[""] * (len(names) - 1)]
            cells = [*cells[:keep], between, *cells[-keep:]]
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(names))]
        left = {i for i, name in enumerate(names) if COLUMNS[name].kind == "text"}
        lines = [
            "  ".join(f"{cell:<{widths[i]}}" if i in left else f"{cell:>{widths[i]}}" for i, cell in enumerate(row))
            for row in (header, *cells)
        ]
        return "\n".join(line.rstrip() for line in (self.summary(), *lines))

    def _repr_html_(self) -> str:
        names, cells = self._cells()
        head = "".join(
            f'<th scope="col" title="{html.escape(COLUMNS[n].meaning)}">{COLUMNS[n].label}</th>' for n in names
        )
        body = "".join(
            "<tr>"
            + f'<th scope="row"><code>{html.escape(row[0])}</code></th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in cells
        )
        return (
            '<div role="region" aria-label="Matrices, measured" tabindex="0" style="max-height:26em;overflow:auto">'
            f"<table><caption>{html.escape(self.summary())}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it, which knows no infinity."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def read_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row again, with every column that there is by now."""
    unknown = sorted(row.keys() - COLUMNS.keys())
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}")
    read = {name: row.get(name) for name in COLUMNS}
    return {
        name: float(value) if isinstance(value, str) and COLUMNS[name].kind != "text" else value
        for name, value in read.items()
    }


def _numbers(values: np.ndarray) -> list[float]:
    """float32 as the shortest decimal numbers that give them back."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


def _written(file: Path, text: str) -> Path:
    try:
        write_whole(file, text.encode())
    except OSError as cause:
        raise CheckpointError(f"{file} cannot be written: {cause.strerror or cause}. Choose another place.") from cause
    return file
