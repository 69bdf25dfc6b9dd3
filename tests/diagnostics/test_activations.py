"""Activation geometry: against the published formulas in NumPy, their invariants, accuracy near zero, and errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics.activations import (
    activation_geometry,
    gram_distortion,
    linear_cka,
    pointwise,
    procrustes_residual,
    raw_distance,
    subspace_distance,
)
from orthokit.errors import DtypeError, NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import random_orthogonal

MEASURES = (activation_geometry, gram_distortion, linear_cka, pointwise, procrustes_residual, raw_distance)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(n, seed=0):
    return random_orthogonal(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(n, d, seed=0, change=0.5):
    X0 = gaussian(n, d, seed=seed) + gaussian(1, d, seed=seed + 1)
    return X0, X0 @ rotation(d, seed) + change * gaussian(n, d, seed=seed + 2)


def reference(X0, X1, rank, centre=True):
    """Raw, Procrustes, Gram, CKA and subspace distance as published: R formed, N x N Gram matrices, projectors."""
    X0, X1 = X0.double().numpy(), X1.double().numpy()
    Z0, Z1 = (X / np.linalg.norm(X, axis=1, keepdims=True) for X in (X0, X1))
    if centre:
        X0, X1 = X0 - X0.mean(0), X1 - X1.mean(0)
    U, _, Vt = np.linalg.svd(X1.T @ X0)
    P0, P1 = (V[:rank].T @ V[:rank] for V in (np.linalg.svd(X)[2] for X in (X0, X1)))
    norm = np.linalg.norm
    return {
        "raw": norm(X1 - X0) / norm(X0),
        "procrustes": norm(X1 @ U @ Vt - X0) / norm(X0),
        "gram": norm(Z1 @ Z1.T - Z0 @ Z0.T) / norm(Z0 @ Z0.T),
        "cka": norm(X0.T @ X1) ** 2 / (norm(X0.T @ X0) * norm(X1.T @ X1)),
        f"subspace_{rank}": norm(P0 - P1) / math.sqrt(2 * rank),
    }


@pytest.mark.parametrize(("n", "d"), [(40, 5), (12, 6), (9, 8), (6, 9), (4, 20), (2, 3), (30, 1)])
@pytest.mark.parametrize("centre", [True, False])
def test_every_measure_follows_its_definition(n, d, centre):
    X0, X1 = pair(n, d)
    rank = 1 if min(n, d) < 4 else 2
    expected = reference(X0, X1, rank, centre=centre)
    found = activation_geometry(X0, X1, centre=centre, ranks=[rank], few="flag").as_row()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-11), name
    alone = {
        "raw": raw_distance(X0, X1, centre=centre),
        "procrustes": procrustes_residual(X0, X1, centre=centre, few="flag"),
        "gram": gram_distortion(X0, X1),
        "cka": linear_cka(X0, X1, centre=centre),
        f"subspace_{rank}": subspace_distance(X0, X1, rank=rank, centre=centre),
    }
    assert {name: value.item() for name, value in alone.items()} == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert found["improvement"] == pytest.approx(found["raw"] - found["procrustes"], abs=1e-15)
    assert found["enough"] == (n >= 4 * d)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), d=st.integers(1, 10), seed=st.integers(0, 10**6), change=st.sampled_from([0.0, 0.1, 3.0]))
def test_bounds_and_symmetries(n, d, seed, change):
    X0, X1 = pair(n, d, seed, change)
    found = activation_geometry(X0, X1, few="flag")
    assert 0 <= found.procrustes <= found.raw and found.improvement >= 0
    assert 0 <= found.cka <= 1
    assert linear_cka(X1, X0).item() == pytest.approx(found.cka, rel=1e-9)
    assert all(math.isnan(value) or 0 <= value <= 1 for value in found.subspace.values())
    # The rotation of the finetuned activations may be any: only what is left counts.
    turned = activation_geometry(X0, X1 @ rotation(d, seed + 1), few="flag")
    for name in ("procrustes", "gram", "cka"):
        assert getattr(turned, name) == pytest.approx(getattr(found, name), rel=1e-7, abs=1e-7)
    together = activation_geometry(X0 @ rotation(d, seed), X1 @ rotation(d, seed), few="flag")
    assert together.raw == pytest.approx(found.raw, rel=1e-9)
    assert together.pointwise.cosine == pytest.approx(found.pointwise.cosine, abs=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize(("n", "d"), [(200, 16), (64, 16), (20, 16)])
def test_a_rotation_leaves_nothing_but_the_raw_distance(dtype, tolerance, n, d):
    X0 = gaussian(n, d) + 1
    X1 = (X0 @ rotation(d)).to(dtype)
    X0 = X0.to(dtype)
    found = activation_geometry(X0, X1, few="flag")
    assert found.procrustes < tolerance and found.gram < tolerance and 1 - found.cka < tolerance
    assert found.raw > 0.5 and found.improvement > 0.5 and found.subspace[max(1, min(n, d) // 4)] > 0.1
    assert procrustes_residual(X0, X1, few="flag").item() < tolerance
    assert gram_distortion(X0, X1).item() < tolerance


@pytest.mark.parametrize(("n", "rank", "few"), [(80, 3, "refuse"), (80, 1, "refuse"), (10, 3, "flag")])
def test_a_rotation_of_rank_deficient_activations_leaves_nothing_either(n, rank, few):
    # The cross product is singular here, so the rotation is not unique: the residual still is.
    X0 = gaussian(n, rank) @ gaussian(rank, 12, seed=1)
    assert procrustes_residual(X0, X0 @ rotation(12), few=few).item() < 1e-12
    wanted = reference(X0, 1.5 * X0 @ rotation(12) + 0.1 * gaussian(n, 1) @ gaussian(1, 12), 1)["procrustes"]
    other = 1.5 * X0 @ rotation(12) + 0.1 * gaussian(n, 1) @ gaussian(1, 12)
    assert procrustes_residual(X0, other, few=few).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("decades", [2, 4, 8, 12])
def test_ill_conditioned_activations_keep_the_promised_accuracy(decades):
    X0 = gaussian(200, 24) * 10 ** (-decades * torch.linspace(0, 1, 24, dtype=torch.float64))
    left = procrustes_residual(X0 @ rotation(24), X0 @ rotation(24, 1)).item()
    # Epsilon times the squared condition number, at most the root of epsilon.
    assert left < min(50 * 2.3e-16 * 10 ** (2 * decades), 5e-8)


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-4, 3e-3, 0.03, 1.0])
def test_the_residual_of_a_known_distortion_is_right_at_every_size(size):
    # Singular values grow by (1 + size) in one direction of two: the best rotation is the identity, exactly.
    X0 = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]] * 2, dtype=torch.float64)
    X1 = X0 * torch.tensor([1 + size, 1.0], dtype=torch.float64)
    found = procrustes_residual(X0, X1 @ rotation(2)).item()
    assert found == pytest.approx(size / math.sqrt(2), rel=1e-6, abs=5e-16)


@pytest.mark.parametrize("size", [1e-10, 1e-6, 1e-2])
def test_a_small_gram_distortion_is_resolved_after_a_rotation(size):
    X0 = torch.eye(2, dtype=torch.float64).repeat(10, 1)
    X1 = torch.tensor([[1.0, 0.0], [math.sin(size), math.cos(size)]], dtype=torch.float64).repeat(10, 1)
    # Half of the 400 cosines became sin(size); half of them were 1 before.
    assert gram_distortion(X0, X1 @ rotation(2)).item() == pytest.approx(math.sin(size), rel=1e-4)


@pytest.mark.parametrize("c", [0.5, 2.0, -3.0])
def test_a_scale_is_seen_by_procrustes_only(c):
    X = gaussian(60, 6)
    found = activation_geometry(X, c * X)
    # A rotation may turn everything over, so a negative factor costs as much as a positive one.
    assert found.procrustes == pytest.approx(abs(abs(c) - 1), rel=1e-10)
    assert found.raw == pytest.approx(abs(c - 1), rel=1e-10)
    assert found.gram < 1e-13 and found.cka == pytest.approx(1, abs=1e-13)
    assert max(found.subspace.values()) < 1e-12
    assert found.pointwise.log_norm_ratio == pytest.approx(abs(math.log(abs(c))), rel=1e-10)
    assert found.pointwise.cosine == pytest.approx(math.copysign(1, c))


def test_gram_distortion_of_all_rows_is_the_mean_of_what_draws_see():
    X0, X1 = pair(300, 4)
    whole = gram_distortion(X0, X1, rows=None).item()
    assert whole == pytest.approx(reference(X0, X1, 1)["gram"], rel=1e-10)
    draws = [gram_distortion(X0, X1, rows=100, seed=seed).item() for seed in range(20)]
    assert len(set(draws)) == 20 and np.mean(draws) == pytest.approx(whole, rel=0.05)
    assert gram_distortion(X0, X1, rows=100, seed=3).item() == draws[3]
    assert gram_distortion(X0, X1, rows=300).item() == whole == gram_distortion(X0, X1, seed=8).item()


def test_reducing_compares_the_best_approximations_and_still_ignores_a_rotation():
    X0, X1 = pair(24, 12)
    low = []
    for X in (X0, X1):
        X = X - X.mean(0)
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        low.append((U[:, :3] * S[:3]) @ Vh[:3])
    expected = reference(*low, 2, centre=False)
    found = activation_geometry(X0, X1, reduce=3, ranks=[2])
    assert found.enough and (found.samples, found.width) == (24, 3)
    for name in ("raw", "procrustes", "cka"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=1e-9), name
    assert procrustes_residual(X0, X1, reduce=3).item() == pytest.approx(expected["procrustes"], rel=1e-9)
    assert procrustes_residual(X0, X0 @ rotation(12), reduce=3).item() < 1e-12
    wide = gaussian(8, 30)
    assert procrustes_residual(wide, wide @ rotation(30), reduce=2).item() < 1e-12


def test_few_tokens_are_refused_or_flagged_because_rotations_fit_noise():
    X0, X1 = gaussian(20, 64), gaussian(20, 64, seed=1)
    for measure in (procrustes_residual, activation_geometry):
        with pytest.raises(ShapeError, match=r"comparing 64 dimensions .* 256; got 20\. Collect more, pass reduce=5"):
            measure(X0, X1)
        with pytest.raises(ShapeError, match=r"comparing 6 dimensions .* 24; got 20"):
            measure(X0, X1, reduce=6)
    found = activation_geometry(X0, X1, few="flag")
    assert not found.enough
    many = activation_geometry(gaussian(2000, 64), gaussian(2000, 64, seed=1))
    # Unrelated in truth (residual near sqrt 2); few tokens make them look related.
    assert found.procrustes < 0.75 * many.procrustes and found.cka > 5 * many.cka


def test_default_ranks_are_the_published_ones_where_they_fit():
    shapes = {(100, 8): [2], (300, 40): [32], (300, 65): [32, 64], (40, 3): [1], (300, 64): [32]}
    for (n, d), ranks in shapes.items():
        X0, X1 = pair(n, d)
        assert list(activation_geometry(X0, X1, ranks=None, few="flag").subspace) == ranks


def test_no_ranks_means_no_subspace_distances():
    X0, X1 = pair(60, 6)
    for reduce in (None, 3):
        assert activation_geometry(X0, X1, ranks=(), reduce=reduce).subspace == {}


def test_directions_that_are_not_there_have_no_distance():
    X0 = gaussian(60, 2) @ gaussian(2, 8, seed=1)
    found = activation_geometry(X0, X0, ranks=[2, 3])
    assert found.subspace[2] < 1e-7 and math.isnan(found.subspace[3])
    with pytest.raises(OptionError, match="at most the 2 directions"):
        subspace_distance(X0, X0, rank=3)


def test_small_subspace_angles_do_not_cancel():
    X0 = torch.diag(torch.tensor([3.0, 2.0, 1e-3], dtype=torch.float64))
    c, s = math.cos(1e-10), math.sin(1e-10)
    R = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    found = subspace_distance(X0, X0 @ R, rank=2, centre=False).item()
    assert found == pytest.approx(1e-10 / math.sqrt(2), rel=1e-4)


def test_pointwise_measures_follow_their_definitions_and_leave_zero_tokens_out():
    X0, X1 = gaussian(30, 5), gaussian(30, 5, seed=1)
    X0[3], X1[7] = 0, 0
    rows = [i for i in range(30) if i not in (3, 7)]
    cosines = [torch.nn.functional.cosine_similarity(X0[i], X1[i], dim=0).item() for i in rows]
    found = pointwise(X0, X1)
    assert found.tokens == 28
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.angle == pytest.approx(np.mean(np.arccos(cosines)))
    ratios = [abs(math.log((X1[i].norm() / X0[i].norm()).item())) for i in rows]
    assert found.log_norm_ratio == pytest.approx(np.mean(ratios))
    nobody = pointwise(torch.zeros(4, 2), torch.ones(4, 2))
    assert nobody.tokens == 0 and math.isnan(nobody.angle)
    tiny = pointwise(torch.tensor([[1.0, 0.0]] * 2).double(), torch.tensor([[1.0, 1e-11]] * 2).double())
    assert tiny.angle == pytest.approx(1e-11, rel=1e-6)


def test_constant_and_zero_activations_have_defined_answers():
    flat, X = torch.ones(20, 3), gaussian(20, 3, dtype=torch.float32)
    same = activation_geometry(flat, flat)
    assert same.raw == same.procrustes == 0 and math.isnan(same.cka) and math.isnan(same.subspace[1])
    zero = torch.zeros(20, 3)
    assert gram_distortion(zero, zero) == 0 and gram_distortion(X, zero).item() == pytest.approx(1)
    assert procrustes_residual(X, zero).item() == pytest.approx(1)
    assert math.isnan(linear_cka(X, flat))


def test_half_precision_non_contiguous_and_graph_inputs_are_taken():
    X0, X1 = pair(40, 5)
    found = procrustes_residual(X0.bfloat16(), X1.bfloat16())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(reference(X0.bfloat16(), X1.bfloat16(), 1)["procrustes"], rel=1e-6)
    assert procrustes_residual(X0, X1.float()).dtype == torch.float64
    turned = activation_geometry(X0.mT.contiguous().mT, X1.requires_grad_())
    assert turned.as_row() == pytest.approx(activation_geometry(X0, X1.detach()).as_row(), rel=1e-12)


def test_bad_input_is_named(unchecked):
    X = gaussian(20, 3)
    for measure in (*MEASURES, lambda *xs: subspace_distance(*xs, rank=1)):
        with pytest.raises(ShapeError, match=r"got 20 and 19 tokens\. Run both models on the same batches"):
            measure(X, X[1:])
        with pytest.raises(ShapeError, match="one width; got 3 and 2"):
            measure(X, X[:, 1:])
        with pytest.raises(ShapeError, match=r"X1 must have the shape \(tokens, width\); got \(1, 20, 3\)"):
            measure(X, X[None])
        with pytest.raises(ShapeError, match="at least two tokens"):
            measure(X[:1], X[:1])
        with pytest.raises(ShapeError, match="one dimension"):
            measure(X[:, :0], X[:, :0])
        with pytest.raises(NonFiniteError, match="X1 must be finite"):
            measure(X, X / 0)
        with pytest.raises(DtypeError, match="X0 must be real floating"):
            measure(X.long(), X)
        with pytest.raises(DtypeError, match="X1 must be real floating"):
            measure(X, X * 1j)
    for rows in (0, 1):
        with pytest.raises(OptionError, match="rows must be an integer >= 2"):
            gram_distortion(X, X, rows=rows)
    for rank in (0, 4):
        with pytest.raises(OptionError, match="rank must satisfy 1 <= rank <= min"):
            subspace_distance(X, X, rank=rank)
        with pytest.raises(OptionError, match="reduce must satisfy"):
            procrustes_residual(X, X, reduce=rank)
        with pytest.raises(OptionError, match="ranks must satisfy"):
            activation_geometry(X, X, ranks=[rank])
    for measure in (procrustes_residual, activation_geometry):
        with pytest.raises(UnknownNameError, match="did you mean 'flag'"):
            measure(X, X, few="flagged")
