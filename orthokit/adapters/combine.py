r"""One adapter out of several: averages of their generators, geodesic means of their rotations, sums of low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters._blocks import BlockAdapter, BlockOptions
from orthokit.adapters.base import Adapter, PartConfig
from orthokit.adapters.layer import AdaptedLayer
from orthokit.adapters.lora import LoRA, LoRAAdapter
from orthokit.adapters.stack import set_adapters, stacked_layers
from orthokit.errors import OptionError, ParameterError, unknown_name
from orthokit.linalg import cayley, exp, inverse_cayley, pack_skew, unpack_skew

__all__ = ["combine", "rotation_log", "rotation_mean"]

METHODS = ("lie", "geodesic")
_LINEAR, _TURNING = ("lora", "full"), ("oft", "boft")
# A step of the mean below this is rounding of the logarithms; it is reached in some ten steps.
_SETTLED, _MOST_STEPS = 1e-12, 200


@torch.no_grad()
def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    into: str = "combined",
    method: str = "lie",
    config: PartConfig | None = None,
    activate: bool = True,
) -> nn.Module:
    r"""Make a new adapter out of several of one kind, on every layer that they are on.

    Rotations: ``"lie"`` is ``f(sum_i w_i Q_i)`` with their generators ``Q_i``; ``"geodesic"`` the point between the
    rotations themselves, ``R_1 (R_1^T R_2)^{w_2}`` for two and for more the mean ``M`` with
    ``sum_i w_i log(M^T R_i) = 0``. LoRA and full fine-tuning: the change ``sum_i w_i dW_i``, exactly.

    Args:
        model: A model with adapters.
        names: Of the adapters, one or more; on the same layers.
        weights: One each; default ``None``: equal ones that sum to 1. ``"lie"`` and adapters that add take any; for
            ``"geodesic"`` they are at least 0 and sum to 1.
        into: Name of the new adapter; default ``"combined"``.
        method: ``"lie"`` (default) or ``"geodesic"``; the same for adapters that add.
        config: Options of the new adapter, for rotations. Default ``None``: those of the first, with the largest block
            size, no projection, the largest dropout, and the exact map where maps of one family differ.
        activate: The new adapter acts alone, as after ``set_adapters(model, into)``; default ``True``. Otherwise it
            rests, and those that act go on.

    Returns:
        ``model``. The adapters that went in are left as they are. What goes in is what acts at their strength on the
        path of ``rewind``; the new adapter has strength 1.

    Raises:
        OptionError: Another number of weights, adapters of different kinds or of one that cannot be combined, block
            sizes that do not divide each other, rotations half a turn apart, a name that is taken.
        UnknownNameError: Unknown method.
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
        comes back as it was. BOFT is combined factor by factor, which is not the geodesic of the products. The rank of
        a combined LoRA is the sum of the ranks (twice that of PiSSA and MiLoRA starts), or the smaller side if that is
        less.

    References:
        S. Yang et al. (2026), Orthogonal model merging, arXiv 2602.05943, averages Cayley generators and rescales the
        mean to the norms that went in; here weights are taken as given. M. Moakher (2002), Means and averaging in the
        group of rotations, SIAM J. Matrix Anal. Appl. 24(1), section 3, for the geodesic mean.
    """
    weights = _check(names, weights, method)
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
        at: _combined([layer.adapters[name] for name in names], weights, method, config, at)  # type: ignore[misc]
        for at, layer in layers.items()
    }
    before = {at: layer.active for at, layer in layers.items()}
    done: list[AdaptedLayer] = []
    try:
        for at, layer in layers.items():
            options, values = made[at]
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


def rotation_log(R: Float[Tensor, "*batch b b"]) -> Float[Tensor, "*batch b b"]:
    r"""The skew logarithm of a rotation, with angles below half a turn: ``exp(rotation_log(R)) = R``.

    Args:
        R: Orthogonal with determinant 1 and without eigenvalue -1, shape ``(..., b, b)``.

    Returns:
        Skew, in at least float32.

    Raises:
        OptionError: A plane is turned by half a turn to rounding, where the shortest way is not unique.
        ShapeError: ``R`` is not square.
        NonFiniteError: ``R`` holds a NaN or an infinity.

    Example:
        >>> A = torch.tensor([[0.0, 3.0], [-3.0, 0.0]], dtype=torch.float64)
        >>> torch.allclose(rotation_log(exp(A)), A)
        True

    Numerics:
        ``2 arctan`` of the inverse Cayley transform, on the eigenvalues of the Hermitian ``i Q``.
    """
    Q = inverse_cayley(R)
    h, U = torch.linalg.eigh(1j * (Q - Q.mT) / 2)
    # Q = U diag(-i h) U^H, and the logarithm of a Cayley transform is 2 arctan of the generator.
    A = ((U * (-2j * h.atan()).unsqueeze(-2)) @ U.mH).real
    return (A - A.mT) / 2


def rotation_mean(R: Float[Tensor, "n *batch b b"], weights: Sequence[float]) -> Float[Tensor, "*batch b b"]:
    r"""The geodesic mean of rotations: the ``M`` that minimises ``sum_i w_i d(M, R_i)^2`` near them.

    Args:
        R: Two or more rotations or batches of them, shape ``(n, ..., b, b)``.
        weights: One each, ``>= 0``, with sum 1.

    Returns:
        Shape ``(..., b, b)``.

    Raises:
        OptionError: Two of them are half a turn apart, or so far that the iteration does not settle.

    Example:
        >>> Q = torch.tensor([[0.0, 0.5], [-0.5, 0.0]], dtype=torch.float64)
        >>> torch.allclose(rotation_mean(torch.stack([cayley(Q), cayley(-Q)]), [0.5, 0.5]), torch.eye(2).double())
        True

    Numerics:
        In closed form for two. For more a fixed-point iteration with step 1 from the mean of the logarithms, which
        contracts by a factor of the order of the squared angle between the rotations; unique if they are within a
        quarter turn of the mean.
    """
    if len(R) == 1:
        return R[0]
    if len(R) == 2:
        return R[0] @ exp(weights[1] * rotation_log(R[0].mT @ R[1]))
    w = R.new_tensor(weights).view(-1, *[1] * (R.ndim - 1))
    mean = exp((w * rotation_log(R)).sum(0))
    for _ in range(_MOST_STEPS):
        step = (w * rotation_log(mean.mT @ R)).sum(0)
        mean = mean @ exp(step)
        if float(step.abs().max()) <= _SETTLED:
            return mean
    raise OptionError("the rotations are too far apart for a geodesic mean; combine them with method='lie'.")


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


def _combined(
    parts: list[Adapter], weights: list[float], method: str, config: PartConfig | None, at: str
) -> tuple[PartConfig, dict[str, Tensor]]:
    """Options and parameters of the new adapter of one layer."""
    kinds = [part.config.kind for part in parts]
    if len(set(kinds)) > 1:
        raise OptionError(f"adapters of one kind can be combined; those of {at!r} are {kinds}.")
    kind = kinds[0]
    if kind in _TURNING:
        return _turning(parts, weights, method, config, at)  # type: ignore[arg-type]
    if kind not in _LINEAR:
        raise OptionError(
            f"{kind} cannot be combined ({at!r}): its parameters are no generators and its changes do not add. Stack "
            "the adapters with set_adapters, or merge them."
        )
    if config is not None:
        raise OptionError(f"config is for rotations; the combined {kind} has the options that make it exact.")
    if kind == "full":
        deltas = [part.strength * part.get_parameter("delta").double() for part in parts]
        return parts[0].config, {"delta": _total([w * delta for w, delta in zip(weights, deltas, strict=True)])}
    return _low_rank(parts, weights)  # type: ignore[arg-type]


def _low_rank(parts: list[LoRAAdapter], weights: list[float]) -> tuple[PartConfig, dict[str, Tensor]]:
    """Factors side by side; pressed to the smaller side where they would be more, which loses nothing."""
    factors = [part.factors() for part in parts]
    down = torch.cat([down.double() for down, _ in factors])
    up = torch.cat([w * up.double() for w, (_, up) in zip(weights, factors, strict=True)], dim=1)
    if len(down) > (limit := min(up.shape[0], down.shape[1])):
        U, S, Vh = torch.linalg.svd(up @ down, full_matrices=False)
        root = S[:limit].sqrt()
        down, up = root[:, None] * Vh[:limit], U[:, :limit] * root
    dropout = max(part.config.dropout for part in parts)
    return LoRA(rank=len(down), dropout=dropout, seed=parts[0].config.seed), {"down": down, "up": up}


def _turning(
    parts: list[BlockAdapter], weights: list[float], method: str, config: PartConfig | None, at: str
) -> tuple[PartConfig, dict[str, Tensor]]:
    options = _options([part.config for part in parts], config, at)
    families = [_family(part.config.map) for part in parts]
    if method == "lie" and len(set(families)) > 1:
        raise OptionError(
            f"generators of different maps have no common scale ({at!r} has {families}); take method='geodesic'."
        )
    if method == "lie" and _family(options.map) != families[0]:
        raise OptionError(f"config.map={options.map!r} reads generators otherwise than {families[0]!r}; keep it.")
    if method == "geodesic" and not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-9)):
        raise OptionError(f"weights of a geodesic mean must be at least 0 and sum to 1; got {weights}.")
    Q = _generators(parts, options, at)
    if method == "lie":
        mean = _total([w * q for w, q in zip(weights, Q, strict=True)])
    else:
        maps = {"cayley": cayley, "exp": exp}
        try:
            R = rotation_mean(torch.stack([maps[f](q) for f, q in zip(families, Q, strict=True)]), weights)
            mean = inverse_cayley(R) if _family(options.map) == "cayley" else rotation_log(R)
        except OptionError as error:
            raise OptionError(
                f"the rotations of {at!r} are half a turn or more apart, so that the way between them is not unique; "
                "combine them with method='lie'."
            ) from error
    return options, {"generator": pack_skew(mean) / options.rate}


def _options(given: list[BlockOptions], config: PartConfig | None, at: str) -> BlockOptions:
    first, sizes = given[0], [one.block_size for one in given]
    if config is not None and type(config) is not type(first):
        raise OptionError(f"config must be {type(first).__name__}, as what is combined; got {type(config).__name__}.")
    size = config.block_size if isinstance(config, BlockOptions) else max(sizes)
    if any(size % one for one in sizes) or (first.kind == "boft" and set(sizes) != {size}):
        needed = "be equal" if first.kind == "boft" else "divide the largest (or that of config)"
        raise OptionError(f"block sizes of {first.kind} must {needed} to be combined; {at!r} has {sizes}, into {size}.")
    if len({one.conv for one in [*given, *([config] if isinstance(config, BlockOptions) else [])]}) > 1:
        raise OptionError(f"the adapters of {at!r} read its convolution in different views; conv must be the same.")
    if any(getattr(one, "scale_outputs", False) for one in (*given, config)):
        raise OptionError(
            f"factors on outputs have no mean in the group of rotations ({at!r}); scale_outputs is in the way."
        )
    share = all(one.share and one.block_size == size for one in given)
    if isinstance(config, BlockOptions):
        if config.share and not share:
            raise OptionError(f"config shares one block, and the adapters of {at!r} have several; take share=False.")
        return config
    maps = {(one.map, one.terms, one.order) for one in given}
    changes: dict[str, Any] = {}
    if len(maps) > 1:
        changes["map"] = "exp" if {_family(one.map) for one in given} == {"exp"} else "cayley"
    if first.kind == "boft":
        changes["factors"] = max(one.factors for one in given)  # type: ignore[attr-defined]
    scales = {(one.angle_scale, one.block_rate) for one in given}
    if len(scales) > 1:
        changes.update(angle_scale=1.0, block_rate=True)
    dropout = max(one.dropout for one in given)
    return replace(first, block_size=size, share=share, radius=None, dropout=dropout, init_std=0.0, **changes)


def _generators(parts: list[BlockAdapter], options: BlockOptions, at: str) -> list[Tensor]:
    """What acts in each adapter, in the blocks of the new one: ``(..., blocks or 1, b, b)``, float64."""
    found, b = [], options.block_size
    factors = max(part.generator.shape[0] for part in parts) if parts[0].generator.ndim == 3 else 0
    for part in parts:
        Q = unpack_skew(part.packed(torch.float64))
        if not options.share and Q.shape[-3] != part.blocks:
            Q = Q.expand(*Q.shape[:-3], part.blocks, -1, -1)
        if Q.shape[-1] != b:
            Q = _embedded(Q, b)
        if factors and Q.shape[0] < factors:
            Q = torch.cat([Q, Q.new_zeros(factors - Q.shape[0], *Q.shape[1:])])
        found.append(Q)
    return found


def _embedded(Q: Tensor, b: int) -> Tensor:
    """Neighbouring blocks as one: ``(k r, c, c)`` to ``(k, b, b)`` with ``b = r c``."""
    c = Q.shape[-1]
    r = b // c
    if Q.shape[0] % r:
        raise OptionError(f"block_size={b} must divide the {Q.shape[0] * c} coordinates; it does not.")
    wide = Q.new_zeros(Q.shape[0] // r, r, c, r, c)
    for i in range(r):
        wide[:, i, :, i] = Q[i::r]
    return wide.view(-1, b, b)


def _family(map: str) -> str:
    return "exp" if map.startswith("exp") else "cayley"


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0)


def _check_kept(part: Adapter, values: dict[str, Tensor], at: str) -> None:
    """Raise if the options of the new adapter do not let its generators act as they are."""
    if isinstance(part, BlockAdapter) and part.config.radius is not None:
        wanted = values["generator"] * part.config.rate
        if not torch.allclose(part.packed(torch.float64), wanted, rtol=1e-5, atol=1e-7):
            raise OptionError(f"config.radius={part.config.radius} cuts the generators of {at!r}; take radius=None.")
