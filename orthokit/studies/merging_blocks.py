"""Functional dual anchors of whole blocks in the study of merging: constructed once, adapted in every trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from orthokit.lab.families import FAMILIES, Expert, expert_model
from orthokit.merging import FDAReport, merge_line, merge_with_anchors

__all__ = ["BLOCK_FAMILIES", "block_contestants"]

Options = Mapping[str, Any]
Contestant = tuple[Callable[[Options], dict[str, Tensor]], dict[str, Any]]

BLOCK_FAMILIES = ("pictures", "language")
"""The families whose blocks are small enough for it."""

_SCALE = {"scale": (0.1, 1.5, "log")}
_SIZES = {"tokens": 16, "construct": {"count": 64, "steps": 150}}
_SMALL = {"tokens": 4, "construct": {"count": 4, "steps": 2}}


def block_contestants(
    family: str, base: Mapping[str, Tensor], experts: Mapping[str, Expert], *, seed: int, small: bool
) -> tuple[dict[str, Contestant], FDAReport]:
    """What takes part: a name to a function from options to a merged trunk, and what is tuned.

    Args:
        family: One of :data:`BLOCK_FAMILIES`.
        base: The trunk of the pretrained model.
        experts: Task to expert.
        seed: Of the anchors.
        small: Fewest anchors and steps, for tests.

    Returns:
        The contestants, and the report of the construction.
    """
    models = [expert_model(family, task, expert, small=small) for task, expert in experts.items()]
    task, first = next(iter(experts.items()))
    start = expert_model(family, task, first, trunk=base, small=small)
    trunks = [expert.trunk for expert in experts.values()]
    epochs = 2 if small else 60
    common: dict[str, Any] = {"blocks": FAMILIES[family].blocks, "untouched": ["head.*"], "seed": seed}
    sizes = _SMALL if small else _SIZES
    _, made = merge_with_anchors(start, models, **common, **sizes, adapt={"epochs": 0})

    def adapted(begin: Any, lr: float, **more: Any) -> dict[str, Tensor]:
        merged, _ = merge_with_anchors(
            start,
            models,
            **common,
            tokens=sizes["tokens"],
            anchors=made.anchors,
            start=begin,
            adapt={"epochs": epochs, "lr": lr},
            **more,
        )
        return {name: tensor for name, tensor in merged.items() if name in base}

    tsv = merge_line(base, trunks, method="tsv")

    def from_base(options: Options) -> dict[str, Tensor]:
        return adapted("pretrained", options.get("lr", 1e-3))

    def from_sum(options: Options) -> dict[str, Tensor]:
        return adapted("task_arithmetic", 1e-2, scale=options.get("scale", 0.3))

    def from_tsv(options: Options) -> dict[str, Tensor]:
        heads = {name: t for name, t in start.state_dict().items() if name not in base}
        return adapted({**tsv.at(options.get("scale", 1.0)), **heads}, 1e-2)

    return {
        "anchors": (from_base, {"lr": (1e-5, 1e-2, "log")}),
        "anchors from task_arithmetic": (from_sum, dict(_SCALE)),
        "anchors from tsv": (from_tsv, dict(_SCALE)),
    }, made
