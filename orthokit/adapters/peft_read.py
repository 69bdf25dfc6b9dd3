"""Folders that PEFT wrote, as the adapters that they are here."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthokit.adapters._install import Entry
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.files import read_json, read_tensors
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.peft_forms import NeumannSumOFT, Release, neumann_terms, release_of
from orthokit.adapters.sites import Site
from orthokit.errors import CheckpointError
from orthokit.linalg import pack_skew, skew_part

__all__ = ["CONFIG", "PREFIX", "TENSORS", "PeftFile", "entry_of", "read_peft"]

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TYPES = ("OFT", "BOFT", "HRA", "LORA")

_LEAF = re.compile(
    r"(?P<path>.*)\.(?P<leaf>oft_R|oft_embedding_R|oft_r|oft_s|boft_R|boft_s|hra_u|lora_A|lora_B|lora_B\.bias"
    r"|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)
# Options under which the same tensors mean another function.
_OTHER_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# Starts that put another weight in the place of the frozen one: from data, at random, or quantised.
_LOST_STARTS = ("pissa_niter", "corda", "loftq", "lora_ga")

Weight = Callable[[], Tensor]


@dataclass(frozen=True)
class PeftFile:
    """What a folder of PEFT's holds.

    Args:
        folder: The folder.
        config: ``adapter_config.json``.
        release: Which PEFT wrote it.
        layers: The tensors of the adapter, by layer and name.
        others: Tensors that are none of the adapter's, such as heads that were saved whole.
    """

    folder: Path
    config: Mapping[str, Any]
    release: Release
    layers: Mapping[str, Mapping[str, Tensor]]
    others: Mapping[str, Tensor]

    @property
    def type(self) -> str:
        """``"OFT"``, ``"BOFT"``, ``"HRA"`` or ``"LORA"``."""
        return str(self.config["peft_type"])


def read_peft(folder: str | os.PathLike[str], *, version: str | None = None) -> PeftFile:
    """The files of a folder, sorted by layer and not yet interpreted.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        version: The release of PEFT that wrote it, where its config does not say or is wrong.

    Raises:
        CheckpointError: A file is missing or damaged, a pickle, or of a type that is not read.
        OptionError: ``version`` contradicts the tensors.
    """
    place = Path(folder)
    config = read_json(place / CONFIG)
    if config.get("peft_type") not in TYPES:
        raise CheckpointError(
            f"{place} holds a PEFT adapter of type {config.get('peft_type')!r}; read are OFT, BOFT, HRA and LORA (with "
            "rsLoRA, DoRA, PiSSA and OLoRA). Load it with PEFT itself: the diagnostics take its model as it is."
        )
    if not (place / TENSORS).is_file() and (place / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{place} holds its tensors in adapter_model.bin, a pickle, which can run any program when it is opened. "
            'Convert it there: python -c "import torch, safetensors.torch as s; s.save_file(torch.load('
            "'adapter_model.bin', weights_only=True, map_location='cpu'), 'adapter_model.safetensors')\""
        )
    tensors = read_tensors(place / TENSORS)
    release = release_of(config, tensors, version=version)
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        if found := _LEAF.fullmatch(bare):
            layers.setdefault(found["path"], {})[found["leaf"]] = tensor
        else:
            others[bare] = tensor
    if not layers:
        raise CheckpointError(f"{place} has no tensor of a {config['peft_type']}; it has {_few(list(tensors))}.")
    return PeftFile(place, config, release, layers, others)


def entry_of(
    file: PeftFile, path: str, site: Site | None, weight: Weight | None = None, *, finite: bool = True
) -> Entry:
    """The adapter of one layer.

    Args:
        file: From :func:`read_peft`.
        path: The layer.
        site: What it is; ``None`` where there is no model: a linear layer that the tensors fit.
        weight: Gives its weight ``(out, in)``, for starts that were taken out of it; ``None``: not looked at.
        finite: Whether to refuse NaN and infinities.

    Raises:
        CheckpointError: Tensors are missing, or mean something that there is no adapter for.
    """
    tensors = file.layers[path]
    broken = [leaf for leaf, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken and finite:
        raise CheckpointError(f"{file.folder}: {_few(broken)} of {path!r} hold NaN or infinite entries.")
    try:
        if file.type == "OFT":
            dense = "oft_r" in tensors
            return _old_oft(file, tensors, site) if dense else _oft(file, tensors, site)
        if file.type == "BOFT":
            return _boft(file, tensors, site)
        if file.type == "HRA":
            return _hra(file, tensors, site)
        return _lora(file, path, tensors, site, weight)
    except CheckpointError:
        raise
    except KeyError as cause:
        found = _few([*tensors, *file.config])
        raise CheckpointError(f"{file.folder}: {path!r} lacks {cause.args[0]!r}; there are {found}.") from cause
    except (TypeError, ValueError, re.error) as cause:
        raise CheckpointError(f"{file.folder}: {path!r} cannot be read: {cause}") from cause


def _oft(file: PeftFile, tensors: Mapping[str, Tensor], site: Site | None) -> Entry:
    config, embedding = file.config, "oft_embedding_R" in tensors
    v = tensors["oft_embedding_R" if embedding else "oft_R"]
    options = _turning(site) | {"block_size": _block_size(v), "share": bool(config.get("block_share"))}
    if config.get("coft"):
        options["radius"] = float(config["eps"]) / math.sqrt(len(v))
    # Rows that were looked up are rows of the weight: they are turned by R where inputs are turned by R^T.
    sign = -1.0 if embedding else 1.0
    if not config.get("use_cayley_neumann", True):
        return Entry(OFT(map="cayley", **options), {"generator": sign * v})
    t = int(config.get("num_cayley_neumann_terms", 5))
    series = {**options, "map": "cayley_neumann", "tolerance": None}
    if t < 2:
        return Entry(OFT(**series, terms=1), {"generator": torch.zeros_like(v)})
    k = neumann_terms(t)
    if file.release.half_last_term and k is not None:
        return Entry(OFT(**series, terms=k), {"generator": -sign * v})
    return Entry(NeumannSumOFT(**series, terms=t - 1), {"generator": -sign * v})


def _old_oft(file: PeftFile, tensors: Mapping[str, Tensor], site: Site | None) -> Entry:
    config, data, scale = file.config, tensors["oft_r"], tensors["oft_s"]
    rows, b = data.shape[:2]
    options = _turning(site)
    if config.get("coft"):
        blocks = rows
        if config.get("block_share"):
            blocks = _width(site, options["conv"]) // b if site is not None else int(config.get("r") or rows)
        radius = float(config["eps"]) * math.ceil(len(scale) / blocks) ** 2 / math.sqrt(rows)
        # There it was the stored matrix that was kept short, not its skew part.
        norm = torch.linalg.matrix_norm(data, keepdim=True)
        data, options["radius"] = data * (radius / norm.clamp_min(radius)), radius
    options |= {"share": bool(config.get("block_share")), "dropout": _dropout(config, "module_dropout", options)}
    made = BOFT(block_size=b, factors=1, scale_outputs=True, **options)
    return Entry(made, {"generator": pack_skew(skew_part(data))[None], "scale": scale.flatten()})


def _boft(file: PeftFile, tensors: Mapping[str, Tensor], site: Site | None) -> Entry:
    data, scale = tensors["boft_R"], tensors["boft_s"]
    options = _turning(site)
    options["dropout"] = _dropout(file.config, "boft_dropout", options)
    made = BOFT(block_size=data.shape[-1], factors=len(data), scale_outputs=True, **options)
    return Entry(made, {"generator": pack_skew(skew_part(data)), "scale": scale.flatten()})


def _hra(file: PeftFile, tensors: Mapping[str, Tensor], site: Site | None) -> Entry:
    u = tensors["hra_u"]
    orthogonal = bool(file.config.get("apply_GS"))
    made = HRA(rank=u.shape[1], symmetric=False, orthogonal=orthogonal, conv=_conv(site))
    return Entry(made, {"vectors": u.mT.contiguous()})


def _lora(file: PeftFile, path: str, tensors: Mapping[str, Tensor], site: Site | None, weight: Weight | None) -> Entry:
    config = file.config
    if other := [option for option in _OTHER_LORA if config.get(option)]:
        raise CheckpointError(
            f"{file.folder} is a LoRA with {', '.join(other)}, which computes something else than W + s B A and is not "
            "read. Load it with PEFT itself."
        )
    if "lora_B.bias" in tensors and bool(tensors["lora_B.bias"].any()):
        raise CheckpointError(f"{file.folder}: {path!r} has a bias in B (lora_bias); merge it with PEFT instead.")
    dora = "lora_magnitude_vector" in tensors
    if "lora_embedding_A" in tensors:
        if dora:
            raise CheckpointError(
                f"{file.folder}: {path!r} is DoRA on an embedding, where PEFT takes lengths of columns; here words are "
                "rows. Merge it with PEFT instead."
            )
        down, up = tensors["lora_embedding_B"].mT, tensors["lora_embedding_A"].mT
    else:
        down, up = tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)
        if site is not None and site.groups > 1:
            raise CheckpointError(f"{file.folder}: {path!r} is a convolution with groups; merge it with PEFT instead.")
    rank, made = down.shape[0], DoRA if dora else LoRA
    alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))
    stabilised = bool(config.get("use_rslora"))
    scale = alpha / (math.sqrt(rank) if stabilised else rank)
    options: dict[str, Any] = {"alpha": alpha, "rank_stabilised": stabilised}
    if scale <= 0:
        up, options = up * scale, {"alpha": None}
    if site is None or site.kind not in ("conv", "embedding"):
        options["dropout"] = float(config.get("lora_dropout") or 0.0)
    more = {"magnitude": tensors["lora_magnitude_vector"].flatten()} if dora else {}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_LOST_STARTS):
        raise CheckpointError(
            f"{file.folder} began with {start!r}, which put another weight in the place of the frozen one; what that "
            "was is not in the file. Save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain "
            "LoRA of it."
        )
    if start == "pissa" and weight is not None:
        # The start is a function of the frozen weight: attaching makes it again.
        kept = frozenset(("down_start", "up_start"))
        return Entry(made(rank, init="pissa", **options), {"down": down, "up": up, **more}, rest=kept)
    if start == "olora" and weight is not None:
        Q, R = torch.linalg.qr(weight())
        down, up = torch.cat([down, R[:rank]]), torch.cat([up, -Q[:, :rank]], dim=1) * (scale if scale > 0 else 1.0)
        options = {**options, "alpha": None, "rank_stabilised": False}
    return _within(made, down, up, options, more)


def _within(made: Any, down: Tensor, up: Tensor, options: Mapping[str, Any], more: Mapping[str, Tensor]) -> Entry:
    """A LoRA of at most the rank that a matrix of these sizes has."""
    rank, rows, columns = len(down), len(up), down.shape[1]
    if rank > min(rows, columns):
        scale = made(rank, **options).scale
        change = scale * (up.double() @ down.double()).to(up.dtype)
        eye = torch.eye(min(rows, columns), dtype=up.dtype)
        down, up = (change, eye) if rows <= columns else (eye, change)
        options = {**options, "alpha": None, "rank_stabilised": False}
    return Entry(made(len(down), **options), {"down": down.contiguous(), "up": up.contiguous(), **more})


def _turning(site: Site | None) -> dict[str, Any]:
    """The options of a rotation whose parameter is its generator."""
    return {"block_rate": False, "conv": _conv(site)}


def _conv(site: Site | None) -> str:
    """PEFT turns patches; where a kernel has one place, these are channels."""
    return "patches" if site is not None and site.kind == "conv" and site.patch * site.groups > 1 else "channels"


def _dropout(config: Mapping[str, Any], key: str, options: Mapping[str, Any]) -> float:
    return 0.0 if options["conv"] == "patches" else float(config.get(key) or 0.0)


def _width(site: Site, conv: str) -> int:
    return site.in_features // site.groups * site.patch if conv == "patches" else site.in_features


def _block_size(v: Tensor) -> int:
    b = (1 + math.isqrt(1 + 8 * v.shape[-1])) // 2
    if v.ndim != 2 or b < 2 or b * (b - 1) // 2 != v.shape[-1]:
        raise CheckpointError(
            f"packed generators have b (b - 1) / 2 columns for a block size b >= 2; got {tuple(v.shape)}."
        )
    return b


def _pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value for a layer whose name ends in a key, a regular expression, of ``pattern``."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
