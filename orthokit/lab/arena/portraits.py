"""What fine-tuning did to a model: its weights in the frame of the pretrained ones, and what its layers put out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from orthokit.adapters.paths import rotation_strengths
from orthokit.diagnostics.activations import activation_geometry, collect_activations
from orthokit.diagnostics.drift import capability_drift
from orthokit.diagnostics.profiles import fluctuation, weight_profiles
from orthokit.diagnostics.spectrum import stable_rank
from orthokit.errors import OptionError, ParameterError
from orthokit.lab.arena.grounds import ground_named, pretrained_model
from orthokit.lab.arena.weights import decomposed_before, target_names, weights_after, weights_before
from orthokit.linalg.spectra import singular_values

__all__ = ["DIAGNOSTICS", "Portrait", "portrait"]

Row = dict[str, Any]

DIAGNOSTICS = (
    "moved",
    "stable_rank",
    "retention",
    "fluctuation",
    "adaptation_fluctuation",
    "csd_general",
    "csd_general_unaligned",
    "csd_target",
    "raw",
    "procrustes",
    "gram",
    "cka",
    "spectrum",
)
"""Columns of a portrait, in order."""

# Rows that the drift on inputs is averaged over; it is a mean, so more of them change it little.
_FELT = 512
_SHOWN = 3


@dataclass(frozen=True)
class Portrait:
    """What fine-tuning did to one model.

    Args:
        summary: Diagnostic to its value for the whole model.
        layers: One row a layer: ``layer``, the diagnostics, ``strength``.
        profiles: One row for each singular direction of three layers: ``layer, index, sigma, retention, adaptation``
            and ``after``, the singular value of that rank in the fine-tuned weight.
    """

    summary: dict[str, float]
    layers: list[dict[str, Any]]
    profiles: list[dict[str, Any]]


def portrait(ground: str, model: nn.Module, *, small: bool = False) -> Portrait:
    r"""Every diagnostic of a fine-tuned model of the arena, beside the pretrained one.

    .. math::
        P(i) = u_i^\top W v_i, \qquad E(i) = \|(W - W_0) v_i\|_2, \qquad W_0 = \textstyle\sum_i \sigma_i u_i v_i^\top

    Args:
        ground: Where it was fine-tuned.
        model: The model, by any method; not changed.
        small: As it was entered.

    Returns:
        :class:`Portrait`. ``moved``: :math:`\|W - W_0\|_F / \|W_0\|_F` over all layers together. Means over layers:
        ``stable_rank`` of the change; ``retention``, the mean of :math:`|P(i) - \sigma_i| / \sigma_1`, and
        ``fluctuation`` of that profile; ``adaptation_fluctuation`` of :math:`E(i) / \|W - W_0\|_F`;
        ``csd_general``, ``csd_target``: relative drift on the inputs that the layer had in the pretrained model on
        texts of either kind, ``csd_general_unaligned`` the unaligned one. Means over the layers whose outputs are
        compared on general inputs: ``raw``, ``procrustes``, ``gram``, ``cka``; other layers have NaN there.
        ``spectrum``: the largest :math:`|\sigma_i(W) - \sigma_i| / \sigma_1` of a layer. ``strength`` of a layer is
        that of :func:`orthokit.adapters.rotation_strengths`, NaN where nothing is turned. A layer at rest has zeros,
        and ``adaptation_fluctuation`` NaN.

    Raises:
        UnknownNameError: No such ground.
        ParameterError, ShapeError: The model is not one of that ground's.

    Example:
        >>> from orthokit.lab.arena import enter
        >>> racer = enter("tinygpt", "oft", lr=1e-2, seed=0, steps=2, small=True)
        >>> _ = racer.advance(), racer.advance()
        >>> found = portrait("tinygpt", racer.model, small=True).summary
        >>> found["spectrum"] < 1e-5 < found["moved"]
        True

    Numerics:
        float32 weights; SVDs of the pretrained weights and inputs of the pretrained model are made once a ground.
        Singular values for ``spectrum`` from Gram matrices in float64. About a second of processor time.

    References:
        Z. Huang et al., PEFT-Arena, arXiv 2605.28819, for the diagnostics; see :mod:`orthokit.diagnostics.profiles`,
        :mod:`~orthokit.diagnostics.drift` and :mod:`~orthokit.diagnostics.activations` for each.
    """
    before, after = weights_before(ground, small), weights_after(ground, model, small=small)
    strengths, outputs = _strengths(model), _outputs_changed(ground, model, small)
    layers: list[Row] = []
    profiles: list[Row] = []
    shown = _evenly(list(before), _SHOWN)
    changed = whole = 0.0
    for name, W0 in before.items():
        W, row = after[name], {"layer": name}
        profile = weight_profiles(W0, W, svd=decomposed_before(ground, small)[name])
        sigma = profile.singular_values
        drift, change = profile.drift / sigma[0], float(profile.change)
        changed, whole = changed + change**2, whole + float(W0.square().sum())
        after_values = singular_values(W.double(), method="gram")
        row |= {
            "moved": change / float(W0.norm()),
            "stable_rank": float(stable_rank(W - W0)),
            "retention": float(drift.mean()),
            "fluctuation": float(fluctuation(drift)),
            "adaptation_fluctuation": float(fluctuation(profile.adaptation / change)) if change > 0 else math.nan,
            **_felt(ground, name, W0, W, small),
            **outputs.get(name, dict.fromkeys(("raw", "procrustes", "gram", "cka"), math.nan)),
            "spectrum": float((after_values - _values_before(ground, small)[name]).abs().max() / sigma[0]),
            "strength": strengths.get(name, math.nan),
        }
        layers.append(row)
        if name in shown:
            columns = {
                "sigma": sigma,
                "retention": profile.retention,
                "adaptation": profile.adaptation,
                "after": after_values,
            }
            profiles += [
                {"layer": name, "index": i} | dict(zip(columns, values, strict=True))
                for i, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True))
            ]
    summary = {key: _mean([row[key] for row in layers]) for key in DIAGNOSTICS}
    summary |= {"moved": math.sqrt(changed / whole), "spectrum": max(row["spectrum"] for row in layers)}
    return Portrait(summary, layers, profiles)


def _mean(values: Sequence[float]) -> float:
    """Over the layers that have a value."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def _evenly(names: list[str], count: int) -> list[str]:
    """First, last and what is evenly between."""
    places = torch.linspace(0, len(names) - 1, min(count, len(names))).round().int().unique().tolist()
    return [names[i] for i in places]


def _strengths(model: nn.Module) -> dict[str, float]:
    """How far each layer is turned, if its adapter turns; reflections may hold a half turn and have no such number."""
    try:
        return rotation_strengths(model)
    except (OptionError, ParameterError):
        return {}


@lru_cache(maxsize=4)
def _values_before(ground: str, small: bool) -> dict[str, Tensor]:
    return {name: singular_values(W.double(), method="gram") for name, W in weights_before(ground, small).items()}


def _mask(ids: Tensor) -> Tensor:
    return ids != 0


def _collected(
    ground: str, model: nn.Module, which: str, layers: Sequence[str], small: bool, *, tokens: int, inputs: bool = False
) -> dict[str, Tensor]:
    place = ground_named(ground)
    if place.inputs is None:
        raise OptionError(f"the ground {ground!r} has no inputs to compare on; give it some.")
    keep = _mask if place.padded else None
    what = "input" if inputs else "output"
    found = collect_activations(model, place.inputs(which, small), layers, what=what, keep=keep, tokens=tokens)
    return {name: X.float() for name, X in found.items()}


@lru_cache(maxsize=4)
def _inputs_before(ground: str, which: str, small: bool) -> dict[str, Tensor]:
    model = pretrained_model(ground, small).eval()
    return _collected(ground, model, which, target_names(ground, small), small, tokens=_FELT, inputs=True)


def _felt(ground: str, name: str, W0: Tensor, W: Tensor, small: bool) -> dict[str, float]:
    general = capability_drift(W0, W, _inputs_before(ground, "general", small)[name])
    target = capability_drift(W0, W, _inputs_before(ground, "target", small)[name])
    return {
        "csd_general": float(general.relative),
        "csd_general_unaligned": float(general.unaligned),
        "csd_target": float(target.relative),
    }


@lru_cache(maxsize=4)
def _outputs_before(ground: str, small: bool) -> dict[str, Tensor]:
    model, place = pretrained_model(ground, small).eval(), ground_named(ground)
    names = [name for name in target_names(ground, small) if any(fnmatchcase(name, one) for one in place.seen)]
    if not names:
        return {}
    return _collected(ground, model, "general", names, small, tokens=place.tokens)


def _outputs_changed(ground: str, model: nn.Module, small: bool) -> dict[str, dict[str, float]]:
    before = _outputs_before(ground, small)
    if not before:
        return {}
    after = _collected(ground, model, "general", list(before), small, tokens=ground_named(ground).tokens)
    found = {}
    for name, X0 in before.items():
        # The smallest runs have few inputs; the recorded ones have at least four tokens a dimension.
        geometry = activation_geometry(X0, after[name], ranks=(), few="flag" if small else "refuse")
        found[name] = {key: getattr(geometry, key) for key in ("raw", "procrustes", "gram", "cka")}
    return found
