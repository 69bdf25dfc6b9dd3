"""What every optimizer of matrices shares: blocks, names, checks, and the seam for several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthokit._threads import share_out
from orthokit.errors import OptionError
from orthokit.matrices import MatrixBlock
from orthokit.optim._pieces import Piece, measured
from orthokit.optim.blocks import block_by_shape, check_gradients

if TYPE_CHECKING:
    from orthokit.optim.sharded import MatrixExchange

__all__ = ["MatrixOptimizer", "check_rate", "keep_dtypes"]

# Entries up to which chunks are moved side by side: the scratch memory of each is a few times as large.
_SHARED = 1 << 24
# FLOP of a step from which it pays to hand them out.
_WORTH = 1e8


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that update matrix blocks; a subclass writes ``_check_options`` and ``_update``.

    Args:
        params: Tensors, named tensors or groups, as in every torch optimizer.
        defaults: Default options of a group.
        blocks: The matrix blocks of each parameter, from ``matrices``; default read from the shape.
        process_group: The processes that share the work on replicated parameters, a group or ``"world"``; default
            ``None``. Sharded parameters (DTensor) are shared in any case, along their mesh.
    """

    exchange: MatrixExchange | None = None
    """Set when several processes share the work; ``None``: this process does it all."""

    elementwise_state: tuple[str, ...] = ()
    """State that is laid out, entry by entry, as its parameter; all other tensors live with the owner of the matrix."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        blocks: Mapping[Any, list[MatrixBlock]] | None,
        process_group: Any = None,
    ) -> None:
        self._process_group = process_group
        # Before super().__init__, which already calls add_param_group. The blocks stay out of the param groups:
        # state_dict() would otherwise carry objects that only a pickle can store.
        self._blocks: dict[Tensor, list[MatrixBlock]] = dict(blocks or {})
        self._names: dict[Tensor, str] = {}
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _update(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in every torch optimizer; the options are checked here.

        Raises:
            OptionError: An option of the group is out of range.
            ParameterError: A parameter is no matrix.
        """
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Counted over all groups, as in state_dict(): a message must name one parameter only.
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:-1])
        names = group.get("param_names") or [f"parameter {first + i}" for i in range(len(group["params"]))]
        try:
            for name, parameter in zip(names, group["params"], strict=True):
                self._names[parameter] = name
                if parameter not in self._blocks:
                    self._blocks[parameter] = [block_by_shape(name, parameter)]
            self._join(group)
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise

    def _join(self, group: dict[str, Any]) -> None:
        """Divide the matrices of a new group among the processes, if several share them."""
        # Whoever holds a DTensor has loaded its module, which takes as long to load as torch itself.
        loaded = sys.modules.get("torch.distributed.tensor")
        sharded = loaded is not None and any(isinstance(p, loaded.DTensor) for p in group["params"])
        if self._process_group is None and not sharded:
            return
        from orthokit.optim.sharded import MatrixExchange

        exchange = self.exchange or MatrixExchange(self._process_group)
        options = {name: value for name, value in group.items() if name not in ("params", "param_names", "lr")}
        cost = partial(self._cost, group=group)
        exchange.add(group["params"], names=self._names, blocks=self._blocks, cost=cost, options=options)
        self.exchange = exchange

    def _cost(self, block: MatrixBlock, group: dict[str, Any]) -> float:
        """FLOP of one step of a block, up to a factor; what the work of several processes is balanced by."""
        m, n = sorted(block.shape[-2:])
        return float(block.count * m * m * n)

    def _share(
        self, chunks: Sequence[Sequence[Piece]], move: Callable[[Any, dict[str, Any]], None], group: dict[str, Any]
    ) -> None:
        """Call ``move(chunk, group)`` for every chunk: on a CPU for several at a time, on one core each."""
        several = len(chunks) > 1 and torch.get_num_threads() > 1
        together = [chunk for chunk in chunks if several and _can_share(chunk)]
        costs = [sum(self._cost(piece.block, group) for piece in chunk) for chunk in together]
        if not together or sum(costs) < _WORTH:
            for chunk in chunks:
                move(chunk, group)
            return
        for chunk in chunks:
            if not _can_share(chunk):
                move(chunk, group)
        # Measured here, where there are as many threads as at every other time.
        group = {**group, **measured(torch.device("cpu"))}
        for chunk in together:
            self._settle(chunk, group)
        share_out(lambda chunk: move(chunk, group), together, costs)

    def _settle(self, chunk: Sequence[Piece], group: dict[str, Any]) -> None:
        """Make what several chunks might otherwise make at once: the state of a parameter that they are parts of."""

    def _has_owner_state(self, group: dict[str, Any]) -> bool:
        """Whether the owners of the matrices of a group hold state of their own; the same on every process."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps three attributes; a deep copy must know its blocks and names as well.
        own = {name: getattr(self, name) for name in ("_blocks", "_names", "_process_group", "exchange")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity, on whatever process; no parameter and no buffer was
                changed, anywhere.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        if self.exchange is not None or not _surely_finite([p.grad for p in params if p.grad is not None]):
            self.check([(self._names[p], p) for p in params])
        self._update_groups()
        return loss

    def check(self, named: list[tuple[str, Tensor]]) -> None:
        """Raise, on all processes alike, unless every gradient of the named parameters can be used."""
        if self.exchange is None:
            if not _surely_finite([p.grad for _, p in named if p.grad is not None]):
                check_gradients((name, p.grad) for name, p in named if p.grad is not None)
        else:
            self.exchange.check(named)

    @torch.no_grad()
    def update(self) -> None:
        """The step itself, for a caller that has checked the gradients."""
        self._update_groups()

    def _update_groups(self) -> None:
        for group in self.param_groups:
            if self.exchange is None:
                self._update(group)
            else:
                self._update_with_others(group, self.exchange)

    def _update_with_others(self, group: dict[str, Any], exchange: MatrixExchange) -> None:
        """The step of a group whose work is shared; plain parameters among sharded ones are updated by everybody."""
        moved = [p for p in group["params"] if p.grad is not None and p.numel()]
        self._update({**group, "params": [p for p in moved if p not in exchange]})
        for parameters in exchange.rounds([p for p in moved if p in exchange]):
            self._update_shared(group, parameters, exchange)

    def _update_shared(self, group: dict[str, Any], parameters: list[Tensor], exchange: MatrixExchange) -> None:
        """One round of shared matrices: each owner makes its step on whole weights and gradients."""
        from orthokit.optim._sharded_update import update_whole

        update_whole(self, group, parameters, exchange)

    def state_dict(self) -> dict[str, Any]:
        """The options and the state, as in every torch optimizer.

        Where several processes share the work, all of them must call it: what only the owner of a matrix holds is laid
        out as the parameter is (sharded or whole), so that it can be saved and loaded with any number of processes.
        """
        return self.gathered(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` gave, on any number of processes; the next step is the one that would follow.

        Args:
            state_dict: As ``state_dict()`` gives it; left as it is.
        """
        super().load_state_dict(state_dict)
        self.adopt(self, state_dict)

    def gathered(self, state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        """A state dict of these groups: dtypes by name, and what the owners hold laid out as the parameters are."""
        options = [_map_options(saved, _named) for saved in state_dict["param_groups"]]
        state_dict = {**state_dict, "param_groups": options}
        if self.exchange is None:
            return state_dict
        from orthokit.optim._sharded_state import gather_state

        return gather_state(self, self.exchange, state_dict, groups)

    def adopt(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Finish the loading of ``state_dict`` into ``optimizer``: this one, or one that this one is a part of."""
        keep_dtypes(optimizer, state_dict)
        for group in optimizer.param_groups:
            group.update(_map_options(group, _unnamed))
        if self.exchange is not None:
            from orthokit.optim._sharded_state import adopt_state

            adopt_state(self, self.exchange)

    def _report(self, make: Callable[[], Any]) -> Any:
        """The frame that ``make`` gives; with several processes, of whole matrices, and all of them must call it."""
        if self.exchange is None:
            return make()
        from orthokit.optim._sharded_report import shared_report

        return shared_report(self, self.exchange, make)

    def blocks(self, parameter: Tensor) -> list[MatrixBlock]:
        """The matrix blocks in which ``parameter`` is updated."""
        return self._blocks[parameter]


def _can_share(chunk: Sequence[Piece]) -> bool:
    return chunk[0].parameter.is_cpu and sum(piece.block.numel for piece in chunk) <= _SHARED


def check_rate(group: dict[str, Any], *names: str) -> None:
    """Raise unless ``lr`` is one number and it and the other named options are at least 0."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise OptionError(f"a tensor lr must hold one element; got {lr.numel()}.")
    for name in ("lr", *names):
        if not group[name] >= 0:
            raise OptionError(f"{name} must be at least 0; got {group[name]}.")


def _surely_finite(grads: list[Tensor]) -> bool:
    """Whether the norms of all gradients are finite, where that can be asked without a transfer and in few calls."""
    for grad in grads:
        if not grad.is_cpu or grad.layout is not torch.strided:
            return False
    return isfinite(sum(map(Tensor.item, torch._foreach_norm(grads)))) if grads else True


def _map_options(group: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: value if name in ("params", "param_names") else change(value) for name, value in group.items()}


def _named(value: Any) -> Any:
    # Plain data only: gathering a full state dict (torch.distributed.checkpoint) knows no dtypes, nor does JSON.
    return str(value) if isinstance(value, torch.dtype) else value


def _unnamed(value: Any) -> Any:
    name = value.removeprefix("torch.") if isinstance(value, str) and value.startswith("torch.") else ""
    return getattr(torch, name) if name else value


def keep_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Undo the cast to the parameter's dtype that ``load_state_dict`` of torch makes: state is often wider.

    Args:
        optimizer: The optimizer that has loaded.
        state_dict: What it loaded.
    """
    groups = zip(state_dict["param_groups"], optimizer.param_groups, strict=True)
    pairs = [pair for saved, group in groups for pair in zip(saved["params"], group["params"], strict=True)]
    for index, p in pairs:
        for name, value in state_dict["state"].get(index, {}).items():
            found = optimizer.state[p].get(name)
            if isinstance(value, Tensor) and isinstance(found, Tensor) and found.dtype != value.dtype:
                optimizer.state[p][name] = value.to(found.device)
