"""Merging of models: one function per method on tensors, ``merge()`` for dicts, ``merge_checkpoints()`` for files.

Every method is ``method(base, experts, *, weights=None, scale=..., **options) -> tensor``; :func:`methods` lists them.
"""

from orthokit.linalg.merged_rotations import MergedGenerator, merge_generators, merge_rotations
from orthokit.merging._registry import MergeMethod, methods
from orthokit.merging.adaptation import *  # noqa: F403
from orthokit.merging.adaptation import __all__ as _adaptation
from orthokit.merging.adapters import ADAPTER_METHODS, merge_adapters
from orthokit.merging.anchor_analysis import *  # noqa: F403
from orthokit.merging.anchor_analysis import __all__ as _anchor_analysis
from orthokit.merging.anchors import *  # noqa: F403
from orthokit.merging.anchors import __all__ as _anchors
from orthokit.merging.averages import *  # noqa: F403
from orthokit.merging.averages import __all__ as _averages
from orthokit.merging.decoupling import OrthoMerged, orthomerge, orthomerge_parts
from orthokit.merging.dicts import Merged, merge
from orthokit.merging.dual_anchors import FDAReport, fda, merge_with_anchors
from orthokit.merging.files import FilesReport, MergeProgress, merge_checkpoints
from orthokit.merging.landscape import *  # noqa: F403
from orthokit.merging.landscape import __all__ as _landscape
from orthokit.merging.line import MergeLine, merge_line
from orthokit.merging.mergekit import MergekitRecipe, read_mergekit
from orthokit.merging.recipe import Recipe
from orthokit.merging.report import MergeReport
from orthokit.merging.sparse import *  # noqa: F403
from orthokit.merging.sparse import __all__ as _sparse
from orthokit.merging.spectral import *  # noqa: F403
from orthokit.merging.spectral import __all__ as _spectral
from orthokit.merging.statistics import *  # noqa: F403
from orthokit.merging.statistics import __all__ as _statistics
from orthokit.merging.tuning import Tuned, tune

__all__ = [
    "ADAPTER_METHODS",
    "FDAReport",
    "FilesReport",
    "MergeLine",
    "MergeMethod",
    "MergeProgress",
    "MergeReport",
    "Merged",
    "MergedGenerator",
    "MergekitRecipe",
    "OrthoMerged",
    "Recipe",
    "Tuned",
    "fda",
    "merge",
    "merge_adapters",
    "merge_checkpoints",
    "merge_generators",
    "merge_line",
    "merge_rotations",
    "merge_with_anchors",
    "methods",
    "orthomerge",
    "orthomerge_parts",
    "read_mergekit",
    "tune",
    *_adaptation,
    *_anchor_analysis,
    *_anchors,
    *_averages,
    *_landscape,
    *_sparse,
    *_spectral,
    *_statistics,
]
