"""What every merging method does first: check its inputs and bring them to one precision and device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError

__all__ = [
    "Gathered",
    "check_finite",
    "check_range",
    "finished",
    "gathered",
    "per_expert",
    "task_vectors",
    "weighted_sum",
]


class Gathered(NamedTuple):
    """The checked inputs of a method; ``base`` and ``experts`` may share memory with what was given: read only.

    Args:
        base: In the working dtype, without gradient; ``experts[0]`` where no base was given.
        experts: One tensor each, of the shape, working dtype and device of ``base``.
        weights: One per expert, in the working dtype, on the device of ``base``.
        dtype: What the result is returned in.
    """

    base: Tensor
    experts: list[Tensor]
    weights: Tensor
    dtype: torch.dtype


def gathered(
    base: Tensor | None,
    experts: Sequence[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    *,
    mean: bool = False,
    positive: bool = False,
    matrices: bool = False,
    least: int = 1,
    most: int | None = None,
) -> Gathered:
    """Check the inputs of a method and bring them to one dtype, at least float32, and to the device of ``base``.

    Args:
        base: The tensor that the experts were trained from, or ``None`` for methods that do not use it.
        experts: One tensor per expert, of the shape of ``base``.
        weights: One finite number per expert; default all 1.
        mean: Whether the method divides by the sum of the weights, which must then not be 0.
        positive: Whether the weights say how much each expert counts: none below 0, not all 0.
        matrices: Whether the method needs matrices, shape ``(..., out, in)``.
        least: Fewest experts the method is defined for, ``>= 1``.
        most: Most experts the method is defined for; default no limit.

    Returns:
        :class:`Gathered`. Unpacks as ``base, experts, weights, dtype``.

    Raises:
        OptionError: Too few or too many experts or weights, a weight that is not finite or has the wrong sign, or
            weights summing to 0.
        ShapeError: An expert whose shape is not that of ``base``, or no matrix where one is needed.
        DtypeError: A tensor that is not real floating.
        NonFiniteError: A tensor that holds a NaN or an infinity.

    Example:
        >>> base, experts, weights, dtype = gathered(torch.zeros(2, dtype=torch.bfloat16), [torch.ones(2)])
        >>> base.dtype, weights.tolist(), dtype
        (torch.float32, [1.0], torch.bfloat16)
    """
    if isinstance(experts, Tensor):
        raise OptionError(
            f"experts must be a list with one tensor per expert; got one tensor of shape {tuple(experts.shape)}. "
            "For a single expert pass [expert]."
        )
    found = list(experts)
    _check_count(len(found), least, most)
    first = found[0] if base is None else base
    named = [(f"expert {index}", expert) for index, expert in enumerate(found)]
    named = named if base is None else [("base", base), *named]
    for name, tensor in named:
        _check_tensor(name, tensor, named[0][0], first, matrices=matrices)
    work = torch.float64 if any(tensor.dtype == torch.float64 for _, tensor in named) else torch.float32
    ready = [expert.detach().to(device=first.device, dtype=work) for expert in found]
    start = ready[0] if base is None else base.detach().to(work)
    return Gathered(start, ready, _weights(weights, len(found), mean=mean, positive=positive, like=start), first.dtype)


def task_vectors(inputs: Gathered) -> list[Tensor]:
    """``expert - base`` of every expert, as new tensors that may be overwritten."""
    return [expert - inputs.base for expert in inputs.experts]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """``sum_i weights[i] tensors[i]`` as a new tensor, one pass per summand."""
    factors = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    total = tensors[0] * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total.add_(tensor, alpha=factor)
    return total


def per_expert(name: str, tensors: Sequence[Tensor] | Tensor | None, inputs: Gathered) -> list[Tensor]:
    """The statistics of a method, one tensor per expert: checked, in the working dtype and on the device.

    Shapes differ from method to method and are left to the caller.
    """
    what = f"{name}= must be a list with one tensor per expert"
    if tensors is None or isinstance(tensors, Tensor):
        got = "nothing" if tensors is None else f"one tensor of shape {tuple(tensors.shape)}"
        raise OptionError(f"{what}; got {got}. Collect it from each expert's own data, in the order of the experts.")
    if len(tensors) != len(inputs.experts):
        raise OptionError(f"{what}; got {len(tensors)} for {len(inputs.experts)} experts. Pass one for each.")
    for index, tensor in enumerate(tensors):
        _check_floating(f"{name}[{index}]", tensor)
        check_finite(f"{name}[{index}]", tensor)
    return [tensor.detach().to(inputs.base) for tensor in tensors]


def finished(merged: Tensor, inputs: Gathered, *, scale: float = 1.0, moved: bool = False) -> Tensor:
    """The result in the dtype asked for, never sharing memory with an input.

    Args:
        merged: The merged tensor, or with ``moved=True`` its change against the base; overwritten where it is new.
        inputs: What :func:`gathered` returned.
        scale: Factor on the change.
        moved: Whether ``merged`` is a change; it may then be overwritten.
    """
    if moved:
        # base + scale * change with one rounding less than scaling first, and in the memory of the change.
        result = torch.add(inputs.base, merged, alpha=scale, out=merged)
    else:
        result = merged if scale == 1 else inputs.base + (merged - inputs.base) * scale
    return result.to(inputs.dtype)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if ``tensor`` holds a NaN or an infinity, naming it and how many."""
    # A NaN or an infinity anywhere makes the sum one, so a finite sum settles it in one pass without a mask; a sum that
    # merely overflowed is settled by looking at every entry.
    work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if bool(torch.isfinite(tensor.sum(dtype=work))):
        return
    tensor = tensor.to(work)
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
        raise NonFiniteError(
            f"{name} holds {kind}: {bad} of its {tensor.numel()} entries are not finite. "
            "Leave it out, or merge an earlier checkpoint."
        )


def check_range(
    name: str, value: float, *, least: float = -math.inf, most: float = math.inf, above: float | None = None
) -> float:
    """``value``, or :class:`OptionError` unless it is a finite number in [least, most] and greater than ``above``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and least <= value <= most and (above is None or value > above):
        return value
    bounds = [f"greater than {above:g}"] if above is not None else [f"at least {least:g}"] if least > -math.inf else []
    bounds += [f"at most {most:g}"] if most < math.inf else []
    raise OptionError(f"{name} must be a finite number{' ' if bounds else ''}{' and '.join(bounds)}; got {value!r}.")


def _check_count(count: int, least: int, most: int | None) -> None:
    if count >= least and (most is None or count <= most):
        return
    if count == 0:
        raise OptionError("experts is empty; pass at least one tensor.")
    wanted = f"exactly {least}" if most == least else f"at least {least}" if count < least else f"at most {most}"
    raise OptionError(f"this method takes {wanted} experts; got {count}. Choose another method for that number.")


def _check_tensor(name: str, tensor: Tensor, first_name: str, first: Tensor, *, matrices: bool) -> None:
    _check_floating(name, tensor)
    if tensor.shape != first.shape:
        raise ShapeError(
            f"all tensors must have one shape; {first_name} has {tuple(first.shape)} and {name} has "
            f"{tuple(tensor.shape)}. Merge the same layer of models with one architecture."
        )
    if matrices and tensor.ndim < 2:
        raise ShapeError(
            f"this method needs matrices (..., out, in); {name} has shape {tuple(tensor.shape)}. "
            "Merge vectors with linear or task_arithmetic."
        )
    if matrices and 0 in tensor.shape[-2:]:
        raise ShapeError(f"this method needs rows and columns; {name} has shape {tuple(tensor.shape)}.")
    check_finite(name, tensor)


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} must be a tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise DtypeError(f"{name} must be real floating; got {tensor.dtype}. Copy such tensors from the base instead.")


def _weights(
    weights: Sequence[float] | Tensor | None, count: int, *, mean: bool, positive: bool, like: Tensor
) -> Tensor:
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise OptionError(f"weights must hold one number per expert; got {len(values)} for {count} experts.")
    if not all(math.isfinite(value) for value in values):
        raise OptionError(f"weights must be finite; got {values}.")
    if positive and (min(values) < 0 or max(values) == 0):
        raise OptionError(f"weights must be at least 0, and one of them greater; got {values}.")
    # Compared with their own rounding: 0.1 + 0.2 - 0.3 is 5.6e-17 and means 0.
    if mean and abs(math.fsum(values)) <= 4 * math.ulp(max(1e-300, *map(abs, values))):
        raise OptionError(f"this method takes a mean: weights must not sum to 0; got {values}.")
    return torch.tensor(values, dtype=like.dtype, device=like.device)
