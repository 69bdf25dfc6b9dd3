"""Adapters: layers that reparameterise the weights of a model, put in, merged or taken off with one call."""

from orthokit.adapters import foreign  # registers the layers of other packages
from orthokit.adapters.attach import adapted_layers, attach, detach, merge, table, unmerge
from orthokit.adapters.base import Adapter, AdapterConfig, AdapterLayer
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA, hra_penalty
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.optimizer import POETOptimizer
from orthokit.adapters.poet import POET, POETLinear
from orthokit.adapters.quantization import dequantize, quantize
from orthokit.adapters.quantized import QuantizedLinear, quantize_linears, requantize
from orthokit.adapters.report import spectrum_report
from orthokit.adapters.stack import (
    adapter_parameters,
    adapter_report,
    adapter_state_dict,
    disabled,
    load_adapter_state_dict,
    set_adapters,
)

__all__ = [
    "BOFT",
    "HRA",
    "OFT",
    "POET",
    "AdaptedLayer",
    "Adapter",
    "AdapterConfig",
    "AdapterLayer",
    "DoRA",
    "FullFineTuning",
    "LoRA",
    "POETLinear",
    "POETOptimizer",
    "QuantizedLinear",
    "adapted_layers",
    "adapter_parameters",
    "adapter_report",
    "adapter_state_dict",
    "attach",
    "dequantize",
    "detach",
    "disabled",
    "foreign",
    "hra_penalty",
    "load_adapter_state_dict",
    "merge",
    "quantize",
    "quantize_linears",
    "requantize",
    "set_adapters",
    "spectrum_report",
    "table",
    "unmerge",
]
