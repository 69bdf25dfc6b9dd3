"""Permutations: gathers both ways, inverse of each other, refused when they are none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit import linalg
from orthokit.errors import DtypeError, OptionError, ShapeError


def permutation(n, seed=0):
    return linalg.random_permutation(n, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 30), st.integers(0, 100))
def test_inverse_undoes(n, seed):
    p = permutation(n, seed)
    q = linalg.inverse_permutation(p)
    x = torch.arange(n)
    assert torch.equal(x[p][q], x) and torch.equal(x[q][p], x)
    assert torch.equal(linalg.inverse_permutation(q), p)


def test_equal_seeds_give_equal_permutations_and_all_are_likely():
    assert torch.equal(permutation(50, 3), permutation(50, 3))
    drawn = [tuple(permutation(3, seed).tolist()) for seed in range(600)]
    counts = [drawn.count(p) for p in set(drawn)]
    # 100 each are expected; six standard deviations of a binomial count are 55.
    assert len(counts) == 6 and min(counts) > 45 and max(counts) < 155
    assert sorted(linalg.random_permutation(4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("dim", [-1, 0, 1, -2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_permute_is_indexing_along_any_dimension(dim, dtype):
    X = torch.arange(5 * 6 * 4).reshape(5, 6, 4).to(dtype)
    p = permutation(X.shape[dim])
    Y = linalg.permute(X, p, dim=dim)
    assert Y.dtype == dtype and torch.equal(Y, X.movedim(dim, 0)[p].movedim(0, dim))
    assert torch.equal(linalg.permute(Y, linalg.inverse_permutation(p), dim=dim), X)


def test_the_four_identities_of_permutation_matrices():
    """Psi = I[p]: Psi W takes rows p, Psi^T W rows p^-1, W Psi columns p^-1, W Psi^T columns p."""
    p = permutation(6)
    q = linalg.inverse_permutation(p)
    Psi, W = torch.eye(6, dtype=torch.float64)[p], torch.randn(6, 6, dtype=torch.float64)
    assert torch.equal(Psi @ W, linalg.permute(W, p, dim=0))
    assert torch.equal(Psi.T @ W, linalg.permute(W, q, dim=0))
    assert torch.equal(W @ Psi, linalg.permute(W, q))
    assert torch.equal(W @ Psi.T, linalg.permute(W, p))


# torch compiles a helper of its own with the deprecated torch.jit.script when forward mode is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("given_inverse", [True, False])
@pytest.mark.parametrize("dim", [-1, 0])
def test_first_and_second_derivatives(given_inverse, dim):
    X = torch.randn(4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = permutation(4)
    q = linalg.inverse_permutation(p) if given_inverse else None
    call = lambda X: linalg.permute(X, p, q, dim=dim) ** 3  # noqa: E731 - a power, so that the second derivative is not 0
    assert torch.autograd.gradcheck(call, (X,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (X,))


def test_the_gradient_is_the_gather_by_the_inverse_and_keeps_no_copy_of_the_input():
    saved = []
    X, p = torch.randn(3, 8, requires_grad=True), permutation(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Y = linalg.permute(X, p)
    g = torch.randn(3, 8)
    (gradient,) = torch.autograd.grad(Y, X, g)
    assert torch.equal(gradient, g[:, linalg.inverse_permutation(p)])
    assert saved and not any(t.is_floating_point() for t in saved)


def test_works_under_vmap_and_func_grad():
    X, p = torch.randn(5, 3, 4), permutation(4)
    assert torch.equal(torch.func.vmap(lambda x: linalg.permute(x, p, linalg.inverse_permutation(p)))(X), X[..., p])
    gradient = torch.func.grad(lambda x: (linalg.permute(x, p, linalg.inverse_permutation(p)) * X[0]).sum())(X[0])
    assert torch.allclose(gradient, X[0][..., linalg.inverse_permutation(p)])


@pytest.mark.parametrize("bad", [[0, 0, 1], [0, 1, 3], [-1, 0, 1]])
def test_what_is_no_permutation_is_refused(bad):
    with pytest.raises(OptionError, match="permutation"):
        linalg.inverse_permutation(torch.tensor(bad))
    with pytest.raises(OptionError, match="permutation"):
        linalg.permute(torch.zeros(3, requires_grad=True), torch.tensor(bad))


def test_wrong_types_and_lengths_are_refused(unchecked):
    with pytest.raises(DtypeError, match="int64"):
        linalg.permute(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ShapeError, match="one dimension"):
        linalg.inverse_permutation(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ShapeError, match="length of dimension"):
        linalg.permute(torch.zeros(3), torch.arange(4))
    with pytest.raises(ShapeError, match="length of dimension 2"):
        linalg.permute(torch.zeros(3), torch.arange(3), dim=2)
    with pytest.raises(ShapeError, match="inverse"):
        linalg.permute(torch.zeros(3), torch.arange(3), torch.arange(4))
    with pytest.raises(OptionError, match="at least 0"):
        linalg.random_permutation(-1)
