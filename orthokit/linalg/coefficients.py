"""Published coefficient tables of odd quintic iterations towards the polar factor.

One step maps every singular value ``s`` to ``a s + b s^3 + c s^5``; a table is the sequence of ``(a, b, c)``. Past its
end the last row repeats. No table is best on every spectrum: ``benchmarks`` and the notebooks show where each wins.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

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
_JORDAN: Triple = (3.4445, -4.7750, 2.0315)
_BASELINE: Triple = (2.0, -1.5, 0.5)
_LIMIT: Triple = (1.875, -1.25, 0.375)


def _safe(row: Triple, safety: float = _SAFETY) -> Triple:
    a, b, c = row
    return (a / safety, b / safety**3, c / safety**5)


COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # K. Jordan et al. (2024), Muon: the steepest slope at 0 that still lands in about [0.7, 1.2]; does not converge.
    "jordan": (_JORDAN,),
    # The same post's point of comparison: converges from anywhere below the square root of 2, with slope 2 at 0.
    "baseline": (_BASELINE,),
    # J. You (2025), four digits as published (modded-nanogpt, train_gpt_medium): five rows, the last two nearly alike.
    "you": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # J. You (2025), his six rows in multiples of 1/1024, as the documentation of modula gives them.
    "you_six": tuple(
        (a / 1024, b / 1024, c / 1024)
        for a, b, c in (
            (3955, -8306, 5008),
            (3735, -6681, 3463),
            (3799, -6499, 3211),
            (4019, -6385, 2906),
            (2677, -3029, 1162),
            (2172, -1833, 682),
        )
    ),
    # J. L. Cesista (2025): eight rows for very small singular values; Megatron-Core first shipped them as
    # "polar_express".
    "cesista": (
        (7.2086, -15.5131, 9.0178),
        (3.9623, -2.5813, 0.4542),
        (3.9466, -2.5765, 0.4544),
        (3.8991, -2.5671, 0.4566),
        (3.7186, -2.5308, 0.4653),
        (3.1390, -2.3073, 0.4733),
        (2.1715, -1.5246, 0.3885),
        (1.8648, -1.2224, 0.3577),
    ),
    # N. Amsel, D. Persson, C. Musco, R. Gower (2025), arXiv 2505.16932; the limit row converges quadratically.
    "polar_express": (*(_safe(row) for row in _MINIMAX), _LIMIT),
    # The same authors' program, which fits each row to the interval that the safety of the rows before leaves, as timm
    # and pytorch_optimizer ship it: safety 1.01, cushion 0.02.
    "polar_express_safe": (
        (8.237312490495555, -23.157747414558198, 16.680568411445915),
        (4.082441999064835, -2.893047735332586, 0.5252849256975648),
        (3.9263479922546582, -2.8547468034765298, 0.5318022422894988),
        (3.2982187133085143, -2.424541981026706, 0.48632008358844075),
        (2.2970369434552573, -1.63662558125903, 0.4002628455953627),
        (1.8763805351440397, -1.2347896577722228, 0.35891887501668385),
        (1.8564423485617974, -1.2132449880935525, 0.3568003487825883),
        (1.8749994008682747, -1.2499988017229169, 0.3749994008546422),
    ),
    # The same with safety 1.02, as timm and pytorch_optimizer ship it under "polar_express_safer".
    "polar_express_safer": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.0429299351667245, -2.808917465908704, 0.5000178451051299),
        (3.8916678022926563, -2.7724841532176825, 0.5060648178503389),
        (3.285753657755658, -2.3681294933425394, 0.46449024233003117),
        (2.3005307116270983, -1.6111665557258408, 0.3833374427545273),
        (1.8631210546382593, -1.2042160621002727, 0.3421879560523383),
        (1.8382572152247512, -1.1779263289537742, 0.3396513038637379),
        (1.8749999923301852, -1.2499999836060613, 0.374999991275876),
    ),
    # Five rows of that construction, the last without safety: modded-nanogpt (2025) and optimuon.
    "modded_nanogpt": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    # gram-newton-schulz (2026): the first five minimax rows, all with safety 1.05.
    "gram_newton_schulz": tuple(_safe(row, 1.05) for row in _MINIMAX[:5]),
    # E. Grishina, M. Smirnov, M. Rakhuba (2025), arXiv 2506.10935, four digits as Emerging-Optimizers ships them: the
    # minimax rows without cushion or safety.
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # T. Boissin et al. (2025), Turbo-Muon: four rows, tuned for input scaled by ``scaling="aol"``.
    "turbo_muon": (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
    # DeepSeek-AI (2026), DeepSeek-V4: eight steep rows, then two that converge.
    "deepseek_v4": (*[_JORDAN] * 8, *[_BASELINE] * 2),
    # arXiv 2606.00371 (2026), How much orthogonalization does Muon need?: five cubic rows that aim at [0.7, 1.3].
    "relaxed_cubic": (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
    # Classical Newton-Schulz of degree 5 and 3: slow from small singular values, exact in the limit.
    "quintic": (_LIMIT,),
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
    if isinstance(coefficients, (str, tuple)):
        with contextlib.suppress(TypeError):  # a tuple of lists
            return list(_known_table(coefficients, steps))
    return _table(coefficients, steps)


@functools.lru_cache(maxsize=64)
def _known_table(coefficients: Any, steps: int) -> list[Triple]:
    # A tiny matrix is orthogonalised in the time that reading five rows takes.
    return _table(coefficients, steps)


def _table(coefficients: Any, steps: int) -> list[Triple]:
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise unknown_name("coefficient table", coefficients, COEFFICIENTS)
        rows: list[Any] = list(COEFFICIENTS[coefficients])
    else:
        single = len(coefficients) > 0 and all(isinstance(c, (int, float)) for c in coefficients)
        rows = [coefficients] if single else list(coefficients)
    if steps < 0:
        raise OptionError(f"steps must be at least 0; got {steps}.")
    if not rows or any(isinstance(row, (int, float)) or len(row) != 3 for row in rows):
        raise OptionError(f"each row of coefficients must be three numbers (a, b, c); got {coefficients!r}.")
    table: list[Triple] = [(float(a), float(b), float(c)) for a, b, c in rows]
    return [table[min(i, len(table) - 1)] for i in range(steps)]
