"""Which parameters of a PyTorch model are matrices, decided by the modules that own them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthokit.errors import DtypeError, NothingMatchedWarning, ParameterError
from orthokit.matrices import matrices


class Zoo(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, 12)
        self.conv = nn.Conv3d(4, 8, 3)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.attn = nn.MultiheadAttention(12, 4)
        self.lstm = nn.LSTM(5, 7)
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.norm = nn.LayerNorm((3, 4))
        self.experts = nn.Parameter(torch.randn(3, 8, 9))
        self.pos_embed = nn.Parameter(torch.randn(1, 9, 12))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.gate = nn.Linear(12, 1)
        self.nothing = nn.Linear(0, 4)
        self.lm_head = nn.Linear(12, 50, bias=False)
        self.lm_head.weight = self.wte.weight


RULES = {
    "conv.weight": ("conv", (8, 108)),
    "up.weight": ("conv_transposed", (54, 4)),
    "attn.in_proj_weight": ("fused", (36, 12)),
    "attn.out_proj.weight": ("linear", (12, 12)),
    "lstm.weight_ih_l0": ("recurrent", (28, 5)),
    "lstm.weight_hh_l0": ("recurrent", (28, 7)),
    "bilinear.weight": ("bilinear", (5, 3, 4)),
    "experts": ("stack", (3, 8, 9)),
}
LEFT_OUT = {
    "wte.weight": "embedding",
    "depthwise.weight": "vector",
    "norm.weight": "norm",
    "pos_embed": "embedding",
    "scale": "scalar",
    "gate.weight": "vector",
    "nothing.weight": "empty",
    "lm_head.weight": "tied",
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_every_kind_of_layer_has_its_rule():
    model = Zoo()
    table = matrices(model)
    assert {block.name: (block.rule, block.shape) for block in table} == RULES
    left = {row.name: row.rule for row in table.left_out}
    assert {name: rule for name, rule in left.items() if rule != "bias"} == LEFT_OUT
    assert table.parameters() == [name for name, _ in model.named_parameters() if name in RULES]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(table.parameters() + list(left)) == sorted(every)


def test_tied_weights_count_once_and_both_names_are_told():
    model = nn.ModuleDict({"wte": nn.Embedding(9, 4), "inner": nn.Linear(4, 3), "lm_head": nn.Linear(4, 9, bias=False)})
    model["lm_head"].weight = model["wte"].weight
    for source in (model, model.state_dict()):
        table = matrices(source)
        rows = {row.name: row for row in table.left_out}
        assert rows["lm_head.weight"].reason == "output head: tied to 'wte.weight'"
        assert "also 'lm_head.weight'" in rows["wte.weight"].reason
        assert sum(row.numel for row in table.left_out) + table[0].numel == 9 * 4 + 4 * 3 + 3


def test_tied_hidden_layers_are_one_block():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    model["b"].weight = model["a"].weight
    assert [block.name for block in matrices(model)] == ["a.weight"]
    assert matrices(model)["a.weight"].shape == (3, 4)


def test_equal_parameters_that_are_not_the_same_are_both_blocks():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    model["b"].load_state_dict(model["a"].state_dict())
    assert len(matrices(model)) == len(matrices(model.state_dict())) == 2


def test_a_head_tied_to_an_embedding_that_comes_later_is_an_embedding():
    model = nn.ModuleDict({"first": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4), "l": nn.Linear(4, 4)})
    model["first"].weight = model["table"].weight
    assert {row.name: row.rule for row in matrices(model).left_out if row.rule != "bias"} == {
        "first.weight": "embedding",
        "table.weight": "tied",
    }


@pytest.mark.parametrize("vocabulary", [256, 300])
def test_an_output_head_is_known_by_its_rows_but_never_inside_a_block(vocabulary):
    width = 256
    model = nn.ModuleDict(
        {
            "tok": nn.Embedding(vocabulary, width),
            "blocks": nn.ModuleList([nn.ModuleDict({"output": nn.Linear(width, width, bias=False)})]),
            "output": nn.Linear(width, vocabulary, bias=False),
        }
    )
    table = matrices(model)
    assert table.parameters() == ["blocks.0.output.weight"]
    assert table.left_out[-1].rule == "head" and "'tok.weight'" in table.left_out[-1].reason


def test_a_classifier_is_a_matrix():
    assert matrices(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))).parameters() == ["0.weight", "2.weight"]


def test_frozen_parameters_keep_their_row_and_say_so():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    first, second = matrices(model)
    assert first.trainable is False and "frozen" in first.reason
    assert second.trainable is True and "frozen" not in second.reason
    assert all(block.trainable is None for block in matrices(model.state_dict()))


@pytest.mark.parametrize("register", [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.spectral_norm])
def test_parametrized_weights_are_read_as_the_layer_they_make(register):
    layer = register(nn.Linear(5, 4))
    block = matrices(layer)["parametrizations.weight.original"]
    assert (block.rule, block.shape) == ("linear", (4, 5))


def test_weight_norm_has_a_direction_and_a_magnitude():
    table = matrices(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    assert {block.name: block.shape for block in table} == {"parametrizations.weight.original1": (4, 27)}
    assert [row.rule for row in table.left_out] == ["bias", "vector"]


def test_conv1d_is_known_by_its_class_name():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 6
            self.weight = nn.Parameter(torch.randn(4, 6))
            self.bias = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return x @ self.weight + self.bias

    layer = Conv1D()
    block = matrices(layer)["weight"]
    x = torch.randn(4)
    assert (block.rule, block.shape) == ("conv1d_transposed", (6, 4))
    torch.testing.assert_close(layer(x), block.view(layer.weight) @ x)


def test_meta_and_lazy_parameters_need_no_data():
    with torch.device("meta"):
        big = nn.Linear(10_000, 20_000)
    assert matrices(big)["weight"].shape == (20_000, 10_000)
    with pytest.warns(NothingMatchedWarning, match="not initialised yet"):
        table = matrices(nn.LazyLinear(4, bias=False))
    assert table.left_out[0].rule == "uninitialised"


def test_named_parameters_and_complex_weights_are_taken():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    assert matrices(model.named_parameters())["weight"].dtype == torch.complex64


@pytest.mark.parametrize("source", [nn.LayerNorm(4), nn.ReLU(), {"bias": torch.zeros(3)}, []])
def test_a_model_without_matrices_warns(source):
    with pytest.warns(NothingMatchedWarning, match="No parameter is treated as a matrix"):
        assert len(matrices(source)) == 0


@pytest.mark.parametrize("source", [torch.randn(3, 3), "model.safetensors", 3, [torch.randn(2, 2)]])
def test_other_sources_are_refused(source, unchecked):
    with pytest.raises(DtypeError, match=r"state dict|pairs"):
        matrices(source)


def test_a_checkpoint_around_a_state_dict_is_refused_with_the_way_in(unchecked):
    with pytest.raises(DtypeError, match=r"checkpoint\['model'\]"):
        matrices({"model": {"a.weight": torch.randn(2, 2)}})
    with pytest.raises(DtypeError, match="'epoch' holds int"):
        matrices({"epoch": 3})


def test_a_name_given_twice_is_refused():
    with pytest.raises(ParameterError, match=r"'a\.weight' is given twice"):
        matrices([("a.weight", torch.randn(2, 2)), ("a.weight", torch.randn(2, 2))])


NAMES = st.from_regex(r"(h\.[0-3]\.)?(wte|attn|mlp|conv|norm|fc|lm_head)\.(weight|bias|w1|qkv)", fullmatch=True)


@given(
    st.dictionaries(NAMES, st.lists(st.integers(0, 4), max_size=5).map(tuple), min_size=1, max_size=8), st.booleans()
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::orthokit.errors.NothingMatchedWarning")
def test_any_names_and_shapes_give_each_parameter_one_fate(shapes, fused):
    weights = {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}
    table = matrices(weights, split_fused=fused)
    assert sorted(table.parameters() + [row.name for row in table.left_out]) == sorted(weights)
    for name in table.parameters():
        blocks = table.blocks(name)
        assert sum(block.numel for block in blocks) == weights[name].numel()
        assert all(min(block.shape[-2:]) > 1 and block.reason for block in blocks)
    assert all(row.reason for row in table.left_out)
