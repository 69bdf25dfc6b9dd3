"""Muon: momentum and the polar factor, in either order, for matrices of any layout."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orthokit.device import fast_matmul_dtype
from orthokit.errors import OptionError, unknown_name
from orthokit.linalg.coefficients import coefficient_table
from orthokit.linalg.polar import METHODS, orthogonalize
from orthokit.matrices import MatrixBlock
from orthokit.optim.blocks import block_by_shape, check_gradients

__all__ = ["Muon", "lr_ratio"]

ORDERS = ("pre", "post", "none")
ADJUSTMENTS = (None, "original", "match_rms_adamw")

# On one CPU thread a batched product saves the overhead of a call, which no longer matters from this width on, and the
# stack costs a copy. On several threads it pays at every width: the batch is split over the cores.
_STACKED_ON_ONE_THREAD = 128


def lr_ratio(rule: str | None, rows: int, columns: int) -> float:
    r"""The factor on the learning rate that makes updates of all shapes alike.

    Args:
        rule: ``None`` or ``"original"``: ``sqrt(max(1, out / in))``. ``"match_rms_adamw"``: ``0.2 sqrt(max(out, in))``,
            which gives an orthogonal update the root mean square 0.2 that AdamW's updates typically have.
        rows: ``out``, at least 1.
        columns: ``in``, at least 1.

    Returns:
        The factor.

    Raises:
        UnknownNameError: No such rule.

    Example:
        >>> lr_ratio("original", 400, 100)
        2.0

    References:
        K. Jordan et al. (2024), Muon. J. Liu et al. (2025), Muon is scalable for LLM training, arXiv 2502.16982, 2.2.
    """
    if rule not in ADJUSTMENTS:
        raise unknown_name("adjust_lr_fn", rule, ADJUSTMENTS)
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class Muon(torch.optim.Optimizer):
    r"""Steepest descent in the spectral norm, with momentum before the polar factor, after it, or without.

    With gradient ``G``, buffer ``M <- momentum M + (1 - momentum) X`` and ``polar`` the factor ``U V^H``:

    - ``order="pre"`` (Muon): ``X = G``, direction ``polar(M)``, or ``polar(lerp(G, M, momentum))`` with Nesterov;
    - ``order="post"`` (Orthogonal-SGDM): ``X = polar(G)``, direction ``M`` as it is, or its Nesterov blend with ``X``;
    - ``order="none"``: direction ``polar(G)``; no buffer.

    Then ``W <- (1 - lr weight_decay) W - lr ratio(shape) direction``.

    Args:
        params: Tensors, named tensors or groups, as in every torch optimizer. Two dimensions are a matrix, three a
            batch of matrices, four or five a convolution, flattened to ``(out, in * kernel)``. Real or complex.
        lr: Learning rate, ``>= 0``; default 1e-3. A one-element tensor is read at every step.
        weight_decay: Decoupled decay, ``>= 0``; default 0.1.
        momentum: Share of the old buffer, in ``[0, 1)``; default 0.95.
        nesterov: Look ahead by one gradient; default ``True``. The theory of momentum as a spectral filter has it off.
        ns_coefficients: One triple, a list of triples or a name in ``linalg.COEFFICIENTS``; default torch's triple.
        eps: Smallest norm that is divided by, ``> 0``; default 1e-7.
        ns_steps: Iterations, ``>= 0``; default 5.
        adjust_lr_fn: ``None`` / ``"original"`` or ``"match_rms_adamw"``; see :func:`lr_ratio`.
        order: ``"pre"`` (default), ``"post"`` or ``"none"``.
        method: ``"newton_schulz"`` (default), ``"polar_express"`` or ``"svd"``; see ``linalg.orthogonalize``.
        polish: Cubic steps after the iteration, ``>= 0``; default 0.
        ns_dtype: Precision of the iteration for real parameters; default the fastest measured here for float32,
            bfloat16 and float16 (bfloat16 or float32), float64 for float64. Complex parameters and ``"svd"`` keep
            their own.
        blocks: The matrix blocks of each parameter, from ``matrices``; default read from the shape. ``optim.for_model``
            fills it in.

    Raises:
        OptionError: An option is out of range.
        UnknownNameError: Unknown order, method, table or adjustment.
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
        One buffer per parameter in the gradient's dtype (none for ``order="none"``). With ``order="pre"`` and
        torch's options it follows ``torch.optim.Muon`` to the rounding of the iteration's dtype; unlike torch 2.13 it
        does not normalise the buffer in place for bfloat16 parameters with ``nesterov=False``.

    References:
        K. Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks. Tuddenham et al. (2022),
        Orthogonalising gradients to speed up neural network optimisation, arXiv 2202.07052. Li, Zhang, Liu, Bao (2026),
        Denoise First, Orthogonalize Later, arXiv 2606.03899, for the three orders.
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
        polish: int = 0,
        ns_dtype: torch.dtype | None = None,
        blocks: Mapping[Any, list[MatrixBlock]] | None = None,
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
            "ns_dtype": ns_dtype,
        }
        # Before super().__init__, which already calls add_param_group. The blocks stay out of the param groups:
        # state_dict() would otherwise carry objects that only a pickle can store.
        self._blocks: dict[Tensor, list[MatrixBlock]] = dict(blocks or {})
        self._names: dict[Tensor, str] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in every torch optimizer; the options are checked here.

        Raises:
            OptionError: An option of the group is out of range.
            ParameterError: A parameter is no matrix.
        """
        _check_options({**self.defaults, **param_group})
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
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps three attributes; a deep copy must know its blocks and names as well.
        return {**super().__getstate__(), "_blocks": self._blocks, "_names": self._names}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity; no parameter and no buffer was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.named_gradients())
        for group in self.param_groups:
            self._update(group)
        return loss

    def named_gradients(self) -> list[tuple[str, Tensor]]:
        """Name and gradient of every parameter that has one."""
        everything = (p for group in self.param_groups for p in group["params"])
        return [(self._names[p], p.grad) for p in everything if p.grad is not None]

    def _update(self, group: dict[str, Any]) -> None:
        lr = float(group["lr"])
        moved = [(p, p.grad) for p in group["params"] if p.grad is not None and p.numel()]
        inputs = [(p, self._polar_input(p, grad, group)) for p, grad in moved]
        pieces = [(p, block, block.read(x)) for p, x in inputs for block in self._blocks[p]]
        directions = _orthogonalize_all([x for _, _, x in pieces], group)
        for (p, block, _), direction in zip(pieces, directions, strict=True):
            if group["order"] == "post":
                direction = self._filter(p, block, direction, group)
            ratio = lr_ratio(group["adjust_lr_fn"], *block.shape[-2:])
            weight = block.read(p)
            weight.mul_(1 - lr * group["weight_decay"]).add_(direction.to(p.dtype), alpha=-lr * ratio)
            if weight.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
                block.write(p, weight)  # strides that allow no view: read gave a copy

    def _polar_input(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        """What the polar factor is taken of: the filtered gradient for "pre", the gradient itself otherwise."""
        if group["order"] != "pre":
            return grad
        buffer, momentum = self._buffer(p, grad), group["momentum"]
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum) if group["nesterov"] else buffer

    def _filter(self, p: Tensor, block: MatrixBlock, direction: Tensor, group: dict[str, Any]) -> Tensor:
        buffer, momentum = self._buffer(p, p), group["momentum"]
        direction = direction.to(buffer.dtype)
        filtered = block.read(buffer).lerp(direction, 1 - momentum)
        block.write(buffer, filtered)
        return direction.lerp(filtered, momentum) if group["nesterov"] else filtered

    def _buffer(self, p: Tensor, like: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(like, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def _orthogonalize_all(inputs: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Polar factors of many matrices; equal shapes are stacked where one batched product beats many single ones."""
    stacks: dict[tuple, list[int]] = defaultdict(list)
    for i, x in enumerate(inputs):
        alone = x.device.type == "cpu" and torch.get_num_threads() == 1 and min(x.shape[-2:]) > _STACKED_ON_ONE_THREAD
        stacks[(*x.shape, x.dtype, x.device, i if alone else -1)].append(i)
    outputs: list[Tensor] = [torch.empty(0)] * len(inputs)
    for members in stacks.values():
        first = inputs[members[0]]
        dtype = _iteration_dtype(first, group)
        stack = first.to(dtype) if len(members) == 1 else torch.stack([inputs[i].to(dtype) for i in members])
        result = orthogonalize(
            stack,
            method=group["method"],
            steps=group["ns_steps"],
            polish=group["polish"],
            coefficients=group["ns_coefficients"] if group["method"] == "newton_schulz" else None,
            eps=group["eps"],
        )
        for i, direction in zip(members, [result] if len(members) == 1 else result.unbind(0), strict=True):
            outputs[i] = direction
    return outputs


def _iteration_dtype(x: Tensor, group: dict[str, Any]) -> torch.dtype:
    # The exact factor of rounded input would not be exact, and half precision has no complex form.
    if x.is_complex() or group["method"] == "svd":
        return x.dtype
    if group["ns_dtype"] is not None:
        return group["ns_dtype"]
    return x.dtype if x.dtype == torch.float64 else fast_matmul_dtype(x.device)


def _check_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise OptionError(f"a tensor lr must hold one element; got {lr.numel()}.")
    for name in ("lr", "weight_decay"):
        if not group[name] >= 0:
            raise OptionError(f"{name} must be at least 0; got {group[name]}.")
    if not 0 <= group["momentum"] < 1:
        raise OptionError(f"momentum must be in [0, 1); got {group['momentum']}.")
    if not group["eps"] > 0:
        raise OptionError(f"eps must be greater than 0; got {group['eps']}.")
    if group["polish"] < 0:
        raise OptionError(f"polish must be at least 0; got {group['polish']}.")
    if group["ns_dtype"] is not None and not group["ns_dtype"].is_floating_point:
        raise OptionError(f"ns_dtype must be a real floating dtype; got {group['ns_dtype']}.")
    for name, known in (("order", ORDERS), ("method", METHODS), ("adjust_lr_fn", ADJUSTMENTS)):
        if group[name] not in known:
            raise unknown_name(name, group[name], known)
    coefficient_table(group["ns_coefficients"], group["ns_steps"])
