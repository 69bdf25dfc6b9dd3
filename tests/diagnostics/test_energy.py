"""Hyperspherical energy: definition, invariances, closed forms, gradients, memory."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics import _tiles
from orthokit.diagnostics.energy import expected_energy, hyperspherical_energy, projected_energy, simplex_energy
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import random_orthogonal

VARIANTS = [(s, h, a) for s in (0, 0.5, 1, 2, 3) for h in (False, True) for a in (False, True)]
DIVERGENT = None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def reference(W, *, s=1.0, half_space=False, angular=False, reduction="mean"):
    """The definition, pair by pair, by exact differences in float64."""
    X = W.double() / W.double().norm(dim=-1, keepdim=True)
    if half_space:
        X = torch.cat([X, -X])
    z = (X[:, None] - X[None]).norm(dim=-1)
    if angular:
        z = 2 * torch.atan2(z, (X[:, None] + X[None]).norm(dim=-1))
    off = ~torch.eye(len(X), dtype=torch.bool)
    f = torch.where(off, -z.clamp(min=1e-6).log() if s == 0 else z.clamp(min=1e-6) ** -s, 0.0)
    if reduction == "none":
        return f.sum(-1)[: len(W)] / (len(X) - 1)
    return f.sum() / (off.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize(("s", "half_space", "angular"), VARIANTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(2, 5), (7, 3), (12, 40)])
def test_every_variant_equals_the_pairwise_definition(s, half_space, angular, reduction, shape):
    W = gaussian(*shape, seed=3)
    options = {"s": s, "half_space": half_space, "angular": angular, "reduction": reduction}
    torch.testing.assert_close(
        hyperspherical_energy(W, **options, chunk=3), reference(W, **options), rtol=1e-11, atol=1e-12
    )
    # float32: a tile keeps pairs with a squared distance above 1/64, hence up to about 3e-5 s/2 a pair.
    torch.testing.assert_close(
        hyperspherical_energy(W.float(), **options).double(), reference(W.float(), **options), rtol=1e-5, atol=1e-6
    )


def test_two_neurons_at_a_right_angle_by_hand():
    W = torch.tensor([[2.0, 0.0], [0.0, 0.1]])
    assert hyperspherical_energy(W).item() == pytest.approx(2**-0.5, rel=1e-7)
    assert hyperspherical_energy(W, s=0).item() == pytest.approx(-math.log(2) / 2, rel=1e-7)
    assert hyperspherical_energy(W, s=1, angular=True).item() == pytest.approx(2 / math.pi, rel=1e-7)
    assert hyperspherical_energy(W, reduction="sum").item() == pytest.approx(2 * 2**-0.5, rel=1e-7)
    # Four points on the circle: four pairs at sqrt 2, two antipodal pairs at 2.
    assert hyperspherical_energy(W, half_space=True).item() == pytest.approx((4 * 2**-0.5 + 2 / 2) / 6, rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 12), d=st.integers(2, 9), seed=st.integers(0, 10**6), s=st.sampled_from([0.0, 1.0, 2.0]),
    half_space=st.booleans(), angular=st.booleans(),
)  # fmt: skip
def test_kept_by_row_scaling_permutation_and_right_rotation(n, d, seed, s, half_space, angular):
    g = generator(seed)
    W = torch.randn(n, d, generator=g, dtype=torch.float64)
    Q = random_orthogonal(d, d, generator=g, dtype=torch.float64)
    scale = torch.rand(n, 1, generator=g, dtype=torch.float64) * 100 + 1e-3
    moved = (scale * W @ Q)[torch.randperm(n, generator=g)]
    options = {"s": s, "half_space": half_space, "angular": angular}
    torch.testing.assert_close(
        hyperspherical_energy(moved, **options), hyperspherical_energy(W, **options), rtol=1e-9, atol=1e-12
    )


def test_rotation_of_well_spread_neurons_keeps_twelve_digits():
    W, Q = gaussian(40, 32), random_orthogonal(32, 32, generator=generator(1), dtype=torch.float64)
    assert abs(hyperspherical_energy(W @ Q) - hyperspherical_energy(W)) < 1e-12


def test_changed_by_left_rotation_and_by_additive_noise():
    W, Q = gaussian(16, 8), random_orthogonal(16, 16, generator=generator(1), dtype=torch.float64)
    before = hyperspherical_energy(W)
    assert abs(hyperspherical_energy(Q @ W) - before) > 1e-4
    assert abs(hyperspherical_energy(W + gaussian(16, 8, seed=5)) - before) > 1e-4


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_half_space_ignores_signs_of_rows_and_plain_does_not(s):
    W = gaussian(9, 4)
    flipped = W * torch.tensor([1.0, -1.0] * 4 + [1.0]).double().unsqueeze(1)
    half = [hyperspherical_energy(A, s=s, half_space=True) for A in (W, flipped)]
    plain = [hyperspherical_energy(A, s=s) for A in (W, flipped)]
    assert abs(half[0] - half[1]) < 1e-12
    assert abs(plain[0] - plain[1]) > 1e-4


# Section "values": d, then the expectation for s = 0, 1, 2.
TABLE = [
    (3, -0.19315, 1.00000, DIVERGENT),
    (8, -0.30833, 0.75255, 0.60000),
    (16, -0.32935, 0.72629, 0.53846),
    (64, -0.34257, 0.71140, 0.50820),
    (256, -0.34559, 0.70815, 0.50198),
    (1024, -0.34633, 0.70737, 0.50049),
]


@pytest.mark.parametrize(("d", "log", "one", "two"), TABLE)
def test_expected_energy_matches_the_table(d, log, one, two):
    assert expected_energy(d, s=0) == pytest.approx(log, abs=5.1e-6)
    assert expected_energy(d, s=1) == pytest.approx(one, abs=5.1e-6)
    if two is DIVERGENT:
        with pytest.raises(OptionError, match="s < d - 1 = 2"):
            expected_energy(d, s=2)
    else:
        assert expected_energy(d, s=2) == pytest.approx(two, abs=5.1e-6)
        assert expected_energy(d, s=2) == pytest.approx((d - 2) / (2 * (d - 3)), rel=1e-12)


@pytest.mark.parametrize(("d", "s"), [(3, 0.0), (5, 0.0), (5, 1.0), (9, 2.0), (9, 2.5)])
def test_expected_energy_is_the_integral_over_the_sphere(d, s):
    integrate = pytest.importorskip("scipy.integrate")

    def density(theta):
        return math.sin(theta) ** (d - 2)

    def energy(theta):
        z = 2 * math.sin(theta / 2)
        return (-math.log(z) if s == 0 else z**-s) * density(theta)

    integral = integrate.quad(energy, 0, math.pi)[0] / integrate.quad(density, 0, math.pi)[0]
    assert expected_energy(d, s=s) == pytest.approx(integral, rel=1e-7)


@pytest.mark.parametrize(("s", "value", "spread"), [(0, -0.3421, 0.0015), (1, 0.71148, 0.0008), (2, 0.50818, 0.0015)])
def test_gaussian_rows_reproduce_the_expectation(s, value, spread):
    energies = hyperspherical_energy(gaussian(20, 64, 64), s=s)
    # Mean of 20 draws against the recorded mean of a like experiment: four standard errors of their difference.
    tolerance = 4 * spread * math.sqrt(1 / 20 + 1 / 10)
    assert energies.mean().item() == pytest.approx(value, abs=tolerance)
    assert energies.mean().item() == pytest.approx(expected_energy(64, s=s), abs=4 * spread / math.sqrt(20) * 1.5)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
def test_half_space_expectation_matches_monte_carlo(s):
    d, n = 8, 12
    energies = hyperspherical_energy(gaussian(4000, n, d, seed=7), s=s, half_space=True)
    error = energies.std().item() / math.sqrt(len(energies))
    assert energies.mean().item() == pytest.approx(expected_energy(d, s=s, half_space=True, neurons=n), abs=4 * error)


def test_expectation_tends_to_orthonormal_rows():
    for s in (0.0, 1.0, 2.0):
        orthonormal = hyperspherical_energy(torch.eye(32, dtype=torch.float64), s=s).item()
        assert orthonormal == pytest.approx(-math.log(2) / 2 if s == 0 else 2 ** (-s / 2), rel=1e-12)
        assert expected_energy(10**6, s=s) == pytest.approx(orthonormal, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 7), extra=st.integers(0, 3), seed=st.integers(0, 10**6), s=st.sampled_from([0.0, 1.0, 2.0]))
def test_simplex_is_the_minimum(n, extra, seed, s):
    centred = torch.eye(n, dtype=torch.float64) - 1 / n  # a regular simplex, in the n - 1 dimensions orthogonal to 1
    least = simplex_energy(n, s=s)
    assert hyperspherical_energy(centred, s=s).item() == pytest.approx(least, rel=1e-10)
    assert hyperspherical_energy(gaussian(n, n + extra, seed=seed), s=s).item() >= least - 1e-12


@pytest.mark.parametrize(("s", "half_space", "angular"), VARIANTS)
def test_gradient_passes_gradcheck_and_is_tangent(s, half_space, angular):
    W = gaussian(2, 6, 4, seed=11).requires_grad_()
    options = {"s": s, "half_space": half_space, "angular": angular}
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda A, r=reduction: hyperspherical_energy(A, **options, reduction=r, chunk=4), W
        )
    (grad,) = torch.autograd.grad(hyperspherical_energy(W, **options).sum(), W)
    assert (grad * W).sum(-1).abs().max() < 1e-12 * grad.abs().max().clamp(min=1)


def test_gradient_with_weights_by_neuron_equals_autograd_of_the_definition():
    W, weights = gaussian(11, 5, seed=2).requires_grad_(), gaussian(11, seed=4)
    fast = torch.autograd.grad((hyperspherical_energy(W, reduction="none", chunk=2) * weights).sum(), W)[0]
    X = W / W.norm(dim=-1, keepdim=True)
    f = (2 - 2 * X @ X.T + torch.eye(11, dtype=torch.float64)).rsqrt() * (1 - torch.eye(11, dtype=torch.float64))
    slow = torch.autograd.grad((f.sum(-1) / 10 * weights).sum(), W)[0]
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_float32_gradient_matches_float64():
    W = gaussian(48, 24)
    grads = []
    for dtype in (torch.float32, torch.float64):
        A = W.to(dtype).requires_grad_()
        hyperspherical_energy(A, chunk=16).backward()
        grads.append(A.grad.double())
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def test_descending_the_gradient_lowers_the_energy_to_the_simplex():
    W = gaussian(4, 3, seed=1).requires_grad_()
    optimizer = torch.optim.SGD([W], lr=2.0)
    for _ in range(300):
        optimizer.zero_grad()
        hyperspherical_energy(W).backward()
        optimizer.step()
    assert hyperspherical_energy(W).item() == pytest.approx(simplex_energy(4), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_near_duplicates_are_right_also_in_float32(dtype, angular, distance):
    W = gaussian(300, 64)  # more than one tile
    x = W[0] / W[0].norm()
    W[299] = 3 * (x + distance * (W[1] - (W[1] @ x) * x) / (W[1] - (W[1] @ x) * x).norm())
    W = W.to(dtype).requires_grad_()
    energy = hyperspherical_energy(W, s=2, angular=angular, reduction="none")
    exact = reference(W.detach(), s=2, angular=angular, reduction="none")
    torch.testing.assert_close(energy.detach().double(), exact, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(energy.sum(), W)
    assert (grad * W).sum(-1).abs().max() < 1e-4 * (grad.norm(dim=-1) * W.norm(dim=-1)).max()
    # The close pair dominates: each is pushed away from the other with 4 / (pairs z^3), per unit of its own length.
    push = grad[0].norm() * W[0].norm()
    assert push.item() == pytest.approx(4 / 299 * distance**-3, rel=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("s", "half_space", "angular"), VARIANTS)
def test_duplicates_give_the_floor_and_finite_gradients(dtype, s, half_space, angular):
    W = gaussian(5, 4, dtype=dtype)
    W[1] = 2 * W[0]
    W[2] = -W[0]
    W.requires_grad_()
    energy = hyperspherical_energy(W, s=s, half_space=half_space, angular=angular, reduction="none")
    energy.sum().backward()
    assert energy.isfinite().all()
    assert W.grad.isfinite().all()
    points = 9 if half_space else 4
    if s > 1:
        closest = (2 if half_space else 1) * 1e6**s / points  # with mirrors, row 0 also coincides with minus row 2
        assert energy[0].item() == pytest.approx(closest, rel=1e-3)


def test_all_equal_rows_sit_at_the_floor():
    assert hyperspherical_energy(torch.full((20, 6), 0.3)).item() == pytest.approx(1e6, rel=1e-6)


def test_a_zero_row_counts_as_orthogonal_and_gets_no_gradient():
    W = torch.eye(5, dtype=torch.float64)[:4].clone()
    W[3] = 0
    W.requires_grad_()
    energy = hyperspherical_energy(W)
    energy.backward()
    assert energy.item() == pytest.approx(2**-0.5, rel=1e-12)
    assert (W.grad[3] == 0).all()
    assert W.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-11, 1.0, 1e30])
def test_extreme_scales_of_float32_rows_do_not_matter(scale):
    W = gaussian(10, 8, dtype=torch.float32)
    torch.testing.assert_close(hyperspherical_energy(W * scale), hyperspherical_energy(W), rtol=1e-5, atol=0)


def test_bfloat16_and_half_are_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        W = gaussian(20, 16, dtype=dtype)
        energy = hyperspherical_energy(W)
        assert energy.dtype == torch.float32
        assert energy.item() == pytest.approx(reference(W).item(), rel=1e-6)


def test_autocast_does_not_round_the_cosines():
    W = gaussian(20, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hyperspherical_energy(W)
    assert inside == hyperspherical_energy(W)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batches_equal_single_matrices(reduction):
    W = gaussian(2, 3, 10, 6).transpose(-1, -2)  # not contiguous: 6 neurons of 10 dimensions
    batched = hyperspherical_energy(W, reduction=reduction)
    single = torch.stack([torch.stack([hyperspherical_energy(A, reduction=reduction) for A in row]) for row in W])
    torch.testing.assert_close(batched, single, rtol=1e-12, atol=0)
    assert hyperspherical_energy(W[:0]).shape == (0, 3)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_chunk_does_not_change_the_value(chunk):
    W = gaussian(65, 9)
    torch.testing.assert_close(hyperspherical_energy(W, chunk=chunk), hyperspherical_energy(W), rtol=1e-13, atol=0)


def test_no_tile_grows_with_the_number_of_neurons():
    W = gaussian(1500, 4, dtype=torch.float32).requires_grad_()
    sizes = []

    def watch(A, B):
        out = torch.bmm(A, B)
        sizes.append(max(out.numel(), A.numel(), B.numel()))
        return out

    with mock.patch.object(_tiles, "_matmul", watch):
        hyperspherical_energy(W, chunk=32).backward()
    assert max(sizes) <= 32 * 8 * 32


def test_functional_gradient_is_supported():
    W = gaussian(6, 3)
    grad = torch.func.grad(hyperspherical_energy)(W)
    A = W.clone().requires_grad_()
    hyperspherical_energy(A).backward()
    torch.testing.assert_close(grad, A.grad)


def test_projected_energy_is_the_mean_over_seeded_projections():
    W = gaussian(14, 20)
    value = projected_energy(W, dims=6, projections=3, generator=generator(5), s=2, half_space=True)
    g = generator(5)
    energies = [reference(W @ torch.randn(20, 6, generator=g).double(), s=2, half_space=True) for _ in range(3)]
    assert value.item() == pytest.approx(np.mean(energies), rel=1e-10)
    assert projected_energy(W, dims=6) == projected_energy(W, dims=6)


def test_projected_energy_of_gaussian_rows_is_the_expectation_in_few_dimensions():
    values = torch.stack([projected_energy(gaussian(30, 64, seed=k), dims=8, projections=5) for k in range(12)])
    error = values.std().item() / math.sqrt(12)
    assert values.mean().item() == pytest.approx(expected_energy(8), abs=4 * error)


def test_projected_energy_is_differentiable():
    W = gaussian(6, 10).requires_grad_()
    (grad,) = torch.autograd.grad(projected_energy(W, dims=4, projections=2), W)
    assert grad.norm() > 0
    assert (grad * W).sum(-1).abs().max() < 1e-12


def test_bad_input_is_named(unchecked):
    W = gaussian(4, 3)
    with pytest.raises(ShapeError, match="at least 2 neurons"):
        hyperspherical_energy(W[:1])
    with pytest.raises(ShapeError, match="at least 2 neurons"):
        hyperspherical_energy(W[:, :0])
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        hyperspherical_energy(W[0])
    with pytest.raises(DtypeError, match="int64"):
        hyperspherical_energy(torch.eye(3, dtype=torch.int64))
    with pytest.raises(DtypeError, match="complex"):
        hyperspherical_energy(torch.eye(3, dtype=torch.complex64))
    for bad in (float("nan"), float("inf")):
        A = W.clone()
        A[2, 1] = bad
        with pytest.raises(NonFiniteError, match="1 of its 4 rows"):
            hyperspherical_energy(A)
    for s in (-1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="s must be finite"):
            hyperspherical_energy(W, s=s)
    with pytest.raises(UnknownNameError, match="did you mean 'mean'"):
        hyperspherical_energy(W, reduction="meam")
    with pytest.raises(OptionError, match="chunk"):
        hyperspherical_energy(W, chunk=0)
    with pytest.raises(OptionError, match="dims"):
        projected_energy(W, dims=0)
    with pytest.raises(OptionError, match="projections"):
        projected_energy(W, projections=0)
    with pytest.raises(OptionError, match="n must be"):
        simplex_energy(1)
    with pytest.raises(OptionError, match="d must be"):
        expected_energy(1)
    with pytest.raises(OptionError, match="neurons"):
        expected_energy(8, half_space=True)
