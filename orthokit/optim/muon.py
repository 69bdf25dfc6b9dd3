"""Muon: momentum and the polar factor, in either order, for matrices of any layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthokit.errors import OptionError, unknown_name
from orthokit.linalg._workspace import Workspace
from orthokit.linalg.coefficients import coefficient_table
from orthokit.linalg.polar import check_iteration, orthogonalize_
from orthokit.matrices import MatrixBlock
from orthokit.optim._alone import ALONE_OPTIONS, Alone, move_alone, prepare_alone
from orthokit.optim._pieces import (
    Chunk,
    Piece,
    Plan,
    chunks,
    decay,
    iteration_dtype,
    iteration_options,
    like,
    strips,
    write_back,
)
from orthokit.optim._report import iteration_flop, update_report
from orthokit.optim.base import MatrixOptimizer, check_rate
from orthokit.optim.rates import ADJUSTMENTS, lr_ratio

if TYPE_CHECKING:
    from orthokit.optim.sharded import MatrixExchange

__all__ = ["Muon"]

ORDERS = ("pre", "post", "none")
DECAYS = ("decoupled", "cautious")
NORMALIZATIONS = (None, "neuron")

# Entries from which a matrix is handled by itself through one scratch buffer; below, calls cost more than memory.
_LARGE = 1 << 15


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
        ns_dtype: Precision of the iteration for real parameters; default float32 for tiny matrices (``m m n`` up to
            ``2^17``, ``m`` the shorter side) and tiny stacks (up to ``2^20`` in all, in one process), else the fastest
            measured here (bfloat16 or float32); float64 for float64. Complex parameters and ``"svd"`` keep their own.
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
        self._plans: dict[tuple, Plan] = {}
        super().__init__(params, defaults, blocks=blocks, process_group=process_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_workspace": self._workspace, "_plans": {}}

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
        plan = self._planned(moved)
        if group["order"] == "pre" and plan.apart:
            buffers = [self._buffer(p) for p in plan.apart]
            torch._foreach_lerp_(buffers, [p.grad for p in plan.apart], 1 - group["momentum"])  # pyright: ignore[reportArgumentType, reportCallIssue]
        self._share(plan.chunks, self._move, group)

    def _move(self, chunk: Chunk, group: dict[str, Any]) -> None:
        alone = self._alone(chunk, group) if len(chunk) == 1 else None
        if alone is not None:
            move_alone(chunk[0], self._buffer(chunk[0].parameter), group, alone)
            return
        stack = self._stack(chunk, group, advance=True)
        self._apply(chunk, self._directions(chunk, stack, group), group)

    def _alone(self, chunk: Chunk, group: dict[str, Any]) -> Alone | None:
        """How the one matrix of a chunk moves, decided once; ``None`` if it goes the general way."""
        options = [group[name] for name in ALONE_OPTIONS]
        if chunk.recipe is None or chunk.recipe[0] != options:
            chunk.recipe = options, prepare_alone(chunk, group, self._workspace)
        return chunk.recipe[1]

    def _settle(self, chunk: Sequence[Piece], group: dict[str, Any]) -> None:
        for piece in chunk:
            if group["order"] != "none":
                self._buffer(piece.parameter)
            if group["normalize"] is not None:
                self._row_moments(piece)

    def _planned(self, moved: list[Tensor]) -> Plan:
        """The chunks of a step. They are kept: with many small matrices, making them costs as much as the products."""
        key = (torch.get_num_threads(), *((id(p), p.dtype, p.grad.dtype, p.device) for p in moved))  # pyright: ignore[reportOptionalMemberAccess]
        if key not in self._plans:
            if len(self._plans) > 2 * len(self.param_groups):
                self._plans.clear()  # other parameters have gradients at every step
            found = list(chunks([Piece(p, block) for p in moved for block in self._blocks[p]]))
            apart = {piece.parameter: None for chunk in found if not chunk.plain for piece in chunk}
            self._plans[key] = Plan(found, list(apart))
        return self._plans[key]

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)  # pyright: ignore[reportArgumentType]
        return state["momentum_buffer"]

    def _stack(self, chunk: Chunk, group: dict[str, Any], *, advance: bool = False) -> Tensor:
        """What the polar factors are taken of, ``(matrices, out, in)`` in the dtype of the products.

        The filtered gradients for "pre", the gradients themselves otherwise. With ``advance`` the buffers move first,
        unless they belong to parameters of several blocks.
        """
        grads = chunk.of([piece.gradient for piece in chunk])
        if group["order"] != "pre":
            return self._stacked(chunk, grads, group)
        buffers, advance = chunk.of([self._buffer(piece.parameter) for piece in chunk]), advance and chunk.plain
        if group["nesterov"]:
            return self._stacked(chunk, grads, group, blend=buffers, advance=advance)
        if advance:
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return self._stacked(chunk, buffers, group)

    def _stacked(
        self,
        chunk: Chunk,
        inputs: list[Tensor],
        group: dict[str, Any],
        *,
        blend: list[Tensor] | None = None,
        advance: bool = False,
    ) -> Tensor:
        """Blocks of equal shape as one batch, cast on the way; with ``blend``, moved towards it by the momentum.

        With ``advance`` it is moved towards the inputs before.
        """
        first, momentum = inputs[0], group["momentum"]
        size = (sum(chunk.counts), *first.shape[-2:])
        dtype = iteration_dtype(first, size, group)
        if first.numel() < _LARGE:
            name = "stack" if dtype == first.dtype else "joined"
            found = self._joined(name, inputs)
            if blend is not None:
                if advance:
                    torch._foreach_lerp_(blend, inputs, 1 - momentum)
                found = torch.lerp(found, self._joined("blend", blend), momentum, out=found)
            return found if dtype == first.dtype else self._room("stack", found, dtype).copy_(found)
        stack = self._workspace.get("stack", size, dtype, first.device)
        if blend is None:
            torch._foreach_copy_(chunk.split(stack), inputs)
            return stack
        scratch = self._room("scratch", max(inputs, key=Tensor.numel)).view(-1)
        for slot, x, y in zip(chunk.split(stack), inputs, blend, strict=True):
            for part, gradient, buffer in strips(slot, x, y):
                if advance:
                    buffer.lerp_(gradient, 1 - momentum)
                part.copy_(torch.lerp(gradient, buffer, momentum, out=like(gradient, scratch)))
        return stack

    def _room(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory in the shape of a tensor."""
        return self._workspace.get(name, tuple(like.shape), dtype or like.dtype, like.device)

    def _joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """Small blocks in one batch: a few calls over all of them cost less than a few calls over each."""
        first, single = parts[0], parts[0].ndim == 2
        size = (len(parts) if single else sum(part.shape[0] for part in parts), *first.shape[-2:])
        out = self._workspace.get(name, size, first.dtype, first.device)
        return torch.stack(parts, out=out) if single else torch.cat(parts, out=out)

    def _directions(self, chunk: Chunk, stack: Tensor, group: dict[str, Any]) -> Tensor:
        """The (normalised) polar factors of a chunk, ``(matrices, out, in)``; ``stack`` is used up."""
        stack = orthogonalize_(stack, **iteration_options(group), workspace=self._workspace)
        return stack if group["normalize"] is None else self._equalize(chunk, stack, group)

    def _equalize(self, chunk: Chunk, stack: Tensor, group: dict[str, Any]) -> Tensor:
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

    def _apply(self, chunk: Chunk, directions: Tensor, group: dict[str, Any]) -> None:
        """Decay and move the weights of a chunk along its directions."""
        lr, rule = float(group["lr"]), group["decay"]
        rate, ratio = lr * group["weight_decay"], lr_ratio(group["adjust_lr_fn"], *directions.shape[-2:])
        weights = chunk.of([piece.parameter for piece in chunk])
        dtype, post = weights[0].dtype, group["order"] == "post"
        if post or weights[0].numel() < _LARGE:
            # A list of two dtypes would go one by one.
            if directions.dtype != dtype:
                directions = self._room("joined", directions, dtype).copy_(directions)
            parts = chunk.split(directions)
            parts = self._filtered(chunk, parts, group) if post else parts
            decay(weights, parts, rate=rate, rule=rule)
            torch._foreach_add_(weights, parts, alpha=-lr * ratio)
        else:
            scratch = self._room("scratch", max(weights, key=Tensor.numel)).view(-1)
            for whole, factor in zip(weights, chunk.split(directions), strict=True):
                for weight, part in strips(whole, factor):
                    direction = part if part.dtype == dtype else like(weight, scratch).copy_(part)
                    decay([weight], [direction], rate=rate, rule=rule)
                    weight.add_(direction, alpha=-lr * ratio)
        write_back(chunk, weights)

    def _filtered(self, chunk: Chunk, parts: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The directions of "post": the average of the polar factors, or its Nesterov blend with the last."""
        momentum, tensors = group["momentum"], [self._buffer(piece.parameter) for piece in chunk]
        buffers = chunk.of(tensors)
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
