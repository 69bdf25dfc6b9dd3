"""The merging methods by name, and what each of them asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from orthokit.errors import unknown_name
from orthokit.merging.averages import linear, metrics_weighted, model_stock, slerp, task_arithmetic
from orthokit.merging.decoupling import orthomerge
from orthokit.merging.dual_anchors import fda
from orthokit.merging.sparse import dare, ties
from orthokit.merging.spectral import iso_c, knots, tsv, wudi
from orthokit.merging.statistics import curvature, fisher, regmean

__all__ = ["MergeMethod", "method_named", "methods"]


@dataclass(frozen=True)
class MergeMethod:
    """One way to merge.

    Args:
        name: By which :func:`~orthokit.merging.merge` knows it.
        function: ``function(base, experts, **options) -> tensor``.
        summary: What it does, in one line.
        reference: Where it is from.
        statistics: Keyword of the statistics it needs of each expert, or ``None``.
        matrices: Whether it needs matrices; other tensors get the weighted mean.
        experts: Fewest and most experts; ``None``: no limit.
        elementwise: Whether a number of the result depends on the numbers in its place alone, so that a large tensor
            can be merged piece by piece.
    """

    name: str
    function: Callable[..., Tensor]
    summary: str
    reference: str
    statistics: str | None = None
    matrices: bool = False
    experts: tuple[int, int | None] = (1, None)
    elementwise: bool = False

    @property
    def options(self) -> Mapping[str, Any]:
        """Its keyword options with their defaults, without ``weights``, ``scale`` and the statistics."""
        own = inspect.signature(self.function).parameters.values()
        common = {"weights", "scale", "generator", self.statistics}
        return {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY and p.name not in common}


_ALL = (
    MergeMethod(
        "linear",
        linear,
        "weighted mean of the experts",
        "Wortsman et al. (2022), arXiv 2203.05482",
        elementwise=True,
    ),
    MergeMethod(
        "task_arithmetic",
        task_arithmetic,
        "base plus a multiple of the summed changes",
        "Ilharco et al. (2023), arXiv 2212.04089",
        elementwise=True,
    ),
    MergeMethod("slerp", slerp, "point on the arc between two models", "Shoemake (1985)", experts=(2, 2)),
    MergeMethod(
        "ties", ties, "largest changes, of the sign that outweighs, averaged", "Yadav et al. (2023), arXiv 2306.01708"
    ),
    MergeMethod("dare", dare, "random part of each change, made larger", "Yu et al. (2024), arXiv 2311.03099"),
    MergeMethod(
        "model_stock",
        model_stock,
        "mean of the experts drawn to the base by the angle between them",
        "Jang et al. (2024), arXiv 2403.19522",
        experts=(2, None),
    ),
    MergeMethod(
        "tsv",
        tsv,
        "leading singular triplets of each change, made orthogonal",
        "Gargiulo et al. (2025), arXiv 2412.00081",
        matrices=True,
    ),
    MergeMethod(
        "iso_c",
        iso_c,
        "summed changes with all singular values equal",
        "Marczak et al. (2025), arXiv 2502.04959",
        matrices=True,
    ),
    MergeMethod(
        "knots",
        knots,
        "changes in one basis of all their singular vectors",
        "Stoica et al. (2024), arXiv 2410.19735",
        matrices=True,
    ),
    MergeMethod(
        "wudi",
        wudi,
        "change that disturbs each expert least on the rows of its own change",
        "Cheng et al. (2025), arXiv 2503.08099",
        matrices=True,
    ),
    MergeMethod(
        "regmean",
        regmean,
        "least squares of the layers' outputs on each expert's inputs",
        "Jin et al. (2023), arXiv 2212.09849",
        statistics="grams",
        matrices=True,
    ),
    MergeMethod(
        "fisher",
        fisher,
        "mean weighted by the Fisher information",
        "Matena, Raffel (2022), arXiv 2111.09832",
        statistics="fishers",
        elementwise=True,
    ),
    MergeMethod(
        "curvature",
        curvature,
        "mean weighted by AdamW's second moments (OTA)",
        "Mahdavinia et al. (2025), arXiv 2509.11167",
        statistics="second_moments",
    ),
    MergeMethod(
        "metrics_weighted",
        metrics_weighted,
        "mean weighted by losses or steps, in our form",
        "after arXiv 2504.18580",
        elementwise=True,
    ),
    MergeMethod(
        "orthomerge",
        orthomerge,
        "rotations of the base merged as rotations, the rest as before",
        "Yang, Shi, Liu (2026), arXiv 2602.05943",
    ),
    MergeMethod(
        "fda",
        fda,
        "layer that answers to each expert's anchors as the expert does",
        "Shi, Wen, Liu (2025), arXiv 2510.21223",
        matrices=True,
    ),
)
_BY_NAME: Mapping[str, MergeMethod] = MappingProxyType({one.name: one for one in _ALL})


def methods() -> Mapping[str, MergeMethod]:
    """All merging methods by name, with a line about each and their options.

    Returns:
        A read-only mapping.

    Example:
        >>> "orthomerge" in methods()
        True
        >>> methods()["task_arithmetic"].summary
        'base plus a multiple of the summed changes'
    """
    return _BY_NAME


def method_named(name: str) -> MergeMethod:
    """The method of this name, or an error that lists all."""
    if name not in _BY_NAME:
        raise unknown_name("method", name, tuple(_BY_NAME))
    return _BY_NAME[name]
