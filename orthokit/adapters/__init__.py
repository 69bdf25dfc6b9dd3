"""Adapters: layers that reparameterise the weights of a model, put in, merged or taken off with one call."""

from orthokit.adapters.attach import adapted_layers, attach, detach, merge, table
from orthokit.adapters.base import AdapterConfig, AdapterLayer
from orthokit.adapters.optimizer import POETOptimizer
from orthokit.adapters.poet import POET, POETLinear
from orthokit.adapters.quantization import dequantize, quantize
from orthokit.adapters.report import spectrum_report

__all__ = [
    "POET",
    "AdapterConfig",
    "AdapterLayer",
    "POETLinear",
    "POETOptimizer",
    "adapted_layers",
    "attach",
    "dequantize",
    "detach",
    "merge",
    "quantize",
    "spectrum_report",
    "table",
]
