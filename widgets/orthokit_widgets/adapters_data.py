"""The numbers behind the page "Adapters": real matrices, adapters of a chosen size on them, and what is measured.

Everything is done by the adapters of :mod:`orthokit.adapters` themselves, so that what is seen is what they do. What
does not depend on the angle (a matrix's own spectrum, directions of generators) is kept between changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orthokit.adapters import BOFT, HRA, OFT, AdaptedLayer, FullFineTuning, LoRA
from orthokit.adapters.base import PartConfig
from orthokit.adapters.boft import BOFTAdapter
from orthokit.adapters.hra import HRAAdapter
from orthokit.adapters.oft import OFTAdapter
from orthokit.diagnostics.energy import hyperspherical_energy
from orthokit.errors import MissingExtraError
from orthokit.lab.pretrained import pretrained_weights, sentence_files
from orthokit.linalg import unpack_skew
from orthokit_widgets.momentum_data import Cache

__all__ = ["DEFAULT", "Choice", "Look", "Weight", "catalogue", "look", "weight"]

#: The matrix that is shown first.
DEFAULT = "tinygpt/2.attn.q"
_TINYGPT = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
# Its other matrix, output.dense, has 1536 inputs: a dense R of that size takes longer than an answer may.
_MINILM = (
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense"),
)
_SOURCES = {
    "tinygpt": ("TinyGPT", "tinygpt-addresses", "blocks.{layer}.{part}.weight", _TINYGPT),
    "minilm": ("MiniLM", "all-minilm-l6-v2", "encoder.layer.{layer}.{part}.weight", _MINILM),
}
_NEURONS, _PAIRS = 384, 300  # rows whose energy, and pairs of rows whose angles, are measured
# The largest matrix takes 8 MB in its three forms.
_WEIGHTS = Cache(64e6, lambda found: found.nbytes)


@dataclass(frozen=True)
class Weight:
    """A matrix of a pretrained model, with what does not change when an adapter is put on it."""

    name: str
    linear: nn.Linear
    matrix: Tensor
    """In float64, ``(out, in)``."""
    gram: Tensor
    """Of its smaller side, in float64."""
    spectrum: np.ndarray
    energy: float
    pairs: Tensor
    """Rows whose angles are compared, ``(2, pairs)``."""
    angles: np.ndarray
    """Degrees."""

    @property
    def nbytes(self) -> int:
        """Memory of the matrix in both types, and of its Gram matrix."""
        return 12 * self.matrix.numel() + 8 * self.gram.numel()

    def energy_of(self, W: Tensor) -> float:
        """Hyperspherical energy of the first rows."""
        return float(hyperspherical_energy(W[:_NEURONS].float()))

    def angles_of(self, W: Tensor) -> np.ndarray:
        """Angles of the pairs, degrees."""
        return _angles(*(W[rows] for rows in self.pairs))

    @property
    def neurons(self) -> int:
        """How many rows the energy is of."""
        return min(_NEURONS, len(self.matrix))


@dataclass(frozen=True)
class Choice:
    """An adapter and its size."""

    adapter: str = "oft"
    block_size: int = 32
    factors: int = 2
    rank: int = 8
    map: str = "cayley"
    terms: int = 3
    watched: bool = False
    angle: float = 0.3
    seed: int = 0

    @property
    def turns(self) -> bool:
        """Whether it is a rotation."""
        return self.adapter in _TURNED


@dataclass(frozen=True)
class Look:
    """What was measured of one adapter on one matrix."""

    trainable: int
    matrix: Tensor
    spectrum: np.ndarray
    energy: float
    angles: np.ndarray
    moved: float
    """Length of the change over that of the matrix."""
    rival: dict[str, np.ndarray]
    """``spectrum`` and ``angles`` of an update of the other sort, as long: of an added one beside a rotation."""
    rotation: Tensor | None = None
    """``R`` as the adapter makes it in float32."""
    entry_error: float = 0.0
    """``max |R^T R - I|``."""
    error: float = 0.0
    """``||R^T R - I||_2``."""
    least: float = 1.0
    """The smallest singular value of ``R``."""
    largest_angle: float = 0.0
    """Of a plane that is turned, radians."""
    typical_angle: float | None = None
    """The root mean square over the planes of the generator, as an angle turned; ``None`` for reflections."""
    switched: bool = False
    """Whether the exact map has taken the place of the series."""
    planes: Tensor | None = None
    """Angles of the generator's planes over the largest; ``None`` for reflections."""


@functools.lru_cache(maxsize=1)
def catalogue() -> dict[str, str]:
    """Matrices that can be chosen, by name, with the words for them: those whose weights are on this machine."""
    found = {}
    for source, (label, weights, pattern, parts) in _SOURCES.items():
        shapes = _shapes(weights)
        layer = 0
        while pattern.format(layer=layer, part=parts[0]) in shapes:
            for part in parts:
                rows, columns = shapes[pattern.format(layer=layer, part=part)]
                found[f"{source}/{layer}.{part}"] = f"{label} {layer} {part}, {rows} × {columns}"
            layer += 1
    return found


def _shapes(weights: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes; none if the package with the weights is not installed, or broken."""
    if weights == "tinygpt-addresses":
        return {name: tuple(tensor.shape) for name, tensor in pretrained_weights(weights).items()}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(sentence_files() / "model.safetensors", framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (MissingExtraError, OSError, SafetensorError):
        return {}


def weight(name: str) -> Weight:
    """One of :func:`catalogue`, with what is known of it; kept."""
    found = _WEIGHTS.get(name)
    if found is None:
        found = _load(name)
        _WEIGHTS.put(name, found)
    return found


@torch.no_grad()
def _load(name: str) -> Weight:
    source, _, rest = name.partition("/")
    layer, _, part = rest.partition(".")
    _, weights, pattern, _ = _SOURCES[source]
    W = pretrained_weights(weights)[pattern.format(layer=layer, part=part)].float().clone()
    linear: Any = nn.utils.skip_init(nn.Linear, W.shape[1], W.shape[0], bias=False).eval()
    linear.weight.copy_(W)
    pairs = torch.randint(len(W) - 1, (2, _PAIRS), generator=torch.Generator().manual_seed(0))
    pairs[1] += pairs[1] >= pairs[0]  # two different rows
    matrix = W.double()
    gram = _gram(matrix)
    bare = Weight(rest, linear, matrix, gram, _spectrum(gram), 0.0, pairs, np.empty(0))
    return replace(bare, energy=bare.energy_of(W), angles=bare.angles_of(matrix))


def _gram(W: Tensor) -> Tensor:
    return W.mT @ W if W.shape[0] >= W.shape[1] else W @ W.mT


def _spectrum(gram: Tensor) -> np.ndarray:
    # As singular_values(method="gram"), without its passes over W that look for what weights of models do not hold.
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).double().numpy()


def _turned_gram(of: Weight, part: Any, W: Tensor) -> Tensor:
    """Gram matrix of ``W R``; of a tall matrix ``R^T (W^T W) R``, for a quarter of the products."""
    if W.shape[0] < W.shape[1]:
        return _gram(W)
    return part.merge(part.merge(of.gram).mT)


def _angles(first: Tensor, second: Tensor) -> np.ndarray:
    """Degrees between rows of the one and of the other."""
    first, second = (nn.functional.normalize(rows, dim=1) for rows in (first, second))
    return torch.rad2deg((first * second).sum(1).clamp(-1, 1).acos()).numpy()


def _noisy(of: Weight, seed: int, length: float) -> dict[str, np.ndarray]:
    """What full fine-tuning by noise of that length makes of the spectrum and the angles, without its whole matrix."""
    cross, square = _noise_grams(of.linear, seed)
    D = _unit_change(tuple(of.matrix.shape), seed)
    rows = (of.matrix[rows] + length * D[rows] for rows in of.pairs)
    # Noise changes the spectrum by far more than rounding; single precision is enough.
    gram = (of.gram + length * cross + length**2 * square).float()
    return {"spectrum": _spectrum(gram), "angles": _angles(*rows)}


@functools.lru_cache(maxsize=8)
def _noise_grams(linear: nn.Linear, seed: int) -> tuple[Tensor, Tensor]:
    """Of ``W + t D`` with unit noise ``D``, the parts of the Gram matrix that go with ``t`` and its square, float64."""
    W = linear.weight.detach().double()
    D = _unit_change(tuple(W.shape), seed).double()
    if W.shape[0] < W.shape[1]:
        W, D = W.mT, D.mT
    half = W.mT @ D
    return half + half.mT, D.mT @ D


@torch.no_grad()
def look(of: Weight, choice: Choice) -> Look:
    """Put an adapter on a matrix and measure what it does.

    Args:
        of: The matrix.
        choice: The adapter.

    Returns:
        What was measured.

    Raises:
        OptionError: The adapter does not suit the matrix; the message says what would.
    """
    # What is added changes the spectrum by far more than rounding; single precision takes half the time.
    if choice.turns:
        layer = _TURNED[choice.adapter](of, choice)
        W = layer.effective_weight(dtype=torch.float64)
        length = float((W - of.matrix).norm())
        gram = _turned_gram(of, layer.adapters["default"], W)
        rival = _noisy(of, choice.seed, length)
    else:
        reference = Choice(block_size=choice.block_size, angle=choice.angle, seed=choice.seed)
        turned = _oft(of, reference)
        R = turned.effective_weight(dtype=torch.float64)
        length = float((R - of.matrix).norm())
        layer = _ADDED[choice.adapter](of, choice, length)
        W = layer.effective_weight()
        gram, other = _gram(W), _turned_gram(of, turned.adapters["default"], R)
        rival = {"spectrum": _spectrum(other), "angles": of.angles_of(R)}
    return Look(
        trainable=sum(p.numel() for p in layer.adapters.parameters()),
        matrix=W,
        spectrum=_spectrum(gram),
        energy=of.energy_of(W),
        angles=of.angles_of(W),
        moved=length / float(of.matrix.norm()),
        rival=rival,
        **_of_rotation(layer.adapters["default"], choice.angle),
    )


def _of_rotation(part: Any, angle: float) -> dict[str, Any]:
    if not isinstance(part, OFTAdapter | BOFTAdapter | HRAAdapter):
        return {}
    blocks = _blocks(part)
    # Eigenvalues of the difference: an error far below 1 keeps its digits.
    values = torch.linalg.eigvalsh(blocks.mT @ blocks - torch.eye(blocks.shape[-1], dtype=blocks.dtype))
    made = {
        "rotation": part.dense(torch.float32),
        "entry_error": part.orthogonality_error(),
        "error": float(values.abs().max()),
        "least": math.sqrt(max(0.0, 1 + float(values.min()))),
        "largest_angle": part.largest_angle(),
    }
    if isinstance(part, HRAAdapter):
        return made
    planes = _directions(part)[1]
    typical = part.config.spec.angle(angle * float(planes.square().mean().sqrt()))
    switched = part.map_in_use().map != part.config.map
    return made | {"switched": switched, "planes": planes, "typical_angle": typical}


def _blocks(part: OFTAdapter | BOFTAdapter | HRAAdapter) -> Tensor:
    """Small matrices that have the singular values of ``R`` as it is made in float32, in float64, ``(k, b, b)``."""
    if isinstance(part, OFTAdapter):
        return part.rotations(torch.float32)[0].double()
    if isinstance(part, BOFTAdapter):
        runs = part.factors(torch.float32)
        return runs[0].stack.double() if len(runs) == 1 else part.dense(torch.float32).double()[None]
    # I - V T V^T is the identity outside the span of V.
    V, T = (side.double() for side in part.factors(torch.float32))
    C = torch.linalg.qr(V)[1]
    return (torch.eye(len(C), dtype=C.dtype) - C @ T @ C.mT)[None]


# --- adapters of a size


def _put(of: Weight, config: PartConfig) -> tuple[AdaptedLayer, Any]:
    layer = AdaptedLayer(of.linear, name=of.name)
    layer.add("default", config)
    return layer, layer.adapters["default"]


def _oft(of: Weight, choice: Choice) -> AdaptedLayer:
    return _sized(*_put(of, OFT(block_size=choice.block_size, **_map(choice))), choice)


def _boft(of: Weight, choice: Choice) -> AdaptedLayer:
    return _sized(*_put(of, BOFT(block_size=choice.block_size, factors=choice.factors, **_map(choice))), choice)


def _map(choice: Choice) -> dict[str, Any]:
    # One rate for every block size: generators are set here, not trained.
    tolerance = 1e-5 if choice.watched else None
    shared: dict[str, Any] = {"tolerance": tolerance, "block_rate": False, "seed": choice.seed}
    return shared | {"map": choice.map, "terms": choice.terms, "order": choice.terms}


def _sized(layer: AdaptedLayer, part: Any, choice: Choice) -> AdaptedLayer:
    """Random generators whose largest plane angle is that of the choice."""
    part.generator.copy_(choice.angle * _directions(part)[0])
    return layer


def _directions(part: Any) -> tuple[Tensor, Tensor]:
    return _unit_generators(tuple(part.generator.shape), part.config.seed)


@functools.lru_cache(maxsize=32)
def _unit_generators(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Normal entries, scaled so that the largest plane angle of all is 1; and the angles of all planes."""
    v = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    planes = torch.linalg.svdvals(unpack_skew(v))[..., ::2].flatten()  # angles come in pairs
    largest = planes.max()
    return v / largest, planes / largest


def _hra(of: Weight, choice: Choice) -> AdaptedLayer:
    layer, part = _put(of, HRA(rank=choice.rank, seed=choice.seed))
    source = torch.Generator().manual_seed(choice.seed)
    # Equal pairs undo each other: as much noise as there is vector takes them apart.
    part.vectors.add_(torch.randn(part.vectors.shape, generator=source))
    # The product is a Cayley transform: C(s Q) is on the path that rewinding takes, and has the angle wanted.
    part.strength = choice.angle / math.tan(part.largest_angle() / 2)
    return layer


def _lora(of: Weight, choice: Choice, length: float) -> AdaptedLayer:
    layer, part = _put(of, LoRA(rank=choice.rank, init="gaussian", seed=choice.seed))
    part.up.copy_(torch.randn(part.up.shape, generator=torch.Generator().manual_seed(choice.seed)))
    part.up.mul_(length / float((part.up @ part.down).norm()))
    return layer


def _full(of: Weight, choice: Choice, length: float) -> AdaptedLayer:
    layer, part = _put(of, FullFineTuning())
    part.delta.copy_(length * _unit_change(tuple(part.delta.shape), choice.seed))
    return layer


@functools.lru_cache(maxsize=4)
def _unit_change(shape: tuple[int, ...], seed: int) -> Tensor:
    D = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return D / D.norm()


_TURNED: dict[str, Callable[[Weight, Choice], AdaptedLayer]] = {"oft": _oft, "boft": _boft, "hra": _hra}
_ADDED: dict[str, Callable[[Weight, Choice, float], AdaptedLayer]] = {"lora": _lora, "full": _full}
