"""State dicts of shared matrices: what one owner holds is laid out as the parameter is, and found again."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from orthokit.errors import CheckpointError
from orthokit.optim._sharded_plan import Box, Item, relative, volume
from orthokit.optim._sharded_share import Share, local_part, mesh_boxes, whole_box
from orthokit.optim.sharded import MatrixExchange

if TYPE_CHECKING:
    from orthokit.optim.base import MatrixOptimizer

__all__ = ["adopt_state", "gather_state", "loaded"]


def gather_state(
    optimizer: MatrixOptimizer, exchange: MatrixExchange, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """A copy of ``state_dict`` whose owner-held tensors are DTensors like their parameters, or whole on every process.

    Every process of the group must call it.
    """
    members = [
        (index, p, group)
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
        for index, p in zip(saved["params"], group["params"], strict=True)
        if p in exchange
    ]
    if not any(optimizer._has_owner_state(group) for _, _, group in members):
        return state_dict
    state = dict(state_dict["state"])
    mine = []
    for index, p, _ in members:
        own = exchange.shares[p].own_box is not None
        values = state.get(index, {}) if own else {}
        held = {key: value for key, value in values.items() if key not in optimizer.elementwise_state}
        mine.append({key: _described(value) for key, value in held.items()})
    everybody: list[Any] = [None] * exchange.router.size
    dist.all_gather_object(everybody, mine, group=exchange.router.group)
    items, tensors, dtypes, places = [], [], [], []
    for k, (index, p, _) in enumerate(members):
        share, found = exchange.shares[p], [described[k] for described in everybody]
        state[index] = {key: v for key, v in state.get(index, {}).items() if key in optimizer.elementwise_state}
        for key in sorted(set().union(*found)):
            kind, value = next(about[key] for about in found if key in about)
            if kind is None:
                state[index][key] = value
                continue
            shape = _whole_shape(share, [about[key][1] if key in about else None for about in found])
            items.append(Item(_work_boxes(share, shape, key), _state_boxes(share, shape, exchange)))
            tensors.append(state_dict["state"].get(index, {}).get(key))
            dtypes.append(kind)
            places.append((index, key, share, shape))
    device = local_part(members[0][1]).device
    parts = exchange.router.route(items, tensors, dtypes, device, remember=False)
    for (index, key, share, shape), part in zip(places, parts, strict=True):
        state[index][key] = _placed(cast("Tensor", part), share, shape)
    return {**state_dict, "state": {index: values for index, values in state.items() if values}}


def adopt_state(optimizer: MatrixOptimizer, exchange: MatrixExchange) -> None:
    """Give every owner its part of a state that was just loaded. Every process of the group must call it."""
    items, tensors, dtypes, places = [], [], [], []
    for p, share in exchange.shares.items():
        state = optimizer.state.get(p, {})
        for key in sorted(state):
            value = state[key]
            if key in optimizer.elementwise_state:
                state[key] = _like_parameter(value, share, key)
                continue
            if not isinstance(value, Tensor) or value.dim() == 0:
                if share.own_box is None:
                    del state[key]  # a number that only the owner would go on counting
                continue
            shape = tuple(value.shape)
            have, part = loaded(value, share, exchange)
            items.append(Item(have, _work_boxes(share, shape, key)))
            tensors.append(part)
            dtypes.append(value.dtype)
            places.append((state, key))
    if not items:
        return
    device = local_part(next(iter(exchange.shares))).device
    for (state, key), part in zip(
        places, exchange.router.route(items, tensors, dtypes, device, remember=False), strict=True
    ):
        if part is None:
            del state[key]
        else:
            state[key] = part.clone()  # it may lie inside a buffer with others, or be the caller's


def _described(value: Any) -> tuple[torch.dtype | None, Any]:
    """A tensor by dtype and shape; a scalar by its value."""
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape)) if value.dim() else (None, value.cpu())
    return None, value


def _whole_shape(share: Share, shapes: list[tuple[int, ...] | None]) -> tuple[int, ...]:
    """The shape of a state tensor, from the shapes of its parts; only stacks have several parts, along dimension 0."""
    first = next(shape for shape in shapes if shape is not None)
    if _single(share):
        return first
    rank = next(rank for rank, shape in enumerate(shapes) if shape is not None)
    return (first[0] // _length(share.work[rank]) * share.shape[0], *first[1:])


def _single(share: Share) -> bool:
    return any(box == whole_box(share.shape) for box in share.work)


def _length(box: Box | None) -> int:
    return 0 if box is None else box[0][1] - box[0][0]


def _work_boxes(share: Share, shape: tuple[int, ...], key: str) -> tuple[Box | None, ...]:
    """Who holds which part of a state tensor while the optimizer works."""
    whole = whole_box(shape)
    if _single(share):
        return tuple(None if box is None else whole for box in share.work)
    per, left = divmod(shape[0], share.shape[0])
    if left:
        raise CheckpointError(
            f"state {key!r} of the stack {share.name!r} must have a multiple of its {share.shape[0]} matrices as first "
            f"size; found {shape}. Load a state of the same model."
        )
    return tuple(
        ((box[0][0] * per, box[0][1] * per), *whole[1:]) if box is not None and volume(box) else None
        for box in share.work
    )


def _state_boxes(share: Share, shape: tuple[int, ...], exchange: MatrixExchange) -> tuple[Box, ...]:
    """Who holds which part of a state tensor in a state dict: rows where the parameter is sharded, else everything."""
    if share.mesh is None:
        return (whole_box(shape),) * exchange.router.size
    return mesh_boxes(shape, share.mesh, _row_dims(share), exchange.router)


def _row_dims(share: Share) -> tuple[int | None, ...]:
    return tuple(None if dim is None else 0 for dim in share.dims)


def _placed(part: Tensor, share: Share, shape: tuple[int, ...]) -> Tensor:
    """A part of a state tensor as it stands in a state dict; a copy."""
    if share.mesh is None:
        return part.clone()
    placements = [Replicate() if dim is None else Shard(0) for dim in share.dims]
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        part.contiguous().clone(), share.mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def loaded(value: Tensor, share: Share, exchange: MatrixExchange) -> tuple[tuple[Box, ...], Tensor]:
    """Who holds which part of a loaded tensor, and this process's part."""
    shape = tuple(value.shape)
    if isinstance(value, DTensor):
        plain = all(type(placement) in (Shard, Replicate) for placement in value.placements)
        if plain and share.mesh is not None and value.device_mesh == share.mesh:
            dims = tuple(x.dim if isinstance(x, Shard) else None for x in value.placements)
            return mesh_boxes(shape, share.mesh, dims, exchange.router), value.to_local()
        value = value.full_tensor()
    return (whole_box(shape),) * exchange.router.size, value


def _like_parameter(value: Tensor, share: Share, key: str) -> Tensor:
    """A tensor shaped as the parameter, laid out as the parameter."""
    if tuple(value.shape) != share.shape:
        raise CheckpointError(
            f"state {key!r} of {share.name!r} must have the shape of its parameter, {share.shape}; found "
            f"{tuple(value.shape)}. Load a state of the same model."
        )
    if share.mesh is None:
        return value.full_tensor() if isinstance(value, DTensor) else value
    placements = [Replicate() if dim is None else Shard(dim) for dim in share.dims]
    if isinstance(value, DTensor):
        return value.redistribute(share.mesh, placements)
    own = value[relative(share.keep[share.rank], whole_box(share.shape))].contiguous()
    strides = tuple(prod(share.shape[i + 1 :]) for i in range(len(share.shape)))
    return DTensor.from_local(
        own, share.mesh, placements, run_check=False, shape=torch.Size(share.shape), stride=strides
    )
