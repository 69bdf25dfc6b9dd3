"""Known defects of the PEFT that wrote an adapter, in words: which apply to it, and which do under conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from orthokit.adapters._install import Entry
from orthokit.adapters._rotation import SkewMap
from orthokit.adapters._turn import rotation_blocks
from orthokit.adapters.peft_forms import NeumannSumOFT, neumann_terms
from orthokit.adapters.peft_read import PeftFile
from orthokit.linalg import unpack_skew

__all__ = ["Finding", "peft_findings", "series_findings"]

# Beyond this a plane has lost a quarter of its length with the series that everyone takes, k = 3.
_LARGE_NORM = 0.7


@dataclass(frozen=True)
class Finding:
    """Something to know about an adapter.

    Args:
        text: In words.
        applies: ``True``: the files show that it applies. ``False``: it does under a condition that the text names.
    """

    text: str
    applies: bool = True


def peft_findings(file: PeftFile, entries: Mapping[str, Entry]) -> list[Finding]:
    """The defects of the writing release that concern these files.

    Args:
        file: The folder.
        entries: Its adapters, by layer.
    """
    of = {"OFT": _oft, "BOFT": _boft, "LORA": _lora}.get(file.type)
    return list(of(file, entries)) if of else []


def series_findings(entries: Mapping[str, Entry]) -> list[Finding]:
    """What a series that is never switched to the exact map does to planes that turn far.

    Args:
        entries: Adapters, by layer.
    """
    norms: dict[int, float] = {}
    for entry in entries.values():
        config: Any = entry.config
        series = getattr(config, "map", None) == "cayley_neumann" and config.tolerance is None
        if series and config.terms % 4 == 3 and not isinstance(config, NeumannSumOFT):
            norms[config.terms] = max(norms.get(config.terms, 0.0), _largest_norm(entry))
    return [
        Finding(
            f"Rank collapse: the series with powers up to k={k} has singular values |1 - theta^{k + 1}|, 0 at "
            f"a generator of norm 1, and the largest norm here is {theta:.3g}. Unmerging divides by them."
        )
        for k, theta in norms.items()
        if theta > _LARGE_NORM
    ]


def _oft(file: PeftFile, entries: Mapping[str, Entry]) -> Iterator[Finding]:
    config, number = file.config, file.release.number or (0, 0)
    if number < (0, 16):
        yield Finding(
            "The first of three OFT formats of PEFT (dense matrices, outputs scaled): releases from 0.16 on do not "
            "read it."
        )
        yield from _scales(entries)
        return
    t, series = int(config.get("num_cayley_neumann_terms", 5)), bool(config.get("use_cayley_neumann", True))
    later = file.release.half_last_term
    if series and not later and t >= 3:
        yield Finding(
            "The second of three OFT formats of PEFT: since 0.18 the same numbers are read as another series, with no "
            f"more than a warning. Rotations of this adapter change by up to {_other_series(entries, t):.2g} an entry."
        )
    if series and t == 1:
        yield Finding("With num_cayley_neumann_terms=1 the rotation is the identity: nothing was trained.")
    if series and later and t in (3, 4):
        yield Finding("num_cayley_neumann_terms=3 and 4 are the same map in PEFT since 0.18.")
    if config.get("module_dropout"):
        yield Finding(f"module_dropout={config['module_dropout']} was stored and never applied in training.")
    yield Finding(
        f"If use_cayley_neumann is changed to {not series}: PEFT's exact map and its series have opposite signs, so "
        "every rotation of this adapter would be inverted.",
        applies=False,
    )
    yield Finding(
        "If it is merged together with another active OFT adapter: PEFT merges them in the opposite order to that of "
        "its forward pass, which is another function.",
        applies=False,
    )
    if any("oft_R" in tensors for tensors in file.layers.values()):
        yield Finding(
            "If a layer is a Conv2d with a kernel larger than 1 x 1: PEFT's forward pass adds up overlapping patches, "
            "is not the identity at the start, and is not what it merges.",
            applies=False,
        )
    if number <= (0, 20):
        yield Finding(
            "If PEFT before 0.21 merged it into a bitsandbytes 4-bit or 8-bit model: the rotation was computed and "
            "discarded. Merge again.",
            applies=False,
        )


def _boft(file: PeftFile, entries: Mapping[str, Entry]) -> Iterator[Finding]:
    wanted = int(file.config.get("boft_n_butterfly_factor", 1))
    there = max(entry.config.factors for entry in entries.values())  # type: ignore[attr-defined]
    if there == 1 < wanted:
        yield Finding(
            f"The config asks for {wanted} butterfly factors and the tensors have one: without a word PEFT takes one "
            "where its CUDA kernel does not build. It was trained as a block-diagonal rotation."
        )
    if there > 1:
        yield Finding(
            "Several butterfly factors: PEFT reads them only where its CUDA kernel builds, and fails on their shapes "
            "elsewhere."
        )
    yield from _scales(entries)


def _lora(file: PeftFile, entries: Mapping[str, Entry]) -> Iterator[Finding]:
    start = file.config.get("init_lora_weights")
    if start in ("pissa", "olora"):
        yield Finding(
            f"It began with {start!r} and was saved without conversion: it belongs to the frozen weight less the "
            "start, which has to be computed again from exactly the same weight."
        )


def _scales(entries: Mapping[str, Entry]) -> Iterator[Finding]:
    scales = torch.cat([entry.tensors["scale"] for entry in entries.values()])
    low, high = float(scales.min()), float(scales.max())
    if max(abs(low - 1), abs(high - 1)) > 1e-6:
        yield Finding(
            f"Outputs are scaled by {low:.4g} to {high:.4g}: singular values of the weights are not kept, though the "
            "rotations are orthogonal."
        )


def _largest_norm(entry: Entry) -> float:
    config: Any = entry.config
    Q = unpack_skew(entry.tensors["generator"].double() * config.rate)
    if config.radius is not None:
        Q = Q * (config.radius / torch.linalg.matrix_norm(Q, keepdim=True).clamp_min(config.radius))
    return entry.strength * float(torch.linalg.matrix_norm(Q, 2).max())


def _other_series(entries: Mapping[str, Entry], t: int) -> float:
    """How far PEFT's series since 0.18 is from the one before, on these numbers."""
    worst = 0.0
    for entry in entries.values():
        config: Any = entry.config
        v = entry.tensors["generator"].double()
        later = SkewMap("cayley_neumann", neumann_terms(t) or 1, 1)
        before, after = (rotation_blocks(v, config.block_size, spec) for spec in (config.spec, later))
        worst = max(worst, float((before - after).abs().max()))
    return worst
