"""torch.optim.Optimizer subclasses that step along orthogonal directions."""

from orthokit.optim.blocks import block_by_shape
from orthokit.optim.muon import Muon, lr_ratio
from orthokit.optim.routing import OPTIMIZERS, RoutedOptimizer, for_model

__all__ = ["OPTIMIZERS", "Muon", "RoutedOptimizer", "block_by_shape", "for_model", "lr_ratio"]
