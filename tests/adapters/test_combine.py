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
from orthokit.adapters._householder import plane_reflections
from orthokit.adapters.boft import BOFT
from orthokit.adapters.combine import combine, rotation_log, rotation_mean
from orthokit.adapters.dora import DoRA
from orthokit.adapters.full import FullFineTuning
from orthokit.adapters.hra import HRA
from orthokit.adapters.lora import LoRA
from orthokit.adapters.oft import OFT
from orthokit.adapters.paths import rewind
from orthokit.adapters.peft_forms import NeumannSumOFT
from orthokit.errors import OptionError, ParameterError, UnknownNameError
from orthokit.linalg import cayley, exp, inverse_cayley, orthogonality_error, skew_part, unpack_skew

METHODS = ("lie", "geodesic")
ALL_METHODS = (*METHODS, "orthomerge")
TURNING = {
    "oft": OFT(4),
    "oft exponential": OFT(4, map="exp"),
    "oft series": OFT(4, map="cayley_neumann", tolerance=None),
    "oft shared": OFT(4, share=True),
    "oft scaled": OFT(4, angle_scale=0.5, block_rate=False, radius=0.6),
    "boft": BOFT(4, factors=2),
    "hra": HRA(4),
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
    refused(model, OptionError, "config is for rotations", ["hra"], config=HRA(4))
    refused(model, OptionError, "orthomerge rotates weights.*merge_checkpoints", ["lora"], method="orthomerge")
    refused(model, OptionError, "weights must be at least 0", ["a", "b"], [1.0, -1.0], method="orthomerge")
    refused(model, OptionError, "clip must be", ["a", "b"], method="orthomerge", clip=0.9)
    refused(model, UnknownNameError, "unknown intensity 'least'", ["a"], method="orthomerge", intensity="least")
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
        if kind == "dora":
            refused(model, OptionError, "cannot be combined", ["a", "b"])
        else:
            combine(model, ["a", "b"])
            assert model[0].active == ("combined",)


def dense_generators(model, names):
    return [torch.stack([inverse_cayley(layer.adapters[name].dense()) for name in names]) for layer in model]


def directed_mean(Q, weights):
    """The mean length along the mean direction."""
    w = torch.tensor(weights, dtype=Q.dtype) / sum(weights)
    mean = (w[:, None, None] * Q).sum(0)
    return mean * float((w * torch.linalg.matrix_norm(Q)).sum() / mean.norm())


@pytest.mark.parametrize("kind", ["oft", "oft series", "oft shared", "oft scaled", "hra"])
def test_orthomerge_is_the_mean_direction_at_the_mean_length_of_the_whole_layer(kind):
    config = TURNING[kind] if kind != "oft series" else OFT(4)
    model = several(config, size=0.05)
    combine(model, ["a", "b", "c"], [1.0, 2.0, 3.0], method="orthomerge")
    expected = [cayley(directed_mean(Q, [1.0, 2.0, 3.0])) for Q in dense_generators(model, "abc")]
    same(rotations(model, "combined"), expected)


def test_orthomerge_of_smaller_blocks_and_of_intensities():
    model = model_with({"a": OFT(2), "b": OFT(4)}, size=0.05)
    combine(model, ["a", "b"], method="orthomerge")
    Q = dense_generators(model, "ab")
    same(rotations(model, "combined"), [cayley(directed_mean(q, [1.0, 1.0])) for q in Q])
    combine(model, ["a", "b"], method="orthomerge", intensity="max", into="most")
    for q, R in zip(Q, rotations(model, "most"), strict=True):
        found = inverse_cayley(R).norm()
        torch.testing.assert_close(found, torch.linalg.matrix_norm(q).max())


@pytest.mark.parametrize("kind", TURNING)
def test_orthomerge_of_equal_adapters_is_each_of_them_and_the_order_does_not_matter(kind):
    model = several(TURNING[kind], size=0.05)
    for layer in model:
        for name in "bc":
            layer.adapters[name].load_state_dict(layer.adapters["a"].state_dict())
    same(weight(combine(model, ["a", "b", "c"], method="orthomerge"), "combined"), weight(model, "a"))
    model = several(TURNING[kind], size=0.05)
    combine(model, ["a", "b", "c"], [1.0, 2.0, 3.0], method="orthomerge", into="one")
    combine(model, ["c", "a", "b"], [3.0, 1.0, 2.0], method="orthomerge", into="other")
    same(weight(model, "one"), weight(model, "other"))


def test_orthomerge_of_opposed_rotations_is_bounded():
    model = several(OFT(4), 2, size=0.05)
    with torch.no_grad():
        for layer in model:
            layer.adapters["b"].generator.copy_(-0.9 * layer.adapters["a"].generator)
    combine(model, ["a", "b"], method="orthomerge", clip=3.0)
    for a, c in zip(rotations(model, "a"), rotations(model, "combined"), strict=True):
        torch.testing.assert_close(inverse_cayley(c), 3.0 * 0.05 * inverse_cayley(a), rtol=1e-9, atol=1e-12)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from([2, 4, 6]), min_size=1, max_size=3),
    st.sampled_from(ALL_METHODS),
    st.sampled_from([1e-8, 1e-3, 0.1]),
    st.integers(0, 1000),
)
def test_reflections_combine_to_what_dense_matrices_give(ranks, method, size, seed):
    """The map of the merged generators to 1e-10, near the identity as well as far from it."""
    names = list("abc"[: len(ranks)])
    model = model_with({name: HRA(r, seed=i) for i, (name, r) in enumerate(zip(names, ranks, strict=True))}, size=size)
    weights = [(i + 1) / (len(ranks) * (len(ranks) + 1) / 2) for i in range(len(ranks))]
    combine(model, names, weights, method=method)
    for layer, Q in zip(model, dense_generators(model, names), strict=True):
        part = layer.adapters["combined"]
        if method == "geodesic":
            expected = rotation_mean(cayley(Q), weights)
        elif method == "lie":
            expected = cayley(sum(w * q for w, q in zip(weights, Q, strict=True)))
        else:
            expected = cayley(directed_mean(Q, weights))
        torch.testing.assert_close(part.dense(), expected, rtol=0, atol=1e-10)
        assert part.config.rank == len(part.vectors) == min(sum(ranks), layer.in_features)
        assert len(part.vectors) % 2 == 0 and float(orthogonality_error(part.dense())) < 1e-13


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(0, 1000), st.floats(-9, 5), st.booleans())
def test_planes_as_reflections_are_the_cayley_transform(m, seed, exponent, degenerate):
    generator = torch.Generator().manual_seed(seed)
    Q = skew_part(torch.randn(m, m, generator=generator, dtype=torch.float64)) * 10**exponent
    if degenerate and m % 2 == 0:  # all planes by one angle
        U = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
        J = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()] * (m // 2))
        Q = U @ J @ U.mT * 10**exponent
    R = torch.eye(m, dtype=torch.float64)
    u = plane_reflections(Q)
    for v in u:
        R = R - 2 * (R @ v)[:, None] * v
    assert len(u) % 2 == 0 and len(u) <= m
    # The Cayley transform itself is known to the rounding of its solve.
    torch.testing.assert_close(R, cayley(Q), rtol=0, atol=1e-13 * (1 + 10**exponent))


def test_reflections_train_on_after_they_were_combined():
    model = combine(several(HRA(2), 2), ["a", "b"])
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    for layer in model:
        u = layer.adapters["combined"].vectors
        assert u.grad is not None and bool(u.grad.isfinite().all())
        torch.testing.assert_close(u.norm(dim=1), torch.full_like(u[:, 0], layer.in_features**0.5))


def test_reflections_without_a_generator_are_refused_but_a_single_one_is_copied():
    configs = {"odd": HRA(3, symmetric=False), "turned": HRA(2, symmetric=False, orthogonal=True), "a": HRA(2)}
    model = model_with(configs)
    refused(model, OptionError, r"odd number of reflections \(3\)", ["odd", "a"])
    refused(model, OptionError, "a half turn", ["turned", "a"])
    refused(model, OptionError, "odd number", ["odd"], [0.5])
    for name in configs:
        same(
            weight(combine(model, [name], into=f"copy_{name}", method="orthomerge"), f"copy_{name}"),
            weight(model, name),
        )
    with torch.no_grad():
        model[0].adapters["a"].vectors[0] = 0
    attach(model, HRA(2), name="b")
    refused(model, OptionError, "is 0 or not finite", ["a", "b"])
    conv = nn.Sequential(nn.Conv2d(4, 4, 2))
    for name, view in (("a", "channels"), ("b", "patches")):
        attach(conv, HRA(2, conv=view), targets="conv", name=name)
    refused(conv, OptionError, "in different views", ["a", "b"])


def test_orthomerge_averages_factors_on_outputs():
    model = several(BOFT(4, scale_outputs=True), 2)
    combine(model, ["a", "b"], [1.0, 3.0], method="orthomerge")
    for layer in model:
        a, b, both = (layer.adapters[name].scale for name in ("a", "b", "combined"))
        torch.testing.assert_close(both, (a + 3 * b) / 4)
    refused(model, OptionError, "scale_outputs is in the way", ["a"], into="x", method="orthomerge", config=BOFT(4))


def test_series_cut_as_peft_did_combine_with_the_exact_map():
    cut = NeumannSumOFT(4, terms=2)
    model = model_with({"a": cut, "b": cut, "c": OFT(4)}, size=0.02)
    same(weight(combine(model, ["a", "b"], [1.0, 0.0], into="ab"), "ab"), weight(model, "a"))
    assert model[0].adapters["ab"].config.kind == "oft_neumann_sum"
    same(weight(combine(model, ["a", "c"], [0.0, 1.0], into="ac"), "ac"), weight(model, "c"))
    assert type(model[0].adapters["ac"].config) is OFT
