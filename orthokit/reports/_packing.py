"""Spectra and profiles in few bytes: thinned, 16 bits a value, as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orthokit.figures.checkpoint_spectra import spread_indices

__all__ = ["pack", "pack_profiles", "places"]

_LEVELS = 65534
PARTS = ("retention_drift", "adaptation")


def places(length: int, points: int) -> list[int]:
    """Which of ``length`` values are kept, counted from 0."""
    return spread_indices(length, points).tolist() if points else []


def pack(spectra: Mapping[str, Any], names: Sequence[str], points: int) -> dict[str, Any] | None:
    """Spectra in the order of ``names``, their logarithms in 65535 steps between their own ends; code 0 is zero.

    Returns:
        ``{"k": length of each (0: none), "ends": [low, high] of log10 each, "codes": base64 of little-endian uint16}``,
        or ``None`` where there is nothing to pack.
    """
    lengths, ends, codes = [], [], []
    for name in names:
        values = spectra.get(name)
        if values is None or not len(values):
            lengths.append(0)
            continue
        kept = np.asarray(values, dtype=np.float64)[places(len(values), points)]
        with np.errstate(divide="ignore"):
            logs = np.log10(np.maximum(kept, 0))
        low, high, code = _quantise(logs)
        lengths.append(len(values))
        ends.append([low, high])
        codes.append(code)
    return _packed(lengths, ends, codes) if codes and points else None


def pack_profiles(profiles: Mapping[str, Any], names: Sequence[str], points: int) -> dict[str, Any] | None:
    """Both profiles of each matrix, one after the other, and where the drift is largest.

    A profile is as rough as noise: leaving values out would lose its peaks. So each point stands for the directions up
    to the next one: by the largest drift, and by the root mean square of the adaptation.
    """
    if not points:
        return None
    lengths, ends, codes, peaks = [], [], [], []
    for name in names:
        profile = profiles.get(name)
        if profile is None:
            lengths.append(0)
            peaks.append(None)
            continue
        drift, moved = (np.asarray(profile[part], dtype=np.float64) for part in PARTS)
        starts = places(len(drift), points)
        lengths.append(len(drift))
        peaks.append([int(drift.argmax()) + 1, float(f"{drift.max():.3g}")])
        counts = np.diff([*starts, len(drift)])
        for part in (np.maximum.reduceat(drift, starts), np.sqrt(np.add.reduceat(moved**2, starts) / counts)):
            low, high, code = _quantise(part)
            ends.append([low, high])
            codes.append(code)
    if not codes:
        return None
    where = {length: places(length, points) for length in sorted(set(lengths) - {0})}
    return _packed(lengths, ends, codes) | {"places": where, "peaks": peaks}


def _quantise(values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """The ends as they are stored, and the codes; what is not finite (the logarithm of 0) becomes code 0."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0, np.zeros(len(values), dtype="<u2")
    low, high = float(f"{finite.min():.9g}"), float(f"{finite.max():.9g}")
    steps = (np.where(np.isfinite(values), values, low) - low) / ((high - low) or 1.0) * _LEVELS
    codes = 1 + steps.round().clip(0, _LEVELS)
    return low, high, np.where(np.isfinite(values), codes, 0).astype("<u2")


def _packed(lengths: list[int], ends: list[list[float]], codes: list[np.ndarray]) -> dict[str, Any]:
    text = base64.b64encode(np.concatenate(codes).tobytes()).decode("ascii")
    return {"k": lengths, "ends": ends, "codes": text}
