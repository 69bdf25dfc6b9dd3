"""Every map, one battery: derivatives, batches, dtypes, strides, and the norm of the exact error."""

import pytest
import torch

from orthokit import linalg

MAPS = {
    "cayley": linalg.cayley,
    "exp": linalg.exp,
    **{f"cayley_neumann {k}": (lambda Q, k=k: linalg.cayley_neumann(Q, terms=k)) for k in (1, 2, 3, 4, 5, 8)},
    **{f"exp_taylor {p}": (lambda Q, p=p: linalg.exp_taylor(Q, order=p)) for p in (1, 2, 3, 4, 6)},
    "polished": lambda Q: linalg.polish_orthogonal(linalg.exp_taylor(Q, order=2), steps=2),
}
EVERY = pytest.mark.parametrize("map", list(MAPS.values()), ids=list(MAPS))


def skew(b, *, norm, batch=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    Q = linalg.skew_part(torch.randn(*batch, b, b, generator=g, dtype=torch.float64))
    return Q * norm / linalg.singular_values(Q)[..., :1, None]


@EVERY
def test_first_and_second_derivatives(map):
    v = linalg.pack_skew(skew(4, norm=0.6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: map(linalg.unpack_skew(v)), (v,))
    assert torch.autograd.gradgradcheck(lambda v: map(linalg.unpack_skew(v)), (v,))


def test_the_inverse_cayley_transform_is_differentiable():
    v = linalg.pack_skew(skew(4, norm=0.6)).requires_grad_()
    call = lambda v: linalg.pack_skew(linalg.inverse_cayley(linalg.cayley(linalg.unpack_skew(v))))  # noqa: E731
    assert torch.autograd.gradcheck(call, (v,))
    (jacobian,) = torch.autograd.functional.jacobian(call, (v,))
    assert torch.allclose(jacobian, torch.eye(6, dtype=torch.float64), atol=1e-10)


@EVERY
@pytest.mark.parametrize("batch", [(3,), (2, 3), (0,), (1, 1, 1)])
def test_a_batch_is_its_matrices_one_by_one(map, batch):
    Q = skew(5, norm=0.4, batch=batch)
    R = map(Q)
    assert R.shape == Q.shape
    for one, each in zip(R.reshape(-1, 5, 5), Q.reshape(-1, 5, 5), strict=True):
        assert torch.allclose(one, map(each), atol=1e-14)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_the_exact_value_of_the_rounded_generator_to_rounding(map, dtype):
    Q = skew(16, norm=0.5, batch=(2,)).to(dtype)
    R = map(Q)
    # Up to eight products of matrices of norm about 1, each rounding sums of 16 terms.
    assert R.dtype == dtype
    assert float((R.double() - map(Q.double())).abs().max()) < 8 * torch.finfo(dtype).eps


@EVERY
def test_gradients_in_low_precision_are_finite_and_near_the_exact_ones(map):
    Q = skew(8, norm=0.5)
    C = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        q = Q.to(dtype, copy=True).requires_grad_()
        (map(q) * C.to(dtype)).sum().backward()
        assert q.grad is not None and q.grad.dtype == dtype
        gradients.append(q.grad.double())
    scale = float(gradients[0].norm())
    assert float((gradients[1] - gradients[0]).norm()) < 1e-5 * scale
    assert float((gradients[2] - gradients[0]).norm()) < 0.1 * scale


@EVERY
def test_strided_input_and_the_smallest_sizes(map):
    Q = skew(6, norm=0.5)
    assert torch.allclose(map(Q.mT), map(Q.mT.contiguous()), atol=1e-14)
    assert torch.allclose(map(-Q), map(Q).mT, atol=1e-14)
    assert map(torch.zeros(1, 1)).tolist() == [[1.0]]
    assert torch.equal(map(torch.zeros(3, 3)), torch.eye(3))
    assert map(torch.zeros(2, 0, 0)).shape == (2, 0, 0)


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("k", range(1, 7))
def test_the_orthogonality_error_of_the_series_is_the_published_closed_form(k, theta):
    R = linalg.cayley_neumann(skew(8, norm=theta), terms=k)
    error = float(torch.linalg.matrix_norm(R.mT @ R - torch.eye(8, dtype=torch.float64), 2))
    square = theta ** (2 * k + 2)
    expected = square if k % 2 == 0 else abs(2 * theta ** (k + 1) + (-square if k % 4 == 3 else square))
    assert error == pytest.approx(expected, rel=1e-6, abs=1e-14)
