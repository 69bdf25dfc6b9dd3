"""Muon: momentum and the polar factor, in either order, for matrices of any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthokit.device import fast_matmul_dtype
from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._workspace import Workspace
from orthokit.linalg.coefficients import coefficient_table
from orthokit.linalg.polar import check_iteration, orthogonalize_
from orthokit.matrices import MatrixBlock
from orthokit.optim._report import iteration_flop, update_report
from orthokit.optim.base import MatrixOptimizer, check_rate
from orthokit.optim.rates import ADJUSTMENTS, lr_ratio

if TYPE_CHECKING:
    from orthokit.optim.sharded import MatrixExchange

__all__ = ["Muon"]

ORDERS = ("pre", "post", "none")
DECAYS = ("decoupled", "cautious")
NORMALIZATIONS = (None, "neuron")

# Entries that go through the iteration at once. On CPUs a few matrices at a time: enough to share among the cores, and
# small enough that the buffers stay in the caches. On other devices the launch of a kernel is what costs.
_CHUNK = {"cpu": 1 << 22}
_CHUNK_ELSEWHERE = 1 << 27
# Entries from which a matrix is handled by itself through one scratch buffer; below, calls cost more than memory.
_LARGE = 1 << 15


class Piece(NamedTuple):
    """One block of one parameter: what a row of the work list is."""

    parameter: Tensor
    block: MatrixBlock

    def of(self, tensor: Tensor) -> Tensor:
        """This block of a tensor shaped like the parameter, ``(matrices, out, in)``; a view if there is one."""
        if tensor.ndim == 2 and not self.block.layout.steps:
            return tensor.unsqueeze(0)  # the common case, at a tenth of the cost of the general one
        return self.block.read(tensor).reshape(-1, *self.block.shape[-2:])

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient, which is there."""
        return self.parameter.grad  # pyright: ignore[reportReturnType]


class Muon(MatrixOptimizer):
    r"""Steepest descent in the spectral norm, with momentum before the polar factor, after it, or without.

    With gradient ``G``, buffer ``M <- momentum M + (1 - momentum) X`` and ``polar`` the factor ``U V^H``:

    - ``order="pre"`` (Muon): ``X = G``, direction ``polar(M)``, or ``polar(lerp(G, M, momentum))`` with Nesterov;
    - ``order="post"`` (Orthogonal-SGDM): ``X = polar(G)``, direction ``M`` as it is, or its Nesterov blend with ``X``;
    - ``order="none"``: direction ``polar(G)``; no buffer.

    Then ``W <- (1 - lr weight_decay) W - lr ratio(shape) direction``. With ``normalize="neuron"`` (NorMuon) each row of
    the polar factor is first divided by the root of its running mean square, and the matrix scaled back to its norm.

    Args:
        params: Tensors, named tensors or groups, as in every torch optimizer. Two dimensions are a matrix, three a
            batch of matrices, four or five a convolution, flattened to ``(out, in * kernel)``. Real or complex.
        lr: Learning rate, ``>= 0``; default 1e-3. A one-element tensor is read at every step.
        weight_decay: Decay, ``>= 0``; default 0.1.
        momentum: Share of the old buffer, in ``[0, 1)``; default 0.95.
        nesterov: Look ahead by one gradient; default ``True``. The theory of momentum as a spectral filter has it off.
        ns_coefficients: One triple, a list of triples or a name in ``linalg.COEFFICIENTS``; default torch's triple.
        eps: Smallest norm that is divided by, ``> 0``; default 1e-7.
        ns_steps: Iterations, ``>= 0``; default 5.
        adjust_lr_fn: ``None`` / ``"original"``, ``"match_rms_adamw"`` or ``"spectral"``; see :func:`lr_ratio`.
        order: ``"pre"`` (default), ``"post"`` or ``"none"``.
        method: ``"newton_schulz"`` (default), ``"polar_express"`` or ``"svd"``; see ``linalg.orthogonalize``.
        polish: Cubic steps after the iteration, ``>= 0``, or ``"auto"``; default 0.
        scaling: What the iteration's input is divided by: ``"frobenius"`` (default), ``"schatten"``, ``"spectral"`` or
            ``"aol"``; see ``linalg.orthogonalize``.
        normalize: ``None`` (default) or ``"neuron"``.
        beta2: Share of the old mean square of ``normalize``, in ``[0, 1)``; default 0.95.
        decay: ``"decoupled"`` (default), or ``"cautious"``: only entries that the step makes smaller decay.
        ns_dtype: Precision of the iteration for real parameters; default the fastest measured here for float32,
            bfloat16 and float16 (bfloat16 or float32), float64 for float64. Complex parameters and ``"svd"`` keep
            their own.
        blocks: The matrix blocks of each parameter, from ``matrices``; default read from the shape. ``optim.for_model``
            fills it in.
        process_group: The processes that divide the work on replicated parameters (DDP): a group or ``"world"``;
            default ``None``, every process updates everything. DTensors (FSDP2) divide it along their mesh in any case.

    Raises:
        OptionError: An option is out of range.
        UnknownNameError: Unknown order, method, table, scaling, adjustment, normalization or decay.
        ParameterError: A parameter is no matrix, or its gradient is sparse.
        NonFiniteError: At a step: a gradient holds NaN or infinity. Nothing was changed.

    Example:
        >>> W = torch.nn.Parameter(torch.zeros(4, 8))
        >>> optimizer = Muon([W], lr=1.0, weight_decay=0.0, polish=4, ns_dtype=torch.float32)
        >>> W.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        >>> _ = optimizer.step()
        >>> bool((W @ W.T - torch.eye(4)).abs().max() < 1e-3)
        True

    Numerics:
        One buffer per parameter in the gradient's dtype (none for ``order="none"``), and one float32 per row with
        ``normalize``. Equal shapes are stacked over the whole group, a few megabytes at a time. With ``order="pre"``
        and torch's options it follows ``torch.optim.Muon`` to the rounding of the iteration's dtype; unlike torch 2.13
        it does not normalise the buffer in place for bfloat16 parameters with ``nesterov=False``.

    References:
        K. Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks. Tuddenham et al. (2022),
        Orthogonalising gradients to speed up neural network optimisation, arXiv 2202.07052. Li, Zhang, Liu, Bao (2026),
        Denoise First, Orthogonalize Later, arXiv 2606.03899, for the three orders. Z. Li et al. (2025), NorMuon,
        arXiv 2510.05491, algorithm 1; its scale ``0.2 sqrt(out in) / ||X||_F`` is ours with ``"match_rms_adamw"``.
        L. Chen et al. (2025), Cautious weight decay, arXiv 2510.12402.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        order: str = "pre",
        method: str = "newton_schulz",
        polish: int | str = 0,
        scaling: str = "frobenius",
        normalize: str | None = None,
        beta2: float = 0.95,
        decay: str = "decoupled",
        ns_dtype: torch.dtype | None = None,
        blocks: Mapping[Any, list[MatrixBlock]] | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "order": order,
            "method": method,
            "polish": polish,
            "scaling": scaling,
            "normalize": normalize,
            "beta2": beta2,
            "decay": decay,
            "ns_dtype": ns_dtype,
        }
        self._workspace = Workspace()
        super().__init__(params, defaults, blocks=blocks, process_group=process_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_workspace": self._workspace}

    def _check_options(self, group: dict[str, Any]) -> None:
        check_rate(group, "weight_decay")
        for name in ("momentum", "beta2"):
            if not 0 <= group[name] < 1:
                raise OptionError(f"{name} must be in [0, 1); got {group[name]}.")
        if group["ns_dtype"] is not None and not group["ns_dtype"].is_floating_point:
            raise OptionError(f"ns_dtype must be a real floating dtype; got {group['ns_dtype']}.")
        known = {"order": ORDERS, "adjust_lr_fn": ADJUSTMENTS, "normalize": NORMALIZATIONS, "decay": DECAYS}
        for name, choices in known.items():
            if group[name] not in choices:
                raise unknown_name(name, group[name], choices)
        names = ("method", "polish", "scaling", "eps")
        check_iteration(steps=group["ns_steps"], **{name: group[name] for name in names})
        coefficient_table(group["ns_coefficients"], group["ns_steps"])

    elementwise_state = ("momentum_buffer",)

    def _has_owner_state(self, group: dict[str, Any]) -> bool:
        return group["normalize"] is not None

    def _cost(self, block: MatrixBlock, group: dict[str, Any]) -> float:
        return block.count * iteration_flop(*block.shape[-2:], steps=group["ns_steps"])

    def _update_shared(self, group: dict[str, Any], parameters: list[Tensor], exchange: MatrixExchange) -> None:
        from orthokit.optim._sharded_update import update_directions

        update_directions(self, group, parameters, exchange)

    def _update(self, group: dict[str, Any]) -> None:
        moved = [p for p in group["params"] if p.grad is not None and p.numel()]
        if not moved:
            return
        if group["order"] == "pre":
            buffers = [self._buffer(p) for p in moved]
            torch._foreach_lerp_(buffers, [p.grad for p in moved], 1 - group["momentum"])
        pieces = [Piece(p, block) for p in moved for block in self._blocks[p]]
        for chunk in chunks(pieces):
            self._apply(chunk, self._directions(chunk, self._stack(chunk, group), group), group)

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)  # pyright: ignore[reportArgumentType]
        return state["momentum_buffer"]

    def _stack(self, chunk: list[Piece], group: dict[str, Any]) -> Tensor:
        """What the polar factors are taken of, ``(matrices, out, in)`` in the dtype of the products.

        The filtered gradients for "pre", the gradients themselves otherwise.
        """
        grads = [piece.of(piece.gradient) for piece in chunk]
        if group["order"] != "pre":
            return self._stacked(grads, group)
        buffers = [piece.of(self.state[piece.parameter]["momentum_buffer"]) for piece in chunk]
        if not group["nesterov"]:
            return self._stacked(buffers, group)
        return self._stacked(grads, group, blend=buffers)

    def _stacked(self, inputs: list[Tensor], group: dict[str, Any], blend: list[Tensor] | None = None) -> Tensor:
        """Batches of equal shape as one, cast on the way; with ``blend``, moved towards it by the momentum before."""
        first, momentum = inputs[0], group["momentum"]
        counts = [x.shape[0] for x in inputs]
        size = (sum(counts), *first.shape[1:])
        stack = self._workspace.get("stack", size, iteration_dtype(first, group), first.device)
        slots = stack.split(counts)
        if blend is not None and first.numel() >= _LARGE:
            for slot, x, y in zip(slots, inputs, blend, strict=True):
                slot.copy_(torch.lerp(x, y, momentum, out=self._scratch(x)))
        else:
            torch._foreach_copy_(slots, inputs if blend is None else torch._foreach_lerp(inputs, blend, momentum))
        return stack

    def _scratch(self, like: Tensor) -> Tensor:
        return self._workspace.get("scratch", tuple(like.shape), like.dtype, like.device)

    def _directions(self, chunk: list[Piece], stack: Tensor, group: dict[str, Any]) -> Tensor:
        """The (normalised) polar factors of a chunk, ``(matrices, out, in)``; ``stack`` is used up."""
        stack = orthogonalize_(stack, **iteration_options(group), workspace=self._workspace)
        return stack if group["normalize"] is None else self._equalize(chunk, stack, group)

    def _equalize(self, chunk: list[Piece], stack: Tensor, group: dict[str, Any]) -> Tensor:
        """Rows divided by the root of their running mean square; the norm of each matrix stays as it was."""
        stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
        squares = stack.abs().square().mean(-1)
        moments = [self._row_moments(piece) for piece in chunk]
        counts = [piece.block.count for piece in chunk]
        torch._foreach_lerp_(moments, [s.to(torch.float32) for s in squares.split(counts)], 1 - group["beta2"])
        scaled = stack / (torch.cat(moments).sqrt().unsqueeze(-1) + group["eps"])
        before, after = (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (stack, scaled))
        return scaled * (before / after.clamp(min=torch.finfo(squares.dtype).tiny))

    def _row_moments(self, piece: Piece) -> Tensor:
        """The part ``(matrices, out)`` of the parameter's row moments that belongs to one of its blocks."""
        p = piece.parameter
        blocks, state = self._blocks[p], self.state[p]
        if "row_moments" not in state:
            rows = sum(block.count * block.shape[-2] for block in blocks)
            state["row_moments"] = torch.zeros(rows, dtype=torch.float32, device=p.device)
        start = 0
        for block in blocks[: blocks.index(piece.block)]:
            start += block.count * block.shape[-2]
        count, rows = piece.block.count, piece.block.shape[-2]
        return state["row_moments"][start : start + count * rows].view(count, rows)

    def _apply(self, chunk: list[Piece], directions: Tensor, group: dict[str, Any]) -> None:
        """Decay and move the weights of a chunk along its directions."""
        counts = [piece.block.count for piece in chunk]
        lr = float(group["lr"])
        rate, ratio = lr * group["weight_decay"], lr_ratio(group["adjust_lr_fn"], *chunk[0].block.shape[-2:])
        weights = [piece.of(piece.parameter) for piece in chunk]
        dtype = weights[0].dtype
        if group["order"] != "post" and weights[0].numel() >= _LARGE:
            for weight, part in zip(weights, directions.split(counts), strict=True):
                direction = part if part.dtype == dtype else self._scratch(weight).copy_(part)
                decay([weight], [direction], rate=rate, rule=group["decay"])
                weight.add_(direction, alpha=-lr * ratio)
        else:
            parts = list(directions.to(dtype).split(counts))
            if group["order"] == "post":
                parts = self._filtered(chunk, parts, group)
            decay(weights, parts, rate=rate, rule=group["decay"])
            torch._foreach_add_(weights, parts, alpha=-lr * ratio)
        write_back(chunk, weights)

    def _filtered(self, chunk: list[Piece], parts: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The directions of "post": the average of the polar factors, or its Nesterov blend with the last."""
        momentum, tensors = group["momentum"], [self._buffer(piece.parameter) for piece in chunk]
        buffers = [piece.of(tensor) for piece, tensor in zip(chunk, tensors, strict=True)]
        parts = [part.to(buffer.dtype) for part, buffer in zip(parts, buffers, strict=True)]
        torch._foreach_lerp_(buffers, parts, 1 - momentum)
        write_back(chunk, buffers, tensors)
        result = torch._foreach_lerp(parts, buffers, momentum) if group["nesterov"] else buffers
        return [r.to(piece.parameter.dtype) for r, piece in zip(result, chunk, strict=True)]

    def report(self, *, time: bool = True) -> Any:
        """How orthogonal the last update was, matrix by matrix, and how fast it was found.

        The directions of the last step are computed again from the gradients and buffers, so call it after ``step``
        and before ``zero_grad``.

        Args:
            time: Also measure the rate of the iteration against the fastest product of this machine; default ``True``.

        Returns:
            A pandas frame, one row per block: ``matrix``, ``shape``, ``mean_error`` (mean of ``|s - 1|`` over the
            singular values ``s`` of the polar factor), ``smallest``, ``largest``, and with ``time`` the ``gflops`` of
            its stack and their ``share_of_roof``.

        Raises:
            ParameterError: No parameter holds a gradient.

        Example:
            >>> W = torch.nn.Parameter(torch.zeros(4, 8))
            >>> W.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
            >>> optimizer = Muon([W], ns_dtype=torch.float32, polish=4)
            >>> _ = optimizer.step()
            >>> bool(optimizer.report(time=False)["mean_error"].item() < 1e-3)
            True
        """
        return self._report(lambda: update_report(self, time=time))


def chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one shape, dtype and device together, as many as the caches hold."""
    alike: dict[tuple, list[Piece]] = defaultdict(list)
    for piece in pieces:
        p = piece.parameter
        alike[(*piece.block.shape[-2:], p.dtype, piece.gradient.dtype, p.device)].append(piece)
    for members in alike.values():
        room = _CHUNK.get(members[0].parameter.device.type, _CHUNK_ELSEWHERE)
        chunk, size = [], 0
        for piece in members:
            if chunk and size + piece.block.numel > room:
                yield chunk
                chunk, size = [], 0
            chunk.append(piece)
            size += piece.block.numel
        yield chunk


def iteration_options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as :func:`orthokit.linalg.orthogonalize` names them."""
    return {
        "method": group["method"],
        "steps": group["ns_steps"],
        "polish": group["polish"],
        "coefficients": group["ns_coefficients"] if group["method"] == "newton_schulz" else None,
        "scaling": group["scaling"],
        "eps": group["eps"],
    }


def iteration_dtype(x: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype of the products for an input."""
    # The exact factor of rounded input would not be exact, and half precision has no complex form.
    if x.is_complex() or group["method"] == "svd":
        return x.dtype
    if group["ns_dtype"] is not None:
        return group["ns_dtype"]
    return x.dtype if x.dtype == torch.float64 else fast_matmul_dtype(x.device)


def decay(weights: list[Tensor], directions: list[Tensor], *, rate: float, rule: str) -> None:
    """Shrink the weights in place: all entries, or with ``"cautious"`` those that the step makes smaller as well."""
    if not rate:
        return
    if rule == "decoupled":
        torch._foreach_mul_(weights, 1 - rate)
        return
    for weight, direction in zip(weights, directions, strict=True):
        shrinking = (weight * direction.conj()).real > 0
        weight.sub_(weight * shrinking, alpha=rate)


def write_back(chunk: list[Piece], values: list[Tensor], tensors: list[Tensor] | None = None) -> None:
    """Strides that allow no view gave a copy; its values go back to the parameter (or to ``tensors``)."""
    for i, (piece, value) in enumerate(zip(chunk, values, strict=True)):
        target = piece.parameter if tensors is None else tensors[i]
        if value.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
            piece.block.write(target, value.view(piece.block.shape))
