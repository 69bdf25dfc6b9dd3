"""Makes the golden adapters of ``data/peft`` with the PEFT that is installed: ``python make_peft.py CASE...``.

Each case is a folder as PEFT saves it, with ``outputs.safetensors`` beside: what PEFT computed. The models and the
inputs are in ``base.safetensors``. ``cases.json`` says which model a case is for. Run it once per PEFT version; cases
whose names do not end in the version that runs are left alone.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).parent / "peft"


def transposed() -> nn.Module:
    """A layer of GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(24, 16))


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False)),
    "embedding": lambda: nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 8)),
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)),
    "transposed": transposed,
    "point": lambda: nn.Sequential(nn.Conv2d(8, 6, 1)),
}


def inputs(kind: str) -> torch.Tensor:
    """The inputs of a model."""
    generator = torch.Generator().manual_seed(7)
    if kind == "embedding":
        return torch.arange(11)
    shape = {"linear": (5, 16), "transposed": (5, 16), "conv": (2, 4, 5, 5), "point": (2, 8, 3, 3)}[kind]
    return torch.randn(shape, generator=generator)


def base() -> dict[str, torch.Tensor]:
    """Models and inputs, made once."""
    path = HERE / "base.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        tensors = {
            f"{kind}.{key}": value for kind, make in MODELS.items() for key, value in make().state_dict().items()
        }
        tensors |= {f"{kind}.x": inputs(kind) for kind in MODELS}
        save_file(tensors, path)
    return load_file(path)


def cases() -> dict[str, tuple[str, list[str], object]]:
    """Name without version -> (model, targets, config)."""
    import peft

    oft, boft, hra, lora = peft.OFTConfig, peft.BOFTConfig, peft.HRAConfig, peft.LoraConfig
    both = ["0", "2"]
    old = peft.__version__.startswith("0.15")
    found = {
        "boft": ("linear", both, lambda: boft(target_modules=both, boft_block_size=4)),
        "boft_factors": (
            "linear",
            both,
            lambda: boft(target_modules=both, boft_block_size=4, boft_n_butterfly_factor=2),
        ),
        "boft_three": (
            "linear",
            both,
            lambda: boft(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=3),
        ),
        "boft_conv": ("conv", ["0"], lambda: boft(target_modules=["0"], boft_block_size=4)),
        "hra": ("linear", both, lambda: hra(target_modules=both, r=3)),
        "hra_gs": ("linear", both, lambda: hra(target_modules=both, r=3, apply_GS=True)),
        "hra_conv": ("conv", ["0"], lambda: hra(target_modules=["0"], r=2)),
        "lora": ("linear", both, lambda: lora(target_modules=both, r=4, lora_alpha=6)),
        "lora_patterns": (
            "linear",
            both,
            lambda: lora(
                target_modules=both, r=4, lora_alpha=6, use_rslora=True, rank_pattern={"2": 2}, alpha_pattern={"0": 3}
            ),
        ),
        "lora_embedding": ("embedding", ["0", "1"], lambda: lora(target_modules=["0", "1"], r=3, lora_alpha=5)),
        "lora_conv": ("conv", ["0"], lambda: lora(target_modules=["0"], r=3, lora_alpha=5)),
        "lora_pissa": ("linear", both, lambda: lora(target_modules=both, r=4, init_lora_weights="pissa")),
        "lora_olora": ("linear", both, lambda: lora(target_modules=both, r=4, init_lora_weights="olora")),
        "lora_transposed": (
            "transposed",
            ["0"],
            lambda: lora(target_modules=["0"], r=4, lora_alpha=6, fan_in_fan_out=True),
        ),
        "dora": ("linear", both, lambda: lora(target_modules=both, r=4, lora_alpha=6, use_dora=True)),
        "dora_conv": ("conv", ["0"], lambda: lora(target_modules=["0"], r=3, use_dora=True)),
    }
    if old:
        found |= {
            "oft": ("linear", both, lambda: oft(target_modules=both, r=4)),
            "oft_coft": (
                "linear",
                both,
                lambda: oft(target_modules=both, r=4, coft=True, eps=0.02, block_share=True),
            ),
            "oft_conv": ("conv", ["0"], lambda: oft(target_modules=["0"], r=6)),
        }
        return found

    def new(kind="linear", targets=both, **options):
        return kind, targets, lambda: oft(**{"target_modules": targets, "oft_block_size": 4, **options})

    found |= {
        "oft": new(),
        "oft_exact": new(use_cayley_neumann=False),
        "oft_t1": new(num_cayley_neumann_terms=1),
        "oft_t2": new(num_cayley_neumann_terms=2),
        "oft_t3": new(num_cayley_neumann_terms=3),
        "oft_t4": new(num_cayley_neumann_terms=4),
        "oft_t8": new(num_cayley_neumann_terms=8),
        "oft_share": new(block_share=True),
        "oft_rank": new(oft_block_size=0, r=4, use_cayley_neumann=False),
        "oft_coft": new(coft=True, eps=0.4),
        "oft_conv": new("conv", ["0"]),
        "oft_point": new("point", ["0"]),
        "oft_embedding": new("embedding", ["0", "1"]),
    }
    return found


def butterfly_on_cpu() -> None:
    """PEFT falls back to one factor without its kernel, which only makes block-diagonal matrices."""
    from peft.tuners.boft import layer

    class BlockDiagonal:
        @staticmethod
        def apply(blocks):
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    layer.get_fbd_cuda, layer.FastBlockDiag = (lambda: True), BlockDiagonal


def make(case: str) -> None:
    """Write one case."""
    import peft

    name, _, version = case.rpartition("-")
    if version != peft.__version__:
        return
    kind, _, config = cases()[name]
    tensors = base()
    model = MODELS[kind]()
    names = [key for key in tensors if key.startswith(f"{kind}.") and key != f"{kind}.x"]
    model.load_state_dict({key.removeprefix(f"{kind}."): tensors[key] for key in names})
    if name in ("boft_factors", "boft_three"):
        butterfly_on_cpu()
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config()).eval()
    generator = torch.Generator().manual_seed(len(name) + 31)
    std = {"hra": 1.0, "lora": 0.3, "dora": 0.3, "boft": 0.3}.get(name.split("_")[0], 0.15)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    x = tensors[f"{kind}.x"]
    folder = HERE / case
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    kept = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        y = wrapped(x).clone()
        merged = wrapped.merge_and_unload()(x)
    save_file({"forward": y.contiguous(), "merged": merged.contiguous()}, folder / "outputs.safetensors")
    listed = HERE / "cases.json"
    known = json.loads(listed.read_text()) if listed.exists() else {}
    known[case] = kind
    listed.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    print(case, {k: tuple(v.shape) for k, v in kept.items()}, float((y - merged).abs().max()))


if __name__ == "__main__":
    import peft

    warnings.simplefilter("ignore")
    HERE.mkdir(exist_ok=True)
    for wanted in sys.argv[1:] or [f"{name}-{peft.__version__}" for name in cases()]:
        make(wanted)
