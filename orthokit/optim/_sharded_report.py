"""Reports of shared matrices: each row is made by one process, on whole tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from orthokit.errors import ParameterError
from orthokit.optim._sharded_plan import Item
from orthokit.optim._sharded_share import local_part, whole_box
from orthokit.optim._sharded_state import gather_state, loaded
from orthokit.optim.sharded import MatrixExchange

if TYPE_CHECKING:
    import pandas as pd

    from orthokit.optim.base import MatrixOptimizer

__all__ = ["shared_report"]


@torch.no_grad()
def shared_report(
    optimizer: MatrixOptimizer, exchange: MatrixExchange, report: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """The frame of ``report``, on every process; every process must call it.

    Args:
        optimizer: Whose report it is.
        exchange: Its exchange.
        report: Makes the frame of one process from the optimizer's groups, state and blocks.

    Returns:
        One row per block, in the order of the parameters.

    Raises:
        ParameterError: No parameter holds a gradient.
    """
    groups, state = optimizer.param_groups, optimizer.state
    ids = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
    saved = {
        "state": {i: state.get(p, {}) for p, i in ids.items()},
        "param_groups": [{"params": [ids[p] for p in group["params"]]} for group in groups],
    }
    found = gather_state(optimizer, exchange, saved, groups)["state"]
    moved = [p for p in ids if p.grad is not None and p.numel()]
    stand_ins = {p: _whole(p, found.get(ids[p], {}), exchange) for p in moved}
    here = {p: x for p, x in stand_ins.items() if x is not None}
    own_state: dict[Tensor, dict[str, Any]] = defaultdict(dict, dict(here.values()))
    try:
        optimizer.exchange, optimizer.state = None, own_state
        optimizer.param_groups = [{**g, "params": [here[p][0] for p in g["params"] if p in here]} for g in groups]
        for p, (x, _) in here.items():
            optimizer._blocks[x], optimizer._names[x] = optimizer._blocks[p], optimizer._names[p]
        mine = report().to_dict("records") if here else []
    finally:
        optimizer.exchange, optimizer.state, optimizer.param_groups = exchange, state, groups
        for p, (x, _) in here.items():
            if x is not p:
                optimizer._blocks.pop(x, None)
                optimizer._names.pop(x, None)
    return _together(mine, [block.name for p in ids for block in optimizer.blocks(p)], exchange)


def _together(mine: list[dict], names: list[str], exchange: MatrixExchange) -> pd.DataFrame:
    import pandas as pd

    everybody: list[Any] = [None] * exchange.router.size
    dist.all_gather_object(everybody, mine, group=exchange.router.group)
    rows = [row for part in everybody for row in part]
    if not rows:
        raise ParameterError("a report needs the gradients of the last step; call it before zero_grad().")
    return pd.DataFrame(sorted(rows, key=lambda row: names.index(row["matrix"])))


def _whole(p: Tensor, state: dict[str, Any], exchange: MatrixExchange) -> tuple[Tensor, dict[str, Any]] | None:
    """The whole parameter with its gradient, and its whole state, on one process; ``None`` on the others."""
    share = exchange.shares.get(p)
    if share is None:  # a plain parameter among sharded ones: everybody has it, the first reports it
        return (p, state) if exchange.router.rank == 0 else None
    owner = next(rank for rank, box in enumerate(share.work) if box is not None)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    values = [p.detach(), p.grad, *tensors.values()]
    items, parts = [], []
    for value in values:
        have, part = loaded(value, share, exchange)
        want = tuple(whole_box(value.shape) if rank == owner else None for rank in range(exchange.router.size))
        items.append(Item(have, want))
        parts.append(part)
    dtypes = [part.dtype for part in parts]
    W, G, *rest = exchange.router.route(items, parts, dtypes, local_part(p).device, remember=False)
    if W is None:
        return None
    stand_in = W.detach()
    stand_in.grad = G
    return stand_in, {**state, **dict(zip(tensors, rest, strict=True))}
