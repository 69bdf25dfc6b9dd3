"""What a look at a checkpoint measures: each column of the table with its meaning, its unit and how exact it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["COLUMNS", "GROUPS", "Column"]

Kind = Literal["text", "count", "number", "ratio", "degrees"]
#: The groups of columns, in the order of the table, and what they are called.
GROUPS = {
    "what": "matrix",
    "norms": "norms",
    "spectrum": "spectrum",
    "tail": "power law",
    "rows": "rows and columns",
    "storage": "storage",
    "change": "against the base",
}


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Args:
        name: Key of the rows.
        label: Head of the column, short.
        group: One of :data:`GROUPS`.
        kind: ``"text"``, ``"count"``, ``"number"`` (of any scale), ``"ratio"`` (about 0 to 1), or ``"degrees"``.
        meaning: What it says, with its formula.
        exactness: How far to trust it.
        signed: Whether 0 is the middle of its scale.
    """

    name: str
    label: str
    group: str
    kind: Kind
    meaning: str
    exactness: str = ""
    signed: bool = False

    @property
    def compared(self) -> bool:
        """Whether it needs a base to compare with."""
        return self.group == "change"

    @property
    def unit(self) -> str:
        """The unit, empty for a pure number."""
        return "°" if self.kind == "degrees" else ""

    def text(self, value: Any) -> str:
        """A cell as text; a hyphen where there is no value.

        Example:
            >>> COLUMNS["frobenius"].text(12.34567), COLUMNS["alpha"].text(None), COLUMNS["numel"].text(147456)
            ('12.35', '-', '147,456')
        """
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "-"
        if self.kind == "text":
            return str(value)
        if self.kind == "count":
            return f"{int(value):,}"
        if self.kind == "degrees":
            return f"{value:.3g}°"
        return _short(float(value))


def _short(value: float) -> str:
    """Four digits, without an exponent where that is short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e4 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


_EXACT = "float64: to 1e-7 of the largest singular value or better"
_SVD = "as exact as the singular values; above 1e5 from an SVD in float64"
_PLAIN = "to rounding"

_LIST = [
    Column("name", "matrix", "what", "text", "Name of the parameter, with its part or its place in a stack."),
    Column("shape", "shape", "what", "text", "Rows x columns, as (out x in)."),
    Column("rule", "read as", "what", "text", "How the parameter is read as a matrix."),
    Column("stored", "stored", "what", "text", "Type of its numbers in the file."),
    Column("numel", "numbers", "what", "count", "How many numbers it has."),
    Column("nonfinite", "not finite", "what", "count", "NaN and infinite entries; measured as if they were 0."),
    Column("layer", "layer", "what", "count", "First number in the name: the depth in the model."),
    Column("role", "role", "what", "text", "The name without that number."),
    Column(
        "measured",
        "measured",
        "what",
        "text",
        "How: in full, or in a first look, whose norms are estimates; not at all where the note says why.",
    ),
    Column("note", "note", "what", "text", "What to know of this matrix besides."),
    Column("frobenius", "‖W‖F", "norms", "number", "Root of the sum of squares.", _PLAIN),
    Column(
        "spectral_norm",
        "σ₁",
        "norms",
        "number",
        "Largest singular value.",
        f"{_EXACT}; in a first look a lower bound, within 1e-3",
    ),
    Column(
        "stable_rank",
        "stable rank",
        "norms",
        "number",
        "‖W‖F² / σ₁²: how many directions carry the energy.",
        "as exact as σ₁; in a first look an upper bound, within 2e-3",
    ),
    Column(
        "effective_rank",
        "effective rank",
        "spectrum",
        "number",
        "exp of the entropy of σ / Σσ (Roy and Vetterli).",
        _EXACT,
    ),
    Column("condition", "condition", "spectrum", "number", "σ₁ / σ_min; infinite where rows depend.", _SVD),
    Column(
        "orthogonality_error",
        "from orthogonal",
        "spectrum",
        "ratio",
        "Relative distance to the nearest multiple of a (semi-)orthogonal matrix, √(1 - (Σσ)² / (k Σσ²)).",
        _EXACT,
    ),
    Column(
        "noise",
        "noise",
        "spectrum",
        "number",
        "Standard deviation of the entries of a random matrix with the same median singular value.",
        "a fit: right where half of the spectrum or more is random",
    ),
    Column(
        "mp_edge",
        "noise edge",
        "spectrum",
        "number",
        "Upper edge of the Marchenko-Pastur law of that noise: noise (√out + √in).",
        "a fit",
    ),
    Column(
        "above_edge",
        "above edge",
        "spectrum",
        "count",
        "Singular values above the edge by more than its own fluctuation.",
        "a fit",
    ),
    Column(
        "mp_distance",
        "from random",
        "spectrum",
        "ratio",
        "Kolmogorov-Smirnov distance of the eigenvalues of WᵀW to that law; near 0: like a random matrix.",
        "a fit",
    ),
    Column(
        "alpha",
        "α",
        "tail",
        "number",
        "Exponent of the power-law tail of the eigenvalues of WᵀW; refused where there is no such tail.",
        "maximum likelihood; see its interval",
    ),
    Column("alpha_low", "α from", "tail", "number", "Lower end of its 95 % interval, the start of the tail as given."),
    Column("alpha_high", "α to", "tail", "number", "Upper end of that interval."),
    Column("alpha_distance", "α fit", "tail", "ratio", "Kolmogorov-Smirnov distance of the tail to its law."),
    Column("alpha_tail", "in tail", "tail", "count", "Eigenvalues in the tail."),
    Column("alpha_refused", "no α since", "tail", "text", "Why no exponent is given."),
    Column(
        "energy_excess",
        "energy - random",
        "rows",
        "number",
        "Mean inverse distance of the directions of the rows, minus its expectation for random ones.",
        "float32 products, close pairs in float64: to 1e-6; above 4,096 rows of 4,096 evenly spaced ones, to some 1e-4",
        signed=True,
    ),
    Column("row_spread", "row spread", "rows", "ratio", "Standard deviation of the row norms over their mean.", _PLAIN),
    Column("column_spread", "column spread", "rows", "ratio", "The same of the column norms.", _PLAIN),
    Column("outlier_rows", "odd rows", "rows", "count", "Rows far longer than the others by a robust rule."),
    Column("outlier_columns", "odd columns", "rows", "count", "Columns far longer than the others."),
    Column("largest_row", "longest row", "rows", "number", "Longest row over the median row.", _PLAIN),
    Column("largest_column", "longest column", "rows", "number", "Longest column over the median column.", _PLAIN),
    Column(
        "rounding",
        "rounding",
        "storage",
        "number",
        "Root mean square error of an entry as it is stored, if it was rounded to the nearest.",
        "a model: uniform errors",
    ),
    Column(
        "rounding_floor",
        "rounding floor",
        "storage",
        "number",
        "The largest singular value that such errors alone have: rounding (√out + √in).",
        "a model",
    ),
    Column("above_floor", "above floor", "storage", "count", "Singular values above the rounding floor.", "a model"),
    Column("relative_change", "change", "change", "ratio", "‖W - W₀‖F / ‖W₀‖F.", _PLAIN),
    Column("spectrum_change", "spectrum change", "change", "ratio", "‖σ(W) - σ(W₀)‖ / ‖σ(W₀)‖.", _EXACT),
    Column(
        "energy_change",
        "energy change",
        "change",
        "number",
        "Hyperspherical energy minus that of the base.",
        "to 1e-6",
        signed=True,
    ),
    Column(
        "change_stable_rank", "its stable rank", "change", "number", "Stable rank of W - W₀.", "as the singular values"
    ),
    Column(
        "change_rank",
        "its rank",
        "change",
        "count",
        "Rank of W - W₀ above what rounding makes; none where it is full.",
        "decided against the rounding of both files",
    ),
    Column(
        "rotation_fraction",
        "rotation-like",
        "change",
        "ratio",
        "Share of ‖W - W₀‖F² that the best rotation of the inputs takes away; a random change of a square matrix has "
        "half, of a wide one nearly all; the verdict says what it would be.",
        "float64",
    ),
    Column(
        "rotation_angle",
        "rotated by",
        "change",
        "degrees",
        "Angle by which that rotation turns W₀, weighted by energy.",
        "float64",
    ),
    Column("rotation_residual", "beside rotation", "change", "ratio", "‖W - W₀R‖F / ‖W₀‖F: what is left.", "float64"),
    Column(
        "block_size",
        "blocks of",
        "change",
        "count",
        "Smallest block size of a block-diagonal rotation that explains the change to rounding.",
        "decided against the rounding of both files",
    ),
    Column("left_angle", "left angle", "change", "degrees", "Largest angle between the top left singular subspaces."),
    Column("right_angle", "right angle", "change", "degrees", "Largest angle between the top right ones."),
    Column("kind", "kind", "change", "text", "What the change is consistent with, in one word."),
    Column("verdict", "verdict", "change", "text", "The same in a sentence, with its numbers."),
]

#: By name, in the order of the table.
COLUMNS: dict[str, Column] = {column.name: column for column in _LIST}
