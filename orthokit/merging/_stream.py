"""How far a merge of files is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MergeProgress"]


@dataclass(frozen=True)
class MergeProgress:
    """How far a merge of files is.

    Args:
        name: The tensor that was written last.
        done: Tensors that are written.
        total: Tensors of the model.
        bytes_done: Bytes that are written.
        bytes_total: Bytes of the model.
        bytes_resumed: Of those that are written, how many an earlier run wrote.
        seconds: Since the start of this run.
    """

    name: str
    done: int
    total: int
    bytes_done: int
    bytes_total: int
    bytes_resumed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second of this run."""
        return (self.bytes_done - self.bytes_resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float:
        """Seconds to go at this rate; infinite at rate 0."""
        left = self.bytes_total - self.bytes_done
        return left / self.rate if self.rate > 0 else 0.0 if left == 0 else float("inf")

    def line(self) -> str:
        """One line of text.

        Example:
            >>> MergeProgress("W", 3, 12, 25 * 10**6, 10**8, 0, 0.5).line()
            'merge 3/12 tensors, 25 of 100 MB, 50 MB/s, 2 s left'
        """
        left = f"{self.remaining:.0f} s left" if self.remaining < float("inf") else "starting"
        sizes = f"{self.bytes_done / 1e6:,.0f} of {self.bytes_total / 1e6:,.0f} MB"
        return f"merge {self.done}/{self.total} tensors, {sizes}, {self.rate / 1e6:,.0f} MB/s, {left}"
