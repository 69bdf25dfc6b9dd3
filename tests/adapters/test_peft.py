"""Adapters of PEFT read and written: golden files that PEFT made, and PEFT itself where it is installed."""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orthokit.adapters import adapted_layers, attach, detach, merge, set_adapters
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.peft_export import save_peft
from orthokit.adapters.peft_forms import NeumannSumOFT
from orthokit.adapters.peft_import import load_peft
from orthokit.adapters.peft_read import read_peft
from orthokit.errors import CheckpointError, OptionError, ParameterError
from orthokit.linalg import cayley, cayley_neumann, unpack_skew

GOLDEN = Path(__file__).parent / "data" / "peft"
CASES = json.loads((GOLDEN / "cases.json").read_text())
BASE = load_file(GOLDEN / "base.safetensors")
# Both compute in float32, with outputs of a few units.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


class Conv1D(nn.Module):
    """As GPT-2's."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False)),
    "embedding": lambda: nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 8)),
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)),
    "point": lambda: nn.Sequential(nn.Conv2d(8, 6, 1)),
    "transposed": lambda: nn.Sequential(Conv1D(24, 16)),
}


def network(kind: str) -> nn.Module:
    model = MODELS[kind]()
    names = [key for key in BASE if key.startswith(f"{kind}.") and key != f"{kind}.x"]
    model.load_state_dict({key.removeprefix(f"{kind}."): BASE[key] for key in names})
    return model


def stir(model: nn.Module, size: float = 0.09) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in layer.adapters.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model.eval()


def folder_of(tmp_path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{key}": t.contiguous() for key, t in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_golden_adapters_compute_what_peft_computed(case):
    kind, expected = CASES[case], load_file(GOLDEN / case / "outputs.safetensors")
    x, model = BASE[f"{kind}.x"], network(kind)
    load_peft(model, GOLDEN / case)
    # PEFT's OFT on patches computes something else than it merges: what it merges is what was meant.
    if case != "oft_conv-0.21.2":
        torch.testing.assert_close(model(x), expected["forward"], **CLOSE)
    else:
        assert (expected["forward"] - expected["merged"]).abs().max() > 1
    torch.testing.assert_close(model(x), expected["merged"], **CLOSE)
    torch.testing.assert_close(merge(model)(x), expected["merged"], **CLOSE)
    if not case.startswith("oft_t1"):
        assert (network(kind)(x) - expected["merged"]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_what_was_read_from_peft_is_written_for_it_again(case, tmp_path):
    kind, expected = CASES[case], load_file(GOLDEN / case / "outputs.safetensors")
    model = load_peft(network(kind), GOLDEN / case, name="theirs")
    if case in ("oft-0.17.1", "oft_t8-0.17.1"):
        with pytest.raises(ParameterError, match=r"before 0\.18"):
            save_peft(model, tmp_path)
        return
    # One term is the identity, read as a series of zeros; of a series on patches PEFT has no layer that computes it.
    if refused := {"oft_t1-0.21.2": "does not have", "oft_conv-0.21.2": "no layer that computes the same"}.get(case):
        with pytest.raises(ParameterError, match=refused):
            save_peft(model, tmp_path)
        return
    save_peft(model, tmp_path)
    again = load_peft(network(kind), tmp_path)
    torch.testing.assert_close(again(BASE[f"{kind}.x"]), expected["merged"], **CLOSE)


@pytest.mark.parametrize(
    "case",
    [
        *("oft-0.21.2", "oft_exact-0.21.2", "oft_share-0.21.2", "oft_rank-0.21.2", "oft_t2-0.21.2", "oft_t8-0.21.2"),
        *("oft_point-0.21.2", "oft_embedding-0.21.2", "hra-0.21.2", "hra_gs-0.21.2", "hra_conv-0.21.2"),
        *("lora-0.21.2", "lora_patterns-0.21.2", "lora_embedding-0.21.2", "lora_conv-0.21.2", "lora_transposed-0.21.2"),
        *("dora-0.21.2", "dora_conv-0.21.2"),
    ],
)
def test_files_come_back_as_peft_wrote_them(case, tmp_path):
    save_peft(load_peft(network(CASES[case]), GOLDEN / case), tmp_path)
    mine, theirs = (load_file(at / "adapter_model.safetensors") for at in (tmp_path, GOLDEN / case))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=0)
    mine, theirs = (json.loads((at / "adapter_config.json").read_text()) for at in (tmp_path, GOLDEN / case))
    assert mine.keys() <= theirs.keys()
    patterns = {"rank_pattern", "alpha_pattern"}
    theirs["target_modules"].sort()
    # A number of terms that is another name of the same map, and the one of two sizes that says the other.
    given = {"num_cayley_neumann_terms", "r", "oft_block_size"} if mine["peft_type"] == "OFT" else {"r", "lora_alpha"}
    if not any(mine.get(one) for one in patterns):
        given = set()
    loose = patterns | given | ({"num_cayley_neumann_terms", "init_weights"} & mine.keys())
    assert {k: v for k, v in mine.items() if k not in loose} == {k: theirs[k] for k in mine if k not in loose}


def test_numbers_of_0_17_and_0_18_mean_different_rotations(tmp_path):
    config = {"peft_type": "OFT", "oft_block_size": 4, "num_cayley_neumann_terms": 5, "use_cayley_neumann": True}
    v = torch.full((4, 6), 0.2)
    folder = folder_of(tmp_path, config, {"0.oft_R.weight": v})
    Q = unpack_skew(v.double())[0]
    older = torch.eye(4) + 2 * (Q + Q @ Q + Q @ Q @ Q + Q @ Q @ Q @ Q)
    newer = cayley_neumann(Q, terms=3)
    for version, expected in ((None, older), ("0.16.0", older), ("0.18", newer), ("0.21.2", newer)):
        model = load_peft(network("linear"), folder, version=version)
        # Rows are turned by x S; here the weight becomes W R with R = S^T.
        assert torch.allclose(model[0].adapters["default"].dense()[:4, :4].T, expected, atol=1e-6)


def test_the_exact_map_has_the_other_sign(tmp_path):
    config = {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": False, "peft_version": "0.21.2"}
    v = torch.full((4, 6), 0.2)
    model = load_peft(network("linear"), folder_of(tmp_path, config, {"0.oft_R.weight": v}))
    S = cayley(-unpack_skew(v.double())[0])
    assert torch.allclose(model[0].adapters["default"].dense()[:4, :4].T, S, atol=1e-6)


@pytest.mark.parametrize(
    ("version", "message"), [("new", "is a release"), ("0.15.2", "0.16 or later"), ("0.13", "0.16 or later")]
)
def test_a_release_that_contradicts_the_tensors_is_refused(version, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        read_peft(GOLDEN / "oft-0.21.2", version=version)


def test_dense_matrices_are_of_no_later_release():
    with pytest.raises(OptionError, match=r"of 0\.14 or 0\.15"):
        read_peft(GOLDEN / "oft-0.15.2", version="0.17")
    assert read_peft(GOLDEN / "oft-0.15.2").release.number == (0, 15)
    assert read_peft(GOLDEN / "oft-0.17.1").release.number == (0, 17)
    assert read_peft(GOLDEN / "oft-0.18.1").release.number == (0, 18)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "VERA"}, {"0.vera_A": torch.ones(1)}, r"type 'VERA'; read are OFT, BOFT, HRA and LORA"),
        ({"peft_type": "OFT"}, {"0.oft_r": torch.zeros(4, 4, 4)}, r"0\.13 or earlier"),
        ({"peft_type": "OFT"}, {"0.oft_r": torch.zeros(1), "0.oft_R.weight": torch.zeros(4, 6)}, r"0\.13 or earlier"),
        ({"peft_type": "OFT"}, {"0.oft_R.weight": torch.zeros(4, 5)}, r"b \(b - 1\) / 2 columns"),
        ({"peft_type": "OFT"}, {"0.weight": torch.zeros(4, 5)}, "no tensor of a OFT"),
        ({"peft_type": "HRA"}, {"0.hra_u": torch.full((16, 1), torch.nan)}, "NaN or infinite"),
        ({"peft_type": "HRA"}, {"0.hra_u": torch.ones(12, 1)}, r"vectors is \(1, 16\) in the model, \(1, 12\)"),
        ({"peft_type": "HRA"}, {"5.hra_u": torch.ones(16, 1)}, "1 of its 1 layers are not there .such as '5'"),
        ({"peft_type": "BOFT"}, {"0.boft_R": torch.zeros(1, 4, 4, 4)}, "lacks 'boft_s'"),
        ({"peft_type": "BOFT"}, {"0.boft_R": torch.zeros(4), "0.boft_s": torch.ones(24, 1)}, "cannot be read"),
        (
            {"peft_type": "BOFT"},
            {"0.boft_R": torch.zeros(1, 4, 5, 5), "0.boft_s": torch.ones(24, 1)},
            "does not fit the model: block_size must divide",
        ),
        ({"peft_type": "OFT", "coft": True, "eps": 0.0}, {"0.oft_R.weight": torch.zeros(4, 6)}, "radius must be"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": "a"}, {"0.oft_R.weight": torch.zeros(4, 6)}, "be read"),
        ({"peft_type": "LORA", "lora_alpha": 1}, {"0.lora_A.weight": torch.zeros(2, 16)}, "lacks 'lora_B'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words_and_nothing_changes(tmp_path, config, tensors, message):
    model = network("linear")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_peft(model, folder_of(tmp_path, config, tensors))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


LORA = {"0.lora_A.weight": torch.full((2, 16), 0.1), "0.lora_B.weight": torch.full((24, 2), 0.1)}


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"use_qalora": True}, {}, "a LoRA with use_qalora"),
        ({"alora_invocation_tokens": [1]}, {}, "a LoRA with alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, {}, "another weight in the place of the frozen one"),
        ({"lora_bias": True}, {"0.lora_B.bias": torch.ones(24)}, "a bias in B"),
        ({}, {"0.token_adapter": torch.ones(2)}, "neither the adapter's nor the model's: '0.token_adapter'"),
        ({}, {"2.weight": torch.ones(16, 24)}, "other weights of the model as well: '2.weight'"),
    ],
)
def test_loras_that_compute_something_else_are_refused(tmp_path, options, more, message):
    folder = folder_of(tmp_path, {"peft_type": "LORA", "lora_alpha": 4, **options}, LORA | more)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_peft(network("linear"), folder)


def test_lora_on_groups_and_dora_on_words_are_refused(tmp_path):
    tensors = {"0.lora_A.weight": torch.zeros(2, 4, 3, 3), "0.lora_B.weight": torch.zeros(6, 1, 1, 1)}
    folder = folder_of(tmp_path, {"peft_type": "LORA", "lora_alpha": 4}, tensors)
    with pytest.raises(CheckpointError, match="convolution with groups"):
        load_peft(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), folder)
    tensors = {"0.lora_embedding_A": torch.zeros(2, 11), "0.lora_embedding_B": torch.zeros(16, 2)}
    tensors["0.lora_magnitude_vector.weight"] = torch.ones(16)
    with pytest.raises(CheckpointError, match="DoRA on an embedding"):
        load_peft(network("embedding"), folder_of(tmp_path, {"peft_type": "LORA", "lora_alpha": 4}, tensors))


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="weights_only=True") as raised:
        load_peft(network("linear"), tmp_path)
    command = str(raised.value).split('-c "')[1].rstrip('"')
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(command, namespace)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["a"], torch.ones(1))


def test_weights_of_the_model_are_refused_loaded_or_left(tmp_path):
    head = torch.ones(16, 24)
    folder = folder_of(tmp_path, {"peft_type": "LORA", "lora_alpha": 2}, LORA | {"2.weight": head})
    before = network("linear")[2].weight
    assert torch.equal(load_peft(network("linear"), folder, weights="leave")[2].weight, before)
    model = load_peft(network("linear"), folder, weights="load")
    assert torch.equal(model[2].weight, head)
    # Beside an adapter that sits on the layer, and where they are the model's own, nothing is refused.
    model = attach(network("linear"), OFT(4), name="mine")
    assert torch.equal(load_peft(model, folder, name="theirs", weights="load")[2].base.weight, head)
    folder_of(tmp_path, {"peft_type": "LORA", "lora_alpha": 2}, LORA | {"2.base_layer.weight": before.detach()})
    assert torch.equal(load_peft(network("linear"), folder)[2].weight, before)


@torch.no_grad()
def test_ranks_beyond_the_matrix_and_odd_scales_are_folded(tmp_path):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(20, 16, generator=generator), torch.randn(24, 20, generator=generator)
    x = BASE["linear.x"]
    for alpha in (10, -10, 0):
        tensors = {"0.lora_A.weight": down, "0.lora_B.weight": up}
        folder = folder_of(tmp_path, {"peft_type": "LORA", "lora_alpha": alpha, "lora_dropout": 0.1}, tensors)
        model = load_peft(network("linear"), folder).eval()
        change = alpha / 20 * (x @ down.T) @ up.T
        torch.testing.assert_close(model[0](x), network("linear")[0](x) + change, rtol=1e-4, atol=1e-4)
        assert model[0].adapters["default"].config.rank == 16


CHANNELS = OFT(2), OFT(2, conv="patches"), BOFT(2, factors=2), HRA(2), LoRA(2), DoRA(2)
LINEAR = (
    OFT(4, angle_scale=2.0),
    OFT(4, map="exp"),
    OFT(4, map="cayley_neumann", terms=3, tolerance=None),
    OFT(4, map="cayley_neumann", terms=6, tolerance=None),
    OFT(4, map="cayley_neumann", terms=4),
    OFT(4, share=True, radius=0.3),
    NeumannSumOFT(4, terms=1),
    BOFT(4, factors=2),
    BOFT(4, factors=2, map="exp", scale_outputs=True),
    BOFT(4, factors=1, share=True, scale_outputs=True),
    HRA(4),
    HRA(3, symmetric=False, orthogonal=True),
    LoRA(4),
    LoRA(4, 6.0, rank_stabilised=True),
    LoRA(4, 6.0, init="pissa"),
    LoRA(3, init="milora"),
    DoRA(3, 5.0),
    DoRA(3, init="pissa"),
)
EXPORTED = [
    *(("linear", config) for config in LINEAR),
    *(("conv", config) for config in CHANNELS),
    ("point", OFT(4)),
    ("embedding", OFT(4)),
    ("embedding", OFT(4, map="cayley_neumann", terms=3, tolerance=None)),
    ("embedding", LoRA(3, 2.0)),
    ("transposed", LoRA(3)),
    ("transposed", DoRA(3)),
]
IDS = [f"{kind}-{i}-{config.kind}" for i, (kind, config) in enumerate(EXPORTED)]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "config"), EXPORTED, ids=IDS)
def test_what_is_written_for_peft_computes_the_same_when_read(kind, config, tmp_path):
    x, model = BASE[f"{kind}.x"], stir(attach(network(kind), config, targets="all"))
    again = load_peft(network(kind), save_peft(model, tmp_path))
    torch.testing.assert_close(again(x), model(x), **CLOSE)
    assert (network(kind)(x) - model(x)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.4])
@pytest.mark.parametrize("config", [OFT(4), OFT(4, map="exp"), BOFT(4, scale_outputs=True), LoRA(4, 3.0)])
def test_a_rewound_adapter_is_written_as_far_as_it_is(config, strength, tmp_path):
    x, model = BASE["linear.x"], stir(attach(network("linear"), config))
    for layer in adapted_layers(model).values():
        layer.adapters["default"].strength = strength
    again = load_peft(network("linear"), save_peft(model, tmp_path))
    torch.testing.assert_close(again(x), model(x), **CLOSE)


@torch.no_grad()
def test_several_adapters_are_written_one_by_one(tmp_path):
    x, model = BASE["linear.x"], attach(attach(network("linear"), OFT(4), name="a"), LoRA(2), name="b")
    stir(model)
    with pytest.raises(ParameterError, match=r"holds one adapter and the model has \['a', 'b'\]"):
        save_peft(model, tmp_path)
    for name in "ab":
        save_peft(model, tmp_path / name, name=name)
    again = network("linear")
    for name in "ab":
        load_peft(again, tmp_path / name, name=name)
    torch.testing.assert_close(again(x), model(x), **CLOSE)
    torch.testing.assert_close(set_adapters(again, ["b", "a"])(x), set_adapters(model, ["b", "a"])(x), **CLOSE)


def _exotic() -> nn.Module:
    return attach(network("linear"), OFT(4, map="exp_taylor"))


def _half_turn() -> nn.Module:
    model = attach(nn.Sequential(nn.Linear(2, 2)), OFT(2, map="exp", block_rate=False))
    with torch.no_grad():
        model[0].adapters["default"].generator.fill_(torch.pi)
    return model


def _not_finite() -> nn.Module:
    model = attach(network("linear"), OFT(4))
    with torch.no_grad():
        model[0].adapters["default"].generator.fill_(torch.inf)
    return model


def _mixed() -> nn.Module:
    return attach(attach(network("linear"), OFT(4), targets="0"), LoRA(2), targets="2")


def _two_series() -> nn.Module:
    model = network("linear")
    for path, k in (("0", 3), ("2", 4)):
        attach(model, OFT(4, map="cayley_neumann", terms=k, tolerance=None), targets=path)
    return model


def _rewound_hra() -> nn.Module:
    model = attach(network("linear"), HRA(2))
    model[0].adapters["default"].strength = 0.5
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_exotic, "'exp_taylor', which is not orthogonal"),
        (_half_turn, "by nearly 180 degrees"),
        (_not_finite, "holds NaN or an infinity"),
        (_mixed, "of one kind and this one is ['lora', 'oft']"),
        (_two_series, "has one map for all layers"),
        (_rewound_hra, "rewound to 0.5"),
        (lambda: attach(network("linear"), FullFineTuning()), "nothing like an adapter of kind 'full'"),
        (lambda: attach(network("linear"), OFT(4, map="cayley_neumann", terms=1, tolerance=None)), "does not have"),
        (lambda: attach(network("linear"), NeumannSumOFT(4, terms=4)), "before 0.18"),
        (lambda: attach(network("transposed"), OFT(4), targets="linear"), "no OFT for '0'"),
        (lambda: attach(network("embedding"), BOFT(4), targets="all"), "no BOFT for '0'"),
        (lambda: attach(network("embedding"), HRA(2), targets="all"), "no HRA for '0'"),
        (lambda: attach(network("embedding"), DoRA(2), targets="all"), "no DoRA for '0'"),
        (lambda: attach(nn.Linear(4, 4), OFT(4)), "a bare layer"),
        (lambda: attach(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), OFT(2), targets="all"), "the groups of '0'"),
        (lambda: attach(nn.Sequential(nn.Conv2d(4, 4, (3, 1))), HRA(2), targets="all"), "another convolution"),
        (lambda: attach(nn.Sequential(nn.Conv1d(4, 4, 3)), OFT(2), targets="all"), "another convolution"),
    ],
)
def test_what_peft_cannot_express_is_refused_in_words(make, message, tmp_path):
    with pytest.raises((ParameterError, OptionError), match=re.escape(message)):
        save_peft(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_conv_of_one_dimension_is_written_as_lora(tmp_path):
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Conv1d(4, 6, 3)), torch.ones(1, 4, 7)
    model = stir(attach(copy.deepcopy(plain), LoRA(2), targets="all"))
    torch.testing.assert_close(load_peft(plain, save_peft(model, tmp_path))(x), model(x), **CLOSE)


def test_layers_are_named_so_that_peft_finds_no_others(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.block = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)})

    save_peft(attach(Net(), OFT(4), targets=["q"]), tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert [path for path in ("q", "block.q", "block.v") if re.fullmatch(targets, path)] == ["q"]
    save_peft(attach(Net(), OFT(4), targets=["q", "block.q"]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["block.q", "q"]
    # A name that ends in another one finds its own rank first.
    model = attach(attach(Net(), LoRA(2), targets=["q"]), LoRA(4), targets=["block.q", "block.v"])
    config = json.loads((save_peft(model, tmp_path) / "adapter_config.json").read_text())
    for path, rank in (("q", 2), ("block.q", 4), ("block.v", 4)):
        keys = [key for key in config["rank_pattern"] if re.match(rf"(.*\.)?({key})$", path)]
        assert (config["rank_pattern"][keys[0]] if keys else config["r"]) == rank


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="peft is not installed: pip install 'orthokit[peers]'")


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.peers
@pytest.mark.usefixtures("quiet")
@torch.no_grad()
@pytest.mark.parametrize(("kind", "config"), [one for one in EXPORTED if one[0] != "transposed"])
def test_peft_itself_computes_and_merges_what_was_written(peft, kind, config, tmp_path):
    x, model = BASE[f"{kind}.x"], stir(attach(network(kind), config, targets="all"))
    theirs = peft.PeftModel.from_pretrained(network(kind), save_peft(model, tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    torch.testing.assert_close(theirs.merge_and_unload()(x), model(x), **CLOSE)


@pytest.mark.peers
@pytest.mark.usefixtures("quiet")
@torch.no_grad()
def test_peft_reads_a_head_that_was_trained_beside(peft, tmp_path):
    model = attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), OFT(4, init_std=0.1), targets="0", train="1")
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    plain[0].load_state_dict(model[0].base.state_dict())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), save_peft(model, tmp_path)).eval()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    torch.testing.assert_close(load_peft(plain, tmp_path, weights="load")(x), model(x), **CLOSE)


@pytest.mark.peers
@pytest.mark.usefixtures("quiet")
@torch.no_grad()
@pytest.mark.parametrize("config", [LoRA(3), LoRA(3, 5.0, rank_stabilised=True), DoRA(3)])
def test_peft_reads_what_was_written_for_gpt2s_layers(peft, config, tmp_path):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    plain, x = nn.Sequential(pytorch_utils.Conv1D(24, 16)), BASE["transposed.x"]
    model = stir(attach(copy.deepcopy(plain), config))
    theirs = peft.PeftModel.from_pretrained(plain, save_peft(model, tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)


@pytest.mark.peers
@pytest.mark.usefixtures("quiet")
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"type": "OFTConfig", "oft_block_size": 8},
        {"type": "OFTConfig", "oft_block_size": 8, "use_cayley_neumann": False, "block_share": True},
        {"type": "OFTConfig", "r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 6},
        {"type": "BOFTConfig", "boft_block_size": 8},
        {"type": "HRAConfig", "r": 4, "apply_GS": True},
        {"type": "LoraConfig", "r": 3, "lora_alpha": 7, "use_rslora": True},
        {"type": "LoraConfig", "r": 3, "init_lora_weights": "pissa", "use_dora": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_peft_writes_now_is_read(peft, options, tmp_path):
    given = dict(options)
    config = getattr(peft, given.pop("type"))(target_modules=["0", "2"], **given)
    theirs = peft.get_peft_model(network("linear"), config).eval()
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        if p.requires_grad:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    x = BASE["linear.x"]
    theirs.save_pretrained(tmp_path)
    expected = theirs(x)
    torch.testing.assert_close(load_peft(network("linear"), tmp_path)(x), expected, **CLOSE)


@pytest.mark.peers
@pytest.mark.usefixtures("quiet")
@torch.no_grad()
def test_two_oft_adapters_act_in_the_order_of_pefts_forward_pass_not_of_its_merge(peft, tmp_path):
    x, model = BASE["linear.x"], attach(attach(network("linear"), OFT(4), name="a"), OFT(8), name="b")
    stir(model, 0.4)
    for name in "ab":
        save_peft(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(network("linear"), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(theirs.eval()(x), model(x), **CLOSE)
    torch.testing.assert_close(merge(copy.deepcopy(model))(x), model(x), **CLOSE)
    # The defect that the audit names: with the order turned round here, PEFT's merge is met.
    merged = theirs.merge_and_unload(adapter_names=["a", "b"])(x)
    assert (merged - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(set_adapters(model, ["b", "a"])(x), merged, **CLOSE)


@pytest.mark.peers
@pytest.mark.usefixtures("quiet")
@torch.no_grad()
def test_models_of_transformers_compute_the_same_with_either(peft, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    bert = transformers.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=32)
    x = torch.arange(1, 13).view(1, -1)
    cases = [
        (transformers.LlamaForCausalLM(llama), peft.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=8)),
        (
            transformers.BertForSequenceClassification(bert),
            peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2),
        ),
    ]
    for model, config in cases:
        plain = copy.deepcopy(model.eval())
        theirs = peft.get_peft_model(model, config).eval()
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
        theirs.save_pretrained(tmp_path)
        if config.task_type:
            with pytest.raises(CheckpointError, match=r"'classifier\.bias', 'classifier\.weight'"):
                load_peft(plain, tmp_path)
        mine = load_peft(plain, tmp_path, weights="load")
        torch.testing.assert_close(mine(x).logits, theirs(x).logits, **CLOSE)


def test_an_adapter_of_peft_is_taken_off_again():
    model = network("linear")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    detach(load_peft(model, GOLDEN / "oft-0.21.2"))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
