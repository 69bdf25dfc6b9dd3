r"""Linear layers over a quantised frozen weight, for adapters to sit on (QOFT, QLoRA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from orthokit.adapters._codes import Codes, decode, layout_of, product
from orthokit.adapters.attach import _replace
from orthokit.adapters.lora import LoRA
from orthokit.adapters.quantization import group_absmax
from orthokit.adapters.sites import KINDS, Kind, kind_of
from orthokit.adapters.targets import Targets, check_layers, chosen_layers, shared_weights
from orthokit.errors import DtypeError, NonFiniteError, ParameterError, ShapeError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["QuantizedLinear", "quantize_linears", "requantize"]


class QuantizedLinear(nn.Module):
    r"""A linear layer whose frozen weight is stored in eight or four bits: ``y = x dense(codes)^T + bias``.

    Args:
        in_features: Width of the inputs.
        out_features: Width of the outputs.
        bias: Whether there is one; default ``True``.
        scheme: ``"nf4"`` (default), ``"int8"`` or ``"uint8"``.
        group_size: Entries that share a scale; default ``None``: 64 for ``"nf4"``, 128 for ``"int8"``, 256 for
            ``"uint8"``.
        double: Scales in eight bits; default ``None``: for ``"nf4"`` alone.
        dtype: Of the bias, of :attr:`weight` and of merged layers; default float32. Inputs may have any floating type.
        weight: The matrix to store; default ``None``: zeros, for a state dict to fill.

    Raises:
        OptionError: An option out of range.
        UnknownNameError: Unknown scheme.

    Example:
        >>> layer = QuantizedLinear.from_linear(nn.Linear(256, 64))
        >>> x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(layer(x), F.linear(x, layer.dense(), layer.bias)), round(layer.bits_per_weight, 2)
        (True, 4.13)

    Numerics:
        The weight is decoded in float32, once for the outputs and once more for the gradient of the inputs; nothing
        dense is kept between them. It has no gradient. Scales stay in float32 under ``.to(torch.bfloat16)``.

    References:
        T. Dettmers et al. (2023), QLoRA, arXiv 2305.14314, section 3, for ``"nf4"`` and double quantisation; there
        groups run on from row to row, and here each row has its own.
    """

    bias: nn.Parameter | None
    compute: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        scheme: str = "nf4",
        group_size: int | None = None,
        double: bool | None = None,
        dtype: torch.dtype = torch.float32,
        weight: Float[Tensor, "out in"] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout_of(scheme, group_size, double, out_features, in_features)
        self.matrix = Codes(self.layout, torch.zeros(out_features, in_features) if weight is None else weight)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, dtype=dtype)) if bias else None)
        # Empty: it takes on the type that the model is cast to.
        self.register_buffer("compute", torch.empty(0, dtype=dtype, device=self.matrix.codes.device), persistent=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, scheme: str = "nf4", group_size: int | None = None, double: bool | None = None
    ) -> QuantizedLinear:
        """The quantised copy of a linear layer; its bias is the same parameter.

        Args:
            linear: ``nn.Linear``, or GPT-2's ``Conv1D``; not changed.
            scheme: As for the class, like what follows.
            group_size: Default ``None``.
            double: Default ``None``.

        Raises:
            ParameterError: No linear layer.
            DtypeError: Its weight is not a real floating tensor.
            NonFiniteError: It has entries that are not finite.
        """
        kind = kind_of(linear)
        if kind is None or kind.name not in ("linear", "conv1d_transposed"):
            raise ParameterError(
                f"only linear layers with a plain weight can be quantised; got {type(linear).__name__}."
            )
        weight = kind.weight(linear, kind.dtype(linear)).detach()
        if not weight.is_floating_point():
            raise DtypeError(f"only real floating weights can be quantised; got {weight.dtype}.")
        if not bool(weight.isfinite().all()):
            raise NonFiniteError("the weight has entries that are not finite; no scale holds them.")
        W = kind.matrix(linear, weight, "patches")
        options: dict[str, Any] = {"scheme": scheme, "group_size": group_size, "double": double}
        layer = cls(W.shape[1], W.shape[0], bias=False, dtype=weight.dtype, weight=W, **options)
        layer.bias = getattr(linear, "bias", None)
        return layer.train(linear.training)

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The weight, made anew at each call."""
        return decode(self.matrix.stored(), self.layout, dtype)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """:meth:`dense` in the type of the layer, for code that reads a weight instead of calling its layer."""
        return self.dense(self.compute.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for an entry, scales and zero points counted."""
        stored = sum(tensor.numel() * tensor.element_size() for tensor in self.matrix.stored())
        return 8 * stored / max(1, self.in_features * self.out_features)

    def product(self, x: Float[Tensor, "*rows in"], *, bias: bool = True) -> Float[Tensor, "*rows out"]:
        """The layer on inputs, with or without its bias, in the type of ``x``."""
        return product(x, self.bias if bias else None, self.layout, self.matrix.stored())

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return self.product(x)
        with torch.autocast(device, enabled=False):
            return self.product(x.to(torch.get_autocast_dtype(device)))

    def extra_repr(self) -> str:
        """Sizes and scheme."""
        scheme = f"scheme={self.layout.scheme!r}, group_size={self.layout.group_size}, double={self.layout.double}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {scheme}"


class _QuantizedKind(Kind):
    """:class:`QuantizedLinear` as a place for adapters."""

    name = "quantized_linear"
    casts = True

    def fits(self, layer: nn.Module) -> bool:
        return type(layer) is QuantizedLinear

    def dtype(self, layer: Any) -> torch.dtype:
        return layer.compute.dtype

    def device(self, layer: Any) -> torch.device:
        return layer.matrix.codes.device

    def weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        return layer.dense(dtype)

    def call(self, layer: Any, x: Tensor, *, weight: Tensor | None = None, bias: bool = True) -> Tensor:
        if weight is None:
            return layer(x) if bias else layer.product(x, bias=False)
        return dense_product(layer, x, weight, bias)

    def plain(self, layer: Any, weight: Tensor) -> nn.Module:
        return plain_linear(layer, weight)


def dense_product(layer: Any, x: Tensor, weight: Tensor, bias: bool) -> Tensor:
    """A layer's outputs with a dense weight in the place of its own."""
    add = layer.bias if bias else None
    return F.linear(x, weight, None if add is None else add.to(x.dtype))


def plain_linear(layer: Any, weight: Tensor) -> nn.Linear:
    """``nn.Linear`` with this weight and a copy of the bias of a quantised layer."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    if layer.bias is not None:  # bitsandbytes casts it to the inputs it last saw
        linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype, copy=True))
    return linear


KINDS.append(_QuantizedKind())


def quantize_linears(
    model: nn.Module,
    *,
    scheme: str = "nf4",
    targets: Targets = "linear",
    group_size: int | None = None,
    double: bool | None = None,
) -> pd.DataFrame:
    """Replace linear layers of a model by quantised ones, in place, and say what it cost.

    Args:
        model: Any module that is not itself the layer.
        scheme: ``"nf4"`` (default), ``"int8"`` or ``"uint8"``.
        targets: As for :func:`orthokit.adapters.attach`; default ``"linear"``.
        group_size: As for :class:`QuantizedLinear`; default ``None``.
        double: Default ``None``.

    Returns:
        One row per layer: ``layer``, ``shape``, ``scheme``, ``bits_per_weight``, ``relative_error`` (Frobenius norm of
        the difference over that of the weight) and ``largest_error`` (of an entry, over the largest entry).

    Raises:
        ParameterError: Nothing matched, or a layer is no plain linear one, carries hooks or shares its weight. Nothing
            was changed.
        OptionError: An option out of range.
        NonFiniteError: A weight has entries that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> frame = quantize_linears(model, scheme="int8")
        >>> bool((frame["relative_error"] < 0.01).all()), type(model[0]).__name__
        (True, 'QuantizedLinear')
    """
    import pandas as pd

    layout_of(scheme, group_size, double, 0, 0)
    chosen = chosen_layers(model, targets, LoRA())
    check_layers(model, chosen, LoRA())
    shared = shared_weights(model)
    if model in chosen.values():
        raise ParameterError("a bare layer cannot be replaced in place; call QuantizedLinear.from_linear on it.")
    new: dict[nn.Module, nn.Module] = {}
    rows = []
    for name, layer in chosen.items():
        kind = kind_of(layer)
        if kind is None or kind.name not in ("linear", "conv1d_transposed"):
            raise ParameterError(
                f"{name!r} is a {type(layer).__name__}, no plain linear layer; leave it out of targets."
            )
        if name in shared:
            leaf, others = shared[name]
            raise ParameterError(
                f"{name!r} shares its {leaf} ({others}); quantising it would untie them; leave it out."
            )
        made = QuantizedLinear.from_linear(layer, scheme=scheme, group_size=group_size, double=double)
        W = kind.matrix(layer, kind.weight(layer, torch.float32).detach(), "patches")
        rows.append({"layer": name, "shape": tuple(W.shape), "scheme": scheme, **_cost(made, W)})
        new[layer] = made
    _replace(model, new)
    return pd.DataFrame(rows)


def requantize(layer: nn.Linear, *, like: QuantizedLinear) -> tuple[QuantizedLinear, dict[str, float]]:
    r"""The merged weight of an adapter back in the codes of its base, and what merging and rounding did to it.

    A rotation of the inputs keeps the length of every row, ``|w R| = |w|``, so the scales of a row stay of the same
    size; a low-rank change need not. It does not keep the range of a group: entries move between groups, and an
    outlier may be spread out or made.

    Args:
        layer: Plain layer with the merged weight.
        like: The quantised layer that the adapter sat on: its scheme and groups are taken.

    Returns:
        The quantised layer, and: ``relative_error`` of quantising; ``row_norm_change``, the largest relative change of
        a row's length by merging, and ``row_norm_change_quantized``, by merging and quantising; ``range_growth`` and
        ``range_growth_mean``, the largest and the mean ratio of a group's largest entry after merging to before
        (groups that were 0 before left out; ``nan`` if all were).

    Raises:
        ShapeError: The shapes differ.

    Example:
        >>> from orthokit.linalg import polar
        >>> base = QuantizedLinear.from_linear(nn.Linear(64, 32))
        >>> R = polar(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        >>> merged = nn.Linear(64, 32)
        >>> with torch.no_grad():
        ...     _ = merged.weight.copy_(base.dense(torch.float64) @ R)
        >>> _, report = requantize(merged, like=base)
        >>> report["row_norm_change"] < 1e-5 < report["relative_error"] < 0.2, report["range_growth"] > 1.05
        (True, True)

    References:
        Z. Qiu et al. (2025), OFTv2, arXiv 2506.19847, section on requantisation, which says that the dynamic range is
        kept; of rows' lengths that is true, of entries it is not.
    """
    W = layer.weight.detach().float()
    before = like.dense()
    if W.shape != before.shape:
        raise ShapeError(f"the layer is {tuple(W.shape)} and the quantised one {tuple(before.shape)}; give its own.")
    layout = like.layout
    made = QuantizedLinear.from_linear(layer, scheme=layout.scheme, group_size=layout.group_size, double=layout.double)
    old, new = (group_absmax(X, group_size=layout.group_size) for X in (before, W))
    growth = (new / old)[old > 0]
    report = {
        "relative_error": _cost(made, W)["relative_error"],
        "row_norm_change": _row_change(W, before),
        "row_norm_change_quantized": _row_change(made.dense(), before),
        "range_growth": float(growth.max()) if len(growth) else float("nan"),
        "range_growth_mean": float(growth.mean()) if len(growth) else float("nan"),
    }
    return made, report


def _cost(made: QuantizedLinear, W: Tensor) -> dict[str, float]:
    error = made.dense() - W
    size, largest = float(torch.linalg.vector_norm(W)), float(W.abs().max()) if W.numel() else 0.0
    return {
        "bits_per_weight": made.bits_per_weight,
        "relative_error": float(torch.linalg.vector_norm(error)) / size if size else 0.0,
        "largest_error": float(error.abs().max()) / largest if largest else 0.0,
    }


def _row_change(after: Tensor, before: Tensor) -> float:
    """The largest relative change of the length of a row that was not 0."""
    a, b = torch.linalg.vector_norm(after, dim=1), torch.linalg.vector_norm(before, dim=1)
    return float(((a / b)[b > 0] - 1).abs().max()) if bool((b > 0).any()) else 0.0
