"""A causal language model of transformers as a ground: here a tiny one with random weights, from a folder."""

import importlib.util
import math

import pytest
import torch

from orthokit.errors import MissingExtraError, OptionError, UnknownNameError
from orthokit.lab.arena import GROUNDS, add_ground, budget_settings, compete, hugging_face, hugging_face_ground

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("tokenizers") is None,
    reason="the packages transformers and tokenizers are not installed",
)
TINY = {"context": 16, "batch": 2, "windows": 8, "characters": 40_000, "block": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One token a byte, two layers of width 16."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def ground(folder):
    add_ground("tiny_llama", hugging_face_ground(folder, local_files_only=True, **TINY))
    yield "tiny_llama"
    del GROUNDS["tiny_llama"]
    for module in ("grounds", "weights", "portraits", "methods"):
        for value in vars(importlib.import_module(f"orthokit.lab.arena.{module}")).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def test_a_model_from_a_folder_is_a_ground_like_any_other(ground):
    rows = compete(ground, "oft", lr=1e-2, seed=0, steps=2, portrait=True, paths=True, alphas=[0.0, 1.0])
    last = [row for row in rows if row["kind"] == "run"][-1]
    # Random weights know nothing: a byte of 256 costs 8 bits.
    assert rows[0]["target"] == pytest.approx(8.0, abs=0.3) and rows[0]["general"] == pytest.approx(8.0, abs=0.3)
    assert last["target"] < rows[0]["target"] and last["moved"] > 0 and last["spectrum"] < 1e-5
    layers = [row["layer"] for row in rows if row["kind"] == "layer"]
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    assert {row["path"] for row in rows if row["kind"] == "path"} >= {"dense", "cayley_sqrt"}
    # Outputs of 16 and 8 numbers are compared on 128 tokens, four times as many.
    assert math.isfinite(last["procrustes"]) and math.isfinite(last["cka"])


def test_budgets_are_found_for_it(ground):
    settings = budget_settings(ground)
    assert settings["oft"][0] == 8 and abs(math.log(settings["lora"][1] / settings["oft"][1])) < 0.7


def test_bits_per_byte_follow_from_the_tokens(folder):
    place = hugging_face_ground(folder, local_files_only=True, **TINY)
    task, model = place.task(0, False), place.model(False)
    assert task.bytes_per_token == pytest.approx(1.0)
    with torch.no_grad():
        losses = [float(task.loss(model, batch)) for batch in task.held_out()]
    assert task.evaluate(model)[place.loss] == pytest.approx(sum(losses) / len(losses) / math.log(2), rel=1e-5)
    assert torch.equal(place.task(1, False).batch(0)[0], place.task(1, False).batch(0)[0])
    assert not torch.equal(place.task(1, False).batch(0)[0], place.task(2, False).batch(0)[0])


def test_names_are_taken_once(ground):
    with pytest.raises(OptionError, match="already"):
        add_ground(ground, GROUNDS[ground])
    with pytest.raises(OptionError, match="begins with no digit"):
        add_ground("tiny-llama", GROUNDS[ground])


def test_what_cannot_be_loaded_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="cannot load"):
        hugging_face_ground(tmp_path / "nothing", local_files_only=True)
    with pytest.raises(OptionError, match="multiple of block=7"):
        hugging_face_ground(folder, local_files_only=True, **(TINY | {"block": 7}))
    with pytest.raises(UnknownNameError, match="corpus"):
        hugging_face_ground(folder, local_files_only=True, target="bible", **TINY)
    with pytest.raises(OptionError, match="longer text"):
        hugging_face_ground(folder, local_files_only=True, **(TINY | {"characters": 10}))
    monkeypatch.setattr(hugging_face.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="transformers"):
        hugging_face_ground(folder)
