"""Factors on the learning rate that make updates of all shapes alike."""

from __future__ import annotations

import math

from orthokit.errors import unknown_name

__all__ = ["ADJUSTMENTS", "lr_ratio"]

ADJUSTMENTS = (None, "original", "match_rms_adamw", "spectral")


def lr_ratio(rule: str | None, rows: int, columns: int) -> float:
    r"""The factor on the learning rate that makes updates of all shapes alike.

    Args:
        rule: ``None`` or ``"original"``: ``sqrt(max(1, out / in))``. ``"match_rms_adamw"``: ``0.2 sqrt(max(out, in))``,
            which gives an orthogonal update the root mean square 0.2 that AdamW's updates typically have.
            ``"spectral"``: ``sqrt(out / in)``, which gives it the norm that lets rates carry over between widths.
        rows: ``out``, at least 1.
        columns: ``in``, at least 1.

    Returns:
        The factor.

    Raises:
        UnknownNameError: No such rule.

    Example:
        >>> lr_ratio("original", 400, 100)
        2.0

    References:
        K. Jordan et al. (2024), Muon. J. Liu et al. (2025), Muon is scalable for LLM training, arXiv 2502.16982, 2.2.
        G. Yang, J. Simon, J. Bernstein (2023), A spectral condition for feature learning, arXiv 2310.17813.
    """
    if rule not in ADJUSTMENTS:
        raise unknown_name("adjust_lr_fn", rule, ADJUSTMENTS)
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if rule == "spectral":
        return math.sqrt(rows / columns)
    return math.sqrt(max(1.0, rows / columns))
