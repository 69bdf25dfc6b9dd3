r"""One adapter out of several: averages of their generators, geodesic means of their rotations, sums of low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from orthokit.adapters._blocks import BlockAdapter
from orthokit.adapters._combine_parts import METHODS, Rule, combined_part
from orthokit.adapters.base import Adapter, PartConfig
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.stack import set_adapters, stacked_layers
from orthokit.errors import OptionError, ParameterError, unknown_name
from orthokit.linalg.merged_rotations import rotation_log, rotation_mean

__all__ = ["combine", "rotation_log", "rotation_mean"]


@torch.no_grad()
def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    into: str = "combined",
    method: str = "lie",
    config: PartConfig | None = None,
    clip: float = 10.0,
    intensity: str = "mean",
    activate: bool = True,
) -> nn.Module:
    r"""Make a new adapter out of several of one kind, on every layer that they are on.

    Rotations: ``"lie"`` is ``f(sum_i w_i Q_i)`` with their generators ``Q_i``; ``"orthomerge"`` the direction of that
    sum at the mean of their lengths, so that adapters which turn apart do not fade; ``"geodesic"`` the point between
    the rotations themselves, ``R_1 (R_1^T R_2)^{w_2}`` for two and for more the mean ``M`` with
    ``sum_i w_i log(M^T R_i) = 0``. LoRA and full fine-tuning: the change ``sum_i w_i dW_i``, exactly.

    Args:
        model: A model with adapters.
        names: Of the adapters, one or more; on the same layers.
        weights: One each; default ``None``: equal ones that sum to 1. ``"lie"`` and adapters that add take any; for
            ``"geodesic"`` they are at least 0 and sum to 1, for ``"orthomerge"`` at least 0 and not all 0.
        into: Name of the new adapter; default ``"combined"``.
        method: ``"lie"`` (default), ``"geodesic"`` or ``"orthomerge"``. Adapters that add have one mean, and no
            OrthoMerge, for which it takes the weights of the model.
        config: Options of the new adapter, for OFT and BOFT. Default ``None``: those of the first, with the largest
            block size, no projection, the largest dropout, and the exact map where maps of one family differ.
        clip: OrthoMerge: largest factor on the mean, ``>= 1``; default 10. It is one for all blocks of a layer.
        intensity: OrthoMerge: length of the result, ``"mean"`` (default), ``"median"`` or ``"max"`` of theirs.
        activate: The new adapter acts alone, as after ``set_adapters(model, into)``; default ``True``. Otherwise it
            rests, and those that act go on.

    Returns:
        ``model``. The adapters that went in are left as they are. What goes in is what acts at their strength on the
        path of ``rewind``; the new adapter has strength 1.

    Raises:
        OptionError: Another number of weights, adapters of different kinds or of one that cannot be combined, block
            sizes that do not divide each other, rotations half a turn apart, an odd number of reflections, OrthoMerge
            of adapters that add, a name that is taken.
        UnknownNameError: Unknown method or intensity.
        ParameterError: There is no such adapter, they are on different layers, or adapters are merged with
            ``keep=True``. Nothing was changed.

    Example:
        >>> from orthokit.adapters import OFT, attach
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> for seed, name in enumerate("ab"):
        ...     _ = attach(model, OFT(4, init_std=0.5, seed=seed), name=name)
        >>> _ = combine(model, ["a", "b"], [0.5, 0.5])
        >>> a, b, both = (model[0].adapters[name].generator for name in ("a", "b", "combined"))
        >>> torch.allclose(both, (a + b) / 2), model[0].active
        (True, ('combined',))

    Numerics:
        In float64, rounded once to the type of the parameters. Smaller blocks are put into the larger ones, which
        changes no rotation. Geodesics are those of the exact map, also for a truncated series, so a single adapter
        comes back as it was. BOFT is combined factor by factor, which is not the geodesic of the products. HRA is
        combined in the span of all vectors, exactly, and comes back as two reflections for each plane that is turned;
        it has as many reflections as all that went in (an even number, and at most the width), of which those that are
        not needed undo each other. The rank of a combined LoRA is the sum of the ranks (twice that of PiSSA and MiLoRA
        starts), or the smaller side if that is less.

    References:
        S. Yang et al. (2026), Orthogonal model merging, arXiv 2602.05943, for ``"orthomerge"``: as there, what is no
        generator (factors on outputs of BOFT) is averaged; here the correction is clipped, and generators are those of
        the map that the adapters have, Cayley's or the logarithm. M. Moakher (2002), Means and averaging in the group
        of rotations, SIAM J. Matrix Anal. Appl. 24(1), section 3, for the geodesic mean.
    """
    rule = Rule(method, _check(names, weights, method), clip=clip, intensity=intensity, config=config)
    found = {name: stacked_layers(model, name) for name in names}
    layers = _same_layers(found)
    for at, layer in layers.items():
        if layer.folded:
            raise ParameterError(f"{at!r} has {layer.folded} merged in; call unmerge first.")
        if any(hasattr(p, "full_tensor") for p in layer.parameters()):
            raise ParameterError(f"{at!r} is divided among processes; combine before the model is sharded.")
        if into in layer.adapters:
            raise OptionError(f"{at!r} has an adapter {into!r} already; give another name with into.")
    # All are made before the first is put in: an error leaves the model as it was.
    made = {
        at: combined_part([layer.adapters[name] for name in names], rule, at)  # type: ignore[misc]
        for at, layer in layers.items()
    }
    before = {at: layer.active for at, layer in layers.items()}
    done: list[AdaptedLayer] = []
    try:
        for at, layer in layers.items():
            options, values, _ = made[at]
            layer.add(into, options)
            done.append(layer)
            layer.active = before[at]
            part: Adapter = layer.adapters[into]  # type: ignore[assignment]
            part.requires_grad_(activate)
            for leaf, value in values.items():
                part.get_parameter(leaf).copy_(value)
            _check_kept(part, values, at)
    except Exception:
        for layer in done:
            layer.remove(into)
        raise
    return set_adapters(model, into) if activate else model


def _check(names: Sequence[str], weights: Sequence[float] | None, method: str) -> list[float]:
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise OptionError(f"names lists one or more adapters, each once; got {names!r}.")
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    given = [1 / len(names)] * len(names) if weights is None else [float(w) for w in weights]
    if len(given) != len(names) or not all(math.isfinite(w) for w in given):
        raise OptionError(f"weights must be one number for each of {list(names)}; got {given}.")
    return given


def _same_layers(found: dict[str, dict[str, AdaptedLayer]]) -> dict[str, AdaptedLayer]:
    (first, layers), *others = found.items()
    for name, theirs in others:
        if different := sorted(layers.keys() ^ theirs.keys()):
            raise ParameterError(
                f"{first!r} and {name!r} must be on the same layers; {different[0]!r} and {len(different) - 1} more "
                "have one of them alone."
            )
    return layers


def _check_kept(part: Adapter, values: dict[str, torch.Tensor], at: str) -> None:
    """Raise if the options of the new adapter do not let its generators act as they are."""
    if isinstance(part, BlockAdapter) and part.config.radius is not None:
        wanted = values["generator"] * part.config.rate
        if not torch.allclose(part.packed(torch.float64), wanted, rtol=1e-5, atol=1e-7):
            raise OptionError(f"config.radius={part.config.radius} cuts the generators of {at!r}; take radius=None.")
