"""Averages of models: against their formulas in float64, at their known ends, and every refusal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from orthokit.merging.averages import linear, metrics_weighted, model_stock, slerp, task_arithmetic

SHAPES = [(), (7,), (1, 5), (4, 6), (6, 4), (2, 3, 5), (0, 3)]
METHODS = [linear, task_arithmetic, slerp, model_stock, metrics_weighted]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def models(*shape, count=3, spread=0.1, dtype=torch.float64, seed=0):
    base = gaussian(*shape, seed=seed)
    experts = [base + spread * gaussian(*shape, seed=seed + 1 + index) for index in range(count)]
    return base.to(dtype), [expert.to(dtype) for expert in experts]


def run(method, base, experts, **options):
    if method is metrics_weighted:
        options.setdefault("losses", [1.0 + index for index in range(len(experts))])
    return method(base, experts[:2] if method is slerp else experts, **options)


def stock_reference(base, experts, filter_wise):
    """Model Stock row by row, each row (or the whole tensor) with its own ratio, clipped."""
    width = base.shape[-1] if filter_wise else base.numel()
    rows = base.reshape(-1, width)
    out = torch.empty_like(rows)
    count = len(experts)
    for index, start in enumerate(rows):
        taus = [expert.reshape(-1, width)[index] - start for expert in experts]
        cosines = [float(taus[i] @ taus[j] / (taus[i].norm() * taus[j].norm())) for j in range(count) for i in range(j)]
        c = sum(cosines) / len(cosines)
        t = min(1.0, max(0.0, count * c / (1 + (count - 1) * c)))
        out[index] = start + t * sum(taus) / count
    return out.reshape(base.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_and_task_arithmetic_follow_their_formulas(shape):
    base, experts = models(*shape)
    weights = [0.5, 2.0, -0.3]
    total = sum(w * expert for w, expert in zip(weights, experts, strict=True))
    torch.testing.assert_close(linear(None, experts, weights=weights), total / sum(weights))
    torch.testing.assert_close(linear(base, experts, weights=weights, normalize=False), total)
    change = sum(w * (expert - base) for w, expert in zip(weights, experts, strict=True))
    torch.testing.assert_close(task_arithmetic(base, experts, weights=weights, scale=0.7), base + 0.7 * change)
    torch.testing.assert_close(
        linear(base, experts, scale=0.4), base + 0.4 * (sum(experts) / 3 - base), rtol=1e-12, atol=1e-12
    )


def test_task_arithmetic_with_scale_one_gives_a_single_expert_back_and_with_one_over_n_the_mean():
    base, experts = models(5, 8)
    torch.testing.assert_close(task_arithmetic(base, experts[:1], scale=1.0), experts[0])
    torch.testing.assert_close(task_arithmetic(base, experts, scale=1 / 3), linear(None, experts))
    assert torch.equal(task_arithmetic(base, [base, base]), base)
    without = task_arithmetic(base, [experts[0], experts[1]], weights=[1, -1], scale=1.0)
    torch.testing.assert_close(without, base + experts[0] - experts[1])


def test_identical_experts_average_to_themselves():
    expert = gaussian(50, 50, dtype=torch.float32)
    # Tripled and divided: two roundings of half an ulp each, and one of the reciprocal.
    torch.testing.assert_close(linear(None, [expert] * 3), expert, rtol=2e-7, atol=0)
    assert torch.equal(linear(None, [expert] * 4), expert)


@pytest.mark.parametrize("shape", [(7,), (4, 6), (2, 3, 5)])
def test_slerp_starts_and_ends_at_its_experts_and_keeps_a_common_norm(shape):
    _, (a, b) = models(*shape, count=2, spread=1.0)
    b = b * (a.norm() / b.norm())
    torch.testing.assert_close(slerp(None, [a, b], t=0.0), a)
    torch.testing.assert_close(slerp(None, [a, b], t=1.0), b)
    for t in (0.1, 0.5, 0.8):
        between = slerp(None, [a, b], t=t)
        torch.testing.assert_close(between.norm(), a.norm())
        angle = math.acos(float((a * b).sum() / a.norm() ** 2))
        turned = math.acos(float((a * between).sum() / a.norm() ** 2))
        assert turned == pytest.approx(t * angle, abs=1e-7)
    torch.testing.assert_close(slerp(None, [a, b], t=0.3), slerp(None, [b, a], t=0.7))


def test_slerp_is_linear_between_parallel_opposite_and_zero_tensors():
    a = gaussian(30)
    for b in (2 * a, -a, torch.zeros(30, dtype=a.dtype), a + 1e-3 * gaussian(30, seed=1)):
        torch.testing.assert_close(slerp(None, [a, b], t=0.25), 0.75 * a + 0.25 * b)
    near = a + 0.05 * gaussian(30, seed=1)
    cosine = float(a @ near / a.norm() / near.norm())
    assert cosine < 0.9995
    assert not torch.allclose(slerp(None, [a, near]), (a + near) / 2, rtol=1e-5, atol=1e-6)


def test_slerp_survives_entries_whose_squares_overflow():
    a, b = torch.tensor([3e25, 0.0]), torch.tensor([0.0, 3e25])
    torch.testing.assert_close(slerp(None, [a, b]), torch.full((2,), 3e25 * math.sqrt(0.5)))


@pytest.mark.parametrize("shape", [(7,), (4, 6), (1, 5), (2, 3, 5)])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_follows_its_formula(shape, filter_wise):
    base, experts = models(*shape)
    shared = gaussian(*shape, seed=9)
    experts = [expert + 0.1 * shared for expert in experts]  # otherwise most ratios are clipped
    found = model_stock(base, experts, filter_wise=filter_wise)
    torch.testing.assert_close(found, stock_reference(base, experts, filter_wise))


def test_model_stock_at_its_three_ends():
    base = gaussian(12)
    tau = gaussian(12, seed=1)
    torch.testing.assert_close(model_stock(base, [base + tau, base + 3 * tau]), base + 2 * tau)
    axes = torch.eye(12, dtype=base.dtype)
    torch.testing.assert_close(model_stock(base, [base + axes[0], base + axes[1], base + 2 * axes[2]]), base)
    # Three unit vectors of pairwise cosine -0.2: the formula says t = 3 (-0.2) / (1 - 0.4) = -1.
    gram = torch.full((3, 3), -0.2, dtype=base.dtype) + 1.2 * torch.eye(3, dtype=base.dtype)
    opposed = torch.linalg.cholesky(gram)
    start = torch.zeros(3, dtype=base.dtype)
    torch.testing.assert_close(model_stock(start, list(opposed)), start)
    assert torch.equal(model_stock(base, [base, base]), base)


def test_model_stock_weights_count_in_the_mean_alone():
    base, tau = torch.zeros(3), torch.tensor([1.0, 2.0, 0.0])
    found = model_stock(base, [tau, 3 * tau], weights=[3, 1])
    torch.testing.assert_close(found, 1.5 * tau)


def test_metrics_weights_are_powers_of_loss_or_step():
    _, experts = models(4, 3)
    losses, steps = [2.0, 0.5, 1.0], [100, 300, 200]
    for options, raw in (
        ({"losses": losses, "power": 2.0}, [loss**-2 for loss in losses]),
        ({"steps": steps, "power": 0.5}, [step**0.5 for step in steps]),
        ({"steps": steps, "weights": [1.0, 0.0, 2.0]}, [100.0, 0.0, 400.0]),
        ({"losses": losses, "power": 0.0}, [1.0, 1.0, 1.0]),
    ):
        wanted = sum(w * expert for w, expert in zip(raw, experts, strict=True)) / sum(raw)
        torch.testing.assert_close(metrics_weighted(None, experts, **options), wanted)
    # 1e-30 to the power -40 is beyond float64, the ratio of equals is not.
    torch.testing.assert_close(
        metrics_weighted(None, experts, losses=[1e-30] * 3, power=40.0), linear(None, experts), rtol=1e-12, atol=1e-14
    )


@given(st.integers(0, 1000), st.permutations(range(3)), st.sampled_from(["linear", "ta", "stock", "metrics"]))
@settings(max_examples=25)
def test_the_order_of_experts_does_not_matter(seed, order, which):
    base, experts = models(3, 5, seed=seed)
    numbers = [0.5, 1.0, 2.0]

    def merged(places):
        chosen, given_ = [experts[i] for i in places], [numbers[i] for i in places]
        if which == "linear":
            return linear(None, chosen, weights=given_)
        if which == "ta":
            return task_arithmetic(base, chosen, weights=given_)
        if which == "stock":
            return model_stock(base, chosen, weights=given_)
        return metrics_weighted(None, chosen, losses=given_)

    torch.testing.assert_close(merged(order), merged(range(3)))


@given(st.integers(0, 1000), st.floats(-3, 3))
@settings(max_examples=20)
def test_an_expert_equal_to_the_base_adds_nothing_to_task_arithmetic(seed, weight):
    base, experts = models(3, 5, seed=seed)
    with_it = task_arithmetic(base, [*experts, base], weights=[1, 1, 1, weight])
    torch.testing.assert_close(with_it, task_arithmetic(base, experts))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5,), (1, 4), (3, 4)])
def test_bfloat16_is_the_rounding_of_the_float32_merge_and_inputs_stay(method, shape):
    base, experts = models(*shape, dtype=torch.bfloat16)
    before = [tensor.clone() for tensor in (base, *experts)]
    found = run(method, base, experts)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, run(method, base.float(), [e.float() for e in experts]).bfloat16())
    assert all(torch.equal(new, old) for new, old in zip((base, *experts), before, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_zeros_non_contiguous_inputs_and_gradients(method):
    zero = torch.zeros(3, 4)
    assert torch.equal(run(method, zero, [zero] * 3), zero)
    base, experts = models(4, 3)
    wanted = run(method, base.mT.contiguous(), [expert.mT.contiguous() for expert in experts])
    torch.testing.assert_close(run(method, base.mT, [expert.mT for expert in experts]), wanted)
    found = run(method, torch.nn.Parameter(base), [torch.nn.Parameter(expert) for expert in experts])
    assert not found.requires_grad
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (base, *experts)}
    assert run(method, base, experts, scale=1.0).untyped_storage().data_ptr() not in inputs


def test_the_dtype_is_that_of_the_base_or_of_the_first_expert():
    base, experts = models(4)
    mixed = [experts[0].bfloat16(), experts[1].float()]
    assert linear(None, mixed).dtype == torch.bfloat16
    assert linear(base, mixed).dtype == torch.float64
    assert task_arithmetic(base.half(), mixed).dtype == torch.float16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b, e: linear(None, []), "experts is empty"),
        (lambda b, e: linear(b, e, weights=[1.0]), "got 1 for 3"),
        (lambda b, e: linear(b, e, weights=[0.1, 0.2, -0.3]), "sum to 0"),
        (lambda b, e: linear(b, e, weights=[1.0, math.inf, 1.0]), "finite"),
        (lambda b, e: linear(None, e, scale=0.5), "pass base"),
        (lambda b, e: task_arithmetic(b, e, scale=math.nan), "scale must be a finite number; got nan"),
        (lambda b, e: slerp(b, e), "exactly 2 experts; got 3"),
        (lambda b, e: slerp(b, e[:2], t=1.2), "t must be a finite number at least 0 and at most 1; got 1.2"),
        (lambda b, e: slerp(b, e[:2], weights=[1, 2]), "t="),
        (lambda b, e: slerp(None, e[:2], scale=2.0), "pass base"),
        (lambda b, e: model_stock(b, e[:1]), "at least 2 experts; got 1"),
        (lambda b, e: model_stock(b, e, weights=[1, -1, 0]), "sum to 0"),
        (lambda b, e: metrics_weighted(b, e), "either losses= or steps="),
        (lambda b, e: metrics_weighted(b, e, losses=[1, 1, 1], steps=[1, 1, 1]), "either"),
        (lambda b, e: metrics_weighted(b, e, losses=[1.0]), "got 1 for 3"),
        (lambda b, e: metrics_weighted(b, e, losses=[1.0, 0.0, 1.0]), r"losses\[1\] must be .* greater than 0"),
        (lambda b, e: metrics_weighted(b, e, steps=[1, 2, 3], power=-1.0), "power"),
        (lambda b, e: metrics_weighted(b, e, steps=[1, 2, 3], weights=[1, -1, 1]), "at least 0"),
    ],
)
def test_every_bad_option_is_refused_by_name(call, says):
    with pytest.raises(OptionError, match=says):
        call(*models(2, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("unchecked")
def test_bad_tensors_are_refused_by_name(method):
    base, experts = models(2, 3)
    with pytest.raises(ShapeError, match=r"base has \(2, 3\) and expert 1 has \(3, 2\)"):
        run(method, base, [experts[0], experts[1].mT, experts[2]])
    with pytest.raises(DtypeError, match=r"expert 0 must be real floating; got torch.int64"):
        run(method, base, [experts[0].long(), *experts[1:]])
    with pytest.raises(DtypeError, match="complex64"):
        run(method, base.to(torch.complex64), experts)
    with pytest.raises(DtypeError, match="expert 1 must be a tensor; got list"):
        run(method, base, [experts[0], [1.0], experts[2]])
    broken = experts[1].clone()
    broken[0, 1] = math.nan
    with pytest.raises(NonFiniteError, match="expert 1 holds NaN: 1 of its 6"):
        run(method, base, [experts[0], broken, experts[2]])
    broken[0, 1] = math.inf
    with pytest.raises(NonFiniteError, match="base holds infinity"):
        run(method, broken, experts)
    with pytest.raises(OptionError, match="pass \\[expert\\]"):
        method(base, experts[0])


def test_a_sum_that_overflows_is_not_mistaken_for_an_infinite_entry():
    huge = torch.full((8,), 3e38)
    torch.testing.assert_close(linear(None, [huge]), huge)


def test_eight_bit_floats_are_merged_in_float32():
    expert = torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn)
    found = linear(None, [expert, expert])
    assert found.dtype == torch.float8_e4m3fn and found.float().tolist() == [0.5, 2.0]
