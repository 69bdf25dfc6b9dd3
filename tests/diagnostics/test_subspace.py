"""Principal angles and subspace errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthokit.diagnostics.subspace import principal_angles, subspace_error, top_subspace
from orthokit.errors import NonFiniteError, OptionError, ShapeError, UnknownNameError
from orthokit.linalg import random_orthogonal


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 9), k=st.integers(1, 9), j=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_angles_equal_scipy_are_symmetric_and_rotation_invariant(n, k, j, seed):
    linalg = pytest.importorskip("scipy.linalg")
    U, V = gaussian(n, min(k, n), seed=seed), gaussian(n, min(j, n), seed=seed + 1)
    angles = principal_angles(U, V)
    expected = torch.from_numpy(linalg.subspace_angles(U.numpy(), V.numpy()).copy()).flip(0)
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-7)
    assert (angles.diff() >= -1e-12).all()
    torch.testing.assert_close(principal_angles(V, U), angles, rtol=0, atol=1e-9)
    Q = random_orthogonal(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(principal_angles(Q @ U, Q @ V), angles, rtol=0, atol=1e-9)


@pytest.mark.parametrize("angle", [1e-14, 1e-10, 1e-6, 1e-2, 0.5, math.pi / 4, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
def test_a_known_angle_is_found_at_every_size(angle):
    U = torch.eye(5, dtype=torch.float64)[:, :2]
    V = U.clone()
    V[0, 0], V[3, 0] = math.cos(angle), math.sin(angle)
    first, second = principal_angles(U, V).tolist()
    assert first == pytest.approx(0, abs=1e-15)
    assert second == pytest.approx(angle, rel=1e-9, abs=1e-16)


def test_equal_and_orthogonal_spans():
    U = gaussian(7, 3)
    assert principal_angles(U, U @ gaussian(3, 3, seed=1)).abs().max() < 1e-12
    E = torch.eye(6)
    assert principal_angles(E[:, :2], E[:, 3:]).tolist() == pytest.approx([math.pi / 2] * 2)


def test_batches_broadcast():
    U, V = gaussian(4, 6, 2), gaussian(6, 3, seed=2)
    angles = principal_angles(U, V)
    assert angles.shape == (4, 2)
    torch.testing.assert_close(angles[3], principal_angles(U[3], V))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_subspace_error_is_the_norm_of_the_difference_of_projectors(side, shape):
    X, Y = gaussian(3, *shape), gaussian(*shape, seed=1)
    for rank in (1, 2, 4):
        A, B = (top_subspace(Z, rank=rank, side=side) for Z in (X, Y))
        projectors = A @ A.mT - B @ B.mT
        expected = torch.linalg.matrix_norm(projectors, ord=2)
        torch.testing.assert_close(subspace_error(X, Y, rank=rank, side=side), expected, rtol=1e-9, atol=1e-9)


def test_subspace_error_ignores_scale_and_rotation():
    X, Y = gaussian(5, 5), gaussian(5, 5, seed=1)
    g = torch.Generator().manual_seed(2)
    Q, R = (random_orthogonal(5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    for side in ("left", "right"):
        before = subspace_error(X, Y, rank=2, side=side)
        torch.testing.assert_close(subspace_error(3 * Q @ X @ R, Q @ Y @ R, rank=2, side=side), before)
        torch.testing.assert_close(
            subspace_error(X.mT, Y.mT, rank=2, side="left"), subspace_error(X, Y, rank=2, side="right")
        )


def test_half_precision_is_computed_in_float32():
    X = gaussian(5, 4).bfloat16()
    assert subspace_error(X, X.float(), rank=2).dtype == torch.float32
    assert subspace_error(X, X.float(), rank=2) < 1e-5


def test_bad_input_is_named(unchecked):
    X = gaussian(4, 3)
    with pytest.raises(OptionError, match="linearly independent"):
        principal_angles(torch.ones(4, 2), X)
    with pytest.raises(OptionError, match="linearly independent"):
        principal_angles(torch.zeros(4, 1), X)
    with pytest.raises(ShapeError, match="columns"):
        principal_angles(X.mT, X)
    with pytest.raises(ShapeError, match="as many rows"):
        principal_angles(X, gaussian(5, 3))
    with pytest.raises(ShapeError, match="one shape"):
        subspace_error(X, X.mT, rank=1)
    with pytest.raises(OptionError, match="rank must satisfy"):
        subspace_error(X, X, rank=4)
    with pytest.raises(UnknownNameError, match="did you mean 'left'"):
        subspace_error(X, X, rank=1, side="lefd")
    with pytest.raises(NonFiniteError, match="X must be finite"):
        subspace_error(X * float("nan"), X, rank=1)
