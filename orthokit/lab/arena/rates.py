"""Learning rates to try first, for every method on every ground."""

from __future__ import annotations

from orthokit.errors import OptionError

__all__ = ["FIRST_RATES", "first_rate"]

# A factor of two apart, around the best of short trials on another seed; the study goes on beyond the edge at which the
# best one lies.
_TEXT_RATES: dict[str, tuple[float, ...]] = {
    "full": (2.5e-5, 5e-5, 1e-4),
    "lora": (8e-4, 1.6e-3, 3.2e-3),
    "dora": (8e-4, 1.6e-3, 3.2e-3),
    "oft": (2.5e-4, 5e-4, 1e-3),
    "boft": (2.5e-4, 5e-4, 1e-3),
    "hra": (4e-3, 8e-3, 1.6e-2),
    "pissa": (2e-4, 4e-4, 8e-4),
    "milora": (4e-4, 8e-4, 1.6e-3),
    "muon": (1.25e-4, 2.5e-4, 5e-4),
    "pion": (1.25e-4, 2.5e-4, 5e-4),
    "vera": (1.6e-2, 3.2e-2, 6.4e-2),
    "ia3": (8e-3, 1.6e-2, 3.2e-2),
}
_PICTURE_RATES: dict[str, tuple[float, ...]] = {
    "full": (1e-3, 2e-3, 4e-3),
    "lora": (1e-2, 2e-2, 4e-2),
    "dora": (1e-2, 2e-2, 4e-2),
    "oft": (5e-3, 1e-2, 2e-2),
    "boft": (5e-3, 1e-2, 2e-2),
    "hra": (2e-2, 4e-2, 8e-2),
    "pissa": (3e-3, 6e-3, 1.2e-2),
    "milora": (1e-2, 2e-2, 4e-2),
    "muon": (4e-3, 8e-3, 1.6e-2),
    "pion": (4e-3, 8e-3, 1.6e-2),
    "vera": (1e-1, 2e-1, 4e-1),
    "ia3": (4e-2, 8e-2, 1.6e-1),
}
FIRST_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "tinygpt": {
        "full": (3.2e-3, 6.4e-3, 1.28e-2),
        "lora": (8e-3, 1.6e-2, 3.2e-2),
        "dora": (8e-3, 1.6e-2, 3.2e-2),
        "oft": (1e-3, 2e-3, 4e-3),
        "boft": (1e-3, 2e-3, 4e-3),
        "hra": (1e-2, 2e-2, 4e-2),
        "pissa": (1.6e-3, 3.2e-3, 6.4e-3),
        "milora": (8e-3, 1.6e-2, 3.2e-2),
        "muon": (5e-3, 1e-2, 2e-2),
        "pion": (5e-3, 1e-2, 2e-2),
        "vera": (6.4e-2, 1.28e-1, 2.56e-1),
        "ia3": (3.2e-2, 6.4e-2, 1.28e-1),
    },
    "fashion": _PICTURE_RATES,
    "digits": _PICTURE_RATES,
    "noun": _TEXT_RATES,
    "verb": _TEXT_RATES,
    "era": _TEXT_RATES,
}
"""Ground to method to three learning rates."""


def first_rate(ground: str, method: str) -> float:
    """The learning rate to begin with: the middle one of those to try first.

    Raises:
        OptionError: There is none for this pair.

    Example:
        >>> first_rate("tinygpt", "lora")
        0.016
    """
    try:
        return FIRST_RATES[ground][method][1]
    except KeyError:
        raise OptionError(f"there is no rate to begin with for {method!r} on {ground!r}; give one in rates.") from None
