"""Several adapters made into one: means of generators and of rotations, and sums that are exact."""

import copy
import itertools

import pytest
import torch
from adapters_models import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthokit.adapters import adapter_parameters, attach, merge, set_adapters
from orthokit.adapters.boft import BOFT
from orthokit.adapters.combine import combine, rotation_log, rotation_mean
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.paths import rewind
from orthokit.errors import OptionError, ParameterError, UnknownNameError
from orthokit.linalg import cayley, exp, orthogonality_error, skew_part, unpack_skew

METHODS = ("lie", "geodesic")
TURNING = {
    "oft": OFT(4),
    "oft exponential": OFT(4, map="exp"),
    "oft series": OFT(4, map="cayley_neumann", tolerance=None),
    "oft shared": OFT(4, share=True),
    "oft scaled": OFT(4, angle_scale=0.5, block_rate=False, radius=0.6),
    "boft": BOFT(4, factors=2),
}
ADDING = {"lora": LoRA(2, alpha=4), "pissa": LoRA(2, init="pissa"), "full": FullFineTuning()}


def model_with(configs, *, size=0.09, seed=0):
    """A small model with one adapter of each of ``configs``, named by its key and away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)).double()
    for i, (name, config) in enumerate(configs.items()):
        attach(model, config, name=name)
        generator = torch.Generator().manual_seed(100 * seed + i)
        with torch.no_grad():
            for p in adapter_parameters(model, name).values():
                p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def several(config, n=3, **options):
    return model_with(dict.fromkeys("abcdef"[:n], config), **options)


def weight(model, *names):
    """Effective weights with these adapters alone."""
    before = [layer.active for layer in model]
    set_adapters(model, names)
    found = [layer.effective_weight(dtype=torch.float64).detach() for layer in model]
    for layer, active in zip(model, before, strict=True):
        layer.active = active
    return found


def changes(model, name):
    return [W - layer.base.weight for W, layer in zip(weight(model, name), model, strict=True)]


def same(found, expected, atol=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def rotations(model, name):
    return [layer.adapters[name].dense() for layer in model]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TURNING | ADDING)
def test_a_single_weight_of_one_gives_that_adapter_back(kind, method):
    model = several((TURNING | ADDING)[kind])
    for i, name in enumerate("abc"):
        one_hot = [float(j == i) for j in range(3)]
        combine(model, ["a", "b", "c"], one_hot, into=f"only_{name}", method=method)
        same(weight(model, f"only_{name}"), weight(model, name))
    same(weight(combine(model, ["b"], into="alone", method=method), "alone"), weight(model, "b"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TURNING | ADDING)
def test_the_order_of_the_adapters_does_not_matter(kind, method):
    model = several((TURNING | ADDING)[kind])
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    orders = list(itertools.permutations("abc"))[::2]
    for i, names in enumerate(orders):
        combine(model, names, [weights[name] for name in names], into=f"mean{i}", method=method)
        same(weight(model, f"mean{i}"), weight(model, "mean0"))
    combine(model, ["a", "b"], [0.3, 0.7], into="ab", method=method)
    combine(model, ["b", "a"], [0.7, 0.3], into="ba", method=method)
    same(weight(model, "ab"), weight(model, "ba"))


@settings(max_examples=8)
@given(w=st.floats(0, 1), map=st.sampled_from(["cayley", "exp"]))
def test_lie_is_the_map_of_the_mean_generator(w, map):
    model = several(OFT(4, map=map), 2)
    Q = [[layer.adapters[name].packed().detach() for layer in model] for name in "ab"]
    combine(model, ["a", "b"], [w, 1 - w])
    same(
        [layer.adapters["combined"].packed().detach() for layer in model],
        [w * a + (1 - w) * b for a, b in zip(*Q, strict=True)],
    )


@settings(max_examples=8)
@given(w=st.floats(0, 1), map=st.sampled_from(["cayley", "exp"]))
def test_two_rotations_are_joined_by_the_shortest_way(w, map):
    """Every point divides the angle between them in the ratio of the weights, and stays a rotation."""
    model = several(OFT(4, map=map), 2)
    combine(model, ["a", "b"], [1 - w, w], method="geodesic")
    for a, b, m in zip(*(rotations(model, name) for name in ("a", "b", "combined")), strict=True):
        whole, part = rotation_log(a.mT @ b), rotation_log(a.mT @ m)
        torch.testing.assert_close(part, w * whole, rtol=0, atol=1e-9)
        assert float(orthogonality_error(m)) < 1e-12


@settings(max_examples=8)
@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4))
def test_generators_that_commute_have_one_mean_with_the_exponential(raw):
    weights = [w / sum(raw) for w in raw]
    names = "abcdef"[: len(raw)]
    model = several(OFT(2, map="exp", block_rate=False), len(raw), size=0.4)  # planes: all rotations commute
    powers = []
    for layer in model:
        A = [torch.block_diag(*unpack_skew(layer.adapters[name].packed().detach())) for name in names]
        powers.append(exp(sum(w * a for w, a in zip(weights, A, strict=True))))
    for method in METHODS:
        combine(model, list(names), weights, into=method, method=method)
        same(rotations(model, method), powers)


@pytest.mark.parametrize("n", [3, 5])
def test_the_mean_of_several_balances_their_logarithms(n):
    model = several(OFT(4), n, size=0.08)
    weights = [(i + 1) / (n * (n + 1) / 2) for i in range(n)]
    combine(model, list("abcdef"[:n]), weights, method="geodesic")
    for *turned, mean in zip(*(rotations(model, name) for name in [*"abcdef"[:n], "combined"]), strict=True):
        balance = sum(w * rotation_log(mean.mT @ R) for w, R in zip(weights, turned, strict=True))
        assert float(balance.abs().max()) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["oft", "oft exponential", "boft"])
def test_an_adapter_and_its_inverse_cancel(kind, method):
    model = several(TURNING[kind], 2, size=0.035)  # by less than a quarter turn, or the shortest way is the other one
    for layer in model:
        with torch.no_grad():
            layer.adapters["b"].generator.copy_(-layer.adapters["a"].generator)
    if kind != "boft":
        for a, b in zip(rotations(model, "a"), rotations(model, "b"), strict=True):
            torch.testing.assert_close(a, b.mT, rtol=0, atol=1e-12)
    combine(model, ["a", "b"], [0.5, 0.5], method=method)
    same(weight(model, "combined"), [layer.base.weight.detach() for layer in model])


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(0, 1000), st.floats(0.01, 0.4))
def test_logarithm_and_mean_against_their_definitions(b, seed, size):
    generator = torch.Generator().manual_seed(seed)
    A = skew_part(torch.randn(4, b, b, generator=generator, dtype=torch.float64)) * size
    R = exp(A)
    if float(torch.linalg.matrix_norm(A, 2).max()) < 3:
        torch.testing.assert_close(rotation_log(R), A, rtol=0, atol=1e-10)
    assert torch.equal(rotation_log(R), -rotation_log(R).mT)
    torch.testing.assert_close(rotation_mean(torch.stack([R, R, R]), [0.2, 0.3, 0.5]), R, rtol=0, atol=1e-12)
    turned = cayley(A[:1])
    both = torch.stack([turned @ R, turned @ R.mT, turned @ R @ R])
    # The mean moves with the rotations.
    if float(torch.linalg.matrix_norm(A, 2).max()) < 0.7:
        mean = rotation_mean(turned.mT @ both, [0.25, 0.25, 0.5])
        torch.testing.assert_close(rotation_mean(both, [0.25, 0.25, 0.5]), turned @ mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_smaller_blocks_are_put_into_larger_ones(method):
    model = model_with({"a": OFT(2), "b": OFT(4), "c": OFT(4, share=True)})
    for names, hot in ((["a", "b"], 0), (["b", "a"], 1), (["a", "c"], 0), (["c", "b"], 0)):
        weights = [float(i == hot) for i in range(2)]
        into = "".join(names)
        combine(model, names, weights, into=into, method=method)
        same(weight(model, into), weight(model, names[hot]))
        assert model[0].adapters[into].config.block_size == 4
    mixed = model_with({"a": OFT(2, angle_scale=3.0), "b": OFT(4, block_rate=False)})
    combine(mixed, ["a", "b"], [0.0, 1.0], method=method, config=OFT(4, angle_scale=0.25, dropout=0.1))
    same(weight(mixed, "combined"), weight(mixed, "b"))
    assert mixed[0].adapters["combined"].config.dropout == 0.1


@settings(max_examples=8)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=3), st.sampled_from(sorted(ADDING)))
def test_adapters_that_add_give_the_exact_sum(weights, kind):
    names = list("abc"[: len(weights)])
    model = several(ADDING[kind], len(weights))
    combine(model, names, weights)
    each = zip(*(changes(model, name) for name in names), strict=True)
    expected = [sum(w * d for w, d in zip(weights, ds, strict=True)) for ds in each]
    same(changes(model, "combined"), expected)


def test_ranks_add_up_to_the_smaller_side():
    model = combine(several(LoRA(3), 2), ["a", "b"])
    assert model[0].adapters["combined"].config.rank == 6
    model = several(LoRA(8), 3)
    expected = [sum(d) / 3 for d in zip(*(changes(model, n) for n in "abc"), strict=True)]
    combine(model, ["a", "b", "c"])
    assert model[0].adapters["combined"].config.rank == 8
    same(changes(model, "combined"), expected)


def test_what_acts_at_its_place_on_the_path_goes_in():
    model = several(OFT(4), 2)
    rewind(model, 0.25, name="a")
    combine(model, ["a", "b"], [1.0, 0.0], into="quarter")
    same(weight(model, "quarter"), weight(model, "a"))
    rewind(model, 1.0, name="a")
    assert not torch.allclose(weight(model, "quarter")[0], weight(model, "a")[0], atol=1e-3)
    model = several(LoRA(2), 2)
    rewind(model, 0.5, name="b")
    same(changes(combine(model, ["b"], [2.0]), "combined"), changes(rewind(model, 1.0), "b"))


@pytest.mark.parametrize("kind", ["oft", "lora"])
def test_the_new_adapter_acts_alone_or_rests_and_the_others_are_left(kind):
    model = several((TURNING | ADDING)[kind], 2)
    x = torch.ones(1, 16, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    y, active = model(x), model[0].active
    combine(model, ["a", "b"], into="rests", activate=False)
    assert torch.equal(model(x), y) and model[0].active == active
    assert not any(p.requires_grad for p in adapter_parameters(model, "rests").values())
    assert all(p.requires_grad for p in adapter_parameters(model, "a").values())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    combine(model, ["a", "b"], into="acts")
    assert model[0].active == ("acts",)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".acts." in name for name in trained)
    same(weight(model, "rests"), weight(model, "acts"))
    y = model(x)
    for name in ("a", "b", "rests"):
        for layer in model:
            layer.remove(name)
    torch.testing.assert_close(merge(model)(x), y, rtol=0, atol=1e-12)


def test_maps_of_one_family_meet_in_the_exact_map():
    model = model_with({"a": OFT(4), "b": OFT(4, map="cayley_neumann", terms=2), "c": OFT(4, map="exp")}, size=0.05)
    combine(model, ["b", "a"], [0.5, 0.5])
    assert model[0].adapters["combined"].config.map == "cayley"
    combine(model, ["a", "c"], [0.0, 1.0], into="other", method="geodesic")
    same(weight(model, "other"), weight(model, "c"))
    with pytest.raises(OptionError, match="method='geodesic'"):
        combine(model, ["a", "c"], into="third")


def test_convolutions_and_embeddings_combine():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Embedding(10, 8)).double()
    for name in "ab":
        attach(model, OFT(2 if name == "a" else 4, init_std=0.3, seed=ord(name)), targets="all", name=name)
    combine(model, ["a", "b"], [1.0, 0.0])
    same(weight(model, "combined"), weight(model, "a"))


def refused(model, error, words, *arguments, **options):
    before, active = copy.deepcopy(model.state_dict()), model[0].active
    with pytest.raises(error, match=words):
        combine(model, *arguments, **options)
    assert model.state_dict().keys() == before.keys() and model[0].active == active


def test_what_cannot_be_combined_is_refused_and_nothing_changes():
    model = model_with({"a": OFT(4), "b": OFT(4), "lora": LoRA(2), "hra": HRA(4), "dora": DoRA(2)})
    attach(model, OFT(2), targets=["0"], name="one")
    refused(model, ParameterError, "must be on the same layers; '1'", ["a", "one"])
    refused(model, ParameterError, "has an adapter 'c'", ["a", "c"])
    refused(model, OptionError, "of one kind", ["a", "lora"])
    refused(model, OptionError, "hra cannot be combined", ["hra"])
    refused(model, OptionError, "dora cannot be combined", ["dora"])
    refused(model, OptionError, "one number for each", ["a", "b"], [1.0])
    refused(model, OptionError, "one number for each", ["a", "b"], [1.0, float("nan")])
    refused(model, OptionError, "at least 0 and sum to 1", ["a", "b"], [0.5, 0.6], method="geodesic")
    refused(model, OptionError, "each once", ["a", "a"])
    refused(model, OptionError, "has an adapter 'b' already", ["a"], into="b")
    refused(model, OptionError, "letters, digits", ["a"], into="no spaces")
    refused(model, UnknownNameError, "unknown method 'mean'", ["a"], method="mean")
    refused(model, OptionError, "config must be OFT", ["a"], config=BOFT(4))
    refused(model, OptionError, "config is for rotations", ["lora"], config=LoRA(4))
    refused(model, OptionError, "block sizes of oft must divide", ["a"], config=OFT(6))
    refused(model, OptionError, "radius=0.001 cuts", ["a"], config=OFT(4, radius=0.001))
    refused(model, OptionError, "config.map='exp'", ["a"], config=OFT(4, map="exp"))
    scaled = several(BOFT(4, scale_outputs=True), 2)
    refused(scaled, OptionError, "scale_outputs is in the way", ["a", "b"])
    merge(model, keep=True)
    refused(model, ParameterError, "call unmerge first", ["a"])


def test_names_that_a_module_has_already_are_refused():
    model = several(OFT(4), 1)
    for name in ("half", "keys", "training"):
        refused(model, OptionError, "attribute of nn.Module", ["a"], into=name)


def test_rotations_half_a_turn_apart_have_no_geodesic():
    model = several(OFT(2, map="exp", block_rate=False), 2)
    with torch.no_grad():
        for layer in model:
            layer.adapters["a"].generator.fill_(torch.pi / 2)
            layer.adapters["b"].generator.fill_(-torch.pi / 2)
    refused(model, OptionError, "half a turn or more apart.*method='lie'", ["a", "b"], [0.5, 0.5], method="geodesic")
    combine(model, ["a", "b"], [0.5, 0.5])
    same(weight(model, "combined"), [layer.base.weight.detach() for layer in model])


def test_every_kind_is_combined_or_refused_in_words():
    """No adapter of the library falls through."""
    for kind, config in KINDS.items():
        model = several(config, 2, size=0.02)
        if kind in ("hra", "dora"):
            refused(model, OptionError, "cannot be combined", ["a", "b"])
        else:
            combine(model, ["a", "b"])
            assert model[0].active == ("combined",)
