"""Makes mergekit.safetensors: what mergekit makes of the recipes in mergekit.yml from four tiny models.

Needs mergekit 0.1.5 to be importable (``pip install mergekit``): python tests/merging/data/make_mergekit.py
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
LAYERS = 3


def tiny_models() -> dict[str, dict[str, Tensor]]:
    """A base with the tensors of a Llama, and three experts whose changes agree in part."""
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    for i in range(LAYERS):
        start = f"model.layers.{i}."
        shapes |= {f"{start}self_attn.{part}_proj.weight": (4, 4) for part in "qkvo"}
        shapes |= {f"{start}mlp.{part}_proj.weight": (6, 4) for part in ("gate", "up")}
        shapes |= {f"{start}mlp.down_proj.weight": (4, 6)}
        shapes |= {f"{start}{norm}_layernorm.weight": (4,) for norm in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(5)

    def normal() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base, common = normal(), normal()
    models = {"base": base}
    for name in "abc":
        own = normal()
        models[name] = {key: base[key] + 0.3 * common[key] + 0.05 * own[key] for key in base}
    return models


def write_models(place: Path) -> None:
    """The models as folders that mergekit reads."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    )
    for name, tensors in tiny_models().items():
        config.save_pretrained(place / name)
        save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})


def mask(tensor: Tensor, density: float) -> Tensor:
    """Which entries of a change stay: a function of the change, so that whoever merges draws the same."""
    seed = int(tensor.double().abs().sum() * 1e4) % (1 << 31)
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < density


@contextlib.contextmanager
def fixed_masks() -> Iterator[None]:
    """Let mergekit keep the entries that :func:`mask` says."""
    from mergekit import sparsify

    def kept(tensor: Tensor, density: float, rescale_norm: Any = None) -> Tensor:
        if density >= 1:
            return tensor
        return sparsify.rescaled_masked_tensor(tensor, mask(tensor, density).to(tensor.dtype), rescale_norm)

    with mock.patch.object(sparsify, "bernoulli", kept):
        yield


def merged_by_mergekit(recipe: dict[str, Any], place: Path, name: str) -> dict[str, Tensor]:
    """What mergekit makes of a recipe over the models in ``place``, the working directory."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    with fixed_masks():
        run_merge(MergeConfiguration.model_validate(recipe), str(place / name), options)
    return load_file(place / name / "model.safetensors")


def main() -> None:
    """Write the file."""
    found = {f"{model}/{key}": t for model, tensors in tiny_models().items() for key, t in tensors.items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_models(Path(folder))
        for name, recipe in yaml.safe_load((HERE / "mergekit.yml").read_text()).items():
            made = merged_by_mergekit(recipe, Path(folder), f"out-{name}")
            found |= {f"{name}/{key}": t for key, t in made.items()}
    save_file(found, HERE / "mergekit.safetensors", metadata={"made by": "mergekit 0.1.5"})


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
