"""Small models with every adapter, for the tests of what PyTorch does with them; here and in other processes."""

import torch
from torch import nn

from orthokit.adapters import adapter_parameters, attach
from orthokit.adapters.base import PartConfig
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT

KINDS: dict[str, PartConfig] = {
    "oft": OFT(4),
    "oft series": OFT(4, map="cayley_neumann"),
    "oft projected": OFT(4, map="exp", radius=0.1),
    "boft": BOFT(4, factors=2),
    "hra": HRA(4),
    "lora": LoRA(2),
    "lora from the spectrum": LoRA(2, init="pissa"),
    "dora": DoRA(2),
    "full": FullFineTuning(),
}


def adapted(config: PartConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small model whose adapters have left their start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).to(dtype)
    attach(model, config, targets=["0", "2"])
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def outcome(model, x, run=None):
    """Outputs, and the gradients of the adapters."""
    model.zero_grad()
    y = (run or model)(x)
    y.float().square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}


def agree(found, expected, **tolerance):
    """Both outputs and gradients."""
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    torch.testing.assert_close(found[1], expected[1], **tolerance)
