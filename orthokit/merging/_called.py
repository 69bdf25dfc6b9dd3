"""A block of a network as a function of its parameters and of its input, and how far apart two outputs are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, unknown_name

__all__ = [
    "DISTANCES",
    "Call",
    "Called",
    "check_fit",
    "check_parameters",
    "distances",
    "find_blocks",
    "twice_differentiable",
    "width_of",
]

Call: TypeAlias = Callable[[nn.Module, Tensor], Tensor]
DISTANCES = ("cosine", "l2", "l1")


class Called(nn.Module):
    """A frozen copy of a block in evaluation mode, run on given parameters.

    Args:
        block: Copied, in float32 at least.
        call: How it is run on hidden states.
    """

    def __init__(self, block: nn.Module, call: Call | None) -> None:
        super().__init__()
        self.block = copy.deepcopy(block).eval().requires_grad_(False)
        for module in (*self.block.parameters(), *self.block.buffers()):
            if module.is_floating_point() and module.element_size() < 4:
                module.data = module.data.float()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        """The block's output on hidden states, whatever it is."""
        return self.block(x) if self.call is None else self.call(self.block, x)

    def on(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output with other parameters, by name; default the block's own."""
        if parameters is None:
            found = self(x)
        else:
            found = functional_call(self, {f"block.{name}": value for name, value in parameters.items()}, (x,))
        if not isinstance(found, Tensor):
            raise DtypeError(
                f"a block must put out one tensor; got {type(found).__name__}. Take it apart with call=, such as "
                "lambda block, x: block(x)[0]."
            )
        if found.ndim < 2 or len(found) != len(x):
            raise ShapeError(
                f"a block must put out hidden states for each of {len(x)} inputs; got shape {tuple(found.shape)}."
            )
        return found

    def own(self) -> dict[str, Tensor]:
        """The block's parameters by name."""
        return dict(self.block.named_parameters())


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Attention out of plain products: the fused kernels have no derivative of their derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def distances(outputs: Tensor, targets: Tensor, distance: str) -> Tensor:
    r"""Distance of each output to its target, over all its tokens at once: ``(n,)``.

    ``cosine``: $1-\cos$; ``l2``: half the squared norm of the difference; ``l1``: sum of absolute differences.
    """
    if distance not in DISTANCES:
        raise unknown_name("distance", distance, DISTANCES)
    a, b = outputs.flatten(1), targets.flatten(1)
    if distance == "cosine":
        return 1 - nn.functional.cosine_similarity(a, b, dim=-1)
    difference = a - b
    return 0.5 * difference.square().sum(-1) if distance == "l2" else difference.abs().sum(-1)


def check_fit(block0: nn.Module, block1: nn.Module, *, what: str = "block1") -> None:
    """Raise unless both have parameters of the same names and shapes."""
    own, other = dict(block0.named_parameters()), dict(block1.named_parameters())
    if not own:
        raise OptionError(f"the block ({type(block0).__name__}) has no parameters; there is nothing to merge.")
    if own.keys() != other.keys():
        odd = sorted(own.keys() ^ other.keys())
        raise ShapeError(f"{what} must be built like the base; parameters in one of them only: {odd[:3]} ({len(odd)}).")
    for name, p in own.items():
        if p.shape != other[name].shape:
            raise ShapeError(
                f"{what} must be built like the base; {name} has shape {tuple(other[name].shape)} and not "
                f"{tuple(p.shape)}."
            )


def check_parameters(block: nn.Module, *, what: str) -> None:
    """Raise unless all parameters are floating and finite."""
    for name, p in block.named_parameters():
        if not p.is_floating_point():
            raise DtypeError(f"{name} of {what} must be floating; got {p.dtype}.")
        if not bool(torch.isfinite(p).all()):
            raise NonFiniteError(f"{what} holds a NaN or an infinity in {name}; leave that checkpoint out.")


def width_of(block: nn.Module) -> int:
    """The width of the hidden states: the commonest number of columns among its matrices, the first of equals."""
    columns = [p.shape[1] for p in block.parameters() if p.ndim == 2]
    if not columns:
        raise OptionError(f"{type(block).__name__} has no matrix that shows the width of its input; give width=.")
    return max(dict.fromkeys(columns), key=columns.count)


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | Callable[[str, nn.Module], bool]) -> list[str]:
    """Names of the modules that are blocks, in the model's order; of modules inside each other the outer one."""
    named = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters())}
    if callable(blocks):
        chosen = {name for name, module in named.items() if blocks(name, module)}
        if not chosen:
            raise OptionError("blocks() holds for none of the model's modules; make it hold for at least one.")
    else:
        chosen = set()
        for pattern in [blocks] if isinstance(blocks, str) else blocks:
            # The whole model is a block only where it is asked for by its empty name.
            found = {name for name in named if name == pattern or (name and fnmatchcase(name, pattern))}
            if not found:
                raise unknown_name("block", pattern, (name for name in named if name.count(".") < 3))
            chosen |= found
        if not chosen:
            raise OptionError("blocks is empty; name at least one module, such as 'blocks.*'.")
    outer = [name for name in named if name in chosen and not any(_inside(name, other) for other in chosen)]
    _check_apart(model, outer)
    return outer


def _inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(other + "."))


def _check_apart(model: nn.Module, blocks: Sequence[str]) -> None:
    """Raise where a parameter of a block is used elsewhere, too: it cannot have two values."""
    homes: dict[int, str | None] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        home = next((block for block in blocks if _inside(name, block)), None)
        if homes.setdefault(id(p), home) != home:
            raise OptionError(
                f"{name} is shared between {homes[id(p)]!r} and {home!r}; merge such blocks as one module."
            )
