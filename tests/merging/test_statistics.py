"""RegMean, Fisher and curvature: the problems they solve, the mean where nobody knows better, and every refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from orthokit.merging.averages import linear
from orthokit.merging.statistics import RankOneMoment, compress_second_moment, curvature, fisher, regmean

SHAPES = [(6, 6), (9, 4), (4, 9), (1, 5), (5, 1), (2, 6, 5)]
METHODS = [regmean, fisher, curvature]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def models(*shape, count=3, dtype=torch.float64, seed=0):
    base = gaussian(*shape, seed=seed)
    experts = [base + 0.1 * gaussian(*shape, seed=seed + 1 + index) for index in range(count)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def gram(*shape, seed=0, rows=40):
    X = gaussian(*shape[:-2], rows, shape[-1], seed=100 + seed)
    return X.mT @ X


def knowledge(method, shape, count=3, seed=0, dtype=torch.float64):
    """What a method wants to know of each expert, under its own name."""
    if method is regmean:
        return {"grams": [gram(*shape, seed=seed + i).to(dtype) for i in range(count)]}
    name = "fishers" if method is fisher else "second_moments"
    return {name: [gaussian(*shape, seed=200 + seed + i, dtype=dtype).square() for i in range(count)]}


def equal_knowledge(method, shape, count=3):
    return {name: [own[0]] * count for name, own in knowledge(method, shape, 1).items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offdiagonal", [1.0, 0.9, 0.0])
def test_regmean_follows_its_formula(shape, offdiagonal):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    grams = knowledge(regmean, shape)["grams"]
    mask = offdiagonal + (1 - offdiagonal) * torch.eye(shape[-1], dtype=base.dtype)
    total = sum(w * G * mask for w, G in zip(weights, grams, strict=True))
    inner = sum(w * E @ (G * mask) for w, E, G in zip(weights, experts, grams, strict=True))
    found = regmean(base, experts, grams=grams, weights=weights, offdiagonal=offdiagonal, ridge=1e-14)
    torch.testing.assert_close(found, inner @ torch.linalg.inv(total), rtol=1e-9, atol=1e-9)
    moved = regmean(base, experts, grams=grams, weights=weights, offdiagonal=offdiagonal, ridge=1e-14, scale=0.5)
    torch.testing.assert_close(moved, (base + found) / 2)


def test_regmean_is_the_least_squares_answer_on_the_inputs_of_all_experts():
    base, experts = models(5, 4)
    inputs = [gaussian(30, 4, seed=60 + i) for i in range(3)]
    targets = torch.cat([X @ E.mT for X, E in zip(inputs, experts, strict=True)])
    wanted = torch.linalg.lstsq(torch.cat(inputs), targets).solution.mT
    found = regmean(base, experts, grams=[X.mT @ X for X in inputs], offdiagonal=1.0, ridge=1e-14)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_regmean_takes_the_mean_where_no_input_reached():
    base, experts = models(3, 6, count=2)
    inputs = [gaussian(2, 6, seed=70 + i) for i in range(2)]  # four of six directions seen
    found = regmean(base, experts, grams=[X.mT @ X for X in inputs], offdiagonal=1.0)
    unseen = torch.linalg.svd(torch.cat(inputs))[2][4:]
    torch.testing.assert_close(found @ unseen.mT, (sum(experts) / 2) @ unseen.mT, rtol=1e-6, atol=1e-6)
    for X, expert in zip(inputs, experts, strict=True):  # and what each saw it still does
        torch.testing.assert_close(found @ X.mT, expert @ X.mT, rtol=1e-5, atol=1e-5)
    nothing = [torch.zeros(6, 6, dtype=base.dtype)] * 2
    torch.testing.assert_close(regmean(base, experts, grams=nothing), sum(experts) / 2)


def test_regmean_accepts_grams_that_are_symmetric_to_rounding():
    base, experts = models(3, 4, dtype=torch.float32)
    grams = [G.bfloat16() for G in knowledge(regmean, (3, 4))["grams"]]
    grams[0][0, 1] *= 1 + 2**-7
    assert torch.isfinite(regmean(base, experts, grams=grams)).all()


@pytest.mark.parametrize("shape", [(), (7,), *SHAPES])
def test_fisher_follows_its_formula_and_raises_small_entries(shape):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    fishers = knowledge(fisher, shape)["fishers"]
    fishers[0] = torch.zeros_like(fishers[0])
    raised = [w * F.clamp(min=1e-2) for w, F in zip(weights, fishers, strict=True)]
    wanted = sum(F * E for F, E in zip(raised, experts, strict=True)) / sum(raised)
    torch.testing.assert_close(fisher(base, experts, fishers=fishers, weights=weights, floor=1e-2), wanted)


@pytest.mark.parametrize("shape", [(), (7,), *SHAPES])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mask", [{}, {"keep": 0.4}, {"threshold": [0.002, 0.0, 0.01]}])
def test_curvature_follows_its_formula(shape, power, mask):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    moments = knowledge(curvature, shape)["second_moments"]
    top, bottom = torch.zeros_like(base), torch.zeros_like(base)
    for index in range(3):
        tau, v = experts[index] - base, moments[index]
        saliency = v * tau**2
        kept = torch.ones_like(base)
        if "keep" in mask:
            k = max(1, int(0.4 * base.numel()))
            kept = (saliency >= saliency.flatten().sort(descending=True).values[k - 1]).double()
        if "threshold" in mask:
            kept = (saliency >= mask["threshold"][index]).double()
        share = weights[index] * v**power * kept
        top, bottom = top + share * tau, bottom + share
    wanted = base + torch.where(bottom > 0, top / bottom, 0.0)
    found = curvature(base, experts, second_moments=moments, weights=weights, power=power, **mask)
    torch.testing.assert_close(found, wanted)


def test_curvature_leaves_the_base_where_every_expert_is_masked():
    base, experts = models(4, 5)
    moments = knowledge(curvature, (4, 5))["second_moments"]
    assert torch.equal(curvature(base, experts, second_moments=moments, threshold=1e9), base)
    found = curvature(base, experts, second_moments=moments, keep=0.05)
    assert int((found != base).sum()) <= 3  # one of twenty entries each


def test_curvature_counts_zero_moments_alike_and_takes_compressed_ones():
    base, experts = models(4, 5)
    zeros = [torch.zeros_like(base)] * 3
    torch.testing.assert_close(curvature(base, experts, second_moments=zeros), linear(None, experts))
    moments = knowledge(curvature, (4, 5))["second_moments"]
    small = [compress_second_moment(v) for v in moments]
    wanted = curvature(base, experts, second_moments=[moment.expand() for moment in small])
    torch.testing.assert_close(curvature(base, experts, second_moments=small), wanted)
    assert not torch.allclose(wanted, curvature(base, experts, second_moments=moments))


@pytest.mark.parametrize("shape", [(4, 6), (1, 5), (5, 1), (2, 3, 4)])
def test_a_compressed_moment_keeps_row_and_column_sums_and_rank_one(shape):
    v = gaussian(*shape).square()
    back = compress_second_moment(v).expand()
    torch.testing.assert_close(back.sum(-1), v.sum(-1))
    torch.testing.assert_close(back.sum(-2), v.sum(-2))
    assert bool((torch.linalg.matrix_rank(back) == 1).all())
    torch.testing.assert_close(compress_second_moment(back).expand(), back)
    zero = torch.zeros(3, 4)
    assert torch.equal(compress_second_moment(zero).expand(), zero)
    tiny = torch.full((3, 4), 1e-30)
    torch.testing.assert_close(compress_second_moment(tiny).expand(), tiny, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_that_know_the_same_are_averaged(method, shape):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    found = method(base, experts, weights=weights, **equal_knowledge(method, shape))
    torch.testing.assert_close(found, linear(None, experts, weights=weights))


@given(st.integers(0, 500), st.permutations(range(3)), st.sampled_from(METHODS))
@settings(max_examples=20)
def test_the_order_of_experts_does_not_matter(seed, order, method):
    base, experts = models(4, 6, seed=seed)
    weights, known = [0.5, 1.0, 2.0], knowledge(method, (4, 6), seed=seed)
    turned = {name: [own[i] for i in order] for name, own in known.items()}
    found = method(base, [experts[i] for i in order], weights=[weights[i] for i in order], **turned)
    torch.testing.assert_close(found, method(base, experts, weights=weights, **known), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_of_weight_zero_and_one_that_knows_nothing_do_not_count(method):
    base, experts = models(4, 6)
    known = knowledge(method, (4, 6))
    two = {name: own[:2] for name, own in known.items()}
    wanted = method(base, experts[:2], **two)
    torch.testing.assert_close(method(base, experts, weights=[1, 1, 0], **known), wanted)
    blank = {name: [*own[:2], torch.zeros_like(own[2])] for name, own in known.items()}
    tolerance = 1e-3 if method is fisher else 1e-6  # a floor of 1e-6 against entries that may be as small
    torch.testing.assert_close(method(base, experts, **blank), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (3, 4)])
def test_bfloat16_is_the_rounding_of_the_float32_merge_and_inputs_stay(method, shape):
    base, experts = models(*shape, dtype=torch.bfloat16)
    known = knowledge(method, shape, dtype=torch.float32)
    before = [tensor.clone() for tensor in (base, *experts, *next(iter(known.values())))]
    found = method(base, experts, **known)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, method(base.float(), [expert.float() for expert in experts], **known).bfloat16())
    after = (base, *experts, *next(iter(known.values())))
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_batches_zeros_and_non_contiguous_inputs(method):
    shape = (2, 4, 5)
    base, experts = models(*shape)
    known = knowledge(method, shape)
    found = method(base, experts, **known)
    for index in range(2):
        own = {name: [tensor[index] for tensor in tensors] for name, tensors in known.items()}
        torch.testing.assert_close(found[index], method(base[index], [e[index] for e in experts], **own))
    turned = method(base.mT.contiguous().mT, [e.mT.contiguous().mT for e in experts], **known)
    torch.testing.assert_close(turned, found)
    zero = torch.zeros(shape, dtype=base.dtype)
    assert torch.equal(method(zero, [zero] * 3, **known), zero)
    assert not method(torch.nn.Parameter(base), experts, **known).requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("unchecked")
def test_bad_knowledge_is_refused_by_name(method):
    base, experts = models(3, 4)
    known = knowledge(method, (3, 4))
    name, own = next(iter(known.items()))
    with pytest.raises(OptionError, match=f"{name}= must be a list .* got nothing"):
        method(base, experts, **{name: None})
    with pytest.raises(OptionError, match="got one tensor"):
        method(base, experts, **{name: own[0]})
    with pytest.raises(OptionError, match="got 2 for 3 experts"):
        method(base, experts, **{name: own[:2]})
    with pytest.raises(ShapeError, match=rf"{name}\[1\] must have"):
        method(base, experts, **{name: [own[0], own[1][:, :2], own[2]]})
    with pytest.raises(NonFiniteError, match=rf"{name}\[2\] holds NaN"):
        method(base, experts, **{name: [*own[:2], own[2] * math.nan]})
    with pytest.raises(DtypeError, match=rf"{name}\[0\]"):
        method(base, experts, **{name: [own[0].long(), *own[1:]]})
    with pytest.raises(OptionError, match=rf"{name}\[0\] must be at least 0"):
        method(base, experts, **{name: [-own[0], *own[1:]]})
    with pytest.raises(OptionError, match="weights must be at least 0"):
        method(base, experts, weights=[1, -1, 1], **known)
    with pytest.raises(NonFiniteError, match="expert 1"):
        method(base, [experts[0], experts[1] * math.nan, experts[2]], **known)
    with pytest.raises(ShapeError, match="expert 2"):
        method(base, [*experts[:2], experts[2][:2]], **known)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda b, e, k: regmean(b, e, grams=k[regmean], offdiagonal=1.1), OptionError, "offdiagonal"),
        (lambda b, e, k: regmean(b, e, grams=k[regmean], ridge=0.0), OptionError, "ridge"),
        (lambda b, e, k: regmean(b[0], [x[0] for x in e], grams=k[regmean]), ShapeError, "needs matrices"),
        (lambda b, e, k: fisher(b, e, fishers=k[fisher], floor=0.0), OptionError, "floor"),
        (lambda b, e, k: curvature(b, e, second_moments=k[curvature], power=-1.0), OptionError, "power"),
        (lambda b, e, k: curvature(b, e, second_moments=k[curvature], eps=0.0), OptionError, "eps"),
        (lambda b, e, k: curvature(b, e, second_moments=k[curvature], keep=0.0), OptionError, "keep"),
        (lambda b, e, k: curvature(b, e, second_moments=k[curvature], threshold=-1.0), OptionError, "threshold"),
        (lambda b, e, k: curvature(b, e, second_moments=k[curvature], threshold=[1.0]), OptionError, "got 1 for 3"),
        (lambda b, e, k: curvature(b, e, second_moments=k[curvature], keep=0.5, threshold=1.0), OptionError, "exclude"),
        (lambda b, e, k: compress_second_moment(-b.abs()), OptionError, "v must be at least 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_every_bad_option_is_refused_by_name(call, error, says):
    base, experts = models(3, 4)
    known = {method: next(iter(knowledge(method, (3, 4)).values())) for method in METHODS}
    with pytest.raises(error, match=says):
        call(base, experts, known)


@pytest.mark.usefixtures("unchecked")
def test_a_gram_that_is_not_symmetric_and_a_lone_moment_are_refused():
    base, experts = models(3, 4)
    grams = knowledge(regmean, (3, 4))["grams"]
    grams[1][0, 2] += 5
    with pytest.raises(OptionError, match=r"grams\[1\] must be symmetric"):
        regmean(base, experts, grams=grams)
    moment = RankOneMoment(torch.ones(3), torch.ones(4))
    with pytest.raises(OptionError, match=r"Pass \[moment\]"):
        curvature(base, experts, second_moments=moment)
    with pytest.raises(NonFiniteError, match=r"second_moments\[0\]"):
        curvature(base, experts[:1], second_moments=[RankOneMoment(torch.ones(3) * math.nan, torch.ones(4))])
    with pytest.raises(ShapeError, match="needs matrices"):
        compress_second_moment(torch.ones(3))
