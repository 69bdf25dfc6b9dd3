"""Several processes, one update: every matrix is updated whole, by the process that owns it.

Sharded parameters (FSDP2's ``fully_shard``, any DTensor) need nothing but the optimizer: their mesh says who takes
part. Replicated parameters (DDP) are updated by every process for itself unless ``process_group=`` divides the work.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard

from orthokit.device import fast_matmul_dtype
from orthokit.errors import OptionError, ParameterError
from orthokit.matrices import MatrixBlock
from orthokit.optim._sharded_plan import Box, assign_owners, extent, volume
from orthokit.optim._sharded_route import Router
from orthokit.optim._sharded_share import (
    Share,
    add_stack,
    local_part,
    mesh_boxes,
    mesh_group,
    resolved,
    stack_work,
    whole_box,
)
from orthokit.optim.blocks import finite, nonfinite_error, sparse_error

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MatrixExchange", "Share", "assign_owners", "local_part"]

# Entries an owner holds at once; more go in several rounds, so that memory stays bounded.
_ROUND = 1 << 26
_ABSENT, _FINE, _NOT_FINITE, _SPARSE, _MISPLACED = range(5)
_PRODUCTS = (torch.bfloat16, torch.float16, torch.float32)


class MatrixExchange:
    r"""Divides the matrices of an optimizer among processes and moves them to their owners and back.

    Owners are found by FLOP, the most expensive matrix first, each to the process with the least work so far. A stack
    of matrices (experts) is not one task: sharded along the stack, every process updates the matrices it holds and
    nothing moves; otherwise it is divided along the stack.

    An optimizer makes its own, as ``optimizer.exchange``; look at it for ``to_frame()``, ``loads`` and the counters.

    Args:
        process_group: The group that shares the work on replicated parameters, or ``"world"``; default ``None``: the
            mesh of the DTensor parameters says.

    Raises:
        OptionError: ``process_group`` is no process group of this process, or torch.distributed is not initialised.

    Numerics:
        A step is one all-to-all to the owners and one back (more only above 2^26 entries per owner and round) and one
        all-reduce of eight bytes per parameter. Casting happens before the transfer and only where one process casts as
        well, so results differ from one process by the rounding of the products alone: batches are composed otherwise.

    References:
        R. L. Graham (1969), Bounds on multiprocessing timing anomalies, for the balance. J. Liu et al. (2025), Muon is
        scalable for LLM training, arXiv 2502.16982, section 2.3, for gathering whole matrices; there every process that
        keeps a part of a matrix gathers all of it, here one owner does.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._given = process_group is not None
        self._mesh: DeviceMesh | None = None
        self.shares: dict[Tensor, Share] = {}
        self.loads: list[float] = []
        """FLOP of a step, for every process of the group."""
        self._router: Router | None = Router(resolved(process_group)) if self._given else None
        self._options = 0
        self._agreed = False
        self._products: torch.dtype | None = None
        if self._router is not None:
            self.loads = [0.0] * self._router.size

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self.shares

    def __deepcopy__(self, memo: dict) -> MatrixExchange:
        raise OptionError("an optimizer that shares its work with other processes cannot be copied; make a new one.")

    @property
    def router(self) -> Router:
        """What moves the tensors; counts ``bytes_sent`` and ``collectives``."""
        if self._router is None:
            raise ParameterError("no parameter is shared yet; add sharded parameters first.")
        return self._router

    def add(
        self,
        parameters: Sequence[Tensor],
        *,
        names: Mapping[Tensor, str],
        blocks: Mapping[Tensor, list[MatrixBlock]],
        cost: Callable[[MatrixBlock], float],
        options: object = None,
    ) -> None:
        """Divide more parameters; what was divided before stays with its owners.

        Args:
            parameters: Those of a new group; plain ones among sharded ones stay with every process.
            names: Their names.
            blocks: Their matrix blocks.
            cost: FLOP of one step of a block.
            options: Options of the group, which must be equal on all processes.

        Raises:
            OptionError: A sharded parameter, and a process group was given.
            ParameterError: A placement that is neither ``Shard`` nor ``Replicate``, or a second mesh.
        """
        members = [p for p in parameters if self._given or isinstance(p, DTensor)]
        if not members:
            return
        mesh = self._checked_mesh(members, names)
        router = self._router or Router(mesh_group(mesh))
        keeps = [self._kept(p, names[p], mesh, router) for p in members]
        costs = [sum(map(cost, blocks[p])) for p in members]
        works = [stack_work(blocks[p], keep, dims) for p, (keep, dims) in zip(members, keeps, strict=True)]
        loads = self.loads or [0.0] * router.size
        for work, amount in zip(works, costs, strict=True):
            add_stack(loads, work, amount)
        single = [i for i, work in enumerate(works) if work is None]
        owners = dict(zip(single, assign_owners([costs[i] for i in single], loads), strict=True))
        turned = tuple(self.shares)
        turns = {i: turn for turn, i in enumerate(sorted(range(len(members)), key=lambda i: (-costs[i], i)))}
        for i, p in enumerate(members):
            keep, dims = keeps[i]
            whole = whole_box(p.shape)
            work = works[i] or tuple(whole if rank == owners[i] else None for rank in range(router.size))
            turn = len(turned) + turns[i]
            self.shares[p] = Share(
                names[p], tuple(p.shape), keep, work, costs[i], turn, blocks[p], router.rank, mesh, dims
            )
        self._router, self._mesh, self.loads, self._agreed = router, mesh, loads, False
        seen = [(tuple(p.shape), str(p.dtype), self.shares[p].work) for p in members]
        self._options = zlib.crc32(repr((seen, options)).encode(), self._options)

    def _checked_mesh(self, members: list[Tensor], names: Mapping[Tensor, str]) -> DeviceMesh | None:
        mesh = self._mesh
        for p in members:
            if not isinstance(p, DTensor):
                continue
            if self._given:
                raise OptionError(
                    f"process_group= is for replicated parameters, and {names[p]!r} is a DTensor, whose mesh says who "
                    "takes part; leave process_group out."
                )
            if mesh is not None and p.device_mesh != mesh:
                raise ParameterError(
                    f"all sharded parameters of one optimizer must lie on one mesh; {names[p]!r} lies on "
                    f"{p.device_mesh}, others on {mesh}. Give each mesh an optimizer of its own."
                )
            mesh = p.device_mesh
        return mesh

    def _kept(
        self, p: Tensor, name: str, mesh: DeviceMesh | None, router: Router
    ) -> tuple[tuple[Box, ...], tuple[int | None, ...]]:
        """The box each process of the group keeps of a parameter, and the dimensions that are sharded."""
        if mesh is None or not isinstance(p, DTensor):
            return (whole_box(p.shape),) * router.size, ()
        for placement in p.placements:
            # Exact types: a strided shard is no subclass by accident, its rows lie in another order.
            if type(placement) not in (Shard, Replicate):
                raise ParameterError(
                    f"a shared matrix must be placed by Shard or Replicate; {name!r} is placed by {placement}. "
                    "Redistribute it, or shard it over one dimension of the mesh only."
                )
        dims = tuple(placement.dim if isinstance(placement, Shard) else None for placement in p.placements)
        keep = mesh_boxes(tuple(p.shape), mesh, dims, router)
        if extent(keep[router.rank]) != tuple(local_part(p).shape):
            raise ParameterError(
                f"the local part of {name!r} must be the range that torch.chunk gives; expected shape "
                f"{extent(keep[router.rank])}, found {tuple(local_part(p).shape)}."
            )
        return keep, dims

    def collect(
        self, parameters: Sequence[Tensor], parts: Sequence[Tensor], dtypes: Sequence[torch.dtype]
    ) -> list[Tensor | None]:
        """What this process is to update, whole, from the parts that all processes keep.

        Args:
            parameters: Whose tensors these are; one may come several times.
            parts: This process's part of each, laid out as the parameter's.
            dtypes: The dtype each travels and arrives in.

        Returns:
            For each the matrices this process owns, else ``None``. May share memory with ``parts``.
        """
        items = [self.shares[p].inwards for p in parameters]
        return self.router.route(items, parts, dtypes, parts[0].device)

    def distribute(
        self, parameters: Sequence[Tensor], results: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]
    ) -> list[Tensor]:
        """This process's part of what the owners found.

        Args:
            parameters: Whose tensors these are.
            results: The whole result of each matrix this process owns, ``None`` for the others.
            dtypes: The dtype each travels and arrives in.

        Returns:
            The part of each that this process keeps. May share memory with ``results``.
        """
        items = [self.shares[p].outwards for p in parameters]
        device = local_part(parameters[0]).device
        found = self.router.route(items, results, dtypes, device)
        return [part for part in found if part is not None]

    def rounds(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The parameters in the order of their cost, as many at a time as an owner may hold."""
        held, batch = [0] * self.router.size, []
        for p in sorted(parameters, key=lambda p: self.shares[p].turn):
            sizes = [volume(box) if box is not None else 0 for box in self.shares[p].work]
            if batch and any(size and size + more > _ROUND for size, more in zip(sizes, held, strict=True)):
                yield batch
                held, batch = [0] * self.router.size, []
            held = [size + more for size, more in zip(sizes, held, strict=True)]
            batch.append(p)
        if batch:
            yield batch

    def check(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Raise on every process, before anything moves, unless all of them can make the step.

        Args:
            named: Every parameter of the optimizer with its name, whether it has a gradient or not.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity on some process.
            ParameterError: A gradient is sparse, is placed otherwise than its parameter, or is missing on some
                processes only.
            OptionError: The processes were given other parameters or options.
        """
        device = next((local_part(p).device for p in self.shares), torch.device("cpu"))
        if not self._agreed:
            self._agree(len(named), device)
        codes = [_code(p) for _, p in named]
        dense = [i for i, code in enumerate(codes) if code == _FINE]
        grads = [local_part(g) for i in dense if (g := named[i][1].grad) is not None]
        filled = [(i, g) for i, g in zip(dense, grads, strict=True) if g.numel()]
        for (i, _), fine in zip(filled, finite([g for _, g in filled]), strict=True):
            codes[i] = _FINE if fine else _NOT_FINITE
        both = torch.tensor([codes, [-code for code in codes]], dtype=torch.int32, device=device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.router.group)
        most, least = both[0].tolist(), (-both[1]).tolist()
        _raise_for([name for name, _ in named], most, least)

    def _agree(self, count: int, device: torch.device) -> None:
        """Once: do all processes mean the same optimizer? A mismatch would otherwise end in a hang."""
        mine = zlib.crc32(repr(count).encode(), self._options)
        both = torch.tensor([mine, -mine], dtype=torch.int64, device=device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.router.group)
        if int(both[0]) != -int(both[1]):
            raise OptionError(
                "all processes must make the optimizer from the same parameters, in the same order, with the same "
                "options; they differ. Build model and optimizer in the same way everywhere."
            )
        self._agreed = True

    def products_dtype(self, device: torch.device) -> torch.dtype:
        """The fastest dtype of matrix products that suits all processes; the first call is a collective."""
        if self._products is None:
            found = torch.tensor(_PRODUCTS.index(fast_matmul_dtype(device)), device=device)
            # Where the machines measured different dtypes to be fastest, the widest is taken everywhere.
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.router.group)
            self._products = _PRODUCTS[int(found)]
        return self._products

    def to_frame(self) -> pd.DataFrame:
        """One row per shared parameter: who updates it, and its FLOP of a step."""
        import pandas as pd

        rows = []
        for share in self.shares.values():
            owners = [rank for rank, box in enumerate(share.work) if box is not None and volume(box)]
            rows.append({"parameter": share.name, "shape": share.shape, "owners": owners, "gflop": share.cost / 1e9})
        return pd.DataFrame(rows)


def _code(p: Tensor) -> int:
    """What can be said of a gradient without looking at its values."""
    if p.grad is None:
        return _ABSENT
    if isinstance(p, DTensor) != isinstance(p.grad, DTensor):
        return _MISPLACED
    if isinstance(p, DTensor) and isinstance(p.grad, DTensor):
        same = p.grad.device_mesh == p.device_mesh and p.grad.placements == p.placements
        return _FINE if same else _MISPLACED
    return _SPARSE if p.grad.is_sparse else _FINE


def _raise_for(names: list[str], most: list[int], least: list[int]) -> None:
    def those(test: Callable[[int, int], bool]) -> list[str]:
        return [name for name, high, low in zip(names, most, least, strict=True) if test(high, low)]

    if found := those(lambda high, low: high == _SPARSE):
        raise sparse_error(found)
    if found := those(lambda high, low: high == _MISPLACED):
        raise ParameterError(
            f"gradients must be placed as their parameters are; those of {', '.join(map(repr, found))} are not. "
            "Redistribute them before the step."
        )
    if found := those(lambda high, low: high != _ABSENT and low == _ABSENT):
        raise ParameterError(
            f"every process must have a gradient or none; only some have one of {', '.join(map(repr, found))}. "
            "No parameter was changed; let the loss reach the same parameters everywhere."
        )
    if found := those(lambda high, low: high == _NOT_FINITE):
        raise nonfinite_error(found)
