"""The steps that owners make for everybody: on whole weights, or on whole directions only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from orthokit.optim._pieces import Piece, chunks, decay, iteration_dtype
from orthokit.optim.rates import lr_ratio
from orthokit.optim.sharded import MatrixExchange, local_part

if TYPE_CHECKING:
    from orthokit.matrices import MatrixBlock
    from orthokit.optim.base import MatrixOptimizer
    from orthokit.optim.muon import Muon

__all__ = ["update_directions", "update_whole"]


def update_whole(
    optimizer: MatrixOptimizer, group: dict[str, Any], parameters: list[Tensor], exchange: MatrixExchange
) -> None:
    """Weights and gradients go to their owners, which make the optimizer's own step; the weights come back."""
    weights = [local_part(p) for p in parameters]
    grads = [local_part(cast("Tensor", p.grad)) for p in parameters]
    dtypes = [x.dtype for x in (*weights, *grads)]
    wholes = exchange.collect([*parameters, *parameters], [*weights, *grads], dtypes)
    results = wholes[: len(parameters)]
    with stand_ins(optimizer, parameters, results, wholes[len(parameters) :], exchange) as present:
        optimizer._update({**group, "params": [x for x in present if x is not None]})
    parts = exchange.distribute(parameters, results, dtypes[: len(parameters)])
    for weight, part in zip(weights, parts, strict=True):
        # Where a process owns what it keeps, the step was made in place.
        if part.data_ptr() != weight.data_ptr():
            weight.copy_(part)


def update_directions(
    optimizer: Muon, group: dict[str, Any], parameters: list[Tensor], exchange: MatrixExchange
) -> None:
    """Muon's step: only what the polar factor is taken of goes to the owners, and only directions come back."""
    if group["ns_dtype"] is None and "agreed_dtype" not in group:
        # Said aloud from here on: what each process would measure for itself need not be the same.
        for dtype, alike in _products(parameters, exchange).items():
            update_directions(optimizer, {**group, "agreed_dtype": dtype}, alike, exchange)
        return
    inputs = _polar_inputs(optimizer, group, parameters)
    wires = [_wire(x, exchange.shares[p].blocks, group) for x, p in zip(inputs, parameters, strict=True)]
    wholes = exchange.collect(parameters, inputs, wires)
    # One process casts a direction to the dtype of the weights; that it is cast before or after the way is the same.
    dtypes = [_direction_dtype(wire, p.dtype, group) for wire, p in zip(wires, parameters, strict=True)]
    results = [None if x is None else torch.empty_like(x, dtype=d) for x, d in zip(wholes, dtypes, strict=True)]
    with stand_ins(optimizer, parameters, wholes, wholes, exchange) as present:
        _write_directions(optimizer, group, present, results)
    _apply(optimizer, group, parameters, exchange.distribute(parameters, results, dtypes), exchange)


@contextmanager
def stand_ins(
    optimizer: MatrixOptimizer,
    parameters: Sequence[Tensor],
    wholes: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    exchange: MatrixExchange,
) -> Iterator[list[Tensor | None]]:
    """Let whole tensors stand for the parameters they belong to: with their gradient, their blocks and their state."""
    present: list[Tensor | None] = []
    for p, whole, grad in zip(parameters, wholes, grads, strict=True):
        # Touched everywhere, so that no process looks as if it had not started (torch.distributed.checkpoint asks).
        state = optimizer.state[p]
        # A handle of its own: the whole may be the parameter itself, or its own gradient.
        stand_in = None if whole is None or not whole.numel() else whole.detach()
        if stand_in is not None:
            stand_in.grad = grad
            optimizer._blocks[stand_in] = exchange.shares[p].own_blocks
            optimizer._names[stand_in] = exchange.shares[p].name
            optimizer.state[stand_in] = state
        present.append(stand_in)
    try:
        yield present
    finally:
        for stand_in in present:
            if stand_in is not None:
                del optimizer._blocks[stand_in], optimizer._names[stand_in], optimizer.state[stand_in]


def _products(parameters: list[Tensor], exchange: MatrixExchange) -> dict[torch.dtype, list[Tensor]]:
    """The parameters by the dtype of their products where no option gives it."""
    found: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for p in parameters:
        wide = p.dtype == torch.float64
        found[torch.float64 if wide else exchange.products_dtype(local_part(p).device)].append(p)
    return found


def _polar_inputs(optimizer: Muon, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
    """This process's part of what the polar factors are taken of."""
    grads = [local_part(cast("Tensor", p.grad)) for p in parameters]
    if group["order"] != "pre":
        return grads
    buffers = [local_part(optimizer._buffer(p)) for p in parameters]
    torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    return list(torch._foreach_lerp(grads, buffers, group["momentum"])) if group["nesterov"] else buffers


def _wire(x: Tensor, blocks: list[MatrixBlock], group: dict[str, Any]) -> torch.dtype:
    """The dtype in which the input of the polar factors travels: the widest that one of its blocks asks for."""
    dtypes = [iteration_dtype(x, block.shape, group) for block in blocks]
    return reduce(torch.promote_types, dtypes)


def _direction_dtype(wire: torch.dtype, weight: torch.dtype, group: dict[str, Any]) -> torch.dtype:
    found = wire if group["normalize"] is None else torch.promote_types(wire, torch.float32)
    return weight if weight.itemsize < found.itemsize else found


def _write_directions(
    optimizer: Muon, group: dict[str, Any], present: list[Tensor | None], results: list[Tensor | None]
) -> None:
    """The (normalised) polar factor of every block of the whole tensors."""
    owned = {x: result for x, result in zip(present, results, strict=True) if x is not None and result is not None}
    for pieces in chunks([Piece(x, block) for x in owned for block in optimizer.blocks(x)]):
        stack = optimizer._stacked(pieces, pieces.of([piece.parameter for piece in pieces]), group)
        factors = optimizer._directions(pieces, stack, group).split(pieces.counts)
        for piece, factor in zip(pieces, factors, strict=True):
            piece.block.write(owned[piece.parameter], factor.reshape(piece.block.shape))


def _apply(
    optimizer: Muon, group: dict[str, Any], parameters: list[Tensor], parts: list[Tensor], exchange: MatrixExchange
) -> None:
    """Filter the directions where the order asks for it, decay, and move this process's part of the weights."""
    lr = float(group["lr"])
    weights = [local_part(p) for p in parameters]
    directions = [part.to(weight.dtype) for part, weight in zip(parts, weights, strict=True)]
    if group["order"] == "post":
        directions = _filtered(optimizer, group, parameters, directions)
    alike: dict[float, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for p, weight, direction in zip(parameters, weights, directions, strict=True):
        share = exchange.shares[p]
        ratios = [lr_ratio(group["adjust_lr_fn"], *block.shape[-2:]) for block in share.blocks]
        if len(set(ratios)) == 1:
            alike[ratios[0]].append((weight, direction))
            continue
        regions = share.regions.to(weight.device)
        for i, ratio in enumerate(ratios):
            where = regions == i
            part, along = weight[where], direction[where]
            decay([part], [along], rate=lr * group["weight_decay"], rule=group["decay"])
            weight[where] = part.add_(along, alpha=-lr * ratio)
    for ratio, pairs in alike.items():
        moving, along = [list(x) for x in zip(*pairs, strict=True)]
        decay(moving, along, rate=lr * group["weight_decay"], rule=group["decay"])
        torch._foreach_add_(moving, along, alpha=-lr * ratio)


def _filtered(
    optimizer: Muon, group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor]
) -> list[Tensor]:
    """The directions of "post": the average of the polar factors, or its Nesterov blend with the last."""
    buffers = [local_part(optimizer._buffer(p)) for p in parameters]
    parts = [direction.to(buffer.dtype) for direction, buffer in zip(directions, buffers, strict=True)]
    torch._foreach_lerp_(buffers, parts, 1 - group["momentum"])
    found = torch._foreach_lerp(parts, buffers, group["momentum"]) if group["nesterov"] else buffers
    return [x.to(direction.dtype) for x, direction in zip(found, directions, strict=True)]
