r"""The entries of a matrix: norms of its rows and columns, which of them are outliers, and what storing them costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from orthokit.checkpoints._rounding import pieces, rounding_error
from orthokit.diagnostics.randommatrix import noise_edge
from orthokit.errors import DtypeError, OptionError, ShapeError
from orthokit.linalg._check import check_matrix

__all__ = ["EntryStats", "LineNorms", "entry_stats", "noise_floor", "rounding_noise"]

# An outlier is this many robust standard deviations of the log norm above the median, and this many times as long.
_DEVIATIONS, _TIMES = 6.0, 2.0
# Standard deviation of a normal distribution over its median absolute deviation.
_MAD = 1.482602
# Lines named in the result.
_TOP = 5


@dataclass(frozen=True)
class LineNorms:
    r"""The Euclidean norms of the rows, or of the columns, of one matrix.

    Args:
        norms: One a line, float64, on the CPU.
        spread: Their standard deviation over their mean; 0 for equal norms and for a zero matrix.
        median: Their median.
        largest: The largest over the median; ``None`` if more than half of the lines are zero.
        outliers: Lines whose log norm lies more than six robust standard deviations above the median of the log norms,
            and whose norm is at least twice the median norm. The robust standard deviation is 1.4826 times the median
            absolute deviation.
        top: The lines with the largest norms, largest first, at most five.
    """

    norms: Float[Tensor, " lines"]
    spread: float
    median: float
    largest: float | None
    outliers: int
    top: tuple[int, ...]


@dataclass(frozen=True)
class EntryStats:
    r"""What the entries of a matrix say without any decomposition.

    Args:
        frobenius: :math:`\|W\|_F`.
        nonfinite: Entries that are NaN or infinite; they count as 0 in everything else.
        rows: Norms of the rows, one an output.
        columns: Norms of the columns, one an input.
    """

    frobenius: float
    nonfinite: int
    rows: LineNorms
    columns: LineNorms


def entry_stats(W: Num[Tensor, "out in"]) -> EntryStats:
    r"""The norms of rows and columns, how much they differ, and which lines stick out.

    .. math:: \text{spread} = \mathrm{std}(\|w_i\|) / \mathrm{mean}(\|w_i\|), \qquad
        \text{outlier: } \log\|w_i\| - \mathrm{med} > 6 \cdot 1.4826\,\mathrm{MAD}
        \ \text{ and } \ \|w_i\| \ge 2\,\mathrm{median}\|w_j\|

    Args:
        W: Matrix, shape ``(out, in)``, floating or complex; NaN and infinities are counted and taken as 0.

    Returns:
        :class:`EntryStats`.

    Raises:
        ShapeError: Not one matrix.
        DtypeError: ``W`` is an integer tensor.

    Example:
        >>> W = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
        >>> W[7] *= 10
        >>> found = entry_stats(W)
        >>> found.rows.outliers, found.rows.top[0], found.columns.outliers
        (1, 7, 0)

    Numerics:
        Squares and sums in float64, of one run of rows at a time: no copy of ``W`` in float64, and no overflow of
        float32 entries. Large or tiny float64 entries are scaled first. Six robust deviations are passed by one line of
        noise in a billion; the factor of two keeps lines out that stand apart only because all others are equal. Zero
        lines are no outliers. 2 ms per million entries on one core.

    References:
        T. Dettmers et al., LLM.int8(), arXiv 2208.07339, for what outlier columns do to quantisation. The rule is ours,
        after B. Iglewicz, D. Hoaglin (1993), How to detect and handle outliers, for median and MAD.
    """
    if W.ndim != 2:
        raise ShapeError(f"W must be one matrix (out, in); got shape {tuple(W.shape)}.")
    check_matrix(W)
    W = W.detach()
    scale = _scale(W)
    rows = torch.zeros(W.shape[0], dtype=torch.float64)
    columns = torch.zeros(W.shape[1], dtype=torch.float64)
    ones = torch.ones(W.shape[0], dtype=torch.float64)
    nonfinite, at = 0, 0
    for piece in pieces(W):
        part = piece.cpu()
        # A float64 part would be the weight itself.
        wide = (part.abs() if part.is_complex() else part).double()
        # In place where that is a copy; what is float64 on the CPU already is the caller's.
        squares = (wide / scale).square_() if scale != 1 else wide.square() if wide is part else wide.square_()
        of_rows = squares.sum(1)
        if not bool(of_rows.isfinite().all()):
            bad = ~squares.isfinite()
            nonfinite += int(bad.sum())
            squares[bad] = 0
            of_rows = squares.sum(1)
        rows[at : at + len(part)] = of_rows
        # A product, since sums over the first dimension are slow.
        columns += ones[: len(part)] @ squares
        at += len(part)
    return EntryStats(scale * math.sqrt(rows.sum().item()), nonfinite, *(_lines(x, scale) for x in (rows, columns)))


def rounding_noise(W: Num[Tensor, "*shape"], *, dtype: torch.dtype) -> float:
    r"""The error that an entry has because it is stored in ``dtype``, root mean square.

    .. math:: \sqrt{\tfrac{1}{N} \sum_{ij} \mathrm{ulp}(w_{ij})^2 / 12}, \qquad
        \mathrm{ulp}(w) = \epsilon\, 2^{\max(\lfloor \log_2 |w| \rfloor,\, e_{\min})}

    Args:
        W: The numbers, any shape; those that were stored, or others that are to be.
        dtype: A floating or complex type, ``torch.bfloat16`` or ``torch.float8_e4m3fn`` as well.

    Returns:
        The error in the units of ``W``; 0 for zeros, which are exact.

    Raises:
        DtypeError: ``dtype`` or the type of ``W`` is not floating.

    Example:
        >>> W = torch.rand(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
        >>> measured = (W - W.bfloat16()).square().mean().sqrt().item()
        >>> abs(rounding_noise(W, dtype=torch.bfloat16) / measured - 1) < 0.02
        True

    Numerics:
        The exponents are read from the bits: no logarithm, exact powers of two, sums in float64; below the smallest
        normal number the distance stays that of subnormal numbers, and nothing loses more than itself. Assumes that
        errors are uniform within half an ulp, which holds for numbers that come from training; overflow of ``dtype`` is
        not counted. Of NaN and infinities the error is 0. 2 ms per million entries on one core.

    References:
        N. Higham (2002), Accuracy and Stability of Numerical Algorithms, section 2.1, for the spacing; B. Widrow,
        I. Kollar (2008), Quantization Noise, for ulp^2 / 12.
    """
    for what, kind in (("dtype", dtype), ("the type of W", W.dtype)):
        if not (kind.is_floating_point or kind.is_complex):
            raise DtypeError(f"{what} must be floating, such as torch.bfloat16; got {kind}. Whole numbers are exact.")
    return rounding_error(W, dtype)


def noise_floor(rounding: float | int, shape: tuple[int, int]) -> float:
    r"""The largest singular value that rounding alone gives a matrix: below it, singular values are not known.

    .. math:: \text{floor} = \text{rounding} \cdot (\sqrt m + \sqrt n)

    Args:
        rounding: Root mean square error of an entry, ``>= 0``, as of :func:`rounding_noise` or
            :meth:`~orthokit.checkpoints.Checkpoint.rounding`.
        shape: ``(m, n)``.

    Returns:
        The floor, in the units of ``rounding``.

    Raises:
        OptionError: ``rounding`` negative or not finite.
        ShapeError: Sizes below 1.

    Example:
        >>> round(noise_floor(1e-3, (400, 100)), 12)
        0.03

    References:
        As :func:`~orthokit.diagnostics.noise_edge`, with rounding errors for the noise: they are independent to a good
        approximation, and unequal in size from entry to entry, which moves the edge by a few per cent.
    """
    if not (rounding >= 0 and math.isfinite(rounding)):
        raise OptionError(f"rounding must be finite and >= 0; got {rounding}.")
    return noise_edge(shape, rounding, 0.0).item()


def _scale(W: Tensor) -> float:
    """What entries are divided by so that their squares stay inside float64; 1 for all types but float64 itself."""
    if W.dtype not in (torch.float64, torch.complex128) or W.numel() == 0:
        return 1.0
    largest = max(float(torch.nan_to_num(piece.abs(), nan=0.0, posinf=0.0).max()) for piece in pieces(W))
    # A power of two, so that dividing by it rounds nothing.
    return 1.0 if largest == 0 or 1e-100 < largest < 1e100 else 2.0 ** math.floor(math.log2(largest))


def _lines(squares: Tensor, scale: float) -> LineNorms:
    norms = squares.sqrt() * scale
    mean = norms.mean().item() if len(norms) else 0.0
    if not mean > 0:
        return LineNorms(norms, 0.0, 0.0, None, 0, tuple(range(min(_TOP, len(norms)))))
    median = norms.median().item()
    top = norms.topk(min(_TOP, len(norms)))
    largest, outliers = None, 0
    if median > 0:
        logs = norms.log()
        above = logs - logs.median()
        deviation = _MAD * above.abs().median()
        largest = top.values[0].item() / median
        outliers = int(((above > _DEVIATIONS * deviation) & (norms >= _TIMES * median)).sum())
    return LineNorms(
        norms=norms,
        spread=(norms / mean).std(correction=0).item(),
        median=median,
        largest=largest,
        outliers=outliers,
        top=tuple(top.indices.tolist()),
    )
