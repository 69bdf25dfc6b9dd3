"""How far the singular values of reparameterised weights have moved, and through what."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orthokit.adapters._ledger import log_ratio
from orthokit.adapters.block_rotation import rotate_sides
from orthokit.adapters.poet import POETLinear
from orthokit.errors import ParameterError
from orthokit.linalg import singular_values

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["spectrum_report"]


def spectrum_report(model: nn.Module) -> pd.DataFrame:
    r"""The drift of every POET layer's singular values since it was attached, measured, predicted and split by cause.

    Growth is ``log(||W||_F / ||W_0||_F)``, a sum over merges that splits exactly into the part of each cause. Rounding
    and quantisation act as noise that changes single values up and down; their typical change of one value is the root
    of the summed squared errors per entry.

    Args:
        model: A model with POET layers, or one such layer. What is not merged yet is counted as if it were now.

    Returns:
        One row per layer. ``layer``, ``shape``, ``merges``; ``angle`` and ``largest angle`` of a plane, now and at any
        merge up to now, in radians; ``drift``: largest ``|s_i - s_i(0)| / s_1(0)`` and ``relative drift``: largest
        ``|s_i / s_i(0) - 1|`` (both NaN unless the spectrum is tracked); ``mean log drift``: mean of
        ``log(s_i / s_i(0))`` over the values that are not 0, with what the determinants of the merged factors say it
        must be (``law``, exact for square weights) and what random generators of the same size would give
        (``expected``); ``growth`` and its parts ``truncation``, ``rounding``, ``requantization``; ``rounding noise``
        and ``requantization noise``: typical change of one value over ``s_1(0)``; ``cause``: the largest of
        truncation and the two noises, ``"none"`` if all are 0.

    Raises:
        ParameterError: The model has no POET layer.

    Example:
        >>> from orthokit.adapters import POET, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 8)), POET(block_size=4, map="cayley"))
        >>> float(spectrum_report(model)["drift"][0]) < 1e-7
        True

    Numerics:
        One decomposition in float64 per layer.

    References:
        The exact laws are in ``linalg.laws``; the split is ours.
    """
    import pandas as pd

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, POETLinear)}
    if not layers:
        raise ParameterError(f"{type(model).__name__} has no POET layer; call adapters.attach(model, POET(...)) first.")
    return pd.DataFrame([{"layer": name or "layer", **_row(layer)} for name, layer in layers.items()])


@torch.no_grad()
def _row(layer: POETLinear) -> dict[str, Any]:
    ledger, polish = layer.ledger, layer.config.polish
    angle = max(layer.input.largest_angle(), layer.output.largest_angle())
    W = layer.dense()
    left, right = layer.exact_rotations()
    now = rotate_sides(W, left, right)
    truncation = ledger.truncation + log_ratio(now, W)
    law = ledger.law + layer.output.log_growth(left) + layer.input.log_growth(right)
    expected = ledger.expected + sum(s.expected_log_growth(polish=polish) for s in (layer.output, layer.input))
    noise = [math.sqrt(n / W.numel()) for n in (ledger.rounding_noise, ledger.requantization_noise)]
    drift, relative, mean_log, top = math.nan, math.nan, math.nan, math.nan
    if len(ledger.initial):
        values, initial = singular_values(now).double().cpu(), ledger.initial
        top = float(initial[0])
        drift = float((values - initial).abs().max()) / top if top else 0.0
        # Values that are 0 up to rounding have no logarithm worth the name.
        kept = initial > initial[0] * max(W.shape) * torch.finfo(torch.float64).eps
        ratios = values[kept] / initial[kept]
        relative = float((ratios - 1).abs().max()) if len(ratios) else 0.0
        mean_log = float(ratios.log().mean()) if len(ratios) else 0.0
    scale = top if top and not math.isnan(top) else float(torch.linalg.vector_norm(W)) / math.sqrt(min(W.shape))
    noise = [n / scale if scale else 0.0 for n in noise]
    sizes = {"truncation": abs(truncation), "rounding": noise[0], "requantization": noise[1]}
    cause = max(sizes, key=lambda name: sizes[name])
    return {
        "shape": (layer.out_features, layer.in_features),
        "merges": ledger.merges,
        "angle": angle,
        "largest angle": max(angle, ledger.largest_angle),
        "drift": drift,
        "relative drift": relative,
        "mean log drift": mean_log,
        "law": law,
        "expected": expected,
        "growth": truncation + ledger.rounding + ledger.requantization,
        "truncation": truncation,
        "rounding": ledger.rounding,
        "requantization": ledger.requantization,
        "rounding noise": noise[0],
        "requantization noise": noise[1],
        "cause": cause if sizes[cause] else "none",
    }
