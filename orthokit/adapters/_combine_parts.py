"""The adapters of one layer made into one: what :func:`~orthokit.adapters.combine` does with each of its layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.adapters._blocks import BlockAdapter, BlockOptions
from orthokit.adapters._householder import plane_reflections
from orthokit.adapters.base import Adapter, PartConfig
from orthokit.adapters.boft import BOFTAdapter
from orthokit.adapters.hra import HRAAdapter
from orthokit.adapters.lora import LoRA, LoRAAdapter
from orthokit.adapters.oft import OFT
from orthokit.adapters.peft_forms import NeumannSumOFT
from orthokit.errors import OptionError
from orthokit.linalg import cayley, exp, inverse_cayley, pack_skew, skew_part, unpack_skew
from orthokit.linalg.merged_rotations import merge_generators, normalised, rotation_log, rotation_mean

__all__ = ["METHODS", "Made", "Rule", "agreement", "combined_part", "factored"]

METHODS = ("lie", "geodesic", "orthomerge")
_ADDING, _BLOCKS = ("lora", "full"), ("oft", "oft_neumann_sum", "boft")


@dataclass(frozen=True)
class Rule:
    """How adapters are combined.

    Args:
        method: One of :data:`METHODS`.
        weights: One per adapter.
        clip: Largest correction of the length, for ``"orthomerge"``.
        intensity: Length of the merged generator, for ``"orthomerge"``.
        config: Options of the result, for OFT and BOFT; ``None``: from those that go in.
        scale: Factor on the merged generator or change.
        rank: Largest rank of a merged LoRA; ``None``: the sum of theirs.
    """

    method: str
    weights: Sequence[float]
    clip: float = 10.0
    intensity: str = "mean"
    config: PartConfig | None = None
    scale: float = 1.0
    rank: int | None = None


class Made(NamedTuple):
    """A combined adapter of one layer.

    Args:
        config: Its options.
        values: Its parameters.
        facts: ``norms`` of what went in (generators or changes), ``norm`` of what came out, ``cosine`` between what
            went in (mean over pairs, ``None`` where there is none); ``correction`` and ``clipped`` of OrthoMerge, and
            of a LoRA ``kept``, the share of the squared change that its rank holds.
    """

    config: PartConfig
    values: dict[str, Tensor]
    facts: dict[str, Any]


def combined_part(parts: Sequence[Adapter], rule: Rule, at: str) -> Made:
    """The adapter that a layer gets in the place of several.

    Args:
        parts: Of one layer.
        rule: How.
        at: The layer, for messages.

    Raises:
        OptionError: They cannot be combined, in words.
    """
    kinds = [str(part.config.kind) for part in parts]
    kind = kinds[0]
    blocks = all(isinstance(part.config, OFT) for part in parts)
    if len(set(kinds)) > 1 and not blocks:
        raise OptionError(f"adapters of one kind can be combined; those of {at!r} are {kinds}.")
    if rule.method == "geodesic" and kind not in _ADDING:
        _check_mean(rule.weights)
    if kind in _BLOCKS:
        return _blocks(parts, rule, at)  # type: ignore[arg-type]
    if kind not in (*_ADDING, "hra"):
        raise OptionError(
            f"{kind} cannot be combined ({at!r}): its parameters are no generators and its changes do not add. Stack "
            "the adapters with set_adapters, or merge them."
        )
    if rule.config is not None:
        raise OptionError(f"config is for rotations in blocks; the combined {kind} has the options that make it exact.")
    if kind == "hra":
        return _reflections(parts, rule, at)  # type: ignore[arg-type]
    if rule.method == "orthomerge":
        raise OptionError(
            f"orthomerge rotates weights, and the change of {kind} ({at!r}) is a rotation of them only in part, which "
            "part depends on the weights of the model. Merge the whole models by orthomerge (merge, merge_checkpoints "
            "of orthokit.merging), or add the adapters up: method='lie' in combine, 'linear', 'ties' and others in "
            "merge_adapters."
        )
    if kind == "full":
        deltas = [part.strength * part.get_parameter("delta").double() for part in parts]
        change = _total([rule.scale * w * delta for w, delta in zip(rule.weights, deltas, strict=True)])
        return Made(parts[0].config, {"delta": change}, agreement(deltas) | {"norm": _norm(change)})  # type: ignore[arg-type]
    return _low_rank(parts, rule)  # type: ignore[arg-type]


def agreement(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """``norms`` of tensors of one shape, and the mean ``cosine`` over their pairs."""
    products = torch.stack([torch.stack([(a * b).sum() for b in tensors]) for a in tensors])
    return _agreement(products)


def _agreement(products: Float[Tensor, "n n"]) -> dict[str, Any]:
    """As :func:`agreement`, from the inner products."""
    norms = products.diagonal().clamp_min(0).sqrt().tolist()
    pairs = [(i, j) for i, j in itertools.combinations(range(len(norms)), 2) if norms[i] * norms[j] > 0]
    cosines = [float(products[i, j]) / (norms[i] * norms[j]) for i, j in pairs]
    return {"norms": norms, "cosine": sum(cosines) / len(cosines) if cosines else None}


def factored(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """``(down, up, kept)``: the leading triplets of a decomposition, and the share of its squares that they hold."""
    root, whole = S[:rank].sqrt(), float(S.square().sum())
    kept = float(S[:rank].square().sum()) / whole if whole > 0 else 1.0
    return root[:, None] * Vh[:rank], U[:, :rank] * root, min(kept, 1.0)


def _low_rank(parts: Sequence[LoRAAdapter], rule: Rule) -> Made:
    """Factors side by side; pressed where that is more than the rank or the smaller side, which loses nothing."""
    each = [(down.double(), up.double()) for down, up in (part.factors() for part in parts)]
    down = torch.cat([down for down, _ in each])
    up = torch.cat([rule.scale * w * up for w, (_, up) in zip(rule.weights, each, strict=True)], dim=1)
    products = [[((up.mT @ other) * (down @ beside.mT)).sum() for beside, other in each] for down, up in each]
    facts = _agreement(torch.stack([torch.stack(row) for row in products]))
    rank, kept = min(len(down), up.shape[0], down.shape[1], rule.rank or len(down)), 1.0
    if len(down) > rank:
        # The product is of the size of the weight and is not formed: its decomposition is that of a small core.
        (left, inner), (right, outer) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
        U, S, Vh = torch.linalg.svd(inner @ outer.mT, full_matrices=False)
        down, up, kept = factored(left @ U, S, Vh @ right.mT, rank)
    norm = float(((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).sqrt())
    config = LoRA(rank=rank, dropout=max(part.config.dropout for part in parts), seed=parts[0].config.seed)
    return Made(config, {"down": down, "up": up}, {**facts, "norm": norm, "kept": kept})


def _merged(Q: Sequence[Tensor], rule: Rule, *, copies: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
    """The sum of generators, or their mean direction at their mean length; all blocks of a layer have one correction.

    Args:
        Q: The generators.
        rule: How.
        copies: In how many places each of their blocks stands.
    """
    facts = agreement(Q)
    if rule.method == "orthomerge":
        merged = merge_generators(list(Q), weights=rule.weights, intensity=rule.intensity, clip=rule.clip)
        correction = float(merged.correction)
        facts |= {"correction": correction if math.isfinite(correction) else None, "clipped": bool(merged.clipped)}
        mean = merged.generator * rule.scale
    else:
        mean = _total([rule.scale * w * q for w, q in zip(rule.weights, Q, strict=True)])
    size = math.sqrt(copies)
    return mean, {**facts, "norms": [size * norm for norm in facts["norms"]], "norm": size * _norm(mean)}


def _blocks(parts: Sequence[BlockAdapter], rule: Rule, at: str) -> Made:
    options = _options([part.config for part in parts], rule, at)
    families = [_family(part.config.map) for part in parts]
    if rule.method != "geodesic" and len(set(families)) > 1:
        raise OptionError(
            f"generators of different maps have no common scale ({at!r} has {families}); take method='geodesic'."
        )
    if rule.method != "geodesic" and _family(options.map) != families[0]:
        raise OptionError(f"config.map={options.map!r} reads generators otherwise than {families[0]!r}; keep it.")
    Q = _generators(parts, options)
    copies = parts[0].config.block_size * parts[0].blocks / (Q[0].shape[-1] * Q[0].shape[-3])
    if rule.method == "geodesic":
        maps = {"cayley": cayley, "exp": exp}
        R = torch.stack([maps[f](q) for f, q in zip(families, Q, strict=True)])
        mean, facts = _geodesic(R, rule, at, cayley_generator=_family(options.map) == "cayley")
    else:
        mean, facts = _merged(Q, rule, copies=copies)
    values = {"generator": pack_skew(mean) / options.rate}
    if getattr(options, "scale_outputs", False):
        each = [_factors_on_outputs(part) for part in parts]
        shares = normalised(rule.weights, len(each))
        values["scale"] = _total([share * one for share, one in zip(shares, each, strict=True)])
    return Made(options, values, facts)


def _factors_on_outputs(part: Any) -> Tensor:
    if isinstance(part, BOFTAdapter) and part.config.scale_outputs:
        return 1 + part.strength * (part.scale.double() - 1)
    return torch.ones(part.site.out_features, dtype=torch.float64, device=part.generator.device)


def _geodesic(
    R: Float[Tensor, "n *lead b b"], rule: Rule, at: str, *, cayley_generator: bool
) -> tuple[Tensor, dict[str, Any]]:
    try:
        mean = rotation_mean(R, rule.weights)
        Q = skew_part(inverse_cayley(mean)) if cayley_generator else rotation_log(mean)
    except OptionError as error:
        raise OptionError(
            f"the rotations of {at!r} are half a turn or more apart, so that the way between them is not unique; "
            "combine them with method='lie'."
        ) from error
    return Q * rule.scale, {"norm": _norm(Q * rule.scale)}


def _check_mean(weights: Sequence[float]) -> None:
    if not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-9)):
        raise OptionError(f"weights of a geodesic mean must be at least 0 and sum to 1; got {list(weights)}.")


def _options(given: Sequence[BlockOptions], rule: Rule, at: str) -> BlockOptions:
    first, sizes, config = given[0], [one.block_size for one in given], rule.config
    if config is not None and type(config) is not type(first):
        raise OptionError(f"config must be {type(first).__name__}, as what is combined; got {type(config).__name__}.")
    size = config.block_size if isinstance(config, BlockOptions) else max(sizes)
    if any(size % one for one in sizes) or (first.kind == "boft" and set(sizes) != {size}):
        needed = "be equal" if first.kind == "boft" else "divide the largest (or that of config)"
        raise OptionError(f"block sizes of {first.kind} must {needed} to be combined; {at!r} has {sizes}, into {size}.")
    if len({one.conv for one in [*given, *([config] if isinstance(config, BlockOptions) else [])]}) > 1:
        raise OptionError(f"the adapters of {at!r} read its convolution in different views; conv must be the same.")
    scaled = [getattr(one, "scale_outputs", False) for one in given]
    fits = rule.method == "orthomerge" and (config is None or getattr(config, "scale_outputs", False) == any(scaled))
    if not fits and (any(scaled) or getattr(config, "scale_outputs", False)):
        raise OptionError(
            f"factors on outputs have no mean in the group of rotations ({at!r}); scale_outputs is in the way. "
            "method='orthomerge' without config averages them beside the rotations."
        )
    share = all(one.share and one.block_size == size for one in given)
    if isinstance(config, BlockOptions):
        if config.share and not share:
            raise OptionError(f"config shares one block, and the adapters of {at!r} have several; take share=False.")
        return config
    maps = {(one.kind, one.map, one.terms, one.order) for one in given}
    changes: dict[str, Any] = {}
    if len(maps) > 1:
        changes["map"] = "exp" if {_family(one.map) for one in given} == {"exp"} else "cayley"
        if isinstance(first, NeumannSumOFT):
            first = OFT(**{field.name: getattr(first, field.name) for field in fields(first)})
    if first.kind == "boft":
        changes["factors"] = max(one.factors for one in given)  # type: ignore[attr-defined]
        changes["scale_outputs"] = any(scaled)
    scales = {(one.angle_scale, one.block_rate) for one in given}
    if len(scales) > 1:
        changes.update(angle_scale=1.0, block_rate=True)
    dropout = max(one.dropout for one in given)
    return replace(first, block_size=size, share=share, radius=None, dropout=dropout, init_std=0.0, **changes)


def _generators(parts: Sequence[BlockAdapter], options: BlockOptions) -> list[Tensor]:
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


def _reflections(parts: Sequence[HRAAdapter], rule: Rule, at: str) -> Made:
    """Products of reflections as rotations of the span of all their vectors, and what they give as reflections again.

    Outside of the span nothing is moved, so generators of its size are all there is.
    """
    first = parts[0].config
    if len({part.config.conv for part in parts}) > 1:
        raise OptionError(f"the adapters of {at!r} read its convolution in different views; conv must be the same.")
    same = len(parts) == 1 and parts[0].strength == 1 and rule.scale == 1
    if same and (rule.method != "lie" or rule.weights[0] == 1):
        # As they are: also an odd number, which has no generator.
        return Made(first, {"vectors": parts[0].vectors.double()}, {})
    units = torch.cat([torch.nn.functional.normalize(part.vectors.double(), dim=-1, eps=0.0) for part in parts])
    if not bool(torch.isfinite(units).all()):
        raise OptionError(f"a vector of {at!r} is 0 or not finite, which is no reflection; it cannot be combined.")
    B = _basis(units)
    R = torch.stack([_inside(part, B) for part in parts])
    if rule.method == "geodesic":
        Q, facts = _geodesic(R, rule, at, cayley_generator=True)
    else:
        try:
            generators = [skew_part(one) for one in inverse_cayley(R)]
        except OptionError as error:
            odd = [len(part.vectors) for part in parts if len(part.vectors) % 2]
            found = f"an odd number of reflections ({odd[0]})" if odd else "a half turn"
            raise OptionError(
                f"the reflections of {at!r} make up {found}, which has no generator and so no mean with others; only "
                "a rotation by less than half a turn can be combined."
            ) from error
        Q, facts = _merged(generators, rule)
    width = units.shape[1]
    rank = min(sum(len(part.vectors) for part in parts) // 2, width // 2) * 2
    vectors = plane_reflections(Q) @ B
    # Pairs of one vector undo each other: they are there to be trained, as those at the start of HRA.
    spare = units[: (rank - len(vectors)) // 2].repeat_interleave(2, 0)
    # Entries of size 1, as those that HRA begins with: a rate of training means the same.
    values = {"vectors": torch.cat([vectors, spare]) * math.sqrt(width)}
    return Made(replace(first, rank=rank, symmetric=True, orthogonal=False), values, facts)


def _basis(units: Float[Tensor, "r n"]) -> Float[Tensor, "m n"]:
    """Orthonormal rows that span those of ``units``."""
    _, S, Vh = torch.linalg.svd(units, full_matrices=False)
    return Vh[max(units.shape) * torch.finfo(units.dtype).eps * S[0] < S]


def _inside(part: HRAAdapter, B: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """The rotation of an adapter in the basis ``B`` of a space that holds its vectors."""
    eye = torch.eye(len(B), dtype=B.dtype, device=B.device)
    if part.strength == 0:
        return eye
    V, T = part.factors(B.dtype)
    C = B @ V
    return eye - C @ T @ C.mT


def _family(map: str) -> str:
    return "exp" if map.startswith("exp") else "cayley"


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
