"""Butterfly factors: their structure written out, orthogonality, and how far their support reaches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit import linalg
from orthokit.errors import OptionError, ShapeError


def rotations(m, k, b, seed=0):
    g = torch.Generator().manual_seed(seed)
    return linalg.cayley(linalg.skew_part(torch.randn(m, k, b, b, generator=g, dtype=torch.float64)))


def reference(blocks):
    """The product of P_i^T Diag(blocks_i) P_i with permutation matrices from the definition: coordinates are coupled
    when their half-block numbers agree in every binary digit but digit i."""
    m, k, b = blocks.shape[:3]
    n, half = k * b, max(b // 2, 1)
    product = torch.eye(n, dtype=blocks.dtype)
    for i in range(m):
        number = torch.arange(n) // half
        digit = (number >> i) & 1
        rest = number - (digit << i)
        # Stable sort by the number without its digit i, then by that digit, then by place.
        order = sorted(range(n), key=lambda c: (int(rest[c]), int(digit[c]), c)) if i else list(range(n))
        P = torch.eye(n, dtype=blocks.dtype)[order]
        product = product @ P.T @ torch.block_diag(*blocks[i]) @ P
    return product


SIZES = [(1, 3, 4), (2, 2, 4), (3, 4, 4), (4, 8, 2), (3, 4, 6), (2, 6, 4), (1, 5, 3)]


@pytest.mark.parametrize(("m", "k", "b"), SIZES)
def test_equals_the_product_of_its_definition(m, k, b):
    blocks = rotations(m, k, b)
    expected = reference(blocks)
    X = torch.randn(5, k * b, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(linalg.butterfly_matrix(blocks), expected, atol=1e-12)
    assert torch.allclose(linalg.apply_butterfly(blocks, X), X @ expected, atol=1e-12)


@given(st.integers(0, 4), st.sampled_from([2, 4, 6]), st.integers(0, 20))
def test_orthogonal_and_dense_at_full_depth_but_not_before(levels, b, seed):
    k = 2**levels
    depth = linalg.butterfly_depth(k * b, b)
    assert depth == 1 + levels
    blocks = rotations(depth, k, b, seed)
    R = linalg.butterfly_matrix(blocks)
    assert torch.allclose(R.mT @ R, torch.eye(k * b, dtype=torch.float64), atol=1e-12)
    support = lambda m: (reference(torch.ones(m, k, b, b)) != 0).float().mean()  # noqa: E731
    assert float(support(depth)) == 1.0
    if depth > 1:
        assert float(support(depth - 1)) < 1.0


def test_one_factor_is_the_block_diagonal():
    blocks = rotations(1, 3, 4)
    assert torch.equal(linalg.butterfly_matrix(blocks), linalg.block_diagonal(blocks[0]))


@pytest.mark.parametrize(("dim", "b"), [(16, 4), (24, 4), (32, 2)])
def test_the_permutation_conjugates_a_factor_into_block_diagonal_form(dim, b):
    for i in range(linalg.butterfly_depth(dim, b)):
        p = linalg.butterfly_permutation(dim, i, block_size=b)
        assert sorted(p.tolist()) == list(range(dim))
        blocks = torch.eye(b, dtype=torch.float64).expand(i + 1, dim // b, b, b).clone()
        blocks[i] = rotations(1, dim // b, b)[0]
        F = linalg.butterfly_matrix(blocks)
        assert torch.allclose(F[p][:, p], linalg.block_diagonal(blocks[i]), atol=1e-12)


def test_gradients():
    blocks = rotations(2, 2, 4).requires_grad_()
    X = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(linalg.apply_butterfly, (blocks, X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_its_dtype(dtype):
    blocks, X = rotations(3, 4, 4), torch.randn(6, 16, dtype=torch.float64)
    Y = linalg.apply_butterfly(blocks.to(dtype), X.to(dtype))
    assert Y.dtype == dtype
    # Three factors, each rounding entries of size up to 4 a few times.
    assert float((Y.double() - linalg.apply_butterfly(blocks, X)).abs().max()) < 64 * torch.finfo(dtype).eps


def test_sizes_that_allow_no_such_factor_are_refused(unchecked):
    with pytest.raises(OptionError, match="must divide dim"):
        linalg.butterfly_depth(10, 4)
    with pytest.raises(OptionError, match="allow factors 0 to 1"):
        linalg.butterfly_permutation(24, 2, block_size=4)
    with pytest.raises(OptionError, match="allow factors 0 to 0"):
        linalg.apply_butterfly(torch.eye(3).expand(2, 4, 3, 3), torch.zeros(1, 12))
    with pytest.raises(ShapeError, match="cover 8"):
        linalg.apply_butterfly(torch.eye(4).expand(1, 2, 4, 4), torch.zeros(1, 12))
