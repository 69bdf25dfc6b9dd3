"""Bare parameters read by their shape, and the check of gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from orthokit.errors import NonFiniteError, ParameterError
from orthokit.matrices import matrices
from orthokit.optim import block_by_shape
from orthokit.optim.blocks import check_gradients


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((4, 6), (4, 6)), ((2, 4, 6), (2, 4, 6)), ((8, 3, 5, 5), (8, 75)), ((8, 3, 2, 2, 2), (8, 24))],
)
def test_dimensions_decide(shape, matrix):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    block = block_by_shape("w", tensor)
    assert block.shape == matrix
    assert torch.equal(block.view(tensor), tensor.reshape(matrix))


@pytest.mark.parametrize("shape", [(), (3,), (1, 2, 3, 4, 5, 6)])
def test_other_dimensions_are_refused_with_the_way_out(shape):
    with pytest.raises(ParameterError, match=r"'norm\.weight'.*AdamW.*for_model"):
        block_by_shape("norm.weight", torch.zeros(shape))


def test_agrees_with_the_routing_of_plain_layers():
    for layer, name in ((nn.Linear(3, 4), "w"), (nn.Conv2d(3, 4, 2), "w"), (nn.Conv3d(3, 4, 2), "w")):
        assert block_by_shape(name, layer.weight).shape == matrices(layer)["weight"].shape


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    where=st.integers(0, 10_000),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]),
)
def test_one_bad_entry_anywhere_is_found(sizes, where, bad, dtype):
    pairs = [(f"p{i}", torch.ones(n, dtype=dtype)) for i, n in enumerate(sizes)]
    check_gradients(pairs)
    flat = [(name, grad, j) for name, grad in pairs for j in range(grad.numel())]
    if not flat:
        return
    name, grad, j = flat[where % len(flat)]
    grad[j] = bad
    with pytest.raises(NonFiniteError, match=f"'{name}'\\. No parameter was changed"):
        check_gradients(pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_finite_gradients_pass(dtype):
    # Their Euclidean norm overflows; they are finite all the same.
    check_gradients([("p", torch.full((50, 50), torch.finfo(dtype).max, dtype=dtype))])


def test_every_bad_parameter_is_named():
    nan = torch.tensor([float("nan")])
    with pytest.raises(NonFiniteError, match="'a', 'c'"):
        check_gradients([("a", nan), ("b", torch.ones(2)), ("c", nan)])


def test_nothing_to_check_is_fine():
    check_gradients([])
    check_gradients([("empty", torch.empty(0, 3))])
