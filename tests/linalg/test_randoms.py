"""Random orthogonal matrices: orthonormal to the last digit, and uniform."""

import pytest
import torch

from orthokit.errors import ShapeError
from orthokit.linalg import random_orthogonal


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5), (5, 1), (1, 1), (2, 3, 4, 6), (0, 4, 4), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shorter_side_is_orthonormal(shape, dtype):
    Q = random_orthogonal(*shape, generator=seeded(), dtype=dtype)
    assert Q.shape == shape and Q.dtype == dtype and Q.is_contiguous()
    wide = Q.double()
    gram = wide @ wide.mT if shape[-2] <= shape[-1] else wide.mT @ wide
    eye = torch.eye(gram.shape[-1], dtype=torch.float64).expand_as(gram)
    torch.testing.assert_close(gram, eye, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(4, 4), (2, 5), (5, 2)])
def test_moments_are_those_of_the_uniform_law(shape):
    # Haar: E q = 0, E q^2 = 1/n, E q^4 = 3 / (n (n + 2)) with n the longer side, and both determinants alike.
    count, n = 20_000, max(shape)
    Q = random_orthogonal(count, *shape, generator=seeded(1), dtype=torch.float64)
    # Five standard errors of a mean of `count` draws; entries are bounded by 1 and have these second moments.
    tolerance = 5 * count**-0.5
    assert Q.mean(0).abs().max() < tolerance * n**-0.5
    assert (Q.square().mean(0) - 1 / n).abs().max() < tolerance * (3 / (n * (n + 2))) ** 0.5
    assert (Q.pow(4).mean(0) - 3 / (n * (n + 2))).abs().max() < tolerance * (105 / n**4) ** 0.5
    assert (Q[:, 0, 0] * Q[:, 1, 1]).mean().abs() < tolerance / n


def test_both_determinants_and_the_trace_have_their_share():
    Q = random_orthogonal(20_000, 3, 3, generator=seeded(2), dtype=torch.float64)
    tolerance = 5 * 20_000**-0.5
    assert abs((torch.linalg.det(Q) > 0).double().mean() - 0.5) < tolerance / 2
    trace = Q.diagonal(dim1=-2, dim2=-1).sum(-1)
    # The trace of a Haar matrix has mean 0 and variance 1 (Diaconis and Shahshahani); a QR without signs has not.
    assert trace.mean().abs() < tolerance and abs(trace.var() - 1) < 2 * tolerance


def test_a_seed_repeats_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    assert torch.equal(random_orthogonal(4, 6, generator=seeded(3)), random_orthogonal(4, 6, generator=seeded(3)))
    assert not torch.equal(random_orthogonal(4, 6), random_orthogonal(4, 6))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(), (3,), (-1, 3), (2, -3)])
def test_shapes_that_are_no_matrix_are_refused(shape):
    with pytest.raises(ShapeError, match="out, in"):
        random_orthogonal(*shape)
