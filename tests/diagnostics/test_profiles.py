"""Weight-space profiles: against the published formulas in float64, their identities, and every error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics import stable_rank
from orthokit.diagnostics.profiles import (
    adaptation_profile,
    fluctuation,
    retention_drift,
    retention_profile,
    singular_vector_alignment,
    thin_svd,
    weight_profiles,
)
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import random_orthogonal

SHAPES = [(6, 6), (9, 4), (4, 9), (1, 5), (5, 1), (1, 1)]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(n, seed=0):
    return random_orthogonal(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(W0, W):
    """Retention, drift and adaptation by their definitions: k by k product, loops, NumPy."""
    U, S, Vh = np.linalg.svd(W0.double().numpy(), full_matrices=False)
    W0, W = W0.double().numpy(), W.double().numpy()
    P = np.diag(U.T @ W @ Vh.T)
    E = [np.linalg.norm((W - W0) @ v) for v in Vh]
    return torch.tensor(P), torch.tensor(np.abs(P - S)), torch.tensor(E)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_profiles_follow_their_definitions(shape, shared):
    W0 = gaussian(*shape)
    W = W0 + 0.3 * gaussian(*shape, seed=1)
    svd = thin_svd(W0) if shared else None
    P, drift, E = reference(W0, W)
    # The conditioning of singular vectors of 9 x 9 Gaussian matrices costs two or three digits.
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(retention_profile(W0, W, svd=svd), P, **close)
    torch.testing.assert_close(retention_drift(W0, W, svd=svd), drift, **close)
    torch.testing.assert_close(adaptation_profile(W0, W, svd=svd), E, **close)
    found = weight_profiles(W0, W, svd=svd)
    torch.testing.assert_close(found.change, torch.linalg.matrix_norm(W - W0))
    torch.testing.assert_close(found.singular_values, torch.linalg.svdvals(W0))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_thin_svd_reproduces_its_matrix_either_way_round(shape):
    W = gaussian(2, *shape)
    U, S, Vh = thin_svd(W)
    torch.testing.assert_close(U @ (S[..., None] * Vh), W)
    torch.testing.assert_close(S, torch.linalg.svdvals(W))
    k = min(shape)
    torch.testing.assert_close(U.mT @ U, torch.eye(k, dtype=W.dtype).expand(2, k, k))
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(k, dtype=W.dtype).expand(2, k, k))


def test_many_runs_share_one_pretrained_matrix_and_batches_go_pairwise():
    W0 = gaussian(5, 7)
    W = W0 + gaussian(3, 2, 5, 7, seed=1)
    found = weight_profiles(W0, W, svd=thin_svd(W0))
    assert all(part.shape == (3, 2, 5) for part in (found.retention, found.drift, found.adaptation))
    assert found.singular_values.shape == (3, 2, 5) and found.change.shape == (3, 2)
    torch.testing.assert_close(found.adaptation[2, 1], adaptation_profile(W0, W[2, 1]))
    pairs = gaussian(3, 5, 7, seed=2)
    batch = weight_profiles(pairs, W[:, 0], svd=thin_svd(pairs))
    torch.testing.assert_close(batch.retention[1], retention_profile(pairs[1], W[1, 0]))
    torch.testing.assert_close(
        singular_vector_alignment(pairs, W[:, 0])[2], singular_vector_alignment(pairs[2], W[2, 0])
    )


def test_memory_layout_does_not_matter():
    W0, W = gaussian(7, 10)[:, ::2].mT, gaussian(7, 5, seed=1).mT
    assert not W0.is_contiguous() and not W.is_contiguous()
    torch.testing.assert_close(retention_profile(W0, W), retention_profile(W0.contiguous(), W.contiguous()))


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 10**6), size=st.sampled_from([1e-6, 1.0, 1e3])
)
def test_invariants_hold_for_every_shape(out, width, seed, size):
    W0, delta = gaussian(out, width, seed=seed), size * gaussian(out, width, seed=seed + 1)
    found = weight_profiles(W0, W0 + delta)
    energy = torch.linalg.matrix_norm(W0 + delta - W0).square()
    written = found.adaptation.square().sum()
    assert written <= energy * (1 + 1e-9)
    if width <= out:
        torch.testing.assert_close(written, energy, rtol=1e-9, atol=0)
    # Cauchy-Schwarz: u^T D v is at most ||D v||.
    assert (found.drift <= found.adaptation * (1 + 1e-9) + 1e-15).all()
    # Rotating inputs and outputs of both takes the singular frame along.
    A, B = rotation(out, seed), rotation(width, seed + 1)
    turned = weight_profiles(A @ W0 @ B, A @ (W0 + delta) @ B)
    for one, other in ((found.drift, turned.drift), (found.adaptation, turned.adaptation)):
        gaps = found.singular_values.diff().abs()
        if not len(gaps) or gaps.min() > 1e-3:  # otherwise the frame itself is ill-determined
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9 * size)


def test_nothing_changed_means_singular_values_and_zeros():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        W = gaussian(6, 4, dtype=dtype)
        found = weight_profiles(W, W)
        assert torch.equal(found.retention, found.singular_values)
        assert not found.drift.any() and not found.adaptation.any() and found.change == 0


def test_scaling_drifts_in_proportion_and_negation_turns_over():
    W0 = gaussian(5, 8)
    found = weight_profiles(W0, 1.25 * W0)
    torch.testing.assert_close(found.drift, 0.25 * found.singular_values)
    torch.testing.assert_close(retention_profile(W0, -W0), -found.singular_values)


def test_a_tiny_drift_is_resolved_where_the_difference_of_profiles_would_cancel():
    W0 = gaussian(40, 30, dtype=torch.float32)
    # One in the last bit of some entries: far below the rounding error of u^T W v.
    W = torch.where(torch.arange(1200).reshape(40, 30) % 7 == 0, torch.nextafter(W0, torch.tensor(9.0)), W0)
    U, S, Vh = thin_svd(W0)
    exact = (U.double() * ((W.double() - W0.double()) @ Vh.double().mT)).sum(-2).abs()
    torch.testing.assert_close(retention_drift(W0, W).double(), exact, rtol=1e-3, atol=1e-5 * exact.max().item())
    naive = ((U * (W @ Vh.mT)).sum(-2) - S).abs().double()
    assert (naive - exact).abs().max() > exact.max()


def test_rank_deficient_and_zero_pretrained_matrices_have_profiles():
    W0 = gaussian(6, 2) @ gaussian(2, 5, seed=1)
    W = W0 + gaussian(6, 5, seed=2)
    found = weight_profiles(W0, W, svd=thin_svd(W0))
    torch.testing.assert_close(found.adaptation.square().sum(), (W - W0).square().sum())
    zero = weight_profiles(torch.zeros(3, 2), torch.ones(3, 2), svd=thin_svd(torch.zeros(3, 2)))
    assert not zero.singular_values.any()
    torch.testing.assert_close(zero.adaptation.square().sum(), torch.tensor(6.0))
    assert weight_profiles(torch.zeros(3, 2), torch.zeros(3, 2)).change == 0


def test_an_update_of_low_rank_has_low_stable_rank():
    delta = gaussian(12, 3) @ gaussian(3, 9, seed=1)
    assert 1 <= stable_rank(delta) <= 3 + 1e-9


def test_half_precision_is_computed_in_float32_and_takes_an_svd_of_full_precision():
    W0, W = gaussian(8, 6, dtype=torch.float32), gaussian(8, 6, seed=1, dtype=torch.float32)
    half = W0.bfloat16()
    exact = weight_profiles(half.float(), W)
    found = weight_profiles(half, W.float(), svd=thin_svd(half.double()))
    assert found.retention.dtype == torch.float32
    torch.testing.assert_close(found.adaptation, exact.adaptation, rtol=1e-4, atol=1e-4)
    assert weight_profiles(half, W, svd=thin_svd(W0)).drift.shape == (6,)  # the SVD before rounding is close enough


def test_alignment_sees_a_turn_of_the_inputs_on_the_right_only():
    W0 = torch.diag(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64))
    R = rotation(3, seed=4)
    torch.testing.assert_close(singular_vector_alignment(W0, W0 @ R), R.diagonal().abs(), rtol=0, atol=1e-12)
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(singular_vector_alignment(W0, W0 @ R, side="left", svd=thin_svd(W0)), one)
    torch.testing.assert_close(singular_vector_alignment(W0, R @ W0), one)
    torch.testing.assert_close(singular_vector_alignment(W0, R @ W0, side="left"), R.diagonal().abs())
    assert (singular_vector_alignment(gaussian(20, 20).float(), gaussian(20, 20).float()) <= 1).all()


def fluctuation_reference(x, width):
    padded = np.pad(x, width // 2, mode="reflect")
    average = np.convolve(padded, np.ones(width) / width, mode="valid")
    return np.abs(x - average).mean()


@settings(max_examples=40, deadline=None)
@given(
    x=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=20),
    width=st.sampled_from([1, 3, 5, 7]),
    shift=st.floats(-10, 10),
)
def test_fluctuation_follows_its_definition_and_ignores_a_shift(x, width, shift):
    values = torch.tensor(x, dtype=torch.float64)
    found = fluctuation(values, width=width)
    assert found.item() == pytest.approx(fluctuation_reference(np.array(x), width), rel=1e-9, abs=1e-9)
    assert fluctuation(values + shift, width=width).item() == pytest.approx(found.item(), rel=1e-9, abs=1e-9)
    assert fluctuation(-3 * values, width=width).item() == pytest.approx(3 * found.item(), rel=1e-9, abs=1e-9)


def test_fluctuation_of_a_constant_is_exactly_zero_and_batches_are_rows():
    assert fluctuation(torch.full((3, 11), 0.1)).tolist() == [0, 0, 0]
    x = gaussian(2, 3, 9)
    torch.testing.assert_close(fluctuation(x)[1, 2], fluctuation(x[1, 2]))
    assert fluctuation(x.bfloat16()).dtype == torch.float32
    assert fluctuation(gaussian(1), width=1) == 0


def test_bad_input_is_named(unchecked):
    W = gaussian(4, 3)
    for profile in (weight_profiles, retention_profile, retention_drift, adaptation_profile, singular_vector_alignment):
        with pytest.raises(ShapeError, match=r"one shape; got \(4, 3\) and \(3, 4\)\. Compare the same layer"):
            profile(W, W.mT)
        with pytest.raises(NonFiniteError, match="W must be finite"):
            profile(W, W / 0)
        with pytest.raises(NonFiniteError, match="W0 must be finite"):
            profile(W * float("nan"), W)
        with pytest.raises(OptionError, match="not the SVD of this W0"):
            profile(W, W, svd=thin_svd(W.flip(0)))
        with pytest.raises(ShapeError, match="svd must be thin_svd"):
            profile(W, W, svd=thin_svd(W[:, :2]))
        with pytest.raises(ShapeError, match="svd must be thin_svd"):
            profile(W, W, svd=torch.linalg.svd(W, full_matrices=True))
    with pytest.raises(ShapeError, match="at least 2 dimensions"):
        retention_profile(W[0], W)
    with pytest.raises(ShapeError, match="at least one row"):
        retention_profile(W[:0], W[:0])
    with pytest.raises(DtypeError, match="W0 must be floating"):
        retention_profile(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2))
    with pytest.raises(DtypeError, match="W must be real"):
        retention_profile(W, W * 1j)
    with pytest.raises(UnknownNameError, match="did you mean 'right'"):
        singular_vector_alignment(W, W, side="rigth")
    for width in (0, 4, -1):
        with pytest.raises(OptionError, match="odd integer"):
            fluctuation(W[0], width=width)
    with pytest.raises(ShapeError, match="more than width // 2 = 3"):
        fluctuation(W[0], width=7)
    with pytest.raises(DtypeError, match="x must be real floating"):
        fluctuation(torch.arange(9))
    with pytest.raises(NonFiniteError, match="x must be finite"):
        fluctuation(torch.full((9,), float("nan")))
