r"""How much of an adapter acts: back along its path to the plain weight, layer by layer if wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orthokit.adapters._blocks import BlockAdapter
from orthokit.adapters._householder import half_turn_gap
from orthokit.adapters._rotating import Rotating, width_of
from orthokit.adapters.base import PATHS, Adapter
from orthokit.adapters.hra import HRAAdapter
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.stack import stacked_layers
from orthokit.errors import OptionError, ParameterError, unknown_name

__all__ = ["rewind", "rotation_strengths", "safe_scales"]

RULES = ("safe", "min")
# Of the skew matrix of reflections: below it they hold a half turn to rounding.
_NO_GAP = 1e-6


def rewind(
    model: nn.Module, alpha: float | Mapping[str, float], *, path: str = "cayley_sqrt", name: str | None = None
) -> nn.Module:
    r"""Set how far adapters are on their path from the plain weight (0) to what was trained (1); nothing is lost.

    With ``Q`` the generator of a rotation ``R = f(Q)``: ``"cayley_sqrt"`` is ``W f(sqrt(alpha) Q)``,
    ``"cayley_linear"`` is ``W f(alpha Q)``, and ``"dense"`` is ``W + alpha (W R - W)``. On the first two every point is
    a rotation of ``W``: singular values, lengths of rows and angles between them stay. On the dense path they do not.

    Args:
        model: A model with adapters.
        alpha: In [0, 1], or layer names with one each; layers that are not named stay as they are. 0 is the plain
            weight exactly, 1 all of the adapter.
        path: ``"cayley_sqrt"`` (default), ``"cayley_linear"`` or ``"dense"``. The names hold for every map: with
            ``map="exp"`` the linear path is ``exp(alpha A)``, the geodesic from ``W``, walked at constant speed.
        name: One adapter; default ``None``: all. The dense path is that of a whole layer.

    Returns:
        ``model``. Forward passes and merges have the place on the path until the next call, and files keep it (those of
        an adapter hold no dense path; saving one is refused). A call forgets what earlier ones set on the same layers
        and adapters, so ``rewind(model, 1.0)`` restores everything.

    Raises:
        OptionError: ``alpha`` outside [0, 1], ``path="dense"`` for one adapter of several, or reflections that no
            rotations lead to. Nothing was changed.
        UnknownNameError: Unknown path.
        ParameterError: There is no such adapter or layer, or adapters are merged with ``keep=True``. Nothing was
            changed.

    Example:
        >>> from orthokit.adapters import OFT, attach, merge
        >>> model = attach(nn.Sequential(nn.Linear(8, 6, dtype=torch.float64)), OFT(4, init_std=0.5))
        >>> plain = torch.linalg.svdvals(model[0].base.weight)
        >>> half = merge(rewind(model, 0.5))[0].weight
        >>> torch.allclose(torch.linalg.svdvals(half), plain, atol=1e-12)
        True

    Numerics:
        Costs nothing: a number a layer is set, which multiplies the generators from then on. Adapters that add
        (:class:`LoRA`, :class:`FullFineTuning`) are scaled by ``alpha`` on every path. :class:`DoRA` scales its
        product by ``alpha`` and takes the lengths of rows ``alpha`` of the way; on the dense path its weight is
        interpolated. For :class:`HRA`, ``Q`` is the inverse Cayley transform of the product of the reflections, in
        closed form: points between are rotations, but no products of as few reflections. An odd number of them, or a
        half turn, has no such ``Q``: there only the dense path is left. A truncated series is further from orthogonal
        at 1 than on the way.

    References:
        Y. Huang et al. (2026), PEFT-Arena, arXiv 2605.28819, path-wise rewinding: the square root and the dense path.
        Why the root: for a unit vector ``v``, ``v^T R v = 1 - 2 v^T Q^T Q (I + Q^T Q)^{-1} v`` is quadratic in a small
        ``Q``, so with ``sqrt(alpha) Q`` the drift grows linearly in ``alpha``. The linear path is ours.
    """
    if path not in PATHS:
        raise unknown_name("path", path, PATHS)
    layers = stacked_layers(model, name)
    if isinstance(alpha, Mapping):
        for layer in alpha:
            if layer not in layers:
                raise ParameterError(f"alpha names {layer!r}, which has no such adapter; layers: {_some(layers)}.")
        layers = {layer: layers[layer] for layer in alpha}
    places = {layer: _place(alpha[layer] if isinstance(alpha, Mapping) else alpha, layer) for layer in layers}
    for at, layer in layers.items():
        if layer.folded:
            raise ParameterError(f"{at!r} has {layer.folded} merged in; call unmerge first.")
        if path == "dense" and name is not None and set(layer.adapters) != {name}:
            raise OptionError(
                f"path='dense' mixes whole weights, and {at!r} has the adapters {list(layer.adapters)}; leave name out."
            )
    before = [(layer, layer.blend, part, part.strength) for layer in layers.values() for part in _parts(layer, name)]
    try:
        for at, layer in layers.items():
            layer.blend = places[at] if path == "dense" else 1.0
            for part in _parts(layer, name):
                part.strength = _on_path(part, places[at], path)
    except OptionError:
        for layer, blend, part, strength in before:
            layer.blend, part.strength = blend, strength
        raise
    return model


def rotation_strengths(model: nn.Module, *, name: str | None = None) -> dict[str, float]:
    r"""How much every layer is turned at the end of its path: ``rho_l = ||Q_l||_F / sqrt(d_l)``.

    For small angles this is the root mean square over the planes of half the angle that they are turned by (of the
    angle itself with ``map="exp"``).

    Args:
        model: A model whose adapters turn: ``OFT``, ``BOFT``, ``HRA``.
        name: One adapter; needed where a layer has several.

    Returns:
        Layer to ``rho >= 0``, in the order of the model. ``Q_l`` is the generator that the map is applied to, with the
        angle scale and the projection in it, at strength 1 wherever :func:`rewind` has set it; ``d_l`` the width that
        is turned. With several factors, squared norms are added.

    Raises:
        OptionError: A layer has several adapters and ``name`` is not given, or an adapter turns nothing.
        ParameterError: There is no such adapter.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 4)), OFT(2, block_rate=False))
        >>> _ = nn.init.constant_(model[0].adapters["default"].generator, 0.1)  # every plane by 2 arctan(0.1)
        >>> round(rotation_strengths(model)["0"], 6)
        0.1
    """
    found = {}
    for at, layer in stacked_layers(model, name).items():
        parts = _parts(layer, name)
        if len(parts) != 1:
            raise OptionError(f"{at!r} has the adapters {list(layer.adapters)}; say which with name.")
        found[at] = _strength(parts[0], at)
    return found


def safe_scales(model: nn.Module, *, rule: str = "safe", first: int = 5, name: str | None = None) -> dict[str, float]:
    r"""Scales that bring layers which turned far back to a common rotation strength: ``min(1, target / rho_l)``.

    Give them to ``rewind(model, scales, path="cayley_linear")``: on that path ``rho_l`` is scaled by just that much.

    Args:
        model: A model whose adapters turn: ``OFT``, ``BOFT``, ``HRA``.
        rule: ``"safe"`` (default): the target is the mean strength of the first layers; ``"min"``: the smallest one.
        first: How many layers the mean is over, in the order of the model, ``>= 1``; default 5. A layer is one adapted
            weight; for blocks of several weights give a multiple.
        name: One adapter; needed where a layer has several.

    Returns:
        Layer to scale in (0, 1]: layers are only ever turned back. Layers that are not turned at all keep 1 and do not
        count for the target, as otherwise one of them would undo all others.

    Raises:
        UnknownNameError: Unknown rule.
        OptionError: ``first`` is below 1, or as for :func:`rotation_strengths`.
        ParameterError: There is no such adapter.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), OFT(4))
        >>> for layer, size in zip(model, (0.1, 0.4)):
        ...     _ = nn.init.constant_(layer.adapters["default"].generator, size)
        >>> {layer: round(scale, 6) for layer, scale in safe_scales(model, rule="min").items()}
        {'0': 1.0, '1': 0.25}

    References:
        Y. Huang et al. (2026), PEFT-Arena, arXiv 2605.28819: both rules by name, without the norm. Ours:
        ``||Q_l||_F / sqrt(d_l)``, no layer turned further, and resting layers left out.
    """
    if rule not in RULES:
        raise unknown_name("rule", rule, RULES)
    if first < 1:
        raise OptionError(f"first must be at least 1; got {first}.")
    strengths = rotation_strengths(model, name=name)
    turned = [rho for rho in strengths.values() if rho > 0]
    if not turned:
        return dict.fromkeys(strengths, 1.0)
    target = min(turned) if rule == "min" else sum(turned[:first]) / len(turned[:first])
    return {layer: min(1.0, target / rho) if rho > 0 else 1.0 for layer, rho in strengths.items()}


def _on_path(part: Adapter, alpha: float, path: str) -> float:
    """The strength that belongs to a place on a path."""
    if path == "dense":
        return 1.0
    if not isinstance(part, Rotating):
        return alpha
    strength = math.sqrt(alpha) if path == "cayley_sqrt" else alpha
    if isinstance(part, HRAAdapter):
        part.strength = strength
        part._check_path(None if part.config.orthogonal else _gram(part))
    return strength


@torch.no_grad()
def _strength(part: Adapter, at: str) -> float:
    if not isinstance(part, Rotating):
        raise OptionError(f"{part.config.kind} turns nothing ({at!r}); rotation strengths are those of rotations.")
    before, part.strength = part.strength, 1.0
    try:
        squared = _reflected(part, at) if isinstance(part, HRAAdapter) else _turned(part)  # type: ignore[arg-type]
    finally:
        part.strength = before
    return math.sqrt(squared / width_of(part.site, part.view))


def _turned(part: BlockAdapter) -> float:
    v = _whole(part.packed(torch.float64))
    # A shared block stands in every place.
    return 2 * part.blocks / v.shape[-2] * float(v.square().sum())


def _reflected(part: HRAAdapter, at: str) -> float:
    """``||Q||_F^2`` of ``Q = -V S^{-1} V^T``, with ``S`` the skew matrix of the upper triangle of ``G = V^T V``."""
    G = _gram(part)
    if part.config.orthogonal or len(G) % 2 or half_turn_gap(G) <= _NO_GAP:
        raise OptionError(f"the reflections of {at!r} hold a half turn, whose generator is infinite; leave it out.")
    upper = G.triu(1)
    A = torch.linalg.solve(upper - upper.mT, G)
    return max(0.0, -float((A @ A).diagonal().sum()))


@torch.no_grad()
def _gram(part: HRAAdapter) -> Tensor:
    V = nn.functional.normalize(_whole(part.vectors).double(), dim=-1, eps=0.0)
    return V @ V.mT


def _whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def _parts(layer: AdaptedLayer, name: str | None) -> list[Adapter]:
    return [part for one, part in layer.adapters.items() if name in (None, one)]  # type: ignore[misc]


def _place(alpha: object, layer: str) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise OptionError(f"alpha must be a number in [0, 1]; got {alpha!r} for {layer!r}.")
    return float(alpha)


def _some(layers: Mapping[str, object]) -> str:
    listed = list(layers)
    shown = ", ".join(map(repr, listed[:4]))
    return f"{shown} and {len(listed) - 4} more" if len(listed) > 4 else shown
