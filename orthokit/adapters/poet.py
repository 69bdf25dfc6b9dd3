r"""POET: a frozen weight between two trainable rotations, merged and drawn anew every so often."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from orthokit.adapters._forward import Frozen, Places, input_centric, weight_centric
from orthokit.adapters._initialise import INITIALISATIONS, initial_weight, stream_generator
from orthokit.adapters._ledger import Ledger
from orthokit.adapters._rotation import SkewMap
from orthokit.adapters.base import AdapterConfig, AdapterLayer
from orthokit.adapters.block_rotation import BlockRotation, rotate_sides, rotations_of, side_sizes
from orthokit.adapters.quantization import quantize
from orthokit.errors import DtypeError, OptionError, ParameterError, unknown_name
from orthokit.linalg import random_permutation

__all__ = ["POET", "POETLinear"]

VARIANTS = ("block", "full")
MEMORY = ("fast", "low", "weight")
QUANTIZE = (None, "uint8")
_IN, _OUT, _WEIGHT = range(3)


@dataclass(frozen=True)
class POET(AdapterConfig):
    r"""Options of POET: training by rotations of a frozen random (or pretrained) weight.

    ``W_eff = A_out W A_in``, with ``A = Psi^T Diag(f(Q_1), ..., f(Q_k)) Psi`` for a random order ``Psi`` of the
    coordinates and trainable skew ``Q_j`` that begin at 0. Every so often ``W <- W_eff``, the orders are drawn anew and
    ``Q <- 0``. The singular values of ``W`` are those it began with, up to the error of ``f``.

    Args:
        block_size: ``b``: coordinates of a block, ``>= 2``; for ``variant="full"`` also a share of the side in (0, 1],
            as a float. A size that ``b`` does not divide gets a smaller last block; a side below ``b`` is one block.
        variant: ``"block"`` (default): blocks cover every coordinate of both sides. ``"full"``: one block a side, over
            a random subset; the rest is at rest until the next merge.
        merge_every: Updates between merges, ``>= 1``, or ``None`` for none by count; default 200.
        merge_angle: Merge a layer once it turns some plane by more than this, in (0, pi) radians; default ``None``.
            A map's error grows with a high power of the angle, and a count is blind to it.
        map: ``f``, of ``linalg.MAPS``; default ``"cayley_neumann"``, as published. ``"cayley"`` is exactly orthogonal
            and on a CPU no dearer: an inverse and two products for forward and backward, against six products.
        terms: ``k`` of ``"cayley_neumann"``; default 3, as published. It shrinks singular values by ``theta^4`` and is
            singular at ``theta = 1``; 4 costs one product more and errs by ``theta^10 / 2``: take 4.
        order: ``p`` of ``"exp_taylor"``; default 4.
        polish: Newton-Schulz steps on every block when it is merged, ``>= 0``; default 0. They undo what the map did
            to singular values since the last merge, so the function moves by as much.
        init: The frozen weight: ``"keep"`` (default) that of the layer; ``"normalised"`` Gaussian rows of length 1
            (best in the published ablation); ``"uniform_spectrum"`` a polar factor; ``"xavier"``; ``"standard"``,
            standard deviation 0.02.
        scale: Factor on that weight, ``> 0``; default 1. As the spectrum never changes, it stays for life.
        memory: ``"fast"`` (default) keeps ``b = W a`` for the backward pass, ``"low"`` only the input; both, as
            published, never form the effective weight. ``"weight"`` keeps only the input and forms the weight in each
            pass: one layer's weight and gradient live for a moment. On a CPU it is the fastest of the three from about
            twice as many rows as the width on, and slower than ``"fast"`` below.
        quantize: ``None`` (default), or ``"uint8"``: the frozen weight in eight bits.
        group_size: Entries that share a scale, ``>= 2``; default 256.
        seed: Of orders and initial weights; default 0.

    Raises:
        OptionError: An option out of range.
        UnknownNameError: Unknown variant, map, initialisation, memory mode or quantisation.

    Example:
        >>> from orthokit.adapters import attach, merge
        >>> model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 12))
        >>> x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
        >>> before = model(x)
        >>> _ = attach(model, POET(block_size=4, map="cayley"))
        >>> torch.allclose(model(x), before, atol=1e-5)  # attaching changes nothing
        True
        >>> type(merge(model)[0]).__name__
        'Linear'

    Numerics:
        ``(out + in) (b - 1) / 2`` trainable numbers a layer where ``b`` divides both. Generators and maps are in at
        least float32, merges in float64. ``adapters.spectrum_report`` says how far singular values moved, and why.

    References:
        Z. Qiu et al. (2025), Reparameterized LLM training via orthogonal equivalence transformation, arXiv 2506.08001;
        Z. Qiu et al. (2026), POET-X, arXiv 2603.05500, for the input-centric form, memory modes and quantisation.
        Ours: any map and length, a merge by angle, ``memory="weight"``, the rule for sizes that ``b`` does not divide;
        ``attach`` keeps the function (the weight is permuted beforehand) and so does a merge (the bias is added last).
    """

    block_size: int | float
    variant: str = "block"
    merge_every: int | None = 200
    merge_angle: float | None = None
    map: str = "cayley_neumann"
    terms: int = 3
    order: int = 4
    polish: int = 0
    init: str = "keep"
    scale: float = 1.0
    memory: str = "fast"
    quantize: str | None = None
    group_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        known = (("variant", VARIANTS), ("init", INITIALISATIONS), ("memory", MEMORY), ("quantize", QUANTIZE))
        for name, choices in known:
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        _check_block_size(self.block_size, self.variant)
        SkewMap(self.map, self.terms, self.order)
        for name, least in (("merge_every", 1), ("polish", 0), ("group_size", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} must be at least {least}; got {value}.")
        if self.merge_angle is not None and not 0 < self.merge_angle < math.pi:
            raise OptionError(f"merge_angle must be in (0, pi) radians; got {self.merge_angle}.")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise OptionError(f"scale must be a number greater than 0; got {self.scale}.")

    def wrap(
        self, linear: nn.Linear, *, name: str = "", stream: int = 0, keep_base: bool = True, track_spectrum: bool = True
    ) -> POETLinear:
        """A :class:`POETLinear` in the place of ``linear``; see :func:`orthokit.adapters.attach`."""
        return POETLinear(linear, self, name=name, stream=stream, keep_base=keep_base, track_spectrum=track_spectrum)


def _check_block_size(block_size: int | float, variant: str) -> None:
    if isinstance(block_size, float):
        if variant != "full" or not 0 < block_size <= 1:
            raise OptionError(
                f"block_size must be an integer, or with variant='full' a share in (0, 1]; got {block_size} "
                f"with variant={variant!r}."
            )
    elif block_size < 2:
        raise OptionError(f"block_size must be at least 2, as one coordinate cannot turn; got {block_size}.")


class POETLinear(AdapterLayer):
    r"""A linear layer whose weight is ``A_out W A_in``, never formed in the forward pass.

    ``y = ((x[p_in] D_in^T) W^T D_out^T)[p_out^{-1}] + bias``: two gathers, two batches of small products around the
    frozen one, whose rows and columns are stored in the order of the blocks.

    Args:
        linear: The layer to replace.
        config: Options.
        name: Name in the model, for messages.
        stream: Number in the model: layers draw different orders from one seed.
        keep_base: Keep a copy of the weight (and bias) for :meth:`original`.
        track_spectrum: Keep the singular values of the initial weight.

    Example:
        >>> layer = POETLinear(nn.Linear(6, 4), POET(block_size=2))
        >>> layer(torch.zeros(5, 6)).shape, sum(p.numel() for p in layer.parameters() if p.requires_grad)
        (torch.Size([5, 4]), 9)
    """

    bias: nn.Parameter | None
    frozen_weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    base_weight: Tensor | None
    base_bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        config: POET,
        *,
        name: str = "",
        stream: int = 0,
        keep_base: bool = True,
        track_spectrum: bool = True,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if not weight.is_floating_point():
            raise DtypeError(f"POET rotates real floating weights; that of {name!r} is {weight.dtype}.")
        self.config, self.name, self.stream = config, name, stream
        self.out_features, self.in_features = weight.shape
        self._dtype, self._trainable = weight.dtype, linear.weight.requires_grad
        spec = SkewMap(config.map, config.terms, config.order)
        options: dict[str, Any] = {
            "recompute": config.memory != "fast",
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        sizes = [side_sizes(dim, config.block_size, config.variant) for dim in (self.in_features, self.out_features)]
        self.input = BlockRotation(self.in_features, sizes[_IN], spec, **options)
        self.output = BlockRotation(self.out_features, sizes[_OUT], spec, **options)
        self.register_parameter("bias", linear.bias)
        self.register_buffer("base_weight", weight.clone() if keep_base else None)
        kept_bias = linear.bias.detach().clone() if keep_base and linear.bias is not None else None
        self.register_buffer("base_bias", kept_bias)
        W = initial_weight(weight, config.init, config.scale, stream_generator(config.seed, stream, _WEIGHT, 0))
        self.ledger = Ledger.of(W, track_spectrum=track_spectrum)
        if config.quantize is None:
            self.frozen_weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
            self.scale = self.zero = None
        else:
            codes, scale, zero = quantize(W, group_size=config.group_size)
            self.register_buffer("frozen_weight", codes)
            self.register_buffer("scale", scale)
            self.register_buffer("zero", zero)
        self._draw()
        self._store(self._ordered(W))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> POETLinear:
        # A rounded scale would scale the whole spectrum of its group: a cast of the model leaves it in float32.
        moved = super()._apply(lambda t: t.to(fn(t).device) if t is self.scale else fn(t), recurse)
        if self.scale is not None:
            self._dtype = fn(self.scale.new_empty(0, dtype=self._dtype)).dtype
        return moved

    @property
    def dtype(self) -> torch.dtype:
        """The type that inputs have and the layer computes in."""
        return self.frozen_weight.dtype if self.scale is None else self._dtype

    def extra_repr(self) -> str:
        """Sizes and modes."""
        stored = f", quantize={self.config.quantize!r}" if self.config.quantize else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{stored}"

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            # The maps stay in full precision; the layer's products take the type that a plain layer's would.
            with torch.autocast(kind, enabled=False):
                return self._forward(x.to(torch.get_autocast_dtype(kind)))
        if x.dtype != self.dtype:
            raise DtypeError(f"{self.name or 'the layer'} holds {self.dtype} weights and got {x.dtype} inputs.")
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        left, right = ([R.to(x.dtype) for R in stacks] for stacks in rotations_of(self.output, self.input))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        places = Places(self.input.index, self.input.inverse, self.output.index, self.output.inverse)
        if self.config.memory == "weight":
            return weight_centric(x, bias, self._frozen(), places, left, right)
        return input_centric(x, bias, self._frozen(), places, left, right, low=self.config.memory == "low")

    def effective_weight(self) -> Float[Tensor, "out in"]:
        """The weight of the plain layer that computes the same; differentiable in the generators.

        Returns:
            Shape ``(out, in)``, in the type of the layer.
        """
        left, right = ([R.to(self.dtype) for R in stacks] for stacks in rotations_of(self.output, self.input))
        return self._placed(rotate_sides(self._frozen().dense(self.dtype), left, right))

    @torch.no_grad()
    def merge_(self) -> None:
        """Put the rotations into the frozen weight and begin new ones at the identity, in new orders.

        Raises:
            NonFiniteError: A generator is not finite.
        """
        W = self.dense()
        left, right = self.exact_rotations()
        law = self.output.log_growth(left) + self.input.log_growth(right)
        expected = sum(side.expected_log_growth(polish=self.config.polish) for side in (self.output, self.input))
        angle = max(side.largest_angle(tol=1e-2) for side in (self.output, self.input))
        turned = rotate_sides(W, left, right)
        self.ledger.merged(angle=angle, law=law, expected=expected, before=W, after=turned)
        turned = self._placed(turned)
        self._draw()
        self._store(self._ordered(turned))

    def exact_rotations(self) -> tuple[list[Tensor], list[Tensor]]:
        """The blocks of the out-side and the in-side that a merge now would multiply with, polished as asked for."""
        work, polish = self.dense_dtype, self.config.polish
        return self.output.exact_rotations(work, polish=polish), self.input.exact_rotations(work, polish=polish)

    @property
    def dense_dtype(self) -> torch.dtype:
        """The precision of merges: float64 where the device has it."""
        return torch.float64 if self.frozen_weight.device.type != "mps" else torch.float32

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The frozen weight in the order of the blocks, in the precision of merges."""
        dtype = self._codes_dtype if self.scale is not None else self.dense_dtype
        return self._frozen().dense(dtype).to(self.dense_dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, but for ``polish``; the adapter stays as it is."""
        W = self._placed(rotate_sides(self.dense(), *self.exact_rotations()))
        return self._plain(W.to(self.dtype), self.bias)

    @torch.no_grad()
    def original(self) -> nn.Linear:
        """The plain layer that was there before, with the weight and bias it had.

        Raises:
            ParameterError: They were not kept, and the layer has merged or began elsewhere.
        """
        if self.base_weight is None:
            raise ParameterError(
                f"the weight of {self.name or 'this layer'!r} before it was adapted was not kept; attach with "
                "keep_base=True, or merge."
            )
        bias = None
        if self.bias is not None and self.base_bias is not None:
            bias = nn.Parameter(self.base_bias.clone(), requires_grad=self.bias.requires_grad)
        return self._plain(self.base_weight.clone(), bias)

    def describe(self) -> dict[str, Any]:
        """``adapter``, ``trainable`` and ``detail`` for the table of adapters."""
        trainable = self.input.generator.numel() + self.output.generator.numel()
        detail = f"in {self.input.blocks}; out {self.output.blocks}; merged {self.ledger.merges} times"
        return {"adapter": "POET", "trainable": trainable, "detail": detail}

    def get_extra_state(self) -> Tensor:
        """The ledger: it stays in float64 on the CPU wherever the layer goes."""
        return self.ledger.as_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the ledger."""
        self.ledger.restore(state)

    def _frozen(self) -> Frozen:
        return Frozen(self.frozen_weight, self.scale, self.zero, self.config.group_size)

    def _ordered(self, W: Tensor) -> Tensor:
        """Rows and columns in the order of the blocks."""
        return W.index_select(0, self.output.index).index_select(1, self.input.index)

    def _placed(self, W: Tensor) -> Tensor:
        """Rows and columns back in their places."""
        return W.index_select(0, self.output.inverse).index_select(1, self.input.inverse)

    @property
    def _codes_dtype(self) -> torch.dtype:
        # Codes are made from and read in at least float32: half precision would round a second time.
        return torch.promote_types(self.dtype, torch.float32)

    def _draw(self) -> None:
        """New random orders, a function of seed, layer, side and number of merges alone; generators at 0."""
        for code, side in ((_IN, self.input), (_OUT, self.output)):
            source = stream_generator(self.config.seed, self.stream, code, self.ledger.merges)
            side.reset(random_permutation(side.dim, generator=source, device=side.index.device))

    @torch.no_grad()
    def _store(self, W: Tensor) -> None:
        """Keep ``W`` in the layer's type, and write down what that did to it."""
        rounded = W.to(self._codes_dtype if self.scale is not None else self.dtype)
        self.ledger.rounded(W, rounded.to(W.dtype))
        if self.scale is None or self.zero is None:
            self.frozen_weight.copy_(rounded)
            return
        codes, scale, zero = quantize(rounded, group_size=self.config.group_size)
        self.frozen_weight.copy_(codes)
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        self.ledger.requantized(rounded.to(W.dtype), self.dense())

    def _plain(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
        sizes = (self.in_features, self.out_features)
        linear = nn.utils.skip_init(nn.Linear, *sizes, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=self._trainable)
        if bias is not None:
            linear.bias = bias
        return linear.train(self.training)  # type: ignore[return-value]
