r"""What the rotations of inputs share: rows and weights through one set of factors, kept while nothing changes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from orthokit.adapters.base import Adapter
from orthokit.adapters.sites import Site
from orthokit.errors import NonFiniteError, unknown_name

__all__ = ["Rotating", "check_conv", "parameter", "plain_autograd", "width_of"]

# Rows of the identity at a time, where a whole rotation is looked at.
_CHUNK = 512
_VIEWS = ("channels", "patches")


def width_of(site: Site, conv: str) -> int:
    """The number of coordinates that an adapter of the inputs turns."""
    if site.kind == "conv" and conv == "patches":
        return site.in_features // site.groups * site.patch
    return site.in_features


def plain_autograd() -> bool:
    """Whether a backward pass written by hand is out of place: a compiler or a transform of functions looks on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class Rotating(Adapter):
    r"""An adapter ``W -> W R`` with ``R`` near to orthogonal, made of factors: ``turn(x) = x R^T``.

    While gradients are off, factors are made once and kept until the parameters change. A change is seen by the
    version that PyTorch counts, by the place in memory, and on a CPU by the values themselves; ``train()``, ``eval()``
    and any pass with gradients forget what was kept.
    """

    _kept: tuple[Any, list[Tensor], Any] | None = None

    @abstractmethod
    def factors(self, dtype: torch.dtype, *, drop: bool = False) -> Any:
        """What the rows are multiplied with, in ``dtype``, differentiable.

        Args:
            dtype: Of the result; the factors are made in at least the type of the parameters.
            drop: Apply dropout, if there is any.
        """

    @abstractmethod
    def through(self, factors: Any, x: Float[Tensor, "*rows in"], *, transposed: bool) -> Float[Tensor, "*rows in"]:
        """``x R``, or ``x R^T``."""

    @property
    def drops(self) -> bool:
        """Whether factors are random now."""
        return False

    def turn(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        r"""``x R^T``, in the type of ``x``."""
        if self.strength == 0:
            return x
        return self.through(self._ready(x.dtype), x, transposed=True)

    def look_up(self, rows: Float[Tensor, "*rows in"], index: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows in"]:
        """Rows ``index`` of ``W R`` from those of ``W``: they are rows of the weight, so they are turned as it is."""
        if self.strength == 0:
            return rows
        return self.through(self._ready(rows.dtype), rows, transposed=False)

    def merge(self, W: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch out in"]:
        """``W R``, differentiable, computed in at least the type of the parameters.

        Raises:
            NonFiniteError: A parameter is not finite, and gradients are off: a training step hands NaN on to the loss.
        """
        self.check_finite()
        if self.strength == 0:
            return W
        work = torch.promote_types(W.dtype, self.dtype)
        return self.through(self.factors(work), W.to(work), transposed=False).to(W.dtype)

    def check_finite(self) -> None:
        """Raise if a parameter holds a NaN or an infinity, unless gradients are on."""
        if torch.is_grad_enabled() or plain_autograd():
            return
        for name, parameter in self.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"the {name} of {self.config.kind} on {self.site.name or 'the layer'!r} must be finite; "
                    "it holds NaN or infinite entries. Go back to an earlier checkpoint and train with a lower rate."
                )

    @torch.no_grad()
    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "in in"]:
        """``R`` as one matrix, for tests, angles and small widths.

        Args:
            dtype: Default :attr:`precise`.
        """
        dtype = self.precise if dtype is None else dtype
        eye = torch.eye(width_of(self.site, self.view), dtype=dtype, device=self.device)
        return eye if self.strength == 0 else self.through(self.factors(dtype), eye, transposed=False)

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """``max |R^T R - I|``, of the factors as they are in the type of the parameters."""
        if self.strength == 0:
            return 0.0
        factors, width, worst = self.factors(self.dtype), width_of(self.site, self.view), 0.0
        eye = torch.eye(width, dtype=self.dtype, device=self.device)
        for rows in eye.split(_CHUNK):
            turned = self.through(factors, self.through(factors, rows, transposed=True), transposed=False)
            worst = max(worst, float((turned - rows).abs().max()))
        return worst

    @property
    def device(self) -> torch.device:
        """Where the parameters are now."""
        return next(self.parameters()).device

    @property
    def precise(self) -> torch.dtype:
        """Float64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def dtype(self) -> torch.dtype:
        """The type that factors are made in: that of the parameters now, but at least float32.

        Sharding in mixed precision hands over parameters in less for the length of a pass.
        """
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    def train(self, mode: bool = True) -> Rotating:
        """As for any module; kept factors are forgotten."""
        self._kept = None
        return super().train(mode)

    def _ready(self, dtype: torch.dtype) -> Any:
        if plain_autograd():
            return self.factors(dtype, drop=True)
        if torch.is_grad_enabled() or self.drops:
            self._kept = None
            return self.factors(dtype, drop=True)
        parameters = list(self.parameters())
        key = (self.strength, dtype, *((p._version, p.data_ptr(), p.dtype, type(p)) for p in parameters))
        if self._kept is not None and self._kept[0] == key:
            # Writing to p.data counts no version. On a CPU comparing costs less than making the factors again.
            pairs = zip(self._kept[1], parameters, strict=True)
            if all(p.device.type != "cpu" or torch.equal(old, p) for old, p in pairs):
                return self._kept[2]
        made = self.factors(dtype)
        copies = [p.detach().clone() if p.device.type == "cpu" else p.detach() for p in parameters]
        self._kept = (key, copies, made)
        return made


def check_conv(conv: str) -> None:
    """Raise unless ``conv`` is a view of a convolution."""
    if conv not in _VIEWS:
        raise unknown_name("conv", conv, _VIEWS)


def parameter(tensor: Tensor, site: Site) -> nn.Parameter:
    """A parameter in the type and on the device of the site."""
    return nn.Parameter(tensor.to(device=site.device, dtype=site.dtype))
