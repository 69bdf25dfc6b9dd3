"""Rotations as PEFT writes them: by what numbers its maps give the same matrices."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from orthokit.adapters._blocks import BlockAdapter
from orthokit.adapters._turn import rotation_blocks
from orthokit.adapters.boft import BOFTAdapter, fused
from orthokit.adapters.hra import HRAAdapter
from orthokit.adapters.peft_forms import NeumannSumOFT
from orthokit.adapters.peft_layers import Parts, Written, check_layer, common, only, place_copies
from orthokit.errors import OptionError, ParameterError
from orthokit.linalg import cayley, inverse_cayley, pack_skew, skew_part, unpack_skew

__all__ = ["boft_state", "hra_state", "oft_state"]

# 178.9 degrees. Rounded to float32 a larger generator would turn the other planes of its block wrongly by 1e-5.
_LARGEST_GENERATOR = 100.0


def oft_state(parts: Parts) -> Written:
    """OFT: packed generators, of the exact map or of a series."""
    if any(layer.site.kind == "conv" and layer.site.patch > 1 for layer, _ in parts.values()):
        # There PEFT's OFT computes something else than it merges; its BOFT goes by the weight.
        return boft_state(parts)
    for path, (layer, _) in parts.items():
        check_layer(path, layer, ("linear", "conv", "embedding"), "OFT")
    terms = _terms(parts)
    share = all(part.config.share for _, part in parts.values())
    tensors, sizes, counts = {}, set(), set()
    for path, (layer, part) in parts.items():
        embedding = layer.site.kind == "embedding"
        v = part.packed(torch.float64) if terms else pack_skew(_generators(path, part)[0])
        # An embedding's rows are turned by R, inputs by R^T; and PEFT's series has the other sign than its exact map.
        v = -v if embedding != bool(terms) else v
        v = v if share else v.expand(part.blocks, -1)
        tensors[f"{path}.{'oft_embedding_R' if embedding else 'oft_R'}.weight"] = v.to(part.generator.dtype)
        sizes.add(part.config.block_size)
        counts.add(part.blocks)
    series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms} if terms else {"use_cayley_neumann": False}
    config = {
        "peft_type": "OFT",
        "r": 0 if len(sizes) == 1 else only(counts, "block sizes and numbers of blocks"),
        "oft_block_size": sizes.pop() if len(sizes) == 1 else 0,
        "block_share": share,
        "coft": False,
        "module_dropout": common(part.config.dropout for _, part in parts.values()),
        "init_weights": True,
    }
    return config | series, tensors


def boft_state(parts: Parts) -> Written:
    """BOFT: skew matrices of one factor, and a factor on every output."""
    tensors, sizes, counts = {}, set(), set()
    for path, (layer, part) in parts.items():
        check_layer(path, layer, ("linear", "conv"), "BOFT")
        Q = _generators(path, part)
        Q = Q.expand(-1, part.blocks, -1, -1)
        Q = Q[0] if len(Q) == 1 else _inverse(path, fused(cayley(Q), 0, len(Q)))
        if (copies := place_copies(layer, part)) > 1:
            eye = torch.eye(copies, dtype=Q.dtype, device=Q.device)
            Q = torch.einsum("kij,pq->kipjq", Q, eye).reshape(len(Q), Q.shape[-1] * copies, -1)
        scale = Q.new_ones(layer.out_features)
        if isinstance(part, BOFTAdapter) and part.config.scale_outputs:
            scale = 1 + part.strength * (part.scale - 1)
        tensors[f"{path}.boft_R"] = Q[None].to(part.generator.dtype)
        shape = (1, -1) if layer.site.kind == "conv" else (-1, 1)
        tensors[f"{path}.boft_s"] = scale.to(part.generator.dtype).reshape(shape)
        sizes.add(Q.shape[-1])
        counts.add(len(Q))
    config = {
        "peft_type": "BOFT",
        "boft_block_num": 0 if len(sizes) == 1 else only(counts, "block sizes and numbers of blocks"),
        "boft_block_size": sizes.pop() if len(sizes) == 1 else 0,
        "boft_n_butterfly_factor": 1,
        "boft_dropout": common(part.config.dropout for _, part in parts.values()),
        "init_weights": True,
    }
    return config, tensors


def hra_state(parts: Parts) -> Written:
    """HRA: vectors as columns."""
    tensors = {}
    for path, (layer, part) in parts.items():
        check_layer(path, layer, ("linear", "conv"), "HRA")
        if not isinstance(part, HRAAdapter) or part.strength != 1:
            raise ParameterError(
                f"{path!r} is rewound to {part.strength:g}, which is no product of as many reflections; call "
                "rewind(model, 1.0) first."
            )
        u = part.vectors.detach()
        if (copies := place_copies(layer, part)) > 1:
            # H (x) I is a reflection for every place of the kernel.
            eye = torch.eye(copies, dtype=u.dtype, device=u.device)
            u = torch.einsum("ri,pq->rpiq", u, eye).reshape(len(u) * copies, -1)
        tensors[f"{path}.hra_u"] = u.mT
    config = {
        "peft_type": "HRA",
        "r": only((u.shape[1] for u in tensors.values()), "numbers of reflections"),
        "apply_GS": only((part.config.orthogonal for _, part in parts.values()), "values of orthogonal"),
        "init_weights": True,
    }
    return config, tensors


def _terms(parts: Parts) -> int | None:
    """PEFT's number of terms, one for all layers; ``None`` for the exact map."""
    fixed, free, exact = set(), set(), False
    for path, (_, part) in parts.items():
        spec, config = part.map_in_use(), part.config
        if isinstance(config, NeumannSumOFT):
            if config.terms > 1:
                raise ParameterError(
                    f"{path!r} has a series as PEFT cut it before 0.18, which later releases do not have; merge it and "
                    "save the model instead."
                )
            fixed.add(2)
        elif spec.map != "cayley_neumann":
            exact = True
        elif config.tolerance is not None:
            # Within its tolerance of the exact map, which will do as well.
            free.add(spec.terms + 2)
        elif spec.terms == 1:
            raise ParameterError(
                f"{path!r} has the series I + 2 Q + Q^2 (terms=1), which PEFT does not have for any number of terms; "
                "merge it and save the model instead."
            )
        else:
            fixed.add(spec.terms + 2)
    if fixed and (exact or len(fixed | free) > 1):
        raise OptionError(
            "PEFT has one map for all layers, and this adapter has several with tolerance=None; attach layers that "
            "differ under different names, and write these one by one."
        )
    if fixed:
        return fixed.pop()
    return free.pop() if not exact and len(free) == 1 and free != {3} else None


def _generators(path: str, part: BlockAdapter) -> Float[Tensor, "m k b b"]:
    """Skew matrices whose Cayley transforms are the blocks, by factor; those of shared blocks once."""
    spec, config = part.map_in_use(), part.config
    v = part.packed(torch.float64)
    v = v[None] if v.ndim == 2 else v
    series = spec.map == "cayley_neumann" and (config.tolerance is None or isinstance(config, NeumannSumOFT))
    if spec.map == "exp_taylor" or series:
        raise ParameterError(
            f"{path!r} has the map {spec.map!r}, which is not orthogonal, and PEFT has no layer that computes the "
            "same; merge it and save the model instead."
        )
    if spec.map == "exp":
        return _inverse(path, rotation_blocks(v, config.block_size, spec))
    return unpack_skew(v)


def _inverse(path: str, R: Float[Tensor, "*lead b b"]) -> Float[Tensor, "*lead b b"]:
    """The generators of rotations, as long as they are of use in float32."""
    try:
        Q = skew_part(inverse_cayley(R))
        near = float(torch.linalg.matrix_norm(Q, 2).max()) > _LARGEST_GENERATOR
    except OptionError:
        near = True
    if near:
        raise ParameterError(
            f"{path!r} turns some plane by nearly 180 degrees, for which the Cayley transform of PEFT has no numbers; "
            "merge it and save the model instead."
        )
    return Q
