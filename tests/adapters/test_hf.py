"""Models of Hugging Face's transformers, small and random: adapted by us, or wrapped by PEFT and taken as they are."""

import copy

import pytest
import torch

from orthokit.adapters import (
    AdaptedLayer,
    adapted_layers,
    adapter_parameters,
    attach,
    detach,
    disabled,
    merge,
    table,
)
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.paths import rewind
from orthokit.diagnostics import Monitor
from orthokit.errors import ParameterError
from orthokit.matrices import matrices
from orthokit.optim import for_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

CONFIGS = {"oft": OFT(4), "boft": BOFT(4), "hra": HRA(4), "lora": LoRA(2), "dora": DoRA(2)}
EACH = pytest.mark.parametrize("kind", CONFIGS)
MODELS = pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def build(name, *, seed=0):
    """One of the models, in evaluation mode."""
    common = {"vocab_size": 40, **SPECIAL}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "gpt2":
            sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes))
        elif name == "llama":
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
            more = {"num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": True}
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **sizes, **more))
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = transformers.BertConfig(**common, **sizes, max_position_embeddings=16)
            model = transformers.BertForSequenceClassification(config)
    return model.eval()


def ids(n=2):
    return torch.randint(3, 40, (n, 6), generator=torch.Generator().manual_seed(1))


def labels(name):
    return ids() if name != "bert" else torch.tensor([0, 1])


def moved(model):
    """Adapters away from their start."""
    with torch.no_grad():
        for i, p in enumerate(adapter_parameters(model).values()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model


@MODELS
@EACH
def test_attaching_changes_nothing_training_moves_the_adapters_alone_and_merges_are_the_forward_pass(name, kind):
    model = build(name)
    before, state = model(ids()).logits.detach(), copy.deepcopy(model.state_dict())
    attach(model, CONFIGS[kind])
    assert len(adapted_layers(model)) == {"gpt2": 8, "llama": 14, "bert": 14}[name]
    torch.testing.assert_close(
        model(ids()).logits, before, rtol=0, atol=1e-5
    )  # reflections undo each other to rounding
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(adapter_parameters(model))
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(ids(), labels=labels(name)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    after = model(ids()).logits.detach()
    assert not torch.allclose(after, before, atol=1e-4)
    for alpha, path in ((0.5, "cayley_sqrt"), (0.0, "cayley_linear")):
        rewound = merge(rewind(copy.deepcopy(model), alpha, path=path))(ids()).logits
        torch.testing.assert_close(rewound, rewind(model, alpha, path=path)(ids()).logits, rtol=0, atol=1e-5)
    with disabled(rewind(model, 1.0)):
        assert torch.equal(model(ids()).logits, before)
    torch.testing.assert_close(merge(copy.deepcopy(model))(ids()).logits, after, rtol=0, atol=1e-5)
    detach(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["*.q_proj", "*.v_proj"], 4),
        ("model.layers.1.*", 7),
        (lambda name: name.endswith(("up_proj", "down_proj")), 4),
        ("linear", 14),
        ("embedding", 1),
        ("all", 15),
    ],
)
def test_layers_are_chosen_by_pattern_function_or_kind(targets, layers):
    model = build("llama")
    before = model(ids()).logits.detach()
    attach(model, OFT(4), targets=targets)
    assert len(adapted_layers(model)) == layers
    assert torch.equal(model(ids()).logits, before)


def test_grouped_keys_and_values_have_fewer_rows_and_the_same_inputs():
    model = moved(attach(build("llama"), OFT(4), targets="*.k_proj"))
    frame = table(model).set_index("layer")
    row = frame.loc["model.layers.0.self_attn.k_proj"]
    assert row["shape"] == (8, 16) and row["trainable"] == 16 * 3 // 2
    y = model(ids()).logits.detach()
    torch.testing.assert_close(merge(model)(ids()).logits, y, rtol=0, atol=1e-6)


def test_the_transposed_layers_of_gpt2_keep_their_layout_when_merged():
    model = moved(attach(build("gpt2"), OFT(4), targets="*.c_attn"))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, AdaptedLayer) and (layer.out_features, layer.in_features) == (48, 16)
    y = model(ids()).logits.detach()
    plain = merge(model).transformer.h[0].attn.c_attn
    assert type(plain).__name__ == "Conv1D" and plain.weight.shape == (16, 48)
    torch.testing.assert_close(model(ids()).logits, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "embedding"), [("gpt2", "transformer.wte"), ("llama", "model.embed_tokens")])
def test_tied_weights_are_said_adapted_apart_and_untied_only_when_asked(name, embedding):
    model = build(name)
    assert model.lm_head.weight is model.get_submodule(embedding).weight
    frame = table(attach(model, OFT(4), targets=[embedding])).set_index("layer")
    assert frame.loc[embedding, "adapter"] == "oft" and "shares its weight" in frame.loc[embedding, "detail"]
    assert "lm_head.weight" in frame.loc[embedding, "detail"] and "tied" in frame.loc["lm_head", "detail"]
    y = moved(model)(ids()).logits.detach()
    with pytest.raises(ParameterError, match="untie=True"):
        merge(model)
    assert torch.equal(model(ids()).logits, y)
    merge(model, untie=True)
    assert model.lm_head.weight is not model.get_submodule(embedding).weight
    torch.testing.assert_close(model(ids()).logits, y, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_generation_and_gradient_checkpointing_of_the_model_work():
    model = moved(attach(build("llama"), OFT(4, dropout=0.2)))
    text = {"input_ids": ids(1), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    tokens = model.generate(**text, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, merge(copy.deepcopy(model)).generate(**text, max_new_tokens=4, do_sample=False))

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        model(ids(), labels=ids(), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}

    expected = gradients() if model.train() else {}
    for use_reentrant in (False, True):
        # Reentrant checkpoints need inputs that take gradients, as transformers itself says.
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)


def wrapped(kind, name="llama"):
    """A model inside PEFT."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    common = {"target_modules": targets}
    config = {
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **common),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, **common),
        "hra": lambda: peft.HRAConfig(r=4, **common),
        "lora": lambda: peft.LoraConfig(r=2, fan_in_fan_out=name == "gpt2", init_lora_weights="gaussian", **common),
        "vera": lambda: peft.VeraConfig(r=2, **common),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **common),
        "adalora": lambda: peft.AdaLoraConfig(total_step=10, **common),
        "miss": lambda: peft.MissConfig(r=2, **common),
    }[kind]()
    return peft.get_peft_model(build(name), config)


PEFT_KINDS = ("oft", "boft", "hra", "lora", "vera", "ia3", "adalora", "miss")
# PEFT's own remarks on the versions and layers that it meets.
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def stepped(model, stepper):
    """Three steps that are watched; only what was to be trained has moved."""
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    monitor = Monitor(model, stepper, every=1, budget=1.0, rank=1, max_matrices=4)
    for step in range(3):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        stepper.step()
        monitor.observe(step)
        stepper.zero_grad()
    after = dict(model.named_parameters())
    changed = {n for n, p in before.items() if not torch.equal(after[n], p)}
    assert changed and changed <= trained
    assert {row["step"] for row in monitor.records} == {0, 1, 2} and monitor.matrices


@QUIET
@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_models_wrapped_by_peft_are_listed_watched_and_trained_as_they_are(kind):
    model = wrapped(kind)
    # Its layers are its own: ours would be a second wrapping, of what is inside.
    assert (table(model)["adapter"] == "none").all()
    names = set(matrices(model).parameters())
    generators = {n for n, _ in model.named_parameters() if any(part in n for part in ("oft_R", "boft_R", "hra_u"))}
    assert not names & generators and (bool(generators) == (kind in ("oft", "boft", "hra")))
    assert all(n in names for n, _ in model.named_parameters() if "lora_A" in n and kind == "lora")
    stepped(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))


@QUIET
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_muon_trains_the_matrices_of_a_lora_of_peft(name):
    model = wrapped("lora", name)
    stepper = for_model(model, "muon", lr=0.01)
    routed = stepper.routing.set_index("name")["optimizer"]
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert set(routed[trained]) == {"Muon"}
    stepped(model, stepper)


@QUIET
@pytest.mark.parametrize("kind", ["oft", "hra", "ia3"])
def test_muon_refuses_adapters_of_peft_that_have_no_matrices(kind):
    with pytest.raises(ParameterError, match="no trainable matrix for Muon"):
        for_model(wrapped(kind), "muon", lr=0.01)


@EACH
def test_muon_trains_the_matrices_of_our_adapters_and_refuses_rotations(kind):
    model = attach(build("llama"), CONFIGS[kind], targets="*_proj")
    if kind in ("lora", "dora"):
        stepped(model, for_model(model, "muon", lr=0.01))
    else:
        with pytest.raises(ParameterError, match="no trainable matrix for Muon"):
            for_model(model, "muon", lr=0.01)
