"""TIES and DARE: against readable forms, exact numbers of entries kept, expectations, and every refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.merging._select import Cut, largest_cut, shrink_
from orthokit.merging.sparse import dare, magnitude_threshold, ties, vote

SHAPES = [(), (9,), (1, 5), (4, 6), (2, 3, 5), (0, 3)]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def models(*shape, count=3, dtype=torch.float64, seed=0, grid=None):
    """A base and experts; with a grid all entries are multiples of it, so that many changes have one size."""
    base = gaussian(*shape, seed=seed)
    experts = [base + 0.1 * gaussian(*shape, seed=seed + 1 + index) for index in range(count)]
    if grid:
        base, *experts = ((tensor / grid).round() * grid for tensor in (base, *experts))
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def trimmed(tau, density):
    """The largest entries, the earlier ones first among equals: a stable sort."""
    flat = tau.reshape(-1)
    kept = torch.argsort(flat.abs(), descending=True, stable=True)[: max(1, int(density * flat.numel()))]
    out = torch.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(tau.shape)


def elected(taus, weights, election, normalize):
    """Sign and disjoint mean, with masks written out."""
    stack = torch.stack([w * tau for w, tau in zip(weights, taus, strict=True)])
    total = stack.sum(0) if election == "sum" else stack.sign().sum(0)
    agrees = stack.sign() == torch.where(total >= 0, 1.0, -1.0)
    shape = (-1, *[1] * taus[0].ndim)
    divisor = (torch.tensor(weights, dtype=stack.dtype).reshape(shape) * agrees).sum(0)
    merged = (stack * agrees).sum(0)
    return torch.where(agrees.any(0), merged / divisor if normalize else merged, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", [None, 1 / 16])
@pytest.mark.parametrize("election", ["sum", "count"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_follows_its_definition(shape, grid, election, normalize):
    base, experts = models(*shape, grid=grid)
    for weights, density in (([1.0, 1.0, 1.0], 0.4), ([0.5, 2.0, 1.2], 0.2), ([1.0, -0.6, 2.0], 1.0)):
        taus = [trimmed(e - base, density) if base.numel() else e - base for e in experts]
        wanted = base + 0.7 * elected(taus, weights, election, normalize)
        options = {"weights": weights, "density": density, "election": election, "normalize": normalize}
        torch.testing.assert_close(ties(base, experts, scale=0.7, **options), wanted)


@pytest.mark.parametrize("grid", [None, 1 / 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_across_the_pieces_that_a_long_tensor_is_worked_on_in(grid, dtype):
    base, experts = models(300, 301, grid=grid, dtype=dtype)
    taus = [trimmed(expert - base, 0.2) for expert in experts]
    wanted = base + elected(taus, [1.0, 1.0, 1.0], "sum", True)
    torch.testing.assert_close(ties(base, experts), wanted)


def test_with_density_one_and_agreeing_signs_ties_is_the_mean():
    base, experts = models(5, 7)
    signs = gaussian(5, 7, seed=9).sign()
    experts = [base + signs * (expert - base).abs() for expert in experts]
    torch.testing.assert_close(ties(base, experts, density=1.0), sum(experts) / 3)


def test_of_a_disputed_entry_the_larger_side_is_kept_and_a_draw_is_positive():
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, 1.0, -2.0]), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([-4.0, 0.0, 1.0])]
    assert ties(base, experts, density=1.0).tolist() == [-4.0, 1.0, 1.0]
    assert ties(base, experts, density=1.0, election="count").tolist() == [1.0, 1.0, 1.0]
    assert ties(base, experts, density=1.0, normalize=False).tolist() == [-4.0, 1.0, 2.0]


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_the_cut_keeps_exactly_as_many_entries_as_asked_for_the_earlier_among_equals(entries, density):
    values = torch.tensor(entries, dtype=torch.float32)
    k = max(1, int(density * len(values)))
    cut = largest_cut(lambda start, stop: values[start:stop], len(values), k, values)
    found = values.clone()
    shrink_(found, cut, 0)
    assert torch.equal(found, trimmed(values, density))
    assert int(torch.count_nonzero(found)) == min(k, int(torch.count_nonzero(values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 2, 5, 9])
def test_a_cut_applies_to_a_piece_by_the_place_it_has_in_the_whole(dtype, start):
    whole = torch.tensor([1.0, -2, 2, 3, -2, 2, 0, 2, 1, 2, -3, 2], dtype=dtype)
    piece = whole[start:].clone()
    shrink_(piece, Cut(2.0, 5), start)
    wanted = [x if abs(x) > 2 or (abs(x) == 2 and i < 5) else 0.0 for i, x in enumerate(whole.tolist())]
    assert piece.tolist() == wanted[start:]


def test_sizes_below_the_normal_range_are_told_apart():
    values = torch.tensor([1e-45, 0.0, -3e-45, 0.0])
    cut = largest_cut(lambda start, stop: values[start:stop], 4, 1, values)
    shrink_(values, cut, 0)
    assert values.tolist() == [0.0, 0.0, pytest.approx(-3e-45, rel=0.5), 0.0]


def test_densities_and_thresholds_may_differ_between_experts():
    base, experts = models(6, 7)
    taus = [trimmed(expert - base, share) for expert, share in zip(experts, (0.1, 0.5, 1.0), strict=True)]
    wanted = base + elected(taus, [1.0] * 3, "sum", True)
    torch.testing.assert_close(ties(base, experts, density=[0.1, 0.5, 1.0]), wanted)
    limits = [0.05, 0.1, 0.0]
    taus = [(e - base) * ((e - base).abs() >= limit) for e, limit in zip(experts, limits, strict=True)]
    wanted = base + elected(taus, [1.0] * 3, "sum", True)
    torch.testing.assert_close(ties(base, experts, threshold=limits), wanted)


@given(st.integers(0, 1000), st.permutations(range(3)), st.sampled_from(["sum", "count"]), st.booleans())
@settings(max_examples=25)
def test_the_order_of_experts_does_not_matter(seed, order, election, normalize):
    base, experts = models(4, 5, seed=seed)
    weights = [0.5, 1.0, 2.0]
    options = {"density": 0.5, "election": election, "normalize": normalize}
    turned = ties(base, [experts[i] for i in order], weights=[weights[i] for i in order], **options)
    torch.testing.assert_close(turned, ties(base, experts, weights=weights, **options))


@given(st.integers(0, 1000), st.floats(0.1, 3))
@settings(max_examples=25)
def test_an_expert_equal_to_the_base_has_no_vote(seed, weight):
    base, experts = models(4, 5, seed=seed)
    torch.testing.assert_close(ties(base, [*experts, base], weights=[1, 1, 1, weight]), ties(base, experts))


def test_weights_that_cancel_are_no_divisor():
    base = torch.zeros(2)
    experts = [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 0.0])]
    # Both agree on + once weighted, with weights summing to 0: the sum is left undivided.
    assert ties(base, experts, weights=[1.0, -1.0], density=1.0).tolist() == [2.0, 1.0]


def test_a_whole_model_is_trimmed_as_one_vector():
    taus = [0.1 * gaussian(40, 30), gaussian(7, 9, seed=1), 0.01 * gaussian(11, seed=2), torch.zeros(0)]
    everything = torch.cat([tau.reshape(-1).double() for tau in taus])
    for density in (0.01, 0.2, 0.77, 1.0):
        threshold = magnitude_threshold(taus, density=density)
        k = max(1, int(density * everything.numel()))
        assert threshold == float(everything.abs().sort(descending=True).values[k - 1])
        assert int((everything.abs() >= threshold).sum()) == k
    # The same through ties: one expert, whose change is trimmed at that size.
    threshold = magnitude_threshold(taus, density=0.2)
    kept = sum(int(torch.count_nonzero(ties(torch.zeros_like(t), [t], threshold=threshold))) for t in taus)
    assert kept == int(0.2 * everything.numel())


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_the_threshold_is_the_kth_largest_size(entries, density):
    values = torch.tensor(entries, dtype=torch.float32)
    half = len(values) // 2
    k = max(1, int(density * len(values)))
    found = magnitude_threshold([values[:half], values[half:]], density=density)
    assert found == float(values.abs().sort(descending=True).values[k - 1])


def test_a_threshold_in_bfloat16_counts_equals():
    values = gaussian(1000, dtype=torch.bfloat16)
    found = magnitude_threshold([values], density=0.3)
    assert found == float(values.float().abs().sort(descending=True).values[299])


def test_dare_without_dropping_leaves_the_changes():
    base, experts = models(4, 5)
    torch.testing.assert_close(dare(base, experts, p=0.0), sum(experts) / 3)
    torch.testing.assert_close(dare(base, experts[:1], p=0.0, rescale="l1"), experts[0])
    torch.testing.assert_close(dare(base, experts, p=0.0, signs="ties"), ties(base, experts, density=1.0))


@pytest.mark.parametrize("signs", ["linear", "ties"])
def test_dare_keeps_the_expectation_of_a_change_and_the_share_of_its_entries(signs):
    n, p = 200_000, 0.9
    # Of seed 0, like the masks: draws of one seed must not go together.
    base, tau = torch.zeros(n, dtype=torch.float64), gaussian(n).abs() + 0.5
    found = dare(base, [tau], p=p, signs=signs)
    # Bernoulli sums: five standard deviations are met with probability 6e-7, and the seed is fixed besides.
    share = float((found != 0).double().mean())
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    spread = math.sqrt(float((tau**2).sum()) * p / (1 - p)) / n
    assert abs(float((found - tau).mean())) < 5 * spread
    kept = found != 0
    torch.testing.assert_close(found[kept], tau[kept] / (1 - p))


def test_the_mean_of_many_draws_is_the_change_itself():
    base, experts = models(6, 5, count=2)
    draws = dare(base.expand(4000, 6, 5), [expert.expand(4000, 6, 5) for expert in experts], p=0.5)
    wanted = sum(experts) / 2
    # Per entry the deviation of one draw is sqrt(p / (1 - p) sum tau^2) / 2 = sqrt(sum tau^2) / 2.
    spread = sum((expert - base) ** 2 for expert in experts).sqrt() / 2 / math.sqrt(4000)
    assert bool(((draws.mean(0) - wanted).abs() < 5 * spread).all())


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
@pytest.mark.parametrize("signs", ["linear", "ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_dare_with_given_masks_follows_its_formula(rescale, signs, normalize):
    base, experts = models(4, 5)
    weights = [0.5, 2.0, 1.0]
    masks = [gaussian(4, 5, seed=20 + index) > 0 for index in range(3)]
    taus = []
    for expert, mask in zip(experts, masks, strict=True):
        tau = (expert - base) * mask
        factors = {"probability": 1 / 0.4, "l1": (expert - base).abs().sum() / tau.abs().sum(), "none": 1.0}
        taus.append(tau * factors[rescale])
    total = sum(w * tau for w, tau in zip(weights, taus, strict=True)) / (sum(weights) if normalize else 1)
    change = total if signs == "linear" else elected(taus, weights, "sum", normalize)
    options = {"p": 0.6, "masks": masks, "rescale": rescale, "signs": signs, "normalize": normalize}
    torch.testing.assert_close(dare(base, experts, weights=weights, scale=0.8, **options), base + 0.8 * change)


def test_a_seed_means_the_same_masks_and_leaves_global_randomness_alone():
    base, experts = models(8, 8)
    state = torch.random.get_rng_state()
    first = dare(base, experts, seed=3)
    assert torch.equal(first, dare(base, experts, seed=3))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = [dare(base, experts, generator=generator) for generator in generators]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], dare(base, experts, generator=generators[0]))
    assert not torch.equal(first, dare(base, experts, seed=4))
    assert torch.equal(state, torch.random.get_rng_state())
    # Experts have masks of their own: what is left of two equal ones differs.
    one, two = (dare(base, [experts[0], experts[0]], weights=w, seed=3) for w in ([1, 0], [0, 1]))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("method", [ties, dare])
@pytest.mark.parametrize("shape", [(5,), (1, 4), (3, 4)])
def test_bfloat16_is_the_rounding_of_the_float32_merge_and_inputs_stay(method, shape):
    base, experts = models(*shape, dtype=torch.bfloat16)
    before = [tensor.clone() for tensor in (base, *experts)]
    found = method(base, experts)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, method(base.float(), [expert.float() for expert in experts]).bfloat16())
    assert all(torch.equal(new, old) for new, old in zip((base, *experts), before, strict=True))
    plain, others = models(*shape, dtype=torch.float32)
    before = [tensor.clone() for tensor in (plain, *others)]
    method(plain, others)
    assert all(torch.equal(new, old) for new, old in zip((plain, *others), before, strict=True))


@pytest.mark.parametrize("method", [ties, dare])
def test_zeros_and_non_contiguous_inputs(method):
    zero = torch.zeros(3, 4)
    assert torch.equal(method(zero, [zero] * 2), zero)
    base, experts = models(4, 3)
    wanted = method(base.mT.contiguous(), [expert.mT.contiguous() for expert in experts])
    torch.testing.assert_close(method(base.mT, [expert.mT for expert in experts]), wanted)
    assert torch.equal(method(base, [base, base]), base)


def test_the_vote_leaves_its_arguments_alone():
    taus = [gaussian(3, 4, seed=index) for index in range(3)]
    before = [tau.clone() for tau in taus]
    torch.testing.assert_close(vote(taus, weights=[1, 2, 3]), elected(before, [1.0, 2.0, 3.0], "sum", True))
    assert all(torch.equal(new, old) for new, old in zip(taus, before, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda b, e: ties(b, []), OptionError, "experts is empty"),
        (lambda b, e: ties(b, e, density=0.0), OptionError, "density must be .* greater than 0 and at most 1; got 0.0"),
        (lambda b, e: ties(b, e, density=1.5), OptionError, "density"),
        (lambda b, e: ties(b, e, density=[0.1, 0.2]), OptionError, "got 2 for 3"),
        (lambda b, e: ties(b, e, threshold=-1.0), OptionError, "threshold"),
        (lambda b, e: ties(b, e, threshold=[1.0]), OptionError, "got 1 for 3"),
        (lambda b, e: ties(b, e, scale=math.inf), OptionError, "scale"),
        (lambda b, e: ties(b, e, election="som"), UnknownNameError, "did you mean 'sum'"),
        (lambda b, e: ties(b, [e[0], e[1] / 0]), NonFiniteError, "expert 1"),
        (lambda b, e: dare(b, e, p=1.0), OptionError, "less than 1"),
        (lambda b, e: dare(b, e, p=-0.1), OptionError, "p must"),
        (lambda b, e: dare(b, e, signs="tie"), UnknownNameError, "did you mean 'ties'"),
        (lambda b, e: dare(b, e, rescale="l2"), UnknownNameError, "rescale"),
        (lambda b, e: dare(b, e, election="x"), UnknownNameError, "election"),
        (lambda b, e: dare(b, e, weights=[1, -1, 0]), OptionError, "sum to 0"),
        (lambda b, e: dare(b, e, masks=[torch.ones(2, 3, dtype=torch.bool)]), OptionError, "got 1 for 3"),
        (lambda b, e: vote(e, weights=[1, 1, 1], election="x"), UnknownNameError, "election"),
        (lambda b, e: magnitude_threshold(e, density=0.0), OptionError, "density"),
        (lambda b, e: magnitude_threshold([], density=0.5), OptionError, "no entries"),
        (lambda b, e: magnitude_threshold([torch.zeros(0)], density=0.5), OptionError, "no entries"),
        (lambda b, e: magnitude_threshold((x for x in e), density=0.5), OptionError, "not a generator"),
        (lambda b, e: magnitude_threshold([e[0] / 0], density=0.5), NonFiniteError, "tensor 0"),
    ],
)
def test_every_bad_argument_is_refused_by_name(call, error, says):
    with pytest.raises(error, match=says):
        call(*models(2, 3))


@pytest.mark.usefixtures("unchecked")
def test_wrong_types_are_refused_by_name():
    base, experts = models(2, 3)
    with pytest.raises(DtypeError, match=r"masks\[1\] must be boolean"):
        dare(base, experts[:2], masks=[torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)])
    with pytest.raises(ShapeError, match=r"masks\[0\] must have the shape of base, \(2, 3\); got \(3,\)"):
        dare(base, experts[:1], masks=[torch.ones(3, dtype=torch.bool)])
    with pytest.raises(DtypeError, match="tensor 0 must be real floating"):
        magnitude_threshold([torch.ones(3, dtype=torch.int64)], density=0.5)
    with pytest.raises(OptionError, match="pass \\[expert\\]"):
        ties(base, experts[0])
    for method in (ties, dare):
        with pytest.raises(ShapeError, match=r"base has \(2, 3\) and expert 1 has \(1, 3\)"):
            method(base, [experts[0], experts[1][:1]])
