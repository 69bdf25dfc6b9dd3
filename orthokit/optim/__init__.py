"""torch.optim.Optimizer subclasses that step along orthogonal directions."""

from orthokit.optim.base import MatrixOptimizer
from orthokit.optim.blocks import block_by_shape
from orthokit.optim.muon import Muon
from orthokit.optim.pion import Pion
from orthokit.optim.rates import lr_ratio
from orthokit.optim.routing import OPTIMIZERS, RoutedOptimizer, for_model

__all__ = [
    "OPTIMIZERS",
    "MatrixOptimizer",
    "Muon",
    "Pion",
    "RoutedOptimizer",
    "block_by_shape",
    "for_model",
    "lr_ratio",
]
