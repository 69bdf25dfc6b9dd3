"""Arithmetic of a monitor that keeps within a share of the time: when to look, when to keep up a running mean."""

from __future__ import annotations

from math import ceil, isfinite

__all__ = ["Budget"]

# Weight of the newest cost in the running estimate: quick, since the first look pays for warming up.
_NEWEST = 0.5
# The running mean may take half of the budget at most; otherwise it could starve the looks it serves.
_UPKEEP_PART = 0.5


class Budget:
    r"""Keeps ``spent <= share * elapsed + one cost`` at every moment, whatever the steps and the looks take.

    A look is allowed when ``spent + predicted <= share * (elapsed + predicted)``, so a look that takes longer than
    predicted overdraws once, and the next one waits until that is paid back. The first look is allowed at once. All
    times are given in by the caller; nothing here reads a clock.

    Args:
        share: Largest share of the elapsed time, ``0 < share <= 1``.
        every: Fewest steps between two looks, ``>= 1``.
    """

    def __init__(self, *, share: float | int, every: int) -> None:
        self.share, self.every, self.period = share, every, every
        self.spent = self.upkeep = 0.0
        self.start: float | int | None = None
        self.last: float | int = 0.0
        self.calls = 0
        self.look_cost: float | int | None = None
        self.upkeep_cost = 0.0
        self.looked_at: int | None = None

    @property
    def elapsed(self) -> float | int:
        """Seconds from the first arrival to the end of the last one."""
        return self.last - (self.last if self.start is None else self.start)

    def arrive(self, now: float | int) -> None:
        """A step is over."""
        self.start = now if self.start is None else self.start
        self.last = now
        self.calls += 1

    def due(self, step: int) -> bool:
        """Whether ``every`` steps have passed since the last look; a smaller step number is a new run."""
        return self.looked_at is None or step < self.looked_at or step - self.looked_at >= self.every

    def affords_look(self) -> bool:
        """Whether the predicted cost of a look fits into what the share leaves."""
        return self.look_cost is None or self._fits(self.look_cost)

    def affords_upkeep(self) -> bool:
        """Whether the predicted cost of one update of the running mean fits, in all and in its own part."""
        own = self.upkeep + self.upkeep_cost <= _UPKEEP_PART * self.share * (self.elapsed + self.upkeep_cost)
        return self._fits(self.upkeep_cost) and (own or self.share >= 1)

    def _fits(self, cost: float | int) -> bool:
        # What is spent also passes: it adds to both sides. A share of 1 is no limit, also where sums are rounded.
        return self.share >= 1 or self.spent + cost <= self.share * (self.elapsed + cost)

    def pay_look(self, step: int, cost: float | int, *, upkeep: float | int, now: float | int) -> None:
        """Book a look that took ``cost`` seconds, ``upkeep`` of them for the running mean."""
        self.spent += cost
        self.look_cost = cost if self.look_cost is None else self.look_cost + _NEWEST * (cost - self.look_cost)
        self.upkeep_cost = upkeep
        self.looked_at = step
        self.last = now

    def pay_upkeep(self, cost: float | int, *, now: float | int) -> None:
        """Book one update of the running mean between looks."""
        self.spent += cost
        self.upkeep += cost
        self.upkeep_cost += _NEWEST * (cost - self.upkeep_cost)
        self.last = now

    def pay_skip(self, cost: float | int, *, now: float | int) -> None:
        """Book the deciding itself."""
        self.spent += cost
        self.last = now

    def plan(self) -> int:
        """Steps between looks that the share can bear in the long run, from the mean step and the predicted costs."""
        steps = self.calls - 1
        if steps < 1 or self.look_cost is None:
            return self.period
        step, upkeep = (self.elapsed - self.spent) / steps, self.upkeep / steps
        # n steps and one look must satisfy: n upkeep + look <= share (n (step + upkeep) + look).
        left = self.share * (step + upkeep) - upkeep
        wanted = self.look_cost * (1 - self.share) / left if left > 0 else float("inf")
        if isfinite(wanted):
            self.period = max(self.every, ceil(wanted))
        return self.period
