"""State dicts with the names and shapes of Hugging Face models."""

import pytest
import torch

from orthokit.errors import NothingMatchedWarning, OptionError, ShapeError
from orthokit.matrices import matrices


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def gpt2(width: int = 12, *, linear: bool = False, bias: bool = True, prefix: str = "transformer.") -> dict:
    """GPT-2: Hugging Face's Conv1D layout, or nanoGPT's nn.Linear under the same names."""
    layers = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    layers |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50, width), "wpe.weight": (16, width)}
    for name, (rows, columns) in layers.items():
        shapes[f"h.0.{name}.weight"] = (columns, rows) if linear else (rows, columns)
        if bias:
            shapes[f"h.0.{name}.bias"] = (columns,)
    shapes |= {"h.0.ln_1.weight": (width,), "h.0.ln_1.bias": (width,), "ln_f.weight": (width,)}
    shapes |= {"h.0.attn.bias": (1, 1, 16, 16), "h.0.attn.masked_bias": ()}
    weights = {prefix + name: torch.zeros(shape) for name, shape in shapes.items()}
    weights["lm_head.weight"] = weights[f"{prefix}wte.weight"]
    return weights


def llama(width: int = 16, heads: int = 4, kv_heads: int = 2) -> dict:
    head, inner = width // heads, 24
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.layers.0.input_layernorm.weight": (width,), "model.norm.weight": (width,)}
    return zeros({"model.embed_tokens.weight": (60, width), **shapes, "lm_head.weight": (60, width)})


def bert(width: int = 12) -> dict:
    layer = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    layer |= {"attention.output.dense": (width, width), "intermediate.dense": (48, width), "output.dense": (width, 48)}
    shapes: dict[str, tuple[int, ...]] = {
        f"bert.embeddings.{name}.weight": (rows, width)
        for name, rows in (("word_embeddings", 70), ("position_embeddings", 20), ("token_type_embeddings", 2))
    }
    shapes |= {f"bert.encoder.layer.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"bert.encoder.layer.0.attention.output.LayerNorm.weight": (width,), "bert.pooler.dense.weight": (12, 12)}
    shapes |= {"cls.predictions.transform.dense.weight": (12, 12), "cls.predictions.decoder.weight": (70, width)}
    weights = zeros(shapes)
    weights["bert.embeddings.position_ids"] = torch.arange(20)[None]
    return weights


def left(table) -> dict[str, str]:
    return {row.name: row.rule for row in table.left_out}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_read_transposed(prefix):
    weights = gpt2(prefix=prefix)
    table = matrices(weights)
    assert {block.name: block.shape for block in table} == {
        f"{prefix}h.0.attn.c_attn.weight": (36, 12),
        f"{prefix}h.0.attn.c_proj.weight": (12, 12),
        f"{prefix}h.0.mlp.c_fc.weight": (48, 12),
        f"{prefix}h.0.mlp.c_proj.weight": (12, 48),
    }
    assert {block.rule for block in table} == {"conv1d_transposed"}
    rules = left(table)
    assert rules["lm_head.weight"] == "tied"
    assert rules[f"{prefix}wte.weight"] == rules[f"{prefix}wpe.weight"] == "embedding"
    assert rules[f"{prefix}h.0.attn.bias"] == rules[f"{prefix}h.0.attn.masked_bias"] == "buffer"
    assert rules[f"{prefix}h.0.ln_1.weight"] == rules[f"{prefix}ln_f.weight"] == "norm"


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_has_the_same_names_and_is_not_transposed(bias):
    table = matrices(gpt2(linear=True, bias=bias))
    assert {block.rule for block in table} == {"linear"}
    assert table["transformer.h.0.mlp.c_fc.weight"].shape == (48, 12)


def test_gpt2_names_without_evidence_say_what_is_assumed():
    block = matrices({"h.0.attn.c_proj.weight": torch.zeros(8, 8)})[0]
    assert block.rule == "linear" and "assumed" in block.reason


@pytest.mark.parametrize("linear", [True, False])
def test_fused_gpt2_parts_are_the_rows_attention_uses(linear):
    weights = gpt2(linear=linear)
    name = "transformer.h.0.attn.c_attn.weight"
    weights[name] = torch.randn(weights[name].shape)
    x = torch.randn(12)
    fused = weights[name] @ x if linear else x @ weights[name]
    table = matrices(weights, split_fused=True)
    for label, expected in zip("qkv", fused.split(12), strict=True):
        torch.testing.assert_close(table[f"{name}[{label}]"].view(weights[name]) @ x, expected)


def test_gguf_by_name():
    shapes = {"token_embd.weight": (40, 16), "output.weight": (40, 16), "output_norm.weight": (16,)}
    shapes |= {f"blk.0.{one}.weight": (16, 16) for one in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_up.weight": (48, 16), "blk.0.ffn_down.weight": (16, 48), "blk.0.attn_norm.weight": (16,)}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    table = matrices(weights)
    assert len(table) == 6 and {block.rule for block in table} == {"linear"}
    rules = left(table)
    assert rules["token_embd.weight"] == "embedding" and rules["output.weight"] == "head"
    assert rules["blk.0.attn_norm.weight"] == "norm"
    heads = matrices(weights, split_heads=4)
    assert heads["blk.0.attn_q.weight"].shape == (4, 4, 16) and heads["blk.0.attn_output.weight"].shape == (4, 16, 4)


def test_llama_by_name():
    table = matrices(llama())
    assert len(table) == 7 and {block.rule for block in table} == {"linear"}
    assert {name: rule for name, rule in left(table).items() if rule != "norm"} == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    }


def test_llama_heads_follow_the_shared_keys():
    shapes = {b.name.split(".")[-2]: b.shape for b in matrices(llama(), split_heads=4)}
    assert shapes["q_proj"] == (4, 4, 16)
    assert shapes["k_proj"] == shapes["v_proj"] == (2, 4, 16)
    assert shapes["o_proj"] == (4, 16, 4)
    assert shapes["down_proj"] == (16, 24)


def test_heads_of_chosen_projections_only():
    shapes = {b.name.split(".")[-2]: b.shape for b in matrices(llama(), split_heads={"*.k_proj.*": 2})}
    assert shapes["k_proj"] == (2, 4, 16) and shapes["q_proj"] == (16, 16)


def test_bert_by_name():
    table = matrices(bert())
    assert len(table) == 8
    rules = left(table)
    assert rules["cls.predictions.decoder.weight"] == "head"
    assert rules["bert.embeddings.position_ids"] == "buffer"
    assert sum(rule == "embedding" for rule in rules.values()) == 3
    heads = {b.name.split("layer.0.")[-1]: b.shape for b in matrices(bert(), split_heads=3)}
    assert heads["attention.self.query.weight"] == (3, 4, 12)
    assert heads["attention.output.dense.weight"] == (3, 12, 4)
    assert heads["output.dense.weight"] == (12, 48)


def test_grouped_query_rows_are_found_beside_the_output_projection():
    weights = zeros({"l.0.self_attn.qkv_proj.weight": (32, 16), "l.0.self_attn.o_proj.weight": (16, 16)})
    shapes = {block.name[len("l.0.self_attn.") :]: block.shape for block in matrices(weights, split_heads=4)}
    assert shapes == {
        "qkv_proj.weight[q]": (4, 4, 16),
        "qkv_proj.weight[k]": (2, 4, 16),
        "qkv_proj.weight[v]": (2, 4, 16),
        "o_proj.weight": (4, 16, 4),
    }


def test_given_row_counts_win_and_must_add_up():
    weights = zeros({"l.0.attn.qkv_proj.weight": (24, 8)})
    table = matrices(weights, split_fused={"*.qkv_proj.*": [16, 4, 4]})
    assert [block.shape for block in table] == [(16, 8), (4, 8), (4, 8)]
    named = matrices(weights, split_fused={"*.qkv_proj.*": {"queries": 16, "rest": 8}})
    assert [block.name[-9:] for block in named] == ["[queries]", "ght[rest]"]
    with pytest.raises(ShapeError, match=r"24 rows; found \[16, 4\]"):
        matrices(weights, split_fused={"*.qkv_proj.*": [16, 4]})


def test_a_fused_projection_of_unknown_parts_stays_whole_and_says_so():
    block = matrices(zeros({"attn.qkv_proj.weight": (24, 16)}), split_fused=True)[0]
    assert block.shape == (24, 16) and "split_fused={name" in block.reason


def test_interleaved_heads_of_neox_and_bloom():
    heads, width = 3, 4
    weight = torch.randn(heads * 3 * width, 12)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    assert "give split_heads" in matrices({name: weight}, split_fused=True)[0].reason
    table = matrices({name: weight}, split_heads=heads)
    q, k, v = weight.view(heads, 3 * width, 12).split(width, dim=1)  # as the models do it
    for label, expected in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(table[f"{name}[{label}]"].view(weight), expected)


def test_gates_of_experts_and_their_orientation():
    bmm = zeros({"experts.gate_up_proj": (2, 8, 20), "experts.down_proj": (2, 10, 8)})  # x @ W
    linear = zeros({"experts.gate_up_proj": (2, 20, 8), "experts.down_proj": (2, 8, 10)})  # x @ W.T
    for weights, rule in ((bmm, "stack_transposed"), (linear, "stack")):
        table = matrices(weights)
        assert {block.rule for block in table} == {rule}
        assert [block.shape for block in table] == [(2, 20, 8), (2, 8, 10)]
        halves = matrices(weights, split_fused=True)
        assert [block.shape for block in halves] == [(2, 10, 8), (2, 10, 8), (2, 8, 10)]


def test_alternating_gates_of_gpt_oss():
    weight = torch.randn(2, 8, 20)
    weights = {"experts.gate_up_proj": weight, "experts.gate_up_proj_bias": torch.zeros(2, 20)}
    weights["experts.down_proj"] = torch.zeros(2, 10, 8)
    table = matrices(weights, split_fused=True)
    gate, up = weight[..., ::2], weight[..., 1::2]  # as the model does it
    assert torch.equal(table["experts.gate_up_proj[gate]"].view(weight), gate.mT)
    assert torch.equal(table["experts.gate_up_proj[up]"].view(weight), up.mT)


@pytest.mark.parametrize(("kind", "labels"), [(torch.nn.LSTM, "ifgo"), (torch.nn.GRU, "rzn")])
def test_recurrent_gates_come_apart_on_request(kind, labels):
    model = kind(5, 7, num_layers=2, bidirectional=True)
    table = matrices(model, split_fused=True)
    assert len(table) == len(labels) * 8
    assert {block.shape for block in table.blocks("weight_hh_l0")} == {(7, 7)}
    assert [block.name[-2] for block in table.blocks("weight_ih_l1_reverse")] == list(labels)


def test_projected_lstm_gates():
    table = matrices(torch.nn.LSTM(5, 7, proj_size=3), split_fused=True)
    assert {block.shape for block in table.blocks("weight_hh_l0")} == {(7, 3)}


@pytest.mark.parametrize("heads", [5, 0, -1, 2.0, True, "all"])
def test_head_counts_that_do_not_fit_are_refused(heads, unchecked):
    with pytest.raises((ShapeError, OptionError)):
        matrices(llama(), split_heads=heads)


@pytest.mark.parametrize("option", ["include", "exclude", "split_heads", "split_fused"])
def test_a_pattern_that_fits_nothing_names_the_closest_parameters(option):
    pattern = {"*.attn.q_prj.*": 1} if option.startswith("split") else "*.attn.q_prj.*"
    value = {"*.attn.q_prj.*": [1]} if option == "split_fused" else pattern
    with pytest.warns(NothingMatchedWarning) as caught:
        matrices(llama(), **{option: value})
    assert f"{option}: '*.attn.q_prj.*' matches no parameter" in str(caught[0].message)
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught[0].message)


def test_include_and_exclude_choose_among_matrices(unchecked):
    table = matrices(llama(), include=["*.self_attn.*", lambda name: "up_proj" in name], exclude="*.v_proj.*")
    assert [name.split(".")[-2] for name in table.parameters()] == ["q_proj", "k_proj", "o_proj", "up_proj"]
    rules = left(table)
    assert rules["model.layers.0.mlp.down_proj.weight"] == rules["model.layers.0.self_attn.v_proj.weight"] == "excluded"
    with pytest.raises(OptionError, match="patterns"):
        matrices(llama(), include=[3])  # pyright: ignore[reportArgumentType]


def test_including_only_what_is_no_matrix_warns():
    with pytest.warns(NothingMatchedWarning, match="No parameter is treated as a matrix"):
        matrices(llama(), include="*embed_tokens*")


def test_state_dict_convolutions_say_what_was_assumed():
    table = matrices(
        zeros({"features.0.weight": (8, 3, 3, 3), "dwconv.weight": (8, 1, 7, 7), "deconv.weight": (4, 6, 2, 2)})
    )
    assert table["features.0.weight"].shape == (8, 27) and "none assumed" in table["features.0.weight"].reason
    assert table["deconv.weight"].shape == (24, 4)
    assert left(table) == {"dwconv.weight": "vector"}


def test_extra_state_is_a_row_of_its_own(unchecked):
    table = matrices({"a.weight": torch.zeros(3, 3), "a._extra_state": b"x"})  # pyright: ignore[reportArgumentType]
    assert left(table) == {"a._extra_state": "buffer"}
