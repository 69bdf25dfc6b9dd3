"""The iteration's fast path against the formulas written out, and what each pre-scaling promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.errors import OptionError, UnknownNameError
from orthokit.linalg import _iteration, orthogonalize, polar, random_orthogonal
from orthokit.linalg._iteration import SCALINGS, _factor, iterate, iterate_differentiable
from orthokit.linalg._workspace import Workspace
from orthokit.linalg.coefficients import coefficient_table

SHAPES = [(2, 5, 9), (2, 9, 5), (3, 6, 6), (1, 1, 4), (2, 4, 1), (1, 1, 1)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def options(scaling: str, polish: int | None) -> dict:
    return {"polish": polish, "headroom": 1.01, "eps": 1e-7, "scaling": scaling}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("polish", [0, 1, 3, None])
@pytest.mark.parametrize("overwrite", [False, True])
def test_buffers_change_nothing_but_rounding(shape, scaling, steps, polish, overwrite):
    X, table = randn(*shape), coefficient_table("polar_express", steps)
    expected = iterate_differentiable(X, table, **options(scaling, polish))
    before, workspace = X.clone(), Workspace()
    for _ in range(2):  # the second time every buffer holds the leftovers of the first
        given_ = before.clone()
        result = iterate(given_, table, **options(scaling, polish), overwrite=overwrite, workspace=workspace)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
        assert overwrite or torch.equal(given_, before)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), power=st.floats(0, 4), seed=st.integers(0, 999))
def test_every_scaling_brings_all_singular_values_to_one_or_below(rows, columns, power, seed):
    X = randn(rows, columns, seed=seed) * torch.arange(1, rows + 1).double().unsqueeze(-1) ** -power
    X = X if rows <= columns else X.mT
    for scaling in SCALINGS:
        scaled = _factor(X @ X.mT, scaling, headroom=1.0, eps=1e-300) * X
        assert torch.linalg.matrix_norm(scaled, 2) <= 1 + 1e-6


def test_a_tighter_scaling_leaves_less_to_lift():
    X = randn(64, 256)
    A = X @ X.mT
    factors = {scaling: float(_factor(A, scaling, headroom=1.0, eps=1e-7).mean()) for scaling in SCALINGS}
    assert factors["frobenius"] < factors["schatten"] < factors["spectral"]
    assert factors["frobenius"] < factors["aol"]


def test_aol_of_orthogonal_rows_is_their_exact_normalisation():
    Q = random_orthogonal(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.tensor([5.0, 1.0, 0.3, 0.01], dtype=torch.float64).unsqueeze(-1) * Q
    torch.testing.assert_close(orthogonalize(X, steps=0, scaling="aol") * 1.01, Q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scaling", [s for s in SCALINGS if s != "aol"])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)], ids=str)
def test_scalar_scalings_keep_the_polar_factor(scaling, shape):
    X = random_orthogonal(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1 * randn(*shape)
    torch.testing.assert_close(orthogonalize(X, polish=6, scaling=scaling), polar(X), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_zero_stays_zero(scaling, dtype):
    assert not orthogonalize(torch.zeros(3, 5, dtype=dtype), scaling=scaling, polish="auto").any()


# The residual it stops at is two units of rounding; the products add about as much again to each singular value.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
def test_auto_polish_ends_at_the_rounding_of_the_products(dtype, tolerance):
    X = randn(40, 100).to(dtype)
    s = torch.linalg.svdvals(orthogonalize(X, steps=6, polish="auto").double())
    assert (s - 1).abs().max() < tolerance


def test_auto_polish_stops_early_and_not_before_it_may():
    X = random_orthogonal(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(orthogonalize(X, steps=8, polish="auto"), orthogonalize(X, steps=8, polish=0))
    rough = randn(8, 20)
    assert not torch.equal(orthogonalize(rough, steps=4, polish="auto"), orthogonalize(rough, steps=4, polish=0))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_differentiable_in_every_shape(shape, scaling):
    X = randn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda M: orthogonalize(M, steps=2, polish=1, scaling=scaling), X)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_float16_survives_its_own_range(scale):
    X = (randn(20, 30) * scale).half()
    s = torch.linalg.svdvals(orthogonalize(X, steps=7, polish=1, eps=1e-12).double())
    assert (s - 1).abs().max() < 0.02


def test_workspace_lends_the_same_memory_again_and_grows():
    workspace = Workspace()
    first = workspace.get("a", (4, 3), torch.float32, torch.device("cpu"))
    again = workspace.get("a", (2, 3), torch.float32, torch.device("cpu"))
    assert again.data_ptr() == first.data_ptr() and again.shape == (2, 3)
    assert workspace.get("b", (2,), torch.float32, torch.device("cpu")).data_ptr() != first.data_ptr()
    assert workspace.get("a", (5, 5), torch.float32, torch.device("cpu")).shape == (5, 5)


def test_unknown_scaling_and_polish_are_refused():
    with pytest.raises(UnknownNameError, match="schatten"):
        orthogonalize(randn(2, 2), scaling="schaten")
    with pytest.raises(OptionError, match="auto"):
        orthogonalize(randn(2, 2), polish="all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("side", [8, 64, 200])
def test_cubic_rows_keep_their_linear_part_in_every_dtype(dtype, side):
    # torch 2.13 ignores the beta of baddbmm on CPUs in half precision where alpha is 0.
    X = (randn(1, side, 2 * side) / side).to(dtype)
    table = coefficient_table("cubic", 8)
    result = iterate(X, table, **options("frobenius", 0), overwrite=False)
    expected = iterate_differentiable(X.double(), table, **options("frobenius", 0))
    assert (result.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["jordan", "polar_express", "you"])
@pytest.mark.parametrize("shape", [(1, 128, 200), (2, 130, 130)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 0.06)])
def test_large_matrices_follow_the_formulas_too(name, shape, dtype, tolerance):
    # Five steps amplify the rounding of bfloat16 (2^-8) about tenfold, in either form of the quadratic.
    X, table = randn(*shape).to(dtype), coefficient_table(name, 5)
    result = iterate(X, table, **options("frobenius", 0), overwrite=False)
    expected = iterate_differentiable(X.double(), table, **options("frobenius", 0))
    assert (result.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", ["jordan", "polar_express", "you", "cubic"])
@pytest.mark.parametrize("shape", [(2, 128, 256), (1, 400, 130), (2, 128, 255)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_two_steps_of_one_gram_matrix_are_two_steps(name, shape, steps):
    X, table = randn(*shape), coefficient_table(name, steps)
    expected = iterate_differentiable(X, table, **options("aol", 1))
    result = iterate(X, table, **options("aol", 1), overwrite=False, workspace=Workspace())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_paired_steps_in_bfloat16_are_as_close_as_single_ones(monkeypatch, power):
    # Small singular values are where a Gram matrix carried along would lose digits: 1 / k^2 falls to 6e-5.
    rows = torch.arange(1, 129).double().unsqueeze(-1) ** -power
    basis = random_orthogonal(128, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    X = (basis @ (rows * randn(128, 512)))[None].bfloat16()
    table = coefficient_table("jordan", 5)
    expected = iterate_differentiable(X.double(), table, **options("frobenius", 0))
    paired = iterate(X, table, **options("frobenius", 0), overwrite=False)
    monkeypatch.setattr(_iteration, "_PAIRED", 100)
    single = iterate(X, table, **options("frobenius", 0), overwrite=False)
    assert not torch.equal(paired, single)
    wrong, usual = (float((Y.double() - expected).norm() / expected.norm()) for Y in (paired, single))
    assert wrong < 2 * usual and wrong < 0.08


@pytest.mark.parametrize("shape", [(3, 40, 90), (3, 90, 40), (20, 32, 64)], ids=str)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("lent", [1, 1 << 30])
def test_fresh_and_lent_buffers_give_the_same(monkeypatch, shape, overwrite, lent):
    monkeypatch.setattr(_iteration, "_LENT", lent)
    X, table, workspace = randn(*shape), coefficient_table("jordan", 4), Workspace()
    expected = iterate_differentiable(X, table, **options("frobenius", 2))
    for _ in range(2):
        given_ = X.clone()
        result = iterate(given_, table, **options("frobenius", 2), overwrite=overwrite, workspace=workspace)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-11)
        assert overwrite or torch.equal(given_, X)
