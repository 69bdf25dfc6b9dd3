r"""A plain layer with adapters around it: stacked, switched, disabled, merged into its weight and taken out again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters.base import Adapter, AdapterLayer, PartConfig
from orthokit.adapters.sites import Kind, kind_of
from orthokit.errors import DtypeError, OptionError, ParameterError

__all__ = ["AdaptedLayer", "Inner"]


class AdaptedLayer(AdapterLayer):
    r"""A frozen layer and named adapters; the active ones act, in the order of :attr:`active`.

    ``T_1(T_2(... T_k(W)))`` for the active ``T_1, ..., T_k``: inputs pass ``T_1`` first, and ``T_k`` is closest to
    ``W``.

    Args:
        base: The layer; kept as it is, its parameters frozen.
        name: Its name in the model, for messages.

    Raises:
        ParameterError: No adapter can sit on such a layer.

    Example:
        >>> from orthokit.adapters import OFT
        >>> layer = AdaptedLayer(nn.Linear(8, 4))
        >>> layer.add("a", OFT(block_size=4))
        >>> layer.add("b", OFT(block_size=2))
        >>> layer.active, layer(torch.zeros(3, 8)).shape
        (('a', 'b'), torch.Size([3, 4]))
    """

    def __init__(self, base: nn.Module, *, name: str = "") -> None:
        super().__init__()
        kind = kind_of(base)
        if kind is None:
            raise ParameterError(f"{name or 'the layer'} is a {type(base).__name__}; no adapter can sit on it.")
        self.name, self.base = name, base
        self._kind: Kind = kind
        self.site = kind.site(base, name)
        self.out_features, self.in_features = self.site.out_features, self.site.in_features
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.disabled = False
        #: Names of the adapters that are in the weight of ``base`` now, and that weight before.
        self.folded: tuple[str, ...] = ()
        self._unfolded: Tensor | None = None
        #: Share of the way from the plain layer to the adapted one on outputs; 1 but for ``rewind(path="dense")``.
        self.blend = 1.0
        #: Which parameters of ``base`` took gradients before.
        self.trained_before = [p.requires_grad for p in base.parameters()]
        base.requires_grad_(False)
        self.train(base.training)

    def add(self, name: str, config: PartConfig, *, stream: int = 0) -> None:
        """A new adapter, active and after the others.

        Args:
            name: Not yet there; letters, digits, ``_`` and ``-``.
            config: Options.
            stream: Number of the layer in the model, for its randomness.

        Raises:
            OptionError: The name is taken or unfit, or the options do not suit the layer.
            ParameterError: Adapters are folded into the weight.
        """
        if not name.replace("_", "").replace("-", "").isalnum():
            raise OptionError(f"an adapter's name has letters, digits, '_' and '-'; got {name!r}.")
        if hasattr(nn.ModuleDict, name) or name == "training":
            raise OptionError(f"{name!r} is an attribute of nn.Module, so no adapter can have it; give another name.")
        if name in self.adapters:
            raise OptionError(f"{self.name or 'the layer'} has an adapter {name!r} already; give another name.")
        if self.folded:
            raise ParameterError(f"{self.name or 'the layer'} has {self.folded} merged in; call unmerge first.")
        # Since the last adapter the model may have been moved or cast.
        self.site = self._kind.site(self.base, self.name)
        part = config.part(self.site, lambda: self._matrix(part_view(config), self.site.dtype), stream=stream)
        if self.site.kind == "conv" and part.view == "channels" and not part.turns_inputs:
            raise OptionError(f"{config.kind} reads a convolution as patches only.")
        self.adapters[name] = part.train(self.training)
        self.active = (*self.active, name)

    def remove(self, name: str) -> None:
        """Take one adapter off.

        Raises:
            ParameterError: It is not there, or folded into the weight.
        """
        if name not in self.adapters:
            raise ParameterError(f"{self.name or 'the layer'} has no adapter {name!r}; it has {list(self.adapters)}.")
        if self.folded:
            raise ParameterError(f"{self.name or 'the layer'} has {self.folded} merged in; call unmerge first.")
        del self.adapters[name]
        self.active = tuple(one for one in self.active if one != name)

    def parts(self) -> list[Adapter]:
        """The adapters that act now, in order."""
        if self.disabled or self.folded:
            return []
        return [self._part(name) for name in self.active]

    def _part(self, name: str) -> Adapter:
        return self.adapters[name]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts()
        if not parts:
            return self._kind.call(self.base, x)
        if self.site.kind == "embedding":
            return self._blended(self._looked_up(parts, x), x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # What the plain layer would compute in; the adapters' own small matrices stay in full precision.
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return self._blended(self._forward(parts, x), x)
        expected = self._kind.dtype(self.base)
        if x.dtype != expected and not self._kind.casts:
            raise DtypeError(f"{self.name or 'the layer'} computes in {expected} and got {x.dtype} inputs.")
        return self._blended(self._forward(parts, x), x)

    def _forward(self, parts: list[Adapter], x: Tensor) -> Tensor:
        if not self._kind.rows and not all(part.turns_inputs and part.view == "channels" for part in parts):
            weight = self.effective_weight(dtype=self.work_dtype).to(x.dtype)
            return self._kind.call(self._at(x), x, weight=weight)
        scaled = any(part.scales_outputs for part in parts)
        bias = getattr(self.base, "bias", None)
        base = self._at(x)

        if not self._kind.rows:
            for part in parts:
                x = part.turn(x.movedim(1, -1)).movedim(-1, 1)
            return self._kind.call(base, x, bias=not scaled)
        y = Inner(self, parts, base, bias=not scaled)(x)
        return y + bias.to(y.dtype) if scaled and bias is not None else y

    def _at(self, x: Tensor) -> Any:
        """The base in the type of the inputs, which differ under autocast alone."""
        # Indices of an embedding have a type of their own.
        if self._kind.casts or self._kind.dtype(self.base) == x.dtype or not x.is_floating_point():
            return self.base
        return _Cast(self.base, x.dtype)

    def _looked_up(self, parts: list[Adapter], index: Tensor) -> Tensor:
        rows = self._kind.call(self.base, index)
        for part in reversed(parts):
            rows = part.look_up(rows, index)
        return rows

    def _blended(self, y: Tensor, x: Tensor) -> Tensor:
        if self.blend == 1.0:
            return y
        return torch.lerp(self._kind.call(self._at(x), x).to(y.dtype), y, self.blend)

    def _matrix(self, view: str, dtype: torch.dtype) -> Tensor:
        return self._kind.matrix(self.base, self._kind.weight(self.base, dtype).detach(), view)

    def effective_weight(self, *, dtype: torch.dtype | None = None) -> Float[Tensor, "*shape"]:
        """The weight of the plain layer that computes the same, as that layer lays it out; differentiable.

        Args:
            dtype: That it is computed in and given in; default ``None``: computed in at least float32, given in the
                layer's type.
        """
        work = self.work_dtype if dtype is None else dtype
        base = self._kind.weight(self.base, work).detach()
        weight = self._through(self.parts(), base)
        if self.blend != 1.0:
            weight = torch.lerp(base, weight, self.blend)
        return weight if dtype is not None else weight.to(self._kind.dtype(self.base))

    def _through(self, parts: list[Adapter], weight: Tensor) -> Tensor:
        if self.site.kind == "embedding":
            every = torch.arange(len(weight), device=weight.device)
            for part in reversed(parts):
                weight = part.look_up(weight, every)
            return weight
        for part in reversed(parts):
            matrix = self._kind.matrix(self.base, weight, part.view)
            weight = self._kind.unmatrix(self.base, part.merge(matrix), part.view)
        return weight

    @property
    def weight(self) -> Tensor:
        """As :meth:`effective_weight`: code that reads a layer's weight instead of calling it gets the adapted one."""
        return self.effective_weight() if self.parts() else self._kind.weight(self.base, self._kind.dtype(self.base))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return getattr(self.base, "bias", None)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The precision of merges: float64 where the device has it."""
        return torch.float32 if self._kind.device(self.base).type == "mps" else torch.float64

    @property
    def work_dtype(self) -> torch.dtype:
        """The type that weights are made in: that of the layer now, but at least float32."""
        return torch.promote_types(self._kind.dtype(self.base), torch.float32)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer that computes the same with the adapters active now; this layer stays as it is."""
        weight = self.effective_weight(dtype=self.dense_dtype).to(self._kind.dtype(self.base))
        return self._restored(self._kind.plain(self.base, weight))

    def original(self) -> nn.Module:
        """The plain layer that was there before, frozen until :meth:`release`.

        Raises:
            ParameterError: Adapters are folded into its weight.
        """
        if self.folded:
            raise ParameterError(f"{self.name or 'the layer'} has {self.folded} merged in; call unmerge first.")
        return self.base

    def release(self) -> None:
        """Give the parameters of the plain layer their gradients back: it leaves this one."""
        self._restored(self.base)

    def _restored(self, layer: nn.Module) -> nn.Module:
        # By name: a quantised layer has no weight among its parameters, and the plain one in its place does.
        names = (name for name, _ in self.base.named_parameters())
        trained = dict(zip(names, self.trained_before, strict=True))
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
        return layer.train(self.training)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the active adapters into the weight of the frozen layer; it keeps its old weight for :meth:`unfold`.

        Raises:
            ParameterError: They are folded already, or the frozen layer is quantised.
        """
        if self.folded:
            raise ParameterError(f"{self.name or 'the layer'} has {self.folded} merged in already.")
        parameter = getattr(self.base, "weight", None)
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point():
            raise ParameterError(f"{self.name or 'the layer'} is quantised; merge with keep=False makes a plain layer.")
        if not self.parts():
            return
        weight = self.effective_weight(dtype=self.dense_dtype)
        # The old bits are kept: in no precision would the inverse of a rotation give them back.
        self._unfolded = parameter.detach().clone()
        parameter.copy_(weight)
        self.folded = self.active

    @torch.no_grad()
    def unfold(self) -> None:
        """Give the frozen layer its weight back, bit for bit."""
        if self._unfolded is not None:
            self.base.weight.copy_(self._unfolded)  # type: ignore[union-attr,operator]
        self.folded, self._unfolded = (), None

    def describe(self) -> dict[str, Any]:
        """``adapter``, ``trainable`` and ``detail`` for the table of adapters."""
        kinds = [f"{name}: {part.config.kind}" for name, part in self._named()]
        trainable = sum(p.numel() for p in self.adapters.parameters() if p.requires_grad)
        notes = [text for _, part in self._named() if (text := part.detail())]
        if self.folded:
            notes.append(f"merged in: {', '.join(self.folded)}")
        elif self.disabled:
            notes.append("disabled")
        elif self.active != tuple(self.adapters):
            notes.append(f"active: {', '.join(self.active) or 'none'}")
        single = len(kinds) == 1 and "default" in self.adapters
        label = kinds[0].removeprefix("default: ") if single else ", ".join(kinds)
        return {"adapter": label, "trainable": trainable, "detail": "; ".join(notes)}

    def _named(self) -> list[tuple[str, Adapter]]:
        return [(name, self._part(name)) for name in self.adapters]

    def extra_repr(self) -> str:
        """Which adapters act."""
        return f"active={list(self.active)}" + (", disabled" if self.disabled else "")


class Inner:
    """What an adapter's :meth:`~orthokit.adapters.base.Adapter.around` stands around: the rest of the layer, inwards.

    Args:
        layer: The layer.
        parts: Its adapters that are closer to the weight, in order.
        base: The plain layer, in the type of the inputs.
        bias: Whether its bias is in the outputs.
    """

    def __init__(self, layer: AdaptedLayer, parts: list[Adapter], base: Any, *, bias: bool) -> None:
        self._layer, self._parts, self._base, self._bias = layer, parts, base, bias

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs for rows."""
        if not self._parts:
            return self._layer._kind.call(self._base, x, bias=self._bias)
        rest = Inner(self._layer, self._parts[1:], self._base, bias=self._bias)
        return self._parts[0].around(rest, x)

    def weight(self) -> Tensor:
        """Its effective weight as a matrix (out, in), in the type of the adapters; differentiable in them."""
        layer, kind = self._layer, self._layer._kind
        base = kind.weight(layer.base, layer.work_dtype).detach()
        return kind.matrix(layer.base, layer._through(self._parts, base), "patches")

    def dense(self, x: Tensor, W: Tensor) -> Tensor:
        """Outputs for rows with the matrix ``W`` in the place of its weight."""
        kind = self._layer._kind
        weight = kind.unmatrix(self._layer.base, W, "patches").to(x.dtype)
        return kind.call(self._base, x, weight=weight, bias=self._bias)


class _Cast:
    """A frozen layer seen in another type, as autocast would call it."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._layer, name)
        return found.to(self._dtype) if isinstance(found, Tensor) and found.is_floating_point() else found

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self._dtype):
            return self._layer(x)


def part_view(config: PartConfig) -> str:
    """How the adapters of these options read the weight of a convolution."""
    return getattr(config, "conv", "patches")
