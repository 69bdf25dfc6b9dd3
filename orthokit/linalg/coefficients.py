"""Published coefficient tables of odd quintic iterations towards the polar factor.

One step maps every singular value ``s`` to ``a s + b s^3 + c s^5``; a table is the sequence of ``(a, b, c)``. Past its
end the last row repeats. No table is best on every spectrum: ``benchmarks`` and the notebooks show where each wins.
"""

from __future__ import annotations

from collections.abc import Sequence

from orthokit.errors import OptionError, unknown_name

__all__ = ["COEFFICIENTS", "Triple", "coefficient_table"]

Triple = tuple[float, float, float]

# The composed minimax polynomials for singular values in [1e-3, 1]. Every row but the last is evaluated at s / 1.01: a
# bfloat16 product can push a singular value slightly above the interval a row was made for, where it would diverge.
_SAFETY = 1.01
_MINIMAX: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def _safe(row: Triple) -> Triple:
    a, b, c = row
    return (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)


COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # K. Jordan et al. (2024), Muon: the steepest slope at 0 that still lands in about [0.7, 1.2]; does not converge.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # J. You (2024), six digits as published: five different rows, the last two nearly alike.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # N. Amsel, D. Persson, C. Musco, R. Gower (2025), arXiv 2505.16932; the limit row converges quadratically.
    "polar_express": (*(_safe(row) for row in _MINIMAX), (1.875, -1.25, 0.375)),
    # Classical Newton-Schulz of degree 5 and 3: slow from small singular values, exact in the limit.
    "quintic": ((1.875, -1.25, 0.375),),
    "cubic": ((1.5, -0.5, 0.0),),
}


def coefficient_table(coefficients: str | Sequence[float] | Sequence[Sequence[float]], steps: int) -> list[Triple]:
    """The ``steps`` triples that an iteration will use.

    Args:
        coefficients: A name in :data:`COEFFICIENTS`, one triple ``(a, b, c)``, or a sequence of triples.
        steps: How many rows are wanted, at least 0; the last row repeats when the table is shorter.

    Returns:
        ``steps`` triples.

    Raises:
        UnknownNameError: The name is not in :data:`COEFFICIENTS`.
        OptionError: ``steps`` is negative, or a row does not hold three numbers.

    Example:
        >>> coefficient_table("jordan", 2)
        [(3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315)]
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise unknown_name("coefficient table", coefficients, COEFFICIENTS)
        rows: list[Sequence[float]] = list(COEFFICIENTS[coefficients])
    else:
        single = len(coefficients) > 0 and all(isinstance(c, (int, float)) for c in coefficients)
        rows = [coefficients] if single else list(coefficients)  # type: ignore[list-item]
    if steps < 0:
        raise OptionError(f"steps must be at least 0; got {steps}.")
    if not rows or any(isinstance(row, (int, float)) or len(row) != 3 for row in rows):
        raise OptionError(f"each row of coefficients must be three numbers (a, b, c); got {coefficients!r}.")
    table: list[Triple] = [(float(a), float(b), float(c)) for a, b, c in rows]
    return [table[min(i, len(table) - 1)] for i in range(steps)]
