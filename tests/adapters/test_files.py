"""Adapters written to a folder and read again: exact, whole, and refused in words when they do not fit."""

import copy
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from orthokit.adapters import adapted_layers, adapter_state_dict, attach, detach, merge, set_adapters
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.files import load, read, save
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.peft_forms import NeumannSumOFT
from orthokit.errors import CheckpointError, OptionError, ParameterError, UnknownNameError

CONFIGS = [
    OFT(4),
    OFT(2, share=True, radius=0.5),
    OFT(4, map="cayley_neumann", terms=3, tolerance=None),
    NeumannSumOFT(4, terms=4),
    BOFT(4, factors=2, scale_outputs=True),
    HRA(2),
    LoRA(3, 5.0),
    LoRA(2, init="pissa"),
    DoRA(2),
    FullFineTuning(),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)).to(dtype)


def stir(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in layer.adapters.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))


def trained(config=None, *, name: str = "default", model: nn.Module | None = None) -> nn.Module:
    model = attach(network() if model is None else model, config or OFT(4), name=name)
    stir(model)
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str], list[bool]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [f"{name}: {type(layer).__name__}" for name, layer in model.named_modules()]
    return state, kinds, [p.requires_grad for p in model.parameters()]


def assert_unchanged(model: nn.Module, before: tuple[dict[str, torch.Tensor], list[str], list[bool]]) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in after[0].items())


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(CONFIGS), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.floats(0.1, 1.0),
    st.randoms(use_true_random=False),
)
def test_what_is_loaded_computes_the_same_to_the_bit(tmp_path_factory, configs, dtype, strength, random):
    plain = network(dtype)
    model = copy.deepcopy(plain)
    names = [f"a{i}" for i in range(len(configs))]
    for name, config in zip(names, configs, strict=True):
        attach(model, config, name=name)
    stir(model)
    order = random.sample(names, random.randint(1, len(names)))
    set_adapters(model, order)
    for layer in adapted_layers(model).values():
        for name, config in zip(names, configs, strict=True):
            layer.adapters[name].strength = 1.0 if config.kind == "hra" else strength
    folder = save(model, tmp_path_factory.mktemp("adapter"))
    again = load(copy.deepcopy(plain), folder)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert [layer.active for layer in adapted_layers(again).values()] == [tuple(order)] * 2
    mine, theirs = adapter_state_dict(model), adapter_state_dict(again)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype for key, value in mine.items())


@pytest.mark.parametrize(
    ("model", "x", "config"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), torch.ones(1, 4, 5, 5), OFT(2)),
        (nn.Sequential(nn.Conv1d(4, 6, 3)), torch.ones(1, 4, 5), OFT(6, conv="patches")),
        (nn.Sequential(nn.Embedding(9, 8)), torch.arange(9), OFT(4)),
        (nn.Sequential(nn.Embedding(9, 8)), torch.arange(9), LoRA(2)),
    ],
    ids=["grouped", "patches", "embedding", "lora"],
)
def test_convolutions_and_embeddings_come_back(tmp_path, model, x, config):
    own = copy.deepcopy(model)
    model = attach(model, config, targets="all")
    stir(model)
    save(model, tmp_path)
    assert torch.equal(load(own, tmp_path)(x), model(x))


def test_a_bare_layer_is_not_changed_and_its_adapted_one_is_returned(tmp_path):
    linear = nn.Linear(8, 4)
    layer = attach(copy.deepcopy(linear), OFT(4))
    stir(layer)
    save(layer, tmp_path)
    again, x = load(linear, tmp_path), torch.ones(1, 8)
    assert type(linear) is nn.Linear
    assert torch.equal(again(x), layer(x))


def test_layers_with_options_of_their_own_come_back(tmp_path):
    model = attach(attach(network(), OFT(4), targets="0"), LoRA(2), targets="2")
    stir(model)
    save(model, tmp_path)
    assert {path: e.config for path, e in read(tmp_path).plan["default"].items()} == {"0": OFT(4), "2": LoRA(2)}
    assert torch.equal(load(network(), tmp_path)(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_the_weights_of_the_model_are_not_in_the_file(tmp_path):
    save(trained(), tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert set(load_file(tmp_path / "adapter.safetensors")) == {
        "0.adapters.default.generator",
        "2.adapters.default.generator",
    }


def test_one_of_several_is_saved_and_loaded_by_name(tmp_path):
    model = trained(LoRA(2), name="b", model=trained(OFT(4), name="a"))
    save(model, tmp_path / "both")
    save(model, tmp_path / "one", name="b")
    x = torch.ones(1, 8)
    alone = set_adapters(model, "b")(x)
    assert torch.equal(load(network(), tmp_path / "both", name="b")(x), alone)
    assert torch.equal(load(network(), tmp_path / "one")(x), alone)
    with pytest.raises(UnknownNameError, match="unknown adapter 'c'"):
        load(network(), tmp_path / "both", name="c")
    with pytest.raises(ParameterError, match="no layer of Sequential has an adapter 'c'"):
        save(model, tmp_path, name="c")


def test_a_single_adapter_takes_the_name_that_it_is_given(tmp_path):
    save(trained(OFT(4), name="old"), tmp_path)
    model = load(trained(LoRA(2), name="mine"), tmp_path, name="new")
    assert [layer.active for layer in adapted_layers(model).values()] == [("mine", "new")] * 2


def test_adapters_that_are_there_get_the_numbers(tmp_path):
    model = trained(OFT(4, dropout=0.1))
    save(model, tmp_path)
    fresh = attach(network(), OFT(4))
    parts = [layer.adapters["default"] for layer in adapted_layers(fresh).values()]
    load(fresh, tmp_path)
    assert [layer.adapters["default"] for layer in adapted_layers(fresh).values()] == parts
    assert torch.equal(fresh(torch.ones(1, 8)), model.eval()(torch.ones(1, 8)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: attach(network(), OFT(4, map="exp")), "map 'exp' and 'cayley' in the file"),
        (lambda: attach(network(), LoRA(2)), "it is lora, and oft in the file"),
        (lambda: attach(network(), OFT(4), targets="0"), "on other layers"),
        (lambda: attach(network(), OFT(2)), "block_size 2 and 4 in the file"),
        (lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), r"linear \(12, 8\) in the model"),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(8, 16)), "2 of its 2 layers are not there .* '0' is a Tanh"),
        (lambda: nn.Sequential(nn.Conv1d(8, 16, 1), nn.Tanh(), nn.Linear(16, 8)), "conv .* in the model, linear"),
    ],
)
def test_an_adapter_for_another_model_is_refused_and_nothing_changes(tmp_path, other, message):
    save(trained(), tmp_path)
    model = other()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load(model, tmp_path)
    assert_unchanged(model, before)


def test_a_name_that_no_adapter_can_have_is_no_fault_of_the_file(tmp_path):
    save(trained(), tmp_path)
    model = network()
    before = snapshot(model)
    for name in ("a.b", "keys", "training"):
        with pytest.raises(OptionError, match="name"):
            load(model, tmp_path, name=name)
    assert_unchanged(model, before)


def test_a_failure_halfway_takes_back_what_was_attached(tmp_path):
    model = trained(OFT(4), name="a")
    attach(model, OFT(4), targets="0", name="b")
    attach(model, LoRA(3), targets="2", name="b")
    save(model, tmp_path)
    listed = json.loads((tmp_path / "adapter.json").read_text())
    # The second group of the second adapter does not fit any more.
    listed["configs"][1]["rank"] = 7
    (tmp_path / "adapter.json").write_text(json.dumps(listed))
    plain = network()
    before = snapshot(plain)
    with pytest.raises(CheckpointError, match=r"'2': (down|up) is .* in the model, .* in the file"):
        load(plain, tmp_path)
    assert_unchanged(plain, before)


def test_merged_adapters_are_not_written_over(tmp_path):
    save(trained(), tmp_path)
    model = merge(trained(), keep=True)
    before = snapshot(model)
    with pytest.raises(ParameterError, match="call unmerge first"):
        load(model, tmp_path)
    with pytest.raises(ParameterError, match="call unmerge first"):
        load(model, tmp_path, name="another")
    assert_unchanged(model, before)


def _cut(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _other_tensors(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    save_file({key: value + 1 for key, value in tensors.items()}, folder / "adapter.safetensors")


def _edit(**values):
    def damage(folder: Path) -> None:
        listed = json.loads((folder / "adapter.json").read_text())
        (folder / "adapter.json").write_text(json.dumps(listed | values))

    return damage


def _config(**values):
    def damage(folder: Path) -> None:
        listed = json.loads((folder / "adapter.json").read_text())
        listed["configs"][0] |= values
        (folder / "adapter.json").write_text(json.dumps(listed))

    return damage


def _retensor(change):
    """Other tensors, with the digest that goes with them."""

    def damage(folder: Path) -> None:
        import hashlib

        path = folder / "adapter.safetensors"
        save_file(change(load_file(path)), path)
        _edit(sha256=hashlib.sha256(path.read_bytes()).hexdigest())(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "no whole safetensors file"),
        (_other_tensors, "is not the file that the JSON"),
        (lambda folder: (folder / "adapter.safetensors").write_bytes(b"\x80\x05pickle"), "no whole safetensors file"),
        (lambda folder: (folder / "adapter.safetensors").unlink(), "has no adapter.safetensors"),
        (lambda folder: (folder / "adapter.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter.json").write_text("[1]"), "holds a list"),
        (lambda folder: (folder / "adapter.json").unlink(), "has no adapter.json; it holds 'adapter.safetensors'"),
        (_edit(format="other"), "its format is 'other'"),
        (_edit(version=1), "has version 1 .* reads version 2"),
        (_edit(configs=[]), "is damaged"),
        (_edit(layers={"0": {}}), "is damaged"),
        (_edit(layers={}), "tensors of no adapter"),
        (_config(kind="vera"), "kind 'vera'; this orthokit knows"),
        (_config(twist=1), "options of 'oft' that this orthokit does not know: 'twist'"),
        (_config(block_size=0), "options that cannot be"),
        (_retensor(lambda t: {k: v * torch.inf for k, v in t.items()}), "NaN or infinite entries: 0: generator"),
        (_retensor(lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()}), r"generator is \(2, 6\) in the model"),
        (_retensor(lambda t: {k + "s": v for k, v in t.items()}), "has no generator in the file"),
        (_retensor(lambda t: t | {"stray": torch.ones(1)}), "tensors of no adapter: 'stray'"),
    ],
)
def test_a_damaged_folder_is_refused_in_words_and_nothing_changes(tmp_path, damage, message):
    save(trained(), tmp_path)
    damage(tmp_path)
    model = network()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load(model, tmp_path)
    assert_unchanged(model, before)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere has no adapter\.json; there is no such folder"):
        load(network(), tmp_path / "nowhere")


def test_numbers_that_are_none_are_not_written(tmp_path):
    model = trained()
    with torch.no_grad():
        model[2].adapters["default"].generator[0, 0] = torch.nan
    with pytest.raises(ParameterError, match=r"'2.adapters.default.generator' hold NaN"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_on_the_dense_path_is_not_written(tmp_path):
    model = trained()
    model[0].blend = 0.5
    with pytest.raises(ParameterError, match="dense path"):
        save(model, tmp_path)


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(ParameterError):
        save(network(), tmp_path)


def test_an_interrupted_writing_leaves_the_old_pair(tmp_path, monkeypatch):
    model = trained()
    save(model, tmp_path)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    stir(model, seed=5)

    def fails(number: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == before


def test_what_is_loaded_can_be_taken_off_again(tmp_path):
    save(trained(), tmp_path)
    model = network()
    before = snapshot(model)
    assert_unchanged(detach(load(model, tmp_path)), before)


def test_a_model_divided_by_fsdp_writes_and_reads_whole_tensors(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    plain = trained()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(copy.deepcopy(plain))
        fresh = fully_shard(attach(network(), OFT(4)))
        load(fresh, save(model, tmp_path))
        for key, value in adapter_state_dict(plain).items():
            assert torch.equal(adapter_state_dict(fresh)[key].full_tensor(), value)
    finally:
        distributed.destroy_process_group()
    assert torch.equal(load(network(), tmp_path)(torch.ones(1, 8)), plain(torch.ones(1, 8)))


def test_weights_that_the_model_shares_may_stay_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(x))

    torch.manual_seed(0)
    plain = Tied()
    model = attach(copy.deepcopy(plain), OFT(4), targets=["head", "table"])
    stir(model)
    save(model, tmp_path)
    again = load(plain, tmp_path)
    assert again.head.base.weight is again.table.base.weight
    assert torch.equal(again(torch.arange(9)), model(torch.arange(9)))


def with_head(seed):
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(body=nn.Linear(8, 8), score=nn.Linear(8, 3)))


def test_what_was_trained_beside_is_written_and_read(tmp_path):
    model = attach(with_head(0), OFT(4, init_std=0.1), train="score")
    fresh = with_head(1)
    fresh.body.load_state_dict(model.body.base.state_dict())
    load(fresh, save(model, tmp_path))
    x = torch.randn(5, 8)
    assert torch.equal(fresh(x), model(x)) and fresh.score.weight.requires_grad
    # It is written again from there.
    again = with_head(2)
    again.body.load_state_dict(model.body.base.state_dict())
    assert torch.equal(load(again, save(fresh, tmp_path / "again"))(x), model(x))


def test_a_head_of_another_shape_is_refused_and_nothing_changes(tmp_path):
    save(attach(with_head(0), OFT(4, init_std=0.1), train="score"), tmp_path)
    other = with_head(1)
    other.score = nn.Linear(8, 5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'score', which was trained beside.*\(3, 8\).*\(5, 8\)"):
        load(other, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(CheckpointError, match="no such module"):
        load(nn.Sequential(OrderedDict(body=nn.Linear(8, 8))), tmp_path)
