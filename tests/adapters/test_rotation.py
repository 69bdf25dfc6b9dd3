"""Packed generators to rotations: the maps of linalg, with gradients by hand."""

import pytest
import torch

from orthokit.adapters._rotation import SkewMap, packed_rotation
from orthokit.errors import OptionError, UnknownNameError
from orthokit.linalg import cayley, cayley_neumann, exp, exp_taylor, packed_size, unpack_skew

SPECS = [
    *(SkewMap("cayley_neumann", k, 1) for k in range(1, 8)),
    *(SkewMap("exp_taylor", 1, p) for p in range(1, 7)),
    SkewMap("cayley", 1, 1),
    SkewMap("exp", 1, 1),
]


def reference(v, spec):
    """The same through the library's maps and torch's own differentiation."""
    Q = unpack_skew(v)
    if spec.map == "cayley_neumann":
        return cayley_neumann(Q, terms=spec.terms)
    if spec.map == "exp_taylor":
        return exp_taylor(Q, order=spec.order)
    return cayley(Q) if spec.map == "cayley" else exp(Q)


def generators(b, k=3, size=0.3, dtype=torch.float64):
    g = torch.Generator().manual_seed(b)
    return (size * torch.randn(k, packed_size(b), generator=g, dtype=torch.float64)).to(dtype).requires_grad_()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_rotation_and_gradient_are_those_of_the_map(spec, recompute):
    v = generators(6)
    weights = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = packed_rotation(v, 6, spec, recompute=recompute), reference(v, spec)
    # A handful of products of numbers near 1 in float64; the largest powers reach 1e3.
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((R * weights).sum(), v, retain_graph=True)[0] for R in (ours, theirs)]
    assert torch.allclose(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spec", [SkewMap("cayley_neumann", 3, 1), SkewMap("cayley_neumann", 4, 1), SPECS[-2]], ids=str)
def test_gradient_by_finite_differences(spec):
    assert torch.autograd.gradcheck(lambda v: packed_rotation(v, 4, spec), (generators(4, k=2),))


def test_gradient_of_three_terms_is_the_published_formula():
    v = generators(5, k=2)
    G = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = torch.autograd.grad(packed_rotation(v, 5, SkewMap("cayley_neumann", 3, 1)), v, G)[0]
    Q = unpack_skew(v.detach())
    second = G @ Q.mT + Q.mT @ G
    dQ = 2 * (G + second) + (2 * Q.mT + (Q @ Q).mT) @ second + (2 * G + second) @ (Q @ Q).mT
    rows, columns = torch.triu_indices(5, 5, offset=1)
    assert torch.allclose(ours, (dQ - dQ.mT)[:, rows, columns], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_follows_the_double_result(dtype):
    v = generators(8, size=0.05)
    double = packed_rotation(v, 8, SkewMap("cayley_neumann", 4, 1))
    low = packed_rotation(v.detach().to(dtype), 8, SkewMap("cayley_neumann", 4, 1))
    assert low.dtype == dtype
    assert float((low.double() - double).detach().abs().max()) < 8 * torch.finfo(dtype).eps


def test_one_coordinate_cannot_turn():
    v = torch.zeros(4, 0, dtype=torch.float64, requires_grad=True)
    assert torch.equal(packed_rotation(v, 1, SPECS[0]), torch.ones(4, 1, 1, dtype=torch.float64))


def test_nan_goes_on_instead_of_crashing_the_solver():
    v = torch.full((1, 3), torch.nan)
    assert packed_rotation(v, 3, SkewMap("cayley", 1, 1)).isnan().any()


def test_three_terms_are_singular_at_a_quarter_turn_and_four_are_not():
    v = torch.tensor([[1.0]], dtype=torch.float64)
    assert float(torch.linalg.svdvals(packed_rotation(v, 2, SkewMap("cayley_neumann", 3, 1))).max()) < 1e-15
    assert float(torch.linalg.svdvals(packed_rotation(v, 2, SkewMap("cayley_neumann", 4, 1))).min()) > 1


def test_bad_maps_are_refused():
    with pytest.raises(UnknownNameError, match="cayley"):
        SkewMap("cayly", 3, 4)
    with pytest.raises(OptionError, match="at least 1"):
        SkewMap("cayley_neumann", 0, 4)
