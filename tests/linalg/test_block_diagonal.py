"""Blocks as a batch: the same result, gradients and merge as the dense block-diagonal matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit import linalg
from orthokit.errors import OptionError, ShapeError


def stacks(dim, b, seed=0, *, dtype=torch.float64):
    """Random blocks by the rule of block_sizes: the full ones in one stack, the remainder in another."""
    g = torch.Generator().manual_seed(seed)
    sizes = linalg.block_sizes(dim, b)
    counts = {size: sizes.count(size) for size in dict.fromkeys(sizes)}
    return [torch.randn(k, size, size, generator=g, dtype=torch.float64).to(dtype) for size, k in counts.items()]


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class TestSizes:
    @given(st.integers(1, 300), st.integers(1, 40))
    def test_every_coordinate_is_covered_and_only_the_last_block_may_be_smaller(self, dim, b):
        sizes = linalg.block_sizes(dim, b)
        assert sum(sizes) == dim and len(sizes) == -(-dim // b)
        assert all(size == b for size in sizes[:-1]) and 1 <= sizes[-1] <= b

    def test_sizes_below_one_are_refused(self):
        for dim, b in ((0, 4), (4, 0)):
            with pytest.raises(OptionError, match="block_size"):
                linalg.block_sizes(dim, b)


class TestApply:
    @given(st.integers(1, 24), st.integers(1, 8), st.integers(0, 5))
    def test_equals_the_dense_matrix(self, dim, b, rows):
        blocks, X = stacks(dim, b), randn(rows, dim)
        dense = linalg.block_diagonal(blocks)
        assert torch.allclose(linalg.apply_blocks(blocks, X), X @ dense, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (2, 0, 12)])
    def test_any_leading_dimensions(self, shape):
        (blocks,) = stacks(12, 4)
        X = randn(*shape)
        Y = linalg.apply_blocks(blocks, X)
        assert Y.shape == X.shape
        assert torch.allclose(Y, X @ linalg.block_diagonal(blocks), atol=1e-12)

    def test_strided_input(self):
        (blocks,) = stacks(12, 4)
        X = randn(12, 7).mT
        assert not X.is_contiguous()
        assert torch.allclose(linalg.apply_blocks(blocks, X), X @ linalg.block_diagonal(blocks), atol=1e-12)
        assert torch.allclose(linalg.apply_blocks(blocks.mT, X), X @ linalg.block_diagonal(blocks).mT, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_low_precision_keeps_its_dtype_and_rounds_like_a_product(self, dtype):
        (exact,) = stacks(16, 4)
        X = randn(5, 16)
        Y = linalg.apply_blocks(exact.to(dtype), X.to(dtype))
        assert Y.dtype == dtype
        # Inputs and the result are rounded once each, and the sum has four terms of size about one.
        scale = float(X.abs().max() * exact.abs().max()) * 4
        assert float((Y.double() - linalg.apply_blocks(exact, X)).abs().max()) <= 4 * scale * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dim", [8, 7])
    def test_gradients_of_rows_and_blocks(self, dim):
        blocks = [stack.requires_grad_() for stack in stacks(dim, 4)]
        X = randn(3, dim).requires_grad_()
        assert torch.autograd.gradcheck(lambda X, *blocks: linalg.apply_blocks(blocks, X), (X, *blocks))
        assert torch.autograd.gradgradcheck(lambda X, *blocks: linalg.apply_blocks(blocks, X), (X, *blocks))

    def test_orthogonal_blocks_keep_lengths(self):
        R = linalg.cayley(linalg.skew_part(randn(3, 4, 4)))
        X = randn(6, 12)
        assert torch.allclose(linalg.apply_blocks(R, X).norm(dim=-1), X.norm(dim=-1), rtol=1e-12)

    def test_sizes_that_do_not_fit_are_refused(self, unchecked):
        with pytest.raises(ShapeError, match="cover 10 coordinates; they cover 8"):
            linalg.apply_blocks(torch.eye(4).expand(2, 4, 4), torch.zeros(3, 10))
        with pytest.raises(ShapeError, match="square"):
            linalg.apply_blocks(torch.zeros(2, 4, 3), torch.zeros(3, 8))
        with pytest.raises(ShapeError, match="at least one stack"):
            linalg.apply_blocks([], torch.zeros(3, 8))


class TestMerge:
    @pytest.mark.parametrize(("m", "n"), [(8, 12), (12, 8), (8, 8), (10, 7)])
    def test_both_sides_equal_the_dense_products(self, m, n):
        W, left, right = randn(m, n), stacks(m, 4), stacks(n, 4, seed=2)
        expected = linalg.block_diagonal(left) @ W @ linalg.block_diagonal(right)
        assert torch.allclose(linalg.rotate_blocks(W, left=left, right=right), expected, atol=1e-12)
        assert torch.allclose(linalg.rotate_blocks(W, left=left), linalg.block_diagonal(left) @ W, atol=1e-12)
        assert linalg.rotate_blocks(W) is W

    def test_a_batch_of_weights_shares_blocks_or_has_its_own(self):
        W = randn(3, 8, 12)
        left, right = randn(3, 2, 4, 4, seed=2), randn(3, 3, 4, 4, seed=3)
        own = linalg.rotate_blocks(W, left=left, right=right)
        for i in range(3):
            assert torch.allclose(own[i], linalg.rotate_blocks(W[i], left=left[i], right=right[i]), atol=1e-12)
        shared = linalg.rotate_blocks(W, left=left[0], right=right[0])
        assert torch.allclose(shared[2], linalg.rotate_blocks(W[2], left=left[0], right=right[0]), atol=1e-12)
        assert torch.equal(linalg.block_diagonal(left)[1], linalg.block_diagonal(left[1]))

    def test_merged_weight_is_the_layer_with_rotated_inputs(self):
        (R,) = stacks(12, 4)
        W, X = randn(5, 12), randn(9, 12, seed=4)
        merged = linalg.rotate_blocks(W, right=R.mT)
        assert torch.allclose(linalg.apply_blocks(R, X) @ W.mT, X @ merged.mT, atol=1e-12)

    def test_orthogonal_merge_keeps_singular_values(self):
        W = randn(8, 12)
        L, R = linalg.cayley(linalg.skew_part(randn(2, 4, 4))), linalg.cayley(linalg.skew_part(randn(3, 4, 4)))
        kept = linalg.singular_values(linalg.rotate_blocks(W, left=L, right=R))
        assert torch.allclose(kept, linalg.singular_values(W), rtol=1e-12)

    def test_gradients_reach_weight_and_both_sides(self):
        W, L, R = randn(4, 6).requires_grad_(), randn(2, 2, 2).requires_grad_(), randn(2, 3, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda W, L, R: linalg.rotate_blocks(W, left=L, right=R), (W, L, R))

    def test_stacks_with_leading_dimensions_must_agree(self, unchecked):
        W = torch.zeros(3, 7, 7)
        with pytest.raises(ShapeError, match="leading dimensions"):
            linalg.rotate_blocks(W, right=[torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 3, 3)])
        with pytest.raises(ShapeError, match="share"):
            linalg.block_diagonal([torch.zeros(3, 1, 4, 4), torch.zeros(1, 3, 3)])
        with pytest.raises(ShapeError, match="cover 7"):
            linalg.rotate_blocks(W, left=torch.zeros(2, 3, 3))
