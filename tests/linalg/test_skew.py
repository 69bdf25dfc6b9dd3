"""Packing by gathers: against the scatter it replaces, with its derivatives, transforms and caches."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from orthokit.linalg import _skew_places, pack_skew, packed_size, unpack_skew
from orthokit.linalg._skew_places import _kept_sources, _kept_upper

# torch compiles a helper of its own with the deprecated torch.jit.script when forward mode is first used.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def vectors(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)


def scattered(v, b):
    """The definition: the strict upper triangle filled row by row, less its transpose."""
    rows, columns = torch.triu_indices(b, b, offset=1)
    upper = v.new_zeros(*v.shape[:-1], b, b)
    upper[..., rows, columns] = v
    return upper - upper.mT


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex128]
)
@pytest.mark.parametrize("b", [1, 2, 3, 8, 33])
def test_equals_the_scatter_bit_for_bit(b, dtype, kept, monkeypatch):
    monkeypatch.setattr(_skew_places, "_LARGEST_KEPT", 100 if kept else 0)
    v = vectors(2, 3, packed_size(b)).abs().to(dtype)
    Q = unpack_skew(v)
    assert Q.dtype == dtype and torch.equal(Q, scattered(v, b))
    assert torch.equal(pack_skew(Q), v)
    # Neither needs a contiguous input.
    turned = v.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(unpack_skew(turned), Q)
    assert torch.equal(pack_skew(Q.mT.contiguous().mT), v)


def test_only_the_strict_upper_triangle_is_packed():
    X = vectors(4, 4)
    assert torch.equal(pack_skew(X), pack_skew(X.triu(1)))
    assert torch.equal(pack_skew(X), X[*torch.triu_indices(4, 4, offset=1)])


@pytest.mark.parametrize("batch", [(), (0,), (2, 0)])
def test_empty_batches_and_matrices(batch):
    assert unpack_skew(torch.zeros(*batch, 6)).shape == (*batch, 4, 4)
    assert pack_skew(torch.zeros(*batch, 4, 4)).shape == (*batch, 6)
    assert pack_skew(torch.zeros(*batch, 0, 0)).shape == pack_skew(torch.zeros(*batch, 1, 1)).shape == (*batch, 0)
    assert torch.equal(unpack_skew(torch.zeros(*batch, 0)), torch.zeros(*batch, 1, 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_at_its_place(bad):
    Q = unpack_skew(torch.tensor([bad, 1.0, 2.0]))
    assert Q.isfinite().tolist() == [[True, False, True], [False, True, True], [True, True, True]]
    assert torch.equal(Q.diagonal(), torch.zeros(3))


@forward_mode
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 0)])
def test_first_and_second_derivatives(shape):
    v = vectors(*shape).requires_grad_()
    b = 4 if shape[-1] else 1
    Q = vectors(*shape[:-1], b, b).requires_grad_()
    # A power, so that the second derivative is not zero.
    for call, X in ((lambda v: unpack_skew(v) ** 3, v), (lambda Q: pack_skew(Q) ** 3, Q)):
        assert torch.autograd.gradcheck(call, (X,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, (X,))


def test_the_gradients_are_the_transposed_maps():
    v, Q = vectors(2, 10).requires_grad_(), vectors(2, 5, 5).requires_grad_()
    G, g = vectors(2, 5, 5), vectors(2, 10)
    assert torch.equal(torch.autograd.grad(unpack_skew(v), v, G)[0], pack_skew(G - G.mT))
    assert torch.equal(torch.autograd.grad(pack_skew(Q), Q, g)[0], scattered(g, 5).triu(1))


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    v = vectors(3, 10).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pack_skew(unpack_skew(v))
    assert not kept


@forward_mode
def test_transforms_and_the_index_they_leave_behind():
    v = vectors(5, 6)
    Q = scattered(v, 4)
    quartic = lambda x: (unpack_skew(x) ** 4).sum()  # noqa: E731
    transforms = [
        lambda: (torch.func.vmap(unpack_skew)(v), Q),
        lambda: (torch.func.vmap(unpack_skew, in_dims=1)(v.T.contiguous()), Q),
        lambda: (torch.func.vmap(pack_skew)(Q), v),
        lambda: (torch.func.jvp(unpack_skew, (v,), (2 * v,))[1], 2 * Q),
        lambda: (torch.func.jvp(pack_skew, (Q,), (2 * Q,))[1], 2 * v),
        lambda: (torch.func.vmap(torch.func.grad(quartic))(v), 8 * v**3),
        lambda: (torch.func.hessian(quartic)(v[0]), torch.diag(24 * v[0] ** 2)),
        lambda: (torch.func.jacfwd(pack_skew)(Q[0]), torch.func.jacrev(pack_skew)(Q[0])),
        lambda: (torch.func.jacfwd(unpack_skew)(v[0]), torch.func.jacrev(unpack_skew)(v[0])),
    ]
    for transform in transforms:
        _kept_sources.cache_clear()
        _kept_upper.cache_clear()
        for _ in range(2):  # the second time with the index that the first has left
            found, expected = transform()
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # a few roundings of powers
        assert torch.equal(unpack_skew(v), Q) and torch.equal(pack_skew(Q), v)


def test_an_index_is_made_once_and_a_fake_one_is_never_kept():
    _kept_sources.cache_clear()
    with FakeTensorMode():
        assert unpack_skew(torch.zeros(2, 6)).shape == (2, 4, 4)
    assert _kept_sources.cache_info().currsize == 0
    with torch.inference_mode():
        unpack_skew(torch.ones(6))
    v = torch.ones(6, requires_grad=True)
    (unpack_skew(v) ** 2).sum().backward()
    assert torch.equal(v.grad, torch.full((6,), 4.0))
    assert _kept_sources.cache_info().misses == 1


def test_meta_tensors_have_shapes():
    assert pack_skew(unpack_skew(torch.zeros(2, 6, device="meta"))).shape == (2, 6)
