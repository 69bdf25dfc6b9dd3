"""The parts of a Pion step: folded matrices, maps as polynomials, weights finer than their dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthokit.errors import OptionError, UnknownNameError
from orthokit.linalg import cayley, cayley_neumann, exp_taylor, packed_size, polish_orthogonal
from orthokit.linalg._workspace import Workspace
from orthokit.optim import Pion, _pion_skew, _pion_step
from orthokit.optim._pion_halves import halved_product, unfold_halves
from orthokit.optim._pion_maps import cayley_change, check_map, gram_coefficients, map_coefficients
from orthokit.optim._pion_skew import fold, skew_product, unfold
from orthokit.optim._pion_state import fine_weight, split_weight


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skew(*shape: int, seed: int = 0) -> Tensor:
    X = randn(*shape, seed=seed)
    return X - X.mT


@pytest.mark.parametrize("tile", [2, 3, 192])
@given(b=st.integers(1, 13), count=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_folding_is_exact_and_holds_every_number_once(tile, b, count, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pion_skew, "_TILE", tile)
        S = skew(count, b, b, seed=seed)
        packed = fold(S)
        assert packed.shape == (count, packed_size(b))
        assert torch.equal(unfold(packed, b), S)
        squares = S * S
        assert torch.equal(unfold(fold(squares), b, sign=1), squares)
        torch.testing.assert_close(2 * packed.square().sum(), squares.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 7, 3), (3, 5, 5), (1, 401, 8), (2, 129, 3)], ids=str)
def test_skew_product_is_the_folded_difference(shape, turn):
    P, Q = randn(*shape), randn(*shape, seed=1)
    out = P.new_empty(shape[0], packed_size(shape[1]))
    skew_product(P, Q, out, Workspace(), turn=turn)
    torch.testing.assert_close(unfold(out, shape[1]), P @ Q.mT - Q @ P.mT)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("b", [2, 3, 8, 9, 400])
def test_blocks_of_a_matrix_multiply_as_the_whole(b, turn):
    P, Q, workspace = randn(1, b, 3), randn(1, b, 3, seed=1), Workspace()
    packed = P.new_empty(1, packed_size(b))
    halved_product(P, Q, packed, workspace, turn=turn, right=(P.mT, Q.mT))
    S = P @ Q.mT - Q @ P.mT
    torch.testing.assert_close(unfold(packed, b), S)
    blocks = unfold_halves(packed, b, torch.float64, workspace, "A")
    assert torch.equal(blocks.to(torch.float64), unfold(packed, b))
    for X, left in ((randn(1, b, 5, seed=2), True), (randn(1, 5, b, seed=2), False)):
        expected = S @ X if left else X @ S
        torch.testing.assert_close(blocks.times(X, torch.full_like(X, torch.nan), left=left), expected)
        torch.testing.assert_close(blocks.times(X, X.clone(), left=left, add=True), X + expected)


@pytest.mark.parametrize("shape", [(160, 144), (40, 800)], ids=str)
def test_the_rate_of_products_decides_on_the_way_and_not_on_the_result(monkeypatch, shape):
    results, ways = {}, {}
    for rate in (1e6, 1e15):
        turns = ways[rate] = set()
        monkeypatch.setattr(_pion_step, "core_rate", lambda dtype, group, rate=rate: rate)
        for name, whole in (("skew_product", skew_product), ("halved_product", halved_product)):

            def noted(*args: Tensor, whole=whole, turns=turns, turn: bool, **options) -> Tensor:
                turns.add(turn)
                return whole(*args, turn=turn, **options)

            monkeypatch.setattr(_pion_step, name, noted)
        W = torch.nn.Parameter(randn(*shape))
        optimizer = Pion([W], lr=0.02)
        for step in range(3):
            W.grad = randn(*shape, seed=step + 1)
            optimizer.step()
        results[rate] = W.detach()
    # Both sides of the first shape have 128 rows or more; at the shorter one of the second nothing is transposed.
    assert ways == {1e6: {True, min(shape) >= 128}, 1e15: {False}}
    torch.testing.assert_close(results[1e6], results[1e15], rtol=0, atol=1e-12)


def polynomial(coefficients: tuple[float, ...], A: Tensor) -> Tensor:
    return sum((c * torch.linalg.matrix_power(A, k) for k, c in enumerate(coefficients)), torch.zeros_like(A))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("polish", [0, 1, 2])
def test_coefficients_are_those_of_the_maps_in_linalg(order, polish):
    A = 0.3 * skew(6, 6) / 6
    for name, factor in (
        ("exp_taylor", exp_taylor(A, order=order)),
        ("cayley_neumann", cayley_neumann(A / 2, terms=order)),
    ):
        found = polynomial(map_coefficients(name, order, polish), A)
        torch.testing.assert_close(found, polish_orthogonal(factor, steps=polish), rtol=0, atol=1e-13)


def test_gram_coefficients_show_the_order_of_the_error():
    assert gram_coefficients(map_coefficients("exp_taylor", 2, 0)) == pytest.approx([1, 0, 0, 0, 0.25])
    # One product more than order 2 buys four powers of the angle: x^6 / 64 instead of x^4 / 4.
    assert gram_coefficients(map_coefficients("cayley_neumann", 2, 0)) == pytest.approx([1, 0, 0, 0, 0, 0, -1 / 64])


@pytest.mark.parametrize("side", ["in", "out"])
def test_cayley_change_is_that_of_the_product_with_the_transform(side):
    W, Q = randn(2, 5, 5), skew(2, 5, 5, seed=1)
    expected = W @ cayley(Q) if side == "in" else cayley(Q) @ W
    torch.testing.assert_close(W + cayley_change(W, Q, side), expected)


@pytest.mark.parametrize(
    ("given_map", "error"),
    [
        (("exp", 2, 0), UnknownNameError),
        (("exp_taylor", 0, 0), OptionError),
        (("exp_taylor", 2, 3), OptionError),
        (("exp_taylor", 2, -1), OptionError),
        (("cayley", 2, 1), OptionError),
    ],
    ids=str,
)
def test_maps_that_are_none_are_refused(given_map, error):
    with pytest.raises(error):
        check_map(*given_map)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, torch.int16), (torch.float16, torch.float32)], ids=str)
@given(seed=st.integers(0, 200), scale=st.sampled_from([1e-3, 0.02, 1.0, 300.0]))
@settings(deadline=None, max_examples=30)
def test_a_weight_and_its_residual_are_the_float32_weight(dtype, bits, seed, scale):
    fine = scale * randn(3, 4, 5, seed=seed, dtype=torch.float32)
    fine[0, 0] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2**-8])  # the last one is a tie
    weight, residual = torch.empty(3, 4, 5, dtype=dtype), torch.zeros(3, 4, 5, dtype=bits)
    split_weight(fine, weight, residual)
    assert torch.equal(weight, fine.to(dtype))
    found = fine_weight(weight, residual)
    # A tie loses the last of 24 bits.
    torch.testing.assert_close(found, fine, rtol=2**-23, atol=0)
    assert (found == fine).float().mean() > 0.95
