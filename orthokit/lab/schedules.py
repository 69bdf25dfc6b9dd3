"""Learning-rate schedules as plain functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from orthokit.errors import OptionError, unknown_name

__all__ = ["SCHEDULES", "lr_factor"]

SCHEDULES = ("constant", "cosine", "wsd")


def lr_factor(
    step: int, *, steps: int, schedule: str = "constant", warmup: int = 0, final: float = 0.0, decay: float = 0.2
) -> float:
    r"""The factor on the base learning rate at ``step``.

    Warm-up rises linearly to 1 over the first ``warmup`` steps. Then ``"constant"`` stays, ``"cosine"`` falls to
    ``final`` along half a cosine, and ``"wsd"`` (warm-up, stable, decay) stays until the last ``decay`` share of the
    steps and falls linearly to ``final``.

    Args:
        step: 0 ... ``steps - 1``.
        steps: Length of the run, ``>= 1``.
        schedule: ``"constant"``, ``"cosine"`` or ``"wsd"``.
        warmup: Steps of the rise, ``0 <= warmup <= steps``; default 0.
        final: Factor at the end, in [0, 1]; default 0.
        decay: Share of the run that ``"wsd"`` falls over, in (0, 1]; default 0.2.

    Returns:
        A number in [0, 1].

    Raises:
        UnknownNameError: No such schedule.
        OptionError: A number out of range.

    Example:
        >>> [lr_factor(i, steps=4, schedule="cosine", warmup=1) for i in (0, 1)]
        [1.0, 1.0]
        >>> round(lr_factor(3, steps=4, schedule="wsd", decay=0.5), 3)
        0.5
    """
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if not 0 <= warmup <= steps or not 0 <= final <= 1 or not 0 < decay <= 1:
        raise OptionError(
            f"need 0 <= warmup <= steps = {steps}, 0 <= final <= 1, 0 < decay <= 1; "
            f"got warmup={warmup}, final={final}, decay={decay}."
        )
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "cosine":
        share = (step - warmup) / max(steps - warmup, 1)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "wsd":
        length = max(1, round(decay * steps))
        return final + (1 - final) * min(1.0, (steps - step) / length)
    return 1.0
