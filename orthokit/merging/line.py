"""A merged model at every scale, out of two merges: what sliders and searches over ``scale`` need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.errors import OptionError
from orthokit.merging._common import check_range
from orthokit.merging.dicts import Merged, merge
from orthokit.merging.report import MergeReport

__all__ = ["MergeLine", "merge_line"]


@dataclass(frozen=True)
class MergeLine:
    """The merged models of one method, as a line in the space of weights.

    Args:
        start: The merge with ``scale=0``: the base, or of OrthoMerge the base under the merged rotation.
        end: The merge with ``scale=1``.
        report: Of the merge with ``scale=1``.
    """

    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    report: MergeReport

    def at(self, scale: float) -> dict[str, Tensor]:
        """The merged model at a scale.

        Args:
            scale: Any finite number, as in :func:`merge`.

        Returns:
            A state dict; tied tensors stay one.

        Raises:
            OptionError: ``scale`` is not finite.
        """
        check_range("scale", scale)
        found: dict[str, Tensor] = {}
        made: dict[tuple[int, int], Tensor] = {}
        for name, a in self.start.items():
            b = self.end[name]
            if (id(a), id(b)) not in made:
                made[id(a), id(b)] = torch.lerp(a, b, scale) if a.is_floating_point() else a.clone()
            found[name] = made[id(a), id(b)]
        return found


def merge_line(
    base: nn.Module | Mapping[str, Tensor],
    experts: Iterable[nn.Module | Mapping[str, Tensor]],
    *,
    method: str = "orthomerge",
    **options: Any,
) -> MergeLine:
    r"""A merged model for every ``scale``, for the cost of two merges.

    Every method multiplies one change by ``scale``, so that its results lie on a line:

    .. math:: W(s) = W(0) + s\,(W(1) - W(0))

    Args:
        base: As in :func:`merge`.
        experts: As in :func:`merge`.
        method: As in :func:`merge`; default ``"orthomerge"``.
        **options: Others of :func:`merge`, ``scale`` apart. A ``scale`` within ``layers`` holds for its tensors at
            every point of the line.

    Returns:
        :class:`MergeLine`.

    Raises:
        OptionError: ``scale`` is given; otherwise as :func:`merge`.
        UnknownNameError: As :func:`merge`.
        ParameterError: As :func:`merge`.
        ShapeError: As :func:`merge`.
        NonFiniteError: As :func:`merge`.

    Example:
        >>> base, expert = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
        >>> line = merge_line(base, [expert], method="task_arithmetic")
        >>> torch.equal(line.at(0.25)["w"], merge(base, [expert], method="task_arithmetic", scale=0.25)["w"])
        True

    Numerics:
        As :func:`merge` to rounding of the two ends, in the dtypes of the base: keep it in float32 for searches.
    """
    if "scale" in options:
        raise OptionError(f"merge_line gives every scale; got scale={options['scale']!r}. Pass it to .at() instead.")
    models = list(experts)
    end: Merged = merge(base, models, method=method, scale=1.0, **options)
    return MergeLine(merge(base, models, method=method, scale=0.0, **options), end, end.report)
