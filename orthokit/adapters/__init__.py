"""Adapters: layers that reparameterise the weights of a model, put in, merged or taken off with one call."""

from orthokit.adapters import foreign  # registers the layers of other packages
from orthokit.adapters.attach import adapted_layers, attach, detach, merge, table, unmerge
from orthokit.adapters.audit import AuditReport, LayerAudit, audit
from orthokit.adapters.base import Adapter, AdapterConfig, AdapterLayer
from orthokit.adapters.boft import BOFT
from orthokit.adapters.combine import combine
from orthokit.adapters.dora import DoRA
from orthokit.adapters.files import load, save
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA, hra_penalty
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.optimizer import POETOptimizer
from orthokit.adapters.paths import rewind, rotation_strengths, safe_scales
from orthokit.adapters.peft_defects import Finding
from orthokit.adapters.peft_export import save_peft
from orthokit.adapters.peft_forms import NeumannSumOFT
from orthokit.adapters.peft_import import load_peft
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
    "AuditReport",
    "DoRA",
    "Finding",
    "FullFineTuning",
    "LayerAudit",
    "LoRA",
    "NeumannSumOFT",
    "POETLinear",
    "POETOptimizer",
    "QuantizedLinear",
    "adapted_layers",
    "adapter_parameters",
    "adapter_report",
    "adapter_state_dict",
    "attach",
    "audit",
    "combine",
    "dequantize",
    "detach",
    "disabled",
    "foreign",
    "hra_penalty",
    "load",
    "load_adapter_state_dict",
    "load_peft",
    "merge",
    "quantize",
    "quantize_linears",
    "requantize",
    "rewind",
    "rotation_strengths",
    "safe_scales",
    "save",
    "save_peft",
    "set_adapters",
    "spectrum_report",
    "table",
    "unmerge",
]
