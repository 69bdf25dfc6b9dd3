"""TSV-M, Iso-C, KnOTS and WUDI: readable forms in float64, published identities, degenerate inputs, every refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.merging.averages import linear
from orthokit.merging.spectral import iso_c, knots, tsv, wudi

SHAPES = [(6, 6), (9, 4), (4, 9), (1, 5), (5, 1), (2, 6, 5)]
METHODS = [tsv, iso_c, knots, wudi]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def models(*shape, count=3, dtype=torch.float64, seed=0):
    base = gaussian(*shape, seed=seed)
    experts = [base + 0.1 * gaussian(*shape, seed=seed + 1 + index) for index in range(count)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def each(function, base, experts):
    """A function of matrices applied to every matrix of a batch."""
    if base.ndim == 2:
        return function(base, experts)
    return torch.stack([each(function, b, [e[i] for e in experts]) for i, b in enumerate(base)])


def tsv_reference(base, experts, weights, k):
    left, values, right = [], [], []
    for expert, weight in zip(experts, weights, strict=True):
        U, S, Vh = torch.linalg.svd(expert - base, full_matrices=False)
        left.append(U[:, :k])
        values.append(weight * S[:k])
        right.append(Vh[:k])
    P, _, Q = torch.linalg.svd(torch.cat(left, 1), full_matrices=False)
    R, _, T = torch.linalg.svd(torch.cat(right, 0), full_matrices=False)
    return base + P @ Q @ torch.diag(torch.cat(values)) @ R @ T


def knots_ties_reference(base, experts, weights, density):
    U, S, Vh = torch.linalg.svd(torch.cat([e - base for e in experts], 1), full_matrices=False)
    keep = 1e-4 * S[0] < S
    parts = []
    for part in (Vh[keep]).split(base.shape[1], dim=1):
        kept = part.flatten().abs().argsort(descending=True)[: max(1, int(density * S.numel() * base.shape[1]))]
        parts.append(torch.zeros(part.numel(), dtype=part.dtype).index_copy(0, kept, part.flatten()[kept]))
    stack = torch.stack([w * part for w, part in zip(weights, parts, strict=True)])
    agrees = stack.sign() == torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    divisor = (torch.tensor(weights, dtype=stack.dtype)[:, None] * agrees).sum(0).clamp(min=1e-9)
    merged = ((stack * agrees).sum(0) / divisor).reshape(-1, base.shape[1])
    return base + U[:, keep] @ torch.diag(S[keep]) @ merged


def wudi_loss(tau, taus, weights=None):
    weights = weights or [1.0] * len(taus)
    return sum(w * ((tau - t) @ t.mT).square().sum() / t.square().sum() for w, t in zip(weights, taus, strict=True))


# Where three experts ask for more directions than the space holds, the published form has an arbitrary part.
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (2, 6, 5)])
@pytest.mark.parametrize("rank", [None, 1])
def test_tsv_follows_its_formula(shape, rank):
    base, experts = models(*shape)
    weights = [0.5, 2.0, 1.0]
    k = rank or max(1, min(shape[-2:]) // 3)
    wanted = each(lambda b, e: tsv_reference(b, e, weights, k), base, experts)
    torch.testing.assert_close(tsv(base, experts, weights=weights, rank=rank), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_of_one_expert_is_that_expert(shape):
    base, experts = models(*shape, count=1)
    torch.testing.assert_close(tsv(base, experts), experts[0])


@pytest.mark.parametrize("shape", [(6, 6), (9, 6), (6, 9)])
def test_tsv_has_the_singular_values_of_all_tasks_side_by_side(shape):
    base, experts = models(*shape)
    own = torch.cat([torch.linalg.svdvals(expert - base)[:2] for expert in experts])
    found = torch.linalg.svdvals(tsv(base, experts) - base)
    torch.testing.assert_close(found, own.sort(descending=True).values)


def test_tsv_of_identical_experts_is_their_strongest_part():
    base, experts = models(7, 5, count=1)
    U, S, Vh = torch.linalg.svd(experts[0] - base, full_matrices=False)
    wanted = base + U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
    torch.testing.assert_close(tsv(base, experts * 3, rank=2), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_has_one_singular_value_and_the_nuclear_norm_of_the_sum(shape):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    total = sum(w * (e - base) for w, e in zip(weights, experts, strict=True))
    change = iso_c(base, experts, weights=weights) - base
    values = torch.linalg.svdvals(change)
    nuclear = torch.linalg.matrix_norm(total, "nuc")
    torch.testing.assert_close(values, (nuclear / values.shape[-1])[..., None].expand_as(values))
    torch.testing.assert_close(torch.linalg.matrix_norm(change, "nuc"), nuclear)
    # The singular vectors are those of the sum: their product is symmetric and positive.
    aligned = total.mT @ change
    torch.testing.assert_close(aligned, aligned.mT)


def test_iso_c_leaves_out_directions_that_nobody_changed():
    base = gaussian(6, 5)
    tau = gaussian(6, 2, seed=1) @ gaussian(2, 5, seed=2)
    values = torch.linalg.svdvals(iso_c(base, [base + tau]) - base)
    torch.testing.assert_close(values[:2], torch.linalg.svdvals(tau).sum().expand(2) / 2)
    assert float(values[2]) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_with_the_linear_rule_is_the_mean_of_the_experts(shape):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    torch.testing.assert_close(knots(base, experts, weights=weights), linear(None, experts, weights=weights))
    halved = base + 0.5 * (linear(None, experts) - base)
    torch.testing.assert_close(knots(base, experts, scale=0.5), halved)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_with_ties_follows_its_formula(shape, density):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    wanted = knots_ties_reference(base, experts, weights, density)
    found = knots(base, experts, weights=weights, inner="ties", density=density)
    # Singular vectors have a sign of their own, under which sums and votes turn along but for draws.
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_knots_leaves_out_directions_below_eps():
    base = torch.zeros(3, 3, dtype=torch.float64)
    expert = torch.diag(torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64))
    for eps, rank in ((0.0, 3), (1e-4, 2), (1e-2, 1)):
        assert int(torch.linalg.matrix_rank(knots(base, [expert], eps=eps), rtol=1e-9)) == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi_solves_its_equation_and_no_step_lowers_its_loss(shape):
    base, experts = models(*shape)
    weights = [1.0, 0.5, 2.0]
    taus = [expert - base for expert in experts]
    tau = wudi(base, experts, weights=weights, ridge=1e-13) - base
    size = [t.square().sum((-2, -1), keepdim=True) for t in taus]
    gram = sum(w * t.mT @ t / n for w, t, n in zip(weights, taus, size, strict=True))
    wanted = sum(w * t @ t.mT @ t / n for w, t, n in zip(weights, taus, size, strict=True))
    torch.testing.assert_close(tau @ gram, wanted, rtol=1e-9, atol=1e-11)
    if base.ndim == 2:
        least = wudi_loss(tau, taus, weights)
        for seed in range(5):
            # A quadratic at its least: to first order nothing changes, to second order it grows.
            assert wudi_loss(tau + 1e-3 * gaussian(*shape, seed=50 + seed), taus, weights) >= least


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
def test_adam_carried_on_far_enough_ends_at_the_exact_answer(shape):
    base, experts = models(*shape)
    taus = [expert - base for expert in experts]
    exact = wudi(base, experts, ridge=1e-13) - base
    near = wudi(base, experts, solver="adam", steps=2500, lr=1e-3) - base
    start = sum(taus)
    least, first = wudi_loss(exact, taus), wudi_loss(start, taus)
    # Of a loss that began far above, all but a millionth is gone; Adam stops within a step or so of the minimum.
    assert abs(float(wudi_loss(near, taus) - least)) < 1e-6 * float(first - least)
    assert float((near - exact).abs().max()) < 1e-3
    # At the published step and number of steps it has moved by 300 x 1e-5 at most.
    early = wudi(base, experts, solver="adam") - base
    assert float((early - start).abs().max()) <= 300 * 1e-5 * 1.01
    assert wudi_loss(early, taus) < first


def test_wudi_keeps_changes_that_share_no_inputs_and_averages_equal_ones():
    base = gaussian(5, 6)
    left, right = gaussian(5, 6, seed=1), gaussian(5, 6, seed=2)
    left[:, 3:], right[:, :3] = 0, 0
    torch.testing.assert_close(wudi(base, [base + left, base + right]), base + left + right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wudi(base, [base + left] * 3), base + left)


@given(st.integers(0, 500), st.permutations(range(3)), st.sampled_from(METHODS))
@settings(max_examples=20)
def test_the_order_of_experts_does_not_matter(seed, order, method):
    base, experts = models(4, 6, seed=seed)
    weights = [0.5, 1.0, 2.0]
    turned = method(base, [experts[i] for i in order], weights=[weights[i] for i in order])
    torch.testing.assert_close(turned, method(base, experts, weights=weights), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4)])
@pytest.mark.parametrize("options", [{"rank": 1}, {}])
def test_an_expert_equal_to_the_base_adds_nothing(shape, options):
    base, experts = models(*shape, count=2)
    for method in (tsv, iso_c, wudi):
        own = options if method is tsv else {}
        if method is tsv and not own:
            continue  # the default rank goes down with the number of experts
        found = method(base, [*experts, base], **own)
        torch.testing.assert_close(found, method(base, experts, **own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (3, 4), (2, 3, 4)])
def test_bfloat16_is_the_rounding_of_the_float32_merge_and_inputs_stay(method, shape):
    base, experts = models(*shape, dtype=torch.bfloat16)
    before = [tensor.clone() for tensor in (base, *experts)]
    found = method(base, experts)
    assert found.dtype == torch.bfloat16 and found.shape == base.shape
    assert torch.equal(found, method(base.float(), [expert.float() for expert in experts]).bfloat16())
    assert all(torch.equal(new, old) for new, old in zip((base, *experts), before, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_float32_agrees_with_float64(method, shape):
    base, experts = models(*shape)
    found = method(base.float(), [expert.float() for expert in experts])
    # The changes are a tenth of the base, so differences in float32 start at 1e-6 and SVDs multiply it.
    torch.testing.assert_close(found.double(), method(base, experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_batches_zeros_and_non_contiguous_inputs(method):
    base, experts = models(2, 3, 4, 5)
    wanted = each(method, base, experts)
    torch.testing.assert_close(method(base, experts), wanted)
    turned = method(base.mT.contiguous().mT, [expert.mT.contiguous().mT for expert in experts])
    torch.testing.assert_close(turned, wanted)
    zero = torch.zeros(3, 4)
    assert torch.equal(method(zero, [zero] * 2), zero)
    assert torch.equal(method(base, [base, base]), base)
    assert not method(torch.nn.Parameter(base), experts).requires_grad


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda b, e: tsv(b, e, rank=0), OptionError, "rank must be at least 1; got 0"),
        (lambda b, e: tsv(b, []), OptionError, "experts is empty"),
        (lambda b, e: iso_c(b, e, weights=[1]), OptionError, "got 1 for 3"),
        (lambda b, e: knots(b, e, inner="tsv"), UnknownNameError, "inner rule"),
        (lambda b, e: knots(b, e, inner="ties", election="x"), UnknownNameError, "election"),
        (lambda b, e: knots(b, e, density=0.0), OptionError, "density"),
        (lambda b, e: knots(b, e, eps=1.0), OptionError, "eps must be less than 1"),
        (lambda b, e: knots(b, e, weights=[1, -1, 0]), OptionError, "sum to 0"),
        (lambda b, e: wudi(b, e, solver="sgd"), UnknownNameError, "solver"),
        (lambda b, e: wudi(b, e, ridge=0.0), OptionError, "ridge"),
        (lambda b, e: wudi(b, e, steps=0), OptionError, "steps"),
        (lambda b, e: wudi(b, e, lr=-1.0), OptionError, "lr"),
        (lambda b, e: wudi(b, e, weights=[1, -1, 1]), OptionError, "at least 0"),
        (lambda b, e: wudi(b, e, weights=[0, 0, 0]), OptionError, "one of them greater"),
    ],
)
def test_every_bad_option_is_refused_by_name(call, error, says):
    with pytest.raises(error, match=says):
        call(*models(2, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("unchecked")
def test_bad_tensors_are_refused_by_name(method):
    base, experts = models(2, 3)
    with pytest.raises(ShapeError, match=r"needs matrices .* base has shape \(3,\)"):
        method(base[0], [expert[0] for expert in experts])
    with pytest.raises(ShapeError, match=r"needs rows and columns; base has shape \(0, 3\)"):
        method(base[:0], [expert[:0] for expert in experts])
    with pytest.raises(ShapeError, match="expert 1"):
        method(base, [experts[0], experts[1].mT])
    with pytest.raises(DtypeError, match="expert 0"):
        method(base, [experts[0].int()])
    with pytest.raises(NonFiniteError, match="expert 0"):
        method(base, [experts[0] * math.inf])
    with pytest.raises(OptionError, match="scale"):
        method(base, experts, scale=math.nan)
