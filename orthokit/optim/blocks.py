"""From parameters to the matrix blocks an optimizer updates, and the checks every optimizer makes before it moves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from orthokit.errors import NonFiniteError, ParameterError
from orthokit.matrices import MatrixBlock
from orthokit.matrices.layout import Axes

__all__ = ["block_by_shape", "check_gradients"]


def block_by_shape(name: str, parameter: Tensor) -> MatrixBlock:
    """The reading of a bare parameter, where its module is unknown and only its shape speaks.

    Two dimensions are a matrix, three a batch of matrices, four and five a convolution ``(out, in, *kernel)`` flattened
    to ``(out, in * kernel)``. Use ``optim.for_model`` or ``matrices`` to let modules and names decide instead.

    Args:
        name: Name for messages and tables.
        parameter: The tensor; only its shape and dtype are read.

    Returns:
        One block that covers the whole parameter.

    Raises:
        ParameterError: Fewer than two or more than five dimensions.

    Example:
        >>> block_by_shape("conv.weight", torch.empty(8, 3, 5, 5)).shape
        (8, 75)
    """
    shape = tuple(parameter.shape)
    rules = {2: ("linear", 0), 3: ("stack", 1), 4: ("conv", 0), 5: ("conv", 0)}
    if len(shape) not in rules:
        raise ParameterError(
            f"an orthogonal optimizer updates matrices, and {name!r} of shape {shape} is none. Give it to AdamW, "
            "or let optim.for_model(model, ...) route every parameter."
        )
    rule, batch = rules[len(shape)]
    labels = ("batch",) * batch + ("out",) + ("in",) * (len(shape) - batch - 1)
    layout = Axes(shape, labels).layout()
    reason = f"{len(shape)} dimensions, read by shape"
    return MatrixBlock(name, name, layout, rule, reason, parameter.dtype, parameter.requires_grad)


@torch.no_grad()
def check_gradients(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if any gradient is sparse or holds a NaN or an infinity; called before the first parameter moves.

    Args:
        named: Pairs of a parameter's name and its gradient.

    Raises:
        NonFiniteError: A gradient is not finite; the message names every such parameter.
        ParameterError: A gradient is sparse.
    """
    pairs = [(name, grad) for name, grad in named if grad.numel()]
    if sparse := [name for name, grad in pairs if grad.is_sparse]:
        raise sparse_error(sparse)
    good = finite([grad for _, grad in pairs])
    if not all(good):
        raise nonfinite_error([name for (name, _), fine in zip(pairs, good, strict=True) if not fine])


def finite(grads: list[Tensor]) -> list[bool]:
    """Whether each tensor, none of them empty, holds finite values only."""
    if not grads:
        return []
    # The Euclidean norm costs a tenth of the maximum norm on CPUs, but overflows on large finite gradients: where it
    # does, the maximum decides.
    good = _finite(torch._foreach_norm(grads, 2))
    return good if all(good) else _finite(grad.abs().max() for grad in grads)


def sparse_error(names: Iterable[str]) -> ParameterError:
    """The error for sparse gradients of the named parameters."""
    listed = ", ".join(map(repr, names))
    return ParameterError(f"gradients must be dense; sparse in {listed}. Use sparse=False in their modules.")


def nonfinite_error(names: Iterable[str]) -> NonFiniteError:
    """The error for gradients of the named parameters that are not finite."""
    return NonFiniteError(
        f"gradients must be finite; NaN or infinity in {', '.join(map(repr, names))}. No parameter was changed; "
        "skip the step (zero_grad), lower the learning rate or clip."
    )


def _finite(values: Iterable[Tensor]) -> list[bool]:
    # One transfer for each kind of scalar, not one a scalar: with many small matrices those would be the step's cost.
    listed, kinds = list(values), defaultdict(list)
    for i, value in enumerate(listed):
        kinds[value.dtype, value.device].append(i)
    good = [True] * len(listed)
    for members in kinds.values():
        found = torch.stack([listed[i] for i in members]).isfinite().tolist()
        for i, fine in zip(members, found, strict=True):
            good[i] = fine
    return good
