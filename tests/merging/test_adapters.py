"""Adapters merged in files without their model: against dense matrices, in both formats, and what is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from orthokit.adapters import adapted_layers, adapter_parameters, attach, load, load_peft, rewind, save, save_peft
from orthokit.adapters.boft import BOFT
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.errors import CheckpointError, OptionError, ParameterError, ShapeError, UnknownNameError
from orthokit.linalg import cayley, inverse_cayley, unpack_skew
from orthokit.merging import Recipe, dare, iso_c, knots, task_arithmetic, ties, tsv
from orthokit.merging.adapters import ADAPTER_METHODS, merge_adapters

TURNING = {
    "oft": OFT(4),
    "oft shared": OFT(4, share=True),
    "boft": BOFT(4, factors=1),
    "hra": HRA(4),
}
ADDING = {"lora": LoRA(2, alpha=4), "pissa": LoRA(2, init="pissa"), "full": FullFineTuning()}


class Conv1D(nn.Module):
    """As GPT-2's."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf).normal_()), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def network(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 12)).to(dtype)


def stirred(model, seed, size=0.3, name="default"):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(model, name).values():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def expert(config, seed, *, dtype=torch.float64, make=network, size=0.1):
    return stirred(attach(make(dtype), config, targets="all"), seed, size)


def experts(place, configs, *, write=save, dtype=torch.float64, make=network, size=0.1):
    """Models with adapters, and the folders that they were written to."""
    models = [expert(config, seed, dtype=dtype, make=make, size=size) for seed, config in enumerate(configs)]
    return models, [write(model, place / f"{i}") for i, model in enumerate(models)]


def weights_of(model):
    return {at: layer.effective_weight(dtype=torch.float64).detach() for at, layer in adapted_layers(model).items()}


def same(found, expected, atol=1e-10):
    assert found.keys() == expected.keys()
    for at in found:
        torch.testing.assert_close(found[at], expected[at], rtol=0, atol=atol)


def loaded(folder, make=network, dtype=torch.float64):
    return load(make(dtype), folder)


def _reference(models, weights, clip=10.0):
    """Weights under the merged rotations, from dense ones: Q at the mean length along the mean direction."""
    shares = [w / sum(weights) for w in weights]
    found = {}
    for at, layer in adapted_layers(models[0]).items():
        Q = [inverse_cayley(adapted_layers(model)[at].adapters["default"].dense()) for model in models]
        mean = sum(share * q for share, q in zip(shares, Q, strict=True))
        length = sum(share * q.norm() for share, q in zip(shares, Q, strict=True))
        found[at] = layer.base.weight @ cayley(min(clip, length / mean.norm()) * mean)
    return found


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 3.0, 1.0]])
@pytest.mark.parametrize("kind", TURNING)
def test_rotations_merge_as_dense_matrices_do(kind, weights, tmp_path):
    models, folders = experts(tmp_path, [TURNING[kind]] * 3)
    report = merge_adapters(folders, tmp_path / "out", weights=weights)
    same(weights_of(loaded(tmp_path / "out")), _reference(models, weights))
    for row in report.rows:
        shares = [w / sum(weights) for w in weights]
        assert row["norm"] == pytest.approx(sum(s * n for s, n in zip(shares, row["norms"], strict=True)))
        assert row["correction"] > 1 and not row["clipped"] and -1 <= row["cosine"] <= 1


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (4, 8)])
def test_smaller_blocks_are_put_into_larger_ones(sizes, tmp_path):
    models, folders = experts(tmp_path, [OFT(size) for size in sizes])
    merge_adapters(folders, tmp_path / "out")
    same(weights_of(loaded(tmp_path / "out")), _reference(models, [1.0, 1.0]))


def test_reflections_of_different_numbers_merge(tmp_path):
    models, folders = experts(tmp_path, [HRA(2), HRA(6), HRA(4, symmetric=False)])
    merge_adapters(folders, tmp_path / "out")
    model = loaded(tmp_path / "out")
    same(weights_of(model), _reference(models, [1.0] * 3))
    assert [layer.adapters["merged"].config.rank for layer in adapted_layers(model).values()] == [12, 8]


def test_butterfly_factors_are_merged_one_by_one_with_one_correction_for_the_layer(tmp_path):
    models, folders = experts(tmp_path, [BOFT(4, factors=2)] * 2)
    report = merge_adapters(folders, tmp_path / "out")
    model = loaded(tmp_path / "out")
    for at, row in zip(adapted_layers(model), report.rows, strict=True):
        Q = [unpack_skew(adapted_layers(one)[at].adapters["default"].packed().detach()) for one in models]
        mean, length = (Q[0] + Q[1]) / 2, (Q[0].norm() + Q[1].norm()) / 2
        merged = unpack_skew(adapted_layers(model)[at].adapters["merged"].packed().detach())
        torch.testing.assert_close(merged, mean * length / mean.norm(), rtol=0, atol=1e-12)
        assert row["correction"] == pytest.approx(float(length / mean.norm()))


@pytest.mark.parametrize("method", ["linear", "geodesic"])
def test_means_of_generators_and_of_rotations(method, tmp_path):
    models, folders = experts(tmp_path, [OFT(4)] * 2)
    merge_adapters(folders, tmp_path / "out", method=method, weights=[1.0, 3.0])
    for at, layer in adapted_layers(loaded(tmp_path / "out")).items():
        A, B = (adapted_layers(model)[at].adapters["default"].dense() for model in models)
        found = layer.adapters["merged"].dense()
        if method == "linear":
            torch.testing.assert_close(inverse_cayley(found), (inverse_cayley(A) + 3 * inverse_cayley(B)) / 4)
        else:  # three quarters of the way
            step = A.mT @ found
            torch.testing.assert_close(torch.linalg.matrix_power(step, 4), torch.linalg.matrix_power(A.mT @ B, 3))


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_scale_multiplies_the_merged_generator(factor, tmp_path):
    _, folders = experts(tmp_path, [OFT(4)] * 2)
    whole = merge_adapters(folders, tmp_path / "whole")
    part = merge_adapters(folders, tmp_path / "part", scale=factor)
    assert [row["norm"] for row in part.rows] == pytest.approx([factor * row["norm"] for row in whole.rows])
    for at, layer in adapted_layers(loaded(tmp_path / "whole")).items():
        Q = inverse_cayley(layer.adapters["merged"].dense())
        found = adapted_layers(loaded(tmp_path / "part"))[at].adapters["merged"].dense()
        torch.testing.assert_close(found, cayley(factor * Q), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [*TURNING, *ADDING])
def test_equal_adapters_give_themselves(kind, tmp_path):
    model = expert((TURNING | ADDING)[kind], 3)
    folder = save(model, tmp_path / "one")
    for method in ["orthomerge", "linear", "geodesic"] if kind in TURNING else ["linear", "ties"]:
        options = {"density": 1.0} if method == "ties" else {}
        merge_adapters([folder] * 3, tmp_path / method, method=method, **options)
        same(weights_of(loaded(tmp_path / method)), weights_of(model))


@pytest.mark.parametrize("kind", [*TURNING, *ADDING, "oft exponential", "reflection"])
def test_a_single_adapter_comes_back(kind, tmp_path):
    more = {"oft exponential": OFT(4, map="exp", radius=0.6), "reflection": HRA(3, symmetric=False)}
    model = expert((TURNING | ADDING | more)[kind], 3)
    report = merge_adapters(
        [save(model, tmp_path / "one")], tmp_path / "out", method="linear" if kind in ADDING else "orthomerge"
    )
    same(weights_of(loaded(tmp_path / "out")), weights_of(model))
    assert len(report.rows) == 2


@pytest.mark.parametrize("kind", [*TURNING, *ADDING])
def test_the_order_of_the_folders_does_not_matter(kind, tmp_path):
    _, folders = experts(tmp_path, [(TURNING | ADDING)[kind]] * 3)
    method = "orthomerge" if kind in TURNING else "linear"
    merge_adapters(folders, tmp_path / "out", method=method, weights=[1.0, 2.0, 3.0])
    merge_adapters(folders[::-1], tmp_path / "turned", method=method, weights=[3.0, 2.0, 1.0])
    same(weights_of(loaded(tmp_path / "out")), weights_of(loaded(tmp_path / "turned")))


def test_opposed_rotations_are_clipped_and_reported(tmp_path):
    models, folders = experts(tmp_path, [OFT(4)] * 2)
    with torch.no_grad():
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            if mine.requires_grad:
                theirs.copy_(-0.99 * mine)
    save(models[1], folders[1])
    nearly = merge_adapters(folders, tmp_path / "nearly", clip=4.0)
    for row in nearly.rows:
        assert row["clipped"] and row["correction"] == pytest.approx(199, rel=1e-6)
        assert row["norm"] == pytest.approx(4 * abs(row["norms"][0] - row["norms"][1]) / 2)
    same(weights_of(loaded(tmp_path / "nearly")), _reference(models, [1.0, 1.0], clip=4.0))
    with torch.no_grad():
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            if mine.requires_grad:
                theirs.copy_(-mine)
    save(models[1], folders[1])
    exactly = merge_adapters(folders, tmp_path / "exactly")
    assert all(row["clipped"] and row["correction"] is None and row["norm"] == 0 for row in exactly.rows)
    assert json.loads(exactly.to_json())["rows"][0]["correction"] is None
    same(weights_of(loaded(tmp_path / "exactly")), {at: m.base.weight for at, m in adapted_layers(models[0]).items()})


DENSE = {
    "task_arithmetic": (task_arithmetic, {"scale": 0.4}),
    "ties": (ties, {"density": 0.5}),
    "dare": (dare, {"p": 0.3}),
    "tsv": (tsv, {}),
    "iso_c": (iso_c, {}),
    "knots": (knots, {}),
    "knots-ties": (knots, {"inner": "ties", "density": 0.3}),
}


@pytest.mark.parametrize("kind", ADDING)
@pytest.mark.parametrize("method", DENSE)
def test_changes_merge_as_the_method_merges_them_and_keep_what_the_rank_holds(method, kind, tmp_path):
    models, folders = experts(tmp_path, [ADDING[kind]] * 2)
    function, options = DENSE[method]
    method = method.removesuffix("-ties")
    report = merge_adapters(folders, tmp_path / "out", method=method, weights=[1.0, 2.0], **options)
    found = weights_of(loaded(tmp_path / "out"))
    for row in report.rows:
        W0 = adapted_layers(models[0])[row["name"]].base.weight.detach()
        changes = [weights_of(model)[row["name"]] - W0 for model in models]
        own = {key: value for key, value in options.items() if key != "scale"}
        recipe = Recipe(method, [1.0, 2.0], options.get("scale"), options=own)
        _, given = recipe.for_tensor(row["name"])  # with the seed of the layer
        merged = function(torch.zeros_like(W0), changes, **given)
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
        r = row.get("rank", len(S))
        assert r == (len(S) if kind == "full" else 8 if kind == "pissa" else 4)
        torch.testing.assert_close(found[row["name"]] - W0, (U[:, :r] * S[:r]) @ Vh[:r], rtol=0, atol=1e-10)
        assert row["norms"] == pytest.approx([float(change.norm()) for change in changes])
        cosine = float((changes[0] * changes[1]).sum() / (changes[0].norm() * changes[1].norm()))
        assert row["cosine"] == pytest.approx(cosine)
        if kind != "full":
            assert row["kept"] == pytest.approx(float(S[:r].square().sum() / S.square().sum()))
            assert row["norm"] == pytest.approx(float(S[:r].norm()))


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_smaller_rank_keeps_the_leading_part_and_says_how_much(method, tmp_path):
    _, folders = experts(tmp_path, [LoRA(3)] * 2)
    whole = merge_adapters(folders, tmp_path / "whole", method=method, rank=100)
    part = merge_adapters(folders, tmp_path / "part", method=method, rank=2)
    full, less = loaded(tmp_path / "whole"), loaded(tmp_path / "part")
    for row in part.rows:
        layers = [adapted_layers(model)[row["name"]] for model in (full, less)]
        big, small = (layer.effective_weight(dtype=torch.float64).detach() - layer.base.weight for layer in layers)
        assert row["rank"] == 2 == torch.linalg.matrix_rank(small)
        if method == "linear":
            left = torch.linalg.svdvals(big)[2:]
            assert float((big - small).norm()) == pytest.approx(float(left.norm()))
            assert 1 - row["kept"] == pytest.approx(float(left.square().sum() / big.square().sum()))
    assert [row["rank"] for row in whole.rows] == [6, 6]
    assert all(row["kept"] == pytest.approx(1) for row in whole.rows) or method == "ties"


def test_random_choices_are_of_the_seed_and_of_each_layer(tmp_path):
    def make(dtype):
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)

    one = expert(LoRA(2), 0, make=make)
    with torch.no_grad():
        for a, b in zip(one[0].adapters.parameters(), one[1].adapters.parameters(), strict=True):
            b.copy_(a)
    folders = [save(one, tmp_path / "one")] * 2
    state = torch.random.get_rng_state()
    drawn = []
    for i, seed in enumerate([0, 0, 1]):
        merge_adapters(folders, tmp_path / f"out{i}", method="dare", seed=seed, rank=8)
        drawn.append(load_file(tmp_path / f"out{i}" / "adapter.safetensors"))
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])
    assert any(not torch.equal(drawn[0][key], drawn[2][key]) for key in drawn[0])
    changes = [drawn[0][f"{at}.adapters.merged.up"] @ drawn[0][f"{at}.adapters.merged.down"] for at in (0, 1)]
    assert not torch.allclose(*changes) and torch.equal(torch.random.get_rng_state(), state)


def test_what_acts_at_its_place_on_the_path_goes_in(tmp_path):
    for i, config in enumerate([OFT(4), HRA(4), LoRA(2)]):
        model = rewind(expert(config, 0), 0.25)
        method = "linear" if i == 2 else "orthomerge"
        merge_adapters([save(model, tmp_path / f"one{i}")] * 2, tmp_path / f"out{i}", method=method)
        same(weights_of(loaded(tmp_path / f"out{i}")), weights_of(model))


def test_factors_on_outputs_are_averaged(tmp_path):
    models, folders = experts(tmp_path, [BOFT(4, factors=1, scale_outputs=True), BOFT(4, factors=1)])
    merge_adapters(folders, tmp_path / "out", weights=[3.0, 1.0])
    expected = _reference(models, [3.0, 1.0])
    for at, W in expected.items():
        expected[at] = W * (3 * adapted_layers(models[0])[at].adapters["default"].scale.detach() + 1)[:, None] / 4
    same(weights_of(loaded(tmp_path / "out")), expected)
    with pytest.raises(OptionError, match="scale_outputs is in the way"):
        merge_adapters(folders, tmp_path / "no", method="linear")


def test_every_kind_of_layer_merges(tmp_path):
    def make(dtype):
        conv = nn.Conv2d(8, 8, 3, groups=2, padding=1)
        return nn.ModuleDict({"a": nn.Sequential(nn.Embedding(5, 8), conv), "b": Conv1D(6, 8)}).to(dtype)

    for i, config in enumerate([OFT(2), OFT(4, conv="patches"), BOFT(2, factors=2), LoRA(2)]):
        place = tmp_path / f"{i}"
        models, folders = experts(place, [config] * 2, make=lambda dtype: _again(make, dtype))
        method = "orthomerge" if i < 3 else "linear"
        report = merge_adapters(folders, place / "out", method=method)
        assert [row["name"] for row in report.rows] == ["a.0", "a.1", "b"]
        merge_adapters(folders[:1], place / "one", method=method)
        same(weights_of(load(_again(make, torch.float64), place / "one")), weights_of(models[0]))
        with pytest.raises(OptionError, match=r"no folder tells that of 'a\.1'"):
            merge_adapters(folders, place / "peft", method=method, format="peft")


def _again(make, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return make(dtype)


def test_a_bare_layer_and_narrow_types_merge(tmp_path):
    for i in range(2):
        layer = stirred(attach(nn.Linear(8, 4), OFT(4)), i)
        save(layer, tmp_path / f"{i}")
    merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    assert load(nn.Linear(8, 4), tmp_path / "out").active == ("merged",)
    _, folders = experts(tmp_path / "peft", [OFT(4)] * 2, write=save_peft, dtype=torch.float32)
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({key: t.bfloat16() for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    merge_adapters(folders, tmp_path / "wide", format="peft")
    assert {t.dtype for t in load_file(tmp_path / "wide" / "adapter_model.safetensors").values()} == {torch.float32}


WRITTEN = {
    "oft": (OFT(4), OFT(8)),
    "oft series": (OFT(4, map="cayley_neumann", terms=3, tolerance=None),) * 2,
    "oft exponential": (OFT(4, map="exp"), OFT(4)),
    "boft": (BOFT(4, factors=2), BOFT(4, factors=2)),
    "hra": (HRA(4), HRA(2)),
    "lora": (LoRA(2, alpha=3), LoRA(3)),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind != "oft exponential"])
def test_folders_of_peft_merge_as_our_own_do(kind, tmp_path):
    """Without PEFT: what save_peft wrote, merged, and read by load_peft."""
    configs, method = WRITTEN[kind], "linear" if kind == "lora" else "orthomerge"
    models = [expert(config, seed, dtype=torch.float32) for seed, config in enumerate(configs)]
    if kind == "boft":  # PEFT's has one factor of larger blocks, of which ours are another merge
        models = [load_peft(network(torch.float32), save_peft(m, tmp_path / f"b{i}")) for i, m in enumerate(models)]
    ours = [save(model, tmp_path / f"ours{i}") for i, model in enumerate(models)]
    theirs = [save_peft(model, tmp_path / f"theirs{i}") for i, model in enumerate(models)]
    merge_adapters(ours, tmp_path / "out", method=method)
    expected = weights_of(loaded(tmp_path / "out", dtype=torch.float32))
    for name, folders in {"theirs": theirs, "mixed": [theirs[0], ours[1]], "turned": [ours[0], theirs[1]]}.items():
        merge_adapters(folders, tmp_path / f"{name}.peft", method=method, format="peft")
        same(weights_of(load_peft(network(torch.float32), tmp_path / f"{name}.peft")), expected, atol=2e-6)
        report = merge_adapters(folders, tmp_path / f"{name}.own", method=method)
        same(weights_of(loaded(tmp_path / f"{name}.own", dtype=torch.float32)), expected, atol=2e-6)
        known = kind in ("lora", "boft") or name != "theirs"
        assert [row["shape"] for row in report.rows] == ([[8, 16], [12, 8]] if known else [[None, 16], [None, 8]])


@torch.no_grad()
def test_rotations_of_peft_go_with_any_number_of_outputs_and_no_other_width(tmp_path):
    _, folders = experts(tmp_path, [OFT(4)] * 2, write=save_peft, dtype=torch.float32)
    merge_adapters(folders, tmp_path / "out")
    merge_adapters([tmp_path / "out"] * 2, tmp_path / "again")
    other = nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(8, 3))
    assert load(other, tmp_path / "again")[0].active == ("merged",)
    with pytest.raises(CheckpointError, match="1 of its 2 layers differ"):
        load(nn.Sequential(nn.Linear(12, 5), nn.Tanh(), nn.Linear(8, 3)), tmp_path / "again")


def test_layers_are_named_so_that_no_others_are_found(tmp_path):
    def make(dtype):
        return nn.ModuleDict({"q": nn.Linear(8, 8), "inner": nn.ModuleDict({"q": nn.Linear(8, 8)})}).to(dtype)

    folders = []
    for i in range(2):
        model = attach(make(torch.float32), LoRA(2), targets="q")
        folders.append(save_peft(model, tmp_path / f"{i}"))
        config = json.loads((folders[i] / "adapter_config.json").read_text())
        (folders[i] / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    merge_adapters(folders, tmp_path / "out", method="linear", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == "q" and config["task_type"] == "CAUSAL_LM"


@pytest.mark.peers
@torch.no_grad()
@pytest.mark.parametrize("kind", WRITTEN)
def test_peft_computes_with_the_merged_adapter_what_we_do(kind, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'orthokit[peers]'")
        configs, method = WRITTEN[kind], "linear" if kind == "lora" else "orthomerge"
        if kind == "oft exponential":
            method = "geodesic"
        _, folders = experts(tmp_path, configs, dtype=torch.float32)
        merge_adapters(folders, tmp_path / "peft", method=method, format="peft")
        merge_adapters(folders, tmp_path / "own", method=method)
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
        theirs = peft.PeftModel.from_pretrained(network(torch.float32), tmp_path / "peft").eval()
        torch.testing.assert_close(theirs(x), loaded(tmp_path / "own", dtype=torch.float32)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.peers
@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"type": "OFTConfig", "oft_block_size": 4},
        {"type": "OFTConfig", "oft_block_size": 4, "use_cayley_neumann": False},
        {"type": "BOFTConfig", "boft_block_size": 4},
        {"type": "HRAConfig", "r": 4},
        {"type": "LoraConfig", "r": 3, "lora_alpha": 7, "use_rslora": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_what_peft_wrote_is_merged(options, tmp_path):
    """One that is merged with itself computes what PEFT computes; two make up another."""
    given = dict(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'orthokit[peers]'")
        config = getattr(peft, given.pop("type"))(target_modules=["0", "2"], **given)
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
        outputs = []
        for seed in range(2):
            theirs = peft.get_peft_model(network(torch.float32), config).eval()
            generator = torch.Generator().manual_seed(seed)
            for p in theirs.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
            theirs.save_pretrained(tmp_path / f"{seed}")
            outputs.append(theirs(x))
        method = "linear" if "Lora" in options["type"] else "orthomerge"
        merge_adapters([tmp_path / "0"] * 2, tmp_path / "twice", method=method, format="peft")
        again = peft.PeftModel.from_pretrained(network(torch.float32), tmp_path / "twice").eval()
        torch.testing.assert_close(again(x), outputs[0], rtol=1e-5, atol=1e-5)
        merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "both", method=method, format="peft")
        both = peft.PeftModel.from_pretrained(network(torch.float32), tmp_path / "both").eval()
        own = load_peft(network(torch.float32), tmp_path / "both")
        torch.testing.assert_close(both(x), own(x), rtol=1e-5, atol=1e-5)
        assert (both(x) - outputs[0]).abs().max() > 1e-3


def refused(error, words, folders, place, **options):
    before = sorted(one.name for one in place.iterdir())
    with pytest.raises(error, match=words):
        merge_adapters(folders, options.pop("out", place / "out"), **options)
    assert sorted(one.name for one in place.iterdir()) == before


def test_options_out_of_range_are_refused_and_nothing_is_written(tmp_path):
    _, (a, b) = experts(tmp_path, [OFT(4)] * 2)
    lora = save(expert(LoRA(2), 0), tmp_path / "lora")
    refused(OptionError, "must be a list of paths", str(a), tmp_path)
    refused(OptionError, "folders is empty", [], tmp_path)
    refused(UnknownNameError, "unknown method 'fisher'", [a, b], tmp_path, method="fisher")
    refused(UnknownNameError, "unknown format 'onnx'", [a, b], tmp_path, format="onnx")
    refused(UnknownNameError, "unknown intensity 'least'", [a, b], tmp_path, intensity="least")
    refused(UnknownNameError, "option of orthomerge on adapters 'density'", [a, b], tmp_path, density=0.5)
    refused(UnknownNameError, "option of ties 'p'", [lora], tmp_path, method="ties", p=0.5)
    refused(OptionError, "clip must be", [a, b], tmp_path, clip=0.5)
    refused(OptionError, "rank must be a whole number", [lora], tmp_path, method="linear", rank=0)
    refused(OptionError, "rank is for LoRA", [a, b], tmp_path, method="linear", rank=4)
    refused(OptionError, "one finite number per folder", [a, b], tmp_path, weights=[1.0])
    refused(OptionError, "one finite number per folder", [a, b], tmp_path, weights=[1.0, float("nan")])
    refused(OptionError, "at least 0", [a, b], tmp_path, weights=[1.0, -1.0])
    refused(OptionError, "must not sum to 0", [a, b], tmp_path, method="linear", weights=[1.0, -1.0])
    refused(OptionError, "scale must be", [a, b], tmp_path, scale=float("inf"))
    refused(OptionError, "letters, digits", [a, b], tmp_path, name="no spaces")
    refused(OptionError, "merge_checkpoints", [lora], tmp_path)
    refused(OptionError, "geodesic is for rotations", [lora], tmp_path, method="geodesic")
    refused(OptionError, "ties merges changes of weights", [a, b], tmp_path, method="ties")
    refused(CheckpointError, "exists already", [a, b], tmp_path, out=b)
    (tmp_path / "file").write_text("")
    refused(CheckpointError, "cannot be written", [a, b], tmp_path, out=tmp_path / "file" / "out")
    assert ADAPTER_METHODS[0] == "orthomerge"


def test_folders_that_do_not_fit_each_other_are_refused(tmp_path):
    _, (oft, half, hra, lora, dora) = experts(tmp_path, [OFT(4), OFT(8), HRA(3, symmetric=False), LoRA(2), DoRA(2)])
    boft = save(expert(BOFT(2), 0), tmp_path / "boft")
    refused(OptionError, "'0' has oft in .* and lora in", [oft, lora], tmp_path)
    refused(OptionError, "'0' has oft in .* and boft in", [oft, boft], tmp_path)
    refused(OptionError, "odd number of reflections", [hra, hra], tmp_path)
    refused(OptionError, "depends on the weights of the model", [dora, dora], tmp_path, method="linear")
    some = save(attach(network(), OFT(4), targets="0"), tmp_path / "some")
    refused(ParameterError, "some lacks '2', against", [oft, some], tmp_path)
    refused(ParameterError, "has '2' besides", [some, oft], tmp_path)
    wide = save(attach(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16)), OFT(4)), tmp_path / "wide")
    refused(ShapeError, r"'2' is linear \(12, 8\) in .* and linear \(16, 8\) in .*1 of 2", [oft, wide], tmp_path)
    theirs = save_peft(stirred(attach(nn.Sequential(nn.Linear(12, 8)), HRA(2)), 0), tmp_path / "theirs")
    ours = save(attach(nn.Sequential(nn.Linear(8, 8)), HRA(2)), tmp_path / "ours")
    refused(CheckpointError, "'0' must have the tensors", [ours, theirs], tmp_path)
    turned = save(expert(BOFT(4, factors=2), 0), tmp_path / "turned")
    refused(OptionError, "block sizes of boft must be equal", [boft, turned], tmp_path)
    exponential = save(expert(OFT(4, map="exp"), 0), tmp_path / "exponential")
    refused(OptionError, "no common scale", [oft, exponential], tmp_path)
    refused(
        ParameterError,
        "PEFT has nothing like",
        [save(expert(FullFineTuning(), 0), tmp_path / "full")],
        tmp_path,
        method="linear",
        format="peft",
    )
    merge_adapters([oft, half], tmp_path / "out")


def test_damaged_folders_are_refused(tmp_path):
    _, (a, b) = experts(tmp_path, [OFT(4)] * 2)
    _, (c, d) = experts(tmp_path / "peft", [OFT(4)] * 2, write=save_peft, dtype=torch.float32)
    refused(CheckpointError, "there is no such folder", [a, tmp_path / "nowhere"], tmp_path)
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, "it holds nothing", [a, tmp_path / "empty"], tmp_path)
    for folder, file, words in ((b, "adapter.safetensors", "no whole"), (d, "adapter_model.safetensors", "no whole")):
        (folder / file).write_bytes((folder / file).read_bytes()[:-9])
        refused(CheckpointError, words, [a if folder is b else c, folder], tmp_path)
    (d / "adapter_model.safetensors").rename(d / "adapter_model.bin")
    refused(CheckpointError, "a pickle", [c, d], tmp_path)
    tensors = load_file(c / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, c / "adapter_model.safetensors")
    refused(CheckpointError, "NaN", [c], tmp_path)
    save_file(tensors | {key: tensors[key].flatten()}, c / "adapter_model.safetensors")
    refused(CheckpointError, "packed generators|cannot be read", [c], tmp_path)
    save_file(tensors | {"base_model.model.head.weight": torch.ones(2, 2)}, c / "adapter_model.safetensors")
    refused(CheckpointError, "weights of the model besides", [c], tmp_path)
    config = json.loads((c / "adapter_config.json").read_text())
    save_file(tensors, c / "adapter_model.safetensors")
    (c / "adapter_config.json").write_text(json.dumps(config | {"block_share": True, "r": 0}))
    refused(CheckpointError, "shares one block", [c], tmp_path)
    text = (a / "adapter.json").read_text()
    (a / "adapter.json").write_text(text[:-20])
    refused(CheckpointError, "cannot be read", [a], tmp_path)
    two = attach(expert(OFT(4), 0), OFT(4), name="other")
    refused(CheckpointError, "must hold one adapter", [save(two, tmp_path / "two")], tmp_path)
    beside = attach(network(), OFT(4), targets="0", train="2")
    refused(CheckpointError, "weights of the model besides", [save(beside, tmp_path / "beside")], tmp_path)
    _, (e,) = experts(tmp_path / "lora", [LoRA(2)], write=save_peft, dtype=torch.float32)
    config = json.loads((e / "adapter_config.json").read_text())
    (e / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    refused(CheckpointError, "depends on the weights", [e], tmp_path, method="linear")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    _, folders = experts(tmp_path, [OFT(4)] * 2)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("orthokit.merging.adapters.save", full)
    refused(CheckpointError, "cannot be written: no space left", folders, tmp_path)
    monkeypatch.undo()
    merge_adapters(folders, tmp_path / "new" / "out")
    assert sorted(one.name for one in (tmp_path / "new").iterdir()) == ["out"]
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == (tmp_path / "0").stat().st_mode & 0o777
